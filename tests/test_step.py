"""The training step: it reads nothing back from the device, it is what a plain loop does, and a graph of it gives the same run."""

import contextlib
import math
from typing import ClassVar

import pytest
import torch

import vaelib
from vaelib import training
from vaelib.config import check_fit
from vaelib.distributed import Group
from vaelib.graphs import Replayed, Watch, float32_products, obstacle
from vaelib.step import TrainStep, epoch_order

CPU = torch.device("cpu")
QUIET = {"progress": False, "device": "cpu"}
SHAPES = vaelib.load_images("shapes")
DIGITS = vaelib.load_images("digits")
MIXTURE = {"name": "discretized_logistic_mixture", "num_mixtures": 2}


def small(name):
    torch.manual_seed(0)
    if name == "conditional":
        return vaelib.conditional_vae((1, 28, 28), 10, (16,), 4)
    if name == "conv":
        return vaelib.conv_vae((3, 32, 32), (2, 8, 8), MIXTURE, channels=(8, 8))
    if name == "hierarchical":
        return vaelib.hierarchical_vae((3, 32, 32), ((2, 1), (2, 1)), width=8, bottleneck=4, blocks=1, likelihood=MIXTURE)
    if name == "two-layer":
        from vaelib.book.reproduce import burda_vae

        return burda_vae(2, DIGITS.pixels.float().mean(0) / 255)
    return vaelib.mlp_vae((1, 28, 28), (16,), 4, name)


def images_of(model):
    return (DIGITS if model.image_shape == (1, 28, 28) else SHAPES)[torch.arange(70)]


def step_of(model, **options):
    config = vaelib.TrainConfig(**{"batch_size": 32, "epochs": 2} | QUIET | options)
    return TrainStep(model.train(), images_of(model), config, Group(), CPU, resident=True)


# --- nothing is read back


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool((x > 0).any()), lambda x: x.unique(),
        lambda x: x.masked_select(x > 0), lambda x: x.index_put_((x > 0,), torch.tensor(1.0)), lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_the_watch_sees_what_makes_the_host_wait(reads):
    with Watch() as watch:
        reads(torch.tensor([1.0, -1.0]))
    assert watch.found


def test_the_watch_lets_what_stays_on_the_device_pass():
    x, rows = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 2])
    with Watch() as watch:
        (torch.where(x > 0, x, 0 * x)[rows].index_select(1, rows) @ torch.ones(2, 1)).sum().backward()
    assert watch.found == []


OPTIONS = {
    "plain": {}, "averaged": {"ema_decay": 0.9, "skip_norm": 1e6}, "unclipped": {"clip_norm": None, "schedule": "linear"},
    "bits": {"free_bits": 0.1, "kl_warmup_epochs": 1.0}, "iwae": {"objective": "iwae", "num_samples": 3},
    "dreg": {"objective": "dreg", "num_samples": 3}, "bf16": {"precision": "bf16"}, "adamw": {"optimizer": "AdamW"},
}  # fmt: skip
MODELS = (
    "bernoulli",
    "gaussian",
    "discretized_logistic",
    "grey_bce_not_a_likelihood",
    "conditional",
    "conv",
    "hierarchical",
    "two-layer",
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_each_model_and_objective_reads_nothing_back(name, options):
    model = small(name)
    try:
        step = step_of(
            model, **OPTIONS[options] | ({"flip": True, "channels_last": True} if name in ("conv", "hierarchical") else {})
        )
        check_fit(model, images_of(model), None, step.config)
    except ValueError as error:
        pytest.skip(f"fit refuses it: {error}")
    for number, take in enumerate(step.steps_to_come(1, done=0)):
        with Watch() if number else contextlib.nullcontext() as watch:  # the optimizer sets itself up in the first step
            take()
        assert not number or watch.found == []
    assert step.place.item() == 3
    assert step.trace[:, 4].tolist() == [32, 32, 6]


# --- it is what a plain loop does


def test_the_steps_are_those_of_a_plain_loop():
    options = {"learning_rate": 3e-3, "kl_warmup_epochs": 1.0, "clip_norm": 5.0, "ema_decay": 0.9, "batch_size": 32, "epochs": 2}
    ours, plain = small("bernoulli"), small("bernoulli")
    images = images_of(ours)
    history = vaelib.fit(ours, images, config=vaelib.TrainConfig(**options | QUIET))

    optimizer, noise = torch.optim.Adam(plain.parameters()), torch.Generator().manual_seed(0)
    averages, step, total = [p.detach().clone() for p in plain.parameters()], 0, 6
    for epoch in (1, 2):
        order, elbos = torch.randperm(70, generator=epoch_order(0, epoch)), []
        for rows in order.split(32):
            rate = 3e-3 * min(1, (step + 1) / max(1, 0.05 * total)) * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.param_groups[0]["lr"] = rate
            x = plain.likelihood.observe(images.pixels[rows], noise)
            terms = plain.elbo(x, eps=torch.randn(1, len(x), 4, generator=noise))
            optimizer.zero_grad()
            (min(1, (step + 1) / 3) * terms.kl - terms.log_likelihood).mean().backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 5.0)
            optimizer.step()
            step += 1
            decay = min(0.9, step / (9 + step))
            averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, plain.parameters(), strict=True)]
            elbos.append(terms.elbo.detach())
        assert history[epoch - 1]["train_elbo"] == pytest.approx(torch.cat(elbos).mean().item(), rel=1e-5)
    for mine, other in zip(ours.parameters(), averages, strict=True):
        torch.testing.assert_close(mine.detach(), other, rtol=1e-4, atol=1e-6)


# --- a graph of it: all but the recording, which only a GPU can do


class Stand:
    """Stands for a stream, a device, a graph: replay calls the function that was recorded."""

    recorded: ClassVar[list] = []

    def __init__(self, *_):
        self.function = None

    def wait_stream(self, _):
        pass

    def register_generator_state(self, generator):
        assert isinstance(generator, torch.Generator)

    def replay(self):
        self.function()


@pytest.fixture
def stood_for(monkeypatch):
    """The CPU in the place of a GPU: what is recorded is not computed, as in a real recording."""

    @contextlib.contextmanager
    def stream(_):
        yield

    def record(self):
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.owner.noise)
        graph.function = self.function
        Stand.recorded.append(self.function)
        self.graph = graph

    Stand.recorded = []
    monkeypatch.setattr(torch.cuda, "Stream", Stand)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Stand)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stand())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Replayed, "record", record)
    monkeypatch.setattr("vaelib.step.obstacle", lambda *_: None)


def run(name="bernoulli", folder=None, resume=False, **options):
    model = small(name)
    config = vaelib.TrainConfig(**{"batch_size": 20, "epochs": 5, "ema_decay": 0.9} | QUIET | options)
    history = vaelib.fit(model, images_of(model), images_of(model), config, folder, resume)
    return [parameter.detach() for parameter in model.parameters()], [{**row, "seconds": 0} for row in history], history


def test_replayed_steps_give_the_run_of_plain_ones(request, tmp_path):
    plain, rows, history = run()
    assert history.not_replayed == "the device is cpu"
    request.getfixturevalue("stood_for")
    replayed, same, history = run()
    assert history.not_replayed is None
    assert len(Stand.recorded) == 2  # one graph for full batches, one for the last
    assert same == rows
    assert all(map(torch.equal, plain, replayed))


def test_a_run_of_replayed_steps_resumes(stood_for, tmp_path):
    whole, rows, _ = run()
    vaelib_fit = {"folder": tmp_path / "run"}

    def stop(self, run, record, after=training.Store.after_epoch):
        after(self, run, record)
        if len(run.history) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Store, "after_epoch", stop)
        run(**vaelib_fit)
    resumed, same, _ = run(**vaelib_fit, resume=True)
    assert same == rows
    assert all(map(torch.equal, whole, resumed))


class Reads(vaelib.Bernoulli):
    """A likelihood that looks at its numbers."""

    def log_prob(self, x, params, validate=True):
        assert params.abs().max().item() < 1e9
        return super().log_prob(x, params, validate)


def test_a_model_that_reads_numbers_back_is_trained_by_plain_steps(stood_for):
    model = vaelib.mlp_vae((1, 28, 28), (16,), 4, Reads())
    history = vaelib.fit(model, images_of(model), config=vaelib.TrainConfig(batch_size=20, epochs=3, **QUIET))
    assert history.not_replayed == "_local_scalar_dense makes the host wait for the device"
    assert not Stand.recorded


def test_what_stands_against_a_graph_is_known_before_the_first_step():
    def found(group=None, resident=True, **options):
        taker = step_of(small("bernoulli"), **options)
        return obstacle(taker.config, torch.device("cuda"), group or Group(), resident, taker.optimizer)

    assert found() is None
    assert found(compile=True) is None
    assert found(cuda_graph=False) == "cuda_graph is False"
    assert "several processes" in found(Group(0, 2))
    assert "host" in found(resident=False)
    assert "reduce-overhead" in found(compile="reduce-overhead")
    assert "SGD" in found(optimizer="SGD", optimizer_options={"momentum": 0.9})


def test_a_recording_that_fails_leaves_the_numbers_as_they_were(monkeypatch):
    class Broken(Stand):
        pass

    @contextlib.contextmanager
    def graph(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    step = step_of(small("bernoulli"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    replayed, state = Replayed(lambda: None, step), step.noise.get_state()
    old = step.noise
    replayed.record()
    assert replayed.obstacle == "operation not permitted when stream is capturing"
    assert step.noise is not old
    assert torch.equal(step.noise.get_state(), state)


def test_tf32_is_switched_for_cuda_alone_and_switched_back():
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for device, wanted in (("cuda", True), ("cuda", False), ("cpu", None)):
        with contextlib.suppress(KeyError), float32_products(torch.device(device), bool(wanted)):
            assert [switch.allow_tf32 for switch in switches] == ([wanted] * 2 if wanted is not None else before)
            raise KeyError
        assert [switch.allow_tf32 for switch in switches] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_on_a_gpu_gives_the_run_of_plain_steps(name):
    def trained(cuda_graph, **options):
        model = small(name)
        config = vaelib.TrainConfig(
            batch_size=20, epochs=4, device="cuda", progress=False, ema_decay=0.9, cuda_graph=cuda_graph, **options
        )
        return vaelib.fit(model, images_of(model), images_of(model), config)

    plain, replayed = trained(False), trained(True)
    assert replayed.not_replayed is None
    for key in ("train_elbo", "valid_elbo"):
        assert replayed[key] == pytest.approx(plain[key], rel=2e-3)
