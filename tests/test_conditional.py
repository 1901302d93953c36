"""The conditional VAE: each label has its own VAE, and every image meets its own label, in training and in judgement."""

import json
import math
import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vaelib
from vaelib import TrainConfig, evaluate, fit, generate, heldout_elbo, image_set, log_likelihood, mlp_vae, train_valid_split
from vaelib.book.plotting import tile
from vaelib.checkpoints import read_checkpoint
from vaelib.conditional import ConditionalVAE, WithLabels, conditional_vae
from vaelib.distributed import leave

QUIET = {"progress": False, "device": "cpu"}
TRAIN = TrainConfig(epochs=20, batch_size=50, **QUIET)


def new_model():
    torch.manual_seed(0)
    return conditional_vae((1, 28, 28), 10, (32,), 4)


@pytest.fixture
def model():
    """Untrained, with weights large enough that the posterior depends on the image, and posterior and pixels on the label."""
    model = new_model()
    with torch.no_grad():
        model.encoder.network.head.weight.mul_(4)
        for part in (model.encoder, model.decoder):
            part.network.hidden[0].weight[:, -10:].mul_(10)
    return model


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = conditional_vae((1, 28, 28), 10, (64,), 6)
    fit(model, digits, config=TRAIN)
    return model


@pytest.fixture(scope="module")
def test_set():
    return vaelib.load_images("digits", "test")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(model, x, labels, eps):
    """Log-likelihood (K, N), KL (N,) and q, written out with the one-hot label behind x and behind z."""
    encoder, decoder = model.encoder.network, model.decoder.network
    one_hot = F.one_hot(labels, 10).float()
    hidden = torch.relu(encoder.hidden[0](torch.cat([x.flatten(1), one_hot], 1)))
    mean, log_var = encoder.head(hidden).chunk(2, dim=1)
    scores = []
    for noise in eps:
        z = mean + (log_var / 2).exp() * noise
        logits = decoder.head(torch.relu(decoder.hidden[0](torch.cat([z, one_hot], 1)))).view_as(x)
        scores.append(-F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1))
    q, p = torch.distributions.Normal(mean, (log_var / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    return torch.stack(scores), torch.distributions.kl_divergence(q, p).sum(1), q


def test_the_elbo_given_labels_is_that_of_networks_that_see_the_one_hot_label(model, digits, generator):
    x, labels = model.likelihood.observe(digits.pixels[:6], generator), digits.labels[:6]
    eps = torch.randn(3, 6, 4, generator=generator)
    score, kl, q = by_hand(model, x, labels, eps)
    bound = model.given(labels)
    terms = bound.elbo(x, 3, eps)
    torch.testing.assert_close(terms.log_likelihood, score.mean(0))
    torch.testing.assert_close(terms.kl, kl)
    torch.testing.assert_close(model(x, eps, labels=labels).elbo, terms.elbo)
    torch.testing.assert_close(bound.encode(x).mean, q.mean)
    z = q.mean + q.stddev * eps
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(2)
    torch.testing.assert_close(bound.log_weights(x, 3, eps), score + prior - q.log_prob(z).sum(2))
    others = model.given((labels + 1) % 10).elbo(x, 3, eps)
    assert ((others.log_likelihood - terms.log_likelihood).abs() > 0.1).all()
    assert ((others.kl - terms.kl).abs() > 0.01).all()


def test_the_estimate_of_log_p_x_given_y_agrees_with_the_integral_over_z(digits):
    torch.manual_seed(0)
    model = conditional_vae((1, 28, 28), 10, (16,), 1)
    with torch.no_grad():
        model.decoder.network.head.weight.mul_(2)
    images = digits[:4]
    x = model.likelihood.observe(torch.where(images.pixels < 128, 0, 255).to(torch.uint8))  # black or white: nothing is drawn
    binary = image_set(torch.where(images.pixels < 128, 0, 255).to(torch.uint8), images.labels)
    z = torch.linspace(-8, 8, 4001)[:, None]
    exact = []
    with torch.no_grad():
        for image, label in zip(x, images.labels, strict=True):
            score = model.likelihood.log_prob(image.expand(4001, -1, -1, -1), model.given(int(label)).decode(z))
            log_joint = score + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
            exact.append(torch.logsumexp(log_joint, 0) + math.log(16 / 4000))
    estimate = log_likelihood(model, binary, 20_000, sample_batch=20_000)
    torch.testing.assert_close(estimate, torch.stack(exact), rtol=0, atol=0.1)
    assert (log_likelihood(model, image_set(binary.pixels, (binary.labels + 1) % 10), 100) - estimate).abs().min() > 0.2


def test_given_shares_the_weights_and_leaves_the_model_unbound(model, digits):
    x = model.likelihood.observe(digits.pixels[:5])
    bound = model.given(3)
    bound.elbo(x).elbo.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [id(p) for p in bound.parameters()] == [id(p) for p in model.parameters()]
    bound.likelihood = vaelib.Gaussian()
    bound.eval()
    assert model.likelihood.config["name"] == "bernoulli"  # it is another object
    assert not any(module.training for network in (model.encoder, model.decoder) for module in network.modules())
    model.train()
    assert all(module.training for module in bound.modules() if isinstance(module, torch.nn.Linear))
    assert model.config["num_classes"] == 10
    with pytest.raises(ValueError, match="model: got a VAE without a config"):
        vaelib.save(bound, "never-written")  # it would come back without its label


def test_one_label_holds_for_all_images_and_labels_repeat_over_the_draws(model, digits, generator):
    x = model.likelihood.observe(digits.pixels[:3], generator)
    z = torch.randn(6, 4, generator=generator)
    fours = torch.full((3,), 4)
    for single in (4, torch.tensor([4])):
        assert torch.equal(model.given(single).encode(x).mean, model.given(fours).encode(x).mean)
        assert torch.equal(model.given(single).decode(z), model.given(fours).decode(z))
    labels = torch.tensor([7, 0, 2])
    each = torch.cat([model.given(label).decode(code[None]) for label, code in zip([7, 0, 2, 7, 0, 2], z, strict=True)])
    torch.testing.assert_close(model.given(labels).decode(z), each)
    assert not torch.allclose(model.given(7).decode(z), model.given(0).decode(z))


def test_what_is_written_for_a_vae_holds_for_a_bound_one(trained, digits):
    images = digits[:20]
    bound = trained.given(images.labels)
    x = vaelib.likelihoods.Bernoulli("threshold").observe(images.pixels)
    sharp = vaelib.reconstruct(bound, (255 * x).to(torch.uint8))
    with torch.no_grad():
        expected = bound.likelihood.to_pixels(bound.likelihood.mean(bound.decode(bound.encode(x).mean)))
    assert torch.equal(sharp, expected)
    assert generate(trained.given(3), 5, seed=0).shape == (5, 1, 28, 28)
    assert torch.equal(generate(trained.given(torch.tensor([3, 8])), 4, seed=0)[::2], generate(trained.given(3), 4, seed=0)[::2])
    ends = vaelib.interpolate(trained.given(3), images.pixels[3], images.pixels[13], steps=4)
    assert torch.equal(ends[:1], vaelib.reconstruct(trained.given(3), images.pixels[3:4]))


def test_evaluation_gives_each_image_its_label_whatever_the_batch_size_and_the_order(model, digits):
    images = digits[:103]
    order = torch.randperm(103, generator=torch.Generator().manual_seed(1))
    whole = heldout_elbo(model, images, num_samples=2, batch_size=103).elbo
    for batch_size in (1, 10, 1000):
        torch.testing.assert_close(heldout_elbo(model, images, 2, batch_size).elbo, whole, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(heldout_elbo(model, images[order], 2, 30).elbo, whole[order], rtol=1e-5, atol=1e-3)
    by_class = torch.empty(103)
    for label in range(10):
        mask = images.labels == label
        by_class[mask] = heldout_elbo(model.given(label), images.pixels[mask], 2).elbo
    torch.testing.assert_close(by_class, whole, rtol=1e-5, atol=1e-3)

    estimate = log_likelihood(model, images, 20, batch_size=103, sample_batch=20)
    torch.testing.assert_close(log_likelihood(model, images[order], 20, 10, 7), estimate[order], rtol=1e-5, atol=1e-3)
    means = vaelib.posterior_means(model, images)
    torch.testing.assert_close(vaelib.posterior_means(model, images, batch_size=7), means)
    torch.testing.assert_close(vaelib.posterior_means(model.given(images.labels), images.pixels), means)
    assert vaelib.active_units(model, images, batch_size=7).tolist() == (means.var(0) > 0.01).tolist()
    result = evaluate(model, images, num_samples=20, elbo_samples=2)
    assert result.elbo == pytest.approx(whole.mean().item(), abs=1e-3)
    assert result.log_likelihood == pytest.approx(estimate.mean().item(), abs=1e-3)
    one_sample = evaluate(model, images, elbo_samples=1).kl
    assert vaelib.kl_per_unit(model, images, batch_size=7).sum().item() == pytest.approx(one_sample, rel=1e-5)


def test_without_labels_there_is_a_clear_error(model, digits):
    x = model.likelihood.observe(digits.pixels[:2])
    for call in (
        lambda: model.encode(x),
        lambda: model.decode(torch.zeros(2, 4)),
        lambda: model.elbo(x),
        lambda: model(x),
        lambda: heldout_elbo(model, digits.pixels[:2]),
        lambda: log_likelihood(model, digits.pixels[:2], 5),
        lambda: vaelib.posterior_means(model, digits.pixels[:2]),
        lambda: vaelib.kl_per_unit(model, digits.pixels[:2]),
        lambda: generate(model, 2),
        lambda: vaelib.reconstruct(model, digits.pixels[:2]),
    ):
        with pytest.raises(ValueError, match=r"^model: got a conditional VAE, expected model.given\(labels\), or an ImageSet"):
            call()


@pytest.mark.parametrize(("labels", "message"), [
    (-1, "got -1, expected labels from 0 to 9"),
    (10, "got 10, expected labels from 0 to 9"),
    (10**30, "got 10+, expected labels from 0 to 9"),
    (torch.tensor([0, 10, 3]), "got 10, expected labels from 0 to 9"),
    (torch.tensor([0, -2, 3]), "got -2, expected labels from 0 to 9"),
    (True, "got bool True, expected an integer or an int64 tensor"),
    (2.0, "got float 2.0, expected an integer or an int64 tensor"),
    ([1, 2], "got list"),
    (torch.tensor([1.0, 2.0]), r"got a float32 tensor of shape \(2,\), expected an integer or an int64 tensor of shape \(N,\)"),
    (torch.tensor([1, 2], dtype=torch.int32), "got a int32 tensor"),
    (torch.tensor([[1, 2]]), r"got a int64 tensor of shape \(1, 2\)"),
    (torch.tensor([], dtype=torch.int64), r"got a int64 tensor of shape \(0,\)"),
])  # fmt: skip
def test_labels_that_the_model_does_not_know_are_refused(model, labels, message):
    with pytest.raises(ValueError, match=f"^labels: {message}"):
        model.given(labels)


def test_labels_of_another_number_than_the_images_are_refused(model, digits):
    x = model.likelihood.observe(digits.pixels[:4])
    bound = model.given(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="^labels: got 2 labels for 4 images, expected one label, or one for each image"):
        bound.encode(x)  # not even a multiple: which image would have which label?
    with pytest.raises(ValueError, match="^labels: got 2 labels for 5 codes"):
        bound.decode(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="^labels: got 2 labels for 1 images"):
        bound.elbo(x[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes: got int 1, expected an integer of at least 2"),
        ({"num_classes": 2.0}, "num_classes: got float 2.0"),
        ({"hidden_dims": 400}, "hidden_dims: got int 400, expected a sequence"),
        ({"hidden_dims": (0,)}, "hidden_dims: got int 0"),
        ({"latent_dim": 0}, "latent_dim: got int 0"),
        ({"latent_dim": (2, 4, 4)}, "latent_dim: got tuple"),
        ({"image_shape": (28, 28)}, "image_shape: got tuple"),
        ({"likelihood": "bernouilli"}, "did you mean 'bernoulli'"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
    ],
)
def test_conditional_vae_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        conditional_vae(**{"image_shape": (1, 28, 28), "num_classes": 10} | arguments)


def test_conditional_vae_builds_the_layers_it_names():
    model = conditional_vae((3, 4, 5), 3, (8, 6), 2, "gaussian", "tanh")
    linear = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert linear == [(63, 8), (8, 6), (6, 4), (5, 6), (6, 8), (8, 60)]
    assert sum(isinstance(m, torch.nn.Tanh) for m in model.modules()) == 4
    assert (model.image_shape, model.latent_dim, model.num_classes) == ((3, 4, 5), 2, 3)


def test_a_conditional_vae_of_ones_own_networks_is_trained_and_judged(digits):
    class Tiles(torch.nn.Module):
        """A convolution that sees the label as constant maps beside the image."""

        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(11, 2, 7, stride=7), torch.nn.Linear(32, 6)

        def forward(self, x, one_hot):
            maps = one_hot[:, :, None, None].expand(-1, -1, 28, 28)
            return self.head(self.conv(torch.cat([x, maps], 1)).flatten(1)).chunk(2, 1)

    decoder = WithLabels(vaelib.MLPDecoder(13, (16,), (1, 28, 28)))
    with pytest.raises(ValueError, match="num_classes: got int 1, expected an integer of at least 2"):
        ConditionalVAE(Tiles(), decoder, vaelib.Bernoulli(), (1, 28, 28), 3, 1)
    torch.manual_seed(0)
    model = ConditionalVAE(Tiles(), decoder, vaelib.Bernoulli(), (1, 28, 28), 3, 10)
    before = evaluate(model, digits[:200]).elbo
    fit(model, digits, config=TrainConfig(epochs=2, batch_size=50, **QUIET))
    assert evaluate(model, digits[:200]).elbo > before


def test_one_step_of_fit_is_one_step_of_gradient_descent_on_the_elbo_given_the_labels(digits):
    model, reference = new_model(), new_model()
    config = TrainConfig(
        epochs=1, batch_size=16, optimizer="SGD", learning_rate=1e-4, schedule="constant", warmup=0, clip_norm=None, num_samples=2,
        **QUIET,
    )  # fmt: skip
    images = digits[:16]
    fit(model, images, config=config)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(16, generator=vaelib.training.epoch_order(seed=0, epoch=1))
    x = reference.likelihood.observe(images.pixels[order], generator)
    eps = torch.randn(2, 16, 4, generator=generator)
    score, kl, _ = by_hand(reference, x, images.labels[order], eps)
    (score.mean(0) - kl).mean().backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 1e-4 * parameter.grad
    torch.testing.assert_close(weights(model), weights(reference))
    assert not torch.equal(weights(model), weights(new_model()))


@pytest.mark.parametrize("options", [{}, {"flip": True, "precision": "bf16", "channels_last": True}])
def test_in_training_and_validation_every_image_meets_its_own_label(options):
    labels = torch.arange(103) % 10
    images = image_set((20 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous(), labels)
    model = conditional_vae((1, 4, 4), 10, (8,), 2, "gaussian")
    seen = []

    def look(module, arguments):
        x, one_hot = arguments
        seen.append(len(x))
        assert one_hot.sum(1).tolist() == [1] * len(x)
        assert (model.likelihood.to_pixels(x)[:, 0, 0, 0] == 20 * one_hot.argmax(1)).all()

    model.encoder.register_forward_pre_hook(look)
    fit(model, images, images[:33], TrainConfig(epochs=2, batch_size=25, **options, **QUIET))
    assert seen == 2 * [25, 25, 25, 25, 3, 33]


def test_images_with_labels_that_the_model_does_not_know_are_not_trained_on(digits):
    model = conditional_vae((1, 28, 28), 3, (8,), 2)
    few = digits[digits.labels < 3]
    before = weights(model)
    for images, valid in ((digits, None), (few, digits)):
        with pytest.raises(ValueError, match="labels: got 9, expected labels from 0 to 2"):
            fit(model, images, valid, TrainConfig(**QUIET))
    with pytest.raises(ValueError, match="labels: got 9"):
        heldout_elbo(model, digits)
    assert torch.equal(weights(model), before)


def test_a_model_bound_to_labels_is_not_trained(model, digits):
    before = weights(model)
    for labels in (3, digits.labels[:100]):
        with pytest.raises(
            ValueError, match="^model: got a conditional VAE bound to labels, expected the model itself; fit hands it"
        ):
            fit(model.given(labels), digits[:100], config=TrainConfig(epochs=1, batch_size=100, **QUIET))
    assert torch.equal(weights(model), before)


def test_a_model_that_needs_labels_is_not_indexed(model, digits):
    with pytest.raises(ValueError, match="^model: got a conditional VAE, expected one that encodes without labels"):
        vaelib.LatentIndex.build(model, digits[:10])
    assert len(vaelib.LatentIndex.build(model.given(3), digits[:10])) == 10


def test_a_run_that_was_cut_off_resumes_to_the_same_bits_but_not_with_other_labels(digits, tmp_path, monkeypatch):
    images, valid = train_valid_split(digits[:500], 100)
    config = TrainConfig(epochs=3, batch_size=32, ema_decay=0.99, flip=True, checkpoint_minutes=0.0, **QUIET)
    whole, cut, resumed = new_model(), new_model(), new_model()
    history = fit(whole, images, valid, config)
    observe, calls = cut.likelihood.observe, []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) > 20:
            raise RuntimeError("crash")
        return observe(*args, **kwargs)

    monkeypatch.setattr(cut.likelihood, "observe", crash)
    with pytest.raises(RuntimeError, match="crash"):
        fit(cut, images, valid, config, folder=tmp_path)
    assert read_checkpoint(tmp_path, {})["step"] % 13 > 0  # amid an epoch
    for changed, name in (((image_set(images.pixels, (images.labels + 1) % 10, "digits"), valid), "images"),
                          ((images, image_set(valid.pixels, (valid.labels + 1) % 10, "digits")), "valid")):  # fmt: skip
        with pytest.raises(ValueError, match=f"resume: .* belongs to another run: its {name} is"):
            fit(new_model(), *changed, config, folder=tmp_path, resume=True)
    again = fit(resumed, images, valid, config, folder=tmp_path, resume=True)
    assert again.steps < history.steps
    assert torch.equal(weights(resumed), weights(whole))
    assert again["valid_elbo"] == history["valid_elbo"]
    assert again["train_elbo"] == history["train_elbo"]


def test_other_labels_make_no_other_run_of_an_unconditional_model(digits, tmp_path):
    config = TrainConfig(epochs=1, **QUIET)
    fit(mlp_vae((1, 28, 28), (8,), 2), digits[:200], config=config, folder=tmp_path)
    fit(mlp_vae((1, 28, 28), (8,), 2), image_set(digits.pixels[:200], name="digits"), config=config, folder=tmp_path, resume=True)


def test_a_compiled_conditional_model_takes_the_same_steps(digits, monkeypatch):
    traced, results = [], []

    def trace(model, mode, of=torch.compile):
        traced.append(of(model, backend="eager"))  # not made machine code: that takes half a minute
        return traced[0]

    monkeypatch.setattr(torch, "compile", trace)
    for compiled in (False, True):
        results.append(new_model())
        options = {"optimizer": "SGD", "learning_rate": 1e-4, "compile": compiled}
        fit(results[-1], digits[:350], config=TrainConfig(epochs=2, batch_size=100, **options, **QUIET))
    assert len(traced) == 1
    torch.testing.assert_close(weights(results[1]), weights(results[0]), rtol=1e-4, atol=1e-6)


def test_a_loaded_model_gives_the_same_elbo(trained, test_set, tmp_path):
    vaelib.save(trained, tmp_path / "run")
    again = vaelib.load(tmp_path / "run")
    assert isinstance(again, ConditionalVAE)
    assert again.config == trained.config
    assert torch.equal(heldout_elbo(again, test_set).elbo, heldout_elbo(trained, test_set).elbo)
    assert torch.equal(generate(again.given(5), 3, seed=0), generate(trained.given(5), 3, seed=0))


def test_images_of_a_class_look_like_that_class(trained, digits):
    from sklearn.linear_model import LogisticRegression

    judge = LogisticRegression(max_iter=300).fit(digits.pixels.flatten(1).numpy() / 255, digits.labels.numpy())
    for label in range(10):
        made = generate(trained.given(label), 100, seed=label)
        verdicts = torch.from_numpy(judge.predict(made.flatten(1).numpy() / 255))
        assert verdicts.bincount(minlength=10).argmax() == label
        assert (verdicts == label).sum() > 50


def test_the_right_label_raises_the_held_out_elbo_above_another_label_s_and_an_unconditional_model_s(trained, digits, test_set):
    torch.manual_seed(0)
    unconditional = mlp_vae((1, 28, 28), (64,), 6)
    fit(unconditional, digits, config=TRAIN)
    right = heldout_elbo(trained, test_set, 10).elbo
    wrong = heldout_elbo(trained, image_set(test_set.pixels, (test_set.labels + 1) % 10), 10).elbo
    without = heldout_elbo(unconditional, test_set, 10).elbo
    for other in (wrong, without):
        gain = right - other
        assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))


def test_the_command_line_trains_and_evaluates_it(vaelib_here, tmp_path, test_set):
    options = ("--model", "conditional", "--hidden", "16", "--latent-dim", "3", "--epochs", "1", "--device", "cpu")
    done = vaelib_here("train", "--data", "digits", *options, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    model = vaelib.load(tmp_path)
    assert (model.num_classes, model.latent_dim) == (10, 3)
    done = vaelib_here("evaluate", tmp_path, "--json")
    assert json.loads(done.stdout)["elbo"] == pytest.approx(evaluate(model, test_set).elbo, abs=1e-3)
    done = vaelib_here("sample", tmp_path, "--out", tmp_path / "threes.png", "--grid", "1x4", "--label", 3)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "threes.png") as sheet:
        large = vaelib.generate(model.given(3), 4, seed=0).repeat_interleave(3, 2).repeat_interleave(3, 3)  # 28 to 64 or more
        expected = tile(large, columns=4)
        assert torch.equal(torch.from_numpy(np.array(sheet)), torch.from_numpy(expected))
    for label, message in (
        ((), "label: got none, expected a class from 0 to 9: the model is conditional"),
        (("--label", 10), "labels: got 10, expected labels from 0 to 9"),
        (("--label", -2), "labels: got -2, expected labels from 0 to 9"),
        (("--label", 3, "--prior", "mixture"), "prior: got 'mixture' beside --label, expected 'standard'"),
    ):
        done = vaelib_here("sample", tmp_path, "--out", tmp_path / "none.png", *label)
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "none.png").exists()


def train_shared(rank, port, folder):
    """One of two processes; batches of 7 and a last one of a single image, so that one process has nothing of its own."""
    torch.set_num_threads(1)
    if rank is not None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    images, valid = train_valid_split(vaelib.load_images("digits")[:50], 21)
    config = TrainConfig(epochs=2, batch_size=7, optimizer="SGD", learning_rate=1e-4, flip=True, **QUIET)
    model = new_model()
    history = fit(model, images, valid, config)
    torch.save({"weights": weights(model), "valid_elbo": history["valid_elbo"]}, folder / f"{rank}.pt")
    leave()


def test_two_processes_follow_the_trajectory_of_one(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vaelib", "vaelib.training", "sklearn.datasets", "torch._dynamo", "torch.optim"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=train_shared, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    train_shared(None, port, tmp_path)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    one, first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (None, 0, 1))
    for result in (first, second):
        torch.testing.assert_close(result["weights"], one["weights"], rtol=1e-4, atol=1e-6)
        assert result["valid_elbo"] == pytest.approx(one["valid_elbo"], rel=1e-5)
