"""Train the VAE of the chapter `generation` with other seeds and score its samples: `python book/_scripts/sample_rows.py [seed ...]`.

The chapter shows one training. Here are three, and three seeds of sampling for each, so that a difference can be held against chance.
runs/samples/<seed> keeps the models. Records go to results/sample-rows.json: one for each training, and "summary", with the mean and the
standard deviation over the trainings, which is made anew from all records at each call.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import vaelib
from vaelib.book.ledger import commit, entry
from vaelib.priors import fit_mixture, posterior_samples
from vaelib.quality import features_of, frechet_distance, manifold_scores, mnist_features
from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "sample-rows.json"
SEEDS = (0, 1, 2)  # of a training: weights, order and noise
DRAWS = (1, 2, 3)  # of the samples
TEMPERATURES = (0.7, 1.4, 2.5, 4.0)
N = 10000


def trained(seed, images):
    """The chapter's VAE, trained with `seed`, and the seconds and the commit of its training; kept under runs/."""
    folder = ROOT / "runs" / "samples" / str(seed) / "VAE"
    if not (folder / "trained.json").exists():
        train, valid = vaelib.train_valid_split(images, len(images) // 12, seed=0)
        torch.manual_seed(seed)
        model, began = vaelib.mlp_vae(images.image_shape, (256,), 20), time.perf_counter()
        config = vaelib.TrainConfig(epochs=20, batch_size=128, learning_rate=5e-3, seed=seed, progress=False)
        vaelib.fit(model, train, valid, config)
        vaelib.save(model, folder)
        about = {"seconds": round(time.perf_counter() - began, 1), "commit": commit()}
        write_text(folder / "trained.json", json.dumps(about))
    return vaelib.load(folder), json.loads((folder / "trained.json").read_text())


def contrast(pixels, factor):
    """Grey levels with their logits multiplied: ``uint8`` -> ``uint8``."""
    return (255 * (factor * torch.logit(pixels / 255)).sigmoid()).round().to(torch.uint8)


def drawn(pixels, seed):
    """Binary images: each pixel white with the probability level / 255."""
    uniform = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return 255 * (uniform < pixels / 255).to(torch.uint8)


def thresholded(pixels):
    """Binary images: white where the level is at least 128."""
    return 255 * (pixels >= 128).to(torch.uint8)


def run(seed, images, test):
    """The record of one training."""
    began = time.perf_counter()
    vae, about = trained(seed, images)
    train, _ = vaelib.train_valid_split(images, len(images) // 12, seed=0)
    net, mixture = mnist_features(), fit_mixture(vae, train, 50)
    real = {"grey": test.pixels, "drawn": drawn(test.pixels, 0), "thresholded": thresholded(test.pixels)}
    real = {kind: features_of(net, pixels) for kind, pixels in real.items()}
    codes, z = posterior_samples(vae, train), posterior_samples(vae, test)

    def any_of(count, draw):
        return torch.randperm(count, generator=torch.Generator().manual_seed(draw))[:N]

    samplers = {
        "VAE, prior": lambda draw: vaelib.generate(vae, N, seed=draw),
        "VAE, mixture": lambda draw: vaelib.generate(vae, N, seed=draw, prior=mixture),
        "VAE, codes of training images": lambda draw: vaelib.generation.decode_pixels(vae, codes[any_of(len(codes), draw)]),
        "reconstructions": lambda draw: vaelib.reconstruct(vae, test.pixels),
        "training images": lambda draw: train.pixels[any_of(len(train), draw)],
    }
    for temperature in TEMPERATURES:
        samplers[f"VAE, prior, T = {temperature}"] = lambda draw, t=temperature: vaelib.generate(vae, N, t, seed=draw)

    rows, distances = {}, {}  # distances: row -> draw -> kind -> number
    for name, sampler in samplers.items():
        row, distances[name] = {}, []
        for draw in DRAWS if name in ("VAE, prior", "VAE, mixture") else DRAWS[:1]:
            pixels = sampler(draw)
            kinds = {"grey": pixels, "drawn": drawn(pixels, draw), "thresholded": thresholded(pixels)}
            features = {kind: features_of(net, changed) for kind, changed in kinds.items()}
            distances[name].append({kind: frechet_distance(real[kind], f) for kind, f in features.items()})
            if draw != DRAWS[0]:
                continue
            scores = manifold_scores(real["thresholded"], features["thresholded"])._asdict()
            row |= {f"{score}_thresholded": value for score, value in scores.items()}
            if name in ("VAE, prior", "VAE, mixture"):
                changed = {"times_1": features["grey"]}
                changed |= {f"times_{factor}": features_of(net, contrast(pixels, factor)) for factor in (0.5, 2)}
                for change, of_changed in changed.items():  # grey images against grey ones, the logits multiplied
                    scores = manifold_scores(real["grey"], of_changed)._asdict() | {
                        "frechet": frechet_distance(real["grey"], of_changed)
                    }
                    row |= {f"{score}_{change}": value for score, value in scores.items()}
        row |= {f"frechet_{kind}": statistics.mean(d[kind] for d in distances[name]) for kind in real}
        rows[name] = row
        print(f"seed {seed}: {name:30}" + "".join(f" {kind} {row[f'frechet_{kind}']:6.1f}" for kind in real), flush=True)
    chance = {
        name: {kind: statistics.stdev(d[kind] for d in distances[name]) for kind in real} for name in ("VAE, prior", "VAE, mixture")
    }

    parts = MultivariateNormal(mixture.means, scale_tril=mixture.roots)
    normal = MultivariateNormal(torch.zeros(20), torch.eye(20)).log_prob(z)
    gain = MixtureSameFamily(Categorical(mixture.weights), parts).log_prob(z) - normal
    elbo = vaelib.evaluate(vae, test).elbo
    rows["VAE, prior"]["elbo"] = elbo
    rows["VAE, mixture"] |= {"elbo": elbo + gain.mean().item(), "gain": gain.mean().item()}
    for temperature in TEMPERATURES:
        wide = MultivariateNormal(torch.zeros(20), temperature**2 * torch.eye(20)).log_prob(z)
        rows[f"VAE, prior, T = {temperature}"]["elbo"] = elbo + (wide - normal).mean().item()
    metrics = {"rows": rows, "sampling_sd": chance, "trained": about, "num_images": N, "sampling_seeds": list(DRAWS)}
    metrics["gain_standard_error"] = vaelib.evaluation.standard_error(gain)
    return entry(f"python book/_scripts/sample_rows.py {seed}", seed, time.perf_counter() - began, metrics)


def summary(records):
    """The mean and the standard deviation over the trainings of each score of each row."""
    all_rows = [record["metrics"]["rows"] for record in records]
    rows = {
        name: {
            score: {"mean": statistics.mean(values), "sd": statistics.stdev(values), "low": min(values), "high": max(values)}
            for score in all_rows[0][name]
            if (values := [rows[name][score] for rows in all_rows])
        }
        for name in all_rows[0]
    }
    metrics = {"rows": rows, "trainings": len(records)}
    return entry("python book/_scripts/sample_rows.py", 0, sum(record["seconds"] for record in records), metrics)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, help="trainings to score; default: 0, 1 and 2")
    arguments = parser.parse_args()
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    for seed in arguments.seeds or SEEDS:
        record = run(seed, images, test)
        done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        done[f"seed-{seed}"] = record
        records = [value for key, value in sorted(done.items()) if key.startswith("seed-")]
        done |= {"summary": summary(records)} if len(records) > 1 else {}
        write_text(LEDGER, json.dumps(done, indent=2) + "\n")


if __name__ == "__main__":
    main()
