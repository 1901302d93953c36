"""The exact oracle: in a linear-Gaussian model log p(x) is known, and every bound must stand in its right place to it."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn

import vaelib
from vaelib import VAE, ElboTerms, Gaussian, TrainConfig, fit, heldout_elbo, image_set, mlp_vae
from vaelib.oracles import LinearGaussian

DIMS, LATENT, SCALE, COUNT = 6, 2, 0.5, 5


class FixedPosterior(nn.Module):
    """An encoder that gives the posterior it was made with."""

    def __init__(self, mean, log_var):
        super().__init__()
        self.mean, self.log_var = mean, log_var

    def forward(self, x):
        return self.mean, self.log_var


class LinearDecoder(nn.Module):
    def __init__(self, oracle):
        super().__init__()
        self.linear = nn.Linear(oracle.latent_dim, oracle.num_dims).double()
        self.linear.weight.data, self.linear.bias.data = oracle.weight.clone(), oracle.bias.clone()

    def forward(self, z):
        return self.linear(z).view(len(z), 1, 1, -1)


@pytest.fixture
def oracle(generator):
    """A model whose posterior is diagonal (orthogonal columns), so that a diagonal q can be exact."""
    basis, _ = torch.linalg.qr(torch.randn(DIMS, LATENT, generator=generator, dtype=torch.float64))
    bias = torch.randn(DIMS, generator=generator, dtype=torch.float64) / 4
    return LinearGaussian(basis * torch.tensor([0.9, 0.4], dtype=torch.float64), bias, SCALE)


@pytest.fixture
def x(oracle, generator):
    return oracle.sample(COUNT, generator)


def exact_posterior(oracle, x):
    truth = oracle.posterior(x)
    return truth.mean, truth.covariance.diagonal().log().expand(len(x), -1)


def other_posterior(generator):
    return torch.randn(2, COUNT, LATENT, generator=generator, dtype=torch.float64).mul(0.5).unbind()


def vae_with(oracle, mean, log_var):
    likelihood = Gaussian(SCALE).double()
    return VAE(FixedPosterior(mean, log_var), LinearDecoder(oracle), likelihood, (1, 1, DIMS), LATENT)


def as_images(x):
    return x.view(len(x), 1, 1, -1)


@pytest.mark.equation("evidence")
def test_log_evidence_is_the_integral_of_likelihood_times_prior(oracle, x):
    grid = torch.linspace(-7, 7, 401, dtype=torch.float64)
    z = torch.cartesian_prod(grid, grid)
    prior = -0.5 * (z**2).sum(1) - math.log(2 * math.pi)
    for row in x:
        error = (row - z @ oracle.weight.T - oracle.bias) / SCALE
        likelihood = -0.5 * (error**2).sum(1) - DIMS * (math.log(SCALE) + 0.5 * math.log(2 * math.pi))
        integral = (likelihood + prior).logsumexp(0) + 2 * math.log(grid[1] - grid[0])
        assert oracle.log_evidence(row[None]).item() == pytest.approx(integral.item(), abs=1e-6)


@pytest.mark.equation("posterior")
def test_posterior_is_the_joint_divided_by_the_evidence(oracle, x, generator):
    truth = oracle.posterior(x)
    z = torch.randn(COUNT, LATENT, generator=generator, dtype=torch.float64)
    joint = vae_with(oracle, z, torch.zeros_like(z))._log_likelihood(as_images(x), z[None])[0]
    joint = joint + torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    density = torch.distributions.MultivariateNormal(truth.mean, truth.covariance).log_prob(z)
    torch.testing.assert_close(density, joint - oracle.log_evidence(x))


@pytest.mark.equation("elbo")
def test_elbo_with_the_exact_posterior_equals_log_evidence(oracle, x):
    terms = oracle.elbo(x, *exact_posterior(oracle, x))
    torch.testing.assert_close(terms.elbo, oracle.log_evidence(x))
    # so does one sample, whatever z: the weight p(x, z) / q(z given x) is constant
    weights = vae_with(oracle, *exact_posterior(oracle, x)).log_weights(as_images(x), 3)
    torch.testing.assert_close(weights, oracle.log_evidence(x).expand(3, -1))


@pytest.mark.equation("kl-gap")
def test_the_gap_of_any_other_q_is_its_kl_to_the_posterior(oracle, x, generator):
    mean, log_var = other_posterior(generator)
    gap = oracle.log_evidence(x) - oracle.elbo(x, mean, log_var).elbo
    assert (gap > 0.05).all()
    torch.testing.assert_close(gap, oracle.posterior_kl(x, mean, log_var))


@pytest.mark.equation("monte-carlo-elbo")
def test_vae_elbo_matches_the_exact_elbo_term_by_term(oracle, x, generator):
    mean, log_var = other_posterior(generator)
    exact = oracle.elbo(x, mean, log_var)
    model = vae_with(oracle, mean, log_var)
    for num_samples in (1, 40):
        draws = torch.stack([model.elbo(as_images(x), num_samples, generator=generator).log_likelihood for _ in range(1000)])
        assert ((draws.mean(0) - exact.log_likelihood).abs() < 4 * draws.std(0) / math.sqrt(len(draws))).all()
    torch.testing.assert_close(model.elbo(as_images(x)).kl, exact.kl)


@pytest.mark.equation("log-weights")
def test_the_mean_log_weight_is_the_elbo_and_the_mean_weight_the_evidence(oracle, x, generator):
    mean, log_var = other_posterior(generator)
    log_weights = vae_with(oracle, mean, log_var).log_weights(as_images(x), 100_000, generator=generator)
    error = log_weights.std(0) / math.sqrt(100_000)
    assert ((log_weights.mean(0) - oracle.elbo(x, mean, log_var).elbo).abs() < 4 * error).all()
    ratio = (log_weights - oracle.log_evidence(x)).exp()
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / math.sqrt(100_000)).all()


@pytest.mark.equation("importance-weighted-bound")
def test_the_bounds_stand_in_order_and_rise_with_k(oracle, x, generator):
    mean, log_var = exact_posterior(oracle, x)
    mean, log_var = mean + 0.4, log_var + 0.8  # a q wider than the posterior, so that the weights have finite variance
    model = vae_with(oracle, mean, log_var)
    repeats = 4000
    bounds, errors = [oracle.elbo(x, mean, log_var).elbo], [torch.zeros(COUNT)]
    for k in (2, 5, 20, 100):
        log_weights = model.log_weights(as_images(x), k * repeats, generator=generator).view(k, -1)
        draws = vaelib.importance_weighted_bound(log_weights).view(repeats, COUNT)
        bounds.append(draws.mean(0))
        errors.append(draws.std(0) / math.sqrt(repeats))
    for lower, upper, e, f in zip(bounds[:-1], bounds[1:], errors[:-1], errors[1:], strict=True):
        assert (upper - lower > 2 * (e**2 + f**2).sqrt()).all()
    truth = oracle.log_evidence(x)
    assert (bounds[-1] < truth + 3 * errors[-1]).all()
    assert (truth - bounds[-1] < 0.02).all()
    assert (truth - bounds[0] > 0.2).all()


@pytest.mark.equation("monte-carlo-elbo")
def test_gradients_of_the_reparameterized_elbo_match_finite_differences(generator):
    torch.manual_seed(0)
    for likelihood in ("bernoulli", {"name": "gaussian", "scale": 0.4, "learned": True}, "discretized_logistic"):
        model = mlp_vae((1, 2, 3), (4,), 2, likelihood, activation="tanh").double()
        pixels = torch.randint(0, 256, (3, 1, 2, 3), generator=generator, dtype=torch.uint8)
        x = model.likelihood.observe(pixels, generator).double()
        eps = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
        parameters = dict(model.named_parameters())

        def elbo(*values, model=model, parameters=parameters, x=x, eps=eps):
            terms = torch.func.functional_call(
                ElboOf(model), {f"model.{k}": v for k, v in zip(parameters, values, strict=True)}, (x, eps)
            )
            return terms.log_likelihood, terms.kl

        assert torch.autograd.gradcheck(elbo, tuple(parameters.values()), eps=1e-6, atol=1e-5)


class ElboOf(nn.Module):
    """A module whose forward is the ELBO, so that torch.func can call it with other weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, eps) -> ElboTerms:
        return self.model.elbo(x, 2, eps)


@pytest.fixture(scope="module")
def small_digits():
    """scikit-learn's digits as they are, 8x8, each pixel a multiple of 15."""
    return image_set(torch.from_numpy(load_digits().images * 15).to(torch.uint8)[:, None])


def test_a_linear_vae_trained_by_fit_reaches_the_evidence_of_pca(small_digits):
    latent_dim = 8
    torch.manual_seed(0)
    model = mlp_vae(small_digits.image_shape, (), latent_dim, {"name": "gaussian", "scale": 0.5, "learned": True})
    data = model.likelihood.observe(small_digits.pixels).flatten(1).numpy()
    pca = PCA(latent_dim).fit(data)
    truth = pca.score(data)
    config = TrainConfig(epochs=150, batch_size=100, learning_rate=0.02, progress=False)
    vaelib.fit(model, small_digits, config=config)
    elbo = heldout_elbo(model, small_digits, num_samples=20).elbo.mean().item()
    assert truth - 0.5 < elbo < truth + 0.05
    decoder = model.decoder.head
    oracle = LinearGaussian(decoder.weight.detach(), decoder.bias.detach(), model.likelihood.log_scale.exp().item())
    evidence = oracle.log_evidence(torch.from_numpy(data)).mean().item()
    assert elbo - 0.05 < evidence < truth + 0.01  # the maximum of the likelihood is PCA's


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="weight, bias: got .* expected shapes"):
        LinearGaussian(torch.zeros(3, 2), torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="scale: got .*, expected a finite number above 0"):
        LinearGaussian(torch.zeros(3, 2), torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match="expected a validation set|expected valid"):
        fit(mlp_vae((1, 8, 8), (), 2), image_set(torch.zeros(200, 1, 8, 8, dtype=torch.uint8)), config=TrainConfig(patience=1))


@pytest.mark.equation("dequantization")
def test_uniform_noise_bounds_the_probability_of_the_pixels_from_below():
    """Two pixels with strong correlation: the bound against the Gaussian's mass on each unit square, by quadrature."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(40_000, generator=generator)
    pair = torch.stack([common, common + 0.5 * torch.randn(40_000, generator=generator)], dim=1)
    pixels = (127 + 4 * pair).floor().clamp(0, 255).to(torch.uint8).view(-1, 1, 1, 2)
    train, test = pixels[:20_000], pixels[20_000:]
    x = train.flatten(1).double() + 0.5
    covariance = torch.cov(x.T, correction=0) + torch.eye(2, dtype=torch.float64) / 12
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), covariance)
    inside = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    square = torch.cartesian_prod(inside, inside)  # midpoints of a fine grid within the unit square
    mass = gaussian.log_prob(test.flatten(1)[:, None] + square).logsumexp(1) - math.log(400)
    bound = vaelib.oracles.gaussian_pixels_log_prob(train, test)
    gap = mass - bound
    standard_error = (gap.std() / math.sqrt(len(gap))).item()
    assert 0 < gap.mean().item() < 0.05
    assert gap.mean().item() > 4 * standard_error
    entropy = gaussian.entropy().item()
    assert -bound.mean().item() == pytest.approx(entropy, abs=5 * (bound.std() / math.sqrt(len(bound))).item())


def test_the_gaussian_of_pixels_refuses_images_of_other_shapes():
    with pytest.raises(ValueError, match=r"test: got images of shape \(1, 1, 3\), expected \(1, 1, 2\)"):
        vaelib.oracles.gaussian_pixels_log_prob(
            torch.zeros(9, 1, 1, 2, dtype=torch.uint8), torch.zeros(9, 1, 1, 3, dtype=torch.uint8)
        )
