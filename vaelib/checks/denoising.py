"""Judge of the loss of a diffusion model in discrete time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vaelib.checks.verdicts import Mistakes, judge, verdict

Network = Callable[[Tensor, Tensor], Tensor]


def level_recipe(
    network: Network,
    log_snr: Tensor,
    x: Tensor,
    i: Tensor,
    eps: Tensor,
    noise_at: int = 0,
    told: Callable[[Tensor], Tensor] | None = None,
    apart: Callable[[Tensor], Tensor] | None = None,
    read: float = 1.0,
    alpha: Callable[[Tensor], Tensor] = torch.sqrt,
    sigma: Callable[[Tensor], Tensor] = torch.sqrt,
    weight_at: int = 0,
    weight: Callable[[Tensor, Tensor], Tensor] = lambda s, t: (s - t).expm1(),
    times: float = 1.0,
    of_x: bool = False,
    power: float = 2.0,
    steps: Callable[[int], float] = float,
    reduce: Callable[[Tensor], Tensor] = lambda error: error.sum(1),
) -> Tensor:
    """T / 2 (SNR_{i-1} / SNR_i - 1) |eps - network(x_i, log-SNR_i)|^2; the arguments put mistakes into it."""
    noise_level = log_snr[(i + noise_at).clamp(0, len(log_snr) - 1)]
    noise_level = apart(noise_level) if apart else noise_level
    a, s = alpha((read * noise_level).sigmoid())[:, None], sigma((-read * noise_level).sigmoid())[:, None]
    x_i = a * x + s * eps
    level = log_snr[i]
    output = network(x_i, told(level) if told else level)
    error = ((x if of_x else eps) - output).abs() ** power
    at = (i + weight_at).clamp(1, len(log_snr) - 1)
    return times * 0.5 * steps(len(log_snr) - 1) * weight(log_snr[at - 1], log_snr[at]) * reduce(error)


def level_with(**switches: Any) -> partial[Tensor]:
    return partial(level_recipe, **switches)


def snr_difference(s: Tensor, t: Tensor) -> Tensor:
    return s.exp() - t.exp()


def first_of(levels: Tensor) -> Tensor:
    return levels[:1].expand(len(levels))


DIFFUSION_MISTAKES: Mistakes = {
    "weighted-twice": (
        "the loss is weighted twice: SNR_{i-1} / SNR_i - 1 belongs to the error of the noise, "
        "SNR_{i-1} - SNR_i to that of x, and each stands there once",
        level_with(weight=lambda s, t: (s - t).expm1().square()),
        level_with(weight=lambda s, t: (s - t).expm1() * snr_difference(s, t)),
        level_with(weight=lambda s, t: (s - t).expm1() * (s - t)),
    ),
    "weight-of-x": ("SNR_{i-1} - SNR_i is the weight of the error of x; that of the noise is SNR_{i-1} / SNR_i - 1",
                    level_with(weight=snr_difference)),
    "no-weight": (
        "the weight SNR_{i-1} / SNR_i - 1 is missing: this is the simple loss, no bound",
        level_with(weight=lambda s, t: torch.ones_like(s)),
    ),
    "continuous": (
        "log-SNR_{i-1} - log-SNR_i is the weight in continuous time; between two levels it is expm1 of that",
        level_with(weight=lambda s, t: s - t),
    ),
    "no-one": ("the -1 of the weight is missing", level_with(weight=lambda s, t: (s - t).exp())),
    "sign": (
        "the sign is wrong: the loss of a level is a KL and not negative",
        level_with(times=-1.0),
        level_with(weight=lambda s, t: (t - s).expm1()),
    ),
    "off-by-one": (
        "the schedule is off by one: the noise is that of level i, and the weight lies between the levels i - 1 and i",
        *(level_with(noise_at=shift) for shift in (-1, 1)),
        *(level_with(weight_at=shift) for shift in (-1, 1)),
        *(level_with(noise_at=shift, weight_at=shift) for shift in (-1, 1)),
    ),
    "variance": (
        "a variance stands where the standard deviation should: x_i = sqrt(alpha^2) x + sqrt(sigma^2) eps",
        level_with(sigma=lambda v: v),
        level_with(alpha=lambda v: v),
        level_with(alpha=lambda v: v, sigma=lambda v: v),
    ),
    "log-snr": (
        "the log-SNR is that of the variances: sigmoid(log-SNR) is alpha^2",
        level_with(read=2.0),
        level_with(read=0.5),
    ),
    "swapped": ("alpha and sigma are swapped: at a high SNR x_i is nearly x", level_with(read=-1.0)),
    "not-scaled": ("x is not scaled by alpha: its variance would grow with the noise", level_with(alpha=torch.ones_like)),
    "timesteps": (
        "the network is not told the level of the noise that it sees: noise, network and weight share one i for each image",
        level_with(told=first_of),
        level_with(told=lambda level: level.flip(0)),
        level_with(told=lambda level: level.mean().expand(len(level))),
        level_with(told=torch.zeros_like),
        level_with(apart=first_of),
        level_with(apart=lambda level: level.flip(0)),
    ),
    "target-x": ("the output is compared with x; this network gives the noise", level_with(of_x=True)),
    "not-squared": ("the error is not squared", level_with(power=1.0)),
    "no-steps": (
        "the factor T is missing: one level, drawn at random, stands for the sum over T",
        level_with(steps=lambda count: 1.0),
    ),
    "steps": ("the number of levels is T = len(log_snr) - 1: level 0 has no term", level_with(steps=lambda count: count + 1.0)),
    "no-half": ("the loss is twice too large: the factor 1/2 is missing", level_with(times=2.0)),
    "mean-latents": ("the error is averaged over the dimensions; add up", level_with(reduce=lambda error: error.mean(1))),
    "mean-batch": ("the error is averaged over the batch; keep one number for each image", level_with(reduce=lambda e: e.sum(1).mean())),
    "not-summed": ("the error is not added up over the dimensions", level_with(reduce=lambda error: error.mean())),
}  # fmt: skip


def gained(x: Tensor, log_snr: Tensor) -> Tensor:
    """A network of no kind, which depends on all that it is told."""
    return (1.3 * x + 0.2).sin() * (0.4 + 0.1 * log_snr[:, None]) + 0.1 * x.roll(1, 1)


@verdict
def check_diffusion_loss(fn: Callable[..., Tensor]) -> str:
    """Judges loss(network, log_snr, x, i, eps): the term of one level of a diffusion model for each image, (N,), nats. eq. diffusion-elbo

    `network(x_i, log-SNR_i)`, (N, L) and (N,) -> (N, L), gives the noise in x_i; log_snr (T + 1,) are the log-SNRs of the levels 0 to T;
    x (N, L); i (N,) are levels from 1 to T, one drawn for each image; eps (N, L). So that its mean over i is the sum over levels, the term
    is multiplied by T. The mistakes are in `DIFFUSION_MISTAKES`. Kingma, Salimans, Poole and Ho 2021.
    """
    cases = []
    for count, dim, steps in ((6, 3, 5), (4, 4, 10)):
        log_snr = torch.linspace(2.5, -2.0, steps + 1) + 0.3 * torch.linspace(-1, 1, steps + 1).square()
        i = torch.randperm(steps)[:count] + 1 if count <= steps else torch.cat([torch.arange(steps) + 1, torch.tensor([2])])
        case = {"network": gained, "log_snr": log_snr, "x": torch.randn(count, dim), "i": i, "eps": torch.randn(count, dim)}
        cases.append(case)
    return judge("loss", fn, level_recipe, DIFFUSION_MISTAKES, cases, "x")
