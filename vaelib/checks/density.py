"""A judge of likelihoods: whether the score of an image is a log-probability, and of which params."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vaelib._validation import check_int, describe
from vaelib.checks.terms import FLOORED_BY_TORCH, bernoulli, bernoulli_pixels
from vaelib.checks.verdicts import (
    Mistakes,
    Wrong,
    attempt,
    check_same,
    fail,
    fail_by_name,
    gradients_of,
    recognized,
    same,
    tensor_from,
    verdict,
)

Function = Callable[..., Any]
STEP = 2 / 255  # between neighbours of 256 levels in [-1, 1]


def log_probs(likelihood: Any, x: Tensor, params: Tensor) -> Tensor:
    """likelihood.log_prob, which must be (N,)."""
    what = f"log_prob(x {tuple(x.shape)}, params {tuple(params.shape)})"
    log_prob = tensor_from(what, lambda *a: likelihood.log_prob(*a), x, params)
    if log_prob.shape == x.shape and x.dim() == 4:
        fail(f"{what} gives one number for each pixel: add them up for each image, (N,)", "not-summed")
    if log_prob.dim() == 0:
        fail(f"{what} gives one number for the batch; keep one for each image, (N,)", "scalar")
    if log_prob.dim() > 1 and len(log_prob) == len(x):
        fail(f"{what} gives {describe(log_prob)}: add up over channels, rows and columns of each image, (N,)", "not-summed")
    if log_prob.shape != x.shape[:1] or log_prob.dtype != params.dtype:
        fail(f"{what}: got {describe(log_prob)}, expected {describe(params.new_empty(len(x)))}")
    return log_prob


def domain(likelihood: Any) -> tuple[Any, float, float, int]:
    """`values`, `lowest`, `highest` and the number of params per grey pixel, with their defaults; `values` is None for real x."""
    low, high = float(getattr(likelihood, "lowest", 0)), float(getattr(likelihood, "highest", 1))
    has_method = hasattr(likelihood, "param_channels")
    width = likelihood.param_channels(1) if has_method else getattr(likelihood, "params_per_value", 1)
    return getattr(likelihood, "values", 256), low, high, check_int("params_per_value", width)


# params that are location and log-scale of a discretized logistic


def stable_mass(a: Tensor, b: Tensor, width: Tensor) -> Tensor:
    """log(sigmoid(b) - sigmoid(a)) where b - a is the width."""
    return F.logsigmoid(b) + F.logsigmoid(-a) + (-torch.expm1(-width)).log()


def floored_mass(a: Tensor, b: Tensor, width: Tensor, floor: float) -> Tensor:
    return (b.sigmoid() - a.sigmoid()).clamp(min=floor).log()


def logistic_recipe(
    x: Tensor,
    params: Tensor,
    layout: Function = lambda params: params.chunk(2, 1),
    swap: bool = False,
    location: Function = lambda m: m,
    log_scale: Function = lambda s: s,
    inverse: Function = lambda s: (-s).exp(),
    pixels: Function = lambda x: x,
    half: float = STEP / 2,
    log_mass: Function = stable_mass,
    lowest: bool = True,
    highest: bool = True,
    ends: float = 1.0,
    over_pixels: Function = lambda values: values.flatten(1).sum(1),
) -> Tensor:
    """log of the mass of a logistic density on the bins of the levels x: (N,), nats; the arguments put mistakes into it."""
    m, s = layout(params)
    m, s = (s, m) if swap else (m, s)
    per_scale, y = inverse(log_scale(s)), pixels(x) - location(m)
    a, b, width = (y - half) * per_scale, (y + half) * per_scale, 2 * half * per_scale
    result = log_mass(a, b, width)
    result = torch.where(ends * x < -0.999, F.logsigmoid(b), result) if lowest else result
    result = torch.where(ends * x > 0.999, F.logsigmoid(-a), result) if highest else result
    total: Tensor = over_pixels(result)
    return total


def logistic_with(**switches: Any) -> partial[Tensor]:
    return partial(logistic_recipe, **switches)


RIGHT_LOGISTICS = [  # however the log-scale is kept in bounds, as long as ordinary ones are let through
    logistic_with(log_scale=limit)
    for limit in (
        *(lambda s: s, lambda s: s.clamp(-7, 7), lambda s: s.clamp(min=-7), lambda s: s.clamp(-10, 10), lambda s: s.clamp(min=-10)),
        lambda s: s.clamp(min=-8),
    )
]


def interleaved(params: Tensor) -> tuple[Tensor, Tensor]:
    return params[:, 0::2], params[:, 1::2]


def first_two(params: Tensor) -> tuple[Tensor, Tensor]:
    return params[:, :1], params[:, 1:2]


def one_scale(params: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """All locations, and the one log-scale at a place among the log-scales."""
    locations, log_scales = params.chunk(2, 1)
    return locations, log_scales[:, place, None]


def density(a: Tensor, b: Tensor, width: Tensor) -> Tensor:
    y = (a + b) / 2
    return (width / STEP).log() - y - 2 * F.softplus(-y)


LOGISTIC_MISTAKES: Mistakes = {
    "sign": ("the sign is wrong: this is a loss", logistic_with(over_pixels=lambda values: -values.flatten(1).sum(1))),
    "swapped": ("location and log-scale are swapped: the first half of the params is the location", logistic_with(swap=True)),
    "interleaved": (
        "the params of a pixel with three channels are three locations, then three log-scales: here they are taken in turns",
        logistic_with(layout=interleaved),
    ),
    "first-channels": (
        "the first two params serve all channels of a pixel; each channel has its own",
        logistic_with(layout=first_two),
    ),
    "one-scale": (
        "one log-scale serves all channels of a pixel; each channel has its own",
        *(logistic_with(layout=partial(one_scale, place=place)) for place in (0, -1)),
    ),
    "inverse-scale": (
        "the scale is exp(-log_scale): divide by exp(log_scale), or multiply by exp(-log_scale)",
        logistic_with(inverse=torch.exp),
    ),
    "log-variance": (
        "the log-scale is taken for twice, or for half, of what it is",
        *(logistic_with(inverse=lambda s, factor=factor: (-factor * s).exp()) for factor in (0.5, 2.0)),
    ),
    "no-exp": (
        "the log-scale is taken for the scale: exp is missing",
        logistic_with(inverse=lambda s: 1 / s),
        logistic_with(inverse=lambda s: s),
        logistic_with(inverse=lambda s: 1 / s.abs()),
        logistic_with(inverse=lambda s: -s),
    ),
    "softplus": (
        "the scale is softplus of the second param, which is to be the log of the scale",
        logistic_with(inverse=lambda s: 1 / F.softplus(s)),
    ),
    "fixed-scale": ("the scale is 1 whatever the log-scale is", logistic_with(inverse=torch.ones_like)),
    "location-sign": ("the location has the wrong sign", logistic_with(location=torch.neg)),
    "location-bounded": (
        "the location goes through tanh or sigmoid; take it as it is",
        *(logistic_with(location=end) for end in (torch.tanh, torch.sigmoid, lambda m: m.clamp(-1, 1))),
    ),
    "pixel-scale": (
        "x is scaled once more: it lies in [-1, 1] already",
        *(
            logistic_with(pixels=scaled)
            for scaled in (lambda x: 2 * x - 1, lambda x: (x + 1) / 2, lambda x: x / 255, lambda x: x / 127.5 - 1)
        ),
    ),
    "bin-width": (
        "the bins are too wide or too narrow: a level reaches 1/255 to each side",
        *(logistic_with(half=half) for half in (2 / 255, 0.5 / 255, 0.5, 1 / 127, 1 / 128, 1 / 256)),
    ),
    "half-bin": (
        "the bin of a level reaches 1/255 to each side of it: here it begins or ends at the level",
        *(logistic_with(pixels=lambda x, side=side: x + side / 255) for side in (1, -1)),
    ),
    "no-tails": (
        "mass is lost beyond the ends: levels 0 and 255 own the tails",
        *(logistic_with(lowest=low, highest=high) for low, high in ((False, False), (True, False), (False, True))),
    ),
    "no-width": (
        "the last term log(1 - exp(-(b - a))) is missing or has another width",
        logistic_with(log_mass=lambda a, b, width: F.logsigmoid(b) + F.logsigmoid(-a)),
        logistic_with(log_mass=lambda a, b, width: F.logsigmoid(b) + F.logsigmoid(-a) + math.log(-math.expm1(-STEP))),
    ),
    "wrong-tail": (
        "log sigmoid(b) + log sigmoid(-a) has a wrong sign inside",
        logistic_with(log_mass=lambda a, b, width: F.logsigmoid(b) + F.logsigmoid(a) + (-torch.expm1(-width)).log()),
        logistic_with(log_mass=lambda a, b, width: F.logsigmoid(-b) + F.logsigmoid(-a) + (-torch.expm1(-width)).log()),
        logistic_with(log_mass=lambda a, b, width: F.logsigmoid(b) - F.logsigmoid(-a) + (-torch.expm1(-width)).log()),
    ),
    "base": (
        "the logarithm has base 2; nats are natural",
        logistic_with(over_pixels=lambda values: values.flatten(1).sum(1) / math.log(2)),
    ),
    "tails-swapped": (
        "the tails of levels 0 and 255 are exchanged: level 0 owns what lies below it",
        logistic_with(ends=-1.0),
    ),
    "density": (
        "this is a density, not the mass of a level",
        logistic_with(log_mass=density, lowest=False, highest=False),
        logistic_with(log_mass=density),
        logistic_with(log_mass=lambda a, b, width: density(a, b, width) + math.log(STEP), lowest=False, highest=False),
        logistic_with(log_mass=lambda a, b, width: density(a, b, width) - width.log(), lowest=False, highest=False),
    ),
}


def bernoulli_recipe(
    x: Tensor, params: Tensor, logits: Function = lambda o: o, pixels: Function = bernoulli_pixels, sign: float = 1.0
) -> Tensor:
    """log p(x) of binary pixels; the arguments put mistakes into it."""
    total: Tensor = sign * pixels(x, logits(params)).flatten(1).sum(1)
    return total


def bernoulli_with(**switches: Any) -> partial[Tensor]:
    return partial(bernoulli_recipe, **switches)


BERNOULLI_MISTAKES: Mistakes = {
    "no-sigmoid": (
        "the logits are taken for probabilities: the sigmoid is missing",
        bernoulli_with(pixels=lambda x, o: -F.binary_cross_entropy(o.clamp(0, 1), x, reduction="none")),
    ),
    "logits-bounded": (
        "the logits go through tanh or a clamp; take them as they are",
        *(bernoulli_with(logits=end) for end in (torch.tanh, lambda o: o.clamp(-1, 1))),
    ),
    "sign": ("the sign is wrong: this is a loss", bernoulli_with(sign=-1.0)),
    "sigmoid-twice": (
        "no params make the lower half of the values likely: the sigmoid is applied twice",
        bernoulli_with(logits=torch.sigmoid),
    ),
    "inverted": ("black and white are exchanged: sigmoid(logit) is the probability of x = 1", bernoulli_with(logits=torch.neg)),
    "mse": (
        "the squared error is no log-probability of binary pixels",
        *(
            bernoulli_with(pixels=lambda x, o, f=f, end=end: -f * (x - end(o)).square())
            for f in (0.5, 1.0)
            for end in (torch.sigmoid, torch.clone)
        ),
    ),
    "absolute-error": ("the absolute error is no log-probability", bernoulli_with(pixels=lambda x, o: -(x - o.sigmoid()).abs())),
    "no-log": ("the log is missing: this is a probability", bernoulli_with(pixels=lambda x, o: bernoulli_pixels(x, o).exp())),
    "ones-only": (
        "the pixels with x = 0 do not count: (1 - x) log(1 - p) is missing",
        bernoulli_with(pixels=lambda x, o: x * F.logsigmoid(o)),
    ),
    "zeros-only": (
        "the pixels with x = 1 do not count: x log p is missing",
        bernoulli_with(pixels=lambda x, o: (1 - x) * F.logsigmoid(-o)),
    ),
    "term-sign": (
        "the terms of x = 1 and of x = 0 are subtracted from each other; add them",
        bernoulli_with(pixels=lambda x, o: x * F.logsigmoid(o) - (1 - x) * F.logsigmoid(-o)),
    ),
    "swapped": ("x and params are swapped in the cross entropy", bernoulli_with(pixels=lambda x, o: bernoulli_pixels(o, x))),
    "base": (
        "the logarithm has base 2; nats are natural",
        bernoulli_with(pixels=lambda x, o: bernoulli_pixels(x, o) / math.log(2)),
    ),
}


def check_sums_to_one(table: Tensor, levels: Tensor, bce: Tensor | None) -> None:
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
    check_reaches_low((table.exp() @ levels).min(), levels.mean(), grey)


def check_reaches_low(lowest_mean: Tensor, middle: Tensor, grey: bool) -> None:
    if lowest_mean > middle - 1e-3:
        why = ("data below 0 meets a sigmoid", "sigmoid-range") if grey else ("the sigmoid is applied twice", "sigmoid-twice")
        fail(f"no params make the lower half of the values likely: {why[0]}", why[1])


def check_images(likelihood: Any, values: Tensor, width: int) -> None:
    """Fails unless the score of an image is the sum over its pixels and, for one or two params per value, over its channels.

    The params of C channels are C first params, then C second ones.
    """
    x, params = values[torch.randint(len(values), (3, 1, 2, 3))], torch.randn(3, width, 2, 3)
    whole = log_probs(likelihood, x, params)
    pixels = (value.permute(0, 2, 3, 1).reshape(18, -1, 1, 1) for value in (x, params))
    check_sum("pixels", whole, log_probs(likelihood, *pixels).view(3, 6).sum(1), 6)
    if getattr(likelihood, "params_per_value", 1) is None or width > 2:
        return
    x, params = values[torch.randint(len(values), (2, 3, 2, 2))], torch.randn(2, width, 3, 2, 2)
    whole = log_probs(likelihood, x, params.flatten(1, 2))
    apart = torch.stack([log_probs(likelihood, x[:, c : c + 1], params[:, :, c]) for c in range(3)]).sum(0)
    if width == 2 and not same(whole, apart):
        layouts = [("interleaved", interleaved), ("first-channels", first_two)]
        layouts += [("one-scale", partial(one_scale, place=place)) for place in (0, -1)]
        for name, layout in layouts:
            parts = zip(*(part.expand(-1, 3, -1, -1).unbind(1) for part in layout(params.flatten(1, 2))), x.unbind(1), strict=True)
            if same(whole, sum(log_probs(likelihood, pixel[:, None], torch.stack([m, s], 1)) for m, s, pixel in parts)):  # type: ignore[arg-type]
                fail(f"log_prob of images with three channels: {LOGISTIC_MISTAKES[name][0]}", name)
    check_sum("channels", whole, apart, 3)


def check_sum(what: str, whole: Tensor, parts: Tensor, count: int) -> None:
    if same(whole, parts / count) and whole.isfinite().all():
        fail(f"log_prob is averaged over the {what}: add them up", f"mean-{what}")
    check_same(f"log_prob of images against the sum over their {what}", whole, parts)


def check_both(first: Callable[[], None], second: Callable[[], None]) -> None:
    """Two checks in turn; where both find a mistake with a name, both names are told."""
    found = []
    for check in (first, second):
        try:
            check()
        except Wrong as wrong:
            found.append(wrong)
    if len(found) == 2 and all(wrong.args[1] for wrong in found) and found[0].args[1] != found[1].args[1]:
        fail(*(join.join(wrong.args[place] for wrong in found) for place, join in ((0, "; and "), (1, " + "))))
    if found:
        raise found[0]


def check_known(likelihood: Any, levels: Tensor, width: int, low: float, high: float) -> None:
    """Fails where log_prob is a Bernoulli's or a discretized logistic's with known mistakes, or right but at far params."""
    binary, logistic = len(levels) == 2 and width == 1, len(levels) == 256 and width == 2 and (low, high) == (-1, 1)
    if not binary and not logistic:
        return
    params = torch.cat([torch.tensor([0.3, 1.5]).repeat(100)[:, None] * torch.randn(200, width), torch.rand(20, width)])
    if logistic:
        params[:, 1] = (2 * params[:, 1]).clamp(-5, 5)
    params = params.repeat_interleave(len(levels), 0)[:, :, None, None]
    x = levels.repeat(220).view(-1, 1, 1, 1)
    found = log_probs(likelihood, x, params).detach()
    rights = RIGHT_LOGISTICS if logistic else [bernoulli]
    tables = LOGISTIC_MISTAKES if logistic else BERNOULLI_MISTAKES

    def close(got: Tensor, expected: Tensor) -> bool:
        """Ten times the tolerance of `same`, in which a probability that a naive difference gives has room."""
        return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-3, atol=1e-3, equal_nan=True)

    def matches(wrong: Function) -> bool:
        """Whether the two agree where a probability is no smaller than 1e-3: there is no floor there. A few pixels first."""
        for few in (slice(0, 512), slice(None)):
            expected = wrong(x[few], params[few])
            likely = (expected > -7) | (found[few] > -7)
            if not close(found[few][likely], expected[likely]):
                return False
        return True

    if not matches(rights[0]):
        if found_names := recognized(tables, matches):
            fail_by_name("log_prob", tables, found_names[0])
        return
    if logistic:
        far = torch.cartesian_prod(torch.tensor([-30.0, -3.0, -1.0, 0.5, 1.0, 4.0, 30.0]), torch.tensor([-5.0, -3.0, 0.0, 3.0]))
    else:
        far = torch.tensor([[-200.0], [-30.0], [-16.0], [16.0], [30.0], [200.0]])
    params = far.repeat_interleave(len(levels), 0)[:, :, None, None]
    x = levels.repeat(len(far)).view(-1, 1, 1, 1)
    found = log_probs(likelihood, x, params).detach()
    accepted = rights if logistic else [*rights, *(bernoulli_with(pixels=pixels) for pixels in FLOORED_BY_TORCH)]
    if any(close(found, right(x, params)) for right in accepted):
        return
    if not found.isfinite().all():
        fail("log_prob is NaN or infinite at params of +-30: a probability rounds to 0 before its log is taken", "overflow")
    worst = (found - rights[0](x, params)).abs().argmax()
    where = f"x {x[worst].item():.4g}, params {', '.join(f'{value:g}' for value in params[worst].flatten().tolist())}"
    fail(
        f"log_prob is {found[worst].item():.5g} at {where}, expected {rights[0](x, params)[worst].item():.5g}: the probability "
        "rounds to 0, or has a floor, before its log is taken",
        "floor",
    )


def check_floor(table: Tensor) -> None:
    """Fails where the smallest log-probability of a table occurs again and again: a floor."""
    rows = (table == table.min()).any(1).sum().item()
    if len(table[0]) == 256 and table.min() < -5 and rows >= 5 and (table == table.min()).sum() >= 50:
        fail(
            f"log_prob is {table.min():.5g} at many values and params: the probability has a floor before its log is taken", "floor"
        )


def check_scale_reaches_low(likelihood: Any, levels: Tensor) -> None:
    """Fails where two log-scales far above the usual limit of -7 give the same log-probabilities."""
    small, smaller = (
        log_probs(likelihood, levels.view(-1, 1, 1, 1), torch.tensor([0.0, s]).repeat(len(levels), 1)[:, :, None, None])
        for s in (-3.5, -4.5)
    )
    if same(small, smaller):
        fail("a log-scale of -4.5 gives what one of -3.5 gives: a clamp keeps the scale from being small", "scale-bounded")


def check_roles(table: Tensor, levels: Tensor, params: Tensor, shifted: Tensor, widened: Tensor) -> None:
    """Fails unless the first of two params moves the mean of x up, and the second its spread.

    The tables are at params, at a larger first and at a larger second one.
    """
    means, squares = (torch.stack([t.exp() @ levels.pow(power) for t in (table, shifted, widened)]) for power in (1, 2))
    spreads = squares - means.square()
    up, wider = (means[1] - means[0]).median(), (spreads[2] - spreads[0]).median()
    if (widened - table).abs().max() < 1e-5:
        fail("the second param, the log-scale, changes nothing: the scale is fixed", "fixed-scale")
    if (shifted - table).abs().max() < 1e-5:
        fail("the first param, the location, changes nothing", "no-location")
    if up < 1e-4 and (means[2] - means[0]).median() > 1e-4:
        fail(
            "a larger second param moves the mean of x up, a larger first one does not: location and log-scale are swapped",
            "swapped",
        )
    if up < -1e-4:
        fail("a larger location moves the mean of x down: its sign is wrong", "location-sign")
    if wider < -1e-4:
        fail("a larger log-scale makes the distribution narrower: divide by exp(log_scale)", "inverse-scale")


def check_density(likelihood: Any, low: float, high: float, width: int) -> str:
    """The case of real x: the density must integrate to 1 at each params, and is differentiable in them."""
    check_images(likelihood, torch.linspace(low, high, 99), width)
    wide = torch.linspace(-8, 8, 17, dtype=torch.float64)
    params = torch.cat([torch.linspace(-1, 1, 21)[:, None], *([torch.zeros(21, 1)] * (width - 1))], 1).double()
    if width == 2:
        params[:, 1] = torch.linspace(-1.1, -0.1, 7).repeat(3)
    try:
        table = real_table(likelihood, wide, params)
    except Exception:  # it refuses x outside [low, high], so its whole mass must lie there
        table = None
    scale = None if table is None else gaussian_scale(table, wide)
    if table is not None and scale is not None:  # of any size: no grid would be fine and wide enough for all
        slope = (table[:, 2:] - table[:, :-2]) / (2 * (wide[1] - wide[0]))  # (mean - x) / scale^2
        means = (slope * scale.square() + wide[1:-1]).mean(1, keepdim=True)
        parabola = -0.5 * ((wide - means) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
        totals, lowest_mean = (table - parabola).exp().mean(1), means.min()
    else:
        tries = [(low, high, True)] if table is None else [(-10.0, 10.0, True)]
        if table is None and "validate" in inspect.signature(likelihood.log_prob).parameters:
            tries.append((-10.0, 10.0, False))  # it may refuse what no data are, and have mass there
        for left, right, guarded in tries:
            grid = torch.linspace(left, right, 20001, dtype=torch.float64)
            density = attempt("log_prob of real x", real_table, likelihood, grid, params, guarded).exp()
            totals = torch.trapezoid(density, grid)
            lowest_mean = (torch.trapezoid(density * grid, grid) / totals).min()
            if torch.allclose(totals, torch.ones_like(totals), rtol=0, atol=1e-3):
                break
        low, high = (low, high) if table is None else (-10.0, 10.0)
    told = f"the density integrates to between {totals.min():.4g} and {totals.max():.4g}, expected 1"
    grid = torch.linspace(low, high, 99, dtype=torch.float64)
    if width == 1 and (low, high) == (0, 1):
        bce = bernoulli(grid.repeat(21).view(-1, 1, 1, 1), params.repeat_interleave(99, 0)[:, :, None, None]).view(21, 99)
        if same(real_table(likelihood, grid, params), bce):
            fail(f"binary cross entropy of grey pixels is no log-probability; {told}", "grey-bce")
    if not torch.allclose(totals, torch.ones_like(totals), rtol=0, atol=1e-3):
        if totals.std() < 1e-3 * totals.mean():
            fail(f"a constant is missing; {told}", "constant")
        if scale is not None and (totals / scale[:, 0]).std() < 1e-3 * (totals / scale[:, 0]).mean():
            fail(f"the log of the scale is not subtracted; {told}", "no-log-scale")
        fail(told)
    if width == 2 and scale is not None:
        check_gaussian_scale(scale[:, 0].log(), *params.unbind(1))
    check_reaches_low(lowest_mean, torch.tensor((low + high) / 2), grey=True)
    check_slope(likelihood, grid.float()[torch.randint(99, (300,))].view(-1, 1, 1, 1), torch.randn(300, width)[:, :, None, None])
    return "log_prob is a density: it integrates to 1, adds up over pixels and channels, and its gradient is its slope"


def real_table(likelihood: Any, grid: Tensor, params: Tensor, guarded: bool = True) -> Tensor:
    """log_prob of each x of the grid at each params, (params, grid); not `guarded`, with `validate` off."""
    x = grid.repeat(len(params)).view(-1, 1, 1, 1)
    with torch.no_grad():
        options = {} if guarded else {"validate": False}
        log_prob = likelihood.log_prob(x, params.repeat_interleave(len(grid), 0)[:, :, None, None], **options)
    return log_prob.view(len(params), len(grid))  # type: ignore[no-any-return]


def gaussian_scale(table: Tensor, grid: Tensor) -> Tensor | None:
    """The scales (rows, 1) of the Gaussians whose log-densities a table holds, from their curvature; None where one is no parabola."""
    curvature = -table.diff(n=2, dim=1) / (grid[1] - grid[0]).square()
    middle = curvature.median(1, keepdim=True).values
    if (middle > 0).all() and torch.allclose(curvature, middle.expand_as(curvature), rtol=1e-3, atol=0):
        return middle.rsqrt()
    return None


def check_gaussian_scale(found: Tensor, first: Tensor, second: Tensor) -> None:
    """Fails where the log of a Gaussian's scale is a wrong function of the two params that is known."""
    wrongs = {
        "log-variance": (second / 2, 2 * second),
        "inverse-scale": (-second,),
        "swapped": (first,),
        "softplus": (F.softplus(second).log(),),
        "no-exp": (second.abs().log(),),
        "fixed-scale": (found.mean().expand_as(found),),
    }
    for name, scales in wrongs.items():
        if any(torch.allclose(found, wrong, atol=1e-3) for wrong in scales):
            sentence = LOGISTIC_MISTAKES[name][0] if name != "fixed-scale" else "the log-scale changes nothing: the scale is fixed"
            fail(f"log_prob of real x: {sentence}", name)


def check_slope(likelihood: Any, x: Tensor, params: Tensor) -> None:
    """Fails unless log_prob has a gradient for params, and it is the slope."""
    params = params.detach().requires_grad_()
    log_prob = log_probs(likelihood, x, params)
    if not log_prob.requires_grad:
        fail("log_prob has no gradient for params: detach, item, numpy or no_grad cuts it off", "detached")
    (gradient,) = gradients_of("log_prob", log_prob.sum(), [params])
    if gradient is None or not gradient.any():
        fail("log_prob has no gradient for params: something cuts it off", "detached")
    step = 0.01 * (2.0 * torch.randint_like(gradient, 2) - 1)
    change = log_probs(likelihood, x, (params + step).detach()) - log_probs(likelihood, x, (params - step).detach())
    error = (change - 2 * (gradient * step).flatten(1).sum(1)).abs()
    if error.median() > 0.05 * change.abs().median() + 2e-6 * log_prob.detach().abs().median():  # the digits that float32 has
        fail("the gradient of log_prob for params is not its slope: something is detached", "detached")


@verdict
def check_likelihood(likelihood: Any) -> str:
    """Judges an object with log_prob(x, params) -> log-probability of each image, summed over its pixels: (N,), nats.

    x is (N, C, H, W), params (N, P * C, H, W): all first params, then all second ones. The object says what x is, as
    `vaelib.likelihoods.Likelihood` does: `values`, 2 or 256 (the default) evenly spaced from `lowest` (0) to `highest` (1), or None
    for real x, and P by `param_channels(1)` or `params_per_value` (1). Over all values the probabilities must sum to 1 at each
    params; a density must integrate to 1. Of two params the first is the location, the second the log of the scale. One or two
    params are tried with three channels as well. eq. discretized-logistic-log-prob, eq. bernoulli-log-prob

    The mistakes are in `LOGISTIC_MISTAKES` and `BERNOULLI_MISTAKES`, with "not-summed", "scalar", "mean-pixels", "mean-channels",
    "grey-bce", "sigmoid-range", "constant", "no-location", "no-log-scale", "scale-bounded", "overflow", "floor", "detached".
    """
    values, low, high, width = attempt("reading values, lowest, highest and params_per_value", domain, likelihood)
    if values not in (2, 256, None) or not low < high:
        fail(f"values, lowest, highest: got {values}, {low:g}, {high:g}, expected 2, 256 or None, and lowest below highest")
    if values is None:
        return check_density(likelihood, low, high, width)
    levels = torch.linspace(low, high, values)
    check_both(partial(check_images, likelihood, levels, width), partial(check_known, likelihood, levels, width, low, high))
    spread = torch.tensor([0.5, 3.0])[torch.randint(2, (300, width))]
    ordinary, extreme = spread * torch.randn(300, width), 30 * (2.0 * torch.randint(2, (300, width)) - 1)
    for name, params in (("ordinary params", ordinary), ("params of +-30", extreme)):
        x, params = levels.repeat(300).view(-1, 1, 1, 1), params.repeat_interleave(values, 0)[:, :, None, None].requires_grad_()
        log_prob = log_probs(likelihood, x, params)
        table = log_prob.detach().view(300, values)
        if name == "ordinary params":
            check_sums_to_one(table, levels, bernoulli(x, params.detach()).view(300, values) if width == 1 else None)
            check_slope(likelihood, x, params)
            check_floor(table)
            if width == 2 and values == 256:
                moved = [
                    log_probs(likelihood, x, params.detach() + torch.tensor(d).view(1, 2, 1, 1)) for d in ((0.3, 0.0), (0.0, 0.3))
                ]
                check_roles(table, levels, params, *(t.detach().view(300, values) for t in moved))
                check_scale_reaches_low(likelihood, levels)
        elif width == 1 and values == 2 and table.max() < math.log(0.99):
            fail(f"no logit makes a value likelier than {table.exp().max():.3g}: the logits are bounded", "logits-bounded")
        if not log_prob.requires_grad:
            fail("log_prob has no gradient for params: detach, item, numpy or no_grad cuts it off", "detached")
        (gradient,) = gradients_of("log_prob", log_prob.sum(), [params])
        if not log_prob.isfinite().all() or gradient is None or not gradient.isfinite().all():
            fail(
                f"log_prob or its gradient is NaN or infinite at {name}: a probability rounds to 0 before its log is taken",
                "overflow",
            )
    return f"log_prob is normalized over {values} values at 300 params, adds up over pixels, and is finite at params of +-30"
