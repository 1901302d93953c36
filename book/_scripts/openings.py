"""Draw the picture that opens each chapter: `python book/_scripts/openings.py [chapter ...]`, all by default.

The pictures go to book/_static/open-<chapter>.png, the numbers in them to results/openings.json. They are made of the real data in
$VAELIB_DATA, with the seed 0. Models are kept under runs/ and trained where they are not there: the VAEs of digits and of photographs
that `retrieval_rows.py` has (on two cores the second takes minutes), and the three models of the chapter mistakes, by the loop that
stands there, and the VQ-VAE of codes. Those of cifar-conv take longer still, and
`python book/_scripts/rows.py --again vector-mixture spatial-mixture` makes them.
"""

import argparse
import base64
import bz2
import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from retrieval_rows import codes, learned
from sklearn.cluster import KMeans
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import vaelib
from vaelib.book.ledger import entry
from vaelib.book.plotting import PALETTE, STYLE, tile
from vaelib.predictive import impute
from vaelib.retrieval import nearest_neighbours
from vaelib.storage import atomic, write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "openings.json"
RUNS = ROOT / "runs"
ROWS = ("vector-mixture", "spatial-mixture")  # of cifar-conv, trained by rows.py
WIDTH = 7.6  # inches, of 100 pixels on a wide page
SIZE = 18  # of the text, in points: 11 pixels on a phone, where a picture is 350 pixels wide
BLUE, RED, GREEN, AMBER, SKY, INK = PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[4], PALETTE[5], PALETTE[6]


def canvas(height):
    """An axes over a whole figure, whose units are inches."""
    figure = plt.figure(figsize=(WIDTH, height), layout="none")
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
    ax.set_axis_off()
    return ax


def put(ax, pixels, left, bottom, side, columns=1):
    """Images (N, C, H, W) in a square of a canvas."""
    limits = ax.get_xlim(), ax.get_ylim()  # which imshow would change
    extent = (left, left + side, bottom, bottom + side)
    ax.imshow(tile(pixels, columns), cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent, aspect="auto")
    ax.set(xlim=limits[0], ylim=limits[1])


def digits():
    """The 784-400-20 of the chapters as the retrieval tables have it, and MNIST's test images."""
    return learned("mnist", "vae", vaelib.load_images("mnist"))[0], vaelib.load_images("mnist", "test")


def elbo():
    """A line of z with its prior, and the curve of Gaussians that a decoder makes of it, among 300 points drawn of this model."""

    def curve(z):  # (N,) -> (N, 2)
        return 2 * torch.stack([z.sin(), -z.cos()], -1)

    deviation, codes = 0.4, [-2, -1, 0, 1, 2]
    noise = torch.Generator().manual_seed(0)
    z = torch.randn(300, generator=noise, dtype=torch.float64)
    points = curve(z) + deviation * torch.randn(300, 2, generator=noise, dtype=torch.float64)
    ax = canvas(3.6)
    line, unit, ground = torch.linspace(-2.9, 2.9, 200), 0.47, 0.95  # inches of one z; height of the axis
    left, right, middle, scale = 1.5, 5.85, 1.78, 0.57  # centres of the halves, inches of one x
    ax.fill_between(left + unit * line, ground, ground + 1.5 * (-(line**2) / 2).exp(), color="#DDDDDD", lw=0)
    ax.plot([left - 1.42, left + 1.42], [ground] * 2, color=INK, lw=2)
    ax.plot(right + scale * points[:, 0], middle + scale * points[:, 1], ".", color="#999999", ms=5)
    ax.plot(*(torch.tensor([right, middle]) + scale * curve(torch.linspace(-2.7, 2.7, 200))).T, color=INK, lw=3)
    for value, color in zip(codes, (RED, AMBER, GREEN, SKY, BLUE), strict=True):
        x, y = curve(torch.tensor(float(value))).tolist()
        ax.plot(left + unit * value, ground, "o", color=color, ms=14)
        ax.text(left + unit * value, ground - 0.2, f"{value}".replace("-", "\u2212"), ha="center", va="top")
        ring = plt.Circle((right + scale * x, middle + scale * y), 2 * scale * deviation, fill=False, ec=color, lw=4, zorder=3)
        ax.add_patch(ring)
        ax.plot(right + scale * x, middle + scale * y, "o", color=color, ms=9, zorder=3)
    ax.text(left, 2.85, "a hidden $z$", ha="center", va="center")
    ax.text(right, 1.95, "what is\nseen, $x$", ha="center", va="center")
    ax.annotate("", (3.95, 1.6), (3.15, 1.6), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 3, "mutation_scale": 28})
    ax.text(3.52, 1.9, "decoder", ha="center", va="center")
    return {"codes": codes, "deviation": deviation, "num_points": len(points)}


def mnist_mlp():
    """Three test digits, the means of their codes as bars, and what the decoder makes of these."""
    model, test = digits()
    shown = test.pixels[torch.tensor([0, 4, 2])]
    means = vaelib.posterior_means(model, shown)
    rebuilt, side, step = vaelib.reconstruct(model, shown), 1.15, 1.3
    ax = canvas(3 * step + 0.55)
    for row, (image, mean, again) in enumerate(zip(shown, means.tolist(), rebuilt, strict=True)):
        bottom = (2 - row) * step + 0.08
        put(ax, image[None], 0.2, bottom, side)
        put(ax, again[None], WIDTH - 0.2 - side, bottom, side)
        middle, unit = bottom + side / 2, side / 2 / means.abs().max().item()
        places = [2.0 + 3.6 * (i + 0.5) / 20 for i in range(20)]
        ax.bar(places, [unit * m for m in mean], 0.13, middle, color=[BLUE if m > 0 else RED for m in mean])
        ax.plot([1.95, 5.65], [middle] * 2, color=INK, lw=1.5)
        for start in (1.43, 5.72):
            arrow = {"arrowstyle": "-|>", "color": INK, "lw": 2, "mutation_scale": 18}
            ax.annotate("", (start + 0.42, middle), (start, middle), arrowprops=arrow)
    for place, text in ((0.2 + side / 2, "784 pixels"), (WIDTH / 2, "20 numbers"), (WIDTH - 0.2 - side / 2, "784 pixels")):
        ax.text(place, 3 * step + 0.3, text, ha="center", va="center")
    return {"num_units": model.latent_dim, "test_images": [0, 4, 2], "means": means.tolist()}


def cifar_conv():
    """A test photograph and what two codes keep of it, each with the bits that the photograph takes in all."""
    test, chosen = vaelib.load_images("cifar10", "test"), 17
    shown = test.pixels[chosen : chosen + 1]
    columns = {"as 3072 bytes": (shown, 8.0 * shown.numel(), INK)}
    metrics = {"test_image": chosen}
    for row, text, color in zip(ROWS, ("code of 128", "code of 64×8×8"), (RED, BLUE), strict=True):
        model = vaelib.load(RUNS / "rows" / row)
        terms = vaelib.heldout_elbo(model, shown, 10)
        metrics[row] = {"bits": -terms.elbo.item() / math.log(2), "rate_bits": terms.kl.item() / math.log(2)}
        columns[text] = (vaelib.reconstruct(model, shown), metrics[row]["bits"], color)
    side = 2.25
    ax = canvas(side + 1.05)
    for left, (text, (picture, bits, color)) in zip((0.2, 2.675, 5.15), columns.items(), strict=True):
        put(ax, picture, left, 0.95, side)
        ax.text(left + side / 2, 0.68, f"{bits:.0f} bits", ha="center", va="center", weight="bold", color=color)
        ax.text(left + side / 2, 0.28, text, ha="center", va="center")
    return metrics


def generation():
    """Test digits rebuilt from their own codes, over draws from the prior."""
    model, test = digits()
    rows = {"rebuilt": vaelib.reconstruct(model, test.pixels[:6]), "sampled": vaelib.generate(model, 6, seed=0)}
    side = 0.98
    ax = canvas(2 * side + 0.35)
    for row, (name, pixels) in enumerate(rows.items()):
        bottom = (1 - row) * (side + 0.15) + 0.1
        ax.text(0.1, bottom + side / 2, name, va="center", color=(BLUE, RED)[row])
        for i in range(6):
            put(ax, pixels[i : i + 1], 1.5 + i * (side + 0.03), bottom, side)
    return {"num_units": model.latent_dim}


def retrieval():
    """A test photograph and the five training images that are nearest by pixels, by PCA and by the means of a VAE."""
    train, test = vaelib.load_images("cifar10"), vaelib.load_images("cifar10", "test")
    found, right = {}, {}
    for name, row in (("pixels", "pixels"), ("PCA", "pca"), ("VAE", "vae")):
        (database, queries), distance, _ = codes("cifar10", row, train, test)
        found[name] = nearest_neighbours(queries[:300], database, 5, distance).indices
        right[name] = train.labels[found[name]] == test.labels[:300, None]
    usual = torch.stack([(own.sum(1) >= 1) & (own.sum(1) <= 2) for own in right.values()]).all(0)
    query = usual.nonzero()[0].item()
    side = 0.93
    ax = canvas(3 * side + 0.5)
    put(ax, test.pixels[query : query + 1], 0.1, 0.62, 1.6)
    ax.text(0.9, 2.45, "query", ha="center", va="center")
    for row, name in enumerate(found):
        bottom = 0.1 + (2 - row) * (side + 0.1)
        ax.text(1.85, bottom + side / 2, name, va="center")
        for i, neighbour in enumerate(found[name][query].tolist()):
            left = 2.77 + i * (side + 0.02)
            put(ax, train.pixels[neighbour : neighbour + 1], left, bottom, side)
            if right[name][query, i]:
                ax.add_patch(plt.Rectangle((left + 0.03, bottom + 0.03), side - 0.06, side - 0.06, fill=False, ec=AMBER, lw=5))
    return {"test_image": query, "right_of_five": {name: int(own[query].sum()) for name, own in right.items()}}


def evaluation():
    """The negative log-likelihood of one model by four protocols, on the same test images."""
    model, test = digits()
    few = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:100]]
    scores = {"the ELBO": -vaelib.heldout_elbo(model, few, 10).elbo.double().mean().item()}
    for draws in (50, 5000):
        scores[f"{draws} draws"] = -vaelib.log_likelihood(model, few, draws).double().mean().item()
    model.likelihood = vaelib.Bernoulli(binarize="threshold")
    scores["5000, pixels cut at ½"] = -vaelib.log_likelihood(model, few, 5000).double().mean().item()
    ax = canvas(3.0)
    low, high = min(scores.values()) - 1, max(scores.values()) + 1
    for row, (name, value) in enumerate(scores.items()):
        y, x = 2.6 - 0.73 * row, 3.9 + 2.3 * (value - low) / (high - low)
        ax.plot([3.9, WIDTH - 0.1], [y, y], color="#DDDDDD", lw=2, zorder=0)
        ax.plot(x, y, "o", color=(RED, AMBER, BLUE, GREEN)[row], ms=18)
        ax.text(0.1, y, name, va="center")
        label = ax.text(x + 0.22, y, f"{value:.1f}", va="center", weight="bold", size=SIZE + 4)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 3})
    return {"num_images": len(few), "nll": scores}


def trained(letter, images):
    """Model A, B or C of the chapter mistakes, by the loop and with the noise that it has there."""
    folder = RUNS / "openings" / f"mistakes-{letter}"
    if (folder / "model.safetensors").exists():
        return vaelib.load(folder)
    torch.manual_seed(0)
    order, model = torch.Generator().manual_seed(0), vaelib.mlp_vae(images.image_shape, (200,), 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(5):
        for pixels in vaelib.minibatches(images, 128, order):
            x = model.likelihood.observe(pixels)
            if letter == "C":  # decodes the mean
                mean, log_var = model.encode(x, validate=False)
                torch.randn_like(mean)  # drawn as for the others, and not used
                loss = (vaelib.gaussian_kl(mean, log_var) - model.likelihood.log_prob(x, model.decode(mean), validate=False)).mean()
            else:
                terms = model.elbo(x, validate=False)
                loss = vaelib.loss(terms) if letter == "B" else -terms.log_likelihood.mean()  # A has no KL
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    vaelib.save(model, folder)
    return model.eval()


def mistakes():
    """Nine test digits as three models rebuild them: one right, two wrong."""
    train, _ = vaelib.train_valid_split(vaelib.load_images("mnist"), 5000, seed=0)
    test = vaelib.load_images("mnist", "test")
    side, scores = 2.3, {}
    ax = canvas(side + 0.65)
    for left, letter in zip((0.15, 2.65, 5.15), "ABC", strict=True):
        model = trained(letter, train)
        put(ax, vaelib.reconstruct(model, test.pixels[:9]), left, 0.1, side, columns=3)
        ax.text(left + side / 2, side + 0.35, letter, ha="center", va="center", weight="bold", size=SIZE + 4)
        scores[letter] = vaelib.evaluate(model, test, elbo_samples=1).elbo
    return {"elbo": scores}


def on_a_gpu():
    """The time of one step of the 784-400-20 on an H200: as first written, as one launch, and its matrix products alone."""
    runs = json.loads((ROOT / "results" / "h200.json").read_text())
    rates = runs["throughput-mnist"]["metrics"]["images_per_second"]
    graph = runs["captured-step"]["metrics"]["cases"][0]
    milliseconds = {
        "operation by operation": 128000 / rates["fit"],
        "in one launch": 1000 / graph["graph_steps_per_s"],
        "its matrix products alone": 128000 / rates["matrix products"],
    }
    ax = canvas(2.9)
    for place, ((name, value), colour) in enumerate(zip(milliseconds.items(), (BLUE, RED, GREEN), strict=True)):
        bottom = 2.05 - 0.95 * place
        ax.add_patch(plt.Rectangle((0.1, bottom), 6.3 * value / max(milliseconds.values()), 0.36, color=colour))
        ax.text(0.1, bottom + 0.5, name, va="bottom")
        ax.text(0.2 + 6.3 * value / max(milliseconds.values()), bottom + 0.18, f"{value:.2f} ms", va="center", color=colour)
    return {"milliseconds": milliseconds}


def compression():
    """Bits a pixel of binarized MNIST's test digits: as they are, under PNG and bz2 on one sheet, and the file of the released VAE."""
    model, test = vaelib.load("mnist-mlp"), vaelib.load_images("binarized-mnist", "test")
    black, packed = io.BytesIO(), np.packbits(test.pixels.numpy() > 0).tobytes()
    Image.fromarray(tile(test.pixels, 100, gap=0)).convert("1", dither=Image.Dither.NONE).save(black, "PNG", optimize=True)
    with tempfile.TemporaryDirectory() as folder:
        written = vaelib.compress(model, test, Path(folder) / "digits.vae")
    sizes = {"as they are": len(packed), "PNG": len(black.getvalue()), "bz2": len(bz2.compress(packed, 9)), "VAE": written.bytes}
    ax = canvas(3.3)
    for place, ((name, value), colour) in enumerate(zip(sizes.items(), (INK, BLUE, BLUE, RED), strict=True)):
        bottom, width = 2.45 - 0.8 * place, 4.3 * value / sizes["as they are"]
        ax.add_patch(plt.Rectangle((1.9, bottom), width, 0.5, color=colour))
        ax.text(1.75, bottom + 0.25, name, va="center", ha="right")
        ax.text(2.0 + width, bottom + 0.25, f"{value / 1000:.0f} kB", va="center", color=colour)
    return {"bytes": sizes}


def uses():
    """Four test digits: the seen upper half, five draws of the lower one from p(hidden given seen), and the digit."""
    model, test = vaelib.load("mnist-mlp"), vaelib.load_images("mnist", "test")
    chosen, generator = [1, 8, 115, 247], torch.Generator().manual_seed(0)
    x = model.likelihood.observe(test.pixels[torch.tensor(chosen)], generator)
    observed = torch.zeros(1, 1, 28, 28, dtype=torch.bool)
    observed[..., :14, :] = True
    found = impute(model, x, observed, 2000, 5, generator=generator)
    ax = canvas(4.6)
    side, left = 0.98, (0.1, 1.4, 2.4, 3.4, 4.4, 5.4, 6.6)
    grey = torch.full_like(x, 0.35)  # the hidden half
    columns = [torch.where(observed, x, grey), *found.draws, x]
    for place, column in enumerate(columns):
        for row, image in enumerate(column):
            pixels = (255 * image[None]).round().to(torch.uint8)
            put(ax, pixels, left[place], 3.05 - 1.0 * row, side)
    for x_at, text in ((0.6, "seen"), (3.9, "five draws of the rest"), (7.05, "truth")):
        ax.text(x_at, 4.32, text, ha="center", va="center")
    return {"test_images": chosen, "num_samples": 2000, "effective_sample_size": found.effective_sample_size.tolist()}


def quantized(images):
    """A VQ-VAE of digits with 7 x 7 of 64 codes, and a prior over its codes, after five epochs each."""
    folder = RUNS / "openings" / "codes"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        model = vaelib.vq_vae((1, 28, 28), 64, 16, likelihood="bernoulli", width=32, narrow=16)
        config = vaelib.TrainConfig(epochs=5, batch_size=128, learning_rate=2e-3, progress=False)
        vaelib.fit(model, images, None, config)
        vaelib.fit_code_prior(model, images, epochs=5, width=64, layers=3)
        vaelib.save(model, folder)
    return vaelib.load(folder)


def from_a_list():
    """Two test digits, their maps of codes and what comes of them; maps that a transformer wrote, and what comes of those."""
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    model, chosen = quantized(images), [0, 4]
    shown = test.pixels[torch.tensor(chosen)]
    use = vaelib.code_usage(model, test).counts.argsort(descending=True).argsort()  # the commonest code has the first colour
    with torch.no_grad():
        written = model.prior.tokens_of(model.prior.sample(3, torch.Generator().manual_seed(0))).view(3, 7, 7)
    own, rebuilt = vaelib.code_maps(model, shown), vaelib.reconstruct(model, shown)
    painted = vaelib.generate(model, 3, seed=0)

    def coloured(maps):
        colours = torch.from_numpy(plt.get_cmap("turbo")(use[maps].numpy() / 63.0)[..., :3])
        return (255 * colours).round().to(torch.uint8).permute(0, 3, 1, 2)

    side, step, ax = 1.12, 1.22, canvas(3.5)
    rows = [
        [part[i : i + 1] for i in range(2) for part in (shown, coloured(own), rebuilt)],
        [part[i : i + 1] for i in range(3) for part in (coloured(written), painted)],
    ]
    for row, (parts, text) in enumerate(
        zip(rows, ("digit, its map, painted from it", "map written, painted from it"), strict=True)
    ):
        bottom = (1 - row) * 1.75 + 0.08
        ax.text(0.2, bottom + side + 0.22, text, va="center", color=(BLUE, RED)[row])
        for place, part in enumerate(parts):
            put(ax, part, 0.18 + place * step, bottom, side)
    return {"test_images": chosen, "num_codes": 64, "rate": vaelib.evaluate(model, test, elbo_samples=1).kl}


def modern():
    """Four sources of codes: samples of one decoder with three of them, and a digit written in the entries of a codebook."""
    rows = json.loads((ROOT / "results" / "diffusion-rows.json").read_text())
    ax, side, step = canvas(2.75), 1.5, 1.98
    titles = ("$\\mathcal{N}(0, I)$", "mixture", "codebook", "diffusion")
    for place, (title, name) in enumerate(zip(titles, ("prior", "mixture", None, "diffusion-cpu"), strict=True)):
        left = 0.08 + step * place
        ax.text(left + side / 2, 2.35, title, ha="center", va="center")
        if name:
            sheet = Image.open(io.BytesIO(base64.b64decode(rows[f"digits-{name}-0"]["metrics"]["samples"])))
            images = pil_to_tensor(sheet).unfold(1, 28, 28).unfold(2, 28, 28).flatten(1, 2).transpose(0, 1)  # (20, 1, 28, 28)
            put(ax, images[:9], left, 0.5, side, 3)
        else:
            pixels = vaelib.load_images("mnist").pixels[:3000].float()
            patches = nn.functional.unfold(pixels, 4, stride=4).transpose(1, 2)  # (N, 49, 16)
            book = KMeans(32, n_init=1, random_state=0).fit(patches.flatten(0, 1).numpy())
            digit = vaelib.load_images("mnist", "test").pixels[:1]
            entries = book.predict(nn.functional.unfold(digit.float(), 4, stride=4)[0].T.numpy())
            brightness = book.cluster_centers_.mean(1).argsort().argsort()  # neighbours in colour are alike in brightness
            colours = plt.get_cmap("turbo")(brightness[entries] / 31)[:, :3].reshape(7, 7, 3)
            limits = ax.get_xlim(), ax.get_ylim()
            ax.imshow(colours, extent=(left, left + side, 0.5, 0.5 + side), aspect="auto", interpolation="nearest")
            ax.set(xlim=limits[0], ylim=limits[1])
        if place:
            arrow = {"arrowstyle": "-|>", "color": INK, "lw": 2, "mutation_scale": 18}
            ax.annotate("", (left - 0.04, 0.5 + side / 2), (left - step + side + 0.04, 0.5 + side / 2), arrowprops=arrow)
    ax.text(WIDTH / 2, 0.22, "where the decoder's codes come from", ha="center", va="center")
    return {"sources": list(titles), "entries": 32, "test_image": 0}


CHAPTERS = {
    "elbo": elbo, "mnist-mlp": mnist_mlp, "cifar-conv": cifar_conv, "generation": generation,
    "retrieval": retrieval, "evaluation": evaluation, "mistakes": mistakes, "on-a-gpu": on_a_gpu,
    "compression": compression,
    "codes": from_a_list,
    "uses": uses,
    "modern": modern,
}  # fmt: skip


def write_picture(figure, path):
    """A PNG of 256 colours at most, at twice the pixels of a wide page."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=200)
    image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    with atomic(path) as partial:
        image.save(partial, "png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", help=f"some of {', '.join(CHAPTERS)}; all by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.chapters) - set(CHAPTERS):
        sys.exit(f"chapters: got {', '.join(sorted(unknown))}, expected some of {', '.join(CHAPTERS)}")
    names = arguments.chapters or list(CHAPTERS)
    missing = [row for row in ROWS if not (RUNS / "rows" / row / "model.safetensors").exists()]
    if "cifar-conv" in names and missing:
        sys.exit(
            f"cifar-conv: no model in runs/rows; python book/_scripts/rows.py --again {' '.join(missing)} trains what is missing"
        )
    plt.switch_backend("agg")
    plt.rcParams.update(
        STYLE | {"font.size": SIZE, "savefig.bbox": "standard", "axes.grid": False, "axes.labelcolor": INK, "text.color": INK}
    )
    for name in names:
        began = time.perf_counter()
        metrics = CHAPTERS[name]()
        path = ROOT / "book" / "_static" / f"open-{name}.png"
        write_picture(plt.gcf(), path)
        plt.close("all")
        record = entry(f"python book/_scripts/openings.py {name}", 0, time.perf_counter() - began, metrics)
        done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        write_text(LEDGER, json.dumps(done | {name: record}, indent=2) + "\n")
        print(f"{path.name:24} {path.stat().st_size / 1000:.0f} KB, {record['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
