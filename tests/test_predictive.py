"""Hidden pixels and replicates, against models whose answers are known in closed form."""

import math

import pytest
import torch

import vaelib
from vaelib.book.oracles import LinearGaussian, exact_vae
from vaelib.book.strokes import changes, holes, ink, parts
from vaelib.likelihoods import LIKELIHOODS, make_likelihood, nearest_level
from vaelib.predictive import SeenPixels, fill_by_turns, impute, predictive_p_values, replicate, seeing
from vaelib.priors import VampPrior


def exact_case(num_images=4, scale=0.15, seed=0):
    """A linear model of 4 x 4 pixels, its oracle, images of its own, and a mask that hides the lower half."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.25 * torch.linalg.qr(torch.randn(16, 3, generator=generator))[0] * torch.tensor([1.5, 1.2, 1.0])
    oracle = LinearGaussian(weight, 0.1 * torch.randn(16, generator=generator), scale)
    x = nearest_level(oracle.sample(num_images, generator)).view(num_images, 1, 4, 4)
    observed = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    observed[..., :2, :] = True
    return exact_vae(oracle, (1, 4, 4)), oracle, x, observed


def conditional(oracle, x, observed):
    """log P(x_o), and mean and log P of the hidden pixels given the seen ones, in closed form: a level owns 2/255 of the line."""
    seen = observed.flatten()
    covariance = oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(16)
    gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, ~seen]).T
    flat = x.flatten(1)
    mean = oracle.bias[~seen] + (flat[:, seen] - oracle.bias[seen]) @ gain.T
    rest = covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]
    normal, width = torch.distributions.MultivariateNormal, 8 * math.log(2 / 255)
    log_seen = normal(oracle.bias[seen], covariance[seen][:, seen]).log_prob(flat[:, seen]) + width
    return log_seen, mean, normal(mean, rest).log_prob(flat[:, ~seen]) + width


@pytest.mark.equation("seen-pixels")
def test_the_model_of_the_seen_pixels_has_their_likelihood():
    model, oracle, x, observed = exact_case()
    weights = seeing(model, observed).log_weights(x, 40_000, generator=torch.Generator().manual_seed(0))
    found = vaelib.importance_weighted_bound(weights)
    assert torch.allclose(found, conditional(oracle, x, observed)[0], atol=0.1)


@pytest.mark.equation("imputation")
@pytest.mark.parametrize("steps", [0, 60])
def test_hidden_pixels_are_filled_in_as_bayes_rule_says(steps):
    model, oracle, x, observed = exact_case()
    found = impute(model, x, observed, 40_000, 2000, steps=steps, generator=torch.Generator().manual_seed(0))
    log_seen, mean, log_hidden = conditional(oracle, x, observed)
    hidden = ~observed.flatten()
    assert torch.allclose(found.mean.flatten(1)[:, hidden], mean, atol=0.01)
    assert torch.allclose(found.draws.mean(0).flatten(1)[:, hidden], mean, atol=0.03)
    assert torch.allclose(found.log_seen, log_seen, atol=0.05)
    assert torch.allclose(found.log_hidden, log_hidden, atol=0.1)
    assert (found.effective_sample_size > 1000).all()


def test_the_encoders_single_pass_is_not_the_answer():
    model, oracle, x, observed = exact_case()
    _, mean, _ = conditional(oracle, x, observed)
    single = model.likelihood.mean(model.decode(model.encode(torch.where(observed, x, -torch.ones_like(x))).mean))
    assert (single.flatten(1)[:, ~observed.flatten()] - mean).abs().mean() > 0.1


def test_the_truth_at_hidden_pixels_enters_its_own_score_alone():
    model, _, x, observed = exact_case()
    other = torch.where(observed, x, nearest_level(torch.rand_like(x)))
    one, two = (impute(model, image, observed, 500, 3, generator=torch.Generator().manual_seed(1)) for image in (x, other))
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.draws, two.draws)
    assert torch.equal(one.log_seen, two.log_seen)
    assert not torch.allclose(one.log_hidden, two.log_hidden)


def test_seen_pixels_stay():
    model, _, x, observed = exact_case()
    found = impute(model, x, observed, 100, 3, generator=torch.Generator().manual_seed(1))
    filled = fill_by_turns(model, x, observed, 2, torch.Generator().manual_seed(1))
    for filling in (found.mean, *found.draws, filled):
        assert torch.equal(filling[observed.expand_as(x)], x[observed.expand_as(x)])
        assert not torch.equal(filling, x)


def test_each_image_may_have_a_mask_of_its_own():
    model, oracle, x, observed = exact_case(2)
    both = torch.cat([observed, ~observed])
    found = impute(model, x, both, 20_000, generator=torch.Generator().manual_seed(0))
    expected = [conditional(oracle, x[i : i + 1], both[i : i + 1])[0] for i in range(2)]
    assert torch.allclose(found.log_seen, torch.cat(expected), atol=0.1)
    bound = vaelib.importance_weighted_bound(seeing(model, both).log_weights(x, 20_000, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(bound, torch.cat(expected), atol=0.1)


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_the_pixels_of_every_likelihood_add_up_to_the_image(name):
    likelihood = make_likelihood(name)
    channels = 3 if "mixture" in name else 1
    generator = torch.Generator().manual_seed(0)
    x = likelihood.observe(torch.randint(0, 256, (2, channels, 3, 5), generator=generator, dtype=torch.uint8), generator)
    params = torch.randn(2, likelihood.param_channels(channels), 3, 5, generator=generator)
    by_pixel = SeenPixels(likelihood, torch.ones(1, 1, 3, 5, dtype=torch.bool)).by_pixel(x, params)
    assert by_pixel.shape == (2, 1, 3, 5)
    assert torch.allclose(by_pixel.flatten(1).sum(1), likelihood.log_prob(x, params), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"observed": torch.ones(1, 1, 4, 4)}, "observed"),
        ({"observed": torch.ones(1, 1, 4, 5, dtype=torch.bool)}, "observed"),
        ({"observed": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "observed"),
        ({"observed": torch.zeros(1, 1, 4, 4, dtype=torch.bool)}, "observed"),
        ({"observed": torch.eye(4, dtype=torch.bool).repeat(3, 1, 1, 1)}, "observed"),
        ({"num_samples": 10}, "num_samples"),
        ({"num_draws": 0}, "num_draws"),
        ({"chains": 0}, "chains"),
        ({"rounds": 0}, "rounds"),
        ({"steps": -1}, "steps"),
        ({"x": torch.zeros(1, 1, 4, 5)}, "x"),
        ({"x": torch.full((1, 1, 4, 4), math.nan)}, "x"),
        ({"observed": [[True, False]]}, "observed"),
        ({"observed": None}, "observed"),
        ({"observed": torch.zeros(0, 1, 4, 4, dtype=torch.bool)}, "observed"),
        ({"observed": torch.eye(4, dtype=torch.int64)[None, None]}, "observed"),
    ],
)
def test_what_cannot_be_filled_in_is_refused_by_name(change, name):
    model, _, x, observed = exact_case(2)
    with pytest.raises(ValueError, match=f"^{name}: got"):
        impute(**{"model": model, "x": x, "observed": observed} | change)


def binary_case(model, num_images=3):
    """A mask that sees the upper half, and images of zeros and ones, for a model of 8 x 8 pixels."""
    observed = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    observed[..., :4, :] = True
    levels = torch.randint(0, 256, (num_images, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return model.likelihood.observe(levels, torch.Generator().manual_seed(0)), observed


def of_every_kind():
    torch.manual_seed(0)
    vector = {"image_shape": (1, 8, 8), "hidden_dims": (8,), "latent_dim": 2}
    with_prior = vaelib.mlp_vae(**vector)
    with_prior.prior = VampPrior(with_prior, torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8), 5)
    return {
        "plain": vaelib.mlp_vae(**vector),
        "float64": vaelib.mlp_vae(**vector).double(),
        "VampPrior": with_prior,
        "conditional": vaelib.conditional_vae(num_classes=4, **vector).given(torch.tensor([3, 0, 2])),
        "hierarchical": vaelib.hierarchical_vae((1, 8, 8), ((2, 1), (2, 1)), 8, 4, 1, "bernoulli"),
        "VQ": vaelib.vq_vae((1, 8, 8), 8, 4, "bernoulli", width=8, narrow=4, blocks=1),
    }


@pytest.mark.parametrize("kind", list(of_every_kind()))
def test_seen_and_hidden_pixels_of_every_model_add_up_to_the_image(kind):
    model = of_every_kind()[kind].eval()
    x, observed = binary_case(model)
    x, likelihood = x.to(next(model.parameters()).dtype), model.likelihood
    eps = torch.randn(2, len(x), model.latent_dim, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    whole, *halves = (one.elbo(x, 2, eps) for one in (model, seeing(model, observed), seeing(model, ~observed)))
    assert torch.allclose(halves[0].log_likelihood + halves[1].log_likelihood, whole.log_likelihood, rtol=1e-5)
    assert all(torch.equal(half.kl, whole.kl) for half in halves)
    assert model.likelihood is likelihood
    with pytest.raises(ValueError, match="^model: got"):
        vaelib.save(seeing(model, observed), "nowhere")


def test_the_seen_pixels_have_no_bits_per_dim_and_a_score_stays_a_score():
    model = vaelib.mlp_vae((1, 28, 28), (8,), 2)
    observed = torch.arange(784).view(1, 1, 28, 28) < 300
    images = vaelib.load_images("digits", "test")[:10]
    assert vaelib.evaluate(seeing(model, observed), images).bits_per_dim is None
    score = vaelib.mlp_vae((1, 28, 28), (8,), 2, "grey_bce_not_a_likelihood")
    with pytest.raises(ValueError, match="^model: got the score 'seen pixels of grey"):
        vaelib.log_likelihood(seeing(score, observed), images)
    with pytest.raises(ValueError, match="^model: got the score"):
        impute(score, score.likelihood.observe(images.pixels), observed)


def test_masks_of_other_images_are_refused():
    model = vaelib.mlp_vae((1, 28, 28), (8,), 2)
    images = vaelib.load_images("digits", "test")[:40]
    first = (torch.arange(784) < 300).view(1, 1, 28, 28)
    seen = seeing(model, torch.cat([first, ~first]))
    for few in (1, 3, 4):
        with pytest.raises(ValueError, match=f"^observed: got 2 masks, expected 1, or one for each of {few} images"):
            seen.elbo(model.likelihood.observe(images[:few].pixels))
    with pytest.raises(ValueError, match="^observed: got 2 masks"):
        vaelib.log_likelihood(seen, images, 5)


def test_labels_of_other_images_are_refused():
    model = vaelib.conditional_vae((1, 8, 8), 4, (8,), 2)
    bound = model.given(torch.tensor([3, 0]))
    x, observed = binary_case(model, 4)
    for call in (
        lambda: replicate(bound, x, 2, "prior"),
        lambda: fill_by_turns(bound, x, observed, 2),
        lambda: impute(bound, x[:2], observed, 12, chains=2),  # K = 12 codes would take the labels in turn
        lambda: replicate(model, x, 2, "prior"),
        lambda: seeing(model, observed).elbo(x),
    ):
        with pytest.raises(ValueError, match="^model: got"):
            call()
    assert impute(model.given(3), x, observed, 12, chains=2, steps=2).mean.shape == x.shape


@pytest.mark.parametrize("kind", ["hierarchical", "VQ"])
def test_a_model_without_one_gaussian_for_each_image_is_not_filled_in(kind):
    model = of_every_kind()[kind].eval()
    x, observed = binary_case(model)
    assert replicate(model, x, 2).shape == (2, *x.shape)
    assert fill_by_turns(model, x, observed, 2).shape == x.shape
    with pytest.raises(ValueError, match="^model: got"):
        impute(model, x, observed, 12, chains=2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rounds": -1}, "rounds"),
        ({"observed": torch.ones(2, 1, 8, 8).tril().bool()}, "observed"),
        ({"observed": torch.ones(1, 1, 8, 8).tril()}, "observed"),
        ({"x": torch.full((3, 1, 8, 8), 0.5)}, "x"),
        ({"x": torch.ones(3, 1, 8, 8, dtype=torch.uint8)}, "x"),
    ],
)
def test_turns_refuse_what_they_cannot_fill(change, name):
    model = vaelib.mlp_vae((1, 8, 8), (8,), 2)
    x, observed = binary_case(model)
    with pytest.raises(ValueError, match=f"^{name}: got"):
        fill_by_turns(**{"model": model, "x": x, "observed": observed, "rounds": 2} | change)


def test_weights_of_few_digits_are_refused():
    model = vaelib.mlp_vae((1, 8, 8), (8,), 2).bfloat16()
    x, observed = binary_case(model)
    with pytest.raises(ValueError, match="^x: got a bfloat16 tensor"):
        impute(model, x.bfloat16(), observed)


@pytest.mark.equation("predictive-p-value")
def test_p_values_of_the_right_model_are_even_under_the_prior_and_not_under_the_posterior():
    model, oracle, x, _ = exact_case(2000)
    generator, along = torch.Generator().manual_seed(1), oracle.weight[:, 0]  # what the first latent makes: q knows it well
    p = {}
    for source in ("prior", "posterior"):
        replicated = replicate(model, x, 200, source, generator)
        p[source] = predictive_p_values(x.flatten(1) @ along, replicated.flatten(2) @ along)
    grid = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    distance = {name: ((values[:, None] <= grid).double().mean(0) - grid).abs().max() for name, values in p.items()}
    assert distance["prior"] < 0.04  # the law of the largest distance: 1.63 / sqrt(2000) = 0.036 at one in a hundred
    assert distance["posterior"] > 0.1
    assert p["posterior"].std() < 0.8 * p["prior"].std()


def test_a_tie_counts_half():
    p = predictive_p_values(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 1.0]]))
    assert p.tolist() == [0.5, 0.0, 0.75]


@pytest.mark.parametrize(
    ("statistic", "replicated"),
    [(torch.zeros(3), torch.zeros(5, 2)), (torch.zeros(3, 1), torch.zeros(5, 3)), (torch.zeros(3), torch.zeros(0, 3))],
)
def test_statistics_of_other_shapes_are_refused(statistic, replicated):
    with pytest.raises(ValueError, match="^statistic, replicated: got"):
        predictive_p_values(statistic, replicated)


def test_a_statistic_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="^replicated: got NaN"):
        predictive_p_values(torch.zeros(1), torch.full((2, 1), math.nan))


@pytest.mark.parametrize(
    ("statistic", "replicated", "name"),
    [
        (torch.tensor([0.1]).double(), torch.tensor([[0.1]]), "statistic, replicated"),  # 0.1 in 64 bits is no 0.1 in 32
        (torch.tensor([1]), torch.tensor([[1.0]]), "statistic, replicated"),
        ([0.1], torch.tensor([[0.1]]), "statistic"),
        (torch.tensor([0.1]), torch.tensor([[0.1j]]), "replicated"),
        (torch.tensor([0.1]), torch.ones(1, 1, device="meta"), "statistic, replicated"),
    ],
)
def test_statistics_of_another_type_are_refused(statistic, replicated, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        predictive_p_values(statistic, replicated)


def test_a_replicate_of_the_posterior_is_like_its_image():
    model, _, x, _ = exact_case(200, scale=0.05)
    generator = torch.Generator().manual_seed(0)
    errors = {source: (replicate(model, x, 5, source, generator) - x).square().mean() for source in ("posterior", "prior")}
    assert errors["posterior"] < 0.5 * errors["prior"]
    with pytest.raises(ValueError, match="^source: got 'both'"):
        replicate(model, x, 5, "both")


def test_strokes_are_counted():
    ring = torch.zeros(1, 7, 7)
    ring[0, 1:6, 1:6] = 1
    ring[0, 2:5, 2:5] = 0
    corner = torch.zeros(1, 7, 7)
    corner[0, 0, 0] = corner[0, 1, 1] = corner[0, 5, 5] = 1  # two meet across a corner
    images = torch.stack([ring, corner])
    assert ink(images).tolist() == [16, 3]
    assert parts(images).tolist() == [1, 2]
    assert holes(images).tolist() == [1, 0]
    assert changes(images).tolist() == [4 * 5 + 4 * 3, 2 + 4 + 4]
    assert parts(images[None].repeat(3, 1, 1, 1, 1)).shape == (3, 2)
    with pytest.raises(ValueError, match="^x: got"):
        ink(images / 2)
