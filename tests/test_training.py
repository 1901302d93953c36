"""The trainer: what it maximizes, how it stops, what it keeps, what it refuses."""

import itertools
import json
import math
import shutil

import pytest
import torch

import vaelib
from vaelib import ElboTerms, History, TrainConfig, fit, heldout_elbo, image_set, mlp_vae, train_valid_split
from vaelib.distributed import Group
from vaelib.graphs import float32_products
from vaelib.step import TrainStep
from vaelib.training import OPTIMIZERS, choose_device, epoch_order, learning_rate_factor, make_optimizer

QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture
def split(digits):
    return train_valid_split(digits[:600], 100)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mlp_vae((1, 28, 28), (32,), 4)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_fit_raises_the_elbo_on_held_out_images(model, split):
    before = heldout_elbo(model, split[1]).elbo.mean().item()
    history = fit(model, *split, TrainConfig(epochs=8, batch_size=50, **QUIET))
    after = heldout_elbo(model, split[1]).elbo.mean().item()
    assert after > before + 200
    assert history[-1]["valid_elbo"] == pytest.approx(after)
    assert history["valid_elbo"][-1] > history["valid_elbo"][0]


def test_history_is_plain_data_with_both_terms(model, split):
    history = fit(model, *split, TrainConfig(epochs=2, batch_size=64, **QUIET))
    assert isinstance(history, History)
    assert json.loads(json.dumps(history)) == list(history)
    assert [epoch["epoch"] for epoch in history] == [1, 2] == history["epoch"]
    for epoch in history:
        for part in ("train", "valid"):
            assert epoch[f"{part}_elbo"] == pytest.approx(epoch[f"{part}_log_likelihood"] - epoch[f"{part}_kl"], rel=1e-5)
        assert epoch["seconds"] > 0
    assert history.stopped == "finished"
    assert history.device == "cpu"
    assert history.best_epoch == 2
    assert "valid_elbo" not in fit(model, split[0], config=TrainConfig(epochs=1, **QUIET))[0]


def test_the_training_elbo_counts_every_image_of_the_last_partial_batch(split):
    model = mlp_vae((1, 28, 28), (4,), 2)  # made to give an image's first pixel as log-likelihood, and 1 as KL
    model.elbo = lambda x, *args, **kwargs: ElboTerms(x[:, 0, 0, 0] + 0 * weights_of(model), torch.ones(len(x)))
    model.likelihood.observe = lambda pixels, generator=None: pixels.float()
    pixels = torch.zeros(103, 1, 28, 28, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(103)
    history = fit(model, image_set(pixels), config=TrainConfig(epochs=1, batch_size=25, **QUIET))
    assert history[0]["train_log_likelihood"] == pytest.approx(51)
    assert history[0]["train_kl"] == pytest.approx(1)


def weights_of(model):
    return sum(p.sum() for p in model.parameters())


def test_one_step_of_fit_is_one_step_of_gradient_descent_on_minus_the_elbo(model, digits):
    images = digits[:16]
    start = weights(model)
    reference = mlp_vae((1, 28, 28), (32,), 4)
    reference.load_state_dict(model.state_dict())
    config = TrainConfig(
        epochs=1,
        batch_size=16,
        optimizer="SGD",
        learning_rate=1e-4,
        schedule="constant",
        warmup=0,
        clip_norm=None,
        beta=2.0,
        **QUIET,
    )
    fit(model, images, config=config)
    generator = torch.Generator().manual_seed(0)
    pixels = next(vaelib.minibatches(images, 16, epoch_order(seed=0, epoch=1)))
    terms = reference.elbo(reference.likelihood.observe(pixels, generator), generator=generator)
    (terms.log_likelihood - 2 * terms.kl).mean().backward()  # ascent on the beta-ELBO
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 1e-4 * parameter.grad
    torch.testing.assert_close(weights(model), weights(reference))
    assert not torch.equal(weights(model), start)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(split):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (32,), 4)
        torch.manual_seed(len(results))  # the global generator plays no part
        fit(model, *split, TrainConfig(epochs=1, batch_size=64, seed=seed, **QUIET))
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_validation_does_not_change_what_is_learned(split):
    results = []
    for valid in (None, split[1]):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (32,), 4)
        fit(model, split[0], valid, TrainConfig(epochs=2, batch_size=64, **QUIET))
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_any_optimizer_of_torch_trains(name, split):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (8,), 2)
    if name == "Muon":  # takes matrices only: choose the parameters in a function of your own
        with pytest.raises(ValueError, match="optimizer_options"):
            fit(model, split[0], config=TrainConfig(epochs=1, optimizer=name, **QUIET))
        return
    rate = {"Adadelta": 1.0}.get(name, 1e-3)
    history = fit(model, split[0], config=TrainConfig(epochs=3, batch_size=50, optimizer=name, learning_rate=rate, **QUIET))
    assert history[-1]["train_elbo"] > history[0]["train_elbo"]


def test_the_optimizer_may_be_a_function_of_the_parameters(model, split):
    config = TrainConfig(epochs=1, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-5, momentum=0.9), **QUIET)
    assert len(fit(model, split[0], config=config)) == 1
    assert "lambda" in config.as_dict()["optimizer"]
    assert (
        make_optimizer(model, TrainConfig(optimizer="SGD", optimizer_options={"momentum": 0.5})).param_groups[0]["momentum"] == 0.5
    )


def test_an_optimizer_class_takes_the_settings_of_its_name(model):
    config = TrainConfig(optimizer=torch.optim.SGD, learning_rate=0.1, optimizer_options={"momentum": 0.9})
    group = make_optimizer(model, config).param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)
    assert make_optimizer(model, TrainConfig(optimizer_options={"foreach": True})).param_groups[0]["foreach"]


def test_learning_rate_warms_up_and_follows_its_schedule():
    factor = learning_rate_factor(TrainConfig(schedule="cosine", warmup=0.04), 100)
    assert [factor(step) for step in (0, 1)] == pytest.approx([0.25, 0.5], rel=1e-2)
    assert factor(50) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0, abs=1e-9)
    assert learning_rate_factor(TrainConfig(schedule="linear", warmup=0), 100)(25) == pytest.approx(0.75)
    assert learning_rate_factor(TrainConfig(schedule="constant"), 100)(99) == 1
    assert learning_rate_factor(TrainConfig(schedule=lambda progress: progress**2), 100)(50) == pytest.approx(0.25)


def test_kl_warm_up_raises_beta_linearly(model, split):
    history = fit(model, split[0], config=TrainConfig(epochs=4, batch_size=50, beta=2.0, kl_warmup_epochs=2, **QUIET))
    assert history["beta"] == pytest.approx([1.0, 2.0, 2.0, 2.0])
    plain = mlp_vae((1, 28, 28), (32,), 4)
    assert fit(plain, split[0], config=TrainConfig(epochs=1, **QUIET))["beta"] == [1.0]


def test_gradient_clipping_bounds_the_step(split):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (32,), 4)
    start = weights(model)
    config = TrainConfig(epochs=1, batch_size=500, optimizer="SGD", learning_rate=1.0, schedule="constant", clip_norm=0.1, **QUIET)
    fit(model, split[0], config=config)
    assert (weights(model) - start).norm().item() == pytest.approx(0.1, rel=1e-3)


def test_early_stop_puts_the_best_weights_back(monkeypatch, model, split):
    seen = []
    scores = iter([-500.0, -300.0, -400.0, -350.0, -100.0])

    def scripted(model, images, **kwargs):
        seen.append(weights(model))
        return ElboTerms(torch.full((len(images),), next(scores)), torch.zeros(len(images)))

    monkeypatch.setattr("vaelib.training.heldout_elbo", scripted)
    history = fit(model, *split, TrainConfig(epochs=5, batch_size=100, patience=2, **QUIET))
    assert history.stopped == "early stop"
    assert history.best_epoch == 2
    assert len(history) == 4
    assert torch.equal(weights(model), seen[1])


def test_ctrl_c_keeps_what_was_learned(monkeypatch, model, split):
    start = weights(model)
    observe, calls = model.likelihood.observe, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 15:  # in the second epoch of ten steps
            raise KeyboardInterrupt
        return observe(*args)

    monkeypatch.setattr(model.likelihood, "observe", interrupted)
    history = fit(model, split[0], config=TrainConfig(epochs=5, batch_size=50, **QUIET))
    assert history.stopped == "interrupted"
    assert len(history) == 1
    assert not torch.equal(weights(model), start)
    assert torch.isfinite(weights(model)).all()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(model, split):
    config = TrainConfig(epochs=3, batch_size=50, optimizer="SGD", learning_rate=1e4, schedule="constant", clip_norm=None, **QUIET)
    with pytest.raises(
        FloatingPointError, match="epoch 1, step 3: the training (log-likelihood|KL) is (nan|inf|-inf); try a lower learning_rate"
    ):
        fit(model, split[0], config=config)


def test_fit_leaves_the_mode_of_the_model_alone(model, split):
    for mode in (True, False):
        model.train(mode)
        model.decoder.eval()
        fit(model, *split, TrainConfig(epochs=1, **QUIET))
        assert model.training is mode
        assert not model.decoder.training


def test_the_progress_bar_shows_the_elbo(model, split, capsys):
    fit(model, *split, TrainConfig(epochs=1, batch_size=100, device="cpu"))
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "valid_elbo" in shown
    fit(model, *split, TrainConfig(epochs=1, **QUIET))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("arguments", "message"), [
    ({"epochs": 0}, "epochs: got int 0"),
    ({"batch_size": 0}, "batch_size: got int 0"),
    ({"batch_size": 12.5}, "batch_size: got float 12.5"),
    ({"learning_rate": 0}, "learning_rate: got int 0, expected a finite number above 0"),
    ({"learning_rate": math.nan}, "learning_rate: got float nan"),
    ({"beta": -1}, "beta: got int -1"),
    ({"optimizer": "Adm"}, "optimizer: got 'Adm'.*did you mean 'Adam'"),
    ({"optimizer": "LBFGS"}, "optimizer: got 'LBFGS'"),
    ({"schedule": "cosin"}, "schedule: got 'cosin'.*did you mean 'cosine'"),
    ({"clip_norm": 0}, "clip_norm: got int 0"),
    ({"patience": 0}, "patience: got int 0"),
    ({"kl_warmup_epochs": -1}, "kl_warmup_epochs: got int -1"),
    ({"warmup": -0.1}, "warmup: got float -0.1"),
    ({"num_samples": 0}, "num_samples: got int 0"),
    ({"seed": -1}, "seed: got int -1"),
        ({"flip": "no"}, "flip: got str 'no', expected True or False"),
        ({"compile": "faster"}, "compile: got 'faster', expected"),
        ({"compile": 1}, "compile: got int 1, expected True, False or a mode of torch.compile"),
        ({"optimizer_options": [1]}, r"optimizer_options: got list \[1\], expected a dict"),
        ({"precision": "fp16"}, "precision: got 'fp16'"),
        ({"ema_decay": 1.5}, "ema_decay: got 1.5, expected a decay, at most 1"),
        ({"skip_norm": 0}, "skip_norm: got int 0"),
        ({"checkpoint_epochs": 0}, "checkpoint_epochs: got int 0"),
        ({"seed": 2**63}, "seed: got 9223372036854775808, expected an integer below"),
        ({"warmup": 5.0}, "warmup: got 5.0, expected a share of the steps, at most 1"),
        ({"optimizer": lambda p: None, "optimizer_options": {"lr": 1}}, "optimizer_options: got options beside a function"),
])  # fmt: skip
def test_a_bad_configuration_is_refused_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**arguments)


def test_fit_refuses_what_does_not_fit(model, split):
    train, _ = split
    small = image_set(torch.zeros(300, 1, 8, 8, dtype=torch.uint8))
    cases = [
        ((small,), {}, r"images: got images of shape \(1, 8, 8\), expected \(1, 28, 28\)"),
        ((train, small), {}, r"valid: got images of shape \(1, 8, 8\)"),
        ((train.pixels.float(),), {}, "images: got a float32 tensor .*, expected pixels: a uint8 tensor"),
        ((["a.png"],), {}, "images: got list .*, expected an ImageSet, or a uint8 tensor"),
        ((train,), {"config": TrainConfig(batch_size=501)}, "batch_size: got 501, expected at most the 500 images"),
        ((train,), {"config": TrainConfig(patience=3)}, "patience: .*expected valid"),
        ((train,), {"config": {"epochs": 3}}, "config: got dict .*, expected a TrainConfig"),
        ((train,), {"config": TrainConfig(device="gpu")}, "device: got 'gpu'"),
        ((train,), {"config": TrainConfig(device=3.5)}, "device: got 3.5"),
        ((train,), {"config": TrainConfig(optimizer_options={"momentun": 1}, optimizer="SGD")}, "optimizer_options: got"),
    ]
    with pytest.raises(ValueError, match="model: got Linear, expected a VAE"):
        fit(torch.nn.Linear(2, 2), train)
    with pytest.raises(ValueError, match="model: got weights of torch.float64, expected torch.float32"):
        fit(mlp_vae((1, 28, 28), (4,), 2).double(), train)
    before = weights(model)
    for arguments, keywords, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(model, *arguments, **keywords)
    assert torch.equal(weights(model), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there, so asking for it is no mistake")
def test_cuda_asked_for_where_there_is_none_is_refused():
    with pytest.raises(ValueError, match="device: got 'cuda', but torch finds no such device here"):
        choose_device("cuda")
    assert choose_device("auto").type in ("cpu", "mps")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_fit_on_cuda_reaches_the_elbo_of_the_cpu(split):
    scores = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (32,), 4)
        fit(model, *split, TrainConfig(epochs=8, batch_size=50, progress=False, device=device))
        scores.append(heldout_elbo(model, split[1], num_samples=10).elbo.mean().item())
    assert scores[0] == pytest.approx(scores[1], abs=10)


FAST_WAYS = [{"precision": "bf16", "channels_last": True}, {"channels_last": True}, {"tf32": True}, {"compile": True}]


def first_losses(images, device, count=8, **options):
    """The loss per image of the first steps, from the same weights and with the same noise."""
    torch.manual_seed(0)
    model = vaelib.conv_vae(channels=(16, 32, 32)).to(device)
    config = TrainConfig(progress=False, device=str(device), **options)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    step = TrainStep(model.train(), images.to(device), config, Group(), torch.device(device), True)
    with float32_products(torch.device(device), config.tf32):
        for take in itertools.islice(step.steps_to_come(1, 0), count):
            take()
    return (step.trace[:count, 5] / step.trace[:count, 4]).tolist()


@pytest.mark.parametrize("options", FAST_WAYS[:2])
def test_each_fast_way_takes_the_first_steps_of_float32(options):
    images = vaelib.load_images("shapes")
    assert first_losses(images, "cpu", **options) == pytest.approx(first_losses(images, "cpu"), rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("options", FAST_WAYS)
def test_each_fast_way_on_cuda_takes_the_first_steps_of_float32(options):
    images = vaelib.load_images("shapes")
    assert first_losses(images, "cuda", **options) == pytest.approx(first_losses(images, "cuda"), rel=0.01)


def test_divergence_puts_the_weights_of_the_last_good_epoch_back(model, split):
    seen = []

    def explode_in_the_third_epoch(progress):
        if progress >= 2 / 5:
            return 1e30
        return 1.0

    def remember(model, images, **keywords):
        seen.append(weights(model))
        return heldout_elbo(model, images, **keywords)

    config = TrainConfig(epochs=5, batch_size=100, schedule=explode_in_the_third_epoch, warmup=0, optimizer="SGD",
                         learning_rate=1e-3, clip_norm=10.0, **QUIET)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vaelib.training.heldout_elbo", remember)
        with pytest.raises(FloatingPointError, match="epoch 3"):
            fit(model, *split, config)
    assert torch.isfinite(weights(model)).all()
    assert torch.equal(weights(model), seen[1])


def test_a_last_step_that_breaks_the_weights_is_noticed(model, split):
    config = TrainConfig(
        epochs=1, batch_size=500, optimizer="SGD", learning_rate=1e39, schedule="constant", warmup=0, clip_norm=None, **QUIET
    )
    with pytest.raises(FloatingPointError, match="epoch 1, the weight .* is not finite"):
        fit(model, split[0], config=config)


def test_unknown_and_absent_devices_are_refused():
    for device in ("meta", "xpu", "gpu", "cuda:99", "cpu:3"):
        with pytest.raises(ValueError, match="device: got"):
            choose_device(device)


def one_step(**changes):
    """Weights before and after one SGD step on 16 digits."""
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (32,), 4)
    start = weights(model)
    config = {"epochs": 1, "batch_size": 16, "optimizer": "SGD", "learning_rate": 1e-3, "schedule": "constant", "warmup": 0}
    history = fit(model, vaelib.load_images("digits")[:16], config=TrainConfig(**config | QUIET | changes))
    return start, weights(model), history


@pytest.mark.parametrize("options", [{}, {"foreach": True}])  # the fused optimizer skips in its kernel, the other is not called
def test_a_step_whose_gradient_is_too_large_is_left_out_and_counted(split, options):
    start, end, history = one_step(skip_norm=1e6, optimizer_options=options)
    assert history["skipped_steps"] == [0]
    assert not torch.equal(start, end)
    norm = history["gradient_norm"][0]
    with pytest.raises(FloatingPointError, match="epoch 2, the gradient's norm was above skip_norm in all 1 steps; try a larger"):
        one_step(epochs=2, skip_norm=0.99 * norm, optimizer_options=options)
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (32,), 4)
    config = {"epochs": 1, "batch_size": 50, "schedule": "constant", "skip_norm": 100.0, "optimizer_options": options, **QUIET}
    history = fit(model, split[0], config=TrainConfig(**config))
    assert 0 < history[0]["skipped_steps"] < 10
    assert history[0]["gradient_norm"] < 100  # of the steps that were taken


def infinite_gradient_at(elbo, step):
    """The same `elbo`, but at its `step`-th call the KL has an infinite gradient behind its finite value."""
    calls = []

    def once_infinite(*args, **kwargs):
        calls.append(1)
        terms = elbo(*args, **kwargs)
        return terms._replace(kl=terms.kl + 0 * (terms.kl.detach() - terms.kl).sqrt()) if len(calls) == step else terms

    return once_infinite


def test_an_infinite_gradient_behind_a_finite_loss_costs_one_step_and_no_weight(monkeypatch, model, split):
    monkeypatch.setattr(model, "elbo", infinite_gradient_at(model.elbo, 4))
    history = fit(model, split[0], config=TrainConfig(epochs=1, batch_size=50, **QUIET))
    assert history[0]["skipped_steps"] == 1
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "SGD", "SGD with momentum", "RMSprop"])
def test_each_optimizer_leaves_a_first_bad_step_out_as_if_it_had_not_been(monkeypatch, name, split):
    ends = []
    for fused in ({}, {"foreach": True}):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (32,), 4)
        monkeypatch.setattr(model, "elbo", infinite_gradient_at(model.elbo, 1))
        options = fused | ({"momentum": 0.9} if "momentum" in name else {})
        config = {"epochs": 1, "batch_size": 100, "optimizer": name.split()[0], "learning_rate": 1e-4, "optimizer_options": options}
        history = fit(model, split[0], config=TrainConfig(**config | QUIET))
        assert history["skipped_steps"] == [1]
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_a_run_of_one_step_epochs_survives_one_bad_step(monkeypatch, model, digits):
    monkeypatch.setattr(model, "elbo", infinite_gradient_at(model.elbo, 2))
    history = fit(model, digits[:50], config=TrainConfig(epochs=4, batch_size=50, **QUIET))
    assert history["skipped_steps"] == [0, 1, 0, 0]
    assert history["gradient_norm"][1] is None


@pytest.mark.parametrize("options", [{}, {"foreach": True}])
def test_a_clipped_step_is_the_whole_step_made_shorter(options):
    start, whole, history = one_step(clip_norm=None, optimizer_options=options)
    _, clipped, _ = one_step(clip_norm=history["gradient_norm"][0] / 10, optimizer_options=options)
    torch.testing.assert_close(clipped - start, (whole - start) / 10, rtol=1e-3, atol=1e-6)


def test_the_average_of_the_weights_is_what_is_validated_and_kept(split):
    results = {}
    for decay in (None, 0.0, 0.5):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (32,), 4)
        start = weights(model)
        steps = []
        likelihood_of = model.likelihood.observe
        model.likelihood.observe = lambda *args, model=model, of=likelihood_of, steps=steps, **kwargs: (
            steps.append(weights(model)) or of(*args, **kwargs)
        )
        config = TrainConfig(epochs=1, batch_size=250, ema_decay=decay, schedule="constant", **QUIET)
        history = fit(model, *split, config)
        del model.likelihood.observe
        assert history[0]["valid_elbo"] == pytest.approx(heldout_elbo(model, split[1]).elbo.mean().item(), rel=1e-6)
        results[decay] = start, steps, weights(model)
    _, _, plain = results[None]
    assert torch.equal(results[0.0][2], plain)
    start, (_, first, *_), end = results[0.5]
    by_hand = start.lerp(first, 1 - 1 / 10).lerp(plain, 1 - 2 / 11)  # the decay of step t is at most t / (9 + t)
    torch.testing.assert_close(end, by_hand)


def test_flips_mirror_about_half_of_the_images_and_change_nothing_else(monkeypatch, model, split):
    seen = []
    observe = model.likelihood.observe
    monkeypatch.setattr(model.likelihood, "observe", lambda pixels, noise: seen.append(pixels) or observe(pixels, noise))
    fit(model, split[0], config=TrainConfig(epochs=1, batch_size=100, flip=True, **QUIET))
    pixels = torch.cat(seen)
    order = torch.cat(list(vaelib.minibatches(split[0], 100, epoch_order(0, 1))))
    same, mirrored = ((pixels == other).flatten(1).all(1) for other in (order, order.flip(3)))
    assert (same | mirrored).all()
    assert 200 < mirrored.sum() < 300  # half of 500, and 4.5 standard errors


def test_free_bits_keep_units_alive_that_the_elbo_would_close(split):
    """With free bits each unit's KL ends near the threshold or above; without, a heavy KL weight closes them all."""
    kl = {}
    for free_bits in (0.0, 0.5):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (32,), 4)
        fit(model, split[0], config=TrainConfig(epochs=20, batch_size=50, beta=20.0, free_bits=free_bits, **QUIET))
        kl[free_bits] = vaelib.kl_per_unit(model, split[1])
    assert kl[0.0].max() < 0.3
    assert kl[0.5].min() > 0.4


def test_bf16_trains_as_well_as_float32_with_losses_in_float32(monkeypatch, split):
    scores, dtypes = {}, set()
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (32,), 4)
        elbo = model.elbo

        def watched(*args, of=elbo, **kwargs):
            terms = of(*args, **kwargs)
            dtypes.update(term.dtype for term in terms if term is not None)
            return terms

        monkeypatch.setattr(model, "elbo", watched)
        layers = set()
        handle = model.decoder.head.register_forward_hook(lambda layer, x, y, layers=layers: layers.add(y.dtype))
        fit(model, split[0], config=TrainConfig(epochs=8, batch_size=50, precision=precision, **QUIET))
        handle.remove()
        assert layers == {{"float32": torch.float32, "bf16": torch.bfloat16}[precision]}
        monkeypatch.undo()
        scores[precision] = heldout_elbo(model, split[1], num_samples=5).elbo.mean().item()
    assert dtypes == {torch.float32}
    assert scores["bf16"] == pytest.approx(scores["float32"], abs=3)


def test_the_history_goes_to_json_lines_and_to_tensorboard(model, split, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = fit(model, *split, TrainConfig(epochs=2, **QUIET), folder=tmp_path, tensorboard=True)
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == list(history)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(history[0])
    assert [event.value for event in events.Scalars("valid_elbo")] == pytest.approx(history["valid_elbo"])


def test_tensorboard_asked_for_where_it_is_not_installed_is_refused(monkeypatch, model, split, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard: the package is not installed; pip install tensorboard"):
        fit(model, split[0], config=TrainConfig(epochs=1, **QUIET), folder=tmp_path, tensorboard=True)
    with pytest.raises(ValueError, match="folder: got None, expected a folder to write TensorBoard"):
        fit(model, split[0], config=TrainConfig(epochs=1, **QUIET), tensorboard=True)


def test_no_number_leaves_the_device_within_an_epoch(monkeypatch, model, split):
    """The steps make no host sync: no item(), tolist(), bool() or copy to the CPU between the first batch and the last."""
    synced, inside = [], []
    observe = model.likelihood.observe
    monkeypatch.setattr(model.likelihood, "observe", lambda *args: inside.append(1) or observe(*args))
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def spy(tensor, *args, name=name, original=original):
            if 0 < len(inside) < 5:
                synced.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    fit(model, split[0], config=TrainConfig(epochs=1, batch_size=100, skip_norm=1e9, ema_decay=0.9, **QUIET))
    assert len(inside) == 5
    assert synced == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_takes_the_same_steps(split, monkeypatch):
    results, modes = [], []

    def noted(model, mode, of=torch.compile):
        modes.append(mode)
        return of(model) if mode is None else of(model, backend="eager")  # to make machine code once takes half a minute

    monkeypatch.setattr(torch, "compile", noted)
    import torch._inductor.config as inductor

    # neither a pool of processes nor a program for each of the processor's extensions, to see whether it has them
    monkeypatch.setattr(inductor, "compile_threads", 1)
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", False)
    for compiled in (False, True, "reduce-overhead"):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (16,), 2)
        fit(
            model,
            split[0],
            config=TrainConfig(epochs=1, batch_size=100, optimizer="SGD", learning_rate=1e-4, compile=compiled, **QUIET),
        )
        results.append(weights(model))
    assert modes == [None, "reduce-overhead"]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_where_no_gradient_can_be_is_refused_with_the_way_out(mode, model, split):
    start = weights(model)
    with (
        mode(),
        pytest.raises(ValueError, match=r"model: got it under torch.no_grad\(\) or torch.inference_mode\(\), expected a call"),
    ):
        fit(model, split[0], config=TrainConfig(epochs=1, **QUIET))
    with torch.inference_mode():
        made_there = mlp_vae((1, 28, 28), (8,), 2)
    with pytest.raises(
        ValueError, match=r"model: got one made under torch.inference_mode\(\), expected it to be made, or loaded, outside"
    ):
        fit(made_there, split[0], config=TrainConfig(epochs=1, **QUIET))
    with pytest.raises(ValueError, match=r"model: got weights that are all frozen, .* model.requires_grad_\(\) thaws all"):
        fit(model.requires_grad_(False), split[0], config=TrainConfig(epochs=1, **QUIET))
    assert torch.equal(weights(model), start)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_frozen_half_of_a_model_stays_as_it_is(part, model, split):
    frozen = getattr(model, part).requires_grad_(False)
    before, all_before = weights(frozen), weights(model)
    history = fit(model, *split, TrainConfig(epochs=2, batch_size=50, ema_decay=0.5, **QUIET))
    assert history[1]["valid_elbo"] > history[0]["valid_elbo"]
    assert torch.equal(weights(frozen), before)
    assert not torch.equal(weights(model), all_before)


def test_the_default_batch_is_the_whole_set_where_that_is_smaller(model, digits, tmp_path):
    history = fit(model, digits[:50], folder=tmp_path, config=TrainConfig(epochs=2, **QUIET))
    assert history.steps == 2
    assert fit(model, digits[:50], folder=tmp_path, config=TrainConfig(epochs=2, **QUIET), resume=True).steps == 0
    with pytest.raises(ValueError, match="batch_size: got 64, expected at most the 50 images of the set"):
        fit(model, digits[:50], config=TrainConfig(batch_size=64, **QUIET))


WILD = {"optimizer": "SGD", "learning_rate": 1e16, "schedule": "constant", "warmup": 0, "clip_norm": 1e-10}


def test_a_run_that_diverged_says_so_and_one_that_did_not_does_not(model, split, recwarn):
    assert fit(model, *split, TrainConfig(epochs=1, batch_size=50, **QUIET)).diverged is None
    torch.manual_seed(0)
    model, some = mlp_vae((1, 28, 28), (32,), 4), {"batch_size": 50, "schedule": "constant", "skip_norm": 100.0}
    history = fit(model, split[0], config=TrainConfig(epochs=1, **some | QUIET))
    assert history.diverged is None  # though half of the steps were left out
    assert not [warning for warning in recwarn if "diverged" in str(warning.message)]
    with pytest.warns(
        UserWarning, match=r"training diverged: after epoch 1 the ELBO is -\S+e\+\d+ nats per image.*; at the first step"
    ):
        history = fit(model, *split, TrainConfig(epochs=1, batch_size=50, **WILD | QUIET))
    assert history.diverged.startswith("after epoch 1")
    assert history[0]["valid_elbo"] < -1e6


def test_training_curves_of_no_epoch_are_refused_in_words():
    from vaelib.book.plotting import training_curves

    with pytest.raises(ValueError, match="history: got one without a finished epoch, expected at least one"):
        training_curves(History())
    with pytest.raises(ValueError, match="skip: got 1, expected less than the 1 epochs"):
        training_curves(History([{"epoch": 1, "train_elbo": 0.0, "train_log_likelihood": 0.0, "train_kl": 0.0}]), skip=1)
