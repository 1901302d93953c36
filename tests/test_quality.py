"""Scores of samples: each against an answer found in another way."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import vaelib
from vaelib.quality import (
    FEATURES_FILE,
    FeatureNet,
    ManifoldScores,
    features_of,
    frechet_distance,
    inception_fid,
    manifold_scores,
    mnist_features,
    nearest_training_images,
)

ROOT = Path(__file__).parent.parent
ASSET = ROOT / "vaelib" / "assets" / FEATURES_FILE


@pytest.fixture(scope="module")
def net():
    return mnist_features()


def with_moments(count, mean, covariance, seed):
    """`count` points whose sample mean and covariance are exactly those given."""
    x = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def naive_scores(real, fake, k):
    """Precision, recall, density and coverage by loops over exact integers."""

    def squared(a, b):
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    def radii(points):
        return [sorted(squared(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    real_radii, fake_radii = radii(real), radii(fake)
    balls = [[squared(f, r) <= radius for r, radius in zip(real, real_radii, strict=True)] for f in fake]
    return (
        sum(map(any, balls)) / len(fake),
        sum(any(squared(f, r) <= radius for f, radius in zip(fake, fake_radii, strict=True)) for r in real) / len(real),
        sum(map(sum, balls)) / (k * len(fake)),
        sum(any(ball[i] for ball in balls) for i in range(len(real))) / len(real),
    )


def test_the_shipped_net_reads_digits_it_has_not_seen(net):
    digits = vaelib.load_images("digits", "test")  # another set than MNIST, and enlarged from 8x8
    with torch.no_grad():
        right = (net(digits.pixels).argmax(1) == digits.labels).double().mean().item()
    assert right > 0.8
    assert not net.training
    assert ASSET.stat().st_size < 250_000


def test_the_shipped_net_is_the_one_on_record():
    with safe_open(ASSET, "pt") as file:
        about = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    record = json.loads((ROOT / "results" / "mnist-features.json").read_text())
    assert float(about["test_accuracy"]) == record["metrics"]["test"]["accuracy"] >= 0.99
    assert int(about["seed"]) == record["seed"]
    assert about["command"] == record["command"]


@pytest.mark.real_data
def test_the_shipped_net_has_the_accuracy_on_record(net, real_data):
    test = real_data("mnist", "test")
    with torch.no_grad():
        right = sum((net(p).argmax(1) == y).sum() for p, y in zip(test.pixels.split(1000), test.labels.split(1000), strict=True))
    record = json.loads((ROOT / "results" / "mnist-features.json").read_text())["metrics"]["test"]
    assert abs(right.item() - record["accuracy"] * 10000) <= 2  # a logit may tie to the last bit on another machine


def test_features_are_what_the_last_layer_reads_whatever_the_batch(net, digits):
    features = features_of(net, digits[:50])
    assert features.shape == (50, 64)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features_of(net, digits.pixels[:50], batch_size=7), features, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net.head(features), net(digits.pixels[:50]), rtol=1e-5, atol=1e-5)
    fresh = FeatureNet().train()
    assert not features_of(fresh, digits[:3]).requires_grad
    assert fresh.training


@pytest.mark.equation("frechet-distance")
def test_the_distance_of_gaussians_with_commuting_covariances_is_the_closed_form():
    axes = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    s, t = torch.arange(1, 7).double(), torch.tensor([3, 0.5, 2, 1, 4, 0.1]).double()  # standard deviations along the axes
    mean_a, mean_b = torch.zeros(6).double(), torch.arange(6).double()
    a = with_moments(50, mean_a, axes * s**2 @ axes.T, 2)
    b = with_moments(80, mean_b, axes * t**2 @ axes.T, 3)
    expected = (mean_a - mean_b).square().sum() + (s - t).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(a[:, :1], a[:, :1] + 3) == pytest.approx(9)  # one feature


def test_the_distance_agrees_with_the_matrix_square_root_of_scipy():
    import numpy as np
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 8, 8, generator=generator)
    a, b = (torch.randn(200, 8, generator=generator) @ m for m in mix)
    c, d = np.cov(a.T.double()), np.cov(b.T.double())
    expected = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item() + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_the_distance_of_a_set_to_itself_is_zero_even_where_its_covariance_is_singular():
    x = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))  # fewer points than dimensions
    scale = x.var(0).sum().item()
    assert frechet_distance(x, x.flip(0)) < 1e-6 * scale
    constant = torch.cat([x, torch.ones(20, 1)], dim=1)
    assert frechet_distance(constant, constant) < 1e-6 * scale
    assert frechet_distance(torch.ones(3, 2), torch.ones(4, 2)) == 0


def test_the_distance_on_features_rises_with_the_noise_in_the_images(net, digits):
    real, noise = digits.pixels[:700], torch.randint(0, 256, (700, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    distances = []
    for share in (0.0, 0.1, 0.3, 0.6):
        fake = ((1 - share) * digits.pixels[700:1400] + share * noise).to(torch.uint8)
        distances.append(frechet_distance(features_of(net, real), features_of(net, fake)))
    assert distances == sorted(distances)


def test_contrast_alone_moves_the_scores_of_grey_images_and_not_those_of_thresholded_ones(net, digits):
    real, fake = digits.pixels[:700], digits.pixels[700:1400]
    softer, crisper = ((255 * (c * torch.logit(fake / 255)).sigmoid()).round().to(torch.uint8) for c in (0.5, 4))

    def scores(pixels, change):
        a, b = features_of(net, change(real)), features_of(net, change(pixels))
        return frechet_distance(a, b), *manifold_scores(a, b)

    grey, grey_softer, grey_crisper = (scores(pixels, lambda p: p) for pixels in (fake, softer, crisper))
    assert min(grey_softer[0], grey_crisper[0]) > 3 * grey[0]  # the same strokes
    assert min(grey_softer[2], grey_crisper[2]) < grey[2] - 0.2  # recall
    black = [scores(pixels, lambda p: 255 * (p >= 128).to(torch.uint8)) for pixels in (fake, softer, crisper)]
    assert black[0] == black[1] == black[2]


def test_the_fid_of_torchmetrics_on_the_same_features_is_our_distance(net, digits, monkeypatch):
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Features(torch.nn.Module):
        num_features = 64

        def forward(self, pixels):
            assert pixels.shape[1:] == (3, 28, 28)
            return net.features(pixels[:, :1])

    metric = fid.FrechetInceptionDistance
    monkeypatch.setattr(fid, "FrechetInceptionDistance", lambda feature: metric(feature=Features()))
    real, fake = digits[:400], digits.pixels[400:900]
    ours = frechet_distance(features_of(net, real), features_of(net, fake))
    assert inception_fid(real, fake, batch_size=70) == pytest.approx(ours, rel=1e-6)  # torchmetrics gives it in float32


def test_a_missing_inception_is_a_clear_error(digits, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match="inception_fid: needs torchmetrics"):
        inception_fid(digits[:3], digits[:3])


def test_weights_of_inception_that_are_not_to_be_had_are_a_clear_error(digits, monkeypatch):
    fid = pytest.importorskip("torchmetrics.image.fid")

    def offline(feature):
        raise OSError("no route to host")

    monkeypatch.setattr(fid, "FrechetInceptionDistance", offline)
    with pytest.raises(ValueError, match=r"inception_fid: needs .* \(no route to host\)"):
        inception_fid(digits[:3], digits[:3])


@pytest.mark.equation("precision-recall")
@pytest.mark.equation("density-coverage")
def test_the_scores_of_points_on_a_line_are_those_counted_by_hand():
    real, fake = torch.tensor([[0.0], [1], [3], [10]]), torch.tensor([[0.5], [1.5], [30]])
    # k = 1: real balls [-1, 1], [0, 2], [1, 5], [3, 17]; fake balls [-0.5, 1.5], [0.5, 2.5], [1.5, 58.5]
    assert manifold_scores(real, fake, k=1) == ManifoldScores(precision=2 / 3, recall=1.0, density=4 / 3, coverage=3 / 4)


points = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=4, max_size=12)


@given(points, points, st.integers(1, 3))
def test_the_scores_are_those_of_loops_over_exact_distances_ties_and_duplicates_included(real, fake, k):
    scores = manifold_scores(torch.tensor(real).float(), torch.tensor(fake).float(), k, block=3)
    assert scores == pytest.approx(naive_scores(real, fake, k), abs=1e-12)


def test_the_scores_agree_with_the_package_of_their_authors():
    prdc = pytest.importorskip("prdc")
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(300, 5, generator=generator), 0.7 * torch.randn(200, 5, generator=generator) + 0.3
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    assert manifold_scores(real, fake)._asdict() == pytest.approx(expected, abs=1e-12)


def test_the_scores_depend_neither_on_the_block_nor_on_the_origin():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(-4, 5, (count, 3), generator=generator).float() for count in (150, 130))  # many ties
    whole = manifold_scores(real, fake, block=1000)
    for block in (1, 7, 64):
        assert manifold_scores(real, fake, block=block) == whole
    assert manifold_scores(real + 1000, fake + 1000) == whole
    assert manifold_scores(real, real)[:2] == (1, 1)


def test_too_little_variety_lowers_recall_and_coverage_and_leaves_precision():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(500, 4, generator=generator)
    collapsed = manifold_scores(real, 0.1 * torch.randn(500, 4, generator=generator))
    assert collapsed.precision == 1
    assert collapsed.recall < 0.1
    assert collapsed.coverage < 0.5
    outliers = manifold_scores(real, 10 * torch.randn(500, 4, generator=generator))
    assert outliers.precision < 0.1


def test_a_copied_training_image_is_found_and_its_distance_counts_pixels(digits):
    train = digits[:300]
    fake = train.pixels[[7, 250]].clone()
    fake[1, 0, 0, :4] += 3  # four black pixels of the margin: a distance of sqrt(4 * 3^2)
    fake = torch.cat([fake, digits.pixels[900:950]])
    found = nearest_training_images(fake, train, block=9)
    assert found.indices[:2, 0].tolist() == [7, 250]
    assert found.distances[:2, 0].tolist() == [0, 6]
    expected = torch.cdist(fake.flatten(1).double(), train.pixels.flatten(1).double()).min(1)
    assert torch.equal(found.indices[:, 0], expected.indices)
    torch.testing.assert_close(found.distances[:, 0].double(), expected.values, rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_refused(net, digits):
    x, bad = torch.randn(6, 3), torch.full((6, 3), math.nan)
    for call, message in [
        (lambda: frechet_distance(x, x[:, :2]), "a, b: got features of 3, 2 dimensions, expected equal numbers"),
        (lambda: frechet_distance(x[:1], x), "a: got a float32 tensor of shape"),
        (lambda: frechet_distance(x, x.long()), "b: got a int64 tensor"),
        (lambda: frechet_distance(x, bad), "b: got NaN or infinite features"),
        (lambda: manifold_scores(x, x[:4], k=4), "k: got 4, expected less than the number of features, 4 in the smaller set"),
        (lambda: manifold_scores(x, x, k=0), "k: got int 0"),
        (lambda: manifold_scores(x, x, block=0), "block: got int 0"),
        (lambda: features_of(net, digits.pixels[:, :, :14]), r"pixels: got images of shape \(1, 14, 28\), expected \(1, 28, 28\)"),
        (lambda: features_of(net, digits.pixels[:0]), "images: got an empty set"),
        (lambda: features_of(net, digits, batch_size=0), "batch_size: got int 0"),
        (lambda: inception_fid(digits.pixels[:3].expand(-1, 2, -1, -1), digits), "real: got a uint8 tensor"),
        (lambda: nearest_training_images(digits.pixels[..., :14], digits), r"fake: got images of shape \(1, 28, 14\)"),
        (lambda: nearest_training_images(digits, digits.pixels.float()), "train: got a float32 tensor"),
        (lambda: nearest_training_images(digits, digits[:3], k=4), "k: got 4, expected at most the 3"),
        (lambda: inception_fid(digits, digits[:1]), "fake: got a uint8 tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
