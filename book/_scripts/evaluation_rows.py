"""What the chapter evaluation claims of one training, for others: `python book/_scripts/evaluation_rows.py [row ...]`, by default all
that are missing.

`model.seed-1` and `model.seed-2` train the chapter's model again and score it as the chapter does; `objectives.seed-0` to `-2` train it
shortly on three objectives, and `outside.seed-0` to `-2` on Fashion-MNIST, to score MNIST under it; means and standard deviations over
these seeds go to `objectives` and `outside`. Models stay in runs/evaluation, so that a run that was cut off goes on. The records go to
results/evaluation-rows.json: command, commit, versions, hardware, seconds and scores. Seconds of trainings are those of the processor.
"""

import argparse
import json
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import vaelib
from vaelib.book.ledger import entry
from vaelib.evaluation import inference_gaps, standard_error
from vaelib.heldout import observations

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "evaluation-rows.json"
ROWS = (
    "model.seed-1", "model.seed-2", "objectives.seed-0", "objectives.seed-1", "objectives.seed-2", "objectives",
    "outside.seed-0", "outside.seed-1", "outside.seed-2", "outside",
)  # fmt: skip
LIKELIHOODS = {"bernoulli": "bernoulli", "levels": "discretized_logistic"}
OBJECTIVES = {"elbo": {}, "iwae": {"objective": "iwae", "num_samples": 5}, "dreg": {"objective": "dreg", "num_samples": 5}}
SIZES = (1, 2, 5, 10, 20, 50, 100, 200)  # draws of an estimate of the gradient


def drawn(images, count):
    """`count` images in the random order of the seed 0."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def trained(images, name, seed, epochs, likelihood="bernoulli", **options):
    """A model of the chapter and the processor's seconds of its training."""
    folder = ROOT / "runs" / "evaluation" / f"{name}-{seed}-{epochs}"
    if (folder / "seconds.txt").exists():
        return vaelib.load(folder), float((folder / "seconds.txt").read_text())
    torch.manual_seed(seed)
    model = vaelib.mlp_vae(images.image_shape, (200, 200), 50, likelihood, activation="tanh")
    began = time.process_time()
    vaelib.fit(model, images, None, vaelib.TrainConfig(epochs=epochs, learning_rate=2e-3, seed=seed, progress=False, **options))
    seconds = time.process_time() - began
    vaelib.save(model, folder)
    (folder / "seconds.txt").write_text(str(seconds))
    return model, seconds


def gradient_terms(model, x, count, generator):
    """Of `count` draws for one image: log w_k, (count,), and its gradient for mean and log-variance of q, (count, 2L), through z and
    through the density."""
    mean, log_var = (value.detach().expand(count, -1) for value in model.encode(x))
    eps = torch.randn(count, model.latent_dim, generator=generator)
    deviation = (log_var / 2).exp()
    z = (mean + deviation * eps).requires_grad_()
    log_likelihood = model.likelihood.log_prob(x.expand(count, *x.shape[1:]), model.decode(z), validate=False)
    log_prior = vaelib.gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z))
    log_weights = log_likelihood + log_prior - vaelib.gaussian_log_density(z, mean, log_var)
    (path,) = torch.autograd.grad(log_weights.sum(), z)
    through_z = torch.cat([path, path * deviation * eps / 2], 1)
    through_density = -torch.cat([eps / deviation, (eps**2 - 1) / 2], 1)
    return log_weights.detach(), through_z, through_density


def signal(model, images, count=20_000):
    """Signal-to-noise ratio of the gradient for mean and log-variance of q, for both estimators and each K of SIZES.

    "images": the root of the mean squared signal over the mean variance, images apart; "batch": the same of the sum over the images.
    """
    generator = torch.Generator().manual_seed(0)
    sums = {}
    for x, _ in observations(model, images.pixels, 1, 0):
        chunks = [gradient_terms(model, x, 2000, generator) for _ in range(count // 2000)]
        log_weights, through_z, through_density = (torch.cat(part) for part in zip(*chunks, strict=True))
        for k in SIZES:
            weights = log_weights.view(-1, k).softmax(1)[..., None]
            plain = (weights * (through_z + through_density).view(-1, k, 2 * model.latent_dim)).sum(1)
            doubly = (weights**2 * through_z.view(-1, k, 2 * model.latent_dim)).sum(1)
            for name, gradient in (("iwae", plain), ("dreg", doubly)):
                noise, mean = gradient.var(0).sum().item(), gradient.mean(0)
                signal = mean.square().sum().item() - noise / len(gradient)
                for key, value in (("noise", noise), ("signal", signal), ("mean", mean), ("excess", noise / len(gradient))):
                    sums[name, k, key] = sums.get((name, k, key), 0) + value
            sums["draws", k] = sums.get(("draws", k), 0) + (1 / weights.square().sum(1)).mean().item() / len(images)
    ratios = {"images": {}, "batch": {}}
    for name in ("iwae", "dreg"):
        for kind in ratios:
            signals = [
                sums[name, k, "signal"]
                if kind == "images"
                else sums[name, k, "mean"].square().sum().item() - sums[name, k, "excess"]
                for k in SIZES
            ]
            ratios[kind][name] = [max(value / sums[name, k, "noise"], 0) ** 0.5 for value, k in zip(signals, SIZES, strict=True)]
    return ratios | {"sizes": list(SIZES), "effective": [sums["draws", k] for k in SIZES], "num_images": len(images)}


def model_row(seed, train, test):
    model, seconds = trained(train, "elbo", seed, 20)
    early, _ = trained(train, "elbo", seed, 3)
    scores = vaelib.evaluate(model, test)
    estimate = vaelib.importance_weighted_estimate(model, drawn(test, 200))
    split = vaelib.rate_decomposition(model, test)
    gaps = {}
    for name, images in (("test", test), ("training", train)):
        found = inference_gaps(model, drawn(images, 200))
        gaps[name] = {part: getattr(found, part).mean().item() for part in ("amortization", "approximation", "log_likelihood")}
        gaps[name] |= {f"{part}_standard_error": standard_error(getattr(found, part)) for part in ("amortization", "approximation")}
    return {
        "elbo": scores.elbo, "elbo_standard_error": scores.elbo_standard_error, "rate": scores.kl,
        "active": int(vaelib.active_units(model, test).sum()),
        "log_likelihood_of_200": estimate.log_likelihood.double().mean().item(),
        "effective_sample_size_of_200": estimate.effective_sample_size.median().item(),
        "share_of_few_draws_of_200": (estimate.effective_sample_size < 10).double().mean().item(),
        "mutual_information": split.mutual_information, "marginal_kl": split.marginal_kl, "gaps": gaps,
        "signal": {"early": signal(early, drawn(test, 20)), "trained": signal(model, drawn(test, 20))},
        "train_seconds": seconds,
    }  # fmt: skip


def objectives_row(seed, train, test):
    scores = {}
    for name, options in OBJECTIVES.items():
        model, seconds = trained(train, name, seed, 3, **options)
        scores[name] = {
            "elbo": vaelib.heldout_elbo(model, test, 5).elbo.double().mean().item(),
            "log_likelihood": vaelib.log_likelihood(model, drawn(test, 1000), 200).double().mean().item(),
            "active": int(vaelib.active_units(model, test).sum()),
            "train_seconds": seconds,
        }
    return scores


def perturbed(images, seed, share=0.2):
    """What a background model is trained on: of each image this share of the pixels, at random, at random levels (Ren et al. 2019)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = images.pixels
    replaced = torch.rand(pixels.shape, generator=generator) < share
    return vaelib.image_set(
        torch.where(replaced, torch.randint(0, 256, pixels.shape, generator=generator, dtype=torch.uint8), pixels)
    )


def compressed(model, images):
    """Nats that zlib takes for each image as the model sees it: (N,)."""
    nats = []
    for x, _ in observations(model, images.pixels, len(images), 0):
        binary = model.likelihood.values == 2
        for image in x if binary else images.pixels:
            data = image.numpy().flatten()
            data = np.packbits(data.astype(bool)) if binary else data
            nats.append(8 * math.log(2) * len(zlib.compress(data.tobytes(), 9)))
    return torch.tensor(nats)


def outside_row(seed, *_):
    """Trained on Fashion-MNIST for three epochs: which of several scores tells its test images from those of MNIST, and how well."""
    train, count = vaelib.load_images("fashion-mnist"), 500
    sets = {
        "inside": vaelib.load_images("fashion-mnist", "test"),
        "outside": vaelib.load_images("mnist", "test"),
        "training": train,
    }
    sets = {name: drawn(images, count) for name, images in sets.items()}
    metrics = {}
    for name, likelihood in LIKELIHOODS.items():
        model, seconds = trained(train, f"fashion-{name}", seed, 3, likelihood)
        background, _ = trained(perturbed(train, seed), f"background-{name}", seed, 3, likelihood)
        found = {key: vaelib.importance_weighted_estimate(model, images, 200) for key, images in sets.items()}
        log_p = {key: estimate.log_likelihood for key, estimate in found.items()}
        less = {key: vaelib.log_likelihood(background, images, 200) for key, images in sets.items()}
        scores = {
            "log_likelihood": log_p,
            "elbo": {key: vaelib.heldout_elbo(model, images, 10).elbo for key, images in sets.items()},
            "typicality": {key: -(value - log_p["training"].mean()).abs() for key, value in log_p.items()},
            "ratio": {key: value - less[key] for key, value in log_p.items()},
            "complexity": {key: value + compressed(model, sets[key]) for key, value in log_p.items()},
        }
        truth = torch.cat([torch.ones(count), torch.zeros(count)])
        refined = {
            key: inference_gaps(model, sets[key][:100], 200).log_likelihood - log_p[key][:100] for key in ("inside", "outside")
        }
        both = torch.cat([log_p["inside"], log_p["outside"]])
        ends = [int(both.quantile(0.005)) - 1, int(both.max()) + 1]  # of the histogram
        metrics[name] = {
            "auroc": {score: float(roc_auc_score(truth, torch.cat([of["inside"], of["outside"]]))) for score, of in scores.items()},
            "mean": {score: {key: value.double().mean().item() for key, value in of.items()} for score, of in scores.items()},
            "effective_sample_size": {key: estimate.effective_sample_size.median().item() for key, estimate in found.items()},
            "refined_gain": {key: gain.double().mean().item() for key, gain in refined.items()},
            "compressed": {key: compressed(model, images).mean().item() for key, images in sets.items()},
            "histogram": {
                "ends": ends, "below": {key: int((log_p[key] < ends[0]).sum()) for key in sets},
                "counts": {key: torch.histc(log_p[key], 40, *ends).int().tolist() for key in sets},
            },
            "train_seconds": seconds,
        }  # fmt: skip
    return metrics | {"count": count, "num_samples": 200, "epochs": 3, "perturbed": 0.2}


def summary(kind, rows):
    """Mean and standard deviation over the seeds, of each score of each objective or likelihood, and the seconds of all."""
    records = [row for key, row in rows.items() if key.startswith(f"{kind}.")]
    scores = {}
    for name in {"objectives": OBJECTIVES, "outside": LIKELIHOODS}[kind]:
        runs = [record["metrics"][name] for record in records]
        runs = [run["auroc"] if kind == "outside" else run for run in runs]
        values = {score: torch.tensor([float(run[score]) for run in runs]) for score in runs[0]}
        scores[name] = {score: {"mean": value.mean().item(), "deviation": value.std().item()} for score, value in values.items()}
    return scores, sum(record["seconds"] for record in records)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(ROWS)}; default: those that are missing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ROWS):
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(ROWS)}")
    done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    train, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    for name in arguments.names or [name for name in ROWS if name not in done]:
        kind, _, seed = name.partition(".seed-")
        began = time.perf_counter()
        if seed:
            metrics = {"model": model_row, "objectives": objectives_row, "outside": outside_row}[kind](int(seed), train, test)
            seconds = time.perf_counter() - began
        else:
            metrics, seconds = summary(kind, json.loads(LEDGER.read_text()))
        record = entry(f"python book/_scripts/evaluation_rows.py {name}", int(seed or 0), seconds, metrics)
        done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        LEDGER.write_text(json.dumps(done | {name: record}, indent=2) + "\n")
        print(f"{name:20} {json.dumps(metrics)[:200]}", flush=True)


if __name__ == "__main__":
    main()
