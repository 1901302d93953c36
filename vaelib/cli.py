"""The command line: `vaelib train`, `vaelib evaluate`, `vaelib sample`, over the same functions that the book uses."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vaelib._validation import check_choice, check_int
from vaelib.data import NAMES, load_images, train_valid_split
from vaelib.evaluation import evaluate as evaluate_model
from vaelib.generation import generate
from vaelib.ledger import entry
from vaelib.storage import CONFIG, MODELS, load, save, writable_folder, write_text
from vaelib.training import TrainConfig, choose_device, fit

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Variational autoencoders: train, evaluate, sample.",
)
RUN = "run.json"

Folder = Annotated[Path, typer.Argument(help="Folder of a trained model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: one JSON object, or a line for each value."""
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    for key, value in result.items():
        print(f"{key:32} {value:.4f}" if isinstance(value, float) else f"{key:32} {value}")


@app.command()
def train(
    data: Annotated[str, typer.Option(help=f"Image set: {', '.join(NAMES)}.")] = "mnist",
    model: Annotated[str, typer.Option(help=f"Kind of network: {', '.join(MODELS)}.")] = "mlp",
    out: Annotated[Path, typer.Option(help="Folder for the model, its history and the record of the run.")] = Path("runs/model"),
    likelihood: Annotated[str, typer.Option(help="bernoulli, gaussian, discretized_logistic.")] = "bernoulli",
    hidden: Annotated[str, typer.Option(help="Sizes of the hidden layers, separated by commas.")] = "400",
    latent_dim: Annotated[int, typer.Option(help="Size of z.")] = 20,
    epochs: int = TrainConfig.epochs,
    batch_size: int = TrainConfig.batch_size,
    optimizer: Annotated[str, typer.Option(help="A class of torch.optim.")] = "Adam",
    learning_rate: float = TrainConfig.learning_rate,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = TrainConfig.warmup,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 leaves it alone.")] = 100.0,
    beta: float = 1.0,
    kl_warmup_epochs: float = 0.0,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without a better held-out ELBO; 0 never stops.")] = 0,
    valid_size: Annotated[int, typer.Option(help="Training images held out for the curve; 0 takes a twelfth.")] = 0,
    seed: int = 0,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is already in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a VAE and save it."""
    import torch

    check_choice("model", model, MODELS)
    try:
        hidden_dims = tuple(int(size) for size in hidden.split(",") if size.strip())
    except ValueError as error:
        raise ValueError(f"hidden: got {hidden!r}, expected integers separated by commas, such as 500,200") from error
    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        clip_norm=clip_norm or None,
        beta=beta,
        kl_warmup_epochs=kl_warmup_epochs,
        patience=patience or None,
        seed=seed,
        device=device,
        progress=not as_json,
    )
    choose_device(device)
    if (out / CONFIG).exists() and not overwrite:
        raise ValueError(f"out: {out} already holds a model, expected another folder; --overwrite replaces it")
    images = load_images(data)
    train_images, valid = train_valid_split(images, check_int("valid_size", valid_size, minimum=0) or len(images) // 12, seed)
    torch.manual_seed(seed)
    vae = MODELS[model](image_shape=images.image_shape, hidden_dims=hidden_dims, latent_dim=latent_dim, likelihood=likelihood)
    writable_folder("out", out)
    start = time.perf_counter()
    history = fit(vae, train_images, valid, config)
    seconds = time.perf_counter() - start
    save(vae, out)
    write_text(out / "history.json", json.dumps(list(history), indent=1) + "\n")
    # the epoch whose weights are saved: the best one where an early stop put it back
    saved_epoch = dict(history[history.best_epoch - 1 if patience and history.best_epoch else -1]) if history else {}
    saved_epoch.pop("seconds", None)
    summary = {
        "out": str(out),
        "data": data,
        "epochs": len(history),
        "stopped": history.stopped,
        "device": history.device,
        "seconds": round(seconds, 1),
        **saved_epoch,
    }
    record = entry(shlex.join(["vaelib", *sys.argv[1:]]), seed, seconds, summary) | {"data": data, "training": config.as_dict()}
    write_text(out / RUN, json.dumps(record, indent=2) + "\n")
    show(summary, as_json)
    if history.stopped == "interrupted":
        raise typer.Exit(130)


def data_of(run: Path, data: str) -> str:
    """The data set named on the command line, else the one the run was trained on."""
    if data:
        return data
    try:
        return str(json.loads((run / RUN).read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {run / RUN} does not say what the model was trained on, expected --data") from error


@app.command()
def evaluate(
    run: Folder,
    data: Annotated[str, typer.Option(help="Image set; by default the one the model was trained on.")] = "",
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    num_samples: Annotated[int, typer.Option(help="Importance samples per image for log p(x); 0 leaves it out.")] = 0,
    elbo_samples: Annotated[int, typer.Option(help="Draws per image for the ELBO.")] = 10,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Held-out ELBO and its terms, in nats per image; with --num-samples the importance-weighted log p(x) too."""
    model = load(run).to(choose_device(device))
    name = data_of(run, data)
    result = evaluate_model(model, load_images(name, split), num_samples, elbo_samples, seed=seed)
    show({"data": name, "split": split} | result.as_dict(), as_json)


@app.command()
def sample(
    run: Folder,
    out: Annotated[Path, typer.Option(help="Image file to write.")] = Path("samples.png"),
    num_images: Annotated[int, typer.Option(help="How many samples.")] = 64,
    temperature: Annotated[float, typer.Option(help="Factor on the prior's standard deviation.")] = 1.0,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Draw images from the prior into one picture."""
    from PIL import Image

    from vaelib.plotting import tile

    sheet = tile(generate(load(run), num_images, temperature, seed), columns=math.ceil(math.sqrt(num_images)))
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"out: got {out}, expected the name of an image file such as samples.png")
    if out.is_dir():
        raise ValueError(f"out: got the folder {out}, expected the name of an image file")
    writable_folder("out", out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        partial = Path(folder) / out.name
        Image.fromarray(sheet).save(partial)
        os.replace(partial, out)
    show({"out": str(out), "num_images": num_images, "temperature": temperature, "seed": seed}, as_json)


def main() -> None:
    """Run the command; bad input ends with one line on stderr and exit status 2."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        print("vaelib: error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
