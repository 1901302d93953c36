"""Evaluation: what is reported, and that it does not depend on how the work was cut up."""

import math

import pytest
import torch

import vaelib
from vaelib import active_units, evaluate, heldout_elbo, importance_weighted_estimate, log_likelihood, mlp_vae, posterior_means
from vaelib import noise as image_noise
from vaelib.book.oracles import LinearGaussian
from vaelib.evaluation import rate_decomposition, standard_error


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    model = mlp_vae((1, 28, 28), (64,), 6)
    vaelib.fit(model, digits, config=vaelib.TrainConfig(epochs=10, batch_size=50, progress=False, device="cpu"))
    return model


@pytest.fixture(scope="module")
def test_set():
    return vaelib.load_images("digits", "test")


def test_evaluate_reports_the_mean_of_vae_elbo_and_its_terms(trained, test_set):
    result = evaluate(trained, test_set, elbo_samples=4)
    terms = heldout_elbo(trained, test_set, 4)
    assert result.elbo == pytest.approx(terms.elbo.mean().item(), rel=1e-6)
    assert result.expected_log_likelihood == pytest.approx(terms.log_likelihood.mean().item(), rel=1e-6)
    assert result.kl == pytest.approx(terms.kl.mean().item(), rel=1e-6)
    assert result.elbo == pytest.approx(result.expected_log_likelihood - result.kl)
    assert result.elbo_standard_error == pytest.approx((terms.elbo.std() / math.sqrt(297)).item(), rel=1e-5)
    assert result.bits_per_dim == pytest.approx(-result.elbo / (784 * math.log(2)))
    assert (result.num_images, result.elbo_samples, result.num_samples, result.seed) == (297, 4, 0, 0)
    assert result.log_likelihood is None
    assert result.normalized
    assert result.as_dict()["elbo"] == result.elbo


def test_results_don_t_depend_on_batch_size_or_order(trained, test_set):
    whole = evaluate(trained, test_set, num_samples=20, elbo_samples=2)
    order = torch.randperm(297, generator=torch.Generator().manual_seed(0))
    for other in (evaluate(trained, test_set, 20, 2, batch_size=37), evaluate(trained, test_set[order], 20, 2)):
        assert other.elbo == pytest.approx(whole.elbo, abs=1e-4)
        assert other.log_likelihood == pytest.approx(whole.log_likelihood, abs=1e-4)


@pytest.mark.equation("importance-weighted-bound")
def test_log_likelihood_does_not_depend_on_chunks_of_images_or_samples(trained, test_set):
    images = test_set[:23]
    whole = log_likelihood(trained, images, 60, batch_size=23, sample_batch=60)
    assert whole.shape == (23,)
    for batch_size, sample_batch in ((1, 60), (10, 7), (23, 1), (100, 100)):
        other = log_likelihood(trained, images, 60, batch_size, sample_batch)
        torch.testing.assert_close(other, whole, rtol=1e-5, atol=1e-3)
    assert not torch.allclose(log_likelihood(trained, images, 60, seed=1), whole)


def test_log_likelihood_lies_above_the_elbo_and_rises_with_the_samples(trained, test_set):
    elbo = heldout_elbo(trained, test_set, 50).elbo.mean()
    estimates = [log_likelihood(trained, test_set, k).mean() for k in (1, 10, 200)]
    assert elbo < estimates[1] < estimates[2]
    assert estimates[0] == pytest.approx(elbo.item(), abs=1.0)
    result = evaluate(trained, test_set, num_samples=10)
    assert result.log_likelihood == pytest.approx(estimates[1].item(), rel=1e-6)
    assert result.log_likelihood_standard_error > 0
    assert result.num_samples == 10


def test_a_score_that_is_no_likelihood_defines_no_log_likelihood(test_set):
    model = mlp_vae((1, 28, 28), (8,), 2, "grey_bce_not_a_likelihood")
    with pytest.raises(ValueError, match="model: got the score 'grey_bce_not_a_likelihood', expected a likelihood"):
        log_likelihood(model, test_set, 5)
    result = evaluate(model, test_set, elbo_samples=1)
    assert not result.normalized
    assert result.bits_per_dim is None


@pytest.mark.equation("effective-sample-size")
def test_the_effective_sample_size_is_the_squared_sum_over_the_sum_of_squares():
    weights = torch.tensor([[1.0, 0.0, 3.0], [1.0, 5.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    size = vaelib.effective_sample_size(weights.log())
    torch.testing.assert_close(size, torch.tensor([4.0, 1.0, 16 / 10]))
    torch.testing.assert_close(vaelib.effective_sample_size(weights.log() - 900), size)  # exp(-900) is 0 in floating point
    for bad in (torch.zeros(3), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match=r"log_weights: got .*, expected shape \(K, N\) with K >= 1"):
            vaelib.effective_sample_size(bad)


class ShiftedPosterior(torch.nn.Module):
    """The exact posterior of a linear-Gaussian model, its mean shifted by a number of its standard deviations."""

    def __init__(self, oracle, shift):
        super().__init__()
        self.oracle, self.shift = oracle, shift

    def forward(self, x):
        mean, covariance = self.oracle.posterior(x.flatten(1))
        return mean + self.shift * covariance.diagonal().sqrt(), covariance.diagonal().log().expand_as(mean)


@pytest.mark.equation("effective-sample-size")
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_of_a_q_shifted_by_d_deviations_a_share_of_exp_minus_d_squared_counts(shift, generator):
    weight = torch.tensor([[0.3], [0.5], [-0.2]])
    oracle = LinearGaussian(weight, torch.zeros(3), 0.5)
    decoder = vaelib.MLPDecoder(1, (), (1, 1, 3), 1, "relu")
    decoder.head.weight.data, decoder.head.bias.data = weight, torch.zeros(3)
    model = vaelib.VAE(ShiftedPosterior(oracle, shift), decoder, vaelib.Gaussian(0.5), (1, 1, 3), 1)
    pixels = torch.randint(0, 256, (400, 1, 1, 3), generator=generator).to(torch.uint8)
    found = importance_weighted_estimate(model, pixels, 2000)
    # E[w]^2 / E[w^2] = exp(-shift^2): the weights are log-normal, with the variance shift^2
    share = found.effective_sample_size / 2000
    bias = (math.exp(4 * shift**2) + 1) * share.mean() / 2000  # of a ratio of means, to the first order and from above
    assert (share.mean() - math.exp(-(shift**2))).abs() < 4 * standard_error(share) + bias + 1e-4
    if shift == 0:
        torch.testing.assert_close(found.effective_sample_size, torch.full((400,), 2000.0), rtol=1e-3, atol=0)


def test_the_estimate_and_its_effective_sample_size_come_from_the_same_weights(trained, test_set):
    images = vaelib.image_set((test_set.pixels[:23] >= 128).to(torch.uint8) * 255)  # nothing is left to binarize
    found = importance_weighted_estimate(trained, images, 60, batch_size=23, sample_batch=60)
    keys = image_noise.image_keys(images.pixels, 0)
    eps = image_noise.normal_noise(keys, (60, trained.latent_dim), image_noise.LATENT).transpose(0, 1)
    with torch.no_grad():
        log_weights = trained.log_weights(trained.likelihood.observe(images.pixels), 60, eps)
    torch.testing.assert_close(found.log_likelihood, vaelib.importance_weighted_bound(log_weights), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.effective_sample_size, vaelib.effective_sample_size(log_weights), rtol=1e-3, atol=0)
    assert torch.equal(log_likelihood(trained, images, 60, batch_size=23, sample_batch=60), found.log_likelihood)
    for batch_size, sample_batch in ((1, 60), (10, 7), (23, 1), (100, 100)):
        other = importance_weighted_estimate(trained, images, 60, batch_size, sample_batch)
        torch.testing.assert_close(other.effective_sample_size, found.effective_sample_size, rtol=1e-3, atol=0)


def test_evaluate_says_how_many_of_the_draws_count(trained, test_set):
    result, size = (function(trained, test_set, 50) for function in (evaluate, importance_weighted_estimate))
    size = size.effective_sample_size
    assert result.effective_sample_size == pytest.approx(size.median().item(), rel=1e-6)
    assert result.share_of_few_draws == pytest.approx((size < 10).double().mean().item())
    assert 0 < result.share_of_few_draws < 1
    assert 1 <= size.min() <= size.max() <= 50
    without = evaluate(trained, test_set)
    assert (without.effective_sample_size, without.share_of_few_draws) == (None, None)


@pytest.mark.equation("active-units")
def test_active_units_are_those_whose_posterior_mean_moves(trained, test_set):
    with torch.no_grad():
        trained.encoder.head.weight[2] *= 1e-3  # switch one unit off: its mean no longer depends on x
    means = posterior_means(trained, test_set, batch_size=50)
    assert means.shape == (297, 6)
    active = active_units(trained, test_set)
    assert active.tolist() == (means.var(0) > 0.01).tolist()
    assert not active[2]
    assert active.sum() >= 4
    assert not active_units(trained, test_set, threshold=1e6).any()


def test_standard_error_of_a_single_image_is_zero():
    assert standard_error(torch.tensor([3.0])) == 0
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)


def test_bad_arguments_are_refused(trained, test_set):
    for call, message in [
        (lambda: evaluate(trained, test_set, num_samples=-1), "num_samples: got int -1"),
        (lambda: evaluate(trained, test_set, elbo_samples=0), "num_samples: got int 0"),
        (lambda: log_likelihood(trained, test_set, 0), "num_samples: got int 0"),
        (lambda: log_likelihood(trained, test_set, 5, sample_batch=0), "sample_batch: got int 0"),
        (lambda: log_likelihood(trained, test_set.pixels.float(), 5), "pixels: got a float32 tensor"),
        (lambda: active_units(trained, test_set, threshold=-1.0), "threshold: got float -1.0"),
        (lambda: active_units(trained, test_set[:1]), "images: got one image, expected at least two"),
        (lambda: evaluate(trained, test_set, seed=2**63), "seed: got 9223372036854775808"),
        (lambda: evaluate(trained, test_set, seed=1.5), "seed: got float 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_kl_of_the_units_adds_up_to_the_rate_whatever_the_batch_size(trained, test_set):
    per_unit = vaelib.kl_per_unit(trained, test_set)
    assert per_unit.shape == (trained.latent_dim,)
    assert per_unit.sum().item() == pytest.approx(vaelib.evaluate(trained, test_set, elbo_samples=1).kl, rel=1e-5)
    torch.testing.assert_close(vaelib.kl_per_unit(trained, test_set, batch_size=7), per_unit, rtol=1e-5, atol=1e-6)


class FixedPosteriors(torch.nn.Module):
    """An encoder that reads the mean and the log-variance of a 1-D code off the first two pixels."""

    def forward(self, x):
        return 4 * x[:, 0, 0, :1], 4 * x[:, 0, 0, 1:2]


def model_of_fixed_posteriors():
    decoder = vaelib.MLPDecoder(1, (), (1, 1, 2), 1, "relu")
    return vaelib.VAE(FixedPosteriors(), decoder, vaelib.Gaussian(), (1, 1, 2), 1)


@pytest.mark.equation("aggregate-posterior")
@pytest.mark.equation("rate-decomposition")
def test_the_rate_is_mutual_information_plus_the_kl_of_the_aggregate_posterior(generator):
    pixels = torch.randint(0, 256, (3000, 1, 1, 2), generator=generator).to(torch.uint8)
    pixels[..., 1] = pixels[..., 1] // 4  # narrow posteriors
    model = model_of_fixed_posteriors()
    found = rate_decomposition(model, pixels, num_draws=3000)
    x = model.likelihood.observe(pixels)
    mean, log_var = (value.double() for value in model.encode(x))
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    log_q = torch.logsumexp(torch.distributions.Normal(mean, (log_var / 2).exp()).log_prob(z), 0) - math.log(3000)
    exact = torch.trapezoid(log_q.exp() * (log_q - torch.distributions.Normal(0.0, 1.0).log_prob(z)), z).item()
    rate = vaelib.gaussian_kl(mean, log_var).mean().item()
    assert abs(found.marginal_kl - exact) < 4 * found.marginal_kl_standard_error
    assert abs(found.mutual_information - (rate - exact)) < 4 * found.mutual_information_standard_error
    assert found.mutual_information > 1


def test_codes_that_tell_nothing_have_no_mutual_information_and_codes_apart_have_log_n(generator):
    same = torch.full((50, 1, 1, 2), 127, dtype=torch.uint8)
    assert abs(rate_decomposition(model_of_fixed_posteriors(), same).mutual_information) < 1e-9
    apart = torch.tensor([0, 85, 170, 255], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 1, 2)
    apart[..., 1] = 0  # standard deviation exp(-2) at means 2.7 apart
    found = rate_decomposition(model_of_fixed_posteriors(), apart)
    assert abs(found.mutual_information - math.log(4)) < 1e-6


def test_a_learned_prior_has_no_such_decomposition():
    model = vaelib.hierarchical_vae((1, 8, 8), ((2, 1), (2, 1)), width=8, bottleneck=4, blocks=1, likelihood="bernoulli")
    with pytest.raises(ValueError, match="model: got a model with several layers of latents"):
        rate_decomposition(model, torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
