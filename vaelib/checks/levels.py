"""Judges of what a likelihood of stored pixels needs besides its score: the best scale, bits per dimension, a mean and a draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vaelib.checks.terms import itself, times
from vaelib.checks.verdicts import Mistakes, judge, verdict
from vaelib.likelihoods import nearest_level

Function = Callable[..., Any]


def scale_recipe(
    x: Tensor,
    mean: Tensor,
    error: Function = torch.sub,
    power: Function = torch.square,
    pool: Function = torch.mean,
    root: Function = torch.sqrt,
) -> Tensor:
    """The root of the mean squared error over all pixels of all images: a scalar; the arguments put mistakes into it."""
    value: Tensor = root(pool(power(error(x, mean))))
    return value


def scale_with(**switches: Any) -> partial[Tensor]:
    return partial(scale_recipe, **switches)


SCALE_MISTAKES: Mistakes = {
    "variance": ("this is the best variance; the scale is its square root", scale_with(root=itself)),
    "sum": ("the squared errors are added up; take their mean over all pixels", scale_with(pool=torch.sum)),
    "sum-pixels": (
        "the squared errors are added up over the pixels of an image; take the mean over them too",
        scale_with(pool=lambda v: v.flatten(1).sum(1).mean()),
    ),
    "mean-of-roots": (
        "the root is taken before the last mean: one scale serves all images, channels and places, so the mean comes first",
        *(scale_with(pool=lambda v, axes=axes: v.mean(axes).sqrt().mean(), root=itself) for axes in ((1, 2, 3), (0,), (0, 2, 3))),
    ),
    "sum-images": (
        "the squared errors are added up over the images; take the mean over them too",
        scale_with(pool=lambda v: v.flatten(1).mean(1).sum()),
    ),
    "less-one": (
        "one is subtracted from the number of pixels: no mean was fitted to these errors, so divide by all",
        scale_with(pool=lambda v: v.sum() / (v.numel() - 1)),
    ),
    "over-all": (
        "the root of the sum is divided by the number of pixels; divide the sum",
        scale_with(pool=lambda v: v.mean() / v.numel()),
    ),
    "per-image": ("this is one scale for each image; one serves all of them", scale_with(pool=lambda v: v.flatten(1).mean(1))),
    "per-pixel": ("this is one scale for each place of the image; one serves all of them", scale_with(pool=lambda v: v.mean(0))),
    "absolute": (
        "this is the mean absolute error, the best scale of a Laplace density; a Gaussian has the root of the mean square",
        scale_with(power=torch.abs, root=itself),
    ),
    "centred": (
        "the mean of the errors is subtracted before they are squared: an error that all pixels share counts too",
        *(scale_with(power=itself, pool=lambda v, unbiased=unbiased: v.var(unbiased=unbiased)) for unbiased in (False, True)),
    ),
    "spread": (
        "this is the spread of x, whatever the mean given for it is",
        *(scale_with(error=lambda x, mean: x, pool=torch.var, power=itself), scale_with(error=lambda x, mean: x - x.mean())),
    ),
    "half": ("the squared error is halved: the 1/2 of the log-density cancels", scale_with(pool=lambda v: 0.5 * v.mean())),
    "log": ("this is the log of the scale", scale_with(root=lambda v: 0.5 * v.log())),
    "inverse": ("this is one over the scale", scale_with(root=torch.rsqrt)),
}


@verdict
def check_optimal_scale(fn: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Judges optimal_scale(x, mean): both (N, C, H, W) -> the scale of a Gaussian that makes x likeliest, (), in units of x.

    It is one number for all pixels of all images, with a gradient for mean. eq. optimal-scale. The mistakes are in `SCALE_MISTAKES`.
    """
    shapes = ((4, 3, 2, 5), (1, 1, 3, 3), (6, 2, 2, 2))
    cases = [{"x": 2 * torch.rand(shape) - 1, "mean": 0.3 + 0.4 * torch.randn(shape)} for shape in shapes]
    cases[0]["x"][0] *= 3
    return judge("optimal_scale", fn, scale_recipe, SCALE_MISTAKES, cases, "mean")


def bits_recipe(
    log_prob: Tensor,
    image_shape: Sequence[int],
    sign: float = -1.0,
    dims: Callable[[Sequence[int]], float] = math.prod,
    unit: float = math.log(2),
    offset: float = 0.0,
    whole: Function = itself,
) -> Tensor:
    """-log_prob / (D log 2): (N,); the arguments put mistakes into it."""
    value: Tensor = whole(sign * log_prob / (dims(image_shape) * unit) + offset)
    return value


def bits_with(**switches: Any) -> partial[Tensor]:
    return partial(bits_recipe, **switches)


BITS_MISTAKES: Mistakes = {
    "sign": ("the sign is wrong: fewer bits are better, and a log-probability is negative", bits_with(sign=1.0)),
    "nats": ("these are nats: a bit is log 2 of them", bits_with(unit=1.0)),
    "multiplied": ("nats are multiplied by log 2; a nat is more than a bit, so divide", bits_with(unit=1 / math.log(2))),
    "decimal": ("the logarithm has base 10; bits have base 2", bits_with(unit=math.log(10))),
    "levels": ("the unit is log 256; a bit is log 2", bits_with(unit=math.log(256))),
    "no-dims": ("these are bits per image: divide by the number of dimensions", bits_with(dims=lambda shape: 1)),
    "pixels": (
        "the bits are divided by the pixels alone: each channel of a pixel is a dimension",
        bits_with(dims=lambda shape: math.prod(shape[1:])),
    ),
    "channels": ("the bits are divided by the channels alone", bits_with(dims=lambda shape: shape[0])),
    "offset": (
        "the width of a level is counted once more: log_prob is that of levels, no density",
        *(bits_with(offset=offset) for offset in (8.0, 7.0, math.log2(127.5), math.log2(255.0), -8.0)),
    ),
    "batch": ("the bits are divided by the number of images: each has bits of its own", bits_with(whole=lambda v: v / len(v))),
    "overflow": (
        "exp underflows where an image has thousands of nats: log_prob is a logarithm already, of another base",
        lambda p, shape: -p.exp().log2() / math.prod(shape),
        lambda p, shape: -p.double().exp().log2().float() / math.prod(shape),
    ),
    "scalar": (
        "this is one number for the batch; keep one for each image",
        bits_with(whole=torch.mean),
        bits_with(whole=torch.sum),
    ),
}


@verdict
def check_bits_per_dim(fn: Callable[[Tensor, Sequence[int]], Tensor]) -> str:
    """Judges bits_per_dim(log_prob, image_shape): (N,), nats per image, and (C, H, W) -> bits per dimension, (N,).

    eq. bits-per-dim. The mistakes are in `BITS_MISTAKES`.
    """
    shapes = ((3, 4, 5), (1, 8, 8), (3, 2, 2))
    drawn = [-60 * torch.rand(n) - least for n, least in ((5, 3), (1, 3000), (3, 3))]
    cases = [{"log_prob": log_prob, "image_shape": shape} for log_prob, shape in zip(drawn, shapes, strict=True)]
    return judge("bits_per_dim", fn, bits_recipe, BITS_MISTAKES, cases, "log_prob")


# the discretized Laplace density


def laplace_cdf(t: Tensor) -> Tensor:
    return torch.where(t < 0, 0.5 * (-t.abs()).exp(), 1 - 0.5 * (-t.abs()).exp())


def laplace_quantile(u: Tensor) -> Tensor:
    v = u - 0.5
    return -v.sign() * torch.log1p(-2 * v.abs())


def masses(m: Tensor, s: Tensor, cdf: Function, inverse: Function, lowest: bool, highest: bool) -> Tensor:
    """What each of the 256 levels gets, along a last axis: (..., 256)."""
    edges = (2 * torch.arange(257, dtype=m.dtype) - 256) / 255
    below = cdf((edges - m[..., None]) * inverse(s)[..., None])
    below = torch.where(torch.arange(257) == 0, 0.0, below) if lowest else below
    below = torch.where(torch.arange(257) == 256, 1.0, below) if highest else below
    return below.diff(dim=-1)


def mean_recipe(
    location: Tensor,
    log_scale: Tensor,
    cdf: Function = laplace_cdf,
    inverse: Function = lambda s: (-s).exp(),
    lowest: bool = True,
    highest: bool = True,
    share: Function = itself,
    values: Function = lambda level: level / 127.5 - 1,
) -> Tensor:
    """The mean of the 256 levels under a discretized density: (N, C, H, W); the arguments put mistakes into it."""
    mass = share(masses(location, log_scale, cdf, inverse, lowest, highest))
    mean: Tensor = (mass * values(torch.arange(256.0))).sum(-1)
    return mean


def mean_with(**switches: Any) -> partial[Tensor]:
    return partial(mean_recipe, **switches)


def normalized(mass: Tensor) -> Tensor:
    return mass / mass.sum(-1, keepdim=True)


LEVEL_MEAN_MISTAKES: Mistakes = {  # m: location, s: log_scale
    "location": (
        "this is the location: near the ends it is not the mean, since levels 0 and 255 own the tails",
        *(lambda m, s: m, lambda m, s: m.clamp(-1, 1)),
    ),
    "mode": ("this is the likeliest level, not the mean of all", lambda m, s: nearest_level(m)),
    "no-tails": (
        "mass is lost beyond the ends: levels 0 and 255 own the tails",
        *(mean_with(lowest=low, highest=high) for low, high in ((False, False), (True, False), (False, True))),
    ),
    "renormalized": (
        "the mass beyond the ends is spread over all levels; levels 0 and 255 own it",
        mean_with(lowest=False, highest=False, share=normalized),
    ),
    "index": (
        "this is the mean of 0 to 255; the values of x are these over 127.5, less 1",
        *(mean_with(values=itself), mean_with(values=times(1 / 255)), mean_with(values=times(1 / 127.5))),
    ),
    "inverse-scale": ("the scale is exp(-log_scale): divide by exp(log_scale)", mean_with(inverse=torch.exp)),
    "no-exp": (
        "the log-scale is taken for the scale: exp is missing",
        *(mean_with(inverse=torch.reciprocal), mean_with(inverse=lambda s: 1 / s.abs()), mean_with(inverse=itself)),
    ),
    "log-variance": (
        "the log-scale is taken for twice, or for half, of what it is",
        *(mean_with(inverse=lambda s, factor=factor: (-factor * s).exp()) for factor in (0.5, 2.0)),
    ),
    "fixed-scale": ("the scale is 1 whatever the log-scale is", mean_with(inverse=torch.ones_like)),
    "another-density": (
        "the levels have the masses of a logistic or a Gaussian, not of a Laplace density",
        *(mean_with(cdf=torch.sigmoid), mean_with(cdf=torch.special.ndtr)),
    ),
    "edges": (
        "the edges of the bins lie elsewhere: between the levels k - 1 and k it is (2 k - 256) / 255",
        *(lambda m, s, shift=shift: mean_recipe(m + shift, s) for shift in (1 / 255, -1 / 255)),
    ),
    "flipped": ("the probabilities are those below the edges; those above belong there", lambda m, s: -mean_recipe(m, s)),
    "sum": ("the levels are averaged: weigh each by its probability", mean_with(share=lambda mass: 0 * mass + 1 / 256)),
}


@verdict
def check_level_mean(fn: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Judges level_mean(location, log_scale): both (N, C, H, W) -> the mean of the 256 levels under a discretized Laplace density.

    x = level / 127.5 - 1; a level owns the bin from 1/255 below it to 1/255 above it, levels 0 and 255 the tails too. The result,
    (N, C, H, W), has a gradient. The mistakes are in `LEVEL_MEAN_MISTAKES`.
    """
    cases = [
        {"location": 0.9 * torch.randn(shape), "log_scale": torch.randn(shape) - 1.5}
        for shape in ((2, 3, 2, 4), (1, 1, 2, 2), (3, 1, 1, 1))
    ]
    cases.append({"location": torch.tensor([-0.9, 0.013, 0.6]).view(1, 3, 1, 1), "log_scale": torch.full((1, 3, 1, 1), -6.0)})
    return judge("level_mean", fn, mean_recipe, LEVEL_MEAN_MISTAKES, cases, "location log_scale")


def draw_recipe(
    location: Tensor,
    log_scale: Tensor,
    uniform: Tensor,
    noise: Function = laplace_quantile,
    flip: bool = False,
    scale: Function = torch.exp,
    end: Function = nearest_level,
) -> Tensor:
    """A draw from the 256 levels, from uniform noise: (N, C, H, W); the arguments put mistakes into it."""
    x: Tensor = end(location + scale(log_scale) * noise(1 - uniform if flip else uniform))
    return x


def draw_with(**switches: Any) -> partial[Tensor]:
    return partial(draw_recipe, **switches)


def level_of(x: Tensor) -> Tensor:
    return (x + 1) * 127.5


LEVEL_DRAW_MISTAKES: Mistakes = {
    "not-rounded": (
        "the draw lies between the levels: round it to the nearest",
        *(draw_with(end=itself), draw_with(end=lambda x: x.clamp(-1, 1))),
    ),
    "not-clamped": (
        "the draw leaves [-1, 1]: what lies beyond an end belongs to level 0 or 255",
        *(
            draw_with(end=lambda x, low=low, high=high: level_of(x).round().clamp(low, high) / 127.5 - 1)
            for low, high in ((-math.inf, math.inf), (0, math.inf), (-math.inf, 255), (0, 256))
        ),
    ),
    "wrapped": (
        "what lies beyond an end comes back at the other: clamp before the level becomes a byte",
        draw_with(end=lambda x: level_of(x).round().remainder(256) / 127.5 - 1),
    ),
    "rounded-down": (
        "the draw is rounded down, or up; round it to the nearest level",
        *(draw_with(end=lambda x, down=down: down(level_of(x)).clamp(0, 255) / 127.5 - 1) for down in (torch.floor, torch.ceil)),
    ),
    "wrong-grid": (
        "the draw is rounded to another grid; the levels are 2/255 apart, from -1 to 1",
        *(
            draw_with(end=lambda x, step=step: ((x * step).round() / step).clamp(-1, 1))
            for step in (1.0, 127.0, 127.5, 128.0, 255.0)
        ),
        draw_with(end=lambda x: (x.clamp(-1, 1) * 127.5).round() / 127.5),
        draw_with(end=lambda x: ((x + 1) * 128).round().clamp(0, 255) / 128 - 1),
    ),
    "index": (
        "this is the level, 0 to 255; x is level / 127.5 - 1",
        *(draw_with(end=lambda x, unit=unit: level_of(x).round().clamp(0, 255) / unit) for unit in (1.0, 255.0)),
    ),
    "no-noise": ("this is no draw: the noise is missing", draw_with(noise=torch.zeros_like)),
    "no-scale": ("the noise has scale 1, whatever the log-scale is", draw_with(scale=torch.ones_like)),
    "inverse-scale": ("the noise is divided by the scale; multiply it", draw_with(scale=lambda s: (-s).exp())),
    "log-variance": (
        "the log-scale is taken for twice, or for half, of what it is",
        *(draw_with(scale=lambda s, factor=factor: (factor * s).exp()) for factor in (0.5, 2.0)),
    ),
    "no-exp": ("the log-scale is taken for the scale: exp is missing", draw_with(scale=itself), draw_with(scale=torch.abs)),
    "flipped": ("the draw falls where the uniform number rises: the sign of the noise is wrong", draw_with(flip=True)),
    "uniform": (
        "the uniform number itself is the noise: put it through the inverse of the distribution function",
        *(draw_with(noise=itself), draw_with(noise=lambda u: u - 0.5), draw_with(noise=lambda u: 2 * u - 1)),
    ),
    "no-two": (
        "the 2 inside the logarithm is missing",
        draw_with(noise=lambda u: -(u - 0.5).sign() * torch.log1p(-(u - 0.5).abs())),
    ),
    "one-side": (
        "all of the noise lies on one side of the location: its sign is missing",
        *(draw_with(noise=lambda u, sign=sign: sign * torch.log1p(-2 * (u - 0.5).abs())) for sign in (1, -1)),
        *(draw_with(noise=torch.log), draw_with(noise=lambda u: -u.log()), draw_with(noise=lambda u: -torch.log1p(-u))),
    ),
    "another-density": (
        "the noise is that of a logistic or a Gaussian, not of a Laplace density",
        *(draw_with(noise=torch.logit), draw_with(noise=torch.special.ndtri)),
    ),
}


@verdict
def check_level_draw(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Judges level_draw(location, log_scale, uniform): all (N, C, H, W) -> x, a draw of a discretized Laplace density, on the levels.

    uniform, in (0, 1), is the noise, given: x rises with it. The mistakes are in `LEVEL_DRAW_MISTAKES`, with "own-noise".
    """
    cases = [
        {
            "location": 0.7 * torch.randn(shape),
            "log_scale": torch.randn(shape) - 1.5,
            "uniform": 0.01 + 0.98 * torch.rand(shape),
        }
        for shape in ((3, 3, 4, 5), (1, 1, 5, 5), (4, 1, 3, 1))
    ]
    return judge("level_draw", fn, draw_recipe, LEVEL_DRAW_MISTAKES, cases)
