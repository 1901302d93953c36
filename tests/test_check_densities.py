"""The judges of priors and posteriors: right ones written in several ways pass, wrong ones do not, and get their name."""

import math

import pytest
import torch
from test_densities import example
from torch import nn

import vaelib
from vaelib import Posterior, StandardNormal
from vaelib.checks import check_posterior, check_prior
from vaelib.priors import MixturePrior


class Prior:
    """A prior of a log-density and a sampler."""

    def __init__(self, log_prob, sample):
        self.log_prob, self.draw = log_prob, sample

    def sample(self, num, generator=None):
        return self.draw(num, generator)


def normal(num, generator):
    return torch.randn(num, 2, generator=generator)


def gaussian(z, mean=0.0, deviation=1.0, two_pi=True):
    squares = ((z - mean) / deviation) ** 2
    return -0.5 * (squares + (math.log(2 * math.pi) if two_pi else 0)).sum(-1) - z.shape[-1] * math.log(deviation)


def mixture(constant=0.5):
    """Two narrow components, far apart; of each the share `constant`."""
    parts = (lambda z: gaussian(z, 2.0, 0.3), lambda z: gaussian(z, -2.0, 0.3))
    return lambda z: torch.stack([part(z) for part in parts]).logsumexp(0) + math.log(constant)


def two(num, generator, share=0.5):
    side = torch.where(torch.rand(num, 1, generator=generator) < share, 2.0, -2.0)
    return side + 0.3 * torch.randn(num, 2, generator=generator)


def vamp():
    torch.manual_seed(1)
    model = vaelib.mlp_vae((1, 4, 4), (16,), 2)
    return example("vamp_prior").VampPrior(model, num_components=6)


RIGHT_PRIORS = {
    "standard": (lambda: StandardNormal(2), 2),
    "eight": (lambda: StandardNormal(8), 8),
    "by distributions": (lambda: Prior(lambda z: torch.distributions.Normal(0, 1).log_prob(z).sum(-1), normal), 2),
    "wide": (lambda: Prior(lambda z: gaussian(z, 3.0, 5.0), lambda n, g: 3 + 5 * normal(n, g)), 2),
    "two modes": (lambda: Prior(mixture(), two), 2),
    "laplace": (
        lambda: Prior(
            lambda z: (-z.abs() - math.log(2)).sum(-1),
            lambda n, g: (lambda u: -u.sign() * torch.log1p(-2 * u.abs()))(torch.rand(n, 2, generator=g).clamp(1e-6) - 0.5),
        ),
        2,
    ),
    "uniform": (
        lambda: Prior(
            lambda z: torch.where((z.abs() < 1).all(-1), -2 * math.log(2), -math.inf) + 0 * z.sum(-1),
            lambda n, g: 2 * torch.rand(n, 2, generator=g) - 1,
        ),
        2,
    ),
    "fitted mixture": (
        lambda: MixturePrior(torch.tensor([0.3, 0.7]), torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), torch.eye(2).repeat(2, 1, 1) * 0.5),
        2,
    ),
    "vamp": (vamp, 2),
}
WRONG_PRIORS = [
    ("unnormalized", lambda: Prior(lambda z: gaussian(z, two_pi=False), normal)),
    ("unnormalized", lambda: Prior(mixture(constant=1.0), two)),  # the share of a component forgotten
    ("unnormalized", lambda: Prior(lambda z: -0.5 * z.square().sum(-1) - math.log(2 * math.pi) / 2, normal)),  # once for two units
    ("unnormalized", lambda: Prior(lambda z: gaussian(z / 2.0), lambda n, g: 2 * normal(n, g))),  # no log of the scale
    ("unnormalized", lambda: Prior(lambda z: gaussian(z).exp(), normal)),  # the density, not its log
    ("unnormalized", lambda: Prior(lambda z: -gaussian(z), normal)),
    ("sample", lambda: Prior(gaussian, lambda n, g: 0.7 * normal(n, g))),
    ("sample", lambda: Prior(gaussian, lambda n, g: 0.3 + normal(n, g))),
    ("sample", lambda: Prior(lambda z: gaussian(z, 0.0, 0.5), lambda n, g: 0.25 * normal(n, g))),  # variance for deviation
    ("sample", lambda: Prior(mixture(), lambda n, g: two(n, g, share=0.9))),
    ("unnormalized", lambda: Prior(mixture(), lambda n, g: two(n, g, share=1.1))),  # one component is never drawn
    ("sample", lambda: Prior(gaussian, lambda n, g: torch.rand(n, 2, generator=g) * math.sqrt(12) - math.sqrt(3))),  # same moments
    ("sample", lambda: Prior(gaussian, lambda n, g: normal(n, g)[:, :1].expand(-1, 2) * 1.0)),  # one noise for both units
    ("generator", lambda: Prior(gaussian, lambda n, g: torch.randn(n, 2) + 0 * normal(n, g))),
    ("generator", lambda: Prior(gaussian, lambda n, g: torch.randn(n, 2, generator=torch.Generator().manual_seed(3)))),
    ("shape", lambda: Prior(gaussian, lambda n, g: normal(n, g)[:, :1])),
    ("shape", lambda: Prior(lambda z: gaussian(z).sum(-1), normal)),
    ("shape", lambda: Prior(lambda z: -0.5 * (z**2 + math.log(2 * math.pi)), normal)),  # not summed over the units
    ("detached", lambda: Prior(lambda z: gaussian(z.detach()), normal)),
    ("raises", lambda: Prior(lambda z: z.nothing, normal)),
    ("no-return", lambda: Prior(lambda z: None, normal)),
]


@pytest.mark.parametrize("name", RIGHT_PRIORS)
def test_right_priors_pass(name):
    make, dim = RIGHT_PRIORS[name]
    found = check_prior(make(), dim)
    assert found, found


@pytest.mark.parametrize("number", range(len(WRONG_PRIORS)))
def test_wrong_priors_get_their_name(number):
    mistake, make = WRONG_PRIORS[number]
    found = check_prior(make(), 2)
    assert not found
    assert found.mistake == mistake, found


def base(deviation=0.5):
    torch.manual_seed(0)
    return Posterior(torch.randn(3, 2), 2 * torch.full((3, 2), deviation).log() + 0.3 * torch.randn(3, 2))


class Own:
    """A posterior whose parts may be put in place of those of `base`."""

    def __init__(self, sample=None, log_prob=None, mean=None):
        q = base()
        self.mean = q.mean if mean is None else mean
        self.sample, self.log_prob = sample or q.sample, log_prob or q.log_prob


def flow():
    torch.manual_seed(3)
    t = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    for parameter in t.parameters():
        parameter.data *= 2
    return example("flow_posterior").Flow(base(), t)


def affine(log_determinant):
    """z = 3 * (a draw of the base): its density needs the logarithm of 3, once for each unit."""
    q = base()
    return Own(sample=lambda eps: 3 * q.sample(eps), log_prob=lambda z: q.log_prob(z / 3) - log_determinant)


RIGHT_POSTERIORS = {
    "gaussian": base,
    "narrow": lambda: base(0.01),
    "flow": flow,
    "affine": lambda: affine(2 * math.log(3)),
    "encoded": lambda: vaelib.mlp_vae((1, 4, 4), (16,), 2).encode(torch.rand(3, 1, 4, 4).round()),
}
posterior = base()
WRONG_POSTERIORS = [
    ("unnormalized", lambda: affine(0.0)),
    ("unnormalized", lambda: affine(math.log(3))),
    ("unnormalized", lambda: Own(log_prob=lambda z: base().log_prob(z) + math.log(2 * math.pi))),
    ("sample", lambda: Own(sample=lambda eps: base().mean + base().log_var.exp() * eps)),  # variance for deviation
    ("sample", lambda: Own(sample=lambda eps: base().sample(eps) + 0.1)),
    ("sample", lambda: Own(sample=lambda eps: base().sample(eps.flip(1)).roll(1, 1))),  # another image's density
    ("sample", lambda: Own(sample=lambda eps: base().mean.expand_as(eps) * 1.0)),  # no noise at all
    ("own-noise", lambda: Own(sample=lambda eps: posterior.sample(torch.randn_like(eps)))),
    ("images", lambda: Own(sample=lambda eps: base().sample(eps[:, :1].expand_as(eps)))),
    ("shape", lambda: Own(sample=lambda eps: base().sample(eps)[0])),
    ("shape", lambda: Own(log_prob=lambda z: base().log_prob(z).sum(1))),
    ("shape", lambda: Own(mean=torch.zeros(3, 2, 1))),
    ("detached", lambda: Own(log_prob=lambda z: base().log_prob(z.detach()))),
    ("raises", lambda: Own(sample=lambda eps: eps.nothing)),
]


@pytest.mark.parametrize("name", RIGHT_POSTERIORS)
def test_right_posteriors_pass(name):
    found = check_posterior(RIGHT_POSTERIORS[name]())
    assert found, found


@pytest.mark.parametrize("number", range(len(WRONG_POSTERIORS)))
def test_wrong_posteriors_get_their_name(number):
    mistake, make = WRONG_POSTERIORS[number]
    found = check_posterior(make())
    assert not found
    assert found.mistake == mistake, found


def test_a_flow_without_its_inverse_is_found():
    q = flow()
    found = check_posterior(Own(sample=q.sample, log_prob=q.base.log_prob))
    assert not found
    assert found.mistake in ("sample", "unnormalized")
