"""What comes out of a trained model: samples, reconstructions, and walks through the latent space and what they decode to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import check_choice, check_int, check_number, check_pixels, check_seed, describe, warn_of_scale
from vaelib.data import ImageSet
from vaelib.evaluation import kl_per_unit, posterior_means
from vaelib.heldout import evaluating, observations
from vaelib.vae import VAE

CHUNK = 500  # codes decoded at once: a mixture likelihood's params of so many images take some 200 MB


def decode_pixels(model: VAE, z: Tensor) -> Tensor:
    """The likelihood's mean at z as pixels: (N, L) -> (N, C, H, W) ``uint8``, on the CPU; some `CHUNK` codes at a time."""
    labels = getattr(model, "labels", None)  # a conditional model: codes come in whole multiples of its labels
    together = 1 if labels is None else len(labels)
    with evaluating(model):
        chunks = z.split(together * max(1, CHUNK // together))
        means = (model.likelihood.mean(model.decode(part.to(model.device))) for part in chunks)
        return torch.cat([model.likelihood.to_pixels(mean).cpu() for mean in means])


def generate(model: VAE, num_images: int, temperature: float = 1.0, seed: int | None = None, prior: Any = None) -> Tensor:
    """New images: z from the prior, decoded to the mean of p(x given z): (num_images, C, H, W) ``uint8``.

    Args:
        temperature: factor on the prior's standard deviation; below 1 the samples are more typical and less varied.
        seed: same seed, same images, up to rounding: image i depends on the seed and on i, not on `num_images`. None draws anew each time.
        prior: what z comes from; None is the model's own prior. Else what `fit_mixture` or `fit_second_stage` of `vaelib.priors` gives,
            or any object with a method ``sample(num, generator)`` that gives z (num, L), and takes a temperature if you ask for one.

    Example:
        >>> import vaelib
        >>> model = vaelib.mlp_vae((1, 28, 28), hidden_dims=(32,), latent_dim=2)
        >>> vaelib.generate(model, 4, seed=0).shape
        torch.Size([4, 1, 28, 28])
    """
    check_int("num_images", num_images)
    check_number("temperature", temperature)
    generator = None if seed is None else torch.Generator().manual_seed(check_seed("seed", seed))
    prior = model.prior if prior is None else prior
    if not hasattr(prior, "sample"):
        raise ValueError(f"prior: got {describe(prior)}, expected None or an object with a method sample")
    if temperature != 1 and "temperature" not in inspect.signature(prior.sample).parameters:
        raise ValueError(f"temperature: got {temperature}, but the prior {type(prior).__name__} takes none, expected 1")
    with evaluating(model):
        z = prior.sample(num_images, generator=generator, **({} if temperature == 1 else {"temperature": temperature}))
    model.check_code(z, "prior")
    return decode_pixels(model, z)


def reconstruct(model: VAE, pixels: Tensor, seed: int = 0) -> Tensor:
    """Each image encoded to its posterior mean and decoded again: ``uint8`` (N, C, H, W) -> the same; deterministic.

    Example:
        >>> import vaelib
        >>> model = vaelib.mlp_vae((1, 28, 28), hidden_dims=(32,), latent_dim=2)
        >>> vaelib.reconstruct(model, vaelib.load_images("digits", "test").pixels[:4]).shape
        torch.Size([4, 1, 28, 28])
    """
    pixels = check_pixels("pixels", pixels, model.image_shape)
    warn_of_scale("pixels", pixels)
    with evaluating(model):
        return torch.cat([decode_pixels(model, model.encode(x).mean) for x, _ in observations(model, pixels, 1000, seed)])


def mean_code(model: VAE, name: str, image: Tensor, seed: int = 0) -> Tensor:
    """The posterior mean of one image, (C, H, W) or (1, C, H, W) ``uint8``: (1, L), on the CPU."""
    image = check_pixels(name, image[None] if getattr(image, "ndim", 4) == 3 else image, model.image_shape)
    if len(image) != 1:
        raise ValueError(f"{name}: got {len(image)} images, expected one")
    return posterior_means(model, image, seed=seed)


def interpolate(model: VAE, a: Tensor, b: Tensor, steps: int = 10, seed: int = 0, kind: str = "linear") -> Tensor:
    """Decoded codes on the way from a's posterior mean to b's: two images (C, H, W) ``uint8`` -> (steps, C, H, W).

    Args:
        steps: how many images, both ends among them: at least 2.
        kind: ``"linear"``: on the straight line. ``"spherical"``: the direction turns at constant speed in the plane of the two codes
            (slerp: Shoemake 1985, White 2016; eq. slerp) while the length goes linearly from a's to b's. So the codes do not cut
            through the middle, where a Gaussian in many dimensions has no mass. Codes on one line through 0 are joined linearly.
    """
    check_int("steps", steps, minimum=2)
    check_choice("kind", kind, ("linear", "spherical"))
    start, end = mean_code(model, "a", a, seed), mean_code(model, "b", b, seed)
    weight = torch.linspace(0, 1, steps, device="cpu")[:, None]  # (steps, 1)
    path = torch.lerp(start.expand(steps, -1), end.expand(steps, -1), weight)  # (steps, L)
    lengths = start.norm(), end.norm()
    cosine = (start / lengths[0] * (end / lengths[1])).sum()
    if kind == "spherical" and cosine.abs() < 1 - 1e-6:  # False for NaN too, where a code is 0
        angle = cosine.arccos()
        turned = ((1 - weight) * angle).sin() * start / lengths[0] + (weight * angle).sin() * end / lengths[1]
        path = torch.lerp(*lengths, weight) * turned / angle.sin()
    return decode_pixels(model, path)


def most_used_units(model: VAE, images: ImageSet | Tensor, count: int = 8) -> Tensor:
    """The `count` latent dimensions with the largest mean KL over the images, most used first: (count,) int64."""
    if check_int("count", count) > model.latent_dim:
        raise ValueError(f"count: got {count}, expected at most the model's {model.latent_dim} latent dimensions")
    return kl_per_unit(model, images).argsort(descending=True, stable=True)[:count]


def traverse(model: VAE, image: Tensor, units: Sequence[int] | Tensor, values: Sequence[float] | Tensor) -> Tensor:
    """Latent traversals: an image's posterior mean with one dimension set to each value in turn, decoded.

    Args:
        image: (C, H, W) ``uint8``.
        units: which dimensions, such as `most_used_units` gives them: U of them.
        values: what they are set to, in units of z, of which the prior has standard deviation 1: V of them.

    Returns:
        (U, V, C, H, W) ``uint8``.
    """
    units, values = torch.as_tensor(units).cpu(), torch.as_tensor(values, dtype=torch.float32).cpu()
    if units.dim() != 1 or units.dtype != torch.int64 or not ((units >= 0) & (units < model.latent_dim)).all() or len(units) == 0:
        raise ValueError(f"units: got {units.tolist()}, expected latent dimensions, whole numbers below {model.latent_dim}")
    if values.dim() != 1 or len(values) == 0 or not values.isfinite().all():
        raise ValueError(f"values: got {values.tolist()}, expected a sequence of finite numbers")
    z = mean_code(model, "image", image).repeat(len(units), len(values), 1)
    z.scatter_(2, units[:, None, None].expand(-1, len(values), 1), values[:, None].expand(len(units), -1, 1))
    pixels: Tensor = decode_pixels(model, z.flatten(0, 1)).unflatten(0, (len(units), len(values)))
    return pixels


def class_means(model: VAE, images: ImageSet) -> Tensor:
    """The mean of the posterior means of each class's images: (num_classes, L), on the CPU.

    Raises:
        ValueError: If the images have no labels, or a class has no image.
    """
    if not images.labelled:
        raise ValueError(f"images: got {images.name!r} without labels, expected labels")
    counts = images.labels.cpu().bincount(minlength=len(images.classes))
    if empty := [name for name, count in zip(images.classes, counts.tolist(), strict=True) if not count]:
        raise ValueError(f"images: got no image of {', '.join(empty)}, expected some of each class")
    total = torch.zeros(len(counts), model.latent_dim, device="cpu")
    return total.index_add(0, images.labels.cpu(), posterior_means(model, images)) / counts[:, None]  # (classes, L)


def attribute_vector(model: VAE, images: ImageSet | Tensor, has: Tensor) -> Tensor:
    """The mean code of the images that have an attribute minus that of those that don't: (L,), on the CPU. White 2016. eq. attribute-vector

    Args:
        has: bool (N,), which images have it.

    Raises:
        ValueError: Unless `has` is such a mask with both kinds in it.
    """
    if not isinstance(has, Tensor) or has.dtype != torch.bool or has.shape != (len(images),):
        raise ValueError(f"has: got {describe(has)}, expected a bool tensor of shape ({len(images)},)")
    if has.all() or not has.any():
        raise ValueError(f"has: got {int(has.sum())} of {len(has)} images, expected some with the attribute and some without")
    means = posterior_means(model, images)
    return means[has.cpu()].mean(0) - means[~has.cpu()].mean(0)


def shift(model: VAE, pixels: Tensor, vector: Tensor, scale: float = 1.0) -> Tensor:
    """Each image's posterior mean plus scale * vector, decoded: ``uint8`` (N, C, H, W) and (L,) -> the same as the images.

    Args:
        vector: such as `attribute_vector` or the difference of two rows of `class_means`.
        scale: below 0 takes the attribute away.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    if not isinstance(vector, Tensor) or vector.shape != (model.latent_dim,):
        raise ValueError(f"vector: got {describe(vector)}, expected a tensor of shape ({model.latent_dim},)")
    return decode_pixels(model, posterior_means(model, pixels) + scale * vector.cpu())


def latent_grid(model: VAE, side: int = 20, tail: float = 0.02) -> Tensor:
    """The latent plane, decoded: (side * side, C, H, W) ``uint8``, rows from high z_2 to low, columns from low z_1 to high.

    Grid points are equal steps of the prior's probability from `tail` to 1 - `tail`, so that each cell stands for the same mass.

    Raises:
        ValueError: Unless the model's latent space has two dimensions.
    """
    check_int("side", side, minimum=2)
    if check_number("tail", tail, exclusive=True) >= 0.5:
        raise ValueError(f"tail: got {tail}, expected a probability below 0.5")
    if model.latent_dim != 2:
        raise ValueError(f"model: got latent_dim {model.latent_dim}, expected 2: only a plane can be drawn")
    points = torch.special.ndtri(torch.linspace(tail, 1 - tail, side, device="cpu"))
    second, first = torch.meshgrid(points.flip(0), points, indexing="ij")
    return decode_pixels(model, torch.stack([first.flatten(), second.flatten()], dim=1))
