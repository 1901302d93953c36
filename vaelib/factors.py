"""What a latent dimension says of the factors that generated an image: mutual information, and the gap that judges a code by it.

Every number here needs the true factors of each image, which a set of photographs does not have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vaelib._validation import check_int, check_seed, describe
from vaelib.data import ImageSet
from vaelib.priors import posterior_samples
from vaelib.vae import VAE


class FactorScores(NamedTuple):
    """What `mutual_information_gap` gives, on the CPU and in float64.

    Attributes:
        gap: the mean of `per_factor`: 1 where each factor has a latent dimension of its own that tells all of it, 0 where none has.
        per_factor: the gap of each factor, (F,).
        information: mutual information of each latent dimension and each factor, corrected for chance, (L, F), nats.
        chance: what was corrected for: the mutual information that is counted where the factors are shuffled, (L, F), nats.
        entropy: of each factor, (F,), nats.
    """

    gap: float
    per_factor: Tensor
    information: Tensor
    chance: Tensor
    entropy: Tensor


def mutual_information_gap(codes: Tensor, factors: Tensor, bins: int = 20, shuffles: int = 20, seed: int = 0) -> FactorScores:
    """How far, for each factor, the latent dimension that tells most of it is ahead of the next one. eq. mig

    The gap of a factor is a difference of two mutual informations over the factor's entropy (Chen et al. 2018, section 4). Here all
    are of counts. A column with more than `bins` distinct values, of codes or of factors, is cut into `bins` intervals that hold
    equally many images, so that only its order matters; of another one each value is a bin. The code of the set is then N draws of
    the aggregate posterior, whose entropy, and whose information, are that of the bins: cutting loses information and adds none.

    Counts of N images find information where there is none, about (bins - 1)**2 / 2N nats. That shrinks the gap of a good code, since
    only the second of the two is small enough to be raised. What shuffled factors show is therefore taken off on a scale that keeps
    complete dependence: I' = (I - C) H / (H - C), where C is the mean over `shuffles` and H the lower of the two entropies, the most
    that I can be. It is the adjusted mutual information of Vinh et al. 2010 in nats; it may come out a little below 0.

    Args:
        codes: (N, L) numbers, L >= 2; for a VAE one draw of q(z given x) for each image, see `sampled_codes`, as Chen et al. have it.
            Posterior means would do a different thing: of a unit whose q is the prior, the order of the means may still tell the
            image, though no draw of it does.
        factors: (N, F) numbers that generated the images, such as `ImageSet.factors`.
        bins: of a column with many values. N must be at least bins**2.
        shuffles: of the images of the factors, for the chance.
        seed: of the shuffles.

    Raises:
        ValueError: For codes or factors that are no finite numbers (N, L) and (N, F) of the same images, fewer than two latent
            dimensions, too few images, or a factor that never changes.

    Example:
        >>> import torch, vaelib.factors
        >>> factors = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> turned = factors @ torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> [round(vaelib.factors.mutual_information_gap(codes, factors).gap, 2) for codes in (factors, turned)]
        [1.0, 0.0]
    """
    codes, factors = check_columns("codes", codes, 2), check_columns("factors", factors, 1)
    bins, shuffles = check_int("bins", bins, minimum=2), check_int("shuffles", shuffles)
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    if len(codes) != len(factors):
        raise ValueError(f"codes, factors: got {len(codes)} and {len(factors)} rows, expected one of each for every image")
    if len(codes) < bins**2:
        raise ValueError(f"codes: got {len(codes)} rows, expected at least bins**2 = {bins**2}; take fewer bins")
    a, b = binned(codes, bins), binned(factors, bins)  # (L, N), (F, N)
    counts = joint_counts(a, b, bins)  # (L, F, bins, bins)
    entropy = entropy_of(counts[0].sum(1))  # (F,)
    if bool((entropy == 0).any()):
        constant = torch.nonzero(entropy == 0).flatten().tolist()
        raise ValueError(f"factors: got column {constant[0]} with one value for all images, expected a factor that changes")
    orders = [torch.randperm(len(codes), generator=generator, device="cpu") for _ in range(shuffles)]
    chance = torch.stack([information_of(joint_counts(a, b[:, order], bins)) for order in orders]).mean(0)
    most = torch.minimum(entropy_of(counts[:, 0].sum(2))[:, None], entropy)  # (L, F)
    scale = torch.where(most - chance > 1e-9, most / (most - chance), 0)  # a latent dimension that is constant tells nothing
    information = (information_of(counts) - chance) * scale
    first, second = information.topk(2, dim=0).values
    per_factor = (first - second) / entropy
    return FactorScores(per_factor.mean().item(), per_factor, information, chance, entropy)


def sampled_codes(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """One draw of q(z given x) for each image: (N, latent_dim), on the CPU; an image has the same draw in every set and order.

    They are those of `vaelib.priors.posterior_samples`: of a model with several layers of latents, drawn from the top down.

    Raises:
        ValueError: For images that are not the model's.
    """
    return posterior_samples(model, images, batch_size, seed)


def check_columns(argument: str, value: Tensor, fewest: int) -> Tensor:
    """`value` on the CPU and in float64 if it is a table (N, columns) of finite real numbers with at least `fewest` columns."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.is_complex():
        raise ValueError(f"{argument}: got {describe(value)}, expected a tensor of real numbers, one row for each image")
    if value.shape[1] < fewest:
        least = "one column" if fewest == 1 else f"{fewest} columns: the gap is that between two of them"
        raise ValueError(f"{argument}: got {describe(value)}, expected at least {least}")
    value = value.detach().cpu().double()
    if not bool(value.isfinite().all()):
        raise ValueError(f"{argument}: got NaN or infinite values, expected finite numbers")
    return value


def binned(values: Tensor, bins: int) -> Tensor:
    """The bin of each number of each column: (N, columns) -> int64 (columns, N). Equal numbers share a bin."""

    def cut(column: Tensor) -> Tensor:
        place: Tensor
        counts: Tensor
        _, place, counts = column.unique(return_inverse=True, return_counts=True)
        if len(counts) <= bins:
            return place
        twice_rank = 2 * counts.cumsum(0) - counts  # of each value, in the middle of its ties: 1, 3, 5, ... where there are none
        of_value: Tensor = bins * twice_rank // (2 * len(column))
        return of_value[place]

    return torch.stack([cut(column) for column in values.T])


def joint_counts(a: Tensor, b: Tensor, bins: int) -> Tensor:
    """How many images lie in each pair of bins: (L, N), (F, N) -> (L, F, bins, bins)."""
    pair = torch.arange(len(a) * len(b), device="cpu").view(len(a), len(b), 1)
    cells = (pair * bins + a[:, None]) * bins + b  # (L, F, N)
    return cells.flatten().bincount(minlength=len(a) * len(b) * bins**2).view(len(a), len(b), bins, bins)


def entropy_of(counts: Tensor) -> Tensor:
    """The entropy of counts over their last axis, nats."""
    share = counts.double() / counts.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    return entropy


def information_of(counts: Tensor) -> Tensor:
    """Mutual information of tables of counts (..., B, B): H(a) + H(b) - H(a, b), nats."""
    return entropy_of(counts.sum(-1)) + entropy_of(counts.sum(-2)) - entropy_of(counts.flatten(-2))
