"""Train the models of the chapter `modern` with codes and learned priors: `python book/_scripts/vq_rows.py [row ...] [--minutes 10]`.

Without names it makes all rows that results/vq-rows.json lacks, in the order of their worth, on the GPU where there is one; a row is
written as soon as it is made, so that the next call goes on after the last one. The rows:

- `cifar-SEED`: the published example, K = 512, 8 x 8 codes of 64 numbers, 10000 steps on batches of 32; then a prior over its codes.
- `budget-SEED`: an eighth of its steps, for two cores.
- `mnist-SEED`: a VQ-VAE of binary digits, 7 x 7 codes of 64, and a prior over its codes, by nats and by the scores of samples.
- `CURE-SEED`: the codebook of the published example, badly started, with one cure each, a quarter of its steps.
- `learned-SEED`: the VAE of the chapter `generation` with N(0, I), a VampPrior and a flow, trained with the model and afterwards.

"summary" has the mean and the standard deviation over the seeds. `--rehearse` makes all of them on the CPU in little time, with bundled
images, into the file that --ledger names.
"""

import argparse
import base64
import io
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image

import vaelib
from vaelib import quantize
from vaelib.book.ledger import entry
from vaelib.distributed import choose_device
from vaelib.evaluation import rate_decomposition
from vaelib.heldout import over_images
from vaelib.priors import FlowPrior, VampPrior, fit_prior
from vaelib.quality import features_of, frechet_distance, mnist_features
from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "vq-rows.json"
SEEDS = (0, 1, 2)
K, TRAIN = 512, 40000  # codes; images of four of CIFAR-10's five batches, as in the example
FAR, TINY = (
    1.0,
    1 / (K * math.sqrt(3)),
)  # standard deviations of a start far from the encoder's outputs, and of one uniform on +-1/K
CURES = {
    "gradient-far": {"learn": "gradient", "scale": FAR},
    "gradient-tiny": {"learn": "gradient", "scale": TINY},
    "gradient-kmeans": {"learn": "gradient", "scale": FAR, "kmeans": True},
    "gradient-restarts": {"learn": "gradient", "scale": FAR, "restart": 0.05},
    "ema-far": {"learn": "ema", "scale": FAR},
    "ema-kmeans": {"learn": "ema", "scale": FAR, "kmeans": True},
    "ema-restarts": {"learn": "ema", "scale": FAR, "restart": 0.05},
    "fsq": {"levels": (8, 8, 8)},
}


class Budget:
    """How long things train: in full, or in a rehearsal, on bundled images.

    Attributes:
        device: of all trainings.
    """

    def __init__(self, rehearse):
        self.rehearse, self.device = rehearse, "cpu" if rehearse else str(choose_device("auto"))

    def __call__(self, full, tiny):
        return tiny if self.rehearse else full

    def images(self, name, split="train"):
        if self.rehearse:
            return vaelib.load_images("shapes" if name == "cifar10" else "digits", split)[:256]
        return vaelib.load_images(name, split)

    def config(self, **options):
        return vaelib.TrainConfig(device=self.device, progress=False, **options)


def picture(pixels, columns):
    """Images (N, C, H, W) side by side, as a PNG in base64."""
    rows = [torch.cat(list(row), dim=2) for row in pixels.split(columns)]
    grid = torch.cat([row for row in rows if row.shape == rows[0].shape], dim=1)  # (C, H, W)
    grid = grid[0] if len(grid) == 1 else grid.permute(1, 2, 0)
    Image.fromarray(grid.contiguous().numpy()).save(png := io.BytesIO(), format="png", optimize=True)
    return base64.b64encode(png.getvalue()).decode()


def squared_error(model, images):
    """The mean squared error of reconstructions, in units of the pixels' range squared."""

    def measure(model, x, keys):
        mean = model.likelihood.mean(model.decode(model.encode(x, validate=False).mean))
        return ((((x - mean) / (model.likelihood.highest - model.likelihood.lowest)) ** 2).flatten(1).mean(1),)

    return over_images(model, images, 1000, 0, measure)[0].double().mean().item()


def seconds_of(function):
    """What it gives, and how long it took."""
    began = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, round(time.perf_counter() - began, 1)


def example(budget, seed, variance, **changes):
    """The VQ-VAE of the published example.

    Its loss is the squared error over the data's variance, a mean over pixels, and 0.25 times the commitment, a mean over the numbers of
    the map. Times half the number of pixels it is minus a Gaussian's log-likelihood of that variance, and a sum over the map whose weight
    is `commitment`.
    """
    changes = {"restart": 0.0, "scale": 0.125} | changes
    kmeans = changes.pop("kmeans", False)
    numbers = 8 * 8 * (len(changes["levels"]) if "levels" in changes else 64)
    torch.manual_seed(seed)
    model = vaelib.vq_vae(
        (3, 32, 32), K, 64, {"name": "gaussian", "scale": 2 * math.sqrt(variance)}, budget(128, 16), budget(32, 8),
        commitment=0.25 * (3 * 32 * 32 / 2) / numbers, **changes,
    )  # fmt: skip
    return model.to(budget.device), kmeans


def fitted_example(budget, seed, epochs, **changes):
    """The example after so many epochs of 1250 steps: the model, its images, and the scores that the example prints."""
    images = budget.images("cifar10")
    train, valid = (images[:TRAIN], images[TRAIN:]) if not budget.rehearse else (images[:192], images[192:])
    variance = (train.pixels.double() / 255).var(correction=0).item()
    model, kmeans = example(budget, seed, variance, **changes)
    if kmeans:
        quantize.kmeans_start(model, train[:2000], seed=seed)
    config = budget.config(
        epochs=epochs, batch_size=32, learning_rate=3e-4, schedule="constant", warmup=0.0, clip_norm=None, seed=seed
    )
    history, seconds = seconds_of(lambda: vaelib.fit(model, train, None, config))
    pixels, scale = 3 * 32 * 32, model.likelihood.log_scale.exp().item()
    constant = pixels * (math.log(scale) + 0.5 * math.log(2 * math.pi))
    usage = quantize.code_usage(model, valid, 32)
    row = {
        "train_error": [
            (-value - constant) * 2 / pixels for value in history["train_log_likelihood"]
        ],  # over the variance, by epoch
        "train_perplexity": history["batch_perplexity"],  # of a batch, running mean over some hundred steps
        "running_perplexity": history["perplexity"],  # of some hundred batches together
        "codes_used": history["codes_used"],
        "error": squared_error(model, valid) / variance,
        "perplexity": usage.perplexity,
        "batch_perplexity": usage.batch_perplexity,
        "used": usage.used,
        "variance": variance,
        "steps": history.steps,
        "fit_seconds": seconds,
        "not_replayed": history.not_replayed,
    }
    return model, train, row


def cifar(budget, seed):
    """The published example, and its codes under a prior: what the bound is in bits/dim, and what comes out of it."""
    model, train, row = fitted_example(budget, seed, budget(8, 2))
    test = budget.images("cifar10", "test")
    row["test_error"] = squared_error(model, test) / row["variance"]
    rmse = math.sqrt(squared_error(model, train[:5000]))
    model.likelihood = vaelib.Gaussian(2 * rmse, discretized=True).to(budget.device)  # the scale that the decoder has earned
    row["uniform"] = scores_of(model, test)
    model.config["likelihood"] = model.likelihood.config
    course, row["prior_seconds"] = seconds_of(
        lambda: quantize.fit_code_prior(
            model, train, budget(20, 2), budget(256, 32), budget(6, 2), budget(8, 2), 256, tf32=True, seed=seed
        )
    )
    row |= {"prior_course": course, "prior": scores_of(model, test), "prior_train": scores_of(model, train[:5000])}
    row["samples"] = picture(vaelib.generate(model, 32, seed=1), 8)
    row["originals"] = picture(test.pixels[:16], 8)
    row["reconstructions"] = picture(vaelib.reconstruct(model, test.pixels[:16]), 8)
    return row


def scores_of(model, images):
    """The bound's terms in nats, and bits/dim."""
    found = vaelib.evaluate(model, images, elbo_samples=1)
    return {
        "elbo": found.elbo,
        "distortion": -found.expected_log_likelihood,
        "rate": found.kl,
        "bits_per_dim": found.bits_per_dim,
        "standard_error": found.elbo_standard_error,
    }


def two_cores(budget, seed):
    """An eighth of the published example's steps."""
    return fitted_example(budget, seed, 1)[2]


def cure(budget, name, seed):
    """A quarter of its steps, with the codebook started badly and one cure."""
    return fitted_example(budget, seed, budget(2, 1), **CURES[name])[2]


def mnist(budget, seed):
    """A VQ-VAE of binary digits with a prior over its codes, beside the book's VAEs: in nats, and by samples' scores."""
    images, test = budget.images("mnist"), budget.images("mnist", "test")
    train, _ = vaelib.train_valid_split(images, len(images) // 12, seed=0)
    torch.manual_seed(seed)
    model = vaelib.vq_vae((1, 28, 28), 64, 16, "bernoulli", budget(64, 16), budget(32, 8)).to(budget.device)
    config = budget.config(epochs=budget(20, 2), batch_size=128, learning_rate=2e-3, seed=seed)
    history, seconds = seconds_of(lambda: vaelib.fit(model, train, None, config))
    row = {"fit_seconds": seconds, "train_perplexity": history["perplexity"], "codes_used": history["codes_used"]}
    row["usage"] = quantize.code_usage(model, test)._replace(counts=None)._asdict()
    row["uniform"] = scores_of(model, test)
    course, row["prior_seconds"] = seconds_of(
        lambda: quantize.fit_code_prior(
            model, train, budget(20, 2), budget(128, 32), budget(4, 2), budget(4, 2), 256, tf32=True, seed=seed
        )
    )
    row |= {"prior_course": course, "prior": scores_of(model, test), "prior_train": scores_of(model, train[:5000])}
    net = mnist_features()
    pixels, sampling = seconds_of(lambda: vaelib.generate(model, budget(10000, 100), seed=1))
    row["sampling_seconds"], row["num_samples"] = sampling, len(pixels)
    for kind, of in (("grey", lambda p: p), ("thresholded", lambda p: 255 * (p >= 128).to(torch.uint8))):
        row[f"frechet_{kind}"] = frechet_distance(features_of(net, of(test.pixels)), features_of(net, of(pixels)))
    uniform = vaelib.generate(model, budget(10000, 100), seed=1, prior=quantize.UniformCodes(model.codebook, model.prior.places))
    row["frechet_thresholded_uniform"] = frechet_distance(
        features_of(net, 255 * (test.pixels >= 128).to(torch.uint8)), features_of(net, 255 * (uniform >= 128).to(torch.uint8))
    )
    row |= {"samples": picture(pixels[:32], 8), "uniform_samples": picture(uniform[:16], 8)}
    row["reconstructions"] = picture(torch.cat([test.pixels[:8], vaelib.reconstruct(model, test.pixels[:8])]), 8)
    return row


def learned(budget, seed):
    """N(0, I), a VampPrior and a flow: with the model, and after it. The gain is what the rate falls by at the same encoder."""
    images, test = budget.images("mnist"), budget.images("mnist", "test")
    train, _ = vaelib.train_valid_split(images, len(images) // 12, seed=0)
    row = {}

    def network():
        torch.manual_seed(seed)
        return vaelib.mlp_vae(images.image_shape, (256,), 20).to(budget.device)

    def flow():
        torch.manual_seed(seed)
        return FlowPrior(20).to(budget.device)

    priors = {
        "normal": lambda model: model.prior,
        "vamp": lambda model: VampPrior(model, train, budget(100, 20), seed),
        "flow": lambda model: flow(),
    }
    config = budget.config(epochs=budget(10, 2), batch_size=128, learning_rate=5e-3, seed=seed)

    def judge(model):
        scores = vaelib.evaluate(model, test, batch_size=200)
        split = rate_decomposition(model, test, budget(2000, 100))
        return scores.as_dict() | {"information": split.mutual_information, "marginal_kl": split.marginal_kl}

    for name, prior in priors.items():
        model = network()
        model.prior = prior(model)
        _, seconds = seconds_of(lambda model=model: vaelib.fit(model, train, None, config))
        row[name] = judge(model) | {"seconds": seconds}
        if name == "normal":
            plain = model
    for name in ("vamp", "flow"):
        prior = priors[name](plain)
        _, seconds = seconds_of(lambda prior=prior: fit_prior(plain, train, prior, epochs=budget(10, 2), seed=seed))
        plain.prior = prior
        row[f"{name} afterwards"] = judge(plain) | {"seconds": seconds}
        row[f"{name} afterwards"]["gain"] = row["normal"]["kl"] - row[f"{name} afterwards"]["kl"]
    return row


def all_rows():
    """Row -> a function of the budget, in the order of their worth."""
    rows = {}
    for seed in SEEDS:
        rows[f"cifar-{seed}"] = lambda budget, seed=seed: cifar(budget, seed)
        for name in CURES:
            rows[f"{name}-{seed}"] = lambda budget, name=name, seed=seed: cure(budget, name, seed)
        rows[f"mnist-{seed}"] = lambda budget, seed=seed: mnist(budget, seed)
        rows[f"learned-{seed}"] = lambda budget, seed=seed: learned(budget, seed)
        rows[f"budget-{seed}"] = lambda budget, seed=seed: two_cores(budget, seed)
    return rows


def seed_of(name):
    return int(name.rpartition("-")[2])


def summary(done):
    """Of each kind of row the mean and the standard deviation of every number over the seeds."""

    def spread(values):
        if all(isinstance(value, dict) for value in values):
            shared = [key for key in values[0] if all(key in value for value in values)]
            return {key: made for key in shared if (made := spread([value[key] for value in values])) is not None}
        if all(isinstance(value, list) for value in values):
            return [spread(list(column)) for column in zip(*values, strict=False)]
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            return None
        return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "each": list(values)}

    kinds = {}
    for name, record in sorted(done.items()):
        if re.fullmatch(r".*-\d+", name):
            kinds.setdefault(name.rpartition("-")[0], []).append(record)
    rows = {
        kind: spread([record["metrics"] for record in records]) | {"trainings": len(records)}
        for kind, records in kinds.items()
        if len(records) > 1
    }
    seconds = sum(record["seconds"] for records in kinds.values() for record in records)
    return entry("python book/_scripts/vq_rows.py", 0, seconds, {"rows": rows})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows to make, even if they are there; default: those that the ledger lacks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no row is begun that would not end in this time")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="the file of rows")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small, with bundled images")
    asked = parser.parse_args()
    rows, budget = all_rows(), Budget(asked.rehearse)
    if unknown := set(asked.names) - set(rows):
        parser.error(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(rows)}")
    if asked.rehearse and asked.ledger == LEDGER:
        parser.error("ledger: got none, expected a file for the rehearsal's rows")
    end, longest = time.monotonic() + 60 * asked.minutes, {}
    for name in asked.names or rows:
        done = json.loads(asked.ledger.read_text()) if asked.ledger.exists() else {}
        if name in done and not asked.names:
            continue
        if name.startswith("budget") and budget.device != "cpu" and not asked.names:
            continue  # a row for the CPU
        kind = name.rpartition("-")[0]
        kind = "cure" if kind in CURES else kind
        if time.monotonic() + 1.2 * longest.get(kind, 0.0) > end:
            print(f"{name}: not begun, the time is up", flush=True)
            continue
        began = time.perf_counter()
        try:
            metrics = rows[name](budget)
        except vaelib.DataNotFoundError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        seconds = time.perf_counter() - began
        longest[kind] = max(seconds, longest.get(kind, 0.0))
        done = json.loads(asked.ledger.read_text()) if asked.ledger.exists() else {}  # another call may have written meanwhile
        done[name] = entry(f"python book/_scripts/vq_rows.py {name}", seed_of(name), seconds, metrics)
        done["summary"] = summary(done)
        write_text(asked.ledger, json.dumps(done, indent=1) + "\n")
        short = {key: round(value, 4) for key, value in metrics.items() if isinstance(value, float)}
        print(f"{name}: {seconds:.0f} s, {short}", flush=True)


if __name__ == "__main__":
    main()
