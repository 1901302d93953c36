"""A prior that is learned with the model: the VampPrior of Tomczak and Welling 2018.

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20)
    model.prior = VampPrior(model, num_components=50)
    vaelib.fit(model, images)
"""

import math

import torch
from torch import nn


class VampPrior(nn.Module):
    """p(z): the even mixture of q(z given u) at M pseudo-inputs u, which are learned."""

    def __init__(self, model, num_components):
        super().__init__()
        self.encode, self.inputs = model.encode, nn.Parameter(torch.rand(num_components, *model.image_shape))

    def log_prob(self, z):  # (..., L) -> (...), by way of (..., M)
        return self.encode(self.inputs, validate=False).log_prob(z[..., None, :]).logsumexp(-1) - math.log(len(self.inputs))

    def sample(self, num, generator=None):  # (num, L)
        q = self.encode(self.inputs[torch.randint(len(self.inputs), (num,), generator=generator)], validate=False)
        return q.sample(torch.randn(q.mean.shape, generator=generator).to(q.mean))
