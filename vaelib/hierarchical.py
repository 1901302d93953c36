"""The hierarchical VAE: several groups of latents, from a coarse map of the image to a fine one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import check_choice, check_image_shape, check_int, describe
from vaelib.likelihoods import Likelihood, make_likelihood
from vaelib.networks import ACTIVATIONS, BottomUp, TopDown, enlarged, halvings
from vaelib.vae import VAE, Posterior, reparameterize


class HierarchicalVAE(VAE):
    """p(x, z) = p(z_1) p(z_2 given z_1) ... p(x given z_1..z_G), with q(z given x) factored in the same order, from the top down.

    A bottom-up pass turns x into features at each resolution. The top-down pass starts from a learned constant; at group l its state
    h, which knows z_1..z_{l-1}, gives the prior of z_l, and h with the features gives the posterior of z_l. Both passes share h
    (Sonderby et al. 2016; Kingma et al. 2016; Child 2021). To the outside z is flat, the groups one after the other, and
    the other methods of `VAE` hold: the KL is closed form given the latents above, so that `elbo` is Monte Carlo in both terms.

    Args:
        encoder: the bottom-up pass.
        decoder: the parts of the top-down pass.
        likelihood: p(x given z), see `vaelib.likelihoods`.
        image_shape: (C, H, W).
        config: what builds the model again.

    Attributes:
        latent_shapes: (channels, height, width) of each group.
    """

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
        return self.decoder(self._top_down(z, draw=False)[0]).to(z.dtype)

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
