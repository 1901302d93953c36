"""The pictures of the first page: the plane of digits to touch, the board to draw on, and the map of the book.

    python book/_scripts/front.py            trains the model of the plane, a few minutes on one core, and draws it and the map
    python book/_scripts/front.py --board    trains the smaller model of the drawing board, as long, and draws that alone
    python book/_scripts/front.py --map      draws the map only

The models are VAEs with two latents, trained on MNIST; their held-out ELBOs go into results/front.json and results/front-board.json.
The output in book/_static is committed: front-plane.html and front-board.html, which book/intro.md takes in, and the map for wide
and for narrow screens. The page of the board holds both networks in 400 KB, which only the smaller model allows, with rounded
weights; what the rounding changes in the ELBO of a test digit stands in its record.
"""

import argparse
import base64
import importlib.util
import json
import re
import textwrap
import time
from html import unescape
from pathlib import Path

import numpy as np
import torch
import yaml

import vaelib
from vaelib.book.widgets import drawing_board, latent_explorer
from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "book" / "_static"
COMMAND = "python book/_scripts/front.py"
HIDDEN, EPOCHS, BATCH, RATE, SEED = (256, 128), 10, 256, 3e-3, 0
BOARD_HIDDEN, BOARD_EPOCHS = (128, 64), 30
START = "1.1, -0.7"  # where the figure begins: a clear digit, while the middle of the plane lies between several
ALT = "A square full of small digits, the latent plane, and beside it the large digit that the decoder draws at the chosen point."
BOARD_ALT = (
    "A board with a handwritten digit; beside it the latent plane, test digits as dots, with the encoder's q as two small ellipses, "
    "and the decoder's reconstruction."
)
STILL = ".vaelib-widget iframe { display: none; } .vaelib-widget .still { display: block !important; max-width: 100%; }"
NO_SCRIPT = f"<noscript><style>{STILL}</style></noscript>"

STEPS = [  # the step, what it gives, its modules
    ("derivation", "a bound, derived", ("oracles",)),
    ("loss", "likelihood and rate", ("objectives", "likelihoods")),
    ("model", "encoder and decoder", ("networks", "vae")),
    ("training", "a loop that resumes", ("data", "step", "training")),
    ("generation", "new images, scored", ("generation", "priors", "quality", "conditional")),
    ("retrieval", "search by codes", ("retrieval", "widgets")),
    ("judgement", "a number to compare", ("evaluation", "reproduce")),
    ("mistakes", "known by symptoms", ("checks",)),
]
CHAPTERS = {  # the chapter, its name on the map, its first and its last step
    "elbo": ("The ELBO", 0, 1),
    "mnist-mlp": ("MNIST", 2, 3),
    "cifar-conv": ("CIFAR-10", 1, 3),
    "generation": ("Generation", 4, 4),
    "retrieval": ("Retrieval", 5, 5),
    "evaluation": ("Evaluation", 6, 6),
    "uses": ("Uses and failures", 6, 6),
    "mistakes": ("Mistakes", 7, 7),
    "on-a-gpu": ("On a GPU", 3, 3),
    "compression": ("Compression", 6, 6),
    "codes": ("Codes from a list", 4, 4),
    "modern": ("Latent diffusion", 4, 4),
}
# Colours are the page's, light and dark; alone, the file has the light ones.
STYLE = """
.route { font: 13.3px system-ui, sans-serif; fill: var(--pst-color-text-base, #222832); }
.route .box { fill: var(--pst-color-surface, #f5f6f7); stroke: var(--pst-color-border, #b9bfc7); }
.route .step { font-size: 16px; font-weight: 600; }
.route .module { font: 13.3px ui-monospace, monospace; letter-spacing: -0.35px; fill: var(--pst-color-text-muted, #48566b); }
.route .way { fill: none; stroke: var(--pst-color-text-muted, #48566b); stroke-width: 2; }
.route .dot, .route .head { fill: var(--pst-color-text-muted, #48566b); }
.route a rect { fill: var(--pst-color-background, #fff); stroke: var(--pst-color-link, #0f5bc4); }
.route a text { fill: var(--pst-color-link, #0f5bc4); text-decoration: underline; }
.route a:hover rect, .route a:focus-visible rect { stroke-width: 3; }
.route a:focus-visible { outline: none; }
"""


def train(hidden=HIDDEN, epochs=EPOCHS, command=COMMAND):
    """A model with two latents and its record: architecture, budget, held-out ELBO."""
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    torch.manual_seed(SEED)
    model = vaelib.mlp_vae(images.image_shape, hidden, latent_dim=2, activation="gelu")
    config = vaelib.TrainConfig(epochs=epochs, batch_size=BATCH, learning_rate=RATE, seed=SEED, device="cpu", progress=False)
    start = time.perf_counter()
    vaelib.fit(model, images, config=config)
    seconds = time.perf_counter() - start
    result = vaelib.evaluate(model, test)
    network = "-".join(map(str, (784, *hidden, 2)))
    metrics = {"data": "mnist", "network": network, "epochs": epochs, "training_seconds": seconds, "test": result.as_dict()}
    return model, vaelib.ledger.entry(command, SEED, seconds, metrics)


def without_caption(figure):
    """The figure to touch without its caption, which stands in book/intro.md, and with a still picture where no script runs."""
    return re.sub(r"<figcaption>.*?</figcaption>", NO_SCRIPT, figure, flags=re.DOTALL)


def plane(model):
    """The figure to touch of the latent plane."""
    figure = latent_explorer(model, caption="in the page", alt=ALT).html
    if figure.count("\nmove(0, 0);\n") != 1:
        raise SystemExit("explorer.js: expected that it ends with a line move(0, 0); which this script changes")
    return without_caption(figure.replace("\nmove(0, 0);\n", f"\nmove({START});\n"))


def board(model):
    """The figure to touch that is drawn on, and what rounding its weights changes: ELBOs of the page's model and of the model."""
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    figure = without_caption(drawing_board(model, images, test, caption="in the page", alt=BOARD_ALT).html)
    chosen = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(SEED))[:1000]]
    exact, rounded = (vaelib.heldout_elbo(one, chosen, num_samples=10).elbo for one in (model, page_model(page_data(figure))))
    change = (rounded - exact).abs().double()
    metrics = {"images": len(chosen), "mean_change": change.mean().item(), "largest_change": change.max().item()}
    return figure, metrics | {"bytes": len(figure.encode())}


def page_data(figure):
    """The numbers that a figure to touch holds."""
    page = unescape(re.search(r'srcdoc="([^"]*)"', figure)[1])
    return json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])


def page_layers(layers):
    """The weights (fan_out, fan_in) and biases (fan_out,) of a network as the page computes with them."""
    for layer in layers:
        read = {name: base64.b64decode(text) for name, text in layer.items() if name != "bits"}
        bias = torch.tensor(np.frombuffer(read["bias"], np.float32))
        kind = {None: np.float32, 8: np.int8, 16: np.int16}[layer.get("bits")]
        weight = torch.tensor(np.frombuffer(read["weight"], kind)).reshape(len(bias), -1)
        yield weight * (torch.tensor(np.frombuffer(read["scale"], np.float32))[:, None] if "scale" in read else 1), bias


def page_model(data):
    """The model that a page with both networks computes with."""
    hidden = [len(bias) for _, bias in page_layers(data["encoder"])][:-1]
    model = vaelib.mlp_vae(tuple(data["shape"]), hidden, latent_dim=2, activation=data["activation"])
    for network, layers in ((model.encoder, data["encoder"]), (model.decoder, data["layers"])):
        for layer, (weight, bias) in zip([*network.hidden[::2], network.head], page_layers(layers), strict=True):
            layer.weight.data, layer.bias.data = weight, bias
    return model


def link(file, x, y, width):
    """A chapter on the map, as a link with its number."""
    number, name = 1 + list(CHAPTERS).index(file), CHAPTERS[file][0]
    middle = f'x="{x + width / 2:g}" y="{y + 18}" text-anchor="middle"'
    rect = f'<rect x="{x}" y="{y}" width="{width}" height="26" rx="13"/>'
    return f'<a href="{file}.html">{rect}<text {middle}>{number} {name}</text></a>'


def svg(kind, width, height, parts):
    """An SVG file with its description in words."""
    names = ", ".join(name for name, _, _ in STEPS[:-1])
    covers = "; ".join(f"{title}: {' to '.join(dict.fromkeys((STEPS[a][0], STEPS[b][0])))}" for title, a, b in CHAPTERS.values())
    text = (
        f"The road leads from {names} to {STEPS[-1][0]}. Chapters by steps: {covers}. Under each step stand its modules of vaelib."
    )
    head = (
        f'<svg class="route route-{kind}" xmlns="http://www.w3.org/2000/svg" viewBox="-1 0 {width + 1} {height}" '
        f'role="group" aria-labelledby="route-{kind}-title route-{kind}-text">'
    )
    words = f'<title id="route-{kind}-title">Map of the book</title>\n<desc id="route-{kind}-text">{text}</desc>'
    return "\n".join([head, words, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def station(x, y, width, height, step, lines, what_x, anchor):
    """A step's box: its name, what it gives, its modules."""
    name, what, _ = step
    what_y = y + (24 if anchor == "end" else 44)
    text = [
        f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>',
        f'<text class="step" x="{x + 12}" y="{y + 24}">{name}</text>',
        f'<text x="{what_x}" y="{what_y}" text-anchor="{anchor}">{what}</text>',
    ]
    first = y + (44 if anchor == "end" else 66)
    return text + [f'<text class="module" x="{x + 12}" y="{first + 16 * i}">{line}</text>' for i, line in enumerate(lines)]


def wide_map():
    """Two rows of four steps, with bars for the chapters below."""
    parts, step_x, box, low, rows = [], 191, 170, 98, (8, 232)
    for i, step in enumerate(STEPS):
        x, y = i % 4 * step_x, rows[i // 4]
        parts += station(x, y, box, low, step, textwrap.wrap(", ".join(step[2]), 20), x + 12, "start")
        if i % 4 < 3:
            middle = y + low // 2
            parts.append(f'<path class="way" d="M{x + box + 2} {middle}h11"/>')
            parts.append(f'<path class="head" d="M{x + box + 12} {middle - 5}l8 5l-8 5z"/>')
    right = 3 * step_x + box
    parts.append(f'<path class="way" d="M{right + 2} {rows[0] + low // 2}h8q8 0 8 8v142q0 8 -8 8H{box // 2 + 8}q-8 0 -8 8v4"/>')
    parts.append(f'<path class="head" d="M{box // 2 - 5} {rows[1] - 9}l5 8l5 -8z"/>')
    lanes = []  # the steps over which each bar of a lane stands, the lanes from above
    for file, (_, first, last) in CHAPTERS.items():
        own = set(range(first, last + 1))
        lane = next((i for i, taken in enumerate(lanes) if not taken & own), len(lanes))
        lanes[lane:] = [own | taken for taken in lanes[lane : lane + 1] or [set()]] + lanes[lane + 1 :]
        y = rows[first // 4] + low + 6 + 30 * lane
        parts.append(link(file, first % 4 * step_x, y, (last - first) * step_x + box))
    return svg("wide", right + 20, rows[1] + low + 10 + 30 * len(lanes), parts)


def tall_map():
    """One column of steps, each with the links of its chapters, for narrow screens."""
    parts, width, x, y = [], 340, 20, 1
    for i, step in enumerate(STEPS):
        lines = textwrap.wrap(", ".join(step[2]), 36)
        left, top, links = x + 12, y + 38 + 16 * len(lines), []
        for file, (name, first, last) in CHAPTERS.items():
            if first <= i <= last:
                size = 8 * len(name) + 36
                if left + size > width - 12:
                    left, top = x + 12, top + 34
                links.append(link(file, left, top, size))
                left += size + 10
        high = top + 34 - y
        parts.append(f'<path class="way" d="M7 {y + 19 if i else y + 24}V{y + (high + 10 + 19 if i < len(STEPS) - 1 else 24)}"/>')
        parts.append(f'<circle class="dot" cx="7" cy="{y + 19}" r="5"/>')
        parts += station(x, y, width - x - 1, high, step, lines, width - 12, "end") + links
        y += high + 10
    return svg("tall", width, y - 1, parts)


def check():
    """The map has the chapters of the contents, in their order, and modules that exist."""
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    listed = [chapter["file"] for part in contents["parts"] if part.get("numbered") for chapter in part["chapters"]]
    if listed != list(CHAPTERS):
        raise SystemExit(f"CHAPTERS: got {', '.join(CHAPTERS)}, expected those of book/_toc.yml: {', '.join(listed)}")
    rooms = ("vaelib", "vaelib.book")
    missing = [name for step in STEPS for name in step[2] if not any(importlib.util.find_spec(f"{room}.{name}") for room in rooms)]
    if missing:
        raise SystemExit(f"STEPS: got {', '.join(missing)}, expected modules of vaelib")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--map", action="store_true", help="draw the map only; train nothing")
    parser.add_argument("--board", action="store_true", help="train the model of the drawing board and draw that only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for so small a model a second one gains little
    if arguments.board:
        model, record = train(BOARD_HIDDEN, BOARD_EPOCHS, f"{COMMAND} --board")
        figure, record["metrics"]["page"] = board(model)
        write("front-board", figure, record)
        return
    check()
    write_text(STATIC / "front-map-wide.svg", wide_map())
    write_text(STATIC / "front-map-tall.svg", tall_map())
    if arguments.map:
        return
    model, record = train()
    write("front", plane(model), record, "front-plane")


def write(name, figure, record, file=None):
    """A figure to book/_static, its record to results."""
    write_text(STATIC / f"{file or name}.html", figure)
    write_text(ROOT / "results" / f"{name}.json", json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["metrics"]))


if __name__ == "__main__":
    main()
