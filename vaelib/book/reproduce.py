"""A paper's table, row by row: importance-weighted autoencoders (Burda, Grosse and Salakhutdinov 2016, table 1), at four budgets."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaelib._validation import check_choice, check_int
from vaelib.book.two_layer import two_layer_vae
from vaelib.config import TrainConfig
from vaelib.data import ImageSet
from vaelib.evaluation import active_units, log_likelihood, standard_error
from vaelib.training import fit
from vaelib.vae import VAE, mlp_vae

OBJECTIVES = {"vae": "elbo", "iwae": "iwae"}  # of the paper's columns; with one sample they are the same
# The paper's negative log-likelihood in nats and active units of each layer: (stochastic layers, column, k).
PAPER: dict[tuple[int, str, int], tuple[float, tuple[int, ...]]] = {
    (1, "vae", 1): (86.76, (19,)), (1, "vae", 5): (86.47, (20,)), (1, "vae", 50): (86.35, (20,)),
    (1, "iwae", 5): (85.54, (22,)), (1, "iwae", 50): (84.78, (25,)),
    (2, "vae", 1): (85.33, (16, 5)), (2, "vae", 5): (85.01, (17, 5)), (2, "vae", 50): (84.78, (17, 5)),
    (2, "iwae", 5): (83.89, (21, 5)), (2, "iwae", 50): (82.90, (26, 7)),
}  # fmt: skip
STAGES = 8  # stage i = 0..7 lasts 3^i epochs at 10^(-i/7) of the first learning rate


def paper_schedule(progress: float) -> float:
    """Progress in [0, 1] -> factor of the learning rate: 10^(-i/7) in stage i of the paper's eight, which last 3^i epochs."""
    epoch = progress * (3**STAGES - 1) / 2
    stage = int(math.log(2 * epoch + 1 + 1e-9, 3))  # the stages before i last (3^i - 1) / 2 epochs together
    return 10 ** (-min(stage, STAGES - 1) / 7)


@dataclass(frozen=True)
class Budget:
    """How long a row trains: all that may differ from the paper.

    Attributes:
        epochs: passes over the training images, for each number of samples k.
        batch_size: as in `TrainConfig`, like the next two.
        learning_rate: its highest value.
        schedule: its course.
        num_samples: draws per image of the importance-weighted estimate on the test set.
    """

    epochs: dict[int, int]
    batch_size: int = 128
    learning_rate: float = 2e-3
    schedule: Any = "cosine"
    num_samples: int = 5000

    def __post_init__(self) -> None:
        for name, value in (("num_samples", self.num_samples), *(("epochs", number) for number in self.epochs.values())):
            check_int(name, value)


# The budget "gpu" has 12.5 times the paper's batch and, as Adam wants it, its learning rate times the square root of that. An H200
# that replays whole steps from a CUDA graph took, at batch 20, 0.326 ms a step for one layer and k = 1 (at batch 100 too), 0.396 for
# k = 5 and 0.500 for k = 50; for two layers 0.619 for k = 1 and 0.816 for k = 50. So a draw costs 0.115 us with one layer and 0.20
# with two, beside what a step costs anyway. Batch 250 was not measured; by these lines its steps, 240 an epoch, are estimated:
#
#   k     epochs   one layer             two layers
#   1     2600     0.35 ms, 220 s        0.67 ms, 415 s
#   5     2000     0.53 ms, 254 s        0.87 ms, 415 s
#   50    550      1.82 ms, 240 s        3.12 ms, 411 s
#
# The rest of ten minutes is for what `fit` does at the end of an epoch, and for the score.
BUDGETS = {
    "paper": Budget(dict.fromkeys((1, 5, 50), (3**STAGES - 1) // 2), 20, 1e-3, paper_schedule),
    "hour": Budget({1: 600, 5: 300, 50: 50}),
    "minutes": Budget({1: 100, 5: 45, 50: 8}),
    "gpu": Budget({1: 2600, 5: 2000, 50: 550}, 250, 3.5e-3),
}


def burda_vae(layers: int, train_mean: Tensor) -> VAE:
    """The paper's network, 784-200-200-50 or with a second layer 100-100-100-50, tanh, with Glorot's initialization.

    The last biases start at the log-odds of the mean image, (C, H, W) in [0, 1], as in the authors' code.
    """
    check_choice("layers", layers, (1, 2))
    shape = tuple(train_mean.shape)
    model = mlp_vae(shape, (200, 200), 50, activation="tanh") if layers == 1 else two_layer_vae(shape)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    last = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(train_mean.clamp(0.001, 0.999).logit().flatten())
    return model


def iwae_row(
    train: ImageSet,
    test: ImageSet,
    layers: int = 1,
    objective: str = "iwae",
    k: int = 1,
    budget: str | Budget = "minutes",
    seed: int = 0,
    device: str = "auto",
    folder: str | Path | None = None,
    progress: bool = True,
) -> tuple[VAE, dict[str, Any]]:
    """Train one row of the table by the paper's recipe and score it on the test set.

    Binarization is dynamic, Adam has eps = 1e-4, and a unit is active where Var_x(E[z given x]) > 0.01. (Of two layers the upper one
    is taken along the path of the lower one's means.)

    Args:
        train, test: the images; the paper trains on all 60000 of MNIST.
        layers: 1 or 2 stochastic layers.
        objective: ``"vae"``, the ELBO with k draws averaged, or ``"iwae"``, the importance-weighted bound of k draws.
        budget: ``"paper"``, ``"hour"`` or ``"minutes"`` (on two cores), ``"gpu"`` (at most ten minutes on an H100 or H200,
            estimated), or a `Budget`.
        folder: where a checkpoint is written, every minute; a run that was cut off goes on from there.

    Raises:
        KeyboardInterrupt: If Ctrl-C ended the training; with a folder the same call goes on from there.

    Returns:
        The model, and the row: the negative log-likelihood ``nll`` in nats with its standard error, ``active_units`` of each layer from
        the lowest up, the paper's two numbers (of MNIST; None for other images), the budget's values, and the seconds of training and
        of scoring.
    """
    check_choice("objective", objective, OBJECTIVES)
    name = budget if isinstance(budget, str) else "custom"
    budget = budget if isinstance(budget, Budget) else BUDGETS[check_choice("budget", budget, BUDGETS)]
    check_choice("k", check_int("k", k), budget.epochs)
    torch.manual_seed(seed)
    model = burda_vae(layers, train.pixels.float().mean(0) / 255)
    config = TrainConfig(
        epochs=budget.epochs[k], batch_size=budget.batch_size, learning_rate=budget.learning_rate, schedule=budget.schedule,
        optimizer_options={"eps": 1e-4}, warmup=0.0, clip_norm=None, objective="elbo" if k == 1 else OBJECTIVES[objective],
        num_samples=k, seed=seed, device=device, progress=progress,
        checkpoint_epochs=budget.epochs[k], checkpoint_minutes=1.0,  # on a GPU an epoch is shorter than the writing of one
    )  # fmt: skip
    history = fit(model, train, None, config, folder, resume=folder is not None)
    if history.stopped == "interrupted":  # a row of fewer epochs than its budget says would be wrong
        raise KeyboardInterrupt
    began = time.perf_counter()
    estimate = log_likelihood(model, test, budget.num_samples)
    active = active_units(model, test)
    counts = [int(part.sum()) for part in active.split(getattr(model, "split", (model.latent_dim,)))][::-1]
    published = PAPER.get((layers, "vae" if k == 1 else objective, k)) if test.name == "mnist" else None
    nll, units = published or (None, ())
    return model, {
        "data": test.name, "layers": layers, "objective": objective, "k": k, "budget": name,
        **asdict(budget), "schedule": config.as_dict()["schedule"],
        "epochs": len(history), "steps": len(history) * math.ceil(len(train) / budget.batch_size), "seed": seed,
        "nll": -estimate.double().mean().item(), "nll_standard_error": standard_error(estimate), "active_units": counts,
        "paper_nll": nll, "paper_active_units": list(units), "device": history.device, "num_test_images": len(test),
        "train_seconds": round(sum(history["seconds"]), 1), "score_seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
