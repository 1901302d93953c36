"""vaelib: variational autoencoders, small enough to read in an evening and tested against exact answers.

The modules follow the book: `data`, `likelihoods`, `objectives`, `networks`, `vae`, `training`, `generation`, `evaluation`,
`plotting`, `cli`.
"""

import importlib
from typing import Any

from vaelib.data import DataNotFoundError, ImageSet, image_set, load_images, minibatches, train_valid_split
from vaelib.evaluation import Evaluation, active_units, evaluate, log_likelihood, posterior_means
from vaelib.generation import generate, interpolate, latent_grid, reconstruct
from vaelib.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, GreyBCENotALikelihood, Likelihood, bits_per_dim
from vaelib.networks import MLPDecoder, MLPEncoder
from vaelib.objectives import ElboTerms, beta_elbo, gaussian_kl, gaussian_log_density, importance_weighted_bound, loss
from vaelib.storage import load, save
from vaelib.training import History, TrainConfig, fit
from vaelib.vae import VAE, Posterior, heldout_elbo, mlp_vae, reparameterize

__version__ = "0.1.0"

__all__ = [
    "VAE", "Bernoulli", "DataNotFoundError", "DiscretizedLogistic", "ElboTerms", "Evaluation", "Gaussian", "GreyBCENotALikelihood",
    "History", "ImageSet", "Likelihood", "MLPDecoder", "MLPEncoder", "Posterior", "TrainConfig", "active_units", "beta_elbo",
    "bits_per_dim", "evaluate", "fit", "gaussian_kl", "gaussian_log_density", "generate", "heldout_elbo", "image_set",
    "importance_weighted_bound", "interpolate", "latent_grid", "load", "load_images", "log_likelihood", "loss", "minibatches",
    "mlp_vae", "plotting", "posterior_means", "reconstruct", "reparameterize", "save", "train_valid_split",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`vaelib.plotting` and `vaelib.oracles` are imported when they are first used: matplotlib costs half a second."""
    if name in ("plotting", "oracles", "ledger", "cli"):
        return importlib.import_module(f"vaelib.{name}")
    raise AttributeError(f"module 'vaelib' has no attribute {name!r}")
