"""A prior that is learned with the model: the VampPrior.

Tomczak and Welling 2018.

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20)
    model.prior = VampPrior(model, num_components=50)
    vaelib.fit(model, images)
"""

import math

import torch
from torch import nn


class VampPrior(nn.Module):
    """p(z): the even mixture of q(z given u) at M learned pseudo-inputs u."""

    def __init__(self, model, num_components):
        super().__init__()
        self.encode = model.encode
        inputs = torch.rand(num_components, *model.image_shape)
        self.inputs = nn.Parameter(inputs)

    def log_prob(self, z):  # (..., L) -> (...), by way of (..., M)
        q = self.encode(self.inputs, validate=False)
        each = q.log_prob(z[..., None, :])
        return each.logsumexp(-1) - math.log(len(self.inputs))

    def sample(self, num, generator=None):  # (num, L)
        chosen = torch.randint(len(self.inputs), (num,), generator=generator)
        q = self.encode(self.inputs[chosen], validate=False)
        eps = torch.randn(q.mean.shape, generator=generator)
        return q.sample(eps.to(q.mean))
