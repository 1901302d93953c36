"""The judge of a coder: right ones pass, however they are written, and each mistake is named."""

import bisect
import functools
import itertools

import pytest

from vaelib.checks import POP_MISTAKES, PUSH_MISTAKES, check_coder
from vaelib.checks.coders import pop_recipe, push_recipe


def push_by_divmod(message, symbol, frequencies):
    quotient, rest = divmod(message, frequencies[symbol])
    return quotient * sum(frequencies) + sum(frequencies[:symbol]) + rest


def pop_by_bisection(message, frequencies):
    edges = [0, *itertools.accumulate(frequencies)]
    quotient, target = divmod(message, edges[-1])
    symbol = bisect.bisect_right(edges, target) - 1
    return symbol, quotient * frequencies[symbol] + target - edges[symbol]


def push_by_table(message, symbol, frequencies):
    slots = [(s, i) for s, f in enumerate(frequencies) for i in range(f)]
    return message // frequencies[symbol] * len(slots) + slots.index((symbol, message % frequencies[symbol]))


def pop_by_table(message, frequencies):
    slots = [(s, i) for s, f in enumerate(frequencies) for i in range(f)]
    symbol, i = slots[message % len(slots)]
    return symbol, message // len(slots) * frequencies[symbol] + i


def pop_by_counting(message, frequencies):
    target, symbol = message % sum(frequencies), 0
    while target >= frequencies[symbol]:
        target -= frequencies[symbol]
        symbol += 1
    return symbol, message // sum(frequencies) * frequencies[symbol] + target


def decode(message, count, frequencies, pop=pop_by_counting):
    symbols = []
    for _ in range(count):
        symbol, message = pop(message, frequencies)
        symbols.append(symbol)
    return symbols[::-1]


@pytest.mark.parametrize("push", [push_by_divmod, push_by_table, push_recipe])
@pytest.mark.parametrize("pop", [pop_by_bisection, pop_by_table, pop_by_counting])
def test_right_coders_pass_however_they_are_written(push, pop):
    verdict = check_coder(push, pop, functools.partial(decode, pop=pop))
    assert verdict, verdict
    assert "decode gives back 50 symbols" in verdict.message


@pytest.mark.parametrize(("name", "wrong"), [(name, fn) for name, (_, *fns) in PUSH_MISTAKES.items() for fn in fns])
def test_a_wrong_push_is_named(name, wrong):
    verdict = check_coder(wrong, pop_recipe)
    assert not verdict
    assert verdict.mistake == name


@pytest.mark.parametrize(("name", "wrong"), [(name, fn) for name, (_, *fns) in POP_MISTAKES.items() for fn in fns])
def test_a_wrong_pop_is_named(name, wrong):
    verdict = check_coder(push_recipe, wrong)
    assert not verdict
    assert verdict.mistake == name


def test_two_mistakes_at_once_are_both_named():
    def push(message, symbol, frequencies):
        return message // frequencies[symbol] * sum(frequencies)  # neither the remainder nor the start

    assert check_coder(push, pop_recipe).mistake in ("no-start + no-remainder", "no-remainder + no-start")


def test_what_is_no_coder_is_told_so():
    assert check_coder(lambda *_: None, pop_recipe).mistake == "returns"
    assert check_coder(lambda *_: 1.0, pop_recipe).mistake == "returns"
    assert check_coder(push_recipe, lambda *_: 3).mistake == "returns"
    assert check_coder(push_recipe, lambda *case: pop_recipe(*case)[::-1]).mistake == "order"
    assert check_coder(push_recipe, lambda *_: 1 / 0).mistake == "raises"
    unknown = check_coder(lambda *case: push_recipe(*case) + 1, pop_recipe)
    assert unknown.mistake is None
    assert "no mistake that I know" in unknown.message


def test_a_decoder_that_gives_the_last_symbol_first_is_told_to_turn_round():
    verdict = check_coder(push_recipe, pop_recipe, lambda *case: decode(*case)[::-1])
    assert verdict.mistake == "reversed"
    assert check_coder(push_recipe, pop_recipe, lambda *case: decode(*case)[1:]).mistake is None
