"""Encoders and decoders: networks from x to the posterior's mean and log-variance, and from z to the likelihood's params."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vaelib._validation import check_choice, check_image_shape, check_int

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers of the given sizes, each followed by the activation."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class MLPEncoder(nn.Module):
    """x (N, C, H, W) -> mean and log-variance of q(z given x), each (N, latent_dim).

    The log-variance is clamped to [-20, 20]: wide enough to touch no trained model, narrow enough that its exp is finite.
    """

    def __init__(self, image_shape: Sequence[int], hidden_dims: Sequence[int], latent_dim: int, activation: str = "relu") -> None:
        super().__init__()
        sizes = [math.prod(check_image_shape("image_shape", image_shape)), *hidden_dims]
        check_choice("activation", activation, ACTIVATIONS)
        self.hidden = mlp([check_int("hidden_dims", size) for size in sizes], activation)
        self.head = nn.Linear(sizes[-1], 2 * check_int("latent_dim", latent_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.head(self.hidden(x.flatten(1))).chunk(2, dim=1)
        return mean, log_var.clamp(-20, 20)


class MLPDecoder(nn.Module):
    """z (N, latent_dim) -> params (N, P*C, H, W); `hidden_dims` in the order in which z meets them."""

    def __init__(
        self,
        latent_dim: int,
        hidden_dims: Sequence[int],
        image_shape: Sequence[int],
        params_per_value: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels, height, width = check_image_shape("image_shape", image_shape)
        self.params_shape = (params_per_value * channels, height, width)
        sizes = [check_int("latent_dim", latent_dim), *hidden_dims]
        check_choice("activation", activation, ACTIVATIONS)
        self.hidden = mlp([check_int("hidden_dims", size) for size in sizes], activation)
        self.head = nn.Linear(sizes[-1], math.prod(self.params_shape))

    def forward(self, z: Tensor) -> Tensor:
        return torch.unflatten(self.head(self.hidden(z)), 1, self.params_shape)
