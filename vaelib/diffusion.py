"""Diffusion as a VAE: many layers of latents, an encoder that only adds noise, and one network that takes it away at every level.

x is what is noised, as a rule codes of a VAE, flat and standardized. At the time t, from 0 to 1, it is x_t = alpha x + sigma eps with
alpha^2 + sigma^2 = 1, and a `Schedule` says log(alpha^2 / sigma^2), the log-SNR. Everything else is a function of the log-SNR.
Sohl-Dickstein et al. 2015; Ho, Jain and Abbeel 2020; as bounds: Kingma, Salimans, Poole and Ho 2021, "Variational diffusion models".
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vaelib import noise
from vaelib._validation import as_path, check_choice, check_int, check_number, check_seed, describe
from vaelib.data import ImageSet
from vaelib.graphs import Replayed
from vaelib.heldout import evaluating
from vaelib.objectives import gaussian_kl
from vaelib.priors import codes_to_fit
from vaelib.storage import atomic, write_tensors
from vaelib.vae import VAE

Denoiser = Callable[[Tensor, Tensor], Tensor]  # x_t (N, L) and its log-SNR (N,) -> the noise in it, (N, L)
SCHEDULES = ("linear", "cosine", "flow")
PARAMETERIZATIONS = ("eps", "x", "v", "flow")
WEIGHTINGS = ("simple", "elbo")
UNLABELLED = 0.15  # of the labels in training


class Schedule(NamedTuple):
    """The log-SNR as a function of the time, falling from `high` at t = 0 to `low` at t = 1.

    Attributes:
        name: ``"linear"`` in t; ``"cosine"``, alpha = cos(pi t / 2) (Nichol and Dhariwal 2021); ``"flow"``, alpha / sigma = (1 - t) / t,
            the straight lines of flow matching (Lipman et al. 2023; Liu et al. 2023). The last two are cut at the ends.
    """

    name: str = "cosine"
    low: float = -10.0
    high: float = 10.0

    def __call__(self, t: Tensor) -> Tensor:
        """Times -> log-SNRs, of one shape."""
        if self.name == "linear":
            return self.high + (self.low - self.high) * t
        inner = self.inner(t)
        return -2 * ((math.pi / 2 * inner).tan().log() if self.name == "cosine" else inner.log() - (1 - inner).log())

    def inner(self, t: Tensor) -> Tensor:
        """The time of the schedule that is not cut: at it sigma / alpha is tan(pi t / 2), or t / (1 - t)."""
        ends = [math.exp(-end / 2) for end in (self.high, self.low)]  # sigma / alpha
        first, last = (2 / math.pi * math.atan(end) if self.name == "cosine" else end / (1 + end) for end in ends)
        return first + (last - first) * t

    def slope(self, t: Tensor) -> Tensor:
        """The derivative of the log-SNR in t, below 0."""
        if self.name == "linear":
            return torch.full_like(t, self.low - self.high)
        inner, width = self.inner(t), self.inner(torch.ones_like(t)) - self.inner(torch.zeros_like(t))
        rate = math.pi / (math.pi * inner).sin() if self.name == "cosine" else 1 / (inner * (1 - inner))
        return -2 * width * rate


def make_schedule(name: str, low: float = -10.0, high: float = 10.0) -> Schedule:
    """A `Schedule`; ValueError for a name that none has, or ends that do not lie below and above 0."""
    check_choice("schedule", name, SCHEDULES)
    if not (math.isfinite(low) and math.isfinite(high) and low < 0 < high):
        raise ValueError(f"low, high: got {low} and {high}, expected log-SNRs below and above 0")
    return Schedule(name, float(low), float(high))


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """The factors on x and on the noise at log-SNRs (N,): each (N, 1). Their squares add up to 1."""
    return log_snr.sigmoid().sqrt()[..., None], (-log_snr).sigmoid().sqrt()[..., None]


def noised(x: Tensor, log_snr: Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha x + sigma eps, a draw of the encoder q(x_t given x): (N, L), (N,), (N, L) -> (N, L). eq. diffusion-marginal"""
    alpha, sigma = alpha_sigma(log_snr)
    return alpha * x + sigma * eps


def target_of(parameterization: str, x: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """What a network of this parameterization should give at x_t: eps; x; v = alpha eps - sigma x; or eps - x, the way that x flows.

    v: Salimans and Ho 2022. eps - x: flow matching, whose lines are straight in x_t / (alpha + sigma).
    """
    alpha, sigma = alpha_sigma(log_snr)
    return {"eps": eps, "x": x, "v": alpha * eps - sigma * x, "flow": eps - x}[parameterization]


def noise_of(parameterization: str, output: Tensor, x_t: Tensor, log_snr: Tensor) -> Tensor:
    """The noise in x_t, as a network of this parameterization says it by its output: (N, L)."""
    alpha, sigma = alpha_sigma(log_snr)
    if parameterization == "eps":
        return output
    if parameterization == "x":
        return (x_t - alpha * output) / sigma
    return sigma * x_t + alpha * output if parameterization == "v" else (x_t + alpha * output) / (alpha + sigma)


def noise_weight(parameterization: str, log_snr: Tensor) -> Tensor:
    """What the output's squared error is multiplied by to give that of eps: (N,) -> (N,). So parameterizations differ by a weight."""
    alpha, sigma = (factor[..., 0] for factor in alpha_sigma(log_snr))
    root = {"eps": torch.ones_like(alpha), "x": alpha / sigma, "v": alpha, "flow": alpha / (alpha + sigma)}
    return root[parameterization].square()


def clean_of(x_t: Tensor, log_snr: Tensor, eps: Tensor) -> Tensor:
    """The x that x_t comes from, if eps is its noise: (N, L)."""
    alpha, sigma = alpha_sigma(log_snr)
    return (x_t - sigma * eps) / alpha


class Frequencies(nn.Module):
    """Sines and cosines of the log-SNR, and two layers: (N,) -> (N, width); a label adds its own vector, the last one means none."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.labels = nn.Embedding(num_classes + 1, width)
        self.layers = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, log_snr: Tensor, labels: Tensor | None) -> Tensor:
        angles = log_snr[:, None] * torch.logspace(-2, 0.5, 16, device=log_snr.device)
        none = torch.full_like(log_snr, self.labels.num_embeddings - 1, dtype=torch.int64)
        told: Tensor = self.layers(torch.cat([angles.sin(), angles.cos()], 1)) + self.labels(none if labels is None else labels)
        return F.silu(told)


class MLPDenoiser(nn.Module):
    """x_t (N, L), log-SNR (N,) and labels (N,) or None -> (N, L): residual layers for codes of shape (L,), which are vectors."""

    def __init__(self, shape: Sequence[int], width: int = 512, depth: int = 3, num_classes: int = 0) -> None:
        super().__init__()
        (dim,) = shape
        self.config: dict[str, Any] = {"shape": [dim], "width": width, "depth": depth, "num_classes": num_classes}
        self.told = Frequencies(128, num_classes)
        self.enter, self.leave = nn.Linear(dim, width), nn.Linear(width, dim)
        self.blocks: Any = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(128, 2 * width), nn.Linear(width, width)])
            for _ in range(depth)
        )
        nn.init.zeros_(self.leave.weight)

    def forward(self, x_t: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        told, h = self.told(log_snr, labels), self.enter(x_t)
        for norm, first, shift, last in self.blocks:
            scale, offset = shift(told).chunk(2, 1)
            h = h + last(F.silu(first(norm(h) * (1 + scale) + offset)))
        out: Tensor = self.leave(F.silu(h))
        return out


class MapBlock(nn.Module):
    """A residual block of 3x3 convolutions, told of the noise level and the label after each normalization."""

    def __init__(self, fan_in: int, fan_out: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for channels in (fan_in, fan_out))
        self.layers = nn.ModuleList(nn.Conv2d(channels, fan_out, 3, padding=1) for channels in (fan_in, fan_out))
        self.shift, self.skip = nn.Linear(width, 2 * fan_out), nn.Conv2d(fan_in, fan_out, 1)
        nn.init.zeros_(self.layers[1].weight)  # type: ignore[arg-type]

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, offset = self.shift(told)[..., None, None].chunk(2, 1)
        change = self.layers[0](F.silu(self.norms[0](h)))
        change = self.layers[1](F.silu(self.norms[1](change) * (1 + scale) + offset))
        out: Tensor = self.skip(h) + change
        return out


class MapDenoiser(nn.Module):
    """The same for codes (C, h, w) laid out in space, flat as the library has them: a U-net of two resolutions, attention at the lower.

    Args:
        shape: (C, h, w).
        width: channels at the higher resolution, a multiple of 8; twice as many at the lower.
    """

    def __init__(self, shape: Sequence[int], width: int = 128, depth: int = 2, num_classes: int = 0) -> None:
        super().__init__()
        if len(shape) != 3 or width % 8:
            raise ValueError(f"shape, width: got {tuple(shape)} and {width}, expected (C, h, w) and a multiple of 8")
        self.shape, wide = tuple(shape), 2 * width
        self.config: dict[str, Any] = {"shape": list(shape), "width": width, "depth": depth, "num_classes": num_classes}
        self.told = Frequencies(wide, num_classes)
        self.enter = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down = nn.ModuleList(MapBlock(width, width, wide) for _ in range(depth))
        self.middle = nn.ModuleList(MapBlock(width if i == 0 else wide, wide, wide) for i in range(depth))
        self.norm, self.attention = nn.GroupNorm(8, wide), nn.MultiheadAttention(wide, 4, batch_first=True)
        self.up = nn.ModuleList(MapBlock(width + wide if i == 0 else width, width, wide) for i in range(depth))
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, shape[0], 3, padding=1))
        nn.init.zeros_(self.leave[2].weight)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, log_snr: Tensor, labels: Tensor | None = None) -> Tensor:
        told, h = self.told(log_snr, labels), self.enter(x_t.unflatten(1, self.shape))
        for block in self.down:
            h = block(h, told)
        low = F.avg_pool2d(h, 2, ceil_mode=True)
        for block in self.middle:
            low = block(low, told)
        places = self.norm(low).flatten(2).transpose(1, 2)  # (N, h * w / 4, wide)
        low = low + self.attention(places, places, places, need_weights=False)[0].transpose(1, 2).view_as(low)
        h = torch.cat([h, F.interpolate(low, h.shape[2:])], 1)
        for block in self.up:
            h = block(h, told)
        out: Tensor = self.leave(h).flatten(1)
        return out


NoiseNetwork = MLPDenoiser | MapDenoiser


def denoising_loss(
    network: Callable[..., Tensor],
    schedule: Schedule,
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    labels: Tensor | None = None,
    parameterization: str = "eps",
    weighting: str = "elbo",
) -> Tensor:
    """What a network is trained by: x (N, L), times (N,), noise (N, L) -> (N,).

    With the weighting ``"elbo"`` its mean over times is the sum over noise levels of eq. diffusion-continuous, in nats, whatever the
    parameterization. ``"simple"`` is the output's mean squared error without a weight (Ho et al. 2020), which asks less of small noise.
    """
    log_snr = schedule(t)
    x_t = noised(x, log_snr, eps)
    error = (target_of(parameterization, x, eps, log_snr) - network(x_t, log_snr, labels)).square()
    if weighting == "simple":
        return error.mean(1)
    return -0.5 * schedule.slope(t) * noise_weight(parameterization, log_snr) * error.sum(1)


class DiffusionTerms(NamedTuple):
    """The three terms of the bound, each (N,), nats. eq. diffusion-elbo

    Attributes:
        prior_kl: KL(q(x_1 given x) || N(0, I)): what is left of x under the most noise; no network has a part in it.
        levels: the sum over the noise levels of KL(q(x_s given x_t, x) || p(x_s given x_t)).
        log_likelihood: E[log p(x given x_0)], x_0 having the least noise.
    """

    prior_kl: Tensor
    levels: Tensor
    log_likelihood: Tensor

    @property
    def elbo(self) -> Tensor:
        """The bound on log p(x), (N,), nats."""
        return self.log_likelihood - self.levels - self.prior_kl


def spread_times(num: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`num` times in [0, 1) for each of `count`, one in each of `num` equal parts: (num, count), on the CPU; each alone is uniform."""
    offset = torch.rand(count, generator=generator, device="cpu")
    return (torch.arange(num, device="cpu")[:, None] + offset) / num


def level_kl(error: Tensor, log_snr_s: Tensor, log_snr_t: Tensor) -> Tensor:
    """KL(q(x_s given x_t, x) || p(x_s given x_t)) of one step, whose two Gaussians differ in their means alone: (N,), nats.

    Args:
        error: the squared distance of eps from its estimate at t, (N,).
    """
    return 0.5 * (log_snr_s - log_snr_t).expm1() * error


def diffusion_elbo(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    steps: int | None = None,
    num_draws: int = 64,
    generator: torch.Generator | None = None,
) -> DiffusionTerms:
    """The ELBO of a diffusion model, in its terms; in discrete and in continuous time. eq. diffusion-elbo eq. diffusion-continuous

    Args:
        denoiser: (x_t, log-SNR) -> the noise in x_t.
        x: (N, L).
        steps: T, how many layers of latents there are after x_0; None is the limit, continuous time.
        num_draws: levels at which each x is noised, spread over all T: the sum over levels is estimated from these.
        generator: of levels and noise; on the CPU.

    Returns:
        `DiffusionTerms`, unbiased estimates.

    Example:
        >>> import torch
        >>> from vaelib.diffusion import Schedule, alpha_sigma, diffusion_elbo
        >>> def exact(x_t, log_snr):  # of x from N(0, I), which is N(0, I) at every level
        ...     return alpha_sigma(log_snr)[1] * x_t
        >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> terms = diffusion_elbo(exact, Schedule(), x, num_draws=2000, generator=torch.Generator().manual_seed(0))
        >>> bool((terms.elbo - torch.distributions.Normal(0, 1).log_prob(x).sum(1)).abs().max() < 0.2)
        True
    """
    check_int("num_draws", num_draws)
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: got {describe(x)}, expected a floating-point tensor (N, L)")
    times = spread_times(num_draws, len(x), generator).to(x)
    ends = schedule(torch.tensor([0.0, 1.0], device=x.device, dtype=x.dtype))
    alpha, sigma = alpha_sigma(ends[1])
    prior_kl = gaussian_kl(alpha * x, (2 * sigma.log()).expand_as(x))

    def error_at(log_snr: Tensor) -> Tensor:
        """The denoiser's squared error at this level, (N,), less a part of the squared norm of eps minus L, of mean 0: it varies less."""
        eps = torch.randn(x.shape, generator=generator, device="cpu", dtype=x.dtype).to(x.device)
        error = (eps - denoiser(noised(x, log_snr, eps), log_snr)).square().sum(1)
        return error - log_snr.sigmoid().square() * (eps.square() - 1).sum(1)  # all that varies, if x is from N(0, I)

    levels = torch.zeros_like(prior_kl)
    for t in times:
        if steps is None:
            levels += -0.5 * schedule.slope(t) * error_at(schedule(t))
        else:
            last = (t * check_int("steps", steps)).floor()
            log_snr_s, log_snr_t = schedule(last / steps), schedule((last + 1) / steps)
            levels += steps * level_kl(error_at(log_snr_t), log_snr_s, log_snr_t)
    first = ends[:1].expand(len(x))  # p(x given x_0) = N(x; x as the denoiser has it, exp(-log-SNR) I)
    error = torch.stack([error_at(first) for _ in range(min(num_draws, 8))]).mean(0)  # it hardly varies
    log_likelihood = 0.5 * x.shape[1] * (ends[0] - math.log(2 * math.pi)) - 0.5 * error
    return DiffusionTerms(prior_kl, levels / num_draws, log_likelihood)


def previous(x_t: Tensor, eps: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, L) and standard deviation (N, 1) of p(x_s given x_t) for a level s of less noise; eps is the denoiser's estimate."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(log_snr_t), alpha_sigma(log_snr_s)
    gone = -(log_snr_t - log_snr_s).expm1()[..., None]  # the share of the variance that is new between s and t
    return alpha_s / alpha_t * (x_t - sigma_t * gone * eps), sigma_s * gone.sqrt()


class DiffusionPrior:
    """A density over codes, of which there is a bound and samples: z = mean + std * x, with x of a diffusion model.

    Attributes:
        network: (x_t, log-SNR, labels or None) -> an output of the `parameterization`.
        mean: (L,), of the codes it was fitted to.
        std: (L,), their standard deviation.
        steps: levels of `sample`.
        stochastic: whether `sample` draws from p(x_s given x_t) in turn, as the bound has it; else each noise determines its code, and
            the way is that of the probability-flow equation (DDIM: Song, Meng and Ermon 2021).
        labels: of the codes to come, see `given`.
        guidance: weight of the label, see `given`.
        history: mean loss of each twentieth of the training.
    """

    def __init__(self, network: NoiseNetwork, schedule: Schedule, mean: Tensor, std: Tensor, parameterization: str = "v") -> None:
        self.network, self.schedule, self.mean, self.std = network, schedule, mean, std
        self.parameterization = check_choice("parameterization", parameterization, PARAMETERIZATIONS)
        self.num_classes, self.steps, self.stochastic = network.config["num_classes"], 100, True
        self.labels: Tensor | int | None = None
        self.guidance = 1.0
        self.history: list[float] = []

    @property
    def device(self) -> torch.device:
        """Where the network is; codes come back to the CPU."""
        return next(self.network.parameters()).device

    def given(self, labels: int | Tensor | None, guidance: float = 1.0) -> DiffusionPrior:
        """The prior over codes with a label: one class for all, or one for each code, (N,) int64. eq. guidance

        Args:
            guidance: 1 is p(z given label). Above, the label is followed more than it is true: the noise is taken for
                eps(none) + guidance (eps(label) - eps(none)), and there is no density any more (Ho and Salimans 2022).
        """
        if labels is not None:
            if not self.num_classes:
                raise ValueError("labels: got some, but this prior was fitted without them; fit_diffusion(..., labels=True)")
            numbers = torch.as_tensor(labels)
            if numbers.dtype != torch.int64 or numbers.dim() > 1 or ((numbers < 0) | (numbers >= self.num_classes)).any():
                raise ValueError(f"labels: got {describe(labels)}, expected classes from 0 to {self.num_classes - 1}")
        new = copy.copy(self)
        new.labels, new.guidance = labels, check_number("guidance", guidance)
        return new

    def denoiser(self, labels: Tensor | None = None) -> Denoiser:
        """The noise in x_t, under the guidance: what `diffusion_elbo` asks. `labels`: (N,), on the device. eq. guidance"""

        def said(x_t: Tensor, log_snr: Tensor, labels: Tensor | None) -> Tensor:
            return noise_of(self.parameterization, self.network(x_t, log_snr, labels), x_t, log_snr)

        def guided(x_t: Tensor, log_snr: Tensor) -> Tensor:
            if labels is None or self.guidance == 1:
                return said(x_t, log_snr, labels)
            without = said(x_t, log_snr, None)
            return without + self.guidance * (said(x_t, log_snr, labels) - without)

        return guided

    def labels_of(self, num: int, size: int) -> list[Tensor | None]:
        """The labels of `num` codes, on the device, for parts of at most `size` codes; None for each part where there are none."""
        if self.labels is None:
            return [None] * max(1, -(-num // size))
        labels = torch.as_tensor(self.labels, device=self.device)
        if labels.dim() and len(labels) != num:
            raise ValueError(f"labels: got {len(labels)} for {num} codes, expected as many, or one class for all")
        return list(labels.expand(num).split(size))

    def bound(self, z: Tensor, steps: int | None = None, num_draws: int = 64, seed: int = 0, batch_size: int = 1000) -> Tensor:
        """A lower bound on log p(z) of codes (N, L): (N,), nats, on the CPU; not log p(z) itself. See `diffusion_elbo`.

        In continuous time it goes along the linear schedule, which gives the same number with less noise than the others.
        """
        if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] != len(self.mean):
            raise ValueError(f"z: got {describe(z)}, expected shape (N, {len(self.mean)})")
        if self.labels is not None and self.guidance != 1:
            raise ValueError(f"guidance: got {self.guidance}, expected 1: guided samples have no density, and no bound")
        generator = torch.Generator().manual_seed(check_seed("seed", seed))
        schedule = self.schedule if steps else self.schedule._replace(name="linear")
        x, size = (z.cpu() - self.mean) / self.std, check_int("batch_size", batch_size)
        with evaluating(self.network):
            parts = [
                diffusion_elbo(self.denoiser(labels), schedule, part.to(self.device), steps, num_draws, generator).elbo.cpu()
                for part, labels in zip(x.split(size), self.labels_of(len(x), size), strict=True)
            ]
        return torch.cat(parts) - self.std.log().sum()

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """`num` codes (num, L), on the CPU: code i is the same, up to rounding, whatever `num` is."""
        width, parts = len(self.mean) * (self.steps + 2 if self.stochastic else 1), []
        most = max(1, min(1000, 2**26 // width))  # numbers of noise at once: 256 MB
        labels = self.labels_of(check_int("num", num), most)
        with evaluating(self.network):
            for start, own in zip(range(0, num, most), labels, strict=True):
                eps = noise.normal_rows(min(most, num - start), width, generator).unflatten(1, (-1, len(self.mean)))
                parts.append(self.from_noise(eps.to(self.device), own).cpu())
        return self.mean + self.std * torch.cat(parts)

    def from_noise(self, eps: Tensor, labels: Tensor | None = None) -> Tensor:
        """x made of noise, (N, steps + 2, L), or (N, 1, L) where it is not stochastic: (N, L)."""
        denoiser = self.denoiser(labels)
        times = torch.linspace(1, 0, self.steps + 1, device=eps.device)
        levels = self.schedule(times)[:, None].expand(-1, len(eps))
        x = eps[:, 0]
        for i, (log_snr_t, log_snr_s) in enumerate(zip(levels[:-1], levels[1:], strict=True), start=1):
            said = denoiser(x, log_snr_t)
            if self.stochastic:
                mean, deviation = previous(x, said, log_snr_t, log_snr_s)
                x = mean + deviation * eps[:, i]
            else:
                x = noised(clean_of(x, log_snr_t, said), log_snr_s, said)
        x = clean_of(x, levels[-1], denoiser(x, levels[-1]))
        return x + (-levels[-1] / 2).exp()[:, None] * eps[:, -1] if self.stochastic else x


def save_prior(prior: DiffusionPrior, path: str | Path) -> None:
    """Write a diffusion prior to one file, from which `load_prior` makes it again."""
    about = {"network": prior.network.config, "schedule": prior.schedule, "parameterization": prior.parameterization}
    tensors = {"mean": prior.mean, "std": prior.std} | {f"network.{k}": v for k, v in prior.network.state_dict().items()}
    with atomic(as_path(path)) as partial:
        write_tensors(partial, tensors, {"diffusion": json.dumps(about)})


def load_prior(path: str | Path) -> DiffusionPrior:
    """The diffusion prior that `save_prior` wrote, on the CPU.

    Raises:
        ValueError: If the file is missing, broken or not of a diffusion prior.
    """
    try:
        with safe_open(as_path(path), "pt") as file:
            about = json.loads(file.metadata()["diffusion"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network, mean, std = make_denoiser(**about["network"]), tensors.pop("mean"), tensors.pop("std")
        network.load_state_dict({name.removeprefix("network."): value for name, value in tensors.items()})
        return DiffusionPrior(network.eval(), make_schedule(*about["schedule"]), mean, std, about["parameterization"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"path: got {path}, expected a file written by save_prior ({' '.join(str(error).split())})") from error


class DenoiserStep:
    """One step of training, as a function of tensors on the device that reads nothing back: so a CUDA graph can replay it.

    Attributes:
        noise: the generator of rows, times, noise and of which labels are left out.
        plan: (steps, 2), learning rate and the weight of the new in the averages.
        place: (1,), how many steps are done.
        trace: (steps,), the loss of each.
        averages: of each parameter.
    """

    def __init__(
        self,
        network: NoiseNetwork,
        x: Tensor,
        labels: Tensor | None,
        loss: Callable[..., Tensor],
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.network, self.x, self.labels, self.loss, device = network, x, labels, loss, x.device
        self.noise, self.within = torch.Generator(device).manual_seed(seed), torch.arange(batch_size, device=device)
        self.none = torch.full((batch_size,), network.config["num_classes"], device=device)
        self.parameters: list[Tensor] = list(network.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        cuda = device.type == "cuda"
        rate = torch.tensor(learning_rate, device=device, dtype=torch.float32 if cuda else torch.float64)
        self.optimizer = torch.optim.Adam(self.parameters, lr=rate, betas=(0.9, 0.99), fused=True, capturable=cuda)
        rates = [learning_rate * min(1, (i + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * i / steps)) for i in range(steps)]
        self.plan = torch.tensor([(rates[i], 1 - min(0.999, (1 + i) / (10 + i))) for i in range(steps)], device=device)
        self.place, self.trace = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(steps, device=device)

    def __call__(self) -> None:
        count, device, draw = len(self.within), self.x.device, self.noise
        rate, weight = self.plan.index_select(0, self.place)[0].unbind()
        self.optimizer.param_groups[0]["lr"].copy_(rate)
        rows = torch.randint(len(self.x), (count,), generator=draw, device=device)
        t = (torch.rand(1, generator=draw, device=device) + self.within / count) % 1  # each is uniform; together they cover all
        eps = torch.randn(count, self.x.shape[1], generator=draw, device=device)
        own = None
        if self.labels is not None:
            left_out = torch.rand(count, generator=draw, device=device) < UNLABELLED
            own = torch.where(left_out, self.none, self.labels.index_select(0, rows))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            value = self.loss(self.network, self.x.index_select(0, rows), t, eps, own).mean()
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.trace.index_copy_(0, self.place, value.detach()[None])
        with torch.no_grad():
            change = list(torch._foreach_sub(self.parameters, self.averages))
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(self.averages, change)
        self.place += 1


def fit_denoiser(
    network: NoiseNetwork,
    schedule: Schedule,
    x: Tensor,
    labels: Tensor | None = None,
    steps: int = 10000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    parameterization: str = "v",
    weighting: str = "simple",
    seed: int = 0,
) -> list[float]:
    """Train a network on x (N, L), on its device: Adam, the rate falling along a cosine; its weights are then their moving average.

    Args:
        labels: (N,), of which a share `UNLABELLED` is left out at random: so one network knows p(x) and p(x given label).

    Returns:
        The mean loss in each twentieth of the steps.
    """
    check_choice("weighting", weighting, WEIGHTINGS)

    def loss(network: nn.Module, x: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None) -> Tensor:
        return denoising_loss(network, schedule, x, t, eps, labels, parameterization, weighting)

    steps, seed = check_int("steps", steps), check_seed("seed", seed)
    step = DenoiserStep(network.train(), x, labels, loss, steps, batch_size, learning_rate, seed)
    call = Replayed(step, step) if x.device.type == "cuda" else step
    for _ in range(steps):
        call()
    with torch.no_grad():
        torch._foreach_copy_(step.parameters, step.averages)
    network.eval()
    return [part.mean().item() for part in step.trace.tensor_split(20) if len(part)]


def make_denoiser(shape: Sequence[int], width: int, depth: int, num_classes: int) -> NoiseNetwork:
    """`MLPDenoiser` for codes of shape (L,), `MapDenoiser` for (C, h, w)."""
    kind = MLPDenoiser if len(shape) == 1 else MapDenoiser
    return kind(shape, check_int("width", width), check_int("depth", depth), num_classes)


def fit_diffusion(
    model: VAE,
    images: ImageSet | Tensor,
    labels: bool = False,
    steps: int = 10000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    width: int | None = None,
    depth: int = 3,
    schedule: str = "cosine",
    parameterization: str = "v",
    weighting: str = "simple",
    seed: int = 0,
) -> DiffusionPrior:
    """A diffusion model of one posterior sample of each image: latent diffusion (Vahdat, Kreis and Kautz 2021; Rombach et al. 2022).

    It is trained on the model's device, and stays there. The codes are standardized first: each unit is divided by its own deviation.

    Args:
        images: the training set.
        labels: whether the network is told the images' labels, which then can be asked for, see `DiffusionPrior.given`.
        steps: of the training, with `batch_size` codes each.
        width: units of the network's layers; None is 512 for codes that are vectors, 64 channels for maps.
        schedule: `Schedule`'s name.
        parameterization: what the network gives: ``"eps"``, ``"x"``, ``"v"`` or ``"flow"``.
        weighting: ``"simple"`` or ``"elbo"``, see `denoising_loss`.
        seed: of the draws, the first weights and the training.

    Raises:
        ValueError: For fewer than two images, labels that are asked for and not there, or a bad option.

    Example:
        >>> import vaelib
        >>> from vaelib.diffusion import fit_diffusion
        >>> model = vaelib.mlp_vae((1, 28, 28), hidden_dims=(32,), latent_dim=2)
        >>> prior = fit_diffusion(model, vaelib.load_images("digits")[:100], steps=5, width=16)
        >>> vaelib.generate(model, 4, seed=0, prior=prior).shape
        torch.Size([4, 1, 28, 28])
    """
    check_choice("parameterization", parameterization, PARAMETERIZATIONS)
    curve, seed = make_schedule(schedule), check_seed("seed", seed)
    check_number("learning_rate", learning_rate, exclusive=True)
    classes: Sequence[str] = ()
    if labels:
        if not isinstance(images, ImageSet) or not images.labelled:
            raise ValueError("labels: got True for images without labels, expected an ImageSet that has them")
        classes = images.classes
    codes, shape = codes_to_fit(model, images, seed, 2, math.inf), model.latent_shape
    mean, std = codes.mean(0), codes.std(0).clamp(min=1e-6)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(seed)
        network = make_denoiser(shape, width or (512 if len(shape) == 1 else 64), depth, len(classes)).to(model.device)
    x, own = ((codes - mean) / std).to(model.device), images.labels.to(model.device) if labels else None  # type: ignore[union-attr]
    prior = DiffusionPrior(network, curve, mean, std, parameterization)
    options = steps, check_int("batch_size", batch_size), learning_rate, parameterization, weighting
    prior.history = fit_denoiser(network, curve, x, own, *options, seed=seed)
    return prior
