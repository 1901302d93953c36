"""The terms of the ELBO against torch.distributions, Monte Carlo and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from vaelib import (
    ElboTerms,
    beta_elbo,
    free_bits_kl,
    gaussian_kl,
    gaussian_log_density,
    importance_weighted_bound,
    loss,
    reparameterize,
)
from vaelib.objectives import gaussian_kl_per_unit


def random_gaussians(generator, *shape):
    """Mean and log-variance of two random diagonal Gaussians."""
    mean, prior_mean = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    log_var, prior_log_var = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return mean, log_var, prior_mean, prior_log_var


def normal(mean, log_var):
    return Independent(Normal(mean, (0.5 * log_var).exp()), 1)


@pytest.mark.equation("gaussian-kl")
def test_gaussian_kl_equals_torch_distributions(generator):
    mean, log_var, prior_mean, prior_log_var = random_gaussians(generator, 7, 5)
    standard = normal(torch.zeros_like(mean), torch.zeros_like(log_var))
    torch.testing.assert_close(gaussian_kl(mean, log_var), kl_divergence(normal(mean, log_var), standard))
    torch.testing.assert_close(
        gaussian_kl(mean, log_var, prior_mean, prior_log_var),
        kl_divergence(normal(mean, log_var), normal(prior_mean, prior_log_var)),
    )
    torch.testing.assert_close(
        gaussian_kl(mean, log_var, prior_mean),
        kl_divergence(normal(mean, log_var), normal(prior_mean, torch.zeros_like(log_var))),
    )
    torch.testing.assert_close(
        gaussian_kl(mean, log_var, prior_log_var=prior_log_var),
        kl_divergence(normal(mean, log_var), normal(torch.zeros_like(mean), prior_log_var)),
    )


@pytest.mark.equation("gaussian-kl")
def test_gaussian_kl_matches_monte_carlo(generator):
    mean, log_var, *_ = random_gaussians(generator, 3, 4)
    z = mean + (0.5 * log_var).exp() * torch.randn(200_000, 3, 4, generator=generator, dtype=torch.float64)
    ratio = normal(mean, log_var).log_prob(z) - normal(torch.zeros_like(mean), torch.zeros_like(log_var)).log_prob(z)
    error = ratio.std(0) / math.sqrt(len(z))
    assert ((gaussian_kl(mean, log_var) - ratio.mean(0)).abs() < 4 * error).all()


@pytest.mark.equation("implied-beta")
def test_means_over_pixels_and_latents_train_the_beta_vae_that_they_imply(small_vae, generator, digits):
    x = small_vae.likelihood.observe(digits.pixels[:8], generator)
    eps = torch.randn(1, 8, 4, generator=generator)
    pixels, latents = 784, 4

    def gradient(objective):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(objective(small_vae.elbo(x, 1, eps)), list(small_vae.parameters()))]
        )

    cases = {(1 / pixels, 1 / latents): pixels / latents, (1 / pixels, 1): pixels, (1, 1 / latents): 1 / latents, (2, 1): 1 / 2}
    for (a, b), beta in cases.items():
        wrong = gradient(lambda terms, a=a, b=b: (-a * terms.log_likelihood + b * terms.kl).mean())
        torch.testing.assert_close(wrong, a * gradient(lambda terms, beta=beta: loss(terms, beta)), rtol=1e-3, atol=1e-5)


def test_gaussian_kl_sums_over_the_last_axis_only():
    mean, log_var = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    assert torch.equal(gaussian_kl(mean, log_var), torch.full((2, 3), 2.0))
    assert torch.equal(gaussian_kl(mean, log_var, 3 * mean), torch.full((2, 3), 8.0))


def test_gaussian_kl_of_the_prior_itself_is_zero():
    assert gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_kl_keeps_its_digits_and_is_never_below_zero_near_the_prior(generator, dtype):
    sizes = torch.logspace(-30, 0, 2000, dtype=torch.float64)[:, None]
    mean, log_var = (sizes * torch.randn(2, 2000, 50, generator=generator, dtype=torch.float64)).to(dtype)
    prior_mean, prior_log_var = torch.randn(2, 2000, 50, generator=generator, dtype=torch.float64).to(dtype)
    zero = torch.zeros_like(mean)
    for pair in ((zero, log_var), (mean, log_var)):
        assert (gaussian_kl_per_unit(*pair) >= 0).all()
        assert (gaussian_kl_per_unit(pair[0] + prior_mean, pair[1] + prior_log_var, prior_mean, prior_log_var) >= 0).all()
        exact = gaussian_kl_per_unit(*(value.double() for value in pair))
        half = 0.5 * (pair[0].double() ** 2 + pair[1].double() ** 2 / 2)  # the series' first term, exact for small ones
        near = sizes[:, 0] < 1e-8
        torch.testing.assert_close(exact[near], half[near], rtol=1e-6, atol=1e-24)
        torch.testing.assert_close(gaussian_kl_per_unit(*pair).double(), exact, rtol=1e-3, atol=0.1 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("part", ["mean", "log_var"])
def test_the_gradient_of_gaussian_kl_near_the_prior_is_the_value_itself(part):
    small = torch.tensor([[1e-6, -1e-6, 1e-4, -1e-4]], requires_grad=True)
    zero = torch.zeros_like(small)
    pair = {"mean": (small, zero), "log_var": (zero, small)}[part]
    (gradient,) = torch.autograd.grad(gaussian_kl(*pair).sum(), small)
    torch.testing.assert_close(gradient, (small if part == "mean" else small / 2).detach(), rtol=1e-3, atol=6e-8)


def test_gaussian_kl_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"mean, log_var: got shapes \(4, 3\), \(1, 3\), expected equal shapes"):
        gaussian_kl(torch.zeros(4, 3), torch.zeros(1, 3))
    whole = torch.zeros(4, 3)
    for place in range(4):
        shapes = [torch.zeros(1, 3) if place == i else whole for i in range(4)]
        with pytest.raises(ValueError, match="mean, log_var, prior_mean, prior_log_var: got shapes .*, expected equal shapes"):
            gaussian_kl(*shapes)


@pytest.mark.equation("gaussian-log-density")
def test_gaussian_log_density_equals_torch_distributions(generator):
    mean, log_var, z, _ = random_gaussians(generator, 2, 7, 5)
    torch.testing.assert_close(gaussian_log_density(z, mean, log_var), normal(mean, log_var).log_prob(z))
    with pytest.raises(ValueError, match="z, mean, log_var: got shapes"):
        gaussian_log_density(z, mean[0], log_var[0])


def expectation(mean, log_var):
    """E[sum(z^3)] under N(mean, exp(log_var)): the mean cubed plus three times mean and variance."""
    return (mean**3 + 3 * mean * log_var.exp()).sum()


@pytest.mark.equation("score-gradient")
def test_the_score_times_f_has_the_mean_of_the_gradient(generator):
    mean, log_var, *_ = (t.requires_grad_() for t in random_gaussians(generator, 1, 3))
    exact = torch.autograd.grad(expectation(mean, log_var), (mean, log_var))
    z = reparameterize(mean.expand(400_000, 3), log_var.expand(400_000, 3), generator=generator).detach()
    each = [t.detach().expand(400_000, 3).clone().requires_grad_() for t in (mean, log_var)]
    scores = torch.autograd.grad(gaussian_log_density(z, *each).sum(), each)
    for gradient, score in zip(exact, scores, strict=True):
        single = (z**3).sum(1, keepdim=True) * score
        assert ((single.mean(0) - gradient[0]).abs() < 4 * single.std(0) / math.sqrt(len(z))).all()


@pytest.mark.equation("path-gradient")
def test_the_gradient_through_the_draw_has_the_mean_of_the_gradient(generator):
    mean, log_var, *_ = (t.requires_grad_() for t in random_gaussians(generator, 1, 3))
    exact = torch.autograd.grad(expectation(mean, log_var), (mean, log_var))
    each = [t.detach().expand(400_000, 3).clone().requires_grad_() for t in (mean, log_var)]
    eps = torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    z = reparameterize(*each, eps)
    singles = torch.autograd.grad((z**3).sum(), each)
    by_hand = 3 * z**2, 3 * z**2 * eps * (0.5 * each[1]).exp() / 2  # ds / dlog_var is s / 2
    for gradient, single, slope in zip(exact, singles, by_hand, strict=True):
        torch.testing.assert_close(single, slope)
        assert ((single.mean(0) - gradient[0]).abs() < 4 * single.std(0) / math.sqrt(len(z))).all()


@pytest.mark.equation("two-terms")
def test_elbo_is_log_likelihood_minus_kl():
    terms = ElboTerms(torch.tensor([-5.0, -2.0]), torch.tensor([1.0, 3.0]))
    assert terms.elbo.tolist() == [-6, -5]


@pytest.mark.equation("beta-elbo")
def test_beta_weighs_the_kl_term_alone():
    terms = ElboTerms(torch.tensor([-5.0, -2.0]), torch.tensor([1.0, 3.0]))
    assert beta_elbo(terms, 4.0).tolist() == [-9, -14]
    assert beta_elbo(terms).tolist() == terms.elbo.tolist()


@pytest.mark.equation("loss")
def test_loss_is_minus_the_mean_over_images_of_the_sum_over_pixels():
    terms = ElboTerms(torch.tensor([-5.0, -2.0]), torch.tensor([1.0, 3.0]))
    assert loss(terms).item() == 5.5
    assert loss(terms, 4.0).item() == 11.5
    assert loss(terms, torch.tensor(4.0)).item() == 11.5
    with pytest.raises(ValueError, match=r"beta: got float -1\.0, expected a finite number of at least 0"):
        loss(terms, -1.0)
    with pytest.raises(ValueError, match=r"beta: got a float32 tensor of shape \(2, 1\), expected one number"):
        beta_elbo(terms, torch.ones(2, 1))
    with pytest.raises(ValueError, match="expected one number"):
        beta_elbo(terms, torch.ones(2))


@pytest.mark.equation("free-bits")
def test_free_bits_charge_each_unit_at_least_the_threshold_on_the_mean_of_the_batch():
    per_unit = torch.tensor([[0.1, 2.0, 0.4], [0.3, 1.0, 0.8]], requires_grad=True)  # means 0.2, 1.5, 0.6
    terms = ElboTerms(torch.tensor([-5.0, -2.0]), per_unit.sum(1), per_unit)
    assert free_bits_kl(terms, 0.5).item() == pytest.approx(0.5 + 1.5 + 0.6)
    assert free_bits_kl(terms, 0.0).item() == pytest.approx(terms.kl.mean().item())
    assert loss(terms, 2.0, free_bits=0.5).item() == pytest.approx(3.5 + 2 * 2.6)
    assert loss(terms, 2.0, free_bits=0.0).item() == loss(terms, 2.0).item()
    loss(terms, 2.0, free_bits=0.5).backward()
    assert per_unit.grad.tolist() == [[0, 1, 1], [0, 1, 1]]  # the unit below the threshold feels no pull; the others 2 * 1/2


def test_free_bits_want_the_kl_of_each_unit_and_a_number_of_nats():
    terms = ElboTerms(torch.tensor([-5.0, -2.0]), torch.tensor([1.0, 3.0]))
    with pytest.raises(ValueError, match="^terms: got no kl_per_unit, expected the KL of each latent unit"):
        free_bits_kl(terms, 0.5)
    with pytest.raises(ValueError, match="free_bits: got float -0.5"):
        loss(terms, free_bits=-0.5)


@pytest.mark.equation("importance-weighted-bound")
def test_importance_weighted_bound_is_the_log_of_the_mean_weight(generator):
    weights = torch.rand(6, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(importance_weighted_bound(weights.log()), weights.mean(0).log())


def test_importance_weighted_bound_survives_weights_beyond_the_floating_range():
    bound = importance_weighted_bound(torch.tensor([[-1000.0, 1000.0], [-1000.0, 1000.0]]))
    assert bound.tolist() == [-1000, 1000]
    assert importance_weighted_bound(torch.tensor([[-7.0, 3.0]])).tolist() == [-7, 3]


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, 4)])
def test_importance_weighted_bound_wants_samples_by_images(bad):
    with pytest.raises(ValueError, match=r"log_weights: got a float32 tensor of shape .* expected shape \(K, N\)"):
        importance_weighted_bound(bad)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(-30, 30),
    st.floats(-20, 20),
)
def test_gaussian_kl_is_finite_non_negative_and_per_image(n, latent, dtype, mean, log_var):
    kl = gaussian_kl(torch.full((n, latent), mean, dtype=dtype), torch.full((n, latent), log_var, dtype=dtype))
    assert kl.shape == (n,)
    assert kl.dtype == dtype
    assert torch.isfinite(kl).all()
    assert (kl >= 0).all()
