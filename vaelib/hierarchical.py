"""Several layers of latents: the hierarchical VAE, from a coarse map of the image to a fine one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaelib import noise
from vaelib._validation import check_choice, check_image_shape, check_int, describe
from vaelib.densities import Draw, Posterior, joined, kl_divergence
from vaelib.likelihoods import Likelihood, make_likelihood
from vaelib.networks import ACTIVATIONS, BottomUp, TopDown, check_depth, enlarged, halvings
from vaelib.vae import VAE, register_model


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
        dim = sum(decoder.latent_dims)
        super().__init__(encoder, decoder, likelihood, image_shape, dim, config, TopDownPrior(decoder, dim))
        self.latent_shapes = [group.latent_shape for group in decoder.groups]

    def encode(self, x: Tensor, validate: bool = True) -> Posterior:
        """q along the path on which each z_l is its posterior's mean: deterministic, mean and log_var, each (N, L)."""
        self.check_input(x, validate)
        return top_down(self.decoder, x.new_zeros(len(x), self.latent_dim), self.encoder(x)).q

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's params at z, the latents of all groups: (N, L) -> (N, P, H, W), in the dtype of z."""
        self.check_code(z)
        params: Tensor = self.decoder(top_down(self.decoder, z, given=True).h)
        return params.to(z.dtype)

    def draw_with(self, x: Tensor, eps: Tensor) -> Draw:
        """Codes drawn from q, and what they meet, see `VAE.draw`: q and p are the Gaussians along the path of each draw, (K, N, L)."""
        path = top_down(self.decoder, eps.flatten(0, 1), self.encoder(x))
        z = path.z.view_as(eps)
        q, p = (Posterior(*(statistic.view_as(eps) for statistic in density)) for density in (path.q, path.p))
        return Draw(z, self.score(x, self.decoder(path.h).to(z.dtype)), q, p, kl_divergence(q, p, z))


class Path(NamedTuple):
    """What a pass through the groups gives: the last state h, and z, its posterior and its prior, each (M, L)."""

    h: Tensor
    z: Tensor
    q: Posterior
    p: Posterior


def top_down(decoder: TopDown, code: Tensor, features: list[Tensor] | None = None, given: bool = False) -> Path:
    """One pass through the groups.

    Args:
        code: (M, L): the standard normal noise that z is drawn with, or z itself where it is `given`.
        features: of N images, from the bottom-up pass; M is a multiple of N. z is then drawn from q, without them from the prior,
            which then stands for q too.

    Returns:
        z and the densities in the dtype of `code`.
    """
    h = decoder.constant.expand(len(code), -1, -1, -1)  # (M, width, h, w)
    parts, posteriors, priors = [], [], []
    seen, level = h, -1
    for group, part in zip(decoder.groups, code.split(decoder.latent_dims, dim=1), strict=True):
        h = enlarged(h, group.latent_shape[1:])
        if features is not None and group.level != level:  # once for all groups of a level
            level, seen = group.level, repeated(decoder.activation(features[group.level]), len(h))
        active = decoder.activation(h).to(seen.dtype)  # under autocast the features' dtype, once for both branches
        mean, log_var, rest = group.prior(active)
        prior = posterior = Posterior(mean.to(code.dtype), log_var.to(code.dtype))
        if features is not None:
            mean, log_var = group.posterior(active, seen)
            posterior = Posterior(mean.to(code.dtype), log_var.to(code.dtype))
        z = part if given else posterior.sample(part)
        h = group(h, rest, z)
        parts.append(z)
        posteriors.append(posterior)
        priors.append(prior)
    return Path(h, torch.cat(parts, dim=1), joined(posteriors), joined(priors))


def repeated(values: Tensor, count: int) -> Tensor:
    """The rows of `values`, again and again, `count` in all; itself where it has so many."""
    return values if len(values) == count else values.repeat(count // len(values), 1, 1, 1)


class LayeredPrior:
    """The prior of a model with several layers of latents. Its weights are those of `network`, the model's decoder."""

    def __init__(self, network: nn.Module, dim: int) -> None:
        self.network, self.dim = network, dim

    def along(self, code: Tensor, given: bool) -> tuple[Tensor, Posterior]:
        """z and the Gaussian that each layer meets given those above, (M, L), of the noise that z is made of, or of z itself."""
        raise NotImplementedError

    def from_noise(self, eps: Tensor) -> Tensor:
        """z made of standard normal noise, layer by layer: (M, L) -> (M, L)."""
        return self.along(eps, given=False)[0]

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z): (K, N, L) -> (K, N), nats."""
        flat = z.flatten(0, -2)
        return self.along(flat, given=True)[1].log_prob(flat).view(z.shape[:-1])

    def sample(self, num: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """z (num, L), where the weights are; row i does not depend on `num`. `temperature` is a factor on each layer's deviation."""
        eps = temperature * noise.normal_rows(check_int("num", num), self.dim, generator)
        device = next(self.network.parameters()).device
        return torch.cat([self.from_noise(part.to(device)) for part in eps.split(500)])


class TopDownPrior(LayeredPrior):
    """The prior of a `HierarchicalVAE`."""

    network: TopDown

    def along(self, code: Tensor, given: bool) -> tuple[Tensor, Posterior]:
        path = top_down(self.network, code, given=given)
        return path.z, path.p


@register_model("hierarchical")
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
    return HierarchicalVAE(encoder, decoder, likelihood, image_shape)


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
