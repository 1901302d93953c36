"""How good samples are without a likelihood: features of a small classifier, distances between sets of features, memorized images.

The scores compare sets, not models: each depends on the features, on the number of images and on the real images that are taken.
Compare only numbers for which these three agree. They also answer to contrast: the same samples with their logits doubled have another
distance, precision and recall. A VAE's decoded means are softer than any image, so compare binary draws of them with binarized images,
or threshold both sides, which no change of contrast moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib._validation import check_int, check_pixels, describe
from vaelib.data import ImageSet
from vaelib.heldout import evaluating
from vaelib.retrieval import Neighbours, nearest_neighbours

FEATURES_FILE = "mnist-features.safetensors"


class FeatureNet(nn.Module):
    """A small convolutional classifier of ten classes of (1, 28, 28) images; the 64 numbers that its last layer reads are features."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in ((1, 16), (16, 32)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.hidden = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 64))
        self.head = nn.Linear(64, 10)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 1, 28, 28) ``uint8`` -> (N, 64) float32, not below 0."""
        pixels = check_pixels("pixels", pixels, (1, 28, 28))
        return F.relu(self.hidden(pixels.to(self.head.weight.device).float() / 255))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 1, 28, 28) ``uint8`` -> the logits of the classes, (N, 10)."""
        logits: Tensor = self.head(self.features(pixels))
        return logits


def mnist_features() -> FeatureNet:
    """The net that `book/_scripts/features.py` trained on MNIST, as vaelib ships it: no download."""
    net = FeatureNet()
    weights = safetensors.torch.load((resources.files("vaelib") / "assets" / FEATURES_FILE).read_bytes())
    net.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return net.eval().to(memory_format=torch.channels_last)  # twice as fast on a CPU


def features_of(net: nn.Module, images: ImageSet | Tensor, batch_size: int = 100) -> Tensor:
    """`net.features` of every image, in chunks (of which 100 stay in a CPU's cache) and without a graph: (N, D) float32, on the CPU."""
    pixels = check_pixels("images", images)
    with evaluating(net):
        chunks = pixels.split(check_int("batch_size", batch_size))
        return torch.cat([net.features(chunk).cpu() for chunk in chunks])  # type: ignore[operator]


def check_features(**sets: Tensor) -> list[Tensor]:
    """Each set of features in float64 on the CPU; ValueError unless it is (N, D), of one D, with N >= 2 and finite numbers."""
    for name, value in sets.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 2 or len(value) < 2:
            raise ValueError(f"{name}: got {describe(value)}, expected a floating-point tensor (N, D) with N of at least 2")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: got NaN or infinite features, expected finite numbers")
    if len({value.shape[1] for value in sets.values()}) > 1:
        widths = ", ".join(str(value.shape[1]) for value in sets.values())
        raise ValueError(f"{', '.join(sets)}: got features of {widths} dimensions, expected equal numbers")
    return [value.detach().cpu().double() for value in sets.values()]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of two sets of features, (N, D) and (M, D).

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``; Heusel et al. 2017, eq. frechet-distance. On Inception's features this is the
    FID. The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2), so that singular covariances need no
    regularization. The estimate is biased upwards, the more the smaller the sets: take the same number of images throughout, and many
    more than D.

    Raises:
        ValueError: Unless the features are finite, of one D, and at least two in each set.
    """
    a, b = check_features(a=a, b=b)
    covariances = [torch.cov(x.T).view(x.shape[1], x.shape[1]) for x in (a, b)]
    roots = []
    for values, vectors in map(torch.linalg.eigh, covariances):
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    trace = sum(c.trace() for c in covariances) - 2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    squared: float = ((a.mean(0) - b.mean(0)).square().sum() + trace).item()
    return max(0.0, squared)


class ManifoldScores(NamedTuple):
    """What `manifold_scores` gives: fidelity in `precision` and `density`, diversity in `recall` and `coverage`."""

    precision: float
    recall: float
    density: float
    coverage: float


def distance_rows(a: Tensor, b: Tensor, block: int) -> Iterator[Tensor]:
    """Squared distances of `block` rows of a at a time to all of b, where no row is longer than 1: (block, M), in steps of 2**-30.

    The steps are far above the rounding of the matrix product: equal distances stay equal, whatever the block.
    """
    norms = b.square().sum(1)
    for rows in a.split(block):
        squared = torch.addmm(norms, rows, b.T, alpha=-2).add_(rows.square().sum(1, keepdim=True))
        yield squared.mul_(2**30).round_()


def manifold_scores(real: Tensor, fake: Tensor, k: int = 5, block: int = 1000) -> ManifoldScores:
    """Precision, recall, density and coverage of fake features (M, D) against real ones (N, D).

    A ball around each feature reaches to its k-th nearest neighbour in its own set. Precision is the share of fake features in some
    real ball, recall the share of real ones in some fake ball (Kynkaanniemi et al. 2019, eq. precision-recall). Density is the mean
    number of real balls around a fake feature, divided by k: it may exceed 1. Coverage is the share of real balls that hold a fake
    feature (Naeem et al. 2020, eq. density-coverage). A ball holds its edge, as in both papers.

    Args:
        k: which neighbour.
        block: features compared at once; memory is block * (N + M) numbers, the result does not depend on it.

    Raises:
        ValueError: For bad features, or k not below the number of features of each set.
    """
    real, fake = check_features(real=real, fake=fake)
    block = check_int("block", block)
    if check_int("k", k) >= min(len(real), len(fake)):
        raise ValueError(f"k: got {k}, expected less than the number of features, {min(len(real), len(fake))} in the smaller set")
    centre = real.mean(0)
    longest = torch.cat([real, fake]).sub(centre).norm(dim=1).max().clamp(min=torch.finfo(real.dtype).tiny)
    real, fake = (real - centre) / longest, (fake - centre) / longest
    radius, fake_radius = (
        torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in distance_rows(x, x, block)]) for x in (real, fake)
    )
    inside, within = 0, 0  # fake features in some real ball; pairs of a fake feature and a real ball that holds it
    covered, recalled = torch.zeros(2, len(real), dtype=torch.bool, device="cpu")
    for distance, own in zip(distance_rows(fake, real, block), fake_radius.split(block), strict=True):
        held = distance <= radius
        inside, within = inside + int(held.any(1).sum()), within + int(held.sum())
        covered |= held.any(0)
        recalled |= (distance <= own[:, None]).any(0)
    density = within / (k * len(fake))
    return ManifoldScores(inside / len(fake), recalled.double().mean().item(), density, covered.double().mean().item())


def nearest_training_images(fake: ImageSet | Tensor, train: ImageSet | Tensor, k: int = 1, block: int = 100) -> Neighbours:
    """The k training images nearest to each generated one: `.indices` and `.distances`, each (M, k); see `nearest_neighbours`.

    The distance is Euclidean over pixels on their scale 0..255. Distances far below those of held-out images are a sign of memorized
    training images; ordinary ones rule out exact copies only, since a shifted copy is far away. Memory: the images in float32.
    """
    train = check_pixels("train", train)
    fake = check_pixels("fake", fake, train.shape[1:])
    scale = 2.0 ** math.ceil(math.log2(255 * math.sqrt(train[0].numel())))  # a power of 2: exact, and no image is longer than 1
    found = nearest_neighbours(fake.flatten(1) / scale, train.flatten(1) / scale, k, block=block)
    return Neighbours(found.indices, found.distances * scale)


def inception_fid(real: ImageSet | Tensor, fake: ImageSet | Tensor, batch_size: int = 100) -> float:
    """The FID on Inception-v3's 2048 features, computed by torchmetrics; grey images are given as RGB. Heusel et al. 2017.

    It needs ``pip install torchmetrics[image] torch-fidelity`` and downloads the network's weights at its first use. Inception was
    trained on photographs of 299x299 pixels; for digits `frechet_distance` on `mnist_features` says more.

    Raises:
        ValueError: If the packages are not installed or the weights are not to be had, or for bad images.
    """
    sets = [check_pixels(name, images) for name, images in (("real", real), ("fake", fake))]
    for name, pixels in zip(("real", "fake"), sets, strict=True):
        if pixels.shape[1] not in (1, 3) or len(pixels) < 2:
            raise ValueError(f"{name}: got {describe(pixels)}, expected at least two images with 1 or 3 channels")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=2048)
    except (ImportError, OSError, RuntimeError) as error:
        needs = "torchmetrics[image] and torch-fidelity installed, and the weights of Inception, which they download"
        raise ValueError(f"inception_fid: needs {needs} ({' '.join(str(error).split())})") from error
    for pixels, is_real in zip(sets, (True, False), strict=True):
        for chunk in pixels.split(check_int("batch_size", batch_size)):
            metric.to(chunk.device).update(chunk.expand(-1, 3, -1, -1), real=is_real)
    return metric.compute().item()
