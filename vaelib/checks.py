"""Judges of a student's own code: each runs it beside the library's and says in words whether it is right, or what is wrong.

A check holds a table of known mistakes: name -> (sentence, what the mistake computes, ...). A mistake is recognized where the
student's results are those of the mistake on every input, and the inputs are such that no two mistakes look alike. What the
student's code raises is told in the verdict; a check itself raises nothing but for wrong arguments of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib._validation import check_image_shape, check_int, describe
from vaelib.objectives import gaussian_kl as kl
from vaelib.objectives import gaussian_kl_per_unit as units
from vaelib.objectives import importance_weighted_bound as bound
from vaelib.retrieval import nearest_neighbours
from vaelib.vae import VAE, mlp_vae, reparameterize

T = TypeVar("T")
Mistakes = dict[str, tuple[Any, ...]]
Case = dict[str, Any]
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}  # float32 sums of a few hundred terms
RUNS, LEARNING_RATE = 50, 1e-3  # of a training step, each run with its own noise


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a check found; true where the code passed.

    Attributes:
        passed: whether the code is right.
        message: the same in words.
        mistake: a short name of the mistake where it is a known one, else None.
    """

    passed: bool
    message: str
    mistake: str | None = None

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{'passed' if self.passed else 'not yet'}{f' [{self.mistake}]' if self.mistake else ''}: {self.message}"


class Wrong(Exception):
    """Ends a check: what is wrong, and the mistake's name or None."""


def fail(message: str, mistake: str | None = None) -> NoReturn:
    raise Wrong(message, mistake)


def verdict(check: Callable[..., str]) -> Callable[..., Verdict]:
    """A check that returns its praise or calls `fail`, as a function that returns a `Verdict`; its random numbers are its own."""

    @functools.wraps(check)
    def judged(*arguments: Any, **named: Any) -> Verdict:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            try:
                return Verdict(True, check(*arguments, **named))
            except Wrong as wrong:
                return Verdict(False, *wrong.args)

    return judged


def attempt(what: str, fn: Callable[..., T], *arguments: Any, seed: int = 0) -> T:
    """fn(*arguments) with the global generator at `seed`; fails where it raises or changes a tensor among its arguments."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    before = [value.detach().clone() for value in tensors]
    torch.default_generator.manual_seed(seed)
    try:
        result = fn(*arguments)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        fail(f"{what} raised {type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}", "raises")
    if not all(map(torch.equal, tensors, before)):
        fail(f"{what} changes its arguments in place: they still belong to the caller; work on new tensors", "in-place")
    return result


def tensor_from(what: str, fn: Callable[..., Any], *arguments: Any, seed: int = 0) -> Tensor:
    """What `attempt` gives, which must be a tensor; on the CPU."""
    result = attempt(what, fn, *arguments, seed=seed)
    if result is None:
        fail(f"{what} returns None: is a return missing?", "no-return")
    if not isinstance(result, Tensor) or result.layout != torch.strided or result.is_meta:
        fail(f"{what} returns {' '.join(describe(result).split())}, expected a dense torch tensor")
    return result.cpu()


def same(got: Tensor, expected: Tensor) -> bool:
    """Whether shape, dtype and values agree."""
    return (got.shape, got.dtype) == (expected.shape, expected.dtype) and torch.allclose(got, expected, **TOLERANCE)


def check_same(what: str, got: Tensor, expected: Tensor) -> None:
    """Fails unless `same`, with the first place where the two differ."""
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        fail(f"{what}: got {describe(got)}, expected {describe(expected)}")
    if len(places := torch.isclose(got, expected, **TOLERANCE).logical_not().nonzero()):
        place = tuple(places[0].tolist())
        at = f" at index {place}" if place else ""
        fail(f"{what}: got {got[place].item():.6g}{at}, expected {expected[place].item():.6g}; this is no mistake that I know")


def judge(
    name: str, fn: Callable[..., Any], right: Callable[..., Tensor], mistakes: Mistakes, cases: Sequence[Case], learned: str = ""
) -> str:
    """Compares fn with `right` on the cases, {argument: value}; the gradient too, for the arguments named in `learned`."""
    calls = [
        f"{name}({', '.join(f'{key} {tuple(value.shape) if isinstance(value, Tensor) else value}' for key, value in case.items())})"
        for case in cases
    ]
    truths, results = [right(*case.values()) for case in cases], []
    for what, case in zip(calls, cases, strict=True):
        results.append(tensor_from(what, fn, *(deepcopy(value) for value in case.values())).detach())
        again = tensor_from(what, fn, *(deepcopy(value) for value in case.values()), seed=1).detach()
        if again.shape != results[-1].shape or not ((again == results[-1]) | (again != again) & (results[-1] != results[-1])).all():
            fail(f"{what} gives different results for the same arguments: it draws noise of its own", "own-noise")
    if not all(map(same, results, truths)):
        for mistake, (sentence, *wrongs) in mistakes.items():
            if any(all(same(got, wrong(*case.values())) for got, case in zip(results, cases, strict=True)) for wrong in wrongs):
                fail(f"{name}: {sentence}", mistake)
    for what, got, truth in zip(calls, results, truths, strict=True):
        check_same(what, got, truth)
    for what, case in zip(calls, cases, strict=True) if learned else ():
        check_gradient(what, fn, right, case, learned.split())
    return f"{name} is right in {len(cases)} cases" + (", and so is its gradient" if learned else "")


def gradients_of(what: str, total: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of a scalar; None where it does not depend on a leaf."""
    return attempt(f"the gradient of {what}", lambda: torch.autograd.grad(total, leaves, allow_unused=True))


def check_gradient(what: str, fn: Callable[..., Any], right: Callable[..., Tensor], case: Case, learned: Sequence[str]) -> None:
    """Fails unless the gradients of fn and `right` agree, for a weighted sum of the result and the arguments named in `learned`."""
    gradients = []
    for function in (right, fn):
        copy = {key: deepcopy(value).requires_grad_(key in learned) for key, value in case.items()}
        value = tensor_from(f"{what}, with arguments that ask for a gradient,", function, *copy.values())
        if not value.requires_grad:
            fail(f"{what}: the value is right, but no gradient flows back: detach, item, numpy or no_grad cuts it off", "detached")
        total = (value * torch.linspace(1, 2, value.numel()).view_as(value)).sum()
        gradients.append(gradients_of(what, total, [copy[key] for key in learned]))
    for key, expected, got in zip(learned, *gradients, strict=True):
        if got is None or (not got.any() and expected.any()):
            fail(f"{what}: the value is right, but no gradient flows back to {key}: something cuts it off", "detached")
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4):
            fail(f"{what}: the value is right, but the gradient for {key} is not: something is detached, or computed with no graph")


KL_MISTAKES: Mistakes = {  # m: mean, s: log_var
    "sign": ("the sign is wrong: a KL divergence is never negative", lambda m, s: -kl(m, s)),
    "no-half": ("your KL is twice too large: the factor 1/2 is missing", lambda m, s: 2 * kl(m, s)),
    "mean-latents": (
        "your KL is 20 times too small where there are 20 latents: it is averaged over the latent dimensions",
        lambda m, s: units(m, s).mean(-1),
    ),
    "mean-batch": ("your KL is averaged over the batch; keep one number for each image", lambda m, s: kl(m, s).mean()),
    "sum-batch": ("your KL is added up over the batch; keep one number for each image", lambda m, s: kl(m, s).sum()),
    "mean-all": ("your KL is averaged over batch and latents; add up over the last axis only", lambda m, s: units(m, s).mean()),
    "not-summed": ("your KL is not added up over the latent dimensions: sum(-1) is missing", units),
    "wrong-axis": ("your KL is added up over the images; add up over the last axis", lambda m, s: units(m, s).sum(0)),
    "variance": ("log_var is taken for the variance; exp(log_var) is the variance", lambda m, s: kl(m, s.log())),
    "std": (
        "log_var is taken for the standard deviation; exp(log_var / 2) is that",
        *(lambda m, s: kl(m, 2 * s.log()), lambda m, s: kl(m, s.square().log())),
    ),
    "log-std": ("log_var is taken for the log of the standard deviation; it is twice that", lambda m, s: kl(m, 2 * s)),
    "no-constant": ("the -1 is missing: the KL of the prior itself must be 0", lambda m, s: kl(m, s) + m.shape[1] / 2),
    "reversed": ("this is KL(p || q), not KL(q || p): the posterior q comes first", lambda m, s: kl(0 * m, 0 * s, m, s)),
    "mean-not-squared": ("the mean is not squared", lambda m, s: 0.5 * (m + s.exp() - 1 - s).sum(-1)),
    "swapped": ("mean and log_var are swapped", lambda m, s: kl(s, m)),
}


@verdict
def check_kl(fn: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Judges kl(mean, log_var): both (N, L) -> KL(N(mean, exp(log_var)) || N(0, I)), (N,), nats. eq. gaussian-kl

    The mistakes are in `KL_MISTAKES`. Kingma and Welling 2014, appendix B.
    """
    cases = [{"mean": torch.randn(n, latents), "log_var": torch.randn(n, latents)} for n, latents in ((5, 20), (1, 3), (4, 1))]
    cases[0]["log_var"][0].abs_()  # an image for which a logarithm of log_var is finite
    return judge("kl", fn, kl, KL_MISTAKES, cases, "mean log_var")


REPARAMETERIZE_MISTAKES: Mistakes = {  # m: mean, s: log_var, e: eps
    "variance": ("the noise is scaled by the variance exp(log_var), not by exp(log_var / 2)", lambda m, s, e: m + s.exp() * e),
    "root-twice": ("the noise is scaled by the root of the standard deviation", lambda m, s, e: m + (s / 4).exp() * e),
    "no-exp": ("the noise is scaled by a logarithm", lambda m, s, e: m + s * e, lambda m, s, e: m + s / 2 * e),
    "inverse": ("the noise is divided by the standard deviation", lambda m, s, e: m + (-s / 2).exp() * e),
    "norm": (
        "the noise is scaled by exp(|mean|^2 / 4), so log_var has no say in it",
        lambda m, s, e: m + (m.square().sum(-1, keepdim=True) / 4).exp() * e,
        lambda m, s, e: m + (m.square() / 4).exp() * e,
    ),
    "no-noise": ("there is no noise: the mean is returned", lambda m, s, e: m),
    "no-mean": ("the mean is missing", lambda m, s, e: (s / 2).exp() * e),
    "no-scale": ("the noise has standard deviation 1, whatever log_var is", lambda m, s, e: m + e),
    "one-noise": ("all images share the noise of the first one", lambda m, s, e: m + (s / 2).exp() * e[:1]),
    "swapped": ("mean and log_var are swapped", lambda m, s, e: s + (m / 2).exp() * e),
}


@verdict
def check_reparameterize(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Judges reparameterize(mean, log_var, eps): all (N, L) -> z = mean + exp(log_var / 2) * eps, (N, L). eq. reparameterization

    eps is the standard normal noise, given. The mistakes are in `REPARAMETERIZE_MISTAKES`, with "own-noise" and "detached".
    """
    cases = [{key: torch.randn(*shape) for key in ("mean", "log_var", "eps")} for shape in ((5, 4), (1, 3), (3, 1))]
    return judge("reparameterize", fn, reparameterize, REPARAMETERIZE_MISTAKES, cases, "mean log_var")


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) of pixels under sigmoid(logits), summed: (N,), nats; no check of x. eq. bernoulli-log-prob"""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def bernoulli_elbo(x: Tensor, mean: Tensor, log_var: Tensor, logits: Tensor) -> Tensor:
    """log-likelihood - KL: (N,), nats. eq. two-terms"""
    return bernoulli(x, logits) - kl(mean, log_var)


def mse_elbo(factor: float, activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, m, s, o: -factor * (x - activation(o)).square().flatten(1).sum(1) - kl(m, s)


def elbo_with(wrong: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, m, s, o: bernoulli(x, o) - wrong(m, s)


ELBO_MISTAKES: Mistakes = {  # x, m: mean, s: log_var, o: logits; a: all four
    "loss": (
        "this is minus the ELBO, a loss; the ELBO is better when it is higher",
        *(lambda *a: -bernoulli_elbo(*a), lambda *a: -bernoulli_elbo(*a).mean(), lambda *a: -bernoulli_elbo(*a).sum()),
    ),
    "kl-added": ("the KL is added; subtract it", lambda x, m, s, o: bernoulli(x, o) + kl(m, s)),
    "no-kl": ("the KL is missing: this is an autoencoder", lambda x, m, s, o: bernoulli(x, o)),
    "no-likelihood": ("the log-likelihood is missing", lambda x, m, s, o: -kl(m, s)),
    "mean-pixels": (
        "the log-likelihood is averaged over the pixels; add it up, as the KL is over the latents",
        lambda x, m, s, o: bernoulli(x, o) / x[0].numel() - kl(m, s),
        lambda x, m, s, o: (bernoulli(x, o) / x[0].numel() - kl(m, s)).mean(),
    ),
    "mean-both": (
        "both terms are averaged, over the pixels and over the latents: the KL then counts too much; add both up",
        *(
            lambda x, m, s, o: bernoulli(x, o) / x[0].numel() - units(m, s).mean(-1),
            lambda x, m, s, o: (bernoulli(x, o) / x[0].numel() - units(m, s).mean(-1)).mean(),
        ),
    ),
    "mean-batch": ("the ELBO is averaged over the batch; keep one number for each image", lambda *a: bernoulli_elbo(*a).mean()),
    "sum-batch": ("the ELBO is added up over the batch; keep one number for each image", lambda *a: bernoulli_elbo(*a).sum()),
    "twice": ("the log-likelihood is counted twice", lambda x, m, s, o: 2 * bernoulli(x, o) - kl(m, s)),
    "sigmoid-twice": ("the sigmoid is applied twice", lambda x, m, s, o: bernoulli_elbo(x, m, s, o.sigmoid())),
    "mse": (
        "the squared error stands where the Bernoulli log-likelihood should",
        *(mse_elbo(factor, activation) for factor in (0.5, 1.0) for activation in (torch.sigmoid, torch.clone)),
    ),
    "swapped-pixels": ("x and logits are swapped in the cross entropy", lambda x, m, s, o: bernoulli_elbo(o, m, s, x)),
    **{  # the other mistakes of the KL, within the ELBO
        f"kl-{name}": (f"the log-likelihood is right; {sentence}", *map(elbo_with, wrongs))
        for name, (sentence, *wrongs) in KL_MISTAKES.items()
        if name not in ("sign", "sum-batch", "mean-all", "not-summed", "wrong-axis")
    },
}


@verdict
def check_elbo(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Judges elbo(x, mean, log_var, logits) for a Bernoulli likelihood: (N,), nats, higher is better. eq. two-terms

    x, 0 or 1, and logits are (N, C, H, W), mean and log_var (N, L). The mistakes are in `ELBO_MISTAKES`.
    """
    cases = []
    for n, image, latents in ((5, (1, 4, 6), 20), (1, (3, 2, 2), 3)):
        x, (mean, log_var) = torch.bernoulli(torch.full((n, *image), 0.4)), torch.randn(2, n, latents)
        cases.append({"x": x, "mean": mean, "log_var": log_var, "logits": 1.5 * torch.randn(n, *image)})
    cases[0]["log_var"][0].abs_()
    return judge("elbo", fn, bernoulli_elbo, ELBO_MISTAKES, cases, "mean log_var logits")


IWAE_MISTAKES: Mistakes = {  # w: log_weights
    "elbo": ("this is the mean of the log-weights, the ELBO: the mean belongs inside the logarithm", lambda w: w.mean(0)),
    "no-log-k": ("log K is missing: logsumexp is the log of a sum, not of a mean", lambda w: w.logsumexp(0)),
    "log-k-added": ("log K is added; subtract it", lambda w: w.logsumexp(0) + math.log(len(w))),
    "wrong-axis": (
        "the sum runs over the images; it runs over the samples, axis 0",
        *(lambda w: w.logsumexp(1) - math.log(w.shape[1]), lambda w: w.logsumexp(1) - math.log(len(w))),
    ),
    "overflow": (
        "exp overflows or underflows at log-weights of +-1000: use torch.logsumexp",
        *(lambda w: w.exp().mean(0).log(), lambda w: (w.exp().mean(0) + 1e-8).log()),
    ),
    "max": ("this is the largest log-weight", lambda w: w.amax(0)),
    "weighted": ("this is the mean of the log-weights under their softmax, not the log of a mean", lambda w: (w.softmax(0) * w).sum(0)),
    "scalar": (
        "the bound is reduced over the batch; keep one number for each image",
        *(lambda w: bound(w).mean(), lambda w: bound(w).sum(), lambda w: bound(w.flatten()[:, None])[0]),
    ),
    "sign": ("the sign is wrong: this is a loss; the bound is better when it is higher", lambda w: -bound(w), lambda w: -bound(w).mean()),
}


@verdict
def check_iwae(fn: Callable[[Tensor], Tensor]) -> str:
    """Judges iwae(log_weights): (K, N), nats -> log of the mean weight over the K samples, (N,), nats.

    eq. importance-weighted-bound. The gradient must be softmax(log_weights). The mistakes are in `IWAE_MISTAKES`. Burda et al. 2016.
    """
    large = torch.tensor([1000.0, -1000.0]) + torch.randn(4, 2)
    cases = [{"log_weights": weights} for weights in (2 * torch.randn(5, 3), large, torch.randn(1, 3), torch.randn(3, 1))]
    return judge("iwae", fn, bound, IWAE_MISTAKES, cases, "log_weights")


def ranked(queries: Tensor, database: Tensor, distance: str = "euclidean") -> Tensor:
    """The whole database for each query, nearest first: (Q, N) int64."""
    return nearest_neighbours(queries, database, len(database), distance).indices


RETRIEVAL_MISTAKES: Mistakes = {  # q: query_codes, x: database_codes
    "farthest": ("these are the farthest: the smallest distances come first", lambda q, x, k: ranked(q, x).flip(1)[:, :k]),
    "cosine": ("these are nearest by cosine, not by Euclidean distance", lambda q, x, k: ranked(q, x, "cosine")[:, :k]),
    "dot": ("the squared norms are forgotten: this ranks by the inner product", lambda q, x, k: (q @ x.T).topk(k).indices),
    "manhattan": ("this ranks by the sum of absolute differences", lambda q, x, k: (-torch.cdist(q, x, p=1)).topk(k).indices),
    "queries": ("the queries are searched in themselves, not in the database", lambda q, x, k: ranked(q, q)[:, :k]),
    "swapped": ("queries and database are swapped", lambda q, x, k: ranked(x, q)[:, :k]),
    "skips-first": ("the nearest is left out, but a query is not in the database", lambda q, x, k: ranked(q, x)[:, 1 : k + 1]),
    "one-based": ("the indices count from 1; they count from 0", lambda q, x, k: ranked(q, x)[:, :k] + 1),
    "order": (
        "the right neighbours in the wrong order: nearest first",
        *(lambda q, x, k: ranked(q, x)[:, :k].flip(1), lambda q, x, k: ranked(q, x)[:, :k].sort(1).values),
    ),
    "distances": (
        "these are distances; return the indices",
        *(lambda q, x, k: nearest_neighbours(q, x, k)[1], lambda q, x, k: nearest_neighbours(q, x, k)[1].square()),
    ),
}


@verdict
def check_retrieval(fn: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Judges retrieval(query_codes, database_codes, k): (Q, L) and (N, L) -> int64 indices (Q, k), nearest first.

    The distance is the Euclidean one; ties may come in any order. The mistakes are in `RETRIEVAL_MISTAKES`, with "own-noise".
    """
    cases = []
    for q, n, k in ((7, 30, 4), (3, 12, 2)):
        database = torch.randn(n, 3) * torch.linspace(0.3, 2, n)[:, None]
        cases.append({"query_codes": torch.randn(q, 3), "database_codes": database, "k": k})
    praise = judge("retrieval", fn, lambda q, x, k: ranked(q, x)[:, :k], RETRIEVAL_MISTAKES, cases)
    queries, database = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 2.0]])
    what = "retrieval with ties (1, 2), (5, 2), 5"
    found = tensor_from(what, fn, queries, database, 5)
    check_same(f"{what}, sorted", found.sort(-1).values, torch.arange(5)[None])
    check_same(f"{what}, distances", database[found[0]].norm(dim=1), torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0]))
    return praise


def scores(likelihood: Any, x: Tensor, params: Tensor) -> Tensor:
    """likelihood.log_prob, which must be (N,)."""
    what = f"log_prob(x {tuple(x.shape)}, params {tuple(params.shape)})"
    log_prob = tensor_from(what, lambda *a: likelihood.log_prob(*a), x, params)
    if log_prob.shape == x.shape and x.dim() == 4:
        fail(f"{what} gives one number for each pixel: add them up for each image, (N,)", "not-summed")
    if log_prob.dim() == 0:
        fail(f"{what} gives one number for the batch; keep one for each image, (N,)", "scalar")
    if log_prob.shape != x.shape[:1] or log_prob.dtype != params.dtype:
        fail(f"{what}: got {describe(log_prob)}, expected {describe(params.new_empty(len(x)))}")
    return log_prob


def domain(likelihood: Any) -> tuple[Any, float, float, int]:
    """`values`, `lowest`, `highest` and the number of params per grey pixel, with their defaults."""
    low, high = float(getattr(likelihood, "lowest", 0)), float(getattr(likelihood, "highest", 1))
    has_method = hasattr(likelihood, "param_channels")
    width = likelihood.param_channels(1) if has_method else getattr(likelihood, "params_per_value", 1)
    return getattr(likelihood, "values", None) or 256, low, high, check_int("params_per_value", width)


def check_normalized(table: Tensor, levels: Tensor, bce: Tensor | None) -> None:
    """Fails unless each row, the log-probabilities of all levels at some params, sums to 1, and rows favour low and high levels.

    `bce` is minus the binary cross entropy at the same params, where there is one param.
    """
    totals, grey = table.exp().sum(1), len(levels) == 256
    told = f"the probabilities of the {len(levels)} values add up to between {totals.min():.4g} and {totals.max():.4g}, expected 1"
    if not torch.allclose(totals, torch.ones_like(totals), rtol=0, atol=1e-3):
        if torch.allclose((-table).exp().sum(1), torch.ones_like(totals), rtol=0, atol=1e-3):
            fail(f"the sign is wrong: this is a loss; {told}", "sign")
        if grey and bce is not None and same(table, bce) and levels[0] < 0:
            fail(f"data below 0 meets a sigmoid, whose values lie in [0, 1]; {told}", "sigmoid-range")
        if grey and bce is not None and same(table, bce):
            fail(f"binary cross entropy of grey pixels is no log-probability; {told}", "grey-bce")
        if totals.std() < 1e-3 * totals.mean():
            fail(f"a constant is missing; {told}", "constant")
        inner = table[:, [0, -1]].exp().sum(1) < 1e-6 * totals  # rows with no mass at the ends
        smooth = totals[inner & (table.amax(1).exp() < 0.05 * totals)] * (levels[1] - levels[0])
        if grey and len(smooth) and torch.allclose(smooth, torch.ones_like(smooth), rtol=0, atol=1e-2):
            fail(f"this is a density, not the mass of a level; {told}", "density")
        inner &= totals > 0.5
        if grey and inner.any() and totals.max() < 1.001 and totals[inner].min() > 0.999:
            fail(f"mass is lost beyond the ends: levels 0 and 255 own the tails; {told}", "no-tails")
        fail(told)
    if (table.exp() @ levels).min() > levels.mean() - 1e-3:
        why = ("data below 0 meets a sigmoid", "sigmoid-range") if grey else ("the sigmoid is applied twice", "sigmoid-twice")
        fail(f"no params make the lower half of the values likely: {why[0]}", why[1])


@verdict
def check_likelihood(likelihood: Any) -> str:
    """Judges an object with log_prob(x, params) -> log-probability of each image, summed over its pixels: (N,), nats.

    x is (N, 1, H, W), params (N, P, H, W). The object says what x is, as `vaelib.likelihoods.Likelihood` does: `values`, 2 or 256
    (the default) evenly spaced from `lowest` (0) to `highest` (1), and P by `param_channels(1)` or `params_per_value` (1).
    Over all values the probabilities must sum to 1 at each params. eq. discretized-logistic-log-prob, eq. bernoulli-log-prob

    Mistakes: "not-summed", "scalar", "mean-pixels", "sign", "grey-bce", "sigmoid-range", "sigmoid-twice", "constant", "density",
    "no-tails", "overflow", "detached".
    """
    values, low, high, width = attempt("reading values, lowest, highest and params_per_value", domain, likelihood)
    if values not in (2, 256) or not low < high:
        fail(f"values, lowest, highest: got {values}, {low:g}, {high:g}, expected 2 or 256 values and lowest below highest")
    levels = torch.linspace(low, high, values)
    x, params = levels[torch.randint(values, (3, 1, 2, 3))], torch.randn(3, width, 2, 3)
    whole = scores(likelihood, x, params)
    parts = scores(likelihood, *(value.permute(0, 2, 3, 1).reshape(18, -1, 1, 1) for value in (x, params))).view(3, 6).sum(1)
    if same(whole, parts / 6) and whole.isfinite().all():
        fail("log_prob is averaged over the pixels: add them up", "mean-pixels")
    check_same("log_prob of images against the sum over their pixels", whole, parts)
    spread = torch.tensor([0.5, 3.0])[torch.randint(2, (300, width))]
    ordinary, extreme = spread * torch.randn(300, width), 30 * (2.0 * torch.randint(2, (300, width)) - 1)
    for name, params in (("ordinary params", ordinary), ("params of +-30", extreme)):
        params = params.repeat_interleave(values, 0)[:, :, None, None].requires_grad_()
        x = levels.repeat(300).view(-1, 1, 1, 1)
        log_prob = scores(likelihood, x, params)
        if name == "ordinary params":
            bce = bernoulli(x, params.detach()).view(300, values) if width == 1 else None
            check_normalized(log_prob.detach().view(300, values), levels, bce)
        if not log_prob.requires_grad:
            fail("log_prob has no gradient for params: detach, item, numpy or no_grad cuts it off", "detached")
        (gradient,) = gradients_of("log_prob", log_prob.sum(), [params])
        if gradient is None or (name == "ordinary params" and not gradient.any()):
            fail("log_prob has no gradient for params: something cuts it off", "detached")
        if not log_prob.isfinite().all() or not gradient.isfinite().all():
            fail(f"log_prob or its gradient is NaN or infinite at {name}: a probability rounds to 0 before its log is taken", "overflow")
        if name == "ordinary params":
            step = 0.01 * (2.0 * torch.randint_like(gradient, 2) - 1)
            change = scores(likelihood, x, (params + step).detach()) - scores(likelihood, x, (params - step).detach())
            error = (change - 2 * (gradient * step).flatten(1).sum(1)).abs()
            if error.median() > 0.05 * change.abs().median():
                fail("the gradient of log_prob for params is not its slope: something is detached", "detached")
    return f"log_prob is normalized over {values} values at 300 params, adds up over pixels, and is finite at params of +-30"


def scrambled(network: Any, seed: int) -> Any:
    """A copy with random signs of the weights, moved a little: as far from its initialization as training may take it."""
    network = deepcopy(network)
    torch.default_generator.manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.01 * torch.randn_like(weight)).mul_(torch.randint_like(weight, 2) * 2 - 1)
    return network


def outputs(what: str, network: Any, value: Tensor, shape: tuple[int, ...], names: Sequence[str], seed: int = 0) -> list[Tensor]:
    """What a network gives: one tensor for each name, of that shape (-1: anything), finite."""
    result = attempt(what, network, value, seed=seed)
    if len(names) == 2 and isinstance(result, Tensor):
        fail(f"{what} returns {describe(result)}, expected mean and log_var, two tensors {shape}", "no-log-var")
    result = [result] if len(names) == 1 else list(result) if isinstance(result, (tuple, list)) else [result]
    if len(result) != len(names) or not all(isinstance(tensor, Tensor) for tensor in result):
        fail(f"{what} returns {', '.join(map(describe, result))}, expected {' and '.join(names)}, tensors of shape {shape}")
    for name, tensor in zip(names, result, strict=True):
        if tensor.dim() != len(shape) or any(size not in (-1, got) for size, got in zip(shape, tensor.shape, strict=True)):
            fail(f"{what}: got {name} as {describe(tensor)}, expected shape {shape}")
        if not tensor.isfinite().all():
            fail(f"{what}: got NaN or infinity in {name}")
    return [tensor.detach() for tensor in result]


def hides_layers(network: Any) -> bool:
    """Whether a network has weights that `parameters` does not give: none at all, or layers in a plain list or dict."""
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        return True
    held = [value for module in network.modules() for key, value in vars(module).items() if key != "_modules"]
    plain = [list(value.values()) if isinstance(value, dict) else value for value in held if isinstance(value, (list, tuple, dict))]
    return any(isinstance(item, nn.Module) for value in plain for item in value)


@verdict
def check_encoder_decoder(encoder: nn.Module, decoder: nn.Module, image_shape: Sequence[int], latent_dim: int) -> str:
    """Judges encoder(x) -> (mean, log_var), each (N, L), and decoder(z) -> params (N, P*C, H, W), for x (N, C, H, W) and z (N, L).

    Works on copies; the student's networks stay as they are.

    Mistakes: "bottleneck", "no-log-var", "new-layers", "unregistered", "same-head", "ignores-input", "positive-mean",
    "positive-log-var", "batch-dependence".

    Raises:
        ValueError: If image_shape or latent_dim is no shape or size.
    """
    channels, *size = check_image_shape("image_shape", image_shape)
    if check_int("latent_dim", latent_dim) >= channels * math.prod(size):
        fail(f"the code has {latent_dim} numbers, the image {channels * math.prod(size)}: that is no bottleneck", "bottleneck")
    check_network("encoder", encoder, torch.rand(8, channels, *size), (8, latent_dim), ("mean", "log_var"))
    params = check_network("decoder", decoder, torch.randn(8, latent_dim), (8, -1, *size), ("params",))
    if params.shape[1] % channels:
        fail(f"decoder: got {params.shape[1]} channels, expected a multiple of the image's {channels}")
    return "encoder and decoder have the right shapes, registered weights, and outputs that depend on their own input alone"


def check_network(part: str, network: Any, value: Tensor, shape: tuple[int, ...], names: Sequence[str]) -> Tensor:
    """Fails unless a network is what `check_encoder_decoder` asks for; its first output."""
    what = f"{part}({tuple(value.shape)})"

    def fresh(training: bool) -> Any:
        copy = attempt(f"a copy of the {part}", deepcopy, network)
        return copy.cpu().train(training) if isinstance(copy, nn.Module) else copy

    first, again = (outputs(what, fresh(False), value, shape, names, seed) for seed in (0, 1))
    if not all(map(torch.equal, first, again)):
        why = "layers made inside forward have new weights at each call, or noise is drawn there"
        fail(f"{what} gives different outputs for the same input in evaluation mode: {why}", "new-layers")
    if hides_layers(network):
        fail(f"the {part} has layers that the optimizer cannot see: assign them in __init__, lists as nn.ModuleList", "unregistered")
    outputs(f"{part} of a batch of one", fresh(False), value[:1], (1, *shape[1:]), names)
    tries = [outputs(what, scrambled(fresh(False), seed), value, shape, names) for seed in range(16)]
    for name, found in zip(names, zip(*tries, strict=True), strict=True):
        if all(torch.allclose(tensor, tensor[:1].expand_as(tensor), rtol=0, atol=1e-7) for tensor in found):
            fail(f"{what}: {name} is the same for all inputs", "ignores-input")
        if part == "encoder" and min(tensor.min() for tensor in found) >= 0:
            why = "a ReLU, sigmoid, softplus or exp at its end takes that away"
            fail(f"{what}: {name} is never negative, but must be able to be: {why}", f"positive-{name.replace('_', '-')}")
    if part == "encoder" and all(torch.equal(*pair) for pair in tries):
        fail(f"{what}: mean and log_var are the same numbers: each needs weights of its own", "same-head")
    batches = value, torch.cat([value[:4], 3 * value[4:] - 1])
    alone, mixed = (outputs(what, fresh(True), batch, shape, names) for batch in batches)
    if not all(torch.allclose(a[:4], b[:4], rtol=1e-4, atol=1e-5) for a, b in zip(alone, mixed, strict=True)):
        why = "batch normalization, or another mean over the batch"
        fail(f"{what}: what an image gives depends on the rest of its batch, and so does its ELBO: {why}", "batch-dependence")
    return first[0]


def training_step(
    objective: Callable[[Tensor, Tensor], Tensor], backward: float = 1.0, noise: float = 1.0, shared: bool = False,
    target: str = "x", cut: bool = False, zero: bool = True, step: bool = True,
) -> Callable[[VAE, torch.optim.Optimizer, Tensor], float]:  # fmt: skip
    """A training step that minimizes objective(log-likelihood, kl), both (N,); the other arguments put mistakes into it."""

    def run(model: VAE, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
        mean, log_var = model.encode(x)
        eps = torch.randn_like(mean[:1]).expand_as(mean) if shared else torch.randn_like(mean)
        z = reparameterize(mean, log_var, noise * eps)
        logits = model.decode(z.detach() if cut else z)
        goal = {"x": x, "output": logits.sigmoid(), "fixed output": logits.sigmoid().detach()}[target]
        loss = objective(bernoulli(goal, logits), kl(mean, log_var))
        if zero:
            optimizer.zero_grad()
        (backward * loss).backward()
        if step:
            optimizer.step()
        return loss.item()

    return run


def negative_elbo(log_likelihood: Tensor, rate: Tensor) -> Tensor:
    return (rate - log_likelihood).mean()


RIGHT_STEP = training_step(negative_elbo)

TRAINING_MISTAKES: Mistakes = {  # a: log-likelihood, b: KL
    "elbo-minimized": (
        "the step lowers the ELBO: minimize minus the ELBO",
        *(training_step(lambda a, b: (a - b).mean()), training_step(negative_elbo, backward=-1.0)),
    ),
    "no-zero-grad": ("the gradients of the step before are still there: zero_grad is missing", training_step(negative_elbo, zero=False)),
    "no-step": ("the weights do not change: backward or step is missing", training_step(negative_elbo, step=False)),
    "own-output": (
        "the target is the model's own output, so there is nothing to learn from x",
        *(training_step(negative_elbo, target="output"), training_step(negative_elbo, target="fixed output")),
    ),
    "mean-decoded": ("the mean is decoded, not a sample z: this trains no VAE", training_step(negative_elbo, noise=0.0)),
    "one-noise": ("all images of a batch share one noise", training_step(negative_elbo, shared=True)),
    "sum-batch": ("the loss is added up over the batch; take the mean", training_step(lambda a, b: (b - a).sum())),
    "mean-pixels": ("the log-likelihood is averaged over the pixels", training_step(lambda a, b: (b - a / 16).mean())),
    "mean-both": ("both terms are averaged, over pixels and latents", training_step(lambda a, b: (b / 2 - a / 16).mean())),
    "mean-latents": ("the KL is averaged over the latent dimensions", training_step(lambda a, b: (b / 2 - a).mean())),
    "no-kl": ("the KL is missing: this is an autoencoder", training_step(lambda a, b: -a.mean())),
    "kl-subtracted": ("the KL is subtracted from the loss; add it", training_step(lambda a, b: (-a - b).mean())),
    "twice": ("the log-likelihood is counted twice", training_step(lambda a, b: (b - 2 * a).mean())),
    "detached": ("the sample z is detached: the log-likelihood teaches the encoder nothing", training_step(negative_elbo, cut=True)),
}


@functools.cache
def training_example() -> tuple[VAE, Tensor]:
    """A small model whose KL, noise and image all matter to the loss, and a batch."""
    torch.default_generator.manual_seed(0)
    model = mlp_vae((1, 4, 4), (8,), 2)
    with torch.no_grad():
        model.encoder.head.weight.mul_(12)  # type: ignore[operator, union-attr]
        model.decoder.head.weight.mul_(4)  # type: ignore[operator, union-attr]
    return model, torch.bernoulli(torch.rand(256, 1, 4, 4))


def trace(fn: Callable[..., Any]) -> list[Tensor]:
    """Two steps from the same weights, RUNS times, each with its noise: losses (RUNS, 2), first and second move (RUNS, weights)."""
    model, x = training_example()
    rows = []

    def weights_of(model: VAE) -> Tensor:
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    for seed in range(RUNS):
        copy, losses, weights = deepcopy(model), [], [weights_of(model)]
        optimizer = torch.optim.SGD(copy.parameters(), lr=LEARNING_RATE)
        for call in (1, 2):
            what = f"call {call} of training_step(model, optimizer, x {tuple(x.shape)})"
            losses.append(attempt(what, fn, copy, optimizer, x.clone(), seed=2 * seed + call))
            if isinstance(losses[-1], bool) or not isinstance(losses[-1], (int, float)):
                fail(f"{what} returns {describe(losses[-1])}, expected the loss as a float: return loss.item()")
            weights.append(weights_of(copy))
            if not math.isfinite(losses[-1]) or not weights[-1].isfinite().all():
                fail(f"{what}: the loss is {losses[-1]:g}; it or a weight is NaN or infinite")
        rows.append((torch.tensor(losses), *((new - old) / LEARNING_RATE for old, new in zip(weights, weights[1:], strict=False))))
    return [torch.stack(row) for row in zip(*rows, strict=True)]


known_trace = functools.cache(trace)


def agree(got: Tensor, expected: Tensor) -> bool:
    """Whether the means over the runs agree to five standard errors, and the noise of `got` is at most four times, at least an eighth.

    A KL by Monte Carlo is some three times as noisy as the closed form; many samples per image are less noisy than one.
    """
    noise, expected_noise = (float(value.var(0).sum()) if value.ne(value[:1]).any() else 0.0 for value in (got, expected))
    squared = (got.mean(0) - expected.mean(0)).square().sum()
    close = squared <= 25 * (noise + expected_noise) / RUNS + 1e-6 * expected.mean(0).square().sum() + 1e-8
    return bool(close) and expected_noise / 64 <= noise <= 16 * expected_noise


@verdict
def check_training_step(fn: Callable[[VAE, torch.optim.Optimizer, Tensor], float]) -> str:
    """Judges training_step(model, optimizer, x) -> loss, a float: minus the mean ELBO of the batch, nats. eq. loss

    model is a small `VAE` with a Bernoulli likelihood, x (N, 1, 4, 4) holds 0 and 1, and the optimizer is SGD over the model's
    parameters. One sample z per image is enough. Loss and step are compared with the right ones as means over `RUNS` runs, to
    five standard errors. The mistakes are in `TRAINING_MISTAKES`.
    """
    found, right = trace(fn), known_trace(RIGHT_STEP)
    if all(map(agree, found, right)):
        return f"loss and step are right in {RUNS} runs of two steps, within five standard errors"
    for mistake, (sentence, *wrongs) in TRAINING_MISTAKES.items():
        if any(all(map(agree, found, known_trace(wrong))) for wrong in wrongs):
            fail(f"training_step: {sentence}", mistake)
    if found[0].eq(found[0][:1]).all():
        fail("training_step: the loss does not vary: it draws no noise, or the same noise at each call", "same-noise")
    names = ("losses of two calls", "first change of the weights", "second change of the weights")
    name, got, expected = next(row for row in zip(names, found, right, strict=True) if not agree(*row[1:]))
    lengths = f"got length {got.mean(0).norm():.5g}, expected {expected.mean(0).norm():.5g} "
    spreads = f"deviation between runs: {got.var(0).sum().sqrt():.3g}, expected {expected.var(0).sum().sqrt():.3g}"
    fail(f"training_step: the mean {name}: {lengths}; {spreads}; this is no mistake that I know")
