"""Train and score the rows of the CIFAR-10 tables: `python book/_scripts/rows.py [name ...]`, all that are missing by default.

Each row is a `vaelib train` with the seed 0, then a `vaelib evaluate`, each in a process of its own; runs/rows/<name> keeps the
model, so that a run that was cut off goes on where it stood. The rows ppca-L need no training: probabilistic PCA with L latents, in
closed form. The rows linear-1.seed-S are VAEs with linear networks and a Gaussian of scale 1. The rows *-gpu take a GPU minutes and
a CPU days; they are made where they are named, as `make gpu` does. The record goes to results/cifar-rows.json: command, commit,
versions, hardware, seconds and the scores on the test set.
"""

import argparse
import functools
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import vaelib as library
from vaelib.book import oracles
from vaelib.book.ledger import entry
from vaelib.evaluation import standard_error
from vaelib.storage import read_object, write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "cifar-rows.json"
CONV = "--model conv --flip --precision bf16 --channels-last"
SCALE_1 = '{"name": "gaussian", "scale": 1.0, "discretized": true}'
LEARNED = '{"name": "gaussian", "scale": 0.3, "learned": true, "discretized": true}'
MIXTURE = '{"name": "discretized_logistic_mixture", "num_mixtures": 5}'
HIERARCHICAL = f"--model hierarchical --flip --precision bf16 --channels-last --likelihood {shlex.quote(MIXTURE)}"
RESIDUAL = f"{CONV} --latent-dim 64x8x8 --residual-blocks 1 --likelihood {shlex.quote(MIXTURE)}"
ROWS = {
    "vector-gaussian-1": f"{CONV} --epochs 12 --likelihood {shlex.quote(SCALE_1)}",
    "vector-gaussian-learned": f"{CONV} --epochs 12 --likelihood {shlex.quote(LEARNED)}",
    "vector-logistic": f"{CONV} --epochs 12",
    "vector-mixture": f"{CONV} --epochs 12 --likelihood {shlex.quote(MIXTURE)}",
    "spatial-logistic": f"{CONV} --epochs 12 --latent-dim 64x8x8",
    "spatial-mixture": f"{CONV} --epochs 12 --latent-dim 64x8x8 --likelihood {shlex.quote(MIXTURE)}",
    "residual-mixture": f"{RESIDUAL} --epochs 12 --learning-rate 1e-3",
    "residual-mixture-hot": f"{RESIDUAL} --epochs 12",  # as the others: it collapses in its first epoch
}
# a hierarchical VAE as small as two CPU cores need it: the default of `vaelib.hierarchical_vae` takes over an hour an epoch there
SMALL = '{"levels": [[16, 1], [16, 2], [8, 2], [4, 0]], "width": 64, "bottleneck": 24, "blocks": 1}'
ROWS["hierarchical-small"] = (
    f"{HIERARCHICAL} --epochs 6 --batch-size 64 --learning-rate 1e-3 --ema-decay 0.999 --model-options {shlex.quote(SMALL)}"
)
# What a GPU is for. An H200 that replays whole steps in bf16 takes 46000 images a second with residual blocks (batch 128), so that
# 150 epochs of 45833 images are three minutes.
# The hierarchy's size and schedule are for half an hour of an H100, by an estimate; not run. A step of the default size took an H200
# 37.7 ms at batch 128 and 57.8 at 256: 0.157 ms an image for 335 MB (benchmarks/memory_passes.py, before it passed over memory a
# quarter less often), 2.1 TB/s of its 4.8, and 17.6 ms for 3150 operations. An H100 (3.35 TB/s) at the same share has 1.49 TB/s: this
# size, 208 MB and 2375 operations, takes 13.3 + 17.9 ms at batch 128, 4100 images a second, so that 140 epochs with their validation
# are 27 minutes. The default size stood at 6.26, 5.64, 5.29 and 4.97 bits/dim after 1, 2, 4 and 8 epochs. A power law through these
# ends at 3.6 (by steps) or 3.85 (by images), one above a floor of 2.9 bits at 3.9 or 4.05: 3.6 is the lower end of what to expect.
GPU_SIZE = '{"levels": [[16, 1], [16, 2], [16, 6], [8, 2]], "width": 128, "bottleneck": 64, "blocks": 2}'
HIERARCHICAL_GPU = f"--epochs 140 --batch-size 128 --learning-rate 1e-3 --ema-decay 0.999 --model-options {shlex.quote(GPU_SIZE)}"
GPU_ROWS = {
    "spatial-mixture-30": f"{CONV} --epochs 30 --latent-dim 64x8x8 --likelihood {shlex.quote(MIXTURE)}",
    "hierarchical": f"{HIERARCHICAL} --epochs 8 --batch-size 256 --learning-rate 1e-3 --ema-decay 0.999",
    "spatial-gpu": f"{RESIDUAL} --epochs 150 --learning-rate 1e-3 --ema-decay 0.999 --checkpoint-epochs 10",
    "hierarchical-gpu": f"{HIERARCHICAL} {HIERARCHICAL_GPU} --checkpoint-minutes 1",
}
# layouts of the latents, the same short training for each
for layout in ("16", "128", "512", "4x4x4", "16x4x4", "4x8x8", "16x8x8", "64x8x8", "16x16x16"):
    ROWS[f"layout-{layout}"] = f"{CONV} --epochs 3 --latent-dim {layout}"
PPCA = {f"ppca-{latents}": latents for latents in (16, 32, 64, 128, 256, 512, 1024, 2048, 3071)}
LINEAR = {f"linear-1.seed-{seed}": seed for seed in range(3)}


@functools.cache
def components_of(data):
    """The principal components of the chapter's training images, and the seconds that they took."""
    started = time.perf_counter()
    moments = oracles.pixel_moments(chapter_split(data)[0].pixels)
    return oracles.principal_components(*moments), time.perf_counter() - started


@functools.cache
def chapter_split(data):
    """Training and validation images of the chapter, and the test images."""
    images = library.load_images(data)
    return *library.train_valid_split(images, len(images) // 20, seed=0), library.load_images(data, "test")


def closed_form(name, data):
    """The record of probabilistic PCA: a Gaussian of real numbers, held to the levels by uniform noise, as the one without latents."""
    components, seconds = components_of(data)
    started = time.perf_counter()
    x = oracles.dequantized(chapter_split(data)[2].pixels)
    model = oracles.probabilistic_pca(components, PPCA[name])
    terms = model.exact_elbo(x)
    elbo = terms.elbo.mean().item()
    test = {
        "elbo": elbo,
        "elbo_standard_error": standard_error(terms.elbo),
        "expected_log_likelihood": terms.log_likelihood.mean().item(),
        "kl": terms.kl.mean().item(),
        "bits_per_dim": -elbo / (model.num_dims * math.log(2)),
        "num_images": len(x),
    }
    metrics = {"latent_dim": PPCA[name], "scale": model.scale / 127.5, "test": test}  # the scale in units of x, in [-1, 1]
    return entry(f"python book/_scripts/rows.py {name}", 0, seconds + time.perf_counter() - started, metrics)


def linear(name, data, epochs=6):
    """The record of a VAE with linear encoder and decoder and a Gaussian density of scale 1: its nats by latent unit."""
    started = time.perf_counter()
    train, valid, test = chapter_split(data)
    torch.manual_seed(LINEAR[name])
    model = library.mlp_vae(train.image_shape, (), 128, {"name": "gaussian", "scale": 1.0})
    config = library.TrainConfig(epochs=epochs, seed=LINEAR[name], progress=False)
    history = library.fit(model, train, valid, config)
    units = library.kl_per_unit(model, test).sort(descending=True).values.tolist()
    metrics = {"epochs": epochs, "kl": sum(units), "kl_per_unit": units, "valid_kl": history["valid_kl"]}
    return entry(f"python book/_scripts/rows.py {name}", LINEAR[name], time.perf_counter() - started, metrics)


def vaelib(*arguments):
    """`vaelib ... --json` as a user runs it; its one JSON object."""
    command = [sys.executable, "-m", "vaelib", *map(str, arguments), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            text = process.communicate()[0]
        except KeyboardInterrupt:  # Ctrl-C came to both; the other one still has a checkpoint to write
            process.wait()
            raise
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(text)


def run(name, data, runs=Path("runs"), further=""):
    """The record of one row."""
    folder = runs / "rows" / name
    vaelib("train", "--data", data, *shlex.split((ROWS | GPU_ROWS)[name]), *shlex.split(further), "--out", folder, "--resume")
    record = json.loads((ROOT / folder / "run.json").read_text())
    record["seconds"] = record["metrics"]["seconds_of_all_epochs"]
    record["metrics"]["test"] = vaelib("evaluate", folder, "--elbo-samples", 5)
    record["metrics"]["epochs_list"] = [json.loads(line) for line in (ROOT / folder / "history.jsonl").read_text().splitlines()]
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows to make; default: those that are missing")
    parser.add_argument("--again", action="store_true", help="from the start, whatever there is")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="file of the records; default: results/cifar-rows.json")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the models; default: runs")
    parser.add_argument("--further", default="", help="options of vaelib train behind the row's own, which they override")
    arguments = parser.parse_args()
    train = functools.partial(run, runs=arguments.runs, further=arguments.further)
    makers = dict.fromkeys((*ROWS, *GPU_ROWS), train) | dict.fromkeys(PPCA, closed_form) | dict.fromkeys(LINEAR, linear)
    unknown = set(arguments.names) - set(makers)
    if unknown:
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(makers)}")
    ledger = arguments.ledger
    done = read_object("ledger", ledger) if ledger.exists() else {}
    for name in arguments.names or [name for name in makers if name not in done and name not in GPU_ROWS]:
        if arguments.again:
            shutil.rmtree(ROOT / arguments.runs / "rows" / name, ignore_errors=True)
        record = makers[name](name, arguments.data)
        done = read_object("ledger", ledger) if ledger.exists() else {}
        write_text(ledger, json.dumps(done | {name: record}, indent=2) + "\n")
        test = record["metrics"].get("test")
        score = f"{test['bits_per_dim']:.3f} bits/dim" if test else f"rate {record['metrics']['kl']:.1f} nats"
        print(f"{name:24} {score}, {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the same command goes on from there
        sys.exit(130)
