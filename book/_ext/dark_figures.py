"""A second drawing of each figure for dark pages, made from the first: light strokes on nothing where that has dark ones on white.

In a drawing of lines and marks every colour gets the opposite lightness and keeps its hue. Pictures stay as they are, since a digit or
a photograph that is inverted is another one: there only the frame around them changes, which holds their labels and gaps.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

WHITE = 240  # of 255: as light as this is the ground
GAP = 8  # pixels: a wider band of white in a grid of pictures belongs to one of them
SIDE = 100  # pixels of a picture in a free layout, at least


def frame_of(levels: np.ndarray, free: bool = False) -> np.ndarray:
    """Where (H, W) a figure's ground, labels and gaps are: all of a drawing, and of pictures what lies around these.

    Pictures are in a grid with labels at its left and above it, or in a `free` layout, where each is a large dark block.
    """
    paper = levels.min(2) >= WHITE
    frame = np.ones_like(paper)
    if free:
        for place in ndimage.find_objects(ndimage.label(~paper)[0]):
            if min(paper[place].shape) >= SIDE and paper[place].mean() < 0.3:
                frame[place] = False
        return frame
    if paper.mean() > 0.5:  # pictures fill the better part of their figure
        return frame
    left = np.argmax((~paper).mean(0) > 0.5)  # labels stand left of the first column that pictures fill
    top = np.argmax((~paper[:, left:]).mean(1) > 0.5)
    frame[top:, left:] = False
    grid = paper[top:, left:]
    for share, bands in ((grid.mean(1), frame[top:, left:]), (grid.mean(0), frame[top:, left:].T)):
        edges = np.flatnonzero(np.diff(np.pad((share > 0.97).astype(int), 1)))
        for start, end in edges.reshape(-1, 2):
            if end - start <= GAP or end == len(share):
                bands[start:end] = True
    return frame


def dark(figure: Image.Image, free: bool = False) -> Image.Image:
    """The figure for a dark page, RGBA, of the same size; `free` as for `frame_of`."""
    ground = Image.new("RGBA", figure.size, "white")
    ground.alpha_composite(figure.convert("RGBA"))
    levels = np.asarray(ground)[..., :3].astype(float)
    turned = levels + (255 - levels.max(2) - levels.min(2))[..., None]  # lightness l -> 1 - l, the same hue
    cover = turned.max(2)[..., None]  # black is nothing, so that the page shows through
    drawn = np.concatenate([255 * turned / np.maximum(cover, 1), cover], 2)
    kept = np.dstack([levels, np.full(levels.shape[:2], 255.0)])
    return Image.fromarray(np.where(frame_of(levels, free)[..., None], drawn, kept).round().astype(np.uint8), "RGBA")
