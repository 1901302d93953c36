"""The page `errata`: what it says that other people's weights are, and the rows that its numbers come from."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch

import vaelib

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "book" / "errata.md").read_text(encoding="utf-8")
CELEBA, DIGITS, FACES, CIFAR = (3, 64, 64), (1, 28, 28), (3, 128, 128), (3, 32, 32)
WEIGHTS = [  # shape of an image, latents, weight of the mean squared error, of the KL summed over latents, beta as the page has it
    (CELEBA, 128, 1, 0.00025, "1.536", "1.24"),
    (CELEBA, 128, 1, 1, "6144", "78.4"),
    (DIGITS, 2, 1000, 1, "0.392", "0.63"),
    (FACES, 200, 10000, 1, "2.458", "1.57"),
    (CIFAR, 256, 1, 0.1 / 256, "0.6", "0.77"),
]


@pytest.mark.parametrize(("shape", "latents", "error", "kl", "beta", "scale"), WEIGHTS)
def test_a_weighted_squared_error_is_the_beta_vae_that_the_page_says(shape, latents, error, kl, beta, scale):
    """Their loss and the library's, on one network, have gradients that differ by a factor only."""
    torch.manual_seed(0)
    size = math.prod(shape)
    model = vaelib.mlp_vae(shape, (8,), latents, "gaussian")
    x, eps = torch.rand(4, *shape), torch.randn(1, 4, latents)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    def theirs():
        mean, log_var = model.encode(x)
        picture = model.decode(mean + (log_var / 2).exp() * eps[0])
        return error * ((picture - x) ** 2).mean() + kl * vaelib.gaussian_kl(mean, log_var).mean()

    implied = kl * size / 2 / error
    ours = gradient(vaelib.loss(model.elbo(x, eps=eps), implied))
    torch.testing.assert_close(gradient(theirs()) * size / 2 / error, ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())
    assert f"{implied:.3f}".rstrip("0").rstrip(".") == beta
    assert f"{math.sqrt(implied):.{len(scale.split('.')[1])}f}" == scale
    assert re.search(rf"- {re.escape(beta)}\n  - {re.escape(scale)}\n", PAGE)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("errata_rows", ROOT / "book" / "_scripts" / "errata_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_right_row_is_minus_the_elbo(script):
    torch.manual_seed(0)
    model = vaelib.mlp_vae((1, 8, 8), (16,), 2)
    x, eps = (torch.rand(6, 1, 8, 8) < 0.5).float(), torch.randn(6, 2)
    torch.testing.assert_close(script.right(model, x, eps), vaelib.loss(model.elbo(x, eps=eps[None])))


def test_what_the_page_says_of_its_rows_holds_in_each_training():
    rows = json.loads((ROOT / "results" / "errata-rows.json").read_text(encoding="utf-8"))

    def each(name, key):
        return [rows[f"{name}.{seed}"]["metrics"][key] for seed in range(3)]

    for wrong in ("small-noise", "two-readings"):
        assert max(each(wrong, "elbo")) < min(each("right-2", "elbo")) - 10
    for name in ("right-2", "right-20", "grey"):
        assert all(a > b for a, b in zip(each(name, "printed"), each(name, "printed_with_the_mean"), strict=True))
