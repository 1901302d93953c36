"""What can be counted on a binary picture of a stroke: statistics that a model was not trained on, to hold it against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy import ndimage
from torch import Tensor

from vaelib._validation import describe

EIGHT = torch.ones(3, 3, dtype=torch.int64).numpy()  # neighbours across corners belong together


def check_binary(x: Tensor) -> Tensor:
    """x (..., 1, H, W) of zeros and ones, as bool (..., H, W)."""
    if x.dim() < 3 or x.shape[-3] != 1 or not torch.all((x == 0) | (x == 1)):
        raise ValueError(f"x: got {describe(x)}, expected binary images (..., 1, H, W), zeros and ones")
    return x[..., 0, :, :].bool()


def ink(x: Tensor) -> Tensor:
    """White pixels: (..., 1, H, W) -> (...)."""
    return check_binary(x).flatten(-2).sum(-1)


def changes(x: Tensor) -> Tensor:
    """Pairs of neighbours, beside or below each other, of which one is white: the length of the outline, (..., 1, H, W) -> (...)."""
    image = check_binary(x)
    return (image[..., 1:, :] != image[..., :-1, :]).flatten(-2).sum(-1) + (image[..., 1:] != image[..., :-1]).flatten(-2).sum(-1)


def parts(x: Tensor) -> Tensor:
    """Connected parts of the white pixels, neighbours across corners together: (..., 1, H, W) -> (...)."""
    image = check_binary(x)
    counts = [ndimage.label(one.numpy(), EIGHT)[1] for one in image.reshape(-1, *image.shape[-2:])]
    return torch.tensor(counts).view(image.shape[:-2])


def holes(x: Tensor) -> Tensor:
    """Connected parts of the black pixels but the one outside, across edges alone: 1 for a "0", (..., 1, H, W) -> (...)."""
    image = torch.nn.functional.pad(~check_binary(x), (1, 1, 1, 1), value=True)
    counts = [ndimage.label(one.numpy())[1] - 1 for one in image.reshape(-1, *image.shape[-2:])]
    return torch.tensor(counts).view(image.shape[:-2])


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {"ink": ink, "changes": changes, "parts": parts, "holes": holes}
