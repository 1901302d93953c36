"""A further term of the loss: the maximum mean discrepancy of q(z) from p(z).

Zhao, Song and Ermon 2019, "InfoVAE".

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20)
    model.penalty = mmd_penalty
    vaelib.fit(model, images)  # its history has a column train_penalty
"""

import torch


def mean_kernel(a, b):  # (N, L), (M, L) -> a number
    """The mean of a Gaussian kernel over all pairs."""
    return (-(a[:, None] - b).square().mean(2)).exp().mean()


def mmd_penalty(x, draw, weight=100.0):
    """weight times the squared discrepancy of codes from draws of N(0, I)."""
    z, other = draw.z[0], torch.randn_like(draw.z[0])  # (N, L)
    within = mean_kernel(z, z) + mean_kernel(other, other)
    return weight * (within - 2 * mean_kernel(z, other))
