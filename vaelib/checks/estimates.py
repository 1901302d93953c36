"""Judges of what estimates the likelihood of a model: log-weights, their effective number, runs put together, and standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vaelib.checks.terms import bound_recipe, itself, times
from vaelib.checks.verdicts import Mistakes, attempt, check_same, fail, fail_by_name, judge, recognized, tensor_from, verdict
from vaelib.likelihoods import Gaussian
from vaelib.objectives import gaussian_kl
from vaelib.vae import VAE

Function = Callable[..., Any]
LOG_TWO_PI = math.log(2 * math.pi)


def log_weights_recipe(
    log_likelihood: Tensor,
    z: Tensor,
    mean: Tensor,
    log_var: Tensor,
    likelihood: float = 1.0,
    prior: float = 1.0,
    q: float = 1.0,
    closed: bool = False,
    read: Function = itself,
    precision: Function = lambda s: (-s).exp(),
    log_det: float = 1.0,
    half: float = 0.5,
    two_pi: tuple[float, float] = (1.0, 1.0),
    reduce: Function = lambda units: units.sum(-1),
    whole: Function = itself,
) -> Tensor:
    """log p(x given z) + log p(z) - log q(z given x): (K, N), nats; the arguments put mistakes into it."""
    s = read(log_var)
    log_p = -half * z.square() - 0.5 * two_pi[0] * LOG_TWO_PI
    log_q = -half * (z - mean).square() * precision(s) - 0.5 * log_det * s - 0.5 * two_pi[1] * LOG_TWO_PI
    if closed:
        value: Tensor = whole(likelihood * log_likelihood - gaussian_kl(mean, log_var))
        return value
    value = whole(likelihood * log_likelihood + reduce(prior * log_p - q * log_q))
    return value


def log_weights_with(**switches: Any) -> partial[Tensor]:
    return partial(log_weights_recipe, **switches)


def both_ways(**switches: Any) -> tuple[partial[Tensor], partial[Tensor]]:
    """With the two constants of 2 pi, and without both: in a right weight they cancel."""
    return log_weights_with(**switches), log_weights_with(**switches, two_pi=(0.0, 0.0))


LOG_WEIGHTS_MISTAKES: Mistakes = {
    "no-prior": ("log p(z) is missing", *both_ways(prior=0.0)),
    "no-q": ("log q(z given x) is missing: this is log p(x, z)", *both_ways(q=0.0)),
    "prior-sign": ("log p(z) is subtracted; add it", *both_ways(prior=-1.0)),
    "at-mean": (
        "a density is asked at the mean of q, not at the draw z",
        lambda p, z, m, s: log_weights_recipe(p, z, m, s) + 0.5 * (z.square() - m.square()).sum(-1),
        lambda p, z, m, s: log_weights_recipe(p, z, m, s) - 0.5 * ((z - m).square() * (-s).exp()).sum(-1),
        lambda p, z, m, s: p + 0.5 * (s - m.square()).sum(-1).expand_as(p),
    ),
    "no-likelihood": ("log p(x given z) is missing", log_weights_with(likelihood=0.0)),
    "q-added": ("log q(z given x) is added; the weight is divided by q, so subtract it", *both_ways(q=-1.0)),
    "swapped": ("log p(z) and log q(z given x) are exchanged", log_weights_with(prior=-1.0, q=-1.0)),
    "sign": ("the sign is wrong throughout", log_weights_with(whole=torch.neg)),
    "closed-kl": (
        "the closed-form KL stands there, the same for all draws of an image: the weight needs log q - log p at the draw",
        log_weights_with(closed=True),
    ),
    "std": ("log_var is taken for the log of the standard deviation; it is twice that", log_weights_with(read=times(2.0))),
    "half-log-var": ("log_var is halved, as if it were twice the log of the variance", log_weights_with(read=times(0.5))),
    "variance": ("log_var is taken for the variance; exp(log_var) is that", log_weights_with(read=lambda s: s.abs().log())),
    "inverse": ("log_var is taken for the log of the precision: its sign is wrong", log_weights_with(read=torch.neg)),
    "multiplied": (
        "the square of z - mean is multiplied by the variance, or divided by the deviation; divide it by the variance",
        *(log_weights_with(precision=wrong) for wrong in (torch.exp, lambda s: (-s / 2).exp(), torch.ones_like)),
    ),
    "no-log-det": ("the term -log_var / 2 of log q is missing", log_weights_with(log_det=0.0)),
    "log-det-sign": ("the term log_var / 2 of log q has the wrong sign", log_weights_with(log_det=-1.0)),
    "log-det-whole": ("log_var is not halved in log q: the normalizer has the standard deviation", log_weights_with(log_det=2.0)),
    "no-half": ("the squares are not halved in the log-densities", log_weights_with(half=1.0)),
    "two-pi": (
        "the log of 2 pi stands in one of the two log-densities only, or in one of them once and not for each latent",
        *(log_weights_with(two_pi=two_pi) for two_pi in ((0.0, 1.0), (1.0, 0.0))),
        *(
            lambda p, z, m, s, sign=sign: log_weights_recipe(p, z, m, s) + sign * (z.shape[-1] - 1) * LOG_TWO_PI / 2
            for sign in (1, -1)
        ),
    ),
    "mean-latents": (
        "the log-densities are averaged over the latents; add them up",
        log_weights_with(reduce=lambda units: units.mean(-1)),
    ),
    "mean-draws": (
        "the log-weights are averaged over the draws; keep one for each",
        log_weights_with(whole=lambda w: w.mean(0)),
    ),
    "no-log": ("these are the weights; give their logarithms, which do not overflow", log_weights_with(whole=torch.exp)),
}


@verdict
def check_importance_weights(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Judges log_weights(log_likelihood, z, mean, log_var): (K, N), (K, N, L), (N, L), (N, L) -> (K, N), nats. eq. log-weights

    The prior is N(0, I), q the diagonal Gaussian of mean and log_var, z K draws of it for each image. The mistakes are in
    `LOG_WEIGHTS_MISTAKES`.
    """
    cases = []
    for k, n, latents in ((4, 3, 5), (1, 2, 3), (3, 1, 2)):
        mean, log_var = torch.randn(n, latents), torch.randn(n, latents)
        z = mean + (log_var / 2).exp() * torch.randn(k, n, latents)
        cases.append({"log_likelihood": torch.randn(k, n) - 2, "z": z, "mean": mean, "log_var": log_var})
    return judge("log_weights", fn, log_weights_recipe, LOG_WEIGHTS_MISTAKES, cases, "log_likelihood z mean log_var")


def ess_recipe(
    w: Tensor,
    axis: int = 0,
    share: Function = torch.softmax,
    power: Function = torch.square,
    pool: Function = torch.sum,
    whole: Function = torch.reciprocal,
    count: Function = lambda value, k: value,
    batch: Function = itself,
) -> Tensor:
    """1 over the sum of the squared shares: (N,); the arguments put mistakes into it."""
    value: Tensor = batch(count(whole(pool(power(share(w, axis)), axis)), w.shape[axis]))
    return value


def ess_with(**switches: Any) -> partial[Tensor]:
    return partial(ess_recipe, **switches)


def every_max(w: Tensor, axis: int, keepdim: bool = True) -> Tensor:
    return w.max()


def shifted_share(shift: Function) -> Function:
    """The shares by exp of what `shift` leaves of the log-weights: finite only where that is their maximum over the draws."""

    def share(w: Tensor, axis: int) -> Tensor:
        e = (w - shift(w, 1 - axis if shift is torch.amax else axis, keepdim=True)).exp()
        shares: Tensor = e / e.sum(axis, keepdim=True)
        return shares

    return share


ESS_MISTAKES: Mistakes = {  # w: log_weights
    "inverse": ("this is the sum of the squared shares; the number of draws is one over it", ess_with(whole=itself)),
    "share": ("this is the share of the draws that count; give their number", ess_with(count=lambda value, k: value / k)),
    "times-k": ("this is K times too large", ess_with(count=lambda value, k: value * k)),
    "largest": (
        "this is one over the largest share: the squares of all shares count",
        ess_with(power=itself, pool=lambda v, axis: v.amax(axis)),
    ),
    "perplexity": (
        "this is the exponential of the entropy of the shares, another number of draws; here their squares are added up",
        ess_with(power=lambda p: -torch.xlogy(p, p), whole=torch.exp),
    ),
    "not-squared": ("the shares are not squared: they add up to 1", ess_with(power=itself)),
    "root": ("this is the root of the number of draws", ess_with(whole=torch.rsqrt)),
    "log": ("this is the log of the number of draws", ess_with(whole=lambda v: -v.log())),
    "not-normalized": (
        "the weights are not divided by their sum before they are squared",
        ess_with(share=lambda w, axis: w.exp()),
    ),
    "mean-one": (
        "the weights are divided by their mean; divide by their sum",
        ess_with(share=lambda w, axis: w.softmax(axis) * w.shape[axis]),
    ),
    "of-logs": (
        "the log-weights stand where the weights should: exp is missing",
        ess_with(share=lambda w, axis: w / w.sum(axis, keepdim=True)),
    ),
    "overflow": (
        "exp overflows or underflows at log-weights of +-1000: torch.softmax does not",
        *(
            ess_with(share=lambda w, axis, floor=floor: w.exp() / (w.exp().sum(axis, keepdim=True) + floor))
            for floor in (0.0, 1e-12, 1e-10, 1e-8)
        ),
        *(ess_with(share=shifted_share(shift)) for shift in (torch.amax, every_max, torch.mean)),
    ),
    "wrong-axis": ("the sum runs over the images; it runs over the draws, axis 0", ess_with(axis=1)),
    "scalar": (
        "this is one number for the batch; keep one for each image",
        *(ess_with(batch=torch.mean), ess_with(batch=torch.sum), ess_with(batch=torch.median), ess_with(batch=torch.amin)),
    ),
}


@verdict
def check_effective_sample_size(fn: Callable[[Tensor], Tensor]) -> str:
    """Judges effective_sample_size(log_weights): (K, N), nats -> how many draws count for each image, (N,), from 1 to K.

    eq. effective-sample-size. The mistakes are in `ESS_MISTAKES`.
    """
    large = torch.tensor([1000.0, -1000.0]) + torch.randn(5, 2)
    wide = torch.tensor([[900.0, 1.0], [-900.0, 2.0], [899.0, 1.5]])
    weights = (2 * torch.randn(5, 3), torch.randn(3, 4) + 1, large, torch.randn(4, 4), torch.randn(1, 3), torch.randn(6, 1), wide)
    return judge("effective_sample_size", fn, ess_recipe, ESS_MISTAKES, [{"log_weights": w} for w in weights])


def pooled_recipe(
    estimates: Tensor,
    counts: Tensor,
    weight: Function = lambda counts: counts.log(),
    axis: int = 0,
    pool: Function = torch.logsumexp,
    total: Function = lambda counts: counts.sum().log(),
    whole: Function = itself,
) -> Tensor:
    """logsumexp(estimates + log counts) - log of all draws: (N,); the arguments put mistakes into it."""
    counts = counts.to(estimates.dtype)
    value: Tensor = whole(pool(estimates + weight(counts)[:, None], axis) - total(counts))
    return value


def pooled_with(**switches: Any) -> partial[Tensor]:
    return partial(pooled_recipe, **switches)


def shifted_sum(shift: Function) -> Function:
    """logsumexp, but that `shift`, and not the maximum over the runs, is subtracted and added."""

    def pool(v: Tensor, axis: int) -> Tensor:
        by = shift(v, axis, keepdim=True)
        value: Tensor = ((v - by).exp().sum(axis, keepdim=True).log() + by).squeeze(axis)
        return value

    return pool


POOLED_MISTAKES: Mistakes = {
    "mean-logs": (
        "this is a mean of the logarithms; the mean of the weights belongs inside the logarithm",
        *(
            lambda e, c: e.mean(0),
            lambda e, c: (e * c[:, None]).sum(0) / c.sum(),
        ),
    ),
    "unweighted": (
        "all runs count the same, whatever their number of draws",
        pooled_with(weight=torch.zeros_like, total=lambda counts: math.log(len(counts))),
    ),
    "no-total": ("the log of the number of all draws is not subtracted", pooled_with(total=lambda counts: 0.0)),
    "log-runs": (
        "the log of the number of runs is subtracted, not of draws",
        pooled_with(total=lambda counts: math.log(len(counts))),
    ),
    "sum-of-logs": (
        "the logs of the numbers of draws are added up; the log of their sum belongs there",
        pooled_with(total=lambda counts: counts.log().sum()),
    ),
    "both": (
        "the log of the number of runs is subtracted too: the number of draws is enough",
        pooled_with(total=lambda counts: counts.sum().log() + math.log(len(counts))),
    ),
    "mean-count": (
        "the log of a run's mean number of draws is subtracted, not of all",
        pooled_with(total=lambda c: c.mean().log()),
    ),
    "no-counts": ("the runs are not multiplied by their numbers of draws", pooled_with(weight=torch.zeros_like)),
    "counts-subtracted": ("the log of a run's draws is subtracted; add it", pooled_with(weight=lambda counts: -counts.log())),
    "no-log": (
        "the numbers of draws are added as they are; their logarithms belong there",
        *(pooled_with(weight=itself, total=total) for total in (lambda c: c.sum().log(), torch.sum, lambda c: c.logsumexp(0))),
    ),
    "max": ("this is the largest estimate", lambda e, c: e.amax(0)),
    "overflow": (
        "exp overflows or underflows at estimates of +-1000: use torch.logsumexp",
        pooled_with(pool=lambda v, axis: v.exp().sum(axis).log()),
        pooled_with(pool=lambda v, axis: v.double().exp().sum(axis).log().float()),
        *(pooled_with(pool=shifted_sum(shift)) for shift in (every_max, torch.mean)),
    ),
    "scalar": (
        "this is one number for the batch; keep one for each image",
        pooled_with(whole=torch.mean),
        pooled_with(whole=torch.sum),
    ),
    "sign": ("the sign is wrong: this is a loss", pooled_with(whole=torch.neg)),
}


@verdict
def check_pooled(fn: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Judges pooled(estimates, counts): (R, N), nats, and (R,), int64 -> the estimate of all draws together, (N,), nats.

    Row r is the log of the mean weight over the counts[r] draws of run r. eq. importance-weighted-bound. The mistakes are in
    `POOLED_MISTAKES`.
    """
    cases = [
        {"estimates": 2 * torch.randn(3, 4), "counts": torch.tensor([5, 1, 20])},
        {
            "estimates": torch.randn(2, 3) + torch.tensor([[1000.0, -1000.0, 500.0], [1000.0, -1000.0, -500.0]]),
            "counts": torch.tensor([7, 100]),
        },
        {"estimates": torch.randn(1, 2), "counts": torch.tensor([3])},
        {"estimates": torch.randn(4, 1), "counts": torch.tensor([2, 2, 2, 2])},
    ]
    return judge("pooled", fn, pooled_recipe, POOLED_MISTAKES, cases, "estimates")


def error_recipe(
    values: Tensor,
    centre: Function = torch.mean,
    power: Function = torch.square,
    less: int = 1,
    over: Function = math.sqrt,
    root: Function = torch.sqrt,
    factor: float = 1.0,
) -> Tensor:
    """The standard deviation over the root of N: a scalar; the arguments put mistakes into it."""
    value: Tensor = factor * root(power(values - centre(values)).sum() / (len(values) - less)) / over(len(values))
    return value


def error_with(**switches: Any) -> partial[Tensor]:
    return partial(error_recipe, **switches)


def nothing(values: Any) -> float:
    return 0.0


STANDARD_ERROR_MISTAKES: Mistakes = {
    "deviation": (
        "this is the standard deviation of one image; the mean of N is surer, by the root of N",
        error_with(over=lambda n: 1.0),
    ),
    "variance": (
        "the root is missing: this is a variance",
        *(error_with(root=itself, over=over) for over in (float, lambda n: 1.0, math.sqrt)),
    ),
    "over-n": ("the standard deviation is divided by N; divide by its root", error_with(over=float)),
    "biased": ("the squares are divided by N; their mean was fitted too, so divide by N - 1", error_with(less=0)),
    "twice-less": ("N - 1 stands where N should: the mean is one of N values", error_with(over=lambda n: math.sqrt(n - 1))),
    "interval": (
        "this is half of an interval, 1.96 or 2 or 3 standard errors; give one",
        *(error_with(factor=factor) for factor in (1.96, 2.0, 3.0, 3.92)),
    ),
    "multiplied": (
        "the standard deviation is multiplied by the root of N; divide by it",
        error_with(over=lambda n: 1 / math.sqrt(n)),
    ),
    "not-centred": ("the mean is not subtracted before the squares are taken", error_with(centre=nothing)),
    "mean": ("this is the mean itself", lambda v: v.mean()),
}


@verdict
def check_standard_error(fn: Callable[[Tensor], Tensor]) -> str:
    """Judges standard_error(values): (N,) -> the standard error of their mean, (): the deviation with N - 1, over the root of N.

    The mistakes are in `STANDARD_ERROR_MISTAKES`.
    """
    cases = [{"values": scale * torch.randn(n) + mean} for n, scale, mean in ((6, 2.0, 3.0), (2, 1.0, -1.0), (40, 5.0, -90.0))]
    return judge("standard_error", fn, error_recipe, STANDARD_ERROR_MISTAKES, cases)


# the estimate of log p(x), against a model that knows it


class Encoder(nn.Module):
    """The posterior's mean and the log of its variances, a little off, so that an importance weight is no constant."""

    def __init__(self, weight: Tensor, scale: float, spread: float = 0.7) -> None:
        super().__init__()
        self.spread = spread  # of log_var over the posterior's
        self.precision = 1 + (weight**2).sum(0) / scale**2  # of the posterior, whose units are independent
        self.back = weight / (scale**2 * self.precision)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.flatten(1) @ self.back
        return mean + 0.5 * self.precision.rsqrt(), (self.spread - self.precision.log()).expand_as(mean)


class Decoder(nn.Module):
    """x = weight z, the columns of the weight orthogonal."""

    def __init__(self, weight: Tensor, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight, self.image_shape = weight, image_shape

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.weight.T).view(-1, *self.image_shape)


def linear_example(height: int = 2, width: int = 3, spread: float = 0.7) -> tuple[VAE, Tensor, Tensor]:
    """A linear-Gaussian VAE of three latents, images of it (10, 1, height, width), and their log p(x)."""
    generator, shape, pixels = torch.Generator().manual_seed(0), (1, height, width), height * width
    weight = torch.linalg.qr(torch.randn(pixels, 3, generator=generator))[0] * torch.tensor([1.5, 1.0, 0.7])
    noise = torch.randn(10, 3 + pixels, generator=generator)
    x = noise[:, :3] @ weight.T + 0.6 * noise[:, 3:]
    covariance = weight @ weight.T + 0.36 * torch.eye(pixels)
    truth = torch.distributions.MultivariateNormal(torch.zeros(pixels), covariance).log_prob(x)
    return VAE(Encoder(weight, 0.6, spread), Decoder(weight, shape), Gaussian(0.6), shape, 3), x.view(-1, *shape), truth


def likelihood_recipe(
    model: VAE,
    x: Tensor,
    num_samples: int,
    noise: Function = itself,
    deviation: Function = lambda s: (s / 2).exp(),
    bound: Function = bound_recipe,
    **of_the_weights: Any,
) -> Tensor:
    """An importance-weighted estimate of log p(x): (N,); the arguments put mistakes into it, others into the log-weights."""
    mean, log_var = model.encode(x, validate=False)
    z = mean + deviation(log_var) * noise(torch.randn(num_samples, *mean.shape))
    log_likelihood = model.likelihood.log_prob(x.repeat(num_samples, 1, 1, 1), model.decode(z.flatten(0, 1)), validate=False)
    value: Tensor = bound(log_weights_recipe(log_likelihood.view(num_samples, -1), z, mean, log_var, **of_the_weights))
    return value


def likelihood_with(**switches: Any) -> partial[Tensor]:
    return partial(likelihood_recipe, **switches)


def prior_estimate(model: VAE, x: Tensor, num_samples: int) -> Tensor:
    z = torch.randn(num_samples, len(x), model.latent_dim)
    log_likelihood = model.likelihood.log_prob(x.repeat(num_samples, 1, 1, 1), model.decode(z.flatten(0, 1)), validate=False)
    value: Tensor = bound_recipe(log_likelihood.view(num_samples, -1))
    return value


LOG_LIKELIHOOD_MISTAKES: Mistakes = {
    "elbo": (
        "the log-weights are averaged: this is the ELBO; the mean belongs inside the logarithm",
        likelihood_with(bound=lambda w: w.mean(0)),
    ),
    "no-log-k": ("log K is missing: logsumexp is the log of a sum, not of a mean", likelihood_with(bound=lambda w: w.logsumexp(0))),
    "log-k-added": (
        "log K is added; subtract it",
        likelihood_with(bound=lambda w: w.logsumexp(0) + math.log(len(w))),
    ),
    "overflow": (
        "exp underflows where an image has hundreds of nats: use torch.logsumexp",
        likelihood_with(bound=lambda w: w.exp().mean(0).log()),
    ),
    "prior-draws": (
        "z is drawn from the prior, so with few draws hardly one explains x: draw it from q(z given x)",
        prior_estimate,
    ),
    "no-noise": ("the mean of q is decoded at every draw: the noise is missing", likelihood_with(noise=torch.zeros_like)),
    "noise-variance": (
        "the noise is scaled by exp(log_var), the variance, not by exp(log_var / 2)",
        likelihood_with(deviation=torch.exp),
    ),
    "noise-no-scale": ("the noise has deviation 1, whatever log_var is", likelihood_with(deviation=torch.ones_like)),
    "sign": ("the sign is wrong: this is a negative log-likelihood", likelihood_with(bound=lambda w: -bound_recipe(w))),
    "max": ("this is the largest log-weight", likelihood_with(bound=lambda w: w.amax(0))),
    "scalar": (
        "this is one number for the batch; keep one for each image",
        likelihood_with(bound=lambda w: bound_recipe(w).mean()),
    ),
    **{  # of the mistakes of the weights those whose estimate is near to some number, whatever the noise is
        f"weights-{name}": (
            f"in the weights: {sentence}",
            *(likelihood_with(**fn.keywords) for fn in LOG_WEIGHTS_MISTAKES[name][1:2]),
        )
        for name, (sentence, *_) in LOG_WEIGHTS_MISTAKES.items()
        if name in ("no-prior", "no-q", "q-added", "closed-kl", "no-log-det")
    },
}


def close_to(got: Tensor, expected: Tensor) -> bool:
    """Whether two estimates of ten numbers agree, to the noise of some thousand draws."""
    if got.shape != expected.shape:
        return False
    difference = (got - expected).abs()
    return bool(difference.max() < 0.25) and bool(difference.mean() < 0.08)


@verdict
def check_log_likelihood(fn: Callable[[VAE, Tensor, int], Tensor]) -> str:
    """Judges log_likelihood(model, x, num_samples): an importance-weighted estimate of log p(x), (N,), nats, by draws of q.

    model is a linear-Gaussian `VAE`, whose log p(x) is known, and x (N, 1, 2, 3) holds real numbers: so the estimate is held against
    the truth. The mistakes are in `LOG_LIKELIHOOD_MISTAKES`, with "few-draws", "same-noise" and "mean-of-parts".
    """
    model, x, truth = linear_example()
    count = 4000
    what = f"log_likelihood(model, x {tuple(x.shape)}, {count})"
    got = tensor_from(what, fn, model, x, count).detach()
    again = tensor_from(what, fn, model, x, count, seed=1).detach()
    few = tensor_from(f"log_likelihood(model, x {tuple(x.shape)}, 3)", fn, model, x, 3).detach()
    if not close_to(got, truth):

        def matches(wrong: Function) -> bool:
            torch.default_generator.manual_seed(2)
            with torch.no_grad():
                return close_to(got, wrong(model, x, count))

        if found := recognized(LOG_LIKELIHOOD_MISTAKES, matches):
            fail_by_name("log_likelihood", LOG_LIKELIHOOD_MISTAKES, found[0])
        if got.shape != truth.shape or got.dtype != truth.dtype:
            check_same(what, got, truth)
        if (got - again).abs().mean() > 0.1:
            fail(
                f"{what}: two calls differ by {(got - again).abs().mean():.2g} nats, as if few draws counted: "
                "are there num_samples draws of q(z given x), and not of the prior?",
                "few-draws",
            )
        difference = (got - truth).mean().item()
        fail(f"{what}: the estimate lies {difference:+.3g} nats from log p(x), on average; this is no mistake that I know")
    if torch.equal(got, again):
        fail(f"{what} gives the same at each call: the noise is the same, or there is none", "same-noise")
    with torch.no_grad():
        low = torch.stack([attempt(what, fn, model, x, 3, seed=seed) for seed in range(30)]).mean(0)
    if few.shape == truth.shape and low.mean() - truth.mean() < -1:
        fail_by_name("log_likelihood", LOG_LIKELIHOOD_MISTAKES, ["prior-draws"])
    if few.shape != truth.shape or (low.mean() - truth.mean()).abs() < 0.03:
        fail("log_likelihood: three draws give the same as thousands, on average: num_samples is not what it says", "num-samples")
    wide, images, evidence = linear_example(spread=4.0)  # some hundred draws are few for its q, and 8000 are enough
    what = "log_likelihood(model, x (300, 1, 2, 3), 8000)"
    short = attempt(what, fn, wide, images.repeat(30, 1, 1, 1), 8000, seed=0) - evidence.repeat(30)
    if short.mean() < -0.06:
        fail(
            f"{what}: where q is wide the estimate lies {-short.mean():.2g} nats below log p(x), as that of fewer draws does: is the "
            "logarithm taken in each part of the draws, and its mean over the parts? Add up the weights of all, and take one logarithm",
            "mean-of-parts",
        )
    tall, images, evidence = linear_example(20, 20)
    what = f"log_likelihood(model, x {tuple(images.shape)}, 500)"
    result = tensor_from(what, fn, tall, images, 500).detach()
    if not result.isfinite().all():
        fail_by_name(what, LOG_LIKELIHOOD_MISTAKES, ["overflow"])
    if result.shape != evidence.shape or (result - evidence).abs().max() > 1:
        fail(f"{what}: the estimate is right for images of six pixels, and not for those of 400: is a number written into it?")
    return f"the estimate is log p(x) to {(got - truth).abs().mean():.2g} nats on {len(x)} images of a model that knows it"
