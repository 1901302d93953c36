"""Priors fitted after training: the decoder has met draws of q(z given x), and their distribution over all images is not p(z).

Each is fitted to `posterior_samples` and goes into `generate(model, num_images, prior=...)`. With a generator of the same seed sample i
is the same, up to rounding, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vaelib import noise
from vaelib._validation import check_int, check_seed
from vaelib.data import ImageSet
from vaelib.heldout import evaluating, latent_noise, over_images
from vaelib.objectives import loss
from vaelib.vae import VAE, mlp_vae


def posterior_samples(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """One draw of q(z given x) for each image: (N, L), on the CPU. Together they are a sample of the aggregate posterior.

    The noise belongs to the image (`vaelib.noise`): the draw depends on `seed`, but neither on the batch size nor on the order.
    """

    def measure(model: VAE, x: Tensor, keys: Tensor) -> tuple[Tensor]:
        return (model.draw(x, 1, latent_noise(keys, 1, model.latent_dim), validate=False).z[0],)

    return over_images(model, images, batch_size, seed, measure)[0]


def codes_to_fit(model: VAE, images: ImageSet | Tensor, seed: int, least: int) -> Tensor:
    """`posterior_samples` for a prior; ValueError for too large a z, or fewer than `least` images."""
    if model.latent_dim > 1024:  # beyond lie latents in space, for which neither prior is meant
        raise ValueError(f"model: got latent_dim {model.latent_dim}, expected at most 1024 to fit a prior to its codes")
    codes = posterior_samples(model, images, seed=seed)
    if len(codes) < least:
        raise ValueError(f"images: got {len(codes)}, expected at least {least} to fit this prior")
    return codes


class MixturePrior(NamedTuple):
    """A mixture of K Gaussians over z.

    Attributes:
        weights: (K,), their sum is 1.
        means: (K, L).
        roots: (K, L, L), the lower Cholesky factors of the covariances.
    """

    weights: Tensor
    means: Tensor
    roots: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """log of the mixture's density: (..., L) -> (...), nats."""
        components = torch.distributions.MultivariateNormal(self.means.to(z), scale_tril=self.roots.to(z))
        return torch.logsumexp(self.weights.to(z).log() + components.log_prob(z[..., None, :]), -1)

    def sample(self, num: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """`num` codes (num, L); `temperature` is a factor on the standard deviation of each component."""
        coin, eps = noise.normal_rows(check_int("num", num), 1 + self.means.shape[1], generator).split(
            [1, self.means.shape[1]], dim=1
        )
        edges = self.weights.double().cumsum(0)[:-1]
        component = torch.searchsorted(edges, torch.special.ndtr(coin[:, 0].double()), right=True)
        eps = temperature * eps
        z = self.means[component]
        for k, root in enumerate(self.roots):
            z[component == k] += eps[component == k] @ root.T
        return z


def fit_mixture(model: VAE, images: ImageSet | Tensor, num_components: int = 10, seed: int = 0) -> MixturePrior:
    """A Gaussian mixture with full covariances, fitted by EM to one posterior sample of each image ("ex-post density estimation").

    Ghosh et al. 2020, "From variational to deterministic autoencoders"; the fit is scikit-learn's `GaussianMixture`.

    Args:
        images: the training set.
        seed: of the draws and of the fit.

    Raises:
        ValueError: If the model has more than 1024 latent dimensions, or there are fewer than max(num_components, 2) images.
    """
    from sklearn.mixture import GaussianMixture  # half a second to import

    codes = codes_to_fit(model, images, seed, max(check_int("num_components", num_components), 2))
    fitted = GaussianMixture(num_components, max_iter=200, random_state=seed % 2**32).fit(codes.double().numpy())
    roots = torch.linalg.cholesky(torch.from_numpy(fitted.covariances_))
    return MixturePrior(torch.from_numpy(fitted.weights_).float(), torch.from_numpy(fitted.means_).float(), roots.float())


class SecondStagePrior(NamedTuple):
    """A VAE over z: u from N(0, I), then z from p(z given u).

    Attributes:
        model: the VAE, on the CPU; its images are standardized codes of shape (L, 1, 1).
        mean: (L,), of the codes it was fitted to.
        std: (L,), their standard deviation.
    """

    model: VAE
    mean: Tensor
    std: Tensor

    def sample(self, num: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """`num` codes (num, L); `temperature` is a factor on the standard deviation of u and of z given u."""
        u, eps = (temperature * noise.normal_rows(check_int("num", num), 2 * len(self.mean), generator)).chunk(2, dim=1)
        with evaluating(self.model):
            z: Tensor = self.model.decode(u).flatten(1) + self.model.likelihood.log_scale.exp() * eps  # type: ignore[operator]
        return self.mean + self.std * z


def fit_second_stage(
    model: VAE, images: ImageSet | Tensor, hidden_dims: Sequence[int] = (512, 512), epochs: int = 20, seed: int = 0
) -> SecondStagePrior:
    """A second VAE, trained on one posterior sample of each image; Dai and Wipf 2019, "Diagnosing and enhancing VAE models".

    Its u has as many dimensions as z, and its likelihood is a Gaussian with one learned scale, as in the paper. The scale starts at
    0.3 of the codes' own: from 1 the second stage hardly leaves its collapsed start, N(mean, std^2). It is trained on the model's
    device by Adam, learning rate 3e-3 falling to 0 along a cosine, with batches of 100.

    Args:
        images: the training set.
        hidden_dims: of the encoder's hidden layers; the decoder mirrors them.
        epochs: passes over the codes.
        seed: of the draws, the first weights and the training.

    Raises:
        ValueError: If the model has more than 1024 latent dimensions, or there are fewer than two images.
    """
    epochs, seed = check_int("epochs", epochs), check_seed("seed", seed)
    codes = codes_to_fit(model, images, seed, 2)
    mean, std = codes.mean(0), codes.std(0).clamp(min=1e-6)
    x = ((codes - mean) / std)[:, :, None, None].to(model.device)  # (N, L, 1, 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(seed)
        stage = mlp_vae(x.shape[1:], hidden_dims, model.latent_dim, {"name": "gaussian", "scale": 0.3, "learned": True})
    stage.to(model.device)
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 100))
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator, device="cpu")
        drawn = [torch.randn(1, len(rows), model.latent_dim, generator=generator, device="cpu") for rows in order.split(100)]
        shuffled, eps = x[order.to(x.device)], torch.cat(drawn, 1).to(x.device)  # no step waits for the host
        for batch, noises in zip(shuffled.split(100), eps.split(100, 1), strict=True):
            optimizer.zero_grad()
            loss(stage(batch, noises)).backward()
            optimizer.step()
            schedule.step()
    return SecondStagePrior(stage.cpu().eval(), mean, std)
