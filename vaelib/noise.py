"""Noise for evaluation that belongs to the image, not to its place in a batch; and noise for samples that belongs to the sample.

An estimate that draws its noise from a running generator changes with the batch size and with the order of the images. Here
each random number is a hash of (the image's pixels, seed, stream, index): the same image meets the same noise in any chunk, in
any order, on any device. The hash is the finalizer of SplitMix64 (Steele, Lea and Flood 2014) in wrapping int64 arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vaelib._validation import check_pixels, check_seed

OBSERVE, LATENT = 1, 2  # the streams: binarization, and draws of z
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


def _mix(h: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64; `>>` keeps the sign, so the mask makes it a logical shift."""
    h = (h ^ ((h >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    h = (h ^ ((h >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return h ^ ((h >> 31) & 0x1FFFFFFFF)


def image_keys(pixels: Tensor, seed: int = 0) -> Tensor:
    """One int64 key per image, from its pixels and the seed: (N, C, H, W) uint8 -> (N,)."""
    flat = check_pixels("pixels", pixels).flatten(1).long()
    seed = check_seed("seed", seed)
    weights = _mix(torch.arange(1, flat.shape[1] + 1, device=flat.device) * _GOLDEN)
    return _mix((flat * weights).sum(1) + _mix(torch.full((1,), seed, device=flat.device) * _GOLDEN))


def uniform_noise(keys: Tensor, shape: Sequence[int], stream: int, start: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float32 with 23 bits: (N, ...); entry i continues where `start` numbers were already used."""
    index = torch.arange(start + 1, start + 1 + math.prod(shape), device=keys.device)
    bits = _mix(_mix(keys + stream)[:, None] + index * _GOLDEN)  # (N, numbers)
    return ((((bits >> 41) & 0x7FFFFF) + 0.5) / 2**23).float().view(len(keys), *shape)


def normal_noise(keys: Tensor, shape: Sequence[int], stream: int, start: int = 0) -> Tensor:
    """Standard normal numbers, float32, by the inverse of the normal distribution function: (N, ...)."""
    return math.sqrt(2) * torch.erfinv(2 * uniform_noise(keys, shape, stream, start) - 1)


def normal_rows(num: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers (num, width), float32, on the CPU: row i is the same whatever `num` is.

    One call of `torch.randn` for all of them would not do: it draws fewer than 16 numbers in another way than more, and the last 16
    anew where their number is no multiple of 16.
    """
    rows = torch.empty(num, width, device="cpu")
    for row in rows:
        row.normal_(generator=generator)
    return rows
