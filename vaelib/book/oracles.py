"""Models whose log p(x) is known exactly, to hold estimates against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelib._validation import check_int, check_number, check_pixels, check_same_shape, check_seed, describe
from vaelib.objectives import ElboTerms, gaussian_kl
from vaelib.vae import VAE, mlp_vae


class FullGaussian(NamedTuple):
    """A Gaussian with full covariance: `mean` (N, L), `covariance` (L, L), the same for all N."""

    mean: Tensor
    covariance: Tensor


class LinearGaussian:
    """z ~ N(0, I), x given z ~ N(weight z + bias, scale^2 I): probabilistic PCA (Tipping and Bishop 1999).

    Everything that a VAE estimates has a closed form here.

    Args:
        weight: (D, L).
        bias: (D,).
        scale: standard deviation of x given z, above 0.
    """

    def __init__(self, weight: Tensor, bias: Tensor, scale: float) -> None:
        if weight.dim() != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"weight, bias: got {describe(weight)} and {describe(bias)}, expected shapes (D, L) and (D,)")
        self.weight, self.bias, self.scale = weight, bias, check_number("scale", scale, exclusive=True)
        self.num_dims, self.latent_dim = weight.shape

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of x: (count, D)."""
        z = torch.randn(count, self.latent_dim, generator=generator, dtype=self.weight.dtype, device="cpu").to(self.weight.device)
        noise = torch.randn(count, self.num_dims, generator=generator, dtype=self.weight.dtype, device="cpu").to(self.weight.device)
        return z @ self.weight.T + self.bias + self.scale * noise

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) = log N(x; bias, weight weight^T + scale^2 I): (N, D) -> (N,), nats. eq. evidence"""
        identity = torch.eye(self.num_dims, dtype=x.dtype, device=x.device)
        covariance = self.weight @ self.weight.T + self.scale**2 * identity
        log_density: Tensor = torch.distributions.MultivariateNormal(self.bias, covariance).log_prob(x)
        return log_density

    def posterior(self, x: Tensor) -> FullGaussian:
        """p(z given x) by Bayes' rule: mean (N, L) and covariance (L, L). eq. posterior"""
        identity = torch.eye(self.latent_dim, dtype=x.dtype, device=x.device)
        covariance = torch.linalg.inv(identity + self.weight.T @ self.weight / self.scale**2)
        return FullGaussian((x - self.bias) @ self.weight @ covariance / self.scale**2, covariance)

    def elbo(self, x: Tensor, mean: Tensor, log_var: Tensor) -> ElboTerms:
        """The exact ELBO of q = N(mean, exp(log_var)), both (N, L): terms (N,), nats. eq. elbo"""
        check_same_shape(mean=mean, log_var=log_var)
        squared_error = ((x - mean @ self.weight.T - self.bias) ** 2).sum(1) + log_var.exp() @ (self.weight**2).sum(0)
        log_likelihood = -0.5 * squared_error / self.scale**2 - 0.5 * self.num_dims * math.log(2 * math.pi * self.scale**2)
        return ElboTerms(log_likelihood, gaussian_kl(mean, log_var))

    def posterior_kl(self, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """KL( N(mean, exp(log_var)) || p(z given x) ), the gap between ELBO and log p(x): (N,), nats. eq. kl-gap"""
        truth = self.posterior(x)
        q = torch.distributions.MultivariateNormal(mean, torch.diag_embed(log_var.exp()))
        p = torch.distributions.MultivariateNormal(truth.mean, truth.covariance.expand(len(x), -1, -1))
        return torch.distributions.kl_divergence(q, p)

    def exact_elbo(self, x: Tensor) -> ElboTerms:
        """The ELBO of q = p(z given x), which is log p(x), in its two terms: (N,), nats. eq. two-terms

        A diagonal q reaches it where the columns of the weight are orthogonal, as those of `probabilistic_pca` are.
        """
        mean, covariance = self.posterior(x)
        error = ((x - mean @ self.weight.T - self.bias) ** 2).sum(1) + (self.weight.T @ self.weight * covariance).sum()
        log_likelihood = -0.5 * error / self.scale**2 - 0.5 * self.num_dims * math.log(2 * math.pi * self.scale**2)
        kl = 0.5 * ((mean**2).sum(1) + covariance.trace() - self.latent_dim - covariance.logdet())
        return ElboTerms(log_likelihood, kl)


def exact_vae(oracle: LinearGaussian, image_shape: Sequence[int]) -> VAE:
    """The linear VAE of this model over the 256 levels, whose encoder is the exact posterior: its ELBO is log P(x). eq. linear-code

    Level k owns 2/255 of the line; where `scale` is some of these steps, P(x) is p(x) times (2/255)^D.

    Args:
        oracle: of x on the scale [-1, 1], with orthogonal columns of the weight: then the posterior's covariance is diagonal.
        image_shape: (C, H, W), of as many values as x has dimensions.
    """
    with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are not kept
        model = mlp_vae(image_shape, (), oracle.latent_dim, {"name": "gaussian", "scale": oracle.scale, "discretized": True})
    mean, covariance = oracle.posterior(torch.zeros(1, oracle.num_dims, dtype=oracle.weight.dtype))
    if not torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=1e-5):
        raise ValueError("oracle: got a weight whose columns are not orthogonal, expected a posterior of independent latents")
    rows = covariance @ oracle.weight.T / oracle.scale**2  # (L, D)
    variances = covariance.diagonal().log()
    encoder, decoder = model.encoder.head, model.decoder.head  # linear layers, there are no others
    with torch.no_grad():
        encoder.weight.copy_(torch.cat([rows, torch.zeros_like(rows)]))  # type: ignore[operator, union-attr]
        encoder.bias.copy_(torch.cat([mean[0], variances]))  # type: ignore[operator, union-attr]
        decoder.weight.copy_(oracle.weight)  # type: ignore[operator, union-attr]
        decoder.bias.copy_(oracle.bias)  # type: ignore[operator, union-attr]
    return model.eval()


class StateSpace(NamedTuple):
    """A linear-Gaussian state-space model: z_1 ~ N(0, I), z_t = transition z_{t-1} + noise * eps, x_t ~ N(weight z_t + bias, scale^2 I).

    Attributes:
        transition: (L, L).
        noise: (L,), standard deviations of what is new in z_t.
        weight: (D, L).
        bias: (D,).
        scale: standard deviation of x_t given z_t.
    """

    transition: Tensor
    noise: Tensor
    weight: Tensor
    bias: Tensor
    scale: float

    def sample(self, count: int, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of x_1, ..., x_T: (count, T, D)."""
        like: Any = {"generator": generator, "dtype": self.weight.dtype}
        z, frames = torch.randn(count, len(self.noise), **like), []
        for _ in range(length):
            frames.append(z @ self.weight.T + self.bias + self.scale * torch.randn(count, len(self.bias), **like))
            z = z @ self.transition.T + self.noise * torch.randn(count, len(self.noise), **like)
        return torch.stack(frames, 1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x_1, ..., x_T) by the Kalman filter: (N, T, D) -> (N,), nats. eq. kalman

        It is the sum of log p(x_t given x_1, ..., x_{t-1}), each a Gaussian whose moments follow from those of the step before.
        """
        eye, total = torch.eye(len(self.noise), dtype=x.dtype), torch.zeros(len(x), dtype=x.dtype)
        mean, covariance = torch.zeros(len(x), len(eye), dtype=x.dtype), eye  # of z_t given the frames before t
        for frame in x.unbind(1):
            spread = self.weight @ covariance @ self.weight.T + self.scale**2 * torch.eye(len(self.bias), dtype=x.dtype)
            error = frame - mean @ self.weight.T - self.bias
            total = total + torch.distributions.MultivariateNormal(torch.zeros_like(self.bias), spread).log_prob(error)
            gain = torch.linalg.solve(spread, self.weight @ covariance).T  # (L, D)
            mean, covariance = mean + error @ gain.T, covariance - gain @ self.weight @ covariance
            mean, covariance = mean @ self.transition.T, self.transition @ covariance @ self.transition.T + self.noise.diag() ** 2
        return total


class PrincipalComponents(NamedTuple):
    """Mean (D,) of some data, eigenvalues (D,) of its covariance, the largest first, and their directions (D, D), one a column."""

    mean: Tensor
    eigenvalues: Tensor
    directions: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log of the Gaussian density with this mean and covariance: (N, D) -> (N,), nats."""
        whitened = (x - self.mean) @ self.directions / self.eigenvalues.sqrt()
        return -0.5 * ((whitened**2).sum(1) + self.eigenvalues.log().sum() + len(self.mean) * math.log(2 * math.pi))


def principal_components(mean: Tensor, covariance: Tensor) -> PrincipalComponents:
    """Those of data with this mean (D,) and covariance (D, D)."""
    if covariance.shape != (*mean.shape, *mean.shape) or mean.dim() != 1:
        raise ValueError(f"mean, covariance: got {describe(mean)} and {describe(covariance)}, expected shapes (D,) and (D, D)")
    eigenvalues, directions = torch.linalg.eigh(covariance)
    return PrincipalComponents(mean, eigenvalues.flip(0), directions.flip(1))


def probabilistic_pca(components: PrincipalComponents, latent_dim: int, scale: float | None = None) -> LinearGaussian:
    """The linear-Gaussian model that gives data with these components the highest likelihood. eq. probabilistic-pca

    Without a scale its square is the mean of the eigenvalues left out. With one, a column of the weight is zero where its eigenvalue
    is at most scale**2: that unit is silent (Tipping and Bishop 1999; Lucas, Tucker, Grosse and Norouzi 2019).

    Args:
        components: of the data, see `principal_components`.
        latent_dim: L, below D.
        scale: standard deviation of x given z, where it is not to be fitted.
    """
    mean, eigenvalues, directions = components
    if check_int("latent_dim", latent_dim) >= len(mean):
        raise ValueError(f"latent_dim: got {latent_dim}, expected fewer than the {len(mean)} dimensions of x")
    if scale is None:
        scale = eigenvalues[latent_dim:].mean().sqrt().item()
    signal = (eigenvalues[:latent_dim] - check_number("scale", scale, exclusive=True) ** 2).clamp(min=0)
    return LinearGaussian(directions[:, :latent_dim] * signal.sqrt(), mean, scale)


def linear_rate(eigenvalues: Tensor, scale: float) -> Tensor:
    """The mean KL of each latent unit of `probabilistic_pca` at this scale, 0 for a silent one: nats. eq. linear-rate

    A VAE with a linear decoder and a Gaussian likelihood of fixed scale ends there (Lucas, Tucker, Grosse and Norouzi 2019).
    """
    return 0.5 * (eigenvalues / check_number("scale", scale, exclusive=True) ** 2).clamp(min=1).log()


def dequantized(pixels: Tensor, seed: int = 0) -> Tensor:
    """Pixels plus uniform noise in [0, 1), flat: ``uint8`` (N, C, H, W) -> float64 (N, D), on the CPU. eq. dequantization"""
    x = check_pixels("pixels", pixels).cpu().flatten(1)
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    return x + torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu")


def pixel_moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of `dequantized` pixels, float64; the noise enters by its mean 1/2 and its variance 1/12."""
    x = check_pixels("pixels", pixels).cpu().flatten(1).double() + 0.5
    mean = x.mean(0)
    x -= mean
    return mean, x.T @ x / len(x) + torch.eye(len(mean), dtype=x.dtype, device=x.device) / 12


def gaussian_pixels_log_prob(train: Tensor, test: Tensor, seed: int = 0) -> Tensor:
    """A bound on log P(pixels) under one Gaussian with full covariance, fitted to training pixels: (N,), nats, on the CPU.
    eq. dequantization

    The pixels are made real by uniform noise u in [0, 1); E_u[log p(pixels + u)] <= log P(pixels), by Jensen, where P is the
    mass of p on the pixels' unit cube (Theis et al. 2016). One draw of u is taken for each image.

    Args:
        train: ``uint8`` (M, C, H, W), more images than pixels times channels.
        test: ``uint8`` (N, C, H, W).

    Raises:
        ValueError: If the images differ in shape.
    """
    train = check_pixels("train", train)
    x = dequantized(check_pixels("test", test, train.shape[1:]), seed)
    return principal_components(*pixel_moments(train)).log_prob(x)
