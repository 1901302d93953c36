"""Checks of arguments: each error names the argument, what came, and what was expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def describe(value: Any) -> str:
    """A short description of a value for an error message: dtype and shape of a tensor, else type and repr."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def check_choice(argument: str, value: Any, options: Iterable[Any]) -> Any:
    """`value` if it is one of `options`; otherwise a ValueError that offers the nearest option."""
    options = sorted(options)
    if value in options:
        return value
    names = {str(option).lower(): option for option in options}
    near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {names[near[0]]!r}?" if near else ""
    raise ValueError(f"{argument}: got {value!r}, expected one of {', '.join(map(repr, options))}{hint}")


def check_int(argument: str, value: Any, minimum: int = 1, maximum: float = 2**63 - 1) -> int:
    """`value` as an int of at least `minimum` and at most `maximum`: torch counts in 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        most = f" and at most {maximum}" if isinstance(value, int) and value > maximum else ""
        raise ValueError(f"{argument}: got {describe(value)}, expected an integer of at least {minimum}{most}")
    return value


def check_seed(argument: str, value: Any) -> int:
    """`value` as a seed: an integer from 0 to 2**63 - 1."""
    seed = check_int(argument, value, minimum=0, maximum=math.inf)
    if seed >= 2**63:
        raise ValueError(f"{argument}: got {value}, expected an integer below 2**63")
    return seed


def check_number(argument: str, value: Any, minimum: float = 0.0, *, exclusive: bool = False) -> float:
    """`value` as a finite float, at least `minimum` (above it where `exclusive`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < minimum or (exclusive and value == minimum):
        bound = f"above {minimum}" if exclusive else f"of at least {minimum}"
        raise ValueError(f"{argument}: got {describe(value)}, expected a finite number {bound}")
    return float(value)


def check_image_shape(argument: str, value: Any) -> tuple[int, int, int]:
    """`value` as (channels, height, width), each at least 1."""
    expected = "(channels, height, width), three positive integers"
    if not isinstance(value, Sequence) or len(value) != 3:
        raise ValueError(f"{argument}: got {describe(value)}, expected {expected}")
    channels, height, width = (check_int(f"{argument} = {expected}", side) for side in value)
    return channels, height, width


def check_pixels(argument: str, value: Any, image_shape: Sequence[int] | None = None) -> Tensor:
    """`value` if it is a uint8 tensor (N, C, H, W) with N >= 1, of `image_shape` where that is given."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        raise ValueError(f"{argument}: got {describe(value)}, expected pixels: a uint8 tensor with values 0..255")
    if value.dim() != 4:
        raise ValueError(f"{argument}: got {describe(value)}, expected shape (N, C, H, W)")
    if len(value) == 0:
        raise ValueError(f"{argument}: got an empty set, shape {tuple(value.shape)}; expected at least one image")
    if image_shape is not None and tuple(value.shape[1:]) != tuple(image_shape):
        raise ValueError(f"{argument}: got images of shape {tuple(value.shape[1:])}, expected {tuple(image_shape)}")
    return value


def check_observation(argument: str, value: Any, shape: Sequence[int] | None = None) -> Tensor:
    """`value` if it is a non-empty floating tensor (N, C, H, W), of image shape `shape` where that is given."""
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        raise ValueError(f"{argument}: got {describe(value)}, expected the model's x; call likelihood.observe(pixels) first")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{argument}: got {describe(value)}, expected a floating-point tensor")
    if value.dim() != 4:
        raise ValueError(f"{argument}: got {describe(value)}, expected shape (N, C, H, W)")
    if len(value) == 0:
        raise ValueError(f"{argument}: got an empty set, shape {tuple(value.shape)}; expected at least one image")
    if shape is not None and tuple(value.shape[1:]) != tuple(shape):
        raise ValueError(f"{argument}: got images of shape {tuple(value.shape[1:])}, expected {tuple(shape)}")
    return value


def check_same_shape(**tensors: Tensor) -> None:
    """ValueError unless all tensors have one shape: the library never broadcasts one operand of a density silently."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{', '.join(shapes)}: got shapes {', '.join(map(str, shapes.values()))}, expected equal shapes")
