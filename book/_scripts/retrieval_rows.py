"""Score the rows of the retrieval tables: `python book/_scripts/retrieval_rows.py [set.row ...]`, all that are missing by default.

The full test set is searched in the full training set. A row is a representation and a distance; the representations that have to be
learned are trained here, all with the seed 0. Records go to results/retrieval-rows.json: command, commit, versions, hardware,
seconds (training and search) and the scores with their intervals.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import vaelib
from vaelib.ledger import entry
from vaelib.retrieval import average_precision, nearest_neighbours, posteriors, score_retrieval

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "retrieval-rows.json"
SETS = ("mnist", "fashion-mnist", "cifar10")
EPOCHS = {"mnist": 15, "fashion-mnist": 15, "cifar10": 8}
LATENTS = {"mnist": 20, "fashion-mnist": 20, "cifar10": 128}
CONTRAST = {"mnist": 10.0, "fashion-mnist": 10.0, "cifar10": 300.0}  # weight of the contrastive loss, in nats of the ELBO
RANKED = 1000  # queries whose whole ranking is scored (mAP)
SLOW = 1000  # queries of the Bhattacharyya distance in 128 dimensions, which no matrix product computes
DISTANCES = ("euclidean", "cosine", "symmetric_kl", "bhattacharyya")
ROWS = ("random", "pixels", "pixels-cosine", "pca", "pca-cosine", "random-conv", "autoencoder", "autoencoder-cosine")
ROWS += (*(f"vae-{d}" for d in DISTANCES), "contrastive")


def build(name):
    """The VAE of a set: an MLP for the grey images, convolutions for colour."""
    torch.manual_seed(0)
    if name == "cifar10":
        return vaelib.conv_vae((3, 32, 32), LATENTS[name], "discretized_logistic")
    return vaelib.mlp_vae((1, 28, 28), (400,), LATENTS[name])


def train_config(name, **options):
    colour = name == "cifar10"
    return vaelib.TrainConfig(epochs=EPOCHS[name], flip=colour, channels_last=colour, precision="bf16" if colour else "float32", **options)


def augment(pixels, generator):
    """Each image changed in a way of its own, ``uint8`` (N, C, H, W) -> the same: grey ones are moved, scaled, turned and slanted; colour
    ones cropped, mirrored and tinted."""
    count, channels = pixels.shape[:2]
    draw = lambda low, high: low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)  # noqa: E731
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


def fit_with_contrast(model, images, config, weight):
    """Minimize -ELBO + weight * NT-Xent (Chen et al. 2020): two views of an image shall have alike posterior means."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    steps = config.epochs * -(-len(images) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(config.epochs):
        for pixels in vaelib.minibatches(images, 256, generator):
            x, one, two = (model.likelihood.observe(p, generator) for p in (pixels, augment(pixels, generator), augment(pixels, generator)))
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                terms = model.elbo(x, generator=generator, validate=False)
                views = F.normalize(torch.cat([model.encode(one, False).mean, model.encode(two, False).mean]))
            likeness = (views @ views.T / 0.2).fill_diagonal_(-torch.inf)
            partner = torch.arange(len(views)).roll(len(pixels))
            loss = vaelib.loss(terms) + weight * F.cross_entropy(likeness, partner)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e4)
            optimizer.step()
            schedule.step()


def learned(name, kind, train):
    """A trained model and the seconds that it took; kept under runs/ so that the four distances share it."""
    folder = ROOT / "runs" / "retrieval" / f"{name}-{kind}"
    if (folder / "seconds.txt").exists():
        return vaelib.load(folder), float((folder / "seconds.txt").read_text())
    model, began = build(name), time.perf_counter()
    if kind == "contrastive":
        fit_with_contrast(model, train, train_config(name), CONTRAST[name])
    else:
        vaelib.fit(model, train, None, train_config(name, beta=0.0 if kind == "autoencoder" else 1.0, progress=False))
    seconds = time.perf_counter() - began
    vaelib.save(model, folder)
    (folder / "seconds.txt").write_text(str(seconds))
    return model, seconds


def codes(name, row, train, test):
    """What a row without posteriors compares: (N, D) of both sets, the distance, and the seconds of training."""
    flat = [images.pixels.flatten(1).float() for images in (train, test)]
    generator = torch.Generator().manual_seed(0)
    distance = "cosine" if row.endswith("-cosine") or row == "contrastive" else "euclidean"
    kind = row.removesuffix("-cosine")
    if kind == "random":
        return [torch.randn(len(x), LATENTS[name], generator=generator) for x in flat], distance, 0.0
    if kind == "pixels":
        return flat, distance, 0.0
    began = time.perf_counter()
    if kind == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(LATENTS[name], random_state=0).fit(flat[0].numpy())
        return [torch.from_numpy(pca.transform(x.numpy())) for x in flat], distance, time.perf_counter() - began
    torch.manual_seed(0)
    shape = train.image_shape
    model = vaelib.conv_vae(shape, LATENTS[name], "gaussian") if kind == "random-conv" else None
    seconds = 0.0
    if model is None:
        model, seconds = learned(name, kind, train)
    return [vaelib.posterior_means(model, images) for images in (train, test)], distance, seconds


def run(name, row):
    """The record of one row."""
    train, test = vaelib.load_images(name), vaelib.load_images(name, "test")
    if row.startswith("vae-"):
        model, seconds = learned(name, "vae", train)
        (database, queries), distance = [posteriors(model, images) for images in (train, test)], row.removeprefix("vae-")
    else:
        (database, queries), distance, seconds = codes(name, row, train, test)
    count = SLOW if (name, distance) == ("cifar10", "bhattacharyya") else len(test)
    first = lambda number: queries[:number] if isinstance(queries, torch.Tensor) else vaelib.Posterior(*(q[:number] for q in queries))  # noqa: E731
    began = time.perf_counter()
    found = nearest_neighbours(first(count), database, 10, distance)
    searched = time.perf_counter() - began
    precision = average_precision(first(RANKED), test.labels[:RANKED], database, train.labels, distance)
    scores = score_retrieval(train.labels[found.indices], test.labels[:count], train.labels, mean_average_precision=precision)
    scores |= {"num_queries": count, "num_ranked": RANKED}
    scores["largest_hub"] = found.indices.flatten().bincount().max().item() / count  # share of queries that have one image among their ten
    metrics = scores | {"train_seconds": round(seconds, 1), "search_seconds": round(searched, 1), "dimensions": LATENTS[name]}
    return entry(f"python book/_scripts/retrieval_rows.py {name}.{row}", 0, seconds + searched, metrics)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows to make, such as mnist.pca; default: those that are missing")
    arguments = parser.parse_args()
    every = [f"{name}.{row}" for name in SETS for row in ROWS]
    if unknown := set(arguments.names) - set(every):
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(every)}")
    done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    for key in arguments.names or [key for key in every if key not in done]:
        record = run(*key.split("."))
        done[key] = record
        LEDGER.write_text(json.dumps(done, indent=2) + "\n")
        print(f"{key:28} {json.dumps(record['metrics'])[:160]}", flush=True)


if __name__ == "__main__":
    main()
