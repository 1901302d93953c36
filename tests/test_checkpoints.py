"""Interrupted runs: a killed process goes on to the same bits; a checkpoint is whole or refused."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
import torch

import vaelib
from vaelib import VAE, MLPDecoder, MLPEncoder, TrainConfig, fit, image_set, mlp_vae, train_valid_split
from vaelib.checkpoints import FILE, load_checkpoint, read_checkpoint, write_checkpoint
from vaelib.storage import only_writer

# every part that has a state: optimizer, schedule, KL warm-up, average of the weights, flips, binarization, draws of z
CONFIG = {
    "epochs": 6, "batch_size": 32, "kl_warmup_epochs": 2, "ema_decay": 0.99, "flip": True, "free_bits": 0.01, "skip_norm": 1e4,
    "checkpoint_epochs": 2, "checkpoint_minutes": 0.0, "progress": False, "device": "cpu",
}  # fmt: skip


def new_model():
    torch.manual_seed(0)
    return mlp_vae((1, 28, 28), (32,), 4)


def new_sets():
    return train_valid_split(vaelib.load_images("digits")[:500], 100)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(folder, started):
    """What the killed process does: start or go on, and save the weights at the end."""
    torch.set_num_threads(1)
    model, (images, valid) = new_model(), new_sets()
    started.set()
    fit(model, images, valid, TrainConfig(**CONFIG), folder=folder, resume=True)
    vaelib.save(model, folder / "model")


@pytest.fixture(scope="module")
def uninterrupted():
    model = new_model()
    return fit(model, *new_sets(), TrainConfig(**CONFIG)), weights(model)


def test_a_run_killed_twenty_times_ends_with_the_weights_of_one_never_interrupted(tmp_path, uninterrupted):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vaelib", "vaelib.training", "sklearn.datasets", "torch._dynamo", "torch.optim"])
    chance, kills, run = random.Random(0), 0, 0
    stepped = []
    while kills < 20 or not (tmp_path / str(run) / "model" / "config.json").exists():
        if (tmp_path / str(run) / "model" / "config.json").exists():
            run += 1  # finished before the twentieth kill: begin another
        folder = tmp_path / str(run)
        folder.mkdir(exist_ok=True)
        started = context.Event()
        process = context.Process(target=train, args=(folder, started))
        process.start()
        assert started.wait(60)
        if kills < 20:
            process.join(chance.uniform(0.0, 0.25))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
                if (folder / FILE).exists():
                    stepped.append(read_checkpoint(folder, {})["step"])
        else:
            process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
    assert any(step % 13 for step in stepped)  # some kills fell amid an epoch of 13 steps
    history, expected = uninterrupted
    for done in range(run + 1):
        model = vaelib.load(tmp_path / str(done) / "model")
        assert torch.equal(weights(model), expected)
        lines = [json.loads(line) for line in (tmp_path / str(done) / "history.jsonl").read_text().splitlines()]
        assert [without_time(line) for line in lines] == [without_time(epoch) for epoch in history]


def without_time(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def stopped_at(step, folder, monkeypatch, model=None, valid=None, **changes):
    """A run that is cut off (as if by a crash) when it asks for its batch after `step` steps."""
    model, (images, _) = model or new_model(), new_sets()
    observe, calls = model.likelihood.observe, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) > step:
            raise RuntimeError("crash")
        return observe(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.likelihood, "observe", crash)
        with pytest.raises(RuntimeError, match="crash"):
            fit(model, images, valid, TrainConfig(**CONFIG | changes), folder=folder)


def own_model():
    torch.manual_seed(0)
    parts = MLPEncoder((1, 28, 28), (8,), 3), MLPDecoder(3, (8,), (1, 28, 28))
    return VAE(*parts, vaelib.Bernoulli(), (1, 28, 28), 3)  # without a config


def gaussian_model():
    torch.manual_seed(0)
    return mlp_vae((1, 28, 28), (8,), 3, {"name": "gaussian", "learned": True})


@pytest.mark.parametrize(("make", "changes"), [
    (new_model, {"patience": 1, "learning_rate": 0.05}),  # the best weights lie in the checkpoint too
    (new_model, {"patience": 2, "ema_decay": None}),
    (new_model, {"optimizer": "RAdam"}),
    (new_model, {"optimizer": "SGD", "learning_rate": 1e-4, "optimizer_options": {"momentum": 0.9}}),
    (new_model, {"optimizer": "Rprop", "learning_rate": np.float64(1e-3), "optimizer_options": {"etas": (np.float64(0.5), 1.2)}}),
    (new_model, {"precision": "bf16"}),
    (gaussian_model, {}),
    (own_model, {}),
])  # fmt: skip
def test_each_kind_of_run_resumes_to_the_same_bits(tmp_path, monkeypatch, make, changes):
    images, valid = new_sets()
    whole, resumed = make(), make()
    history = fit(whole, images, valid, TrainConfig(**CONFIG | changes))
    cut = min(19, 13 * len(history) - 1)
    stopped_at(cut, tmp_path, monkeypatch, make(), valid, **changes)
    step = read_checkpoint(tmp_path, {})["step"]
    assert step % 13 > 0
    again = fit(resumed, images, valid, TrainConfig(**CONFIG | changes), folder=tmp_path, resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert (again.stopped, again.best_epoch) == (history.stopped, history.best_epoch)
    assert again.steps == 13 * len(history) - step
    assert [without_time(epoch) for epoch in again] == [without_time(epoch) for epoch in history]


def test_resume_goes_on_amid_an_epoch_and_takes_no_step_twice(tmp_path, monkeypatch):
    stopped_at(20, tmp_path, monkeypatch)
    assert read_checkpoint(tmp_path, {})["step"] == 20
    model, (images, _) = new_model(), new_sets()
    observe, calls = model.likelihood.observe, []
    monkeypatch.setattr(model.likelihood, "observe", lambda *args: calls.append(1) or observe(*args))
    history = fit(model, images, None, TrainConfig(**CONFIG), folder=tmp_path, resume=True)
    assert len(calls) == 6 * 13 - 20
    assert history["epoch"] == [1, 2, 3, 4, 5, 6]
    again = fit(new_model(), images, None, TrainConfig(**CONFIG), folder=tmp_path, resume=True)
    assert list(again) == list(history)  # nothing is left to do


@pytest.mark.parametrize("resume", [False, True])
def test_a_history_that_is_not_of_a_run_is_not_written_over(tmp_path, resume):
    (tmp_path / "history.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="folder: .* already holds a history.jsonl, and no checkpoint"):
        fit(new_model(), new_sets()[0], None, TrainConfig(**CONFIG), folder=tmp_path, resume=resume)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("history.jsonl", "mine")]


def test_resume_starts_where_there_is_no_checkpoint_and_without_it_an_old_one_is_not_overwritten(tmp_path):
    images, _ = new_sets()
    config = TrainConfig(epochs=1, progress=False, device="cpu")
    assert len(fit(new_model(), images, config=config, folder=tmp_path / "new", resume=True)) == 1
    before = (tmp_path / "new" / FILE).read_bytes()
    with pytest.raises(ValueError, match="folder: .*already holds a checkpoint, expected another folder, or resume=True"):
        fit(new_model(), images, config=config, folder=tmp_path / "new")
    assert (tmp_path / "new" / FILE).read_bytes() == before
    with pytest.raises(ValueError, match="folder: got None, expected a folder to resume from"):
        fit(new_model(), images, config=config, resume=True)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, monkeypatch):
    stopped_at(5, tmp_path, monkeypatch)
    images, valid = new_sets()
    config = TrainConfig(**CONFIG)
    other = mlp_vae((1, 28, 28), (16,), 4)
    cases = [
        ((other, images, None, config), r"its model.hidden_dims is \[32\], expected \[16\]"),
        ((new_model(), images[:300], None, config), r"its images is 'digits \(400, 1, 28, 28\)"),
        ((new_model(), image_set(255 - images.pixels), None, config), "its images is 'digits"),
        ((new_model(), images, valid, config), "its valid is None"),
        ((own_model(), images, None, config), "its model is "),
        ((new_model(), images, None, TrainConfig(**CONFIG | {"channels_last": True})), "its config.channels_last is False"),
        (
            (new_model(), images, None, TrainConfig(**CONFIG | {"learning_rate": 1e-3})),
            "its config.learning_rate is 0.005, expected 0.001",
        ),
    ]
    before = (tmp_path / FILE).read_bytes()
    for arguments, message in cases:
        start = weights(arguments[0])
        with pytest.raises(ValueError, match=f"resume: .* belongs to another run: {message}"):
            fit(*arguments, folder=tmp_path, resume=True)
        assert torch.equal(weights(arguments[0]), start)
    assert (tmp_path / FILE).read_bytes() == before
    free = TrainConfig(**CONFIG | {"checkpoint_epochs": 1, "checkpoint_minutes": None})  # what changes no result may change
    assert len(fit(new_model(), images, None, free, folder=tmp_path, resume=True)) == 6


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "code", "tensor"])
def test_a_broken_checkpoint_is_refused_and_runs_no_code(tmp_path, monkeypatch, damage):
    stopped_at(5, tmp_path, monkeypatch)
    path = tmp_path / FILE
    content = path.read_bytes()
    if damage == "tensor":
        torch.save(torch.ones(3), path)
    elif damage == "code":
        torch.save({"version": 1, "model": Exploit(tmp_path / "ran")}, path)
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "other": b"no checkpoint at all"}[damage])
    with pytest.raises(ValueError, match="resume: .* is truncated or no checkpoint of vaelib"):
        fit(new_model(), new_sets()[0], None, TrainConfig(**CONFIG), folder=tmp_path, resume=True)
    assert not (tmp_path / "ran").exists()


class Exploit:
    """Pickled, it asks the reader to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def fill_the_disk(folder, answers):
    """In a process whose files may not grow beyond 20 kB, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write_checkpoint(folder, {"weights": torch.zeros(100_000)})
    except ValueError as error:
        answers.put(str(error))


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint_whole(tmp_path):
    write_checkpoint(tmp_path, {"weights": torch.ones(10), "step": 7})
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    process = context.Process(target=fill_the_disk, args=(tmp_path, answers))
    process.start()
    message = answers.get(timeout=60)
    process.join()
    assert "could not write" in message
    assert "the checkpoint before it is kept" in message
    assert read_checkpoint(tmp_path, {})["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def turning_nan(elbo, step):
    """The same `elbo`, but for a KL of NaN at its `step`-th call."""
    calls = []

    def turns_nan(*args, **kwargs):
        calls.append(1)
        terms = elbo(*args, **kwargs)
        return terms._replace(kl=terms.kl * float("nan")) if len(calls) == step else terms

    return turns_nan


def test_a_loss_that_turns_nan_names_step_and_term_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    images, _ = new_sets()
    model = new_model()
    monkeypatch.setattr(model, "elbo", turning_nan(model.elbo, 13 + 6))  # in the second epoch's sixth step

    config = TrainConfig(epochs=3, batch_size=32, progress=False, device="cpu")
    with pytest.raises(FloatingPointError, match="epoch 2, step 6: the training KL is nan"):
        fit(model, images, None, config, folder=tmp_path)
    state = read_checkpoint(tmp_path, {})
    assert state["step"] == 13
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["weights"][name])
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1


def test_a_checkpoint_amid_an_epoch_is_never_one_of_a_broken_loss(tmp_path, monkeypatch):
    images, _ = new_sets()
    model = new_model()
    monkeypatch.setattr(model, "elbo", turning_nan(model.elbo, 13 + 6))

    with pytest.raises(FloatingPointError, match="epoch 2, step 6"):
        fit(model, images, None, TrainConfig(**CONFIG | {"free_bits": 0.0}), folder=tmp_path)  # a checkpoint at each step
    assert read_checkpoint(tmp_path, {})["step"] == 13 + 5


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_ctrl_c_waits_for_the_step_and_leaves_a_checkpoint_of_it(tmp_path, monkeypatch):
    images, valid = new_sets()
    config = TrainConfig(**CONFIG | {"checkpoint_minutes": None})
    whole, model = new_model(), new_model()
    fit(whole, images, valid, config)
    observe, calls = model.likelihood.observe, []

    def press(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        return observe(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.likelihood, "observe", press)
        history = fit(model, images, valid, config, folder=tmp_path)
    assert history.stopped == "interrupted"
    assert history.steps == len(calls) == read_checkpoint(tmp_path, {})["step"] == 9
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    fit(model, images, valid, config, folder=tmp_path, resume=True)
    assert torch.equal(weights(model), weights(whole))


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model, (images, _) = new_model(), new_sets()
        observe = model.likelihood.observe
        monkeypatch.setattr(model.likelihood, "observe", lambda *args: signal.raise_signal(signal.SIGINT) or observe(*args))
        history = fit(model, images, config=TrainConfig(epochs=1, progress=False, device="cpu"))
        assert history.stopped == "finished"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_early_stop_leaves_a_checkpoint_of_its_end(tmp_path):
    images, valid = new_sets()
    config = TrainConfig(
        **CONFIG | {"epochs": 30, "patience": 1, "learning_rate": 0.05, "checkpoint_epochs": 50, "checkpoint_minutes": None}
    )
    history = fit(new_model(), images, valid, config, folder=tmp_path)
    assert history.stopped == "early stop"
    again = fit(new_model(), images, valid, config, folder=tmp_path, resume=True)
    assert (again.stopped, again.steps, len(again)) == ("early stop", 0, len(history))


def test_checkpoints_come_after_the_epochs_and_minutes_asked_for(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("vaelib.training.write_checkpoint", lambda folder, state: written.append(state["step"]))
    images, _ = new_sets()
    for changes in ({"checkpoint_epochs": 4, "checkpoint_minutes": None}, {"checkpoint_epochs": 6, "checkpoint_minutes": 1.0}):
        start = time.perf_counter()
        if changes["checkpoint_minutes"]:
            clock = iter(start + 30.0 * i for i in range(10**6))  # each look at the clock finds it half a minute later
            monkeypatch.setattr("vaelib.training.time.perf_counter", lambda clock=clock: next(clock))
        fit(new_model(), images, None, TrainConfig(**CONFIG | changes), folder=tmp_path / str(changes["checkpoint_epochs"]))
    assert written[:3] == [0, 4 * 13, 6 * 13]
    assert len(written[3:]) > 30


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("minutes", [None, 0.0])
def test_a_second_ctrl_c_amid_a_step_leaves_the_last_checkpoint_of_a_whole_step(tmp_path, monkeypatch, minutes):
    images, valid = new_sets()
    config = TrainConfig(**CONFIG | {"checkpoint_minutes": minutes})
    whole, model = new_model(), new_model()
    fit(whole, images, valid, config)
    observe, calls = model.likelihood.observe, []

    def press_twice(*args, **kwargs):
        calls.append(1)
        x = observe(*args, **kwargs)  # it has drawn from the noise of the run: the step has begun
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return x

    with monkeypatch.context() as patch:
        patch.setattr(model.likelihood, "observe", press_twice)
        history = fit(model, images, valid, config, folder=tmp_path)
    assert history.stopped == "interrupted"
    assert read_checkpoint(tmp_path, {})["step"] == (0 if minutes is None else 8)
    fit(model, images, valid, config, folder=tmp_path, resume=True)
    assert torch.equal(weights(model), weights(whole))


def hold(folder, held):
    """What another process does: it writes to the folder until it is killed."""
    with only_writer("folder", folder):
        held.set()
        time.sleep(600)


def test_a_folder_has_one_writer_and_a_killed_one_lets_it_go(tmp_path):
    context = multiprocessing.get_context("forkserver")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(120)
    config = TrainConfig(epochs=1, progress=False, device="cpu")
    try:
        with pytest.raises(ValueError, match="folder: another process is writing to .*, expected another folder"):
            fit(new_model(), new_sets()[0], config=config, folder=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert len(fit(new_model(), new_sets()[0], config=config, folder=tmp_path)) == 1
    with only_writer("folder", tmp_path), only_writer("folder", os.path.relpath(tmp_path)):  # its own process may again
        assert (tmp_path / ".lock").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "history.jsonl"]


@pytest.mark.parametrize("lost", ["weights", "optimizer", "noise", "history", "trace"])
def test_a_checkpoint_that_lacks_a_part_is_refused_and_the_part_is_named(tmp_path, monkeypatch, lost):
    stopped_at(5, tmp_path, monkeypatch)
    state = read_checkpoint(tmp_path, {})
    write_checkpoint(tmp_path, {name: value for name, value in state.items() if name != lost})
    with pytest.raises(ValueError, match=f"resume: got a checkpoint without {lost}, expected a whole one"):
        fit(new_model(), new_sets()[0], None, TrainConfig(**CONFIG), folder=tmp_path, resume=True)
    write_checkpoint(tmp_path, state | {lost: 3})
    with pytest.raises(ValueError, match="resume: .*(parts do not fit this run|no checkpoint of vaelib .its .* is int 3)"):
        fit(new_model(), new_sets()[0], None, TrainConfig(**CONFIG), folder=tmp_path, resume=True)


def test_the_model_of_a_checkpoint_is_the_one_that_the_run_would_have_ended_on(tmp_path, monkeypatch):
    stopped_at(20, tmp_path / "averaged", monkeypatch)
    model, state = load_checkpoint(tmp_path / "averaged")
    assert torch.equal(weights(model), torch.cat([average.flatten() for average in state["averages"]]))
    assert not torch.equal(weights(model), torch.cat([value.flatten() for value in state["weights"].values()]))
    assert not model.training
    images, valid = new_sets()
    fit(
        trained := new_model(),
        images,
        valid,
        TrainConfig(**CONFIG | {"patience": 1, "learning_rate": 0.05}),
        folder=tmp_path / "best",
    )
    assert torch.equal(weights(load_checkpoint(tmp_path / "best")[0]), weights(trained))
    fit(plain := new_model(), images, None, TrainConfig(**CONFIG | {"ema_decay": None}), folder=tmp_path / "plain")
    assert torch.equal(weights(load_checkpoint(tmp_path / "plain")[0]), weights(plain))
    stopped_at(5, tmp_path / "own", monkeypatch, own_model())
    with pytest.raises(ValueError, match="path: .*checkpoint.pt does not hold the weights of a model that vaelib builds"):
        load_checkpoint(tmp_path / "own")
    with pytest.raises(ValueError, match="it has no config.json .but the checkpoint.pt of a run that was cut off"):
        vaelib.load(tmp_path / "averaged")
