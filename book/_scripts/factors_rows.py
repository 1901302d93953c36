"""Score codes by the factors of the images: `python book/_scripts/factors_rows.py [row ...]`, all that are missing by default.

The images are the bundled shapes, halved to 16x16 pixels by averaging. A row beta-B.seed-S is one training of a small VAE with the
weight B of the rate (beta-0 is an autoencoder whose noise costs nothing); ica.seed-S and pca are of pixels, factors is the code that
one would wish for, turned is that code with two pairs of factors turned by 45 degrees. All have ten numbers, but for the last two.
Codes are draws of q(z given x) of the test images, one each. Records go to results/factors-rows.json, one for each row, and what
they say together, with means and standard deviations over the trainings, under "summary".
"""

import argparse
import json
import statistics
import time
import warnings
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning

import vaelib
from vaelib.book.ledger import entry
from vaelib.factors import mutual_information_gap, sampled_codes
from vaelib.storage import read_object, write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "factors-rows.json"
SEEDS = range(5)
BETAS = (0, 1, 4, 16, 32, 64)
LATENTS, EPOCHS = 10, 30
LIKELIHOOD = {"name": "gaussian", "scale": 0.3}
USED = 0.1  # nats: a unit of a larger rate counts as used
VAES = {f"beta-{beta}.seed-{seed}": (beta, seed) for beta in BETAS for seed in SEEDS}
ICAS = {f"ica.seed-{seed}": seed for seed in SEEDS}
ROWS = [*VAES, "pca", *ICAS, "factors", "turned"]


def halved(split):
    """The shapes at 16x16."""
    images = vaelib.load_images("shapes", split)
    return replace(images, pixels=F.avg_pool2d(images.pixels.float(), 2).round().to(torch.uint8))


def scores(codes, factors):
    """What is kept of a code."""
    found = mutual_information_gap(codes, factors)
    rounded = [[round(value, 4) for value in row] for row in found.information.tolist()]
    told = (found.information.max(0).values / found.entropy).tolist()
    return {"gap": found.gap, "per_factor": found.per_factor.tolist(), "best_share": told, "information": rounded}


def trained(beta, seed, images, epochs=EPOCHS):
    """A VAE of fully connected layers."""
    torch.manual_seed(seed)
    model = vaelib.mlp_vae(images.image_shape, (256, 128), LATENTS, LIKELIHOOD)
    config = vaelib.TrainConfig(epochs=epochs, learning_rate=2e-3, beta=beta, seed=seed, progress=False)
    vaelib.fit(model, images, None, config)
    return model


def vae_row(beta, seed, images, test, epochs=EPOCHS):
    """Scores of one training; `gap_of_means` and the others beside `gap` are of the same model, told in another way."""
    model = trained(beta, seed, images, epochs)
    judged, units = vaelib.evaluate(model, test), vaelib.kl_per_unit(model, test)
    codes, means = sampled_codes(model, test), vaelib.posterior_means(model, test)
    return {
        "beta": beta,
        "epochs": epochs,
        "elbo": judged.elbo,
        "likelihood_term": judged.expected_log_likelihood,
        "rate": judged.kl,
        "used": int((units > USED).sum()),
        "rate_of_units": units.tolist(),
        **scores(codes, test.factors),
        "gap_of_means": mutual_information_gap(means, test.factors).gap,
        "gap_of_other_draws": mutual_information_gap(sampled_codes(model, test, seed=1), test.factors).gap,
        "gap_of_10_bins": mutual_information_gap(codes, test.factors, bins=10).gap,
        "gap_of_training_images": mutual_information_gap(sampled_codes(model, images), images.factors).gap,
    }


def row(name, images, test):
    """The metrics of one row."""
    if name in VAES:
        return vae_row(*VAES[name], images, test)
    flat, held_out = (s.pixels.flatten(1).double().numpy() / 255 for s in (images, test))
    if name == "pca":
        return scores(torch.from_numpy(PCA(LATENTS, svd_solver="full").fit(flat).transform(held_out)), test.factors)
    if name in ICAS:
        # no contrast and no algorithm of scikit-learn's converges here, as `iterations` tells: the axes move on
        found = FastICA(LATENTS, whiten="unit-variance", tol=1e-3, max_iter=1000, random_state=ICAS[name]).fit(flat)
        return {"iterations": int(found.n_iter_), **scores(torch.from_numpy(found.transform(held_out)), test.factors)}
    code = test.factors.double().clone()
    if name == "turned":  # x with y, size with hue, each on the same scale
        code = (code - code.mean(0)) / code.std(0)
        for a, b in ((1, 2), (3, 4)):
            code[:, a], code[:, b] = (code[:, a] + code[:, b]) / 2**0.5, (code[:, a] - code[:, b]) / 2**0.5
    return scores(code, test.factors)


def ranks(values):
    """The place of each value, 0 for the lowest."""
    return np.argsort(np.argsort(values)).astype(float)


def spread(values):
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values), "each": list(values)}


def won(a, b):
    """The share of pairs of a training of each in which the one of a has the larger gap."""
    return statistics.fmean((x > y) + 0.5 * (x == y) for x in a for y in b)


def summary(done):
    """What the rows say together."""
    kinds = {f"beta-{beta}": [done[name]["metrics"] for name in VAES if VAES[name][0] == beta] for beta in BETAS}
    kinds["ica"] = [done[name]["metrics"] for name in ICAS]
    found = {
        kind: {key: spread([row[key] for row in rows]) for key, value in rows[0].items() if isinstance(value, (int, float))}
        for kind, rows in kinds.items()
    }
    for kind, rows in kinds.items():  # factor by factor, the mean over the trainings
        for key in ("per_factor", "best_share"):
            found[kind][key] = np.mean([row[key] for row in rows], axis=0).tolist()
    gaps = {kind: found[kind]["gap"]["each"] for kind in kinds}
    order = sorted(gaps, key=lambda kind: -found[kind]["gap"]["mean"])
    upsets = {f"{worse} over {better}": won(gaps[worse], gaps[better]) for better, worse in combinations(order, 2)}
    with_a_bound = [f"beta-{beta}" for beta in BETAS if beta]  # of the autoencoder the ELBO says nothing
    first = max(with_a_bound, key=lambda kind: found[kind]["gap"]["mean"])
    each = [row for kind in with_a_bound for row in kinds[kind]]
    within = [np.corrcoef(*(ranks([row[key] for row in kinds[kind]]) for key in ("elbo", "gap")))[0, 1] for kind in with_a_bound]
    between = statistics.variance([found[kind]["gap"]["mean"] for kind in with_a_bound])
    noise = statistics.fmean(found[kind]["gap"]["deviation"] ** 2 for kind in with_a_bound)
    return {
        "seeds": list(SEEDS),
        "methods": found,
        "order": order,
        "best_beta": first,
        "upsets": upsets,
        "rank_correlation_of_elbo_and_gap": {
            "over_all": np.corrcoef(*(ranks([row[key] for row in each]) for key in ("elbo", "gap")))[0, 1],
            "within_a_beta": dict(zip(with_a_bound, within, strict=True)) | {"mean": statistics.fmean(within)},
        },
        # of the variance of the gap over betas and seeds together: that of the seeds, and that of the means of the betas without it
        "share_of_the_seed": noise / (noise + max(0.0, between - noise / len(SEEDS))),
        "moved_by_other_draws": spread(
            [abs(row["gap"] - row["gap_of_other_draws"]) for rows in list(kinds.values())[:-1] for row in rows]
        ),
        "lowest": min(row["gap"] for row in each),
        "highest": max(row["gap"] for row in each),
        "trainings": len(each),
        "below_pca": sum(row["gap"] < done["pca"]["metrics"]["gap"] for row in each),
        "pca": done["pca"]["metrics"]["gap"],
        "factors": done["factors"]["metrics"]["gap"],
        "turned": done["turned"]["metrics"]["gap"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="rows to make, such as beta-16.seed-0; default: those that are missing")
    parser.add_argument("--again", action="store_true", help="make them all, whatever there is")
    arguments = parser.parse_args()
    done = read_object("ledger", LEDGER) if LEDGER.exists() else {}
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"rows: got {', '.join(sorted(unknown))}, expected some of {', '.join(ROWS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    images, test = halved("train"), halved("test")
    for name in arguments.rows or [name for name in ROWS if arguments.again or name not in done]:
        began, seed = time.perf_counter(), VAES[name][1] if name in VAES else ICAS.get(name, 0)
        metrics = row(name, images, test)
        seconds = max(0.1, time.perf_counter() - began)  # the ledger counts in tenths
        done[name] = entry(f"python book/_scripts/factors_rows.py {name}", seed, seconds, metrics)
        write_text(LEDGER, json.dumps({key: done[key] for key in (*ROWS, "summary") if key in done}, indent=2) + "\n")
        print(f"{name:16} gap {metrics['gap']:.3f}, {done[name]['seconds']:.0f} s", flush=True)
    if set(ROWS) <= set(done):
        seconds = sum(done[name]["seconds"] for name in ROWS)
        done["summary"] = entry("python book/_scripts/factors_rows.py", 0, seconds, summary(done))
        write_text(LEDGER, json.dumps({key: done[key] for key in (*ROWS, "summary")}, indent=2) + "\n")


if __name__ == "__main__":
    main()
