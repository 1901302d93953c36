"""A likelihood: given z, x has a Laplace distribution around the decoder's output, so that its score is an absolute error.

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20, {"name": "laplace", "scale": 0.1})
"""

import torch
from torch.distributions import Laplace as LaplaceDensity

import vaelib


@vaelib.register_likelihood("laplace")
class Laplace(vaelib.Likelihood):
    """A density of continuous x in [-1, 1]; params (N, C, H, W) are its medians."""

    lowest, values = -1.0, None

    def __init__(self, scale=0.1):
        super().__init__(name="laplace", scale=scale)

    def log_prob(self, x, params, validate=True):  # (N, C, H, W), (N, C, H, W) -> (N,)
        return LaplaceDensity(self.check(x, params, validate), self.config["scale"]).log_prob(x).flatten(1).sum(1)

    def mean(self, params):
        return params

    def sample(self, params, generator=None):  # the difference of two exponential waiting times
        return params + self.config["scale"] * torch.empty(2, *params.shape).exponential_(generator=generator).to(params).diff(dim=0)[0]
