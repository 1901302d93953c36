"""The judges of a student's code pass what is right however it is written, name every known mistake, and never raise."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, MultivariateNormal, Normal, kl_divergence

import vaelib
from vaelib import checks
from vaelib.checks import (
    check_elbo,
    check_encoder_decoder,
    check_iwae,
    check_kl,
    check_likelihood,
    check_reparameterize,
    check_retrieval,
    check_training_step,
    verdicts,
)
from vaelib.likelihoods import level_bins, logistic_log_mass
from vaelib.networks import MLPDecoder, MLPEncoder


def kl_by_loop(mean, log_var):
    rows = [sum(0.5 * (m * m + s.exp() - 1 - s) for m, s in zip(*row, strict=True)) for row in zip(mean, log_var, strict=True)]
    return torch.stack(rows)


def kl_into_zeros(mean, log_var):
    total = torch.zeros(len(mean))
    for unit in range(mean.shape[1]):
        total = total + (mean[:, unit] ** 2 + log_var[:, unit].exp() - log_var[:, unit] - 1) / 2
    return total


def standard(mean):
    return Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)


KL = [
    vaelib.gaussian_kl,
    lambda m, s: -0.5 * torch.sum(1 + s - m.pow(2) - s.exp(), dim=1),
    lambda m, s: 0.5 * (m.square() + s.exp() - 1 - s).sum(-1),
    lambda m, s: kl_divergence(Independent(Normal(m, (s / 2).exp()), 1), standard(m)),
    lambda m, s: kl_divergence(Normal(m, (0.5 * s).exp()), Normal(0.0, 1.0)).sum(1),
    lambda m, s: torch.einsum("nl->n", m**2 + torch.exp(s) - 1 - s) / 2,
    lambda m, s: 0.5 * (m * m).sum(1) + 0.5 * (torch.expm1(s) - s).sum(1),
    lambda m, s: (0.5 * (m.double() ** 2 + s.double().exp() - 1 - s.double()).sum(1)).float(),
    lambda m, s: m.shape[1] * (0.5 * (m**2 + s.exp() - 1 - s)).mean(1),
    lambda m, s: torch.baddbmm((s.exp() - s - 1).sum(1)[:, None, None], m[:, None], m[:, :, None]).flatten() / 2,
    lambda m, s: (torch.linalg.vector_norm(m, dim=1) ** 2 + s.exp().sum(1) - s.sum(1) - m.size(1)) * 0.5,
    kl_by_loop,
    kl_into_zeros,
]


def reparameterize_in_place_of_its_own(mean, log_var, eps):
    z = eps.clone()
    z *= log_var.mul(0.5).exp()
    z += mean
    return z


REPARAMETERIZE = [
    vaelib.reparameterize,
    lambda m, s, e: m + torch.exp(0.5 * s) * e,
    lambda m, s, e: m + s.exp().sqrt() * e,
    lambda m, s, e: torch.addcmul(m, (s / 2).exp(), e),
    lambda m, s, e: e * torch.exp(s) ** 0.5 + m,
    lambda m, s, e: m + e / torch.exp(-s / 2),
    lambda m, s, e: m - (0.5 * s).exp() * -e,
    lambda m, s, e: torch.stack([m, (s / 2).exp() * e]).sum(0),
    lambda m, s, e: m.add(s.div(2).exp().mul(e)),
    lambda m, s, e: m + torch.pow(math.e, s / 2) * e,
    lambda m, s, e: torch.stack([a + torch.diag((b / 2).exp()) @ c for a, b, c in zip(m, s, e, strict=True)]),
    lambda m, s, e: torch.distributions.AffineTransform(m, (s / 2).exp())(e),
    reparameterize_in_place_of_its_own,
]


def elbo_by_loop(x, mean, log_var, logits):
    rows = []
    for i in range(len(x)):
        cross_entropy = F.binary_cross_entropy_with_logits(logits[i], x[i], reduction="sum")
        rows.append(-cross_entropy - vaelib.gaussian_kl(mean[i : i + 1], log_var[i : i + 1])[0])
    return torch.stack(rows)


ELBO = [
    lambda x, m, s, o: vaelib.Bernoulli().log_prob(x, o) - vaelib.gaussian_kl(m, s),
    lambda x, m, s, o: vaelib.ElboTerms(vaelib.Bernoulli().log_prob(x, o), vaelib.gaussian_kl(m, s)).elbo,
    lambda x, m, s, o: -F.binary_cross_entropy_with_logits(o, x, reduction="none").sum((1, 2, 3)) - KL[1](m, s),
    lambda x, m, s, o: -F.binary_cross_entropy(o.sigmoid(), x, reduction="none").flatten(1).sum(1) - KL[2](m, s),
    lambda x, m, s, o: Independent(Bernoulli(logits=o), 3).log_prob(x) - KL[3](m, s),
    lambda x, m, s, o: Bernoulli(probs=o.sigmoid()).log_prob(x).flatten(1).sum(1) - KL[4](m, s),
    lambda x, m, s, o: (x * o - F.softplus(o)).flatten(1).sum(1) - KL[5](m, s),
    lambda x, m, s, o: (x * F.logsigmoid(o) + (1 - x) * F.logsigmoid(-o)).view(len(x), -1).sum(-1) - KL[6](m, s),
    lambda x, m, s, o: F.logsigmoid((2 * x - 1) * o).flatten(1).sum(1) - KL[7](m, s),
    lambda x, m, s, o: -torch.logaddexp(torch.zeros_like(o), (1 - 2 * x) * o).sum(dim=(-1, -2, -3)) + KL[1](m, s).neg(),
    lambda x, m, s, o: x[0].numel() * F.logsigmoid((2 * x - 1) * o).mean((1, 2, 3)) - KL[8](m, s),
    elbo_by_loop,
]


def iwae_by_hand(log_weights):
    top = log_weights.max(0).values
    return top + torch.log(torch.mean(torch.exp(log_weights - top), 0))


def iwae_by_loop(log_weights):
    return torch.stack([torch.logsumexp(column, 0) - math.log(len(column)) for column in log_weights.T])


IWAE = [
    vaelib.importance_weighted_bound,
    lambda w: torch.logsumexp(w, 0) - math.log(w.shape[0]),
    lambda w: torch.logsumexp(w - math.log(len(w)), dim=0),
    lambda w: w.logsumexp(0) - torch.log(torch.tensor(float(len(w)))),
    lambda w: functools.reduce(torch.logaddexp, w) - np.log(len(w)),
    lambda w: w.T.logsumexp(1) - math.log(w.size(0)),
    lambda w: w.max(0).values.detach() + (w - w.max(0).values.detach()).exp().mean(0).log(),
    lambda w: w.double().logsumexp(0).sub(math.log(len(w))).float(),
    lambda w: -(F.log_softmax(w, 0)[0] - w[0]) - math.log(len(w)),
    lambda w: torch.logcumsumexp(w, 0)[-1] - math.log(len(w)),
    iwae_by_hand,
    iwae_by_loop,
]


def search_by_loop(queries, database, k):
    rows = []
    for query in queries:
        distance = [float(((query - code) ** 2).sum()) for code in database]
        rows.append(sorted(range(len(database)), key=distance.__getitem__)[:k])
    return torch.tensor(rows)


def faiss_search(queries, database, k):
    index = pytest.importorskip("faiss").IndexFlatL2(database.shape[1])
    index.add(database.numpy())
    return torch.from_numpy(index.search(queries.numpy(), k)[1])


def numpy_search(queries, database, k):
    distance = np.linalg.norm(queries.numpy()[:, None] - database.numpy()[None], axis=2)
    return torch.from_numpy(distance.argsort(1)[:, :k])


RETRIEVAL = [
    lambda q, x, k: vaelib.nearest_neighbours(q, x, k).indices,
    lambda q, x, k: torch.cdist(q, x).topk(k, largest=False).indices,
    lambda q, x, k: torch.cdist(q, x).argsort(1)[:, :k],
    lambda q, x, k: (q[:, None] - x[None]).norm(dim=2).sort(1).indices[:, :k],
    lambda q, x, k: (q[:, None] - x).square().sum(-1).argsort(dim=-1, stable=True)[:, :k],
    lambda q, x, k: (-torch.cdist(q, x)).topk(k).indices,
    lambda q, x, k: ((x**2).sum(1) - 2 * q @ x.T).argsort(1)[:, :k],
    lambda q, x, k: ((q**2).sum(1, keepdim=True) + (x**2).sum(1) - 2 * q @ x.T).clamp(min=0).sqrt().topk(k, largest=False)[1],
    lambda q, x, k: torch.stack([(x - one).pow(2).sum(1).topk(k, largest=False).indices for one in q]),
    lambda q, x, k: len(x) - 1 - torch.cdist(q, x.flip(0)).argsort(dim=1, stable=True)[:, :k],
    search_by_loop,
    faiss_search,
    numpy_search,
]

CORRECT = {check_kl: KL, check_reparameterize: REPARAMETERIZE, check_elbo: ELBO, check_iwae: IWAE, check_retrieval: RETRIEVAL}
TABLES = {
    check_kl: checks.KL_MISTAKES,
    check_reparameterize: checks.REPARAMETERIZE_MISTAKES,
    check_elbo: checks.ELBO_MISTAKES,
    check_iwae: checks.IWAE_MISTAKES,
    check_retrieval: checks.RETRIEVAL_MISTAKES,
    check_training_step: checks.TRAINING_MISTAKES,
}


def named(cases):
    return [pytest.param(*case, id=f"{case[0].__name__}-{i}") for i, case in enumerate(cases)]


@pytest.mark.parametrize(("check", "fn"), named((check, fn) for check, fns in CORRECT.items() for fn in fns))
def test_what_is_right_passes_however_it_is_written(check, fn):
    verdict = check(fn)
    assert verdict.passed
    assert verdict.mistake is None
    assert bool(verdict)
    assert "is right in" in verdict.message


@pytest.mark.parametrize(
    ("check", "mistake", "sentence", "fn"),
    named((check, name, text, fn) for check, table in TABLES.items() for name, (text, *fns) in table.items() for fn in fns),
)
def test_every_known_mistake_is_told_by_name_in_its_own_sentence(check, mistake, sentence, fn):
    verdict = check(fn)
    assert not verdict
    assert verdict.mistake == mistake
    assert sentence in verdict.message
    assert f"not yet [{mistake}]" in repr(verdict)


def test_the_sentences_of_a_table_differ():
    for table in TABLES.values():
        assert len({sentence for sentence, *_ in table.values()}) == len(table)


# the mistakes as students write them, apart from the lambdas of the tables


def detached_scale(mean, log_var, eps):
    return mean + (log_var / 2).exp().detach() * eps


WRITTEN = [
    (check_kl, "mean-all", lambda m, s: -0.5 * torch.mean(1 + s - m.pow(2) - s.exp())),
    (check_kl, "sum-batch", lambda m, s: -0.5 * torch.sum(1 + s - m.pow(2) - s.exp())),
    (check_kl, "std", lambda m, s: kl_divergence(Normal(m, s, validate_args=False), Normal(0.0, 1.0)).sum(1)),
    (check_kl, "reversed", lambda m, s: kl_divergence(standard(m), Independent(Normal(m, (s / 2).exp()), 1))),
    (check_kl, "detached", lambda m, s: torch.tensor(kl_by_loop(m, s).tolist())),
    (check_kl, "detached", lambda m, s: KL[1](m, s.detach())),
    (check_kl, "own-noise", lambda m, s: KL[1](m + torch.randn_like(m), s)),
    (check_reparameterize, "own-noise", lambda m, s, e: m + (s / 2).exp() * torch.randn_like(m)),
    (check_reparameterize, "own-noise", lambda m, s, e: Normal(m, (s / 2).exp()).rsample()),
    (check_reparameterize, "detached", detached_scale),
    (check_reparameterize, "detached", lambda m, s, e: m.detach() + (s / 2).exp() * e),
    (check_reparameterize, "detached", lambda m, s, e: (m + (s / 2).exp() * e).detach()),
    (check_elbo, "loss", lambda x, m, s, o: F.binary_cross_entropy_with_logits(o, x, reduction="sum") + KL[1](m, s).sum()),
    (check_elbo, "detached", lambda x, m, s, o: ELBO[0](x, m, s, o.detach())),
    (check_iwae, "detached", lambda w: IWAE[0](w.detach())),
    (check_iwae, "overflow", lambda w: torch.log(torch.exp(w).sum(0) / w.shape[0])),
    (check_retrieval, "cosine", lambda q, x, k: F.cosine_similarity(q[:, None], x[None], dim=2).topk(k).indices),
    (check_retrieval, "farthest", lambda q, x, k: torch.cdist(q, x).topk(k).indices),
    (check_retrieval, "distances", lambda q, x, k: torch.cdist(q, x).topk(k, largest=False).values),
]


@pytest.mark.parametrize(("check", "mistake", "fn"), named(WRITTEN))
def test_mistakes_in_a_student_s_own_words_are_recognized_too(check, mistake, fn):
    assert check(fn).mistake == mistake


def test_a_wrong_gradient_behind_right_values_does_not_pass():
    verdict = check_iwae(lambda w: w.mean(0) + (IWAE[0](w) - w.mean(0)).detach())
    assert not verdict
    assert "gradient for log_weights is not" in verdict.message


def changes_in_place(fn):
    def changed(first, *rest):
        result = fn(first, *rest)
        first.mul_(2)
        return result

    return changed


def crash(*arguments):
    raise RuntimeError("the student's own words")


@pytest.mark.parametrize("check", CORRECT, ids=lambda check: check.__name__)
def test_trouble_in_the_student_s_code_is_told_and_never_raised(check):
    right = CORRECT[check][0]
    trouble = {
        "raised RuntimeError: the student's own words": crash,
        "raised SystemExit: 3": lambda *a: exit(3),
        "TypeError": lambda: None,
        "'NoneType' object is not callable": None,
        "returns None": lambda *a: None,
        "returns ndarray": lambda *a: right(*a).detach().numpy(),
        "returns tuple": lambda *a: (right(*a), 0),
        "returns float 1.0, expected a dense torch tensor": lambda *a: 1.0,
        "expected a dense torch tensor": lambda *a: right(*a).to_sparse(),
        "in place": changes_in_place(right),
        "got a float64 tensor of shape": lambda *a: right(*a).double(),
        "got a bool tensor of shape": lambda *a: right(*a) > 0,
        "got a complex64 tensor of shape": lambda *a: right(*a).to(torch.complex64),
        "got nan at index (0": lambda *a: (
            torch.where(torch.arange(right(*a).numel()).view_as(right(*a)) == 0, math.nan, 1.0)
            if check is not check_retrieval
            else torch.tensor([math.nan]).expand(right(*a).shape).log().nan_to_num(math.nan)
        ),
        "of shape (1, ": lambda *a: right(*a)[None],
    }
    if check is check_retrieval:
        del trouble["got nan at index (0"]  # no integer is NaN
    for words, fn in trouble.items():
        verdict = check(fn)
        assert not verdict
        assert words in verdict.message, (words, verdict)


def test_the_verdict_names_the_call_and_the_first_difference():
    verdict = check_kl(lambda m, s: KL[0](m, s) + torch.arange(len(m)))
    assert verdict.mistake is None
    assert "kl(mean (5, 20), log_var (5, 20)): got" in verdict.message
    assert "at index (1,), expected" in verdict.message
    verdict = check_kl(lambda m, s: crash() if m.shape[1] == 3 else KL[0](m, s))
    assert verdict.message == "kl(mean (1, 3), log_var (1, 3)) raised RuntimeError: the student's own words"


@pytest.mark.parametrize("check", [c for c in CORRECT if c is not check_retrieval], ids=lambda check: check.__name__)
def test_a_small_perturbation_never_passes(check, generator, monkeypatch):
    monkeypatch.setattr(verdicts, "pairs", lambda mistakes: iter(()))  # its name is not asked for, and thousands of pairs take long
    right = CORRECT[check][0]

    def one_off(place, *arguments):
        result = right(*arguments)
        hit = torch.arange(result.numel()).view_as(result) == place % result.numel()
        return torch.where(hit, 1.01 * result, result)

    perturbed = [lambda *a: 1.01 * right(*a), lambda *a: right(*a) + 0.01, lambda *a: right(*a) * (1 + 0.01 * torch.rand(()))]
    perturbed += [functools.partial(one_off, int(place)) for place in torch.randint(1000, (10,), generator=generator)]
    assert not any(check(fn) for fn in perturbed)


def test_a_retrieval_with_one_neighbour_off_never_passes(generator):
    for place in torch.randint(8, (10,), generator=generator):

        def one_off(queries, database, k, place=int(place)):
            order = torch.cdist(queries, database).argsort(1)
            order[place % len(order), place % k], order[place % len(order), -1] = order[place % len(order), -1].item(), 0
            return order[:, :k]

        assert not check_retrieval(one_off)


def test_the_judge_leaves_the_global_generator_and_a_no_grad_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():
        assert check_kl(fn=KL[0])
        assert check_reparameterize(REPARAMETERIZE[0])
        assert not check_reparameterize(WRITTEN[7][2])
    with torch.inference_mode():
        assert check_elbo(ELBO[0])
    assert torch.equal(torch.rand(1), expected)


# likelihoods


class Student:
    """An object with no more than a student would write."""

    values, lowest, highest, params_per_value = 256, -1, 1, 2

    def __init__(self, log_prob, **attributes):
        self.log_prob = log_prob
        vars(self).update(attributes)


def binary(log_prob):
    return Student(log_prob, values=2, lowest=0, params_per_value=1)


def grey(log_prob, **attributes):
    return Student(log_prob, **{"params_per_value": 1, **attributes})


def total(values):
    return values.flatten(1).sum(1)


def categorical(x, params):
    return total(Categorical(logits=params.movedim(1, -1)).log_prob(((x[:, 0] + 1) * 127.5).round()))


def naive_logistic(x, params, tails=True, floor=1e-9):
    mean, log_scale = params.chunk(2, 1)
    inverse = (-log_scale.clamp(-7, 7)).exp()
    lower, upper, inner, below = level_bins(x)
    above = torch.sigmoid((upper - mean) * inverse)
    under = torch.sigmoid((lower - mean) * inverse)
    if tails:
        above, under = torch.where(below, above, 1.0), torch.where(inner, under, 0.0)
    return total((above - under).clamp(min=floor).log())


def logistic_density(x, params):
    mean, log_scale = params.chunk(2, 1)
    a = (x - mean) * (-log_scale).exp()
    return total(-a - log_scale - 2 * F.softplus(-a))


def logistic(x, params):
    return total(logistic_log_mass(x, *params.chunk(2, 1)))


def bce(x, params):
    return -total(F.binary_cross_entropy_with_logits(params, x, reduction="none"))


LIKELIHOODS = [
    vaelib.Bernoulli(),
    vaelib.DiscretizedLogistic(),
    vaelib.DiscretizedLogisticMixture(3),
    vaelib.DiscretizedLogisticMixture(1),
    vaelib.Bernoulli("threshold"),
    vaelib.DiscretizedLogisticMixture(10),
    *(
        vaelib.Gaussian(scale, learned, discretized)
        for scale in (0.01, 0.1, 1.0, 30.0)
        for learned in (False, True)
        for discretized in (False, True)
    ),
    binary(bce),
    binary(lambda x, p: total(x * F.logsigmoid(p) + (1 - x) * F.logsigmoid(-p))),
    binary(lambda x, p: Independent(Bernoulli(logits=p), 3).log_prob(x)),
    binary(lambda x, p: -total(F.softplus((1 - 2 * x) * p))),
    binary(lambda x, p: torch.stack([-F.softplus((1 - 2 * a) * b).sum() for a, b in zip(x, p, strict=True)])),
    Student(logistic),
    grey(categorical, params_per_value=256),
    grey(lambda x, p: vaelib.Gaussian(0.2, discretized=True).log_prob(x, p.tanh())),
]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_likelihood_that_is_one_passes(likelihood):
    verdict = check_likelihood(likelihood)
    assert verdict, verdict


WRONG_LIKELIHOODS = [
    ("not-summed", binary(lambda x, p: -F.binary_cross_entropy_with_logits(p, x, reduction="none"))),
    ("scalar", binary(lambda x, p: bce(x, p).sum())),
    ("scalar", binary(lambda x, p: -F.binary_cross_entropy_with_logits(p, x))),
    ("mean-pixels", binary(lambda x, p: bce(x, p) / x[0].numel())),
    ("mean-pixels", Student(lambda x, p: logistic(x, p) / x[0].numel())),
    ("sign", binary(lambda x, p: -bce(x, p))),
    ("sign", Student(lambda x, p: -logistic(x, p))),
    ("grey-bce", vaelib.GreyBCENotALikelihood()),
    ("grey-bce", grey(bce, lowest=0)),
    ("sigmoid-range", grey(bce)),
    ("sigmoid-range", grey(lambda x, p: vaelib.Gaussian(0.1, discretized=True).log_prob(x, p.sigmoid()))),
    ("sigmoid-twice", binary(lambda x, p: bce(x, p.sigmoid()))),
    ("constant", Student(lambda x, p: logistic(x, p) + 0.5 * math.log(2 * math.pi) * x[0].numel())),
    ("density", Student(logistic_density)),
    ("density", Student(logistic_density, lowest=-1.0)),
    ("raises", vaelib.GreyBCENotALikelihood),
    ("no-tails", Student(functools.partial(naive_logistic, tails=False, floor=1e-30))),
    ("overflow", Student(functools.partial(naive_logistic, floor=0.0))),
    ("overflow", binary(lambda x, p: total(x * p.sigmoid().log() + (1 - x) * (1 - p.sigmoid()).log()))),
    ("detached", binary(lambda x, p: bce(x, p.detach()))),
    ("detached", binary(lambda x, p: bce(x, p.detach()) + 0 * total(p))),
    ("detached", Student(lambda x, p: logistic(x, torch.cat([p[:, :1], p[:, 1:].detach()], 1)))),
    ("detached", Student(lambda x, p: logistic(x, torch.cat([p[:, :1].detach(), p[:, 1:]], 1)))),
    ("raises", binary(crash)),
    ("raises", object()),
    ("raises", binary(lambda x, p: total(F.binary_cross_entropy(p, x)))),
    ("in-place", binary(lambda x, p: bce(x, p.detach().mul_(2)))),
    ("no-return", binary(lambda x, p: None)),
    (None, binary(lambda x, p: bce(x, p).detach().numpy())),
    (None, binary(lambda x, p: bce(x, p).double())),
    (None, binary(lambda x, p: math.nan * bce(x, p))),
    (None, binary(lambda x, p: 1.01 * bce(x, p))),
    (None, Student(lambda x, p: 1.01 * logistic(x, p))),
    (None, Student(lambda x, p: logistic(x, p) * torch.where(total(x).abs() < 0.005, 1.5, 1.0))),
    (None, Student(logistic, values=17)),
    ("raises", Student(logistic, params_per_value="two")),
]


@pytest.mark.parametrize(("mistake", "likelihood"), WRONG_LIKELIHOODS)
def test_a_score_that_is_no_likelihood_is_told_by_name(mistake, likelihood):
    verdict = check_likelihood(likelihood)
    assert not verdict
    assert verdict.mistake == mistake, verdict


# encoders and decoders


class Encoder(nn.Module):
    """Two heads over one hidden layer; the arguments put mistakes in."""

    def __init__(self, mean_end=None, log_var_end=None, norm=None, result=None, hidden=None):
        super().__init__()
        self.hidden = hidden or nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.norm = norm or nn.Identity()
        self.mean, self.log_var = nn.Linear(16, 4), nn.Linear(16, 4)
        self.mean_end, self.log_var_end = mean_end or nn.Identity(), log_var_end or nn.Identity()
        self.result = result or (lambda mean, log_var: (mean, log_var))

    def forward(self, x):
        h = self.norm(self.hidden(x))
        return self.result(self.mean_end(self.mean(h)), self.log_var_end(self.log_var(h)))


class LayersInForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 16)

    def forward(self, x):
        return nn.Linear(16, 8)(self.first(x.flatten(1))).chunk(2, 1)


class LayersInList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(64, 16), nn.ReLU()]
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.layers[1](self.layers[0](x.flatten(1)))).chunk(2, 1)


class Function(nn.Module):
    """A network of one function over one layer."""

    def __init__(self, fn, *sizes):
        super().__init__()
        self.layer, self.fn = nn.Linear(*sizes), fn

    def forward(self, value):
        return self.fn(self.layer, value)


def decoder(*end):
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 64), *(end or (nn.Unflatten(1, (1, 8, 8)),)))


ZERO_HEAD = Encoder()
nn.init.zeros_(ZERO_HEAD.log_var.weight)
nn.init.zeros_(ZERO_HEAD.log_var.bias)
CONV = vaelib.conv_vae((1, 8, 8), 4, channels=(4, 8))
PAIRS = [
    (MLPEncoder((1, 8, 8), (16,), 4), MLPDecoder(4, (16,), (1, 8, 8))),
    (CONV.encoder, CONV.decoder),
    (Encoder(), decoder()),
    (ZERO_HEAD, decoder(nn.Unflatten(1, (1, 8, 8)), nn.Hardtanh(-15, 15))),
    (Encoder(norm=nn.Dropout(0.5)), decoder(nn.Dropout(0.2), nn.Unflatten(1, (1, 8, 8)))),
    (Encoder(norm=nn.LayerNorm(16), mean_end=nn.Tanh()), decoder()),
    (Encoder(result=lambda mean, log_var: [mean, log_var.clamp(-10, 10)]), decoder(nn.LayerNorm(64), nn.Unflatten(1, (1, 8, 8)))),
]


@pytest.mark.parametrize("pair", PAIRS)
def test_networks_that_fit_pass_and_stay_as_they_were(pair):
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in pair]
    verdict = check_encoder_decoder(*pair, (1, 8, 8), 4)
    assert verdict, verdict
    for network, state in zip(pair, before, strict=True):
        assert network.training
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


BATCH_NORM = decoder()
BATCH_NORM.insert(1, nn.BatchNorm1d(16))
WRONG_NETWORKS = [
    ("no-log-var", Encoder(result=lambda mean, log_var: mean), decoder()),
    ("new-layers", LayersInForward(), decoder()),
    ("new-layers", Encoder(result=lambda mean, log_var: (mean + torch.randn_like(mean), log_var)), decoder()),
    ("new-layers", Encoder(), lambda z: nn.Linear(4, 64)(z).view(-1, 1, 8, 8)),
    ("unregistered", LayersInList(), decoder()),
    ("unregistered", lambda x: (x.flatten(1)[:, :4], -x.flatten(1)[:, :4]), decoder()),
    ("same-head", Encoder(result=lambda mean, log_var: (mean, mean)), decoder()),
    ("ignores-input", Encoder(result=lambda mean, log_var: (mean, 0 * log_var)), decoder()),
    ("ignores-input", Encoder(result=lambda mean, log_var: (0 * mean, log_var)), decoder()),
    ("ignores-input", Encoder(), Function(lambda layer, z: layer(0 * z).view(-1, 1, 8, 8), 4, 64)),
    ("positive-log-var", Encoder(log_var_end=nn.Softplus()), decoder()),
    ("positive-log-var", Encoder(log_var_end=nn.Sigmoid()), decoder()),
    ("positive-log-var", Encoder(log_var_end=nn.ReLU()), decoder()),
    ("positive-mean", Encoder(mean_end=nn.ReLU()), decoder()),
    ("batch-dependence", Encoder(norm=nn.BatchNorm1d(16)), decoder()),
    ("batch-dependence", Encoder(result=lambda mean, log_var: (mean - mean.mean(0), log_var)), decoder()),
    ("batch-dependence", Encoder(), BATCH_NORM),
    ("raises", Encoder(hidden=nn.Linear(64, 16)), decoder()),
    ("raises", None, decoder()),
    ("in-place", Encoder(hidden=nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 16))), Function(lambda _, z: z.mul_(2), 1, 1)),
    (None, Encoder(result=lambda mean, log_var: (mean[0], log_var[0])), decoder()),
    (None, Encoder(result=lambda mean, log_var: (mean.squeeze(), log_var.squeeze())), decoder()),
    (None, Encoder(result=lambda mean, log_var: None), decoder()),
    (None, Encoder(result=lambda mean, log_var: (mean, log_var, mean)), decoder()),
    (None, Encoder(result=lambda mean, log_var: (mean, log_var * math.nan)), decoder()),
    (None, Encoder(result=lambda mean, log_var: (mean.detach().numpy(), log_var)), decoder()),
    (None, Encoder(), decoder(nn.Identity())),
    (None, Encoder(), decoder(nn.Unflatten(1, (1, 4, 16)))),
]


@pytest.mark.parametrize(("mistake", "encoder", "decode"), WRONG_NETWORKS)
def test_networks_that_do_not_fit_are_told_by_name(mistake, encoder, decode):
    verdict = check_encoder_decoder(encoder, decode, (1, 8, 8), 4)
    assert not verdict
    assert verdict.mistake == mistake, verdict


def test_a_code_as_large_as_the_image_is_no_bottleneck_and_bad_sizes_are_the_caller_s():
    assert check_encoder_decoder(Encoder(), decoder(), (1, 2, 2), 4).mistake == "bottleneck"
    assert not check_encoder_decoder(Encoder(), decoder(), (3, 8, 8), 4)
    with pytest.raises(ValueError, match="image_shape: got"):
        check_encoder_decoder(Encoder(), decoder(), (8, 8), 4)
    with pytest.raises(ValueError, match="latent_dim: got"):
        check_encoder_decoder(Encoder(), decoder(), (1, 8, 8), 0)


# training steps


def stepping(loss_of, scale=1.0):
    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        return scale * loss.item()

    return step


def sampled_kl(model, x):
    mean, log_var = model.encode(x)
    z = vaelib.reparameterize(mean, log_var)
    zeros = torch.zeros_like(z)
    kl = vaelib.gaussian_log_density(z, mean, log_var) - vaelib.gaussian_log_density(z, zeros, zeros)
    return (kl - model.likelihood.log_prob(x, model.decode(z))).mean()


def by_hand(model, x):
    mean, log_var = model.encoder(x)
    logits = model.decoder(mean + torch.randn_like(mean) * torch.exp(log_var / 2))
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    return (reconstruction - 0.5 * torch.sum(1 + log_var - mean**2 - log_var.exp())) / len(x)


def zero_at_the_end(model, optimizer, x):
    loss = vaelib.loss(model.elbo(x))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


STEPS = [
    stepping(lambda model, x: vaelib.loss(model.elbo(x))),
    stepping(lambda model, x: -model.elbo(x).elbo.mean()),
    stepping(lambda model, x: -model.elbo(x, num_samples=3).elbo.mean()),
    stepping(lambda model, x: -model.log_weights(x).mean()),
    stepping(sampled_kl),
    stepping(by_hand),
    zero_at_the_end,
]


@pytest.mark.parametrize("step", STEPS)
def test_a_training_step_that_raises_the_elbo_passes(step):
    verdict = check_training_step(step)
    assert verdict, verdict


def fixed_noise(model, optimizer, x):
    torch.manual_seed(0)
    return STEPS[0](model, optimizer, x)


WRONG_STEPS = [
    ("same-noise", fixed_noise),
    ("no-step", lambda model, optimizer, x: vaelib.loss(model.elbo(x)).item()),
    ("elbo-minimized", stepping(lambda model, x: model.elbo(x).elbo.mean())),
    ("no-kl", stepping(lambda model, x: -model.elbo(x).log_likelihood.mean())),
    ("raises", crash),
    ("raises", stepping(lambda model, x: model.elbo(x).elbo)),
    ("in-place", stepping(lambda model, x: vaelib.loss(model.elbo(x.mul_(0))))),
    (None, stepping(lambda model, x: vaelib.loss(model.elbo(x)), scale=1.01)),
    (None, stepping(lambda model, x: -vaelib.beta_elbo(model.elbo(x), 1.1).mean())),
    ("no-return", lambda model, optimizer, x: STEPS[0](model, optimizer, x) and None),
    ("not-a-float", lambda model, optimizer, x: torch.tensor(STEPS[0](model, optimizer, x))),
    ("eval-mode", lambda model, optimizer, x: STEPS[0](model.eval(), optimizer, x)),
    (None, lambda model, optimizer, x: STEPS[0](model, optimizer, x) * math.nan),
    (None, lambda model, optimizer, x: STEPS[0](model, optimizer, x[:1].expand_as(x))),
]


@pytest.mark.parametrize(("mistake", "step"), WRONG_STEPS)
def test_a_training_step_that_does_not_is_told_by_name(mistake, step):
    verdict = check_training_step(step)
    assert not verdict
    assert verdict.mistake == mistake, verdict


# a wrong solution gets the name of its mistake, or of both, and a right one in another style passes


def kl_terms(m, s):
    return 0.5 * (m**2 + s.exp() - 1 - s)


def cross_entropy(x, o):
    return F.binary_cross_entropy_with_logits(o, x, reduction="none").flatten(1).sum(1)


def two_terms(x, m, s, o):
    return (cross_entropy(x, o) + kl_terms(m, s).sum(1)).mean()


def step_of(loss_of=two_terms, z_of=REPARAMETERIZE[0], zero=True, between=lambda model: None, told=lambda loss: loss.item()):
    """A training step in a student's words; `between`: what happens between backward and step."""

    def step(model, optimizer, x):
        mean, log_var = model.encode(x)
        loss = loss_of(x, mean, log_var, model.decode(z_of(mean, log_var, torch.randn_like(mean))))
        if zero:
            optimizer.zero_grad()
        loss.backward()
        between(model)
        optimizer.step()
        return told(loss)

    return step


def encoder_without_graph(model, optimizer, x):
    with torch.no_grad():
        mean, log_var = model.encode(x)
    loss = two_terms(x, mean, log_var, model.decode(vaelib.reparameterize(mean, log_var)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def backward_twice(model, optimizer, x):
    loss = vaelib.loss(model.elbo(x))
    optimizer.zero_grad()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    return loss.item()


class SharedMean(Encoder):
    def forward(self, x):
        return super().forward(x.mean(0, keepdim=True).expand_as(x))


def gaussian(density):
    """Of real x, by location and log-scale; `density` is that of one pixel."""
    return Student(lambda x, p: total(density(x, m_of(p), s_of(p))), values=None)


def one_log_scale(x, p):
    channels = x.shape[1]
    return total(logistic_log_mass(x, p[:, :channels], p[:, -1:]))


def logistic_of(m, s):
    return lambda x, p: logistic(x, torch.cat([m(p), s(p)], 1))


def m_of(p):
    return p.chunk(2, 1)[0]


def s_of(p):
    return p.chunk(2, 1)[1]


def naive_log_sigmoid(x, o, floor=0.0):
    return (x * (o.sigmoid() + floor).log() + (1 - x) * ((-o).sigmoid() + floor).log()).flatten(1).sum(1)


class CutHead(Encoder):
    def forward(self, x):
        h = self.hidden(x)
        return self.mean(h), self.log_var(h.detach())


IMAGE = nn.Unflatten(1, (1, 8, 8))
NETWORKS = lambda encoder, decode: check_encoder_decoder(encoder, decode, (1, 8, 8), 4)  # noqa: E731
SINGLE = [
    (check_kl, "log-var-sign", lambda m, s: 0.5 * (m**2 + s.exp() - 1 + s).sum(1)),
    (check_kl, "bracket", lambda m, s: (0.5 * (m**2 + s.exp()) - 1 - s).sum(1)),
    (check_kl, "bracket", lambda m, s: -0.5 * torch.sum(1 + s - m**2, 1) - s.exp().sum(1)),
    (check_kl, "log-std", lambda m, s: kl_divergence(Normal(m, s.exp()), Normal(0.0, 1.0)).sum(1)),
    (check_kl, "constant-once", lambda m, s: 0.5 * ((m**2 + s.exp() - s).sum(1) - 1)),
    (check_kl, "floor", lambda m, s: kl_terms(m, s.clamp(-4, 4)).sum(1)),
    (check_reparameterize, "scaled-mean", lambda m, s, e: m * (s / 2).exp() + e),
    (check_reparameterize, "bracket", lambda m, s, e: m + 0.5 * s.exp() * e),
    (check_reparameterize, "noise-sign", lambda m, s, e: m - (s / 2).exp() * e),
    (check_elbo, "mean-default", lambda x, m, s, o: -F.binary_cross_entropy_with_logits(o, x) - kl_terms(m, s).sum(1)),
    (check_elbo, "kl-sum-batch", lambda x, m, s, o: -cross_entropy(x, o) - kl_terms(m, s).sum()),
    (check_elbo, "overflow", lambda x, m, s, o: naive_log_sigmoid(x, o) - kl_terms(m, s).sum(1)),
    (check_elbo, "floor", lambda x, m, s, o: naive_log_sigmoid(x, o, 1e-8) - kl_terms(m, s).sum(1)),
    (check_elbo, "detached", lambda x, m, s, o: -cross_entropy(x, o) - kl_terms(m, s.detach()).sum(1)),
    (check_iwae, "overflow", lambda w: (w - w.max()).exp().mean(0).log() + w.max()),
    (check_iwae, "no-shift", lambda w: (w - w.max(0).values).exp().mean(0).log()),
    (check_retrieval, "excluded", lambda q, x, k: torch.cdist(q, x).masked_fill(torch.cdist(q, x) < 1e-3, 1e9).argsort(1)[:, :k]),
    (check_likelihood, "swapped", Student(logistic_of(s_of, m_of))),
    (check_likelihood, "inverse-scale", Student(logistic_of(m_of, lambda p: -s_of(p)))),
    (check_likelihood, "fixed-scale", Student(logistic_of(m_of, lambda p: 0 * s_of(p) - 2.3))),
    (check_likelihood, "interleaved", Student(logistic_of(lambda p: p[:, 0::2], lambda p: p[:, 1::2]))),
    (check_likelihood, "first-channels", Student(lambda x, p: total(logistic_log_mass(x, p[:, :1], p[:, 1:2])))),
    (check_likelihood, "floor", Student(naive_logistic)),
    (check_likelihood, "overflow", binary(naive_log_sigmoid)),
    (check_likelihood, "mean-channels", binary(lambda x, p: F.logsigmoid((2 * x - 1) * p).mean(1).sum((1, 2)))),
    (check_likelihood, "inverted", binary(lambda x, p: F.logsigmoid((1 - 2 * x) * p).flatten(1).sum(1))),
    (check_likelihood, "constant", grey(lambda x, p: -0.5 * total((x - p) ** 2), values=None)),
    *(
        (NETWORKS, name, (Encoder(), decoder(IMAGE, end)))
        for name, end in (
            *(
                ("sigmoid", nn.Sigmoid()),
                ("relu", nn.ReLU()),
                ("relu", nn.Softplus()),
                ("tanh", nn.Tanh()),
                ("tanh", nn.Softsign()),
            ),
            *(("softmax", nn.Softmax(-1)), ("never-positive", nn.LogSigmoid()), ("bounded", nn.ELU()), ("bounded", nn.SiLU())),
        )
    ),
    (NETWORKS, "softmax", (Encoder(), decoder(nn.Softmax(1), IMAGE))),
    (NETWORKS, "param-channels", (Encoder(), nn.Sequential(nn.Linear(4, 128), nn.Unflatten(1, (2, 8, 8))))),
    (NETWORKS, "detached", (Encoder(), Function(lambda layer, z: layer(z).detach().view(-1, 1, 8, 8), 4, 64))),
    (NETWORKS, "detached", (Encoder(), Function(lambda layer, z: layer(z.data).view(-1, 1, 8, 8), 4, 64))),
    (NETWORKS, "detached", (Encoder(result=lambda mean, log_var: (mean, log_var.detach())), decoder())),
    (NETWORKS, "detached", (CutHead(), decoder())),
    (NETWORKS, "bounded-log-var", (Encoder(log_var_end=nn.Tanh()), decoder())),
    (
        NETWORKS,
        "ignores-latent",
        (Encoder(), Function(lambda layer, z: layer(z * torch.tensor([1.0, 1, 1, 0])).view(-1, 1, 8, 8), 4, 64)),
    ),
    (NETWORKS, "bounded", (Encoder(), decoder(nn.Hardtanh(-3, 3), IMAGE))),
    (NETWORKS, "bounded", (Encoder(), Function(lambda layer, z: 3 * layer(z).tanh().view(-1, 1, 8, 8), 4, 64))),
    (NETWORKS, "negative-log-var", (Encoder(log_var_end=nn.LogSigmoid()), decoder())),
    (NETWORKS, "batch-dependence", (SharedMean(), decoder())),
    (NETWORKS, "ignores-pixels", (Encoder(hidden=Function(lambda layer, x: layer(x[:, :, :4].flatten(1)), 32, 16)), decoder())),
    (check_kl, "detached", lambda m, s: 0.5 * (m**2 + s.detach().exp() - 1 - s).sum(1)),
    (check_kl, "base", lambda m, s: kl_terms(m, s).sum(1) / math.log(2)),
    (check_elbo, "base", lambda x, m, s, o: -(cross_entropy(x, o) + kl_terms(m, s).sum(1)) / math.log(2)),
    (check_elbo, "beta", lambda x, m, s, o: -cross_entropy(x, o) - 4 * kl_terms(m, s).sum(1)),
    (
        check_elbo,
        "mean-channels",
        lambda x, m, s, o: F.logsigmoid((2 * x - 1) * o).mean(1).sum((1, 2)) - kl_terms(m, s).sum(1),
    ),
    (check_iwae, "floor", lambda w: w.clamp(-80, 80).exp().mean(0).log()),
    (check_retrieval, "one-unit", lambda q, x, k: (q[:, :1] - x[:, 0]).abs().topk(k, largest=False).indices),
    (check_retrieval, "one-query", lambda q, x, k: torch.cdist(q[:1], x).topk(k, largest=False).indices.expand(len(q), k)),
    (check_retrieval, "half", lambda q, x, k: torch.cdist(q.half().float(), x.half().float()).topk(k, largest=False).indices),
    (check_likelihood, "no-sigmoid", binary(lambda x, p: -total(F.binary_cross_entropy(p.clamp(0, 1), x, reduction="none")))),
    (check_likelihood, "logits-bounded", binary(lambda x, p: bce(x, p.tanh()))),
    (check_likelihood, "logits-bounded", binary(lambda x, p: bce(x, 3 * (p / 3).tanh()))),
    (check_likelihood, "scale-bounded", Student(logistic_of(m_of, lambda p: s_of(p).clamp(min=0)))),
    (check_likelihood, "one-scale", Student(one_log_scale)),
    (check_likelihood, "base", Student(lambda x, p: logistic(x, p) / math.log(2))),
    (check_likelihood, "no-log-scale", gaussian(lambda x, m, s: -0.5 * ((x - m) / s.exp()) ** 2 - 0.5 * math.log(2 * math.pi))),
    (check_likelihood, "log-variance", gaussian(lambda x, m, s: Normal(m, (s / 2).exp()).log_prob(x))),
    (check_likelihood, "inverse-scale", gaussian(lambda x, m, s: Normal(m, (-s).exp()).log_prob(x))),
    (check_likelihood, "swapped", gaussian(lambda x, m, s: Normal(s, m.exp()).log_prob(x))),
    (check_likelihood, "fixed-scale", gaussian(lambda x, m, s: Normal(m, 0 * s + 0.3).log_prob(x))),
    (check_training_step, "backward-twice", backward_twice),
    (check_training_step, "detached", encoder_without_graph),
    (check_training_step, "beta", step_of(lambda x, m, s, o: (cross_entropy(x, o) + 4 * kl_terms(m, s).sum(1)).mean())),
    (check_training_step, "no-scale", step_of(z_of=lambda m, s, e: m + e)),
    (check_training_step, "noise-variance", step_of(z_of=lambda m, s, e: m + s.exp() * e)),
    (check_training_step, "elbo-minimized", step_of(lambda *a: -two_terms(*a))),
    (check_training_step, "elbo-minimized", step_of(told=lambda loss: -loss.item())),
    (check_training_step, "kl-sum-batch", step_of(lambda x, m, s, o: cross_entropy(x, o).mean() + kl_terms(m, s).sum())),
    (check_training_step, "no-half", step_of(lambda x, m, s, o: (cross_entropy(x, o) + 2 * kl_terms(m, s).sum(1)).mean())),
    (check_training_step, "sigmoid-twice", step_of(lambda x, m, s, o: two_terms(x, m, s, o.sigmoid()))),
    (check_training_step, "detached", step_of(lambda x, m, s, o: two_terms(x, m, s, o.detach()))),
    (check_training_step, "detached", step_of(lambda x, m, s, o: two_terms(x, m, s.detach(), o))),
    (check_training_step, "overflow", step_of(lambda x, m, s, o: (kl_terms(m, s).sum(1) - naive_log_sigmoid(x, o)).mean())),
]
DOUBLE = [
    (check_kl, "no-half + mean-latents", lambda m, s: (2 * kl_terms(m, s)).mean(1)),
    (check_kl, "sign + no-half", lambda m, s: (1 + s - m**2 - s.exp()).sum(1)),
    (check_kl, "sum-batch + mean-not-squared", lambda m, s: 0.5 * (m + s.exp() - 1 - s).sum()),
    (check_reparameterize, "variance + no-mean", lambda m, s, e: s.exp() * e),
    (check_reparameterize, "variance + swapped", lambda m, s, e: s + m.exp() * e),
    (
        check_elbo,
        "mean-pixels + mean-batch",
        lambda x, m, s, o: -F.binary_cross_entropy_with_logits(o, x) - kl_terms(m, s).sum(1).mean(),
    ),
    (check_elbo, "sigmoid-twice + kl-no-half", lambda x, m, s, o: -cross_entropy(x, o.sigmoid()) - 2 * kl_terms(m, s).sum(1)),
    (check_iwae, "no-log-k + sign", lambda w: -w.logsumexp(0)),
    (check_retrieval, "farthest + cosine", lambda q, x, k: F.cosine_similarity(q[:, None], x[None], dim=2).argsort(1)[:, :k]),
    (check_likelihood, "swapped + inverse-scale", Student(logistic_of(s_of, lambda p: -m_of(p)))),
    (check_likelihood, "mean-pixels + sign", binary(lambda x, p: -bce(x, p) / x[0].numel())),
    (check_likelihood, "interleaved + sign", Student(lambda x, p: -total(logistic_log_mass(x, p[:, 0::2], p[:, 1::2])))),
    (
        check_training_step,
        "mean-latents + detached",
        step_of(
            lambda x, m, s, o: (cross_entropy(x, o) + kl_terms(m, s).mean(1)).mean(),
            lambda m, s, e: REPARAMETERIZE[0](m, s, e).detach(),
        ),
    ),
    (check_training_step, "detached + no-zero-grad", step_of(z_of=lambda m, s, e: REPARAMETERIZE[0](m, s, e).detach(), zero=False)),
    (
        check_training_step,
        "noise-variance + no-half",
        step_of(lambda x, m, s, o: (cross_entropy(x, o) + 2 * kl_terms(m, s).sum(1)).mean(), lambda m, s, e: m + s.exp() * e),
    ),
    (
        check_training_step,
        "kl-subtracted + mean-pixels",
        step_of(lambda x, m, s, o: F.binary_cross_entropy_with_logits(o, x) - kl_terms(m, s).sum(1).mean()),
    ),
]


def judged(check, solution):
    return check(*solution) if isinstance(solution, tuple) else check(solution)


@pytest.mark.parametrize(
    ("check", "mistake", "solution"), [pytest.param(*row, id=f"{row[1]}-{i}") for i, row in enumerate(SINGLE + DOUBLE)]
)
def test_a_wrong_solution_gets_its_name_and_of_two_mistakes_both_names(check, mistake, solution):
    verdict = judged(check, solution)
    assert not verdict
    assert verdict.mistake == mistake, verdict
    assert verdict.message


def test_there_are_as_many_of_them_as_it_takes():
    assert len(SINGLE) >= 40
    assert len(DOUBLE) >= 10
    assert {check for check, *_ in SINGLE} == {*TABLES, check_likelihood, NETWORKS}


def in_parts(model, optimizer, x):
    optimizer.zero_grad(set_to_none=False)
    loss = 0.0
    for part in x.split(64):
        mean, log_var = model.encode(part)
        share = two_terms(part, mean, log_var, model.decode(REPARAMETERIZE[1](mean, log_var, torch.randn_like(mean)))) / 4
        share.backward()
        loss += share.item()
    optimizer.step()
    return loss


def by_autograd_grad(model, optimizer, x):
    mean, log_var = model.encode(x)
    loss = two_terms(x, mean, log_var, model.decode(vaelib.reparameterize(mean, log_var)))
    weights = list(model.parameters())
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = gradient
    optimizer.step()
    return loss.item()


def antithetic(model, optimizer, x):
    mean, log_var = model.encode(x)
    eps = torch.randn_like(mean)
    optimizer.zero_grad()
    loss = sum(two_terms(x, mean, log_var, model.decode(vaelib.reparameterize(mean, log_var, sign * eps))) for sign in (1, -1)) / 2
    loss.backward()
    optimizer.step()
    return loss.item()


def of_distributions(model, optimizer, x):
    mean, log_var = model.encode(x)
    q = Independent(Normal(mean, (log_var / 2).exp()), 1)
    log_likelihood = Independent(Bernoulli(logits=model.decode(q.rsample())), 3).log_prob(x)
    loss = (kl_divergence(q, standard(mean)) - log_likelihood).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


RIGHT = [
    (
        check_kl,
        lambda m, s: kl_divergence(
            MultivariateNormal(m, torch.diag_embed(s.exp())), MultivariateNormal(0 * m[0], torch.eye(m.shape[1]))
        ),
    ),
    (check_kl, lambda m, s: torch.vmap(lambda a, b: 0.5 * (a @ a + b.exp().sum() - b.sum() - len(a)))(m, s)),
    (check_kl, lambda m, s: -0.5 * torch.einsum("ij->i", 1 + s - m * m - s.exp())),
    (check_elbo, lambda x, m, s, o: -nn.BCELoss(reduction="none")(o.sigmoid(), x).sum((1, 2, 3)) - kl_terms(m, s).sum(1)),
    (check_elbo, lambda x, m, s, o: torch.where(x > 0, F.logsigmoid(o), F.logsigmoid(-o)).sum((1, 2, 3)) - kl_terms(m, s).sum(1)),
    (check_retrieval, lambda q, x, k: (-((q.unsqueeze(1) - x.unsqueeze(0)) ** 2).sum(-1)).topk(k)[1]),
    (check_likelihood, Student(lambda x, p: total(logistic_log_mass(x, *p.view(len(p), 2, -1, *p.shape[2:]).unbind(1))))),
    (check_likelihood, Student(lambda x, p: total(logistic_log_mass(x, *p.split(x.shape[1], 1))))),
    (check_likelihood, Student(lambda x, p: total(Normal(m_of(p), s_of(p).exp()).log_prob(x)), values=None)),
    (check_likelihood, Student(logistic_of(m_of, lambda p: s_of(p).clamp(min=-7)))),
    (check_retrieval, lambda q, x, k: (q @ x.T - x.square().sum(1) / 2).topk(k).indices),
    (NETWORKS, (Encoder(), decoder(IMAGE, nn.Hardtanh(-10, 10)))),
    (
        NETWORKS,
        (Encoder(), nn.Sequential(nn.Linear(4, 16), nn.ELU(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 64)), IMAGE)),
    ),
    (check_training_step, step_of(between=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0))),
    (check_training_step, step_of(between=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 20.0))),
    (check_training_step, step_of(between=lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.1))),
    (check_training_step, in_parts),
    (check_training_step, by_autograd_grad),
    (check_training_step, antithetic),
    (check_training_step, of_distributions),
    (
        check_training_step,
        step_of(lambda x, m, s, o: (F.binary_cross_entropy(o.sigmoid(), x, reduction="sum") + kl_terms(m, s).sum()) / len(x)),
    ),
]


@pytest.mark.parametrize(("check", "solution"), [pytest.param(*row, id=str(i)) for i, row in enumerate(RIGHT)])
def test_a_right_solution_in_another_style_passes(check, solution):
    verdict = judged(check, solution)
    assert verdict, verdict
    assert len(RIGHT) >= 15


def test_the_mean_loss_is_told_with_its_sign():
    verdict = check_training_step(step_of(lambda *a: -two_terms(*a)))
    assert "mean loss: got -" in verdict.message
    assert "expected +" in verdict.message
    assert "its sign is the opposite" in verdict.message
    told = check_training_step(stepping(lambda model, x: vaelib.loss(model.elbo(x)), scale=1.01)).message
    assert "the loss that it returns is 1.01 times the right one" in told


@pytest.mark.parametrize("free_bits", [0.05, 0.1, 1.0])
def test_free_bits_in_the_step_are_no_elbo(free_bits):
    verdict = check_training_step(stepping(lambda model, x: vaelib.loss(model.elbo(x), free_bits=free_bits)))
    assert not verdict  # the example has a unit that is nearly silent
    assert "the loss that it returns" in verdict.message


def test_a_decay_of_the_weights_hidden_in_the_gradient_is_found():
    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = vaelib.loss(model.elbo(x))
        loss.backward()
        for parameter in model.parameters():
            parameter.grad.add_(0.01 * parameter.detach())
        optimizer.step()
        return loss.item()

    assert "something else than the gradient of the loss" in check_training_step(step).message


def test_a_decoder_may_give_several_params_per_value_where_that_is_asked_for():
    two = nn.Sequential(nn.Linear(4, 128), nn.Unflatten(1, (2, 8, 8)))
    assert check_encoder_decoder(Encoder(), two, (1, 8, 8), 4, params_per_value=2)
    assert check_encoder_decoder(Encoder(), decoder(), (1, 8, 8), 4, params_per_value=2).mistake == "param-channels"
    with pytest.raises(ValueError, match="params_per_value: got"):
        check_encoder_decoder(Encoder(), two, (1, 8, 8), 4, params_per_value=0)
