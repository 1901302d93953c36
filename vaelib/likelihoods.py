"""Observation models p(x given z): each owns the scaling of pixels, its inverse, and a density that sums or integrates to 1.

A likelihood turns ``uint8`` pixels into the model's x (`observe`), scores x under the decoder's output (`log_prob`, nats per
image, every constant kept), and leads back to pixels (`mean`, `sample`, `to_pixels`). The decoder's output is called
``params``: a tensor (N, P*C, H, W), P numbers per pixel and channel (`params_per_value`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib._validation import check_choice, check_int, check_number, check_observation, check_pixels, check_same_shape, describe


class Likelihood(nn.Module):
    """What every likelihood offers; a new one defines `observe`, `log_prob`, `mean`, `sample` and `to_pixels`.

    Attributes:
        params_per_value: how many numbers the decoder gives per pixel and channel.
        lowest: the smallest x that `observe` gives.
        highest: the largest.
        values: how many values x can take (2 or 256); None where x is continuous, so that bits/dim has no meaning.
        normalized: False only for scores that are no likelihood at all.
        config: the keyword arguments that build it again, with its ``name``.
    """

    params_per_value = 1
    lowest, highest = 0.0, 1.0
    values: int | None = 2
    normalized = True

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def observe(self, pixels: Tensor, generator: torch.Generator | None = None, uniform: Tensor | None = None) -> Tensor:
        """Pixels (N, C, H, W) ``uint8`` -> x (N, C, H, W) float32; here x = pixels / 127.5 - 1, in [-1, 1]."""
        check_pixels("pixels", pixels)
        return pixels.float() / 127.5 - 1

    def to_pixels(self, x: Tensor) -> Tensor:
        """x (or its mean) -> ``uint8`` pixels, rounded to the nearest level and clamped to 0..255."""
        level = (x - self.lowest) * (255 / (self.highest - self.lowest))
        return level.round().clamp(0, 255).to(torch.uint8)

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """log p(x given params), summed over pixels and channels: (N,), in nats."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """E[x] under params: (N, C, H, W)."""
        raise NotImplementedError

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw of x: (N, C, H, W)."""
        raise NotImplementedError

    def check(self, x: Tensor, params: Tensor, validate: bool) -> None:
        """ValueError unless x and params fit together; with `validate` the values of x are looked at too (NaN, range)."""
        check_observation("x", x)
        n, channels, *size = x.shape
        if params.shape != (n, self.params_per_value * channels, *size):
            expected = (n, self.params_per_value * channels, *size)
            raise ValueError(f"params: got {describe(params)}, expected shape {expected} for x of shape {tuple(x.shape)}")
        if validate:
            self.check_values(x)

    def check_values(self, x: Tensor) -> None:
        """ValueError where x holds a NaN or lies outside [lowest, highest]."""
        low, high = (value.item() for value in x.detach().aminmax())
        if math.isnan(low):  # aminmax gives NaN twice where there is one
            raise ValueError("x: got NaN, expected finite values")
        if low < self.lowest or high > self.highest:
            raise ValueError(
                f"x: got values in [{low:g}, {high:g}], expected [{self.lowest:g}, {self.highest:g}]; "
                "likelihood.observe(pixels) scales uint8 pixels"
            )


def binarize_by_draws(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """1 with probability pixel / 255, exactly: a whole number uniform on 0..254 is below the pixel that often."""
    return (torch.empty_like(pixels).random_(255, generator=generator) < pixels).float()


def binarize_by_bits(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """1 with probability pixel / 255 to within 2**-16, exactly at 0 and 255, in a sixth of the time on a CPU.

    Four pixels share one int64 draw, 16 bits each; 257 * pixel is pixel / 255 on the scale of 65535.
    """
    bits = torch.empty((pixels.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    below = bits.view(torch.int16)[: pixels.numel()].view(pixels.shape) < pixels.short() * 257 - 32768
    return (below | (pixels == 255)).float()


class Bernoulli(Likelihood):
    """Binary pixels; params are logits. eq. bernoulli-log-prob

    Args:
        binarize: ``"sample"``: x = 1 with probability pixel / 255, drawn anew at each call (dynamic binarization, the field's
            custom for MNIST since Salakhutdinov and Murray 2008); ``"threshold"``: x = 1 where the pixel is at least 128.
    """

    def __init__(self, binarize: str = "sample") -> None:
        super().__init__(name="bernoulli", binarize=check_choice("binarize", binarize, ("sample", "threshold")))
        self.binarize = binarize

    def observe(self, pixels: Tensor, generator: torch.Generator | None = None, uniform: Tensor | None = None) -> Tensor:
        """Pixels (N, C, H, W) ``uint8`` -> x in {0, 1}, float32.

        The draw comes from `uniform` (same shape, in [0, 1)) where it is given, else from `generator`.
        """
        check_pixels("pixels", pixels)
        if self.binarize == "threshold":
            return (pixels >= 128).float()
        if uniform is not None:
            check_same_shape(pixels=pixels, uniform=uniform)
            return (uniform < pixels / 255).float()
        draw = binarize_by_bits if pixels.device.type == "cpu" else binarize_by_draws
        return draw(pixels, generator)

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """Sum over pixels of x log p + (1 - x) log(1 - p), p = sigmoid(params): (N,), nats. eq. bernoulli-log-prob"""
        self.check(x, params, validate)
        return -F.binary_cross_entropy_with_logits(params, x, reduction="none").flatten(1).sum(1)

    def check_values(self, x: Tensor) -> None:
        super().check_values(x)
        if not torch.all((x == 0) | (x == 1)):
            raise ValueError(
                "x: got values between 0 and 1, expected only 0 and 1; likelihood.observe(pixels) binarizes uint8 pixels"
            )

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(params.sigmoid(), generator=generator)


class GreyBCENotALikelihood(Bernoulli):
    """The web's "BCE loss" on grey pixels in [0, 1]: it trains, but it is no log-density of x.

    The score exp(-BCE) does not integrate to 1 over [0, 1]; the missing factor is the normalizer of the continuous Bernoulli
    (Loaiza-Ganem and Cunningham 2019). Being linear in x, -BCE is the mean Bernoulli log-probability over binarizations of x.
    It stands here so that the book can measure it.
    """

    values = None
    normalized = False

    def __init__(self) -> None:
        super().__init__()
        self.config = {"name": "grey_bce_not_a_likelihood"}

    def observe(self, pixels: Tensor, generator: torch.Generator | None = None, uniform: Tensor | None = None) -> Tensor:
        """Pixels ``uint8`` -> x = pixels / 255, float32."""
        return check_pixels("pixels", pixels).float() / 255

    def check_values(self, x: Tensor) -> None:
        Likelihood.check_values(self, x)


class Gaussian(Likelihood):
    """Real-valued pixels with one standard deviation for all; params are means. eq. gaussian-log-prob

    x lies in [-1, 1] as `observe` gives it. Wider x is accepted up to +-10 (draws of the model overshoot); more looks like
    pixels that were never scaled and is refused.

    Args:
        scale: the standard deviation, in units of x (the start value where it is learned).
        learned: whether `fit` learns it as one shared parameter (the "sigma-VAE" of Rybkin et al. 2021).
    """

    lowest, highest = -1.0, 1.0
    values = None

    def __init__(self, scale: float = 1.0, learned: bool = False) -> None:
        check_number("scale", scale, exclusive=True)
        super().__init__(name="gaussian", scale=scale, learned=learned)
        log_scale = torch.tensor(math.log(scale))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """Sum over pixels of log N(x; params, scale^2): (N,), nats, with every constant. eq. gaussian-log-prob"""
        self.check(x, params, validate)
        error = (x - params) * (-self.log_scale).exp()
        return -(0.5 * error**2 + self.log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def check_values(self, x: Tensor) -> None:
        if not torch.all(x.detach().abs() <= 10):  # False for NaN too
            raise ValueError(
                "x: got NaN or values beyond +-10, expected x on the scale [-1, 1]; likelihood.observe(pixels) scales uint8 pixels"
            )

    def mean(self, params: Tensor) -> Tensor:
        return params

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(params.shape, generator=generator, device=params.device, dtype=params.dtype)
        return params + self.log_scale.exp() * noise


class DiscretizedLogistic(Likelihood):
    """256 grey levels, each the mass that a logistic density puts on the level's bin. eq. discretized-logistic-log-prob

    x = level / 127.5 - 1; level k owns the bin ((2k - 256) / 255, (2k - 254) / 255]; level 0 owns everything below its bin too,
    level 255 everything above. params hold the location and the log-scale, both in units of x, along the channel axis.
    The log-scale is clamped to [-7, 7], as in PixelCNN++ (Salimans et al. 2017) below: exp(-7) is a ninth of a bin.
    """

    params_per_value = 2
    lowest, highest = -1.0, 1.0
    values = 256
    min_log_scale, max_log_scale = -7.0, 7.0

    def __init__(self) -> None:
        super().__init__(name="discretized_logistic")

    def check_values(self, x: Tensor) -> None:
        super().check_values(x)
        level = (x.detach() + 1) * 127.5
        if not torch.all((level - level.round()).abs() < 0.01):
            raise ValueError(
                "x: got values between the 256 levels, expected level / 127.5 - 1; likelihood.observe(pixels) gives them"
            )

    def location_and_inverse_scale(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """params (N, 2C, H, W) -> location and 1 / scale, each (N, C, H, W)."""
        location, log_scale = params.chunk(2, dim=1)
        return location, (-log_scale.clamp(self.min_log_scale, self.max_log_scale)).exp()

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """Sum over pixels of log P(level): (N,), nats. eq. discretized-logistic-log-prob

        With a, b the standardized upper and lower edge of the bin,
        sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), of which each log is stable.
        """
        self.check(x, params, validate)
        location, inverse_scale = self.location_and_inverse_scale(params)
        level = ((x + 1) * 127.5).round()
        a = ((2 * level - 254) / 255 - location) * inverse_scale
        b = ((2 * level - 256) / 255 - location) * inverse_scale
        below_top, above_bottom = level < 255, level > 0
        log_width = torch.log(-torch.expm1(-(2 / 255) * inverse_scale))  # log(1 - exp(b - a))
        log_mass = (
            torch.where(below_top, F.logsigmoid(a), 0.0)
            + torch.where(above_bottom, F.logsigmoid(-b), 0.0)
            + torch.where(below_top & above_bottom, log_width, 0.0)
        )
        return log_mass.flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """E[x] = -1 + (2/255) * (sum over the 255 inner edges of P(x above the edge))."""
        location, inverse_scale = self.location_and_inverse_scale(params)
        total = torch.zeros_like(location)
        for level in range(255):
            total += torch.sigmoid((location - (2 * level - 254) / 255) * inverse_scale)
        return total * (2 / 255) - 1

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        location, inverse_scale = self.location_and_inverse_scale(params)
        u = torch.rand(location.shape, generator=generator, device=params.device, dtype=params.dtype)
        continuous = location + (u.log() - (-u).log1p()) / inverse_scale
        return ((continuous + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


LIKELIHOODS = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
    "grey_bce_not_a_likelihood": GreyBCENotALikelihood,
}


def make_likelihood(spec: str | dict[str, Any] | Likelihood) -> Likelihood:
    """A likelihood from its name, from its config (``{"name": "gaussian", "scale": 0.1}``), or as it is.

    Raises:
        ValueError: For an unknown name (with the nearest one) or an argument that the likelihood does not have.
    """
    if isinstance(spec, Likelihood):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, dict):
        raise ValueError(f"likelihood: got {describe(spec)}, expected a name, a config or a Likelihood")
    arguments = dict(spec)
    name = check_choice("likelihood", arguments.pop("name", None), LIKELIHOODS)
    try:
        return LIKELIHOODS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"likelihood: got arguments {arguments}, which {name!r} does not take") from error


def bits_per_dim(log_prob: Tensor | float, num_dims: int, likelihood: Likelihood) -> Tensor | float:
    """Nats per image -> bits per dimension, -log_prob / (num_dims log 2). eq. bits-per-dim

    Raises:
        ValueError: If the likelihood is a density over real x, or no likelihood: then the number would have no meaning.
    """
    check_int("num_dims", num_dims)
    if likelihood.values is None:
        raise ValueError(
            f"likelihood: got {likelihood.config['name']!r}, expected one over discrete values; bits/dim has no meaning here"
        )
    return -log_prob / (num_dims * math.log(2))
