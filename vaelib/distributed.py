"""Several processes, one training run: `torchrun --nproc-per-node N -m vaelib train ...`.

Each process holds all images and the whole model, and computes its share of every global batch. All draw the same noise for the
global batch and keep their share of it, so that N processes follow the trajectory of one, up to the order of additions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The processes of a run: this one's number (`rank`) and how many there are (`size`)."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` images of a global batch are this process's: every `size`-th from `rank` on, at least one."""
        return slice(self.rank if self.rank < count else 0, None, self.size)

    def weight(self, count: int) -> float:
        """Factor on the mean loss over the share: gradients averaged over processes are then those of the global batch."""
        return len(range(self.rank, count, self.size)) * self.size / count

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each of them; in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def join(device: torch.device) -> Group:
    """The group that `torchrun` started this process in, or a group of one.

    On CUDA the processes talk through NCCL, each on the GPU of its local rank, unless `device` names one; elsewhere through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
        return Group()
    if not dist.is_initialized():
        if device.type == "cuda":
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local % torch.cuda.device_count() if device.index is None else device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Group(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Take this process out of its group, if it is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
