"""Checkpoints: all that a training run needs to go on as if nothing had happened, in one file, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vaelib._validation import describe, help_at, plain
from vaelib.config import TrainConfig
from vaelib.data import ImageSet
from vaelib.storage import BROKEN, CHECKPOINT, atomic, build, check_weights, writable_folder
from vaelib.vae import VAE

FILE = CHECKPOINT
VERSION = 1
# What may differ between a run and its continuation: where and how fast it runs, and what it shows, but not what it computes.
FREE_ON_RESUME = ("device", "compile", "cuda_graph", "tf32", "checkpoint_epochs", "checkpoint_minutes", "progress")
KINDS: dict[str, Any] = {
    "optimizer": dict, "averages": (list, type(None)), "best_weights": (dict, type(None)), "history": list,
    "step": int, "images": str, "elapsed": float, "best_elbo": float, "best_epoch": (int, type(None)),
}  # fmt: skip


def hash_of_images(images: ImageSet, model: VAE) -> str:
    """A hash of the pixels in their order, and of their labels where the model is given them: which images a run was trained on."""
    digest = hashlib.blake2b(images.pixels.cpu().contiguous().numpy().data, digest_size=16)
    if model.given(images.known_labels) is not model:
        digest.update(images.labels.cpu().contiguous().numpy().data)
    return f"{images.name} {tuple(images.pixels.shape)} {digest.hexdigest()}"


def identity_of(model: VAE, images: ImageSet, valid: ImageSet | None, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued: the model, the images, and what the configuration computes."""
    return {
        "model": model.config or repr(model),
        "images": hash_of_images(images, model),
        "valid": None if valid is None else hash_of_images(valid, model),
        "config": {key: value for key, value in config.as_dict().items() if key not in FREE_ON_RESUME},
    }


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` to ``checkpoint.pt`` in the folder: to a temporary file, onto the disk, then renamed over the old one.

    Raises:
        ValueError: If it cannot be written (a full disk, say); the checkpoint before it is then still whole.
    """
    folder = writable_folder("folder", folder)
    try:
        with atomic(folder / FILE) as partial, partial.open("wb") as file:
            torch.save(plain({"version": VERSION, **state}), file)  # the reader accepts no numbers of NumPy
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        reason = " ".join(str(error).split())
        raise ValueError(f"folder: could not write {folder / FILE} ({reason}); the checkpoint before it is kept") from error


def read_checkpoint(folder: Path, expected: dict[str, Any], argument: str = "resume") -> dict[str, Any]:
    """The state in the folder's checkpoint; no code in the file is run.

    Args:
        expected: what must agree with the file, such as the model's config and the fingerprint of the images.
        argument: what an error names.

    Raises:
        ValueError: If the file is truncated or no checkpoint, or was written by another run.
    """
    path = folder / FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = int(state["version"])
        if wrong := [name for name, kind in KINDS.items() if name in state and not isinstance(state[name], kind)]:
            raise ValueError(f"its {wrong[0]} is {describe(state[wrong[0]])}")
    except (OSError, EOFError, *BROKEN, pickle.PickleError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split(".")[0].split())
        raise ValueError(f"{argument}: {path} is truncated or no checkpoint of vaelib ({reason}){help_at('no-resume')}") from error
    if version != VERSION:
        raise ValueError(f"{argument}: {path} has version {version}, expected {VERSION}")
    for name, value in expected.items():
        if state.get(name) != value:
            found = difference(name, state.get(name), value) + help_at("no-resume")
            raise ValueError(f"{argument}: {path} belongs to another run: {found}")
    return state


def load_checkpoint(folder: Path) -> tuple[VAE, dict[str, Any]]:
    """The model of a run that was cut off, and the state of its checkpoint; no code in the file is run.

    Its weights are those that `fit` would have ended on: the best where it was to stop early, else their average where it kept one.

    Raises:
        ValueError: If the file is no checkpoint, or not one of a model that vaelib can build, or its weights are not finite.
    """
    state, path = read_checkpoint(folder, {}, "path"), folder / FILE
    try:
        model = build(state["model"])
        weights = state["best_weights"] or state["weights"]
        if state["best_weights"] is None and state["averages"] is not None:
            weights = weights | dict(zip(dict(model.named_parameters()), state["averages"], strict=True))
        model.load_state_dict(weights, assign=True)
        if lacking := {"history", "step", "images"} - state.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except BROKEN as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path: {path} does not hold the weights of a model that vaelib builds ({reason})") from error
    check_weights(path, model.state_dict())
    return model.eval(), state


def difference(name: str, found: Any, expected: Any) -> str:
    """Where two values differ, for a message; of two dicts the first entry that does."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *found]:
            if found.get(key) != expected.get(key):
                return difference(f"{name}.{key}", found.get(key), expected.get(key))
    return f"its {name} is {found!r}, expected {expected!r}"


def tensorboard_writer() -> Any:
    """TensorBoard's SummaryWriter, or a ValueError that says how to get it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: the package is not installed; pip install tensorboard") from error
    return SummaryWriter


@contextmanager
def held_interrupts() -> Iterator[list[int]]:
    """Let the first Ctrl-C wait until the step is done, so that a checkpoint can be written; the second one acts at once.

    Yields:
        A list that the first Ctrl-C fills.
    """
    pressed: list[int] = []
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)  # as in a job in the background
    if ignored or threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield pressed
        return

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
