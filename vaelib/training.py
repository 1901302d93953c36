"""The trainer: one function, `fit`, over one configuration, `TrainConfig`."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import check_choice, check_int, check_number, check_seed, describe
from vaelib.data import ImageSet, minibatches
from vaelib.objectives import loss
from vaelib.vae import VAE, heldout_elbo

# LBFGS wants a closure, SparseAdam sparse gradients: neither fits this loop.
OPTIMIZERS = {
    name: value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
}
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
        batch_size: images per step; the last, smaller batch counts.
        optimizer: the name of a class in `torch.optim`, a class of your own, or a function from parameters to an optimizer,
            which then sets its own learning rate.
        learning_rate: the highest learning rate.
        optimizer_options: further arguments of the optimizer, such as ``{"momentum": 0.9}``.
        schedule: ``"cosine"`` (to 0), ``"linear"`` (to 0), ``"constant"``, or a function from progress in [0, 1] to a factor.
        warmup: share of the steps over which the learning rate rises linearly from 0.
        clip_norm: the gradient's norm is cut to this; None leaves it alone.
        beta: weight of the KL term; 1 is the ELBO.
        kl_warmup_epochs: epochs over which beta rises linearly from 0.
        num_samples: draws of z per image and step.
        seed: of the order of the images, the binarization and the draws of z. (Seed the weights with `torch.manual_seed`.)
        device: ``"auto"`` takes CUDA, else MPS, else the CPU; or any device of torch.
        patience: stop after this many epochs without a better validation ELBO, and put the best weights back; None never stops.
        progress: show a progress bar.
    """

    epochs: int = 20
    batch_size: int = 128
    optimizer: str | Callable[[Iterable[Tensor]], torch.optim.Optimizer] = "Adam"
    learning_rate: float = 5e-3
    optimizer_options: dict[str, Any] | None = None
    schedule: str | Callable[[float], float] = "cosine"
    warmup: float = 0.05
    clip_norm: float | None = 100.0
    beta: float = 1.0
    kl_warmup_epochs: float = 0
    num_samples: int = 1
    seed: int = 0
    device: str = "auto"
    patience: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_int("epochs", self.epochs)
        check_int("batch_size", self.batch_size)
        check_int("num_samples", self.num_samples)
        if check_number("warmup", self.warmup) > 1:
            raise ValueError(f"warmup: got {self.warmup}, expected a share of the steps, at most 1")
        check_seed("seed", self.seed)
        check_number("learning_rate", self.learning_rate, exclusive=True)
        check_number("beta", self.beta)
        check_number("kl_warmup_epochs", self.kl_warmup_epochs)
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, exclusive=True)
        if self.patience is not None:
            check_int("patience", self.patience)
        if not callable(self.optimizer):
            check_choice("optimizer", self.optimizer, OPTIMIZERS)
        elif not inspect.isclass(self.optimizer) and self.optimizer_options:
            raise ValueError("optimizer_options: got options beside a function, expected the function to set them itself")
        if not callable(self.schedule):
            check_choice("schedule", self.schedule, SCHEDULES)

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain data; functions become their names."""
        return {key: getattr(value, "__name__", repr(value)) if callable(value) else value for key, value in asdict(self).items()}


class History(list[dict[str, float]]):
    """One plain dict per finished epoch; ``history["valid_elbo"]`` is that column, ``history[-1]`` the last epoch.

    Keys: ``epoch`` (from 1), ``train_elbo``, ``train_log_likelihood``, ``train_kl`` (means over the epoch's images while the
    weights moved, nats), ``valid_elbo``, ``valid_log_likelihood``, ``valid_kl`` (where a validation set was given),
    ``learning_rate`` and ``beta`` (at the epoch's last step), ``seconds``.

    Attributes:
        stopped: ``"finished"``, ``"early stop"`` or ``"interrupted"``.
        best_epoch: the epoch with the best validation ELBO, None without a validation set.
        device: what it ran on.
    """

    stopped = "finished"
    best_epoch: int | None = None
    device = "cpu"

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
    except RuntimeError as error:
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
    kind = OPTIMIZERS[config.optimizer] if isinstance(config.optimizer, str) else config.optimizer
    options = {"lr": config.learning_rate, **(config.optimizer_options or {})}
    if (
        "fused" in inspect.signature(kind).parameters
        and model.device.type in ("cpu", "cuda")
        and not {"foreach", "differentiable"} & set(options)
    ):
        options.setdefault("fused", True)
    try:
        return kind(model.parameters(), **options)
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


def copy_of_weights(model: VAE) -> dict[str, Tensor]:
    """The model's state, apart from it."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def check_finite(epoch: int, terms: dict[str, float], model: VAE) -> None:
    """FloatingPointError that names the epoch and what is no longer finite, a term of the loss or a weight."""
    wrong = [f"the {name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
    wrong += [f"the weight {name} is not finite" for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if wrong:
        raise FloatingPointError(f"epoch {epoch}: {wrong[0]}; try a lower learning_rate or a clip_norm")


def fit(model: VAE, images: ImageSet, valid: ImageSet | None = None, config: TrainConfig | None = None) -> History:
    """Maximize the ELBO of `images`; the model is trained in place and ends on the chosen device.

    All images go to the device once; a minibatch is an index slice there, made the model's x by the likelihood. Ctrl-C ends the
    training, keeps what was learned and returns the history.

    Args:
        model: changed in place.
        images: what to train on.
        valid: what to compute the ELBO on after each epoch, with the same noise each time.
        config: see `TrainConfig`.

    Returns:
        History : a list with one dict per epoch.

    Raises:
        ValueError: If images and model don't fit together, or the configuration asks for what is not there.
        FloatingPointError: If a term of the loss or a weight is no longer finite; the model then has the weights of the last good epoch.
    """
    config = config or TrainConfig()
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config: got {describe(config)}, expected a TrainConfig")
    for name, these in (("images", images), ("valid", valid)):
        if these is None and name == "valid":
            continue
        if not isinstance(these, ImageSet):
            raise ValueError(f"{name}: got {describe(these)}, expected an ImageSet")
        if these.image_shape != model.image_shape:
            raise ValueError(f"{name}: got images of shape {these.image_shape}, expected {model.image_shape} as the model has")
    if config.batch_size > len(images):
        raise ValueError(f"batch_size: got {config.batch_size}, expected at most the {len(images)} images of the set")
    if config.patience is not None and valid is None:
        raise ValueError("patience: got a number, but there is no validation set to judge by; expected valid as well")

    from tqdm.auto import tqdm

    device = choose_device(config.device)
    model.to(device)
    images = images.to(device)
    valid = None if valid is None else valid.to(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    parameters = list(model.parameters())
    foreach = True if device.type in ("cpu", "cuda") else None  # torch's default loops over the weights on a CPU: 0.7 ms a step
    steps_per_epoch = math.ceil(len(images) / config.batch_size)
    optimizer = make_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config, config.epochs * steps_per_epoch))
    kl_warmup_steps = config.kl_warmup_epochs * steps_per_epoch

    history = History()
    history.device = str(device)
    best_elbo, best_weights, good_weights = -math.inf, None, copy_of_weights(model)
    was_training = model.training
    bar = tqdm(total=config.epochs * steps_per_epoch, unit="batch", disable=not config.progress)
    try:
        for epoch in range(1, config.epochs + 1):
            start = time.perf_counter()
            model.train()
            totals = torch.zeros(2, device=device)  # log-likelihood and KL: no number leaves the device before the epoch's end
            for step, pixels in enumerate(minibatches(images, config.batch_size, generator), (epoch - 1) * steps_per_epoch + 1):
                beta = config.beta * (min(1.0, step / kl_warmup_steps) if kl_warmup_steps else 1.0)
                learning_rate = optimizer.param_groups[0]["lr"]
                x = model.likelihood.observe(pixels, generator)
                terms = model.elbo(x, config.num_samples, generator=generator, validate=False)
                optimizer.zero_grad()
                loss(terms, beta).backward()
                if config.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm, foreach=foreach)
                optimizer.step()
                schedule.step()
                totals += torch.stack([terms.log_likelihood.detach().sum(), terms.kl.detach().sum()])
                bar.update()

            log_likelihood, kl = (totals / len(images)).tolist()
            check_finite(epoch, {"training log-likelihood": log_likelihood, "training KL": kl}, model)
            record = {"epoch": epoch, "train_elbo": log_likelihood - kl, "train_log_likelihood": log_likelihood, "train_kl": kl}
            if valid is not None:
                terms = heldout_elbo(model, valid, seed=config.seed)
                record |= {f"valid_{name}": getattr(terms, name).mean().item() for name in ("elbo", "log_likelihood", "kl")}
                check_finite(epoch, {"held-out ELBO": record["valid_elbo"]}, model)
            good_weights = copy_of_weights(model)
            history.append(record | {"learning_rate": learning_rate, "beta": beta, "seconds": time.perf_counter() - start})
            bar.set_postfix({key: f"{record[key]:.2f}" for key in ("train_elbo", "valid_elbo") if key in record})

            if valid is not None and record["valid_elbo"] > best_elbo:
                best_elbo, history.best_epoch = record["valid_elbo"], epoch
                if config.patience is not None:
                    best_weights = good_weights
            elif config.patience is not None and epoch - (history.best_epoch or 0) >= config.patience:
                history.stopped = "early stop"
                break
    except KeyboardInterrupt:
        history.stopped = "interrupted"
    except FloatingPointError:
        best_weights = best_weights or good_weights
        raise
    finally:
        bar.close()
        model.train(was_training)
        if best_weights is not None:
            model.load_state_dict(best_weights)
    return history
