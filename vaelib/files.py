"""Pictures from files and from the items of data sets, as ``uint8`` pixels: what `vaelib.data` makes sets of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaelib._validation import as_path, check_image_shape, describe


def read_image(path: str | Path, image_shape: Sequence[int]) -> Tensor:
    """An image file of any format that Pillow reads, as ``uint8`` (C, H, W): turned upright, resized, cropped to its centre.

    What is transparent shows white behind it. 16 bits per pixel are scaled to 8; 32-bit integers and floating-point numbers are refused,
    since the file does not say which of them are black and white.

    Raises:
        ValueError: If the file is missing, no whole image or of such numbers, or if `image_shape` asks for other than 1 or 3 channels.
    """
    from PIL import Image, ImageOps

    shape = check_image_shape("image_shape", image_shape)
    if shape[0] not in (1, 3):
        raise ValueError(f"image_shape: got {shape[0]} channels, expected 1 (grey) or 3 (RGB) for an image file")
    try:
        with Image.open(as_path(path)) as file:
            image = ImageOps.exif_transpose(file)
            wide = image.mode == "I" and file.format in ("PPM", "PNG")  # 16 bits, of which Pillow makes 32
            if wide or image.mode.startswith("I;16"):  # Pillow would clip the 65536 levels at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
                raise ValueError(f"its pixels are {kind} on a scale that is not known, expected 8 or 16 bits")
            return fitted(image, shape)
    except Exception as error:  # Pillow's readers raise errors of many kinds on a broken file
        raise ValueError(f"path: got {path}, expected an image file ({error})") from error


def fitted(image: Any, shape: tuple[int, int, int]) -> Tensor:
    """An image of Pillow, white behind what is transparent, resized and cropped to its centre: ``uint8`` (C, H, W)."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"image_shape: got {channels} channels, expected 1 (grey) or 3 (RGB) for an image file")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height))
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1).contiguous()


def files_below(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each file below a folder, through links too, with "" or the reason why it cannot be read; see `load_folder`."""
    links: list[Path] = []
    folders, seen = [folder], set()  # links are followed last, so that a folder has the name of its own where it has one
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            identity = folder.stat()
            if (identity.st_dev, identity.st_ino) in seen:
                yield folder, "a link to a folder that was read before"
                continue
            seen.add((identity.st_dev, identity.st_ino))
            entries = sorted(folder.iterdir())
        except OSError as error:
            yield folder, error.strerror or str(error)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry)
            elif entry.is_file() or entry.is_symlink():
                yield entry, "" if entry.is_file() else "a broken link"


def read_files(path: Path, image_shape: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each image file below the folder, by its name within it, and the reason for each file that cannot be read, see `load_folder`."""
    found, skipped, reason = {}, {}, "it has no files"
    if not path.is_dir():
        raise ValueError(f"path: got {path}, expected a folder; {'it is a file' if path.exists() else 'there is none'}")
    for file, problem in sorted(files_below(path)):
        name = file.relative_to(path).as_posix()
        if problem:
            skipped[name] = reason = problem
            continue
        try:
            found[name] = read_image(file, image_shape)
        except ValueError as error:
            text = str(error.__cause__ or error)
            for form in (file, file.resolve()):  # Pillow names one or the other, by its version
                text = text.replace(repr(str(form)), "")
            skipped[name] = text.strip(" :")
            reason = str(error)
    if not found:
        raise ValueError(f"path: got {path}, expected a folder with an image that can be read; {len(skipped)} cannot ({reason})")
    return found, skipped


def image_and_label(i: int, item: Any) -> tuple[Any, Any]:
    """Image and label (None without one) of item i of a data set."""
    if isinstance(item, dict):
        key = next((key for key in ("image", "img") if key in item), None)
        if key is None:
            raise ValueError(f"dataset: item {i} is a dict of {', '.join(map(repr, item))}, expected one with 'image' or 'img'")
        return item[key], item.get("label")
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def as_pixels(what: str, image: Any, shape: tuple[int, int, int]) -> Tensor:
    """One image of Pillow, of NumPy or of torch as ``uint8`` (C, H, W)."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return fitted(image, shape)
    try:
        # a copy of an array, since data sets hand out views that nobody may write to, of which torch warns
        values = torch.as_tensor(image.copy() if isinstance(image, np.ndarray) else image, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} is {describe(image)}, expected an image of Pillow, an array or a tensor") from error
    if values.shape == shape[1:] and shape[0] == 1:
        values = values[None]
    if values.shape != shape and values.dim() == 3 and isinstance(image, np.ndarray):
        values = values.permute(2, 0, 1)  # arrays have their channels last
    if values.shape != shape:
        raise ValueError(f"{what} has the shape {tuple(values.shape)}, expected {shape}; only images of Pillow are resized")
    if values.is_floating_point() and values.min() >= 0 and values.max() <= 1:
        return (255 * values).round().to(torch.uint8)
    if values.dtype != torch.uint8:
        raise ValueError(f"{what} is {describe(values)}, expected uint8, or floating-point numbers from 0 to 1")
    return values
