"""The trainer: one function, `fit`, over one configuration, `TrainConfig`.

A step leaves the device alone: what the history needs is kept there, step by step, and read once at the epoch's end.
"""

from __future__ import annotations

import inspect
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import as_path, check_choice, check_flag, check_int, check_number, check_seed, describe, plain
from vaelib.checkpoints import FILE, fingerprint, read_checkpoint, write_checkpoint
from vaelib.data import ImageSet, as_image_set, minibatches
from vaelib.distributed import Group, join
from vaelib.objectives import ElboTerms, free_bits_kl, loss
from vaelib.storage import BROKEN, only_writer, write_text
from vaelib.vae import VAE, evaluating, heldout_elbo, labels_for

# LBFGS wants a closure, SparseAdam sparse gradients: neither fits this loop.
OPTIMIZERS: dict[str, Any] = {
    name: value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
SCHEDULES: dict[str, Callable[[float], float]] = {  # progress in [0, 1] -> factor of the learning rate
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train; a bad value is refused here, before any work (the device is looked for by `fit`).

    Attributes:
        epochs: passes over the data.
        batch_size: images per step, over all processes together; the last, smaller batch counts. The default means all images of a
            set that has fewer; any other number above the size of the set is refused by `fit`.
        optimizer: the name of a class in `torch.optim`, a class of your own, or a function from parameters to an optimizer,
            which then sets its own learning rate.
        learning_rate: the highest learning rate.
        optimizer_options: further arguments of the optimizer, such as ``{"momentum": 0.9}``.
        schedule: ``"cosine"`` (to 0), ``"linear"`` (to 0), ``"constant"``, or a function from progress in [0, 1] to a factor.
        warmup: share of the steps over which the learning rate rises linearly from 0.
        clip_norm: the gradient's norm is cut to this; None leaves it alone.
        skip_norm: a step whose gradient has a larger norm is left out and counted; one with a norm that is not finite always is.
        beta: weight of the KL term; 1 is the ELBO.
        kl_warmup_epochs: epochs over which beta rises linearly from 0.
        free_bits: nats per latent unit below which the KL is not pressed, see `vaelib.objectives.free_bits_kl`; 0 is the ELBO.
        objective: ``"elbo"``; ``"iwae"``, the importance-weighted bound of `num_samples` draws (Burda et al. 2016); or ``"dreg"``,
            the same with the encoder's gradient of Tucker et al. 2019, `vaelib.objectives.doubly_reparameterized_bound`. The
            last two take neither beta nor free bits; the history has the bound as ``train_objective``, beside the ELBO.
        num_samples: K, draws of z per image and step.
        ema_decay: decay of an exponential moving average of the weights, which is then what is validated, kept and saved;
            None keeps the weights themselves. In step t the decay is at most (1 + t) / (10 + t).
        flip: mirror each image with probability 1/2.
        precision: ``"float32"``, or ``"bf16"``: the networks under autocast; KL, likelihood and log-sum-exp stay in float32.
        compile: run the model through `torch.compile`; a string is its mode, such as ``"reduce-overhead"``, which records CUDA graphs.
        channels_last: lay images and convolutions out with the channels innermost.
        seed: of the order of the images, the flips, the binarization and the draws of z. (Seed the weights with
            `torch.manual_seed`.)
        device: ``"auto"`` takes CUDA, else MPS, else the CPU; or any device of torch.
        patience: stop after this many epochs without a better validation ELBO, and put the best weights back; None never stops.
        checkpoint_epochs: write a checkpoint after every so many epochs (and after the last), where `fit` is given a folder.
        checkpoint_minutes: write one after so many minutes too, amid an epoch.
        progress: show a progress bar.

    Example:
        >>> import vaelib
        >>> vaelib.TrainConfig(epochs=5, batch_size=64).schedule
        'cosine'
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str | Callable[[Iterable[Tensor]], torch.optim.Optimizer] = "Adam"
    learning_rate: float = 5e-3
    optimizer_options: dict[str, Any] | None = None
    schedule: str | Callable[[float], float] = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = 100.0
    skip_norm: float | None = None
    beta: float = 1.0
    kl_warmup_epochs: float = 0
    free_bits: float = 0.0
    objective: str = "elbo"
    num_samples: int = 1
    ema_decay: float | None = None
    flip: bool = False
    precision: str = "float32"
    compile: bool | str = False
    channels_last: bool = False
    seed: int = 0
    device: str = "auto"
    patience: int | None = None
    checkpoint_epochs: int = 1
    checkpoint_minutes: float | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name in ("epochs", "batch_size", "num_samples", "checkpoint_epochs"):
            check_int(name, getattr(self, name))
        for name, highest, meaning in (("warmup", 1, "share of the steps"), ("ema_decay", 1, "decay")):
            if getattr(self, name) is not None and check_number(name, getattr(self, name)) > highest:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a {meaning}, at most {highest}")
        check_seed("seed", self.seed)
        check_number("learning_rate", self.learning_rate, exclusive=True)
        for name in ("beta", "kl_warmup_epochs", "free_bits"):
            check_number(name, getattr(self, name))
        for name in ("clip_norm", "skip_norm"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), exclusive=True)
        if self.checkpoint_minutes is not None:
            check_number("checkpoint_minutes", self.checkpoint_minutes)
        if self.patience is not None:
            check_int("patience", self.patience)
        check_choice("precision", self.precision, ("float32", "bf16"))
        check_choice("objective", self.objective, ("elbo", "iwae", "dreg"))
        if self.objective != "elbo":
            for name, neutral in (("beta", 1.0), ("kl_warmup_epochs", 0), ("free_bits", 0.0), ("patience", None)):
                if getattr(self, name) != neutral:
                    belongs = f"{neutral}: it belongs to the ELBO, and the objective is {self.objective!r}"
                    raise ValueError(f"{name}: got {getattr(self, name)}, expected {belongs}")
        if self.objective == "dreg" and self.compile:
            raise ValueError(f"compile: got {self.compile!r}, expected False: the gradient of the objective 'dreg' is made by a hook")
        if isinstance(self.compile, str):
            check_choice("compile", self.compile, COMPILE_MODES)
        elif not isinstance(self.compile, bool):
            raise ValueError(f"compile: got {describe(self.compile)}, expected True, False or a mode of torch.compile")
        for name in ("flip", "channels_last", "progress"):
            check_flag(name, getattr(self, name))
        if self.optimizer_options is not None and not isinstance(self.optimizer_options, dict):
            raise ValueError(f"optimizer_options: got {describe(self.optimizer_options)}, expected a dict")
        if not callable(self.optimizer):
            check_choice("optimizer", self.optimizer, OPTIMIZERS)
        elif not inspect.isclass(self.optimizer) and self.optimizer_options:
            raise ValueError("optimizer_options: got options beside a function, expected the function to set them itself")
        if not callable(self.schedule):
            check_choice("schedule", self.schedule, SCHEDULES)

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain data; functions and classes become their names (all lambdas have the same)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: name_of(value) if callable(value) else value for key, value in values.items()}


def name_of(function: Any) -> str:
    """Module and name of a function or class; of a callable object those of its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


HISTORY = "history.jsonl"
TRACE = ("log_likelihood", "kl", "norm", "skipped", "count", "loss", "penalty")  # of a step; see `train_step`
# What may differ between a run and its continuation: where and how fast it runs, and what it shows, but not what it computes.
FREE_ON_RESUME = ("device", "compile", "checkpoint_epochs", "checkpoint_minutes", "progress")


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
        raise ValueError(f"device: got {device!r}, but torch finds no such device here; expected 'auto' or 'cpu'")
    return chosen


def make_optimizer(model: VAE, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config` over the model's parameters, in its fused form where it has one."""
    if callable(config.optimizer) and not inspect.isclass(config.optimizer):
        return config.optimizer(model.parameters())
    kind: type[torch.optim.Optimizer] = OPTIMIZERS[config.optimizer] if isinstance(config.optimizer, str) else config.optimizer  # type: ignore[assignment]
    options = {"lr": config.learning_rate, **(config.optimizer_options or {})}
    if (
        "fused" in inspect.signature(kind).parameters
        and model.device.type in ("cpu", "cuda")
        and not {"foreach", "differentiable"} & set(options)
    ):
        options.setdefault("fused", True)
    try:
        try:
            return kind(model.parameters(), **options)
        except RuntimeError:  # a torch whose fused form does not reach this device
            return kind(model.parameters(), **options | {"fused": False})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"optimizer_options: got {config.optimizer_options}, which {kind.__name__} does not take: {error}"
        ) from error


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate: linear warm-up times the schedule."""
    schedule = config.schedule if callable(config.schedule) else SCHEDULES[config.schedule]

    warmup_steps = max(1.0, config.warmup * total_steps)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / warmup_steps)
        return warmup * schedule(min(1.0, step / total_steps))

    return factor


def kl_weight(config: TrainConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Step -> beta: from beta / (warm-up steps) at the first step, linearly, to beta."""
    warmup_steps = max(1.0, config.kl_warmup_epochs * steps_per_epoch)
    return lambda step: config.beta * min(1.0, (step + 1) / warmup_steps)


def epoch_order(seed: int, epoch: int) -> torch.Generator:
    """The generator that shuffles an epoch, a function of seed and epoch alone: on resume the order needs no memory."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def take_step(optimizer: torch.optim.Optimizer, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """One step of the optimizer with the gradient cut to `clip_norm`; no step where its norm is not finite or above `skip_norm`.

    Returns:
        The gradient's norm before clipping, and 1 where the step was left out, else 0: scalars on the device.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
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


def train_step(
    forward: Callable[..., ElboTerms],
    model: VAE,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, ...],
    noise: torch.Generator,
    beta: float,
    config: TrainConfig,
    group: Group,
) -> Tensor:
    """One step on one global batch: its pixels and, where they are known, its labels.

    Returns:
        A row for the epoch's trace, on the device: sums of log-likelihood and KL over this process's share of the batch, the gradient's
        norm, 1 where the step was skipped, the number of images in the share, and sums of the loss and its penalty over them.
    """
    pixels, labels = batch[0], batch[1] if len(batch) == 2 else None
    device = pixels.device
    if config.flip:
        coin = torch.rand(len(pixels), 1, 1, 1, generator=noise, device=device) < 0.5
        pixels = torch.where(coin, pixels.flip(3), pixels)
    x = model.likelihood.observe(pixels, noise)
    eps = torch.randn(config.num_samples, len(x), model.latent_dim, generator=noise, device=device)
    weight = group.weight(len(x))
    if group.size > 1:
        share = group.share(len(x))
        x, eps, labels = x[share], eps[:, share], None if labels is None else labels[share]
    if config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
        terms = forward(x, eps, config.objective, labels)
    objective = terms
    if config.free_bits and group.size > 1:
        objective = with_global_kl(terms, weight, group)
    optimizer.zero_grad()
    value = loss(objective, beta, config.free_bits)
    (weight * value).backward()
    norm, skipped = take_step(optimizer, config)
    count = len(x) * float(weight > 0)  # a share that only fills a place counts nothing
    penalty = torch.zeros_like(norm) if terms.penalty is None else terms.penalty.mean()
    sums = [float(count > 0) * term.detach().sum() for term in (terms.log_likelihood, terms.kl)]
    return torch.stack([*sums, norm, skipped, torch.full_like(norm, count), count * value.detach(), count * penalty.detach()])


def copy_of_weights(model: VAE) -> dict[str, Tensor]:
    """The model's state, apart from it."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@dataclass
class Run:
    """What changes while `fit` runs, and so belongs into a checkpoint."""

    model: VAE
    optimizer: torch.optim.Optimizer
    noise: torch.Generator
    averages: list[Tensor] | None  # of each parameter, where there is an `ema_decay`
    trace: Tensor  # (steps per epoch, len(TRACE)): what each step of this epoch gave
    history: History
    step: int = 0  # steps done
    elapsed: float = 0.0  # seconds of this epoch so far
    best_elbo: float = -math.inf
    best_weights: dict[str, Tensor] | None = None
    first_elbo: float = -math.inf  # of the first step; nothing is below it where it is not known

    def state(self) -> dict[str, Any]:
        """All of it as plain data and tensors."""
        return {
            "weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "averages": self.averages,
            "noise": self.noise.get_state(), "device": self.trace.device.type, "history": list(self.history),
            "best_epoch": self.history.best_epoch, "step": self.step, "trace": self.trace, "best_elbo": self.best_elbo,
            "best_weights": self.best_weights, "elapsed": self.elapsed, "first_elbo": self.first_elbo,
        }  # fmt: skip

    def restore(self, state: dict[str, Any], group: Group) -> None:
        """Go on from `state`; ValueError where it lacks a part."""
        state = {"first_elbo": self.first_elbo} | state  # it came later than the first checkpoints
        if lacking := self.state().keys() - state.keys():
            raise ValueError(f"resume: got a checkpoint without {', '.join(sorted(lacking))}, expected a whole one")
        try:
            self._restore(state, group)
        except BROKEN as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"resume: got a checkpoint whose parts do not fit this run ({reason}), expected a whole one") from error

    def _restore(self, state: dict[str, Any], group: Group) -> None:
        device = self.trace.device
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averages is not None:
            self.averages = [value.to(device) for value in state["averages"]]
        if state["device"] == device.type:  # another kind of device has another kind of generator
            self.noise.set_state(state["noise"])
        self.history.extend(state["history"])
        self.history.best_epoch = state["best_epoch"]
        for name in ("step", "elapsed", "best_elbo", "best_weights", "first_elbo"):
            setattr(self, name, state[name])
        if group.leads:  # the others' part of an epoch that was cut off is not known, and not counted
            trace = state["trace"].to(device)
            if trace.shape[1] == 5:  # from before the loss and its penalty were kept: there it was minus the ELBO
                trace = torch.cat([trace, trace[:, 1:2] - trace[:, :1], torch.zeros_like(trace[:, :1])], dim=1)
            self.trace = trace

    def average(self, decay: float) -> None:
        """Move the averages towards the weights; early ones move faster."""
        assert self.averages is not None
        with torch.no_grad():
            weight = 1 - min(decay, self.step / (9 + self.step))
            torch._foreach_lerp_(self.averages, list(self.model.parameters()), weight)

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


def fits(device: torch.device, images: ImageSet, valid: ImageSet | None) -> bool:
    """Whether the sets may stay on the device: anywhere but on CUDA, and there if they take at most half of the memory that is free."""
    if device.type != "cuda":
        return True
    taken = sum(part.nbytes for each in (images, valid) if each is not None for part in (each.pixels, each.labels))
    try:
        return 2 * taken <= torch.cuda.mem_get_info(device)[0]
    except RuntimeError:  # a device that does not say
        return True


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


def divergence(kept: dict[str, float], first_elbo: float, steps: int, pixels: int) -> str | None:
    """Why the weights after the epoch `kept` are no use, as `History` says it; None where they are."""
    elbo = kept.get("valid_elbo", kept["train_elbo"])
    skipped = kept["skipped_steps"]
    if elbo < first_elbo and (2 * skipped >= steps > 1 or elbo < first_elbo - abs(first_elbo) - pixels):
        left_out = f", with {skipped:.0f} of {steps} steps left out" if skipped else ""
        return f"after epoch {kept['epoch']} the ELBO is {elbo:.4g} nats per image{left_out}; at the first step it was {first_elbo:.4g}"
    return None


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
        raise ValueError("model: got weights that are all frozen, expected some with requires_grad; model.requires_grad_() thaws all")
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


def epoch_record(run: Run, epoch: int, valid: ImageSet | None, seed: int, group: Group) -> dict[str, Any]:
    """What an epoch that has just ended gave: the means of its trace, and of the held-out ELBO.

    Raises:
        FloatingPointError: If a term of the loss, a weight or the held-out ELBO is no longer finite.
    """
    rows = summed(run.trace, group).cpu()  # the epoch's only wait for the device, but for the validation
    check_finite(epoch, rows, run.model, run.history)
    if epoch == 1:
        run.first_elbo = ((rows[0, 0] - rows[0, 1]) / rows[0, 4]).item()
    log_likelihood, kl, value, penalty = (rows[:, [0, 1, 5, 6]].double().sum(0) / rows[:, 4].sum()).tolist()
    record = {"epoch": epoch, "train_elbo": log_likelihood - kl, "train_log_likelihood": log_likelihood, "train_kl": kl}
    record |= {"train_objective": -value} | ({"train_penalty": penalty} if rows[:, 6].any() else {})
    if valid is not None:
        record |= validate(run.model, valid, seed, group)
        if not math.isfinite(record["valid_elbo"]):
            raise FloatingPointError(f"epoch {epoch}: the held-out ELBO is {record['valid_elbo']}; try a lower learning_rate")
    taken = rows[rows[:, 3] == 0]
    return record | {"gradient_norm": taken[:, 2].mean().item() if len(taken) else None, "skipped_steps": len(rows) - len(taken)}


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
    config = config or TrainConfig()
    images, valid = as_image_set("images", images), None if valid is None else as_image_set("valid", valid)
    if isinstance(config, TrainConfig) and config.batch_size == TrainConfig.batch_size:
        config = replace(config, batch_size=min(config.batch_size, len(images)))
    check_arguments(model, images, valid, config)
    if folder is None and (resume or tensorboard):
        raise ValueError(f"folder: got None, expected a folder to {'resume from' if resume else 'write TensorBoard logs to'}")
    folder = None if folder is None else as_path(folder)
    if folder is not None and (folder / FILE).exists() and not resume:
        raise ValueError(f"folder: {folder} already holds a checkpoint, expected another folder, or resume=True to go on from it")
    group = join(choose_device(config.device))
    if config.batch_size < group.size:
        raise ValueError(f"batch_size: got {config.batch_size}, expected at least one image for each of {group.size} processes")
    with only_writer("folder", folder) if folder is not None and group.leads else nullcontext():
        history = _fit(model, images, valid, config, folder, resume, tensorboard, group)
    if history.diverged:
        warnings.warn(f"training diverged: {history.diverged}; try a lower learning_rate or a clip_norm", stacklevel=2)
    return history


def _fit(
    model: VAE,
    images: ImageSet,
    valid: ImageSet | None,
    config: TrainConfig,
    folder: Path | None,
    resume: bool,
    tensorboard: bool,
    group: Group,
) -> History:
    """What `fit` does once its arguments are found good and the folder is this run's alone."""
    identity = {} if folder is None else {
        "model": model.config or repr(model),
        "images": fingerprint(images, model),
        "valid": None if valid is None else fingerprint(valid, model),
        "config": {key: value for key, value in config.as_dict().items() if key not in FREE_ON_RESUME},
    }  # fmt: skip

    from tqdm.auto import tqdm

    device = choose_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    resident = fits(device, images, valid)
    if resident:
        images, valid = images.to(device), None if valid is None else valid.to(device)
    forward: Callable[..., ElboTerms] = model
    if group.size > 1:  # this also makes all processes start from the first one's weights
        forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if config.compile:
        forward = torch.compile(forward, mode=None if config.compile is True else config.compile)
    of_batch = ("pixels", "labels") if images.labelled else ("pixels",)
    steps_per_epoch = math.ceil(len(images) / config.batch_size)
    run = Run(
        model=model,
        optimizer=make_optimizer(model, config),
        noise=torch.Generator(device).manual_seed(config.seed),
        averages=None if config.ema_decay is None else [parameter.detach().clone() for parameter in model.parameters()],
        trace=torch.zeros(steps_per_epoch, len(TRACE), device=device),
        history=History(),
    )
    history = run.history
    history.device = str(device)
    peaks = [options["lr"] for options in run.optimizer.param_groups]
    rate_factor = learning_rate_factor(config, config.epochs * steps_per_epoch)
    beta = kl_weight(config, steps_per_epoch)

    def write_state() -> None:
        if folder is not None and group.leads:
            write_checkpoint(folder, identity | run.state())

    writer = tensorboard_writer() if tensorboard else None
    group.wait()  # all have looked for a checkpoint before the first one writes it
    if folder is not None and resume and (folder / FILE).exists():
        run.restore(read_checkpoint(folder, identity), group)
        group.wait()
    elif folder is not None:
        write_state()  # whether it can be written is known before any work

    with run.judged():
        good_weights = copy_of_weights(model)
    modes = {module: module.training for module in model.modules()}
    first_step, last_written = run.step, time.perf_counter()
    if writer is not None and folder is not None:  # it forgets what an interrupted run wrote after its checkpoint
        writer = writer(folder / "tensorboard", purge_step=len(history) + 1) if group.leads else None
    pressed, release = hold_interrupts()
    whole = False
    total = config.epochs * steps_per_epoch
    bar = tqdm(total=total, initial=run.step, unit="batch", disable=not (config.progress and group.leads))
    try:
        for epoch in range(len(history) + 1, config.epochs + 1):
            if config.patience is not None and history.best_epoch and epoch - 1 - history.best_epoch >= config.patience:
                history.stopped = "early stop"
                break
            start = time.perf_counter() - run.elapsed
            model.train()
            done = run.step - (epoch - 1) * steps_per_epoch  # above 0 only on resume
            order = (epoch_order(config.seed, epoch) for _ in of_batch)  # the same for each
            batches = (
                minibatches(images, config.batch_size, generator, done, field, None if resident else device)
                for field, generator in zip(of_batch, order, strict=True)
            )
            for row, batch in enumerate(zip(*batches, strict=True), done):
                for options, peak in zip(run.optimizer.param_groups, peaks, strict=True):
                    options["lr"] = peak * rate_factor(run.step)
                run.trace[row] = train_step(forward, model, run.optimizer, batch, run.noise, beta(run.step), config, group)
                run.step += 1
                if config.ema_decay is not None:
                    run.average(config.ema_decay)
                bar.update()
                run.elapsed = time.perf_counter() - start
                if pressed:
                    whole = True
                    raise KeyboardInterrupt
                if config.checkpoint_minutes is not None and time.perf_counter() - last_written >= 60 * config.checkpoint_minutes:
                    if run.trace[: row + 1, [0, 1, 5]].isfinite().all():  # never over the last good one
                        write_state()
                    last_written = time.perf_counter()

            with run.judged():
                record = epoch_record(run, epoch, valid, config.seed, group)
                good_weights = copy_of_weights(model)
            record |= {"learning_rate": peaks[0] * rate_factor(run.step - 1), "beta": beta(run.step - 1)}
            record["seconds"] = time.perf_counter() - start
            history.append(record)
            run.elapsed = 0.0
            bar.set_postfix({key: f"{record[key]:.2f}" for key in ("train_elbo", "valid_elbo") if key in record})
            if valid is not None and record["valid_elbo"] > run.best_elbo:
                run.best_elbo, history.best_epoch = record["valid_elbo"], epoch
                if config.patience is not None:
                    run.best_weights = good_weights
            if folder is not None and group.leads:
                write_text(folder / HISTORY, "".join(json.dumps(line) + "\n" for line in history))
                if epoch % config.checkpoint_epochs == 0:
                    write_state()
                    last_written = time.perf_counter()
            if writer is not None:
                for key, value in record.items():
                    if value is not None:
                        writer.add_scalar(key, value, epoch)
        write_state()
    except KeyboardInterrupt:
        history.stopped = "interrupted"
        if whole:  # raised between two steps, and not by a second Ctrl-C amid one
            write_state()
    except FloatingPointError:
        run.best_weights = good_weights
        raise
    finally:
        release()
        history.steps = run.step - first_step
        bar.close()
        if writer is not None:
            writer.close()
        for module, mode in modes.items():
            module.training = mode
        if run.best_weights is not None:
            model.load_state_dict(run.best_weights)
        elif run.averages is not None:
            torch._foreach_copy_([parameter.detach() for parameter in model.parameters()], run.averages)
    if history:
        kept = history[-1] if run.best_weights is None or history.best_epoch is None else history[history.best_epoch - 1]
        history.diverged = divergence(kept, run.first_elbo, steps_per_epoch, math.prod(model.image_shape))
    return history


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


def tensorboard_writer() -> Any:
    """TensorBoard's SummaryWriter, or a ValueError that says how to get it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: the package is not installed; pip install tensorboard") from error
    return SummaryWriter


def hold_interrupts() -> tuple[list[int], Callable[[], object]]:
    """Let the first Ctrl-C wait until the step is done, so that a checkpoint can be written; the second one acts at once.

    Returns:
        A list that the first Ctrl-C fills, and a function that puts the old handling back.
    """
    pressed: list[int] = []
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)  # as in a job in the background
    if ignored or threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        return pressed, lambda: None

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    return pressed, lambda: signal.signal(signal.SIGINT, before) and None
