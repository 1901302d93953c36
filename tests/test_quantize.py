"""Vector quantization: rates and bounds against sums over all codes, gradients, running means, restarts, priors, tokens."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import vaelib
from vaelib import TrainConfig, fit, heldout_elbo, image_set
from vaelib.checks import VQ_MISTAKES, check_prior, check_vq
from vaelib.checks.codes import nearest, quantize_recipe
from vaelib.distributed import join
from vaelib.graphs import Watch
from vaelib.priors import FlowPrior, VampPrior, fit_prior
from vaelib.quantize import (
    Codebook,
    CodePrior,
    FiniteScalars,
    UniformCodes,
    code_maps,
    code_usage,
    fit_code_prior,
    gaussian_tokens,
    kmeans_start,
    perplexity,
    vq_vae,
)
from vaelib.step import TrainStep

PRIOR = {"width": 16, "layers": 2, "heads": 2}
SMALL = {"likelihood": "bernoulli", "width": 8, "narrow": 4, "blocks": 1}


def tiny(prior=None, **changes):
    """Images of 4 x 8 pixels, two places, three codes: nine maps in all."""
    torch.manual_seed(1)
    model = vq_vae((1, 4, 8), 3, 2, scale=1.0, restart=0.0, prior=prior, **SMALL, **changes)
    with torch.no_grad():  # far from its first weights, where nothing depends on anything
        for value in model.parameters():
            value += 0.3 * torch.randn_like(value)
    return model.eval()


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (20, 1, 4, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def all_maps(num_codes, places):
    return torch.tensor(list(itertools.product(range(num_codes), repeat=places)))


@pytest.mark.equation("uniform-rate")
@pytest.mark.parametrize("prior", [None, PRIOR])
def test_bounds_are_those_of_the_sum_over_all_maps_of_codes(prior, pixels):
    model = tiny(prior)
    kmeans_start(model, pixels)
    x = model.likelihood.observe(pixels, torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = all_maps(3, 2)
        z = model.prior.z_of(maps)  # (9, L)
        log_prior = model.prior.log_prob(z)
        joint = torch.stack([model.likelihood.log_prob(x, model.decode(code.expand(20, -1))) for code in z]) + log_prior[:, None]
        exact = joint.logsumexp(0)
        q = model.encode(x)
        terms = model.elbo(x)
        own = joint[q.tokens.flatten(1) @ torch.tensor([3, 1]), torch.arange(20)]
        assert len(q.tokens.unique()) > 1
    torch.testing.assert_close(terms.elbo, own)
    torch.testing.assert_close(model.importance_weighted_bound(x, 7), own)  # all its draws are one point
    assert (terms.elbo < exact).all()
    torch.testing.assert_close(exact.mean(), exact.mean().clamp(max=0))  # a probability
    if prior is None:
        torch.testing.assert_close(terms.kl, torch.full((20,), 2 * math.log(3)))
    else:
        torch.testing.assert_close(terms.kl, -log_prior[q.tokens.flatten(1) @ torch.tensor([3, 1])])
        assert terms.kl.std() > 0.01


@pytest.mark.parametrize("prior", [None, PRIOR])
def test_what_asks_for_a_continuous_code_names_what_it_cannot(prior, pixels):
    model = tiny(prior)
    with pytest.raises(ValueError, match=type(model.prior).__name__):
        vaelib.evaluation.annealed_log_likelihood(model, pixels, num_steps=2, num_chains=1)
    for asks in (vaelib.evaluation.posteriors, vaelib.rate_decomposition, vaelib.evaluation.inference_gaps):
        with pytest.raises(ValueError, match="OneHot"):
            asks(model, pixels)


@pytest.mark.equation("code-prior")
def test_the_probabilities_of_all_maps_sum_to_one_and_each_code_sees_only_those_before():
    torch.manual_seed(0)
    prior = CodePrior(Codebook(3, 2, scale=1.0), (2, 2), **PRIOR)
    maps = all_maps(3, 4)
    assert prior.log_prob(prior.z_of(maps)).unique().numel() == 1  # it starts as the uniform prior
    torch.nn.init.normal_(prior.head.weight)
    log_prob = prior.log_prob(prior.z_of(maps))
    assert log_prob.std() > 0.3
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(prior.log_prob(prior.z_of(maps)[None].expand(2, -1, -1)), log_prob.expand(2, -1))
    logits = prior.logits(maps)
    changed = prior.logits(torch.cat([maps[:, :2], 2 - maps[:, 2:]], 1))
    torch.testing.assert_close(logits[:, :3], changed[:, :3])
    assert not torch.allclose(logits[:, 3], changed[:, 3])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_of_a_code_prior_come_as_often_as_it_says(temperature):
    torch.manual_seed(0)
    prior = CodePrior(Codebook(3, 2, scale=1.0), (1, 2), **PRIOR)
    torch.nn.init.normal_(prior.head.weight)
    with torch.no_grad():
        z = prior.sample(20000, torch.Generator().manual_seed(0), temperature)
        counts = (prior.tokens_of(z) @ torch.tensor([3, 1])).bincount(minlength=9) / 20000
        maps = all_maps(3, 2)
        steps = (prior.logits(maps) / temperature).log_softmax(-1).gather(-1, maps[..., None])[..., 0]  # place by place
        expected = steps.sum(1).exp()
        assert ((counts - expected).abs() < 5 * (expected / 20000).sqrt()).all()
        assert torch.equal(prior.sample(5, torch.Generator().manual_seed(0), temperature), z[:5])
        likeliest = prior.tokens_of(prior.sample(3, torch.Generator().manual_seed(0), 0.0))
        assert (likeliest == likeliest[0]).all()
        assert likeliest[0, 0] == prior.logits(maps)[0, 0].argmax()


def test_the_uniform_prior_draws_each_code_alike_and_row_by_row():
    prior = UniformCodes(Codebook(5, 2, scale=1.0), (2, 3))
    z = prior.sample(4000, torch.Generator().manual_seed(0))
    counts = prior.tokens_of(z).flatten().bincount(minlength=5) / 24000
    assert (counts - 0.2).abs().max() < 5 * math.sqrt(0.2 / 24000)
    assert torch.equal(prior.sample(3, torch.Generator().manual_seed(0)), z[:3])


@pytest.mark.equation("nearest-code")
def test_the_nearest_code_is_that_of_all_distances_and_the_first_of_equals():
    torch.manual_seed(0)
    book, vectors = Codebook(50, 6, scale=1.0), torch.randn(4, 3, 3, 6)
    expected = (vectors[..., None, :] - book.codes).square().sum(-1).argmin(-1)
    assert torch.equal(book.nearest(vectors), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.nearest(vectors), expected)
    book.codes[7] = book.codes[3]
    assert book.nearest(book.codes[7]) == 3


@pytest.mark.equation("straight-through")
@pytest.mark.parametrize("learn", ["ema", "gradient"])
def test_z_is_the_codes_and_its_gradient_is_the_output_s(learn):
    torch.manual_seed(0)
    book, output = Codebook(5, 3, learn=learn, scale=1.0), torch.randn(2, 2, 2, 3, requires_grad=True)
    q, weight = book(output), torch.randn(2, 12)
    assert torch.equal(q.mean, book.codes[q.tokens].movedim(-1, 1).flatten(1))  # to the last bit
    gradient = torch.autograd.grad((weight * q.mean).sum(), [output, *book.parameters()], allow_unused=True)
    torch.testing.assert_close(gradient[0], weight.unflatten(1, (3, 2, 2)).movedim(1, -1))
    assert not any(part is not None for part in gradient[1:])
    assert torch.equal(q.log_prob(q.sample(torch.randn(4, 2, 12))), torch.zeros(4, 2))
    assert (q.log_prob(q.mean + 0.1) == -math.inf).all()


@pytest.mark.equation("vq-loss")
def test_the_loss_moves_codes_by_their_distance_and_the_output_by_beta_times_it():
    torch.manual_seed(0)
    output = torch.randn(3, 2, 2, 4, requires_grad=True)
    book = Codebook(5, 4, learn="gradient", commitment=0.25, scale=1.0)
    q = book(output)
    difference = output - book.codes[q.tokens]
    torch.testing.assert_close(q.loss, 1.25 * difference.square().flatten(1).sum(1))
    to_output, to_codes = torch.autograd.grad(q.loss.sum(), [output, book.codes])
    torch.testing.assert_close(to_output, (2 * 0.25 * difference).detach())
    expected = torch.zeros(5, 4).index_add_(0, q.tokens.flatten(), -2 * difference.detach().flatten(0, 2))
    torch.testing.assert_close(to_codes, expected)
    running = Codebook(5, 4, commitment=0.25, scale=1.0)
    torch.testing.assert_close(
        running(output).loss, 0.25 * (output - running.codes[running(output).tokens]).square().flatten(1).sum(1)
    )


@pytest.mark.equation("codebook-average")
def test_running_means_are_the_formula_and_tend_to_the_means_of_the_outputs_that_chose_each_code():
    torch.manual_seed(0)
    book, output, eps = Codebook(4, 3, decay=0.9, restart=0.0, scale=0.5), torch.randn(8, 2, 2, 3), torch.randn(1, 8, 12)
    first, tokens = book.codes.clone(), book.nearest(output)
    one_hot = F.one_hot(tokens.flatten(), 4).float() * 4 / 32  # in even shares
    counts, sums = 0.9 + 0.1 * one_hot.sum(0), 0.9 * first + 0.1 * one_hot.T @ output.flatten(0, 2)
    book.follow(output, tokens, eps)
    torch.testing.assert_close(book.codes, sums / counts[:, None], rtol=1e-4, atol=1e-4)
    for _ in range(300):  # one assignment for good: k-means' mean
        book.follow(output, tokens, eps)
    for code in tokens.unique():
        torch.testing.assert_close(book.codes[code], output[tokens == code].mean(0), rtol=1e-3, atol=1e-3)


def test_an_unused_code_stays_where_it_is_or_moves_onto_an_output_and_used_ones_are_left_alone():
    torch.manual_seed(0)
    output, eps = torch.randn(6, 2, 2, 3), torch.randn(1, 6, 12)
    far = 50 * torch.ones(2, 3)
    for restart in (0.0, 0.2):
        book = Codebook(5, 3, decay=0.5, restart=restart, scale=1.0)
        book.counts.fill_(1.0)
        book.codes[3:] = far
        book.sums.copy_(book.codes)
        for _ in range(2):  # an unused code's count is a quarter of an even one, then an eighth
            book.follow(output, book.nearest(output), eps)
        torch.testing.assert_close(book.codes[3:], far, rtol=1e-3, atol=0)
        used = book.nearest(output)
        counts = 0.5 * book.counts + 0.5 * used.flatten().bincount(minlength=5) * 5 / 24
        book.follow(output, used, eps)
        if restart == 0:
            torch.testing.assert_close(book.codes[3:], far, rtol=1e-3, atol=0)
            continue
        distances = torch.cdist(book.codes, output.flatten(0, 2)).min(1).values
        assert (distances[3:] < 1e-6).all()
        assert not torch.equal(book.codes[3], book.codes[4])
        assert torch.equal(distances < 1e-6, counts < restart)
        assert torch.equal(book.counts[3:], torch.ones(2))


def test_with_restarts_the_first_step_puts_the_codes_onto_outputs():
    torch.manual_seed(0)
    book, output = Codebook(64, 3), 5 + torch.randn(16, 2, 2, 3)
    book.follow(output, book.nearest(output), torch.randn(1, 16, 12))
    assert len(book.nearest(output).unique()) > 40


@pytest.mark.equation("finite-scalars")
def test_finite_scalars_are_the_nearest_levels_and_their_gradient_is_that_of_tanh():
    book = FiniteScalars((4, 3, 5))
    assert book.num_codes == 60
    assert torch.equal(book.nearest(book.codes), torch.arange(60))
    torch.manual_seed(0)
    output = (2 * torch.randn(5, 2, 2, 3)).requires_grad_()
    q = book(output)
    assert torch.equal(q.tokens, torch.cdist(output.detach().tanh().flatten(0, 2), book.codes).argmin(1).view(5, 2, 2))
    assert torch.equal(q.mean, book.codes[q.tokens].movedim(-1, 1).flatten(1))
    assert q.loss is None
    (gradient,) = torch.autograd.grad(q.mean.sum(), [output])
    torch.testing.assert_close(gradient, 1 - output.detach().tanh() ** 2)


@pytest.mark.equation("perplexity")
def test_perplexity_is_the_exponential_of_the_entropy():
    assert perplexity(torch.full((7,), 3.0)).item() == pytest.approx(7)
    assert perplexity(torch.tensor([0.0, 5.0, 0.0])).item() == pytest.approx(1)
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert perplexity(8 * shares).item() == pytest.approx(2**1.5)


def test_usage_counts_each_place_of_each_image(pixels):
    model = tiny()
    usage, maps = code_usage(model, pixels, batch_size=8), code_maps(model, pixels)
    assert torch.equal(usage.counts, maps.flatten().bincount(minlength=3))
    assert usage.perplexity == pytest.approx(perplexity(usage.counts.double()).item())
    each = [perplexity(part.flatten().bincount(minlength=3).double()).item() for part in (maps[:8], maps[8:16])]  # whole batches
    assert usage.batch_perplexity == pytest.approx(sum(each) / 2)
    assert usage.used == (usage.counts > 0).sum()


def test_k_means_puts_each_code_onto_the_mean_of_what_is_nearest_to_it(pixels):
    model = tiny()
    x = model.likelihood.observe(pixels, uniform=torch.full(pixels.shape, 0.5))
    model.likelihood = vaelib.Bernoulli("threshold")

    def error():
        output = model.encode((pixels >= 128).float()).output
        return (output - model.codebook.codes[model.codebook.nearest(output)]).square().sum(-1).mean().item()

    before = error()
    kmeans_start(model, pixels, rounds=30)
    assert error() < before
    output = model.encode((pixels >= 128).float()).output.detach()
    for code in range(3):
        mine = output[model.codebook.nearest(output) == code]
        torch.testing.assert_close(model.codebook.codes[code], mine.mean(0))
    assert x.shape == pixels.shape


@pytest.mark.parametrize("changes", [{}, {"learn": "gradient"}, {"levels": (4, 4)}, {"prior": PRIOR}])
def test_a_run_cut_off_amid_an_epoch_goes_on_to_the_same_bits(changes, tmp_path, monkeypatch):
    images = vaelib.load_images("digits")[:96]
    config = TrainConfig(epochs=3, batch_size=32, checkpoint_minutes=0.0, progress=False, device="cpu")

    def model():
        torch.manual_seed(0)
        return vq_vae((1, 28, 28), 16, 4, **SMALL, **changes)

    whole, cut, resumed = model(), model(), model()
    history = fit(whole, images, images, config)
    draw, calls = vaelib.VQVAE.draw_with, itertools.count()

    def interrupted(self, x, eps):
        if self.training and next(calls) == 4:
            raise KeyboardInterrupt
        return draw(self, x, eps)

    monkeypatch.setattr(vaelib.VQVAE, "draw_with", interrupted)
    assert fit(cut, images, images, config, folder=tmp_path).stopped == "interrupted"
    monkeypatch.undo()
    again = fit(resumed, images, images, config, folder=tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for column in ("train_elbo", "valid_elbo", "perplexity", "batch_perplexity", "codes_used"):
        assert history[column] == again[column]


@pytest.mark.parametrize("changes", [{}, {"learn": "gradient"}, {"levels": (4, 4)}, {"prior": PRIOR}])
def test_a_step_reads_nothing_back_from_the_device(changes):
    model = vq_vae((1, 28, 28), 16, 4, **SMALL, **changes)
    config = TrainConfig(batch_size=16, epochs=1, device="cpu", progress=False)
    cpu = torch.device("cpu")
    taker = TrainStep(model.train(), vaelib.load_images("digits")[:48], config, join(cpu), cpu, True)
    for step in taker.steps_to_come(1, 0):
        with Watch() as watch:
            step()
        assert watch.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changes", [{}, {"learn": "gradient"}, {"levels": (4, 4)}, {"prior": PRIOR}])
def test_the_steps_on_a_gpu_are_replayed_from_a_graph(changes):
    torch.manual_seed(0)
    model = vq_vae((1, 28, 28), 16, 4, **SMALL, **changes)
    config = TrainConfig(epochs=3, batch_size=32, progress=False, device="cuda")
    history = fit(model, vaelib.load_images("digits")[:320], None, config)
    assert history.not_replayed is None
    assert history[-1]["train_elbo"] > history[0]["train_elbo"]


def test_the_history_tells_perplexity_and_use_and_evaluation_moves_no_code():
    torch.manual_seed(0)
    images = vaelib.load_images("digits")[:128]
    model = vq_vae((1, 28, 28), 16, 4, **SMALL)
    history = fit(model, images, images, TrainConfig(epochs=2, batch_size=32, progress=False, device="cpu"))
    assert 1 <= history[-1]["batch_perplexity"] <= 16
    assert 1 <= history[-1]["perplexity"] <= 16
    assert 1 <= history[-1]["codes_used"] <= 16
    before = model.codebook.codes.clone()
    heldout_elbo(model, images)
    assert torch.equal(model.codebook.codes, before)


def test_a_prior_over_codes_lowers_the_rate_alone_and_is_saved_with_the_model(tmp_path):
    torch.manual_seed(0)
    images = vaelib.load_images("digits")[:512]
    model = vq_vae((1, 28, 28), 16, 4, **SMALL)
    fit(model, images, None, TrainConfig(epochs=4, batch_size=32, progress=False, device="cpu"))
    before = heldout_elbo(model, images)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    course = fit_code_prior(model, images, epochs=4, batch_size=32, **PRIOR)
    assert torch.equal(torch.get_rng_state(), state)
    after = heldout_elbo(model, images)
    assert before.kl.mean().item() == pytest.approx(49 * math.log(16), rel=1e-5)
    assert after.kl.mean() < course[-1] < course[0] < before.kl.mean()
    assert torch.equal(after.log_likelihood, before.log_likelihood)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    nats = model.prior.nats(code_maps(model, images).flatten(1)).sum(1)
    torch.testing.assert_close(after.kl, nats.detach())
    vaelib.save(model, tmp_path)
    loaded = vaelib.load(tmp_path)
    assert torch.equal(vaelib.generate(loaded, 3, seed=0), vaelib.generate(model, 3, seed=0))
    assert vaelib.generate(model, 3, seed=0, temperature=0.5).shape == (3, 1, 28, 28)


def test_fit_trains_a_prior_over_codes_with_the_model_too():
    torch.manual_seed(0)
    images = vaelib.load_images("digits")[:512]
    model = vq_vae((1, 28, 28), 16, 4, prior=PRIOR, **SMALL)
    history = fit(model, images, None, TrainConfig(epochs=4, batch_size=32, progress=False, device="cpu"))
    assert history[-1]["train_kl"] < 0.9 * 49 * math.log(16)


@pytest.mark.equation("gaussian-tokens")
def test_a_token_is_as_near_as_a_draw_once_its_bits_exceed_the_rate():
    torch.manual_seed(0)
    q = vaelib.Posterior(torch.randn(2000, 3), torch.tensor([0.5, 0.1, 0.02]).log().mul(2).expand(2000, 3))
    rate = vaelib.gaussian_kl_per_unit(q.mean, q.log_var) / math.log(2)  # bits, of each image and unit
    for bits in (1, 4, 8, 12):
        tokens, z = gaussian_tokens(q, 2**bits)
        assert tokens.max() < 2**bits
        squares = (z - q.mean) ** 2 / q.log_var.exp()  # 1 on average for a draw of q
        above, below = squares[rate < bits - 2], squares[rate > bits + 1]
        assert len(above) == 0 or above.mean() < 1
        assert len(below) == 0 or below.mean() > 1
    assert len(above) > 1000
    assert torch.equal(gaussian_tokens(q, 16, group=3)[1], gaussian_tokens(q, 16, group=3)[1])


def test_tokens_drawn_by_their_weights_tend_to_draws_of_q():
    q = vaelib.Posterior(torch.full((4000, 1), 0.7), torch.full((4000, 1), 0.3).log().mul(2))
    _, z = gaussian_tokens(q, 4096, nearest=False)
    assert z.mean().item() == pytest.approx(0.7, abs=0.03)
    assert z.std().item() == pytest.approx(0.3, abs=0.03)
    _, by_two = gaussian_tokens(q, 2, nearest=False)
    assert len(by_two.unique()) == 2


@pytest.mark.equation("flow-prior")
def test_a_flow_is_a_density_of_what_it_samples():
    torch.manual_seed(0)
    flow = FlowPrior(2, layers=3, width=16)
    z = torch.randn(7, 4, 2)
    torch.testing.assert_close(flow.log_prob(z), vaelib.StandardNormal(2).log_prob(z))  # its start
    for network in flow.networks:
        torch.nn.init.normal_(network[1].weight, std=0.3)
        torch.nn.init.normal_(network[1].bias, std=0.3)
    found = check_prior(flow, 2)
    assert found, found
    axis = torch.linspace(-12, 12, 601)
    grid = torch.cartesian_prod(axis, axis)
    assert (flow.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2).item() == pytest.approx(1, abs=1e-3)
    eps = torch.randn(5, 2, requires_grad=True)
    jacobian = torch.stack([torch.autograd.functional.jacobian(flow.from_noise, each) for each in eps])
    volume = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(
        flow.log_prob(flow.from_noise(eps)), vaelib.StandardNormal(2).log_prob(eps) - volume, rtol=1e-4, atol=1e-4
    )


def plane_model():
    torch.manual_seed(0)
    images = vaelib.load_images("digits")[:200]
    model = vaelib.mlp_vae((1, 28, 28), (32,), 2, {"name": "bernoulli", "binarize": "threshold"})
    fit(model, images, None, TrainConfig(epochs=20, batch_size=50, progress=False, device="cpu"))
    return model, images


@pytest.mark.equation("learned-prior-gain")
def test_what_a_prior_gains_is_the_fall_of_the_aggregate_posterior_s_kl():
    model, images = plane_model()
    model.eval()
    for value in model.parameters():
        value.requires_grad_(False)
    q = vaelib.evaluation.posteriors(model, images)
    axis = torch.linspace(-8, 8, 401)
    grid, cell = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
    log_aggregate = torch.stack([q.log_prob(part[:, None]).logsumexp(1) for part in grid.split(5000)[:-1]]).flatten()
    log_aggregate = torch.cat([log_aggregate, q.log_prob(grid[len(log_aggregate) :, None]).logsumexp(1)]) - math.log(200)
    share = log_aggregate.exp() * cell
    assert share.sum().item() == pytest.approx(1, abs=1e-3)

    def of_the_aggregate(prior):
        return (share * (log_aggregate - prior.log_prob(grid))).sum().item()

    def rate(prior):
        eps = torch.randn(2000, 200, 2, generator=torch.Generator().manual_seed(0))
        z = q.sample(eps)
        return (q.log_prob(z) - prior.log_prob(z)).mean().item()

    normal = vaelib.StandardNormal(2)
    vamp, flow = VampPrior(model, images, 20), FlowPrior(2, layers=4, width=32)
    for prior in (vamp, flow):
        course = fit_prior(model, images, prior, epochs=150, batch_size=100, learning_rate=1e-2)
        assert course[-1] < course[0]
        gain = rate(normal) - rate(prior)
        assert gain == pytest.approx(of_the_aggregate(normal) - of_the_aggregate(prior), abs=0.01)
        assert 0.05 < gain < of_the_aggregate(normal)  # what no prior exceeds
    found = check_prior(vamp, 2)
    assert found, found


def test_a_vamp_prior_is_the_even_mixture_at_its_inputs():
    model, images = plane_model()
    prior = VampPrior(model, images, 5)
    q = model.encode(prior.inputs, validate=False)
    z = torch.randn(3, 4, 2)
    parts = torch.distributions.Normal(q.mean, (0.5 * q.log_var).exp()).log_prob(z[..., None, :]).sum(-1)
    torch.testing.assert_close(prior.log_prob(z), parts.logsumexp(-1) - math.log(5))
    assert [name for name, _ in prior.named_parameters()] == ["inputs"]


def by_hand(output, codes, beta):
    tokens = ((output[:, None] - codes) ** 2).sum(-1).min(1).indices
    chosen = torch.nn.functional.embedding(tokens, codes)
    squares = (output.detach() - chosen).pow(2).sum(-1) + beta * (output - chosen.detach()).pow(2).sum(-1)
    return output + (chosen - output).detach(), squares


def by_one_hot(output, codes, beta):
    one_hot = F.one_hot(nearest(output, codes), len(codes)).to(codes)
    chosen = one_hot @ codes
    loss = F.mse_loss(chosen, output.detach(), reduction="none") + beta * F.mse_loss(output, chosen.detach(), reduction="none")
    return (chosen - output).detach() + output, loss.sum(1)


@pytest.mark.parametrize("right", [by_hand, by_one_hot, quantize_recipe])
def test_right_quantizations_pass(right):
    found = check_vq(right)
    assert found, found


@pytest.mark.parametrize("name", VQ_MISTAKES)
def test_each_known_mistake_gets_its_name(name):
    for wrong in VQ_MISTAKES[name][1:]:
        assert check_vq(wrong).mistake == name


def test_two_mistakes_get_both_names_and_other_trouble_its_own():
    def pair(output, codes, beta):
        return quantize_recipe(output, codes, beta, straight="nowhere", factor=2.0)

    assert check_vq(pair).mistake == "no-straight-through + twice"
    assert check_vq(lambda output, codes, beta: None).mistake == "no-return"
    assert check_vq(lambda output, codes, beta: (output, (output**2).mean())).mistake == "shape"
    assert check_vq(lambda output, codes, beta: output.nothing).mistake == "raises"
    noisy = check_vq(lambda output, codes, beta: (output + torch.randn_like(output), output.sum(1)))
    assert noisy.mistake == "own-noise"
    shifted = check_vq(lambda output, codes, beta: tuple(part + 0.1 for part in quantize_recipe(output, codes, beta)))
    assert not shifted
    assert "no mistake that I know" in shifted.message


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Codebook(1, 3), "num_codes"),
        (lambda: Codebook(4, 0), "code_dim"),
        (lambda: Codebook(4, 3, learn="adam"), "learn"),
        (lambda: Codebook(4, 3, decay=1.0), "decay"),
        (lambda: Codebook(4, 3, scale=0.0), "scale"),
        (lambda: Codebook(4, 3, restart=-1.0), "restart"),
        (lambda: FiniteScalars(8), "levels"),
        (lambda: FiniteScalars((8, 1)), "levels"),
        (lambda: vq_vae((1, 30, 30)), "image_shape"),
        (lambda: vq_vae((1, 28, 28), halvings=0), "halvings"),
        (lambda: vq_vae((1, 28, 28), prior={"width": 10, "heads": 4}), "width"),
        (lambda: code_maps(vaelib.mlp_vae(), torch.zeros(2, 1, 28, 28, dtype=torch.uint8)), "model"),
        (lambda: kmeans_start(vq_vae((1, 28, 28), levels=(4,), **SMALL), vaelib.load_images("digits")[:5]), "model"),
        (lambda: kmeans_start(vq_vae((1, 28, 28), 512, 4, **SMALL), vaelib.load_images("digits")[:5]), "images"),
        (lambda: gaussian_tokens(vaelib.Posterior(torch.zeros(2, 3), torch.zeros(2, 3)), 8, group=2), "group"),
        (lambda: FlowPrior(1), "latent_dim"),
        (lambda: VampPrior(vaelib.mlp_vae(), vaelib.load_images("digits")[:5], 6), "images"),
    ],
)
def test_a_bad_argument_is_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name}: got"):
        call()


def test_a_batch_of_one_small_image_has_noise_enough_for_its_restarts():
    torch.manual_seed(0)
    model = vq_vae((1, 4, 8), 64, 2, **SMALL).train()
    model.elbo(model.likelihood.observe(torch.zeros(1, 1, 4, 8, dtype=torch.uint8)))
    assert model.codebook.codes.isfinite().all()
    images = image_set(torch.zeros(3, 1, 4, 8, dtype=torch.uint8))
    fit(model, images, None, TrainConfig(epochs=2, batch_size=2, progress=False, device="cpu"))
    assert model.codebook.codes.isfinite().all()
