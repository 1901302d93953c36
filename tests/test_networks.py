"""Convolutional and hierarchical models: shapes, layout of the latents, initialization, and bounds that are bounds."""

import json
import math

import pytest
import torch

import vaelib
from vaelib import ConvDecoder, ConvEncoder, bits_per_dim, conv_vae, gaussian_log_density, heldout_elbo, hierarchical_vae, mlp_vae
from vaelib.likelihoods import LIKELIHOODS
from vaelib.networks import LatentGroup, ResidualBlock

SMALL = {"levels": ((3, 1), (2, 2), (2, 1)), "width": 8, "bottleneck": 6, "blocks": 1}
BUILDERS = {
    "mlp": lambda shape=(3, 8, 8), **kw: mlp_vae(shape, (16,), 4, **{"likelihood": "discretized_logistic"} | kw),
    "conv": lambda shape=(3, 8, 8), **kw: conv_vae(shape, 4, channels=(6, 8), **kw),
    "conv, residual": lambda shape=(3, 8, 8), **kw: conv_vae(shape, 4, channels=(6, 8), residual_blocks=2, activation="gelu", **kw),
    "conv, spatial": lambda shape=(3, 8, 8), **kw: conv_vae(shape, (2, shape[1] // 2, shape[2] // 2), channels=(6, 8), **kw),
    "hierarchical": lambda shape=(3, 8, 8), **kw: hierarchical_vae(shape, **SMALL, **kw),
}


@pytest.fixture(params=list(BUILDERS))
def model(request):
    torch.manual_seed(0)
    return stirred(BUILDERS[request.param]())


@pytest.fixture
def hierarchical():
    torch.manual_seed(0)
    return stirred(BUILDERS["hierarchical"]())


def stirred(model):
    """The model with weights away from their start, so that no branch is zero and posteriors differ from priors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * (0.3 / math.sqrt(parameter[0].numel()))
    return model


def some_x(model, count, seed=2):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *model.image_shape), generator=generator, dtype=torch.uint8)
    return model.likelihood.observe(pixels, generator)


def resolutions(network, given):
    """(H, W) of what each convolution of a network gives, in the order of the computation."""
    seen = []
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[2:])))
    network(given)
    return seen


# --- shapes


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (2, 33, 31), (3, 64, 64)])
@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind != "mlp"])
def test_any_channels_and_odd_sides_come_back_in_their_shape(kind, image_shape):
    model = BUILDERS[kind](image_shape)
    x = some_x(model, 2)
    terms = model.elbo(x, 3)
    assert terms.elbo.shape == (2,)
    assert terms.kl_per_unit.shape == (2, model.latent_dim)
    assert torch.isfinite(terms.elbo).all()
    assert model.encode(x).mean.shape == model.encode(x).log_var.shape == (2, model.latent_dim)
    assert model.decode(torch.zeros(2, model.latent_dim)).shape == (
        2,
        model.likelihood.param_channels(image_shape[0]),
        *image_shape[1:],
    )
    assert vaelib.generate(model, 2).shape == (2, *image_shape)


def test_a_latent_vector_is_reached_by_halving_and_left_by_doubling():
    assert resolutions(ConvEncoder((1, 28, 28), (4, 5, 6), 7), torch.zeros(1, 1, 28, 28)) == [(14, 14), (7, 7), (3, 3)]
    decoder = ConvDecoder(7, (6, 5, 4), (1, 28, 28))
    assert resolutions(decoder, torch.zeros(1, 7)) == [(7, 7), (14, 14), (28, 28), (28, 28)]
    assert resolutions(ConvDecoder(7, (6, 5), (1, 33, 31)), torch.zeros(1, 7)) == [(16, 15), (33, 31), (33, 31)]


def test_latents_in_space_keep_their_resolution_once_it_is_reached():
    model = conv_vae((3, 32, 32), (5, 8, 8), channels=(4, 6, 7, 8))
    assert model.latent_shape == (5, 8, 8)
    assert model.latent_dim == 320
    assert conv_vae((3, 8, 8), 6, channels=(4,)).latent_shape == (6,)
    assert resolutions(model.encoder, torch.zeros(1, 3, 32, 32)) == [(16, 16), (8, 8), (8, 8), (8, 8), (8, 8)]
    assert resolutions(model.decoder, torch.zeros(1, 320)) == [(8, 8), (8, 8), (8, 8), (16, 16), (32, 32), (32, 32)]


def test_a_latent_in_space_sees_and_paints_its_own_place():
    model = conv_vae((1, 32, 32), (2, 8, 8), channels=(4, 6))
    x = torch.zeros(1, 1, 32, 32)
    corner = x.clone()
    corner[..., :2, :2] = 1
    change = (model.encode(corner, validate=False).mean - model.encode(x, validate=False).mean).view(2, 8, 8).abs().sum(0)
    assert change[0, 0] > 0
    assert change[2:].max() == change[:, 2:].max() == 0
    z = torch.zeros(1, 2, 8, 8)
    z[..., -1, 0] = 1
    painted = (model.decode(z.flatten(1)) - model.decode(torch.zeros(1, 128))).abs().sum((0, 1))
    assert painted[-4:, :4].min() > 0
    assert painted[:16].max() == painted[:, 16:].max() == 0


def test_the_groups_of_a_hierarchy_are_maps_from_coarse_to_fine(hierarchical):
    assert hierarchical.latent_shapes == [(3, 2, 2), (2, 4, 4), (2, 4, 4), (2, 8, 8)]
    assert hierarchical.latent_dim == 3 * 4 + 2 * 2 * 16 + 2 * 64
    skipping = hierarchical_vae((1, 9, 8), ((2, 1), (2, 0), (2, 1), (2, 0)), 8, 4, 1)
    assert skipping.latent_shapes == [(2, 1, 1), (2, 4, 4)]


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (
            conv_vae,
            {"image_shape": (1, 7, 28)},
            r"image_shape: got \(1, 7, 28\), expected sides of at least 8, which 3 stages halve",
        ),
        (conv_vae, {"image_shape": (28, 28)}, r"image_shape: got tuple \(28, 28\), expected \(channels, height, width\)"),
        (
            conv_vae,
            {"image_shape": (1, 28, 28), "latent_dim": (16, 8, 8)},
            r"latent_dim: got \(16, 8, 8\), expected .* one of 28x28, 14x14, 7x7, 3x3, .* 3 stages can reach from .* \(1, 28, 28\)",
        ),
        (conv_vae, {"image_shape": (3, 33, 31), "latent_dim": (16, 8, 8)}, "one of 33x31, 16x15, 8x7, 4x3,"),
        (conv_vae, {"latent_dim": (64, 8)}, r"latent_dim: got tuple \(64, 8\), expected an integer or \(channels, height, width\)"),
        (conv_vae, {"latent_dim": "64x8x8"}, "latent_dim: got str '64x8x8', expected an integer or"),
        (conv_vae, {"latent_dim": (0, 8, 8)}, "latent_dim: got int 0, expected an integer of at least 1"),
        (conv_vae, {"latent_dim": 0}, "latent_dim: got int 0"),
        (conv_vae, {"channels": ()}, r"channels: got tuple \(\), expected a sequence of integers such as \(32, 64, 128\)"),
        (conv_vae, {"channels": 32}, "channels: got int 32, expected a sequence"),
        (conv_vae, {"channels": (32, 0)}, "channels: got int 0"),
        (conv_vae, {"residual_blocks": -1}, "residual_blocks: got int -1, expected an integer of at least 0"),
        (conv_vae, {"activation": "rellu"}, "activation: got 'rellu'.*did you mean 'relu'"),
        (conv_vae, {"likelihood": "bernouilli"}, "likelihood: got 'bernouilli'"),
        (
            hierarchical_vae,
            {"image_shape": (3, 32, 7)},
            r"image_shape: got \(3, 32, 7\), expected sides of at least 8 for 4 levels",
        ),
        (hierarchical_vae, {"levels": ()}, r"levels: got tuple \(\), expected pairs \(latent channels, groups\)"),
        (hierarchical_vae, {"levels": (8, 2)}, r"levels: got tuple \(8, 2\), expected pairs"),
        (hierarchical_vae, {"levels": ((8, 0), (8, 1))}, "levels: got .*, expected at least one group at the first, the smallest"),
        (hierarchical_vae, {"levels": ((8, 1), (0, 1))}, "levels: got int 0"),
        (hierarchical_vae, {"levels": ((8, 1), (8, -1))}, "levels: got int -1"),
        (hierarchical_vae, {"width": 0}, "width: got int 0"),
        (hierarchical_vae, {"bottleneck": 1.5}, "bottleneck: got float 1.5"),
        (hierarchical_vae, {"blocks": 0}, "blocks: got int 0"),
        (hierarchical_vae, {"activation": "swish"}, "activation: got 'swish'"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_expected(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


# --- initialization


def test_no_model_has_running_statistics():
    for build in BUILDERS.values():
        assert not list(build().buffers())
        assert not [module for module in build().modules() if "Norm" in type(module).__name__]


def test_residual_blocks_start_as_the_identity(generator):
    x = torch.randn(2, 6, 5, 4, generator=generator)
    for block in (ResidualBlock(6), ResidualBlock(6, "silu", bottleneck=3)):
        assert torch.equal(block(x), x)
        assert not torch.equal(stirred(block)(x), x)


def test_residual_blocks_leave_the_untrained_model_as_it_was(generator):
    plain, deep = (conv_vae((3, 8, 8), 4, channels=(6, 8), residual_blocks=blocks) for blocks in (0, 2))
    for part in ("encoder", "decoder"):
        outside = [m for m in getattr(deep, part).hidden if not isinstance(m, ResidualBlock)] + [getattr(deep, part).head]
        inside = [*getattr(plain, part).hidden, getattr(plain, part).head]
        for mine, other in zip(outside, inside, strict=True):
            mine.load_state_dict(other.state_dict())
    x, eps = some_x(plain, 3), torch.randn(1, 3, 4, generator=generator)
    assert torch.equal(deep.elbo(x, 1, eps).elbo, plain.elbo(x, 1, eps).elbo)


def test_the_default_models_have_the_size_they_are_said_to_have():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build().parameters()) for build in (conv_vae, hierarchical_vae)]
    assert 1.1e6 < sizes[0] < 1.2e6
    assert 2.5e6 < sizes[1] < 3.5e6


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "discretized_logistic_mixture"])
def test_the_first_loss_is_that_of_a_vague_guess(likelihood):
    torch.manual_seed(0)
    images = vaelib.load_images("shapes").pixels[:2]
    for model in (conv_vae(likelihood=likelihood), conv_vae(latent_dim=(64, 8, 8)), hierarchical_vae(likelihood=likelihood)):
        with torch.no_grad():
            terms = model.elbo(model.likelihood.observe(images))
        bits = [bits_per_dim(value, 3072, model.likelihood).mean() for value in (terms.log_likelihood, -terms.kl)]
        assert 8 < bits[0] < 10  # 8 bits: every level equally likely
        assert bits[1] < 0.2


def test_a_hierarchy_starts_with_the_standard_normal_as_its_prior(generator):
    model = hierarchical_vae((3, 8, 8), **SMALL)
    eps = torch.randn(4, model.latent_dim, generator=generator)
    assert torch.equal(model.prior.from_noise(eps), eps)


def test_the_log_variances_stay_where_the_kl_is_finite():
    for sign in (1, -1):
        encoder = ConvEncoder((1, 8, 8), (4,), (2, 4, 4))
        torch.nn.init.constant_(encoder.head.bias, sign * 1e4)
        assert (encoder(torch.zeros(1, 1, 8, 8))[1] == sign * 20).all()
        group = LatentGroup(0, (2, 4, 4), 6, 4, 1.0, "silu")
        for branch in (group.prior_branch, group.posterior_branch):
            torch.nn.init.constant_(branch[-1].bias, sign * 1e4)
        h = torch.zeros(1, 6, 4, 4)
        assert (group.prior(h)[1] == sign * 10).all()
        assert (group.posterior(h, h)[1] == sign * 10).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_two_branches_of_a_group_and_its_sums_are_those_of_their_plain_forms(layout, generator):
    """They share the activated state, and two 1x1 convolutions are added by one."""
    model = hierarchical_vae((3, 8, 8), **SMALL).to(memory_format=layout)
    stirred(model)
    group, act = model.decoder.groups[-1], torch.nn.functional.silu
    h, features = (torch.randn(4, 8, 8, 8, generator=generator).contiguous(memory_format=layout) for _ in range(2))
    z = torch.randn(4, 2 * 8 * 8, generator=generator)
    mean, log_var, rest = group.prior(act(h))
    expected_mean, expected_log_var, change = group.prior_branch(h).split((2, 2, 8), dim=1)
    torch.testing.assert_close(mean, expected_mean.flatten(1))
    torch.testing.assert_close(log_var, expected_log_var.flatten(1))
    torch.testing.assert_close(group(h, rest, z), group.block(h + change + group.enter(z.view(4, 2, 8, 8))))
    expected = group.posterior_branch(torch.cat([h, features], dim=1)).flatten(1).chunk(2, dim=1)
    torch.testing.assert_close(group.posterior(act(h), act(features)), expected)


# --- the bounds


def test_several_samples_are_the_mean_of_single_ones_and_images_stay_apart(model, generator):
    x = some_x(model, 3)
    eps = torch.randn(4, 3, model.latent_dim, generator=generator)
    terms = model.elbo(x, 4, eps)
    singles = [model.elbo(x, 1, eps[k : k + 1]) for k in range(4)]
    torch.testing.assert_close(terms.log_likelihood, torch.stack([t.log_likelihood for t in singles]).mean(0))
    torch.testing.assert_close(terms.kl_per_unit, torch.stack([t.kl_per_unit for t in singles]).mean(0))
    torch.testing.assert_close(terms.kl, terms.kl_per_unit.sum(1))
    torch.testing.assert_close(model.elbo(x[1:2], 4, eps[:, 1:2]).elbo, terms.elbo[1:2])
    weights = model.log_weights(x, 4, eps)
    torch.testing.assert_close(weights[2:3], model.log_weights(x, 1, eps[2:3]))
    assert weights.std(0).min() > 0.1


def test_the_likelihood_of_the_elbo_is_that_of_the_decoded_z(model, generator):
    x = some_x(model, 3)
    eps = torch.randn(2, 3, model.latent_dim, generator=generator)
    drawn = model.draw(x, 2, eps)
    z, posterior = drawn.z, drawn.q
    assert z.shape == eps.shape
    torch.testing.assert_close(posterior.mean + (posterior.log_var / 2).exp() * eps, z)
    decoded = [model.likelihood.log_prob(x, model.decode(z[k])) for k in range(2)]
    torch.testing.assert_close(model.elbo(x, 2, eps).log_likelihood, torch.stack(decoded).mean(0))
    expected = torch.stack(decoded) + model.prior.log_prob(z) - gaussian_log_density(z, *(part.expand_as(z) for part in posterior))
    torch.testing.assert_close(model.log_weights(x, 2, eps), expected)


@pytest.mark.equation("hierarchical-kl")
def test_the_closed_form_kl_of_a_hierarchy_is_the_mean_of_log_q_minus_log_p(hierarchical, generator):
    x, count = some_x(hierarchical, 2), 1000
    with torch.no_grad():
        eps = torch.randn(count, 2, hierarchical.latent_dim, generator=generator)
        z, _, posterior, prior, _ = hierarchical.draw(x, count, eps)
        sampled = gaussian_log_density(z, *posterior) - gaussian_log_density(z, *prior)
        kl = vaelib.gaussian_kl(posterior.mean, posterior.log_var, *prior)  # given the latents above, so it varies with the sample
        terms = hierarchical.elbo(x, count, eps)
        weights = hierarchical.log_weights(x, count, eps)
    torch.testing.assert_close(terms.kl, kl.mean(0))
    assert (terms.kl > 5).all()
    assert kl.std(0).min() > 0.01
    error = (sampled - kl).std(0) / math.sqrt(count)
    assert ((sampled - kl).mean(0).abs() < 4 * error).all()
    # the same for the ELBO: the mean log-weight
    assert ((weights.mean(0) - terms.elbo).abs() < 4 * error).all()


def test_the_bounds_of_a_hierarchy_rise_with_the_number_of_samples(hierarchical, generator):
    x, count = some_x(hierarchical, 2), 1000
    with torch.no_grad():
        eps = torch.randn(count, 2, hierarchical.latent_dim, generator=generator)
        log_weights = hierarchical.log_weights(x, count, eps)
        elbo = hierarchical.elbo(x, count, eps).elbo
    bounds, errors = [], []
    for k in (1, 4, 20, 50):
        draws = vaelib.importance_weighted_bound(log_weights.view(k, -1)).view(-1, 2)
        bounds.append(draws.mean(0))
        errors.append(draws.std(0) / math.sqrt(len(draws)))
    for lower, upper, e, f in zip(bounds[:-1], bounds[1:], errors[:-1], errors[1:], strict=True):
        assert (upper - lower > 2 * (e**2 + f**2).sqrt()).all()
    assert (bounds[1] - elbo > 2 * errors[1]).all()


@pytest.mark.parametrize(("image_shape", "count"), [((1, 1, 2), 30_000), ((1, 2, 2), 5000)])
def test_the_weights_of_all_images_average_to_probabilities_that_sum_to_one(image_shape, count, generator):
    """The whole of inference at once: E_q[p(x, z) / q(z given x)] = p(x), and binary images are few enough to add them all up."""
    torch.manual_seed(0)
    levels = ((2, 2),) if image_shape[1] == 1 else ((2, 1), (1, 2))
    model = stirred(hierarchical_vae(image_shape, levels, 6, 5, 1, "bernoulli"))
    for group in model.decoder.groups:  # a wide q, so that the weights vary little
        torch.nn.init.constant_(group.posterior_branch[-1].bias[group.latent_shape[0] :], 0.5)
    pixels = math.prod(image_shape)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * pixels).view(-1, *image_shape)
    with torch.no_grad():
        weights = model.log_weights(x, count, generator=generator).exp().double()
    error = (weights.var(0) / len(weights)).sum().sqrt()
    assert error < 0.02
    assert abs(weights.mean(0).sum() - 1) < 4 * error
    assert weights.mean(0).std() > 0.01  # and the images are not all equally likely


# --- the way down


def test_latents_are_drawn_from_the_top_down(hierarchical, generator):
    eps = torch.randn(2, hierarchical.latent_dim, generator=generator)
    z = hierarchical.prior.from_noise(eps)
    assert torch.equal(hierarchical.prior.from_noise(eps), z)
    assert torch.equal(hierarchical.decode(z), hierarchical.decode(z))
    bounds = [0, *torch.tensor([math.prod(shape) for shape in hierarchical.latent_shapes]).cumsum(0).tolist()]
    for group, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        other = eps.clone()
        other[:, start:end] += 1
        changed = hierarchical.prior.from_noise(other) != z
        assert not changed[:, :start].any()
        assert changed[:, start:end].all()
        if group < len(bounds) - 2:
            assert changed[:, end:].any()
        assert not torch.equal(hierarchical.decode(hierarchical.prior.from_noise(other)), hierarchical.decode(z))


def test_the_prior_s_branch_moves_the_state_beside_z(hierarchical):
    z = torch.zeros(1, hierarchical.latent_dim)
    before = hierarchical.decode(z)
    for group in hierarchical.decoder.groups:
        with torch.no_grad():
            group.prior_branch[-1].bias[2 * group.latent_shape[0] :] += 1
        after = hierarchical.decode(z)
        assert not torch.equal(after, before)
        before = after


def test_the_same_noise_gives_the_prior_when_the_posterior_is_made_equal_to_it(hierarchical, generator):
    for group in hierarchical.decoder.groups:  # q and p at N(0, 1): what remains is one way down
        for branch in (group.prior_branch, group.posterior_branch):
            torch.nn.init.zeros_(branch[-1].weight)
            torch.nn.init.zeros_(branch[-1].bias)
    x, eps = some_x(hierarchical, 3), torch.randn(1, 3, hierarchical.latent_dim, generator=generator)
    assert torch.equal(hierarchical.draw(x, 1, eps).z[0], hierarchical.prior.from_noise(eps[0]))
    assert hierarchical.elbo(x, 1, eps).kl.abs().max() == 0


def test_generation_and_judgement_work_on_every_model(model):
    images = vaelib.image_set(torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    samples = vaelib.generate(model, 4, seed=1)
    assert samples.shape == (4, 3, 8, 8)
    assert torch.equal(vaelib.generate(model, 4, seed=1), samples)
    assert len(vaelib.generate(model, 4, temperature=0).unique(dim=0)) == 1
    assert len(samples.unique(dim=0)) == 4
    assert vaelib.reconstruct(model, images.pixels).shape == images.pixels.shape
    line = vaelib.interpolate(model, images.pixels[0], images.pixels[1], steps=3)
    torch.testing.assert_close(line[[0, 2]], vaelib.reconstruct(model, images.pixels[:2]), atol=1, rtol=0)  # one grey level
    assert vaelib.active_units(model, images).shape == (model.latent_dim,)
    result = vaelib.evaluate(model, images, num_samples=20, elbo_samples=2)
    assert result.log_likelihood > result.elbo
    assert result.bits_per_dim > 0


# --- per image


def test_encode_is_deterministic_and_knows_one_image_at_a_time(model):
    x = some_x(model, 5)
    first, again, alone = model.encode(x), model.encode(x), model.encode(x[3:4])
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a[3:4])
    assert first.mean.std(0).max() > 0.01


def test_the_heldout_elbo_does_not_depend_on_the_batch_size(model):
    pixels = torch.randint(0, 256, (11, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = heldout_elbo(model, pixels, num_samples=2)
    for batch_size in (1, 4):
        chunked = heldout_elbo(model, pixels, num_samples=2, batch_size=batch_size)
        torch.testing.assert_close(chunked.elbo, whole.elbo, rtol=1e-5, atol=1e-3)
    estimate = vaelib.log_likelihood(model, pixels, 6)
    torch.testing.assert_close(
        vaelib.log_likelihood(model, pixels, 6, batch_size=3, sample_batch=4), estimate, rtol=1e-5, atol=1e-3
    )


# --- files, number formats, memory formats


def test_a_loaded_model_of_any_kind_gives_the_same_elbo(model, tmp_path, generator):
    assert json.loads(json.dumps(model.config)) == model.config
    vaelib.save(model, tmp_path)
    again = vaelib.load(tmp_path)
    assert again.config == model.config
    assert type(again) is type(model)
    x, eps = some_x(model, 3), torch.randn(2, 3, model.latent_dim, generator=generator)
    with torch.no_grad():
        assert torch.equal(again.elbo(x, 2, eps).elbo, model.elbo(x, 2, eps).elbo)


def test_the_activation_is_that_of_every_layer():
    for model in (
        conv_vae((3, 8, 8), 4, channels=(4, 6), residual_blocks=1, activation="tanh"),
        hierarchical_vae(activation="tanh", **SMALL),
    ):
        for part in (model.encoder, model.decoder):
            names = {type(module).__name__ for module in part.modules()}
            assert "Tanh" in names
            assert not names & {"ReLU", "SiLU", "GELU", "LeakyReLU"}


def test_the_config_holds_every_argument():
    conv = conv_vae((1, 12, 12), (2, 3, 3), "bernoulli", (4, 6), 1, "tanh")
    assert conv.config == {
        "model": "conv",
        "image_shape": [1, 12, 12],
        "latent_dim": [2, 3, 3],
        "likelihood": {"name": "bernoulli", "binarize": "sample"},
        "channels": [4, 6],
        "residual_blocks": 1,
        "activation": "tanh",
    }
    hierarchical = hierarchical_vae((1, 4, 4), ((2, 1), (1, 2)), 6, 5, 2, "bernoulli", "relu")
    assert hierarchical.config == {
        "model": "hierarchical",
        "image_shape": [1, 4, 4],
        "levels": [[2, 1], [1, 2]],
        "width": 6,
        "bottleneck": 5,
        "blocks": 2,
        "likelihood": {"name": "bernoulli", "binarize": "sample"},
        "activation": "relu",
    }


def test_float64_stays_float64(model, generator):
    x, eps = some_x(model, 3), torch.randn(2, 3, model.latent_dim, generator=generator, dtype=torch.float64)
    single = model.elbo(x, 2, eps.float())
    terms = model.double().elbo(x.double(), 2, eps)
    for mine, other in zip(terms[:3], single[:3], strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(other.double(), mine, rtol=1e-4, atol=1e-4)
    assert model.prior.from_noise(eps[0]).dtype == model.decode(eps[0]).dtype == torch.float64


def test_under_autocast_the_terms_are_float32_and_near_those_of_float32(model, generator):
    x, eps = some_x(model, 3), torch.randn(2, 3, model.latent_dim, generator=generator)
    exact = model.elbo(x, 2, eps)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.elbo(x, 2, eps)
        assert model.encode(x).mean.dtype == model.decode(eps[0]).dtype == model.prior.from_noise(eps[0]).dtype == torch.float32
        drawn = model.draw(x, 2, eps)
        assert drawn.log_weights.dtype == torch.float32
    z, posterior = drawn.z, drawn.q
    assert {values.dtype for values in (*terms[:3], z, *posterior)} == {torch.float32}
    torch.testing.assert_close(posterior.mean + (posterior.log_var / 2).exp() * eps, z)
    assert not torch.equal(terms.elbo, exact.elbo)
    for mine, other in ((terms.elbo, exact.elbo), (terms.kl, exact.kl)):
        torch.testing.assert_close(mine, other, rtol=2**-6, atol=2**-6)  # bfloat16 has 8 bits
    model.elbo(x).elbo.sum().backward()


def test_channels_last_changes_the_memory_and_not_the_numbers(model, generator):
    x, eps = some_x(model, 3), torch.randn(2, 3, model.latent_dim, generator=generator)
    terms = model.elbo(x, 2, eps)
    model.to(memory_format=torch.channels_last)
    last = model.elbo(x.contiguous(memory_format=torch.channels_last), 2, eps)
    for mine, other in zip(last, terms, strict=True):
        torch.testing.assert_close(mine, other)


# --- learning


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("kind", list(BUILDERS))
def test_the_gradient_reaches_every_weight(kind, likelihood, generator):
    torch.manual_seed(0)
    model = BUILDERS[kind](likelihood=likelihood)
    x = some_x(model, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):  # zero weights hide those behind them, two deep in a hierarchy
        optimizer.zero_grad()
        vaelib.loss(model.elbo(x, generator=generator)).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (lambda: conv_vae(latent_dim=16, channels=(8, 16, 32), activation="gelu"), 60),
        (lambda: conv_vae(latent_dim=(4, 8, 8), channels=(8, 16, 16), residual_blocks=1, activation="gelu"), 60),
        (lambda: hierarchical_vae(levels=((8, 1), (4, 1), (2, 1), (1, 0)), width=16, bottleneck=8, blocks=1), 30),
    ],
    ids=["conv", "conv, spatial", "hierarchical"],
)
def test_a_few_dozen_steps_on_images_lower_the_loss(build, steps):
    torch.manual_seed(0)
    model, test = build(), vaelib.load_images("shapes", "test")[:64]
    before = vaelib.evaluate(model, test, elbo_samples=1).bits_per_dim
    config = vaelib.TrainConfig(epochs=1, batch_size=16, learning_rate=1e-2, progress=False, device="cpu")
    vaelib.fit(model, vaelib.load_images("shapes")[: 16 * steps], config=config)
    after = vaelib.evaluate(model, test, elbo_samples=1).bits_per_dim
    assert after < 7.2 < 8 < before  # 8 bits: all levels equally likely
    x = model.likelihood.observe(test.pixels)
    with torch.no_grad():
        params = model.decode(model.encode(x).mean)
        own, exchanged = (model.likelihood.log_prob(x, p).mean() for p in (params, params.roll(1, 0)))
    assert own > exchanged + 1  # an image's code is of use for that image
