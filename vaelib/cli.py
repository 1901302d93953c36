"""The command line: `vaelib train`, `evaluate`, `sample`, `index`, `search`, `compress`, `reproduce`, over the functions of the book."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from vaelib._validation import as_path, check_choice, check_int, check_number, check_seed, help_at
from vaelib.book.ledger import entry
from vaelib.book.reproduce import BUDGETS, OBJECTIVES, iwae_row
from vaelib.checkpoints import load_checkpoint, read_checkpoint
from vaelib.coding import compress, decompress
from vaelib.conditional import ConditionalVAE
from vaelib.config import TrainConfig
from vaelib.data import NAMES, ImageSet, load_folder, load_images, read_image, train_valid_split
from vaelib.diffusion import fit_diffusion, load_prior, save_prior
from vaelib.distributed import choose_device, join, leave
from vaelib.evaluation import evaluate as evaluate_model
from vaelib.files import files_below
from vaelib.generation import generate, interpolate
from vaelib.likelihoods import LIKELIHOODS
from vaelib.priors import fit_mixture, fit_second_stage
from vaelib.quantize import VQVAE, fit_code_prior
from vaelib.retrieval import DISTANCES, METHODS, LatentIndex, is_index
from vaelib.storage import CHECKPOINT, CONFIG, WEIGHTS, atomic, load, only_writer, read_object, save, writable_folder, write_text
from vaelib.training import HISTORY, fit
from vaelib.vae import MODELS, VAE

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Variational autoencoders: train, evaluate, sample, index, search, compress, reproduce.",
)
RUN, PRIOR = "run.json", "prior.safetensors"
FILES = (CHECKPOINT, CONFIG, WEIGHTS, HISTORY, RUN, PRIOR)  # what a run leaves in its folder
PRIORS = {"standard": None, "mixture": fit_mixture, "second-stage": fit_second_stage, "diffusion": fit_diffusion}


def expanded(value: Any) -> Any:
    """A path, a list of them or none, with ~ as the home folder: the shell leaves it where it stands behind --out= or in quotes."""
    return [as_path(path) for path in value] if isinstance(value, (list, tuple)) else as_path(value) if value else value


Folder = Annotated[Path, typer.Argument(help="Folder of a trained model.", callback=expanded)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


def print_version(asked: bool) -> None:
    """Print the version and end, where it was asked for."""
    if asked:
        import vaelib

        print("vaelib", vaelib.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)] = False,
) -> None:
    """What stands before a command."""


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: one JSON object, or a line for each value."""
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    for key, value in result.items():
        if isinstance(value, float):
            value = f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2g}"
        print(f"{key:32} {value}")


def model_arguments(model: str, likelihood: str, options: str = "", **given: str | int) -> dict[str, Any]:
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
    try:
        further = json.loads(options or "{}")
    except ValueError as error:
        raise ValueError(f"model-options: got {options!r}, expected a JSON object ({error})") from error
    free = inspect.signature(MODELS[model]).parameters.keys() - arguments.keys() - {"image_shape", "num_classes"}
    if not isinstance(further, dict) or not further.keys() <= free:
        raise ValueError(f"model-options: got {options!r}, expected a JSON object with some of {', '.join(sorted(free))}")
    return arguments | further


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of `TrainConfig` in place of its argument `config`.

    Type, default and help of an option are those of the field; where a field may be None, 0 stands for it. Left out are `progress` and
    `optimizer_options`, which a command line has no use for; and the mode of `compile`.
    """
    kinds = get_type_hints(TrainConfig)
    meanings = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(TrainConfig) or "", re.MULTILINE)
    texts = {name: re.sub(r'[`"]', "", " ".join((text[0].upper() + text[1:]).split())) for name, text in meanings}
    options, nullable = [], []
    for field in fields(TrainConfig):
        if field.name in ("progress", "optimizer_options"):
            continue
        kind = bool if field.name == "compile" else (get_args(kinds[field.name]) or (kinds[field.name],))[0]
        text, default = texts.get(field.name, ""), field.default  # none under python -OO
        if type(None) in get_args(kinds[field.name]):
            nullable.append(field.name)
            text, default = f"{text} 0 is None.", kind(default or 0)
        name = field.name.replace("_", "-")
        option = typer.Option(f"--{name}/--no-{name}" if default is True else f"--{name}", help=text)  # no --no-flip
        options.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        )

    signature = inspect.signature(command, eval_str=True)
    own = [parameter.replace(kind=parameter.KEYWORD_ONLY) for name, parameter in signature.parameters.items() if name != "config"]

    @functools.wraps(command)
    def configured(**given: Any) -> None:
        values: dict[str, Any] = {option.name: given.pop(option.name) for option in options}
        command(config=TrainConfig(**values | {name: values[name] or None for name in nullable}), **given)

    configured.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    configured.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
    return configured


@app.command()
@config_options
def train(
    config: TrainConfig,
    data: Annotated[str, typer.Option(help=f"Image set: {', '.join(NAMES)}; default: mnist.")] = "",
    folder: Annotated[str, typer.Option(help="Folder of image files, instead of --data.")] = "",
    size: Annotated[str, typer.Option(help="With --folder: side of the images, or HEIGHTxWIDTH; default: 64.")] = "",
    grey: Annotated[bool, typer.Option("--grey", help="With --folder: in grey, not in colour.")] = False,
    model: Annotated[str, typer.Option(help=f"Kind of network: {', '.join(MODELS)}.")] = "mlp",
    out: Annotated[
        Path, typer.Option(help="Folder for the model, its history and the record of the run.", callback=expanded)
    ] = Path("runs/model"),
    likelihood: Annotated[
        str, typer.Option(help=f"{', '.join(LIKELIHOODS)}, or a JSON object with its arguments; default: the model's.")
    ] = "",
    hidden_dims: Annotated[
        str, typer.Option("--hidden", help="mlp, conditional: sizes of the hidden layers, such as 500,200.")
    ] = "",
    latent_dim: Annotated[str, typer.Option(help="Size of z; conv: also channels x height x width, such as 64x8x8.")] = "",
    channels: Annotated[str, typer.Option(help="conv: channels of its stages, such as 32,64,128.")] = "",
    residual_blocks: Annotated[str, typer.Option(help="conv: residual blocks after each stage.")] = "",
    model_options: Annotated[
        str, typer.Option(help='JSON object with further arguments of the model\'s function, as in the reference: {"width": 64}.')
    ] = "",
    code_prior_epochs: Annotated[
        int, typer.Option(help="vq: epochs of a prior over its codes, trained after the model; 0 leaves the uniform one.")
    ] = 0,
    prior: Annotated[
        str, typer.Option(help="diffusion: fit a diffusion model to the codes afterwards, for vaelib sample --prior diffusion.")
    ] = "standard",
    prior_steps: Annotated[int, typer.Option(help="Steps of that fit; 0 takes 10000.")] = 0,
    prior_width: Annotated[
        int, typer.Option(help="Width of its network; 0 takes 512 for codes that are vectors, 64 for maps.")
    ] = 0,
    compile_mode: Annotated[str, typer.Option(help="torch.compile in this mode, such as reduce-overhead (CUDA graphs).")] = "",
    valid_size: Annotated[int, typer.Option(help="Training images held out for the curve; 0 takes a twelfth.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's checkpoint, or start where there is none.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the history for TensorBoard too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is already in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a VAE and save it. Several processes: torchrun --nproc-per-node N -m vaelib train ..."""
    import torch

    check_choice("model", model, MODELS)
    check_choice("prior", prior, ("standard", "diffusion"))
    prior_steps = check_prior_steps(prior_steps, prior)
    if check_int("prior_width", prior_width, minimum=0) and prior != "diffusion":
        raise ValueError(f"prior_width: got {prior_width}, expected it beside --prior diffusion only")
    if prior == "diffusion" and "num_classes" in inspect.signature(MODELS[model]).parameters:
        raise ValueError(
            f"prior: got {prior!r} for the model {model!r}, expected 'standard': the prior of a conditional model is kept"
        )
    arguments = model_arguments(
        model,
        likelihood,
        model_options,
        hidden_dims=hidden_dims,
        latent_dim=latent_dim,
        channels=channels,
        residual_blocks=residual_blocks,
    )
    config = replace(config, compile=compile_mode or config.compile, progress=not as_json)
    group = join(choose_device(config.device))
    if resume and overwrite:
        raise ValueError("overwrite: got it beside --resume, expected one of the two")
    check_unused(out, resume, overwrite)
    shape = folder_shape(folder, data, size, grey)
    data = data or ("" if folder else "mnist")
    if group.leads:
        images = load_folder(folder, shape) if folder else images_named(data)  # fetched by one process only
        warn_skipped(images.skipped)
    group.wait()
    if not group.leads:
        images = load_folder(folder, shape) if folder else images_named(data)
    train_images, valid = train_valid_split(
        images, check_int("valid_size", valid_size, minimum=0) or len(images) // 12, config.seed
    )
    torch.manual_seed(config.seed)
    if "num_classes" in inspect.signature(MODELS[model]).parameters:
        arguments["num_classes"] = len(images.classes)
    vae = MODELS[model](image_shape=images.image_shape, **arguments)
    if check_int("code_prior_epochs", code_prior_epochs, minimum=0) and not isinstance(vae, VQVAE):
        raise ValueError(f"code-prior-epochs: got {code_prior_epochs}, but the model {model!r} has no codes, expected vq")
    with only_writer("out", out) if group.leads else nullcontext():
        if group.leads:
            check_unused(out, resume, overwrite)  # again: another process may have been there meanwhile
            if overwrite:
                for name in FILES:
                    (out / name).unlink(missing_ok=True)
                shutil.rmtree(out / "tensorboard", ignore_errors=True)
        group.wait()
        start = time.perf_counter()
        history = fit(vae, train_images, valid, config, folder=out, resume=resume, tensorboard=tensorboard)
        seconds = time.perf_counter() - start
        leave()
        if not group.leads:
            return
        before = metrics_of(out / RUN) if history.steps == 0 and (out / RUN).exists() else None
        if before is not None and before.get("stopped") != "interrupted":  # the run was finished before: its record stands
            show(before, as_json)
            return
        course = []
        if code_prior_epochs and history.stopped != "interrupted":
            course = fit_code_prior(vae, train_images, code_prior_epochs, seed=config.seed)
        save(vae, out)
        # the epoch whose weights are saved: the best one where an early stop put it back; none where Ctrl-C came amid one
        saved_epoch = dict(history[history.best_epoch - 1 if config.patience and history.best_epoch else -1]) if history else {}
        saved_epoch.pop("seconds", None)
        if history.stopped == "interrupted":
            saved_epoch = {}
        summary = {
            "out": str(out),
            **({"folder": str(as_path(folder).resolve())} if folder else {"data": data}),
            "epochs": len(history),
            "stopped": history.stopped,
            "diverged": history.diverged,
            "device": history.device,
            "processes": group.size,
            "steps": history.steps,
            "seconds": round(seconds, 1),
            "seconds_of_all_epochs": round(sum(history["seconds"]), 1),
            **saved_epoch,
            **({"code_prior_rate": course[-1]} if course else {}),  # nats per image, while it was trained
        }
        if prior == "diffusion" and history.stopped != "interrupted":
            start = time.perf_counter()
            labels, width = train_images.labelled, prior_width or None
            fitted = fit_diffusion(vae, train_images, labels, prior_steps, width=width, seed=config.seed)
            save_prior(fitted, out / PRIOR)
            summary |= {"prior": prior, "prior_loss": fitted.history[-1], "prior_seconds": round(time.perf_counter() - start, 1)}
        record = entry(shlex.join(["vaelib", *sys.argv[1:]]), config.seed, seconds, summary)
        record |= {"data": data} if data else {"folder": summary["folder"]}
        record |= {"model": vae.config, "training": config.as_dict()}
        write_text(out / RUN, json.dumps(record, indent=2) + "\n")
    show(summary, as_json)
    if history.stopped == "interrupted":
        raise typer.Exit(130)


def check_prior_steps(steps: int, prior: str) -> int:
    """How many steps a diffusion prior is fitted for; ValueError where there is none."""
    if check_int("prior_steps", steps, minimum=0) and prior != "diffusion":
        raise ValueError(f"prior_steps: got {steps}, expected it beside --prior diffusion only")
    return steps or 10000


def fitted_prior(model: VAE, run: Path, prior: str, data: str, steps: int, label: int | None, guidance: float, seed: int) -> Any:
    """What --prior of vaelib sample asks for: fitted to the training images' codes, or the diffusion model that training left."""
    if prior != "diffusion":
        fit_prior: Any = PRIORS[prior]
        return fit_prior and fit_prior(model, images_named(data_of(run, data)), seed=seed)
    if (run / PRIOR).exists() and not data and not steps:
        found = load_prior(run / PRIOR)
        found.network.to(model.device)
    else:
        images = images_named(data_of(run, data))
        found = fit_diffusion(model, images, images.labelled, steps or 10000, seed=seed)
    return found if label is None else found.given(label, guidance)


def folder_shape(folder: str, data: str, size: str, grey: bool) -> tuple[int, int, int]:
    """The shape that a folder's images are given, from --size and --grey; ValueError where these options do not fit together."""
    check_one_source(folder, data)
    if not folder and (size or grey):
        raise ValueError(f"{'size' if size else 'grey'}: got it without --folder, expected it beside --folder only")
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})?", size or "64"):
        raise ValueError(f"size: got {size!r}, expected a number of pixels such as 64, or HEIGHTxWIDTH such as 48x64")
    height, _, width = (size or "64").partition("x")
    return 1 if grey else 3, int(height), int(width or height)


def check_unused(out: Path, resume: bool, overwrite: bool) -> None:
    """ValueError if the folder holds a file that training would write over, unless it was asked to."""
    found = [name for name in FILES if (out / name).exists()]
    if not found or overwrite or (resume and CHECKPOINT in found):
        return
    has = f"already holds a file named {found[0]}"
    if CONFIG in found:
        has = "already holds a model"
    elif CHECKPOINT in found:
        has = "already holds a checkpoint, --resume goes on from it"
    raise ValueError(f"out: {out} {has}, expected another folder; --overwrite replaces it{help_at('cut-off')}")


def metrics_of(record: Path) -> dict[str, Any]:
    """What the record of a finished run says of it."""
    metrics = read_object("out", record).get("metrics")
    if not isinstance(metrics, dict):
        raise ValueError(f"out: {record} is no record of a run: it has no metrics")
    return metrics


def images_named(data: str, split: str = "train") -> ImageSet:
    """The image set that --data names."""
    return load_images(check_choice("data", data, NAMES), split)


def check_one_source(folder: str, data: str, split: str = "") -> None:
    """ValueError if --folder came beside an option that names a set."""
    if folder and (data or split):
        raise ValueError(f"folder: got it beside {'--data' if data else '--split'}, expected one of the two")


def images_asked_for(run: Path, model: VAE, folder: str, data: str, split: str) -> tuple[ImageSet, dict[str, str]]:
    """The images of --folder, or of --data, or those of the run, and what a record says of where they come from."""
    if folder:
        images = load_folder(folder, model.image_shape)
        warn_skipped(images.skipped)
        return images, {"folder": str(as_path(folder).resolve())}
    images = images_named(data_of(run, data), split)
    return images, {"data": images.name, "split": split}


def data_of(run: Path, data: str) -> str:
    """The data set named on the command line, else the one the run was trained on; a run that was cut off has it in its checkpoint."""
    if data:
        return data
    try:
        if not (run / RUN).exists() and (run / CHECKPOINT).exists():
            return check_choice("data", read_checkpoint(run, {}, "data")["images"].split(" ")[0], NAMES)  # type: ignore[no-any-return]
        record = read_object("data", run / RUN)
        if "folder" in record and "data" not in record:
            raise ValueError(f"it was trained on the folder {record['folder']}")
        return str(record["data"])
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"data: the run in {run} does not say what the model was trained on, expected --data ({error})") from error


def load_run(run: Path) -> VAE:
    """The model in a run's folder; of a run that was cut off the one of its checkpoint, and a line on stderr says so."""
    if all((run / name).is_file() for name in (CONFIG, WEIGHTS)) or not (run / CHECKPOINT).is_file():
        return load(run)
    model, state = load_checkpoint(run)
    done = f"{len(state['history'])} epochs and {state['step']} steps"
    print(
        f"vaelib: {run} has no finished model; its checkpoint is used, after {done}; train --resume goes on from it",
        file=sys.stderr,
    )
    return model


@app.command()
def evaluate(
    run: Folder,
    data: Annotated[str, typer.Option(help="Image set; by default the one the model was trained on.")] = "",
    split: Annotated[str, typer.Option(help="test or train; of binarized-mnist also valid; default: test.")] = "",
    folder: Annotated[str, typer.Option(help="Folder of image files, instead of --data.")] = "",
    num_samples: Annotated[int, typer.Option(help="Importance samples per image for log p(x); 0 leaves it out.")] = 0,
    elbo_samples: Annotated[int, typer.Option(help="Draws per image for the ELBO.")] = 10,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Held-out ELBO and its terms, in nats per image; with --num-samples the importance-weighted log p(x) too."""
    check_int("elbo_samples", elbo_samples)
    check_int("num_samples", num_samples, minimum=0)
    check_seed("seed", seed)
    check_one_source(folder, data, split)
    model = load_run(run).to(choose_device(device))
    images, source = images_asked_for(run, model, folder, data, split or "test")
    result = evaluate_model(model, images, num_samples, elbo_samples, seed=seed)
    show(source | result.as_dict(), as_json)


@app.command()
def sample(
    run: Folder,
    out: Annotated[Path, typer.Option(help="Image file to write.", callback=expanded)] = Path("samples.png"),
    num_images: Annotated[int, typer.Option(help="How many images; 0 takes 64, or 10 steps of --interpolate.")] = 0,
    grid: Annotated[str, typer.Option(help="ROWSxCOLS of the sheet, such as 4x10, instead of --num-images.")] = "",
    temperature: Annotated[float, typer.Option(help="Factor on the prior's standard deviation.")] = 1.0,
    prior: Annotated[
        str, typer.Option(help="standard, or fitted to the training images' codes: mixture, second-stage, diffusion.")
    ] = "standard",
    prior_steps: Annotated[int, typer.Option(help="diffusion: fit it anew, for so many steps.")] = 0,
    guidance: Annotated[float, typer.Option(help="diffusion: weight of the --label; 1 is p(z given label).")] = 1.0,
    data: Annotated[str, typer.Option(help="What --prior is fitted to; by default the set the model was trained on.")] = "",
    ends: Annotated[tuple[str, str], typer.Option("--interpolate", help="Walk between two image files.")] = ("", ""),
    kind: Annotated[str, typer.Option(help="Way of --interpolate: linear or spherical; default: linear.")] = "",
    label: Annotated[int | None, typer.Option(help="conditional model or --prior diffusion: number of the class.")] = None,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw images from the prior, or the way between two images, into one picture."""
    check_picture(out)
    check_choice("prior", prior, PRIORS)
    check_choice("kind", kind or "linear", ("linear", "spherical"))
    check_number("temperature", temperature)
    between = ends != ("", "")
    check_int("num_images", num_images, minimum=2 if between and num_images == 1 else 0)
    check_seed("seed", seed)
    if between and (prior != "standard" or temperature != 1):
        raise ValueError("interpolate: got it beside --prior or --temperature, expected one or the other: it draws nothing")
    if kind and not between:
        raise ValueError(f"kind: got {kind!r}, expected it beside --interpolate only")
    if data and prior == "standard":
        raise ValueError(f"data: got {data!r}, expected it beside --prior only: nothing is fitted to it")
    check_not_input(out, *filter(None, ends))
    if grid and num_images:
        raise ValueError("grid: got it beside --num-images, expected one of the two")
    if grid and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", grid):
        raise ValueError(f"grid: got {grid!r}, expected ROWSxCOLS such as 4x10")
    count = math.prod(map(int, grid.split("x"))) if grid else num_images or (10 if between else 64)
    check_int("grid" if grid else "num_images", count, minimum=2 if between else 1)
    columns = int(grid.split("x")[1]) if grid else count if between else math.ceil(math.sqrt(count))
    model = load_run(run).to(choose_device(device))
    check_prior_steps(prior_steps, prior)
    if label is not None and not isinstance(model, ConditionalVAE) and prior != "diffusion":
        raise ValueError(f"label: got {label}, expected it for a conditional model only, or beside --prior diffusion")
    if guidance != 1 and (label is None or prior != "diffusion"):
        raise ValueError(f"guidance: got {guidance}, expected it beside --prior diffusion and --label only")
    if isinstance(model, ConditionalVAE):
        if label is None:
            raise ValueError(f"label: got none, expected a class from 0 to {model.num_classes - 1}: the model is conditional")
        if prior != "standard":
            raise ValueError(f"prior: got {prior!r} beside --label, expected 'standard': the others know no labels")
        model = model.given(label)
    if between:
        kind = kind or "linear"
        first, last = (read_image(end, model.image_shape) for end in ends)
        pixels = interpolate(model, first, last, count, seed, kind)
    else:
        fitted = fitted_prior(model, run, prior, data, prior_steps, label, guidance, seed)
        pixels = generate(model, count, temperature, seed, fitted)
    write_sheet(pixels, columns, out)
    drawn: dict[str, Any] = {"interpolate": ends, "kind": kind} if between else {"temperature": temperature, "prior": prior}
    drawn |= {"guidance": guidance} if prior == "diffusion" and label is not None else {}
    show({"out": str(out), "num_images": count, **drawn, "seed": seed}, as_json)


@app.command("index")
def index_images(
    run: Folder,
    out: Annotated[Path, typer.Option(help="Index file to write.", callback=expanded)] = Path("images.index"),
    data: Annotated[str, typer.Option(help="Image set; by default the one the model was trained on.")] = "",
    split: Annotated[str, typer.Option(help="train or test; default: train.")] = "",
    folder: Annotated[str, typer.Option(help="Folder of image files, instead of --data.")] = "",
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}; all but the first are FAISS's and approximate.")] = "exact",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Encode images to their posteriors and write an index of them, to be searched by content."""
    check_one_source(folder, data, split)
    if out.exists() and not (overwrite and is_index(out)):
        found = "is no index" if overwrite else "already exists"
        raise ValueError(f"out: {out} {found}, expected a new file; --overwrite replaces an index")
    check_choice("method", method, METHODS)
    model = load_run(run).to(choose_device(device))
    images, source = images_asked_for(run, model, folder, data, split or "train")
    index = LatentIndex.build(model, images, method=method, source=source)
    if not all(part.isfinite().all() for part in index.codes):
        raise ValueError(
            f"run: the model in {run} gives codes that are not finite (NaN or infinity), expected one that was trained well"
        )
    index.save(out)
    result = {"out": str(out), **source, "images": len(index), "skipped": len(images.skipped), "latents": model.latent_dim}
    result |= {"method": method, "bytes": out.stat().st_size}
    show(result | {"skipped_files": list(images.skipped)} if as_json else result, as_json)


def warn_skipped(skipped: dict[str, str]) -> None:
    """A line on stderr that names the first three files that were skipped, with the reasons."""
    if skipped:
        first = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:3])
        print(f"vaelib: skipped {files(len(skipped))}: {first}{', ...' * (len(skipped) > 3)}", file=sys.stderr)


def files(count: int) -> str:
    """How many files, in words."""
    return f"{count} file{'s' * (count != 1)}"


def query_images(index: LatentIndex, paths: list[Path], query_index: int | None) -> tuple[list[str], Any, dict[str, str]]:
    """Names and pixels of the queries, and the files of folders that were skipped, with the reasons."""
    import torch

    names, pixels = [], []
    skipped: dict[str, str] = {}
    for path in paths:
        if path.is_dir():
            found = load_folder(path, index.model.image_shape)
            names += [str(path / name) for name in found.names]
            pixels += list(found.pixels)
            skipped |= {str(path / name): reason for name, reason in found.skipped.items()}
        else:
            names, pixels = [*names, str(path)], [*pixels, read_image(path, index.model.image_shape)]
    if query_index is not None:
        if "data" not in index.source:
            raise ValueError(
                f"query_index: got {query_index}, but the index is not of an image set; expected image files as queries"
            )
        test = load_images(index.source["data"], "test")
        if check_int("query_index", query_index, minimum=0) >= len(test):
            raise ValueError(f"query_index: got {query_index}, expected less than the {len(test)} test images")
        names, pixels = [*names, f"{test.name} test {query_index}"], [*pixels, test.pixels[query_index]]
    if not names:
        raise ValueError("queries: got none, expected image files, a folder of them, or --query-index")
    return names, torch.stack(pixels), skipped


@app.command()
def search(
    index_file: Annotated[Path, typer.Argument(metavar="INDEX", help="File written by vaelib index.", callback=expanded)],
    queries: Annotated[list[Path] | None, typer.Argument(help="Image files, or folders of them.", callback=expanded)] = None,
    k: Annotated[int | None, typer.Option("-k", help="Neighbours per query; default: 10, or all of a smaller index.")] = None,
    distance: Annotated[str, typer.Option(help=", ".join(DISTANCES))] = "euclidean",
    query_index: Annotated[int | None, typer.Option(help="Query with this image of the data set's test split.")] = None,
    out: Annotated[
        Path, typer.Option(help="Picture to write: each query, and its neighbours to its right.", callback=expanded)
    ] = Path("neighbours.png"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the images of an index that are most like the queries: a table, and a picture where the images are at hand."""
    import torch

    check_choice("distance", distance, DISTANCES)
    check_picture(out)
    index = LatentIndex.load(index_file).to(choose_device(device))
    names, pixels, skipped = query_images(index, queries or [], query_index)
    of_index = [Path(index.source["folder"]) / name for name in index.names] if "folder" in index.source else []
    check_not_input(out, index_file, *names, *skipped, *of_index)
    warn_skipped(skipped)
    k = min(10, len(index)) if k is None else k
    indices, distances = (part.tolist() for part in index.search(pixels, k, distance))
    rows = [
        {
            "query": name,
            "rank": rank,
            "index": i,
            "label": index.label(i),
            "file": index.names[i] if index.names else None,
            "distance": d,
        }
        for name, *hits in zip(names, indices, distances, strict=True)
        for rank, (i, d) in enumerate(zip(*hits, strict=True), start=1)
    ]
    try:
        images = images_of(index, indices)
    except ValueError as error:
        images = None
        print("vaelib: no picture is made:", " ".join(str(error).split()), file=sys.stderr)
    if images is not None:
        write_sheet(torch.cat([pixels[:, None], images], 1).flatten(0, 1), k + 1, out)
    if as_json:
        result = {"images": len(index), "k": k, "distance": distance, "skipped": len(skipped), "skipped_files": list(skipped)}
        show(result | {"out": None if images is None else str(out), "neighbours": rows}, True)
        return
    print(f"{'query':32} {'rank':>4} {'distance':>10}  {'label':12} image")
    for row in rows:
        image = row["file"] or row["index"]
        print(f"{row['query']:32} {row['rank']:4} {row['distance']:10.4f}  {row['label'] or '-':12} {image}")
    if images is not None:
        print(f"picture: {out}")


Model = Annotated[
    Path, typer.Option("--model", help="Folder of a trained model, or the name of a released one.", callback=expanded)
]


@app.command("compress")
def compress_images(
    model: Model,
    images: Annotated[list[Path] | None, typer.Argument(help="Image files, or folders of them.", callback=expanded)] = None,
    data: Annotated[str, typer.Option(help="Image set, instead of files.")] = "",
    split: Annotated[str, typer.Option(help="test or train; of binarized-mnist also valid; default: test.")] = "",
    out: Annotated[Path, typer.Option(help="File to write.", callback=expanded)] = Path("images.vae"),
    bins: Annotated[int, typer.Option(help="Values of each latent, a power of 2.")] = 2**12,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write images to one file of about their negative ELBO in bits, without loss; whoever opens it needs the same model."""
    import torch

    if bool(images) == bool(data):
        raise ValueError(f"images: got {'files beside --data' if data else 'none'}, expected image files or folders, or --data")
    if split and not data:
        raise ValueError(f"split: got {split!r} without --data, expected it beside --data only")
    if out.exists() and not overwrite:
        raise ValueError(f"out: {out} already exists, expected a new file; --overwrite replaces it")
    vae = load_run(model)
    if data:
        pixels = images_named(data, split or "test").pixels
    else:
        names = [name for path in images or [] for name in (pictures_in(path) if path.is_dir() else [path])]
        check_not_input(out, *names)
        pixels = torch.stack([read_image_as_is(name, vae.image_shape) for name in names])
    start = time.perf_counter()
    written = compress(vae, pixels, out, bins)
    show({"out": str(out), **written._asdict(), "seconds": time.perf_counter() - start}, as_json)


@app.command("decompress")
def decompress_images(
    file: Annotated[Path, typer.Argument(help="File written by vaelib compress.", callback=expanded)],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the images, as 00000.png and so on.", callback=expanded)] = Path("images"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds files.")] = False,
    as_json: Json = False,
) -> None:
    """Write the images of a file of vaelib compress as PNG files, in their order; their names are not kept."""
    from PIL import Image

    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {out}, which is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"out: {out} holds files, expected a new folder; --overwrite writes into it")
    start = time.perf_counter()
    pixels = decompress(file, load_run(model))
    writable_folder("out", out)
    digits = max(len(str(len(pixels) - 1)), 5)
    for number, image in enumerate(pixels):
        with atomic(out / f"{number:0{digits}}.png") as partial:
            Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()).save(partial, "PNG")
    show({"out": str(out), "images": len(pixels), "seconds": time.perf_counter() - start}, as_json)


def pictures_in(folder: Path) -> list[Path]:
    """The files below a folder that are not hidden, sorted by name."""
    found = [path for path, problem in sorted(files_below(folder)) if not problem]
    if not found:
        raise ValueError(f"images: got the folder {folder}, expected one with image files")
    return found


def read_image_as_is(path: Path, shape: tuple[int, int, int]) -> Any:
    """An image file as ``uint8`` (C, H, W), with no pixel changed.

    Raises:
        ValueError: If it has another size or mode than the model's images: `read_image` would fit it, and so lose what was there.
    """
    from PIL import Image

    pixels = read_image(path, shape)
    with Image.open(path) as image:
        modes = ("1", "L") if shape[0] == 1 else ("RGB",)
        if image.size != (shape[2], shape[1]) or image.mode not in modes or image.getexif().get(0x112, 1) != 1:
            got = f"a {image.mode} image of {image.width}x{image.height} pixels"
            raise ValueError(f"images: {path} is {got}, expected {modes[-1]} and {shape[2]}x{shape[1]}: to fit it would be a loss")
    return pixels


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="iwae: Burda, Grosse and Salakhutdinov 2016, table 1.")],
    layers: Annotated[int, typer.Option(help="Stochastic layers, 1 or 2.")] = 1,
    objective: Annotated[str, typer.Option(help=", ".join(OBJECTIVES))] = "iwae",
    k: Annotated[int, typer.Option("-k", help="Draws of z per image and step: 1, 5 or 50.")] = 1,
    budget: Annotated[str, typer.Option(help=", ".join(BUDGETS))] = "minutes",
    data: Annotated[str, typer.Option(help="Image set; the paper's is mnist.")] = "mnist",
    out: Annotated[
        Path, typer.Option(help="Folder of all rows; a row that was cut off goes on from there.", callback=expanded)
    ] = Path("runs/iwae"),
    ledger: Annotated[Path | None, typer.Option(help="JSON file that the row is added to.", callback=expanded)] = None,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train and score one row of a paper's table."""
    check_choice("table", table, ("iwae",))
    check_seed("seed", seed)
    check_choice("k", k, BUDGETS[check_choice("budget", budget, BUDGETS)].epochs)
    name = f"{check_choice('data', data, NAMES)}-{layers}-{objective if k > 1 else 'vae'}-{k}.{budget}" + f".seed{seed}" * (
        seed > 0
    )
    rows_of(ledger)  # whether it can be added to is known before any work
    check_unused(out / name, (out / name / CHECKPOINT).exists(), False)
    writable_folder("out", out / name)
    train, test = images_named(data), images_named(data, "test")
    with only_writer("out", out / name):
        model, row = iwae_row(train, test, layers, objective, k, budget, seed, device, out / name, not as_json)
        save(model, out / name)
        made = entry(shlex.join(["vaelib", *sys.argv[1:]]), seed, row["train_seconds"] + row["score_seconds"], row)
        write_text(out / name / RUN, json.dumps(made, indent=2) + "\n")
    if ledger:
        write_text(ledger, json.dumps(rows_of(ledger) | {name: made}, indent=2) + "\n")
    show({"row": name, "out": str(out / name), **row}, as_json)


def rows_of(ledger: Path | None) -> dict[str, Any]:
    """The rows that the ledger has; ValueError unless it is a JSON object, or a new file in a folder that can be written."""
    if ledger is None:
        return {}
    writable_folder("ledger", ledger.parent)
    if ledger.exists() and not ledger.is_file():
        raise ValueError(f"ledger: got {ledger}, expected the name of a JSON file")
    return read_object("ledger", ledger) if ledger.exists() else {}


def images_of(index: LatentIndex, indices: list[list[int]]) -> Any:
    """The images at `indices` (Q, k) by the index's source: pixels (Q, k, C, H, W); a file that cannot be read is white.

    Raises:
        ValueError: If the source is not known or not at hand, or has other images than the index.
    """
    import torch

    shape = index.model.image_shape
    match index.source:
        case {"folder": folder} if index.names:
            if not Path(folder).is_dir():
                raise ValueError(f"there is no folder {folder}, where the images were")
            found, lacking = {}, 0
            for i in {i for row in indices for i in row}:
                try:
                    found[i] = read_image(Path(folder) / index.names[i], shape)
                except ValueError:
                    found[i], lacking = torch.full(shape, 255, dtype=torch.uint8), lacking + 1
            if lacking:
                print(f"vaelib: white in the picture: {files(lacking)} that cannot be read", file=sys.stderr)
            return torch.stack([torch.stack([found[i] for i in row]) for row in indices])
        case {"data": data, "split": split}:
            images = load_images(data, split)
            if (len(images), images.image_shape) != (len(index), shape):
                raise ValueError(f"the {split} split of {data} is not what was indexed")
            return images.pixels[torch.tensor(indices)]
    raise ValueError("the index does not say where its images are")


def check_not_input(out: Path, *inputs: str | Path) -> None:
    """ValueError if `out` is the file of an input: it would be overwritten."""
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise ValueError(f"out: got {out}, which is an input, expected another file")


def check_picture(out: Path) -> None:
    """ValueError unless `out` is the name of an image file that Pillow can write."""
    from PIL import Image

    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE or out.is_dir():
        raise ValueError(f"out: got {out}, expected the name of an image file such as samples.png")


def write_sheet(pixels: Any, columns: int, out: Path) -> None:
    """Write images (N, C, H, W) side by side to one picture, each side enlarged to 64 pixels or more, whole or not at all."""
    from PIL import Image

    from vaelib.book.plotting import tile

    zoom = math.ceil(64 / min(pixels.shape[2:]))  # whole, so that each pixel stays a square
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    writable_folder("out", out.parent)
    with atomic(out) as partial:
        Image.fromarray(tile(pixels, columns)).save(partial, Image.registered_extensions()[out.suffix.lower()])


def say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line on stderr."""
    print("vaelib: warning:", " ".join(str(message).split()), file=sys.stderr)


def check_no_empty(arguments: list[str]) -> None:
    """ValueError if one is empty, as an unset variable of the shell makes it: a path would be the current folder."""
    for before, argument in zip(["vaelib", *arguments], arguments, strict=False):
        option = argument[:-1] if re.fullmatch("--[a-z-]+=", argument) else before
        if not argument or option != before:
            raise ValueError(f"{option.lstrip('-')}: got '' on the command line, expected a value; leave it out for the default")


def main() -> None:
    """Run the command; bad input ends with one line on stderr and exit status 2, Ctrl-C with one and 130."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = say_warning
            check_no_empty(sys.argv[1:])
            app()
    except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        process = f" (process {os.environ['RANK']} of {os.environ['WORLD_SIZE']})" if "RANK" in os.environ else ""
        print(f"vaelib: error{process}:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(2)
    except (SystemExit, KeyboardInterrupt) as end:  # Typer turns Ctrl-C into an exit, its versions into different ones
        chain = (end, end.__context__, end.__context__ and end.__context__.__cause__)
        if not any(isinstance(link, KeyboardInterrupt) for link in chain):
            raise
        print("vaelib: interrupted", file=sys.stderr)
        sys.exit(130)
