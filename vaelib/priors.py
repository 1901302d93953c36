"""Priors fitted after training: the decoder has met draws of q(z given x), and their distribution over all images is not p(z).

Each is fitted to `posterior_samples` and goes into `generate(model, num_images, prior=...)`. With a generator of the same seed sample i
is the same, up to rounding, whatever the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaelib import noise
from vaelib._validation import check_int, check_pixels, check_seed
from vaelib.data import ImageSet
from vaelib.densities import Posterior, reparameterize
from vaelib.evaluation import posteriors
from vaelib.heldout import evaluating, latent_noise, over_images
from vaelib.networks import mlp, zero
from vaelib.objectives import gaussian_log_density, loss
from vaelib.vae import VAE, mlp_vae


def posterior_samples(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """One draw of q(z given x) for each image: (N, L), on the CPU. Together they are a sample of the aggregate posterior.

    The noise belongs to the image (`vaelib.noise`): the draw depends on `seed`, but neither on the batch size nor on the order.
    """

    def measure(model: VAE, x: Tensor, keys: Tensor) -> tuple[Tensor]:
        return (model.draw(x, 1, latent_noise(keys, 1, model.latent_dim), validate=False).z[0],)

    return over_images(model, images, batch_size, seed, measure)[0]


def codes_to_fit(model: VAE, images: ImageSet | Tensor, seed: int, least: int, most: float = 1024) -> Tensor:
    """`posterior_samples` for a prior; ValueError for a z of more than `most` numbers, or fewer than `least` images.

    Beyond 1024 lie latents in space, for which only a prior with a network for maps is meant.
    """
    if model.latent_dim > most:
        raise ValueError(f"model: got latent_dim {model.latent_dim}, expected at most {most} to fit a prior to its codes")
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


class VampPrior(nn.Module):
    """The even mixture of q(z given u) at M learned pseudo-inputs u: the aggregate posterior of few images, which are chosen to fit.

    Tomczak and Welling 2018. As `model.prior` it is trained with the model; `fit_prior` trains it afterwards.

    Args:
        model: whose encoder it asks; its posterior must be one diagonal Gaussian for each image.
        images: M of them, chosen at random, are the first pseudo-inputs: from noise, whose codes lie far apart, they come slowly.
        num_components: M.
        seed: of the choice.
    """

    def __init__(self, model: VAE, images: ImageSet | Tensor, num_components: int = 500, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(check_seed("seed", seed))
        pixels = check_pixels("images", images.pixels if isinstance(images, ImageSet) else images, model.image_shape)
        if len(pixels) < check_int("num_components", num_components):
            raise ValueError(f"images: got {len(pixels)}, expected at least one for each of the {num_components} pseudo-inputs")
        chosen = torch.randperm(len(pixels), generator=generator, device="cpu")[:num_components]
        likelihood = model.likelihood
        unit = pixels[chosen.to(pixels.device)].to(model.device) / 255
        self.inputs = nn.Parameter(likelihood.lowest + (likelihood.highest - likelihood.lowest) * unit)
        self.encode = model.encode  # no part of this module: its weights belong to the model

    def log_prob(self, z: Tensor) -> Tensor:
        """log of the mixture's density: (..., L) -> (...), nats."""
        q = self.encode(self.inputs, validate=False)
        return torch.logsumexp(q.log_prob(z[..., None, :]), -1) - math.log(len(self.inputs))

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """`num` codes (num, L); row i does not depend on `num`."""
        q = self.encode(self.inputs, validate=False)
        rows = noise.normal_rows(check_int("num", num), 1 + q.mean.shape[1], generator).to(q.mean)
        chosen = (torch.special.ndtr(rows[:, 0].double()) * len(q.mean)).long().clamp(max=len(q.mean) - 1)
        return Posterior(q.mean[chosen], q.log_var[chosen]).sample(rows[:, 1:])


class FlowPrior(nn.Module):
    """N(0, I) pushed through affine couplings: half of z is shifted and scaled by what a network says of the other half, in turn.

    It starts as N(0, I). "RealNVP", Dinh, Sohl-Dickstein and Bengio 2017. As `model.prior` it is trained with the model; `fit_prior`
    trains it afterwards. eq. flow-prior

    Args:
        latent_dim: L, at least 2.
        layers: how many couplings.
        width: of the two hidden layers of each one's network.
    """

    def __init__(self, latent_dim: int, layers: int = 6, width: int = 128) -> None:
        super().__init__()
        self.latent_dim = check_int("latent_dim", latent_dim, minimum=2)
        self.moved = latent_dim // 2
        sizes = (latent_dim - self.moved, check_int("width", width), width)
        self.networks = nn.ModuleList()
        for _ in range(check_int("layers", layers)):
            zero(last := nn.Linear(width, 2 * self.moved))
            self.networks.append(nn.Sequential(mlp(sizes, "relu"), last))

    def coupling(self, network: nn.Module, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log-scale, the latter between -2 and 2, of the other half."""
        shift, log_scale = network(kept).chunk(2, -1)
        return shift, 2 * torch.tanh(log_scale / 2)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z): (..., L) -> (...), nats: that of the noise it is made of, minus the log-scales. eq. flow-prior"""
        volume = torch.zeros_like(z[..., 0])
        for network in reversed(self.networks):
            z = z.flip(-1)
            kept, moved = z[..., self.moved :], z[..., : self.moved]
            shift, log_scale = self.coupling(network, kept)
            z = torch.cat([(moved - shift) * (-log_scale).exp(), kept], -1)
            volume = volume - log_scale.sum(-1)
        return volume + gaussian_log_density(z, torch.zeros_like(z), torch.zeros_like(z))

    def from_noise(self, eps: Tensor) -> Tensor:
        """z made of standard normal noise: (M, L) -> (M, L)."""
        for network in self.networks:
            moved, kept = eps[..., : self.moved], eps[..., self.moved :]
            shift, log_scale = self.coupling(network, kept)
            eps = torch.cat([shift + log_scale.exp() * moved, kept], -1).flip(-1)
        return eps

    def sample(self, num: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """`num` codes (num, L); row i does not depend on `num`. `temperature` is a factor on the noise."""
        eps = noise.normal_rows(check_int("num", num), self.latent_dim, generator)
        return self.from_noise(temperature * eps.to(next(self.parameters())))


def fit_prior(
    model: VAE,
    images: ImageSet | Tensor,
    prior: nn.Module,
    epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> list[float]:
    """Train a prior, and nothing else, to give draws of q(z given x) the largest density: its part of the ELBO, which is minus the rate.

    What the rate falls by is what the aggregate posterior's KL falls by. eq. learned-prior-gain

    Each epoch draws anew. Adam, on the model's device, along a cosine to 0; only the prior's own parameters move.

    Returns:
        The mean of -log p(z) in each epoch while it moved, nats per image.
    """
    q, device = posteriors(model, images), model.device
    mean, log_var = q.mean.to(device), q.log_var.to(device)
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    prior.to(device)
    optimizer = torch.optim.Adam(prior.parameters(), lr=learning_rate)
    steps = check_int("epochs", epochs) * -(-len(mean) // check_int("batch_size", batch_size))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    course = []
    for _ in range(epochs):
        order = torch.randperm(len(mean), generator=generator, device="cpu").to(device)
        eps = torch.randn(mean.shape, generator=generator, device="cpu").to(device)
        total = torch.zeros((), device=device)
        for rows in order.split(batch_size):
            optimizer.zero_grad()
            nats = -prior.log_prob(reparameterize(mean[rows], log_var[rows], eps[rows]))  # type: ignore[operator]
            nats.mean().backward()
            optimizer.step()
            schedule.step()
            total += nats.detach().sum()
        course.append(total.item() / len(mean))
    return course
