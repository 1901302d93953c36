"""The exact oracle: in a linear-Gaussian model log p(x) is known, and every bound must stand in its right place to it."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn

import vaelib
from vaelib import VAE, ElboTerms, Gaussian, TrainConfig, fit, heldout_elbo, image_set, mlp_vae
from vaelib.book import oracles
from vaelib.book.oracles import LinearGaussian, linear_rate, principal_components, probabilistic_pca

DIMS, LATENT, SCALE, COUNT = 6, 2, 0.5, 5


EIGENVALUES = torch.tensor([3.0, 1.2, 0.6, 0.25, 0.1, 0.02], dtype=torch.float64)  # of the data below; SCALE**2 is 0.25


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
    return VAE(FixedPosterior(mean, log_var), LinearDecoder(oracle), likelihood, (1, 1, DIMS), oracle.latent_dim)


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
    joint = vae_with(oracle, z, torch.zeros_like(z)).log_likelihood(as_images(x), z[None])[0]
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
    config = TrainConfig(epochs=80, batch_size=100, learning_rate=0.02, progress=False, device="cpu")
    vaelib.fit(model, small_digits, config=config)
    elbo = heldout_elbo(model, small_digits, num_samples=20).elbo.mean().item()
    assert truth - 0.5 < elbo < truth + 0.05
    decoder = model.decoder.head
    oracle = LinearGaussian(decoder.weight.detach(), decoder.bias.detach(), model.likelihood.log_scale.exp().item())
    evidence = oracle.log_evidence(torch.from_numpy(data)).mean().item()
    assert elbo - 0.05 < evidence < truth + 0.01  # the maximum of the likelihood is PCA's


@pytest.fixture
def data(generator):
    """Data (400, DIMS) whose covariance has EIGENVALUES to the last digit, and its principal components."""
    white = torch.randn(400, DIMS, generator=generator, dtype=torch.float64)
    white -= white.mean(0)
    white = torch.linalg.qr(white)[0] * math.sqrt(len(white))
    basis, _ = torch.linalg.qr(torch.randn(DIMS, DIMS, generator=generator, dtype=torch.float64))
    x = white * EIGENVALUES.sqrt() @ basis.T + torch.randn(DIMS, generator=generator, dtype=torch.float64)
    return x, principal_components(x.mean(0), torch.cov(x.T, correction=0))


@pytest.mark.equation("probabilistic-pca")
def test_probabilistic_pca_has_the_covariance_of_the_data_in_its_own_directions_and_one_scale_in_the_others(data):
    x, components = data
    torch.testing.assert_close(components.eigenvalues, EIGENVALUES)
    oracle = probabilistic_pca(components, LATENT)
    assert oracle.scale**2 == pytest.approx(EIGENVALUES[LATENT:].mean().item())
    covariance = oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(DIMS)
    expected = torch.cat([EIGENVALUES[:LATENT], torch.full((DIMS - LATENT,), oracle.scale**2)])
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance).flip(0), expected)
    # so its mean log-likelihood is that of scikit-learn's, which divides by N - 1, on data that make up for it
    scaled = x.mean(0) + (x - x.mean(0)) * math.sqrt((len(x) - 1) / len(x))
    pca = PCA(LATENT).fit(scaled.numpy())
    expected = probabilistic_pca(principal_components(scaled.mean(0), torch.cov(scaled.T)), LATENT).log_evidence(scaled)
    assert expected.mean().item() == pytest.approx(pca.score(scaled.numpy()), abs=1e-9)


@pytest.mark.equation("probabilistic-pca")
@pytest.mark.parametrize("scale", [None, SCALE])
def test_no_other_weight_bias_or_scale_has_a_higher_likelihood(data, scale, generator):
    x, components = data
    best = probabilistic_pca(components, 4, scale)
    weight, bias = best.weight.clone().requires_grad_(), best.bias.clone().requires_grad_()
    LinearGaussian(weight, bias, best.scale).log_evidence(x).mean().backward()
    assert weight.grad.abs().max() < 1e-9
    assert bias.grad.abs().max() < 1e-9
    highest = best.log_evidence(x).mean()
    for _ in range(20):
        step = 0.1 * torch.randn(best.weight.shape, generator=generator, dtype=torch.float64)
        assert LinearGaussian(best.weight + step, best.bias, best.scale).log_evidence(x).mean() < highest
    if scale is None:
        assert all(LinearGaussian(best.weight, best.bias, best.scale * f).log_evidence(x).mean() < highest for f in (0.95, 1.05))


def test_with_a_latent_less_than_dimensions_probabilistic_pca_is_the_full_gaussian(data):
    x, components = data
    full = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0)).log_prob(x)
    terms = probabilistic_pca(components, DIMS - 1).exact_elbo(x)
    torch.testing.assert_close(components.log_prob(x), full)
    torch.testing.assert_close(terms.elbo, full)  # rate and distortion make up -log p: the rate is no surcharge
    assert terms.kl.mean() > 3


@pytest.mark.equation("linear-rate")
def test_a_unit_of_a_linear_vae_is_silent_where_its_eigenvalue_is_at_most_the_squared_scale(data):
    x, components = data
    oracle = probabilistic_pca(components, 5, SCALE)  # eigenvalues 3, 1.2, 0.6 stand above 0.25, the next at it, the last below
    model = vae_with(oracle, *exact_posterior(oracle, x))
    terms = model.elbo(as_images(x), 1)
    rate = linear_rate(EIGENVALUES[:5], SCALE)
    torch.testing.assert_close(rate, 0.5 * torch.tensor([12.0, 4.8, 2.4, 1.0, 1.0], dtype=torch.float64).log())
    torch.testing.assert_close(terms.kl_per_unit.mean(0), rate)
    assert (terms.kl_per_unit[:, 3:].abs() < 1e-9).all()  # not in the mean only: for every image
    # the closed form, the library's own weights and the brute-force Gaussian agree image by image
    brute = torch.distributions.MultivariateNormal(oracle.bias, oracle.weight @ oracle.weight.T + SCALE**2 * torch.eye(DIMS))
    torch.testing.assert_close(oracle.exact_elbo(x).elbo, brute.log_prob(x))
    torch.testing.assert_close(oracle.exact_elbo(x).kl, terms.kl)
    torch.testing.assert_close(model.log_weights(as_images(x), 3), brute.log_prob(x).expand(3, -1))


@pytest.mark.equation("linear-rate")
def test_giving_a_silent_unit_a_weight_lowers_the_evidence_and_a_live_one_raises_it(data):
    x, components = data
    for unit, direction, better in ((2, 2, True), (4, 4, False)):
        without = probabilistic_pca(components, 5, SCALE)
        without.weight[:, unit] = 0
        small = without.weight.clone()
        small[:, unit] = 0.05 * components.directions[:, direction]
        change = LinearGaussian(small, without.bias, SCALE).log_evidence(x).mean() - without.log_evidence(x).mean()
        assert (change > 0) == better
        assert abs(change) > 1e-5


@pytest.mark.equation("linear-rate")
def test_fit_leaves_a_linear_vae_with_the_predicted_units_and_nats(small_digits):
    torch.manual_seed(0)
    scale, latent_dim = 0.8, 12
    model = mlp_vae(small_digits.image_shape, (), latent_dim, {"name": "gaussian", "scale": scale})
    x = model.likelihood.observe(small_digits.pixels).flatten(1).double()
    components = principal_components(x.mean(0), torch.cov(x.T, correction=0))
    predicted = linear_rate(components.eigenvalues, scale)
    live = int((predicted > 0).sum())
    assert 3 <= live <= latent_dim - 3
    vaelib.fit(model, small_digits, config=TrainConfig(epochs=80, batch_size=100, learning_rate=0.02, progress=False, device="cpu"))
    measured = vaelib.kl_per_unit(model, small_digits).sort(descending=True).values.double()
    assert measured.sum().item() == pytest.approx(predicted.sum().item(), abs=0.1)
    assert (measured[:live] - predicted[:live]).abs().max() < 0.1
    assert measured[live:].max() < 0.01


def test_components_and_latent_dims_that_do_not_fit_are_refused(data):
    _, components = data
    with pytest.raises(ValueError, match="latent_dim: got 6, expected fewer than the 6 dimensions of x"):
        probabilistic_pca(components, DIMS)
    with pytest.raises(ValueError, match="scale: got .*, expected a finite number above 0"):
        probabilistic_pca(components, 2, 0.0)
    with pytest.raises(ValueError, match=r"mean, covariance: got .*, expected shapes \(D,\) and \(D, D\)"):
        principal_components(torch.zeros(3), torch.zeros(3, 2))


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


@pytest.mark.equation("kalman")
def test_the_kalman_filter_gives_the_log_density_of_all_frames_together():
    generator = torch.Generator().manual_seed(0)
    transition, weight = torch.randn(2, 2, generator=generator).double() / 2, torch.randn(3, 2, generator=generator).double()
    model = oracles.StateSpace(transition, torch.tensor([0.5, 0.8]).double(), weight, torch.ones(3).double(), 0.3)
    x = model.sample(5, 4, generator)
    blocks = [torch.eye(2).double()]  # covariances of z_t, then of z_s and z_t
    for _ in range(3):
        blocks.append(transition @ blocks[-1] @ transition.T + (model.noise**2).diag())
    joint = torch.zeros(12, 12).double()
    for s in range(4):
        for t in range(s, 4):
            between = weight @ torch.linalg.matrix_power(transition, t - s) @ blocks[s] @ weight.T
            joint[3 * t : 3 * t + 3, 3 * s : 3 * s + 3] = between
            joint[3 * s : 3 * s + 3, 3 * t : 3 * t + 3] = between.T
    whole = torch.distributions.MultivariateNormal(model.bias.repeat(4), joint + 0.09 * torch.eye(12).double())
    torch.testing.assert_close(model.log_evidence(x), whole.log_prob(x.flatten(1)))


def test_a_draw_of_a_state_space_model_has_the_variance_of_its_law():
    model = oracles.StateSpace(0.5 * torch.eye(1), torch.tensor([0.75**0.5]), torch.ones(1, 1), torch.zeros(1), 0.1)
    x = model.sample(20000, 3, torch.Generator().manual_seed(0))[..., 0]
    torch.testing.assert_close(
        torch.cov(x.T), torch.tensor([[1.01, 0.5, 0.25], [0.5, 1.01, 0.5], [0.25, 0.5, 1.01]]), atol=0.04, rtol=0
    )
