"""The judges of the later assignments: right code passes however it is written, and every mistake gets its name."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal, kl_divergence

import vaelib
from vaelib import checks
from vaelib.book.oracles import LinearGaussian
from vaelib.checks import (
    check_ancestral,
    check_bits_per_dim,
    check_effective_sample_size,
    check_importance_weights,
    check_kl_between,
    check_layered_elbo,
    check_layered_evidence,
    check_level_draw,
    check_level_mean,
    check_log_likelihood,
    check_optimal_scale,
    check_pooled,
    check_standard_error,
)
from vaelib.checks.layers import TwoLayers

TABLES = {
    check_optimal_scale: checks.SCALE_MISTAKES,
    check_bits_per_dim: checks.BITS_MISTAKES,
    check_level_mean: checks.LEVEL_MEAN_MISTAKES,
    check_level_draw: checks.LEVEL_DRAW_MISTAKES,
    check_importance_weights: checks.LOG_WEIGHTS_MISTAKES,
    check_effective_sample_size: checks.ESS_MISTAKES,
    check_pooled: checks.POOLED_MISTAKES,
    check_standard_error: checks.STANDARD_ERROR_MISTAKES,
    check_log_likelihood: checks.LOG_LIKELIHOOD_MISTAKES,
    check_kl_between: checks.KL_BETWEEN_MISTAKES,
    check_layered_elbo: checks.LAYERED_ELBO_MISTAKES,
    check_layered_evidence: checks.LAYERED_EVIDENCE_MISTAKES,
    check_ancestral: checks.ANCESTRAL_MISTAKES,
}


def levels():
    return torch.arange(256) / 127.5 - 1


def density(location, log_scale):
    return Laplace(location[..., None], log_scale.exp()[..., None])


def mean_by_masses(location, log_scale):
    below = density(location, log_scale).cdf(levels()[1:] - 1 / 255)
    ends = torch.zeros_like(below[..., :1]), torch.ones_like(below[..., :1])
    return (torch.cat([ends[0], below, ends[1]], -1).diff(dim=-1) * levels()).sum(-1)


def mean_by_edges(location, log_scale):
    above = 1 - density(location, log_scale).cdf(levels()[1:] - 1 / 255)
    return above.sum(-1) / 127.5 - 1


def mean_by_loop(location, log_scale):
    total = -torch.ones_like(location)
    for level in range(1, 256):
        total = total + (1 - Laplace(location, log_scale.exp()).cdf(torch.tensor((2 * level - 256) / 255))) * 2 / 255
    return total


def draw_by_loop(location, log_scale, uniform):
    found = []
    for m, s, u in zip(location.flatten().tolist(), log_scale.flatten().tolist(), uniform.flatten().tolist(), strict=True):
        y = m + math.exp(s) * (math.log(2 * u) if u < 0.5 else -math.log(2 - 2 * u))
        found.append(min(max(round((y + 1) * 127.5), 0), 255) / 127.5 - 1)
    return torch.tensor(found).view_as(location)


def ess_by_loop(log_weights):
    w = (log_weights - log_weights.amax(0)).exp()
    return torch.stack([column.sum() ** 2 / (column * column).sum() for column in w.T])


def draws_of_q(model, x, num_samples):
    mean, log_var = model.encode(x)
    q = Normal(mean, (log_var / 2).exp())
    z = q.rsample((num_samples,))
    return z, model.log_likelihood(x, z), q


def estimate_by_distributions(model, x, num_samples):
    z, log_likelihood, q = draws_of_q(model, x, num_samples)
    w = log_likelihood + Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)
    return w.logsumexp(0) - math.log(num_samples)


def estimate_in_parts(model, x, num_samples, size):
    """The mean of the estimates of parts of the draws, each a bound of its own."""
    sizes = [size] * (num_samples // size) + [num_samples % size] * (num_samples % size > 0)
    parts = torch.stack([estimate_by_distributions(model, x, part) for part in sizes])
    return (parts * torch.tensor(sizes)[:, None]).sum(0) / num_samples


def estimate_one_by_one(model, x, num_samples):
    total = torch.full((len(x),), -math.inf)
    for part in [100] * (num_samples // 100) + [1] * (num_samples % 100):
        total = torch.logaddexp(total, model.log_weights(x, part).logsumexp(0).detach())
    return total - math.log(num_samples)


def antithetic(model, x, num_samples):
    mean, log_var = model.encode(x)
    eps = torch.randn((num_samples + 1) // 2, *mean.shape)
    z = vaelib.Posterior(mean, log_var).sample(torch.cat([eps, -eps])[:num_samples])
    w = model.log_likelihood(x, z) + vaelib.StandardNormal(3).log_prob(z) - vaelib.Posterior(mean, log_var).log_prob(z)
    return vaelib.importance_weighted_bound(w)


def between_by_distributions(m, s, prior_m, prior_s):
    q, p = (Independent(Normal(a, (b / 2).exp()), 1) for a, b in ((m, s), (prior_m, prior_s)))
    return kl_divergence(q, p)


def between_by_matrices(m, s, prior_m, prior_s):
    q, p = (MultivariateNormal(a, torch.diag_embed(b.exp())) for a, b in ((m, s), (prior_m, prior_s)))
    return kl_divergence(q, p)


def elbo_by_distributions(model, x, eps2, eps1):
    q2 = Normal(*(f(part) for f, part in zip((lambda v: v, lambda v: (v / 2).exp()), model.posterior2(x), strict=True)))
    z2 = q2.mean + q2.stddev * eps2
    mean, log_var = model.posterior1(x, z2)
    z1 = mean + log_var.mul(0.5).exp() * eps1
    upper = kl_divergence(q2, Normal(0.0, 1.0)).sum(1)
    return model.log_likelihood(x, z1) - (upper + between_by_distributions(mean, log_var, *model.prior1(z2)))


def elbo_by_library(model, x, eps2, eps1):
    q2 = vaelib.Posterior(*model.posterior2(x))
    z2 = q2.sample(eps2)
    q1 = vaelib.Posterior(*model.posterior1(x, z2))
    kl = vaelib.gaussian_kl(*q2) + vaelib.gaussian_kl(*q1, *model.prior1(z2))
    return model.log_likelihood(x, q1.sample(eps1)) - kl


def elbo_one_by_one(model, x, eps2, eps1):
    rows = zip(x.split(1), eps2.split(1), eps1.split(1), strict=True)
    return torch.cat([elbo_by_library(model, *row) for row in rows])


def evidence_by_stacking(x, upper, lower, scale1, scale):
    weight = torch.cat([lower @ upper, scale1 * lower], 1)  # of z2 and of the noise of z1
    return LinearGaussian(weight, torch.zeros(len(lower)), scale).log_evidence(x)


def evidence_by_cholesky(x, upper, lower, scale1, scale):
    covariance = lower @ (upper @ upper.T + scale1**2 * torch.eye(len(upper))) @ lower.T + scale**2 * torch.eye(len(lower))
    factor = torch.linalg.cholesky(covariance)
    y = torch.linalg.solve_triangular(factor, x.T, upper=False)
    return -0.5 * y.square().sum(0) - factor.diag().log().sum() - 0.5 * len(lower) * math.log(2 * math.pi)


def evidence_by_parts(x, upper, lower, scale1, scale):
    a, b = lower @ upper, scale1 * lower
    covariance = a @ a.T + b @ b.T + scale * scale * torch.eye(x.shape[1])
    return MultivariateNormal(torch.zeros(x.shape[1]), covariance).log_prob(x)


def ancestral_by_distributions(model, eps2, eps1):
    mean, log_var = model.prior1(torch.zeros_like(eps2) + eps2)
    return model.decode(torch.distributions.AffineTransform(mean, log_var.exp().sqrt())(eps1))


RIGHT = [
    (check_optimal_scale, lambda x, m: (x - m).square().mean().sqrt()),
    (check_optimal_scale, lambda x, m: torch.nn.functional.mse_loss(m, x) ** 0.5),
    (check_optimal_scale, lambda x, m: torch.linalg.vector_norm(x - m) / math.sqrt(x.numel())),
    (check_optimal_scale, lambda x, m: torch.stack([((a - b) ** 2).mean() for a, b in zip(x, m, strict=True)]).mean().sqrt()),
    (check_bits_per_dim, lambda p, shape: -p / (math.prod(shape) * math.log(2))),
    (check_bits_per_dim, lambda p, shape: vaelib.bits_per_dim(p, math.prod(shape), vaelib.DiscretizedLogistic())),
    (check_bits_per_dim, lambda p, shape: -p * math.log2(math.e) / torch.tensor(shape).prod()),
    (check_bits_per_dim, lambda p, shape: -(p / np.log(2) / shape[0] / shape[1] / shape[2])),
    (check_level_mean, mean_by_masses),
    (check_level_mean, mean_by_edges),
    (check_level_mean, mean_by_loop),
    (check_level_draw, lambda m, s, u: vaelib.likelihoods.nearest_level(m + s.exp() * Laplace(0.0, 1.0).icdf(u))),
    (check_level_draw, lambda m, s, u: ((Laplace(m, s.exp()).icdf(u).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1),
    (check_level_draw, draw_by_loop),
    (check_importance_weights, lambda p, z, m, s: p + vaelib.StandardNormal(1).log_prob(z) - vaelib.Posterior(m, s).log_prob(z)),
    (
        check_importance_weights,
        lambda p, z, m, s: p + (Normal(0.0, 1.0).log_prob(z) - Normal(m, (s / 2).exp()).log_prob(z)).sum(-1),
    ),
    (check_importance_weights, lambda p, z, m, s: p - 0.5 * (z**2 - (z - m) ** 2 / s.exp() - s).sum(2)),
    (check_effective_sample_size, vaelib.effective_sample_size),
    (check_effective_sample_size, ess_by_loop),
    (check_effective_sample_size, lambda w: (2 * w.logsumexp(0) - (2 * w).logsumexp(0)).exp()),
    (check_effective_sample_size, lambda w: 1 / (w - w.logsumexp(0)).exp().pow(2).sum(0)),
    (check_pooled, lambda e, c: torch.logsumexp(e + c.log()[:, None], 0) - c.sum().log()),
    (check_pooled, lambda e, c: (e + (c / c.sum()).log()[:, None]).logsumexp(0)),
    (check_pooled, lambda e, c: vaelib.importance_weighted_bound(e.repeat_interleave(c, 0))),
    (check_pooled, lambda e, c: e.amax(0) + ((c / c.sum())[:, None] * (e - e.amax(0)).exp()).sum(0).log()),
    (check_standard_error, lambda v: v.std() / len(v) ** 0.5),
    (check_standard_error, lambda v: torch.tensor(vaelib.evaluation.standard_error(v))),
    (check_standard_error, lambda v: ((v - v.mean()).square().sum() / (len(v) * (len(v) - 1))).sqrt()),
    (check_standard_error, lambda v: (v.var() / v.numel()).sqrt()),
    (check_log_likelihood, estimate_by_distributions),
    (check_log_likelihood, estimate_one_by_one),
    (check_log_likelihood, antithetic),
    (check_kl_between, vaelib.gaussian_kl),
    (check_kl_between, between_by_distributions),
    (check_kl_between, between_by_matrices),
    (check_layered_elbo, elbo_by_distributions),
    (check_layered_elbo, elbo_by_library),
    (check_layered_elbo, elbo_one_by_one),
    (check_layered_evidence, evidence_by_stacking),
    (check_layered_evidence, evidence_by_cholesky),
    (check_layered_evidence, evidence_by_parts),
    (check_ancestral, lambda model, e2, e1: model.decode(vaelib.reparameterize(*model.prior1(e2), e1))),
    (check_ancestral, lambda model, e2, e1: model.decode(vaelib.Posterior(*model.prior1(e2)).sample(e1))),
    (check_ancestral, ancestral_by_distributions),
]


def rows(cases):
    return [pytest.param(*case, id=f"{case[0].__name__}-{i}") for i, case in enumerate(cases)]


@pytest.mark.parametrize(("check", "fn"), rows(RIGHT))
def test_what_is_right_passes_however_it_is_written(check, fn):
    verdict = check(fn)
    assert verdict, verdict
    assert verdict.mistake is None
    assert [row[0] for row in RIGHT].count(check) >= 3


@pytest.mark.parametrize(
    ("check", "mistake", "sentence", "fn"),
    rows((check, name, text, fn) for check, table in TABLES.items() for name, (text, *fns) in table.items() for fn in fns),
)
def test_every_known_mistake_is_told_by_name_in_its_own_sentence(check, mistake, sentence, fn):
    verdict = check(fn)
    assert not verdict
    assert verdict.mistake == mistake, verdict
    assert sentence in verdict.message


def test_the_sentences_of_a_table_differ_and_the_docstring_names_it():
    for check, table in TABLES.items():
        assert len({sentence for sentence, *_ in table.values()}) == len(table)
        name = next(name for name, value in vars(checks).items() if value is table)
        assert f"`{name}`" in check.__doc__


DOUBLE = [
    (check_optimal_scale, "variance + sum", lambda x, m: ((x - m) ** 2).sum()),
    (check_bits_per_dim, "nats + pixels", lambda p, shape: -p / (shape[1] * shape[2])),
    (check_level_mean, "no-tails + inverse-scale", lambda m, s: checks.levels.mean_recipe(m, -s, lowest=False, highest=False)),
    (check_level_draw, "not-rounded + log-variance", lambda m, s, u: m + (s / 2).exp() * Laplace(0.0, 1.0).icdf(u)),
    (check_importance_weights, "q-added + mean-latents", lambda p, z, m, s: p + (normal(z) + normal(z, m, s)).mean(-1)),
    (check_effective_sample_size, "inverse + wrong-axis", lambda w: w.softmax(1).square().sum(1)),
    (check_pooled, "no-total + no-counts", lambda e, c: e.logsumexp(0)),
    (check_standard_error, "deviation + biased", lambda v: v.std(unbiased=False)),
    (check_kl_between, "reversed + no-half", lambda m, s, a, b: 2 * vaelib.gaussian_kl(a, b, m, s)),
    (check_layered_elbo, "no-upper + variance", lambda *a: checks.layers.layered_recipe(*a, upper=0.0, deviation=torch.exp)),
    (check_layered_evidence, "no-middle + no-log-det", lambda *a: checks.layers.evidence_recipe(*a, middle=0.0, log_det=0.0)),
    (check_ancestral, "top-mean + variance", lambda model, e2, e1: model.decode(drawn_wide(model.prior1(0 * e2), e1))),
]


def normal(z, mean=0.0, log_var=None):
    return Normal(mean, 1.0 if log_var is None else (log_var / 2).exp()).log_prob(z)


def drawn_wide(density, eps):
    return density[0] + density[1].exp() * eps


@pytest.mark.parametrize(("check", "names", "fn"), rows(DOUBLE))
def test_of_two_mistakes_both_are_named(check, names, fn):
    verdict = check(fn)
    assert not verdict
    assert verdict.mistake == names, verdict


def mean_by_branches(location, log_scale):
    """Right, but exp overflows in the branch that is not taken, and the gradient is NaN."""
    t = (levels()[1:] - 1 / 255 - location[..., None]) / log_scale.exp()[..., None]
    return torch.where(t < 0, 1 - 0.5 * t.exp(), 0.5 * (-t).exp()).sum(-1) / 127.5 - 1


def level(location, log_scale, uniform):
    return ((Laplace(location, log_scale.exp()).icdf(uniform) + 1) * 127.5).round()


def ess_of(weights):
    return weights.sum(0) ** 2 / weights.square().sum(0)


def estimate_by_prior(model, x, num_samples):
    z = torch.randn(num_samples, len(x), 3)
    return model.log_likelihood(x, z).logsumexp(0) - math.log(num_samples)


def kl_over_deviation(m, s, prior_m, prior_s):
    squares = (m - prior_m) ** 2 / (prior_s / 2).exp()
    return 0.5 * (squares + (s - prior_s).exp() - 1 - s + prior_s).sum(-1)


def paths(model, x, eps2, eps1):
    q2 = vaelib.Posterior(*model.posterior2(x))
    z2 = q2.sample(eps2)
    q1 = vaelib.Posterior(*model.posterior1(x, z2))
    return q2, z2, q1, q1.sample(eps1)


def elbo_by_draws(model, x, eps2, eps1):
    q2, z2, q1, z1 = paths(model, x, eps2, eps1)
    log_p = normal(z2).sum(-1) + normal(z1, *model.prior1(z2)).sum(-1)
    return model.log_likelihood(x, z1) + log_p - normal(z2, *q2).sum(-1) - normal(z1, *q1).sum(-1)


def kl_over_batch(model, x, eps2, eps1, reduce):
    q2, z2, q1, z1 = paths(model, x, eps2, eps1)
    return model.log_likelihood(x, z1) - reduce(vaelib.gaussian_kl(*q2) + vaelib.gaussian_kl(*q1, *model.prior1(z2)))


def evidence_with_determinant(x, upper, lower, scale1, scale, determinant):
    covariance = lower @ (upper @ upper.T + scale1**2 * torch.eye(len(upper))) @ lower.T + scale**2 * torch.eye(len(lower))
    squares = (torch.linalg.solve(covariance, x.T).T * x).sum(-1)
    return -0.5 * (squares + determinant(covariance) + len(lower) * math.log(2 * math.pi))


WRITTEN = [
    (check_optimal_scale, "detached", lambda x, m: (x - m.detach()).square().mean().sqrt()),
    (check_optimal_scale, "absolute", lambda x, m: torch.nn.functional.l1_loss(m, x)),
    (check_level_draw, "own-noise", lambda m, s, u: vaelib.likelihoods.nearest_level(Laplace(m, s.exp()).sample())),
    (check_level_mean, "detached", lambda m, s: mean_by_edges(m, s.detach())),
    (check_effective_sample_size, "overflow", lambda w: w.exp().sum(0) ** 2 / w.exp().square().sum(0)),
    (check_log_likelihood, "same-noise", lambda *a: (torch.manual_seed(7), estimate_by_distributions(*a))[1]),
    (check_log_likelihood, "elbo", lambda model, x, k: model.elbo(x, k, validate=False).elbo.detach()),
    (check_log_likelihood, "num-samples", lambda model, x, k: estimate_by_distributions(model, x, 4000)),
    (check_log_likelihood, "mean-of-parts", lambda model, x, k: estimate_in_parts(model, x, k, 500)),
    (check_log_likelihood, "mean-of-parts", lambda model, x, k: estimate_in_parts(model, x, k, 100)),
    (check_log_likelihood, "few-draws", lambda model, x, k: estimate_by_distributions(model, x, 1)),
    (check_log_likelihood, "raises", lambda model, x, k: model.nothing),
    (check_layered_elbo, "detached", lambda model, x, e2, e1: elbo_by_library(model, x.detach(), e2, e1)),
    (check_kl_between, "detached", lambda m, s, a, b: vaelib.gaussian_kl(m, s, a, b.detach())),
    (check_optimal_scale, "mean-of-roots", lambda x, m: (x - m).square().mean((0, 2, 3)).sqrt().mean()),
    (check_optimal_scale, "sum-images", lambda x, m: ((x - m).square().sum() / x[0].numel()).sqrt()),
    (check_optimal_scale, "less-one", lambda x, m: torch.linalg.vector_norm(x - m) / math.sqrt(x.numel() - 1)),
    (check_optimal_scale, "over-all", lambda x, m: (x - m).square().sum().sqrt() / x.numel()),
    (check_bits_per_dim, "overflow", lambda p, shape: -torch.log2(torch.exp(p)) / math.prod(shape)),
    (check_bits_per_dim, "batch", lambda p, shape: -p / (len(p) * math.prod(shape) * math.log(2))),
    (check_level_mean, "overflow", mean_by_branches),
    (check_level_mean, "edges", lambda m, s: (1 - density(m, s).cdf(levels()[1:])).sum(-1) / 127.5 - 1),
    (check_level_mean, "flipped", lambda m, s: density(m, s).cdf(levels()[1:] - 1 / 255).sum(-1) / 127.5 - 1),
    (check_level_draw, "wrapped", lambda m, s, u: level(m, s, u).to(torch.int64).remainder(256) / 127.5 - 1),
    (check_level_draw, "not-clamped", lambda m, s, u: level(m, s, u).clamp(min=0) / 127.5 - 1),
    (check_level_draw, "wrong-grid", lambda m, s, u: (Laplace(m, s.exp()).icdf(u).clamp(-1, 1) * 127.5).round() / 127.5),
    (check_importance_weights, "at-mean", lambda p, z, m, s: p + (normal(m) - normal(z, m, s)).sum(-1)),
    (check_importance_weights, "prior-sign", lambda p, z, m, s: p - (normal(z) + normal(z, m, s)).sum(-1)),
    (
        check_importance_weights,
        "two-pi",
        lambda p, z, m, s: p - 0.5 * z.square().sum(-1) - 0.5 * math.log(2 * math.pi) - normal(z, m, s).sum(-1),
    ),
    (check_effective_sample_size, "overflow", lambda w: ess_of((w - w.max()).exp())),
    (check_effective_sample_size, "overflow", lambda w: ess_of((w - w.mean(0)).exp())),
    (check_pooled, "overflow", lambda e, c: e.mean(0) + (c / c.sum() @ (e - e.mean(0)).exp()).log()),
    (check_pooled, "overflow", lambda e, c: e.max() + (c / c.sum() @ (e - e.max()).exp()).log()),
    (check_pooled, "sum-of-logs", lambda e, c: (e + c.log()[:, None]).logsumexp(0) - c.log().sum()),
    (check_log_likelihood, "prior-draws", estimate_by_prior),
    (check_log_likelihood, "overflow", lambda model, x, k: model.log_weights(x, k).detach().exp().mean(0).log()),
    (check_kl_between, "constant-once", lambda m, s, a, b: vaelib.gaussian_kl(m, s, a, b) + 0.5 * (m.shape[1] - 1)),
    (check_kl_between, "half-of-some", lambda m, s, a, b: vaelib.gaussian_kl(m, s, a, b) - 0.5 * (s - b).sum(-1)),
    (check_kl_between, "precision-root", lambda m, s, a, b: kl_over_deviation(m, s, a, b)),
    (check_layered_elbo, "sampled-kl", elbo_by_draws),
    (check_layered_elbo, "batch-kl", lambda *a: kl_over_batch(*a, lambda kl: kl.sum())),
    (check_layered_elbo, "batch-kl", lambda *a: kl_over_batch(*a, lambda kl: kl.mean())),
    (check_layered_evidence, "overflow", lambda *a: evidence_with_determinant(*a, lambda c: torch.det(c).log())),
    (check_layered_evidence, "two-pi", lambda *a: evidence_by_parts(*a) + 0.5 * (len(a[2]) - 1) * math.log(2 * math.pi)),
    (check_layered_evidence, "log-det-sign", lambda *a: evidence_with_determinant(*a, lambda c: -torch.logdet(c))),
    (check_layered_evidence, "not-squared", lambda x, up, low, s1, s: evidence_by_parts(x, up, low, s1**0.5, s)),
    (check_layered_evidence, "scales-swapped", lambda x, up, low, s1, s: evidence_by_parts(x, up, low, s, s1)),
    (check_ancestral, "squashed", lambda *a: ancestral_by_distributions(*a).sigmoid()),
    (check_ancestral, "inverse", lambda model, e2, e1: model.decode((lambda m, s: m + e1 / (s / 2).exp())(*model.prior1(e2)))),
]


@pytest.mark.parametrize(("check", "mistake", "fn"), rows(WRITTEN))
def test_mistakes_in_a_student_s_own_words_are_recognized_too(check, mistake, fn):
    verdict = check(fn)
    assert not verdict
    assert verdict.mistake == mistake, verdict


@pytest.mark.parametrize("check", TABLES, ids=lambda check: check.__name__)
def test_trouble_in_the_student_s_code_is_told_and_a_small_error_never_passes(check):
    right = next(fn for of, fn in RIGHT if of is check)
    trouble = {
        "raised ZeroDivisionError": lambda *a: 1 / 0,
        "'NoneType' object is not callable": None,
        "returns None": lambda *a: None,
        "returns ndarray": lambda *a: right(*a).detach().numpy(),
        "expected a dense torch tensor": lambda *a: 1.0,
        "got a float64 tensor of shape": lambda *a: 3 * right(*a).double(),
    }
    for words, fn in trouble.items():
        verdict = check(fn)
        assert not verdict
        assert words in verdict.message, (words, verdict)
    wrongs = [lambda *a: 1.05 * right(*a), lambda *a: right(*a) + 0.3]
    if check is not check_log_likelihood:
        wrongs += [lambda *a: 1.01 * right(*a), lambda *a: right(*a) + 0.01]
    assert not any(check(fn) for fn in wrongs)


def test_what_a_function_does_to_its_images_spoils_no_later_check():
    def shifted(model, x, num_samples):
        x += 1.0
        return estimate_by_distributions(model, x, num_samples)

    assert check_log_likelihood(shifted).mistake == "in-place"
    assert check_log_likelihood(estimate_by_distributions)


def test_an_estimate_with_a_number_of_the_example_written_into_it_does_not_pass():
    def hard_coded(model, x, num_samples):
        estimate = estimate_by_distributions(model, x, num_samples)
        return estimate - 3 * math.log(2 * math.pi) + x[0].numel() / 2 * math.log(2 * math.pi)

    verdict = check_log_likelihood(hard_coded)
    assert not verdict
    assert "those of 400" in verdict.message


def test_a_mean_on_another_grid_is_told_by_its_value_and_not_by_its_gradient():
    edges = (2 * torch.arange(1, 128) - 128) / 127
    verdict = check_level_mean(lambda m, s: (1 - density(m, s).cdf(edges)).sum(-1) * 2 / 127 - 1)
    assert not verdict
    assert "expected" in verdict.message, verdict


def test_the_elbo_of_the_model_that_is_handed_out_lies_below_its_evidence_whatever_q_is():
    """The importance-weighted bound of many draws stands for the evidence."""
    model = TwoLayers(0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, generator=g).expand(20000, -1)
    eps2, eps1 = (torch.randn(len(x), dim, generator=g) for dim in (2, 3))
    q2 = vaelib.Posterior(*model.posterior2(x))
    z2 = q2.sample(eps2)
    q1, p1 = (vaelib.Posterior(*d) for d in (model.posterior1(x, z2), model.prior1(z2)))
    z1 = q1.sample(eps1)
    log_joint = model.log_likelihood(x, z1) + p1.log_prob(z1) + vaelib.StandardNormal(2).log_prob(z2)
    log_w = log_joint - q2.log_prob(z2) - q1.log_prob(z1)
    elbo = elbo_by_library(model, x, eps2, eps1)
    assert abs(elbo.mean() - log_w.mean()) < 6 * (elbo - log_w).std() / math.sqrt(len(x))
    assert elbo.mean() < log_w.logsumexp(0) - math.log(len(x))
