"""A model judged on a set of images: chunk by chunk, without a graph, with noise that belongs to each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vaelib import noise
from vaelib._validation import check_int, check_pixels, help_at, warn_of_scale
from vaelib.data import ImageSet
from vaelib.objectives import ElboTerms
from vaelib.vae import VAE


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No graph, evaluation mode; the model's mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class AtLeast(int):
    """A number of images to a chunk that nobody asked for: on CUDA the first chunk alone has it, and later ones what memory holds.

    By the size that is best on a CPU a GPU waits for the host, which launches its kernels. No estimate depends on the chunks.
    """


def observations(model: VAE, pixels: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (x, keys) on the model's device; an image's x and its key don't depend on the chunk that it is in."""
    pixels, size, start = check_pixels("pixels", pixels, model.image_shape), check_int("batch_size", batch_size), 0
    grows = isinstance(batch_size, AtLeast) and model.device.type == "cuda"
    while start < len(pixels):
        if grows:
            torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device)
        chunk = pixels[start : start + size].to(model.device)
        keys = noise.image_keys(chunk, seed)
        uniform = noise.uniform_noise(keys, chunk.shape[1:], noise.OBSERVE)
        yield model.likelihood.observe(chunk, uniform=uniform), keys
        start += len(chunk)
        if grows:
            size = max(size, images_that_fit(model.device, len(chunk), torch.cuda.max_memory_allocated(model.device) - before))


def images_that_fit(device: torch.device, count: int, used: int) -> int:
    """How many images half of the memory holds that is free on CUDA, if `count` of them took `used` bytes.

    It counts on 8 GiB at most: a tensor of float32 then has fewer than 2**31 numbers, and the GPU has enough to do long before.
    """
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min((torch.cuda.mem_get_info(device)[0] + unused) // 2, 2**33) * count // max(used, 1)


def exact(values: Tensor) -> Tensor:
    """float64, for sums; where the values are, but on the CPU for MPS, which has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def labels_for(model: VAE, argument: str, images: ImageSet) -> Tensor | None:
    """The labels of a set for `VAE.given`, None where nobody gave any; ValueError where the model needs them, or knows others."""
    try:
        model.given(images.known_labels)
    except ValueError as error:
        if images.labelled:
            raise
        expected = "expected labels, or model.given(label): the model is conditional" + help_at("no-labels")
        raise ValueError(f"{argument}: got {images.name!r} without labels, {expected}") from error
    return images.known_labels


def given_labels(model: VAE, images: ImageSet | Tensor, batch_size: int, seed: int) -> Iterator[tuple[VAE, Tensor, Tensor]]:
    """Chunks of (model, x, keys), see `observations`; the model is the one for the labels of the chunk, see `VAE.given`.

    Args:
        images: an `ImageSet` or ``uint8`` pixels (N, C, H, W), which have no labels.
    """
    if isinstance(images, ImageSet):
        pixels, labels = images.pixels, labels_for(model, "images", images)
    else:
        pixels, labels = check_pixels("pixels", images, model.image_shape), None
        model.given(labels)
        warn_of_scale("pixels", pixels)
    start = 0
    for x, keys in observations(model, pixels, batch_size, seed):
        own = None if labels is None else labels[start : start + len(x)].to(x.device)
        yield model.given(own, validate=False), x, keys
        start += len(x)


def latent_noise(keys: Tensor, num_samples: int, latent_dim: int, start: int = 0) -> Tensor:
    """The noise of `num_samples` draws of z for each image, after `start` others: (K, N, L)."""
    return noise.normal_noise(keys, (num_samples, latent_dim), noise.LATENT, start * latent_dim).transpose(0, 1)  # (K, N, L)


def over_images(
    model: VAE,
    images: ImageSet | Tensor,
    batch_size: int,
    seed: int,
    measure: Callable[[VAE, Tensor, Tensor], tuple[Tensor, ...]],
) -> list[Tensor]:
    """What `measure(model, x, keys)` gives of each chunk, see `given_labels`, put together on the CPU: each (N, ...).

    Of a chunk nothing but this is read back from the device.
    """
    with evaluating(model):
        chunks = [[part.cpu() for part in measure(*chunk)] for chunk in given_labels(model, images, batch_size, seed)]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def heldout_elbo(model: VAE, images: ImageSet | Tensor, num_samples: int = 1, batch_size: int = 1000, seed: int = 0) -> ElboTerms:
    """`VAE.elbo` of every image of a set, in chunks and without a graph: terms of shape (N,), nats, on the CPU.

    Binarization and z come from noise that belongs to each image (`vaelib.noise`): the result depends on `seed`, but neither on
    the batch size nor on the order of the images.

    Args:
        images: an `ImageSet`, whose labels a conditional model is given, or ``uint8`` pixels (N, C, H, W).
        num_samples: draws of z per image.
        batch_size: images per chunk; num_samples * batch_size codes are decoded at once.
    """
    check_int("num_samples", num_samples)

    def measure(model: VAE, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        terms = model.elbo(x, num_samples, latent_noise(keys, num_samples, model.latent_dim), validate=False)
        return terms.log_likelihood, terms.kl

    return ElboTerms(*over_images(model, images, batch_size, seed, measure))
