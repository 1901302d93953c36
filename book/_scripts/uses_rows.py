"""What the chapter uses says of three trainings: `python book/_scripts/uses_rows.py [row ...]`, by default all that are missing.

`digits.seed-0` to `-2` train 784-400-20 on MNIST for fifteen epochs, fill in hidden pixels of test images in several ways, and hold the
images against what the model makes. `anomaly.seed-0` to `-2` train it ten times for five epochs, each time without one digit, and score
the digit that was left out; `clothes.seed-0` to `-2` train it on Fashion-MNIST and score MNIST. Means and standard deviations over the
seeds go to `digits`, `anomaly` and `clothes`. Records go to results/uses-rows.json: command, commit, versions, hardware, seconds, scores.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

import vaelib
from vaelib.book.ledger import entry
from vaelib.book.strokes import STATISTICS
from vaelib.evaluation import standard_error
from vaelib.predictive import fill_by_turns, impute, predictive_p_values, replicate
from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "uses-rows.json"
KINDS = ("digits", "anomaly", "clothes")
ROWS = tuple(f"{kind}{seed}" for kind in KINDS for seed in (".seed-0", ".seed-1", ".seed-2", ""))
NEIGHBOURS = (1, 5, 10, 20, 50, 100)  # of the filling by neighbours: chosen on training images
DRAWS = 5000  # codes per image with hidden pixels
COUNT = 60  # images with hidden pixels, for each mask


def drawn(images, count, seed=0):
    """`count` images in the random order of this seed."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]


def trained(images, name, seed, epochs):
    """A model of the chapter; kept in runs/uses, so that a run that was cut off goes on."""
    folder = ROOT / "runs" / "uses" / f"{name}-{seed}"
    if (folder / "config.json").exists():
        return vaelib.load(folder)
    torch.manual_seed(seed)
    model = vaelib.mlp_vae(images.image_shape, (400,), 20)
    vaelib.fit(model, images, None, vaelib.TrainConfig(epochs=epochs, learning_rate=2e-3, seed=seed, progress=False))
    vaelib.save(model, folder)
    return model


def masks():
    """Of 28 x 28 pixels, True where one is seen: (1, 1, 28, 28) each."""
    upper, around = torch.zeros(1, 1, 28, 28, dtype=torch.bool), torch.ones(1, 1, 28, 28, dtype=torch.bool)
    upper[..., :14, :] = True
    around[..., 7:21, 7:21] = False
    some = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0)) < 0.2
    return {"lower half": upper, "centre": around, "four in five": some}


def by_neighbours(x, train, observed, count):
    """The share of white among the `count` training images that differ least at the seen pixels, towards the mean of all by one image."""
    seen, database = x[:, :, observed[0, 0]].flatten(1), train[:, :, observed[0, 0]].flatten(1)
    nearest = torch.cdist(seen, database).topk(count, largest=False).indices  # (N, count)
    return (train[nearest].sum(1) + train.mean(0)) / (count + 1)


def score_of(x, probability, observed):
    """Mean log-probability of a hidden pixel under the probability of white, each pixel for itself: (N,), nats."""
    hidden = ~observed.expand_as(x)
    probability = probability.clamp(1e-4, 1 - 1e-4)  # so that one pixel that no training image has costs nine nats and not all
    log_prob = torch.where(x == 1, probability.log(), (1 - probability).log())
    return (log_prob * hidden).flatten(1).sum(1).double() / hidden.flatten(1).sum(1)


def filled(model, train, test, seed):
    """What each way of filling in scores for each mask, nats per hidden pixel."""
    generator = torch.Generator().manual_seed(seed)
    observe = vaelib.Bernoulli().observe
    x_train = observe(train.pixels, torch.Generator().manual_seed(0))
    x = observe(drawn(test, COUNT).pixels, torch.Generator().manual_seed(0))
    tuning, rest = x_train[:500], x_train[500:]
    scores = {}
    for name, observed in masks().items():
        best = max(NEIGHBOURS, key=lambda k: score_of(tuning, by_neighbours(tuning, rest, observed, k), observed).mean())
        black = torch.where(observed, x, torch.zeros_like(x))
        with torch.no_grad():
            single = model.likelihood.mean(model.decode(model.encode(black).mean))
            chains = [fill_by_turns(model, x, observed, 10, generator) for _ in range(20)]
            turns = torch.stack([model.likelihood.mean(model.decode(model.encode(one).mean)) for one in chains]).mean(0)
        found, plain = (impute(model, x, observed, DRAWS, steps=steps, generator=generator) for steps in (100, 0))
        ways = {
            "mean": x_train.mean(0, keepdim=True).expand_as(x),
            "neighbours": by_neighbours(x, x_train, observed, best),
            "encoder": single,
            "turns": turns,
            "resampled_plain": plain.mean,
            "resampled": found.mean,
        }
        each = {way: score_of(x, probability, observed) for way, probability in ways.items()}
        scores[name] = {
            way: {
                "nats": score.mean().item(),
                "standard_error": standard_error(score),
                "over_neighbours": (score - each["neighbours"]).mean().item(),
                "over_neighbours_standard_error": standard_error(score - each["neighbours"]),
            }
            for way, score in each.items()
        }
        for key, imputed in (("ascended", found), ("plain", plain)):
            scores[name][key] = {
                "effective_sample_size": imputed.effective_sample_size.median().item(),
                "log_seen": imputed.log_seen.double().mean().item(),
                "log_hidden": imputed.log_hidden.double().mean().item(),
            }
        scores[name] |= {"count": best, "hidden": int((~observed).sum())}
    return scores


def checked(model, test, seed, count=500, replicates=50):
    """Statistics of test images beside those of replicates, given a new z and given the image's own."""
    generator = torch.Generator().manual_seed(seed)
    x = model.likelihood.observe(drawn(test, count).pixels, torch.Generator().manual_seed(0))
    made = {source: replicate(model, x, replicates, source, generator) for source in ("prior", "posterior")}
    with torch.no_grad():
        likeliest = (model.decode(model.prior.sample(count, generator)) > 0).float()
    scores = {}
    for name, statistic in STATISTICS.items():
        truth = statistic(x)
        row = {"images": truth.double().mean().item(), "likeliest": statistic(likeliest).double().mean().item()}
        for source, replicated in made.items():
            values = statistic(replicated)
            p = predictive_p_values(truth, values)
            row[source] = {
                "mean": values.double().mean().item(),
                "mean_p": p.mean().item(),
                "outside": ((p < 0.025) | (p > 0.975)).double().mean().item(),
                "histogram": torch.histc(p, 10, 0, 1).int().tolist(),
            }
        scores[name] = row
    return scores


def digits_row(seed):
    train, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    model = trained(train, "digits", seed, 15)
    elbo = vaelib.heldout_elbo(model, test).elbo.double().mean().item()
    return {"elbo": elbo, "filled": filled(model, train, test, seed), "checked": checked(model, test, seed)}


def anomaly_scores(model, train, sets):
    """How strange each image of each set is by several scores, larger is stranger: {score: {set: (N,)}}."""
    flat = {name: images.pixels.flatten(1).float() / 255 for name, images in (sets | {"train": train}).items()}
    pca = PCA(20, random_state=0).fit(flat["train"].numpy())
    found = {name: {} for name in ("log_likelihood", "elbo", "distortion", "rate", "typicality", "neighbours", "pca", "ink")}
    usual = vaelib.log_likelihood(model, drawn(train, 1000), 50).mean()
    for name, images in sets.items():
        terms, log_p = vaelib.heldout_elbo(model, images, 10), vaelib.log_likelihood(model, images, 50)
        back = torch.from_numpy(pca.inverse_transform(pca.transform(flat[name].numpy())))
        found["log_likelihood"][name], found["typicality"][name] = -log_p, (log_p - usual).abs()
        found["elbo"][name], found["distortion"][name], found["rate"][name] = -terms.elbo, -terms.log_likelihood, terms.kl
        found["neighbours"][name] = torch.cdist(flat[name], flat["train"]).topk(5, largest=False).values.mean(1)
        found["pca"][name] = (back - flat[name]).square().sum(1)
        found["ink"][name] = flat[name].sum(1)
    return found


def auroc(found):
    """The probability that an image from outside is the stranger one, for each score."""
    return {
        score: float(roc_auc_score([0] * len(of["inside"]) + [1] * len(of["outside"]), torch.cat([of["inside"], of["outside"]])))
        for score, of in found.items()
    }


def anomaly_row(seed):
    train, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    scores = {}
    for digit in range(10):
        kept = train[train.labels != digit]
        model = trained(kept, f"without-{digit}", seed, 5)
        sets = {"inside": drawn(test[test.labels != digit], 1000), "outside": drawn(test[test.labels == digit], 1000)}
        scores[str(digit)] = auroc(anomaly_scores(model, kept, sets))
    means = {score: statistics.fmean(of[score] for of in scores.values()) for score in scores["0"]}
    return {"digits": scores, "mean": means}


def clothes_row(seed):
    train = vaelib.load_images("fashion-mnist")
    model = trained(train, "clothes", seed, 5)
    sets = {
        "inside": drawn(vaelib.load_images("fashion-mnist", "test"), 1000),
        "outside": drawn(vaelib.load_images("mnist", "test"), 1000),
    }
    return auroc(anomaly_scores(model, train, sets))


def over_seeds(records):
    """Mean, standard deviation and range of each number of records of one shape."""
    first = records[0]
    if isinstance(first, dict):
        return {key: over_seeds([record[key] for record in records]) for key in first if key != "histogram"}
    values = [float(value) for value in records]
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values), "low": min(values), "high": max(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(ROWS)}; default: those that are missing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ROWS):
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(ROWS)}")
    done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    for name in arguments.names or [name for name in ROWS if name not in done]:
        kind, _, seed = name.partition(".seed-")
        began = time.perf_counter()
        done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        if seed:
            metrics = {"digits": digits_row, "anomaly": anomaly_row, "clothes": clothes_row}[kind](int(seed))
            seconds = time.perf_counter() - began
        else:
            rows = [done[f"{kind}.seed-{i}"] for i in range(3)]
            metrics, seconds = over_seeds([row["metrics"] for row in rows]), sum(row["seconds"] for row in rows)
        record = entry(f"python book/_scripts/uses_rows.py {name}", int(seed or 0), seconds, metrics)
        write_text(LEDGER, json.dumps(done | {name: record}, indent=2) + "\n")
        print(f"{name:20} {seconds:.0f} s {json.dumps(metrics)[:300]}", flush=True)


if __name__ == "__main__":
    main()
