"""Judges of the terms of the ELBO and of the bounds built from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli

from vaelib.checks.verdicts import Mistakes, judge, verdict
from vaelib.densities import reparameterize
from vaelib.objectives import gaussian_kl as kl
from vaelib.objectives import importance_weighted_bound as bound

Function = Callable[..., Tensor]


def itself(value: Tensor) -> Tensor:
    return value


def times(factor: float) -> Function:
    return lambda value: factor * value


def kl_recipe(
    m: Tensor,
    s: Tensor,
    swap: bool = False,
    read: Function = itself,
    square: Function = torch.square,
    var: Function = torch.exp,
    one: float = 1.0,
    log: float = 1.0,
    factors: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.5),
    reverse: bool = False,
    reduce: Function = lambda units: units.sum(-1),
    sign: float = 1.0,
) -> Tensor:
    """KL(N(m, exp(s)) || N(0, I)): sum over latents of (m^2 + exp(s) - 1 - s) / 2; the arguments put mistakes into it."""
    m, s = (s, m) if swap else (m, s)
    s = read(s)
    if reverse:  # of N(0, I) from q
        m, s = m * (-s / 2).exp(), -s
    a, b, c, d = factors
    return sign * reduce(a * square(m) + b * var(s) - c * one - d * log * s)


def kl_with(**switches: Any) -> partial[Tensor]:
    return partial(kl_recipe, **switches)


# where a bracket behind the factor 1/2 closes too early: the factors of mean^2, variance, 1 and log_var
EARLY = [
    *(
        (0.5, 0.5, 1, 1),
        (0.5, 1, 1, 1),
        (1, 0.5, 1, 1),
        (0.5, 0.5, 0.5, 1),
        (0.5, 0.5, 1, 0.5),
        (0.5, 1, 0.5, 0.5),
        (1, 0.5, 0.5, 0.5),
    ),
    *(
        (-1, -1, 0.5, 0.5),
        (0.5, -1, 0.5, 0.5),
        (-1, 0.5, 0.5, 0.5),
        (-1, -1, 0.5, -1),
        (1, 1, 0.5, 1),
        (1, 1, 0.5, 0.5),
        (1, 1, 1, 0.5),
    ),
]
KL_MISTAKES: Mistakes = {
    "sign": ("the sign is wrong: a KL divergence is never negative", kl_with(sign=-1.0)),
    "no-half": ("your KL is twice too large: the factor 1/2 is missing", kl_with(factors=(1, 1, 1, 1))),
    "half-twice": ("your KL is twice too small: the factor 1/2 stands there twice", kl_with(factors=(0.25, 0.25, 0.25, 0.25))),
    "mean-latents": (
        "your KL is 20 times too small where there are 20 latents: it is averaged over the latent dimensions",
        kl_with(reduce=lambda units: units.mean(-1)),
    ),
    "mean-batch": (
        "your KL is averaged over the batch; keep one number for each image",
        kl_with(reduce=lambda units: units.sum(-1).mean()),
    ),
    "sum-batch": ("your KL is added up over the batch; keep one number for each image", kl_with(reduce=lambda units: units.sum())),
    "mean-all": (
        "your KL is averaged over batch and latents; add up over the last axis only",
        kl_with(reduce=lambda units: units.mean()),
    ),
    "not-summed": ("your KL is not added up over the latent dimensions: sum(-1) is missing", kl_with(reduce=itself)),
    "wrong-axis": (
        "your KL is added up over the images; add up over the last axis",
        *(kl_with(reduce=lambda units: units.sum(0)), kl_with(reduce=lambda units: units.mean(0))),
    ),
    "max-latents": (
        "your KL is that of the largest latent; add up over the last axis",
        kl_with(reduce=lambda units: units.amax(-1)),
    ),
    "variance": ("log_var is taken for the variance; exp(log_var) is the variance", kl_with(read=torch.log)),
    "std": (
        "log_var is taken for the standard deviation; exp(log_var / 2) is that",
        *(kl_with(read=lambda s: 2 * s.log()), kl_with(read=lambda s: s.square().log())),
    ),
    "log-std": ("log_var is taken for the log of the standard deviation; it is twice that", kl_with(read=times(2))),
    "half-log-var": ("log_var is halved, as if it were twice the log of the variance", kl_with(read=times(0.5))),
    "inverse": ("log_var is taken for the log of the precision: its sign is wrong throughout", kl_with(read=torch.neg)),
    "no-constant": ("the -1 is missing: the KL of the prior itself must be 0", kl_with(one=0.0)),
    "constant-sign": ("the 1 has the wrong sign: the KL of the prior itself must be 0", kl_with(one=-1.0)),
    "constant-once": (
        "the 1 is subtracted once, not once for each latent",
        *(
            kl_with(reduce=lambda units, again=again: units.sum(-1) + 0.5 * (units.shape[-1] - again), one=1.0)
            for again in (1.0, 2.0)  # inside the bracket of the factor 1/2, or outside
        ),
    ),
    "log-var-sign": ("log_var is added; it must be subtracted", kl_with(log=-1.0)),
    "no-log-var": ("the term -log_var is missing", kl_with(log=0.0)),
    "half-log": ("the term -log_var is halved: this is the log of the standard deviation", kl_with(log=0.5)),
    "no-exp": ("exp is missing: log_var stands where the variance should", kl_with(var=itself)),
    "std-for-variance": (
        "exp(log_var / 2), the standard deviation, stands where the variance should",
        kl_with(var=lambda s: (s / 2).exp()),
    ),
    "squared-variance": ("the variance is squared", kl_with(var=lambda s: (2 * s).exp())),
    "precision": ("exp(-log_var), the precision, stands where the variance should", kl_with(var=lambda s: (-s).exp())),
    "no-variance": ("the variance exp(log_var) is missing", kl_with(var=torch.zeros_like)),
    "variance-sign": ("the variance is subtracted; it must be added", kl_with(var=lambda s: -s.exp())),
    "reversed": ("this is KL(p || q), not KL(q || p): the posterior q comes first", kl_with(reverse=True)),
    "mean-not-squared": ("the mean is not squared", kl_with(square=itself), kl_with(square=torch.abs)),
    "no-mean": ("the term mean^2 is missing", kl_with(square=torch.zeros_like)),
    "mean-sign": ("the square of the mean is subtracted; it must be added", kl_with(square=lambda m: -m.square())),
    "bracket": (
        "the factor 1/2 reaches only a part of the sum: a bracket is closed too early",
        *(kl_with(factors=factors) for factors in EARLY),
        *(kl_with(square=lambda m, power=power: power * m.square()) for power in (0.5, 2.0)),
        *(kl_with(var=lambda s, power=power: power * s.exp()) for power in (0.5, 2.0)),
        *(kl_with(one=one) for one in (0.5, 2.0)),
        kl_with(log=2.0),
    ),
    "swapped": ("mean and log_var are swapped", kl_with(swap=True)),
    "base": ("your KL is in bits; nats are natural", kl_with(reduce=lambda units: units.sum(-1) / math.log(2))),
    "floor": ("a clamp or an added epsilon changes the value", kl_with(read=lambda s: s.clamp(-5, 5))),
}


def gaussians(*shapes: tuple[int, int], **scales: float) -> list[dict[str, Tensor]]:
    """For each shape one case: an argument of standard normal numbers, times its scale, for each name."""
    return [{key: scale * torch.randn(*shape) for key, scale in scales.items()} for shape in shapes]


@verdict
def check_kl(fn: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Judges kl(mean, log_var): both (N, L) -> KL(N(mean, exp(log_var)) || N(0, I)), (N,), nats. eq. gaussian-kl

    The mistakes are in `KL_MISTAKES`. Kingma and Welling 2014, appendix B.
    """
    cases = gaussians((5, 20), (1, 3), (4, 1), (4, 4), mean=1.0, log_var=1.0)
    cases[0]["log_var"][0].abs_()  # an image for which a logarithm of log_var is finite
    cases[3]["log_var"].abs_()
    extremes = [
        {"mean": torch.tensor([[-20.0, 0.0, 5.0], [0.0, 0.0, 0.0]]), "log_var": torch.tensor([[-9.0, 6.0, 0.0], [-9.0, 9.0, -6.0]])}
    ]
    return judge("kl", fn, kl, KL_MISTAKES, cases, "mean log_var", extremes)


def sample_recipe(
    m: Tensor,
    s: Tensor,
    e: Tensor,
    swap: bool = False,
    location: Function = itself,
    scale: Function = lambda m, s: (s / 2).exp(),
    noise: Function = itself,
    join: Function = lambda location, scale, noise: location + scale * noise,
) -> Tensor:
    """m + exp(s / 2) * e; the arguments put mistakes into it."""
    m, s = (s, m) if swap else (m, s)
    return join(location(m), scale(m, s), noise(e))


def sample_with(**switches: Any) -> partial[Tensor]:
    return partial(sample_recipe, **switches)


def scaled_by(*scales: Function) -> list[partial[Tensor]]:
    """The scale as a function of log_var."""
    return [sample_with(scale=lambda m, s, scale=scale: scale(s)) for scale in scales]


REPARAMETERIZE_MISTAKES: Mistakes = {  # m: mean, s: log_var, e: eps
    "variance": ("the noise is scaled by the variance exp(log_var), not by exp(log_var / 2)", *scaled_by(torch.exp)),
    "squared-variance": ("the noise is scaled by the square of the variance", *scaled_by(lambda s: (2 * s).exp())),
    "root-twice": ("the noise is scaled by the root of the standard deviation", *scaled_by(lambda s: (s / 4).exp())),
    "no-exp": ("the noise is scaled by a logarithm", *scaled_by(itself, times(0.5), torch.abs)),
    "inverse": ("the noise is divided by the standard deviation", *scaled_by(lambda s: (-s / 2).exp())),
    "precision": ("the noise is divided by the variance", *scaled_by(lambda s: (-s).exp())),
    "bracket": (
        "the 1/2 stands outside exp: exp(log_var) / 2 is half the variance",
        *scaled_by(lambda s: s.exp() / 2, lambda s: math.exp(0.5) * s),
    ),
    "root": (
        "the noise is scaled by a root of log_var, with no exp",
        *scaled_by(torch.sqrt, lambda s: s.abs().sqrt(), lambda s: s.clamp(min=0).sqrt()),
    ),
    "softplus": ("the noise is scaled by the softplus of log_var", *scaled_by(F.softplus, lambda s: F.softplus(s).sqrt())),
    "norm": (
        "the noise is scaled by exp(|mean|^2 / 4), so log_var has no say in it",
        sample_with(scale=lambda m, s: (m.square().sum(-1, keepdim=True) / 4).exp()),
        sample_with(scale=lambda m, s: (m.square() / 4).exp()),
    ),
    "no-noise": ("there is no noise: the mean is returned", sample_with(noise=torch.zeros_like)),
    "constant-noise": (
        "the noise is left out: the standard deviation itself is added to the mean",
        sample_with(noise=torch.ones_like),
    ),
    "no-mean": ("the mean is missing", sample_with(location=torch.zeros_like)),
    "mean-sign": ("the mean has the wrong sign", sample_with(location=torch.neg)),
    "no-scale": ("the noise has standard deviation 1, whatever log_var is", sample_with(scale=lambda m, s: torch.ones_like(s))),
    "scale-mean": (
        "the variance is averaged, but each latent of each image has its own",
        sample_with(scale=lambda m, s: (s.mean(-1, keepdim=True) / 2).exp()),
        sample_with(scale=lambda m, s: (s.mean(0, keepdim=True) / 2).exp()),
        sample_with(scale=lambda m, s: (s.mean() / 2).exp() + 0 * s),
    ),
    "one-scale": ("all images share the variance of the first one", sample_with(scale=lambda m, s: (s[:1] / 2).exp() + 0 * s)),
    "one-noise": ("all images share the noise of the first one", sample_with(noise=lambda e: e[:1] + 0 * e)),
    "one-noise-latents": ("all latents share one noise", sample_with(noise=lambda e: e[:, :1] + 0 * e)),
    "noise-sign": ("the noise is subtracted; add it", sample_with(noise=torch.neg)),
    "noise-abs": ("the noise is never negative", sample_with(noise=torch.abs), sample_with(noise=torch.square)),
    "scaled-mean": (
        "the standard deviation multiplies the mean; it must multiply the noise alone",
        *(sample_with(join=lambda m, s, e: (m + e) * s), sample_with(join=lambda m, s, e: m * s + e)),
    ),
    "added": ("the standard deviation is added to the noise; it must multiply it", sample_with(join=lambda m, s, e: m + s + e)),
    "swapped": ("mean and log_var are swapped", sample_with(swap=True)),
    "floor": ("a clamp or an added epsilon changes the value", *scaled_by(lambda s: (s.clamp(-5, 5) / 2).exp())),
}


@verdict
def check_reparameterize(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Judges reparameterize(mean, log_var, eps): all (N, L) -> z = mean + exp(log_var / 2) * eps, (N, L). eq. reparameterization

    eps is the standard normal noise, given. The mistakes are in `REPARAMETERIZE_MISTAKES`, with "own-noise" and "detached".
    """
    cases = gaussians((5, 4), (1, 3), (3, 1), (4, 4), mean=1.0, log_var=1.0, eps=1.0)
    cases[3]["log_var"].abs_()
    extremes = gaussians((2, 3), mean=30.0, log_var=1.0, eps=1.0)
    extremes[0]["log_var"] = torch.tensor([[-9.0, 9.0, -6.0], [6.0, -9.0, 9.0]])
    return judge("reparameterize", fn, reparameterize, REPARAMETERIZE_MISTAKES, cases, "mean log_var", extremes)


def bernoulli_pixels(x: Tensor, logits: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) of pixels under sigmoid(logits), summed: (N,), nats; no check of x. eq. bernoulli-log-prob"""
    return bernoulli_pixels(x, logits).flatten(1).sum(1)


def naive_log(x: Tensor, logits: Tensor, floor: float = 0.0) -> Tensor:
    """By log(sigmoid), each pixel; at large logits it is infinite, or `floor` shows."""
    return x * (logits.sigmoid() + floor).log() + (1 - x) * (1 - logits.sigmoid() + floor).log()


FLOORED_BY_TORCH: list[Function] = [  # right but for logits beyond some 15, where torch's own functions floor the log
    lambda x, o: -F.binary_cross_entropy(o.sigmoid(), x, reduction="none"),
    lambda x, o: Bernoulli(probs=o.sigmoid(), validate_args=False).log_prob(x),
]


def mse(factor: float, activation: Function) -> Function:
    return lambda x, o: -factor * (x - activation(o)).square()


def elbo_recipe(
    x: Tensor,
    mean: Tensor,
    log_var: Tensor,
    logits: Tensor,
    pixels: Function = bernoulli_pixels,
    over_pixels: Function = lambda values: values.flatten(1).sum(1),
    likelihood: float = 1.0,
    rate: float = 1.0,
    whole: Function = itself,
    kl: Function = kl_recipe,
    **of_the_kl: Any,
) -> Tensor:
    """Log-likelihood - KL: (N,); the arguments put mistakes into it, those that it does not know into the KL."""
    log_likelihood = likelihood * over_pixels(pixels(x, logits)) if likelihood else torch.zeros(())
    return whole(log_likelihood - rate * kl(mean, log_var, **of_the_kl) if rate else log_likelihood)


def elbo_with(**switches: Any) -> partial[Tensor]:
    return partial(elbo_recipe, **switches)


def per_pixel(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


ELBO_MISTAKES: Mistakes = {  # x, m: mean, s: log_var, o: logits
    "loss": (
        "this is minus the ELBO, a loss; the ELBO is better when it is higher",
        *(elbo_with(whole=lambda v: -v), elbo_with(whole=lambda v: -v.mean()), elbo_with(whole=lambda v: -v.sum())),
    ),
    "kl-added": ("the KL is added; subtract it", elbo_with(rate=-1.0)),
    "no-kl": ("the KL is missing: this is an autoencoder", elbo_with(rate=0.0)),
    "no-likelihood": ("the log-likelihood is missing", elbo_with(likelihood=0.0)),
    "likelihood-sign": ("the log-likelihood is subtracted: its sign is wrong", elbo_with(likelihood=-1.0)),
    "mean-pixels": (
        "the log-likelihood is averaged over the pixels; add it up, as the KL is over the latents",
        elbo_with(over_pixels=per_pixel),
    ),
    "mean-channels": (
        "the log-likelihood is averaged over the channels; add it up over them too",
        elbo_with(over_pixels=lambda values: values.mean(1).flatten(1).sum(1)),
    ),
    "mean-default": (
        "the log-likelihood is averaged over pixels and images, as a cross entropy is by default; add up over the pixels of each image",
        elbo_with(over_pixels=torch.mean),
    ),
    "likelihood-sum-batch": (
        "the log-likelihood is added up over the batch; keep one number for each image",
        elbo_with(over_pixels=torch.sum),
    ),
    "likelihood-mean-batch": (
        "the log-likelihood is averaged over the batch; keep one number for each image",
        elbo_with(over_pixels=lambda values: values.flatten(1).sum(1).mean()),
    ),
    "mean-both": (
        "both terms are averaged, over the pixels and over the latents: the KL then counts too much; add both up",
        elbo_with(over_pixels=per_pixel, reduce=lambda units: units.mean(-1)),
        elbo_with(over_pixels=per_pixel, reduce=lambda units: units.mean(-1), whole=torch.mean),
        elbo_with(over_pixels=torch.mean, reduce=lambda units: units.mean()),
    ),
    "mean-batch": ("the ELBO is averaged over the batch; keep one number for each image", elbo_with(whole=torch.mean)),
    "sum-batch": ("the ELBO is added up over the batch; keep one number for each image", elbo_with(whole=torch.sum)),
    "base": ("the ELBO is in bits; nats are natural", elbo_with(whole=lambda v: v / math.log(2))),
    "beta": (
        "the KL is weighted by a factor, as in a beta-VAE; the ELBO counts it once",
        *(elbo_with(rate=beta) for beta in (0.01, 0.1, 0.25, 3.0, 4.0, 5.0, 10.0)),
    ),
    "twice": ("the log-likelihood is counted twice", elbo_with(likelihood=2.0)),
    "half": ("the log-likelihood is halved", elbo_with(likelihood=0.5)),
    "sigmoid-twice": ("the sigmoid is applied twice", elbo_with(pixels=lambda x, o: bernoulli_pixels(x, o.sigmoid()))),
    "mse": (
        "the squared error stands where the Bernoulli log-likelihood should",
        *(elbo_with(pixels=mse(factor, activation)) for factor in (0.5, 1.0) for activation in (torch.sigmoid, itself)),
    ),
    "absolute-error": (
        "the absolute error stands where the Bernoulli log-likelihood should",
        *(elbo_with(pixels=lambda x, o, end=end: -(x - end(o)).abs()) for end in (torch.sigmoid, itself)),
    ),
    "swapped-pixels": (
        "x and logits are swapped in the cross entropy",
        *(elbo_with(pixels=lambda x, o: bernoulli_pixels(o, x)), elbo_with(pixels=lambda x, o: bernoulli_pixels(o.sigmoid(), x))),
    ),
    "own-output": ("the target is the model's own output", elbo_with(pixels=lambda x, o: bernoulli_pixels(o.sigmoid(), o))),
    "inverted": (
        "black and white are exchanged: sigmoid(logit) is the probability of x = 1",
        elbo_with(pixels=lambda x, o: bernoulli_pixels(1 - x, o)),
    ),
    "ones-only": (
        "the pixels with x = 0 do not count: (1 - x) log(1 - p) is missing",
        elbo_with(pixels=lambda x, o: x * F.logsigmoid(o)),
    ),
    "zeros-only": (
        "the pixels with x = 1 do not count: x log p is missing",
        elbo_with(pixels=lambda x, o: (1 - x) * F.logsigmoid(-o)),
    ),
    "term-sign": (
        "the terms of x = 1 and of x = 0 are subtracted from each other; add them",
        *(elbo_with(pixels=lambda x, o, sign=sign: sign * (x * F.logsigmoid(o) - (1 - x) * F.logsigmoid(-o))) for sign in (1, -1)),
    ),
    "no-log": ("the log is missing: these are probabilities", elbo_with(pixels=lambda x, o: bernoulli_pixels(x, o).exp())),
    "no-sigmoid": (
        "the logits are taken for probabilities: the sigmoid is missing",
        *(
            elbo_with(pixels=lambda x, o, end=end: x * end(o).log() + (1 - x) * (1 - end(o)).log())
            for end in (itself, lambda o: o.clamp(1e-6, 1 - 1e-6))
        ),
    ),
    "overflow": (
        "log(sigmoid) is NaN or infinite where a probability rounds to 0: use logsigmoid, or the cross entropy with logits",
        elbo_with(pixels=naive_log),
    ),
    "floor": (
        "the probability has a floor, or is clamped, before its log is taken: use logsigmoid, or the cross entropy with logits",
        elbo_with(pixels=partial(naive_log, floor=1e-9)),
    ),
    **{  # the other mistakes of the KL, within the ELBO
        f"kl-{name}": (f"the log-likelihood is right; {sentence}", *(elbo_with(**wrong.keywords) for wrong in wrongs))
        for name, (sentence, *wrongs) in KL_MISTAKES.items()
        if name not in ("sign", "not-summed", "wrong-axis", "overflow", "floor")
    },
}


@verdict
def check_elbo(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Judges elbo(x, mean, log_var, logits) for a Bernoulli likelihood: (N,), nats, higher is better. eq. two-terms

    x, 0 or 1, and logits are (N, C, H, W), mean and log_var (N, L). The mistakes are in `ELBO_MISTAKES`.
    """
    cases = []
    for n, image, latents in ((5, (1, 4, 6), 20), (1, (3, 2, 2), 3), (3, (3, 3, 3), 3)):
        x, (mean, log_var) = torch.bernoulli(torch.full((n, *image), 0.4)), torch.randn(2, n, latents)
        cases.append({"x": x, "mean": mean, "log_var": log_var, "logits": 1.5 * torch.randn(n, *image)})
    cases[0]["log_var"][0].abs_()
    cases[2]["log_var"].abs_()
    cases[2]["logits"] = torch.rand_like(cases[2]["x"])  # in (0, 1), so that probabilities in place of logits give finite numbers
    sizes = torch.tensor([30.0, -30.0, 200.0, -200.0, 30.0, -30.0, 200.0, -200.0]).view(2, 1, 2, 2)
    x = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]).view(2, 1, 2, 2)
    extremes = [{"x": x, "mean": torch.randn(2, 3), "log_var": torch.randn(2, 3), "logits": sizes}]
    accepted = [elbo_with(pixels=pixels) for pixels in FLOORED_BY_TORCH]
    return judge("elbo", fn, elbo_recipe, ELBO_MISTAKES, cases, "mean log_var logits", extremes, accepted)


def bound_recipe(
    w: Tensor,
    axis: int = 0,
    pool: Function = torch.logsumexp,
    less_log_k: Function = lambda value, k: value - math.log(k),
    count: Callable[..., int] = lambda w, axis: w.shape[axis],
    whole: Function = itself,
) -> Tensor:
    """logsumexp over the samples - log K: (N,); the arguments put mistakes into it."""
    return whole(less_log_k(pool(w, axis), count(w, axis)))


def bound_with(**switches: Any) -> partial[Tensor]:
    return partial(bound_recipe, **switches)


def without_log_k(pool: Function, **switches: Any) -> partial[Tensor]:
    return bound_with(pool=pool, less_log_k=lambda value, k: value, **switches)


IWAE_MISTAKES: Mistakes = {  # w: log_weights
    "elbo": (
        "this is the mean of the log-weights, the ELBO: the mean belongs inside the logarithm",
        without_log_k(lambda w, axis: w.mean(axis)),
    ),
    "no-log-k": ("log K is missing: logsumexp is the log of a sum, not of a mean", bound_with(less_log_k=lambda value, k: value)),
    "log-k-added": ("log K is added; subtract it", bound_with(less_log_k=lambda value, k: value + math.log(k))),
    "minus-k": ("K is subtracted; subtract its logarithm", bound_with(less_log_k=lambda value, k: value - k)),
    "divided": (
        "the logarithm is divided by K; subtract log K instead",
        bound_with(less_log_k=lambda value, k: value / k),
    ),
    "log-base": (
        "log K has another base: logarithms are natural",
        *(bound_with(less_log_k=lambda value, k, log=log: value - log(k)) for log in (math.log2, math.log10)),
    ),
    "log-n": (
        "the log of the number of images is subtracted, not of the samples",
        bound_with(count=lambda w, axis: w.shape[1 - axis]),
    ),
    "wrong-axis": (
        "the sum runs over the images; it runs over the samples, axis 0",
        *(bound_with(axis=1), bound_with(axis=1, count=lambda w, axis: len(w)), without_log_k(torch.logsumexp, axis=1)),
    ),
    "overflow": (
        "exp overflows or underflows at log-weights of +-1000: use torch.logsumexp",
        *(
            bound_with(pool=lambda w, axis, floor=floor: (w.exp().sum(axis) + floor).log())
            for floor in (0.0, 1e-12, 1e-10, 1e-8, 1e-6)
        ),
        *(without_log_k(lambda w, axis, floor=floor: (w.exp().mean(axis) + floor).log()) for floor in (1e-12, 1e-10, 1e-8, 1e-6)),
        *(
            without_log_k(lambda w, axis, floor=floor: w.exp().mean(axis).clamp(min=floor).log())
            for floor in (1e-30, 1e-12, 1e-10, 1e-8)
        ),
        bound_with(pool=lambda w, axis: (w - w.max()).exp().sum(axis).log() + w.max()),
    ),
    "floor": (
        "a clamp of the log-weights changes the bound: use torch.logsumexp, which needs none",
        *(
            bound_with(pool=lambda w, axis, limit=limit: w.clamp(-limit, limit).logsumexp(axis))
            for limit in (10, 20, 30, 50, 80, 88, 100, 500, 700)
        ),
    ),
    "max": ("this is the largest log-weight", without_log_k(lambda w, axis: w.amax(axis))),
    "min": ("this is the smallest log-weight", without_log_k(lambda w, axis: w.amin(axis))),
    "median": ("this is the median of the log-weights", without_log_k(lambda w, axis: w.median(axis).values)),
    "no-shift": (
        "the largest log-weight is subtracted before exp, but not added again",
        bound_with(pool=lambda w, axis: (w - w.amax(axis, keepdim=True)).exp().sum(axis).log()),
    ),
    "shift-sign": (
        "the largest log-weight is subtracted before exp, and once more after it",
        bound_with(pool=lambda w, axis: w.logsumexp(axis) - 2 * w.amax(axis)),
    ),
    "weighted": (
        "this is the mean of the log-weights under their softmax, not the log of a mean",
        without_log_k(lambda w, axis: (w.softmax(axis) * w).sum(axis)),
    ),
    "no-log": (
        "the log is missing: this is the mean weight",
        without_log_k(lambda w, axis: w.exp().mean(axis)),
        without_log_k(lambda w, axis: w.exp().sum(axis)),
    ),
    "scalar": (
        "the bound is reduced over the batch; keep one number for each image",
        *(bound_with(whole=torch.mean), bound_with(whole=torch.sum), lambda w: bound(w.flatten()[:, None])[0]),
    ),
    "sign": (
        "the sign is wrong: this is a loss; the bound is better when it is higher",
        *(bound_with(whole=torch.neg), bound_with(whole=lambda value: -value.mean())),
    ),
}


@verdict
def check_iwae(fn: Callable[[Tensor], Tensor]) -> str:
    """Judges iwae(log_weights): (K, N), nats -> log of the mean weight over the K samples, (N,), nats.

    eq. importance-weighted-bound. The gradient must be softmax(log_weights). The mistakes are in `IWAE_MISTAKES`. Burda et al. 2016.
    """
    large = torch.tensor([1000.0, -1000.0]) + torch.randn(4, 2)
    mixed = torch.tensor([[-1000.0, 1.0], [2.0, 1000.0], [1.0, -1000.0]])
    weights = (2 * torch.randn(5, 3), large, torch.randn(1, 3), torch.randn(3, 1), torch.randn(4, 4), torch.randn(1, 1), mixed)
    return judge("iwae", fn, bound, IWAE_MISTAKES, [{"log_weights": w} for w in weights], "log_weights")
