"""Bits-back coding: what is pushed is popped, at the promised length, on any machine, and a file that is wrong says so."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import vaelib
from vaelib import coding, fixed
from vaelib.book.oracles import LinearGaussian, exact_vae
from vaelib.coding import Bins, BitsBack, Distribution, Message, compress, decompress
from vaelib.densities import Posterior

LOG2 = math.log(2)


def table(frequencies, length=1, precision=coding.PRECISION):
    """The distribution with these probabilities, for each of `length` symbols."""
    below = np.concatenate([[0], np.cumsum(np.array(frequencies, dtype=float) / np.sum(frequencies))])
    shares = np.rint(below * fixed.FULL).astype(np.int64)
    return Distribution(lambda k, at: shares[k], len(frequencies), length, precision)


def push_big(x, start, frequency, precision):
    """ANS on one integer of any size: the definition, which `Message` follows in words of 32 bits."""
    return (x // frequency << precision) + x % frequency + start


def pop_big(x, find, precision):
    target = x & ((1 << precision) - 1)
    symbol, start, frequency = find(target)
    return symbol, frequency * (x >> precision) + target - start


def trained(**arguments):
    """A small model, a little trained, and some test images of its set."""
    torch.manual_seed(0)
    model = vaelib.mlp_vae((1, 28, 28), hidden_dims=(64,), latent_dim=8, **arguments)
    train, test = (vaelib.load_images("digits", split) for split in ("train", "test"))
    if arguments["likelihood"] == "bernoulli":
        train, test = (vaelib.image_set((part.pixels >= 128).to(torch.uint8) * 255) for part in (train, test))
    vaelib.fit(model, train, None, vaelib.TrainConfig(epochs=8, seed=0, progress=False))
    return model.eval(), test.pixels[: 70 if arguments["likelihood"] == "bernoulli" else 40]


@pytest.fixture(scope="module")
def binary():
    return trained(likelihood="bernoulli")


@pytest.fixture(scope="module")
def grey():
    return trained(likelihood="discretized_logistic")


def random_conv(likelihood="discretized_logistic_mixture", **arguments):
    torch.manual_seed(3)
    return vaelib.conv_vae((3, 32, 32), latent_dim=6, likelihood=likelihood, channels=(8, 12), **arguments).eval()


# the coder


@pytest.mark.equation("ans-push")
def test_popping_undoes_pushing_on_one_integer_and_on_words():
    probabilities = [0.5, 0.3, 0.15, 0.05]
    symbols = np.random.default_rng(0).choice(4, size=2000, p=probabilities)
    distribution = table(probabilities)
    edges = [int(distribution.cdf(np.array([k]))[0]) for k in range(5)]
    start = x = int(Message().heads[0])
    for s in symbols:
        x = push_big(x, edges[s], edges[s + 1] - edges[s], distribution.precision)
    length = math.log2(x) - 32
    for s in reversed(symbols):
        popped, x = pop_big(
            x, lambda t: next((k, edges[k], edges[k + 1] - edges[k]) for k in range(4) if edges[k] <= t < edges[k + 1]), 28
        )
        assert popped == s
    assert x == start
    message = Message()
    for s in symbols:
        message.push([s], distribution)
    assert message.bits == pytest.approx(length, rel=1e-4)  # the words cost no more than the definition
    for s in reversed(symbols):
        assert message.pop(distribution) == s
    assert message.is_start()
    assert message.initial == 0


@pytest.mark.parametrize("lanes", [1, 3, 64])
def test_the_length_is_the_promised_one_in_any_number_of_lanes(lanes):
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(50))
    symbols = rng.choice(50, size=5000, p=probabilities)
    distribution = table(probabilities, 5000)
    message = Message(lanes)
    start = message.bits
    message.push(symbols, distribution)
    assert message.bits - start == pytest.approx(distribution.bits(symbols).sum(), rel=1e-4)
    assert np.array_equal(message.pop(distribution), symbols)
    assert message.is_start()


@pytest.mark.equation("code-length")
def test_symbols_of_a_distribution_cost_its_entropy_and_a_wrong_one_costs_the_divergence_more():
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(8)), rng.dirichlet(np.ones(8))
    symbols = rng.choice(8, size=200_000, p=p)
    costs = [table(probabilities, len(symbols)).bits(symbols) for probabilities in (p, q)]
    error = [cost.std() / math.sqrt(len(symbols)) for cost in costs]
    assert costs[0].mean() == pytest.approx(stats.entropy(p, base=2), abs=4 * error[0])
    assert costs[1].mean() == pytest.approx(stats.entropy(p, base=2) + stats.entropy(p, q, base=2), abs=4 * error[1])


@pytest.mark.equation("integer-frequencies")
def test_each_value_has_a_share_however_unlikely_and_the_shares_fill_the_whole():
    certain = Distribution(lambda k, at: np.where(k > 3, fixed.FULL, 0), 256, 1)
    edges = np.array([int(certain.cdf(np.array([k]))[0]) for k in range(257)])
    assert edges[0] == 0
    assert edges[-1] == 2**certain.precision
    assert np.diff(edges).min() == 1
    message = Message()
    message.push([200], certain)  # of probability 0 before the shares were made at least 1
    assert message.pop(certain) == 200
    assert certain.bits(np.array([200])) == pytest.approx(28)


def test_what_is_popped_of_spare_words_has_the_distribution_and_goes_back():
    probabilities = np.array([0.6, 0.3, 0.1])
    distribution = table(probabilities, 20_000)
    message = Message(8)
    popped = message.pop(distribution)
    counts = np.bincount(popped, minlength=3)
    assert stats.chisquare(counts, 20_000 * probabilities).pvalue > 0.001
    assert 32 * message.initial == pytest.approx(distribution.bits(popped).sum(), abs=32 * 9)
    message.push(popped, distribution)
    assert message.is_start()


def test_a_symbol_out_of_range_is_refused():
    for symbols in ([4], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"symbols: got .* expected 1 integers from 0 to 3"):
            Message().push(symbols, table([1, 1, 1, 1]))


# numbers that are the same everywhere


@pytest.mark.parametrize(
    ("name", "function", "unit"),
    [("normal", stats.norm.cdf, 2**30), ("logistic", stats.logistic.cdf, 2**30), ("exp", np.exp, 2**20)],
)
def test_a_tabled_curve_is_the_function_and_grows(name, function, unit):
    t = np.arange(-(7 << 16), 7 << 16, 97)
    values = fixed.curve(name)(t)
    assert np.abs(values / unit - function(t / 2**16)).max() < (1e-5 if name != "exp" else 1e-4 * math.exp(7))
    assert np.diff(values).min() >= 0


def test_the_tables_are_these_integers():
    """Another machine that had other tables would decode other pixels: here are their checksums."""
    import zlib

    found = {name: zlib.crc32(fixed.curve(name).values.astype("<i8").tobytes()) for name in ("normal", "logistic", "exp")}
    assert found == CHECKSUMS


CHECKSUMS = {"normal": 2166851029, "logistic": 2047292996, "exp": 2804115767}


def shuffled(model, seed):
    """The same function with the units of its hidden layer in another order: floating-point sums then come out differently."""
    generator = torch.Generator().manual_seed(seed)
    for network in (model.encoder, model.decoder):
        first, last = network.hidden[0], network.head
        order = torch.randperm(first.out_features, generator=generator)
        with torch.no_grad():
            first.weight.copy_(first.weight[order])
            first.bias.copy_(first.bias[order])
            last.weight.copy_(last.weight[:, order])
    return model


def test_exact_networks_do_not_see_the_order_of_their_sums_and_plain_ones_do():
    from copy import deepcopy

    model = vaelib.load("mnist-mlp")
    other = shuffled(deepcopy(model), 1)
    z = fixed.to_grid(torch.randn(50, 20, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(model.decode(z.float()), other.decode(z.float()))
    assert torch.equal(fixed.exact_model(model).decode(z), fixed.exact_model(other).decode(z))
    assert torch.equal(fixed.exact_model(model).decode(z)[:1], fixed.exact_model(model).decode(z[:1]))


def test_an_exact_model_has_no_parameters_and_is_scored_as_any_other():
    model, images = vaelib.load("mnist-mlp"), vaelib.load_images("digits", "test")[:10]
    exact = fixed.exact_model(model)
    assert exact.device.type == "cpu"
    assert not list(exact.encoder.parameters())
    found, plain = (vaelib.heldout_elbo(one, images).elbo for one in (exact, model))
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "gelu", "silu"])
def test_exact_networks_are_near_the_plain_ones(activation):
    torch.manual_seed(1)
    for model in (
        vaelib.mlp_vae((1, 8, 8), (30, 20), 5, activation=activation).eval(),
        random_conv(activation=activation, residual_blocks=1),
        vaelib.conv_vae((1, 15, 17), latent_dim=3, channels=(4, 6), activation=activation).eval(),
        vaelib.conv_vae((3, 16, 16), latent_dim=(2, 8, 8), channels=(4, 6), activation=activation).eval(),
    ):
        exact = fixed.exact_model(model)
        pixels = torch.randint(0, 256, (3, *model.image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        x = model.likelihood.observe(pixels, uniform=torch.full(pixels.shape, 0.5))
        z = fixed.to_grid(torch.randn(3, model.latent_dim, generator=torch.Generator().manual_seed(0)))
        with torch.no_grad():
            for got, plain in zip(exact.encode(x.double()), model.encode(x), strict=True):
                torch.testing.assert_close(got.float(), plain, atol=4e-3, rtol=0)
            torch.testing.assert_close(exact.decode(z).float(), model.decode(z.float()), atol=4e-3, rtol=0)
            assert torch.equal(exact.decode(z) * fixed.GRID, (exact.decode(z) * fixed.GRID).round())


def test_a_network_without_an_exact_form_is_refused_by_name():
    class Own(nn.Module):
        pass

    model = vaelib.mlp_vae((1, 4, 4), (), 2)
    model.decoder = Own()
    with pytest.raises(ValueError, match="model: got a network with a Own, which has no exact form"):
        BitsBack(model)
    model = vaelib.mlp_vae((1, 4, 4), (), 2)
    with torch.no_grad():
        model.decoder.head.weight.fill_(1e6)
    with pytest.raises(ValueError, match="expected smaller weights"):
        BitsBack(model)
    with pytest.raises(ValueError, match="expected N"):
        BitsBack(vaelib.hierarchical_vae((1, 8, 8), ((2, 1),), width=4, bottleneck=2, blocks=1))


# latents as integers


@pytest.mark.equation("equal-mass-bins")
def test_bins_have_equal_mass_under_the_prior_and_a_gaussians_own_under_it():
    bins = Bins(256)
    edges = bins.edges[1:-1] / 2**20
    assert np.abs(stats.norm.cdf(edges) - np.arange(1, 256) / 256).max() < 1e-5
    q = Posterior(torch.tensor([[0.5, -1.0]]), torch.tensor([[-2.0, -5.0]]))
    distribution = bins.gaussian(q)
    for place, (mean, log_var) in enumerate(((0.5, -2.0), (-1.0, -5.0))):
        masses = np.diff(np.concatenate([[0], stats.norm.cdf(edges, mean, math.exp(log_var / 2)), [1]]))
        found = [distribution.cdf(np.array([k, k]))[place] / 2**28 for k in range(257)]
        assert np.abs(np.diff(found) - masses).max() < 3e-5
    assert np.array_equal(bins.prior(1).cdf(np.arange(257)), np.arange(257))


# bits back


def length_of_each(codec, pixels, lanes=1):
    """Bits that the message grows by, image after image."""
    message = Message(lanes)
    lengths = []
    for image in pixels.split(1):
        before = message.bits - 32 * message.initial
        codec.push(message, image)
        lengths.append(message.bits - 32 * message.initial - before)
    return torch.tensor(lengths, dtype=torch.float64)


@pytest.mark.equation("bits-back")
@pytest.mark.parametrize("which", ["binary", "grey"])
def test_images_come_back_and_cost_their_negative_elbo(which, request):
    model, pixels = request.getfixturevalue(which)
    codec, message = BitsBack(model), Message(4)
    parts = pixels.split(7)
    for part in parts:
        codec.push(message, part)
    length = (message.bits - 32 * message.initial) / len(pixels)
    terms = vaelib.heldout_elbo(model, pixels, 20)
    each = length_of_each(codec, pixels) + terms.elbo / LOG2  # what one draw of z adds to the mean over draws, of each image
    assert length + terms.elbo.mean() / LOG2 == pytest.approx(0, abs=4 * each.std().item() / math.sqrt(len(pixels)) + 0.01 * length)
    assert abs(each.mean()) < 4 * each.std().item() / math.sqrt(len(pixels)) + 0.002 * length
    back = [codec.pop(message, len(part)) for part in reversed(parts)]
    assert torch.equal(torch.cat(back[::-1]), pixels)
    assert message.is_start()


@pytest.mark.parametrize(
    "likelihood",
    [
        "discretized_logistic",
        "discretized_logistic_mixture",
        {"name": "gaussian", "scale": 0.3, "learned": True, "discretized": True},
    ],
)
def test_colour_comes_back_and_an_image_unlike_the_data_is_longer_not_wrong(likelihood):
    model = random_conv(likelihood)
    shapes = vaelib.load_images("shapes", "test").pixels[:3]
    noise = torch.randint(0, 256, shapes.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([shapes, noise, torch.zeros_like(shapes), 255 - torch.zeros_like(shapes)])
    codec, message = BitsBack(model), Message(16)
    codec.push(message, pixels)
    x = model.likelihood.observe(pixels)
    with torch.no_grad():
        elbo = model.elbo(x, 30, generator=torch.Generator().manual_seed(1)).elbo.sum().item()
    assert message.bits - 32 * message.initial == pytest.approx(-elbo / LOG2, rel=0.01)
    assert torch.equal(codec.pop(message, len(pixels)), pixels)
    assert message.is_start()


def linear(scale=0.06, spread=0.4, seed=0):
    """A linear-Gaussian model of 16 pixels with orthogonal columns, on the scale [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q[:, :3]
    return LinearGaussian(directions * torch.tensor([0.6, 0.4, 0.3]).double() * spread, torch.zeros(16).double(), scale)


def images_of(oracle, count, seed=1):
    x = oracle.sample(count, torch.Generator().manual_seed(seed))
    assert x.abs().max() < 0.95  # no mass beyond the levels, where p(x) is not the code's
    return ((x + 1) * 127.5).round().to(torch.uint8).view(-1, 1, 4, 4)


def promised(oracle, pixels):
    """-log2 p(x) of each image, with the width of a level: (N,)."""
    x = pixels.flatten(1).double() / 127.5 - 1
    return -(oracle.log_evidence(x) + 16 * math.log(2 / 255)) / LOG2


@pytest.mark.equation("linear-code")
def test_with_the_exact_posterior_each_image_costs_minus_log_p_of_x():
    oracle = linear()
    pixels = images_of(oracle, 200)
    lengths = length_of_each(BitsBack(exact_vae(oracle, (1, 4, 4)), bins=2**14), pixels)
    differences = lengths - promised(oracle, pixels)
    assert differences.abs().max() < 0.5  # of 74 bits, in each single image, whichever z was drawn
    assert abs(differences.mean()) < 0.05


@pytest.mark.equation("code-excess")
def test_a_wrong_model_or_a_wrong_posterior_costs_its_divergence():
    truth, wrong = linear(), linear(scale=0.09, spread=0.25)
    pixels = images_of(truth, 400)
    excess = length_of_each(BitsBack(exact_vae(wrong, (1, 4, 4))), pixels) - promised(truth, pixels)
    covariances = [oracle.weight @ oracle.weight.T + oracle.scale**2 * torch.eye(16).double() for oracle in (truth, wrong)]
    divergence = torch.distributions.kl_divergence(
        *(torch.distributions.MultivariateNormal(torch.zeros(16).double(), covariance) for covariance in covariances)
    )
    assert divergence / LOG2 > 2
    assert excess.mean() == pytest.approx(divergence.item() / LOG2, abs=4 * excess.std().item() / 20)
    model = exact_vae(truth, (1, 4, 4))
    with torch.no_grad():
        model.encoder.head.bias[3:] += 1.5
    excess = length_of_each(BitsBack(model), pixels) - promised(truth, pixels)
    x = pixels.flatten(1).double() / 127.5 - 1
    with torch.no_grad():
        mean, log_var = model.encode(x.float().view(-1, 1, 4, 4))
    divergence = truth.posterior_kl(x, mean.double(), log_var.double()).mean() / LOG2
    assert divergence > 1
    assert excess.mean() == pytest.approx(divergence.item(), abs=4 * excess.std().item() / 20)


def test_an_exact_vae_asks_for_orthogonal_columns():
    with pytest.raises(ValueError, match="not orthogonal"):
        exact_vae(LinearGaussian(torch.ones(16, 2), torch.zeros(16), 0.1), (1, 4, 4))


@pytest.mark.parametrize("swap", [True, False])
def test_two_layers_come_back_in_either_order_and_bit_swap_borrows_less(swap):
    torch.manual_seed(0)
    model = vaelib.two_layer_vae((1, 28, 28), ((40,), (20,)), (10, 6)).eval()
    digits = vaelib.load_images("digits", "test").pixels[:40]
    pixels = (digits >= 128).to(torch.uint8) * 255
    codec, message = BitsBack(model, swap=swap), Message()
    for part in pixels.split(1):
        codec.push(message, part)
    assert message.initial * 32 <= (10 + 1) * 12 if swap else message.initial * 32 >= (10 + 6) * 10
    elbo = vaelib.heldout_elbo(model, pixels, 20).elbo.mean().item()
    assert (message.bits - 32 * message.initial) / len(pixels) == pytest.approx(-elbo / LOG2, rel=0.005)
    back = [codec.pop(message, 1) for _ in pixels]
    assert torch.equal(torch.cat(back[::-1]), pixels)
    assert message.is_start()


# constriction, the well-kept coder


def test_constriction_needs_the_same_number_of_bits():
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(0)
    p = rng.uniform(0.01, 0.99, 5000)
    symbols = (rng.uniform(size=5000) < p).astype(np.int32)
    theirs = constriction.stream.stack.AnsCoder()
    theirs.encode_reverse(symbols, constriction.stream.model.Bernoulli(), p)
    below = np.rint((1 - p) * fixed.FULL).astype(np.int64)
    ours = Message()
    ours.push(symbols, Distribution(lambda k, at: below[at], 2, 5000))
    assert abs(ours.bits - theirs.num_bits()) <= 64


# files


def test_a_file_gives_its_images_back_and_its_report_adds_up(binary, grey, tmp_path):
    for model, pixels in (binary, grey):
        written = compress(model, pixels, tmp_path / "digits.vae")
        assert torch.equal(decompress(tmp_path / "digits.vae", model), pixels)
        assert written.images == len(pixels)
        assert written.bytes == (tmp_path / "digits.vae").stat().st_size
        assert written.bits_per_dim == pytest.approx(8 * written.bytes / pixels.numel())
        over = 8 * written.bytes - written.message_bits - written.initial_bits
        assert 0 < over < 8 * 60 + 64 * 64  # header, checksums, and the states
        assert vaelib.compress is compress


def test_a_single_image_and_an_image_set_are_written_too(grey, tmp_path):
    model, pixels = grey
    compress(model, vaelib.image_set(pixels[:1]), tmp_path / "one.vae", bins=64)
    assert torch.equal(decompress(tmp_path / "one.vae", model), pixels[:1])


def test_the_file_does_not_depend_on_threads_and_opens_under_another_number(binary, tmp_path):
    model, pixels = binary[0], binary[1][:20]
    vaelib.save(model, tmp_path / "model")
    compress(model, pixels, tmp_path / "digits.vae")
    code = (
        "import sys, torch, vaelib, hashlib; torch.set_num_threads(3); folder = sys.argv[1];"
        "model = vaelib.load(f'{folder}/model'); pixels = vaelib.decompress(f'{folder}/digits.vae', model);"
        "print(hashlib.sha256(pixels.numpy().tobytes()).hexdigest());"
        "vaelib.compress(model, pixels, f'{folder}/again.vae')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    import hashlib

    assert done.stdout.strip() == hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    assert (tmp_path / "again.vae").read_bytes() == (tmp_path / "digits.vae").read_bytes()


def test_a_file_that_is_cut_off_damaged_or_of_another_model_is_refused(binary, tmp_path):
    model, pixels = binary
    file = tmp_path / "digits.vae"
    compress(model, pixels[:20], file)
    content = file.read_bytes()
    for wrong in (content[:-1], content[:60], content[:30], content + b"\0", b"", b"PNG" + content[3:]):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"path: .*(cut off or damaged|does not begin as one)"):
            decompress(file, model)
    for place in range(8, len(content), 37):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="cut off or damaged"):
            decompress(file, model)
    file.write_bytes(content[:7] + b"\x02" + content[8:])
    with pytest.raises(ValueError, match="is of version 2 of the format, expected 1"):
        decompress(file, model)
    file.write_bytes(content)
    torch.manual_seed(1)
    other = vaelib.mlp_vae((1, 28, 28), hidden_dims=(64,), latent_dim=8)
    with pytest.raises(ValueError, match="model: got one with the fingerprint"):
        decompress(file, other)
    with pytest.raises(ValueError, match=r"path: got .*nowhere, expected a file written by vaelib.compress"):
        decompress(tmp_path / "nowhere", model)


def test_probabilities_that_differ_are_noticed(binary, tmp_path, monkeypatch):
    model, pixels = binary
    compress(model, pixels[:30], tmp_path / "digits.vae")
    curve = fixed.curve("logistic")
    monkeypatch.setattr(
        coding, "curve", lambda name: curve._replace(values=curve.values + 2**20) if name == "logistic" else fixed.curve(name)
    )
    with pytest.raises(ValueError, match="came out with other pixels than went in"):
        decompress(tmp_path / "digits.vae", model)


def test_what_cannot_be_coded_is_refused_by_name(binary, grey, tmp_path):
    model, _ = binary
    with pytest.raises(ValueError, match="grey pixels, expected only 0 and 255"):
        compress(model, grey[1], tmp_path / "x.vae")
    with pytest.raises(ValueError, match="images: got images of shape"):
        compress(model, torch.zeros(1, 1, 8, 8, dtype=torch.uint8), tmp_path / "x.vae")
    assert not (tmp_path / "x.vae").exists()
    for likelihood in ("gaussian", "grey_bce_not_a_likelihood"):
        with pytest.raises(ValueError, match="model: got the likelihood"):
            BitsBack(vaelib.mlp_vae((1, 8, 8), (), 2, likelihood))
    for bins in (3, 1, 2**17):
        with pytest.raises(ValueError, match="bins: got"):
            BitsBack(model, bins)
    with pytest.raises(ValueError, match="model: got str"):
        BitsBack("mnist-mlp")


@pytest.mark.real_data
def test_test_digits_become_a_file_of_their_negative_elbo(tmp_path):
    model = vaelib.load("mnist-mlp")
    pixels = vaelib.load_images("binarized-mnist", "test").pixels
    written = compress(model, pixels, tmp_path / "digits.vae")
    elbo = vaelib.heldout_elbo(model, pixels, 10).elbo.mean().item()
    assert 8 * written.bytes / len(pixels) == pytest.approx(-elbo / LOG2, rel=0.005)
    assert torch.equal(decompress(tmp_path / "digits.vae", model), pixels)
