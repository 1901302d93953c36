"""A likelihood: a Laplace density around the decoder's output.

Its score is an absolute error, where that of a Gaussian is a squared one.

    likelihood = {"name": "laplace", "scale": 0.1}
    model = vaelib.mlp_vae((1, 28, 28), (400,), 20, likelihood)
"""

import torch
from torch.distributions import Laplace as LaplaceDensity

import vaelib


@vaelib.register_likelihood("laplace")
class Laplace(vaelib.Likelihood):
    """A density of real x in [-1, 1]; params (N, C, H, W) are its medians."""

    lowest, values = -1.0, None

    def __init__(self, scale=0.1):
        super().__init__(name="laplace", scale=scale)

    def log_prob(self, x, params, validate=True):  # twice (N, C, H, W) -> (N,)
        params = self.check(x, params, validate)
        density = LaplaceDensity(params, self.config["scale"])
        return density.log_prob(x).flatten(1).sum(1)

    def mean(self, params):
        return params

    def sample(self, params, generator=None):  # difference of two waits
        times = torch.empty(2, *params.shape).exponential_(generator=generator)
        return params + self.config["scale"] * times.diff(dim=0)[0].to(params)
