"""The variational autoencoder: encoder, decoder, likelihood and prior.

Functions of vaelib that take pixels or codes move them to the model's device, and results come back to the CPU; the methods of a
`VAE`, which take x or z, move nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from vaelib._validation import check_image_shape, check_int, check_observation, describe, help_at, plain
from vaelib.densities import Draw, Posterior, StandardNormal, kl_divergence
from vaelib.likelihoods import Likelihood, make_likelihood
from vaelib.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, check_channels, check_latent_dim
from vaelib.objectives import ElboTerms, doubly_reparameterized_bound, importance_weighted_bound

P = ParamSpec("P")
M = TypeVar("M", bound="VAE")
MODELS: dict[str, Callable[..., VAE]] = {}  # what builds a model of each name from its config; see `register_model`


class VAE(nn.Module):
    """p(x, z) = p(z) p(x given z), with the amortized posterior q(z given x).

    Args:
        encoder: module from x (N, C, H, W) to (mean, log_var), each (N, L), or to a posterior of your own, see `vaelib.densities`.
        decoder: module from z (N, L) to the likelihood's params (N, P*C, H, W).
        likelihood: p(x given z), see `vaelib.likelihoods`.
        image_shape: (C, H, W).
        latent_dim: L, or (channels, height, width) of latents that are laid out in space: L is then their product.
        config: what builds the model again (`register_model` sets it); without it `save` refuses.
        prior: p(z), see `vaelib.densities`; None is N(0, I).

    Attributes:
        latent_shape: the shape that one code z has for the networks: (L,) or (channels, height, width).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        image_shape: Sequence[int],
        latent_dim: int | Sequence[int],
        config: dict[str, Any] | None = None,
        prior: Any = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.image_shape = check_image_shape("image_shape", image_shape)
        self.latent_shape = check_latent_dim(latent_dim)
        self.latent_dim = math.prod(self.latent_shape)
        self.prior: Any = StandardNormal(self.latent_dim) if prior is None else prior
        self.config = plain(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are; of a model without any, where its buffers are, or the CPU."""
        return next(chain(self.parameters(), self.buffers()), torch.empty(0, device="cpu")).device

    def given(self, labels: int | Tensor | None, validate: bool = True) -> VAE:
        """The model for images with these labels: itself, but for a `ConditionalVAE`."""
        return self

    def forward(self, x: Tensor, eps: Tensor | None = None, objective: str = "elbo", labels: Tensor | None = None) -> ElboTerms:
        """`elbo`, or its terms with the importance-weighted `bound` beside them, without a look at the values of x.

        It is what DistributedDataParallel and torch.compile wrap. The objectives are those of `TrainConfig`.
        """
        model, num_samples = self.given(labels, validate=False), 1 if eps is None else len(eps)
        if objective == "elbo":
            return model.elbo(x, num_samples, eps, validate=False)
        drawn = model.draw(x, num_samples, eps, validate=False)
        bound = doubly_reparameterized_bound(drawn) if objective == "dreg" else importance_weighted_bound(drawn.log_weights)
        log_likelihood, kl, by_unit, *_ = drawn.terms
        by_unit = None if by_unit is None else by_unit.detach()
        return ElboTerms(log_likelihood.detach(), kl.detach(), by_unit, model.penalty(x, drawn), bound)

    def encode(self, x: Tensor, validate: bool = True) -> Posterior:
        """q(z given x), deterministic: x (N, C, H, W) -> mean and log_var, each (N, L).

        With `validate` the values of x are checked (NaN, range); shape, dtype and device always are.
        """
        self.check_input(x, validate)
        q = self.encoder(x)
        return q if hasattr(q, "log_prob") else Posterior(*(statistic.to(x.dtype) for statistic in q))

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's params at z: (N, L) -> (N, P, H, W), in the dtype of z."""
        self.check_code(z)
        params: Tensor = self.decoder(z)
        return params.to(z.dtype)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x given z) of K codes for each image: x (N, C, H, W), z (K, N, L) -> (K, N), nats."""
        return self.score(x, self.decode(z.flatten(0, 1)))

    def score(self, x: Tensor, params: Tensor) -> Tensor:
        """log p(x) under the likelihood's params: x (N, C, H, W), params (K*N, P, H, W) -> (K, N), nats."""
        num_samples = len(params) // len(x)
        repeated = x if num_samples == 1 else x.expand(num_samples, *x.shape).flatten(0, 1)  # (K*N, C, H, W)
        return self.likelihood.log_prob(repeated, params, validate=False).view(num_samples, len(x))

    def draw(
        self,
        x: Tensor,
        num_samples: int = 1,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        validate: bool = True,
    ) -> Draw:
        """Codes drawn from q(z given x), and what they meet: all that the bounds are made of.

        Args:
            x: (N, C, H, W), as `likelihood.observe` gives it.
            num_samples: K, draws of z per image.
            eps: the standard normal noise (K, N, L); drawn from `generator` where it is not given.
            validate: whether the values of x are checked (NaN, range); shapes always are.
        """
        self.check_input(x, validate)
        return self.draw_with(x, self.noise_for(x, num_samples, eps, generator))

    def draw_with(self, x: Tensor, eps: Tensor) -> Draw:
        """What `draw` does with arguments that were checked: the method that a model with several layers of latents overrides."""
        q = self.encode(x, validate=False)
        z = q.sample(eps)  # (K, N, L)
        return Draw(z, self.log_likelihood(x, z), q, self.prior, kl_divergence(q, self.prior, z))

    def elbo(
        self,
        x: Tensor,
        num_samples: int = 1,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        validate: bool = True,
    ) -> ElboTerms:
        """The ELBO of each image: Monte Carlo over z for the likelihood, closed form for the KL. eq. monte-carlo-elbo

        Args:
            x: (N, C, H, W), as `likelihood.observe` gives it.
            num_samples: K, draws of z per image, averaged.
            eps: the standard normal noise (K, N, L); drawn from `generator` where it is not given.
            validate: whether the values of x are checked (NaN, range); shapes always are.

        Returns:
            ElboTerms with `.log_likelihood`, `.kl` and `.elbo`, each (N,), in nats, and `.kl_per_unit` (N, L).
        """
        drawn = self.draw(x, num_samples, eps, generator, validate)
        log_likelihood, kl, by_unit, *_ = drawn.terms  # and not `_replace`, at which the compiler of torch 2.11 stops
        return ElboTerms(log_likelihood, kl, by_unit, self.penalty(x, drawn))

    def penalty(self, x: Tensor, draw: Draw) -> Tensor | None:
        """A further term of the loss, (N,) or one number, for a class of your own to define: `fit` adds it, no estimate does."""
        return None

    def report(self) -> dict[str, float]:
        """Further columns of the history, for a class of your own to define: `fit` asks at the end of each epoch."""
        return {}

    def log_weights(
        self,
        x: Tensor,
        num_samples: int = 1,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        validate: bool = True,
    ) -> Tensor:
        """log p(x, z_k) - log q(z_k given x) for z_1..z_K from q(z given x): (K, N), nats. eq. log-weights

        Parameters are those of `elbo`.
        """
        return self.draw(x, num_samples, eps, generator, validate).log_weights

    def importance_weighted_bound(
        self,
        x: Tensor,
        num_samples: int,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        validate: bool = True,
    ) -> Tensor:
        """The bound with K = num_samples draws: (N,), nats. eq. importance-weighted-bound"""
        return importance_weighted_bound(self.log_weights(x, num_samples, eps, generator, validate))

    def check_input(self, x: Tensor, validate: bool) -> None:
        """ValueError unless x has the model's shape, dtype and device and, with `validate`, values of the likelihood's range."""
        check_observation("x", x, self.image_shape)
        weight = next(self.encoder.parameters(), x)
        if (x.dtype, x.device) != (weight.dtype, weight.device):
            expected = f"{weight.dtype} on {weight.device} as the encoder's weights{help_at('other-device')}"
            raise ValueError(f"x: got {x.dtype} on {x.device}, expected {expected}")
        if validate:
            self.likelihood.check_values(x)

    def check_code(self, z: Tensor, argument: str = "z") -> None:
        """ValueError unless z has shape (N, L)."""
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"{argument}: got {describe(z)}, expected shape (N, {self.latent_dim})")

    def noise_for(self, x: Tensor, num_samples: int, eps: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """`eps` after a check of its shape, or new noise (K, N, L)."""
        shape = (check_int("num_samples", num_samples), len(x), self.latent_dim)
        if eps is None:
            return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        if eps.shape != shape:
            raise ValueError(f"eps: got {describe(eps)}, expected shape {shape}, (num_samples, N, latent_dim)")
        return eps


def register_model(name: str) -> Callable[[Callable[P, M]], Callable[P, M]]:
    """A decorator for a function that builds a `VAE`: its arguments become the model's config, from which `load` builds it again.

    Arguments are what JSON can hold, and likelihoods; sequences come back as lists.

    Raises:
        ValueError: If another function has the name.
    """

    def register(build: Callable[P, M]) -> Callable[P, M]:
        signature = inspect.signature(build)

        @functools.wraps(build)
        def built(*args: P.args, **kwargs: P.kwargs) -> M:
            model = build(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            model.config = {"model": name} | {key: as_config(value) for key, value in given.arguments.items()}
            if "likelihood" in given.arguments:
                model.config["likelihood"] = model.likelihood.config
            return model

        if (known := MODELS.get(name, built)).__qualname__ != built.__qualname__:  # the same one again: a cell that was run twice
            raise ValueError(f"name: got {name!r}, which is {known.__qualname__}, expected a name that no model has")
        MODELS[name] = built
        return built

    return register


def as_config(value: Any) -> Any:
    """The same as JSON gives it back: sequences as lists, numbers as Python's own; a likelihood as its config."""
    if isinstance(value, Likelihood):
        return value.config
    sequence = isinstance(value, Sequence) and not isinstance(value, str)
    return [as_config(entry) for entry in value] if sequence else plain(value)


def check_hidden_dims(value: Sequence[int]) -> tuple[int, ...]:
    """`value` as a tuple; the networks check its sizes."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"hidden_dims: got {describe(value)}, expected a sequence of integers such as (400,)")
    return tuple(value)


@register_model("mlp")
def mlp_vae(
    image_shape: Sequence[int] = (1, 28, 28),
    hidden_dims: Sequence[int] = (400,),
    latent_dim: int = 20,
    likelihood: str | dict[str, Any] | Likelihood = "bernoulli",
    activation: str = "relu",
) -> VAE:
    """A VAE of fully connected layers; the decoder mirrors the encoder.

    Args:
        image_shape: (C, H, W).
        hidden_dims: sizes of the encoder's hidden layers; () makes encoder and decoder linear.
        latent_dim: size of z.
        likelihood: a name, a config or a `Likelihood`.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"gelu"`` or ``"silu"``.

    Example:
        >>> import vaelib
        >>> model = vaelib.mlp_vae((1, 28, 28), hidden_dims=(32,), latent_dim=2)
        >>> x = model.likelihood.observe(vaelib.load_images("digits", "test").pixels)
        >>> model.elbo(x).kl.shape
        torch.Size([297])
    """
    likelihood, hidden_dims = make_likelihood(likelihood), check_hidden_dims(hidden_dims)
    encoder = MLPEncoder(image_shape, hidden_dims, latent_dim, activation)
    decoder = MLPDecoder(latent_dim, hidden_dims[::-1], image_shape, likelihood.param_channels(image_shape[0]), activation)
    return VAE(encoder, decoder, likelihood, image_shape, latent_dim)


@register_model("conv")
def conv_vae(
    image_shape: Sequence[int] = (3, 32, 32),
    latent_dim: int | Sequence[int] = 128,
    likelihood: str | dict[str, Any] | Likelihood = "discretized_logistic",
    channels: Sequence[int] = (32, 64, 128),
    residual_blocks: int = 0,
    activation: str = "gelu",
) -> VAE:
    """A VAE of strided convolutions; the decoder mirrors the encoder.

    Args:
        image_shape: (C, H, W), sides of at least 2 to the number of stages.
        latent_dim: size of z, or (channels, height, width) such as (64, 8, 8) for latents laid out in space; the image's sides,
            halved and rounded down at most once per stage, must come to that height and width.
        likelihood: a name, a config or a `Likelihood`.
        channels: of each of the encoder's stages.
        residual_blocks: residual blocks at each stage, in the encoder and in the decoder.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"gelu"`` or ``"silu"``.

    Example:
        >>> import vaelib
        >>> model = vaelib.conv_vae((3, 32, 32), latent_dim=16, channels=(8, 16))
        >>> model.encode(model.likelihood.observe(vaelib.load_images("shapes", "test").pixels[:5])).mean.shape
        torch.Size([5, 16])
    """
    likelihood = make_likelihood(likelihood)
    image_shape, channels = check_image_shape("image_shape", image_shape), check_channels(channels)
    encoder = ConvEncoder(image_shape, channels, latent_dim, residual_blocks, activation)
    param_channels = likelihood.param_channels(image_shape[0])
    decoder = ConvDecoder(latent_dim, channels[::-1], image_shape, param_channels, residual_blocks, activation)
    return VAE(encoder, decoder, likelihood, image_shape, latent_dim)
