"""Several layers of latents: the hierarchical VAE, from a coarse map of the image to a fine one, and the two layers of Burda et al."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vaelib._validation import check_choice, check_image_shape, check_int, describe
from vaelib.likelihoods import Likelihood, make_likelihood
from vaelib.networks import ACTIVATIONS, BottomUp, MLPDecoder, MLPEncoder, TopDown, check_depth, enlarged, halvings
from vaelib.objectives import gaussian_kl_per_unit
from vaelib.vae import VAE, Posterior, check_hidden_dims, reparameterize


class HierarchicalVAE(VAE):
    """p(x, z) = p(z_1) p(z_2 given z_1) ... p(x given z_1..z_G), with q(z given x) factored in the same order, from the top down.

    A bottom-up pass turns x into features at each resolution. The top-down pass starts from a learned constant; at group l its state
    h, which knows z_1..z_{l-1}, gives the prior of z_l, and h with the features gives the posterior of z_l. Both passes share h
    (Sonderby et al. 2016; Kingma et al. 2016; Child 2021). To the outside z is flat, the groups one after the other, and
    the other methods of `VAE` hold: the KL is closed form given the latents above, so that `elbo` is Monte Carlo in both terms.
    eq. hierarchical-kl

    Args:
        encoder: the bottom-up pass.
        decoder: the parts of the top-down pass.
        likelihood: p(x given z), see `vaelib.likelihoods`.
        image_shape: (C, H, W).
        config: what builds the model again.

    Attributes:
        latent_shapes: (channels, height, width) of each group.
    """

    layered = True
    encoder: BottomUp
    decoder: TopDown

    def __init__(
        self,
        encoder: BottomUp,
        decoder: TopDown,
        likelihood: Likelihood,
        image_shape: Sequence[int],
        config: dict[str, Any] | None = None,
    ) -> None:
        latent_shapes = [group.latent_shape for group in decoder.groups]
        super().__init__(encoder, decoder, likelihood, image_shape, sum(map(math.prod, latent_shapes)), config)
        self.latent_shapes = latent_shapes

    def encode(self, x: Tensor, validate: bool = True) -> Posterior:
        """q along the path on which each z_l is its posterior's mean: deterministic, mean and log_var, each (N, L)."""
        self.check_input(x, validate)
        return self._top_down(x.new_zeros(len(x), self.latent_dim), self.encoder(x))[2]

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's params at z, the latents of all groups: (N, L) -> (N, P, H, W), in the dtype of z."""
        self.check_code(z)
        params: Tensor = self.decoder(self._top_down(z, draw=False)[0])
        return params.to(z.dtype)

    def sample_prior(self, eps: Tensor) -> Tensor:
        """z from p(z), group by group, made of standard normal noise: (N, L) -> (N, L)."""
        self.check_code(eps, "eps")
        return self._top_down(eps)[1]

    def infer(
        self, x: Tensor, num_samples: int, eps: Tensor | None, generator: torch.Generator | None, validate: bool
    ) -> tuple[Tensor, Posterior, Posterior]:
        """z (K, N, L) drawn from q, the q that it came from, and the prior that it meets, each (K, N, L)."""
        return self._infer(x, num_samples, eps, generator, validate)[1:]

    def _infer_and_score(
        self, x: Tensor, num_samples: int, eps: Tensor | None, generator: torch.Generator | None, validate: bool
    ) -> tuple[Tensor, Tensor, Posterior, Posterior]:
        h, z, posterior, prior = self._infer(x, num_samples, eps, generator, validate)
        return self._score(x, self.decoder(h).to(z.dtype)), z, posterior, prior

    def _infer(
        self, x: Tensor, num_samples: int, eps: Tensor | None, generator: torch.Generator | None, validate: bool
    ) -> tuple[Tensor, Tensor, Posterior, Posterior]:
        """The last state h of the pass that draws z (K*N, width, h, w), and what `infer` gives."""
        self.check_input(x, validate)
        eps = self._noise(x, num_samples, eps, generator)
        h, z, posterior, prior = self._top_down(eps.flatten(0, 1), self.encoder(x))
        return h, z.view_as(eps), Posterior(*(t.view_as(eps) for t in posterior)), Posterior(*(t.view_as(eps) for t in prior))

    def _top_down(
        self, code: Tensor, features: list[Tensor] | None = None, draw: bool = True
    ) -> tuple[Tensor, Tensor, Posterior, Posterior]:
        """One pass through the groups.

        Args:
            code: (M, L): the standard normal noise that z is drawn with, or z itself where `draw` is False.
            features: of N images, from the bottom-up pass; M is a multiple of N. z is then drawn from q, without them from the prior.

        Returns:
            The last state h, then z, q (the prior where there are no features) and the prior, each (M, L) in the dtype of `code`.
        """
        h = self.decoder.constant.expand(len(code), -1, -1, -1)
        parts, posteriors, priors = [], [], []
        for group, part in zip(self.decoder.groups, code.split([math.prod(s) for s in self.latent_shapes], dim=1), strict=True):
            h = enlarged(h, group.latent_shape[1:])
            mean, log_var, change = group.prior(h)
            prior = posterior = Posterior(mean.to(code.dtype), log_var.to(code.dtype))
            if features is not None:
                seen = features[group.level]
                mean, log_var = group.posterior(h, seen if len(seen) == len(h) else seen.repeat(len(h) // len(seen), 1, 1, 1))
                posterior = Posterior(mean.to(code.dtype), log_var.to(code.dtype))
            z = reparameterize(*posterior, part) if draw else part
            h = group(h + change, z)
            parts.append(z)
            posteriors.append(posterior)
            priors.append(prior)
        return h, torch.cat(parts, dim=1), joined(posteriors), joined(priors)


def joined(groups: Sequence[Posterior]) -> Posterior:
    """The groups' means and log-variances, one group after the other."""
    mean, log_var = (torch.cat(statistic, dim=1) for statistic in zip(*groups, strict=True))
    return Posterior(mean, log_var)


def hierarchical_vae(
    image_shape: Sequence[int] = (3, 32, 32),
    levels: Sequence[Sequence[int]] = ((16, 2), (16, 4), (8, 6), (4, 4)),
    width: int = 128,
    bottleneck: int = 48,
    blocks: int = 2,
    likelihood: str | dict[str, Any] | Likelihood = "discretized_logistic_mixture",
    activation: str = "silu",
) -> HierarchicalVAE:
    """A top-down hierarchical VAE of residual blocks, a small relative of the "very deep VAE" (Child 2021).

    Args:
        image_shape: (C, H, W), sides of at least 2 to the number of levels less one.
        levels: (latent channels, groups of latents) at each resolution, from the smallest up. The last resolution is the image's own,
            each one before it half the next, rounded down. 0 groups put no latents there.
        width: channels of the state and of the features.
        bottleneck: channels within the residual blocks.
        blocks: residual blocks of the bottom-up pass at each resolution.
        likelihood: a name, a config or a `Likelihood`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"gelu"`` or ``"silu"``.
    """
    likelihood = make_likelihood(likelihood)
    image_shape, levels = check_image_shape("image_shape", image_shape), check_levels(levels)
    for name, value in (("width", width), ("bottleneck", bottleneck), ("blocks", blocks)):
        check_int(name, value)
    check_depth("blocks", blocks, len(levels) * blocks)
    check_depth("levels", levels, sum(groups for _, groups in levels))
    check_choice("activation", activation, ACTIVATIONS)
    sizes = halvings(image_shape, len(levels) - 1)[::-1]
    if len(sizes) < len(levels):
        least = 2 ** (len(levels) - 1)
        raise ValueError(f"image_shape: got {image_shape}, expected sides of at least {least} for {len(levels)} levels")
    encoder = BottomUp(image_shape, len(levels), width, bottleneck, blocks, activation)
    decoder = TopDown(levels, sizes, width, bottleneck, likelihood.param_channels(image_shape[0]), activation)
    config = {
        "model": "hierarchical",
        "image_shape": list(image_shape),
        "levels": [list(level) for level in levels],
        "width": width,
        "bottleneck": bottleneck,
        "blocks": blocks,
        "likelihood": likelihood.config,
        "activation": activation,
    }
    return HierarchicalVAE(encoder, decoder, likelihood, image_shape, config)


def check_levels(value: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """`value` as pairs (latent channels, groups), with latents at the first."""
    expected = "pairs (latent channels, groups), one for each resolution, such as ((8, 1), (8, 2))"
    pairs = isinstance(value, Sequence) and len(value) > 0
    if not pairs or not all(isinstance(level, Sequence) and not isinstance(level, str) and len(level) == 2 for level in value):
        raise ValueError(f"levels: got {describe(value)}, expected {expected}")
    levels = tuple((check_int("levels", channels), check_int("levels", groups, minimum=0)) for channels, groups in value)
    if levels[0][1] == 0:
        raise ValueError(f"levels: got {describe(value)}, expected at least one group at the first, the smallest resolution")
    return levels


class TwoLayerVAE(VAE):
    """p(x, h1, h2) = N(h2; 0, I) p(h1 given h2) p(x given h1), with q(h1 given x) q(h2 given h1): inference runs from the bottom up.

    Burda, Grosse and Salakhutdinov 2016, section 5. To the outside z is flat, h2 before h1. The KL of h2 is closed form given h1.
    That of h1 is log q - log p at the draw, because h1 and the h2 that its prior depends on are drawn together: one draw of it may
    be negative, its mean is not.

    Args:
        encoder: two networks, x -> mean and log-variance of h1, and h1 -> those of h2.
        decoder: two networks, h2 -> mean and log-variance of h1, and h1 -> the likelihood's params.
        latent_dims: sizes of h1 and h2.
        likelihood, image_shape, config: as in `VAE`.
    """

    layered = True
    encoder: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(
        self,
        encoder: nn.ModuleList,
        decoder: nn.ModuleList,
        likelihood: Likelihood,
        image_shape: Sequence[int],
        latent_dims: Sequence[int],
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, decoder, likelihood, image_shape, sum(latent_dims), config)
        self.split = tuple(latent_dims)[::-1]

    def encode(self, x: Tensor, validate: bool = True) -> Posterior:
        """q along the path on which h1 is its posterior's mean: deterministic, mean and log_var, each (N, L)."""
        self.check_input(x, validate)
        below = self.encoder[0](x)
        return Posterior(*(part.to(x.dtype) for part in joined([Posterior(*self.encoder[1](below[0])), Posterior(*below)])))

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's params at h1, the second part of z: (N, L) -> (N, P, H, W), in the dtype of z."""
        self.check_code(z)
        params: Tensor = self.decoder[1](z.split(self.split, dim=1)[1])
        return params.to(z.dtype)

    def sample_prior(self, eps: Tensor) -> Tensor:
        """z from p(z), made of standard normal noise: (N, L) -> (N, L)."""
        self.check_code(eps, "eps")
        h2, noise = eps.split(self.split, dim=1)
        return torch.cat([h2, reparameterize(*Posterior(*self.decoder[0](h2)), noise)], dim=1)

    def infer(
        self, x: Tensor, num_samples: int, eps: Tensor | None, generator: torch.Generator | None, validate: bool
    ) -> tuple[Tensor, Posterior, Posterior]:
        """z (K, N, L) drawn from q, the q that it came from, and the prior that it meets, each (K, N, L)."""
        self.check_input(x, validate)
        eps = self._noise(x, num_samples, eps, generator)
        noise2, noise1 = eps.flatten(0, 1).split(self.split, dim=1)
        below = Posterior(*(statistic.repeat(num_samples, 1).to(eps.dtype) for statistic in self.encoder[0](x)))
        h1 = reparameterize(*below, noise1)
        top = Posterior(*(statistic.to(eps.dtype) for statistic in self.encoder[1](h1)))
        h2 = reparameterize(*top, noise2)
        prior = Posterior(*(statistic.to(eps.dtype) for statistic in self.decoder[0](h2)))
        posterior, prior = joined([top, below]), joined([Posterior(*(torch.zeros_like(h2),) * 2), prior])
        posterior, prior = (Posterior(*(statistic.view_as(eps) for statistic in pair)) for pair in (posterior, prior))
        return torch.cat([h2, h1], dim=1).view_as(eps), posterior, prior

    def _kl_per_unit(self, z: Tensor, posterior: Posterior, prior: Posterior | None) -> Tensor:
        (top_mean, mean), (top_log_var, log_var) = (statistic.split(self.split, dim=2) for statistic in posterior)
        at, prior_mean, prior_log_var = (statistic.split(self.split, dim=2)[1] for statistic in (z, *prior))  # type: ignore[misc]  # never None here
        squares = (at - prior_mean) ** 2 * (-prior_log_var).exp() - (at - mean) ** 2 * (-log_var).exp()
        return torch.cat([gaussian_kl_per_unit(top_mean, top_log_var), 0.5 * (squares + prior_log_var - log_var)], dim=2)


def two_layer_vae(
    image_shape: Sequence[int] = (1, 28, 28),
    hidden_dims: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
    latent_dims: Sequence[int] = (100, 50),
    likelihood: str | dict[str, Any] | Likelihood = "bernoulli",
    activation: str = "tanh",
) -> TwoLayerVAE:
    """The network with two stochastic layers of Burda et al. 2016; the decoders mirror the encoders.

    Args:
        image_shape: (C, H, W).
        hidden_dims: sizes of the hidden layers between x and h1, and between h1 and h2.
        latent_dims: sizes of h1 and h2.
        likelihood: a name, a config or a `Likelihood`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"gelu"`` or ``"silu"``.
    """
    likelihood = make_likelihood(likelihood)
    for name, value in (("hidden_dims", hidden_dims), ("latent_dims", latent_dims)):
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise ValueError(f"{name}: got {describe(value)}, expected two, for the lower and the upper layer")
    (hidden1, hidden2), (dim1, dim2) = map(check_hidden_dims, hidden_dims), (check_int("latent_dims", dim) for dim in latent_dims)
    encoder = [MLPEncoder(image_shape, hidden1, dim1, activation), MLPEncoder((dim1, 1, 1), hidden2, dim2, activation)]
    params = MLPDecoder(dim1, hidden1[::-1], image_shape, likelihood.param_channels(image_shape[0]), activation)
    decoder = [MLPEncoder((dim2, 1, 1), hidden2[::-1], dim1, activation), params]
    config = {
        "model": "two-layer",
        "image_shape": list(image_shape),
        "hidden_dims": [list(hidden1), list(hidden2)],
        "latent_dims": [dim1, dim2],
        "likelihood": likelihood.config,
        "activation": activation,
    }
    return TwoLayerVAE(nn.ModuleList(encoder), nn.ModuleList(decoder), likelihood, image_shape, (dim1, dim2), config)
