"""The trainer: one function, `fit`, a short loop over a `Run`, which takes the steps, and a `Store`, which writes the files.

A step leaves the device alone: what the history needs is kept there, step by step, and read once at the epoch's end.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import as_path, describe
from vaelib.checkpoints import FILE, held_interrupts, identity_of, read_checkpoint, tensorboard_writer, write_checkpoint
from vaelib.config import OPTIMIZERS as OPTIMIZERS
from vaelib.config import TrainConfig, kl_weight, learning_rate_factor, make_optimizer
from vaelib.data import ImageSet, as_image_set, minibatches
from vaelib.distributed import Group, choose_device, fits, join, summed, with_global_kl
from vaelib.heldout import evaluating, heldout_elbo, labels_for
from vaelib.objectives import ElboTerms, free_bits_kl, loss
from vaelib.storage import BROKEN, only_writer, write_text
from vaelib.vae import VAE

HISTORY = "history.jsonl"
TRACE = ("log_likelihood", "kl", "norm", "skipped", "count", "loss", "penalty")  # of a step; see `Run.loss_and_sums`


class History(list[dict[str, float]]):
    """One plain dict per finished epoch; ``history["valid_elbo"]`` is that column, ``history[-1]`` the last epoch.

    Keys: ``epoch`` (from 1), ``train_elbo``, ``train_log_likelihood``, ``train_kl`` (means over the epoch's images while the
    weights moved, nats), ``train_objective`` (the same of what was maximized: minus the loss), ``train_penalty`` (of its further term,
    where there is one), ``valid_elbo``, ``valid_log_likelihood``, ``valid_kl`` (where a validation set was given), ``gradient_norm`` (mean
    over the steps that were taken, before clipping; None where there was none), ``skipped_steps``, ``learning_rate`` and ``beta``
    (at the epoch's last step), ``seconds``.

    Attributes:
        stopped: ``"finished"``, ``"early stop"`` or ``"interrupted"``.
        best_epoch: the epoch with the best validation ELBO, None without a validation set.
        diverged: in words, why the weights that are kept should not be used; None where training did not diverge. It did if, after
            the epoch whose weights are kept, the ELBO (held out, where there is a validation set) was below that of the run's first
            step, and either at least half of that epoch's steps were left out, or it was below it by more than its own size and
            one nat per pixel value.
        device: what it ran on.
        steps: how many steps this call of `fit` took; fewer than the whole run's after a resume.
    """

    stopped = "finished"
    best_epoch: int | None = None
    diverged: str | None = None
    device = "cpu"
    steps = 0

    def __getitem__(self, key: Any) -> Any:
        return [epoch[key] for epoch in self] if isinstance(key, str) else super().__getitem__(key)


def epoch_order(seed: int, epoch: int) -> torch.Generator:
    """The generator that shuffles an epoch, a function of seed and epoch alone: on resume the order needs no memory."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


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
    momentum = any(group.get("momentum") for group in optimizer.param_groups)  # fused SGD would skip, but leave its buffer unset
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not momentum:  # it divides and skips inside its kernel
        optimizer.grad_scale, optimizer.found_inf = scale, skip.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip:  # the others must wait for the answer
        if scale is not None:
            torch._foreach_div_(gradients, scale)
        optimizer.step()
    return norm, skip


def copy_of_weights(model: VAE) -> dict[str, Tensor]:
    """The model's state, apart from it."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Run:
    """A training under way: what `fit` needs at a step and at an epoch's end. What changes, `state` holds and `restore` puts back.

    Attributes:
        forward: the model, or what stands before it: several processes, a compiled graph.
        averages: of each parameter, where there is an `ema_decay`.
        trace: (steps per epoch, len(TRACE)): what each step of this epoch gave.
        step: steps done, over all epochs.
        elapsed: seconds of this epoch so far.
        first_elbo: of the first step; minus infinity, below which nothing is, where it is not known.
    """

    def __init__(self, model: VAE, images: ImageSet, valid: ImageSet | None, config: TrainConfig, group: Group) -> None:
        device = choose_device(config.device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        model.to(device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model, self.config, self.group, self.device = model, config, group, device
        self.resident = fits(device, images, valid)
        if self.resident:
            images, valid = images.to(device), None if valid is None else valid.to(device)
        self.images, self.valid = images, valid
        self.forward: Callable[..., ElboTerms] = model
        if group.size > 1:  # this also makes all processes start from the first one's weights
            devices = [device.index] if device.type == "cuda" else None
            self.forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices)
        if config.compile:
            self.forward = torch.compile(self.forward, mode=None if config.compile is True else config.compile)

        self.steps_per_epoch = math.ceil(len(images) / config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = make_optimizer(model, config)
        self.peaks = [options["lr"] for options in self.optimizer.param_groups]
        self.rate_factor = learning_rate_factor(config, self.total_steps)
        self.beta = kl_weight(config, self.steps_per_epoch)
        self.noise = torch.Generator(device).manual_seed(config.seed)
        self.averages = None if config.ema_decay is None else [parameter.detach().clone() for parameter in model.parameters()]
        self.trace = torch.zeros(self.steps_per_epoch, len(TRACE), device=device)
        self.history = History()
        self.history.device = str(device)
        self.step, self.elapsed = 0, 0.0
        self.first_elbo = self.best_elbo = -math.inf
        self.best_weights: dict[str, Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """All that changes, as plain data and tensors."""
        return {
            "weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "averages": self.averages,
            "noise": self.noise.get_state(), "device": self.device.type, "history": list(self.history),
            "best_epoch": self.history.best_epoch, "step": self.step, "trace": self.trace, "best_elbo": self.best_elbo,
            "best_weights": self.best_weights, "elapsed": self.elapsed, "first_elbo": self.first_elbo,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; ValueError where it lacks a part."""
        state = {"first_elbo": self.first_elbo} | state  # it came later than the first checkpoints
        if lacking := self.state().keys() - state.keys():
            raise ValueError(f"resume: got a checkpoint without {', '.join(sorted(lacking))}, expected a whole one")
        try:
            self.model.load_state_dict(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.averages is not None:
                self.averages = [value.to(self.device) for value in state["averages"]]
            if state["device"] == self.device.type:  # another kind of device has another kind of generator
                self.noise.set_state(state["noise"])
            self.history.extend(state["history"])
            self.history.best_epoch = state["best_epoch"]
            for name in ("step", "elapsed", "best_elbo", "best_weights", "first_elbo"):
                setattr(self, name, state[name])
            if self.group.leads:  # the others' part of an epoch that was cut off is not known, and not counted
                trace = state["trace"].to(self.device)
                if trace.shape[1] == 5:  # from before the loss and its penalty were kept: there it was minus the ELBO
                    trace = torch.cat([trace, trace[:, 1:2] - trace[:, :1], torch.zeros_like(trace[:, :1])], dim=1)
                self.trace = trace
        except BROKEN as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"resume: got a checkpoint whose parts do not fit this run ({reason})") from error

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """The model trains inside the block; after it, however it ends, it has its modes back, and the weights that are kept."""
        modes = {module: module.training for module in self.model.modules()}
        with self.judged():
            self.good_weights = copy_of_weights(self.model)
        first_step = self.step
        try:
            yield
        except KeyboardInterrupt:
            self.history.stopped = "interrupted"
        except FloatingPointError:
            self.best_weights = self.good_weights
            raise
        finally:
            self.history.steps = self.step - first_step
            for module, mode in modes.items():
                module.training = mode
            if self.best_weights is not None:
                self.model.load_state_dict(self.best_weights)
            elif self.averages is not None:
                torch._foreach_copy_([parameter.detach() for parameter in self.model.parameters()], self.averages)

    @contextmanager
    def judged(self) -> Iterator[None]:
        """The model has inside the block the weights that are validated, kept and saved: the averages, where there are some."""
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        own = [parameter.clone() for parameter in parameters] if self.averages else parameters
        torch._foreach_copy_(parameters, self.averages or own)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)

    def stops_early(self) -> bool:
        """Whether the held-out ELBO has not risen for `patience` epochs; the history then says so."""
        patience, best = self.config.patience, self.history.best_epoch
        if patience is None or best is None or len(self.history) - best < patience:
            return False
        self.history.stopped = "early stop"
        return True

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The epoch's global batches that are still to come, in an order that seed and epoch give: pixels, and labels if known."""
        self.started = time.perf_counter() - self.elapsed
        self.model.train()
        epoch = len(self.history) + 1
        done = self.step - (epoch - 1) * self.steps_per_epoch  # above 0 only on resume

        def slices(field: str) -> Iterator[Tensor]:
            order, device = epoch_order(self.config.seed, epoch), None if self.resident else self.device
            return minibatches(self.images, self.config.batch_size, order, done, field, device)

        if not self.images.labelled:
            return ((pixels, None) for pixels in slices("pixels"))
        return zip(slices("pixels"), slices("labels"), strict=True)

    def take_step(self, pixels: Tensor, labels: Tensor | None) -> None:
        """One step on one global batch; its row of the trace stays on the device."""
        for options, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            options["lr"] = peak * self.rate_factor(self.step)
        self.optimizer.zero_grad()
        value, sums = self.loss_and_sums(pixels, labels, self.beta(self.step))
        value.backward()
        norm, skipped = clipped_step(self.optimizer, self.config)
        self.trace[self.step % self.steps_per_epoch] = torch.stack([*sums[:2], norm, skipped, *sums[2:]])
        self.step += 1
        if self.averages is not None:
            self.average()
        self.elapsed = time.perf_counter() - self.started

    def loss_and_sums(self, pixels: Tensor, labels: Tensor | None, beta: float) -> tuple[Tensor, list[Tensor]]:
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
        with torch.autocast(self.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
            terms = self.forward(x, eps, config.objective, labels)
        objective = with_global_kl(terms, weight, group) if config.free_bits and group.size > 1 else terms
        value = loss(objective, beta, config.free_bits)

        count = len(x) * float(weight > 0)  # a share that only fills a place counts nothing
        penalty = torch.zeros_like(value) if terms.penalty is None else terms.penalty.mean()
        sums = [float(count > 0) * term.detach().sum() for term in (terms.log_likelihood, terms.kl)]
        sums += [torch.full_like(value.detach(), count), count * value.detach(), count * penalty.detach()]
        return weight * value, sums

    def average(self) -> None:
        """Move the averages towards the weights; early ones move faster.

        (`torch.optim.swa_utils.AveragedModel` copies the weights at its first step and keeps a second model; here the average starts
        where training does, and `judged` lends it to the one model.)
        """
        assert self.averages is not None
        with torch.no_grad():
            weight = 1 - min(self.config.ema_decay or 0.0, self.step / (9 + self.step))
            torch._foreach_lerp_(self.averages, list(self.model.parameters()), weight)

    def end_epoch(self) -> dict[str, Any]:
        """Judge the epoch, and add its record to the history.

        Raises:
            FloatingPointError: If a term of the loss, a weight or the held-out ELBO is no longer finite.
        """
        history, epoch = self.history, len(self.history) + 1
        rows = summed(self.trace, self.group).cpu()  # the epoch's only wait for the device, but for the validation
        with self.judged():
            check_finite(epoch, rows, self.model, history)
            if epoch == 1:
                self.first_elbo = ((rows[0, 0] - rows[0, 1]) / rows[0, 4]).item()
            record = training_means(epoch, rows)
            if self.valid is not None:
                record |= validate(self.model, self.valid, self.config.seed, self.group)
                if not math.isfinite(record["valid_elbo"]):
                    found = f"the held-out ELBO is {record['valid_elbo']}"
                    raise FloatingPointError(f"epoch {epoch}: {found}; try a lower learning_rate")
            self.good_weights = copy_of_weights(self.model)
        taken = rows[rows[:, 3] == 0]
        record |= {
            "gradient_norm": taken[:, 2].mean().item() if len(taken) else None,
            "skipped_steps": len(rows) - len(taken),
            "learning_rate": self.peaks[0] * self.rate_factor(self.step - 1),
            "beta": self.beta(self.step - 1),
            "seconds": time.perf_counter() - self.started,
        }
        history.append(record)
        self.elapsed = 0.0
        if self.valid is not None and record["valid_elbo"] > self.best_elbo:
            self.best_elbo, history.best_epoch = record["valid_elbo"], epoch
            if self.config.patience is not None:
                self.best_weights = self.good_weights
        return record

    def divergence(self) -> str | None:
        """Why the weights that are kept are no use, as `History` says it; None where they are."""
        history = self.history
        if not history:
            return None
        kept = history[-1] if self.best_weights is None or history.best_epoch is None else history[history.best_epoch - 1]
        elbo, skipped, steps = kept.get("valid_elbo", kept["train_elbo"]), kept["skipped_steps"], self.steps_per_epoch
        worst = self.first_elbo - abs(self.first_elbo) - math.prod(self.model.image_shape)
        if elbo < self.first_elbo and (2 * skipped >= steps > 1 or elbo < worst):
            left_out = f", with {skipped:.0f} of {steps} steps left out" if skipped else ""
            found = f"the ELBO is {elbo:.4g} nats per image{left_out}; at the first step it was {self.first_elbo:.4g}"
            return f"after epoch {kept['epoch']} {found}"
        return None


class Store:
    """The folder of a run, in which its first process alone writes: checkpoints, the history, logs for TensorBoard. None keeps nothing."""

    def __init__(self, folder: Path | None, run: Run, identity: dict[str, Any], resume: bool, tensorboard: bool) -> None:
        self.folder, self.leads, self.identity, self.config = folder, run.group.leads, identity, run.config
        kind = tensorboard_writer() if tensorboard else None
        found = folder is not None and resume and (folder / FILE).exists()
        run.group.wait()  # all have looked for a checkpoint before the first one writes it
        if folder is not None and found:
            run.restore(read_checkpoint(folder, identity))
            run.group.wait()
        else:
            self.write(run)  # whether it can be written is known before any work
        self.last_written = time.perf_counter()
        self.writer = None
        if kind is not None and folder is not None and self.leads:  # it forgets what came after the checkpoint
            self.writer = kind(folder / "tensorboard", purge_step=len(run.history) + 1)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, run: Run) -> None:
        """Write a checkpoint."""
        if self.folder is not None and self.leads:
            write_checkpoint(self.folder, self.identity | run.state())
        self.last_written = time.perf_counter()

    def after_step(self, run: Run) -> None:
        """A checkpoint every `checkpoint_minutes`, but never one of numbers that are not finite over the last good one."""
        minutes = self.config.checkpoint_minutes
        if minutes is None or time.perf_counter() - self.last_written < 60 * minutes:
            return
        self.last_written = time.perf_counter()
        row = (run.step - 1) % run.steps_per_epoch
        if run.trace[: row + 1, [0, 1, 5]].isfinite().all():
            self.write(run)

    def after_epoch(self, run: Run, record: dict[str, Any]) -> None:
        """The epoch's line of the history, its logs, and a checkpoint every `checkpoint_epochs`."""
        if self.folder is not None and self.leads:
            write_text(self.folder / HISTORY, "".join(json.dumps(line) + "\n" for line in run.history))
            if len(run.history) % self.config.checkpoint_epochs == 0:
                self.write(run)
        if self.writer is not None:
            for key, value in record.items():
                if value is not None:
                    self.writer.add_scalar(key, value, len(run.history))


def check_finite(epoch: int, trace: Tensor, model: VAE, history: History) -> None:
    """FloatingPointError that names epoch, step and what is no longer finite: a term of the loss, every gradient, or a weight.

    `trace` has a row for each step, as `train_step` gives it.
    """
    wrong, advice = [], "a lower learning_rate or a clip_norm"
    bad = ~trace[:, [0, 1, 5]].isfinite()
    if bad.any():
        step = int(bad.any(1).nonzero()[0])
        term = int(bad[step].nonzero()[0])
        found = f"{('log-likelihood', 'KL', 'loss')[term]} is {trace[step, (0, 1, 5)[term]].item():g}"
        wrong.append(f"step {step + 1}: the training {found}")
    elif (trace[:, 3] == 1).all() and (len(trace) > 1 or (history and history[-1]["skipped_steps"])):
        reason = "not finite"
        if trace[:, 2].isfinite().all():
            reason, advice = "above skip_norm", "a larger skip_norm"
        wrong.append(f"the gradient's norm was {reason} in all {len(trace)} steps")
    wrong += [f"the weight {name} is not finite" for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if wrong:
        raise FloatingPointError(f"epoch {epoch}, {wrong[0]}; try {advice}")


def check_arguments(model: VAE, images: ImageSet, valid: ImageSet | None, config: TrainConfig) -> None:
    """ValueError unless `fit` can start with these."""
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config: got {describe(config)}, expected a TrainConfig")
    if not isinstance(model, VAE):
        raise ValueError(f"model: got {type(model).__name__}, expected a VAE")
    if getattr(model, "labels", None) is not None:
        expected = "expected the model itself; fit hands it the labels of the images"
        raise ValueError(f"model: got a conditional VAE bound to labels, {expected}")
    if not torch.is_grad_enabled():
        raise ValueError("model: got it under torch.no_grad() or torch.inference_mode(), expected a call of fit outside of them")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        expected = "expected some with requires_grad; model.requires_grad_() thaws all"
        raise ValueError(f"model: got weights that are all frozen, {expected}")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model: got one made under torch.inference_mode(), expected it to be made, or loaded, outside")
    if dtypes := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        raise ValueError(
            f"model: got weights of {dtypes.pop()}, expected torch.float32; precision='bf16' is an argument of TrainConfig"
        )
    for name, these in (("images", images), ("valid", valid)):
        if these is None:
            continue
        if these.image_shape != model.image_shape:
            raise ValueError(f"{name}: got images of shape {these.image_shape}, expected {model.image_shape} as the model has")
        labels_for(model, name, these)
    if config.batch_size > len(images):
        raise ValueError(f"batch_size: got {config.batch_size}, expected at most the {len(images)} images of the set")
    if config.objective == "dreg" or config.free_bits:  # they ask for more than every q and prior has: tried before any work
        labels, x = images[:1].known_labels, torch.zeros(1, *model.image_shape, device=model.device)
        with evaluating(model):
            drawn = model.given(labels).draw(x, 1, x.new_zeros(1, 1, model.latent_dim), validate=False)
        if config.objective == "dreg":
            drawn.gaussian("objective: got 'dreg' for")
        else:
            free_bits_kl(drawn.terms, config.free_bits)
    if config.patience is not None and valid is None:
        raise ValueError("patience: got a number, but there is no validation set to judge by; expected valid as well")


def validate(model: VAE, valid: ImageSet, seed: int, group: Group) -> dict[str, float]:
    """Means of the held-out ELBO and its terms, each process doing its share of the images."""
    terms = heldout_elbo(model, valid[group.share(len(valid))], seed=seed)
    own = group.rank < len(valid)
    sums = [float(own) * getattr(terms, name).double().sum().item() for name in ("elbo", "log_likelihood", "kl")]
    means = group.sum(torch.tensor(sums, device=model.device, dtype=torch.float32 if model.device.type == "mps" else torch.float64))
    return {
        f"valid_{name}": value / len(valid) for name, value in zip(("elbo", "log_likelihood", "kl"), means.tolist(), strict=True)
    }


def training_means(epoch: int, rows: Tensor) -> dict[str, Any]:
    """The means over an epoch's images of what its steps gave: nats."""
    log_likelihood, kl, value, penalty = (rows[:, [0, 1, 5, 6]].double().sum(0) / rows[:, 4].sum()).tolist()
    record = {"epoch": epoch, "train_elbo": log_likelihood - kl, "train_log_likelihood": log_likelihood, "train_kl": kl}
    return record | {"train_objective": -value} | ({"train_penalty": penalty} if rows[:, 6].any() else {})


def fit(
    model: VAE,
    images: ImageSet | Tensor,
    valid: ImageSet | Tensor | None = None,
    config: TrainConfig | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
) -> History:
    """Maximize the ELBO of `images`; the model is trained in place and ends on the chosen device.

    All images go to the device once; a minibatch is an index slice there, made the model's x by the likelihood. (A set of more than
    half of a GPU's free memory stays on the host, and comes in chunks of some batches.) Ctrl-C ends the
    training after the step that it came in, keeps what was learned and returns the history; a second one does not wait. Under
    `torchrun` the processes share each batch. A run that diverged ends with a warning, see `History`.

    Args:
        model: changed in place.
        images: what to train on; a conditional model is given their labels.
        valid: what to compute the ELBO on after each epoch, with the same noise each time.
        config: see `TrainConfig`.
        folder: where ``checkpoint.pt`` and ``history.jsonl`` (one JSON object per epoch) are written; None writes nothing.
        resume: go on from the folder's checkpoint, or start where there is none. In one process on a CPU the result is, to the
            last bit, that of a run that was never interrupted. (With several, the training means of an epoch that was cut off
            leave out some images; on another kind of device the noise is another.)
        tensorboard: write the history for TensorBoard too, to ``tensorboard`` in the folder (``pip install tensorboard``).

    Returns:
        History : a list with one dict per epoch.

    Raises:
        ValueError: If images and model don't fit together, the configuration asks for what is not there, the folder holds a
            checkpoint and `resume` is off, or its checkpoint belongs to another run, or another process is writing to it.
        FloatingPointError: If a term of the loss or a weight is no longer finite; the model then has the weights after the last
            good epoch (or where it resumed), and the folder the last checkpoint before the trouble.

    Example:
        >>> import vaelib
        >>> model = vaelib.mlp_vae((1, 28, 28), hidden_dims=(32,), latent_dim=2)
        >>> history = vaelib.fit(model, vaelib.load_images("digits"), config=vaelib.TrainConfig(epochs=2, progress=False))
        >>> history[0]["train_elbo"] < history[1]["train_elbo"]  # nats per image
        True
    """
    from tqdm.auto import tqdm

    config = config or TrainConfig()
    images, valid = as_image_set("images", images), None if valid is None else as_image_set("valid", valid)
    if isinstance(config, TrainConfig) and config.batch_size == TrainConfig.batch_size:
        config = replace(config, batch_size=min(config.batch_size, len(images)))
    check_arguments(model, images, valid, config)
    folder = check_folder(folder, resume, tensorboard)
    group = join(choose_device(config.device))
    if config.batch_size < group.size:
        raise ValueError(f"batch_size: got {config.batch_size}, expected at least one image for each of {group.size} processes")
    with only_writer("folder", folder) if folder is not None and group.leads else nullcontext():
        identity = {} if folder is None else identity_of(model, images, valid, config)
        run = Run(model, images, valid, config, group)
        with (
            Store(folder, run, identity, resume, tensorboard) as store,
            run.kept_whole(),
            held_interrupts() as pressed,
            tqdm(total=run.total_steps, initial=run.step, unit="batch", disable=not (config.progress and group.leads)) as bar,
        ):
            while len(run.history) < config.epochs and not run.stops_early():
                for pixels, labels in run.batches():
                    run.take_step(pixels, labels)
                    bar.update()
                    if pressed:
                        store.write(run)
                        raise KeyboardInterrupt
                    store.after_step(run)
                record = run.end_epoch()
                bar.set_postfix({key: f"{record[key]:.2f}" for key in ("train_elbo", "valid_elbo") if key in record})
                store.after_epoch(run, record)
            store.write(run)
    run.history.diverged = run.divergence()
    if run.history.diverged:
        warnings.warn(f"training diverged: {run.history.diverged}; try a lower learning_rate or a clip_norm", stacklevel=2)
    return run.history


def check_folder(folder: str | Path | None, resume: bool, tensorboard: bool) -> Path | None:
    """The folder as a path; ValueError where it has a checkpoint that nobody asked to go on from, or is asked for and not given."""
    if folder is None:
        if resume or tensorboard:
            raise ValueError(f"folder: got None, expected a folder to {'resume from' if resume else 'write TensorBoard logs to'}")
        return None
    folder = as_path(folder)
    if (folder / FILE).exists() and not resume:
        raise ValueError(f"folder: {folder} already holds a checkpoint, expected another folder, or resume=True to go on from it")
    return folder
