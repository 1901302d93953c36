"""A VQ-VAE (van den Oord, Vinyals and Kavukcuoglu 2017) as a VAE: q(z given x) has one code in each place, p(z) all with the same chance.

    model = vq_vae((3, 32, 32), num_codes=64, code_dim=16)
    vaelib.fit(model, images)  # the rate is num_places * log(num_codes) nats, exactly
"""

import math

import torch
from torch import nn

import vaelib


class OneHot:
    """q(z given x): the nearest code of each place, for sure. Its gradient goes straight through to the encoder's output."""

    def __init__(self, output, codes):  # (N, h, w, D), (K, D)
        self.index = torch.cdist(output.detach(), codes.detach()).argmin(-1)  # (N, h, w)
        chosen = codes[self.index]
        self.loss = ((chosen - output.detach()).square() + 0.25 * (output - chosen.detach()).square()).flatten(1).sum(1)
        self.mean = (output + (chosen - output).detach()).movedim(-1, 1).flatten(1)  # (N, L)

    def sample(self, eps):
        return self.mean.expand_as(eps)

    def log_prob(self, z):
        return z.new_zeros(z.shape[:-1])


class Uniform(nn.Module):
    """p(z): each place has one of the K codes, all with the same chance."""

    def __init__(self, num_codes, code_dim, size):
        super().__init__()
        self.codes, self.size = nn.Parameter(torch.randn(num_codes, code_dim)), size

    def log_prob(self, z):
        return z.new_full(z.shape[:-1], -math.prod(self.size) * math.log(len(self.codes)))

    def sample(self, num, generator=None):
        index = torch.randint(len(self.codes), (num, *self.size), generator=generator)
        return self.codes[index].movedim(-1, 1).flatten(1)


class VQVAE(vaelib.VAE):
    """A VAE whose encoder's mean, a map, is replaced by its nearest codes."""

    def encode(self, x, validate=True):
        output = super().encode(x, validate).mean.unflatten(1, self.latent_shape)
        return OneHot(output.movedim(1, -1), self.prior.codes)

    def penalty(self, x, draw):
        return draw.q.loss
