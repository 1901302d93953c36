"""Diffusion held to exact answers: densities whose score is known at every noise level, and Gaussians' own KL."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import vaelib
from vaelib import diffusion
from vaelib.diffusion import (
    PARAMETERIZATIONS,
    SCHEDULES,
    DiffusionPrior,
    Schedule,
    alpha_sigma,
    denoising_loss,
    diffusion_elbo,
    fit_diffusion,
    make_denoiser,
    make_schedule,
    noised,
)
from vaelib.priors import MixturePrior

ENDS = {"low": -10.0, "high": 10.0}  # what is cut off beyond is below what the tests resolve


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def mixture():
    """Three Gaussians of the plane, with full covariances."""
    roots = torch.tensor([[[0.5, 0.0], [0.3, 0.2]], [[0.3, 0.0], [-0.2, 0.4]], [[0.2, 0.0], [0.0, 0.9]]])
    means = torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.5, -1.0]])
    return MixturePrior(torch.tensor([0.5, 0.2, 0.3]), means, roots)


def noised_log_prob(mixture, x_t, log_snr):
    """log of the mixture's density after the noise of the level, which is a mixture again."""
    mixture = MixturePrior(*(part.double() for part in mixture))
    alpha, sigma = alpha_sigma(log_snr)  # (N, 1)
    covariances = (
        alpha[..., None, None] ** 2 * (mixture.roots @ mixture.roots.mT) + sigma[..., None, None] ** 2 * torch.eye(2).double()
    )
    components = MultivariateNormal(alpha[..., None] * mixture.means, covariances, validate_args=False)
    return MixtureSameFamily(
        Categorical(mixture.weights.expand(len(x_t), -1), validate_args=False), components, validate_args=False
    ).log_prob(x_t)


def exact_denoiser(mixture):
    """E[eps given x_t] = -sigma times the score of the noised density."""

    def denoiser(x_t, log_snr):
        with torch.enable_grad():
            at = x_t.detach().requires_grad_()
            (score,) = torch.autograd.grad(noised_log_prob(mixture, at, log_snr).sum(), at)
        return -alpha_sigma(log_snr)[1] * score

    return denoiser


def exact_gaussian(variances):
    def denoiser(x_t, log_snr):
        alpha, sigma = alpha_sigma(log_snr)
        return sigma * x_t / (alpha**2 * variances + sigma**2)

    return denoiser


@pytest.mark.equation("diffusion-marginal")
def test_the_encoder_adds_noise_so_that_the_variance_of_standardized_data_stays():
    x, eps = torch.randn(2, 4000, 3, generator=seeded()).unbind()
    for level in (-6.0, 0.0, 6.0):
        log_snr = torch.full((4000,), level)
        x_t = noised(x, log_snr, eps)
        assert x_t.std().item() == pytest.approx(1, abs=0.03)
        correlation = torch.corrcoef(torch.stack([x.flatten(), x_t.flatten()]))[0, 1]
        assert correlation.item() == pytest.approx((1 / (1 + math.exp(-level))) ** 0.5, abs=0.03)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_between_its_ends_and_its_slope_is_its_derivative(name):
    schedule = make_schedule(name, -8.0, 9.0)
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    values = schedule(t)
    assert values[[0, -1]].tolist() == pytest.approx([9.0, -8.0], abs=1e-6)
    (derivative,) = torch.autograd.grad(values.sum(), t)
    assert (derivative < 0).all()
    torch.testing.assert_close(schedule.slope(t.detach()), derivative)


@pytest.mark.equation("diffusion-continuous")
@pytest.mark.parametrize("name", SCHEDULES)
def test_with_the_exact_denoiser_the_bound_is_the_log_density_of_each_point(mixture, name):
    x, width = mixture.sample(4, seeded(1)).double(), {"linear": 0.03, "cosine": 0.15, "flow": 0.1}[name]
    terms = diffusion_elbo(exact_denoiser(mixture), make_schedule(name, **ENDS), x.repeat(200, 1), None, 200, seeded())
    each = terms.elbo.view(200, 4)
    error = each.std(0) / 200**0.5
    assert (error < width).all()
    assert ((each.mean(0) - mixture.log_prob(x)).abs() < 4 * error + 1e-3).all()


def test_for_a_gaussian_too():
    variances = torch.tensor([0.1, 1.0, 3.0]).double()
    x = variances.sqrt() * torch.randn(3, 3, generator=seeded()).double()
    each = diffusion_elbo(exact_gaussian(variances), Schedule("linear", **ENDS), x.repeat(300, 1), None, 64, seeded()).elbo.view(
        300, 3
    )
    exact = torch.distributions.Normal(0, variances.sqrt()).log_prob(x).sum(1)
    assert ((each.mean(0) - exact).abs() < 4 * each.std(0) / 300**0.5 + 1e-3).all()


@pytest.mark.equation("diffusion-elbo")
def test_in_discrete_time_the_bound_rises_with_the_number_of_levels_to_the_log_density(mixture):
    x, denoiser = mixture.sample(400, seeded(1)).double(), exact_denoiser(mixture)
    exact = mixture.log_prob(x).mean().item()
    schedule, counts = Schedule("linear", **ENDS), (8, 32, 64, 128, 512)
    gaps = [exact - diffusion_elbo(denoiser, schedule, x, steps, 64, seeded()).elbo.mean().item() for steps in counts]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1
    assert gaps[2] / gaps[3] == pytest.approx(2, rel=0.2)  # the gap is of the order 1 / T
    assert abs(gaps[4]) < 0.25


@pytest.mark.equation("diffusion-elbo")
def test_each_level_s_term_is_the_kl_of_two_gaussians_of_a_hierarchical_vae():
    """q(x_s given x_t, x), by Bayes' rule from the encoder's own Gaussians, against p(x_s given x_t)."""
    generator = seeded()
    x, x_t, guess = torch.randn(3, 50, 4, generator=generator, dtype=torch.float64).unbind()
    level_s, level_t = torch.full((50,), 1.3).double(), torch.full((50,), 0.4).double()
    (a_s, s_s), (a_t, s_t) = alpha_sigma(level_s), alpha_sigma(level_t)
    step = a_t / a_s  # q(x_t given x_s) = N(step x_s, new)
    new = s_t**2 - step**2 * s_s**2
    precision = 1 / s_s**2 + step**2 / new
    mean = (a_s * x / s_s**2 + step * x_t / new) / precision
    p_mean, p_deviation = diffusion.previous(x_t, guess, level_t, level_s)
    torch.testing.assert_close(p_deviation**2, 1 / precision)
    log_var = -precision.log().expand_as(mean)
    by_gaussians = vaelib.gaussian_kl(mean, log_var, p_mean, log_var)
    eps = (x_t - a_t * x) / s_t
    torch.testing.assert_close(diffusion.level_kl((eps - guess).square().sum(1), level_s, level_t), by_gaussians)


def test_the_sum_over_levels_is_that_of_a_hierarchical_vae_along_one_path(mixture):
    """Three levels: the log-ratio of the whole path, drawn by the encoder, has the mean of the terms."""
    schedule, denoiser, draws = Schedule("linear", -2.0, 4.0), exact_denoiser(mixture), 20000
    x = torch.tensor([[0.4, -0.6]]).double().expand(draws, 2)
    levels = schedule(torch.linspace(0, 1, 4)).double()[:, None].expand(-1, draws)
    path, generator = [x], seeded()
    before_a, before_s = torch.ones(draws, 1).double(), torch.zeros(draws, 1).double()
    log_q = torch.zeros(draws).double()
    for level in levels:  # x_0, x_1/3, ..., x_1: each from the one before
        alpha, sigma = alpha_sigma(level)
        step = alpha / before_a
        deviation = (sigma**2 - step**2 * before_s**2).sqrt()
        nxt = step * path[-1] + deviation * torch.randn(draws, 2, generator=generator, dtype=torch.float64)
        log_q += vaelib.gaussian_log_density(nxt, step * path[-1], (2 * deviation.log()).expand_as(nxt))
        path, before_a, before_s = [*path, nxt], alpha, sigma
    log_p = vaelib.gaussian_log_density(path[-1], torch.zeros_like(x), torch.zeros_like(x))
    for i in (3, 2, 1):
        mean, deviation = diffusion.previous(path[i + 1], denoiser(path[i + 1], levels[i]), levels[i], levels[i - 1])
        log_p += vaelib.gaussian_log_density(path[i], mean, (2 * deviation.log()).expand_as(mean))
    clean = diffusion.clean_of(path[1], levels[0], denoiser(path[1], levels[0]))
    log_p += vaelib.gaussian_log_density(x, clean, (-levels[0])[:, None].expand_as(x))
    by_path = log_p - log_q
    by_terms = diffusion_elbo(denoiser, schedule, x, 3, 3, seeded(1)).elbo
    error = (by_path.var() / draws + by_terms.var() / draws).sqrt()
    assert (by_path.mean() - by_terms.mean()).abs() < 4 * error
    assert by_terms.std() < by_path.std()  # KLs in closed form


def test_schedules_with_the_same_ends_give_one_bound_with_other_variances(mixture):
    x, denoiser = mixture.sample(3000, seeded(1)).double(), exact_denoiser(mixture)
    found = {name: diffusion_elbo(denoiser, make_schedule(name, **ENDS), x, None, 1, seeded()).levels for name in SCHEDULES}
    means = {name: levels.mean().item() for name, levels in found.items()}
    errors = {name: levels.std().item() / 3000**0.5 for name, levels in found.items()}
    for name in SCHEDULES:
        assert abs(means[name] - means["linear"]) < 4 * math.hypot(errors[name], errors["linear"])
    spreads = sorted(levels.std().item() for levels in found.values())
    assert spreads[-1] > 1.3 * spreads[0]


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_the_parameterizations_are_one_loss_up_to_a_weight(parameterization):
    x, eps, wrong = torch.randn(3, 60, 5, generator=seeded(), dtype=torch.float64).unbind()
    t = torch.linspace(0.05, 0.95, 60, dtype=torch.float64)
    schedule = Schedule()
    log_snr = schedule(t)
    x_t = noised(x, log_snr, eps)
    target = diffusion.target_of(parameterization, x, eps, log_snr)
    torch.testing.assert_close(diffusion.noise_of(parameterization, target, x_t, log_snr), eps)
    output = target + wrong
    error = (eps - diffusion.noise_of(parameterization, output, x_t, log_snr)).square().sum(1)
    weighted = diffusion.noise_weight(parameterization, log_snr) * wrong.square().sum(1)
    torch.testing.assert_close(error, weighted)
    loss = denoising_loss(lambda *_: output, schedule, x, t, eps, None, parameterization)
    torch.testing.assert_close(loss, -0.5 * schedule.slope(t) * error)


def test_flow_matching_is_the_straight_line_from_data_to_noise():
    """In x_t / (alpha + sigma) the way is (1 - s) x + s eps, and its speed eps - x is what the network is asked for."""
    x, eps = torch.randn(2, 7, 3, generator=seeded(), dtype=torch.float64).unbind()
    s = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    log_snr = 2 * ((1 - s) / s).log()
    alpha, sigma = alpha_sigma(log_snr)
    line = (1 - s)[:, None] * x + s[:, None] * eps
    torch.testing.assert_close(noised(x, log_snr, eps) / (alpha + sigma), line)
    torch.testing.assert_close(diffusion.target_of("flow", x, eps, log_snr), eps - x)
    uncut = Schedule("flow", -30.0, 30.0)
    torch.testing.assert_close(uncut(s), log_snr, rtol=1e-4, atol=1e-4)
    simple = denoising_loss(lambda *_: torch.zeros_like(x), uncut, x, s, eps, None, "flow", "simple")
    torch.testing.assert_close(simple, (eps - x).square().mean(1))


class Exact(torch.nn.Module):
    """A network that knows the density of the data."""

    def __init__(self, mixture):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.denoiser, self.config = exact_denoiser(mixture), {"num_classes": 0}

    def forward(self, x_t, log_snr, labels=None):
        return self.denoiser(x_t.double(), log_snr.double()).float()


@pytest.mark.parametrize("stochastic", [True, False])
def test_samples_of_the_exact_denoiser_are_samples_of_the_density(mixture, stochastic):
    prior = DiffusionPrior(Exact(mixture), Schedule(), torch.zeros(2), torch.ones(2), "eps")
    prior.steps, prior.stochastic = 200, stochastic
    drawn, true = prior.sample(4000, seeded()), mixture.sample(4000, seeded(1))
    found, expected = (mixture.log_prob(each.double()) for each in (drawn, true))
    assert found.mean().item() == pytest.approx(expected.mean().item(), abs=0.1)
    torch.testing.assert_close(drawn.mean(0), true.float().mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(true.float().T), atol=0.12, rtol=0)


def test_the_bound_of_a_prior_is_that_of_standardized_codes(mixture):
    moved = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    plain = DiffusionPrior(Exact(mixture), Schedule(), torch.zeros(2), torch.ones(2), "eps")
    shifted = DiffusionPrior(Exact(mixture), Schedule(), *moved, "eps")
    x = mixture.sample(20, seeded())
    there = moved[0] + moved[1] * x.float()
    torch.testing.assert_close(shifted.bound(there), plain.bound(x.float()) - moved[1].log().sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(plain.bound(x.float(), num_draws=500).mean(), mixture.log_prob(x).float().mean(), atol=0.05, rtol=0)


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = vaelib.mlp_vae((1, 28, 28), (64,), 4)
    vaelib.fit(model, digits, config=vaelib.TrainConfig(epochs=10, batch_size=50, progress=False, device="cpu"))
    return model


@pytest.fixture(scope="module")
def prior(trained, digits):
    return fit_diffusion(trained, digits, labels=True, steps=800, batch_size=64, width=64, depth=2)


def test_a_fitted_prior_gives_codes_of_unseen_images_more_than_the_standard_normal_does(trained, prior):
    z = vaelib.priors.posterior_samples(trained, vaelib.load_images("digits", "test")[:150])
    gain = prior.bound(z) - trained.prior.log_prob(z)
    assert gain.mean() > 3 * gain.std() / len(z) ** 0.5  # although it is a bound
    assert prior.history[0] > prior.history[-1]


def test_sample_i_is_the_same_whatever_the_number_of_samples(trained, prior):
    for stochastic in (True, False):
        one = prior.given(None)
        one.stochastic, one.steps = stochastic, 10
        draws = {num: one.sample(num, seeded(3)) for num in (1, 3, 50)}
        torch.testing.assert_close(draws[50][:3], draws[3], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(draws[3][:1], draws[1], rtol=1e-4, atol=1e-4)
    assert vaelib.generate(trained, 3, seed=0, prior=one).shape == (3, 1, 28, 28)


@pytest.mark.equation("guidance")
def test_guidance_moves_the_noise_away_from_what_it_is_without_the_label(prior):
    x_t, log_snr = torch.randn(6, 4, generator=seeded()), torch.linspace(-4, 4, 6)
    labels = torch.full((6,), 3)
    with torch.no_grad():
        without, told = prior.denoiser()(x_t, log_snr), prior.given(3).denoiser(labels)(x_t, log_snr)
        assert not torch.allclose(without, told)
        for weight in (0.0, 1.0, 2.5):
            guided = prior.given(3, weight).denoiser(labels)(x_t, log_snr)
            torch.testing.assert_close(guided, (1 - weight) * without + weight * told, rtol=1e-4, atol=1e-5)


def test_guidance_makes_codes_more_like_those_of_the_label(trained, prior, digits):
    codes = vaelib.priors.posterior_samples(trained, digits)
    means = torch.stack([codes[digits.labels == digit].mean(0) for digit in range(10)])

    def share(weight):
        labels = torch.arange(10).repeat(30)
        drawn = prior.given(labels, weight).sample(300, seeded())
        return (torch.cdist(drawn, means).argmin(1) == labels).float().mean().item()

    shares = [share(weight) for weight in (0.0, 1.0, 3.0)]
    assert shares[0] < 0.3 < shares[1] < shares[2]


def test_what_cannot_be_asked_says_so(trained, prior, digits):
    with pytest.raises(ValueError, match="guidance: got 2.0, expected 1: guided samples have no density"):
        prior.given(3, 2.0).bound(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="labels: got int 10, expected classes from 0 to 9"):
        prior.given(10)
    with pytest.raises(ValueError, match="labels: got 3 for 2 codes"):
        prior.given(torch.tensor([1, 2, 3])).sample(2)
    with pytest.raises(ValueError, match="this prior was fitted without them"):
        fit_diffusion(trained, digits[:50], steps=1, width=8).given(1)
    with pytest.raises(ValueError, match="labels: got True for images without labels"):
        fit_diffusion(trained, digits.pixels, labels=True, steps=1)
    with pytest.raises(ValueError, match="schedule: got 'cosin', expected one of"):
        fit_diffusion(trained, digits, schedule="cosin")
    with pytest.raises(ValueError, match="weighting: got"):
        fit_diffusion(trained, digits[:50], steps=1, width=8, weighting="unit")
    with pytest.raises(ValueError, match=r"z: got a float32 tensor of shape \(2, 5\), expected shape \(N, 4\)"):
        prior.bound(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="x: got"):
        diffusion_elbo(exact_gaussian(1), Schedule(), torch.zeros(3))
    with pytest.raises(ValueError, match="low, high: got"):
        make_schedule("linear", 1.0, 2.0)
    with pytest.raises(ValueError, match="shape, width: got .* and 12, expected"):
        make_denoiser((4, 7, 7), 12, 1, 0)


def test_a_prior_over_maps_learns_that_the_places_of_a_map_are_alike():
    x = torch.randn(500, 2, 1, 1, generator=seeded()).expand(-1, -1, 3, 5).flatten(1)
    torch.manual_seed(0)
    network = make_denoiser((2, 3, 5), 16, 1, 0)
    history = diffusion.fit_denoiser(network, Schedule(), x, steps=300, batch_size=64)
    assert history[-1] < 0.65 * history[0]
    drawn = DiffusionPrior(network, Schedule(), torch.zeros(30), torch.ones(30)).sample(50, seeded()).view(50, 2, 15)
    assert drawn.std(2).mean() < 0.7 * drawn.std()


def test_a_map_of_codes_gets_a_network_for_maps():
    torch.manual_seed(0)
    model = vaelib.conv_vae((3, 32, 32), latent_dim=(2, 4, 4), channels=(8, 8, 8))
    prior = fit_diffusion(model, vaelib.load_images("shapes")[:50], steps=2, batch_size=8, width=16, depth=1)
    prior.steps = 3
    assert isinstance(prior.network, diffusion.MapDenoiser)
    assert vaelib.generate(model, 3, seed=0, prior=prior).shape == (3, 3, 32, 32)


def test_a_saved_prior_draws_the_same(prior, tmp_path):
    diffusion.save_prior(prior, tmp_path / "prior.safetensors")
    again = diffusion.load_prior(tmp_path / "prior.safetensors")
    prior.steps = again.steps = 10
    torch.testing.assert_close(again.given(2, 1.5).sample(5, seeded()), prior.given(2, 1.5).sample(5, seeded()))
    z = torch.zeros(2, 4)
    torch.testing.assert_close(again.bound(z), prior.bound(z))
    (tmp_path / "broken").write_bytes(b"no")
    for name in ("broken", "missing"):
        with pytest.raises(ValueError, match="expected a file written by save_prior"):
            diffusion.load_prior(tmp_path / name)


def test_the_fit_leaves_the_caller_s_random_state_alone_and_depends_on_its_seed(trained, digits):
    before = torch.random.get_rng_state()
    options = {"steps": 5, "width": 8, "depth": 1}
    weights = [fit_diffusion(trained, digits[:60], seed=seed, **options).network.leave.weight for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def students_loss(network, log_snr, x, i, eps):
    """As a student writes it, with the weights of x."""
    alpha2, previous_alpha2 = torch.sigmoid(log_snr[i]), torch.sigmoid(log_snr[i - 1])
    snr, previous_snr = alpha2 / (1 - alpha2), previous_alpha2 / (1 - previous_alpha2)
    x_i = alpha2.sqrt()[:, None] * x + (1 - alpha2).sqrt()[:, None] * eps
    x_hat = (x_i - (1 - alpha2).sqrt()[:, None] * network(x_i, log_snr[i])) / alpha2.sqrt()[:, None]
    return (len(log_snr) - 1) / 2 * (previous_snr - snr) * ((x - x_hat) ** 2).sum(1)


def test_the_checker_passes_a_loss_that_is_right_in_other_words():
    assert vaelib.checks.check_diffusion_loss(students_loss)


MISTAKES = [(name, fn) for name, (_, *fns) in vaelib.checks.DIFFUSION_MISTAKES.items() for fn in fns]


@pytest.mark.parametrize(("name", "fn"), MISTAKES, ids=[f"{name}-{place}" for place, (name, _) in enumerate(MISTAKES)])
def test_the_checker_names_the_mistake(name, fn):
    verdict = vaelib.checks.check_diffusion_loss(lambda network, log_snr, x, i, eps: fn(network, log_snr, x, i, eps))
    assert (verdict.passed, verdict.mistake) == (False, name)


def test_the_checker_names_two_mistakes_and_a_loss_without_a_gradient():
    def two(network, log_snr, x, i, eps):
        x_i = torch.sigmoid(log_snr[i]).sqrt()[:, None] * x + torch.sigmoid(-log_snr[i])[:, None] * eps  # a variance
        weight = torch.expm1(log_snr[i - 1] - log_snr[i])
        return 0.5 * weight * (eps - network(x_i, log_snr[i])).square().sum(1)  # and no T

    assert vaelib.checks.check_diffusion_loss(two).mistake == "variance + no-steps"
    assert vaelib.checks.check_diffusion_loss(lambda *a: students_loss(*a).detach()).mistake == "detached"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_checker_s_loss_has_the_mean_that_the_library_s_sum_over_levels_has(mixture, schedule):
    levels, denoiser, draws = 6, exact_denoiser(mixture), 30000
    curve = make_schedule(schedule, -3.0, 3.0)
    log_snr, x, generator = (
        curve(torch.linspace(0, 1, levels + 1)).double(),
        torch.tensor([[0.3, 0.8]]).double().expand(draws, 2),
        seeded(),
    )
    i = torch.randint(1, levels + 1, (draws,), generator=generator)
    one = students_loss(denoiser, log_snr, x, i, torch.randn(draws, 2, generator=generator).double())
    by_library = diffusion_elbo(denoiser, curve, x[:2000], levels, 60, seeded(1)).levels
    assert (one.mean() - by_library.mean()).abs() < 4 * (one.var() / draws + by_library.var() / 2000).sqrt()


def test_the_command_line_fits_a_prior_after_training_and_draws_from_it_by_label(vaelib_here, tmp_path):
    run, quick = tmp_path / "run", ("--data", "digits", "--hidden", "16", "--latent-dim", "3", "--epochs", "1", "--device", "cpu")
    done = vaelib_here("train", *quick, "--out", run, "--prior", "diffusion", "--prior-steps", 3, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prior"] == "diffusion"
    options = ("--prior", "diffusion", "--label", 3, "--guidance", 1.5, "--num-images", 4, "--device", "cpu", "--json")
    done = vaelib_here("sample", run, "--out", tmp_path / "a.png", *options)
    assert done.returncode == 0, done.stderr
    drawn = json.loads(done.stdout)
    assert (drawn["prior"], drawn["guidance"]) == ("diffusion", 1.5)
    prior = diffusion.load_prior(run / "prior.safetensors")
    from vaelib.book.plotting import tile

    pixels = vaelib.generate(vaelib.load(run), 4, seed=0, prior=prior.given(3, 1.5))
    with Image.open(tmp_path / "a.png") as sheet:
        expected = tile(pixels.repeat_interleave(3, 2).repeat_interleave(3, 3), 2).astype(int)
        assert abs(np.asarray(sheet).astype(int) - expected).max() <= 1
    again = vaelib_here("sample", run, "--out", tmp_path / "b.png", *options, "--prior-steps", 2)  # fitted anew
    assert again.returncode == 0, again.stderr
    refused = vaelib_here("train", *quick, "--out", run)
    assert refused.returncode == 2
    assert vaelib_here("sample", run, "--out", tmp_path / "c.png", *options[:2], "--label", 10).returncode == 2
