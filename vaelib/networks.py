"""Encoders and decoders: networks from x to the posterior's mean and log-variance, and from z to the likelihood's params."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib._validation import check_choice, check_image_shape, check_int, describe

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


MOST_LAYERS = 1000  # in one network: far beyond any that trains; a config that asks for more is nonsense that would not end


def check_depth(argument: str, value: Any, layers: int) -> None:
    """ValueError if `value` asks for more than `MOST_LAYERS` layers or blocks."""
    if layers > MOST_LAYERS:
        raise ValueError(f"{argument}: got {describe(value)}, which makes {layers} layers, expected at most {MOST_LAYERS}")


def mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers of the given sizes, each followed by the activation."""
    check_depth("hidden_dims", sizes[1:], len(sizes) - 1)
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
        mean, log_var = self.head(self.hidden(x.flatten(1))).chunk(2, dim=1)  # each (N, L)
        return mean, log_var.clamp(-20, 20)


class MLPDecoder(nn.Module):
    """z (N, latent_dim) -> params (N, param_channels, H, W), as many channels as the image without `param_channels`.

    `hidden_dims` come in the order in which z meets them.
    """

    def __init__(
        self,
        latent_dim: int,
        hidden_dims: Sequence[int],
        image_shape: Sequence[int],
        param_channels: int | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels, height, width = check_image_shape("image_shape", image_shape)
        self.params_shape = (channels if param_channels is None else check_int("param_channels", param_channels), height, width)
        sizes = [check_int("latent_dim", latent_dim), *hidden_dims]
        check_choice("activation", activation, ACTIVATIONS)
        self.hidden = mlp([check_int("hidden_dims", size) for size in sizes], activation)
        self.head = nn.Linear(sizes[-1], math.prod(self.params_shape))

    def forward(self, z: Tensor) -> Tensor:
        return torch.unflatten(self.head(self.hidden(z)), 1, self.params_shape)  # (N, P, H, W)


def check_latent_dim(value: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one latent code: (L,) for a vector, (channels, height, width) for latents laid out in space."""
    if not isinstance(value, Sequence):
        return (check_int("latent_dim", value),)
    if isinstance(value, str) or len(value) != 3:
        raise ValueError(f"latent_dim: got {describe(value)}, expected an integer or (channels, height, width)")
    return tuple(check_int("latent_dim", size) for size in value)


def check_channels(value: Sequence[int]) -> tuple[int, ...]:
    """`value` as the channels of one or more stages."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) == 0:
        raise ValueError(f"channels: got {describe(value)}, expected a sequence of integers such as (32, 64, 128)")
    return tuple(check_int("channels", size) for size in value)


def halvings(image_shape: Sequence[int], times: int) -> list[tuple[int, int]]:
    """The image's resolution (H, W) and what halving makes of it, rounding down, at most `times` times and never below 1."""
    _, height, width = check_image_shape("image_shape", image_shape)
    return [(height >> i, width >> i) for i in range(times + 1) if min(height >> i, width >> i) >= 1]


def stage_sizes(image_shape: Sequence[int], stages: int, latent_shape: Sequence[int]) -> list[tuple[int, int]]:
    """The resolution before the first stage of an encoder and after each: halved by every stage, or until the latents' is reached.

    Raises:
        ValueError: If the image is too small for that, or halving it does not lead to the latents' resolution.
    """
    sizes = halvings(image_shape, stages)
    if len(latent_shape) == 1:
        if len(sizes) <= stages:
            expected = f"sides of at least {2**stages}, which {stages} stages halve"
            raise ValueError(f"image_shape: got {tuple(image_shape)}, expected {expected}")
        return sizes
    if tuple(latent_shape[1:]) not in sizes:
        possible = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ValueError(
            f"latent_dim: got {tuple(latent_shape)}, expected (channels, height, width) with height x width one of {possible}, "
            f"the resolutions that {stages} stages can reach from image_shape {tuple(image_shape)}"
        )
    reached = sizes.index((latent_shape[1], latent_shape[2]))
    return sizes[: reached + 1] + [sizes[reached]] * (stages - reached)


def activated_convolutions(channels: Sequence[int], kernels: Sequence[int], activation: str) -> nn.Sequential:
    """(activation, convolution) for each kernel size; the resolution stays."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, kernel in zip(channels[:-1], channels[1:], kernels, strict=True):
        layers += [ACTIVATIONS[activation](), nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2)]
    return nn.Sequential(*layers)


def zero(convolution: nn.Module) -> None:
    """Let a convolution start as the zero function."""
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """x + f(x) with f = activation, 3x3, activation, 3x3 (He et al. 2016); f starts as 0, so that the block starts as the identity.

    With `bottleneck` f narrows to that many channels: 1x1, 3x3, 3x3, 1x1 (Child 2021).
    """

    def __init__(self, channels: int, activation: str = "relu", bottleneck: int | None = None) -> None:
        super().__init__()
        if bottleneck is None:
            self.f = activated_convolutions([channels] * 3, (3, 3), activation)
        else:
            self.f = activated_convolutions([channels, *[bottleneck] * 3, channels], (1, 3, 3, 1), activation)
        zero(self.f[-1])

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.f(x)
        return x + change


class ConvEncoder(nn.Module):
    """x (N, C, H, W) -> mean and log-variance of q(z given x), each (N, L), with the log-variance clamped to [-20, 20].

    Each stage is a convolution (kernel 4, stride 2, padding 1: it halves the sides, rounding down), `residual_blocks` blocks and
    an activation. There is no batch normalization: an image's posterior must not depend on the images beside it.

    Args:
        image_shape: (C, H, W).
        channels: of each stage.
        latent_dim: L, or (channels, height, width): then the stages that come after that resolution is reached keep it (kernel 3),
            and a 1x1 convolution gives mean and log-variance at each place. Either way z is flat.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: Sequence[int],
        latent_dim: int | Sequence[int],
        residual_blocks: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels, latent_shape = check_channels(channels), check_latent_dim(latent_dim)
        sizes = stage_sizes(image_shape, len(channels), latent_shape)
        check_int("residual_blocks", residual_blocks, minimum=0)
        check_depth("residual_blocks", residual_blocks, len(channels) * (1 + residual_blocks))
        check_choice("activation", activation, ACTIVATIONS)
        layers: list[nn.Module] = []
        for fan_in, fan_out, before, after in zip((image_shape[0], *channels[:-1]), channels, sizes[:-1], sizes[1:], strict=True):
            kernel, stride = (3, 1) if before == after else (4, 2)
            layers.append(nn.Conv2d(fan_in, fan_out, kernel, stride, padding=1))
            layers += [ResidualBlock(fan_out, activation) for _ in range(residual_blocks)]
            layers.append(ACTIVATIONS[activation]())
        self.hidden = nn.Sequential(*layers)
        if len(latent_shape) == 1:
            self.head: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * math.prod(sizes[-1]), 2 * latent_shape[0]))
        else:
            self.head = nn.Conv2d(channels[-1], 2 * latent_shape[0], 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.head(self.hidden(x)).chunk(2, dim=1)  # each (N, L), or (N, channels, h, w)
        return mean.flatten(1), log_var.flatten(1).clamp(-20, 20)


class ConvDecoder(nn.Module):
    """z (N, L) -> params (N, param_channels, H, W), as many channels as the image without `param_channels`.

    It mirrors `ConvEncoder`: a linear layer (for latents in space a 3x3 convolution), then stages of `residual_blocks` blocks, an
    activation and a transposed convolution (kernel 4, stride 2, padding 1, with the output padding that gives back odd sides),
    then a 3x3 convolution. `channels` come in the order in which z meets them.
    """

    def __init__(
        self,
        latent_dim: int | Sequence[int],
        channels: Sequence[int],
        image_shape: Sequence[int],
        param_channels: int | None = None,
        residual_blocks: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        channels, latent_shape = check_channels(channels), check_latent_dim(latent_dim)
        sizes = stage_sizes(image_shape, len(channels), latent_shape)[::-1]
        check_int("residual_blocks", residual_blocks, minimum=0)
        check_depth("residual_blocks", residual_blocks, len(channels) * (1 + residual_blocks))
        check_choice("activation", activation, ACTIVATIONS)
        if len(latent_shape) == 1:
            first = (channels[0], *sizes[0])
            layers: list[nn.Module] = [nn.Linear(latent_shape[0], math.prod(first)), nn.Unflatten(1, first)]
        else:
            layers = [nn.Unflatten(1, latent_shape), nn.Conv2d(latent_shape[0], channels[0], 3, padding=1)]
        for fan_in, fan_out, before, after in zip(channels, (*channels[1:], channels[-1]), sizes[:-1], sizes[1:], strict=True):
            layers += [ResidualBlock(fan_in, activation) for _ in range(residual_blocks)]
            layers.append(ACTIVATIONS[activation]())
            if before == after:
                layers.append(nn.Conv2d(fan_in, fan_out, 3, padding=1))
            else:
                odd = (after[0] % 2, after[1] % 2)
                layers.append(nn.ConvTranspose2d(fan_in, fan_out, 4, 2, padding=1, output_padding=odd))
        self.hidden = nn.Sequential(*layers, ACTIVATIONS[activation]())
        param_channels = image_shape[0] if param_channels is None else check_int("param_channels", param_channels)
        self.head = nn.Conv2d(channels[-1], param_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        params: Tensor = self.head(self.hidden(z))
        return params


class BottomUp(nn.Module):
    """x (N, C, H, W) -> features (N, width, h, w) at each of `resolutions` halvings of the image, the smallest first.

    At each resolution stand `blocks` residual blocks; between two, 2x2 means halve the sides, rounding down.
    """

    def __init__(
        self, image_shape: Sequence[int], resolutions: int, width: int, bottleneck: int, blocks: int, activation: str = "silu"
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(image_shape[0], width, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width, activation, bottleneck) for _ in range(blocks))) for _ in range(resolutions)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        h = self.stem(x)  # (N, width, H, W)
        for stage in self.stages:
            h = stage(F.avg_pool2d(h, 2) if features else h)
            features.insert(0, h)
        return features


class LatentGroup(nn.Module):
    """One group of latents z_l in the top-down pass, a map of `latent_shape`: its prior, its posterior, and what it does to the state h.

    The prior sees h (N, width, h, w), the posterior sees the image's features too (Sonderby et al. 2016; Kingma et al. 2016). What
    the prior's branch gives starts as 0, so that p starts as N(0, I), and q starts near it; log-variances are clamped to [-10, 10],
    which keeps the KL between two learned Gaussians finite. h and features come to both branches through the activation, which is then
    computed once.

    Args:
        level: which of the bottom-up pass's features it meets, 0 for the smallest.
        latent_shape: (channels, height, width).
        scale: factor on the first weights by which z_l enters h: 1 / sqrt(number of groups) keeps h of one size (Child 2021).
    """

    def __init__(self, level: int, latent_shape: Sequence[int], width: int, bottleneck: int, scale: float, activation: str) -> None:
        super().__init__()
        self.level, self.latent_shape = level, tuple(latent_shape)
        channels, narrow, kernels = latent_shape[0], [bottleneck] * 3, (1, 3, 3, 1)
        self.split = (2 * channels, width)
        self.prior_branch = activated_convolutions([width, *narrow, 2 * channels + width], kernels, activation)
        self.posterior_branch = activated_convolutions([2 * width, *narrow, 2 * channels], kernels, activation)
        self.enter = nn.Conv2d(channels, width, 1)
        self.block = ResidualBlock(width, activation, bottleneck)
        zero(self.prior_branch[-1])
        with torch.no_grad():
            self.enter.weight.mul_(scale)

    def prior(self, active: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Activated h -> mean and log-variance of p(z_l given the latents above), each (N, L_l), and the branch's rest, for `forward`."""
        last: Any = self.prior_branch[-1]
        (weight, other), (bias, shift) = (parameter.split(self.split) for parameter in (last.weight, last.bias))
        hidden = self.prior_branch[1:-1](active)  # (N, bottleneck, h, w)
        return *self.moments(F.conv2d(hidden, weight, bias)), (hidden, other, shift)

    def posterior(self, active: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Activated h and features of x -> mean and log-variance of q(z_l given x and the latents above), each (N, L_l)."""
        return self.moments(self.posterior_branch[1:](torch.cat([active, features], dim=1)))

    @staticmethod
    def moments(statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, flat, of a branch's output."""
        mean, log_var = statistics.chunk(2, dim=1)  # each (N, channels, h, w)
        return mean.flatten(1), log_var.flatten(1).clamp(-10, 10)

    def forward(self, h: Tensor, rest: Sequence[Tensor], z: Tensor) -> Tensor:
        """The next state, from h, the rest of the prior's branch and z_l (N, L_l).

        h gains what the prior's branch says apart from z_l, and what z_l says. One 1x1 convolution over the channels of both gives
        their sum: each term of its own would be one more pass over h, which is most of what such a model has to do.
        """
        hidden, weight, bias = rest
        layout = torch.channels_last if hidden.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        code = z.unflatten(1, self.latent_shape).to(hidden.dtype).contiguous(memory_format=layout)  # (N, channels, h, w)
        enter: Any = self.enter
        weight, bias = torch.cat([weight, enter.weight], dim=1), bias + enter.bias
        state: Tensor = self.block(h + F.conv2d(torch.cat([hidden, code], dim=1), weight, bias))
        return state


class TopDown(nn.Module):
    """The parts of the top-down pass, which `HierarchicalVAE` runs: a learned constant, groups of latents, and the way to params.

    Args:
        levels: (latent channels, groups) for each of `sizes`.
        sizes: the resolutions (h, w), the smallest first and the image's own last.
    """

    def __init__(
        self,
        levels: Sequence[Sequence[int]],
        sizes: Sequence[tuple[int, int]],
        width: int,
        bottleneck: int,
        param_channels: int,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        scale = 1 / math.sqrt(sum(groups for _, groups in levels))
        self.size, self.activation = sizes[-1], ACTIVATIONS[activation]()
        self.constant = nn.Parameter(torch.zeros(1, width, *sizes[0]))
        self.groups: Any = nn.ModuleList(
            LatentGroup(level, (channels, *size), width, bottleneck, scale, activation)
            for level, ((channels, groups), size) in enumerate(zip(levels, sizes, strict=True))
            for _ in range(groups)
        )
        self.latent_dims = [
            channels * math.prod(size) for (channels, groups), size in zip(levels, sizes, strict=True) for _ in range(groups)
        ]
        last = ResidualBlock(width, activation, bottleneck)
        self.head = nn.Sequential(last, ACTIVATIONS[activation](), nn.Conv2d(width, param_channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        """The last state -> params (N, param_channels, H, W)."""
        params: Tensor = self.head(enlarged(h, self.size))
        return params


def enlarged(h: Tensor, size: tuple[int, int]) -> Tensor:
    """h at a higher resolution, each value repeated; h itself where it has that size."""
    return h if h.shape[-2:] == size else F.interpolate(h, size=size)
