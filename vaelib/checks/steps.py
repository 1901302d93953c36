"""A judge of a training step: the codes that it decodes, the loss that it tells, its gradient, and the move of the weights.

Each run makes two steps from the same weights with noise of its own, while hooks record what the encoder reads, what the decoder
reads, and the gradients. From the codes follow the noise, and with it the right loss and gradient to the last digits; where no
reading of the codes fits, loss and move are compared as means over the runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vaelib._validation import describe
from vaelib.checks.terms import (
    ELBO_MISTAKES,
    FLOORED_BY_TORCH,
    REPARAMETERIZE_MISTAKES,
    bernoulli_pixels,
    elbo_recipe,
    sample_recipe,
)
from vaelib.checks.verdicts import Mistakes, attempt, fail, recognized, verdict
from vaelib.objectives import gaussian_kl, gaussian_log_density
from vaelib.vae import VAE, mlp_vae

Step = Callable[[VAE, torch.optim.Optimizer, Tensor], float]
RUNS, EXACT, LEARNING_RATE = 20, 4, 1e-3  # runs, those of them that are replayed, and the optimizer's learning rate


def step_recipe(
    model: VAE,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    backward: float = 1.0,
    fresh_noise: bool = True,
    cut: str = "",
    zero: str = "before",
    step: int = 1,
    step_first: bool = False,
    codes: Callable[..., Tensor] = sample_recipe,
    of_the_codes: dict[str, Any] | None = None,
    **of_the_elbo: Any,
) -> float:
    """A training step on minus the mean ELBO; the arguments put mistakes into it, those that it does not know into the ELBO."""
    if step_first:
        optimizer.step()
    mean, log_var = model.encode(x)
    if not fresh_noise:
        torch.default_generator.manual_seed(0)
    z = codes(mean, log_var, torch.randn_like(mean), **(of_the_codes or {}))
    loss = loss_at(model, x, mean, log_var, z, cut, of_the_elbo)
    if zero == "before":
        optimizer.zero_grad()
    (backward * loss).backward()
    if zero == "after":
        optimizer.zero_grad()
    for _ in range(0 if step_first else step):
        optimizer.step()
    return loss.item()


def loss_at(model: VAE, x: Tensor, mean: Tensor, log_var: Tensor, z: Tensor, cut: str, of_the_elbo: dict[str, Any]) -> Tensor:
    """Minus the mean of what `elbo_recipe` gives, with the graph cut at one place."""
    rate = (mean.detach() if cut == "kl mean" else mean, log_var.detach() if cut == "kl log_var" else log_var)
    if cut == "kl":
        rate = mean.detach(), log_var.detach()
    logits = model.decode(z.detach() if cut == "z" else z)
    return -elbo_recipe(x, *rate, logits.detach() if cut == "logits" else logits, **of_the_elbo).mean()


def step_with(**switches: Any) -> functools.partial[float]:
    return functools.partial(step_recipe, **switches)


def codes_with(name: str) -> list[functools.partial[float]]:
    return [step_with(of_the_codes=fn.keywords) for fn in REPARAMETERIZE_MISTAKES[name][1:]]


def of_the_elbo(*left_out: str) -> Mistakes:
    """The rows of the ELBO's table, as steps; those of the KL without the prefix."""
    rows = {}
    for name, (sentence, *fns) in ELBO_MISTAKES.items():
        short = {"kl-added": "kl-subtracted"}.get(
            name, name.removeprefix("kl-") if name not in ("kl-sum-batch", "kl-mean-batch", "kl-base") else name
        )
        if name not in left_out:
            told = {
                "kl-added": "the KL is subtracted from the loss; add it",
                "sum-batch": "the loss is added up over the batch; take the mean",
            }
            words = told.get(name, sentence)
            rows[short] = (words, *(step_with(**fn.keywords) for fn in fns))
    return rows


RIGHT_STEP = step_with()
CUTS = {
    "z": "the sample z is detached: the log-likelihood teaches the encoder nothing",
    "logits": "the decoder's output is detached: the log-likelihood teaches nothing",
    "kl": "the KL is detached: it teaches the encoder nothing",
    "kl mean": "the mean is detached in the KL",
    "kl log_var": "log_var is detached in the KL",
    "code log_var": "log_var is detached in the sample z",
    "code mean": "the mean is detached in the sample z",
    "log_var": "log_var is detached: nothing teaches the encoder its variance",
    "mean": "the mean is detached: nothing teaches the encoder its mean",
    "encoder": "what the encoder gives is detached: nothing teaches it",
}
TRAINING_MISTAKES: Mistakes = {
    "elbo-minimized": (
        "the step lowers the ELBO: minimize minus the ELBO",
        *(step_with(whole=torch.neg), step_with(backward=-1.0)),
    ),
    "no-zero-grad": ("the gradients of the step before are still there: zero_grad is missing", step_with(zero="")),
    "no-step": (
        "the weights do not change: backward or step is missing, or zero_grad stands between them",
        *(step_with(step=0), step_with(zero="after")),
    ),
    "step-first": ("the optimizer steps before backward: with the gradient of the call before", step_with(step_first=True)),
    "two-steps": ("the optimizer steps twice with one gradient", step_with(step=2)),
    "backward-twice": ("the gradient is twice that of the loss: backward is called twice", step_with(backward=2.0)),
    "own-output": (
        "the target is the model's own output, so there is nothing to learn from x",
        step_with(pixels=lambda x, o: bernoulli_pixels(o.sigmoid(), o)),
        step_with(pixels=lambda x, o: bernoulli_pixels(o.sigmoid().detach(), o)),
    ),
    "mean-decoded": ("the mean is decoded, not a sample z: this trains no VAE", *codes_with("no-noise")),
    "one-noise": ("all images of a batch share one noise", *codes_with("one-noise")),
    "one-noise-latents": ("all latents of an image share one noise", *codes_with("one-noise-latents")),
    "noise-variance": ("the noise is scaled by the variance exp(log_var), not by exp(log_var / 2)", *codes_with("variance")),
    "noise-no-exp": ("the noise is scaled by a logarithm", *codes_with("no-exp")),
    "noise-inverse": ("the noise is divided by the standard deviation", *codes_with("inverse")),
    "noise-root": ("the noise is scaled by the root of the standard deviation", *codes_with("root-twice")),
    "noise-bracket": ("the 1/2 stands outside exp: exp(log_var) / 2 is half the variance", *codes_with("bracket")[:1]),
    "no-scale": ("the noise has standard deviation 1, whatever log_var is", *codes_with("no-scale")),
    "no-mean": ("the mean is missing in the sample z", *codes_with("no-mean")),
    "constant-noise": ("the noise is left out: the standard deviation itself is added to the mean", *codes_with("constant-noise")),
    "codes-swapped": ("mean and log_var are swapped in the sample z", *codes_with("swapped")),
    "prior-decoded": (
        "z is drawn from the prior, whatever x is",
        step_with(of_the_codes={"location": torch.zeros_like, "scale": lambda m, s: torch.ones_like(s)}),
    ),
    "same-noise": ("the noise is the same at each call", step_with(fresh_noise=False)),
    "mean-latents": ("the KL is averaged over the latent dimensions", step_with(reduce=lambda units: units.mean(-1))),
    **of_the_elbo(
        *("loss", "own-output", "mean-batch", "mean-default", "likelihood-mean-batch", "kl-mean-batch", "kl-mean-latents", "kl-mean-all"),
        *("mean-channels", "likelihood-sign", "no-sigmoid", "kl-variance", "kl-std"),  # one channel; the last three are NaN at once
    ),
    "detached": ("a part of the graph is cut off", step_with(cut="z")),
}  # fmt: skip
for taken in ("overflow", "floor"):  # they show at large logits only
    TRAINING_MISTAKES[taken] = TRAINING_MISTAKES.pop(taken)
OF_THE_LIKELIHOOD = {"pixels", "over_pixels", "likelihood", "rate", "whole"}  # switches that a KL by Monte Carlo has too
NOISE = [name for name, (_, *fns) in TRAINING_MISTAKES.items() if any("of_the_codes" in fn.keywords for fn in fns)]
OBJECTIVE: Mistakes = {
    name: (sentence, *elbos)
    for name, (sentence, *fns) in TRAINING_MISTAKES.items()
    if (
        elbos := [
            fn
            for fn in fns
            if fn.keywords.keys().isdisjoint({"backward", "zero", "step", "step_first", "of_the_codes", "fresh_noise", "cut"})
        ]
    )
    and name not in ("overflow", "floor")
}


@functools.cache
def training_example() -> tuple[VAE, Tensor]:
    """A small model whose KL, noise and image all matter to the loss, one unit of it nearly silent, and a batch."""
    torch.default_generator.manual_seed(0)
    model = mlp_vae((1, 4, 4), (8,), 5)
    with torch.no_grad():
        head: Any = model.encoder.head
        head.weight.mul_(12)
        for rows in (head.weight[4::5], head.bias[4::5]):  # mean and log-variance of the last unit
            rows.mul_(0.01)
        model.decoder.head.weight.mul_(2.5)  # type: ignore[operator, union-attr]
    return model, torch.bernoulli(torch.rand(256, 1, 4, 4))


@dataclass
class Call:
    """What one call of a training step did; gradients and moves are vectors over all weights."""

    model: VAE  # as it was before
    loss: float
    left: Tensor  # the gradient that was there before
    move: Tensor  # the change of the weights, over minus the learning rate
    raw: Tensor | None = None  # the gradient after backward; None where there was no backward
    read: list[Tensor] = field(default_factory=list)  # what the encoder read
    codes: list[Tensor] = field(default_factory=list)  # what the decoder read


def weights_of(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def gradients_of_weights(model: nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]).clone()


def recorded(fn: Step, model: VAE, optimizer: torch.optim.Optimizer, x: Tensor, seed: int, what: str, exact: bool) -> Call:
    """One call of a training step, watched by hooks."""
    before = deepcopy(model)
    call = Call(before, math.nan, gradients_of_weights(model), Tensor())

    def note(gradient_of: nn.Module) -> None:
        call.raw = gradients_of_weights(gradient_of)

    hooks = [
        model.encoder.register_forward_pre_hook(lambda module, given: call.read.append(given[0].detach().clone())),
        model.decoder.register_forward_pre_hook(lambda module, given: call.codes.append(given[0].detach().clone())),
        *(p.register_post_accumulate_grad_hook(lambda p: note(model)) for p in (model.parameters() if exact else ())),
    ]
    try:
        loss = attempt(what, fn, model, optimizer, x, seed=seed)
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(loss, bool) or not isinstance(loss, (int, float)):
        name = "no-return" if loss is None else "not-a-float"
        fail(f"{what} returns {describe(loss)}, expected the loss as a float: return loss.item()", name)
    if not model.training:
        fail(
            f"{what} leaves the model in evaluation mode, where dropout and the like do not train: call model.train()", "eval-mode"
        )
    call.loss, call.move = float(loss), (weights_of(before) - weights_of(model)) / LEARNING_RATE
    if not math.isfinite(call.loss) or not call.move.isfinite().all():
        fail(f"{what}: the loss is {call.loss:g}; it or a weight is NaN or infinite")
    return call


def runs_of(fn: Step, runs: int = RUNS) -> list[tuple[Call, Call]]:
    """Two steps from the same weights, `runs` times, each with its noise."""
    model, x = training_example()
    found = []
    for seed in range(runs):
        copy = deepcopy(model)
        optimizer = torch.optim.SGD(copy.parameters(), lr=LEARNING_RATE)
        shape = tuple(x.shape)
        first, second = (
            recorded(
                fn,
                copy,
                optimizer,
                x.clone(),
                2 * seed + call,
                f"call {call} of training_step(model, optimizer, x {shape})",
                seed < EXACT,
            )
            for call in (1, 2)
        )
        found.append((first, second))
    return found


# the codes


@dataclass
class Reading:
    """How the codes of a call come from what the encoder gave: z = location + scale * noise, all (K * N, L)."""

    x: Tensor
    read: Tensor
    noise: Tensor
    switches: dict[str, Any]


def arranged(call: Call, x: Tensor, each: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """x, what the encoder read and the codes, repeated so that they fit; `each`: the codes of an image stand side by side."""
    if not call.read or not call.codes or any(part.shape[1:] != call.codes[0].shape[1:] for part in call.codes):
        return None
    read, codes = torch.cat(call.read), torch.cat(call.codes)
    if len(read) > len(x) and torch.equal(read[: len(x)], read[-len(x) :]):
        read = read[: len(x)]
    if read.shape != x.shape or len(codes) % len(x) or not len(codes):
        return None
    count = len(codes) // len(x)

    def repeated(values: Tensor) -> Tensor:
        return values.repeat_interleave(count, 0) if each else values.repeat(count, *[1] * (values.dim() - 1))

    return repeated(x), repeated(read), codes


def standard(noise: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether noise is standard normal, and its size has nothing to do with the other tensors, to five standard errors."""
    if not noise.isfinite().all():
        return False
    n = noise.numel()
    squares = noise.square() - 1
    if noise.mean().abs() > 5 / math.sqrt(n) or squares.mean().abs() > 5 * math.sqrt(2 / n):
        return False
    if (noise.square().square().mean() - 3).abs() > 5 * math.sqrt(96 / n):
        return False
    correlation = torch.corrcoef(noise.T).fill_diagonal_(0.0) if noise.shape[1] > 1 else torch.zeros(())
    if correlation.abs().max() > 6 / math.sqrt(len(noise)):
        return False
    features = [other - other.mean() for other in others]
    limits = ((noise, 1.0), (squares, math.sqrt(2.0)))
    return all(
        (f * value).mean().abs() <= 6 * size * f.square().mean().sqrt() / math.sqrt(n) for f in features for value, size in limits
    )


HYPOTHESES: list[tuple[str, dict[str, Any]]] = sorted(
    [("", {}), *((name, fn.keywords["of_the_codes"]) for name in NOISE for fn in TRAINING_MISTAKES[name][1:])],
    key=lambda row: "noise" not in row[1],  # these fit exactly or not at all
)


def noise_under(switches: dict[str, Any], mean: Tensor, log_var: Tensor, codes: Tensor) -> Tensor:
    """The noise that makes the codes, where they are location + scale * noise; NaN or infinite where the scale is 0."""
    plain = {key: value for key, value in switches.items() if key != "noise"}
    location = sample_recipe(mean, log_var, torch.zeros_like(mean), **plain)
    return (codes - location) / (sample_recipe(mean, log_var, torch.ones_like(mean), **plain) - location)


def read_codes(runs: Sequence[tuple[Call, Call]], x: Tensor) -> tuple[str | None, list[tuple[Reading, Reading]], list[str]]:
    """The name of what is wrong with the codes ("" for nothing, None where no reading fits), a reading of each call, and notes."""
    for each in (False, True):
        parts = [[arranged(call, x, each) for call in run] for run in runs]
        if any(part is None for run in parts for part in run):
            return None, [], []
        flat = [(call.model, *part) for run, row in zip(runs, parts, strict=True) for call, part in zip(run, row, strict=True)]  # type: ignore[misc]
        with torch.no_grad():
            posteriors = [model.encoder(read) for model, _, read, _ in flat]
        mean, log_var, codes = (torch.cat(list(t)) for t in (*zip(*posteriors, strict=True), [c for *_, c in flat]))
        for name, switches in HYPOTHESES:
            noise = noise_under(switches, mean, log_var, codes)
            shaped = noise.view(len(flat), -1, noise.shape[1])
            repeated = bool((shaped - shaped[:1]).abs().median() < 1e-3)
            fixed = switches.get("noise")
            if fixed in (torch.zeros_like, torch.ones_like):
                fits = torch.allclose(noise, fixed(noise), atol=1e-3)
            elif "noise" in switches:
                axis = 2 if name == "one-noise-latents" else 1
                fits = bool((shaped - shaped.narrow(axis, 0, 1)).abs().max() < 1e-2 and noise.std() > 0.1)
            else:
                few = len(shaped[0]) if repeated else len(noise)
                fits = standard(noise[:few], (mean[:few], log_var[:few]))
            if fits:
                return "same-noise" if repeated and not name else name, readings_of(flat, noise, switches), []
    right = noise_under({}, mean, log_var, codes)
    note = f"the noise (z - mean) / exp(log_var / 2) has mean {right.mean():.3g} and deviation {right.std():.3g}, expected 0 and 1"
    return None, readings_of(flat, right, {}), [note]


def readings_of(flat: Sequence[Any], noise: Tensor, switches: dict[str, Any]) -> list[tuple[Reading, Reading]]:
    parts = noise.split([len(codes) for *_, codes in flat])
    readings = [Reading(x, read, part, switches) for (_, x, read, _), part in zip(flat, parts, strict=True)]
    return list(zip(readings[0::2], readings[1::2], strict=True))


# loss and gradient at those codes


def sampled_kl(z: Tensor, path: bool) -> Callable[..., Tensor]:
    """The KL as log q(z) - log p(z); `path`: with q's params detached in the density, which leaves the mean gradient as it is."""

    def of(mean: Tensor, log_var: Tensor) -> Tensor:
        mean, log_var = (mean.detach(), log_var.detach()) if path else (mean, log_var)
        zero = torch.zeros_like(z)
        return gaussian_log_density(z, mean, log_var) - gaussian_log_density(z, zero, zero)

    return of


def terms_at(call: Call, reading: Reading, cut: str = "") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, log_var, z and logits of a call, with their graph in `call.model`, which is cut at one place."""
    mean, log_var = call.model.encoder(reading.read)
    mean = mean.detach() if cut in ("mean", "encoder") else mean
    log_var = log_var.detach() if cut in ("log_var", "encoder") else log_var
    code = (mean.detach() if cut == "code mean" else mean, log_var.detach() if cut == "code log_var" else log_var)
    plain = {key: value for key, value in reading.switches.items() if key != "noise"}
    z = sample_recipe(*code, reading.noise.nan_to_num(0.0, 0.0, 0.0), **plain)
    return mean, log_var, z, call.model.decoder(z)


def replayed(call: Call, reading: Reading, elbo: dict[str, Any], cut: str = "", kl: str = "closed") -> Tensor:
    """The loss, with its graph in `call.model`, that a step with these switches has at the codes of the call."""
    mean, log_var, z, _ = terms_at(call, reading, cut)
    if kl != "closed":
        elbo = {**elbo, "kl": sampled_kl(z, kl == "path")}
    return loss_at(call.model, reading.x, mean, log_var, z, cut, elbo)


def gradient_at(call: Call, loss: Tensor) -> Tensor:
    weights = list(call.model.parameters())
    if not loss.requires_grad:
        return torch.zeros_like(call.move)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(weights, gradients, strict=True)])


def near(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).norm() <= 2e-3 * expected.norm() + 1e-5)


def clipped(pairs: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> bool:
    """Whether the moves are gradients clipped: by norm, all of them or each weight's, or by value."""
    if all(near(move, raw.clamp(-float(move.abs().max()), float(move.abs().max()))) for raw, move in pairs):
        tops = torch.stack([move.abs().max() for _, move in pairs])
        if bool((tops / tops.max() > 0.98).all()):
            return True

    def by_norm(parts: Sequence[tuple[Tensor, Tensor]]) -> bool:
        norms = [(float(raw.norm()), float(move.norm())) for raw, move in parts]
        limit = max(move for _, move in norms)
        return all(
            near(move, raw * (b / max(a, 1e-12))) and b > 0 and (abs(b - a) < 2e-3 * a or b > 0.98 * limit)
            for (raw, move), (a, b) in zip(parts, norms, strict=True)
        )

    if by_norm(pairs):
        return True
    split = [list(zip(raw.split(list(sizes)), move.split(list(sizes)), strict=True)) for raw, move in pairs]
    return all(by_norm(parts) for parts in zip(*split, strict=True))


def explained(runs: Sequence[tuple[Call, Call]], readings: Sequence[tuple[Reading, Reading]]) -> tuple[list[str], list[str]] | None:
    """Names and sentences of what is wrong with loss, gradient and move of the first runs; None where something fits no mistake."""
    calls = [
        (call, reading) for run, row in zip(runs[:EXACT], readings, strict=False) for call, reading in zip(run, row, strict=True)
    ]
    kinds = ("closed", "sampled")

    with torch.no_grad():
        known = [terms_at(call, reading) for call, reading in calls]

    def tells(elbo: dict[str, Any], kl: str = "closed") -> bool:
        """Whether the loss is that of these switches in all calls."""
        try:
            for (call, reading), (mean, log_var, z, logits) in zip(calls, known, strict=True):
                kinds = elbo if kl == "closed" else {**elbo, "kl": sampled_kl(z, False)}
                loss = -float(elbo_recipe(reading.x, mean, log_var, logits, **kinds).mean())
                if not math.isclose(call.loss, loss, rel_tol=2e-4, abs_tol=2e-4):
                    return False
        except RuntimeError:  # shapes that two mistakes together do not fit
            return False
        return True

    def descends(elbo: dict[str, Any], cut: str = "", kl: str = "closed", sign: float = 1.0) -> str | None:
        """Whether the gradients are those of these switches: "" or "no-zero-grad" where they are, None where not."""
        left = False
        for call, reading in calls:
            got = call.move if call.raw is None else call.raw
            expected = sign * gradient_at(call, replayed(call, reading, elbo, cut, kl))
            if near(got, expected):
                continue
            if not near(got, expected + call.left):
                return None
            left = True
        return "no-zero-grad" if left else ""

    names: list[str] = []
    notes: list[str] = []

    def matched(test: Callable[[dict[str, Any]], bool]) -> tuple[tuple[str, ...], dict[str, Any]] | None:
        if test({}):
            return (), {}
        found = recognized(OBJECTIVE, lambda fn: test(fn.keywords))
        return (found[0], found[1].keywords) if found else None

    told_kl = next((kind for kind in kinds if tells({}, kind)), "closed")
    told = ((), {}) if tells({}, told_kl) else matched(tells)
    moved = any(call.move.any() for call, _ in calls)
    graded = any(call.raw is not None for call, _ in calls) or moved
    optimized: tuple[str, ...] = told[0] if told else ()
    elbo = told[1] if told else {}
    cut, held = "", None
    if graded:
        tries: list[tuple[dict[str, Any], tuple[str, ...], str, str, float]] = []
        for keywords, found_names in dict.fromkeys([(0, optimized), (1, ())]):
            e = elbo if keywords == 0 else {}
            kls = ["closed", *(kl for kl in ("sampled", "path") if e.keys() <= OF_THE_LIKELIHOOD)]
            tries += [(e, found_names, kl, "", sign) for sign in (1.0, -1.0, 2.0) for kl in kls]
            if len(found_names) == 1:  # the same loss with another gradient
                tries += [
                    (fn.keywords, found_names, "closed", "", 1.0) for fn in OBJECTIVE[found_names[0]][1:] if tells(fn.keywords)
                ]
            tries += [(e, found_names, kl, c, 1.0) for kl in kls for c in CUTS]
        for e, found_names, kl, c, sign in tries:
            held = descends(e, c, kl, sign)
            if held is not None:
                optimized, cut = found_names, c
                if sign != 1:
                    names.append("elbo-minimized" if sign < 0 else "backward-twice")
                    notes.append(TRAINING_MISTAKES[names[-1]][0])
                break
        if held is None:
            singles = ((name, fn) for name, (_, *fns) in OBJECTIVE.items() for fn in fns)
            single = next(((name, fn) for name, fn in singles if descends(fn.keywords) is not None), None)
            if single is None:
                return None
            optimized, held = (single[0],), descends(single[1].keywords)
    if told is None:
        ratios = [call.loss / replayed(call, reading, {}).item() for call, reading in calls]
        about = (
            f"{sum(ratios) / len(ratios):.4g} times the right one" if max(ratios) - min(ratios) < 1e-3 else "no loss that I know"
        )
        if held is None or optimized or names:
            return None
        return [], [f"the step is right, but the loss that it returns is {about}: mean loss {mean_loss(runs)}"]
    for name in told[0] if told[0] == optimized or not optimized or not graded else (*told[0], *optimized):
        wording = OBJECTIVE[name][0]
        if graded and told[0] != optimized and name in told[0]:
            wording = f"the loss that is returned: {wording}"
        names.append(name)
        notes.append(wording)
    if graded and optimized and not told[0]:
        names += optimized
        notes += [
            f"the loss that is returned is right, but not the one that is minimized: {OBJECTIVE[name][0]}" for name in optimized
        ]
    if cut:
        names.append("detached")
        notes.append(f"{TRAINING_MISTAKES['detached'][0]}: {CUTS[cut]}")
    if held == "no-zero-grad":
        names.append("no-zero-grad")
        notes.append(TRAINING_MISTAKES["no-zero-grad"][0])
    if not moved:
        return [*names, "no-step"], [*notes, TRAINING_MISTAKES["no-step"][0]]
    raws = [(call.raw, call.move) for call, _ in calls if call.raw is not None]
    if raws and not all(near(move, raw) for raw, move in raws):
        sizes = [p.numel() for p in calls[0][0].model.parameters()]
        if all(near(move, 2 * raw) for raw, move in raws):
            names.append("two-steps")
            notes.append(TRAINING_MISTAKES["two-steps"][0])
        elif all(near(call.move, call.left) for call, _ in calls):
            names = [*(name for name in names if name != "no-zero-grad"), "step-first"]
            notes = [*(note for note in notes if note != TRAINING_MISTAKES["no-zero-grad"][0]), TRAINING_MISTAKES["step-first"][0]]
        elif all(near(move, -raw) for raw, move in raws):
            names.append("elbo-minimized")
            notes.append(TRAINING_MISTAKES["elbo-minimized"][0])
        elif not clipped(raws, sizes):
            return names, [*notes, "the optimizer steps with something else than the gradient of the loss"]
    return names, notes


def mean_loss(runs: Sequence[tuple[Call, Call]]) -> str:
    right = known_runs(RIGHT_STEP)
    got, expected = (sum(run[0].loss for run in found) / len(found) for found in (runs, right))
    opposite = "; its sign is the opposite" if abs(got + expected) < 0.05 * abs(expected) else ""
    if f"{got:+.5g}" == f"{expected:+.5g}":
        return f"{got:+.5g}, as expected"
    return f"got {got:+.5g}, expected {expected:+.5g}{opposite}"


known_runs = functools.cache(runs_of)


# the means over the runs, where the codes cannot be read


def trace(runs: Sequence[tuple[Call, Call]]) -> list[Tensor]:
    """Losses (runs, 2), first and second move (runs, weights)."""
    losses = torch.tensor([[call.loss for call in run] for run in runs])
    return [losses, *(torch.stack([run[place].move for run in runs]) for place in (0, 1))]


def agree(got: Tensor, expected: Tensor) -> bool:
    """Whether the means over the runs agree to five standard errors, and the noise of `got` is at most four times, at least an eighth.

    A KL by Monte Carlo is some three times as noisy as the closed form; many samples per image are less noisy than one.
    """
    noise, expected_noise = (float(value.var(0).sum()) if value.ne(value[:1]).any() else 0.0 for value in (got, expected))
    squared = (got.mean(0) - expected.mean(0)).square().sum()
    close = squared <= 25 * (noise + expected_noise) / len(got) + 1e-6 * expected.mean(0).square().sum() + 1e-8
    return bool(close) and expected_noise / 64 <= noise <= 16 * expected_noise


def check_large_logits(fn: Step) -> None:
    """Fails where the loss is not finite, or wrong, at logits of some hundreds."""
    model, x = training_example()
    copy = deepcopy(model)
    with torch.no_grad():
        copy.decoder.head.weight.mul_(200)  # type: ignore[operator, union-attr]
        copy.decoder.head.bias.mul_(200)  # type: ignore[operator, union-attr]
    optimizer = torch.optim.SGD(copy.parameters(), lr=LEARNING_RATE)
    before, codes = deepcopy(copy), []
    hook = copy.decoder.register_forward_pre_hook(lambda module, given: codes.append(given[0].detach().clone()))
    loss = attempt("training_step of a model with large logits", fn, copy, optimizer, x.clone())
    hook.remove()
    sentence = TRAINING_MISTAKES["overflow"][0]
    if not math.isfinite(loss) or not weights_of(copy).isfinite().all():
        fail(f"training_step: the loss is {loss:g} for a model with large logits: {sentence}", "overflow")
    if not codes or sum(map(len, codes)) % len(x):
        return
    z = torch.cat(codes)
    count = len(z) // len(x)
    with torch.no_grad():
        mean, log_var = before.encode(x)
        for each in (False, True):
            images, *posterior = (
                t.repeat_interleave(count, 0) if each else t.repeat(count, *[1] * (t.dim() - 1)) for t in (x, mean, log_var)
            )
            scored = [pixels(images, before.decode(z)).flatten(1).sum(1) for pixels in (bernoulli_pixels, *FLOORED_BY_TORCH)]
            rates = [gaussian_kl(*posterior), sampled_kl(z, False)(*posterior)]
            if any(math.isclose(loss, float((rate - score).mean()), rel_tol=1e-3) for rate in rates for score in scored):
                return
    fail(f"training_step: the loss is {loss:.5g} for a model with large logits: {TRAINING_MISTAKES['floor'][0]}", "floor")


@verdict
def check_training_step(fn: Step) -> str:
    """Judges training_step(model, optimizer, x) -> loss, a float: minus the mean ELBO of the batch, nats. eq. loss

    model is a small `VAE` with a Bernoulli likelihood, x (N, 1, 4, 4) holds 0 and 1, and the optimizer is SGD over the model's
    parameters. One sample z per image is enough. Gradients may be clipped. The codes that reach the decoder must be
    mean + exp(log_var / 2) times standard normal noise; loss, gradient and move are then compared at these very codes, in several
    runs of two steps. The mistakes are in `TRAINING_MISTAKES`.
    """
    runs = runs_of(fn)
    x = training_example()[1]
    name, readings, notes = read_codes(runs, x)
    found = explained(runs, readings) if readings else None
    praise = f"loss, gradient and step are right in {RUNS} runs of two steps"
    if found and name is not None:
        names, sentences = found
        codes = [name] if name else []
        if codes or names:
            told = [*(TRAINING_MISTAKES[code][0] for code in codes), *sentences]
            fail(f"training_step: {'; and '.join(told)}; mean loss: {mean_loss(runs)}", " + ".join(dict.fromkeys([*codes, *names])))
        if sentences:
            fail(f"training_step: {'; and '.join(sentences)}")
        check_large_logits(fn)
        return praise
    right = trace(known_runs(RIGHT_STEP))
    got = trace(runs)
    if all(map(agree, got, right)):
        check_large_logits(fn)
        return praise
    for mistake in ("step-first", "elbo-minimized", "no-kl"):
        sentence, wrong, *_ = TRAINING_MISTAKES[mistake]
        if all(map(agree, got, trace(known_runs(wrong)))):
            fail(f"training_step: {sentence}", mistake)
    if got[0].eq(got[0][:1]).all():
        fail("training_step: the loss does not vary: it draws no noise, or the same noise at each call", "same-noise")
    what = ("losses of two calls", "first change of the weights", "second change of the weights")
    place, one, other = next(row for row in zip(what, got, right, strict=True) if not agree(*row[1:]))
    lengths = f"the mean {place}: got length {one.mean(0).norm():.5g}, expected {other.mean(0).norm():.5g}"
    read = next((w for run in runs for call in run for w in call.read), x)
    if read.shape == x.shape and not torch.equal(read, x):
        notes = [*notes, "the encoder does not read x"]
    fail(f"training_step: {'; '.join([f'mean loss: {mean_loss(runs)}', lengths, *notes])}; this is no mistake that I know")
