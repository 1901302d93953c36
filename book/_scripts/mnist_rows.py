"""Train and score the rows of the MNIST tables: `python book/_scripts/mnist_rows.py [row ...]`, all that are missing by default.

A row is trained three times, with the seeds 0, 1 and 2 for weights, order and noise, on the images that the chapter trains on, and
scored on the test set. Records go to results/mnist-rows.json: command, commit, versions, hardware, seconds, and each score with its
mean and its standard deviation over the three trainings.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import vaelib
from vaelib.book.ledger import entry

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "mnist-rows.json"
SEEDS = (0, 1, 2)
SHORT = 6  # epochs of the sizes and the likelihoods
USED = 0.1  # nats: a latent dimension of a larger rate counts as used
LIKELIHOODS = {
    "bernoulli-threshold": {"name": "bernoulli", "binarize": "threshold"},
    "grey-bce": "grey_bce_not_a_likelihood",
    "gaussian-1": {"name": "gaussian", "scale": 1.0},
    "gaussian-learned": {"name": "gaussian", "scale": 0.3, "learned": True},
    "gaussian-discretized": {"name": "gaussian", "scale": 0.3, "learned": True, "discretized": True},
    "logistic-discretized": "discretized_logistic",
}
# A row: the arguments of `mlp_vae`, and those of `TrainConfig` that differ from the chapter's.
ROWS = {f"784-400-{latents}": (((400,), latents), {}) for latents in (2, 5, 10, 20, 50)}
ROWS |= {f"784-{hidden}-20": (((hidden,), 20), {}) for hidden in (100, 200, 800)}
ROWS |= {f"784-128-{latents}": (((128,), latents, "bernoulli", "leaky_relu"), {}) for latents in (20, 256)}
ROWS |= {name: (((400,), 20, spec), {}) for name, spec in LIKELIHOODS.items()}
ROWS |= {f"784-128-{n}.18-epochs": (((128,), n, "bernoulli", "leaky_relu"), {"epochs": 18}) for n in (20, 256)}
ROWS |= {f"beta-{beta:g}": (((400,), 20), {"epochs": 2, "beta": beta}) for beta in (1.0, 4.0)}
MOMENTUM = {"optimizer": "SGD", "optimizer_options": {"momentum": 0.9}}
ROWS |= {f"sgd-{rate:g}": (((400,), 20), {"epochs": 2, "learning_rate": rate, **MOMENTUM}) for rate in (1e-4, 1e-3, 1e-2, 1e-1)}
ROWS |= {f"adam-{rate:g}": (((400,), 20), {"epochs": 2, "learning_rate": rate}) for rate in (1e-3, 6e-2)}
ROWS["784-400-20.10-epochs"] = (((400,), 20), {"epochs": 10})


def scores(vae, test):
    """What the chapter says of a model: on its own score, on those that likelihoods share, and unit by unit."""
    found = vaelib.evaluate(vae, test)
    row = {"elbo": found.elbo, "kl": found.kl, "active": int(vaelib.active_units(vae, test).sum())}
    with torch.no_grad():
        q = vae.encode(vae.likelihood.observe(test.pixels, torch.Generator().manual_seed(0)))
    units = vaelib.gaussian_kl(q.mean[..., None], q.log_var[..., None]).mean(0)  # (L,), nats
    row |= {"used": int((units > USED).sum()), "used_share": (units[units > USED].sum() / units.sum()).item()}
    row["rate_of_the_rest"] = units[units <= USED].sum().item()
    own = vae.likelihood
    if isinstance(own, vaelib.Bernoulli):  # params are logits
        vae.likelihood, shared = vaelib.Bernoulli(), "as_bernoulli"
    elif isinstance(own, vaelib.Gaussian):
        row["scale"] = own.log_scale.exp().item()
        vae.likelihood, shared = vaelib.Gaussian(row["scale"], discretized=True), "over_levels"
    else:
        shared = "over_levels"
    same = own.values == vae.likelihood.values and vae.likelihood.config.get("binarize") == own.config.get("binarize")
    row[shared] = row["elbo"] if same else vaelib.evaluate(vae, test).elbo
    vae.likelihood = own
    return row


def run(name, seeds=SEEDS):
    """The record of one row."""
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    train, _ = vaelib.train_valid_split(images, len(images) // 12, seed=0)
    network, options = ROWS[name]
    options = {"epochs": SHORT, "learning_rate": 6e-3, "progress": False} | options
    each, began = [], time.perf_counter()
    for seed in seeds:
        torch.manual_seed(seed)
        vae = vaelib.mlp_vae(train.image_shape, *network)
        vaelib.fit(vae, train, None, vaelib.TrainConfig(seed=seed, **options))
        each.append(scores(vae, test))
    metrics = {"epochs": options["epochs"], "seeds": list(seeds)}
    for key in each[0]:
        values = [row[key] for row in each]
        metrics[key] = {"mean": statistics.fmean(values), "deviation": statistics.stdev(values), "each": values}
    return entry(f"python book/_scripts/mnist_rows.py {name}", seeds[0], time.perf_counter() - began, metrics)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows to make, such as 784-400-20; default: those that are missing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ROWS):
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(ROWS)}")
    done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    whole = [name for name, record in done.items() if len(record["metrics"]["seeds"]) == len(SEEDS)]
    for name in arguments.names or [name for name in ROWS if name not in whole]:
        record = run(name)
        done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        LEDGER.write_text(json.dumps(done | {name: record}, indent=2) + "\n")
        elbo = record["metrics"]["elbo"]
        print(f"{name:24} ELBO {elbo['mean']:.2f} +- {elbo['deviation']:.2f} nats, {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
