"""Priors and posteriors of one's own: every bound and estimate asks them, and gives the numbers that integration over the plane gives."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

import vaelib
from vaelib import TrainConfig, fit, generate, heldout_elbo, image_set, log_likelihood, mlp_vae
from vaelib.densities import Draw, Posterior, StandardNormal, joined, kl_divergence, register_kl
from vaelib.evaluation import annealed_log_likelihood, inference_gaps, kl_per_unit, posteriors, rate_decomposition, refine_posterior

QUIET = {"progress": False, "device": "cpu"}
EXAMPLES = Path(__file__).parent.parent / "book" / "examples"


def example(name):
    """A module of book/examples, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plane_vae(seed=0, likelihood="bernoulli"):
    """A VAE of 4 x 4 binary images with a latent plane, far from trained, so that q, p and the posterior are all different."""
    torch.manual_seed(seed)
    model = mlp_vae((1, 4, 4), (8,), 2, likelihood)
    with torch.no_grad():
        model.encoder.head.weight.mul_(3)
        model.decoder.head.weight.mul_(4)
    return model


def with_vamp_prior():
    model = plane_vae()
    model.prior = example("vamp_prior").VampPrior(model, 5)
    return model


def with_flow():
    model = plane_vae()
    model.encoder = example("flow_posterior").FlowEncoder(model.encoder, 2)
    with torch.no_grad():
        model.encoder.t[2].weight.mul_(2)
    return model


def with_both():
    model = with_flow()
    model.prior = MixtureOfTwo()
    return model


class MixtureOfTwo:
    """A prior that is no module and has no noise that it is made of."""

    def log_prob(self, z):
        parts = (Posterior(*(torch.full_like(z, value) for value in pair)) for pair in ((1.5, -1.0), (-1.0, 0.3)))
        return torch.stack([part.log_prob(z) for part in parts]).logsumexp(0) - math.log(2)

    def sample(self, num, generator=None):
        chosen = torch.rand(num, 1, generator=generator) < 0.5
        eps = torch.randn(num, 2, generator=generator)
        return torch.where(chosen, 1.5 + math.exp(-0.5) * eps, -1 + math.exp(0.15) * eps)


MODELS = {"vamp prior": with_vamp_prior, "flow": with_flow, "flow and mixture": with_both}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return request.param()


def exact(model, x, plane):
    """By sums over the plane: log p(x) and the ELBO of each image."""
    z, area = plane
    evidence, elbo = [], []
    with torch.no_grad():
        log_prior = model.prior.log_prob(z[:, None])[:, 0]
        for image in x:
            log_joint = model.likelihood.log_prob(image.expand(len(z), -1, -1, -1), model.decode(z)) + log_prior
            log_q = model.encode(image[None]).log_prob(z[:, None])[:, 0]
            evidence.append(log_joint.logsumexp(0) + area)
            elbo.append(((log_q + area).exp() * (log_joint - log_q)).nansum())
            assert log_q.exp().sum() * math.exp(area) == pytest.approx(1, abs=2e-3)
    assert log_prior.exp().sum() * math.exp(area) == pytest.approx(1, abs=2e-3)
    return torch.stack(evidence), torch.stack(elbo)


def test_every_estimate_of_a_density_of_one_s_own_is_that_of_the_integral(model, binary, plane):
    x = model.likelihood.observe(binary.pixels)
    evidence, elbo = exact(model, x, plane)
    assert (evidence - elbo).min() > 0.05  # the bound is not tight
    with torch.no_grad():
        log_weights = model.log_weights(x, 20_000, generator=torch.Generator().manual_seed(1))
    error = log_weights.std(0) / math.sqrt(20_000)  # of a mean over so many draws
    assert ((heldout_elbo(model, binary, num_samples=20_000).elbo - elbo).abs() < 5 * error + 0.01).all()
    error = (log_weights - evidence).exp().std(0) / math.sqrt(20_000)
    assert (error < 0.1).all()
    assert ((log_likelihood(model, binary, 20_000, sample_batch=5000) - evidence).abs() < 5 * error + 0.01).all()
    annealed = annealed_log_likelihood(model, binary, num_steps=100, num_chains=32)
    torch.testing.assert_close(annealed.mean(), evidence.mean(), rtol=0, atol=0.1)
    bounds = [model.importance_weighted_bound(x, k, generator=torch.Generator().manual_seed(0)).mean() for k in (1, 10, 1000)]
    assert bounds[0] < bounds[1] < bounds[2]


def test_what_is_drawn_from_a_prior_has_its_density(model, plane):
    z, area = plane
    mass = (model.prior.log_prob(z[:, None])[:, 0] + area).exp().detach()
    drawn = model.prior.sample(50_000, generator=torch.Generator().manual_seed(0)).detach()
    mean = mass @ z
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(drawn.T), (z - mean).T @ ((z - mean) * mass[:, None]), rtol=0.05, atol=0.05)
    assert generate(model, 3, seed=0).shape == (3, 1, 4, 4)
    assert torch.equal(generate(model, 3, seed=0), generate(model, 3, seed=0))


def test_gaps_are_right_under_a_prior_of_one_s_own(binary, plane):
    model = with_vamp_prior()
    evidence, elbo = exact(model, model.likelihood.observe(binary.pixels), plane)
    gaps = inference_gaps(model, binary, num_samples=5000, steps=100)
    torch.testing.assert_close(gaps.elbo, elbo, rtol=0, atol=0.1)
    torch.testing.assert_close(gaps.log_likelihood, evidence, rtol=0, atol=0.05)
    assert (gaps.amortization > -0.1).all()
    assert (gaps.approximation > -0.1).all()
    assert gaps.amortization.mean() > 0.1


def test_the_rate_splits_in_parts_that_add_up_and_are_not_negative(binary):
    model = with_vamp_prior()
    split = rate_decomposition(model, binary, num_draws=12)
    assert split.mutual_information + split.marginal_kl == pytest.approx(heldout_elbo(model, binary).kl.mean().item(), abs=1e-4)
    assert 0 < split.mutual_information < math.log(12)
    many = image_set(binary.pixels.repeat(200, 1, 1, 1))  # the same q(z), and 200 draws of each
    split = rate_decomposition(model, many, num_draws=2400)
    assert split.marginal_kl > -4 * split.marginal_kl_standard_error


def test_what_asks_for_more_than_a_density_names_the_model_s_own(binary):
    flow, vamp = with_flow(), with_vamp_prior()
    x = flow.likelihood.observe(binary.pixels)
    config = {"epochs": 1, "batch_size": 12, **QUIET}
    for call, message in [
        (lambda: inference_gaps(flow, binary, 5), "^model: got a model with the posterior Flow, expected one diagonal Gaussian q"),
        (lambda: refine_posterior(flow, x), "^model: got a model with the posterior Flow, expected one diagonal Gaussian q"),
        (lambda: rate_decomposition(flow, binary), "^model: got a model with the posterior Flow"),
        (lambda: posteriors(flow, binary), "^model: got one with the posterior Flow, expected a Gaussian"),
        (lambda: vaelib.LatentIndex.build(flow, binary), "^model: got one with the posterior Flow, expected a Gaussian"),
        (lambda: fit(flow, binary, config=TrainConfig(objective="dreg", **config)), "^objective: got 'dreg' for a model with the pos"),
        (lambda: kl_per_unit(vamp, binary), "^model: got one whose KL to the prior VampPrior has no units, expected"),
        (lambda: fit(vamp, binary, config=TrainConfig(free_bits=0.1, **config)), "^terms: got no kl_per_unit"),
        (lambda: generate(vamp, 2, temperature=0.5), "^temperature: got 0.5, but the prior VampPrior"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_a_prior_and_a_posterior_of_one_s_own_are_trained(objective, digits):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (32,), 4)
    model.prior = example("vamp_prior").VampPrior(model, 10)
    model.encoder = example("flow_posterior").FlowEncoder(model.encoder, 4)
    before, inputs, shift = (
        heldout_elbo(model, digits[1200:]).elbo.mean(),
        model.prior.inputs.clone(),
        model.encoder.t[0].weight.clone(),
    )
    config = TrainConfig(epochs=3, batch_size=50, objective=objective, num_samples=2, **QUIET)
    fit(model, digits[:1000], config=config)
    assert heldout_elbo(model, digits[1200:]).elbo.mean() > before + 150
    assert not torch.equal(model.prior.inputs, inputs)
    assert not torch.equal(model.encoder.t[0].weight, shift)


# --- the KL


def test_the_closed_forms_are_those_of_torch(generator):
    mean, log_var, other_mean, other_log_var = torch.randn(4, 3, 5, generator=generator)
    q, p = Posterior(mean, log_var), Posterior(other_mean, other_log_var)
    z = torch.zeros(1, 3, 5)
    normal, other = (torch.distributions.Normal(density.mean, (density.log_var / 2).exp()) for density in (q, p))
    standard = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(kl_divergence(q, StandardNormal(5), z)[0], torch.distributions.kl_divergence(normal, standard))
    torch.testing.assert_close(kl_divergence(q, p, z)[0], torch.distributions.kl_divergence(normal, other))
    torch.testing.assert_close(q.kl(p), torch.distributions.kl_divergence(normal, other).sum(1))
    torch.testing.assert_close(q.log_prob(z), normal.log_prob(z).sum(2))
    torch.testing.assert_close(StandardNormal(5).log_prob(mean), standard.log_prob(mean).sum(1))


@pytest.mark.equation("kl-divergence")
def test_without_a_closed_form_the_kl_is_one_draw_whose_mean_it_is(generator):
    q, z = Posterior(torch.full((1, 2), 0.5), torch.full((1, 2), -1.0)), None
    eps = torch.randn(100_000, 1, 2, generator=generator)
    z = q.sample(eps)
    prior = MixtureOfTwo()
    drawn = kl_divergence(q, prior, z)
    assert drawn.shape == (100_000, 1)
    torch.testing.assert_close(drawn, q.log_prob(z) - prior.log_prob(z))

    class AsGaussian(MixtureOfTwo):
        def log_prob(self, z):
            return StandardNormal(2).log_prob(z)

    drawn = kl_divergence(q, AsGaussian(), z)
    closed = kl_divergence(q, StandardNormal(2), z).sum()
    assert abs(drawn.mean() - closed) < 5 * drawn.std() / math.sqrt(len(drawn))


def test_a_closed_form_that_was_registered_is_taken_and_keeps_the_units(binary, monkeypatch):
    monkeypatch.setattr(vaelib.densities, "CLOSED_FORMS", dict(vaelib.densities.CLOSED_FORMS))

    class Wide:
        """N(0, 4 I)."""

        log_var = math.log(4)

        def log_prob(self, z):
            return Posterior(torch.zeros_like(z), torch.full_like(z, self.log_var)).log_prob(z)

        def sample(self, num, generator=None):
            return 2 * torch.randn(num, 2, generator=generator)

    model = plane_vae()
    model.prior = Wide()
    drawn = heldout_elbo(model, binary, num_samples=20_000).kl
    with pytest.raises(ValueError, match="the prior Wide has no units"):
        kl_per_unit(model, binary)

    @register_kl(Posterior, Wide)
    def closed_form(q, p):
        return 0.5 * ((q.mean**2 + q.log_var.exp()) / 4 - 1 + p.log_var - q.log_var)

    torch.testing.assert_close(heldout_elbo(model, binary).kl, drawn, rtol=0, atol=0.1)
    assert kl_per_unit(model, binary).sum().item() == pytest.approx(heldout_elbo(model, binary).kl.mean().item(), abs=1e-4)


def test_a_draw_is_what_the_bounds_are_made_of(generator):
    model = plane_vae()
    x = torch.bernoulli(torch.rand(3, 1, 4, 4, generator=generator), generator=generator)
    eps = torch.randn(7, 3, 2, generator=generator)
    draw = model.draw(x, 7, eps)
    assert isinstance(draw, Draw)
    assert (draw.z.shape, draw.log_likelihood.shape, draw.q.mean.shape, draw.kl.shape) == ((7, 3, 2), (7, 3), (3, 2), (1, 3, 2))
    torch.testing.assert_close(draw.log_weights, draw.log_likelihood + draw.p.log_prob(draw.z) - draw.q.log_prob(draw.z))
    torch.testing.assert_close(model.log_weights(x, 7, eps), draw.log_weights)
    for mine, other in zip(model.elbo(x, 7, eps), draw.terms, strict=True):
        torch.testing.assert_close(mine, other)
    assert draw.gaussian() is draw.q
    halves = draw.q.split([1, 1])
    for mine, other in zip(joined(halves), draw.q, strict=True):
        assert torch.equal(mine, other)
    assert not draw.q.detach().mean.requires_grad
