"""A judge of vector quantization: the codes that are chosen, the loss, and where each of their gradients goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import describe
from vaelib.checks.verdicts import Mistakes, attempt, check_same, fail, fail_by_name, recognized, same, verdict

Quantize = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
PARTS = (
    "z",
    "the loss",
    "z's gradient for output",
    "z's gradient for codes",
    "the loss's gradient for output",
    "the loss's gradient for codes",
)


def identity(value: Tensor) -> Tensor:
    return value


def nearest(output: Tensor, codes: Tensor) -> Tensor:
    return torch.cdist(output, codes).argmin(1)


def quantize_recipe(
    output: Tensor,
    codes: Tensor,
    beta: float,
    choose: Callable[[Tensor, Tensor], Tensor] = nearest,
    straight: str = "to output",
    in_codebook: Callable[[Tensor], Tensor] = torch.detach,
    in_commitment: Callable[[Tensor], Tensor] = torch.detach,
    weights: Callable[[float], tuple[float, float]] = lambda beta: (1.0, beta),
    over: Callable[[Tensor], Tensor] = lambda squares: squares.sum(1),
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The nearest codes with a straight-through gradient, and the loss of codebook and commitment; arguments put mistakes into it."""
    chosen = codes[choose(output, codes)]
    z = {
        "to output": chosen.detach() + output - output.detach(),
        "nowhere": chosen.detach(),
        "to codes": chosen,
        "to both": chosen + output - output.detach(),
        "unquantized": output,
    }[straight]
    codebook, commitment = weights(beta)
    loss = codebook * over((chosen - in_codebook(output)) ** 2) + commitment * over((output - in_commitment(chosen)) ** 2)
    return z, factor * loss


def evidence(fn: Quantize, output: Tensor, codes: Tensor, beta: float) -> list[Tensor]:
    """z, the loss, and the gradients of a weighted sum of each, for output and codes: what `PARTS` names; zeros where there is none."""
    output, codes = output.clone().requires_grad_(), codes.clone().requires_grad_()
    results, found = fn(output, codes, beta), []
    for value in results:
        total = (value * torch.linspace(1, 2, value.numel()).view_as(value)).sum()
        gradients: Any = (None, None)
        if value.requires_grad:
            gradients = torch.autograd.grad(total, [output, codes], allow_unused=True, retain_graph=True)
        pairs = zip(gradients, (output, codes), strict=True)
        found += [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pairs]
    return [*(value.detach() for value in results), *found]


def mistake(**switches: Any) -> functools.partial[tuple[Tensor, Tensor]]:
    return functools.partial(quantize_recipe, **switches)


VQ_MISTAKES: Mistakes = {
    "no-straight-through": (
        "the gradient of z reaches no output: choosing a code has none; add output - output.detach() to the chosen codes",
        mistake(straight="nowhere"),
        mistake(straight="to codes"),
    ),
    "codebook-by-decoder": (
        "the gradient of z reaches the codes too: detach them in z; the codes follow the outputs, by the loss",
        mistake(straight="to both"),
    ),
    "unquantized": ("z is the output itself: nothing is quantized", mistake(straight="unquantized")),
    "codebook-not-learned": (
        "the term that moves the codes is missing: nothing teaches them where the outputs are",
        mistake(weights=lambda beta: (0.0, beta)),
        mistake(weights=lambda beta: (0.0, 1.0)),
    ),
    "no-commitment": (
        "the commitment is missing: nothing keeps the outputs near the codes",
        mistake(weights=lambda beta: (1.0, 0.0)),
    ),
    "no-beta": ("beta is left out", mistake(weights=lambda beta: (1.0, 1.0))),
    "beta-on-codebook": (
        "beta weighs the term of the codes; it belongs to the commitment",
        mistake(weights=lambda beta: (beta, 1.0)),
    ),
    "beta-on-both": ("beta weighs both terms; it belongs to the commitment alone", mistake(weights=lambda beta: (beta, beta))),
    "no-stop-codebook": ("the output is not detached in the term that moves the codes", mistake(in_codebook=identity)),
    "no-stop-commitment": ("the codes are not detached in the commitment", mistake(in_commitment=identity)),
    "no-stop": (
        "nothing is detached in the loss, so that both terms move codes and outputs alike",
        mistake(in_codebook=identity, in_commitment=identity),
    ),
    "farthest": (
        "the farthest code is chosen: argmin, not argmax, of the distance",
        mistake(choose=lambda o, c: torch.cdist(o, c).argmax(1)),
    ),
    "inner-product": (
        "the code with the largest inner product is chosen, which favours long codes: take the smallest distance",
        mistake(choose=lambda o, c: (o @ c.T).argmax(1)),
    ),
    "cosine": (
        "the code in the nearest direction is chosen, whatever its length: take the smallest distance",
        mistake(choose=lambda o, c: (o @ (c / c.norm(dim=1, keepdim=True)).T).argmax(1)),
    ),
    "mean-dims": ("the loss is averaged over the D numbers; add them up", mistake(over=lambda squares: squares.mean(1))),
    "no-square": ("the loss has distances in place of their squares", mistake(over=lambda squares: squares.sum(1).sqrt())),
    "half": ("the loss is half of what it should be", mistake(factor=0.5)),
    "twice": ("the loss is counted twice", mistake(factor=2.0)),
}


@verdict
def check_vq(quantize: Quantize) -> str:
    """Judges ``quantize(output, codes, beta)``: outputs (M, D) and codes (K, D) -> z (M, D) and the loss (M,). eq. vq-loss

    z has the values of the nearest codes, and hands its gradient to the output alone, eq. straight-through. The loss of an output is its
    squared distance to its code, which moves the code, plus beta times the same, which moves the output. Known mistakes are in
    `VQ_MISTAKES`.
    """
    generator, cases = torch.Generator().manual_seed(3), []
    for m, k, d, beta in ((7, 5, 3, 0.25), (11, 4, 2, 0.6)):
        scale = torch.tensor([0.4, 3.0]).repeat(k)[:k, None]  # short codes and long ones, which an inner product takes for near
        codes = scale * torch.randn(k, d, generator=generator)
        cases.append((torch.randn(m, d, generator=generator), codes, beta))
    found = []
    for output, codes, beta in cases:
        what = f"quantize(output {tuple(output.shape)}, codes {tuple(codes.shape)}, {beta})"
        results: Any = attempt(what, quantize, output.clone(), codes.clone(), beta)
        if not isinstance(results, tuple) or len(results) != 2 or not all(isinstance(part, Tensor) for part in results):
            fail(
                f"{what} returns {describe(results)}, expected two tensors: z and the loss",
                None if results is not None else "no-return",
            )
        for part, value, shape in zip(PARTS, results, (output.shape, output.shape[:1]), strict=False):
            if value.shape != shape:
                fail(f"{what}: {part} has shape {tuple(value.shape)}, expected {tuple(shape)}", "shape")
        found.append(attempt(f"the gradient of {what}", evidence, quantize, output, codes, beta))
        if not all(map(torch.equal, found[-1], attempt(what, evidence, quantize, output, codes, beta, seed=1))):
            fail(f"{what} gives different results for the same arguments: it draws noise of its own", "own-noise")

    def matches(fn: Quantize) -> bool:
        return all(all(map(same, got, evidence(fn, *case))) for got, case in zip(found, cases, strict=True))

    if not matches(quantize_recipe):
        if known := recognized(VQ_MISTAKES, matches):
            fail_by_name("quantize", VQ_MISTAKES, known[0])
        for got, case in zip(found, cases, strict=True):
            for part, value, expected in zip(PARTS, got, evidence(quantize_recipe, *case), strict=True):
                check_same(f"quantize: {part}", value, expected)
    return f"quantize is right in {len(cases)} cases, and so are its gradients"
