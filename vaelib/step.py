"""One step of training, from the indices of its images to the optimizer, as a function that reads nothing back from the device.

What changes from step to step (which images, learning rate, beta, weight of the moving average, row of the trace) lies in tensors on the
device, which are filled once an epoch. So a step can be recorded in a CUDA graph and costs the host one launch; on a CPU the same lines
run without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vaelib.config import TrainConfig, kl_weight, learning_rate_factor, make_optimizer
from vaelib.data import ImageSet, minibatches
from vaelib.distributed import Group, with_global_kl
from vaelib.graphs import Replayed, obstacle
from vaelib.objectives import ElboTerms, loss
from vaelib.vae import VAE

TRACE = ("log_likelihood", "kl", "norm", "skipped", "count", "loss", "penalty")  # of a step; see `TrainStep.loss_and_sums`


def epoch_order(seed: int, epoch: int) -> torch.Generator:
    """The generator that shuffles an epoch, a function of seed and epoch alone: on resume the order needs no memory."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def skips_inside(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer divides the gradients and leaves out a step inside its kernel, so that nobody waits for their norm."""
    momentum = any(group.get("momentum") for group in optimizer.param_groups)  # fused SGD would skip, but leave its buffer unset
    return getattr(optimizer, "_step_supports_amp_scaling", False) and not momentum


def clipped_step(optimizer: torch.optim.Optimizer, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """One step of the optimizer with the gradient cut to `clip_norm`; no step where its norm is not finite or above `skip_norm`.

    Returns:
        The gradient's norm before clipping, and 1 where the step was left out, else 0: scalars on the device.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    skip = ~(norm <= (config.skip_norm or torch.finfo(norm.dtype).max))
    scale = None if config.clip_norm is None else (norm / config.clip_norm).clamp(min=1)
    if skips_inside(optimizer):
        optimizer.grad_scale, optimizer.found_inf = scale, skip.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip:  # the others must wait for the answer
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        optimizer.step()
    return norm, skip


class TrainStep:
    """A step of `fit`, and the tensors that it works on.

    Attributes:
        forward: the model, or what stands before it: several processes, a compiled graph.
        resident: whether the images are on the device.
        averages: of each parameter, where there is an `ema_decay`.
        order: (N,), the images of the epoch in the order of their turns.
        place: (1,), how many steps of the epoch are done.
        plan: (steps per epoch, 3): factor of the learning rate, beta, and the weight of the new in the averages.
        trace: (steps per epoch, len(TRACE)): what each step of the epoch gave.
        obstacle: in words, why the steps are not replayed from a CUDA graph; None where they are, or may be.
    """

    def __init__(
        self, model: VAE, images: ImageSet, config: TrainConfig, group: Group, device: torch.device, resident: bool
    ) -> None:
        self.model, self.images, self.config = model, images, config
        self.group, self.device, self.resident = group, device, resident
        self.forward: Callable[..., ElboTerms] = model
        if group.size > 1:  # this also makes all processes start from the first one's weights
            devices = [device.index] if device.type == "cuda" else None
            self.forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices)
        if config.compile:
            self.forward = torch.compile(self.forward, mode=None if config.compile is True else config.compile)

        self.per_epoch = math.ceil(len(images) / config.batch_size)
        self.rate_factor = learning_rate_factor(config, config.epochs * self.per_epoch)
        self.beta = kl_weight(config, self.per_epoch)
        self.optimizer = make_optimizer(model, config)
        self.peaks = [options["lr"] for options in self.optimizer.param_groups]
        self.noise = torch.Generator(device).manual_seed(config.seed)
        self.averages = None if config.ema_decay is None else [parameter.detach().clone() for parameter in model.parameters()]

        self.order = torch.zeros(len(images), dtype=torch.int64, device=device)
        self.within = torch.arange(config.batch_size, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.plan = torch.zeros(self.per_epoch, 3, dtype=exact, device=device)
        self.trace = torch.zeros(self.per_epoch, len(TRACE), device=device)
        self.sized: dict[int, Callable[[], None]] = {}
        self.hold_rates()
        self.obstacle = obstacle(config, device, group, resident, self.optimizer)

    def hold_rates(self) -> None:
        """Keep the learning rates in tensors, where the optimizer can read them there; again after its state was loaded."""
        for options in self.optimizer.param_groups:
            if skips_inside(self.optimizer) and "capturable" in options:
                options["capturable"] = self.device.type == "cuda"
                kind = torch.float32 if options["capturable"] else torch.float64  # as its kernels read them
                options["lr"] = torch.tensor(float(options["lr"]), dtype=kind, device=self.device)

    def steps_to_come(self, epoch: int, done: int) -> Iterator[Callable[[], None]]:
        """The steps of an epoch as functions to call in turn, without the first `done`."""
        first = (epoch - 1) * self.per_epoch
        weight = [1 - min(self.config.ema_decay or 0.0, step / (9 + step)) for step in range(first + 1, first + 1 + self.per_epoch)]
        plan = [(self.rate_factor(first + i), self.beta(first + i), weight[i]) for i in range(self.per_epoch)]
        self.plan.copy_(torch.tensor(plan, dtype=self.plan.dtype))
        self.place.fill_(done)
        size = self.config.batch_size
        if self.resident:
            self.order.copy_(torch.randperm(len(self.order), generator=epoch_order(self.config.seed, epoch), device="cpu"))
            for start in range(done * size, len(self.order), size):
                yield self.of_size(min(size, len(self.order) - start))
            return
        fields = ("pixels", "labels") if self.images.labelled else ("pixels",)
        parts = [minibatches(self.images, size, epoch_order(self.config.seed, epoch), done, field, self.device) for field in fields]
        for part in zip(*parts, strict=True):
            yield partial(self.on, *part)

    def of_size(self, size: int) -> Callable[[], None]:
        """The step on the next `size` images: plain, or as a graph that is recorded when it is first due."""
        if size not in self.sized:
            plain = partial(self.on_next, size)
            self.sized[size] = plain if self.obstacle else Replayed(plain, self)
        step = self.sized[size]
        if isinstance(step, Replayed) and step.obstacle:
            self.obstacle, self.sized = step.obstacle, {}
            return self.of_size(size)
        return step

    def on_next(self, size: int) -> None:
        """A step on the next `size` images of the epoch."""
        rows = self.order.index_select(0, self.place * self.config.batch_size + self.within[:size])
        labels = self.images.labels.index_select(0, rows) if self.images.labelled else None
        self.on(self.images.pixels.index_select(0, rows), labels)

    def on(self, pixels: Tensor, labels: Tensor | None = None) -> None:
        """A step on one global batch."""
        factor, beta, weight = self.plan.index_select(0, self.place)[0].unbind()
        for options, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(options["lr"], Tensor):
                options["lr"].copy_(peak * factor)
            else:
                options["lr"] = peak * factor.item()
        self.optimizer.zero_grad()
        value, sums = self.loss_and_sums(pixels, labels, beta.float())
        value.backward()
        norm, skipped = clipped_step(self.optimizer, self.config)
        self.trace.index_copy_(0, self.place, torch.stack([*sums[:2], norm, skipped, *sums[2:]])[None])
        if self.averages is not None:
            self.average(weight)
        self.place += 1

    def loss_and_sums(self, pixels: Tensor, labels: Tensor | None, beta: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss whose gradient a step follows, and what the trace has of it.

        Returns:
            The mean loss over this process's share of the batch, weighted so that the processes' mean is that of the batch; and sums over
            the share: log-likelihood, KL, number of images, loss, penalty.
        """
        config, group = self.config, self.group
        if config.flip:
            coin = torch.rand(len(pixels), 1, 1, 1, generator=self.noise, device=self.device) < 0.5
            pixels = torch.where(coin, pixels.flip(3), pixels)
        x = self.model.likelihood.observe(pixels, self.noise)
        eps = torch.randn(config.num_samples, len(x), self.model.latent_dim, generator=self.noise, device=self.device)
        weight = group.weight(len(x))
        if group.size > 1:
            share = group.share(len(x))
            x, eps, labels = x[share], eps[:, share], None if labels is None else labels[share]
        if config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with self.precision():
            terms = self.forward(x, eps, config.objective, labels)
        objective = with_global_kl(terms, weight, group) if config.free_bits and group.size > 1 else terms
        value = loss(objective, beta, config.free_bits)

        count = len(x) * float(weight > 0)  # a share that only fills a place counts nothing
        penalty = torch.zeros_like(value) if terms.penalty is None else terms.penalty.mean()
        sums = [float(count > 0) * term.detach().sum() for term in (terms.log_likelihood, terms.kl)]
        sums += [torch.full_like(value.detach(), count), count * value.detach(), count * penalty.detach()]
        return weight * value, sums

    def precision(self) -> Any:
        """The networks' arithmetic; no copies of the weights are kept from call to call, which a graph would not see change."""
        bf16 = self.config.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=self.device.type != "cuda") if bf16 else nullcontext()

    @torch.no_grad()
    def average(self, weight: Tensor) -> None:
        """Move the averages towards the weights; early ones move faster.

        (`torch.optim.swa_utils.AveragedModel` copies the weights at its first step and keeps a second model; here the average starts
        where training does, and `Run.judged` lends it to the one model.)
        """
        averages: list[Tensor] = self.averages or []
        change = list(torch._foreach_sub(list(self.model.parameters()), averages))
        torch._foreach_mul_(change, weight.float())
        torch._foreach_add_(averages, change)
