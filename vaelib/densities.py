"""Densities over z as objects: q(z given x) and p(z), each in a form that every bound and estimate can ask.

What is asked of a posterior q is ``mean`` (N, L), ``sample(eps)`` and ``log_prob(z)``; of a prior p ``log_prob(z)`` and
``sample(num, generator)``. `kl_divergence` has a closed form for the pairs that `register_kl` was told of, as `torch.distributions` has;
for any other pair it is one draw of log q - log p. So a prior or a posterior of your own needs these methods, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelib import noise
from vaelib._validation import check_int, check_same_shape
from vaelib.objectives import ElboTerms, gaussian_kl_per_unit, gaussian_log_density

CLOSED_FORMS: dict[tuple[type, type], Callable[[Any, Any], Tensor]] = {}


def register_kl(q: type, p: type) -> Callable[[Callable[[Any, Any], Tensor]], Callable[[Any, Any], Tensor]]:
    """A decorator: the function is KL(q || p) of each latent unit, (..., L), nats, for these two classes and their subclasses."""

    def keep(closed_form: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        CLOSED_FORMS[q, p] = closed_form
        return closed_form

    return keep


def kl_divergence(q: Any, p: Any, z: Tensor) -> Tensor:
    """KL(q(z given x) || p(z)), nats: by latent unit, (1, N, L) or (K, N, L), where it is closed form; else at each draw, (K, N).
    eq. kl-divergence

    Args:
        z: K draws of q, (K, N, L). Where there is no closed form, log q(z) - log p(z) stands for the KL, whose mean it has: one draw may
            be below 0.
    """
    closed = (form for (of_q, of_p), form in CLOSED_FORMS.items() if isinstance(q, of_q) and isinstance(p, of_p))
    if (form := next(closed, None)) is None:
        difference: Tensor = q.log_prob(z) - p.log_prob(z)
        return difference
    by_unit = form(q, p)
    return by_unit if by_unit.dim() == 3 else by_unit[None]


def reparameterize(mean: Tensor, log_var: Tensor, eps: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """z = mean + exp(log_var / 2) * eps with eps ~ N(0, I), differentiable in mean and log_var. eq. reparameterization

    A gradient of f(z) that flows through z is that of eq. path-gradient.
    `eps` (same shape) may be given; otherwise it is drawn from `generator`.
    """
    if eps is None:
        eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    check_same_shape(mean=mean, log_var=log_var, eps=eps)
    return mean + (0.5 * log_var).exp() * eps


class Posterior(NamedTuple):
    """A diagonal Gaussian, as q(z given x) is: `mean` and `log_var`, each (N, L); or one for each draw, (K, N, L)."""

    mean: Tensor
    log_var: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """z = mean + deviation * eps for standard normal noise: (K, N, L) -> (K, N, L). eq. reparameterization"""
        return reparameterize(self.mean.expand_as(eps), self.log_var.expand_as(eps), eps)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z given x): (K, N, L) -> (K, N), nats; z, mean and log_var are broadcast. eq. gaussian-log-density"""
        return gaussian_log_density(*torch.broadcast_tensors(z, self.mean, self.log_var))

    def kl(self, prior: Any, z: Tensor | None = None) -> Tensor:
        """KL(q || prior) of each image: (N,), or (K, N) at the draws `z` where there is no closed form for it, see `kl_divergence`."""
        kl = kl_divergence(self, prior, self.mean[None] if z is None else z)
        return kl if kl.dim() == 2 else kl.sum(2)[0] if len(kl) == 1 else kl.sum(2)

    def detach(self) -> Posterior:
        """The same density as a constant."""
        return Posterior(self.mean.detach(), self.log_var.detach())

    def split(self, sizes: list[int] | tuple[int, ...]) -> list[Posterior]:
        """The Gaussians of groups of latents, of these sizes, one after the other."""
        return [Posterior(*pair) for pair in zip(self.mean.split(sizes, -1), self.log_var.split(sizes, -1), strict=True)]


def joined(groups: list[Posterior]) -> Posterior:
    """One Gaussian of groups of latents, one after the other: the opposite of `Posterior.split`."""
    mean, log_var = (torch.cat(statistic, dim=-1) for statistic in zip(*groups, strict=True))
    return Posterior(mean, log_var)


class StandardNormal(NamedTuple):
    """N(0, I) over `dim` latents, the usual prior."""

    dim: int

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z): (..., L) -> (...), nats. eq. gaussian-log-density"""
        return gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z))

    def sample(self, num: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """z (num, L), on the CPU; row i does not depend on `num`. `temperature` is a factor on the standard deviation."""
        return temperature * noise.normal_rows(check_int("num", num), self.dim, generator)

    def from_noise(self, eps: Tensor) -> Tensor:
        """z made of standard normal noise: (M, L) -> (M, L). A prior that has this is annealed in the noise."""
        return eps


@register_kl(Posterior, StandardNormal)
def _to_standard_normal(q: Posterior, p: StandardNormal) -> Tensor:
    return gaussian_kl_per_unit(q.mean, q.log_var)


@register_kl(Posterior, Posterior)
def _to_gaussian(q: Posterior, p: Posterior) -> Tensor:
    return gaussian_kl_per_unit(q.mean, q.log_var, p.mean, p.log_var)


class Draw(NamedTuple):
    """K codes drawn from q(z given x) for each of N images, and what they meet. Every bound and estimate is a function of it.

    Attributes:
        z: the codes, (K, N, L).
        log_likelihood: log p(x given z), (K, N), nats.
        q: the posterior that z came from: a `Posterior` of (N, L), or of (K, N, L) along a path of layers, or one of your own.
        p: the prior that z meets.
        kl: KL(q || p) as `kl_divergence` gives it: (1, N, L), (K, N, L) or (K, N), nats.
    """

    z: Tensor
    log_likelihood: Tensor
    q: Any
    p: Any
    kl: Tensor

    @property
    def terms(self) -> ElboTerms:
        """The terms of the ELBO, means over the K draws. eq. monte-carlo-elbo"""
        log_likelihood, kl = mean_over_draws(self.log_likelihood), mean_over_draws(self.kl)
        return ElboTerms(log_likelihood, kl) if kl.dim() == 1 else ElboTerms(log_likelihood, kl.sum(1), kl)

    @property
    def log_weights(self) -> Tensor:
        """The log of each draw's importance weight, log p(x, z_k) - log q(z_k given x), (K, N), nats. eq. log-weights"""
        log_weights: Tensor = self.log_likelihood + self.p.log_prob(self.z) - self.q.log_prob(self.z)
        return log_weights

    def gaussian(self, got: str = "model: got") -> Posterior:
        """q, where it is one diagonal Gaussian for each image; for any other a ValueError, which begins with `got` and names it."""
        if isinstance(self.q, Posterior) and self.q.mean.dim() == 2:
            return self.q
        found = "several layers of latents" if isinstance(self.q, Posterior) else f"the posterior {type(self.q).__name__}"
        raise ValueError(f"{got} a model with {found}, expected one diagonal Gaussian q(z given x) for each image")


def mean_over_draws(values: Tensor) -> Tensor:
    """The mean over the first axis; for one draw that draw, which is cheaper."""
    return values[0] if len(values) == 1 else values.mean(0)
