"""The mutual information gap: each number against an answer found in another way."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

import vaelib
from vaelib.factors import binned, entropy_of, information_of, joint_counts, mutual_information_gap, sampled_codes
from vaelib.priors import posterior_samples

ROOT = Path(__file__).parent.parent
COUNT = 20000


@pytest.fixture
def factors():
    """Three independent factors, the last one of three kinds."""
    g = torch.Generator().manual_seed(0)
    return torch.stack([*torch.rand(2, COUNT, generator=g), torch.randint(0, 3, (COUNT,), generator=g).float()], 1)


def noise(count, columns, seed=1):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def correlated(correlation, count=COUNT):
    """Pairs of standard normals with this correlation: two tensors (count, 1)."""
    a, b = noise(count, 2, 2).split(1, 1)
    return a, correlation * a + math.sqrt(1 - correlation**2) * b


@pytest.mark.equation("mig")
def test_the_gap_is_the_difference_of_the_two_largest_informations_over_the_entropy(factors):
    codes = torch.cat([factors[:, :2] + 0.3 * noise(COUNT, 2), factors + 0.1 * noise(COUNT, 3, 3)], 1)
    found = mutual_information_gap(codes, factors)
    assert found.information.shape == found.chance.shape == (5, 3)
    for k in range(3):
        first, second = sorted(found.information[:, k].tolist(), reverse=True)[:2]
        assert found.per_factor[k].item() == pytest.approx((first - second) / found.entropy[k].item(), abs=1e-12)
    assert found.gap == pytest.approx(sum(found.per_factor.tolist()) / 3, abs=1e-12)
    assert found.entropy.tolist() == pytest.approx([math.log(20), math.log(20), math.log(3)], abs=1e-3)


@pytest.mark.parametrize("count", [400, 1000, 5120])
def test_informations_are_the_adjusted_ones_of_scikit_learn(factors, count):
    """Which takes the mean over all shuffles exactly, from the hypergeometric distribution, and divides by the lower entropy."""
    factors = factors[:count]
    codes = torch.cat([factors[:, :1] + 0.2 * noise(count, 1), factors[:, 2:] + noise(count, 1, 3), noise(count, 1, 4) > 1.0], 1)
    found = mutual_information_gap(codes, factors, shuffles=200)
    a, b = binned(codes.double(), 20), binned(factors.double(), 20)
    plain = information_of(joint_counts(a, b, 20))
    for i in range(3):
        for k in range(3):
            assert plain[i, k].item() == pytest.approx(mutual_info_score(a[i].numpy(), b[k].numpy()), abs=1e-12)
            adjusted = adjusted_mutual_info_score(a[i].numpy(), b[k].numpy(), average_method="min")
            most = min(entropy_of(a[i].bincount()).item(), entropy_of(b[k].bincount()).item())
            assert found.information[i, k].item() == pytest.approx(adjusted * most, abs=0.01)


@pytest.mark.parametrize("correlation", [0.3, 0.6, 0.9])
def test_the_information_of_two_gaussians_is_the_closed_form_less_what_bins_lose(correlation):
    a, b = correlated(correlation)
    exact = -0.5 * math.log(1 - correlation**2)
    found = mutual_information_gap(torch.cat([a, noise(COUNT, 1, 5)], 1), b).information
    assert 0.93 * exact < found[0, 0].item() < exact + 0.01
    assert abs(found[1, 0].item()) < 0.005


def test_the_information_of_a_kind_is_that_of_nearest_neighbours():
    kind = torch.randint(0, 3, (4000, 1), generator=torch.Generator().manual_seed(0))
    codes = torch.cat([kind + 0.7 * noise(4000, 1), noise(4000, 1, 3)], 1)
    found = mutual_information_gap(codes, kind).information[:, 0]
    nearest = mutual_info_classif(codes.numpy(), kind[:, 0].numpy(), random_state=0)  # no bins: Ross 2014
    assert found.tolist() == pytest.approx(nearest.tolist(), abs=0.03)


def test_a_code_that_is_the_factors_has_the_gap_1_in_every_order_sign_and_scale(factors):
    whole = mutual_information_gap(factors, factors)
    assert whole.per_factor.tolist() == pytest.approx([1, 1, 1], abs=0.01)
    changed = torch.cat([noise(COUNT, 1), -3 * factors[:, [2]] + 7, factors[:, [0]].exp(), -(factors[:, [1]] ** 3)], 1)
    found = mutual_information_gap(changed, factors)
    assert found.per_factor.tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert found.information.argmax(0).tolist() == [2, 3, 1]


def test_the_order_and_the_sign_of_latents_change_nothing(factors):
    codes = factors + 0.2 * noise(COUNT, 3)
    found, flipped = mutual_information_gap(codes, factors), mutual_information_gap(-codes[:, [2, 0, 1]], factors)
    assert flipped.gap == pytest.approx(found.gap, abs=1e-9)
    assert torch.allclose(flipped.information, found.information[[2, 0, 1]], atol=1e-9)


def test_a_turn_by_45_degrees_takes_the_gap_of_two_factors_and_leaves_the_third(factors):
    turned = torch.cat([factors[:, [0]] + factors[:, [1]], factors[:, [0]] - factors[:, [1]], factors[:, [2]]], 1)
    found = mutual_information_gap(turned, factors)
    assert found.information[:2, :2].min() > 0.3  # the two dimensions together still tell both factors
    assert found.per_factor.tolist() == pytest.approx([0, 0, 1], abs=0.02)


@pytest.mark.parametrize("count", [400, 1000, 5000])
def test_noise_has_no_information_and_no_gap_however_few_the_images(factors, count):
    gaps, informations = [], []
    for seed in range(20):
        found = mutual_information_gap(noise(count, 5, seed), factors[:count])
        gaps.append(found.gap)
        informations.append(found.information.mean().item())
    raw = found.chance[0, 0].item()
    assert raw == pytest.approx(19**2 / (2 * count), rel=0.3)  # what counts alone would have called information
    spread = torch.tensor(informations).std().item() / math.sqrt(20)
    assert abs(sum(informations) / 20) < 4 * spread + 1e-3
    assert 0 <= sum(gaps) / 20 < 8 / count  # the largest of five is ahead of the next by chance


def test_the_correction_restores_the_gap_of_a_good_code_that_chance_lowers(factors):
    few = factors[:400]
    found = mutual_information_gap(few, few)
    a, b = binned(few.double(), 20), binned(few.double(), 20)
    plain = information_of(joint_counts(a, b, 20)).topk(2, 0).values
    uncorrected = ((plain[0] - plain[1]) / found.entropy).mean().item()
    assert uncorrected < 0.9
    assert found.gap > 0.97


def test_the_gap_of_many_images_is_that_of_few(factors):
    codes = factors + 0.2 * noise(COUNT, 3)
    few = [mutual_information_gap(codes[i : i + 1000], factors[i : i + 1000]).gap for i in range(0, COUNT, 1000)]
    assert sum(few) / len(few) == pytest.approx(mutual_information_gap(codes, factors).gap, abs=0.01)


def test_a_unit_that_never_moves_tells_nothing_and_ties_share_a_bin(factors):
    codes = torch.cat([torch.full((COUNT, 1), 0.5), factors], 1)
    assert mutual_information_gap(codes, factors).information[0].tolist() == [0, 0, 0]
    column = torch.tensor([0.0] * 70 + [float(i) for i in range(1, 31)])[:, None]
    bins = binned(column, 5)[0]
    assert bins[:70].unique().numel() == 1
    assert bins.diff().min() == 0
    assert bins.max() == 4


def test_the_seed_of_the_shuffles_moves_the_gap_little_and_the_same_seed_not_at_all(factors):
    codes, some = (factors + 0.2 * noise(COUNT, 3))[:1000], factors[:1000]
    gaps = [mutual_information_gap(codes, some, seed=seed).gap for seed in (0, 0, 1, 2, 3)]
    assert gaps[0] == gaps[1]
    assert max(gaps) - min(gaps) < 0.01


def test_the_means_of_a_dead_unit_tell_the_image_and_its_draws_do_not():
    """Why draws are the code: the encoder's last weights of a collapsed unit are small, not zero."""
    images = vaelib.load_images("shapes")
    torch.manual_seed(0)
    model = vaelib.mlp_vae(images.image_shape, (16,), 2, {"name": "gaussian", "scale": 0.3})
    with torch.no_grad():
        model.encoder.head.weight.mul_(1e-4)
        model.encoder.head.bias.zero_()
    assert model.encode(model.likelihood.observe(images.pixels[:100])).kl(model.prior).max() < 1e-5
    means = mutual_information_gap(vaelib.posterior_means(model, images), images.factors)
    draws = mutual_information_gap(sampled_codes(model, images), images.factors)
    assert means.information.max() > 0.3
    assert draws.information.max() < 0.02


def test_codes_are_draws_of_q_that_belong_to_the_image():
    images = vaelib.load_images("shapes", "test")
    torch.manual_seed(0)
    model = vaelib.mlp_vae(images.image_shape, (16,), 3, {"name": "gaussian", "scale": 0.3})
    codes = sampled_codes(model, images)
    with torch.no_grad():
        q = model.encode(model.likelihood.observe(images.pixels))
    eps = (codes - q.mean) * (-q.log_var / 2).exp()
    assert eps.mean().item() == pytest.approx(0, abs=0.06)
    assert eps.std().item() == pytest.approx(1, abs=0.04)
    back = torch.arange(len(images) - 1, -1, -1)
    assert torch.allclose(sampled_codes(model, images[back], 100), codes[back], atol=1e-5)
    assert not torch.allclose(sampled_codes(model, images.pixels, seed=1), codes, atol=0.1)


def test_codes_of_layers_are_drawn_from_the_top_down():
    torch.manual_seed(0)
    model = vaelib.hierarchical_vae((1, 8, 8), ((2, 1), (2, 1)), 8, 4, 1, "bernoulli")
    pixels = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    codes = sampled_codes(model, pixels)
    path_of_means = vaelib.evaluation.posteriors(model, pixels).mean
    assert torch.equal(codes, posterior_samples(model, pixels))
    assert (codes - path_of_means).std() > 0.5


def test_chance_that_is_as_large_as_the_information_can_be_gives_no_infinite_gap():
    factors, codes = torch.tensor([[0], [1], [0], [1]]), torch.tensor([[0.0, 1.5], [1.0, -0.3], [0.0, -2.2], [1.0, 0.6]])
    for seed in range(10):
        found = mutual_information_gap(codes, factors, bins=2, shuffles=1, seed=seed)
        assert math.isfinite(found.gap)
        assert found.information.isfinite().all()


GOOD = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("codes", "factors", "options", "message"),
    [
        (GOOD.tolist(), GOOD, {}, "codes: got list .* expected a tensor of real numbers, one row for each image"),
        (GOOD[:, 0], GOOD, {}, r"codes: got a float32 tensor of shape \(400,\)"),
        (GOOD, GOOD[:, 0], {}, r"factors: got a float32 tensor of shape \(400,\)"),
        (GOOD + 0j, GOOD, {}, "codes: got a complex64 tensor"),
        (GOOD[:, :1], GOOD, {}, "codes: .* expected at least 2 columns: the gap is that between two of them"),
        (GOOD, GOOD[:, :0], {}, "factors: .* expected at least one column"),
        (GOOD * math.nan, GOOD, {}, "codes: got NaN or infinite values, expected finite numbers"),
        (GOOD, GOOD / 0, {}, "factors: got NaN or infinite values, expected finite numbers"),
        (GOOD, GOOD[1:], {}, "codes, factors: got 400 and 399 rows, expected one of each for every image"),
        (GOOD[1:], GOOD[1:], {}, r"codes: got 399 rows, expected at least bins\*\*2 = 400; take fewer bins"),
        (GOOD, GOOD * torch.tensor([1.0, 0.0]), {}, "factors: got column 1 with one value for all images"),
        (GOOD, GOOD, {"bins": 1}, "bins: got int 1, expected an integer of at least 2"),
        (GOOD, GOOD, {"shuffles": 0}, "shuffles: got int 0, expected an integer of at least 1"),
        (GOOD, GOOD, {"seed": -1}, "seed: got int -1"),
    ],
)
def test_bad_input_is_refused_by_name(codes, factors, options, message):
    with pytest.raises(ValueError, match=message):
        mutual_information_gap(codes, factors, **options)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("factors_rows", ROOT / "book" / "_scripts" / "factors_rows.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_is_of_one_training_and_scores_the_test_images(script):
    images, test = script.halved("train"), script.halved("test")
    assert images.image_shape == (3, 16, 16)
    found = script.vae_row(4, 0, images[:512], test, epochs=1)
    assert len(found["information"]) == len(found["rate_of_units"]) == script.LATENTS
    assert sum(found["rate_of_units"]) == pytest.approx(found["rate"], rel=1e-3)
    again = mutual_information_gap(sampled_codes(script.trained(4, 0, images[:512], 1), test), test.factors)
    assert again.gap == pytest.approx(found["gap"], abs=1e-6)


def test_how_often_one_training_is_ahead_of_another(script):
    assert script.won([1.0, 2.0], [0.0, 1.5]) == 0.75
    assert script.won([1.0], [1.0]) == 0.5
    assert script.ranks([3.0, 1.0, 2.0]).tolist() == [2, 0, 1]


def test_the_ledger_has_every_row_and_its_summary_is_of_them(script):
    made = json.loads(script.LEDGER.read_text())
    assert set(made) == {*script.ROWS, "summary"}
    again = script.summary(made)
    assert json.loads(json.dumps(again)) == made["summary"]["metrics"]
    assert {name: made[name]["metrics"]["epochs"] for name in script.VAES} == dict.fromkeys(script.VAES, script.EPOCHS)
