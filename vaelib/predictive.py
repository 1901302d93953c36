"""What a trained model predicts: hidden pixels from those that were seen, and data sets like the one that it was given."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelib._validation import check_choice, check_int, describe
from vaelib.conditional import BoundVAE
from vaelib.densities import Posterior
from vaelib.evaluation import check_normalized, refine_posterior
from vaelib.heldout import evaluating
from vaelib.likelihoods import Likelihood
from vaelib.objectives import effective_sample_size
from vaelib.vae import VAE


class SeenPixels(Likelihood):
    """p(x_o given z): the factors of the seen pixels alone. Every likelihood of the library is a product over pixels.

    Args:
        likelihood: of all pixels.
        observed: bool, (1, 1, H, W) or (N, 1, H, W): True where a pixel was seen.

    Raises:
        ValueError: Where there are several masks, by `observe`, `check_values` and `log_prob`, for another number of images.
    """

    values = None  # as of a density: bits/dim would divide by all pixels of the image

    def __init__(self, likelihood: Likelihood, observed: Tensor) -> None:
        super().__init__(name=f"seen pixels of {likelihood.config.get('name')}")
        self.likelihood, self.observed = likelihood, observed
        self.lowest, self.highest, self.normalized = likelihood.lowest, likelihood.highest, likelihood.normalized

    def param_channels(self, channels: int) -> int:
        return self.likelihood.param_channels(channels)

    def observe(self, pixels: Tensor, generator: torch.Generator | None = None, uniform: Tensor | None = None) -> Tensor:
        check_masks(self.observed, len(pixels))
        return self.likelihood.observe(pixels, generator, uniform)

    def to_pixels(self, x: Tensor) -> Tensor:
        return self.likelihood.to_pixels(x)

    def check_values(self, x: Tensor) -> None:
        check_masks(self.observed, len(x))
        self.likelihood.check_values(x)

    def by_pixel(self, x: Tensor, params: Tensor) -> Tensor:
        """log p of each pixel, its channels together, seen or not: (N, C, H, W), (N, P, H, W) -> (N, 1, H, W), nats."""
        n, _, height, width = x.shape
        values, of_params = (images.permute(0, 2, 3, 1).reshape(n * height * width, -1, 1, 1) for images in (x, params))
        return self.likelihood.log_prob(values, of_params, validate=False).view(n, 1, height, width)  # a pixel is an image of 1 x 1

    def log_prob(self, x: Tensor, params: Tensor, validate: bool = True) -> Tensor:
        """The sum over the seen pixels: (N,), nats. eq. seen-pixels"""
        self.check(x, params, validate)
        draws, rest = divmod(len(x), len(self.observed))  # several draws of z for each image
        if rest or not draws:
            check_masks(self.observed, len(x))
        return (self.by_pixel(x, params) * self.observed.to(x.device).repeat(draws, 1, 1, 1)).flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        return self.likelihood.mean(params)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.likelihood.sample(params, generator)


def check_masks(observed: Tensor, images: int) -> None:
    """ValueError unless there is one mask, or one for each of the images."""
    if len(observed) not in (1, images):
        raise ValueError(f"observed: got {len(observed)} masks, expected 1, or one for each of {images} images")


def check_observed(observed: Any, image_shape: tuple[int, ...]) -> Tensor:
    """`observed` if it is bool (N, 1, H, W) each mask sees a pixel and one hides one; else a ValueError."""
    shape = (1, *image_shape[1:])
    if not isinstance(observed, Tensor) or observed.dtype != torch.bool or observed.dim() != 4 or observed.shape[1:] != shape:
        raise ValueError(f"observed: got {describe(observed)}, expected bool of shape (N or 1, {', '.join(map(str, shape))})")
    if observed.all() or not observed.flatten(1).any(1).all():  # True of no mask at all too
        raise ValueError("observed: got a mask with every pixel seen, or with none, expected some of each")
    return observed


def check_labels(model: VAE, images: int = 1) -> None:
    """ValueError where the model is bound to several labels, and not one for each image."""
    if isinstance(model, BoundVAE) and len(model.labels) not in (1, images):
        expected = f"1, or one for each of {images} images" if images > 1 else "one label, that of all images"
        raise ValueError(f"model: got one with {len(model.labels)} labels, expected {expected}")


def seeing(model: VAE, observed: Tensor) -> VAE:
    """The VAE of the seen pixels, p(x_o) = integral of p(x_o given z) p(z): the same networks under `SeenPixels`. eq. seen-pixels

    It is of the model's class, so `log_likelihood`, `refine_posterior` and `annealed_log_likelihood` estimate log p(x_o) of it. Its
    encoder is the model's and reads all of x: what stands at the hidden pixels moves q, never the target.

    Args:
        model: of whole images; it is not changed.
        observed: bool, (1, 1, H, W), one mask for all images, or (N, 1, H, W), for N images that then come in one batch: True where a
            pixel was seen.

    Raises:
        ValueError: For an `observed` of another type or shape, or one that sees nothing or all.
    """
    seen = copy.copy(model)
    likelihood = SeenPixels(model.likelihood, check_observed(observed, model.image_shape))
    seen._modules = model._modules | {"likelihood": likelihood}  # a dict of its own: the model keeps its likelihood
    seen.config = None
    return seen


class Imputation(NamedTuple):
    """What `impute` finds for N images.

    Attributes:
        mean: E[x given the seen pixels], (N, C, H, W); seen pixels are as they were.
        draws: fillings from p(x_m given x_o), (S, N, C, H, W); seen pixels are as they were.
        log_seen: estimate of log p(x_o) of the seen pixels, (N,), nats; a lower bound in expectation.
        log_hidden: estimate of log p(x_m given x_o) of what the x that was given holds at the hidden pixels, (N,), nats. It is no
            bound, and is believed only where many draws count.
        effective_sample_size: how many of the draws count, (N,). eq. effective-sample-size
    """

    mean: Tensor
    draws: Tensor
    log_seen: Tensor
    log_hidden: Tensor
    effective_sample_size: Tensor


def fill_by_turns(model: VAE, x: Tensor, observed: Tensor, rounds: int, generator: torch.Generator | None = None) -> Tensor:
    """x with its hidden pixels drawn by turns: z given x, then the hidden pixels given z, `rounds` times, from a draw of the model.

    The chain of Rezende, Mohamed and Wierstra 2014. It would go to p(x_m given x_o) if q were the posterior.

    Raises:
        ValueError: As `impute`; 0 rounds give the first draw.
    """
    model.check_input(x, validate=True)
    check_masks(check_observed(observed, model.image_shape), len(x))
    check_labels(model, len(x))
    check_int("rounds", rounds, minimum=0)
    observed = observed.to(x.device)
    with evaluating(model):
        z = model.prior.sample(len(x), generator).to(x)
        for turn in range(rounds + 1):
            params = model.decode(z)
            x = torch.where(observed, x, model.likelihood.sample(params, generator).to(x))
            if turn < rounds:
                z = model.draw(x, 1, generator=generator, validate=False).z[0]
    return x


def impute(
    model: VAE,
    x: Tensor,
    observed: Tensor,
    num_samples: int = 1000,
    num_draws: int = 1,
    chains: int = 10,
    rounds: int = 3,
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> Imputation:
    """Fill in hidden pixels by importance resampling: p(x_m given x_o) is the mean of p(x_m given z) over p(z given x_o). eq. imputation

    Codes come from an even mixture of the prior and of `chains` Gaussians for each image. These start as the encoder's q at fillings
    by turns (`fill_by_turns`) and ascend the ELBO of the seen pixels (`refine_posterior` of `seeing`). The weight of a code is
    p(x_o given z) p(z) over the density of the whole mixture, so that a Gaussian that went astray costs draws and no more.

    Args:
        model: one with one diagonal Gaussian q(z given x) for each image; a conditional one is given one label for all images.
        x: (N, C, H, W), as `likelihood.observe` gives it. What it holds at hidden pixels enters `log_hidden` and nothing else.
        observed: bool, (1, 1, H, W) or (N, 1, H, W): True where a pixel was seen.
        num_samples: K, draws of z per image, more than `chains`; rounded up to a multiple of `chains` + 1.
        num_draws: S, fillings per image.
        chains: Gaussians per image.
        rounds: of each filling.
        steps: of the ascent; with 0 the proposals are the encoder's.
        generator: of all draws but those of the ascent, which belong to the filled image.

    Raises:
        ValueError: For a score that is no likelihood, another posterior or several labels, an x that is not the model's, an `observed`
            of another type or shape, or numbers that are too small.
    """
    model.check_input(x, validate=True)
    check_normalized(model)
    check_labels(model)  # each image is filled in by itself, with the same model
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: got {describe(x)}, expected float32 or float64, whose digits the weights need")
    check_masks(check_observed(observed, model.image_shape), len(x))
    if check_int("num_samples", num_samples) <= check_int("chains", chains):
        raise ValueError(f"num_samples: got {num_samples}, expected more than chains = {chains}")
    check_int("rounds", rounds), check_int("num_draws", num_draws), check_int("steps", steps, minimum=0)
    masks = observed.to(x.device).expand(len(x), -1, -1, -1)
    found = []
    for image, mask in zip(x.split(1), masks.split(1), strict=True):
        filled = fill_by_turns(model, image.expand(chains, -1, -1, -1), mask, rounds, generator)
        q = refine_posterior(seeing(model, mask), filled, steps, num_samples=1, validate=False)
        found.append(_resample(model, image, mask, q, num_samples, num_draws, generator))
    mean, draws, log_seen, log_hidden, size = zip(*found, strict=True)
    return Imputation(torch.cat(mean), torch.cat(draws, 1), torch.cat(log_seen), torch.cat(log_hidden), torch.cat(size))


def _resample(
    model: VAE,
    x: Tensor,
    mask: Tensor,
    q: Posterior,
    num_samples: int,
    num_draws: int,
    generator: torch.Generator | None,
) -> Imputation:
    """`impute` for one image (1, C, H, W), from codes of the mixture of the prior and the Gaussians `q`, (chains, L)."""
    with evaluating(model):
        parts = len(q.mean) + 1
        each = math.ceil(num_samples / parts)
        eps = torch.randn(each, *q.mean.shape, generator=generator, device=x.device, dtype=x.dtype)
        z = torch.cat([q.sample(eps).flatten(0, 1), model.prior.sample(each, generator).to(x)])  # (K, L)
        densities = torch.cat([q.log_prob(z[:, None]), model.prior.log_prob(z)[:, None]], 1)  # (K, parts)
        params = model.decode(z)
        by_pixel = SeenPixels(model.likelihood, mask).by_pixel(x.expand(len(z), -1, -1, -1), params)  # (K, 1, H, W)
        log_seen, log_hidden = ((by_pixel * where).flatten(1).sum(1) for where in (mask, ~mask))
        log_weights = log_seen + model.prior.log_prob(z) - (densities.logsumexp(1) - math.log(parts))
        weights, total = log_weights.softmax(0), log_weights.logsumexp(0)
        mean = torch.einsum("k,kchw->chw", weights, model.likelihood.mean(params).to(x.dtype))
        chosen = torch.multinomial(weights, num_draws, replacement=True, generator=generator)
        draws = model.likelihood.sample(params[chosen], generator).to(x.dtype)[:, None]  # (S, 1, C, H, W)
    return Imputation(
        torch.where(mask, x, mean),
        torch.where(mask, x, draws),
        (total - math.log(len(z)))[None],
        ((log_weights + log_hidden).logsumexp(0) - total)[None],
        effective_sample_size(log_weights[:, None]),
    )


def replicate(
    model: VAE, x: Tensor, num_replicates: int = 100, source: str = "posterior", generator: torch.Generator | None = None
) -> Tensor:
    """Data like `x` from the model: (N, C, H, W) -> (R, N, C, H, W), x given z given a z of their own.

    Args:
        model: the model.
        x: (N, C, H, W), as `likelihood.observe` gives it.
        num_replicates: R.
        source: ``"posterior"``, z from q(z given x): another picture of the same code; ``"prior"``, z from the prior: another picture.
        generator: of all draws.

    Raises:
        ValueError: For an x that is not the model's, labels that are not its own, a number below 1 or another source.
    """
    model.check_input(x, validate=True)
    check_labels(model, len(x))
    posterior = check_choice("source", source, ("posterior", "prior")) == "posterior"
    with evaluating(model):
        draws = torch.empty(check_int("num_replicates", num_replicates), *x.shape, dtype=x.dtype, device=x.device)
        for draw in draws:
            code = (
                model.draw(x, 1, generator=generator, validate=False).z[0] if posterior else model.prior.sample(len(x), generator)
            )
            draw.copy_(model.likelihood.sample(model.decode(code.to(x)), generator))
    return draws


def predictive_p_values(statistic: Tensor, replicated: Tensor) -> Tensor:
    """The share of replicates whose statistic is larger, ties counted half: (N,), (R, N) -> (N,). eq. predictive-p-value

    Gelman, Meng and Stern 1996. Near 0 or 1 the data are unlike what the model makes; even over [0, 1] only where the replicates do
    not know the data, as those of the prior: those of the posterior lie nearer to one half also for the true model.

    Raises:
        ValueError: If the shapes do not fit, the types differ, between which no tie is a tie, or a value is NaN.
    """
    for name, values in (("statistic", statistic), ("replicated", replicated)):
        if not isinstance(values, Tensor) or values.is_complex():
            raise ValueError(f"{name}: got {describe(values)}, expected a tensor of real numbers")
    if statistic.dtype != replicated.dtype or statistic.device != replicated.device:
        got = " and ".join(f"{values.dtype} on {values.device}" for values in (statistic, replicated))
        raise ValueError(f"statistic, replicated: got {got}, expected one type on one device")
    if statistic.dim() != 1 or replicated.dim() != 2 or replicated.shape[1:] != statistic.shape or 0 in replicated.shape:
        raise ValueError(
            f"statistic, replicated: got {describe(statistic)} and {describe(replicated)}, expected shapes (N,) and (R, N)"
        )
    for name, values in (("statistic", statistic), ("replicated", replicated)):
        if torch.isnan(values.double()).any():
            raise ValueError(f"{name}: got NaN, expected numbers")
    larger, equal = (replicated > statistic).double(), (replicated == statistic).double()
    return (larger + equal / 2).mean(0)
