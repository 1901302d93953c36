"""Annealed importance sampling: exact where log p(x) is known, and in agreement with importance sampling where it is not."""

import math

import pytest
import torch
from torch import nn

import vaelib
from vaelib.book.oracles import LinearGaussian
from vaelib.evaluation import annealed_log_likelihood, bidirectional_bounds, log_likelihood


def oracle_and_vae(latent_dim, dims, scale, count, generator):
    """A linear-Gaussian model, a VAE with its decoder, pixels of its images, and their log p(x)."""
    weight = 0.3 * torch.randn(dims, latent_dim, generator=generator)
    model = vaelib.mlp_vae((1, 1, dims), (), latent_dim, {"name": "gaussian", "scale": scale})
    model.decoder.head.weight.data, model.decoder.head.bias.data = weight.clone(), torch.zeros(dims)
    oracle = LinearGaussian(weight.double(), torch.zeros(dims, dtype=torch.float64), scale)
    pixels = ((oracle.sample(count, generator) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).view(count, 1, 1, dims)
    return model, pixels, oracle.log_evidence(model.likelihood.observe(pixels).flatten(1).double())


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = vaelib.mlp_vae((1, 28, 28), (64,), 2)
    vaelib.fit(model, digits, config=vaelib.TrainConfig(epochs=10, batch_size=50, progress=False, device="cpu"))
    return model


@pytest.fixture(scope="module")
def images(digits):
    return digits[:30]


def assert_mean_ratio_is_one(log_ratios):
    """The weights estimate p(x) without bias: their mean over images is 1 within four standard errors."""
    ratios = log_ratios.exp()
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(len(ratios))


@pytest.mark.equation("annealed-importance-sampling")
def test_the_annealed_estimate_is_the_evidence_of_a_linear_gaussian_model(generator):
    model, pixels, evidence = oracle_and_vae(3, 6, 0.3, 200, generator)
    found = annealed_log_likelihood(model, pixels, num_steps=60, num_chains=8)
    assert found.shape == (200,)
    assert_mean_ratio_is_one(found - evidence)
    assert (found - evidence).std() < 0.5
    one = annealed_log_likelihood(model, pixels, num_steps=60, num_chains=1)
    assert_mean_ratio_is_one(one - evidence)
    assert one.mean() < found.mean() < evidence.mean()  # a lower bound, tighter with more chains


def test_more_steps_bring_the_estimate_nearer(generator):
    model, pixels, evidence = oracle_and_vae(3, 6, 0.1, 50, generator)
    errors = [evidence - annealed_log_likelihood(model, pixels, steps, 4) for steps in (1, 10, 100)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        gain = coarse - fine
        assert gain.mean() > 4 * gain.std() / math.sqrt(50)


def test_the_step_size_follows_a_posterior_far_narrower_than_the_prior(generator):
    model, pixels, evidence = oracle_and_vae(2, 6, 0.02, 40, generator)
    found = annealed_log_likelihood(model, pixels, num_steps=200, num_chains=4)
    from_the_prior = annealed_log_likelihood(model, pixels, num_steps=1, num_chains=200)
    assert (evidence - found).mean() < 0.1 * (evidence - from_the_prior).mean()
    assert_mean_ratio_is_one(found - evidence)


def simulated(model, count, generator):
    """Images drawn of the model, with the codes that they were drawn from."""
    z = model.prior.sample(count, generator)
    with torch.no_grad():
        return model.likelihood.sample(model.decode(z), generator), z


@pytest.mark.equation("reverse-annealing")
def test_annealing_back_from_an_image_s_own_code_estimates_one_over_the_evidence(generator):
    model, _, _ = oracle_and_vae(3, 6, 0.3, 1, generator)
    oracle = LinearGaussian(model.decoder.head.weight.data.double(), torch.zeros(6, dtype=torch.float64), 0.3)
    x, z = simulated(model, 300, generator)
    evidence = oracle.log_evidence(x.flatten(1).double())
    found = bidirectional_bounds(model, x, z, 40, 8)
    assert found.lower.shape == found.upper.shape == (300,)
    assert_mean_ratio_is_one(evidence - found.upper)
    assert_mean_ratio_is_one(found.lower - evidence)
    assert found.lower.mean() < evidence.mean() < found.upper.mean()


def test_the_two_bounds_close_as_the_steps_grow_whatever_the_chunks(generator):
    model, _, _ = oracle_and_vae(3, 6, 0.1, 1, generator)
    x, z = simulated(model, 60, generator)
    gaps = [upper - lower for lower, upper in (bidirectional_bounds(model, x, z, steps, 4) for steps in (2, 20, 150))]
    for coarse, fine in zip(gaps, gaps[1:], strict=False):
        gain = coarse - fine
        assert gain.mean() > 4 * gain.std() / math.sqrt(60)
    torch.manual_seed(1)
    binary = vaelib.mlp_vae((1, 4, 4), (8,), 2)
    x, z = simulated(binary, 60, generator)
    found = bidirectional_bounds(binary, x, z, 10, 4)
    torch.testing.assert_close(bidirectional_bounds(binary, x, z, 10, 4, batch_size=7), found, rtol=0, atol=1e-3)
    truth = quadrature(binary, x)
    assert_mean_ratio_is_one(truth - found.upper)
    assert_mean_ratio_is_one(found.lower - truth)


def test_from_a_code_that_is_no_draw_of_the_posterior_there_is_no_upper_bound(generator):
    model, _, _ = oracle_and_vae(3, 6, 0.3, 1, generator)
    oracle = LinearGaussian(model.decoder.head.weight.data.double(), torch.zeros(6, dtype=torch.float64), 0.3)
    x, z = simulated(model, 300, generator)
    excess = bidirectional_bounds(model, x, z + 5, 1, 1, leapfrog_steps=1).upper - oracle.log_evidence(x.flatten(1).double())
    assert excess.mean() < -4 * excess.std() / math.sqrt(300)


def quadrature(model, x):
    """log p(x) of each image by a sum over a fine grid of two-dimensional codes."""
    axis = torch.linspace(-7, 7, 350)
    total = torch.full((len(x),), -math.inf)
    with torch.no_grad():
        for z in torch.cartesian_prod(axis, axis).split(20_000):
            logits = model.decode(z).flatten(1)
            log_joint = logits @ x.flatten(1).T - nn.functional.softplus(logits).sum(1, keepdim=True)
            log_prior = -0.5 * z.square().sum(1, keepdim=True) - math.log(2 * math.pi)
            total = torch.logaddexp(total, (log_joint + log_prior).logsumexp(0))
    return total + 2 * (axis[1] - axis[0]).log()


def test_on_a_trained_model_annealing_and_importance_sampling_agree_with_quadrature(trained, images):
    black_and_white = vaelib.image_set((images.pixels >= 128).to(torch.uint8) * 255)  # the same x for every seed
    truth = quadrature(trained, trained.likelihood.observe(black_and_white.pixels))
    annealed = annealed_log_likelihood(trained, black_and_white, num_steps=100, num_chains=8)
    sampled = log_likelihood(trained, black_and_white, 5000)
    assert_mean_ratio_is_one(annealed - truth)
    assert sampled.mean() < truth.mean()  # the encoder's q misses a part of the posterior
    difference = annealed - sampled
    assert difference.mean().abs() < 4 * difference.std() / math.sqrt(len(difference))


def test_it_never_asks_the_encoder(trained, images):
    before = annealed_log_likelihood(trained, images[:5], 5, 2)
    encoder, trained.encoder = trained.encoder, nn.Identity()
    try:
        assert torch.equal(annealed_log_likelihood(trained, images[:5], 5, 2), before)
    finally:
        trained.encoder = encoder


def test_an_image_s_estimate_does_not_depend_on_the_images_beside_it(trained, images):
    whole = annealed_log_likelihood(trained, images, 20, 4)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(annealed_log_likelihood(trained, images, 20, 4, batch_size=7), whole, rtol=0, atol=0.01)
    torch.testing.assert_close(annealed_log_likelihood(trained, images[order], 20, 4), whole[order], rtol=0, atol=0.01)
    assert (annealed_log_likelihood(trained, images, 20, 4, seed=1) - whole).abs().mean() > 0.1


def test_models_of_several_layers_and_with_labels_are_annealed_too(digits, generator):
    torch.manual_seed(0)
    layered = vaelib.hierarchical_vae((1, 8, 8), ((2, 1), (2, 1)), width=8, bottleneck=4, blocks=1, likelihood="bernoulli")
    pixels = torch.randint(0, 2, (30, 1, 8, 8), generator=generator).to(torch.uint8) * 255
    difference = annealed_log_likelihood(layered, pixels, 20, 4, leapfrog_steps=3) - log_likelihood(layered, pixels, 1000)
    assert_mean_ratio_is_one(difference)
    conditional = vaelib.conditional_vae((1, 28, 28), 10, (16,), 3)
    images = digits[:3]
    found = annealed_log_likelihood(conditional, images, 5, 2)
    for place in range(3):
        bound = conditional.given(int(images.labels[place]))
        alone = annealed_log_likelihood(bound, images.pixels[place : place + 1], 5, 2)
        torch.testing.assert_close(alone[0], found[place], rtol=0, atol=0.01)


def test_annealing_leaves_the_networks_and_their_mode_as_they_are(small_vae, images):
    small_vae.train()
    before = {name: value.clone() for name, value in small_vae.state_dict().items()}
    annealed_log_likelihood(small_vae, images[:2], 2, 1)
    assert small_vae.training
    assert all(parameter.grad is None for parameter in small_vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in small_vae.state_dict().items())


def test_bad_arguments_are_refused(trained, images):
    score = vaelib.mlp_vae((1, 28, 28), (8,), 2, "grey_bce_not_a_likelihood")
    for call, message in [
        (lambda: annealed_log_likelihood(score, images), "model: got the score 'grey_bce_not_a_likelihood', expected a likelihood"),
        (lambda: annealed_log_likelihood(trained, images, 0), "num_steps: got int 0"),
        (lambda: annealed_log_likelihood(trained, images, 5, 0), "num_chains: got int 0"),
        (lambda: annealed_log_likelihood(trained, images, 5, 1, 0), "batch_size: got int 0"),
        (lambda: annealed_log_likelihood(trained, images, 5, leapfrog_steps=0), "leapfrog_steps: got int 0"),
        (lambda: bidirectional_bounds(trained, torch.zeros(2, 1, 28, 28), torch.zeros(3, 2), 5), "x, z: got"),
        (lambda: bidirectional_bounds(trained, torch.zeros(2, 1, 28, 28), torch.zeros(2, 3), 5), "z: got"),
        (lambda: bidirectional_bounds(score, torch.zeros(2, 1, 28, 28), torch.zeros(2, 2), 5), "expected a likelihood"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
