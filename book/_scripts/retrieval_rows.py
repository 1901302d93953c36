"""Score the rows of the retrieval tables: `python book/_scripts/retrieval_rows.py [set.row[.seed] ...]`, all that are missing by default.

The test set is searched in the full training set. A row is a representation and a distance. What is drawn or learned is made anew with
each seed: weights, order of the images and noise; `mnist.vae-cosine.1` is that row with the seed 1. Records go to
results/retrieval-rows.json: command, seed, commit, versions, hardware, seconds (training and search) and the scores with their intervals.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import skew, spearmanr

import vaelib
from vaelib.book.ledger import entry
from vaelib.retrieval import average_precision, nearest_neighbours, posteriors, score_retrieval
from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "retrieval-rows.json"
SETS = ("mnist", "fashion-mnist", "cifar10")
SEEDS = (0, 1, 2)
EPOCHS = {"mnist": 15, "fashion-mnist": 15, "cifar10": 4}
LATENTS = {"mnist": 20, "fashion-mnist": 20, "cifar10": 128}
CONTRAST = {"mnist": 10.0, "fashion-mnist": 10.0, "cifar10": 300.0}  # weight of the contrastive loss, in nats of the ELBO
SOME = 1000  # queries, drawn at random, where each costs a whole ranking (mAP) or no matrix product serves (Bhattacharyya)
DISTANCES = ("euclidean", "cosine", "symmetric_kl", "bhattacharyya")
FIXED = ("pixels", "pixels-cosine", "pca", "pca-cosine")  # nothing drawn, nothing learned: one record
DRAWN = ("random", "random-conv", "random-conv-cosine")
LEARNED = (
    "autoencoder", "autoencoder-cosine", *(f"vae-{d}" for d in DISTANCES), "contrastive", "contrastive-only",
    "supervised", "supervised-cosine",
)  # fmt: skip
ROWS = FIXED + DRAWN + LEARNED
EVERY = [
    f"{name}.{row}{f'.{seed}' if seed else ''}"
    for seed in SEEDS for name in SETS for row in ROWS if seed == 0 or row not in FIXED
]  # fmt: skip


def build(name, seed):
    """The VAE of a set: an MLP for the grey images, convolutions for colour."""
    torch.manual_seed(seed)
    if name == "cifar10":
        return vaelib.conv_vae((3, 32, 32), LATENTS[name], "discretized_logistic")
    return vaelib.mlp_vae((1, 28, 28), (400,), LATENTS[name])


def train_config(name, seed, **options):
    """How all learned rows of a set are trained."""
    colour = name == "cifar10"
    return vaelib.TrainConfig(epochs=EPOCHS[name], flip=colour, channels_last=colour, seed=seed, **options)


def augment(pixels, generator):
    """Each image changed in a way of its own, ``uint8`` (N, C, H, W) -> the same: grey ones are moved, scaled, turned and slanted; colour
    ones cropped, mirrored and tinted."""
    count, channels = pixels.shape[:2]

    def draw(low, high):
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    colour = channels == 3
    zoom = draw(0.5 if colour else 0.8, 1.0 if colour else 1.15).view(count)
    room = (1 - zoom).abs() if colour else torch.full_like(zoom, 0.2)
    theta = torch.zeros(count, 2, 3)
    mirror = torch.where(draw(0, 1).view(count) < 0.5, -1.0, 1.0) if colour else 1.0
    theta[:, 0, 0], theta[:, 1, 1] = zoom * mirror, zoom
    if not colour:
        turn, slant = draw(-0.3, 0.3).view(count), draw(-0.4, 0.4).view(count)
        theta[:, 0, 1], theta[:, 1, 0] = slant - turn, turn
    theta[:, 0, 2], theta[:, 1, 2] = room * draw(-1, 1).view(count), room * draw(-1, 1).view(count)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    image = F.grid_sample(pixels.float(), grid, align_corners=False, padding_mode="reflection" if colour else "zeros")
    if colour:
        grey = image.mean(1, keepdim=True)
        saturation = torch.where(draw(0, 1) < 0.2, torch.zeros(count, 1, 1, 1), draw(0.5, 1.5))
        image = grey + saturation * (image - grey)
        centre = image.mean((1, 2, 3), keepdim=True)
        image = (centre + draw(0.5, 1.5) * (image - centre)) * draw(0.6, 1.4)
    return image.round().clamp(0, 255).to(torch.uint8)


def fit_with_contrast(model, images, config, weight, elbo=True):
    """Minimize weight * NT-Xent (Chen et al. 2020), two views of an image shall have alike posterior means, and minus the `elbo`."""
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(model.parameters() if elbo else model.encoder.parameters(), lr=1e-3, fused=True)
    steps = config.epochs * -(-len(images) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(config.epochs):
        for pixels in vaelib.minibatches(images, 256, generator):
            x, one, two = (
                model.likelihood.observe(p, generator) for p in (pixels, augment(pixels, generator), augment(pixels, generator))
            )
            terms = model.elbo(x, generator=generator, validate=False) if elbo else None
            views = F.normalize(torch.cat([model.encode(one, False).mean, model.encode(two, False).mean]))
            likeness = (views @ views.T / 0.2).fill_diagonal_(-torch.inf)
            partner = torch.arange(len(views)).roll(len(pixels))
            loss = weight * F.cross_entropy(likeness, partner) + (vaelib.loss(terms) if elbo else 0.0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e4)
            optimizer.step()
            schedule.step()


def fit_with_labels(model, images, config):
    """Minimize the cross-entropy of a linear classifier that reads the posterior means, and throw the classifier away: what is left are
    the penultimate features of a classifier with the VAE's encoder. No other row sees a label."""
    noise, *orders = (torch.Generator().manual_seed(config.seed) for _ in range(3))
    classifier = torch.nn.Linear(model.latent_dim, len(images.classes))
    optimizer = torch.optim.Adam([*model.encoder.parameters(), *classifier.parameters()], lr=1e-3, fused=True)
    steps = config.epochs * -(-len(images) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(config.epochs):
        batches = (vaelib.minibatches(images, 256, orders[i], field=field) for i, field in enumerate(("pixels", "labels")))
        for pixels, labels in zip(*batches, strict=True):
            if config.flip:
                pixels = torch.where(torch.rand(len(pixels), 1, 1, 1, generator=noise) < 0.5, pixels.flip(3), pixels)
            features = model.encode(model.likelihood.observe(pixels, noise), False).mean
            optimizer.zero_grad()
            F.cross_entropy(classifier(features), labels).backward()
            optimizer.step()
            schedule.step()


def learned(name, kind, train, seed=0):
    """A trained model and the seconds that it took; kept under runs/ so that the four distances share it."""
    folder = ROOT / "runs" / "retrieval" / f"{name}-{kind}{f'-{seed}' if seed else ''}"
    if (folder / "seconds.txt").exists():
        return vaelib.load(folder), float((folder / "seconds.txt").read_text())
    model, began = build(name, seed), time.perf_counter()
    if kind == "supervised":
        fit_with_labels(model, train, train_config(name, seed))
    elif kind.startswith("contrastive"):
        fit_with_contrast(model, train, train_config(name, seed), CONTRAST[name], elbo=kind == "contrastive")
    else:
        vaelib.fit(model, train, None, train_config(name, seed, beta=0.0 if kind == "autoencoder" else 1.0, progress=False))
    seconds = time.perf_counter() - began
    vaelib.save(model, folder)
    (folder / "seconds.txt").write_text(str(seconds))
    return model, seconds


def codes(name, row, train, test, seed=0):
    """What a row without posteriors compares: (N, D) of both sets, the distance, and the seconds of training."""
    flat = [images.pixels.flatten(1).float() for images in (train, test)]
    generator = torch.Generator().manual_seed(seed)
    distance = "cosine" if row.endswith("-cosine") or row.startswith("contrastive") else "euclidean"
    kind = row.removesuffix("-cosine")
    if kind == "random":
        return [torch.randn(len(x), LATENTS[name], generator=generator) for x in flat], distance, 0.0
    if kind == "pixels":
        return flat, distance, 0.0
    began = time.perf_counter()
    if kind == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(LATENTS[name], random_state=seed).fit(flat[0].numpy())
        return [torch.from_numpy(pca.transform(x.numpy())) for x in flat], distance, time.perf_counter() - began
    torch.manual_seed(seed)
    model = vaelib.conv_vae(train.image_shape, LATENTS[name], "gaussian") if kind == "random-conv" else None
    seconds = 0.0
    if model is None:
        model, seconds = learned(name, kind, train, seed)
    return [vaelib.posterior_means(model, images) for images in (train, test)], distance, seconds


def hubs(found, database, distance):
    """How uneven the answers are (Radovanovic, Nanopoulos and Ivanovic 2010): how often each image of the database is among the ten.

    `largest_hub` is the share of queries that have one image among their ten; `hub_skewness` is that of the counts, 0 where all are alike;
    `hub_norm_correlation` is Spearman's between an image's count and the norm of its code: below 0 where the short codes are the hubs.
    """
    mean = database if isinstance(database, torch.Tensor) else database.mean
    counts = found.indices.flatten().bincount(minlength=len(mean)).double()
    norm = mean.double().norm(dim=1)
    return {
        "largest_hub": (counts.max() / len(found.indices)).item(),
        "hub_skewness": float(skew(counts.numpy())),
        "hub_norm_correlation": float(spearmanr(counts.numpy(), norm.numpy()).statistic),
        "norm_variation": (norm.std() / norm.mean()).item(),
    }


def run(name, row, seed):
    """The record of one row."""
    train, test = vaelib.load_images(name), vaelib.load_images(name, "test")
    if row.startswith("vae-"):
        model, seconds = learned(name, "vae", train, seed)
        (database, queries), distance = [posteriors(model, images) for images in (train, test)], row.removeprefix("vae-")
    else:
        (database, queries), distance, seconds = codes(name, row, train, test, seed)

    def chosen(places):
        return queries[places] if isinstance(queries, torch.Tensor) else vaelib.Posterior(*(part[places] for part in queries))

    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:SOME].sort().values  # the same for all rows
    asked = some if distance == "bhattacharyya" else torch.arange(len(test))
    began = time.perf_counter()
    found = nearest_neighbours(chosen(asked), database, 10, distance)
    searched = time.perf_counter() - began
    precision = average_precision(chosen(some), test.labels[some], database, train.labels, distance)
    scores = score_retrieval(train.labels[found.indices], test.labels[asked], train.labels, mean_average_precision=precision)
    scores |= {"num_queries": len(asked), "num_ranked": len(some), **hubs(found, database, distance)}
    metrics = scores | {"train_seconds": round(seconds, 1), "search_seconds": round(searched, 1), "dimensions": LATENTS[name]}
    return entry(
        f"python book/_scripts/retrieval_rows.py {name}.{row}{f'.{seed}' if seed else ''}", seed, seconds + searched, metrics
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows to make, such as mnist.vae-cosine.2; default: those missing")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(EVERY):
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(EVERY)}")
    done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    for key in arguments.names or [key for key in EVERY if key not in done]:
        name, row, *seed = key.split(".")
        done[key] = run(name, row, int(seed[0]) if seed else 0)
        write_text(LEDGER, json.dumps({key: done[key] for key in EVERY if key in done}, indent=2) + "\n")
        print(f"{key:28} {json.dumps(done[key]['metrics'])[:160]}", flush=True)


if __name__ == "__main__":
    main()
