"""A further term of the loss: the maximum mean discrepancy of q(z) and p(z) (Zhao, Song and Ermon 2019, "InfoVAE").

    model = vaelib.mlp_vae((1, 28, 28), (400,), 20)
    model.penalty = mmd_penalty
    vaelib.fit(model, images)
"""

import torch


def mmd_penalty(x, draw, weight=100.0):
    """weight times the squared discrepancy of the batch's codes from as many draws of N(0, I), under a Gaussian kernel."""
    z = draw.z[0]  # (N, L)
    both = torch.cat([z, torch.randn_like(z)])  # (2N, L)
    kernel = (-torch.cdist(both, both).square() / z.shape[1]).exp()  # (2N, 2N)
    sign = torch.ones(len(both), device=z.device).index_fill_(0, torch.arange(len(z), len(both), device=z.device), -1)
    return weight * (sign @ kernel @ sign) / len(z) ** 2
