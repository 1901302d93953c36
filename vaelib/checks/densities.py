"""Judges of a prior or a posterior of one's own: does `log_prob` integrate to 1, and is it the density of what `sample` draws?

Both questions are answered by importance sampling. The proposal lies around the student's own draws, half of it narrowly and half of it
widely, so that it reaches what `log_prob` holds possible, whether `sample` draws it or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import describe
from vaelib.checks.verdicts import check_same, fail, tensor_from, verdict

DRAWS, CENTRES = 20_000, 400  # of the proposal; and draws of the student's around which half of it lies
SURE = 6.0  # standard errors


def heavy(num: int, dim: int) -> Tensor:
    """Draws (num, L) of Student's distribution with 5 degrees of freedom."""
    return torch.distributions.StudentT(5.0).sample((num, dim)).double()


def heavy_log_prob(z: Tensor) -> Tensor:
    """Its log-density: (..., L) -> (...)."""
    value: Tensor = torch.distributions.StudentT(5.0).log_prob(z).sum(-1)
    return value


def proposal(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Places z (DRAWS, L) around the draws (M, L), and the log-density of the proposal at them."""
    centres, dim = draws[:CENTRES], draws.shape[1]
    middle, wide = draws.mean(0), 2 * draws.std(0) + 1e-3
    narrow = wide * CENTRES ** (-1 / (dim + 4))
    half = DRAWS // 2
    near = centres[torch.randint(len(centres), (half,))] + narrow * heavy(half, dim)
    z = torch.cat([near, middle + wide * heavy(DRAWS - half, dim)])
    around = []
    for part in z.split(1000):
        pairs = torch.ones(len(part), len(centres), dtype=z.dtype)
        for unit in range(dim):  # one over the density is (1 + t^2 / 5)^3, up to a constant: no logarithm of each pair
            pairs *= 1 + ((part[:, unit, None] - centres[:, unit]) / narrow[unit]).square() / 5
        around.append(pairs.reciprocal().pow(3).mean(1).log())
    parts = [
        torch.cat(around) + heavy_log_prob(torch.zeros(dim, dtype=z.dtype)) - narrow.log().sum(),
        heavy_log_prob((z - middle) / wide) - wide.log().sum(),
    ]
    return z, torch.stack(parts).logsumexp(0) - math.log(2)


def features(z: Tensor) -> Tensor:
    """Bounded functions whose means tell densities apart: (M, L) -> (M, F)."""
    generator = torch.Generator().manual_seed(1)
    waves = torch.cat([scale * torch.randn(z.shape[1], 12, generator=generator, dtype=z.dtype) for scale in (0.5, 1.5)], 1)
    phases = z @ waves
    return torch.cat([phases.sin(), phases.cos()], 1)


def check_draws(what: str, draws: Tensor, log_prob: Callable[[Tensor], Tensor]) -> None:
    """Fails unless `log_prob`, (M, L) -> (M,), integrates to 1 and is the density of `draws` (M, L)."""
    draws = draws.double()
    middle, spread = draws.mean(0), draws.std(0) + 1e-6
    z, log_proposal = proposal(draws)
    log_weights = log_prob(z.float()).double() - log_proposal
    if log_weights.isnan().any():
        fail(f"{what}.log_prob gives NaN at {z[log_weights.isnan()][0].tolist()}")
    total = (log_weights.logsumexp(0) - math.log(len(z))).item()
    weights = (log_weights - log_weights.max()).exp()
    error = (weights.std() / weights.mean() / math.sqrt(len(z))).item()  # of the integral, relative
    if error > 0.2 and total < math.log(2):
        where = "it holds likely what sample does not draw, or next to nothing of what it draws"
        fail(f"{what}: log_prob and sample lie apart: {where}", "sample")
    if error > 0.2 or abs(math.expm1(total)) > SURE * error + 1e-3:
        reasons = "a constant or a log-determinant is wrong, or sample leaves a part out"
        told = f"{what}.log_prob integrates to {math.exp(total):.4g}, expected 1: {reasons}"
        by_two_pi = abs(total - draws.shape[1] / 2 * math.log(2 * math.pi)) < SURE * error + 1e-3
        fail(f"{told}{'; here it is the 2 pi of the Gaussian' if by_two_pi else ''}", "unnormalized")
    expected, values = features((draws - middle) / spread), features((z - middle) / spread)
    share = weights[:, None] / weights.sum()
    found = (share * values).sum(0)
    errors = ((share * (values - found)).square().sum(0) + expected.var(0) / len(draws)).sqrt()
    if ((found - expected.mean(0)).abs() / errors).max() > SURE:
        fail(f"{what}: sample does not draw from the density that log_prob gives", "sample")


def check_log_prob(what: str, density: Any, z: Tensor) -> None:
    """Fails unless log_prob of z (K, N, L) is (K, N), one draw's apart from the others', with a gradient in z."""
    z = z.detach().clone().requires_grad_()
    found = tensor_from(f"{what}.log_prob{tuple(z.shape)}", density.log_prob, z)
    if found.shape != z.shape[:2]:
        expected = f"expected {tuple(z.shape[:2])}: a log-density of each code, summed over its units"
        fail(f"{what}.log_prob of z {tuple(z.shape)} has shape {tuple(found.shape)}, {expected}", "shape")
    alone = tensor_from(f"{what}.log_prob", density.log_prob, z[:1].detach())
    check_same(f"{what}.log_prob of one draw, against the same among others", alone.detach(), found[:1].detach())
    if not found.requires_grad or torch.autograd.grad(found.sum(), z, allow_unused=True)[0] is None:
        fail(f"{what}.log_prob has no gradient in z: training and annealing follow it", "detached")


@verdict
def check_prior(prior: Any, latent_dim: int) -> str:
    """Judges p(z): ``log_prob(z)``, (K, N, L) -> (K, N), nats, and ``sample(num, generator)``, (num, L), as `VAE.prior` is asked.

    `latent_dim` should be small, at most 8: build your prior for that size to have it judged. Named mistakes: "unnormalized",
    "sample" (drawn from another density), "generator", "shape", "detached", "raises".
    """

    def drawn(num: int, seed: int, other: int = 0) -> Tensor:
        """With a generator at `seed` and the global one at `other`."""
        generator = torch.Generator().manual_seed(seed)
        return tensor_from("prior.sample", lambda: prior.sample(num, generator=generator), seed=other).detach()

    draws = drawn(DRAWS, 0)
    if draws.shape != (DRAWS, latent_dim) or not draws.is_floating_point():
        fail(f"prior.sample({DRAWS}) gives {describe(draws)}, expected floats of shape {(DRAWS, latent_dim)}", "shape")
    if not torch.equal(draws, drawn(DRAWS, 0, other=1)) or torch.equal(draws, drawn(DRAWS, 1)):
        fail("prior.sample: the same generator gives other codes, or another one the same: draw with the generator", "generator")
    check_log_prob("prior", prior, draws[:12].view(4, 3, latent_dim))
    check_draws("prior", draws, lambda z: tensor_from("prior.log_prob", prior.log_prob, z[:, None])[:, 0].detach())
    return "log_prob integrates to 1, and is the density of what sample draws"


@verdict
def check_posterior(q: Any) -> str:
    """Judges q(z given x) of N images: ``mean`` (N, L), ``sample(eps)``, (K, N, L) -> the same, ``log_prob(z)``, (K, N, L) -> (K, N), nats.

    Give what an encoder of yours gives for a few images, with L at most 8. Named mistakes: those of `check_prior`, with "own-noise" and
    "images" (an image's code depends on another's noise).
    """
    mean = getattr(q, "mean", None)
    if not isinstance(mean, Tensor) or mean.dim() != 2 or not mean.isfinite().all():
        fail(f"q.mean is {describe(mean)}, expected a finite tensor (N, L)", "shape")
    count, dim = mean.shape
    eps = torch.randn(DRAWS, count, dim)
    z = tensor_from("q.sample", q.sample, eps).detach()
    if z.shape != eps.shape:
        fail(f"q.sample of eps {tuple(eps.shape)} has shape {tuple(z.shape)}, expected the same", "shape")
    if not torch.equal(z, tensor_from("q.sample", q.sample, eps, seed=1).detach()):
        fail("q.sample gives other codes for the same eps: it draws noise of its own", "own-noise")
    other = eps.clone()
    other[:, 0] = torch.randn(DRAWS, dim)
    moved = tensor_from("q.sample", q.sample, other).detach()
    if not torch.allclose(moved[:, 1:], z[:, 1:], atol=1e-6):
        fail("q.sample: an image's code changes with the noise of another image", "images")
    check_log_prob("q", q, z[:4])
    for image in range(count):

        def log_prob(places: Tensor, image: int = image) -> Tensor:
            together = z[: len(places)].clone()
            together[:, image] = places
            return tensor_from("q.log_prob", q.log_prob, together)[:, image].detach()

        check_draws(f"q of image {image}", z[:, image], log_prob)
    return "log_prob integrates to 1 for each image, and is the density of what sample draws"
