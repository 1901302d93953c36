"""A posterior that is no diagonal Gaussian: a coupling flow behind one.

Dinh, Krueger and Bengio 2015.

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20)
    model.encoder = FlowEncoder(model.encoder, latent_dim=20)
    vaelib.fit(model, images)
"""

import torch
from torch import nn

import vaelib


class Flow:
    """q(z given x): a draw (a, b) of the Gaussian `base` becomes (a, b + t(a)).

    That keeps volumes, and can be undone.
    """

    def __init__(self, base, t):
        self.base, self.t = base, t
        self.mean = self.moved(base.mean, 1)  # where the base's mean goes

    def moved(self, z, sign):  # (..., L) -> (..., L)
        a, b = z.chunk(2, dim=-1)
        return torch.cat([a, b + sign * self.t(a)], dim=-1)

    def sample(self, eps):  # (K, N, L) -> (K, N, L)
        return self.moved(self.base.sample(eps), 1)

    def log_prob(self, z):  # (K, N, L) -> (K, N)
        return self.base.log_prob(self.moved(z, -1))


class FlowEncoder(nn.Module):
    """An encoder to (mean, log_var), and one flow behind it for all images."""

    def __init__(self, encoder, latent_dim):
        super().__init__()
        self.encoder = encoder
        half = latent_dim // 2
        layers = nn.Linear(half, 64), nn.Tanh(), nn.Linear(64, half)
        self.t = nn.Sequential(*layers)

    def forward(self, x):
        return Flow(vaelib.Posterior(*self.encoder(x)), self.t)
