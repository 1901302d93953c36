"""Each likelihood is a distribution: it sums or integrates to 1, agrees with an independent form, and owns its pixels."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, logistic, norm
from torch.distributions import Normal

from vaelib import Bernoulli, DiscretizedLogistic, DiscretizedLogisticMixture, Gaussian, GreyBCENotALikelihood, bits_per_dim
from vaelib.likelihoods import LIKELIHOODS, Likelihood, binarize_by_bits, binarize_by_draws, gaussian_log_mass, make_likelihood

DISCRETIZED_GAUSSIAN = {"name": "gaussian", "scale": 0.3, "learned": False, "discretized": True}
ALL = [*LIKELIHOODS, DISCRETIZED_GAUSSIAN]
over_all = pytest.mark.parametrize("config", ALL, ids=lambda config: config if isinstance(config, str) else "discretized_gaussian")
LEVELS = torch.arange(256)
RAMP = LEVELS.to(torch.uint8).view(256, 1, 1, 1)  # one image of one pixel per grey level


def params_for(likelihood, x, generator=None):
    shape = (len(x), likelihood.param_channels(x.shape[1]), *x.shape[2:])
    return torch.randn(shape, generator=generator)


@pytest.mark.equation("bernoulli-log-prob")
def test_bernoulli_sums_to_one_over_all_binary_images(generator):
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).view(64, 1, 2, 3)
    params = torch.randn(1, 1, 2, 3, generator=generator).expand(64, 1, 2, 3) * 3
    assert Bernoulli().log_prob(images, params).exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.equation("bernoulli-log-prob")
def test_bernoulli_is_the_sum_of_log_p_and_log_one_minus_p(generator):
    x = torch.randint(0, 2, (5, 3, 2, 2), generator=generator).double()
    logits = torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    p = torch.sigmoid(logits)
    expected = (x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3))
    torch.testing.assert_close(Bernoulli().log_prob(x, logits), expected)


@pytest.mark.equation("bernoulli-log-prob")
def test_dynamic_binarization_is_one_with_probability_pixel_over_255(generator):
    pixels = torch.tensor([0, 1, 100, 254, 255], dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 400, 500)
    uniform = torch.rand(5, 1, 400, 500, generator=generator)
    draws = binarize_by_bits(pixels, generator), binarize_by_draws(pixels, generator), Bernoulli().observe(pixels, uniform=uniform)
    for x in draws:
        assert set(x.unique().tolist()) == {0, 1}
        share, p = x.mean((1, 2, 3)), torch.tensor([0, 1, 100, 254, 255]) / 255
        assert ((share - p).abs() <= 4 * (p * (1 - p) / 200_000).sqrt()).all()
        assert share[0] == 0
        assert share[-1] == 1


def test_dynamic_binarization_of_every_level_and_of_any_number_of_pixels(generator):
    pixels = RAMP.expand(256, 1, 99, 101)
    p = torch.arange(256) / 255
    for draw in (binarize_by_bits, binarize_by_draws):
        share = draw(pixels, generator).mean((1, 2, 3))
        assert ((share - p).abs() <= 4.5 * (p * (1 - p) / 9999).sqrt()).all()
        assert draw(torch.zeros(1, 1, 1, 3, dtype=torch.uint8)).tolist() == [[[[0, 0, 0]]]]
        seeded = [draw(pixels[100:101], torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
        assert torch.equal(seeded[0], seeded[1])
        assert not torch.equal(seeded[0], seeded[2])


def test_of_the_65536_bit_patterns_257_per_grey_level_give_one_and_all_of_them_at_255(monkeypatch):
    every_pattern = torch.arange(-(2**15), 2**15).short().view(torch.int64)
    monkeypatch.setattr(torch.Tensor, "random_", lambda bits, *args, **kwargs: bits.copy_(every_pattern))
    ones = [binarize_by_bits(torch.full((1, 1, 256, 256), level, dtype=torch.uint8)).sum().item() for level in range(256)]
    assert ones == [257 * level for level in range(255)] + [65536]


def test_on_a_cpu_binarization_takes_its_bits_and_elsewhere_a_draw_per_pixel():
    pixels = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    x = Bernoulli().observe(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(x, binarize_by_bits(pixels, torch.Generator().manual_seed(0)))
    assert Bernoulli().observe(pixels.to("meta")).device.type == "meta"


def test_dynamic_binarization_follows_the_given_uniform_numbers():
    pixels = torch.tensor([[51, 51]], dtype=torch.uint8).view(1, 1, 1, 2)  # p = 0.2
    assert Bernoulli().observe(pixels, uniform=torch.tensor([0.19, 0.2]).view(1, 1, 1, 2)).flatten().tolist() == [1, 0]


def test_dynamic_binarization_draws_anew_at_each_call(generator):
    pixels = torch.full((1, 1, 28, 28), 128, dtype=torch.uint8)
    likelihood = Bernoulli()
    first, second = likelihood.observe(pixels, generator), likelihood.observe(pixels, generator)
    assert not torch.equal(first, second)
    again = likelihood.observe(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(first, again)


def test_threshold_binarization_cuts_at_128():
    likelihood = Bernoulli("threshold")
    x = likelihood.observe(RAMP)
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == [0.0] * 128 + [1.0] * 128
    with pytest.raises(
        ValueError, match="binarize: got 'treshold', expected one of 'sample', 'threshold'; did you mean 'threshold'"
    ):
        Bernoulli("treshold")


@pytest.mark.equation("gaussian-log-prob")
@pytest.mark.parametrize("learned", [False, True])
def test_gaussian_agrees_with_torch_distributions_with_all_constants(generator, learned):
    x, mean = torch.rand(2, 4, 3, 5, 5, generator=generator).mul(2).sub(1)
    expected = Normal(mean, 0.3).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(Gaussian(0.3, learned).log_prob(x, mean), expected, rtol=1e-5, atol=1e-3)


def test_gaussian_integrates_to_one():
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64).view(-1, 1, 1, 1)
    density = Gaussian(0.7).log_prob(x, torch.full_like(x, 0.4)).exp()
    assert torch.trapezoid(density, x.flatten()).item() == pytest.approx(1, abs=1e-6)


def test_only_the_learned_scale_is_a_parameter():
    assert list(Gaussian(0.3).parameters()) == []
    likelihood = Gaussian(0.3, learned=True)
    assert [p.exp().item() for p in likelihood.parameters()] == [pytest.approx(0.3)]
    x = torch.zeros(2, 1, 1, 1)
    likelihood.log_prob(x, x).sum().backward()
    assert likelihood.log_scale.grad.item() == pytest.approx(-2)  # d/ds of -log s, twice


WIDE_AND_NARROW = [1e-3, 2e-3, 0.01, 0.04, 0.07, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0]


@pytest.mark.parametrize("scale", WIDE_AND_NARROW)
def test_discretized_gaussian_sums_to_one_over_the_256_levels(scale, generator):
    likelihood = Gaussian(scale, discretized=True)
    means = torch.cat([torch.rand(300, generator=generator) * 2.4 - 1.2, torch.tensor([-1e6, -50, -1.5, -1, 0, 1, 1.5, 50, 1e6])])
    means = torch.cat([means, (2 * torch.arange(255) - 254) / 255])  # on an edge
    log_prob = likelihood.log_prob(
        likelihood.observe(RAMP).repeat(len(means), 1, 1, 1), means.repeat_interleave(256).view(-1, 1, 1, 1)
    )
    assert torch.isfinite(log_prob).all()
    total = log_prob.view(-1, 256).double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.equation("discretized-gaussian-log-prob")
@pytest.mark.parametrize("scale", WIDE_AND_NARROW)
@pytest.mark.parametrize("mean", [0.0, -0.99, 0.3, 1.2])
def test_discretized_gaussian_is_the_gaussian_mass_of_the_levels_bin(scale, mean):
    level = LEVELS.double().numpy()
    upper, lower = ((2 * level - 254) / 255 - mean) / scale, ((2 * level - 256) / 255 - mean) / scale
    upper[-1], lower[0] = math.inf, -math.inf
    mass = norm.sf(lower) - norm.sf(upper)
    below = lower + upper < 0  # the tail that keeps its digits
    mass[below] = (norm.cdf(upper) - norm.cdf(lower))[below]
    counts = mass > 1e-300
    assert counts.any()
    x = (LEVELS.double() / 127.5 - 1).view(-1, 1, 1, 1)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-7)):
        likelihood = Gaussian(scale, discretized=True).to(dtype)
        likelihood.log_scale.fill_(math.log(scale))  # with the digits of dtype
        log_prob = likelihood.log_prob(x.to(dtype), torch.full_like(x, mean).to(dtype)).numpy()
        assert log_prob[counts] == pytest.approx(torch.from_numpy(mass[counts]).log().numpy(), rel=tolerance, abs=tolerance)


def test_discretized_gaussian_has_the_gradient_of_its_log_mass_also_far_outside():
    x = torch.tensor([0, 1, 60, 127, 128, 200, 254, 255], dtype=torch.float64).div(127.5).sub(1).view(1, 8, 1, 1)
    means = torch.linspace(-1.3, 1.4, 8, dtype=torch.float64).roll(3).view(1, 8, 1, 1).requires_grad_()
    for scale in WIDE_AND_NARROW:
        log_scale = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(gaussian_log_mass, (x, means, log_scale), atol=1e-4, rtol=1e-4)
        far = torch.tensor([-1e6, -1e4, 1e4, 1e6]).view(4, 1, 1, 1).requires_grad_()
        level = torch.full((4, 1, 1, 1), 100 / 127.5 - 1)
        Gaussian(scale, discretized=True).log_prob(level, far).sum().backward()
        density = (level - far.detach()) / scale**2  # one bin is nothing at this distance
        torch.testing.assert_close(far.grad, density, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-6, *WIDE_AND_NARROW, 1e6])
def test_discretized_gaussian_has_finite_log_probs_and_gradients_at_every_level_and_distance(scale):
    likelihood = Gaussian(scale, learned=True, discretized=True)
    distances = torch.cat([torch.logspace(-8, 6, 15), torch.zeros(1), -torch.logspace(-8, 6, 15)])
    x = likelihood.observe(RAMP).expand(256, 1, 1, 31)
    params = (x + distances).requires_grad_()
    log_prob = likelihood.log_prob(x, params)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(params.grad).all()
    assert torch.isfinite(likelihood.log_scale.grad)


@pytest.mark.equation("optimal-scale")
def test_the_best_scale_is_the_root_mean_squared_error(generator):
    x, params = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    likelihood = Gaussian(learned=True).double()
    with torch.no_grad():
        likelihood.log_scale.copy_((x - params).square().mean().sqrt().log())
    likelihood.log_prob(x, params).sum().backward()
    assert likelihood.log_scale.grad.item() == pytest.approx(0, abs=1e-10)
    at_best = likelihood.log_prob(x, params).sum()
    for shift in (-0.1, 0.1):
        with torch.no_grad():
            likelihood.log_scale.add_(shift)
        assert likelihood.log_prob(x, params).sum() < at_best
        with torch.no_grad():
            likelihood.log_scale.sub_(shift)


def test_discretized_gaussian_is_over_the_256_levels_and_its_scale_can_be_learned():
    assert Gaussian().values is None
    likelihood = Gaussian(0.2, learned=True, discretized=True)
    assert likelihood.values == 256
    assert bits_per_dim(-784 * math.log(256), 784, likelihood) == pytest.approx(8)
    x = likelihood.observe(RAMP[100:101])
    likelihood.log_prob(x, x).sum().backward()
    assert likelihood.log_scale.grad.item() == pytest.approx(-1, abs=1e-3)  # d/ds of -log s, as a bin is narrow here
    with pytest.raises(ValueError, match=r"^x: got values between the 256 levels, expected level / 127.5 - 1"):
        likelihood.log_prob(x + 0.5 / 127.5, x)


@pytest.mark.parametrize("scale", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("mean", [-0.3, 0.99, 2.5])
def test_discretized_gaussian_mean_is_the_mean_of_its_256_probabilities(scale, mean):
    likelihood = Gaussian(scale, discretized=True).double()
    x = likelihood.observe(RAMP).double()
    params = torch.full_like(x, mean)
    expected = (likelihood.log_prob(x, params).exp() * x.flatten()).sum().item()
    assert likelihood.mean(params)[0].item() == pytest.approx(expected, abs=1e-6)


def logistic_params(location, log_scale, count):
    return torch.tensor([location, log_scale]).view(1, 2, 1, 1).expand(count, 2, 1, 1)


@pytest.mark.equation("discretized-logistic-log-prob")
@pytest.mark.parametrize("location", [-50.0, -1.5, -1.0, -0.9999, -0.5, 0.0, 0.003, 0.5, 0.9961, 1.0, 1.5, 50.0])
@pytest.mark.parametrize("log_scale", [-100.0, -7.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 2.0, 4.0, 7.0, 100.0])
def test_discretized_logistic_sums_to_one_over_the_256_levels(location, log_scale):
    likelihood = DiscretizedLogistic()
    log_prob = likelihood.log_prob(likelihood.observe(RAMP), logistic_params(location, log_scale, 256))
    assert torch.isfinite(log_prob).all()
    assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.equation("discretized-logistic-log-prob")
@pytest.mark.parametrize("level", [0, 1, 2, 100, 128, 253, 254, 255])
@pytest.mark.parametrize(("location", "log_scale"), [(0.0, -3.0), (-0.99, -4.0), (0.7, -1.0), (1.2, 0.0), (-0.3, 2.0)])
def test_discretized_logistic_is_the_logistic_mass_of_the_levels_bin(level, location, log_scale):
    scale = math.exp(log_scale)
    upper = math.inf if level == 255 else (2 * level - 254) / 255
    lower = -math.inf if level == 0 else (2 * level - 256) / 255
    mass = logistic.cdf(upper, location, scale) - logistic.cdf(lower, location, scale)
    if upper > location:  # the tail that keeps its digits
        mass = logistic.sf(lower, location, scale) - logistic.sf(upper, location, scale)
    likelihood = DiscretizedLogistic()
    log_prob = likelihood.log_prob(likelihood.observe(RAMP[level : level + 1]), logistic_params(location, log_scale, 1))
    assert log_prob.item() == pytest.approx(math.log(mass), rel=1e-4, abs=1e-5)


def test_discretized_logistic_clamps_its_log_scale_at_seven_on_both_sides():
    likelihood = DiscretizedLogistic()
    x = likelihood.observe(RAMP)
    for beyond, bound in ((-9.0, -7.0), (9.0, 7.0)):
        assert torch.equal(
            likelihood.log_prob(x, logistic_params(0.1, beyond, 256)), likelihood.log_prob(x, logistic_params(0.1, bound, 256))
        )
    within = [likelihood.log_prob(x, logistic_params(0.1, s, 256)) for s in (-7.0, -6.9, 6.9, 7.0)]
    assert not torch.equal(within[0], within[1])
    assert not torch.equal(within[2], within[3])


def test_discretized_logistic_takes_location_and_log_scale_from_the_channel_axis(generator):
    likelihood = DiscretizedLogistic()
    x = likelihood.observe(torch.randint(0, 256, (2, 3, 4, 5), generator=generator, dtype=torch.uint8))
    params = torch.randn(2, 6, 4, 5, generator=generator)
    per_channel = sum(likelihood.log_prob(x[:, c : c + 1], params[:, [c, c + 3]]) for c in range(3))
    torch.testing.assert_close(likelihood.log_prob(x, params), per_channel)


@pytest.mark.parametrize(("location", "log_scale"), [(0.0, -3.0), (-0.99, -2.0), (0.9, -1.0), (0.2, 0.0)])
def test_discretized_logistic_mean_is_the_mean_of_its_256_probabilities(location, log_scale):
    likelihood = DiscretizedLogistic()
    params = logistic_params(location, log_scale, 256).double()
    x = likelihood.observe(RAMP).double()
    expected = (likelihood.log_prob(x, params).exp() * x.flatten()).sum().item()
    assert likelihood.mean(params)[0].item() == pytest.approx(expected, abs=1e-6)


def mixture_log_prob_by_loops(x, params, num_mixtures):
    """log p of x (N, C, H, W) float64 by plain loops, from the layout as documented."""
    n, channels, height, width = x.shape
    total = torch.zeros(n, dtype=torch.float64)
    for i, h, w in itertools.product(range(n), range(height), range(width)):
        row = lambda r: params[i, r * num_mixtures : (r + 1) * num_mixtures, h, w].tolist()  # noqa: B023, E731
        pi = [math.exp(logit) / sum(map(math.exp, row(0))) for logit in row(0)]
        p = 0
        for k in range(num_mixtures):
            mass, pair = 1.0, 1 + 2 * channels
            for c in range(channels):
                location, scale = row(1 + c)[k], math.exp(row(1 + channels + c)[k])
                for earlier in range(c):
                    location += math.tanh(row(pair)[k]) * x[i, earlier, h, w].item()
                    pair += 1
                level = round((x[i, c, h, w].item() + 1) * 127.5)
                upper = math.inf if level == 255 else (2 * level - 254) / 255
                lower = -math.inf if level == 0 else (2 * level - 256) / 255
                if upper > location:  # the tail that keeps its digits
                    mass *= logistic.sf(lower, location, scale) - logistic.sf(upper, location, scale)
                else:
                    mass *= logistic.cdf(upper, location, scale) - logistic.cdf(lower, location, scale)
            p += pi[k] * mass
        total[i] += math.log(p)
    return total


def mixture_params(generator, count, num_mixtures, channels, spread=1.0):
    """(count, P, 1, 1): random, with log-scales around -2."""
    params = torch.randn(count, (channels + 1) * (channels + 2) // 2, num_mixtures, generator=generator) * spread
    params[:, 1 + channels : 1 + 2 * channels] -= 2
    return params.view(count, -1, 1, 1)


def without_last_channel(params, num_mixtures, channels):
    """The params of the first channels - 1 channels alone."""
    logits, rest = params.unflatten(1, (-1, num_mixtures)).tensor_split([1], dim=1)
    locations, log_scales, coefficients = rest.tensor_split([channels, 2 * channels], dim=1)
    kept = coefficients[:, : (channels - 1) * (channels - 2) // 2]
    return torch.cat([logits, locations[:, :-1], log_scales[:, :-1], kept], dim=1).flatten(1, 2)


def test_a_mixture_has_a_logit_and_per_channel_a_location_a_scale_and_coefficients_to_the_earlier_ones():
    for num_mixtures, channels in itertools.product([1, 4, 10], [1, 2, 3, 4]):
        expected = num_mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)
        assert DiscretizedLogisticMixture(num_mixtures).param_channels(channels) == expected
    assert DiscretizedLogisticMixture().num_mixtures == 10
    likelihood = DiscretizedLogisticMixture(2)
    for wrong in (1, 2, 7, 8, 10, 13, 22):
        for call in (likelihood.mean, likelihood.sample):
            with pytest.raises(ValueError, match=r"^params: got .*, expected 2 \* \(C \+ 1\)\(C \+ 2\) / 2 channels for some C$"):
                call(torch.zeros(1, wrong, 2, 2))
    with pytest.raises(ValueError, match="num_mixtures: got int 0, expected an integer of at least 1"):
        DiscretizedLogisticMixture(0)


@pytest.mark.parametrize("num_mixtures", [1, 3, 10])
def test_a_mixture_sums_to_one_over_the_256_levels_of_one_channel(num_mixtures, generator):
    likelihood = DiscretizedLogisticMixture(num_mixtures)
    extreme = torch.tensor([-1e6, -100.0, -7.0, -1.0, 0.0, 1.0, 7.0, 100.0, 1e6])
    params = torch.cat(
        [mixture_params(generator, 50, num_mixtures, 1, spread) for spread in (0.3, 1, 3, 30)]
        + [extreme[torch.randint(0, 9, (100, 3 * num_mixtures, 1, 1), generator=generator)]]
    )
    log_prob = likelihood.log_prob(likelihood.observe(RAMP).repeat(300, 1, 1, 1), params.repeat_interleave(256, 0))
    assert torch.isfinite(log_prob).all()
    total = log_prob.view(300, 256).double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_mixture_summed_over_its_last_channel_is_the_mixture_of_the_channels_before(channels, generator):
    likelihood = DiscretizedLogisticMixture(3)
    params = mixture_params(generator, 40, 3, channels)
    earlier = likelihood.sample(params, generator)[:, :-1]
    x = torch.cat([earlier.repeat_interleave(256, 0), likelihood.observe(RAMP).repeat(40, 1, 1, 1)], dim=1)
    total = likelihood.log_prob(x, params.repeat_interleave(256, 0)).view(40, 256).logsumexp(1)
    expected = likelihood.log_prob(earlier, without_last_channel(params, 3, channels))
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.equation("logistic-mixture-log-prob")
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_mixture_agrees_with_plain_loops_over_pixels_components_and_channels(channels, generator):
    likelihood = DiscretizedLogisticMixture(2)
    params = mixture_params(generator, 2 * 2 * 3, 2, channels).double().view(2, 2, 3, -1).permute(0, 3, 1, 2)
    pixels = torch.randint(0, 256, (2, channels, 2, 3), generator=generator)
    pixels[0, :, 0, 0], pixels[1, :, 1, 2] = 0, 255
    x = pixels.double() / 127.5 - 1
    expected = mixture_log_prob_by_loops(x, params, 2)
    torch.testing.assert_close(likelihood.log_prob(x, params), expected)
    torch.testing.assert_close(likelihood.log_prob(x.float(), params.float()), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mixture_of_one_component_without_coefficients_is_the_discretized_logistic(channels, generator):
    one, mixture = DiscretizedLogistic(), DiscretizedLogisticMixture(1)
    x = one.observe(torch.randint(0, 256, (5, channels, 4, 4), generator=generator, dtype=torch.uint8))
    params = torch.randn(5, 2 * channels, 4, 4, generator=generator) * 10
    logit, coefficients = torch.randn(5, 1, 4, 4, generator=generator), torch.zeros(5, channels * (channels - 1) // 2, 4, 4)
    same = torch.cat([logit, params, coefficients], dim=1)
    torch.testing.assert_close(mixture.log_prob(x, same), one.log_prob(x, params))
    torch.testing.assert_close(mixture.mean(same), one.mean(params), rtol=0, atol=1 / 255)


def test_a_mixture_puts_mass_on_two_separated_levels_which_one_logistic_cannot():
    likelihood = DiscretizedLogistic()
    x = likelihood.observe(RAMP[[40, 200]])
    params = torch.tensor([0.0, 0.0, *x.flatten().tolist(), -7.0, -7.0]).view(1, 6, 1, 1).expand(2, 6, 1, 1)
    assert (DiscretizedLogisticMixture(2).log_prob(x, params).exp() > 0.48).all()
    grid = torch.cartesian_prod(torch.linspace(-1.5, 1.5, 61), torch.linspace(-7, 7, 57)).view(-1, 2, 1, 1)
    both = torch.stack([likelihood.log_prob(level.expand(len(grid), 1, 1, 1), grid) for level in x.split(1)])
    assert both.min(0).values.max().exp() < 1 / 160  # the 159 levels between weigh no less than the lighter of the two


def test_samples_of_a_mixture_have_the_joint_probabilities_of_two_channels(generator):
    likelihood = DiscretizedLogisticMixture(2)
    params = torch.tensor([0.4, -0.2, -0.4, 0.3, 0.1, -0.95, -4.0, -4.5, -4.5, -4.0, 0.9, -1.2]).view(1, 12, 1, 1)
    grid = torch.cartesian_prod(LEVELS, LEVELS).view(-1, 2, 1, 1) / 127.5 - 1
    p = likelihood.log_prob(grid, params.expand(len(grid), -1, 1, 1)).double().exp()
    draws = likelihood.sample(params.expand(100_000, -1, 1, 1), generator)
    likelihood.check_values(draws)
    level = likelihood.to_pixels(draws).flatten(1).long()
    observed, expected = (level[:, 0] * 256 + level[:, 1]).bincount(minlength=65536), 100_000 * p
    often = expected >= 5
    lump = lambda counts: torch.cat([counts[often], counts[~often].sum().view(1)])  # noqa: E731
    distance = ((lump(observed) - lump(expected)) ** 2 / lump(expected)).sum().item()
    assert often.sum() > 400
    assert 1e-4 < chi2.sf(distance, often.sum().item()) < 1 - 1e-4


def test_the_components_of_a_mixture_are_drawn_with_the_softmax_of_their_logits(generator):
    logits, levels = [0.9, -0.4, 0.1], torch.tensor([40, 120, 210])
    row = [*logits, *(levels / 127.5 - 1).tolist(), -7.0, -7.0, -7.0]  # each component sits on its own level
    draws = DiscretizedLogisticMixture(3).sample(torch.tensor(row).view(1, 9, 1, 1).expand(60_000, -1, 1, 1), generator)
    pixels = DiscretizedLogisticMixture(3).to_pixels(draws).flatten()
    share = torch.stack([((pixels.int() - level).abs() < 5).float().mean() for level in levels])
    p = torch.tensor(logits).softmax(0)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / 60_000).sqrt() + 1e-3).all()


def test_the_third_channel_of_a_sample_depends_on_the_first_and_the_second(generator):
    likelihood = DiscretizedLogisticMixture(1)
    earlier = torch.tensor([60, 200]).view(1, 2, 1, 1) / 127.5 - 1  # nearly certain: scales of a ninth of a bin
    first, second = earlier.flatten().tolist()
    row = [0.0, first, second - math.tanh(0.2) * first, 0.1, -7.0, -7.0, -3.0, 0.2, 0.7, -0.4]
    params = torch.tensor(row).view(1, 10, 1, 1)
    draws = likelihood.sample(params.expand(40_000, -1, 1, 1), generator)
    draws = draws[((draws[:, :2] - earlier).abs() < 1e-6).all(1).flatten()]
    assert len(draws) > 36_000
    share = likelihood.to_pixels(draws[:, 2]).flatten().long().bincount(minlength=256) / len(draws)
    x = torch.cat([earlier.expand(256, 2, 1, 1), likelihood.observe(RAMP)], dim=1)
    p = likelihood.log_prob(x, params.expand(256, -1, 1, 1)).softmax(0)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / len(draws)).sqrt() + 1e-4).all()


def test_the_mean_of_a_mixture_is_within_half_a_level_of_the_mean_of_its_256_probabilities(generator):
    likelihood = DiscretizedLogisticMixture(3)
    params = torch.cat([mixture_params(generator, 100, 3, 1, spread) for spread in (1, 3)])
    x = likelihood.observe(RAMP)
    p = likelihood.log_prob(x.repeat(200, 1, 1, 1), params.repeat_interleave(256, 0)).view(200, 256).exp()
    torch.testing.assert_close(likelihood.mean(params).flatten(), p @ x.flatten(), rtol=0, atol=1 / 255)
    smooth = params.double().unflatten(1, (3, 3)).clone()
    smooth[:, 2] = smooth[:, 2].clamp(min=-3)
    smooth, x = smooth.flatten(1, 2), x.double()
    p = likelihood.log_prob(x.repeat(200, 1, 1, 1), smooth.repeat_interleave(256, 0)).view(200, 256).exp()
    midpoint_rule = (2 / 255) ** 2 / 24 / (4 * math.exp(-3))  # width^2 / 24 times the steepest slope of a logistic function
    torch.testing.assert_close(likelihood.mean(smooth).flatten(), p @ x.flatten(), rtol=0, atol=midpoint_rule + 1e-6)


def test_the_mean_of_a_mixture_lets_each_channel_move_the_later_ones(generator):
    likelihood = DiscretizedLogisticMixture(2)
    row = [0.5, -0.5, -0.3, 0.6, 0.2, -0.1, 0.0, 0.3, -4.0, -3.5, -3.0, -4.0, -3.0, -3.5, 0.5, -0.6, -0.7, 0.4, 0.8, 0.3]
    params = torch.tensor(row).view(1, 20, 1, 1)
    draws = likelihood.sample(params.expand(40_000, -1, 1, 1), generator)
    error = (likelihood.mean(params) - draws.mean(0)).abs()
    assert (error <= 5 * draws.std(0) / 200).all()


def test_the_mean_of_a_mixture_stays_within_the_levels_however_far_the_location():
    likelihood = DiscretizedLogisticMixture(1)
    for location in (1.5, 10.0, 1e3, 1e6):
        for log_scale in (-100.0, -7.0, -2.0, 0.0, 2.0, 7.0, 100.0):
            params = torch.tensor([0.0, location, log_scale]).view(1, 3, 1, 1)
            mirrored = torch.tensor([0.0, -location, log_scale]).view(1, 3, 1, 1)
            exact = DiscretizedLogistic().mean(params[:, 1:].double()).item()
            assert likelihood.mean(params).item() == pytest.approx(exact, abs=1 / 255)
            assert abs(likelihood.mean(params).item()) <= 1
            assert likelihood.mean(mirrored).item() == -likelihood.mean(params).item()


@pytest.mark.parametrize("size", [10.0, 1e3, 1e6])
def test_a_mixture_has_finite_gradients_at_mixed_extremes(size, generator):
    likelihood = DiscretizedLogisticMixture(4)
    x = likelihood.observe(torch.randint(0, 256, (64, 3, 2, 2), generator=generator, dtype=torch.uint8))
    sign = torch.randint(-1, 2, (64, 40, 2, 2), generator=generator)
    params = (size * sign).requires_grad_()
    log_prob = likelihood.log_prob(x, params)
    (log_prob.sum() + likelihood.mean(params).sum()).backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(params.grad).all()
    assert (params.grad.flatten(1) != 0).any(1).all()


def log_probs_of_all_values(likelihood, params):
    """Every value x can take, with its log-probability under params (1, P, 1, 1)."""
    values = torch.linspace(likelihood.lowest, likelihood.highest, likelihood.values).view(-1, 1, 1, 1)
    return values.flatten(), likelihood.log_prob(values, params.expand(len(values), -1, 1, 1))


@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(), DiscretizedLogistic(), Gaussian(0.08, discretized=True)],
    ids=["bernoulli", "discretized_logistic", "discretized_gaussian"],
)
@pytest.mark.parametrize("first", [-0.95, 0.3, 0.97])
def test_samples_have_the_probabilities_of_log_prob(likelihood, first, generator):
    params = torch.tensor([first, -3.0][: likelihood.params_per_value]).view(1, -1, 1, 1)
    values, log_probs = log_probs_of_all_values(likelihood, params)
    draws = likelihood.sample(params.expand(40_000, -1, 1, 1), generator).flatten()
    observed = (draws[:, None] - values).abs().min(1)
    assert observed.values.max() < 1e-6  # each draw is a value that x can take
    share = observed.indices.bincount(minlength=len(values)) / len(draws)
    p = log_probs.exp()
    assert ((share - p).abs() <= 5 * (p * (1 - p) / len(draws)).sqrt() + 1e-4).all()
    assert likelihood.mean(params).item() == pytest.approx(draws.mean().item(), abs=5 * draws.std().item() / 200)


def test_a_sample_is_the_location_plus_the_scale_times_the_noise_of_the_generator():
    params = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seeded = lambda: torch.Generator().manual_seed(2)  # noqa: E731
    noise = torch.randn(3, 2, 4, 4, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(Gaussian(0.5).sample(params, seeded()), params + 0.5 * noise)
    levels = ((params + 0.5 * noise + 1) * 127.5).round().clamp(0, 255)
    torch.testing.assert_close(Gaussian(0.5, discretized=True).sample(params, seeded()), levels / 127.5 - 1)
    u = torch.rand(3, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    continuous = params[:, :1] + params[:, 1:].exp() * torch.logit(u)
    levels = ((continuous + 1) * 127.5).round().clamp(0, 255)
    torch.testing.assert_close(DiscretizedLogistic().sample(params, seeded()), levels / 127.5 - 1)
    expected = torch.bernoulli(params.sigmoid(), generator=seeded())
    assert torch.equal(Bernoulli().sample(params, seeded()), expected)


@over_all
def test_samples_are_drawn_on_the_device_of_the_params(config):
    likelihood = make_likelihood(config).to("meta")
    assert likelihood.sample(torch.zeros(2, likelihood.param_channels(3), 4, 4, device="meta")).device.type == "meta"


def test_gaussian_samples_have_its_mean_and_scale(generator):
    params = torch.full((50_000, 1, 1, 1), 0.4)
    likelihood = Gaussian(0.3)
    draws = likelihood.sample(params, generator)
    assert likelihood.mean(params).equal(params)
    assert draws.mean().item() == pytest.approx(0.4, abs=5 * 0.3 / math.sqrt(50_000))
    assert draws.std().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("config", [config for config in ALL if config != "bernoulli"])
def test_pixels_survive_observe_and_to_pixels(config):
    likelihood = make_likelihood(config)
    x = likelihood.observe(RAMP)
    assert x.dtype == torch.float32
    assert x.min().item() == likelihood.lowest
    assert x.max().item() == likelihood.highest
    assert torch.equal(likelihood.to_pixels(x), RAMP)


def test_to_pixels_rounds_and_clamps():
    assert Bernoulli().to_pixels(torch.tensor([-0.1, 0.0, 0.499, 0.501, 1.0, 1.1])).tolist() == [0, 0, 127, 128, 255, 255]
    assert Gaussian().to_pixels(torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.2])).tolist() == [0, 0, 128, 255, 255]


def test_grey_bce_is_marked_as_no_likelihood_and_does_not_integrate_to_one():
    score = GreyBCENotALikelihood()
    assert not score.normalized
    assert all(make_likelihood(config).normalized for config in ALL if config != "grey_bce_not_a_likelihood")
    x = torch.linspace(0, 1, 10_001).view(-1, 1, 1, 1)
    mass = torch.trapezoid(score.log_prob(x, torch.full_like(x, 2.0)).exp(), x.flatten()).item()
    p = 1 / (1 + math.exp(-2))
    assert mass == pytest.approx((2 * p - 1) / 2, abs=1e-6)  # the integral of p^x (1 - p)^(1 - x), with logit 2: 0.38, not 1


@pytest.mark.equation("bits-per-dim")
def test_bits_per_dim_of_the_uniform_distribution_are_eight():
    nats = -3072 * math.log(256)
    assert bits_per_dim(nats, 3072, DiscretizedLogistic()) == pytest.approx(8)
    assert bits_per_dim(torch.tensor([nats, nats / 2]), 3072, DiscretizedLogistic()).tolist() == pytest.approx([8, 4])
    assert bits_per_dim(-784 * math.log(2), 784, Bernoulli()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["gaussian", "grey_bce_not_a_likelihood"])
def test_bits_per_dim_is_refused_where_it_has_no_meaning(name):
    with pytest.raises(ValueError, match=f"likelihood: got '{name}', expected one over discrete values"):
        bits_per_dim(-1.0, 784, make_likelihood(name))
    with pytest.raises(ValueError, match="num_dims: got int 0, expected an integer of at least 1"):
        bits_per_dim(-1.0, 0, Bernoulli())


@over_all
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_params_of_low_precision_are_scored_in_float32_also_under_autocast(config, dtype, generator):
    likelihood = make_likelihood(config)
    x = likelihood.observe(torch.randint(0, 256, (4, 3, 5, 5), generator=generator, dtype=torch.uint8), generator)
    params = params_for(likelihood, x, generator).to(dtype)
    expected = likelihood.log_prob(x, params.float())
    draw = likelihood.sample(params.float(), torch.Generator().manual_seed(0))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            log_prob = likelihood.log_prob(x, params)
            mean, again = likelihood.mean(params), likelihood.sample(params, torch.Generator().manual_seed(0))
        for got, full in ((log_prob, expected), (mean, likelihood.mean(params.float())), (again, draw)):
            assert got.dtype == torch.float32
            assert torch.equal(got, full)


@over_all
def test_log_prob_is_per_image_and_independent_of_the_other_images(config, generator):
    likelihood = make_likelihood(config)
    x = likelihood.observe(torch.randint(0, 256, (6, 2, 3, 4), generator=generator, dtype=torch.uint8), generator)
    params = params_for(likelihood, x, generator)
    together = likelihood.log_prob(x, params)
    assert together.shape == (6,)
    apart = torch.cat([likelihood.log_prob(x[i : i + 1], params[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, apart)


@over_all
def test_a_wrong_x_is_refused_with_its_name(config):
    likelihood = make_likelihood(config)
    x = torch.zeros(2, 1, 4, 4) if likelihood.lowest == 0 else torch.full((2, 1, 4, 4), 1.0)
    params = params_for(likelihood, x)
    pixels = torch.full((2, 1, 4, 4), 200, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"x: got a uint8 tensor .* call likelihood.observe\(pixels\) first"):
        likelihood.log_prob(pixels, params)
    with pytest.raises(ValueError, match=r"^x: got .*[; ]likelihood.observe\(pixels\) scales uint8 pixels$"):
        likelihood.log_prob(pixels.float(), params)
    no_number = "^x: got NaN, expected finite values$"
    if config == "gaussian":
        no_number = r"^x: got NaN or values beyond \+-10, expected x on .*; likelihood.observe\(pixels\) scales uint8 pixels$"
    with pytest.raises(ValueError, match=no_number):
        likelihood.log_prob(torch.full_like(x, math.nan), params)
    with pytest.raises(ValueError, match=r"^x: got NaN"):
        likelihood.log_prob(torch.cat([x[:1], torch.full_like(x[:1], math.nan)]), params)
    with pytest.raises(ValueError, match=r"params: got a float32 tensor of shape .*, expected shape \(2, "):
        likelihood.log_prob(x, params[:1])
    with pytest.raises(ValueError, match=r"params: .* expected shape"):
        likelihood.log_prob(x, params.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"x: got an empty set"):
        likelihood.log_prob(x[:0], params[:0])
    with pytest.raises(ValueError, match=r"x: got a float32 tensor of shape \(2, 4, 4\), expected shape \(N, C, H, W\)"):
        likelihood.log_prob(x[:, 0], params)
    with pytest.raises(ValueError, match=r"x: got an? int64 tensor of shape .*, expected a floating-point tensor"):
        likelihood.log_prob(x.long(), params)
    assert likelihood.log_prob(x * 300, params, validate=False).shape == (2,)  # only the values go unchecked
    colour = x.expand(2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=rf"^params: .*, expected shape \(2, {likelihood.param_channels(3)}, 4, 4\) for x of shape"
    ):
        likelihood.log_prob(colour, params)
    with pytest.raises(ValueError, match="params"):
        likelihood.log_prob(x, params[:1], validate=False)


@over_all
def test_values_on_the_border_of_the_range_pass_and_values_beyond_do_not(config):
    likelihood = make_likelihood(config)
    border = 10.0 if config == "gaussian" else likelihood.highest
    low = -10.0 if config == "gaussian" else likelihood.lowest
    for value in (border, low):
        likelihood.check_values(torch.full((1, 1, 2, 2), value))
        beyond = torch.tensor([value, value + (0.01 if value > 0 else -0.01)]).view(1, 1, 1, 2)
        with pytest.raises(ValueError, match=r"x: got"):
            likelihood.check_values(beyond)


def test_bernoulli_refuses_grey_values():
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3)
    with pytest.raises(
        ValueError,
        match=r"^x: got values between 0 and 1, expected only 0 and 1; likelihood.observe\(pixels\) binarizes uint8 pixels$",
    ):
        Bernoulli().log_prob(x, torch.zeros_like(x))
    assert GreyBCENotALikelihood().log_prob(x, torch.zeros_like(x)).item() == pytest.approx(-3 * math.log(2))


@over_all
@pytest.mark.parametrize(
    "bad", [torch.rand(2, 1, 4, 4), torch.zeros(0, 1, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8), [1]]
)
def test_observe_wants_uint8_images(config, bad):
    with pytest.raises(ValueError, match=r"pixels: got .*expected"):
        make_likelihood(config).observe(bad)


@pytest.mark.parametrize("config", ["discretized_logistic", "discretized_logistic_mixture", DISCRETIZED_GAUSSIAN])
def test_a_likelihood_over_256_levels_refuses_values_between_them(config):
    likelihood = make_likelihood(config)
    x = (RAMP / 255)[:4]  # in [0, 1], so that every other value lies between two levels
    with pytest.raises(ValueError, match=r"^x: got values between the 256 levels, expected level / 127.5 - 1"):
        likelihood.log_prob(x, params_for(likelihood, x))
    likelihood.check_values(likelihood.observe(RAMP))
    for shift, fits in ((0.008, True), (0.012, False), (-0.012, False)):
        x = torch.full((1, 1, 1, 1), (100 + shift) / 127.5 - 1, dtype=torch.float64)
        if fits:
            likelihood.check_values(x)
        else:
            with pytest.raises(ValueError, match=r"likelihood.observe\(pixels\) gives them$"):
                likelihood.check_values(x)


def test_grey_bce_is_the_mean_bernoulli_score_over_binarizations(generator):
    pixels = torch.randint(0, 256, (1, 1, 3, 3), generator=generator, dtype=torch.uint8)
    logits = torch.randn(1, 1, 3, 3, generator=generator)
    score = GreyBCENotALikelihood()
    draws = Bernoulli().log_prob(Bernoulli().observe(pixels.expand(100_000, 1, 3, 3), generator), logits.expand(100_000, 1, 3, 3))
    error = draws.std().item() / math.sqrt(100_000)
    assert score.log_prob(score.observe(pixels), logits).item() == pytest.approx(draws.mean().item(), abs=4 * error)


def test_uniform_numbers_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"pixels, uniform: got shapes \(1, 1, 2, 2\), \(5, 1, 2, 2\)"):
        Bernoulli().observe(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), uniform=torch.zeros(5, 1, 2, 2))


def test_an_unknown_likelihood_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="likelihood: got 'bernouli', expected one of .*; did you mean 'bernoulli'"):
        make_likelihood("bernouli")
    with pytest.raises(ValueError, match=r"likelihood: got arguments \{'sigma': 1\}, which 'gaussian' does not take"):
        make_likelihood({"name": "gaussian", "sigma": 1})
    with pytest.raises(ValueError, match="likelihood: got None, expected one of"):
        make_likelihood({"scale": 1.0})
    assert Gaussian().config == {"name": "gaussian", "scale": 1.0, "learned": False}
    with pytest.raises(ValueError, match="^likelihood: got type <class .*Bernoulli'>, expected a name, a config or a Likelihood$"):
        make_likelihood(Bernoulli)
    for scale in (0, -1.0, math.nan, "1"):
        with pytest.raises(ValueError, match="scale: got .*, expected a finite number above 0"):
            Gaussian(scale)


@pytest.mark.parametrize(
    "config",
    [
        *ALL,
        {"name": "gaussian", "scale": 0.2, "learned": True},
        {"name": "bernoulli", "binarize": "threshold"},
        {"name": "discretized_logistic_mixture", "num_mixtures": 3},
    ],
)
def test_a_likelihood_is_rebuilt_by_its_config(config):
    likelihood = make_likelihood(config)
    again = make_likelihood(likelihood.config)
    assert type(again) is type(likelihood)
    assert again.config == likelihood.config
    assert make_likelihood(likelihood) is likelihood
    name = config if isinstance(config, str) else config["name"]
    assert likelihood.config["name"] == name
    if isinstance(config, dict):
        assert likelihood.config == config
    assert again.values == likelihood.values


@over_all
def test_a_likelihood_over_so_many_values_sums_to_one_over_them_with_its_mean(config, generator):
    likelihood = make_likelihood(config)
    if likelihood.values is None:
        assert config in ("gaussian", "grey_bce_not_a_likelihood"), "a density needs its name here, and a test that integrates it"
        return
    x = torch.linspace(likelihood.lowest, likelihood.highest, likelihood.values, dtype=torch.float64).view(-1, 1, 1, 1)
    for params in 3 * torch.randn(20, 1, likelihood.param_channels(1), 1, 1, generator=generator, dtype=torch.float64):
        mass = likelihood.log_prob(x, params.expand(len(x), -1, 1, 1)).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)
        assert likelihood.mean(params).item() == pytest.approx((mass @ x.flatten()).item(), abs=1 / 255)  # half a level


def test_the_base_class_defines_no_distribution():
    x = torch.zeros(1, 1, 1, 1)
    for call in (lambda: Likelihood().log_prob(x, x), lambda: Likelihood().mean(x), lambda: Likelihood().sample(x)):
        with pytest.raises(NotImplementedError):
            call()


@given(
    st.sampled_from(ALL),
    st.integers(1, 3),
    st.sampled_from([1, 3]),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([-1e6, -100.0, -8.0, 0.0, 8.0, 100.0, 1e6]),
    st.integers(0, 255),
)
def test_log_prob_and_its_gradient_are_finite_for_any_params(config, n, channels, side, dtype, value, level):
    likelihood = make_likelihood(config)
    x = likelihood.observe(torch.full((n, channels, side, side), level, dtype=torch.uint8)).to(dtype)
    params = torch.full((n, likelihood.param_channels(channels), side, side), value, dtype=dtype, requires_grad=True)
    log_prob = likelihood.log_prob(x, params)
    assert log_prob.shape == (n,)
    assert log_prob.dtype == dtype
    assert not torch.isnan(log_prob).any()
    assert torch.isfinite(log_prob).all()
    log_prob.sum().backward()
    assert torch.isfinite(params.grad).all()
    mean = likelihood.mean(params.detach())
    assert mean.shape == x.shape
    assert torch.isfinite(mean).all()
    assert likelihood.to_pixels(mean).dtype == torch.uint8
    assert likelihood.sample(params.detach()).shape == x.shape


def test_minus_grey_bce_minus_the_rate_bounds_the_expected_log_probability_of_the_binarized_image(generator):
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    prior = Normal(0.0, 1.0).log_prob(z)
    weight, bias = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    params = (z[:, None] * weight + bias).view(-1, 1, 2, 2)  # logits of four pixels, on the line of codes
    grey = torch.rand(4, generator=generator, dtype=torch.float64).view(1, 1, 2, 2)
    binary = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).view(16, 1, 2, 2)
    chance = (grey * binary + (1 - grey) * (1 - binary)).flatten(1).prod(1)  # of each binarization
    log_px = [torch.trapezoid((Bernoulli().log_prob(b.expand_as(params), params) + prior).exp(), z).log() for b in binary]
    expected = (chance * torch.stack(log_px)).sum()
    minus_bce = GreyBCENotALikelihood().log_prob(grey.expand_as(params), params)
    for mean, deviation in ((0.0, 1.0), (0.4, 0.8), (-1.0, 0.5)):
        q = Normal(mean, deviation)
        rate = torch.distributions.kl_divergence(q, Normal(0.0, 1.0))
        bound = torch.trapezoid(q.log_prob(z).exp() * minus_bce, z) - rate
        assert bound < expected
    assert expected - torch.trapezoid(prior.exp() * minus_bce, z) < 2  # at q = p(z): a bound that says something


def test_a_mixture_scores_params_of_either_layout_alike_to_the_last_digit(generator):
    likelihood = DiscretizedLogisticMixture(3)
    x = likelihood.observe(torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8))
    plain = torch.randn(4, 30, 8, 8, generator=generator).requires_grad_()
    inner = plain.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    scores = [likelihood.log_prob(x, params) for params in (plain, inner)]
    assert torch.equal(*scores)
    for score in scores:
        score.sum().backward()
    assert torch.equal(plain.grad, inner.grad)
