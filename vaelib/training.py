"""The trainer: one function, `fit`, a short loop over a `Run`, which takes the steps, and a `Store`, which writes the files.

A step leaves the device alone (`vaelib.step`): what the history needs is kept there, step by step, and read once at the epoch's end.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import as_path, help_at
from vaelib.checkpoints import FILE, held_interrupts, identity_of, read_checkpoint, tensorboard_writer, write_checkpoint
from vaelib.config import OPTIMIZERS as OPTIMIZERS
from vaelib.config import TrainConfig, check_fit
from vaelib.config import learning_rate_factor as learning_rate_factor
from vaelib.config import make_optimizer as make_optimizer
from vaelib.data import ImageSet, as_image_set
from vaelib.distributed import Group, choose_device, fits, join, summed
from vaelib.graphs import float32_products
from vaelib.heldout import heldout_elbo
from vaelib.step import TrainStep
from vaelib.step import epoch_order as epoch_order
from vaelib.storage import BROKEN, only_writer, write_text
from vaelib.vae import VAE

HISTORY = "history.jsonl"


class History(list[dict[str, float]]):
    """One plain dict per finished epoch; ``history["valid_elbo"]`` is that column, ``history[-1]`` the last epoch.

    Keys: ``epoch`` (from 1), ``train_elbo``, ``train_log_likelihood``, ``train_kl`` (means over the epoch's images while the
    weights moved, nats), ``train_objective`` (the same of what was maximized: minus the loss), ``train_penalty`` (of its further term,
    where there is one), ``valid_elbo``, ``valid_log_likelihood``, ``valid_kl`` (where a validation set was given), ``gradient_norm`` (mean
    over the steps that were taken, before clipping; None where there was none), ``skipped_steps``, ``learning_rate`` and ``beta``
    (at the epoch's last step), ``seconds``; and what the model's own `VAE.report` gives.

    Attributes:
        stopped: ``"finished"``, ``"early stop"`` or ``"interrupted"``.
        best_epoch: the epoch with the best validation ELBO, None without a validation set.
        diverged: in words, why the weights that are kept should not be used; None where training did not diverge. It did if, after
            the epoch whose weights are kept, the ELBO (held out, where there is a validation set) was below that of the run's first
            step, and either at least half of that epoch's steps were left out, or it was below it by more than its own size and
            one nat per pixel value.
        device: what it ran on.
        steps: how many steps this call of `fit` took; fewer than the whole run's after a resume.
        not_replayed: in words, why its steps were not replayed from a CUDA graph; None where they were.
    """

    stopped = "finished"
    best_epoch: int | None = None
    diverged: str | None = None
    device = "cpu"
    steps = 0
    not_replayed: str | None = None

    def __getitem__(self, key: Any) -> Any:
        return [epoch[key] for epoch in self] if isinstance(key, str) else super().__getitem__(key)


def copy_of_weights(model: VAE) -> dict[str, Tensor]:
    """The model's state, apart from it."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Run:
    """A training under way: what `fit` needs at an epoch's end. What changes, `state` holds and `restore` puts back.

    Attributes:
        taker: what takes the steps.
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
        resident = fits(device, images, valid)
        if resident:
            images, valid = images.to(device), None if valid is None else valid.to(device)
        self.valid, self.taker = valid, TrainStep(model, images, config, group, device, resident)
        self.total_steps = config.epochs * self.taker.per_epoch
        self.history = History()
        self.history.device = str(device)
        self.step, self.elapsed = 0, 0.0
        self.first_elbo = self.best_elbo = -math.inf
        self.best_weights: dict[str, Tensor] | None = None

    def state(self) -> dict[str, Any]:
        """All that changes, as plain data and tensors."""
        return {
            "weights": self.model.state_dict(), "optimizer": self.taker.optimizer.state_dict(), "averages": self.taker.averages,
            "noise": self.taker.noise.get_state(), "device": self.device.type, "history": list(self.history),
            "best_epoch": self.history.best_epoch, "step": self.step, "trace": self.taker.trace, "best_elbo": self.best_elbo,
            "best_weights": self.best_weights, "elapsed": self.elapsed, "first_elbo": self.first_elbo,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`; ValueError where it lacks a part."""
        state = {"first_elbo": self.first_elbo} | state  # it came later than the first checkpoints
        if lacking := self.state().keys() - state.keys():
            raise ValueError(f"resume: got a checkpoint without {', '.join(sorted(lacking))}, expected a whole one")
        try:
            self.model.load_state_dict(state["weights"])
            self.taker.optimizer.load_state_dict(state["optimizer"])
            self.taker.hold_rates()
            if self.taker.averages is not None:
                self.taker.averages = [value.to(self.device) for value in state["averages"]]
            if state["device"] == self.device.type:  # another kind of device has another kind of generator
                self.taker.noise.set_state(state["noise"])
            self.history.extend(state["history"])
            self.history.best_epoch = state["best_epoch"]
            for name in ("step", "elapsed", "best_elbo", "best_weights", "first_elbo"):
                setattr(self, name, state[name])
            if self.group.leads:  # the others' part of an epoch that was cut off is not known, and not counted
                trace = state["trace"].to(self.device)
                if trace.shape[1] == 5:  # from before the loss and its penalty were kept: there it was minus the ELBO
                    trace = torch.cat([trace, trace[:, 1:2] - trace[:, :1], torch.zeros_like(trace[:, :1])], dim=1)
                self.taker.trace = trace
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
            self.history.steps, self.history.not_replayed = self.step - first_step, self.taker.obstacle
            for module, mode in modes.items():
                module.training = mode
            if self.best_weights is not None:
                self.model.load_state_dict(self.best_weights)
            elif self.taker.averages is not None:
                torch._foreach_copy_([parameter.detach() for parameter in self.model.parameters()], self.taker.averages)

    @contextmanager
    def judged(self) -> Iterator[None]:
        """The model has inside the block the weights that are validated, kept and saved: the averages, where there are some."""
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        own = [parameter.clone() for parameter in parameters] if self.taker.averages else parameters
        torch._foreach_copy_(parameters, self.taker.averages or own)
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

    def steps(self) -> Iterator[None]:
        """Take the epoch's steps that are still to come, one by one."""
        self.started = time.perf_counter() - self.elapsed
        self.model.train()
        epoch = len(self.history) + 1
        for take in self.taker.steps_to_come(epoch, done=self.step - (epoch - 1) * self.taker.per_epoch):  # above 0 only on resume
            take()
            self.step += 1
            self.elapsed = time.perf_counter() - self.started
            yield

    def end_epoch(self) -> dict[str, Any]:
        """Judge the epoch, and add its record to the history.

        Raises:
            FloatingPointError: If a term of the loss, a weight or the held-out ELBO is no longer finite.
        """
        history, epoch = self.history, len(self.history) + 1
        rows = summed(self.taker.trace, self.group).cpu()  # the epoch's only wait for the device, but for the validation
        with self.judged():
            check_finite(epoch, rows, self.model, history)
            if epoch == 1:
                self.first_elbo = ((rows[0, 0] - rows[0, 1]) / rows[0, 4]).item()
            record = training_means(epoch, rows)
            if self.valid is not None:
                record |= validate(self.model, self.valid, self.config.seed, self.group)
                if not math.isfinite(record["valid_elbo"]):
                    found = f"the held-out ELBO is {record['valid_elbo']}"
                    raise FloatingPointError(f"epoch {epoch}: {found}; try a lower learning_rate{help_at('diverged')}")
            self.good_weights = copy_of_weights(self.model)
        taken = rows[rows[:, 3] == 0]
        record |= {
            "gradient_norm": taken[:, 2].mean().item() if len(taken) else None,
            "skipped_steps": len(rows) - len(taken),
            "learning_rate": self.taker.peaks[0] * self.taker.rate_factor(self.step - 1),
            "beta": self.taker.beta(self.step - 1),
            "seconds": time.perf_counter() - self.started,
        } | self.model.report()
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
        elbo, skipped, steps = kept.get("valid_elbo", kept["train_elbo"]), kept["skipped_steps"], self.taker.per_epoch
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
        row = (run.step - 1) % run.taker.per_epoch
        if run.taker.trace[: row + 1, [0, 1, 5]].isfinite().all():
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

    `trace` has a row for each step, as `TrainStep` gives it.
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
        raise FloatingPointError(f"epoch {epoch}, {wrong[0]}; try {advice}{help_at('diverged')}")


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
    check_fit(model, images, valid, config)
    folder = check_folder(folder, resume, tensorboard)
    group = join(choose_device(config.device))
    if config.batch_size < group.size:
        raise ValueError(f"batch_size: got {config.batch_size}, expected at least one image for each of {group.size} processes")
    with only_writer("folder", folder) if folder is not None and group.leads else nullcontext():
        identity = {} if folder is None else identity_of(model, images, valid, config)
        run = Run(model, images, valid, config, group)
        with (
            Store(folder, run, identity, resume, tensorboard) as store,
            float32_products(run.device, config.tf32),
            run.kept_whole(),
            held_interrupts() as pressed,
            tqdm(total=run.total_steps, initial=run.step, unit="batch", disable=not (config.progress and group.leads)) as bar,
        ):
            while len(run.history) < config.epochs and not run.stops_early():
                for _ in run.steps():
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
        advice = f"try a lower learning_rate or a clip_norm{help_at('diverged')}"
        warnings.warn(f"training diverged: {run.history.diverged}; {advice}", stacklevel=2)
    obstacle = run.history.not_replayed
    if obstacle and config.cuda_graph and run.device.type == "cuda":
        warnings.warn(f"the steps were not replayed from a CUDA graph: {obstacle}{help_at('cuda-graph')}", stacklevel=2)
    return run.history


def check_folder(folder: str | Path | None, resume: bool, tensorboard: bool) -> Path | None:
    """The folder as a path; ValueError where it has files that nobody asked to go on from, or is asked for and not given."""
    if folder is None:
        if resume or tensorboard:
            raise ValueError(f"folder: got None, expected a folder to {'resume from' if resume else 'write TensorBoard logs to'}")
        return None
    folder = as_path(folder)
    if (folder / FILE).exists() and not resume:
        way_out = f"expected another folder, or resume=True to go on from it{help_at('cut-off')}"
        raise ValueError(f"folder: {folder} already holds a checkpoint, {way_out}")
    if (folder / HISTORY).exists() and not (folder / FILE).exists():
        raise ValueError(f"folder: {folder} already holds a {HISTORY}, and no checkpoint to go on from; expected another folder")
    return folder
