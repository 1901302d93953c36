"""vaelib: variational autoencoders, small enough to read in an evening and tested against exact answers.

The modules follow the book: `data`, `likelihoods`, `objectives`, `densities`, `networks`, `vae`, `hierarchical`, `conditional`, `training`,
`evaluation`, `predictive`, `generation`, `priors`, `diffusion`, `retrieval`, `quality`, `factors`. `book` serves its pages, `checks` its
exercises, `cli` the command line.
"""

import importlib
from typing import Any

from vaelib.book.two_layer import TwoLayerVAE, two_layer_vae
from vaelib.coding import BitsBack, Message, compress, decompress
from vaelib.conditional import ConditionalVAE, conditional_vae
from vaelib.config import TrainConfig
from vaelib.data import DataNotFoundError, ImageSet, image_set, load_images, minibatches, train_valid_split
from vaelib.densities import Draw, Posterior, StandardNormal, kl_divergence, register_kl, reparameterize
from vaelib.evaluation import (
    Evaluation,
    active_units,
    evaluate,
    importance_weighted_estimate,
    kl_per_unit,
    log_likelihood,
    posterior_means,
    rate_decomposition,
)
from vaelib.generation import generate, interpolate, latent_grid, reconstruct
from vaelib.heldout import heldout_elbo
from vaelib.hierarchical import HierarchicalVAE, hierarchical_vae
from vaelib.likelihoods import (
    Bernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    GreyBCENotALikelihood,
    Likelihood,
    bits_per_dim,
    register_likelihood,
)
from vaelib.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from vaelib.objectives import (
    ElboTerms,
    beta_elbo,
    doubly_reparameterized_bound,
    effective_sample_size,
    free_bits_kl,
    gaussian_kl,
    gaussian_kl_per_unit,
    gaussian_log_density,
    importance_weighted_bound,
    loss,
)
from vaelib.quantize import (
    VQVAE,
    CodeUsage,
    code_maps,
    code_usage,
    fit_code_prior,
    gaussian_tokens,
    kmeans_start,
    perplexity,
    vq_vae,
)
from vaelib.retrieval import LatentIndex, Neighbours, nearest_neighbours
from vaelib.storage import load, released, save
from vaelib.training import History, fit
from vaelib.vae import VAE, conv_vae, mlp_vae, register_model

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "VQVAE",
    "Bernoulli",
    "BitsBack",
    "CodeUsage",
    "ConditionalVAE",
    "ConvDecoder",
    "ConvEncoder",
    "DataNotFoundError",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Draw",
    "ElboTerms",
    "Evaluation",
    "Gaussian",
    "GreyBCENotALikelihood",
    "HierarchicalVAE",
    "History",
    "ImageSet",
    "LatentIndex",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
    "Message",
    "Neighbours",
    "Posterior",
    "StandardNormal",
    "TrainConfig",
    "TwoLayerVAE",
    "active_units",
    "beta_elbo",
    "bits_per_dim",
    "checks",
    "code_maps",
    "code_usage",
    "compress",
    "conditional_vae",
    "conv_vae",
    "decompress",
    "diffusion",
    "doubly_reparameterized_bound",
    "effective_sample_size",
    "evaluate",
    "factors",
    "fit",
    "fit_code_prior",
    "free_bits_kl",
    "gaussian_kl",
    "gaussian_kl_per_unit",
    "gaussian_log_density",
    "gaussian_tokens",
    "generate",
    "heldout_elbo",
    "hierarchical_vae",
    "image_set",
    "importance_weighted_bound",
    "importance_weighted_estimate",
    "interpolate",
    "kl_divergence",
    "kl_per_unit",
    "kmeans_start",
    "latent_grid",
    "load",
    "load_images",
    "log_likelihood",
    "loss",
    "minibatches",
    "mlp_vae",
    "nearest_neighbours",
    "perplexity",
    "plotting",
    "posterior_means",
    "priors",
    "quality",
    "quantize",
    "rate_decomposition",
    "reconstruct",
    "register_kl",
    "register_likelihood",
    "register_model",
    "released",
    "reparameterize",
    "save",
    "train_valid_split",
    "two_layer_vae",
    "vq_vae",
    "widgets",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Modules that are imported when they are first used: matplotlib costs half a second."""
    if name in ("priors", "diffusion", "quality", "factors", "checks", "cli"):
        return importlib.import_module(f"vaelib.{name}")
    if name in ("plotting", "tables", "widgets", "oracles", "ledger", "reproduce"):
        return importlib.import_module(f"vaelib.book.{name}")
    raise AttributeError(f"module 'vaelib' has no attribute {name!r}")
