"""How good a trained model is: held-out ELBO, importance-weighted log-likelihood, bits/dim, active units."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelib import noise
from vaelib._validation import check_int, check_number
from vaelib.data import ImageSet
from vaelib.likelihoods import bits_per_dim
from vaelib.objectives import gaussian_log_density
from vaelib.vae import VAE, Posterior, evaluating, given_labels, heldout_elbo


@dataclass(frozen=True)
class Evaluation:
    """Means over a held-out set, in nats per image; standard errors are over images.

    Attributes:
        elbo: the mean ELBO; `elbo_standard_error` its standard error.
        expected_log_likelihood: its likelihood term, minus the distortion.
        kl: its KL term, the rate.
        bits_per_dim: of the ELBO; None where x is continuous.
        log_likelihood: importance-weighted estimate of log p(x) from `num_samples` draws; None where it was not asked for.
        num_images: how many images it was measured on.
        elbo_samples: draws of z per image for the ELBO.
        num_samples: draws of z per image for `log_likelihood`.
        seed: of the noise.
        normalized: False if the model's score is no likelihood: then `elbo` bounds no log p(x).
    """

    elbo: float
    elbo_standard_error: float
    expected_log_likelihood: float
    kl: float
    bits_per_dim: float | None
    log_likelihood: float | None
    log_likelihood_standard_error: float | None
    num_images: int
    elbo_samples: int
    num_samples: int
    seed: int
    normalized: bool

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def standard_error(values: Tensor) -> float:
    """Standard deviation over images, divided by the square root of their number; 0 for a single image."""
    return (values.double().std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def evaluate(
    model: VAE, images: ImageSet, num_samples: int = 0, elbo_samples: int = 10, batch_size: int = 1000, seed: int = 0
) -> Evaluation:
    """The held-out ELBO with its terms and, with `num_samples` above 0, the importance-weighted log-likelihood.

    Args:
        images: the held-out set.
        num_samples: draws per image for the importance-weighted estimate (the field reports 5000); 0 leaves it out.
        elbo_samples: draws per image for the ELBO.
        batch_size: images per chunk; the result does not depend on it.
    """
    check_int("num_samples", num_samples, minimum=0)
    terms = heldout_elbo(model, images, elbo_samples, batch_size, seed)
    elbo = terms.elbo.double().mean().item()
    estimate = log_likelihood(model, images, num_samples, seed=seed) if num_samples else None
    discrete = model.likelihood.values is not None
    return Evaluation(
        elbo=elbo,
        elbo_standard_error=standard_error(terms.elbo),
        expected_log_likelihood=terms.log_likelihood.double().mean().item(),
        kl=terms.kl.double().mean().item(),
        bits_per_dim=bits_per_dim(elbo, math.prod(model.image_shape), model.likelihood) if discrete else None,
        log_likelihood=None if estimate is None else estimate.double().mean().item(),
        log_likelihood_standard_error=None if estimate is None else standard_error(estimate),
        num_images=len(terms.elbo),
        elbo_samples=elbo_samples,
        num_samples=num_samples,
        seed=seed,
        normalized=model.likelihood.normalized,
    )


def log_likelihood(
    model: VAE, images: ImageSet | Tensor, num_samples: int = 5000, batch_size: int = 100, sample_batch: int = 100, seed: int = 0
) -> Tensor:
    """Importance-weighted estimate of log p(x) of each image: (N,), nats, on the CPU. eq. importance-weighted-bound

    Memory is bounded: batch_size * sample_batch codes are decoded at once. The result depends on neither number, nor on the
    order of the images. Burda, Grosse and Salakhutdinov 2016.

    Raises:
        ValueError: If the model's score is no likelihood.
    """
    check_int("num_samples", num_samples)
    check_int("sample_batch", sample_batch)
    if not model.likelihood.normalized:
        raise ValueError(f"model: got the score {model.likelihood.config['name']!r}, expected a likelihood; it defines no log p(x)")
    estimates = []
    with evaluating(model):
        for bound, x, keys in given_labels(model, images, batch_size, seed):
            total = torch.full((len(x),), -math.inf, dtype=torch.float64)  # on the CPU: MPS has no float64
            for start in range(0, num_samples, sample_batch):
                count = min(sample_batch, num_samples - start)
                eps = noise.normal_noise(keys, (count, model.latent_dim), noise.LATENT, start * model.latent_dim)
                log_weights = bound.log_weights(x, count, eps.transpose(0, 1), validate=False)
                total = torch.logaddexp(total, torch.logsumexp(log_weights, dim=0).cpu().double())
            estimates.append((total - math.log(num_samples)).float())
    return torch.cat(estimates)


def posteriors(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Posterior:
    """q(z given x) of each image, in chunks: mean and log_var, each (N, latent_dim), on the CPU. Nothing is sampled from it.

    Where the likelihood binarizes, its noise belongs to the image (`vaelib.noise`): the same image has the same code in every chunk.
    For a `HierarchicalVAE` it is q along the path of the means.
    """
    with evaluating(model):
        parts = [[part.cpu() for part in bound.encode(x)] for bound, x, _ in given_labels(model, images, batch_size, seed)]
    return Posterior(*(torch.cat(part) for part in zip(*parts, strict=True)))


def posterior_means(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """The posterior mean of each image: (N, latent_dim), on the CPU."""
    return posteriors(model, images, batch_size, seed).mean


def active_units(model: VAE, images: ImageSet | Tensor, threshold: float = 0.01, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """Which latent dimensions the posterior mean moves in: Var over images of E[z given x] above the threshold, bool (L,).

    eq. active-units. Burda, Grosse and Salakhutdinov 2016, section 5.
    """
    check_number("threshold", threshold)
    if len(images if isinstance(images, Tensor) else images.pixels) < 2:
        raise ValueError("images: got one image, expected at least two: a variance over images is asked for")
    return posterior_means(model, images, batch_size, seed).var(0) > threshold


def kl_per_unit(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """The mean over images of each latent unit's KL: (L,), nats, on the CPU. Their sum is the mean rate. eq. gaussian-kl

    A unit at 0 carries nothing: its posterior has collapsed onto the prior.
    """
    total = torch.zeros(model.latent_dim, dtype=torch.float64)
    with evaluating(model):
        for bound, x, keys in given_labels(model, images, batch_size, seed):
            eps = noise.normal_noise(keys, (1, model.latent_dim), noise.LATENT).transpose(0, 1)
            total += bound.elbo(x, 1, eps, validate=False).kl_per_unit.sum(0).cpu().double()
    return (total / len(images)).float()


class RateDecomposition(NamedTuple):
    """The mean rate split in two, in nats, each with its standard error over the draws. eq. rate-decomposition"""

    mutual_information: float
    marginal_kl: float
    mutual_information_standard_error: float
    marginal_kl_standard_error: float


def rate_decomposition(model: VAE, images: ImageSet | Tensor, num_draws: int = 2000, seed: int = 0) -> RateDecomposition:
    """What the codes tell of the images, and what the prior misses of the codes.

    The rate is I(x; z) + KL(q(z) || p(z)) with the aggregate posterior q(z), the mean of q(z given x) over the N images. Estimated
    from one code each of the first `num_draws` images in random order; log q(z) is a log-sum-exp over all N posteriors.
    The mutual information cannot exceed log N. Hoffman and Johnson 2016. eq. aggregate-posterior, eq. rate-decomposition

    Raises:
        ValueError: For a model whose prior is not N(0, I) in one piece, such as a hierarchical one.
    """
    means, log_vars, codes = [], [], []
    with evaluating(model):
        for bound, x, keys in given_labels(model, images, 1000, seed):
            eps = noise.normal_noise(keys, (1, model.latent_dim), noise.LATENT).transpose(0, 1)
            z, posterior, prior = bound.infer(x, 1, eps, None, False)
            if prior is not None:
                raise ValueError("model: got one with a learned prior, expected one whose prior is N(0, I)")
            for kept, value in zip((means, log_vars, codes), (*posterior, z), strict=True):
                kept.append(value[0].cpu().double())
    mean, log_var, z = torch.cat(means), torch.cat(log_vars), torch.cat(codes)
    chosen = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[: check_int("num_draws", num_draws)]
    precision = (-log_var).exp()
    constant = (mean.square() * precision + log_var).sum(1) + model.latent_dim * math.log(2 * math.pi)  # (N,)
    own, marginal, under_prior = [], [], []
    for these in chosen.split(200):
        squares = z[these].square() @ precision.T - 2 * z[these] @ (mean * precision).T + constant  # -2 log q(z_m given x_n), (M, N)
        marginal.append(torch.logsumexp(-0.5 * squares, 1) - math.log(len(z)))
        own.append(gaussian_log_density(z[these], mean[these], log_var[these]))
        under_prior.append(gaussian_log_density(z[these], torch.zeros_like(z[these]), torch.zeros_like(z[these])))
    information, gap = torch.cat(own) - torch.cat(marginal), torch.cat(marginal) - torch.cat(under_prior)
    return RateDecomposition(information.mean().item(), gap.mean().item(), standard_error(information), standard_error(gap))
