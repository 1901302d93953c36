"""Where a training runs: on which device, and in how many processes, `torchrun --nproc-per-node N -m vaelib train ...`.

Each process holds all images and the whole model, and computes its share of every global batch. All draw the same noise for the
global batch and keep their share of it, so that N processes follow the trajectory of one, up to the order of additions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vaelib._validation import help_at
from vaelib.data import ImageSet
from vaelib.objectives import ElboTerms


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """``"auto"`` -> CUDA, else MPS, else CPU; any other name is checked.

    Raises:
        ValueError: If the device is unknown or not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if str(device) == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'mps'") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}.get(chosen.type)
    if count is None:
        raise ValueError(f"device: got {device!r}, expected 'auto', 'cpu', 'cuda' or 'mps'")
    if (chosen.index or 0) >= count:
        raise ValueError(
            f"device: got {device!r}, but torch finds no such device here; expected 'auto' or 'cpu'{help_at('no-device')}"
        )
    return chosen


def fits(device: torch.device, images: ImageSet, valid: ImageSet | None) -> bool:
    """Whether the sets may stay on the device: anywhere but on CUDA, and there if they take at most half of the memory that is free."""
    if device.type != "cuda":
        return True
    taken = sum(part.nbytes for each in (images, valid) if each is not None for part in (each.pixels, each.labels))
    try:
        return 2 * taken <= torch.cuda.mem_get_info(device)[0]
    except RuntimeError:  # a device that does not say
        return True


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


def summed(trace: Tensor, group: Group) -> Tensor:
    """The trace with sums and counts added up over the processes; norm and "skipped" are the same in all of them."""
    shares = group.sum(trace[:, [0, 1, 4, 5, 6]])
    return torch.cat([shares[:, :2], trace[:, 2:4], shares[:, 2:]], dim=1)


def with_global_kl(terms: ElboTerms, weight: float, group: Group) -> ElboTerms:
    """The share's terms with `kl_per_unit` shifted so that its mean is the global batch's: free bits then bite as in one process."""
    assert terms.kl_per_unit is not None
    local = terms.kl_per_unit.mean(0)
    total = group.sum(local.detach() * weight) / group.size
    return terms._replace(kl_per_unit=terms.kl_per_unit + (total - local.detach()))
