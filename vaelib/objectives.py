"""The terms of the ELBO and the bounds built from them: per image, in nats, every constant kept.

Reduction over the batch happens once, in `loss`, where the optimizer needs a scalar.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vaelib._validation import check_number, check_same_shape, describe

if TYPE_CHECKING:
    from vaelib.densities import Draw


class ElboTerms(NamedTuple):
    """The two terms of the ELBO, apart, and their difference. eq. two-terms

    Attributes:
        log_likelihood: E_q[log p(x given z)], (N,), nats; minus the distortion.
        kl: KL(q(z given x) || p(z)), (N,), nats; the rate.
        kl_per_unit: the same by latent unit, (N, L), nats; their sum is `kl`. None where nobody computed it.
        penalty: a further term that the loss adds to minus the bound, (N,) or one number, see `VAE.penalty`. None where there is none.
        bound: what the loss maximizes in place of the ELBO, (N,), nats: an importance-weighted bound. None where it is the ELBO.
    """

    log_likelihood: Tensor
    kl: Tensor
    kl_per_unit: Tensor | None = None
    penalty: Tensor | None = None
    bound: Tensor | None = None

    @property
    def elbo(self) -> Tensor:
        """log_likelihood - kl, (N,), nats. eq. two-terms"""
        return self.log_likelihood - self.kl


def gaussian_kl(mean: Tensor, log_var: Tensor, prior_mean: Tensor | None = None, prior_log_var: Tensor | None = None) -> Tensor:
    """KL( N(mean, exp(log_var)) || N(prior_mean, exp(prior_log_var)) ) of diagonal Gaussians: (N, L) -> (N,), nats. eq. gaussian-kl

    Without a prior it is the standard normal. Kingma and Welling 2014, appendix B.

    Raises:
        ValueError: If the shapes differ: nothing is broadcast.

    Example:
        >>> import torch, vaelib
        >>> vaelib.gaussian_kl(mean=torch.ones(1, 4), log_var=torch.zeros(1, 4))
        tensor([2.])
    """
    return gaussian_kl_per_unit(mean, log_var, prior_mean, prior_log_var).sum(-1)


def gaussian_kl_per_unit(
    mean: Tensor, log_var: Tensor, prior_mean: Tensor | None = None, prior_log_var: Tensor | None = None
) -> Tensor:
    """The terms that `gaussian_kl` adds up, one for each latent unit: (N, L) -> (N, L), nats. eq. gaussian-kl

    None is below 0: s = log_var goes in as expm1(s) - s, and expm1(s), above s by s^2 / 2 at least near 0, rounds to s or above it.
    In exp(s) - 1 - s the digits of s near 0 are lost beside the 1.
    """
    if prior_mean is None and prior_log_var is None:
        check_same_shape(mean=mean, log_var=log_var)
        return 0.5 * (mean**2 + (log_var.expm1() - log_var))
    prior_mean = torch.zeros_like(mean) if prior_mean is None else prior_mean
    prior_log_var = torch.zeros_like(log_var) if prior_log_var is None else prior_log_var
    check_same_shape(mean=mean, log_var=log_var, prior_mean=prior_mean, prior_log_var=prior_log_var)
    difference = log_var - prior_log_var
    return 0.5 * ((mean - prior_mean) ** 2 * (-prior_log_var).exp() + (difference.expm1() - difference))


def gaussian_log_density(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(z; mean, exp(log_var)), diagonal: (..., L) -> (...), nats. eq. gaussian-log-density

    Its gradient in mean and log_var, at a z that does not depend on them, is the score of eq. score-gradient.
    """
    check_same_shape(z=z, mean=mean, log_var=log_var)
    return -0.5 * ((z - mean) ** 2 * (-log_var).exp() + log_var + math.log(2 * math.pi)).sum(-1)


def beta_elbo(terms: ElboTerms, beta: float | Tensor = 1.0) -> Tensor:
    """log_likelihood - beta * kl: (N,), nats. eq. beta-elbo

    A bound on log p(x) for beta >= 1 only. A loss with weights a and b on the two terms is a times this one with beta = b / a:
    means over D pixels and L latents, in place of sums, make beta D / L. eq. implied-beta. Higgins et al. 2017.

    Raises:
        ValueError: If beta is negative or not one number.
    """
    if not isinstance(beta, Tensor):
        check_number("beta", beta)
    elif beta.dim() > 0:
        raise ValueError(f"beta: got {describe(beta)}, expected one number")
    return terms.log_likelihood - beta * terms.kl


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """log of the mean weight over K samples, by a stable log-sum-exp: (K, N) -> (N,), nats. eq. importance-weighted-bound

    log_weights[k] = log p(x, z_k) - log q(z_k given x), with z_k drawn from q. K = 1 is the one-sample ELBO; the bound rises
    with K towards log p(x). Burda, Grosse and Salakhutdinov 2016.

    Raises:
        ValueError: Unless log_weights has two axes and at least one sample.
    """
    check_log_weights(log_weights)
    return torch.logsumexp(log_weights, dim=0) - math.log(len(log_weights))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """How many of K draws count, (sum of w)^2 / sum of w^2: (K, N) -> (N,), from 1 to K. eq. effective-sample-size

    K where all weights are equal, 1 where one draw has everything. Kong, Liu and Wong 1994.

    Args:
        log_weights: as for `importance_weighted_bound`; a constant added to them changes nothing.

    Raises:
        ValueError: Unless log_weights has two axes and at least one sample.

    Example:
        >>> import torch, vaelib
        >>> vaelib.effective_sample_size(torch.tensor([[3.0], [1.0], [0.0]]).log())
        tensor([1.6000])
    """
    check_log_weights(log_weights)
    return 1 / log_weights.softmax(0).square().sum(0)


def check_log_weights(log_weights: Tensor) -> None:
    """ValueError unless log_weights has shape (K, N) with K >= 1."""
    if log_weights.dim() != 2 or len(log_weights) == 0:
        raise ValueError(f"log_weights: got {describe(log_weights)}, expected shape (K, N) with K >= 1")


def doubly_reparameterized_bound(draw: Draw) -> Tensor:
    """`importance_weighted_bound`, with the gradient that keeps its signal as K grows: (N,), nats. eq. doubly-reparameterized-gradient

    The gradient of decoder and prior is the usual one, with the normalized weights w_k. To the encoder the gradient flows through z_k
    alone (the density q is a constant there), with w_k squared. Its mean is the same and its noise smaller: "DReG",
    Tucker, Lawson, Gu and Maddison 2019.

    Raises:
        ValueError: Unless q is one diagonal Gaussian for each image.
    """
    constant = draw.gaussian("objective: got 'dreg' for").detach()
    log_weights = draw.log_likelihood + draw.p.log_prob(draw.z) - constant.log_prob(draw.z)
    if draw.z.requires_grad:
        weights = log_weights.detach().softmax(0)[..., None]  # (K, N, 1)
        draw.z.register_hook(lambda gradient: weights * gradient)
    return importance_weighted_bound(log_weights)


def free_bits_kl(terms: ElboTerms, free_bits: float) -> Tensor:
    """Sum over latent units of max(free_bits, mean over the batch of the unit's KL): a scalar, nats. eq. free-bits

    A unit below the threshold costs the same as one at it, so nothing pulls it to the prior. Kingma et al. 2016, appendix C.8.

    Raises:
        ValueError: If free_bits is negative, or the terms hold no `kl_per_unit`.
    """
    check_number("free_bits", free_bits)
    if terms.kl_per_unit is None:
        raise ValueError("terms: got no kl_per_unit, expected the KL of each latent unit, as VAE.elbo gives it")
    return terms.kl_per_unit.mean(0).clamp(min=free_bits).sum()


def loss(terms: ElboTerms, beta: float | Tensor = 1.0, free_bits: float = 0.0) -> Tensor:
    """What the optimizer minimizes: minus the mean over the batch of the (beta-)ELBO, a scalar, nats per image. eq. loss

    With `free_bits` the KL term is `free_bits_kl`; a `bound` stands in place of the ELBO, and takes neither. The mean `penalty` is added.
    """
    penalty = 0.0 if terms.penalty is None else terms.penalty.mean()
    if terms.bound is not None:
        return penalty - terms.bound.mean()
    if free_bits:
        terms = ElboTerms(terms.log_likelihood.mean(), free_bits_kl(terms, free_bits))
    return penalty - beta_elbo(terms, beta).mean()
