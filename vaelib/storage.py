"""Saved models: a folder with the weights (safetensors) and a config that people can read; loading runs no code from it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vaelib._validation import as_path, check_choice, describe, help_at, warn
from vaelib.vae import MODELS, VAE

WEIGHTS, CONFIG, CHECKPOINT, LOCK = "model.safetensors", "config.json", "checkpoint.pt", ".lock"
RELEASED = Path(__file__).parent / "assets" / "models"  # a folder for each model that comes with the library
MANIFEST = RELEASED / "released.json"
BROKEN = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)  # what a config of nonsense raises


def writable_folder(argument: str, path: str | Path) -> Path:
    """`path` as a folder that exists and can be written to; otherwise a ValueError that names `argument`."""
    path = as_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"{argument}: got {path}, expected a folder that can be written ({error.strerror or error})") from error


@contextmanager
def only_writer(argument: str, path: str | Path) -> Iterator[None]:
    """Inside the block this process alone writes to the folder `path`; where another does, a ValueError that names `argument`.

    The operating system takes the lock back when the process dies. A process that has the lock may take it again.
    """
    file = writable_folder(argument, path).resolve() / LOCK
    lock = FileLock(file, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{argument}: another process is writing to {path}, expected another folder") from error
    except (OSError, NotImplementedError):  # a file system that knows no locks
        yield
        return
    try:
        yield
    finally:
        if lock.lock_counter == 1 and os.name == "posix":  # elsewhere an open file cannot be removed, and filelock does it later
            file.unlink(missing_ok=True)
        lock.release()


def read_object(argument: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError that names `argument` where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = f"it holds {describe(found)}"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{argument}: {path} is no file of one JSON object ({reason})")


def check_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """ValueError if one of the weights, which were read from `path`, is not finite: all that they compute would be NaN."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"path: {path} holds weights that are not finite (NaN or infinity), {name} the first; train anew")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A file that is written whole or not at all: the block writes to the path that it is given, which then takes the place of `path`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file; who may read it follows the umask, while `save_file` alone gives it to its owner only."""
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, path, about)
    path.chmod(mode)


def build(config: dict[str, Any]) -> VAE:
    """The model of a config with weights that hold no memory yet (on the meta device): nothing random is drawn."""
    arguments = dict(config)
    kind = check_choice("model", arguments.pop("model", None), MODELS)
    with torch.device("meta"):
        return MODELS[kind](**arguments)


def signature(model: VAE) -> dict[str, Any]:
    """What must agree for weights to fit: the likelihood's class, and each weight's shape and dtype."""
    return {"likelihood": type(model.likelihood)} | {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


def save(model: VAE, path: str | Path) -> None:
    """Write the model to the folder `path`: ``model.safetensors`` and ``config.json``, each whole or not at all.

    Raises:
        ValueError: If the folder cannot be written, or the model was not built by a function of vaelib and so has no config.

    Example:
        >>> import os, tempfile, vaelib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vaelib.save(vaelib.mlp_vae(latent_dim=2), folder)
        ...     sorted(os.listdir(folder))
        ['config.json', 'model.safetensors']
    """
    if model.config is None:
        builders = ", ".join(builder.__name__ for builder in MODELS.values())
        own = "or by a function of your own under vaelib.register_model; save its state_dict() yourself"
        raise ValueError(f"model: got a VAE without a config, expected one built by {builders}, {own}")
    try:
        config = json.dumps(model.config, indent=2)
    except TypeError as error:
        raise ValueError(
            f"model: got a config that JSON cannot hold ({error}), expected numbers, strings, lists and dicts"
        ) from error
    if signature(model) != signature(build(json.loads(config))):
        raise ValueError(
            "model: got a VAE that its config does not build again (other parts or dtype); save its state_dict() yourself"
        )
    path = writable_folder("path", path)
    try:
        with atomic(path / CONFIG) as partial_config, atomic(path / WEIGHTS) as partial:  # the weights take their place first
            # they carry the config too: `load` can tell when the two files are not of one model
            write_tensors(partial, model.state_dict(), {"config": config})
            partial_config.write_text(config + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: got {path}, expected a folder that can be written ({error})") from error


def released() -> dict[str, dict[str, Any]]:
    """The trained models that come with vaelib, which `load` knows by name: what each was trained on, how, and what it scores.

    Returns:
        For each name a dict with ``data``, the image set; ``training``, the record of the run; ``test``, an `Evaluation` of the stored
        weights on the whole test set, in nats per image; ``sha256`` of the weights.

    Example:
        >>> import vaelib
        >>> sorted(vaelib.released())
        ['cifar-map', 'mnist-mlp', 'mnist-plane']
        >>> vaelib.load("mnist-plane").latent_dim
        2
    """
    return read_object("released", MANIFEST)


def found_folder(path: str | Path) -> Path:
    """The folder that `load` reads: `path`, or that of the released model of this name, whose weights are checked first.

    A folder comes first, with a warning where it hides a released model.
    """
    name, path = str(path), as_path(path)
    card = released().get(name)
    if path.exists():
        if card:
            warn(f"path: got {name!r}, a folder here and a released model; the folder is loaded{help_at('released-model')}")
        return path
    if card is None:
        return path
    try:
        found = hashlib.sha256((RELEASED / name / WEIGHTS).read_bytes()).hexdigest()
    except OSError as error:
        found = str(error)
    if found != card["sha256"]:
        way_out = f"install vaelib again{help_at('released-model')}"
        raise ValueError(f"path: the released model {name!r} is missing or damaged (its sha256 is {found}); {way_out}")
    return RELEASED / name


def load(path: str | Path, model: VAE | None = None) -> VAE:
    """The model that `save` wrote to the folder `path`, or a released one of that name, on the CPU, in evaluation mode.

    Args:
        path: a folder, or a name of `released`, such as ``"mnist-mlp"``. A folder of that name comes first, with a warning.
        model: one that you built as the saved one was: it is given the weights, moved to the CPU and returned. Without it, a model or
            likelihood of your own must be registered first, see `register_model` and `register_likelihood`.

    Raises:
        ValueError: If a file is missing or broken, the weights belong to another model, or one of them is not finite; if those of a
            released model do not have their checksum.

    Example:
        >>> import tempfile, vaelib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vaelib.save(vaelib.mlp_vae(latent_dim=2), folder)
        ...     vaelib.load(folder).latent_dim
        2
    """
    path = found_folder(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            cut = (
                f" (but the {CHECKPOINT} of a run that was cut off, with which fit goes on: resume=True, or vaelib train --resume)"
            )
            known = f"; released models are {', '.join(map(repr, sorted(released())))}{help_at('released-model')}"
            hint = cut if (path / CHECKPOINT).is_file() else "" if path.exists() else known
            raise ValueError(f"path: got {path}, expected a folder written by vaelib.save; it has no {name}{hint}")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        built = model is None
        model = build(config) if model is None else model.cpu()
    except (OSError, *BROKEN) as error:
        own = "one of your own is registered first (register_model, register_likelihood), or given: load(path, model=...)"
        raise ValueError(f"path: {path / CONFIG} is not a config written by vaelib.save ({error}); {own}") from error
    try:
        with safe_open(path / WEIGHTS, "pt") as file:
            stored = (file.metadata() or {}).get("config")
        if stored != json.dumps(config, indent=2):
            raise ValueError("they belong to another model")
        weights = load_file(path / WEIGHTS)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        for name in [*shapes, *weights]:
            if (found := weights[name].shape if name in weights else None) != (expected := shapes.get(name)):
                raise ValueError(f"they hold {name} with shape {found and tuple(found)}, the model {expected and tuple(expected)}")
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path: {path / WEIGHTS} is broken or not the weights of the model in {CONFIG} ({reason})") from error
    check_weights(path / WEIGHTS, weights)
    model.load_state_dict(weights, assign=built)
    return model.eval()
