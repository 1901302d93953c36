"""A judge of a coder: asymmetric numeral systems on one integer."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vaelib._validation import describe
from vaelib.checks.verdicts import Mistakes, attempt, fail, fail_by_name, recognized, verdict

Counts = Sequence[int]


def start_of(symbol: int, frequencies: Counts) -> int:
    return sum(frequencies[:symbol])


def push_recipe(
    message: int,
    symbol: int,
    frequencies: Counts,
    total: Callable[[Counts], int] = sum,
    start: Callable[[int, Counts], int] = start_of,
    quotient: Callable[[int, int], int] = lambda message, frequency: message // frequency,
    remainder: Callable[[int, int], int] = lambda message, frequency: message % frequency,
) -> int:
    """The message with the symbol on top; the arguments put mistakes into it."""
    frequency = frequencies[symbol]
    return quotient(message, frequency) * total(frequencies) + remainder(message, frequency) + start(symbol, frequencies)


def found_at(target: int, frequencies: Counts, offset: int = 0) -> int:
    """The symbol whose interval holds the target; `offset` 1 puts its upper end into it."""
    edges = [start_of(k + 1, frequencies) for k in range(len(frequencies))]
    return next((k for k, edge in enumerate(edges) if target < edge + offset), len(edges) - 1)


def pop_recipe(
    message: int,
    frequencies: Counts,
    find: Callable[[int, Counts], int] = found_at,
    start: Callable[[int, Counts], int] = start_of,
    factor: Callable[[int, Counts], int] = lambda symbol, frequencies: frequencies[symbol],
    target: Callable[[int, int], int] = lambda message, total: message % total,
    rest: Callable[[int], int] = lambda target: target,
) -> tuple[int, int]:
    """The topmost symbol, and the message without it."""
    total = sum(frequencies)
    place = target(message, total)
    symbol = find(place, frequencies)
    return symbol, factor(symbol, frequencies) * (message // total) + rest(place) - start(symbol, frequencies)


PUSH_MISTAKES: Mistakes = {
    "no-start": ("push forgets to add where the symbol's interval starts", partial(push_recipe, start=lambda symbol, f: 0)),
    "upper-end": (
        "push adds the end of the symbol's interval; it starts at the sum of the frequencies before it",
        partial(push_recipe, start=lambda symbol, f: start_of(symbol + 1, f)),
    ),
    "no-remainder": (
        "push drops message % frequency: those bits can not come back",
        partial(push_recipe, remainder=lambda message, frequency: 0),
    ),
    "count-for-total": (
        "push multiplies by the number of symbols, not by the sum of the frequencies",
        partial(push_recipe, total=lambda f: len(f)),
    ),
    "pop-for-push": (
        "push divides by the total and multiplies by the frequency: that is the step of pop, and the message shrinks",
        lambda message, symbol, f: message // sum(f) * f[symbol] + message % sum(f) + start_of(symbol, f),
    ),
    "uniform": (
        "push gives each symbol the same share: the frequency does not enter, and likely symbols cost as much as others",
        lambda message, symbol, f: message * len(f) + symbol,
    ),
    "float": (
        "push divides with /, in floating point, which loses digits of a long message: use // ",
        partial(push_recipe, quotient=lambda message, frequency: int(message / frequency)),
        partial(push_recipe, quotient=lambda message, frequency: math.floor(message / frequency)),
    ),
}
POP_MISTAKES: Mistakes = {
    "start-kept": ("pop forgets to subtract where the symbol's interval starts", partial(pop_recipe, start=lambda symbol, f: 0)),
    "no-frequency": (
        "pop does not multiply by the symbol's frequency: the bits that push divided by are lost",
        partial(pop_recipe, factor=lambda symbol, f: 1),
    ),
    "no-target": ("pop does not add message % total back", partial(pop_recipe, rest=lambda target: 0)),
    "upper-edge": (
        "pop looks up the interval with its upper end in it: a target on an edge belongs to the next symbol",
        partial(pop_recipe, find=partial(found_at, offset=1)),
    ),
    "wrong-end": (
        "pop looks at the wrong end of the message: what was pushed last is in message % total, the lowest digits",
        partial(pop_recipe, target=lambda message, total: int(str(message)[:2]) % total),
        partial(pop_recipe, target=lambda message, total: message // total % total),
    ),
}


@verdict
def check_coder(
    push: Callable[[int, int, Counts], int],
    pop: Callable[[int, Counts], tuple[int, int]],
    decode: Callable[[int, int, Counts], Sequence[int]] | None = None,
) -> str:
    """Judges the two steps of asymmetric numeral systems on an integer of any size. eq. ans-push

    push(message, symbol, frequencies) gives the new message, pop(message, frequencies) the symbol and the message without it; the
    frequencies are positive integers, one a symbol, whose sum is the total. decode(message, count, frequencies) gives the `count`
    symbols that were pushed last, in the order in which they were pushed. The mistakes are in `PUSH_MISTAKES` and `POP_MISTAKES`, with
    "returns", "order" and "reversed".
    """
    rng = random.Random(0)
    tables = [[3, 5, 8], [1, 6, 2, 7], [10, 3, 1, 1, 1], [2, 9, 5, 11, 4]]
    cases = [(rng.randrange(10**size), frequencies) for size in (3, 6, 12, 40, 80) for frequencies in tables for _ in range(3)]
    pushes: list[Any] = [(message, rng.randrange(len(frequencies)), frequencies) for message, frequencies in cases]
    got = [attempt(f"push{case}", push, case[0], case[1], list(case[2])) for case in pushes]
    compare("push", push_recipe, PUSH_MISTAKES, pushes, got, int)
    pops: list[Any] = [(push_recipe(*case), case[2]) for case in pushes] + [(start_of(1, f) + 5 * sum(f), f) for f in tables]
    taken = [attempt(f"pop{case}", pop, case[0], list(case[1])) for case in pops]
    swapped = [pair[::-1] for pair in taken if isinstance(pair, tuple)]
    if swapped == [pop_recipe(*case) for case in pops] and swapped != taken:
        fail("pop returns (message, symbol), expected (symbol, message)", "order")
    compare("pop", pop_recipe, POP_MISTAKES, pops, taken, tuple)
    if decode is not None:
        symbols, message = [rng.randrange(4) for _ in range(50)], 1
        for symbol in symbols:
            message = push_recipe(message, symbol, tables[1])
        found = list(attempt("decode(message, 50, [1, 6, 2, 7])", decode, message, 50, list(tables[1])))
        if found == symbols[::-1]:
            fail("decode gives the symbols backwards: a stack gives first what was pushed last, so turn them round", "reversed")
        if found != symbols:
            fail(f"decode gives {describe(found)}, expected {describe(symbols)}; this is no mistake that I know")
    return f"push is right in {len(pushes)} cases, pop in {len(pops)}" + (", and decode gives back 50 symbols" if decode else "")


def compare(name: str, right: Callable[..., Any], mistakes: Mistakes, cases: Sequence[Any], got: Sequence[Any], kind: type) -> None:
    """Fails unless the results are the right ones, by the mistake's name where they are those of a mistake."""
    for case, result in zip(cases, got, strict=True):
        if not isinstance(result, kind) or isinstance(result, bool):
            fail(
                f"{name}{case} returns {describe(result)}, expected {'an int' if kind is int else 'a tuple (symbol, message)'}",
                "returns",
            )
    if list(got) == [right(*case) for case in cases]:
        return

    def matches(wrong: Callable[..., Any]) -> bool:
        try:
            return list(got) == [wrong(*case) for case in cases]
        except (ArithmeticError, ValueError, LookupError):
            return False

    if found := recognized(mistakes, matches):
        fail_by_name(name, mistakes, found[0])
    case, result = next(pair for pair in zip(cases, got, strict=True) if pair[1] != right(*pair[0]))
    fail(f"{name}{case} gives {result}, expected {right(*case)}; this is no mistake that I know")
