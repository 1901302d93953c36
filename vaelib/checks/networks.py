"""A judge of encoders and decoders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from vaelib._validation import check_image_shape, check_int, describe
from vaelib.checks.verdicts import attempt, fail, verdict
from vaelib.networks import ConvDecoder, MLPDecoder

SEEDS = 16  # of the copies with other weights
ENDS = {  # of a decoder whose outputs stay in a range: name -> sentence
    "softmax": "the pixels of an image add up to 1, as after a softmax",
    "sigmoid": "outputs stay between 0 and 1, as after a sigmoid",
    "relu": "outputs are never negative, as after a ReLU, softplus or exp",
    "never-positive": "outputs are never positive, as after a log-sigmoid, a log-softmax or minus a ReLU",
    "tanh": "outputs stay between -1 and 1, as after a tanh",
    "bounded": "outputs stay on one side of a small number, or near 0, as after an ELU, a clamp or a multiple of tanh",
}


def scrambled(network: Any, seed: int, scale: float = 1.0) -> Any:
    """A copy with random signs of the weights, moved a little: as far from its initialization as training may take it."""
    network = deepcopy(network)
    torch.default_generator.manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.01 * torch.randn_like(weight)).mul_(torch.randint_like(weight, 2) * 2 - 1).mul_(scale)
    return network


def outputs(what: str, network: Any, value: Tensor, shape: tuple[int, ...], names: Sequence[str], seed: int = 0) -> list[Tensor]:
    """What a network gives: one tensor for each name, of that shape (-1: anything), finite; with its graph."""
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
    return result


def hides_layers(network: Any) -> bool:
    """Whether a network has weights that `parameters` does not give: none at all, or layers in a plain list or dict."""
    if not isinstance(network, nn.Module) or not any(True for _ in network.parameters()):
        return True
    held = [value for module in network.modules() for key, value in vars(module).items() if key != "_modules"]
    plain = [list(value.values()) if isinstance(value, dict) else value for value in held if isinstance(value, (list, tuple, dict))]
    return any(isinstance(item, nn.Module) for value in plain for item in value)


@verdict
def check_encoder_decoder(
    encoder: nn.Module, decoder: nn.Module, image_shape: Sequence[int], latent_dim: int, params_per_value: int | None = None
) -> str:
    """Judges encoder(x) -> (mean, log_var), each (N, L), and decoder(z) -> params (N, P*C, H, W), for x (N, C, H, W) and z (N, L).

    P is `params_per_value`: 1 where it is not given, but any number for a decoder of `vaelib.networks`, which was told. Params are
    real numbers of any size, so nothing may bound them at the decoder's end. Works on copies; the student's networks stay as they are.

    Mistakes: "bottleneck", "no-log-var", "new-layers", "unregistered", "same-head", "ignores-input", "ignores-latent",
    "ignores-pixels", "positive-mean", "positive-log-var", "negative-mean", "negative-log-var", "bounded-log-var", "batch-dependence",
    "detached", "param-channels", and for what ends the decoder "softmax", "sigmoid", "relu", "never-positive", "tanh", "bounded".

    Raises:
        ValueError: If image_shape, latent_dim or params_per_value is no shape or size.
    """
    channels, *size = check_image_shape("image_shape", image_shape)
    if params_per_value is not None:
        check_int("params_per_value", params_per_value)
    if check_int("latent_dim", latent_dim) >= channels * math.prod(size):
        fail(f"the code has {latent_dim} numbers, the image {channels * math.prod(size)}: that is no bottleneck", "bottleneck")
    check_network("encoder", encoder, torch.rand(8, channels, *size), (8, latent_dim), ("mean", "log_var"))
    params = check_network("decoder", decoder, torch.randn(8, latent_dim), (8, -1, *size), ("params",))
    told = params_per_value is None and isinstance(decoder, (MLPDecoder, ConvDecoder))
    expected = channels if told else channels * (params_per_value or 1)
    if params.shape[1] % channels or (params.shape[1] != expected and not told):
        why = f"{params_per_value or 1} for each of the image's {channels}"
        fail(
            f"decoder: got {params.shape[1]} channels, expected {'a multiple of ' if told else ''}{expected}, {why}",
            "param-channels",
        )
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
        fail(
            f"the {part} has layers that the optimizer cannot see: assign them in __init__, lists as nn.ModuleList", "unregistered"
        )
    outputs(f"{part} of a batch of one", fresh(False), value[:1], (1, *shape[1:]), names)
    copies = [scrambled(fresh(False), seed) for seed in range(SEEDS)]
    tries = [[tensor.detach() for tensor in outputs(what, copy, value, shape, names)] for copy in copies]
    for name, found in zip(names, zip(*tries, strict=True), strict=True):
        if all(torch.allclose(tensor, tensor[:1].expand_as(tensor), rtol=0, atol=1e-7) for tensor in found):
            alone = [copy(value[:1]) for copy in copies]
            alone = [one if isinstance(one, Tensor) else one[names.index(name)] for one in alone]
            if not all(torch.allclose(one, tensor[:1], rtol=1e-4, atol=1e-5) for one, tensor in zip(alone, found, strict=True)):
                why = "a mean over the batch makes it so"
                fail(f"{what}: {name} is the same for all inputs of a batch, another in another batch: {why}", "batch-dependence")
            fail(f"{what}: {name} is the same for all inputs", "ignores-input")
    large = large_outputs(fresh(False), value)
    for name, small, ends in zip(names, zip(*tries, strict=True), zip(*large, strict=True), strict=True):
        low, high = (
            float(fn([fn_of(t) for t in (*small, *ends) if t.isfinite().all()]))
            for fn, fn_of in ((min, torch.amin), (max, torch.amax))
        )
        if part == "encoder":
            check_range_of_code(what, name, low, high)
        else:
            check_range_of_params(what, low, high, small)
    if part == "encoder" and all(torch.equal(*pair) or torch.equal(pair[0], -pair[1]) for pair in tries):
        fail(f"{what}: mean and log_var are the same numbers: each needs weights of its own", "same-head")
    check_gradients(what, part, copies[:4], value, names)
    batches = value, torch.cat([value[:4], 3 * value[4:] - 1])
    alone, mixed = (outputs(what, fresh(True), batch, shape, names) for batch in batches)
    if not all(torch.allclose(a[:4], b[:4], rtol=1e-4, atol=1e-5) for a, b in zip(alone, mixed, strict=True)):
        why = "batch normalization, or another mean over the batch"
        fail(f"{what}: what an image gives depends on the rest of its batch, and so does its ELBO: {why}", "batch-dependence")
    return first[0]


def large_outputs(network: Any, value: Tensor) -> list[list[Tensor]]:
    """Outputs with weights and inputs many times as large, for a range that nothing but the network's end can bound."""
    found = []
    for seed, scale in enumerate((3.0, 3.0, 10.0, 10.0, 30.0, 30.0)):
        with torch.no_grad():
            result = scrambled(network, seed, scale)(scale * value)
        found.append([result] if isinstance(result, Tensor) else list(result))
    return found


def check_range_of_code(what: str, name: str, low: float, high: float) -> None:
    why = "a ReLU, sigmoid, softplus or exp at its end takes that away"
    short = name.replace("_", "-")
    if low >= 0:
        fail(f"{what}: {name} is never negative, but must be able to be: {why}", f"positive-{short}")
    if high <= 0:
        fail(f"{what}: {name} is never positive, but must be able to be: {why}", f"negative-{short}")
    if name == "log_var" and max(-low, high) <= 1:
        fail(
            f"{what}: log_var stays between -1 and 1, but must be able to be any number: a tanh at its end takes that away",
            "bounded-log-var",
        )


def check_range_of_params(what: str, low: float, high: float, found: Sequence[Tensor]) -> None:
    """Fails where the outputs, with weights of any size, stay in a range that a decoder's last activation is known for."""
    flat = [tensor.flatten(1) for tensor in found]
    groups = [
        *(tensor.sum(1) for tensor in flat),
        *(tensor.sum(1) for tensor in found),
        *(t.sum(2) for t in found),
        *(t.sum(3) for t in found),
    ]
    sums = [groups[start : start + len(found)] for start in range(0, len(groups), len(found))]
    if low >= 0 and high <= 1 and any(all(torch.allclose(t, torch.ones_like(t), atol=1e-4) for t in kind) for kind in sums):
        end = "softmax"
    elif low >= 0:
        end = "sigmoid" if high <= 1 else "relu"
    elif high <= 0:
        end = "never-positive"
    elif low >= -1 and high <= 1:
        end = "tanh"
    elif low >= -2 or high <= 2 or max(-low, high) <= 6:
        end = "bounded"
    else:
        return
    fail(
        f"{what}: {ENDS[end]}, also with weights many times as large; params are real numbers of any size: end with a linear layer",
        end,
    )


def check_gradients(what: str, part: str, copies: Sequence[Any], value: Tensor, names: Sequence[str]) -> None:
    """Fails unless each output has a gradient for all weights that it depends on, and params one for each latent."""
    for place, name in enumerate(names):
        reached: dict[str, bool] = {}
        seen = torch.zeros(value.shape[1:], dtype=torch.bool)
        for copy in copies:
            leaf = value.clone().requires_grad_()
            result = copy(leaf)
            output = result if isinstance(result, Tensor) else result[place]
            weights = {key: weight for key, weight in copy.named_parameters() if weight.requires_grad}
            if not output.requires_grad:
                fail(f"{what}: no gradient flows back from {name}: detach, item, numpy or no_grad cuts it off", "detached")
            total = (output * torch.randn_like(output)).sum()
            gradients = torch.autograd.grad(total, [leaf, *weights.values()], allow_unused=True)
            for key, gradient in zip(weights, gradients[1:], strict=True):
                reached[key] = reached.get(key, False) or (gradient is not None and bool(gradient.any()))
            seen |= gradients[0] is not None and (gradients[0] != 0).any(0)
        for key in (key for key, found in reached.items() if not found):
            if depends_on(copies[0], key, value, place):
                fail(
                    f"{what}: {name} depends on {key}, but its gradient does not reach it: detach or no_grad cuts it off",
                    "detached",
                )
        if part == "encoder" and seen.float().mean() <= 0.5:
            fail(f"{what}: {name} depends on {seen.sum().item()} of the {seen.numel()} numbers of an image only", "ignores-pixels")
        if part == "decoder" and not seen.all():
            unseen = seen.logical_not().nonzero().flatten().tolist()
            with torch.no_grad():
                other = value.clone()
                other[:, unseen] += 1
                same = all(torch.equal(copy(value), copy(other)) for copy in copies)
            if same:
                fail(f"{what}: params do not depend on latent {unseen[0]}", "ignores-latent")
            fail(f"{what}: params depend on z, but no gradient flows back to it: the encoder would learn nothing", "detached")


def depends_on(network: Any, key: str, value: Tensor, place: int) -> bool:
    """Whether an output changes with one of the weights."""
    with torch.no_grad():
        before, other = network(value), deepcopy(network)
        other.get_parameter(key).add_(torch.randn_like(other.get_parameter(key)))
        after = other(value)
    pair = (before, after) if isinstance(before, Tensor) else (before[place], after[place])
    return not torch.allclose(*pair)
