"""What comes out of a trained model: samples of the prior, reconstructions, interpolations, the map of a 2-D latent plane."""

from __future__ import annotations

import torch
from torch import Tensor

from vaelib._validation import check_int, check_number, check_pixels, check_seed
from vaelib.vae import VAE, evaluating, observations


def decode_pixels(model: VAE, z: Tensor) -> Tensor:
    """The likelihood's mean at z as pixels: (N, L) -> (N, C, H, W) ``uint8``, on the CPU."""
    with evaluating(model):
        return model.likelihood.to_pixels(model.likelihood.mean(model.decode(z.to(model.device)))).cpu()


def generate(model: VAE, num_images: int, temperature: float = 1.0, seed: int | None = None) -> Tensor:
    """New images: z from the prior, decoded to the mean of p(x given z): (num_images, C, H, W) ``uint8``.

    Args:
        temperature: factor on the prior's standard deviation; below 1 the samples are more typical and less varied.
        seed: same seed, same images; None draws anew each time.
    """
    check_int("num_images", num_images)
    check_number("temperature", temperature)
    generator = None if seed is None else torch.Generator().manual_seed(check_seed("seed", seed))
    eps = temperature * torch.randn(num_images, model.latent_dim, generator=generator)
    with evaluating(model):
        return decode_pixels(model, model.sample_prior(eps.to(model.device)))


def reconstruct(model: VAE, pixels: Tensor, seed: int = 0) -> Tensor:
    """Each image encoded to its posterior mean and decoded again: ``uint8`` (N, C, H, W) -> the same; deterministic."""
    with evaluating(model):
        return torch.cat([decode_pixels(model, model.encode(x).mean) for x, _ in observations(model, pixels, 1000, seed)])


def interpolate(model: VAE, a: Tensor, b: Tensor, steps: int = 10, seed: int = 0) -> Tensor:
    """Decoded codes on the line from a's posterior mean to b's: two images (C, H, W) ``uint8`` -> (steps, C, H, W)."""
    check_int("steps", steps, minimum=2)
    ends = []
    with evaluating(model):
        for name, image in (("a", a), ("b", b)):
            image = check_pixels(
                name, image if not isinstance(image, Tensor) or image.dim() == 4 else image[None], model.image_shape
            )
            if len(image) != 1:
                raise ValueError(f"{name}: got {len(image)} images, expected one")
            ends += [model.encode(x).mean for x, _ in observations(model, image, 1, seed)]
    weight = torch.linspace(0, 1, steps, device=model.device)[:, None]
    return decode_pixels(model, torch.lerp(ends[0].expand(steps, -1), ends[1].expand(steps, -1), weight))


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
    points = torch.special.ndtri(torch.linspace(tail, 1 - tail, side))
    second, first = torch.meshgrid(points.flip(0), points, indexing="ij")
    return decode_pixels(model, torch.stack([first.flatten(), second.flatten()], dim=1))
