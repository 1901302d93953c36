"""Saved models: a folder with the weights (safetensors) and a config that people can read; loading runs no code from it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vaelib._validation import check_choice, describe
from vaelib.vae import VAE, mlp_vae

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODELS = {"mlp": mlp_vae}


def writable_folder(argument: str, path: str | Path) -> Path:
    """`path` as a folder that exists and can be written to; otherwise a ValueError that names `argument`."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"{argument}: got {path}, expected a folder that can be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary file beside it, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(model: VAE, path: str | Path) -> None:
    """Write the model to the folder `path`: ``model.safetensors`` and ``config.json``, each whole or not at all.

    Raises:
        ValueError: If the folder cannot be written, or the model was not built by a function of vaelib and so has no config.
    """
    if model.config is None:
        raise ValueError("model: got a VAE without a config, expected one built by mlp_vae; save its state_dict() yourself")
    path = writable_folder("path", path)
    config = json.dumps(model.config, indent=2)
    partial = path / f".{WEIGHTS}.partial"
    try:
        # the weights carry the config too: `load` can tell when the two files are not of one model
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, partial, {"config": config})
        os.replace(partial, path / WEIGHTS)
        write_text(path / CONFIG, config + "\n")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: got {path}, expected a folder that can be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | Path) -> VAE:
    """The model that `save` wrote to the folder `path`, on the CPU, in evaluation mode.

    Raises:
        ValueError: If a file is missing or broken, or the weights belong to another model.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise ValueError(f"path: got {path}, expected a folder written by vaelib.save; it has no {name}")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = check_choice("model", config.pop("model"), MODELS)
        model = MODELS[kind](**config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"path: {path / CONFIG} is not a config written by vaelib.save ({error})") from error
    try:
        with safe_open(path / WEIGHTS, "pt") as file:
            stored = json.loads((file.metadata() or {}).get("config", "null"))
        if stored != model.config:
            raise ValueError(
                f"path: {path / WEIGHTS} belongs to another model: its config is {describe(stored)}, {CONFIG} says otherwise"
            )
        model.load_state_dict(load_file(path / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"path: {path / WEIGHTS} is broken or not the weights of this model ({error})") from error
    return model.eval()
