"""The two layers of latents of Burda, Grosse and Salakhutdinov 2016, whose rows `vaelib.book.reproduce` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vaelib._validation import check_int, describe
from vaelib.densities import Draw, Posterior, joined, kl_divergence
from vaelib.hierarchical import LayeredPrior
from vaelib.likelihoods import Likelihood, make_likelihood
from vaelib.networks import MLPDecoder, MLPEncoder
from vaelib.vae import VAE, check_hidden_dims, register_model


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
        split = tuple(latent_dims)[::-1]
        super().__init__(encoder, decoder, likelihood, image_shape, sum(split), config, TwoLayerPrior(decoder, split))
        self.split = split

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

    def draw_with(self, x: Tensor, eps: Tensor) -> Draw:
        """Codes drawn from q, and what they meet, see `VAE.draw`: q and p are the Gaussians along the path of each draw, (K, N, L)."""
        noise2, noise1 = eps.split(self.split, dim=2)
        below = Posterior(*(statistic.repeat(len(eps), 1).view_as(noise1).to(eps.dtype) for statistic in self.encoder[0](x)))
        h1 = below.sample(noise1)
        above = Posterior(*(statistic.view_as(noise2).to(eps.dtype) for statistic in self.encoder[1](h1.flatten(0, 1))))
        z = torch.cat([above.sample(noise2), h1], dim=2)
        q, along = joined([above, below]), self.prior.along(z.flatten(0, 1), given=True)[1]
        p = Posterior(*(statistic.view_as(z) for statistic in along))
        (_, p1), zero = p.split(self.split), torch.zeros_like(noise2)
        closed, drawn = kl_divergence(above, Posterior(zero, zero), z), log_ratio_per_unit(h1, below, p1)
        return Draw(z, self.log_likelihood(x, z), q, p, torch.cat([closed, drawn], dim=2))


def log_ratio_per_unit(z: Tensor, q: Posterior, p: Posterior) -> Tensor:
    """log q(z) - log p(z) of each unit: (..., L), nats."""
    squares = (z - p.mean) ** 2 * (-p.log_var).exp() - (z - q.mean) ** 2 * (-q.log_var).exp()
    return 0.5 * (squares + p.log_var - q.log_var)


class TwoLayerPrior(LayeredPrior):
    """The prior of a `TwoLayerVAE`: N(0, I) over h2, a network's Gaussian over h1."""

    network: nn.ModuleList

    def __init__(self, network: nn.ModuleList, split: Sequence[int]) -> None:
        super().__init__(network, sum(split))
        self.split = split

    def along(self, code: Tensor, given: bool) -> tuple[Tensor, Posterior]:
        h2, part = code.split(self.split, dim=1)
        p1 = Posterior(*(statistic.to(code.dtype) for statistic in self.network[0](h2)))
        z = code if given else torch.cat([h2, p1.sample(part)], dim=1)
        return z, joined([Posterior(torch.zeros_like(h2), torch.zeros_like(h2)), p1])


@register_model("two-layer")
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
    return TwoLayerVAE(nn.ModuleList(encoder), nn.ModuleList(decoder), likelihood, image_shape, (dim1, dim2))
