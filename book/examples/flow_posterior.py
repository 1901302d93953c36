"""A posterior that is no diagonal Gaussian: a coupling flow (Dinh, Krueger and Bengio 2015) behind one.

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20)
    model.encoder = FlowEncoder(model.encoder, latent_dim=20)
    vaelib.fit(model, images)
"""

import torch
from torch import nn

import vaelib


class Flow:
    """q(z given x): a draw (a, b) of the Gaussian `base` becomes z = (a, b + t(a)), which keeps volumes and can be undone."""

    def __init__(self, base, t):
        self.base, self.t = base, t
        self.mean = self.moved(base.mean, 1)  # where the base's mean goes: what the images are compared by

    def moved(self, z, sign):  # (..., L) -> (..., L)
        a, b = z.chunk(2, dim=-1)
        return torch.cat([a, b + sign * self.t(a)], dim=-1)

    def sample(self, eps):  # (K, N, L) -> (K, N, L)
        return self.moved(self.base.sample(eps), 1)

    def log_prob(self, z):  # (K, N, L) -> (K, N)
        return self.base.log_prob(self.moved(z, -1))


class FlowEncoder(nn.Module):
    """An encoder to (mean, log_var) with a flow behind it, the same for all images."""

    def __init__(self, encoder, latent_dim):
        super().__init__()
        self.encoder = encoder
        self.t = nn.Sequential(nn.Linear(latent_dim // 2, 64), nn.Tanh(), nn.Linear(64, latent_dim // 2))

    def forward(self, x):
        return Flow(vaelib.Posterior(*self.encoder(x)), self.t)
