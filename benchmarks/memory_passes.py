"""Bytes that a training step of the hierarchical VAE reads and writes, by operator: `python benchmarks/memory_passes.py`.

A GPU spends most of this step on passes over memory, so that bytes per image say how fast it can be. Each operator is taken to read its
arguments and to write its results once; what a library does inside one, and a bias that CUDA adds in a pass of its own, are not seen.
Two batches are measured: what grows with the batch belongs to the image, the rest (casts of weights) to the step.
"""

import argparse
import collections
import json
import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vaelib

MOVES_NOTHING = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "new_empty_strided",
    "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
OPTIONS = {"likelihood": {"name": "discretized_logistic_mixture", "num_mixtures": 5}}


def size(value):
    """Bytes of a tensor, a value that is only repeated counted once; 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    return value.element_size() * math.prod(length for length, stride in zip(value.shape, value.stride(), strict=True) if stride)


class Passes(TorchDispatchMode):
    """Counts the bytes of the operators called inside the block, by name."""

    def __init__(self):
        super().__init__()
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (name := func.overloadpacket.__name__) not in MOVES_NOTHING:
            self.bytes[name] += sum(map(size, tree_leaves((args, kwargs, result))))
        return result


def step(model, batch, precision):
    """Bytes by operator, forward and backward, of a step without the optimizer."""
    pixels = torch.randint(0, 256, (batch, *model.image_shape), dtype=torch.uint8)
    x = model.likelihood.observe(pixels).contiguous(memory_format=torch.channels_last)
    eps = torch.randn(1, batch, model.latent_dim)
    model.zero_grad()
    with Passes() as forward, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        terms = model(x, eps)
        loss = vaelib.objectives.loss(terms)
    with Passes() as backward:
        loss.backward()
    return forward.bytes, backward.bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-options", type=json.loads, default={}, help="of `vaelib.hierarchical_vae`, as JSON")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "float32"))
    parser.add_argument("--batch", type=int, default=2, help="the smaller batch; the other is twice as large")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = vaelib.hierarchical_vae(**OPTIONS | arguments.model_options).to(memory_format=torch.channels_last)
    small, large = (step(model, batch, arguments.precision) for batch in (arguments.batch, 2 * arguments.batch))
    report = {"parameters": sum(p.numel() for p in model.parameters()), "megabytes_per_image": 0.0}
    for name, few, many in zip(("forward", "backward"), small, large, strict=True):
        report[name] = {key: (many[key] - few[key]) / arguments.batch / 1e6 for key, _ in many.most_common()}
        report["megabytes_per_image"] += sum(report[name].values())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
