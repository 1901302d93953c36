"""The command line: `vaelib train`, `vaelib evaluate`, `vaelib sample`, over the same functions that the book uses."""

from __future__ import annotations

import inspect
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vaelib._validation import check_choice, check_int
from vaelib.checkpoints import FILE as CHECKPOINT
from vaelib.data import NAMES, load_images, train_valid_split
from vaelib.distributed import join, leave
from vaelib.evaluation import evaluate as evaluate_model
from vaelib.generation import generate
from vaelib.ledger import entry
from vaelib.likelihoods import LIKELIHOODS
from vaelib.storage import CONFIG, MODELS, WEIGHTS, load, save, writable_folder, write_text
from vaelib.training import HISTORY, TrainConfig, choose_device, fit

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


def model_arguments(model: str, likelihood: str, **given: str | int) -> dict[str, Any]:
    """The arguments for the model's builder from the text of the command line; what was left out takes the builder's default.

    Raises:
        ValueError: For text that is no number, or an argument that this kind of model does not have.
    """
    arguments: dict[str, Any] = {}
    if likelihood:
        try:
            arguments["likelihood"] = json.loads(likelihood) if likelihood.startswith("{") else likelihood
        except ValueError as error:
            raise ValueError(f"likelihood: got {likelihood!r}, expected a name or a JSON object ({error})") from error
    for name, text in given.items():
        if text == "" or text is None:
            continue
        option = {"hidden_dims": "hidden"}.get(name, name)
        if name not in inspect.signature(MODELS[model]).parameters:
            raise ValueError(f"{option}: got {text!r}, but the model {model!r} takes no such argument")
        separator = "x" if name == "latent_dim" else ","
        try:
            numbers = [int(number) for number in str(text).split(separator) if number.strip() or name == "latent_dim"]
        except ValueError as error:
            example = "128 or 64x8x8" if name == "latent_dim" else "500,200"
            raise ValueError(f"{option}: got {text!r}, expected integers such as {example}") from error
        single = name in ("residual_blocks", "latent_dim") and len(numbers) == 1
        arguments[name] = numbers[0] if single else tuple(numbers)
    return arguments


@app.command()
def train(
    data: Annotated[str, typer.Option(help=f"Image set: {', '.join(NAMES)}.")] = "mnist",
    model: Annotated[str, typer.Option(help=f"Kind of network: {', '.join(MODELS)}.")] = "mlp",
    out: Annotated[Path, typer.Option(help="Folder for the model, its history and the record of the run.")] = Path("runs/model"),
    likelihood: Annotated[
        str, typer.Option(help=f"{', '.join(LIKELIHOODS)}, or a JSON object with its arguments; default: the model's.")
    ] = "",
    hidden_dims: Annotated[str, typer.Option("--hidden", help="mlp: sizes of the hidden layers, such as 500,200.")] = "",
    latent_dim: Annotated[str, typer.Option(help="Size of z; conv: also channels x height x width, such as 64x8x8.")] = "",
    channels: Annotated[str, typer.Option(help="conv: channels of its stages, such as 32,64,128.")] = "",
    residual_blocks: Annotated[str, typer.Option(help="conv: residual blocks after each stage.")] = "",
    epochs: int = TrainConfig.epochs,
    batch_size: Annotated[int, typer.Option(help="Images per step, over all processes together.")] = TrainConfig.batch_size,
    optimizer: Annotated[str, typer.Option(help="A class of torch.optim.")] = "Adam",
    learning_rate: float = TrainConfig.learning_rate,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = TrainConfig.warmup,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 leaves it alone.")] = 100.0,
    skip_norm: Annotated[float, typer.Option(help="Steps with a larger gradient are left out; 0 leaves none out.")] = 0.0,
    beta: float = 1.0,
    kl_warmup_epochs: float = 0.0,
    free_bits: Annotated[float, typer.Option(help="Nats per latent unit that cost nothing.")] = 0.0,
    ema_decay: Annotated[float, typer.Option(help="Decay of the moving average of the weights; 0 keeps none.")] = 0.0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images at random.")] = False,
    precision: Annotated[str, typer.Option(help="float32 or bf16.")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels innermost in memory.")] = False,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without a better held-out ELBO; 0 never stops.")] = 0,
    valid_size: Annotated[int, typer.Option(help="Training images held out for the curve; 0 takes a twelfth.")] = 0,
    checkpoint_epochs: Annotated[int, typer.Option(help="Epochs between checkpoints.")] = 1,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints amid an epoch; 0 writes none.")] = 0.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's checkpoint, or start where there is none.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the history for TensorBoard too.")] = False,
    seed: int = 0,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is already in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a VAE and save it. Several processes: torchrun --nproc-per-node N -m vaelib train ..."""
    import torch

    check_choice("model", model, MODELS)
    arguments = model_arguments(
        model, likelihood, hidden_dims=hidden_dims, latent_dim=latent_dim, channels=channels, residual_blocks=residual_blocks
    )
    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        clip_norm=clip_norm or None,
        skip_norm=skip_norm or None,
        beta=beta,
        kl_warmup_epochs=kl_warmup_epochs,
        free_bits=free_bits,
        ema_decay=ema_decay or None,
        flip=flip,
        precision=precision,
        compile=compiled,
        channels_last=channels_last,
        patience=patience or None,
        checkpoint_epochs=checkpoint_epochs,
        checkpoint_minutes=checkpoint_minutes or None,
        seed=seed,
        device=device,
        progress=not as_json,
    )
    group = join(choose_device(device))
    if resume and overwrite:
        raise ValueError("overwrite: got it beside --resume, expected one of the two")
    found = [name for name in (CONFIG, CHECKPOINT) if (out / name).exists()]
    if found and not (overwrite or (resume and CHECKPOINT in found)):
        has = "already holds a model" if CONFIG in found else "already holds a checkpoint, --resume goes on from it"
        raise ValueError(f"out: {out} {has}, expected another folder; --overwrite replaces it")
    if group.leads:
        images = load_images(data)  # fetched by one process only
    group.wait()
    if not group.leads:
        images = load_images(data)
    train_images, valid = train_valid_split(images, check_int("valid_size", valid_size, minimum=0) or len(images) // 12, seed)
    torch.manual_seed(seed)
    vae = MODELS[model](image_shape=images.image_shape, **arguments)
    if group.leads:
        writable_folder("out", out)
        if overwrite:
            for name in (CHECKPOINT, CONFIG, WEIGHTS, HISTORY, RUN):
                (out / name).unlink(missing_ok=True)
            shutil.rmtree(out / "tensorboard", ignore_errors=True)
    group.wait()
    start = time.perf_counter()
    history = fit(vae, train_images, valid, config, folder=out, resume=resume, tensorboard=tensorboard)
    seconds = time.perf_counter() - start
    leave()
    if not group.leads:
        return
    if history.steps == 0 and (out / RUN).exists():  # the run was finished before: its record stands
        show(json.loads((out / RUN).read_text(encoding="utf-8"))["metrics"], as_json)
        return
    save(vae, out)
    # the epoch whose weights are saved: the best one where an early stop put it back; none where Ctrl-C came amid one
    saved_epoch = dict(history[history.best_epoch - 1 if patience and history.best_epoch else -1]) if history else {}
    saved_epoch.pop("seconds", None)
    if history.stopped == "interrupted":
        saved_epoch = {}
    summary = {
        "out": str(out),
        "data": data,
        "epochs": len(history),
        "stopped": history.stopped,
        "device": history.device,
        "processes": group.size,
        "steps": history.steps,
        "seconds": round(seconds, 1),
        "seconds_of_all_epochs": round(sum(history["seconds"]), 1),
        **saved_epoch,
    }
    record = entry(shlex.join(["vaelib", *sys.argv[1:]]), seed, seconds, summary)
    record |= {"data": data, "model": vae.config, "training": config.as_dict()}
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
        process = f" (process {os.environ['RANK']} of {os.environ['WORLD_SIZE']})" if "RANK" in os.environ else ""
        print(f"vaelib: error{process}:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
