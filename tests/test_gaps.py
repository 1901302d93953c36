"""Inference gaps, held against linear-Gaussian models in which both are known."""

import math

import pytest
import torch
from torch import nn

import vaelib
from vaelib.book.oracles import LinearGaussian
from vaelib.evaluation import inference_gaps, log_likelihood, refine_posterior

COUNT, DIMS, SCALE = 100, 6, 0.3


class WrongEncoder(nn.Module):
    """A q that is the same for every image, and wide."""

    def __init__(self, latent_dim):
        super().__init__()
        self.mean, self.log_var = (nn.Parameter(torch.full((latent_dim,), value)) for value in (0.7, 0.5))

    def forward(self, x):
        return self.mean.expand(len(x), -1), self.log_var.expand(len(x), -1)


def oracle_and_vae(latent_dim, generator):
    """A linear-Gaussian model whose posterior is correlated, a VAE with its decoder and a wrong encoder, and pixels of its images."""
    weight = 0.3 * torch.randn(DIMS, latent_dim, generator=generator)
    model = vaelib.mlp_vae((1, 1, DIMS), (), latent_dim, {"name": "gaussian", "scale": SCALE})
    model.encoder = WrongEncoder(latent_dim)
    model.decoder.head.weight.data, model.decoder.head.bias.data = weight.clone(), torch.zeros(DIMS)
    oracle = LinearGaussian(weight.double(), torch.zeros(DIMS, dtype=torch.float64), SCALE)
    pixels = ((oracle.sample(COUNT, generator) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).view(COUNT, 1, 1, DIMS)
    return oracle, model, pixels


def best_diagonal(oracle, x):
    """The q of the highest ELBO: the posterior's mean, and the inverse of the diagonal of its precision."""
    truth = oracle.posterior(x)
    return truth.mean, -torch.linalg.inv(truth.covariance).diagonal().log().expand_as(truth.mean)


def doubled(posterior):
    return [value.double() for value in posterior]


def assert_mean_is_zero(errors):
    """Within four standard errors over images, each of which has its own noise."""
    assert errors.mean().abs() < 4 * errors.std() / math.sqrt(len(errors))


def test_the_refined_q_is_the_best_diagonal_gaussian(generator):
    oracle, model, pixels = oracle_and_vae(3, generator)
    x = model.likelihood.observe(pixels)
    exact_x = x.flatten(1).double()
    mean, log_var = best_diagonal(oracle, exact_x)
    refined = doubled(refine_posterior(model, x))
    loss = oracle.elbo(exact_x, mean, log_var).elbo - oracle.elbo(exact_x, *refined).elbo
    gain = oracle.elbo(exact_x, *refined).elbo - oracle.elbo(exact_x, *doubled(model.encode(x))).elbo
    assert (loss > -1e-6).all()  # nothing is better than the best
    assert loss.mean() < 0.001 * gain.mean()
    assert ((refined[0] - mean) / (log_var / 2).exp()).square().mean().sqrt() < 0.1  # in standard deviations of q
    assert (refined[1] - log_var).square().mean().sqrt() < 0.1
    rough = doubled(refine_posterior(model, x, num_samples=1))
    assert (oracle.elbo(exact_x, *rough).elbo < oracle.elbo(exact_x, *refined).elbo).double().mean() > 0.8


@pytest.mark.equation("amortization-gap")
def test_both_gaps_have_their_exact_values(generator):
    oracle, model, pixels = oracle_and_vae(3, generator)
    x = model.likelihood.observe(pixels)
    exact_x = x.flatten(1).double()
    evidence = oracle.log_evidence(exact_x)
    gaps = inference_gaps(model, pixels, num_samples=500)
    amortized = oracle.elbo(exact_x, *doubled(model.encode(x))).elbo
    refined = oracle.elbo(exact_x, *doubled(refine_posterior(model, x))).elbo  # of the same seed, so the same q
    best = oracle.elbo(exact_x, *best_diagonal(oracle, exact_x)).elbo
    assert [value.shape for value in gaps] == [(COUNT,)] * 3
    assert_mean_is_zero(gaps.elbo - amortized)
    assert_mean_is_zero(gaps.refined_elbo - refined)
    assert_mean_is_zero((gaps.log_likelihood - evidence).exp() - 1)
    assert_mean_is_zero(gaps.amortization - (best - amortized) + (best - refined))
    assert (evidence - best).mean() > 0.1
    error = gaps.approximation - (evidence - best)
    assert -4 * error.std() / math.sqrt(COUNT) < error.mean() < 4 * error.std() / math.sqrt(COUNT) + (best - refined).mean()
    torch.testing.assert_close(gaps.approximation + gaps.amortization, gaps.log_likelihood - gaps.elbo, rtol=0, atol=1e-3)


def test_a_code_of_one_number_leaves_no_approximation_gap(generator):
    oracle, model, pixels = oracle_and_vae(1, generator)
    gaps = inference_gaps(model, pixels, num_samples=500)
    exact_x = model.likelihood.observe(pixels).flatten(1).double()
    refined = oracle.elbo(exact_x, *doubled(refine_posterior(model, model.likelihood.observe(pixels)))).elbo
    assert_mean_is_zero(gaps.approximation - (oracle.log_evidence(exact_x) - refined))
    assert (oracle.log_evidence(exact_x) - refined).mean() < 0.01
    assert gaps.amortization.mean() > 1


def test_both_elbos_meet_the_same_noise(generator):
    _, model, pixels = oracle_and_vae(2, generator)
    gaps = inference_gaps(model, pixels, num_samples=3, steps=0)
    assert torch.equal(gaps.amortization, torch.zeros(COUNT))
    assert not torch.equal(inference_gaps(model, pixels, num_samples=3, steps=0, seed=1).elbo, gaps.elbo)


def test_gaps_don_t_depend_on_chunks_or_order(generator):
    _, model, pixels = oracle_and_vae(2, generator)
    whole = inference_gaps(model, pixels, 30, 20)
    order = torch.randperm(COUNT, generator=generator)
    cut = inference_gaps(model, pixels, 30, 20, batch_size=17, sample_batch=7)
    shuffled = inference_gaps(model, pixels[order], 30, 20)
    for value, other, moved in zip(whole, cut, shuffled, strict=True):
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(moved, value[order], rtol=1e-4, atol=1e-3)


def test_refining_leaves_the_networks_and_their_mode_as_they_are(small_vae, digits):
    small_vae.train()
    before = {name: value.clone() for name, value in small_vae.state_dict().items()}
    x = small_vae.likelihood.observe(digits.pixels[:5], torch.Generator().manual_seed(0))
    first = refine_posterior(small_vae, x, steps=0)
    torch.testing.assert_close(first, small_vae.encode(x))
    refined = refine_posterior(small_vae, x, steps=3)
    assert not refined.mean.requires_grad
    assert not torch.allclose(refined.mean, first.mean)
    assert all(torch.equal(value, before[name]) for name, value in small_vae.state_dict().items())
    assert all(parameter.grad is None for parameter in small_vae.parameters())
    assert small_vae.training


def test_a_conditional_model_is_refined_given_each_image_s_label(digits):
    torch.manual_seed(0)
    model = vaelib.conditional_vae((1, 28, 28), 10, (16,), 3)
    images = digits[:4]
    gaps = inference_gaps(model, images, 20, 5)
    for place in range(4):
        alone = inference_gaps(model.given(int(images.labels[place])), images.pixels[place : place + 1], 20, 5)
        for value, single in zip(gaps, alone, strict=True):
            torch.testing.assert_close(single[0], value[place], rtol=1e-5, atol=1e-3)


def test_on_a_trained_model_the_bounds_stand_in_order(digits):
    torch.manual_seed(0)
    model = vaelib.mlp_vae((1, 28, 28), (64,), 6)
    vaelib.fit(model, digits, config=vaelib.TrainConfig(epochs=10, batch_size=50, progress=False, device="cpu"))
    images = vaelib.load_images("digits", "test")[:40]
    gaps = inference_gaps(model, images, 200, 150)
    assert (gaps.amortization > 0).double().mean() > 0.95
    assert (gaps.approximation > 0).double().mean() > 0.95
    difference = gaps.log_likelihood - log_likelihood(model, images, 2000)
    assert abs(difference.mean()) < 0.5 * gaps.amortization.mean()


def test_models_without_such_gaps_and_bad_arguments_are_refused(generator):
    _, model, pixels = oracle_and_vae(2, generator)
    x = model.likelihood.observe(pixels)
    layered = vaelib.hierarchical_vae((1, 8, 8), ((2, 1), (2, 1)), width=8, bottleneck=4, blocks=1, likelihood="bernoulli")
    score = vaelib.mlp_vae((1, 8, 8), (8,), 2, "grey_bce_not_a_likelihood")
    eight = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    for call, message in [
        (
            lambda: inference_gaps(layered, eight),
            "model: got a model with several layers of latents, expected one diagonal Gaussian q",
        ),
        (lambda: inference_gaps(score, eight), "model: got the score 'grey_bce_not_a_likelihood', expected a likelihood"),
        (lambda: inference_gaps(model, pixels, 0), "num_samples: got int 0"),
        (lambda: inference_gaps(model, pixels, 5, sample_batch=0), "sample_batch: got int 0"),
        (lambda: inference_gaps(model, pixels, 5, batch_size=0), "batch_size: got int 0"),
        (lambda: refine_posterior(model, x, steps=-1), "steps: got int -1"),
        (lambda: refine_posterior(model, x, learning_rate=0), "learning_rate: got int 0, expected a finite number above 0"),
        (lambda: refine_posterior(model, x, num_samples=0), "num_samples: got int 0"),
        (lambda: refine_posterior(model, pixels), "x: got a uint8 tensor .* call likelihood.observe"),
        (lambda: refine_posterior(model, x * math.nan), "x: got"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("learning_rate", [10.0, 100.0])
def test_an_ascent_that_diverges_leaves_the_encoder_s_q(learning_rate, generator):
    _, model, pixels = oracle_and_vae(3, generator)
    gaps = inference_gaps(model, pixels, num_samples=200, steps=20, learning_rate=learning_rate)
    assert gaps.refined_elbo.isfinite().all()
    assert (gaps.amortization > -2).all()  # but for the noise of the choice by 64 draws
