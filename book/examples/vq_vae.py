"""A VQ-VAE as a VAE: q(z given x) puts one code in each place, p(z) any.

Van den Oord, Vinyals and Kavukcuoglu 2017. The rate is the number of places
times log(num_codes) nats, whatever the image.

    model = vq_vae((3, 32, 32), num_codes=64)
    vaelib.fit(model, images)
"""

import math

import torch
from torch import nn

import vaelib


class OneHot:
    """q(z given x): these codes, for sure.

    The decoder's gradient goes straight through them to the encoder's output.
    """

    def __init__(self, output, codes):  # each (N, H, W, D)
        to_output, to_codes = codes - output.detach(), output - codes.detach()
        self.loss = (to_output**2 + 0.25 * to_codes**2).flatten(1).sum(1)
        straight = output + (codes - output).detach()
        self.mean = straight.movedim(-1, 1).flatten(1)  # (N, L)

    def sample(self, eps):
        return self.mean.expand_as(eps)

    def log_prob(self, z):
        return z.new_zeros(z.shape[:-1])


class Uniform(nn.Module):
    """p(z): in each place one of the codes, all with the same chance."""

    def __init__(self, num_codes, code_dim, places):
        super().__init__()
        self.codes = nn.Parameter(0.3 * torch.randn(num_codes, code_dim))
        self.places = places

    def log_prob(self, z):
        rate = math.prod(self.places) * math.log(len(self.codes))
        return z.new_full(z.shape[:-1], -rate)

    def sample(self, num, generator=None):
        size = (num, *self.places)
        index = torch.randint(len(self.codes), size, generator=generator)
        return self.codes[index].movedim(-1, 1).flatten(1)


class VQVAE(vaelib.VAE):
    """A VAE whose encoder's mean, a map, gives way to its nearest codes."""

    def encode(self, x, validate=True):
        output = super().encode(x, validate).mean  # (N, L)
        output = output.unflatten(1, self.latent_shape).movedim(1, -1)
        nearest = torch.cdist(output, self.prior.codes).argmin(-1)
        return OneHot(output, self.prior.codes[nearest])

    def penalty(self, x, draw):
        return draw.q.loss


@vaelib.register_model("own_vq")
def vq_vae(
    image_shape,
    num_codes=64,
    latent_dim=(8, 8, 8),
    likelihood="discretized_logistic",
    channels=(32, 64),
):
    """Convolutions to a map of codes, (code size, H, W), and back."""
    base = vaelib.conv_vae(image_shape, latent_dim, likelihood, channels)
    prior = Uniform(num_codes, latent_dim[0], latent_dim[1:])
    parts = base.encoder, base.decoder, base.likelihood
    return VQVAE(*parts, image_shape, latent_dim, prior=prior)
