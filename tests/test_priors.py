"""Priors fitted to the codes: they draw what the decoder has met, and the same seed draws the same."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import vaelib
from vaelib import generate, mlp_vae, noise
from vaelib.priors import MixturePrior, fit_mixture, fit_second_stage, posterior_samples
from vaelib.quality import frechet_distance


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (64,), 4)
    vaelib.fit(model, digits, config=vaelib.TrainConfig(epochs=10, batch_size=50, progress=False, device="cpu"))
    return model


@pytest.fixture(scope="module")
def priors(trained, digits):
    return fit_mixture(trained, digits, 5), fit_second_stage(trained, digits, (64, 64))


class TwoHeaps(nn.Module):
    """An encoder whose posteriors lie around (3, -1) for images that start white, else around (-3, -1)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        side = 6 * x.flatten(1)[:, 0] - 3
        mean = torch.stack([side, -torch.ones_like(side)], dim=1) + self.weight
        return mean, torch.full_like(mean, math.log(0.25))


@pytest.fixture(scope="module")
def two_heaps():
    model = mlp_vae((1, 4, 4), (8,), 2, {"name": "bernoulli", "binarize": "threshold"})
    model.encoder = TwoHeaps()
    pixels = torch.randint(0, 256, (1000, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels[:, 0, 0, 0] = torch.where(torch.arange(1000) < 250, 255, 0)  # a quarter lies right
    return model, pixels


def test_posterior_samples_are_draws_of_q_with_the_noise_of_the_image(trained, digits):
    z = posterior_samples(trained, digits, seed=3)
    assert z.shape == (1500, 4)
    x, keys = next(vaelib.heldout.observations(trained, digits.pixels, 1500, 3))
    mean, log_var = trained.encode(x)
    eps = noise.normal_noise(keys, (4,), noise.LATENT)
    torch.testing.assert_close(z, (mean + (log_var / 2).exp() * eps).detach(), rtol=1e-5, atol=1e-5)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(posterior_samples(trained, digits[order], batch_size=37, seed=3), z[order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(posterior_samples(trained, digits, seed=4), z)


def test_posterior_samples_of_a_hierarchical_model_come_down_its_groups(digits):
    torch.manual_seed(0)
    model = vaelib.hierarchical_vae((1, 28, 28), ((2, 1), (1, 1)), width=8, bottleneck=4, blocks=1, likelihood="bernoulli")
    z = posterior_samples(model, digits.pixels[:5])
    x, keys = next(vaelib.heldout.observations(model, digits.pixels[:5], 5, 0))
    eps = noise.normal_noise(keys, (1, model.latent_dim), noise.LATENT).transpose(0, 1)
    assert torch.equal(z, model.draw(x, 1, eps).z[0])
    assert posterior_samples(model, digits.pixels[:5], batch_size=2).shape == (5, model.latent_dim)


def test_a_mixture_of_one_component_is_the_gaussian_with_the_codes_moments(trained, digits):
    prior = fit_mixture(trained, digits, num_components=1)
    z = posterior_samples(trained, digits).double()
    assert prior.weights.tolist() == [1.0]
    torch.testing.assert_close(prior.means[0].double(), z.mean(0), rtol=1e-5, atol=1e-6)
    covariance = torch.cov(z.T, correction=0) + 1e-6 * torch.eye(4)  # scikit-learn adds 1e-6 to the diagonal
    torch.testing.assert_close((prior.roots[0] @ prior.roots[0].T).double(), covariance, rtol=1e-5, atol=1e-6)


def test_a_mixture_finds_the_heaps_and_draws_from_them_in_proportion(two_heaps):
    prior = fit_mixture(*two_heaps, num_components=2)
    right = prior.means[:, 0].argmax()
    # 250 codes with standard deviation 0.5 determine their mean to 0.032: four of these
    torch.testing.assert_close(prior.means[right], torch.tensor([3.0, -1.0]), rtol=0, atol=0.13)
    torch.testing.assert_close(prior.means[1 - right], torch.tensor([-3.0, -1.0]), rtol=0, atol=0.13)
    assert prior.weights[right] == pytest.approx(0.25, abs=1e-3)
    z = prior.sample(4000, generator=torch.Generator().manual_seed(0))
    assert (z[:, 0] > 0).double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))


def test_draws_of_a_mixture_have_its_moments_and_temperature_scales_its_components():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 2, 2, generator=generator).tril()
    prior = MixturePrior(torch.tensor([0.2, 0.5, 0.3]), 2 * torch.randn(3, 2, generator=generator), roots)
    for temperature in (1.0, 0.5):
        z = prior.sample(40000, generator, temperature).double()
        within = torch.einsum("k,kij,klj->il", prior.weights, roots, roots).double()
        mean = (prior.weights[:, None] * prior.means).sum(0).double()
        off = prior.means - mean
        covariance = temperature**2 * within + torch.einsum("k,ki,kj->ij", prior.weights.double(), off, off)
        error = 4 * covariance.diagonal().sqrt() / math.sqrt(40000)  # four standard errors of the mean
        assert ((z.mean(0) - mean).abs() < error).all()
        product = (z - mean)[:, :, None] * (z - mean)[:, None, :]
        assert ((product.mean(0) - covariance).abs() < 4 * product.std(0) / math.sqrt(40000)).all()
    cold = prior.sample(50, generator, 0.0)
    assert torch.cdist(cold, prior.means).amin(1).max() == 0


def test_a_mixture_gives_codes_of_unseen_images_more_density_than_the_standard_normal(trained, priors):
    z = posterior_samples(trained, vaelib.load_images("digits", "test"))
    prior = priors[0]
    mixture = MixtureSameFamily(Categorical(prior.weights), MultivariateNormal(prior.means, scale_tril=prior.roots))
    assert mixture.log_prob(z).mean() > MultivariateNormal(torch.zeros(4), torch.eye(4)).log_prob(z).mean()


def test_a_second_stage_leaves_the_gap_between_two_heaps_emptier_than_a_gaussian_of_their_moments(two_heaps):
    model, pixels = two_heaps
    z = posterior_samples(model, pixels)[:, 0]
    prior = fit_second_stage(model, pixels, (64, 64), epochs=60)
    draws = prior.sample(4000, generator=torch.Generator().manual_seed(0))[:, 0]
    gaussian = torch.distributions.Normal(z.mean(), z.std())
    gap = (gaussian.cdf(torch.tensor(1.5)) - gaussian.cdf(torch.tensor(-1.5))).item()
    assert (z.abs() < 1.5).double().mean() < 0.01
    assert (draws.abs() < 1.5).double().mean() < 0.5 * gap
    assert 0.15 < (draws > 0).double().mean() < 0.35  # a quarter of the images


def test_both_fitted_priors_lie_nearer_to_codes_of_unseen_images_than_the_standard_normal(trained, priors):
    z = posterior_samples(trained, vaelib.load_images("digits", "test"))
    standard = frechet_distance(torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)), z)
    for prior in priors:
        assert frechet_distance(prior.sample(1000, generator=torch.Generator().manual_seed(0)), z) < standard


@pytest.mark.parametrize("place", [0, 1])
def test_sample_i_of_a_fitted_prior_is_the_same_whatever_the_number_of_samples(trained, priors, place):
    draws = {num: priors[place].sample(num, torch.Generator().manual_seed(3), 0.9) for num in (1, 3, 50)}
    for num, z in draws.items():
        torch.testing.assert_close(z, draws[50][:num], rtol=1e-5, atol=1e-5)
    few, many = (generate(trained, num, seed=0, prior=priors[place]).int() for num in (4, 64))
    assert (few - many[:4]).abs().max() <= 1


def test_temperature_zero_of_a_second_stage_gives_one_code_and_more_spreads_it(priors):
    prior = priors[1]
    cold = prior.sample(5, temperature=0.0)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold))
    spread = [prior.sample(500, torch.Generator().manual_seed(0), t).std(0).mean() for t in (0.3, 1.0, 1.5)]
    assert spread == sorted(spread)


@pytest.mark.parametrize("place", [0, 1])
def test_generate_decodes_the_prior_s_draws_of_the_same_seed(trained, priors, place):
    prior = priors[place]
    z = prior.sample(6, torch.Generator().manual_seed(5), 0.8)
    expected = trained.decode(z).sigmoid().mul(255).round().to(torch.uint8)
    assert torch.equal(generate(trained, 6, 0.8, seed=5, prior=prior), expected)
    assert not torch.equal(generate(trained, 6, 0.8, seed=6, prior=prior), expected)
    assert not torch.equal(generate(trained, 6, 0.8, prior=prior), generate(trained, 6, 0.8, prior=prior))


def test_the_same_seed_fits_the_same_prior_and_leaves_the_random_state_alone(trained, digits):
    images = digits[:200]
    for fit_prior in (lambda seed: fit_mixture(trained, images, 3, seed), lambda s: fit_second_stage(trained, images, (8,), 2, s)):
        draws = []
        for seed in (0, 0, 1):
            state = torch.get_rng_state()
            prior = fit_prior(seed)
            assert torch.equal(torch.get_rng_state(), state)
            draws.append(prior.sample(4, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


def test_bad_arguments_are_refused(trained, digits):
    large = vaelib.conv_vae((1, 28, 28), (64, 7, 7), "bernoulli", channels=(4, 4))
    for call, message in [
        (lambda: fit_mixture(large, digits), "model: got latent_dim 3136, expected at most 1024"),
        (lambda: fit_second_stage(large, digits), "model: got latent_dim 3136, expected at most 1024"),
        (lambda: fit_mixture(trained, digits[:5], 10), "images: got 5, expected at least 10 to fit this prior"),
        (lambda: fit_mixture(trained, digits[:1], 1), "images: got 1, expected at least 2"),
        (lambda: fit_mixture(trained, digits, 0), "num_components: got int 0"),
        (lambda: fit_mixture(trained, digits, seed=-1), "seed: got int -1"),
        (lambda: fit_second_stage(trained, digits[:1]), "images: got 1, expected at least 2"),
        (lambda: fit_second_stage(trained, digits, epochs=0), "epochs: got int 0"),
        (lambda: fit_second_stage(trained, digits, hidden_dims=(0,)), "hidden_dims: got int 0"),
        (lambda: posterior_samples(trained, digits.pixels.float()), "pixels: got a float32 tensor"),
        (lambda: generate(trained, 3, prior="mixture"), "prior: got str 'mixture', expected None or an object"),
        (lambda: generate(trained, 3, prior=MixturePrior(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])),
         r"prior: got a float32 tensor of shape \(3, 2\), expected shape \(N, 4\)"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
