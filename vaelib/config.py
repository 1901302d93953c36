"""How to train: `TrainConfig`, what it says of optimizer, learning rate and weight of the KL term, and whether `fit` can start with it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vaelib._validation import check_choice, check_flag, check_int, check_number, check_seed, describe, plain
from vaelib.data import ImageSet
from vaelib.heldout import evaluating, labels_for
from vaelib.objectives import free_bits_kl
from vaelib.vae import VAE

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
        clip_norm: the gradient's norm is cut to this, as a rule at every step of photographs, see the page on troubleshooting; None
            leaves it alone.
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
        cuda_graph: on CUDA record the whole step in a CUDA graph and replay it, wherever that can be done; a warning, and
            `History.not_replayed`, say where it cannot.
        tf32: let a GPU round the factors of products and convolutions to 11 bits: TF32, faster from Ampere on. False keeps all 24.
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
    cuda_graph: bool = True
    tf32: bool = False
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
            raise ValueError(f"compile: got {self.compile!r}, expected False: a hook makes the gradient of 'dreg'")
        if isinstance(self.compile, str):
            check_choice("compile", self.compile, COMPILE_MODES)
        elif not isinstance(self.compile, bool):
            raise ValueError(f"compile: got {describe(self.compile)}, expected True, False or a mode of torch.compile")
        for name in ("flip", "cuda_graph", "tf32", "channels_last", "progress"):
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


def check_fit(model: VAE, images: ImageSet, valid: ImageSet | None, config: TrainConfig) -> None:
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
