"""The examples that readers start from, book/examples: as short as the book says, trained, saved, loaded, and right."""

import ast
import itertools
import math

import pytest
import torch
from test_densities import EXAMPLES, exact, example, plane_vae

import vaelib
from vaelib import TrainConfig, evaluate, fit, heldout_elbo, image_set, log_likelihood, mlp_vae, register_likelihood, register_model
from vaelib.checks import check_likelihood
from vaelib.evaluation import annealed_log_likelihood, inference_gaps

QUIET = {"progress": False, "device": "cpu"}
STATEMENTS = {"flow_posterior": 20, "laplace": 13, "mmd": 6, "own_encoder": 6, "vamp_prior": 15, "vq_vae": 35}


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    """What an example registers is forgotten after the test."""
    monkeypatch.setattr(vaelib.likelihoods, "LIKELIHOODS", dict(vaelib.likelihoods.LIKELIHOODS))
    models = dict(vaelib.vae.MODELS)
    for module in (vaelib.vae, vaelib.storage):  # both hold the name
        monkeypatch.setattr(module, "MODELS", models)


def statements(path):
    """How many statements the classes and functions of a file have, themselves included; docstrings are none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [inner for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) for inner in ast.walk(node)]
    docstrings = sum(isinstance(node, (ast.ClassDef, ast.FunctionDef)) and bool(ast.get_docstring(node)) for node in nodes)
    return sum(isinstance(node, ast.stmt) for node in nodes) - docstrings


def test_the_examples_are_short_and_no_line_runs_out_of_its_column():
    assert {path.stem: statements(path) for path in EXAMPLES.glob("*.py")} == STATEMENTS
    for path in EXAMPLES.glob("*.py"):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 80, path


def there_and_back(model, folder):
    vaelib.save(model, folder)
    return vaelib.load(folder)


# --- an encoder


def test_an_own_encoder_is_trained_and_judged(digits):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (32,), 4)
    model.encoder = example("own_encoder").PoolEncoder(4)
    before = evaluate(model, digits[1200:])
    fit(model, digits[:1000], config=TrainConfig(epochs=5, batch_size=50, **QUIET))
    after = evaluate(model, digits[1200:], num_samples=50)
    assert before.elbo + 200 < after.elbo < after.log_likelihood
    with pytest.raises(ValueError, match="model: got a VAE that its config does not build again"):
        vaelib.save(model, "never-written")


def test_a_builder_of_one_s_own_is_saved_with_its_arguments(digits, tmp_path):
    @register_model("pooled")
    def pooled_vae(latent_dim=4, likelihood="bernoulli"):
        model = mlp_vae((1, 28, 28), (32,), latent_dim, likelihood)
        model.encoder = example("own_encoder").PoolEncoder(latent_dim)
        return model

    model = pooled_vae(likelihood=vaelib.Gaussian(0.3))
    assert model.config == {"model": "pooled", "latent_dim": 4, "likelihood": {"name": "gaussian", "scale": 0.3, "learned": False}}
    again = there_and_back(model, tmp_path)
    assert torch.equal(vaelib.posterior_means(again, digits[:9]), vaelib.posterior_means(model, digits[:9]))
    vaelib.LatentIndex.build(model, digits[:20]).save(tmp_path / "digits.index")
    assert len(vaelib.LatentIndex.load(tmp_path / "digits.index")) == 20
    with pytest.raises(ValueError, match="name: got 'mlp', which is mlp_vae, expected a name that no model has"):
        register_model("mlp")(pooled_vae)
    del vaelib.vae.MODELS["pooled"]
    with pytest.raises(ValueError, match="got 'pooled', expected one of .*; one of your own is registered first"):
        vaelib.load(tmp_path)
    given = pooled_vae(likelihood=vaelib.Gaussian(0.3))
    weight = given.encoder.layers[0].weight
    assert vaelib.load(tmp_path, model=given) is given
    assert weight is given.encoder.layers[0].weight  # an optimizer that holds it goes on
    assert torch.equal(vaelib.posterior_means(given, digits[:9]), vaelib.posterior_means(model, digits[:9]))
    other, before = pooled_vae(5), {}
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"they hold encoder.layers.4.weight with shape \(8, 784\), the model \(10, 784\)"):
        vaelib.load(tmp_path, model=other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_arguments_that_json_cannot_hold_are_refused_when_saved(tmp_path):
    @register_model("odd")
    def odd_vae(activation=torch.nn.ReLU):
        return mlp_vae((1, 4, 4), (3,), 2)

    with pytest.raises(ValueError, match="model: got a config that JSON cannot hold"):
        vaelib.save(odd_vae(), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


# --- a likelihood


def test_an_own_likelihood_is_a_density_with_the_moments_that_it_says(generator):
    likelihood = example("laplace").Laplace(0.2)
    x = torch.linspace(-9, 9, 20_001)[:, None, None, None]
    mass = likelihood.log_prob(x, torch.full_like(x, 0.3), validate=False).exp() * (18 / 20_000)
    assert mass.sum() == pytest.approx(1, abs=1e-3)
    draws = likelihood.sample(torch.full((200_000, 1, 1, 1), 0.3), generator).flatten()
    assert draws.mean() == pytest.approx(0.3, abs=5 * 0.2 * math.sqrt(2 / 200_000))
    assert draws.var() == pytest.approx(2 * 0.2**2, rel=0.05)
    assert check_likelihood(likelihood).passed


def test_an_own_likelihood_is_trained_saved_and_right(digits, binary, plane, tmp_path):
    laplace = example("laplace").Laplace
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (32,), 4, {"name": "laplace", "scale": 0.3})
    before = evaluate(model, digits[1200:]).elbo
    fit(model, digits[:1000], config=TrainConfig(epochs=3, batch_size=50, **QUIET))
    assert evaluate(model, digits[1200:]).elbo > before + 200
    again = there_and_back(model, tmp_path)
    assert isinstance(again.likelihood, laplace)
    assert torch.equal(heldout_elbo(again, digits[:9]).elbo, heldout_elbo(model, digits[:9]).elbo)
    with pytest.raises(ValueError, match="name: got 'gaussian', which is Gaussian, expected a name that no likelihood has"):
        register_likelihood("gaussian")(laplace)

    model = plane_vae(likelihood=laplace(4.0))
    with torch.no_grad():
        model.encoder.head.weight.div_(6)  # a q as wide as the posterior, so that no single draw carries the estimate
    x = model.likelihood.observe(binary.pixels)
    evidence, elbo = exact(model, x, plane)
    with torch.no_grad():
        log_weights = model.log_weights(x, 20_000, generator=torch.Generator().manual_seed(1))
    errors = log_weights.std(0) / math.sqrt(20_000), (log_weights - evidence).exp().std(0) / math.sqrt(20_000)
    assert torch.stack(errors).max() < 0.05
    assert ((heldout_elbo(model, binary, num_samples=20_000).elbo - elbo).abs() < 5 * errors[0] + 0.01).all()
    assert ((log_likelihood(model, binary, 20_000, sample_batch=5000) - evidence).abs() < 5 * errors[1] + 0.01).all()


# --- a further term of the loss


def test_a_penalty_is_trained_shown_in_the_history_and_in_no_estimate(digits):
    mmd, discrepancies = example("mmd"), []
    for penalized in (False, True):
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (32,), 4)
        if penalized:
            before = heldout_elbo(model, digits[:50]).elbo
            model.penalty = lambda x, draw: mmd.mmd_penalty(x, draw, weight=3000.0)
            assert torch.equal(heldout_elbo(model, digits[:50]).elbo, before)
        history = fit(model, digits[:1000], digits[1200:], TrainConfig(epochs=8, batch_size=100, **QUIET))
        for epoch in history:
            assert ("train_penalty" in epoch) == penalized
            expected = epoch["train_elbo"] - epoch.get("train_penalty", 0.0)
            assert epoch["train_objective"] == pytest.approx(expected, rel=1e-4)
        codes = vaelib.priors.posterior_samples(model, digits[:1000])
        discrepancies.append(mmd.mmd_penalty(None, vaelib.Draw(codes[None], None, None, None, None), weight=1.0).item())
    assert discrepancies[1] < 0.5 * discrepancies[0]


@pytest.mark.parametrize("objective", ["elbo", "iwae", "dreg"])
def test_one_step_of_fit_is_one_step_down_the_objective_with_its_penalty(objective, digits):
    def new_model():
        torch.manual_seed(0)
        model = mlp_vae((1, 28, 28), (8,), 3)
        model.penalty = lambda x, draw: 5 * draw.z.square().sum((0, 2))
        return model

    model, reference = new_model(), new_model()
    config = {"optimizer": "SGD", "learning_rate": 1e-4, "schedule": "constant", "warmup": 0, "clip_norm": None, **QUIET}
    history = fit(model, digits[:16], config=TrainConfig(epochs=1, batch_size=16, objective=objective, num_samples=2, **config))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(16, generator=vaelib.training.epoch_order(seed=0, epoch=1))
    x = reference.likelihood.observe(digits.pixels[order], generator)
    drawn = reference.draw(x, 2, torch.randn(2, 16, 3, generator=generator))
    bound = drawn.terms.elbo if objective == "elbo" else vaelib.importance_weighted_bound(drawn.log_weights)
    value = (bound - 5 * drawn.z.square().sum((0, 2))).mean()
    assert history[0]["train_objective"] == pytest.approx(value.item(), rel=1e-5)
    assert history[0]["train_elbo"] == pytest.approx(drawn.terms.elbo.mean().item(), rel=1e-5)
    value.backward()
    for (name, mine), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if objective != "dreg" or "decoder" in name:  # the encoder's gradient of "dreg" is another estimate
            torch.testing.assert_close(mine, other + 1e-4 * other.grad)


def test_a_loss_is_finite_in_its_penalty_too(digits):
    model = mlp_vae((1, 28, 28), (8,), 3)
    model.penalty = lambda x, draw: draw.z.sum() / 0
    with pytest.raises(FloatingPointError, match="epoch 1, step 1: the training loss is"):
        fit(model, digits[:100], config=TrainConfig(epochs=1, batch_size=50, **QUIET))


# --- a learned prior, a flow: their numbers are in test_densities


def test_a_learned_prior_and_a_flow_are_saved_under_a_builder(digits, tmp_path):
    @register_model("vamp-flow")
    def vamp_flow_vae(num_components, latent_dim=4):
        model = mlp_vae((1, 28, 28), (16,), latent_dim)
        model.encoder = example("flow_posterior").FlowEncoder(model.encoder, latent_dim)
        base = model.encode
        model.prior = example("vamp_prior").VampPrior(model, num_components)
        model.prior.encode = lambda x, validate: base(x, validate).base  # a prior needs components that can be drawn from
        return model

    model = vamp_flow_vae(6)
    again = there_and_back(model, tmp_path)
    assert torch.equal(again.prior.inputs, model.prior.inputs)
    assert torch.equal(log_likelihood(again, digits[:9], 20), log_likelihood(model, digits[:9], 20))


# --- discrete codes


@pytest.fixture
def tiny_vq():
    """Codes of two numbers, three of them, in 1 x 2 places: nine codes in all, which can be gone through."""
    torch.manual_seed(0)
    model = example("vq_vae").vq_vae((1, 4, 8), 3, (2, 1, 2), "bernoulli", (8, 8))
    with torch.no_grad():
        model.encoder.head.weight.mul_(20)
        output = vaelib.VAE.encode(model, torch.rand(40, 1, 4, 8).round()).mean.unflatten(1, (2, 2)).movedim(1, -1).flatten(0, 1)
        model.prior.codes.copy_(output[[0, 30, 60]])  # so that images differ in theirs
    return model


def test_the_numbers_of_a_vq_vae_are_those_of_the_sum_over_its_codes(tiny_vq):
    pixels = (255 * torch.randint(2, (40, 1, 4, 8), generator=torch.Generator().manual_seed(1))).to(torch.uint8)
    images = image_set(pixels)
    x = tiny_vq.likelihood.observe(pixels)
    with torch.no_grad():
        places = [torch.stack(pair) for pair in itertools.product(tiny_vq.prior.codes, repeat=2)]  # (2, D) each
        every = torch.stack(places).movedim(-1, 1).flatten(1)  # (9, L)
        joint = torch.stack([tiny_vq.likelihood.log_prob(x, tiny_vq.decode(z.expand(40, -1))) - 2 * math.log(3) for z in every])
        q = tiny_vq.encode(x)
        nearest = torch.cdist(q.mean, every)
    assert nearest.min(1).values.max() < 0.01  # the mean is one of the nine, as far as cdist tells
    assert len(nearest.argmin(1).unique()) > 1
    terms = heldout_elbo(tiny_vq, images)
    torch.testing.assert_close(terms.kl, torch.full((40,), 2 * math.log(3)))
    torch.testing.assert_close(terms.elbo, joint[nearest.argmin(1), torch.arange(40)], rtol=1e-5, atol=1e-4)
    assert (terms.elbo <= joint.logsumexp(0)).all()
    drawn = tiny_vq.prior.sample(5000, torch.Generator().manual_seed(0)).detach()
    counts = torch.cdist(drawn, every).argmin(1).bincount(minlength=9)
    assert ((counts - 5000 / 9).square() / (5000 / 9)).sum() < 26  # chi-squared of 8 degrees of freedom: 0.999 lie below


def test_a_vq_vae_is_trained_saved_and_names_what_it_cannot(tmp_path):
    images = vaelib.load_images("shapes")
    torch.manual_seed(0)
    model = example("vq_vae").vq_vae((3, 32, 32), 32)
    codes, before = model.prior.codes.clone(), evaluate(model, images[:100])
    history = fit(model, images[:1000], config=TrainConfig(epochs=3, batch_size=50, **QUIET))
    after = evaluate(model, images[:100])
    assert after.elbo > before.elbo + 500
    assert after.kl == pytest.approx(64 * math.log(32), rel=1e-5)
    assert history[0]["train_penalty"] > history[-1]["train_penalty"] > 0
    assert not torch.equal(model.prior.codes, codes)
    again = there_and_back(model, tmp_path)
    assert torch.equal(heldout_elbo(again, images[:9]).elbo, heldout_elbo(model, images[:9]).elbo)
    assert vaelib.generate(again, 3, seed=0).shape == (3, 3, 32, 32)
    for call, message in [
        (lambda: inference_gaps(model, images[:2], 5), "model: got a model with the posterior OneHot"),
        (
            lambda: annealed_log_likelihood(model, images[:2], 5, 2),
            "model: got one with the prior Uniform, whose log_prob has no gradient",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
