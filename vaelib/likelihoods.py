"""Observation models p(x given z): each owns the scaling of pixels, its inverse, and a density that sums or integrates to 1.

A likelihood turns ``uint8`` pixels into the model's x (`observe`), scores x under the decoder's output (`log_prob`, nats per
image, every constant kept), and leads back to pixels (`mean`, `sample`, `to_pixels`). The decoder's output is called
``params``: a tensor (N, param_channels(C), H, W) (`Likelihood.param_channels`). Params in bfloat16 or float16, as autocast gives
them, are taken to float32 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib._validation import (
    check_choice,
    check_flag,
    check_int,
    check_number,
    check_observation,
    check_pixels,
    check_same_shape,
    describe,
    plain,
)

T = TypeVar("T", float, Tensor)
L = TypeVar("L", bound="Likelihood")


class Likelihood(nn.Module):
    """What every likelihood offers; a new one defines `observe`, `log_prob`, `mean`, `sample` and `to_pixels`.

    Attributes:
        params_per_value: how many numbers the decoder gives per pixel and channel; None where that depends on the channels.
        lowest: the smallest x that `observe` gives.
        highest: the largest.
        values: how many values x can take (2 or 256); None where x is continuous, so that bits/dim has no meaning.
        normalized: False only for scores that are no likelihood at all.
        config: the keyword arguments that build it again, with its ``name``.
    """

    params_per_value: int | None = 1
    lowest, highest = 0.0, 1.0
    values: int | None = 2
    normalized = True

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = plain(config)

    def param_channels(self, channels: int) -> int:
        """How many numbers the decoder gives per pixel of an image with `channels` channels."""
        return self.params_per_value * channels  # type: ignore[operator]  # None only where this method is another

    def observe(self, pixels: Tensor, generator: torch.Generator | None = None, uniform: Tensor | None = None) -> Tensor:
        """Pixels (N, C, H, W) ``uint8`` -> x (N, C, H, W) float32; here x = pixels / 127.5 - 1, in [-1, 1]."""
        return check_pixels("pixels", pixels).float() / 127.5 - 1

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

    def check(self, x: Tensor, params: Tensor, validate: bool) -> Tensor:
        """`params`, in float32 at least, if x and params fit together; with `validate` the values of x are looked at too.

        Raises:
            ValueError: For another shape, a NaN in x or an x out of range.
        """
        check_observation("x", x)
        n, channels, *size = x.shape
        expected = (n, self.param_channels(channels), *size)
        if params.shape != expected:
            raise ValueError(f"params: got {describe(params)}, expected shape {expected} for x of shape {tuple(x.shape)}")
        if validate:
            self.check_values(x)
        return at_least_float32(params)

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


def at_least_float32(params: Tensor) -> Tensor:
    """bfloat16 and float16 -> float32, whose digits a log-likelihood needs; float32 and float64 stay as they are."""
    return params.to(torch.promote_types(params.dtype, torch.float32))


def binarize_by_draws(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """1 with probability pixel / 255, exactly: a whole number uniform on 0..254 is below the pixel that often."""
    return (torch.empty_like(pixels).random_(255, generator=generator) < pixels).float()


def binarize_by_bits(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """1 with probability pixel / 255 to within 2**-16, exactly at 0 and 255, in less than half the time on a CPU.

    Four pixels share one int64 draw, 16 bits each; 257 * pixel is pixel / 255 on the scale of 65535. That the largest of the
    65536 values is lowered by one makes 255 exact, and changes no other pixel.
    """
    bits = torch.empty((pixels.numel() + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)
    bits = bits.view(torch.int16)[: pixels.numel()].view(pixels.shape).clamp_(max=32766)
    return bits.lt_(pixels.short().mul_(257).sub_(32768)).float()


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
        pixels = check_pixels("pixels", pixels)
        if self.binarize == "threshold":
            return (pixels >= 128).float()
        if uniform is not None:
            check_same_shape(pixels=pixels, uniform=uniform)
            return (uniform < pixels / 255).float()
        draw = binarize_by_bits if pixels.device.type == "cpu" else binarize_by_draws
        return draw(pixels, generator)

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """Sum over pixels of x log p + (1 - x) log(1 - p), p = sigmoid(params): (N,), nats. eq. bernoulli-log-prob"""
        params = self.check(x, params, validate)
        return -F.binary_cross_entropy_with_logits(params, x, reduction="none").flatten(1).sum(1)

    def check_values(self, x: Tensor) -> None:
        super().check_values(x)
        if not torch.all((x == 0) | (x == 1)):
            raise ValueError(
                "x: got values between 0 and 1, expected only 0 and 1; likelihood.observe(pixels) binarizes uint8 pixels"
            )

    def mean(self, params: Tensor) -> Tensor:
        return at_least_float32(params).sigmoid()

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(params), generator=generator)


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


def check_grey_levels(x: Tensor) -> None:
    """ValueError where x, known to be in [-1, 1], lies between the 256 levels."""
    level = (x.detach() + 1) * 127.5
    if not torch.all((level - level.round()).abs() < 0.01):
        raise ValueError("x: got values between the 256 levels, expected level / 127.5 - 1; likelihood.observe(pixels) gives them")


def nearest_level(x: Tensor) -> Tensor:
    """Real x -> the nearest of the 256 levels, level / 127.5 - 1."""
    return ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def level_bins(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = level / 127.5 - 1 -> the lower and the upper edge of the level's bin, and whether each bounds it, in the shape of x.

    Level k owns the bin ((2k - 256) / 255, (2k - 254) / 255]; level 0 owns everything below its bin too, level 255 everything
    above. Neighbours share an edge to the last bit, so that their masses add up.
    """
    level = ((x + 1) * 127.5).round()
    return (2 * level - 256) / 255, (2 * level - 254) / 255, level > 0, level < 255


def mean_of_levels(probability_above: Callable[[float], Tensor]) -> Tensor:
    """E[x] = -1 + (2/255) * (sum over the 255 inner edges of P(x above the edge)), exact."""
    return sum(probability_above((2 * level - 254) / 255) for level in range(255)) * (2 / 255) - 1  # type: ignore[return-value]


def gaussian_log_mass(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of the mass that N(mean, scale^2) puts on the bin of the level x: elementwise, nats.

    In units of sqrt(2) scale from the mean, the bin is mirrored to the side above it: edges near < far, middle c, width w. Its mass
    is (erf(far) - erf(near)) / 2 where it holds the mean, else exp(-near^2) (erfcx(near) - exp(-gap) erfcx(far)) / 2 with
    gap = far^2 - near^2 = 2 c w. Where both differences are small they have too few digits; there the midpoint rule with its
    first correction, w exp(-c^2 + (2 c^2 - 1) w^2 / 12) / sqrt(pi), is exact to 1e-7.
    """
    lower, upper, above_bottom, below_top = level_bins(x)
    unit = math.sqrt(0.5) * (-log_scale).exp()
    lower, upper, w = (lower - mean) * unit, (upper - mean) * unit, (2 / 255) * unit
    inner = above_bottom & below_top
    mirrored = torch.where(inner, lower + upper < 0, below_top)  # level 0 always, level 255 never: their far edge is infinite
    near, far = torch.where(mirrored, -upper, lower), torch.where(mirrored, -lower, upper)
    c = (0.5 * (lower + upper)).abs()
    gap = 2 * c * w
    narrow = inner & (gap < 0.1) & (w < 0.07)
    tail = near.clamp(min=0)
    beyond = torch.special.erfcx(tail) - torch.where(inner, (-gap).exp() * torch.special.erfcx(far.clamp(min=0)), 0.0)
    around = torch.where(inner, far.erf(), 1.0) - near.erf()
    wide = torch.where(narrow, 1.0, torch.where(near > 0, beyond, around))  # 1: no log of 0 where it is not used
    midpoint = w.log() - c**2 + (2 * c**2 - 1) * w**2 / 12 - 0.5 * math.log(math.pi)
    return torch.where(narrow, midpoint, (0.5 * wide).log() - tail**2)


def logistic_inverse_scale(log_scale: Tensor) -> Tensor:
    """1 / scale; log-scale clamped to [-7, 7], as in PixelCNN++ (Salimans et al. 2017) below: exp(-7) is a ninth of a bin."""
    return (-log_scale.clamp(-7, 7)).exp()


def logistic_log_mass(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """Log of the mass that a logistic density puts on the bin of the level x: elementwise, nats.

    With a, b the standardized upper and lower edge of the bin,
    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), of which each log is stable.
    """
    lower, upper, above_bottom, below_top = level_bins(x)
    inverse_scale = logistic_inverse_scale(log_scale)
    a, b = (upper - location) * inverse_scale, (lower - location) * inverse_scale
    log_width = torch.log(-torch.expm1(-(2 / 255) * inverse_scale))  # log(1 - exp(b - a))
    return (
        torch.where(below_top, F.logsigmoid(a), 0.0)
        + torch.where(above_bottom, F.logsigmoid(-b), 0.0)
        + torch.where(below_top & above_bottom, log_width, 0.0)
    )


def logistic_level(location: Tensor, log_scale: Tensor, generator: torch.Generator | None) -> Tensor:
    """A draw of the logistic density, rounded to the nearest level: elementwise."""
    u = torch.rand(location.shape, generator=generator, device=location.device, dtype=location.dtype)
    return nearest_level(location + (u.log() - (-u).log1p()) / logistic_inverse_scale(log_scale))


def clamped_logistic_mean(location: Tensor, log_scale: Tensor) -> Tensor:
    """E[clamp(y, -1, 1)] for a logistic y: elementwise; less than half a level from the mean of the 256 levels, at 1/255 the cost.

    It is 1 - s (softplus((1 - m) / s) - softplus((-1 - m) / s)), in a form that keeps its digits far outside [-1, 1].
    """
    inverse_scale = logistic_inverse_scale(log_scale)
    above, below = F.softplus(-(location + 1).abs() * inverse_scale), F.softplus(-(location - 1).abs() * inverse_scale)
    return location.clamp(-1, 1) + (above - below) / inverse_scale


class Gaussian(Likelihood):
    """Gaussian pixels with one standard deviation for all; params are means. eq. gaussian-log-prob

    Real-valued x lies in [-1, 1] as `observe` gives it. Wider x is accepted up to +-10 (draws of the model overshoot); more looks
    like pixels that were never scaled and is refused. Discretized, it is a distribution over the 256 levels, each with the mass
    of its bin (`level_bins`), so that bits/dim has a meaning; x is then refused between the levels. eq. discretized-gaussian-log-prob

    Args:
        scale: the standard deviation, in units of x (the start value where it is learned).
        learned: whether `fit` learns it as one shared parameter (the "sigma-VAE" of Rybkin et al. 2021); its best value is the
            root mean squared error, eq. optimal-scale
        discretized: whether x is one of the 256 levels instead of a real number.
    """

    lowest, highest = -1.0, 1.0
    values = None

    def __init__(self, scale: float = 1.0, learned: bool = False, discretized: bool = False) -> None:
        check_number("scale", scale, exclusive=True)
        learned, discretized = check_flag("learned", learned), check_flag("discretized", discretized)
        super().__init__(name="gaussian", scale=scale, learned=learned)
        if discretized:  # only then: `load` wants configs written before this argument unchanged
            self.config["discretized"] = True
            self.values = 256
        self.discretized = discretized
        log_scale = torch.tensor(math.log(scale))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """Sum over pixels of log N(x; params, scale^2), or of the log mass of its bin: (N,), nats, with every constant.

        eq. gaussian-log-prob
        """
        params = self.check(x, params, validate)
        if self.discretized:
            return gaussian_log_mass(x, params, self.log_scale).flatten(1).sum(1)
        error = (x - params) * (-self.log_scale).exp()
        return -(0.5 * error**2 + self.log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def check_values(self, x: Tensor) -> None:
        if self.discretized:
            super().check_values(x)
            check_grey_levels(x)
        elif not torch.all(x.detach().abs() <= 10):  # False for NaN too
            raise ValueError(
                "x: got NaN or values beyond +-10, expected x on the scale [-1, 1]; likelihood.observe(pixels) scales uint8 pixels"
            )

    def mean(self, params: Tensor) -> Tensor:
        """E[x]: params; discretized, the exact mean of the 256 levels, which the tails that levels 0 and 255 own pull inwards."""
        params = at_least_float32(params)
        if not self.discretized:
            return params
        inverse_scale = (-self.log_scale).exp()
        return mean_of_levels(lambda edge: torch.special.ndtr((params - edge) * inverse_scale))

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        params = at_least_float32(params)
        noise = torch.randn(params.shape, generator=generator, device=params.device, dtype=params.dtype)
        draw = params + self.log_scale.exp() * noise
        return nearest_level(draw) if self.discretized else draw


class DiscretizedLogistic(Likelihood):
    """256 grey levels, each the mass that a logistic density puts on the level's bin. eq. discretized-logistic-log-prob

    x = level / 127.5 - 1; `level_bins` has the bins. params hold the location and the log-scale, both in units of x, along the
    channel axis. The log-scale is clamped to [-7, 7].
    """

    params_per_value = 2
    lowest, highest = -1.0, 1.0
    values = 256

    def __init__(self) -> None:
        super().__init__(name="discretized_logistic")

    def check_values(self, x: Tensor) -> None:
        super().check_values(x)
        check_grey_levels(x)

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """Sum over pixels of log P(level): (N,), nats. eq. discretized-logistic-log-prob"""
        location, log_scale = self.check(x, params, validate).chunk(2, dim=1)  # each (N, C, H, W)
        return logistic_log_mass(x, location, log_scale).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """E[x], the exact mean of the 256 levels."""
        location, log_scale = at_least_float32(params).chunk(2, dim=1)
        inverse_scale = logistic_inverse_scale(log_scale)
        return mean_of_levels(lambda edge: torch.sigmoid((location - edge) * inverse_scale))

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        location, log_scale = at_least_float32(params).chunk(2, dim=1)
        return logistic_level(location, log_scale, generator)


class DiscretizedLogisticMixture(Likelihood):
    """Per pixel a mixture of K discretized logistics that the channels share, as in PixelCNN++ (Salimans et al. 2017).

    eq. logistic-mixture-log-prob

    p(x) = sum over j of pi_j prod over c of P(x_c; location m_jc + sum over c' < c of a_jcc' x_c', log-scale s_jc): channel c
    depends linearly on the channels before it. The J * (C + 1)(C + 2) / 2 params of a pixel with C channels are rows of J numbers
    (one per component), one after the other along the channel axis:

    - 1 row of mixture logits: pi = softmax over j;
    - C rows of locations m, in units of x;
    - C rows of log-scales s, clamped to [-7, 7];
    - C(C - 1)/2 rows of coefficients, a = tanh(row), for (c, c') = (1, 0), (2, 0), (2, 1), (3, 0), ...

    Args:
        num_mixtures: J.
    """

    params_per_value = None
    lowest, highest = -1.0, 1.0
    values = 256

    def __init__(self, num_mixtures: int = 10) -> None:
        super().__init__(name="discretized_logistic_mixture", num_mixtures=check_int("num_mixtures", num_mixtures))
        self.num_mixtures: int = self.config["num_mixtures"]

    def param_channels(self, channels: int) -> int:
        return self.num_mixtures * (channels + 1) * (channels + 2) // 2

    def check_values(self, x: Tensor) -> None:
        super().check_values(x)
        check_grey_levels(x)

    def split(self, params: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, tuple[Tensor, ...]]]]:
        """params -> the mixture logits, and per channel c its location, log-scale and c coefficients, each (N, J, H, W).

        Raises:
            ValueError: If no C has so many params.
        """
        channels = (math.isqrt(8 * (params.shape[1] // self.num_mixtures) + 1) - 3) // 2  # of (C + 1)(C + 2) / 2 rows
        if channels < 1 or params.shape[1] != self.param_channels(channels):
            raise ValueError(
                f"params: got {describe(params)}, expected {self.num_mixtures} * (C + 1)(C + 2) / 2 channels for some C"
            )
        params = at_least_float32(params).contiguous()  # else each row lies scattered where the channels are innermost
        logits, *rows = params.unflatten(1, (-1, self.num_mixtures)).unbind(1)  # each (N, J, H, W)
        locations, log_scales, rows = rows[:channels], rows[channels : 2 * channels], rows[2 * channels :]
        coefficients = [tuple(row.tanh() for row in rows[c * (c - 1) // 2 : c * (c + 1) // 2]) for c in range(channels)]
        return logits, list(zip(locations, log_scales, coefficients, strict=True))

    @staticmethod
    def shift(location: Tensor, coefficients: Sequence[Tensor], earlier: Sequence[Tensor]) -> Tensor:
        """The location given the earlier channels: (N, K, H, W)."""
        return location + sum(a * value for a, value in zip(coefficients, earlier, strict=True))

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """Sum over pixels of log sum over k of pi_k P(the pixel's levels; component k): (N,), nats."""
        logits, channels = self.split(self.check(x, params, validate))
        values = x.split(1, dim=1)  # C of (N, 1, H, W)
        log_joint = logits.log_softmax(1)  # (N, J, H, W)
        for c, (location, log_scale, coefficients) in enumerate(channels):
            log_joint = log_joint + logistic_log_mass(values[c], self.shift(location, coefficients, values[:c]), log_scale)
        return log_joint.logsumexp(1).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """Approximate E[x]: the components' means, weighted by pi, where earlier channels enter through their component's mean.

        A component's mean is that of a clamped logistic, less than half a level from that of its 256 levels. That earlier channels
        enter as means is exact but for the clamping: it ignores their spread where that reaches beyond -1 or 1.
        """
        logits, channels = self.split(params)
        means: list[Tensor] = []
        for location, log_scale, coefficients in channels:
            means.append(clamped_logistic_mean(self.shift(location, coefficients, means), log_scale))
        return (logits.softmax(1).unsqueeze(1) * torch.stack(means, 1)).sum(2)  # sum over J of (N, C, J, H, W)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One exact draw of x (N, C, H, W): a component for each pixel, then its channels in order."""
        logits, channels = self.split(params)
        # of exponential clocks with rates pi_k, the k-th rings first with probability pi_k
        component = (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(1, keepdim=True)
        values: list[Tensor] = []
        for location, log_scale, coefficients in channels:
            location = self.shift(location, coefficients, values).gather(1, component)  # (N, 1, H, W)
            values.append(logistic_level(location, log_scale.gather(1, component), generator))
        return torch.cat(values, 1)  # (N, C, H, W)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discretized_logistic": DiscretizedLogistic,
    "discretized_logistic_mixture": DiscretizedLogisticMixture,
    "grey_bce_not_a_likelihood": GreyBCENotALikelihood,
}


def register_likelihood(name: str) -> Callable[[type[L]], type[L]]:
    """A decorator: the class becomes the likelihood `name`, for `make_likelihood`, the builders of models, `save` and `load`.

    The class hands its arguments on, ``super().__init__(name=name, scale=scale)``: they are its config.

    Raises:
        ValueError: If another class has the name.
    """

    def register(cls: type[L]) -> type[L]:
        if (known := LIKELIHOODS.get(name, cls)).__qualname__ != cls.__qualname__:  # the same one again: a cell that was run twice
            raise ValueError(f"name: got {name!r}, which is {known.__qualname__}, expected a name that no likelihood has")
        LIKELIHOODS[name] = cls
        return cls

    return register


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


def bits_per_dim(log_prob: T, num_dims: int, likelihood: Likelihood) -> T:
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
