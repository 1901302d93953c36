"""Lossless compression by a VAE: bits-back coding with asymmetric numeral systems, and the file that comes of it.

The length of the message is the negative ELBO in bits (Hinton and van Camp 1993; Townsend, Bird and Barber 2019, "BB-ANS"; eq. bits-back).
All probabilities are integers, and the networks compute in exact arithmetic (`vaelib.fixed`), so that a file opens on any machine.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaelib._validation import as_path, check_int, check_pixels, describe
from vaelib.data import ImageSet
from vaelib.densities import Posterior, StandardNormal
from vaelib.fixed import FULL, GRID, Ints, curve, exact_model, to_ints
from vaelib.likelihoods import Bernoulli, DiscretizedLogistic, DiscretizedLogisticMixture, Gaussian
from vaelib.storage import atomic, writable_folder
from vaelib.vae import VAE

PRECISION = 28  # probabilities of a coder are multiples of 2**-PRECISION
Words = NDArray[np.uint32]


def spare_words(count: int, start: int = 0) -> Words:
    """Pseudo-random words that both sides know, what a message begins with: word i is the SplitMix64 hash of i. (count,)"""
    with np.errstate(over="ignore"):
        h = np.arange(start + 1, start + 1 + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (h >> np.uint64(32)).astype(np.uint32)


class Distribution(NamedTuple):
    """Integers 0..size-1 with integer probabilities, one distribution for each of `length` symbols.

    Attributes:
        below: F(k, at): P(symbol < k) of the symbols at these places, in units of 1 / FULL, growing in k.
        size: how many values a symbol can have.
        length: how many symbols.
        precision: probabilities are multiples of 2**-precision. None is 0: each value can be coded, the unlikeliest in so many bits.
    """

    below: Callable[[Ints, Any], Ints]
    size: int
    length: int
    precision: int = PRECISION

    def cdf(self, k: Ints, at: Any = slice(None)) -> Ints:
        """2**precision times P(symbol < k), each value's share made at least 1: (n,) -> (n,). eq. integer-frequencies"""
        share = np.where(k <= 0, 0, np.where(k >= self.size, FULL, self.below(k, at)))
        return k + (share * ((1 << self.precision) - self.size) >> 30)

    def bits(self, symbols: Ints) -> NDArray[np.float64]:
        """What symbols (n,) cost: -log2 of their probability, as the integers have it. (n,) eq. code-length"""
        share: Ints = self.cdf(symbols + 1) - self.cdf(symbols)
        return self.precision - np.log2(share.astype(np.float64))

    def tabled(self) -> Distribution:
        """The same with all its values computed at once, which serves where there are few."""
        table = np.stack([self.below(np.full(self.length, k), slice(None)) for k in range(1, self.size)])  # (size - 1, length)
        places = np.arange(self.length)
        return self._replace(below=lambda k, at: table[np.clip(k - 1, 0, self.size - 2), places[at]])

    def find(self, target: Ints, at: Any) -> tuple[Ints, Ints, Ints]:
        """The symbols whose intervals hold the targets, the intervals' starts and their lengths, by bisection: (n,) each."""
        low, high = np.zeros_like(target), np.full_like(target, self.size)
        for _ in range((self.size - 1).bit_length()):
            middle = (low + high) >> 1
            above = self.cdf(middle, at) > target
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        start = self.cdf(low, at)
        return low, start, self.cdf(low + 1, at) - start


class Message:
    """A stack of symbols: what is pushed last is popped first. It is rANS (Duda 2013), eq. ans-push, in `lanes` interleaved states.

    Each state is an integer from 2**32 to 2**64; where it would grow beyond, its low 32 bits go onto `tail`, a stack of words.
    A message that is popped when empty hands out `spare_words`, as many as it is asked for: bits-back coding pops before it pushes.

    Attributes:
        heads: the states, uint64 (lanes,).
        initial: how many spare words were handed out.
    """

    def __init__(self, lanes: int = 1) -> None:
        self.heads = spare_words(check_int("lanes", lanes)).astype(np.uint64) + np.uint64(2**32)
        self.lanes, self.initial, self.words, self.size = lanes, 0, np.empty(1024, dtype=np.uint32), 0

    @property
    def tail(self) -> Words:
        """The words below the states, the oldest first."""
        return self.words[: self.size]

    @property
    def bits(self) -> float:
        """The information in the message, in bits, which is 0 or little more at its start."""
        return 32.0 * self.size + float(np.log2(self.heads.astype(np.float64)).sum()) - 32 * self.lanes

    def push(self, symbols: Ints, distribution: Distribution) -> None:
        """Put symbols (n,) onto the stack; the message grows by -log2 of their probability."""
        symbols = np.asarray(symbols, dtype=np.int64).reshape(-1)
        if len(symbols) != distribution.length or symbols.min() < 0 or symbols.max() >= distribution.size:
            expected = f"{distribution.length} integers from 0 to {distribution.size - 1}"
            raise ValueError(f"symbols: got {len(symbols)} from {symbols.min()} to {symbols.max()}, expected {expected}")
        starts = distribution.cdf(symbols)
        start, frequency = starts.astype(np.uint64), (distribution.cdf(symbols + 1) - starts).astype(np.uint64)
        shift = np.uint64(distribution.precision)
        for first in range(0, len(symbols), self.lanes):
            s, f = start[first : first + self.lanes], frequency[first : first + self.lanes]
            heads = self.heads[: len(s)]
            full = (heads >> (np.uint64(64) - shift)) >= f
            if full.any():
                self.put(heads[full])
                heads = np.where(full, heads >> np.uint64(32), heads)
            quotient, rest = np.divmod(heads, f)
            self.heads[: len(s)] = (quotient << shift) + rest + s

    def pop(self, distribution: Distribution) -> Ints:
        """Take the symbols (n,) that were pushed under this distribution off the stack; of other bits, draw them from it."""
        distribution = distribution.tabled() if distribution.size == 2 else distribution
        shift, found = np.uint64(distribution.precision), np.empty(distribution.length, dtype=np.int64)
        mask = np.uint64((1 << distribution.precision) - 1)
        for first in reversed(range(0, distribution.length, self.lanes)):
            at = slice(first, min(first + self.lanes, distribution.length))
            heads = self.heads[: at.stop - first]
            target = (heads & mask).astype(np.int64)
            found[at], start, frequency = distribution.find(target, at)
            heads = frequency.astype(np.uint64) * (heads >> shift) + (target - start).astype(np.uint64)
            empty = heads < np.uint64(2**32)
            if empty.any():
                heads[empty] = (heads[empty] << np.uint64(32)) | self.take(int(empty.sum()))
            self.heads[: at.stop - first] = heads
        return found

    def put(self, heads: NDArray[np.uint64]) -> None:
        """The low 32 bits of some states onto the tail."""
        if self.size + len(heads) > len(self.words):
            self.words = np.concatenate([self.words, np.empty_like(self.words)])
        self.words[self.size : self.size + len(heads)] = heads & np.uint64(2**32 - 1)
        self.size += len(heads)

    def take(self, count: int) -> NDArray[np.uint64]:
        """The uppermost words of the tail, off it; below its end lie the spare words."""
        if lacking := max(count - self.size, 0):
            fresh = spare_words(lacking, self.lanes + self.initial)[::-1]
            self.words = np.concatenate([fresh, self.tail, np.empty(1024, dtype=np.uint32)])
            self.initial, self.size = self.initial + lacking, self.size + lacking
        self.size -= count
        return self.words[self.size : self.size + count].astype(np.uint64)

    def is_start(self) -> bool:
        """Whether the message is what it was before anything was pushed: the spare words, and nothing else."""
        fresh = Message(self.lanes)
        spare = spare_words(self.initial, self.lanes)[::-1]
        return bool(np.array_equal(self.heads, fresh.heads) and np.array_equal(self.tail, spare))


class Bins:
    """A line of real numbers cut into bins, so that a latent is an integer: its bin. eq. equal-mass-bins

    Attributes:
        count: how many, a power of 2.
        edges: (count + 1,), in units of 2**-20; the outermost stand for -inf and inf.
        centres: (count,), what a bin stands for, in units of 1 / GRID.
    """

    def __init__(self, count: int, spread: str = "mass") -> None:
        """`spread` ``"mass"`` gives each bin the same mass under N(0, 1), ``"width"`` the same width on [-8, 8]."""
        if check_int("bins", count, 2, 2**16) & (count - 1):
            raise ValueError(f"bins: got {count}, expected a power of 2 from 2 to 65536")
        self.count, steps = count, np.arange(2 * count + 1, dtype=np.int64)
        halves = (
            curve("normal").inverse(steps * (FULL // (2 * count))) if spread == "mass" else (steps * 2**24 // (2 * count)) - 2**23
        )
        self.edges, self.centres = halves[::2], (halves[1::2] + 128) >> 8

    def prior(self, length: int) -> Distribution:
        """The bins of equal mass under N(0, 1), which has the same probability for each."""
        return Distribution(lambda k, at: k * 0, self.count, length, self.count.bit_length() - 1)

    def gaussian(self, q: Posterior) -> Distribution:
        """The masses that Gaussians, (N, L), give to the bins, N * L distributions in all."""
        mean = to_ints(q.mean).reshape(-1) << 8
        inverse = curve("exp")(-np.clip(to_ints(q.log_var), -15 * GRID, 15 * GRID).reshape(-1) << 3)

        def below(k: Ints, at: Any) -> Ints:
            distance = np.clip(self.edges[k] - np.clip(mean[at], -(2**26), 2**26), -(2**26), 2**26)
            return curve("normal")(distance * inverse[at] >> 24)

        return Distribution(below, self.count, len(mean))

    def values(self, symbols: Ints, length: int) -> Tensor:
        """The centres of bins: (N * L,) -> (N, L), float64."""
        return torch.from_numpy(self.centres[symbols]).double().view(-1, length) / GRID


EDGES: Ints = (np.arange(0, 514, 2, dtype=np.int64) - 256) * 2**20 // 255  # below level k ends the bin of level k - 1


class Located:
    """Levels 0..255 of a curve that is moved and scaled: the discretized logistic and the discretized Gaussian. All arrays are (n,)."""

    def __init__(self, kind: str, location: Ints, log_scale: Ints) -> None:
        self.curve = curve(kind)
        self.location = np.clip(location.reshape(-1), -8 * GRID, 8 * GRID) << 8
        self.inverse = curve("exp")(-np.clip(log_scale, -7 * GRID, 7 * GRID).reshape(-1) << 4)

    def below(self, k: Ints, at: Any = slice(None), shift: Ints | int = 0) -> Ints:
        """P(level < k), in units of 1 / FULL."""
        location = np.clip(self.location[at] + shift, -(2**23), 2**23)
        return np.where(k <= 0, 0, np.where(k >= 256, FULL, self.curve((EDGES[k] - location) * self.inverse[at] >> 24)))


class Mixture:
    """Levels of pixels whose channels share a mixture of logistics: each channel's distribution given those before it.

    As `DiscretizedLogisticMixture`, eq. logistic-mixture-log-prob; the weights of the components are updated by Bayes' rule.
    """

    def __init__(self, likelihood: DiscretizedLogisticMixture, params: Tensor) -> None:
        logits, channels = likelihood.split(params)
        rows = to_ints(logits.moveaxis(1, 3)).reshape(-1, likelihood.num_mixtures)  # (pixels, J)
        self.weights = curve("exp")((rows - rows.max(1, keepdims=True)) << 4) + 1
        self.shape, self.parts, self.coefficients = rows.shape, [], []
        for location, log_scale, _ in channels:
            self.parts.append(Located("logistic", *(to_ints(part.moveaxis(1, 3)) for part in (location, log_scale))))
        raw = params.unflatten(1, (-1, likelihood.num_mixtures))[:, 1 + 2 * len(channels) :].unbind(1)
        for c in range(len(channels)):
            own = (to_ints(row.moveaxis(1, 3)).reshape(rows.shape) for row in raw[c * (c - 1) // 2 : c * (c + 1) // 2])
            self.coefficients.append([2 * curve("logistic")(row << 5) - FULL for row in own])  # tanh

    def channel(self, c: int, earlier: list[Ints]) -> Distribution:
        """The distribution of channel c, given the levels of those before it, each (pixels,)."""
        weights = self.weights
        for before in range(c):
            of = self.component(before, earlier)
            at = earlier[before][:, None]
            joint = weights * (of(at + 1, slice(None)) - of(at, slice(None)) + 1)
            weights = joint // ((joint.max(1, keepdims=True) >> 20) + 1) + 1
        of, total = self.component(c, earlier), weights.sum(1)

        def below(k: Ints, at: Any) -> Ints:
            share: Ints = (weights[at] * of(k[:, None], at)).sum(1) // total[at]
            return share

        return Distribution(below, 256, len(weights))

    def component(self, c: int, earlier: list[Ints]) -> Callable[[Ints, Any], Ints]:
        """P(level of channel c < k) under each component: (pixels, 1) -> (pixels, J)."""
        part, shift = self.parts[c], np.zeros(self.shape, dtype=np.int64)
        for row, levels in zip(self.coefficients[c], earlier, strict=False):
            shift = shift + (row * ((2 * levels - 255) * 2**20 // 255)[:, None] >> 30)
        location = np.clip(part.location.reshape(self.shape) + shift, -(2**23), 2**23)
        inverse = part.inverse.reshape(self.shape)

        def below(k: Ints, at: Any) -> Ints:
            value = part.curve((EDGES[k] - location[at]) * inverse[at] >> 24)
            return np.where(k <= 0, 0, np.where(k >= 256, FULL, value))

        return below


Stage = Callable[[list[Ints]], Distribution]


def pixel_stages(likelihood: Any, params: Tensor) -> list[Stage]:
    """p(x given z) as distributions of symbols, one stage after the other, each given the symbols of those before it.

    A mixture has a stage for each channel, (N * H * W,) symbols; the others have one, (N * C * H * W,).
    """
    if isinstance(likelihood, Bernoulli):
        logits = to_ints(params).reshape(-1)
        return [lambda _: Distribution(lambda k, at: curve("logistic")(-logits[at] << 4), 2, len(logits))]
    if isinstance(likelihood, DiscretizedLogisticMixture):
        mixture = Mixture(likelihood, params)
        return [lambda earlier, c=c: mixture.channel(c, earlier) for c in range(len(mixture.parts))]  # type: ignore[misc]
    if isinstance(likelihood, DiscretizedLogistic):
        located = Located("logistic", *(to_ints(part) for part in params.chunk(2, dim=1)))
    else:
        located = Located("normal", to_ints(params), np.broadcast_to(to_ints(likelihood.log_scale), params.shape))
    return [lambda _: Distribution(located.below, 256, len(located.location))]


class BitsBack:
    """Codes images with a VAE onto a `Message`: each costs its negative ELBO, in bits. eq. bits-back

    To push an image, z is popped under q(z given x), the image is pushed under p(x given z), and z under p(z): what the first of the
    three takes off the message is the bits that come back. `pop` does the same backwards.

    Args:
        model: a `VAE` with the prior N(0, I), a diagonal Gaussian posterior and a likelihood of discrete pixels; or with layers of
            latents in a chain, x - h1 - h2, as `TwoLayerVAE`: then in the order of Bit-Swap (Kingma, Abbeel and Ho 2019), in which a
            layer is pushed as soon as the one above it is popped.
        bins: into how many values of equal prior mass each latent is rounded, a power of 2. eq. equal-mass-bins
        exact: whether the networks compute in exact arithmetic, see `vaelib.fixed`. Without it the same machine, batch and number of
            threads may give a message back, and any other may not.
        swap: False pops all layers before anything is pushed.

    Raises:
        ValueError: For another prior, posterior, likelihood or network.
    """

    def __init__(self, model: VAE, bins: int = 2**12, exact: bool = True, swap: bool = True) -> None:
        check_can_code(model)
        self.model = exact_model(model) if exact else model.eval()
        self.exact, self.swap = exact, swap
        self.infer: list[Any] = [self.model.encoder]
        self.generate: list[Any] = [self.model.decoder]
        self.dims: list[int] = [model.latent_dim]
        if isinstance(self.model.encoder, nn.ModuleList) and isinstance(self.model.decoder, nn.ModuleList):  # a chain of layers
            self.infer, self.generate = list(self.model.encoder), list(self.model.decoder)[::-1]
            self.dims = [len(part.head.bias) // 2 for part in self.infer]
        self.layers = range(len(self.dims))
        self.bins = [Bins(bins, "mass" if layer == self.layers[-1] else "width") for layer in self.layers]

    def push(self, message: Message, pixels: Tensor) -> None:
        """Put images, ``uint8`` (N, C, H, W), onto the message, all of them as one."""
        states = [symbols_of(self.model, pixels)]
        for layer in self.layers:
            states.append(message.pop(self.posterior(layer, states[layer])))
            if self.swap:
                self.push_given(message, layer, states)
        for layer in () if self.swap else self.layers:
            self.push_given(message, layer, states)
        message.push(states[-1], self.bins[-1].prior(len(states[-1])))

    def pop(self, message: Message, count: int) -> Tensor:
        """Take the `count` images off the message that were pushed last, as one: ``uint8`` (N, C, H, W)."""
        states = [message.pop(self.bins[-1].prior(count * self.dims[-1]))]  # of the layers from the top down
        for layer in reversed(self.layers):
            states.append(self.pop_given(message, layer, states[-1]))
            if self.swap:
                message.push(states[-2], self.posterior(layer, states[-1]))
        for layer in () if self.swap else reversed(self.layers):
            message.push(states[-2 - layer], self.posterior(layer, states[-1 - layer]))
        return pixels_from(self.model, states[-1])

    def input(self, layer: int, symbols: Ints) -> Tensor:
        """What a network is given of a layer: the images where it is 0, else the bins' centres, (N, L)."""
        if layer:
            values = self.bins[layer - 1].values(symbols, self.dims[layer - 1])
            return values if self.exact else values.to(self.model.device, torch.float32)
        pixels = pixels_from(self.model, symbols)
        x = self.model.likelihood.observe(pixels, uniform=torch.full(pixels.shape, 0.5, device="cpu"))
        return x.double() if self.exact else x.to(self.model.device)

    @torch.no_grad()
    def posterior(self, layer: int, symbols: Ints) -> Distribution:
        """q of the layer above, given the symbols of this one."""
        q = self.infer[layer](self.input(layer, symbols))
        if not isinstance(q, tuple):
            raise ValueError(f"model: got the posterior {type(q).__name__}, expected a diagonal Gaussian: a pair (mean, log_var)")
        return self.bins[layer].gaussian(Posterior(*q))

    @torch.no_grad()
    def stages(self, layer: int, above: Ints) -> list[Stage]:
        """p of this layer, given the symbols of the one above."""
        params = self.generate[layer](self.input(layer + 1, above))
        if layer == 0:
            return pixel_stages(self.model.likelihood, params)
        return [lambda _: self.bins[layer - 1].gaussian(Posterior(*params))]

    def push_given(self, message: Message, layer: int, states: list[Ints]) -> None:
        stages = self.stages(layer, states[layer + 1])
        parts = split_stages(states[layer], len(stages), self.model)
        for number in reversed(range(len(stages))):
            message.push(parts[number], stages[number](parts[:number]))

    def pop_given(self, message: Message, layer: int, above: Ints) -> Ints:
        parts: list[Ints] = []
        for stage in self.stages(layer, above):
            parts.append(message.pop(stage(parts)))
        return join_stages(parts, self.model)


def split_stages(symbols: Ints, count: int, model: VAE) -> list[Ints]:
    """The symbols of images (N * C * H * W,) as those of each channel, (N * H * W,) each; of one stage as they are."""
    if count == 1:
        return [symbols]
    channels, height, width = model.image_shape
    return list(np.moveaxis(symbols.reshape(-1, channels, height * width), 1, 0).reshape(channels, -1))


def join_stages(parts: list[Ints], model: VAE) -> Ints:
    """The opposite of `split_stages`."""
    channels, height, width = model.image_shape
    if len(parts) == 1:
        return parts[0]
    return np.moveaxis(np.stack(parts).reshape(channels, -1, height * width), 0, 1).reshape(-1)


def symbols_of(model: VAE, pixels: Tensor) -> Ints:
    """Pixels as symbols, (N * C * H * W,): levels, or 0 and 1 under a Bernoulli likelihood.

    Raises:
        ValueError: If a Bernoulli likelihood meets grey pixels, of which it would lose the level.
    """
    pixels = check_pixels("images", pixels, model.image_shape).cpu()
    if not isinstance(model.likelihood, Bernoulli):
        return pixels.flatten().long().numpy()
    if grey := int(((pixels > 0) & (pixels < 255)).sum()):
        expected = "only 0 and 255: the likelihood is Bernoulli, of binary pixels; a discretized one codes grey levels"
        raise ValueError(f"images: got {grey} grey pixels, expected {expected}")
    return (pixels == 255).flatten().long().numpy()


def pixels_from(model: VAE, symbols: Ints) -> Tensor:
    """The opposite of `symbols_of`."""
    scale = 255 if isinstance(model.likelihood, Bernoulli) else 1
    return torch.from_numpy(symbols * scale).to(torch.uint8).view(-1, *model.image_shape)


def check_can_code(model: Any) -> None:
    """ValueError unless bits-back coding is defined for this model here."""
    if not isinstance(model, VAE):
        raise ValueError(f"model: got {describe(model)}, expected a VAE")
    likelihood = model.likelihood
    known = isinstance(likelihood, (Bernoulli, DiscretizedLogistic, DiscretizedLogisticMixture))
    if not (known or (isinstance(likelihood, Gaussian) and likelihood.discretized)) or not likelihood.normalized:
        expected = "a distribution of discrete pixels: Bernoulli, or a discretized logistic, mixture or Gaussian"
        raise ValueError(f"model: got the likelihood {likelihood.config['name']!r}, expected {expected}")
    if not isinstance(model.prior, StandardNormal) and not isinstance(model.encoder, nn.ModuleList):
        raise ValueError(
            f"model: got the prior {type(model.prior).__name__}, expected N(0, I), or a chain of layers above each other"
        )


HEADER = struct.Struct(
    "<8s16sI3HHHBBII"
)  # magic, fingerprint, images, C, H, W, batch, lanes, log2 bins, swap, initial words, CRC of pixels
MAGIC = b"vaelib\x00\x01"  # the last byte is the version of the format


class Compressed(NamedTuple):
    """What `compress` wrote.

    Attributes:
        images: how many.
        bytes: the file's size.
        bits_per_dim: the file's bits over all pixels and channels.
        message_bits: of these, the images: what the message grew by, which is the sum of their negative ELBOs.
        initial_bits: the bits that the first images borrowed, and that stay in the file. What is left are header and rounding.
    """

    images: int
    bytes: int
    bits_per_dim: float
    message_bits: float
    initial_bits: int


def model_hash(model: VAE) -> bytes:
    """16 bytes that name the model: a hash of its config and weights."""
    digest = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()[:16]


def compress(model: VAE, images: ImageSet | Tensor, path: str | Path, bins: int = 2**12) -> Compressed:
    """Write images to a file of about their negative ELBO in bits, from which `decompress` gets them back without a wrong pixel.

    Of images that are unlike those the model was trained on the file is longer, by the divergence in the mean, eq. code-excess, and
    never wrong. The file does not hold the model: whoever opens it needs the same weights. Its networks compute in exact arithmetic, on
    the CPU, so that any machine gives the same bits.

    Args:
        model: see `BitsBack`.
        images: an `ImageSet` or ``uint8`` pixels (N, C, H, W); 0 and 255 only where the likelihood is Bernoulli.
        path: the file to write, whole or not at all.
        bins: see `BitsBack`; the file says how many.

    Raises:
        ValueError: If the model is of a kind that cannot code, or the images do not fit it.

    Example:
        >>> import tempfile, torch, vaelib
        >>> model = vaelib.mlp_vae((1, 28, 28), hidden_dims=(16,), latent_dim=2, likelihood="discretized_logistic")
        >>> pixels = vaelib.load_images("digits", "test").pixels[:3]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = vaelib.compress(model, pixels, f"{folder}/digits.vae")
        ...     torch.equal(vaelib.decompress(f"{folder}/digits.vae", model), pixels)
        True
    """
    codec, pixels = BitsBack(model, bins), check_pixels("images", images, model.image_shape).cpu()
    symbols_of(model, pixels)  # that they can be coded is known before any work
    path = as_path(path)
    writable_folder("path", path.parent)
    binary = isinstance(model.likelihood, Bernoulli)  # their files are shorter, and a lane costs 48 bits
    batch, lanes = len(pixels) // 1000 + 1, min(max(pixels.numel() >> (16 if binary else 11), 1), 64)
    message = Message(lanes)
    for part in pixels.split(batch):
        codec.push(message, part)
    sizes = len(pixels), *model.image_shape, batch, lanes, bins.bit_length() - 1, codec.swap
    header = HEADER.pack(MAGIC, model_hash(model), *sizes, message.initial, zlib.crc32(pixels.numpy().tobytes()))
    body = header + message.heads.astype("<u8").tobytes() + message.tail.astype("<u4").tobytes()
    content = body + struct.pack("<I", zlib.crc32(body))
    with atomic(path) as partial:
        partial.write_bytes(content)
    initial = 32 * message.initial
    return Compressed(len(pixels), len(content), 8 * len(content) / pixels.numel(), message.bits - initial, initial)


def decompress(path: str | Path, model: VAE) -> Tensor:
    """The images in a file that `compress` wrote with this model: ``uint8`` (N, C, H, W), on the CPU.

    Raises:
        ValueError: If the file is none of vaelib's, of another version, cut off or damaged; if it was written with another model; if
            what comes out does not have the checksum of what went in.
    """
    path = as_path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"path: got {path}, expected a file written by vaelib.compress ({error.strerror})") from error
    if content[:7] != MAGIC[:7] or len(content) < HEADER.size + 4:
        raise ValueError(f"path: got {path}, expected a file written by vaelib.compress; it does not begin as one")
    if content[7] != MAGIC[7]:
        raise ValueError(f"path: {path} is of version {content[7]} of the format, expected {MAGIC[7]}; another vaelib wrote it")
    body, (checksum,) = content[:-4], struct.unpack("<I", content[-4:])
    if zlib.crc32(body) != checksum:
        raise ValueError(f"path: {path} is cut off or damaged: its checksum is not that of its content")
    _, written_by, count, *_shape, batch, lanes, log_bins, swap, initial, pixel_checksum = HEADER.unpack_from(body)
    if (mine := model_hash(model)) != written_by:
        raise ValueError(
            f"model: got one with the fingerprint {mine.hex()}, but {path} was written with {written_by.hex()}, expected that model"
        )
    codec, message = BitsBack(model, 2**log_bins, swap=bool(swap)), Message(lanes)
    message.heads = np.frombuffer(body, "<u8", lanes, HEADER.size).astype(np.uint64)
    message.words = np.frombuffer(body, "<u4", offset=HEADER.size + 8 * lanes).astype(np.uint32)
    message.size, message.initial = len(message.words), initial
    parts = [codec.pop(message, min(batch, count - first)) for first in reversed(range(0, count, batch))]
    pixels = torch.cat(parts[::-1])
    if not message.is_start() or zlib.crc32(pixels.numpy().tobytes()) != pixel_checksum:
        raise ValueError(f"path: {path} came out with other pixels than went in: its probabilities were not those of its writer")
    return pixels
