"""Checkpoints: all that a training run needs to go on as if nothing had happened, in one file, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from vaelib._validation import plain
from vaelib.data import ImageSet
from vaelib.storage import writable_folder

FILE = "checkpoint.pt"
VERSION = 1


def fingerprint(images: ImageSet, labels: bool = False) -> str:
    """A hash of the pixels in their order, and of their labels where asked for: which images a run was trained on."""
    digest = hashlib.blake2b(images.pixels.cpu().contiguous().numpy().data, digest_size=16)
    if labels:
        digest.update(images.labels.cpu().contiguous().numpy().data)
    return f"{images.name} {tuple(images.pixels.shape)} {digest.hexdigest()}"


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` to ``checkpoint.pt`` in the folder: to a temporary file, onto the disk, then renamed over the old one.

    Raises:
        ValueError: If it cannot be written (a full disk, say); the checkpoint before it is then still whole.
    """
    folder = writable_folder("folder", folder)
    partial = folder / f".{FILE}.partial"
    try:
        with partial.open("wb") as file:
            torch.save(plain({"version": VERSION, **state}), file)  # the reader accepts no numbers of NumPy
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / FILE)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        reason = " ".join(str(error).split())
        raise ValueError(f"folder: could not write {folder / FILE} ({reason}); the checkpoint before it is kept") from error
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The state in the folder's checkpoint; no code in the file is run.

    Args:
        expected: what must agree with the file, such as the model's config and the fingerprint of the images.

    Raises:
        ValueError: If the file is truncated or no checkpoint, or was written by another run.
    """
    path = folder / FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.PickleError, zipfile.BadZipFile) as error:
        reason = str(error).split(".")[0].strip()
        raise ValueError(f"resume: {path} is truncated or no checkpoint of vaelib ({reason})") from error
    if version != VERSION:
        raise ValueError(f"resume: {path} has version {version}, expected {VERSION}")
    for name, value in expected.items():
        if state.get(name) != value:
            raise ValueError(f"resume: {path} belongs to another run: {difference(name, state.get(name), value)}")
    return state


def difference(name: str, found: Any, expected: Any) -> str:
    """Where two values differ, for a message; of two dicts the first entry that does."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *found]:
            if found.get(key) != expected.get(key):
                return difference(f"{name}.{key}", found.get(key), expected.get(key))
    return f"its {name} is {found!r}, expected {expected!r}"
