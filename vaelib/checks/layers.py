"""Judges of the parts of a model with two layers of latents: p(x, z1, z2) = p(z2) p(z1 given z2) p(x given z1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vaelib.checks.terms import itself, times
from vaelib.checks.verdicts import Mistakes, judge, verdict

Function = Callable[..., Any]


def between_recipe(
    m: Tensor,
    s: Tensor,
    prior_m: Tensor,
    prior_s: Tensor,
    swap: bool = False,
    centre: Function = torch.sub,
    read: Function = itself,
    square: Function = torch.square,
    precision: Function = lambda t: (-t).exp(),
    ratio: Function = torch.sub,
    one: float = 1.0,
    log: Function = torch.sub,
    half: float = 0.5,
    reduce: Function = lambda units: units.sum(-1),
    sign: float = 1.0,
) -> Tensor:
    """KL of two diagonal Gaussians, N(m, exp(s)) from N(prior_m, exp(prior_s)): (N,), nats; the arguments put mistakes into it."""
    if swap:
        m, s, prior_m, prior_s = prior_m, prior_s, m, s
    s, prior_s = read(s), read(prior_s)
    squares = square(centre(m, prior_m)) * precision(prior_s)
    value: Tensor = sign * reduce(half * (squares + ratio(s, prior_s).exp() - one - log(s, prior_s)))
    return value


def between_with(**switches: Any) -> partial[Tensor]:
    return partial(between_recipe, **switches)


def first(a: Tensor, b: Tensor) -> Tensor:
    return a


KL_BETWEEN_MISTAKES: Mistakes = {
    "reversed": ("this is KL(p || q), not KL(q || p): the posterior q comes first", between_with(swap=True)),
    "standard-prior": (
        "this is the KL to N(0, I): the prior's mean and log_var play no part",
        between_with(centre=first, precision=torch.ones_like, ratio=first, log=first),
    ),
    "no-prior-mean": ("the prior's mean is not subtracted", between_with(centre=first)),
    "means-added": ("the means are added; subtract them", between_with(centre=torch.add)),
    "no-precision": (
        "the squared difference of the means is not divided by the prior's variance",
        between_with(precision=torch.ones_like),
    ),
    "own-precision": (
        "the squared difference of the means is divided by q's variance, or multiplied by the prior's; divide by the prior's",
        between_with(precision=torch.exp),
        lambda m, s, pm, ps: between_recipe(m, s, pm, ps) + half_squares(m, pm, s) - half_squares(m, pm, ps),
    ),
    "no-ratio": ("q's variance is not divided by the prior's", between_with(ratio=first)),
    "ratio-inverse": ("the prior's variance is divided by q's; it is the other way round", between_with(ratio=lambda a, b: b - a)),
    "no-log-ratio": ("the prior's log_var is missing in the term -(log_var - prior_log_var)", between_with(log=first)),
    "log-sign": ("the logarithms have the wrong sign", between_with(log=lambda a, b: b - a)),
    "no-log": ("the term with the logarithms of the variances is missing", between_with(log=lambda a, b: 0 * a)),
    "no-constant": ("the -1 is missing: the KL of the prior itself must be 0", between_with(one=0.0)),
    "constant-once": (
        "the -1 stands there once, and not for each latent",
        *(lambda m, s, pm, ps, c=c: between_recipe(m, s, pm, ps, one=0.0) - c for c in (0.5, 1.0)),
    ),
    "no-half": ("your KL is twice too large: the factor 1/2 is missing", between_with(half=1.0)),
    "half-of-some": (
        "the factor 1/2 is missing in some of the terms; it is before all of them",
        between_with(square=lambda d: 2 * d.square()),
        between_with(log=lambda a, b: 2 * (a - b)),
        lambda m, s, pm, ps: 2 * between_recipe(m, s, pm, ps) - 0.5 * (ps - s).sum(-1),
    ),
    "precision-root": (
        "the squared difference of the means is divided by the prior's standard deviation; divide by its variance",
        between_with(precision=lambda t: (-t / 2).exp()),
    ),
    "log-std": ("log_var is taken for the log of the standard deviation; it is twice that", between_with(read=times(2.0))),
    "half-log-var": ("log_var is halved, as if it were twice the log of the variance", between_with(read=times(0.5))),
    "mean-not-squared": (
        "the difference of the means is not squared",
        *(between_with(square=itself), between_with(square=torch.abs)),
    ),
    "mean-latents": ("your KL is averaged over the latents; add it up", between_with(reduce=lambda units: units.mean(-1))),
    "not-summed": ("your KL is not added up over the latents: sum(-1) is missing", between_with(reduce=itself)),
    "sum-batch": (
        "your KL is one number for the batch; keep one for each image",
        *(between_with(reduce=torch.sum), between_with(reduce=lambda units: units.sum(-1).mean())),
    ),
    "sign": ("the sign is wrong: a KL divergence is never negative", between_with(sign=-1.0)),
}


def half_squares(m: Tensor, prior_m: Tensor, s: Tensor) -> Tensor:
    return 0.5 * ((m - prior_m).square() * (-s).exp()).sum(-1)


@verdict
def check_kl_between(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Judges kl_between(mean, log_var, prior_mean, prior_log_var): four times (N, L) -> KL(q || p) of each image, (N,), nats.

    q = N(mean, exp(log_var)) and p = N(prior_mean, exp(prior_log_var)) are diagonal. eq. gaussian-kl. The mistakes are in
    `KL_BETWEEN_MISTAKES`.
    """
    names = ("mean", "log_var", "prior_mean", "prior_log_var")
    cases = [dict(zip(names, torch.randn(4, *shape).unbind(), strict=True)) for shape in ((5, 4), (1, 3), (3, 1), (4, 4))]
    return judge("kl_between", fn, between_recipe, KL_BETWEEN_MISTAKES, cases, " ".join(names))


class TwoLayers:
    """A small model with two layers of latents, of 2 and 3 units, and 6 pixels; each density that it states is N(mean, exp(log_var)).

    What `check_layered_elbo` and `check_ancestral` hand to a student's function.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seed, self.dims = seed, (6, 3, 2)

        def layer(out: int, into: int) -> Tensor:
            return 1.5 * torch.randn(out, into, generator=generator) / math.sqrt(into)

        self.top, self.down, self.up = layer(4, 6), layer(6, 2), layer(6, 8)
        self.out = layer(6, 3)

    def __repr__(self) -> str:
        return f"model {self.seed}"

    def posterior2(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q(z2 given x): mean and log_var, each (N, 2)."""
        mean, log_var = (x @ self.top.T).chunk(2, -1)
        return mean, log_var.tanh() - 1

    def posterior1(self, x: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """q(z1 given x, z2): mean and log_var, each (N, 3)."""
        mean, log_var = (torch.cat([x, z2], -1) @ self.up.T).chunk(2, -1)
        return mean, log_var.tanh() - 1

    def prior1(self, z2: Tensor) -> tuple[Tensor, Tensor]:
        """p(z1 given z2): mean and log_var, each (N, 3)."""
        mean, log_var = (z2 @ self.down.T + 0.7).chunk(2, -1)
        return mean, log_var.tanh()

    def decode(self, z1: Tensor) -> Tensor:
        """The mean of x given z1: (N, 3) -> (N, 6)."""
        return z1 @ self.out.T

    def log_likelihood(self, x: Tensor, z1: Tensor) -> Tensor:
        """log p(x given z1), a Gaussian of deviation 1: (N,), nats."""
        return -0.5 * ((x - self.decode(z1)).square() + math.log(2 * math.pi)).sum(-1)


def drawn(density: tuple[Tensor, Tensor], eps: Tensor, deviation: Function = lambda s: (s / 2).exp()) -> Tensor:
    z: Tensor = density[0] + deviation(density[1]) * eps
    return z


def layered_recipe(
    model: TwoLayers,
    x: Tensor,
    eps2: Tensor,
    eps1: Tensor,
    deviation: Function = lambda s: (s / 2).exp(),
    prior_at: Function = lambda z2, mean2: z2,
    posterior_at: Function = lambda z2, mean2: z2,
    code: Function = lambda q1, p1: q1,
    noise1: Function = itself,
    met: Function = lambda p1: p1,
    between: Function = between_recipe,
    likelihood: float = 1.0,
    upper: float = 1.0,
    lower: float = 1.0,
    whole: Function = itself,
) -> Tensor:
    """The ELBO of a model with two layers at one path of draws: (N,), nats; the arguments put mistakes into it."""
    q2 = model.posterior2(x)
    z2 = drawn(q2, eps2, deviation)
    q1, p1 = model.posterior1(x, posterior_at(z2, q2[0])), model.prior1(prior_at(z2, q2[0]))
    z1 = drawn(code(q1, p1), noise1(eps1), deviation)
    zero = torch.zeros_like(q2[0])
    rate = upper * between(*q2, zero, zero) + lower * between(*q1, *met(p1))
    value: Tensor = whole(likelihood * model.log_likelihood(x, z1) - rate)
    return value


def layered_with(**switches: Any) -> partial[Tensor]:
    return partial(layered_recipe, **switches)


def at_noise(*names: str) -> Function:
    """The recipe with eps2 where these of its switches say which z2 a density is asked at."""

    def wrong(model: TwoLayers, x: Tensor, eps2: Tensor, eps1: Tensor) -> Tensor:
        return layered_with(**dict.fromkeys(names, lambda z2, mean2: eps2))(model, x, eps2, eps1)

    return wrong


LAYERED_ELBO_MISTAKES: Mistakes = {
    "standard-prior": (
        "the KL of z1 is taken to N(0, I); its prior is p(z1 given z2)",
        layered_with(met=lambda p1: tuple(torch.zeros_like(part) for part in p1)),
    ),
    "no-upper": ("the KL of z2 is missing", layered_with(upper=0.0)),
    "no-lower": ("the KL of z1 is missing", layered_with(lower=0.0)),
    "prior-at-mean": (
        "p(z1 given z2) is asked at the mean of q(z2 given x), not at the draw z2: the KL is an expectation over z2",
        layered_with(prior_at=lambda z2, mean2: mean2),
    ),
    "posterior-at-mean": (
        "q(z1 given x, z2) is asked at the mean of q(z2 given x), not at the draw z2",
        layered_with(posterior_at=lambda z2, mean2: mean2),
    ),
    "at-mean": (
        "both densities of z1 are asked at the mean of q(z2 given x), not at the draw z2",
        layered_with(prior_at=lambda z2, mean2: mean2, posterior_at=lambda z2, mean2: mean2),
    ),
    "prior-decoded": (
        "z1 is drawn from its prior, so the code knows nothing of x but through z2; draw it from q(z1 given x, z2)",
        layered_with(code=lambda q1, p1: p1),
    ),
    "mean-decoded": ("the mean of q(z1 given x, z2) is decoded, not a draw", layered_with(noise1=torch.zeros_like)),
    "variance": ("the noise is scaled by exp(log_var), the variance, not by exp(log_var / 2)", layered_with(deviation=torch.exp)),
    "no-scale": ("the noise has deviation 1, whatever log_var is", layered_with(deviation=torch.ones_like)),
    "sampled-kl": (
        "the KLs, or that of z1, are taken at the draws, log q - log p; take the closed form, which has less noise",
        *(lambda model, x, eps2, eps1, both=both: sampled_recipe(model, x, eps2, eps1, both) for both in (True, False)),
    ),
    "at-noise": (
        "a density of z1 is asked at the noise eps2, not at the draw z2",
        *(at_noise(*names) for names in (("prior_at",), ("posterior_at",), ("prior_at", "posterior_at"))),
    ),
    "batch-kl": (
        "the KLs are one number for the batch; each image has its own",
        *(
            layered_with(between=partial(between_recipe, reduce=reduce))
            for reduce in (torch.sum, lambda units: units.sum(-1).mean(), torch.mean)
        ),
    ),
    "reversed": (
        "a KL, or both, are the wrong way round: q comes first",
        layered_with(between=partial(between_recipe, swap=True)),
        lambda model, x, eps2, eps1: (
            layered_recipe(model, x, eps2, eps1) + one_way(model, x, eps2) - one_way(model, x, eps2, swap=True)
        ),
        lambda model, x, eps2, eps1: (
            layered_recipe(model, x, eps2, eps1, between=partial(between_recipe, swap=True))
            - one_way(model, x, eps2)
            + one_way(model, x, eps2, swap=True)
        ),
    ),
    "mean-latents": (
        "the KLs are averaged over the latents; add them up",
        layered_with(between=partial(between_recipe, reduce=lambda units: units.mean(-1))),
    ),
    "no-half": ("both KLs are twice too large: the factor 1/2 is missing", layered_with(between=partial(between_recipe, half=1.0))),
    "kl-added": ("the KLs are added; subtract them", layered_with(upper=-1.0, lower=-1.0)),
    "lower-added": ("the KL of z1 is added; subtract it", layered_with(lower=-1.0)),
    "no-likelihood": ("log p(x given z1) is missing", layered_with(likelihood=0.0)),
    "loss": ("this is minus the ELBO, a loss; the ELBO is better when it is higher", layered_with(whole=torch.neg)),
    "scalar": (
        "this is one number for the batch; keep one for each image",
        *(layered_with(whole=torch.mean), layered_with(whole=torch.sum)),
    ),
}


def one_way(model: TwoLayers, x: Tensor, eps2: Tensor, **switches: Any) -> Tensor:
    """The KL of z1 alone."""
    z2 = drawn(model.posterior2(x), eps2)
    return between_recipe(*model.posterior1(x, z2), *model.prior1(z2), **switches)


def sampled_recipe(model: TwoLayers, x: Tensor, eps2: Tensor, eps1: Tensor, both: bool) -> Tensor:
    """The same with log q - log p at the draws, of both layers or of z1 alone; the constants cancel."""
    q2 = model.posterior2(x)
    z2 = drawn(q2, eps2)
    q1, p1 = model.posterior1(x, z2), model.prior1(z2)
    z1 = drawn(q1, eps1)
    upper = (
        (half_squares(z2, 0 * z2, 0 * z2) - half_squares(z2, *q2) - 0.5 * q2[1].sum(-1))
        if both
        else between_recipe(*q2, 0 * z2, 0 * z2)
    )
    lower = half_squares(z1, *p1) - half_squares(z1, *q1) + 0.5 * (p1[1] - q1[1]).sum(-1)
    return model.log_likelihood(x, z1) - upper - lower


@verdict
def check_layered_elbo(fn: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Judges layered_elbo(model, x, eps2, eps1) of a model with two layers: x (N, D), eps2 (N, L2), eps1 (N, L1) -> (N,), nats.

    model has ``posterior2(x)``, ``posterior1(x, z2)`` and ``prior1(z2)``, each mean and log_var of a diagonal Gaussian, and
    ``log_likelihood(x, z1)``, (N,); p(z2) is N(0, I). z2 and then z1 are drawn with the noise given; the two KLs are closed form, that
    of z1 given the draw z2. eq. hierarchical-kl. The mistakes are in `LAYERED_ELBO_MISTAKES`.
    """
    cases = [
        {"model": TwoLayers(seed), "x": torch.randn(n, 6), "eps2": torch.randn(n, 2), "eps1": torch.randn(n, 3)}
        for seed, n in ((0, 4), (1, 1), (2, 3))
    ]
    return judge("layered_elbo", fn, layered_recipe, LAYERED_ELBO_MISTAKES, cases, "x eps2 eps1")


def ancestral_recipe(
    model: TwoLayers,
    eps2: Tensor,
    eps1: Tensor,
    deviation: Function = lambda s: (s / 2).exp(),
    asked: Function = itself,
    noise1: Function = itself,
    location: Function = itself,
    end: Function = lambda model, z1: model.decode(z1),
) -> Tensor:
    """z2 = eps2, z1 drawn of its prior, decoded: (N, D); the arguments put mistakes into it."""
    mean, log_var = model.prior1(asked(eps2))
    value: Tensor = end(model, drawn((location(mean), log_var), noise1(eps1), deviation))
    return value


def ancestral_with(**switches: Any) -> partial[Tensor]:
    return partial(ancestral_recipe, **switches)


ANCESTRAL_MISTAKES: Mistakes = {
    "no-upper": (
        "the upper layer plays no part: z1 is drawn from N(0, I), not from p(z1 given z2)",
        ancestral_with(location=torch.zeros_like, deviation=torch.ones_like),
    ),
    "top-mean": ("z2 is 0 for all images: draw it from N(0, I) first", ancestral_with(asked=torch.zeros_like)),
    "mean-decoded": (
        "the mean of p(z1 given z2) is decoded, not a draw: the noise of z1 is missing",
        ancestral_with(noise1=torch.zeros_like),
    ),
    "variance": ("the noise is scaled by exp(log_var), the variance, not by exp(log_var / 2)", ancestral_with(deviation=torch.exp)),
    "no-scale": ("the noise of z1 has deviation 1, whatever log_var is", ancestral_with(deviation=torch.ones_like)),
    "no-exp": ("the noise is scaled by log_var itself: exp is missing", ancestral_with(deviation=itself)),
    "inverse": (
        "the noise is divided by the deviation, exp(log_var / 2); multiply by it",
        ancestral_with(deviation=lambda s: (-s / 2).exp()),
    ),
    "log-std": (
        "log_var is taken for a quarter, or for four times, of what it is",
        *(ancestral_with(deviation=lambda s, factor=factor: (factor * s).exp()) for factor in (0.25, 2.0)),
    ),
    "squashed": (
        "a sigmoid, or a tanh, follows the decoder: its output is the mean itself",
        *(ancestral_with(end=lambda model, z1, squash=squash: squash(model.decode(z1))) for squash in (torch.sigmoid, torch.tanh)),
    ),
    "no-mean": ("the mean of p(z1 given z2) is missing in z1", ancestral_with(location=torch.zeros_like)),
    "not-decoded": ("this is z1; decode it", ancestral_with(end=lambda model, z1: z1)),
    "one-noise": ("all images share one noise for z1", ancestral_with(noise1=lambda e: e[:1].expand_as(e))),
    "one-top": ("all images share one z2", ancestral_with(asked=lambda e: e[:1].expand_as(e))),
}


@verdict
def check_ancestral(fn: Callable[[Any, Tensor, Tensor], Tensor]) -> str:
    """Judges ancestral(model, eps2, eps1): (N, L2) and (N, L1), standard normal noise -> the decoded mean of x, (N, D).

    z2 is eps2, as p(z2) is N(0, I); z1 is drawn from ``model.prior1(z2)``, mean and log_var; ``model.decode(z1)`` gives the mean of x.
    The mistakes are in `ANCESTRAL_MISTAKES`.
    """
    cases = [
        {"model": TwoLayers(seed), "eps2": torch.randn(n, 2), "eps1": torch.randn(n, 3)} for seed, n in ((0, 4), (1, 1), (2, 3))
    ]
    return judge("ancestral", fn, ancestral_recipe, ANCESTRAL_MISTAKES, cases, "eps2 eps1")


def evidence_recipe(
    x: Tensor,
    upper: Tensor,
    lower: Tensor,
    scale1: float,
    scale: float,
    power: float = 2.0,
    power1: float = 2.0,
    top: float = 1.0,
    middle: float = 1.0,
    mapped: bool = True,
    given: bool = False,
    diagonal: bool = False,
    log_det: float = 1.0,
    determinant: Function = torch.logdet,
    two_pi: Function = itself,
    inverse: Function = torch.linalg.inv,
    half: float = 0.5,
    over: Function = lambda value: value,
    sign: float = 1.0,
) -> Tensor:
    """log N(x; 0, lower (upper upper^T + scale1^2 I) lower^T + scale^2 I): (N,), nats; the arguments put mistakes into it."""
    of_z1 = middle * scale1**power1 * torch.eye(len(upper))
    inner = top * upper @ upper.T + (of_z1 if mapped else 0)
    covariance = lower @ inner @ lower.T + scale**power * torch.eye(len(lower))
    if not mapped:
        covariance = covariance + middle * scale1**power1 * torch.eye(len(lower))
    if diagonal:
        covariance = covariance.diag().diag()
    squares = (x @ inverse(covariance) * x).sum(-1)
    constant = two_pi(len(lower)) * math.log(2 * math.pi)
    value: Tensor = sign * over(-half * (squares + log_det * determinant(covariance) + constant))
    return value


def evidence_with(**switches: Any) -> partial[Tensor]:
    return partial(evidence_recipe, **switches)


LAYERED_EVIDENCE_MISTAKES: Mistakes = {
    "no-middle": (
        "the noise of z1, scale1^2 I, is missing in the covariance",
        evidence_with(middle=0.0),
    ),
    "not-mapped": (
        "the noise of z1 reaches x through the lower weight: its covariance is multiplied by it on both sides",
        evidence_with(mapped=False),
    ),
    "no-upper": ("the upper layer is missing in the covariance", evidence_with(top=0.0)),
    "standard-middle": (
        "z1 is taken for N(0, I): its covariance is upper upper^T + scale1^2 I",
        lambda x, upper, lower, scale1, scale: evidence_recipe(x, 0 * upper, lower, 1.0, scale),
    ),
    "not-squared": (
        "the scales, or one of them, stand where their squares should",
        *(evidence_with(power=power, power1=power1) for power, power1 in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0))),
    ),
    "scales-swapped": (
        "scale1 and scale are exchanged: scale1 is that of z1, scale that of x",
        lambda x, upper, lower, scale1, scale: evidence_recipe(x, upper, lower, scale, scale1),
    ),
    "no-inverse": ("the covariance stands in the square; its inverse belongs there", evidence_with(inverse=itself)),
    "log-det-whole": ("the log-determinant is not halved", evidence_with(log_det=2.0)),
    "log-det-sign": ("the log-determinant has the wrong sign", evidence_with(log_det=-1.0)),
    "overflow": (
        "the determinant of many dimensions overflows before its logarithm is taken: use torch.logdet",
        evidence_with(determinant=lambda covariance: torch.linalg.det(covariance).log()),
    ),
    "diagonal": ("only the diagonal of the covariance is used: the pixels depend on each other", evidence_with(diagonal=True)),
    "no-log-det": ("the log-determinant of the covariance is missing", evidence_with(log_det=0.0)),
    "two-pi": (
        "the log of 2 pi is missing, or stands there once and not for each dimension",
        *(evidence_with(two_pi=lambda d, count=count: count) for count in (0.0, 1.0, 2.0)),
    ),
    "no-half": ("the factor 1/2 is missing", evidence_with(half=1.0)),
    "mean-dims": ("the log-density is divided by the number of dimensions", lambda *a: evidence_recipe(*a) / a[0].shape[1]),
    "scalar": (
        "this is one number for the batch; keep one for each image",
        evidence_with(over=torch.mean),
        evidence_with(over=torch.sum),
    ),
    "sign": ("the sign is wrong: this is a loss", evidence_with(sign=-1.0)),
}


@verdict
def check_layered_evidence(fn: Callable[[Tensor, Tensor, Tensor, float, float], Tensor]) -> str:
    """Judges layered_evidence(x, upper, lower, scale1, scale): log p(x) of a linear model with two layers, (N,), nats. eq. evidence

    z2 ~ N(0, I), z1 given z2 ~ N(upper z2, scale1^2 I), x given z1 ~ N(lower z1, scale^2 I); x is (N, D), upper (L1, L2), lower
    (D, L1). The mistakes are in `LAYERED_EVIDENCE_MISTAKES`.
    """
    cases = [
        {"x": torch.randn(n, 5), "upper": torch.randn(3, 2), "lower": torch.randn(5, 3), "scale1": scale1, "scale": scale}
        for n, scale1, scale in ((4, 0.6, 0.8), (1, 1.3, 0.5), (3, 0.4, 1.2))
    ]
    cases[1]["x"] = torch.randn(1, 4)
    cases[1]["lower"] = torch.randn(4, 3)
    many = {"x": 3 * torch.randn(2, 100), "upper": torch.randn(3, 2), "lower": torch.randn(100, 3), "scale1": 0.7, "scale": 3.0}
    cases.append(many)
    return judge("layered_evidence", fn, evidence_recipe, LAYERED_EVIDENCE_MISTAKES, cases, "x")
