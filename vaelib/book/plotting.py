"""The book's figures: image grids, training curves, latent planes. One style, a palette safe for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from torch import Tensor

from vaelib._validation import check_int, check_pixels, describe

# Okabe and Ito 2008, in an order whose neighbours differ in lightness too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "font.size": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def style() -> Iterator[None]:
    """The book's matplotlib style, for one figure.

    Only these settings are put back afterwards: `plt.rc_context` would also undo the interactive mode that a notebook's backend
    switches on when the first figure is made, and no later figure would show.
    """
    before = {key: plt.rcParams[key] for key in STYLE}
    plt.rcParams.update(STYLE)
    try:
        yield
    finally:
        plt.rcParams.update(before)


def use_style() -> None:
    """The book's matplotlib style, for the rest of the notebook."""
    plt.rcParams.update(STYLE)


def tile(pixels: Tensor, columns: int | None = None, gap: int = 1, ground: int = 255) -> np.ndarray:
    """Images side by side in one array: ``uint8`` (N, C, H, W) -> (rows, width) or (rows, width, 3)."""
    pixels = check_pixels("pixels", pixels)
    count, channels, height, width = pixels.shape
    columns = check_int("columns", columns) if columns is not None else math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.full(
        (channels, rows * (height + gap) - gap, columns * (width + gap) - gap), ground, dtype=torch.uint8, device="cpu"
    )
    for i, image in enumerate(pixels.cpu()):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    array = sheet.permute(1, 2, 0).numpy()
    return array[..., 0] if channels == 1 else array


def show_images(
    pixels: Tensor,
    columns: int | None = None,
    row_labels: Sequence[str] = (),
    scale: float = 0.45,
    ax: Axes | None = None,
    gap: int = 1,
) -> Figure:
    """A grid of images; `row_labels` name its rows, `scale` is the size of one image in inches."""
    with style():
        pixels = check_pixels("pixels", pixels)
        count = len(pixels)
        columns = columns or math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        if ax is None:
            label_width = 0.09 * max(map(len, row_labels), default=0)
            _, ax = plt.subplots(figsize=(scale * columns + label_width, scale * rows))
        ax.imshow(tile(pixels, columns, gap), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.grid(False)
        ax.set_xticks([])
        ax.set_yticks([])
        height = pixels.shape[2] + gap
        if row_labels:
            ax.set_yticks([height * (row + 0.5) for row in range(len(row_labels))], row_labels)
            ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        return ax.figure  # type: ignore[return-value]  # no SubFigure


def training_curves(history: Sequence[dict[str, float]], skip: int = 0) -> Figure:
    """The ELBO and its two terms by epoch, training and held out, in nats; `skip` leaves the first epochs out of the view.

    Raises:
        ValueError: If there is no epoch to show, as when training was interrupted in its first.
    """
    if not len(history):
        raise ValueError("history: got one without a finished epoch, expected at least one; was training interrupted in its first?")
    if check_int("skip", skip, minimum=0) >= len(history):
        raise ValueError(f"skip: got {skip}, expected less than the {len(history)} epochs of the history")
    shown = list(history)[skip:]
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharex=True)
        names = {"elbo": "ELBO", "log_likelihood": "E[log p(x given z)]", "kl": "KL to the prior"}
        for ax, (term, title) in zip(axes, names.items(), strict=True):
            for color, (part, label) in zip(PALETTE, {"train": "training", "valid": "held out"}.items(), strict=False):
                if f"{part}_{term}" in shown[0]:
                    epochs = [epoch["epoch"] for epoch in shown]
                    ax.plot(
                        epochs,
                        [epoch[f"{part}_{term}"] for epoch in shown],
                        color=color,
                        label=label,
                        ls="-" if part == "train" else "--",
                    )
            ax.set(title=title, xlabel="epoch")
        axes[0].set_ylabel("nats per image")
        axes[0].legend(loc="lower right")
        return figure


def apart(places: Tensor, distance: float) -> Tensor:
    """Points (N, 2), pushed away from each other until no two are nearer than `distance`; equal ones stay."""
    for _ in range(200):
        gaps = places[:, None] - places
        lengths = gaps.norm(dim=2).fill_diagonal_(math.inf)
        places = places + ((distance - lengths).clamp(min=0) / 2 / lengths.clamp(min=1e-9))[:, :, None].mul(gaps).sum(1)
    return places


def latent_scatter(codes: Tensor, labels: Tensor, classes: Sequence[str], ax: Axes | None = None) -> Figure:
    """Posterior means in a 2-D latent space, coloured by class, each class named at its median or, where names would meet, beside it."""
    if not isinstance(codes, Tensor) or codes.dim() != 2 or codes.shape[1] != 2:
        expected = "shape (N, 2): a plane; take two latents, such as codes[:, most_used_units(model, images, 2)]"
        raise ValueError(f"codes: got {describe(codes)}, expected {expected}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != codes.shape[:1]:
        expected = f"an int64 tensor of shape ({len(codes)},), the numbers of the classes"
        raise ValueError(f"labels: got {describe(labels)}, expected {expected}")
    if labels.min() < 0 or labels.max() >= len(classes):
        got = int(labels.min() if labels.min() < 0 else labels.max())
        raise ValueError(f"labels: got {got}, expected numbers from 0 to {len(classes) - 1}, one for each of the classes")
    codes, labels = codes.cpu(), labels.cpu()
    with style():
        if ax is None:
            _, ax = plt.subplots(figsize=(4.6, 4.4))
        colors = plt.get_cmap("tab10")(np.arange(10))
        for label in range(len(classes)):
            mine = codes[labels == label]
            ax.scatter(mine[:, 0], mine[:, 1], s=3, alpha=0.35, color=colors[label % 10], linewidths=0)
        present = labels.unique().tolist()
        medians = torch.stack([codes[labels == label].median(0).values for label in present])
        span = (codes.amax(0) - codes.amin(0)).max().item()
        for label, (x, y), (left, up) in zip(present, medians.tolist(), apart(medians, 0.07 * span).tolist(), strict=True):
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colors[label % 10], "alpha": 0.9}
            ax.plot([x, left], [y, up], color="black", lw=0.8)
            ax.text(left, up, classes[label], ha="center", va="center", fontsize=9, bbox=box)
        ax.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
        return ax.figure  # type: ignore[return-value]  # no SubFigure
