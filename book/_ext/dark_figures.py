"""A second drawing of each figure for dark pages, made from the first: light strokes on nothing where that has dark ones on white.

In a drawing of lines and marks every colour gets the opposite lightness and keeps its hue. Pictures stay as they are, since a digit or
a photograph that is inverted is another one: there only the frame around them changes, which holds their labels and gaps.
"""

import numpy as np
from matplotlib.colors import rgb_to_hsv
from PIL import Image
from scipy import ndimage

WHITE = 240  # of 255: as light as this is the ground
GAP = 10  # pixels: a wider band of white in a single row or column of pictures belongs to one of them
SIDE = 100  # pixels of a dark block in a free layout, at least
LENGTH, WIDTH = 48, 8  # pixels of a filled rectangle, at least: a colour bar is narrow
TINT, GREY = 220, 60  # of 255: brightest channel of what is no pale tint, spread of the channels of what is no grey
TICK = 6  # pixels: what stands out further is a label


def is_one_colour(levels: np.ndarray) -> bool:
    """Whether a block is filled evenly, as a bar is; its blurred edge does not count."""
    inner = levels[3:-3, 3:-3].reshape(-1, 3)
    return np.unique(inner, axis=0, return_counts=True)[1].max() >= 0.97 * len(inner)


def is_picture(levels: np.ndarray) -> bool:
    """Whether a block is a rectangle, its sides unbroken, of more than one colour: bars and letters are not."""
    paper = levels.min(2) >= WHITE
    whole = max(side.mean() for side in (paper[0], paper[-1], paper[:, 0], paper[:, -1])) < 0.2  # its corners may be blurred
    if not whole or max(paper.shape) < LENGTH or min(paper.shape) < WIDTH:
        return False
    return not is_one_colour(levels)


def blocks(levels: np.ndarray, paper: np.ndarray, dark_ones: bool) -> np.ndarray:
    """A frame around each picture by itself, and around each large dark block if so asked."""
    frame = np.ones_like(paper)
    for place in ndimage.find_objects(ndimage.label(~paper)[0]):
        if dark_ones and min(paper[place].shape) >= SIDE and paper[place].mean() < 0.3 and not is_one_colour(levels[place]):
            frame[place] = False
        inner = []
        for axis, part in ((1, place[0]), (0, place[1])):
            filled = np.flatnonzero(paper[place].mean(axis) < 0.5)  # the other rows and columns are those of ticks
            if len(filled) and filled[0] <= TICK and filled[-1] + TICK >= part.stop - part.start - 1:
                inner.append(slice(part.start + filled[0], part.start + filled[-1] + 1))
        if len(inner) == 2 and is_picture(levels[tuple(inner)]):
            frame[tuple(inner)] = False
    return frame


def frame_of(levels: np.ndarray, free: bool = False) -> np.ndarray:
    """Where (H, W) a figure's ground, labels and gaps are: all of a drawing, and of pictures what lies around these.

    Pictures are in a grid with labels at its left and above it. In a `free` layout, and where labels stand at the right as those of a
    colour bar do, each is found by itself.
    """
    paper = levels.min(2) >= WHITE
    frame = np.ones_like(paper)
    if free:
        return blocks(levels, paper, dark_ones=True)
    if paper.mean() > 0.5:  # pictures fill the better part of their figure
        return frame
    columns = np.flatnonzero((~paper).mean(0) > 0.5)
    left = columns[0] if len(columns) else 0  # labels stand left of the first column that pictures fill
    rows = np.flatnonzero((~paper[:, left:]).mean(1) > 0.5)
    top = rows[0] if len(rows) else 0
    if len(columns) and not paper[:, columns[-1] + TICK :].all():
        return blocks(levels, paper, dark_ones=False)
    frame[top:, left:] = False
    grid = paper[top:, left:]
    bands = []  # of each direction: start, end, whether it lies inside of the grid
    for share in (grid.mean(1), grid.mean(0)):
        edges = np.flatnonzero(np.diff(np.pad((share > 0.95).astype(int), 1))).reshape(-1, 2)
        bands.append([(start, end, start > 0 and end < len(share), share[start:end].min() == 1) for start, end in edges])
    for own, other, part in ((bands[0], bands[1], frame[top:, left:]), (bands[1], bands[0], frame[top:, left:].T)):
        table = any(inside for _, _, inside, _ in other)
        for start, end, inside, empty in own:
            if end - start <= GAP or end == len(part) or (table and inside and empty):
                part[start:end] = True
    return frame


def is_shading(colours: np.ndarray) -> bool:
    """Whether strong colours (N, 3) are the shades of a density: none of them much more frequent than others, and all of one hue."""
    shades, counts = np.unique(colours, axis=0, return_counts=True)
    return np.sort(counts)[-12:].sum() < 0.2 * counts.sum() and np.ptp(rgb_to_hsv(shades / 255)[:, 0]) < 0.1


def lossless(figure: Image.Image) -> Image.Image:
    """The same figure without channels that tell nothing: colours where all is grey, a cover where all is opaque."""
    figure = figure.convert("RGBA")
    grey = figure.convert("LA")
    smaller = grey if grey.convert("RGBA").tobytes() == figure.tobytes() else figure
    opaque = figure.getextrema()[3] == (255, 255)
    return smaller.convert(smaller.mode[:-1]) if opaque else smaller


def dark(figure: Image.Image, free: bool = False) -> Image.Image:
    """The figure for a dark page, RGBA, of the same size; `free` as for `frame_of`."""
    ground = Image.new("RGBA", figure.size, "white")
    ground.alpha_composite(figure.convert("RGBA"))
    levels = np.asarray(ground)[..., :3].astype(float)
    high, low = levels.max(2), levels.min(2)
    shift = 255 - high - low  # lightness l -> 1 - l, the same hue
    strong = (high < TINT) & (high - low > GREY)
    if not is_shading(levels[strong]):  # a purple line stays one that is seen
        shift = np.where(strong, np.maximum(shift, 135 - (high + low) / 2), shift)
    turned = levels + shift[..., None]
    cover = turned.max(2)[..., None]  # black is nothing, so that the page shows through
    drawn = np.concatenate([255 * turned / np.maximum(cover, 1), cover], 2)
    kept = np.dstack([levels, np.full(levels.shape[:2], 255.0)])
    return Image.fromarray(np.where(frame_of(levels, free)[..., None], drawn, kept).round().astype(np.uint8), "RGBA")
