"""The importance-weighted objective and its doubly reparameterized gradient, the two layers of Burda et al., and their table."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import vaelib
from vaelib import TrainConfig, fit, importance_weighted_bound, mlp_vae, two_layer_vae
from vaelib.book.reproduce import BUDGETS, PAPER, Budget, burda_vae, iwae_row, paper_schedule
from vaelib.cli import app
from vaelib.objectives import doubly_reparameterized_bound

QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture
def tiny():
    """A VAE of 4x4 pixels whose posterior is far from the true one, and a binary image."""
    torch.manual_seed(0)
    model = mlp_vae((1, 4, 4), (8,), 2).double()
    with torch.no_grad():
        model.encoder.head.weight.mul_(6)
        model.decoder.head.weight.mul_(6)
    return model, torch.bernoulli(torch.rand(1, 1, 4, 4)).double()


def gradients(model, x, bound_of, draws=20_000, num_samples=5):
    """The gradient of a bound for the encoder, from many independent draws: mean and standard error, (weights,) each."""
    torch.manual_seed(1)
    rows = []
    for _ in range(20):
        eps = torch.randn(num_samples, draws // 20, 2, dtype=torch.float64)
        total = bound_of(model, x.expand(draws // 20, 1, 4, 4), eps).mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.encoder.parameters()))]))
    rows = torch.stack(rows)
    return rows.mean(0), rows.std(0) / math.sqrt(len(rows))


def bound_by(gradient_of_z, detached=True):
    """The importance-weighted bound whose gradient for z_k is made over by `gradient_of_z(weights, gradient)`."""

    def bound(model, x, eps):
        drawn = model.draw(x, len(eps), eps)
        z, log_weights = drawn.z, drawn._replace(q=drawn.q.detach() if detached else drawn.q).log_weights
        weights = log_weights.detach().softmax(0)[..., None]
        z.register_hook(lambda gradient: gradient_of_z(weights, gradient))
        return importance_weighted_bound(log_weights)

    return bound


def agree(one, other):
    """Whether two estimated gradients are one within six standard errors."""
    return bool(((one[0] - other[0]).abs() <= 6 * (one[1] ** 2 + other[1] ** 2).sqrt() + 1e-9).all())


def plain(model, x, eps):
    return model(x, eps, "iwae").bound


def dreg(model, x, eps):
    return model(x, eps, "dreg").bound


@pytest.mark.equation("doubly-reparameterized-gradient")
def test_the_doubly_reparameterized_gradient_has_the_mean_of_the_plain_one_and_less_noise(tiny):
    usual, doubly = gradients(*tiny, plain), gradients(*tiny, dreg)
    assert agree(usual, doubly)
    assert doubly[1].norm() < 0.7 * usual[1].norm()


def test_with_one_draw_it_is_the_gradient_of_the_elbo(tiny):
    assert agree(gradients(*tiny, lambda model, x, eps: model(x, eps).elbo, num_samples=1), gradients(*tiny, dreg, num_samples=1))


@pytest.mark.parametrize(
    ("wrong", "detached"),
    [
        (lambda weights, gradient: weights * gradient, False),  # the density q is not a constant
        (lambda weights, gradient: gradient, True),  # w instead of w squared
        (lambda weights, gradient: -weights * gradient, True),  # the sign
        (lambda weights, gradient: (1 - weights) * gradient, True),  # w (1 - w): the weights of another estimator
        (lambda weights, gradient: weights.mean(0) * gradient, True),  # averaged over the draws
    ],
    ids=["not-detached", "not-squared", "sign", "one-minus-w", "mean-weight"],
)
def test_the_known_mistakes_of_the_gradient_have_another_mean(tiny, wrong, detached):
    usual = gradients(*tiny, plain)
    assert agree(usual, gradients(*tiny, bound_by(lambda weights, gradient: weights * gradient)))
    assert not agree(usual, gradients(*tiny, bound_by(wrong, detached)))


def test_value_and_decoder_gradient_are_those_of_the_plain_bound(tiny):
    model, x = tiny
    eps = torch.randn(7, 3, 2, dtype=torch.float64)
    found = []
    for objective in ("iwae", "dreg"):
        terms = model(x.expand(3, 1, 4, 4), eps, objective)
        found.append((terms.bound.detach(), torch.autograd.grad(terms.bound.sum(), list(model.decoder.parameters()))))
        assert terms.kl_per_unit.shape == (3, 2)
        torch.testing.assert_close(terms.kl_per_unit.sum(1), terms.kl)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][0], model.importance_weighted_bound(x.expand(3, 1, 4, 4), 7, eps).detach())


def test_without_a_graph_the_bound_is_only_a_number(tiny):
    model, x = tiny
    with torch.no_grad():
        drawn = model.draw(x, 3)
        assert not doubly_reparameterized_bound(drawn).requires_grad
        torch.testing.assert_close(doubly_reparameterized_bound(drawn), importance_weighted_bound(drawn.log_weights))


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_fit_raises_the_importance_weighted_bound(objective, digits):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (32,), 4)
    before = vaelib.log_likelihood(model, digits[1200:1300], 5).mean()
    config = TrainConfig(epochs=5, batch_size=50, objective=objective, num_samples=5, **QUIET)
    history = fit(model, digits[:1000], None, config)
    after = vaelib.log_likelihood(model, digits[1200:1300], 5).mean()
    assert after > before + 200
    assert history[-1]["train_objective"] == pytest.approx(after.item(), rel=0.2)
    assert history[-1]["train_elbo"] < history[-1]["train_objective"]
    assert history[-1]["train_elbo"] == pytest.approx(history[-1]["train_log_likelihood"] - history[-1]["train_kl"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "elbow"}, "objective: got 'elbow', expected one of 'dreg', 'elbo', 'iwae'"),
        ({"objective": "iwae", "beta": 2.0}, "beta: got 2.0, expected 1.0: it belongs to the ELBO"),
        ({"objective": "dreg", "free_bits": 0.1}, "free_bits: got 0.1, expected 0.0"),
        ({"objective": "iwae", "patience": 3}, "patience: got 3, expected None"),
        ({"objective": "dreg", "compile": True}, "compile: got True, expected False"),
    ],
)
def test_options_that_do_not_go_with_the_objective_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_the_doubly_reparameterized_gradient_is_refused_for_layers(digits):
    model = two_layer_vae((1, 28, 28), ((16,), (8,)), (4, 2))
    with pytest.raises(ValueError, match="objective: got 'dreg' for a model with several layers of latents"):
        model(model.likelihood.observe(digits.pixels[:2]), torch.randn(3, 2, 6), "dreg")
    with pytest.raises(ValueError, match="objective: got 'dreg' for a model with several layers of latents"):
        fit(model, digits[:100], None, TrainConfig(epochs=1, batch_size=50, objective="dreg", num_samples=2, **QUIET))


class Affine(nn.Module):
    """value (N, D) -> weight value, shaped; with `log_var` a pair of it and a constant log-variance."""

    def __init__(self, weight, log_var=None, shape=None):
        super().__init__()
        self.weight, self.log_var, self.shape = nn.Parameter(weight), log_var, shape

    def forward(self, value):
        mean = value.flatten(1) @ self.weight.T
        mean = mean if self.shape is None else mean.view(-1, *self.shape)
        return mean if self.log_var is None else (mean, torch.full_like(mean, self.log_var))


@pytest.fixture
def two_layers(generator):
    """Two layers of linear Gaussians: the model, images drawn from it, and their exact log p(x)."""
    a, b, c, d = (0.8 * torch.randn(*shape, generator=generator) for shape in ((2, 1), (4, 2), (2, 4), (1, 2)))
    scale = 0.6
    encoder = nn.ModuleList([Affine(0.1 * c, math.log(1.5)), Affine(0.3 * d, 0.0)])
    decoder = nn.ModuleList([Affine(a, math.log(0.5)), Affine(b, shape=(1, 2, 2))])
    model = vaelib.TwoLayerVAE(encoder, decoder, vaelib.Gaussian(scale), (1, 2, 2), (2, 1))
    covariance = b @ (a @ a.T + 0.5 * torch.eye(2)) @ b.T + scale**2 * torch.eye(4)
    truth = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)
    torch.manual_seed(0)
    x = truth.sample((6,))
    return model, x.view(6, 1, 2, 2), truth.log_prob(x), covariance


def test_two_layers_estimate_the_exact_evidence_and_bound_it(two_layers, generator):
    model, x, log_evidence, _ = two_layers
    weights = model.log_weights(x, 200_000, generator=generator).detach()
    relative = (weights - importance_weighted_bound(weights)).exp()
    error = relative.std(0) / math.sqrt(len(weights))
    assert (error < 0.05).all()
    assert ((importance_weighted_bound(weights) - log_evidence).abs() < 5 * error).all()
    assert (weights.mean(0) < log_evidence).all()


def test_the_elbo_of_two_layers_is_the_mean_log_weight(two_layers, generator):
    model, x, *_ = two_layers
    with torch.no_grad():
        terms, weights = model.elbo(x, 50_000, generator=generator), model.log_weights(x, 50_000, generator=generator)
    error = weights.std(0) / math.sqrt(len(weights))
    assert ((terms.elbo - weights.mean(0)).abs() < 5 * error).all()
    assert terms.kl_per_unit.shape == (6, 3)
    torch.testing.assert_close(terms.kl_per_unit.sum(1), terms.kl)


def test_the_bound_of_two_layers_that_is_trained_is_that_of_their_log_weights(two_layers):
    model, x, *_ = two_layers
    eps = torch.randn(5, 6, 3)
    torch.testing.assert_close(model(x, eps, "iwae").bound, importance_weighted_bound(model.log_weights(x, 5, eps)))


def test_draws_from_the_prior_of_two_layers_have_the_exact_covariance(two_layers, generator):
    model, _, _, covariance = two_layers
    with torch.no_grad():
        pixels = model.decode(model.prior.sample(200_000, generator)).flatten(1)
    found = pixels.T @ pixels / len(pixels) + model.likelihood.config["scale"] ** 2 * torch.eye(4)
    torch.testing.assert_close(found, covariance, atol=0.03, rtol=0.03)


def test_two_layers_are_trained_saved_and_used_as_any_model(digits, tmp_path):
    torch.manual_seed(0)
    model = two_layer_vae((1, 28, 28), ((32,), (16,)), (8, 4))
    before = vaelib.heldout_elbo(model, digits[1200:]).elbo.mean()
    fit(model, digits[:1000], None, TrainConfig(epochs=5, batch_size=50, objective="iwae", num_samples=3, **QUIET))
    assert vaelib.heldout_elbo(model, digits[1200:]).elbo.mean() > before + 150
    vaelib.save(model, tmp_path / "two")
    again = vaelib.load(tmp_path / "two")
    x = model.likelihood.observe(digits.pixels[:3])
    torch.testing.assert_close(again.encode(x), model.encode(x))
    assert vaelib.generate(again, 5).shape == (5, 1, 28, 28)
    assert vaelib.reconstruct(again, digits.pixels[:2]).shape == (2, 1, 28, 28)
    assert vaelib.active_units(again, digits[:100]).shape == (12,)
    torch.testing.assert_close(vaelib.log_likelihood(again, digits[:20], 50, 7, 9), vaelib.log_likelihood(again, digits[:20], 50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_dims": (200, 100)}, "hidden_dims: got int 200"),
        ({"latent_dims": (100, 50, 20)}, "latent_dims: got .*, expected two"),
        ({"latent_dims": (100, 0)}, "latent_dims: got int 0"),
    ],
)
def test_sizes_of_two_layers_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        two_layer_vae(**arguments)


def test_the_schedule_has_the_paper_s_eight_stages():
    epochs = [round(3280 * i / 32800, 6) for i in range(32800)]  # tenths of an epoch
    factors = [paper_schedule(epoch / 3280) for epoch in epochs]
    assert [factors.count(10 ** (-i / 7)) for i in range(8)] == [10 * 3**i for i in range(8)]
    assert paper_schedule(1.0) == pytest.approx(0.1)


def test_the_network_starts_as_the_paper_s(digits):
    torch.manual_seed(0)
    model = burda_vae(1, digits.pixels.float().mean(0) / 255)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [
        (200, 784), (200, 200), (100, 200), (200, 50), (200, 200), (784, 200),
    ]  # fmt: skip
    hidden = model.encoder.hidden[0].weight.detach()
    assert hidden.abs().max() <= math.sqrt(6 / 984)
    assert hidden.std().item() == pytest.approx(math.sqrt(2 / 984), rel=0.02)
    mean_image = digits.pixels.float().mean(0) / 255
    torch.testing.assert_close(model.decoder.head.bias.sigmoid().view(1, 28, 28), mean_image.clamp(0.001, 0.999))
    with pytest.raises(ValueError, match="layers: got 3, expected one of 1, 2"):
        burda_vae(3, mean_image)


SMALL = Budget({1: 2, 5: 1, 50: 1}, num_samples=20)


def test_a_row_says_what_was_trained_and_what_came_out(digits, tmp_path):
    train, test = (dataclasses.replace(part, name="mnist") for part in (digits[:400], digits[1400:1450]))
    model, row = iwae_row(train, test, 2, "iwae", 5, SMALL, folder=tmp_path, progress=False, device="cpu")
    assert row["nll"] == pytest.approx(-vaelib.log_likelihood(model, test, 20).mean().item())
    assert (row["paper_nll"], row["paper_active_units"]) == (83.89, [21, 5])
    assert (row["budget"], row["epochs"], row["steps"], row["num_samples"], row["batch_size"]) == ("custom", 1, 4, 20, 128)
    assert len(row["active_units"]) == 2  # the layer of 100, then that of 50
    assert sum(row["active_units"]) == int(vaelib.active_units(model, test).sum())
    _, resumed = iwae_row(train, test, 2, "iwae", 5, SMALL, folder=tmp_path, progress=False, device="cpu")
    assert resumed["nll"] == row["nll"]  # a finished run is not trained again


def test_with_one_draw_both_columns_are_the_same_run(digits):
    train, test = (dataclasses.replace(part, name="mnist") for part in (digits[:200], digits[1400:1420]))
    rows = [iwae_row(train, test, 1, name, 1, SMALL, progress=False, device="cpu")[1] for name in ("vae", "iwae")]
    assert rows[0]["nll"] == rows[1]["nll"]
    assert rows[0]["paper_nll"] == rows[1]["paper_nll"] == PAPER[1, "vae", 1][0] == 86.76


def test_a_budget_that_makes_no_sense_is_refused_before_the_training():
    with pytest.raises(ValueError, match="num_samples: got int 0"):
        Budget({1: 1}, num_samples=0)
    with pytest.raises(ValueError, match="epochs: got float 0.5"):
        Budget({1: 0.5})


def test_the_paper_s_budget_is_the_paper_s_recipe():
    budget = BUDGETS["paper"]
    assert (budget.batch_size, budget.learning_rate, budget.num_samples) == (20, 1e-3, 5000)
    assert set(budget.epochs.values()) == {sum(3**i for i in range(8))} == {3280}
    assert all(set(other.epochs) == {1, 5, 50} and other.num_samples == 5000 for other in BUDGETS.values())


def test_the_budget_of_a_gpu_trains_a_row_in_eight_minutes_by_the_rates_that_were_measured():
    budget = BUDGETS["gpu"]
    assert budget.learning_rate == pytest.approx(1e-3 * math.sqrt(budget.batch_size / 20), rel=0.02)
    # ms of a step of 20 images with k draws each, from the line through two numbers of draws; its slope, ms a draw
    measured = {(1, 1): 0.326, (1, 5): 0.396, (1, 50): 0.500, (2, 1): 0.619, (2, 50): 0.816}
    slopes = {1: (0.500 - 0.396) / (20 * 45), 2: (0.816 - 0.619) / (20 * 49)}
    for layers, slope in slopes.items():
        for k, epochs in budget.epochs.items():
            step = measured.get((layers, k), measured[layers, 1] + slope * 20 * (k - 1)) + slope * k * (budget.batch_size - 20)
            assert epochs * math.ceil(60_000 / budget.batch_size) * step / 1000 < 8 * 60, (layers, k)


def test_the_command_adds_its_row_to_the_ledger(monkeypatch, tmp_path):
    monkeypatch.setitem(BUDGETS, "minutes", SMALL)
    ledger = tmp_path / "rows.json"
    ledger.write_text('{"other": 1}')
    options = ["--data", "digits", "--out", str(tmp_path / "runs"), "--ledger", str(ledger), "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, ["reproduce", "iwae", "-k", "5", *options])
    assert done.exit_code == 0, done.output
    rows = json.loads(ledger.read_text())
    assert set(rows) == {"other", "digits-1-iwae-5.minutes"}
    metrics = rows["digits-1-iwae-5.minutes"]["metrics"]
    assert metrics["nll"] == json.loads(done.stdout)["nll"]
    assert (metrics["budget"], metrics["data"]) == ("minutes", "digits")
    assert metrics["paper_nll"] is None  # the paper's numbers are MNIST's
    assert {"command", "seed", "commit", "hardware", "versions", "seconds"} <= set(rows["digits-1-iwae-5.minutes"])
    assert vaelib.load(tmp_path / "runs" / "digits-1-iwae-5.minutes").latent_dim == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vampprior"], "table: got 'vampprior', expected one of 'iwae'"),
        (["iwae", "-k", "7"], "k: got 7, expected one of 1, 5, 50"),
        (["iwae", "--layers", "3"], "layers: got 3, expected one of 1, 2"),
        (["iwae", "--budget", "year"], "budget: got 'year', expected one of 'gpu', 'hour', 'minutes', 'paper'"),
        (["iwae", "--objective", "gan"], "objective: got 'gan', expected one of 'iwae', 'vae'"),
    ],
)
def test_a_row_that_is_not_in_the_table_is_refused(arguments, message, tmp_path):
    done = CliRunner().invoke(app, ["reproduce", *arguments, "--data", "digits", "--out", str(tmp_path / "runs")])
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("*.safetensors"))
