"""What only CUDA has: a function without arguments as one launch, recorded in a graph and replayed; and TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vaelib.config import TrainConfig
from vaelib.distributed import Group

WARM_UP = 3  # plain calls before the recording: libraries set up what they need, torch.compile compiles
READING = {  # operators that hand numbers, or a size that depends on them, to the host
    "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "nonzero_static", "unique_consecutive", "unique_dim",
    "_unique", "_unique2",
}  # fmt: skip


def obstacle(
    config: TrainConfig, device: torch.device, group: Group, resident: bool, optimizer: torch.optim.Optimizer
) -> str | None:
    """In words, what is known before the first step to stand against a graph of the steps of `fit`; None where nothing is."""
    if not config.cuda_graph:
        return "cuda_graph is False"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if group.size > 1:
        return "several processes share each step"
    if not resident:
        return "the images stay on the host"
    if isinstance(config.compile, str) and config.compile not in ("default", "max-autotune-no-cudagraphs"):
        return f"compile={config.compile!r} records graphs of its own"
    if not all(isinstance(options["lr"], Tensor) for options in optimizer.param_groups):
        return f"the optimizer {type(optimizer).__name__} waits for the gradient's norm"
    return None


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Whether CUDA's products and convolutions of float32 may round their factors to TF32, inside the block; elsewhere nothing changes."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn) if device.type == "cuda" else ()
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = tf32
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


class Watch(TorchDispatchMode):
    """Notes the operators called inside the block that make the host wait for the device, which no graph can hold.

    Attributes:
        found: their names, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        devices = {each.device.type for each in (result, *args) if isinstance(each, Tensor)}
        crosses = name in ("_to_copy", "copy_") and len(devices) > 1
        masks = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if name in READING or crosses or masks:
            self.found.append(name)
        return result


class Replayed:
    """A function without arguments or result, as one launch.

    The first `WARM_UP` calls are plain ones, on a stream of their own, and one of them is watched; the next one records the graph;
    it and all further calls replay it. A function that reads numbers back is called plainly for good.

    Attributes:
        owner: what the function draws with, by a generator that it has as `noise`.
        obstacle: in words, why there is no graph; None where there is one, or where the recording is still to come.
    """

    def __init__(self, function: Callable[[], None], owner: Any) -> None:
        self.function, self.owner = function, owner
        self.calls = 0
        self.graph: Any = None
        self.obstacle: str | None = None

    def __call__(self) -> None:
        self.calls += 1
        if self.graph is None and self.obstacle is None and self.calls > WARM_UP:
            self.record()
        if self.graph is not None:
            self.graph.replay()
        elif self.calls > WARM_UP:
            self.function()
        else:
            self.warm_up()

    def warm_up(self) -> None:
        """A plain call on a side stream, as a recording needs it before."""
        device = self.owner.noise.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            if self.calls < WARM_UP:
                self.function()
            else:
                with Watch() as watch:
                    self.function()
                if watch.found:
                    self.obstacle = f"{watch.found[0]} makes the host wait for the device"
        torch.cuda.current_stream(device).wait_stream(stream)

    def record(self) -> None:
        """Record the function; nothing of it is computed yet."""
        graph, state = torch.cuda.CUDAGraph(), self.owner.noise.get_state()
        try:
            graph.register_generator_state(self.owner.noise)
            with torch.cuda.graph(graph):
                self.function()
        except RuntimeError as error:
            self.owner.noise = torch.Generator(self.owner.noise.device)  # the old one stays in the broken recording
            self.owner.noise.set_state(state)
            self.obstacle = str(error).split("\n")[0]
        else:
            self.graph = graph
