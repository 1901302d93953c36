"""An encoder: any module from x to the mean and the log-variance of q(z given x).

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20)
    model.encoder = PoolEncoder(20)
"""

from torch import nn


class PoolEncoder(nn.Module):
    """Convolve, average each of 7 x 7 places, and read mean and log-variance from what is left of 28 x 28 pixels."""

    def __init__(self, latent_dim):
        super().__init__()
        pooled = nn.Conv2d(1, 16, 5, padding=2), nn.GELU(), nn.AvgPool2d(4), nn.Flatten()  # (N, 784)
        self.layers = nn.Sequential(*pooled, nn.Linear(784, 2 * latent_dim))

    def forward(self, x):
        return self.layers(x).chunk(2, dim=1)
