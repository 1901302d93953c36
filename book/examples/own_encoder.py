"""An encoder: any module from x to mean and log-variance of q(z given x).

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20)
    model.encoder = PoolEncoder(20)
"""

from torch import nn


class PoolEncoder(nn.Module):
    """Convolve 28 x 28 pixels, average to 7 x 7, read mean and log-variance."""

    def __init__(self, latent_dim):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.GELU(), nn.AvgPool2d(4),
            nn.Flatten(), nn.Linear(784, 2 * latent_dim),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x).chunk(2, dim=1)
