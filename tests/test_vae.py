"""The model: sampling, shapes, determinism, and estimates that don't depend on how the images were cut into batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vaelib
from vaelib import VAE, MLPDecoder, MLPEncoder, heldout_elbo, importance_weighted_bound, mlp_vae, noise, reparameterize
from vaelib.likelihoods import LIKELIHOODS


@pytest.mark.equation("reparameterization")
def test_reparameterize_has_the_right_mean_and_variance(generator):
    mean = torch.tensor([-1.0, 0.0, 3.0]).expand(200_000, 3)
    log_var = torch.tensor([-2.0, 0.0, 1.0]).expand(200_000, 3)
    z = reparameterize(mean, log_var, generator=generator)
    std = log_var[0].mul(0.5).exp()
    assert ((z.mean(0) - mean[0]).abs() < 5 * std / math.sqrt(200_000)).all()
    torch.testing.assert_close(z.var(0), std**2, rtol=0.02, atol=0)


@pytest.mark.equation("reparameterization")
def test_reparameterize_is_the_formula_and_carries_gradients():
    mean, log_var = torch.tensor([[1.0, -2.0]], requires_grad=True), torch.tensor([[0.0, math.log(9.0)]], requires_grad=True)
    z = reparameterize(mean, log_var, torch.tensor([[0.5, 2.0]]))
    assert z.tolist() == [[1.5, pytest.approx(4.0)]]
    z.sum().backward()
    assert mean.grad.tolist() == [[1, 1]]
    assert log_var.grad.tolist() == [[0.25, pytest.approx(3.0)]]


def test_reparameterize_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"mean, log_var, eps: got shapes \(2, 3\), \(1, 3\), \(2, 3\)"):
        reparameterize(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="mean, log_var, eps: got shapes"):
        reparameterize(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


def test_reparameterize_draws_from_its_generator_in_the_dtype_of_the_mean():
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    draws = [reparameterize(zeros, zeros, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(draws[0], torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    torch.manual_seed(1)
    assert torch.equal(reparameterize(zeros, zeros), draws[0])


def test_noise_is_drawn_on_the_device_of_the_mean():
    nowhere = torch.zeros(2, 3, device="meta")
    assert reparameterize(nowhere, nowhere).device.type == "meta"


def test_observations_are_made_on_the_device_of_the_model(small_vae, digits):
    x, keys = next(vaelib.heldout.observations(small_vae.to("meta"), digits.pixels[:5], 3, 0))
    assert x.device.type == keys.device.type == "meta"
    assert x.shape == (3, 1, 28, 28)


def test_a_model_that_needs_labels_comes_bound_to_those_of_each_chunk_and_others_come_as_they_are(small_vae, digits):
    images = digits[100:125]  # the first thirty labels only count from 0 to 9, over and over
    conditional = vaelib.conditional.conditional_vae((1, 28, 28), 10, (8,), 4)
    x, keys = (torch.cat(parts) for parts in zip(*vaelib.heldout.observations(small_vae, images.pixels, 25, 3), strict=True))
    for model, data, bound in (
        (conditional, images, True),
        (conditional.given(3), images, False),
        (small_vae, images, False),
        (small_vae, images.pixels, False),
    ):
        models, xs, ks = zip(*vaelib.heldout.given_labels(model, data, 10, 3), strict=True)
        assert [len(part) for part in xs] == [10, 10, 5]
        assert torch.equal(torch.cat(xs), x)
        assert torch.equal(torch.cat(ks), keys)
        if bound:
            assert torch.equal(torch.cat([each.labels for each in models]), images.labels)
        else:
            assert all(each is model for each in models)


def test_heldout_elbo_takes_the_labels_of_the_images(digits):
    model = vaelib.conditional.conditional_vae((1, 28, 28), 10, (8,), 4)
    images = digits[100:125]
    whole = heldout_elbo(model, images, 2, batch_size=10)
    bound = heldout_elbo(model.given(images.labels), images.pixels, 2)
    torch.testing.assert_close(whole.elbo, bound.elbo, rtol=1e-5, atol=1e-3)


def test_encode_is_deterministic(small_vae, digits):
    x = small_vae.likelihood.observe(digits.pixels[:5])
    first, second = small_vae.encode(x), small_vae.encode(x)
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.log_var, second.log_var)
    assert first.mean.shape == first.log_var.shape == (5, 4)
    assert first.mean.std(0).min() > 0.05  # and it depends on x


def test_the_log_variance_stays_where_its_exp_is_finite():
    encoder = MLPEncoder((1, 2, 2), (), 1)
    torch.nn.init.constant_(encoder.head.bias, 1e4)
    assert encoder(torch.zeros(1, 1, 2, 2))[1].item() == 20
    torch.nn.init.constant_(encoder.head.bias, -1e4)
    assert encoder(torch.zeros(1, 1, 2, 2))[1].item() == -20


@pytest.mark.equation("monte-carlo-elbo")
def test_elbo_averages_the_samples_and_keeps_the_images_apart(small_vae, digits, generator):
    x = small_vae.likelihood.observe(digits.pixels[:3], generator)
    eps = torch.randn(4, 3, 4, generator=generator)
    terms = small_vae.elbo(x, 4, eps)
    singles = [small_vae.elbo(x, 1, eps[k : k + 1]) for k in range(4)]
    torch.testing.assert_close(terms.log_likelihood, torch.stack([t.log_likelihood for t in singles]).mean(0))
    torch.testing.assert_close(terms.kl, singles[0].kl)
    alone = small_vae.elbo(x[1:2], 4, eps[:, 1:2])
    torch.testing.assert_close(terms.elbo[1:2], alone.elbo)
    assert terms.elbo.shape == (3,)
    assert not torch.allclose(singles[0].log_likelihood, singles[1].log_likelihood)


def test_elbo_averages_two_samples_too(small_vae, digits, generator):
    x = small_vae.likelihood.observe(digits.pixels[:3], generator)
    eps = torch.randn(2, 3, 4, generator=generator)
    both, first, second = small_vae.elbo(x, 2, eps), small_vae.elbo(x, 1, eps[:1]), small_vae.elbo(x, 1, eps[1:])
    torch.testing.assert_close(both.log_likelihood, (first.log_likelihood + second.log_likelihood) / 2)


def test_a_call_of_the_model_is_its_elbo_without_a_look_at_the_values(small_vae, digits, generator):
    x = small_vae.likelihood.observe(digits.pixels[:3], generator)
    eps = torch.randn(2, 3, 4, generator=generator)
    assert torch.equal(small_vae(x, eps).elbo, small_vae.elbo(x, 2, eps).elbo)
    torch.manual_seed(5)
    one = small_vae(x)
    torch.manual_seed(5)
    assert torch.equal(one.elbo, small_vae.elbo(x).elbo)
    with pytest.raises(ValueError, match="x: got"):
        small_vae.elbo(x + 0.5)
    assert small_vae(x + 0.5).elbo.shape == (3,)


def test_noise_has_the_precision_of_x(small_vae, digits):
    model, x = small_vae.double(), small_vae.likelihood.observe(digits.pixels[:2]).double()
    drawn = model.elbo(x, generator=torch.Generator().manual_seed(1))
    eps = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(drawn.elbo, model.elbo(x, 1, eps).elbo)


def test_codes_and_params_are_float32_under_autocast(small_vae, digits):
    x = small_vae.likelihood.observe(digits.pixels[:2])
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_var = small_vae.encode(x)
        params = small_vae.decode(mean)
    assert {mean.dtype, log_var.dtype, params.dtype} == {torch.float32}


@pytest.mark.equation("log-weights")
def test_log_weights_are_log_joint_minus_log_posterior(small_vae, digits, generator):
    x = small_vae.likelihood.observe(digits.pixels[:3], generator)
    eps = torch.randn(2, 3, 4, generator=generator)
    mean, log_var = small_vae.encode(x)
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    expected = []
    for k in range(2):
        z = mean + (log_var / 2).exp() * eps[k]
        log_px = small_vae.likelihood.log_prob(x, small_vae.decode(z))
        expected.append(log_px + torch.distributions.Normal(0, 1).log_prob(z).sum(1) - q.log_prob(z).sum(1))
    weights = small_vae.log_weights(x, 2, eps)
    torch.testing.assert_close(weights, torch.stack(expected))
    torch.testing.assert_close(small_vae.importance_weighted_bound(x, 2, eps), importance_weighted_bound(weights))
    one = small_vae.log_weights(x, generator=torch.Generator().manual_seed(3))
    assert one.shape == (1, 3)
    assert torch.equal(one, small_vae.log_weights(x, generator=torch.Generator().manual_seed(3)))
    k2 = [small_vae.importance_weighted_bound(x, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*k2)


def test_elbo_draws_one_sample_from_its_generator(small_vae, digits):
    x = small_vae.likelihood.observe(digits.pixels[:3])
    first, again = (small_vae.elbo(x, generator=torch.Generator().manual_seed(3)).elbo for _ in range(2))
    assert torch.equal(first, again)
    eps = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(first, small_vae.elbo(x, 1, eps).elbo)


def test_encode_refuses_what_is_not_x_on_the_encoders_terms(small_vae):
    x = torch.zeros(2, 1, 28, 28)
    with pytest.raises(ValueError, match="x: got NaN"):
        small_vae.encode(x * math.nan)
    with pytest.raises(ValueError, match=r"x: got values in \[200, 200\]"):
        small_vae.encode(x + 200)
    assert torch.isfinite(small_vae.encode(x + 0.5, validate=False).mean).all()
    message = "^x: got torch.float64 on cpu, expected torch.float32 on cpu as the encoder's weights; see https:.*#other-device$"
    with pytest.raises(ValueError, match=message):
        small_vae.elbo(x.double())
    with pytest.raises(ValueError, match="x: got torch.float32 on meta"):
        small_vae.encode(x.to("meta"))


def test_values_are_validated_unless_told_otherwise(small_vae):
    grey = torch.full((2, 1, 28, 28), 0.5)
    for call in (
        small_vae.encode,
        small_vae.elbo,
        small_vae.log_weights,
        lambda x, **kw: small_vae.importance_weighted_bound(x, 1, **kw),
    ):
        with pytest.raises(ValueError, match="x: got values between 0 and 1"):
            call(grey)
        answer = call(grey, validate=False)
        assert torch.isfinite(answer[0] if isinstance(answer, tuple) else answer).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), r"x: got a uint8 tensor .* call likelihood.observe"),
        (torch.zeros(2, 1, 14, 14), r"x: got images of shape \(1, 14, 14\), expected \(1, 28, 28\)"),
        (torch.zeros(2, 784), r"x: got a float32 tensor of shape \(2, 784\), expected shape \(N, C, H, W\)"),
        (torch.zeros(0, 1, 28, 28), "x: got an empty set"),
        (torch.full((2, 1, 28, 28), 255.0), r"x: got values in \[255, 255\], expected \[0, 1\]"),
        (torch.full((2, 1, 28, 28), math.nan), "x: got NaN"),
        ([[0.0]], "x: got list"),
    ],
)
def test_elbo_refuses_what_is_not_x(small_vae, x, message):
    with pytest.raises(ValueError, match=message):
        small_vae.elbo(x)


def test_wrong_codes_noise_and_sample_counts_are_refused(small_vae, digits):
    x = small_vae.likelihood.observe(digits.pixels[:2])
    for z in (torch.zeros(2, 5), torch.zeros(4), torch.zeros(1, 2, 4)):
        with pytest.raises(ValueError, match=r"^z: got a float32 tensor of shape .*, expected shape \(N, 4\)$"):
            small_vae.decode(z)
    for eps in (torch.zeros(2, 4), torch.zeros(2, 2, 4), torch.zeros(1, 2, 3)):
        with pytest.raises(
            ValueError, match=r"^eps: got a float32 tensor of shape .*, expected shape \(1, 2, 4\), \(num_samples, N, latent_dim\)$"
        ):
            small_vae.elbo(x, 1, eps)
    for count in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="num_samples: got .*, expected an integer of at least 1"):
            small_vae.elbo(x, count)
        with pytest.raises(ValueError, match="num_samples: got"):
            heldout_elbo(small_vae, digits[:2], count)
    with pytest.raises(ValueError, match="batch_size: got int 0"):
        heldout_elbo(small_vae, digits[:2], batch_size=0)
    with pytest.raises(ValueError, match=r"pixels: got images of shape \(1, 28, 28\), expected \(1, 8, 8\)"):
        heldout_elbo(mlp_vae((1, 8, 8), (4,), 2), digits)


def test_heldout_elbo_does_not_depend_on_batches_or_order_and_counts_the_last_partial_batch(small_vae, digits):
    images = digits[:103]
    whole = heldout_elbo(small_vae, images, num_samples=3, batch_size=103)
    assert whole.elbo.shape == (103,)
    for batch_size in (1, 10, 50, 1000):
        terms = heldout_elbo(small_vae, images, num_samples=3, batch_size=batch_size)
        torch.testing.assert_close(terms.elbo, whole.elbo, rtol=1e-5, atol=1e-3)
    order = torch.randperm(103, generator=torch.Generator().manual_seed(1))
    shuffled = heldout_elbo(small_vae, images[order], num_samples=3)
    torch.testing.assert_close(shuffled.elbo, whole.elbo[order], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(heldout_elbo(small_vae, images.pixels, num_samples=3).kl, whole.kl, rtol=1e-5, atol=1e-4)


def test_heldout_elbo_depends_on_its_seed_and_on_nothing_else_random(small_vae, digits):
    first = heldout_elbo(small_vae, digits[:20]).elbo
    torch.manual_seed(7)
    assert torch.equal(heldout_elbo(small_vae, digits[:20]).elbo, first)
    assert torch.equal(heldout_elbo(small_vae, digits[:20], seed=0).elbo, first)
    assert not torch.equal(heldout_elbo(small_vae, digits[:20], seed=1).elbo, first)
    one_sample = heldout_elbo(small_vae, digits[:20], num_samples=1).elbo
    assert torch.equal(one_sample, first)


def test_heldout_elbo_is_vae_elbo_on_fresh_draws(small_vae, digits, generator):
    images = digits[:200]
    estimate = heldout_elbo(small_vae, images, num_samples=5)
    x = small_vae.likelihood.observe(images.pixels, generator)
    with torch.no_grad():
        fresh = small_vae.elbo(x, 5, generator=generator)
    for mine, other in zip(estimate[:2], fresh[:2], strict=True):
        assert abs(mine.mean() - other.mean()) < 4 * (mine - other).std() / math.sqrt(200)


def test_evaluation_builds_no_graph_and_leaves_the_mode_alone(small_vae, digits):
    class Watch(torch.nn.Module):
        """A decoder that notes in which mode it was called."""

        def __init__(self, decoder):
            super().__init__()
            self.decoder, self.seen = decoder, []

        def forward(self, z):
            self.seen.append((self.training, torch.is_grad_enabled()))
            return self.decoder(z)

    small_vae.decoder = Watch(small_vae.decoder)
    for mode in (True, False):
        small_vae.train(mode)
        terms = heldout_elbo(small_vae, digits[:5])
        assert small_vae.training is mode
        assert not terms.elbo.requires_grad
        assert terms.log_likelihood.grad_fn is None
    assert set(small_vae.decoder.seen) == {(False, False)}
    assert all(p.grad is None for p in small_vae.parameters())
    small_vae.train()
    small_vae.encoder.eval()  # a part that was frozen stays frozen
    heldout_elbo(small_vae, digits[:5])
    assert [small_vae.training, small_vae.encoder.training, small_vae.decoder.training] == [True, False, True]
    with pytest.raises(ValueError, match="pixels"):
        heldout_elbo(small_vae, digits.pixels[:0])
    assert small_vae.training


def test_every_likelihood_fits_the_mlp(digits, generator):
    for name in LIKELIHOODS:
        model = mlp_vae((3, 8, 6), (16, 8), 3, name)
        x = model.likelihood.observe(torch.randint(0, 256, (4, 3, 8, 6), generator=generator, dtype=torch.uint8), generator)
        terms = model.elbo(x)
        assert terms.elbo.shape == (4,)
        terms.elbo.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_mlp_vae_builds_the_layers_it_names():
    model = mlp_vae((1, 28, 28), (400, 200), 20, activation="leaky_relu")
    linear = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert linear == [(784, 400), (400, 200), (200, 40), (20, 200), (200, 400), (400, 784)]
    assert sum(isinstance(m, torch.nn.LeakyReLU) for m in model.modules()) == 4
    assert model.config == {
        "model": "mlp",
        "image_shape": [1, 28, 28],
        "hidden_dims": [400, 200],
        "latent_dim": 20,
        "likelihood": {"name": "bernoulli", "binarize": "sample"},
        "activation": "leaky_relu",
    }
    default = mlp_vae()
    linear = [(m.in_features, m.out_features) for m in default.modules() if isinstance(m, torch.nn.Linear)]
    assert linear == [(784, 400), (400, 40), (20, 400), (400, 784)]
    assert default.image_shape == (1, 28, 28)
    assert default.config["activation"] == "relu"
    assert default.likelihood.config["name"] == "bernoulli"
    assert default.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: got int 0, expected an integer of at least 1"),
        ({"latent_dim": 2.5}, "latent_dim: got float 2.5"),
        ({"hidden_dims": (400, 0)}, "hidden_dims: got int 0"),
        ({"hidden_dims": 400}, r"hidden_dims: got int 400, expected a sequence of integers such as \(400,\)"),
        ({"hidden_dims": "400"}, "hidden_dims: got str '400'"),
        ({"hidden_dims": None}, "hidden_dims: got NoneType None"),
        ({"image_shape": (28, 28)}, r"image_shape: got tuple \(28, 28\), expected \(channels, height, width\)"),
        ({"image_shape": (1, 28, -1)}, "image_shape = .*: got int -1"),
        ({"likelihood": "bernouilli"}, "likelihood: got 'bernouilli'.*did you mean 'bernoulli'"),
        ({"activation": "rellu"}, "activation: got 'rellu'.*did you mean 'relu'"),
    ],
)
def test_mlp_vae_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mlp_vae(**arguments)


def test_a_vae_of_ones_own_networks_checks_its_shapes():
    networks = MLPEncoder((1, 4, 4), (3,), 2), MLPDecoder(2, (3,), (1, 4, 4)), vaelib.Bernoulli()
    with pytest.raises(ValueError, match="latent_dim: got int 0"):
        VAE(*networks, (1, 4, 4), 0)
    with pytest.raises(ValueError, match="image_shape: got"):
        VAE(*networks, (4, 4), 2)
    model = VAE(*networks, [1, 4, 4], 2)
    assert model.image_shape == (1, 4, 4)
    assert model.config is None


@given(
    st.integers(1, 4), st.sampled_from([(1, 2, 2), (3, 1, 4), (1, 5, 3)]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 255)
)
def test_elbo_has_one_finite_number_per_image(n, image_shape, latent_dim, num_samples, level):
    model = mlp_vae(image_shape, (4,), latent_dim)
    x = model.likelihood.observe(torch.full((n, *image_shape), level, dtype=torch.uint8))
    terms = model.elbo(x, num_samples)
    for values in (terms.log_likelihood, terms.kl, terms.elbo):
        assert values.shape == (n,)
        assert torch.isfinite(values).all()
    assert terms.kl_per_unit.shape == (n, latent_dim)
    torch.testing.assert_close(terms.kl_per_unit.sum(1), terms.kl)
    assert model.log_weights(x, num_samples).shape == (num_samples, n)


def test_keyed_noise_is_uniform_normal_and_uncorrelated(digits):
    keys = noise.image_keys(digits.pixels)
    assert len(keys.unique()) == len(digits.pixels.unique(dim=0))
    uniform = noise.uniform_noise(keys, (400,), noise.OBSERVE).double()
    assert uniform.min() > 0
    assert uniform.max() < 1
    counts = torch.histc(uniform, 64, 0, 1)
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
    assert 25 < chi_squared < 120  # 63 degrees of freedom: mean 63, standard deviation 11
    normal = noise.normal_noise(keys, (400,), noise.LATENT).double()
    n = normal.numel()
    assert abs(normal.mean()) < 4 / math.sqrt(n)
    assert abs(normal.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((normal**4).mean() - 3) < 4 * math.sqrt(96 / n)
    for a, b in ((normal[:, :-1], normal[:, 1:]), (normal[:-1], normal[1:]), (normal, uniform - 0.5)):
        assert abs((a * b).mean() / (a.std() * b.std())) < 4 / math.sqrt(n)
    torch.testing.assert_close(noise.normal_noise(keys, (100,), noise.LATENT, start=300), normal[:, 300:].float())


def test_conv_vae_has_128_latents_and_a_decoder_that_mirrors_the_encoder():
    assert vaelib.conv_vae().latent_dim == 128
    model = vaelib.conv_vae((1, 8, 8), 4, "bernoulli", channels=(3, 5))
    down = [
        layer.out_channels for layer in model.encoder.modules() if isinstance(layer, torch.nn.Conv2d) and layer.stride == (2, 2)
    ]
    up = [layer.in_channels for layer in model.decoder.modules() if isinstance(layer, torch.nn.ConvTranspose2d)]
    assert down == [3, 5]
    assert up == [5, 3]
