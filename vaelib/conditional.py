"""The conditional VAE: for each label y a VAE of p(x given y), all of them sharing their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vaelib._validation import check_image_shape, check_int, describe, plain
from vaelib.densities import Posterior
from vaelib.likelihoods import Likelihood, make_likelihood
from vaelib.networks import MLPDecoder, MLPEncoder
from vaelib.vae import VAE, check_hidden_dims, register_model


class ConditionalVAE(VAE):
    """p(x, z given y) = N(z; 0, I) p(x given z, y), with the amortized posterior q(z given x, y); y is the label of x.

    `given(labels)` is the VAE of p(x given y), so all that is written for a VAE holds for it: `generate(model.given(3), 64)`.
    `fit` takes the labels from its `ImageSet`; so do `heldout_elbo` and the functions of `vaelib.evaluation`, but only for a model
    that is not bound: a bound one keeps its own. The bounds are then on log p(x given y).
    Sohn, Lee and Yan 2015; Kingma et al. 2014 (semi-supervised learning), model M2 with every label observed.

    Args:
        encoder: module from x (N, C, H, W) and y (N, num_classes), one-hot, to (mean, log_var), each (N, L).
        decoder: module from z (N, L) and y (N, num_classes), one-hot, to the likelihood's params (N, P*C, H, W).
        likelihood, image_shape, latent_dim, config: as in `VAE`.
        num_classes: how many labels there are, at least 2; a label is an integer from 0 to num_classes - 1.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        image_shape: Sequence[int],
        latent_dim: int | Sequence[int],
        num_classes: int,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, decoder, likelihood, image_shape, latent_dim, config)
        self.num_classes = check_int("num_classes", num_classes, minimum=2)

    def given(self, labels: int | Tensor | None, validate: bool = True) -> BoundVAE:
        """The VAE of p(x given y): networks, likelihood and prior are this model's. It has no config: save the model itself.

        Args:
            labels: one label for all images, or an int64 tensor (N,) with that of each image. K draws of z for each image meet the
                labels K times over, so the decoder takes codes (K*N, L) in the order of `VAE.elbo`.
            validate: whether the labels are checked; without it a tensor is taken as it is.

        Raises:
            ValueError: For no labels, for labels of another dtype or shape, or outside 0..num_classes - 1.
        """
        return BoundVAE(self, self.check_labels(labels) if validate or not isinstance(labels, Tensor) else labels)

    def check_labels(self, labels: int | Tensor | None) -> Tensor:
        """The labels as an int64 tensor (N,); ValueError unless all are labels of this model."""
        if labels is None:
            raise ValueError("model: got a conditional VAE, expected model.given(labels), or an ImageSet with labels to work on")
        labels = plain(labels)
        single = isinstance(labels, int) and not isinstance(labels, bool)
        if not single and not (isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.dim() == 1 and len(labels)):
            raise ValueError(f"labels: got {describe(labels)}, expected an integer or an int64 tensor of shape (N,)")
        low, high = (labels, labels) if isinstance(labels, int) else (int(labels.min()), int(labels.max()))
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels: got {low if low < 0 else high}, expected labels from 0 to {self.num_classes - 1}")
        return torch.tensor([labels], device="cpu") if isinstance(labels, int) else labels

    def encode(self, x: Tensor, validate: bool = True) -> Posterior:
        """ValueError: only a model that is bound to labels encodes."""
        return self.given(None).encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """ValueError: only a model that is bound to labels decodes."""
        return self.given(None).decode(z)


class BoundVAE(VAE):
    """The VAE of p(x given y) for given labels, see `ConditionalVAE.given`.

    Attributes:
        labels: (N,), or one for all images, (1,).
    """

    def __init__(self, model: ConditionalVAE, labels: Tensor) -> None:
        encoder = GivenLabels(model.encoder, labels, model.num_classes, "images")
        decoder = GivenLabels(model.decoder, labels, model.num_classes, "codes")
        latent = model.latent_dim if len(model.latent_shape) == 1 else model.latent_shape
        super().__init__(encoder, decoder, model.likelihood, model.image_shape, latent, prior=model.prior)
        self.labels = labels


class GivenLabels(nn.Module):
    """A network of values and their one-hot labels, for labels that are known: (K*N, ...) -> its output."""

    def __init__(self, network: nn.Module, labels: Tensor, num_classes: int, name: str) -> None:
        super().__init__()
        self.network, self.labels, self.num_classes, self.name = network, labels, num_classes, name

    def forward(self, values: Tensor) -> Any:
        count, wanted = len(self.labels), len(values)
        if count > 1 and (wanted % count if self.name == "codes" else wanted != count):
            raise ValueError(f"labels: got {count} labels for {wanted} {self.name}, expected one label, or one for each image")
        classes = torch.arange(self.num_classes, device=values.device)
        one_hot = self.labels.to(values.device)[:, None] == classes  # not F.one_hot, which may wait for the device
        return self.network(values, one_hot.to(values.dtype).repeat(wanted // count, 1))


class WithLabels(nn.Module):
    """A network of one vector, given that vector with the one-hot label behind it: (N, ...), (N, num_classes) -> its output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, values: Tensor, one_hot: Tensor) -> Any:
        return self.network(torch.cat([values.flatten(1), one_hot], dim=1))


@register_model("conditional")
def conditional_vae(
    image_shape: Sequence[int],
    num_classes: int,
    hidden_dims: Sequence[int] = (400,),
    latent_dim: int = 20,
    likelihood: str | dict[str, Any] | Likelihood = "bernoulli",
    activation: str = "relu",
) -> ConditionalVAE:
    """A conditional VAE of fully connected layers: `mlp_vae` whose encoder and decoder see the one-hot label beside x and z.

    Args:
        image_shape: (C, H, W).
        num_classes: how many labels there are, at least 2.
        hidden_dims, latent_dim, likelihood, activation: as in `mlp_vae`.
    """
    likelihood, hidden_dims = make_likelihood(likelihood), check_hidden_dims(hidden_dims)
    image_shape, labels = check_image_shape("image_shape", image_shape), check_int("num_classes", num_classes, minimum=2)
    latent_dim, param_channels = check_int("latent_dim", latent_dim), likelihood.param_channels(image_shape[0])
    encoder = MLPEncoder((1, 1, math.prod(image_shape) + labels), hidden_dims, latent_dim, activation)
    decoder = MLPDecoder(latent_dim + labels, hidden_dims[::-1], image_shape, param_channels, activation)
    return ConditionalVAE(WithLabels(encoder), WithLabels(decoder), likelihood, image_shape, latent_dim, num_classes)
