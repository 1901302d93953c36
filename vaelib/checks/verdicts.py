"""What all checks share: the verdict, safe calls of a student's code, and the comparison with right and with known wrong code.

A table of mistakes is name -> (sentence, what the mistake computes, ...). What a mistake computes is as a rule a
`functools.partial` of a *recipe*: the right formula with switches, of which the mistake turns some. Two mistakes that turn
different switches of one recipe make a pair, and pairs are recognized where no single mistake is: the name is then "one + other".
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from vaelib._validation import describe

T = TypeVar("T")
Mistakes = dict[str, tuple[Any, ...]]
Case = dict[str, Any]
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}  # float32 sums of a few hundred terms


@dataclass(frozen=True, repr=False)
class Verdict:
    """What a check found; true where the code passed.

    Attributes:
        passed: whether the code is right.
        message: the same in words.
        mistake: a short name of the mistake where it is a known one, else None; of two mistakes both names, "one + other".
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
        told = f"{what}: got {describe(got)}, expected {describe(expected)}"
        if got.shape != expected.shape and got.dtype == expected.dtype and got.numel() == expected.numel():
            if same(got.squeeze(), expected.squeeze()):
                fail(
                    f"{told}: the numbers are right, but an axis of size 1 is {'lost' if got.dim() < expected.dim() else 'too many'}"
                )
            if same(got.T, expected) if got.dim() == 2 else False:
                fail(f"{told}: the numbers are right, but the result is transposed")
        fail(told)
    if len(places := torch.isclose(got, expected, **TOLERANCE).logical_not().nonzero()):
        place = tuple(places[0].tolist())
        at = f" at index {place}" if place else ""
        fail(f"{what}: got {got[place].item():.6g}{at}, expected {expected[place].item():.6g}; this is no mistake that I know")


def pairs(mistakes: Mistakes) -> Iterator[tuple[tuple[str, str], Callable[..., Any]]]:
    """Two mistakes at once, of which each turns other switches of the same recipe: their names, and what they compute."""
    partials = [(name, fn) for name, (_, *fns) in mistakes.items() for fn in fns if isinstance(fn, functools.partial)]
    for (name, fn), (other, another) in itertools.combinations(partials, 2):
        if name != other and fn.func is another.func and not fn.keywords.keys() & another.keywords.keys():
            yield (name, other), functools.partial(fn.func, **fn.keywords, **another.keywords)


Found = tuple[tuple[str, ...], Any]


def recognized(mistakes: Mistakes, matches: Callable[[Any], bool]) -> Found | None:
    """The name of the mistake, or the names of the two, for which `matches` is true of what it computes, and that function."""
    for name, (_, *fns) in mistakes.items():
        for fn in filter(matches, fns):
            return (name,), fn
    return next(((names, fn) for names, fn in pairs(mistakes) if matches(fn)), None)


def fail_by_name(what: str, mistakes: Mistakes, names: Sequence[str]) -> NoReturn:
    """Fails with the sentences and the names of the mistakes."""
    fail(f"{what}: {'; and '.join(mistakes[name][0] for name in names)}", " + ".join(names))


def call_of(name: str, case: Case) -> str:
    return (
        f"{name}({', '.join(f'{key} {tuple(value.shape) if isinstance(value, Tensor) else value}' for key, value in case.items())})"
    )


def judge(
    name: str,
    fn: Callable[..., Any],
    right: Callable[..., Tensor],
    mistakes: Mistakes,
    cases: Sequence[Case],
    learned: str = "",
    extremes: Sequence[Case] = (),
    accepted: Sequence[Callable[..., Tensor]] = (),
) -> str:
    """Compares fn with `right` on the cases, {argument: value}; the gradient too, for the arguments named in `learned`.

    Of the mistakes, "overflow" and "floor" are those that show on `extremes` alone: no finite number, or another one than it should
    be. There the values of a function in `accepted` pass too.
    """
    everything = [*cases, *extremes]
    calls = [call_of(name, case) for case in everything]
    truths, results = [right(*case.values()) for case in everything], []
    for what, case in zip(calls, everything, strict=True):
        results.append(tensor_from(what, fn, *(deepcopy(value) for value in case.values())).detach())
        again = tensor_from(what, fn, *(deepcopy(value) for value in case.values()), seed=1).detach()
        if again.shape != results[-1].shape or not ((again == results[-1]) | (again != again) & (results[-1] != results[-1])).all():
            fail(f"{what} gives different results for the same arguments: it draws noise of its own", "own-noise")
    if not all(map(same, results[: len(cases)], truths)):

        def matches(wrong: Callable[..., Any]) -> bool:
            try:
                return all(same(got, wrong(*case.values())) for got, case in zip(results, cases, strict=False))
            except (RuntimeError, IndexError):  # shapes that two mistakes together do not fit
                return False

        if found := recognized(mistakes, matches):
            names, wrong = found
            for got, case in zip(results[len(cases) :], extremes, strict=True):
                if not got.isfinite().all() and wrong(*case.values()).isfinite().all():
                    names = *names, "overflow"
                elif not accepted and not same(got, wrong(*case.values())):
                    names = *names, "floor"
            fail_by_name(name, mistakes, [known for known in names if known in mistakes])
    for what, got, truth in zip(calls[: len(cases)], results, truths, strict=False):
        check_same(what, got, truth)
    for what, got, truth, case in zip(calls[len(cases) :], results[len(cases) :], truths[len(cases) :], extremes, strict=True):
        if not same(got, truth) and not any(same(got, other(*case.values())) for other in accepted):
            if got.shape != truth.shape:
                check_same(what, got, truth)
            finite = got.isfinite().all() or "overflow" not in mistakes
            fail_by_name(f"{what}, at extreme values", mistakes, ("floor" if finite else "overflow",))
    for place, (what, case) in enumerate(zip(calls, everything, strict=True)) if learned else ():
        check_gradient(what, fn, right, case, learned.split(), strict=place < len(cases))
    return f"{name} is right in {len(everything)} cases" + (", and so is its gradient" if learned else "")


def gradients_of(what: str, total: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of a scalar; None where it does not depend on a leaf."""
    return attempt(f"the gradient of {what}", lambda: torch.autograd.grad(total, leaves, allow_unused=True))


def check_gradient(
    what: str, fn: Callable[..., Any], right: Callable[..., Tensor], case: Case, learned: Sequence[str], strict: bool = True
) -> None:
    """Fails unless the gradients of fn and `right` agree, for a weighted sum of the result and the arguments named in `learned`.

    Unless `strict`, they need only be finite.
    """
    gradients = []
    for function in (right, fn):
        copy = {key: deepcopy(value).requires_grad_() if key in learned else deepcopy(value) for key, value in case.items()}
        value = tensor_from(f"{what}, with arguments that ask for a gradient,", function, *copy.values())
        if not value.requires_grad:
            fail(f"{what}: the value is right, but no gradient flows back: detach, item, numpy or no_grad cuts it off", "detached")
        total = (value * torch.linspace(1, 2, value.numel()).view_as(value)).sum()
        gradients.append(gradients_of(what, total, [copy[key] for key in learned]))
    for key, expected, got in zip(learned, *gradients, strict=True):
        if strict and (got is None or (not got.any() and expected.any())):
            fail(f"{what}: the value is right, but no gradient flows back to {key}: something cuts it off", "detached")
        if got is not None and not got.isfinite().all():
            fail(f"{what}: the value is right, but the gradient for {key} is NaN or infinite", "overflow")
        if strict and not torch.allclose(got, expected, rtol=1e-3, atol=1e-4):
            why = "something is detached, or computed with no graph"
            fail(f"{what}: the value is right, but the gradient for {key} is not: {why}", "detached")
