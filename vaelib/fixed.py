"""Arithmetic that gives the same numbers on every machine: curves as tables of integers, and networks whose sums are exact.

A coder needs the same probabilities on both sides to the last bit. Floating-point sums depend on their order, so on the machine, the
number of threads and the batch; sums of integers do not, and a float64 holds every integer up to 2**53. So weights are rounded to
multiples of 2**-16 and what flows between layers to multiples of 2**-12: each product, and each sum of them, is then exact, whatever
the order. What is no sum, such as tanh or the normal distribution function, is read off a table whose entries come from decimal
arithmetic, which rounds alike everywhere.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vaelib._validation import describe
from vaelib.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, ResidualBlock
from vaelib.vae import VAE

Ints = NDArray[np.int64]
GRID, WEIGHT_GRID, LARGEST = 2**12, 2**16, 2**11  # units of what flows and of the weights; what flows stays within +-LARGEST
FULL = 2**30  # the value of a curve that stands for 1


class Curve(NamedTuple):
    """A growing function as a table: `values` at multiples of 1/64 from `low` on, straight lines between; integers in and out.

    An argument is a multiple of 2**-16. Outside the table the curve goes on flat.
    """

    values: Ints
    low: int

    def __call__(self, t: Ints) -> Ints:
        """The values at arguments t, in units of 2**-16: (...) -> (...)."""
        t = np.clip(t - (self.low << 16), 0, ((len(self.values) - 1) << 10) - 1)
        at, rest = t >> 10, t & 1023
        found: Ints = self.values[at] + ((self.values[at + 1] - self.values[at]) * rest >> 10)
        return found

    def inverse(self, value: Ints) -> Ints:
        """The arguments at which the curve has these values, in units of 2**-20."""
        at = np.clip(np.searchsorted(self.values, value, side="right") - 1, 0, len(self.values) - 2)
        step = np.maximum(self.values[at + 1] - self.values[at], 1)
        found: Ints = (self.low << 20) + (at << 14) + np.clip(value - self.values[at], 0, step) * 2**14 // step
        return found


def tabled(function: Any, low: int, high: int, unit: int) -> Curve:
    """`function` of a Decimal as a `Curve` between two whole numbers; `unit` is the integer that stands for 1."""
    with localcontext() as context:
        context.prec = 30
        values = [int(function(Decimal(i) / 64) * unit + Decimal("0.5")) for i in range(64 * low, 64 * high + 1)]
    return Curve(np.array(values, dtype=np.int64), low)


def normal_distribution(x: Decimal) -> Decimal:
    """Phi(x), by the series phi(x) (x + x^3/3 + x^5/(3 5) + ...) around 1/2, whose terms are all of one sign."""
    term = total = abs(x)
    n = 1
    while term > Decimal("1e-28"):
        n += 2
        term *= x * x / n
        total += term
    half = total * (-x * x / 2).exp() / Decimal("2.506628274631000502415765284811")  # sqrt(2 pi)
    return Decimal("0.5") + half.copy_sign(x)


@functools.cache
def curve(name: str) -> Curve:
    """``"normal"`` and ``"logistic"``, the distribution functions, 1 standing as `FULL`; ``"exp"``, on [-16, 8), 1 standing as 2**20."""
    if name == "normal":
        return tabled(normal_distribution, -8, 8, FULL)
    if name == "logistic":
        return tabled(lambda x: 1 / (1 + (-x).exp()), -22, 22, FULL)
    return tabled(lambda x: x.exp(), -16, 8, 2**20)


def to_grid(x: Tensor) -> Tensor:
    """float64, rounded to multiples of 1 / `GRID` within +-`LARGEST`."""
    return (x.double().clamp(-LARGEST, LARGEST) * GRID).round() / GRID


def to_ints(x: Tensor) -> Ints:
    """A tensor as integers in units of 1 / `GRID`, on the CPU; what is not finite becomes 0."""
    ints: Ints = (to_grid(x.detach().cpu().nan_to_num(0, LARGEST, -LARGEST)) * GRID).long().numpy()
    return ints


class ExactSum(nn.Module):
    """A linear layer or a convolution of float64 numbers on the grid, as a product of matrices whose every sum is exact.

    Raises:
        ValueError: If weights are so large that a sum might need more than 53 bits, or the layer is of a kind that is not known here.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.kind: tuple[Any] = (layer,)  # in a tuple, so that its weights are not this module's
        plain = isinstance(layer, nn.Linear) or (layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros")
        weight = (layer.weight.detach().double() * WEIGHT_GRID).round() / WEIGHT_GRID
        if isinstance(layer, nn.ConvTranspose2d):
            weight = weight.flatten(1).T  # (out * k * k, in)
        self.register_buffer("weight", weight.flatten(1).cpu())
        bias = torch.zeros(1, device="cpu") if layer.bias is None else layer.bias.detach()
        self.register_buffer("bias", to_grid(bias).cpu())
        if not plain or not weight.flatten(1).abs().sum(1).max() < 2**53 / (GRID * WEIGHT_GRID * LARGEST) / 32:
            raise ValueError(f"model: got {layer} with weights or options beyond exact sums, expected smaller weights")

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.kind[0]
        x, weight = to_grid(x), self.weight
        if isinstance(layer, nn.Linear):
            return to_grid(x @ weight.T + self.bias)
        height, width = x.shape[2:]
        (k, k2), (s, s2), (p, p2) = layer.kernel_size, layer.stride, layer.padding
        if isinstance(layer, nn.ConvTranspose2d):
            o, o2 = layer.output_padding
            size = (height - 1) * s - 2 * p + k + o, (width - 1) * s2 - 2 * p2 + k2 + o2
            y = F.fold(weight @ x.flatten(2), size, (k, k2), padding=(p, p2), stride=(s, s2))
        else:
            columns = F.unfold(x, (k, k2), padding=(p, p2), stride=(s, s2))  # (N, in * k * k, places)
            y = (weight @ columns).unflatten(2, ((height + 2 * p - k) // s + 1, (width + 2 * p2 - k2) // s2 + 1))
        return to_grid(y + self.bias[:, None, None])


class ExactActivation(nn.Module):
    """An activation read off the tables; numbers on the grid in and out."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.kind = type(activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is nn.ReLU:
            return x.clamp(min=0)
        t = torch.as_tensor(to_ints(x)).numpy()
        if self.kind is nn.LeakyReLU:
            y = np.where(t < 0, t // 100, t)
        elif self.kind is nn.Tanh:
            y = (2 * curve("logistic")(t << 5) - FULL) * GRID >> 30
        else:  # GELU is x Phi(x), SiLU is x times the logistic function
            y = t * curve("normal" if self.kind is nn.GELU else "logistic")(t << 4) >> 30
        return torch.from_numpy(y).double() / GRID


SUMS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
PLAIN_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU)
HOLDERS = (MLPEncoder, MLPDecoder, ConvEncoder, ConvDecoder, ResidualBlock, nn.Sequential, nn.ModuleList, nn.Flatten, nn.Unflatten)


def exact_network(network: nn.Module) -> nn.Module:
    """A copy, on the CPU, that computes exactly: the same numbers on every machine, in every batch, on any number of threads.

    Raises:
        ValueError: If it has a part whose arithmetic is not known here: a network of your own, or a hierarchical one.
    """
    if isinstance(network, SUMS):
        return ExactSum(network)
    if isinstance(network, PLAIN_ACTIVATIONS):
        if isinstance(network, nn.LeakyReLU) and network.negative_slope != 0.01:
            raise ValueError(f"model: got {network}, expected the slope 0.01")
        return ExactActivation(network)
    if type(network) not in HOLDERS:
        known = "fully connected or convolutional networks of vaelib (mlp, conv, two-layer)"
        raise ValueError(f"model: got a network with a {type(network).__name__}, which has no exact form, expected {known}")
    network = deepcopy(network)
    for name, part in network.named_children():
        setattr(network, name, exact_network(part))
    return network


def exact_model(model: VAE) -> VAE:
    """A copy of the model whose networks are exact (`exact_network`), on the CPU, in evaluation mode."""
    if not isinstance(model, VAE):
        raise ValueError(f"model: got {describe(model)}, expected a VAE")
    copied = deepcopy(model).cpu().eval()
    copied.encoder, copied.decoder = exact_network(copied.encoder), exact_network(copied.decoder)
    return copied
