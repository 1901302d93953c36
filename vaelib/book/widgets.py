"""Figures to touch. In a page, with no server: the networks run in the reader's browser. In a live notebook: ipywidgets.

A `Widget` is one self-contained iframe, sandboxed and without network; its page and scripts are in ``vaelib/assets``.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Ellipse
from PIL import Image
from torch import Tensor, nn

from vaelib._validation import check_int, check_number, check_pixels, check_seed, describe
from vaelib.book.plotting import latent_scatter, show_images, style, tile
from vaelib.data import ImageSet
from vaelib.densities import Posterior
from vaelib.evaluation import posterior_means, posteriors
from vaelib.generation import decode_pixels, interpolate, latent_grid
from vaelib.heldout import heldout_elbo
from vaelib.likelihoods import Bernoulli
from vaelib.networks import ACTIVATIONS, MLPDecoder, MLPEncoder
from vaelib.retrieval import Neighbours
from vaelib.vae import VAE

LIMIT = 400_000  # bytes of HTML that one figure may add to a page


@dataclass(frozen=True, repr=False)
class Widget:
    """An interactive figure that a notebook shows as the value of a cell.

    Attributes:
        html: the iframe with its caption, and a still picture for print.
        still: the same picture as a PNG file, for viewers that run no script.
        alt: what the figure shows, in words.
    """

    html: str
    still: bytes
    alt: str

    def __repr__(self) -> str:
        return f"Widget({self.alt!r}, {len(self.html.encode()) // 1000} KB)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "image/png": base64.b64encode(self.still).decode(), "text/plain": self.alt}


def latent_explorer(
    model: VAE,
    caption: str,
    alt: str,
    extent: float = 2.5,
    codes: Tensor | None = None,
    labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
) -> Widget:
    """Move over a 2-D latent plane, decoded where the pointer is; arrow keys move too.

    Args:
        extent: the plane shown is [-extent, extent] in both directions.
        codes: posterior means (N, 2) to show as dots, at most 2000 of them, evenly picked; without them the plane shows images.
        labels: int64 (N,), the dots' colours; each class is named at its median.
        classes: the names of the labels; without them their numbers.

    Raises:
        ValueError: Unless the latent space is a plane, the decoder fully connected and the likelihood Bernoulli.
    """
    data = page_decoder(model) | {"extent": check_number("extent", extent, exclusive=True)}
    still = sheet(latent_grid(model, 9), 9)
    if codes is not None:
        data |= dots(codes, labels, classes)
    return widget("explorer", data, caption, alt, still, "50cqw + 62px", "100cqw + 96px")


def dots(codes: Tensor, labels: Tensor | None, classes: Sequence[str] | None, most: int = 2000) -> dict[str, Any]:
    """Codes (N, 2) with their classes, at most `most` of them, as the page's plane shows them."""
    if not isinstance(codes, Tensor) or codes.dim() != 2 or codes.shape[1] != 2 or len(codes) == 0:
        raise ValueError(f"codes: got {describe(codes)}, expected shape (N, 2)")
    step = -(-len(codes) // most)
    names = named("labels", labels, len(codes), classes)[::step]
    kinds = sorted(set(names))
    indices = torch.tensor([kinds.index(name) for name in names], device="cpu")
    return {"codes": encoded(codes[::step]), "labels": encoded(indices, torch.uint8), "classes": kinds}


def drawing_board(
    model: VAE,
    images: ImageSet | Tensor,
    test: ImageSet,
    caption: str,
    alt: str,
    extent: float = 3,
    num_samples: int = 50,
    seed: int = 0,
) -> Widget:
    """Draw a digit: see its q(z given x) in the latent plane, the reconstruction, and rate and distortion in nats. eq. two-terms

    A drawing becomes an image as MNIST's did: scaled to a box of 20 pixels, with the centre of mass in pixel (14, 14). The likelihood
    binarizes it, with the same noise for every image of the page, so that a stroke changes x only where it leaves ink. The distortion is
    the mean over `num_samples` draws of z, the same noise for every x.

    Args:
        images: an `ImageSet` or pixels (N, 1, 28, 28) ``uint8`` of training images, for which the encoder's weights are rounded.
        test: held-out images with labels: the dots of the plane, one of each class to choose, and what they cost.
        extent: the plane shown is [-extent, extent] in both directions.

    Raises:
        ValueError: Unless images are 28 x 28, the latent space a plane, both networks fully connected and the likelihood Bernoulli.
    """
    data, encoder, draws = page_decoder(model, short=2**12), model.encoder, check_int("num_samples", num_samples)
    if type(encoder) is not MLPEncoder or tuple(model.image_shape) != (1, 28, 28) or model.latent_dim != 2:
        got = f"{type(encoder).__name__} with {model.latent_dim} latents for images {tuple(model.image_shape)}"
        raise ValueError(f"model: got {got}, expected MLPEncoder with 2 latents for images (1, 28, 28), as MNIST has")
    data |= {"extent": check_number("extent", extent, exclusive=True)}
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    pixels = check_pixels("images", pixels_of(images), model.image_shape)[:: -(-len(images) // 2000)].cpu()
    x = model.likelihood.observe(pixels, generator).flatten(1)
    data["encoder"], activation = packed([*encoder.hidden, encoder.head], x, short=2**14, long=2**12)
    if activation != data["activation"]:
        raise ValueError(f"model: got {activation} in the encoder and {data['activation']} in the decoder, expected the same")
    noise = torch.full((784,), 127, device="cpu")  # x is 1 where a level is above it
    if model.likelihood.config["binarize"] == "sample":
        noise = torch.randint(255, (784,), generator=generator, device="cpu")
    q, terms = posteriors(model, test), heldout_elbo(model, test, num_samples=10)
    data |= dots(q.mean, test.known_labels, test.classes, most=1000)
    shown = [int((test.labels.cpu() == label).nonzero()[0]) for label in test.labels.unique().tolist()]
    data |= {
        "digits": encoded(test.pixels[shown], torch.uint8),
        "names": [test.classes[label] for label in test.labels[shown].tolist()],
    }
    data |= {"noise": encoded(noise, torch.uint8), "draws": encoded(torch.randn(draws, 2, generator=generator, device="cpu"))}
    data |= {"rate": float(terms.kl.double().mean()), "distortion": float(-terms.log_likelihood.double().mean())}
    data["costs"] = encoded((-terms.elbo).double().quantile(torch.linspace(0, 1, 101, dtype=torch.float64, device="cpu")))
    still = board_still(model, test, q, shown[len(shown) // 2], extent)
    return widget("encoder", data, caption, alt, still, "41cqw + 288px", "min(100cqw + 640px, 1050px)")


def board_still(model: VAE, test: ImageSet, q: Posterior, i: int, extent: float) -> bytes:
    """Image `i`, the plane with its q at one and two standard deviations, and its reconstruction, as a PNG file."""
    with style():
        figure, axes = plt.subplots(1, 3, figsize=(8, 2.8), width_ratios=(1, 1.25, 1))
        show_images(test.pixels[i : i + 1], ax=axes[0])
        latent_scatter(q.mean[::8], test.labels[::8], test.classes, axes[1])
        (left, up), (across, down) = q.mean[i].tolist(), (0.5 * q.log_var[i]).exp().tolist()
        for times in (1, 2):
            axes[1].add_patch(Ellipse((left, up), 2 * times * across, 2 * times * down, fill=False, lw=1.2, zorder=9))
        axes[1].set(xlim=(-extent, extent), ylim=(-extent, extent))
        show_images(decode_pixels(model, q.mean[i : i + 1]), ax=axes[2])
        for ax, title in zip(axes, ("image", "q(z | x)", "reconstruction"), strict=True):
            ax.set_title(title)
        file = io.BytesIO()
        figure.savefig(file, dpi=90)
        plt.close(figure)
    return png(Image.open(file).convert("RGB").quantize(16))


def interpolation_slider(model: VAE, images: ImageSet | Tensor, caption: str, alt: str, steps: int = 11) -> Widget:
    """Choose two of a few images and slide from one's posterior mean to the other's, straight or spherically.

    Args:
        images: an `ImageSet` or pixels (N, C, H, W) ``uint8``, 2 to 12 of them.
        steps: how many decoded images of the path are shown at once, 2 to 15.
    """
    images = pixels_of(images)
    data, means = page_decoder(model), posterior_means(model, images)
    if not (2 <= len(images) <= 12 and check_int("steps", steps, minimum=2) <= 15):
        raise ValueError(f"images, steps: got {len(images)} images and {steps} steps, expected 2 to 12 and 2 to 15")
    rows = -(-len(images) // 6)
    columns = -(-len(images) // rows)
    data |= {"means": encoded(means), "images": encoded(images, torch.uint8)}
    data |= {"count": len(images), "columns": columns, "steps": steps}
    strip = f"{100 / steps:.1f}cqw"
    wide = f"max({100 * rows / columns:.1f}cqw + 120px, 50cqw) + {strip} + 82px"
    narrow = f"{200 * rows / columns:.1f}cqw + {strip} + 394px"
    return widget("interpolation", data, caption, alt, sheet(interpolate(model, images[0], images[1], steps), steps), wide, narrow)


def traversal_sliders(
    model: VAE, image: ImageSet | Tensor, units: Sequence[int], caption: str, alt: str, span: float = 3
) -> Widget:
    """A slider for each of a few latent dimensions, starting at the image's posterior mean.

    Args:
        image: pixels (C, H, W) or (1, C, H, W) ``uint8``, or an `ImageSet` of one image.
        units: latent dimensions, 1 to 10 of them, such as those of the largest `kl_per_unit`.
        span: the sliders run over [-span, span], further where the image's own code lies outside.
    """
    image = pixels_of(image)
    data, code = page_decoder(model), start_code(model, "image", image, units)
    data |= {"image": encoded(image, torch.uint8), "code": encoded(code)}
    data |= {"units": list(units), "span": check_number("span", span, exclusive=True)}
    z = code.repeat(len(units), 9, 1)
    for row, unit in enumerate(units):
        z[row, :, unit] = torch.linspace(-span, span, 9, device="cpu")
    still = sheet(decode_pixels(model, z.flatten(0, 1)), 9, [f"z[{unit}]" for unit in units])
    sliders = f"{36 * len(units) + 106}px"
    return widget("traversal", data, caption, alt, still, f"max(40cqw + 20px, {sliders})", f"{sliders} + 190px")


def retrieval_browser(
    queries: ImageSet | Tensor,
    gallery: ImageSet | Tensor,
    neighbours: Mapping[str, Neighbours | Tensor],
    caption: str,
    alt: str,
    query_labels: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
) -> Widget:
    """Choose a query and a distance, and see its neighbours; those with another label are marked.

    Args:
        queries: an `ImageSet` or pixels (Q, C, H, W) ``uint8``.
        gallery: an `ImageSet` or pixels (N, C, H, W) ``uint8``; only those of its images that are a neighbour are stored.
        neighbours: for each distance's name, what a search found or its indices int64 (Q, k) into the gallery, nearest first.
        query_labels: int64 (Q,), given together with `gallery_labels`, int64 (N,).
        classes: the names of the labels; without them their numbers.
    """
    queries, gallery = pixels_of(queries), pixels_of(gallery)
    shape = check_grey_or_colour("queries", check_pixels("queries", queries).shape[1:])
    queries, gallery = queries.cpu(), check_pixels("gallery", gallery, shape).cpu()
    if not isinstance(neighbours, Mapping) or not neighbours:
        raise ValueError(f"neighbours: got {describe(neighbours)}, expected a dict from a distance's name to indices (Q, k)")
    indices = {name: found.indices if isinstance(found, Neighbours) else found for name, found in neighbours.items()}
    k = max((value.shape[-1] for value in indices.values() if isinstance(value, Tensor) and value.dim()), default=0)
    for name, found in indices.items():
        good = isinstance(found, Tensor) and found.dtype == torch.int64 and found.shape == (len(queries), k) and k > 0
        if not good or found.min() < 0 or found.max() >= len(gallery):
            expected = f"int64 indices ({len(queries)}, k) from 0 to {len(gallery) - 1}, the same k for each distance"
            raise ValueError(f"neighbours[{name!r}]: got {describe(found)}, expected {expected}")
    if (query_labels is None) != (gallery_labels is None):
        raise ValueError("query_labels, gallery_labels: got one of them, expected both or none")
    names, table = [str(name) for name in indices], torch.stack(list(indices.values())).cpu()  # (distances, Q, k)
    used, place = table.unique(return_inverse=True)
    labels = named("gallery_labels", gallery_labels, len(gallery), classes)
    atlas = base64.b64encode(png(tile(torch.cat([queries, gallery[used]]), 32, gap=0))).decode()
    data = {"shape": list(shape), "count": len(queries), "names": names, "neighbours": place.tolist(), "atlas": atlas}
    data |= {"queryLabels": named("query_labels", query_labels, len(queries), classes)}
    data |= {"galleryLabels": [labels[i] for i in used.tolist()] if labels else []}
    still = sheet(torch.cat([torch.cat([queries[:1], gallery[found[0]]]) for found in table]), k + 1, names)
    heights = []
    names_px = 48 * -(-len(names) // 2)  # on a phone the distances stand in rows of two
    for across, down, rest in ((12, 8, 160), (6, 4, 140 + names_px)):  # images in a row of queries and of neighbours
        rows, lines = -(-len(queries) // across), -(-k // down)
        heights.append(f"{100 * (rows / across + lines / down):.1f}cqw + {24 * lines + rest}px")
    return widget("retrieval", data, caption, alt, still, *heights)


def widget(kind: str, data: dict[str, Any], caption: str, alt: str, still: bytes, wide: str, narrow: str) -> Widget:
    """The figure `kind`: its page and scripts around `data`; `wide` and `narrow` are the frame's heights, in CSS.

    Raises:
        ValueError: If there is no caption or alternative text, or the figure is larger than `LIMIT`.
    """
    for name, text in (("caption", caption), ("alt", alt)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: got {describe(text)}, expected a text that says what the figure shows")
    scripts = "\n".join(
        asset(name) for name in ("page.js", *["decoder.js"] * ("layers" in data), *["plane.js"] * ("extent" in data), f"{kind}.js")
    )
    text = json.dumps(data).replace("<", "\\u003c")  # no name can end the script
    page = asset("widget.html", title=html.escape(alt), kind=kind, data=text, scripts=scripts)
    words = {"page": html.escape(page), "alt": html.escape(alt), "caption": html.escape(caption), "wide": wide, "narrow": narrow}
    text = asset("figure.html", still=base64.b64encode(still).decode(), **words)
    if (size := len(text.encode())) > LIMIT:
        raise ValueError(f"{kind}: got {size} bytes of HTML, expected at most {LIMIT}: use fewer hidden units or fewer images")
    return Widget(text, still, alt)


def asset(name: str, **parts: str) -> str:
    """The text of a file in ``vaelib/assets``, each @@name@@ in it replaced."""
    text = (files("vaelib") / "assets" / name).read_text(encoding="utf-8")
    return re.sub("@@([a-z]+)@@", lambda match: parts[match[1]], text)


def encoded(values: Tensor, dtype: torch.dtype = torch.float32) -> str:
    """The numbers of a tensor as base64 text."""
    return base64.b64encode(values.detach().cpu().to(dtype).contiguous().numpy().tobytes()).decode()


def png(pixels: Any, zoom: int = 1) -> bytes:
    """An array (H, W) or (H, W, 3), or a PIL image, as a PNG file."""
    image, file = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST).save(file, "png", optimize=True)
    return file.getvalue()


def sheet(pixels: Tensor, columns: int, row_labels: Sequence[str] = ()) -> bytes:
    """A grid of images in the book's style, as a PNG file of few colours."""
    figure, file = show_images(pixels, columns, row_labels), io.BytesIO()
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return png(Image.open(file).convert("RGB").quantize(16 if pixels.shape[1] == 1 else 256))


def page_decoder(model: VAE, short: int = 2**14) -> dict[str, Any]:
    """What the page needs to decode: `packed` layers and the activation.

    Raises:
        ValueError: Unless the decoder is fully connected, the likelihood Bernoulli, and the image grey or of three colours.
    """
    decoder, likelihood = getattr(model, "decoder", None), getattr(model, "likelihood", None)
    if type(decoder) is not MLPDecoder or not isinstance(likelihood, Bernoulli):
        got = f"decoder {type(decoder).__name__} and likelihood {type(likelihood).__name__}"
        raise ValueError(f"model: got {got}, expected MLPDecoder and Bernoulli: the page computes that mean itself")
    shape = check_grey_or_colour("model", model.image_shape)
    h = torch.randn(1000, model.latent_dim, generator=torch.Generator().manual_seed(0), device="cpu")  # from the prior
    layers, activation = packed([*decoder.hidden, decoder.head], h, short)
    return {"shape": list(shape), "layers": layers, "activation": activation}


def packed(network: Sequence[Any], h: Tensor, short: int, long: int = 2**14) -> tuple[list[dict[str, Any]], str]:
    """Linear layers, as their page reads them, and the activation's name. Rounding keeps what they give for inputs like h (N, fan_in).

    Layers are float32; those of more than `short` weights are int8 with a scale for each row, or else those of more than `long` int16.
    An encoder needs that: with a middle layer of 8 bits the ELBO of a test digit was 0.3 nats off in the mean, with 16 bits 0.1.
    """
    activation: Any = next((layer for layer in network if not isinstance(layer, nn.Linear)), nn.ReLU())
    layers = []
    for layer in network[::2]:
        weight, bias = layer.weight.detach().cpu().float(), layer.bias.detach().cpu().float()
        numbers: dict[str, Any] = {"weight": encoded(weight)}
        if weight.numel() > min(short, long):
            bits = 8 if weight.numel() > short else 16
            whole, scale = rounded(weight, h, 2 ** (bits - 1) - 1)
            bias = bias + (weight - whole * scale) @ h.mean(0)  # takes up what rounding changes on average
            kind = {8: torch.int8, 16: torch.int16}[bits]
            numbers = {"weight": encoded(whole, kind), "bits": bits, "scale": encoded(scale)}
        layers.append(numbers | {"bias": encoded(bias)})
        h = activation(h @ weight.T + bias)
    return layers, next(name for name, kind in ACTIVATIONS.items() if type(activation) is kind)


def rounded(weight: Tensor, h: Tensor, largest: int = 127) -> tuple[Tensor, Tensor]:
    """Whole numbers up to +-largest (fan_out, fan_in), a scale for each row (fan_out, 1), that keep weight @ h for inputs h (N, fan_in).

    What rounding changes in one column is made up for in those after it (Frantar et al. 2023, GPTQ). On MNIST an image is then
    at most 3 grey levels off; with plain rounding it was 12.
    """
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    second = h.double().T @ h.double() / len(h)
    damping = 0.01 * second.diagonal().mean() + 1e-9
    factor = torch.linalg.cholesky(torch.linalg.inv(second + damping * torch.eye(len(second), device=second.device)), upper=True)
    left, whole = weight.double(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        whole[:, j] = (left[:, j] / scale[:, 0]).round().clamp(-largest, largest)
        left[:, j + 1 :] -= torch.outer((left[:, j] - whole[:, j] * scale[:, 0]) / factor[j, j], factor[j, j + 1 :])
    return whole, scale


def pixels_of(images: ImageSet | Tensor) -> Tensor:
    """The pixels of an `ImageSet`; what is no such set comes back as it is."""
    return images.pixels if isinstance(images, ImageSet) else images


def check_grey_or_colour(argument: str, shape: Sequence[int]) -> Sequence[int]:
    """`shape` (C, H, W) if its images are grey or of three colours."""
    if shape[0] not in (1, 3):
        raise ValueError(f"{argument}: got images of {shape[0]} channels, expected 1 or 3")
    return shape


def named(argument: str, labels: Tensor | None, count: int, classes: Sequence[str] | None) -> list[str]:
    """The name of each label, none without labels; ValueError unless they are `count` whole numbers that name a class."""
    if labels is None:
        return []
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (count,):
        raise ValueError(f"{argument}: got {describe(labels)}, expected an int64 tensor of shape ({count},)")
    if classes is not None and (labels.min() < 0 or labels.max() >= len(classes)):
        raise ValueError(f"{argument}: got {int(labels.min())} to {int(labels.max())}, expected 0 to {len(classes) - 1}")
    return [str(label if classes is None else classes[label]) for label in labels.tolist()]


def start_code(model: VAE, argument: str, image: ImageSet | Tensor, units: Sequence[int] = (0,)) -> Tensor:
    """The image's posterior mean (1, L), after a check of the image and of the latent dimensions `units`."""
    code = posterior_means(model, image[None] if isinstance(image, Tensor) and image.dim() == 3 else image)
    if len(code) != 1:
        raise ValueError(f"{argument}: got {len(code)} images, expected one")
    if not 1 <= len(set(units)) == len(units) <= 10 or not set(units) <= set(range(model.latent_dim)):
        raise ValueError(f"units: got {units}, expected 1 to 10 different integers from 0 to {model.latent_dim - 1}")
    return code


def live(model: VAE, code: Callable[[list[float]], Tensor], **limits: tuple[float, float, float]) -> Any:
    """Sliders over a decoded image, in an ipywidgets box: `limits` name each one's minimum, maximum and start.

    Raises:
        ImportError: If ipywidgets is missing.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("ipywidgets is missing, expected it for a live figure: pip install ipywidgets") from error
    picture = ipywidgets.Image(format="png", width=280)
    sliders = [ipywidgets.FloatSlider(z, min=low, max=high, step=0.01, description=name) for name, (low, high, z) in limits.items()]

    def show(_: Any = None) -> None:
        picture.value = png(tile(decode_pixels(model, code([slider.value for slider in sliders]))), zoom=10)

    for slider in sliders:
        slider.observe(show, "value")
    show()
    return ipywidgets.VBox([picture, *sliders])


def live_explorer(model: VAE, extent: float = 2.5) -> Any:
    """`latent_explorer` in a live notebook, for any model with a 2-D latent space: an ipywidgets box."""
    latent_grid(model, 2)  # refuses a model without a latent plane
    limits = (-check_number("extent", extent, exclusive=True), extent, 0.0)
    return live(model, lambda z: torch.tensor([z], device="cpu"), z1=limits, z2=limits)


def live_interpolation(model: VAE, a: ImageSet | Tensor, b: ImageSet | Tensor) -> Any:
    """A slider from a's posterior mean to b's, images (C, H, W) ``uint8``, for any model: an ipywidgets box."""
    first, second = start_code(model, "a", a), start_code(model, "b", b)
    return live(model, lambda t: torch.lerp(first, second, t[0]), t=(0.0, 1.0, 0.0))


def live_traversal(model: VAE, image: ImageSet | Tensor, units: Sequence[int], span: float = 3) -> Any:
    """`traversal_sliders` in a live notebook, for any model: an ipywidgets box."""
    start, span = start_code(model, "image", image, units), check_number("span", span, exclusive=True)
    limits = {f"z[{unit}]": (min(-span, value), max(span, value), value) for unit in units for value in [float(start[0, unit])]}
    return live(
        model, lambda z: start.index_copy(1, torch.tensor(list(units), device="cpu"), torch.tensor([z], device="cpu")), **limits
    )
