"""Checks of arguments: each error names the argument, what came, and what was expected."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TROUBLES = "https://vaelib.github.io/vae-book/troubleshooting.html"


def describe(value: Any) -> str:
    """A short description of a value for an error message: dtype and shape of a tensor, else type and repr."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def plain(value: Any) -> Any:
    """The same with NumPy's numbers as Python's own, within dicts, lists and tuples too: what JSON and checkpoints take."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def as_path(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading ~ expanded; every path that the library is given goes through here."""
    return Path(os.path.expanduser(path))  # pathlib's raises where ~name is no user, and so may be a file


def help_at(section: str) -> str:
    """The end of a message: where the book's page on troubles has more on it. `section` is a target of book/troubleshooting.md."""
    return f"; see {TROUBLES}#{section}"


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
    """`value` as an int of at least `minimum` and at most `maximum`: torch counts in 64 bits. NumPy's integers are welcome."""
    number = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if number is None or not minimum <= number <= maximum:
        most = f" and at most {maximum}" if number is not None and number > maximum else ""
        raise ValueError(f"{argument}: got {describe(value)}, expected an integer of at least {minimum}{most}")
    return number


def check_flag(argument: str, value: Any) -> bool:
    """`value` as a bool; NumPy's is welcome."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{argument}: got {describe(value)}, expected True or False")
    return bool(value)


def check_seed(argument: str, value: Any) -> int:
    """`value` as a seed: an integer from 0 to 2**63 - 1."""
    seed = check_int(argument, value, minimum=0, maximum=math.inf)
    if seed >= 2**63:
        raise ValueError(f"{argument}: got {value}, expected an integer below 2**63")
    return seed


def check_number(argument: str, value: Any, minimum: float = 0.0, *, exclusive: bool = False) -> float:
    """`value` as a finite float, at least `minimum` (above it where `exclusive`); NumPy's numbers are welcome."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
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
    if channels_last((channels, height, width)):
        raise ValueError(
            f"{argument}: got {tuple(value)}, expected (channels, height, width): the channels come first{help_at('channels-last')}"
        )
    return channels, height, width


def channels_last(shape: Sequence[int]) -> bool:
    """Whether (C, H, W) is rather (H, W, C): 1, 3 or 4 at its end alone."""
    return min(shape[:2]) > 4 and shape[2] in (1, 3, 4)


def warn(message: str) -> None:
    """A UserWarning at the line outside vaelib that called it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("vaelib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_of_scale(argument: str, pixels: Tensor) -> None:
    """A warning where pixels are 0 and 1, or all of a set are at most 16: the levels 0..255 are expected."""
    top = int(pixels.max())
    if top == 1 or (1 < top <= 16 and len(pixels) >= 16):
        reach = "of 0 and 1 only" if top == 1 else f"of at most {top}"
        warn(
            f"{argument}: got levels {reach}, expected 0..255, where 255 is white; multiply them by {255 // top} if {top} is white"
            + help_at("pixels-of-0-and-1")
        )


def check_pixels(argument: str, value: Any, image_shape: Sequence[int] | None = None) -> Tensor:
    """The pixels of an `ImageSet`, a tensor or a NumPy array: uint8 (N, C, H, W) with N >= 1, of `image_shape` where that is given."""
    value = getattr(value, "pixels", value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8:
        value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        raise ValueError(f"{argument}: got {describe(value)}, expected pixels: a uint8 tensor with values 0..255")
    if value.dim() != 4:
        raise ValueError(f"{argument}: got {describe(value)}, expected shape (N, C, H, W)")
    if len(value) == 0:
        raise ValueError(f"{argument}: got an empty set, shape {tuple(value.shape)}; expected at least one image")
    if image_shape is None and channels_last(value.shape[1:]):
        way_out = "the channels come before height and width; permute(0, 3, 1, 2) moves them there" + help_at("channels-last")
        raise ValueError(f"{argument}: got shape {tuple(value.shape)}, expected (N, C, H, W): {way_out}")
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
