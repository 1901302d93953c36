"""Codes in place of a Gaussian z: the VQ-VAE as a VAE with a one-hot posterior, its codebooks, and the prior that they need.

The encoder's output is a map of h * w places with D numbers each; a codebook puts one of K codes in each place. So q(z given x) is one
point, and KL(q || p) is -log p of that point: h w log K nats under the uniform prior (van den Oord, Vinyals and Kavukcuoglu 2017), the
cross-entropy under a learned one. z is the map of the codes' vectors, flat, (N, L) with L = D h w, as for any other `VAE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelib import noise
from vaelib._validation import check_choice, check_image_shape, check_int, check_number, check_seed, describe
from vaelib.data import ImageSet
from vaelib.densities import Draw, Posterior, StandardNormal
from vaelib.graphs import float32_products
from vaelib.heldout import over_images
from vaelib.likelihoods import Likelihood, make_likelihood
from vaelib.networks import activated_convolutions, zero
from vaelib.vae import VAE, register_model

EPSILON = 1e-5  # of the counts' Laplace smoothing


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes' shares, from 1 (one code has all) to K (all have the same). eq. perplexity

    Args:
        counts: how often each code was chosen, (..., K); at least one count is above 0.

    Example:
        >>> import torch, vaelib
        >>> vaelib.perplexity(torch.tensor([3.0, 3.0, 0.0, 0.0]))
        tensor(2.)
    """
    entropy: Tensor = torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1)
    return entropy.exp()


def grouped() -> bool:
    """Whether several processes share each batch."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def over_processes(sums: Tensor) -> Tensor:
    """The sums of all of them, in place."""
    if grouped():
        torch.distributed.all_reduce(sums)
    return sums


def choices(tokens: Tensor, num_codes: int) -> Tensor:
    """How often each code was chosen: (M,) -> (K,) float32, over all processes."""
    ones = torch.ones(len(tokens), device=tokens.device)
    return over_processes(torch.zeros(num_codes, device=tokens.device).index_add_(0, tokens, ones))


class OneHot(NamedTuple):
    """q(z given x) of a VQ-VAE: these codes, for sure.

    Attributes:
        tokens: the number of the code in each place, (N, h, w) int64.
        mean: the codes' vectors as a flat map, (N, L). Its gradient is handed to the encoder's output as it is. eq. straight-through
        output: what the encoder said, (N, h, w, D).
        loss: what pulls codes and output together, (N,); see `Codebook`. None where nothing does.
    """

    tokens: Tensor
    mean: Tensor
    output: Tensor
    loss: Tensor | None

    def sample(self, eps: Tensor) -> Tensor:
        """Its one point, for any noise: (K, N, L) -> (K, N, L)."""
        return self.mean.expand_as(eps)

    def log_prob(self, z: Tensor) -> Tensor:
        """0 at its point, -infinity elsewhere: (..., N, L) -> (..., N), nats."""
        here = (z == self.mean).all(-1)
        return torch.zeros_like(z[..., 0]).masked_fill(~here, -math.inf)


class Codebook(nn.Module):
    """K vectors of D numbers, of which each output of the encoder gets the nearest.

    The encoder's output is pulled to its code by `commitment` times their squared distance, summed over the map. The codes follow the
    outputs in one of two ways: by that distance as a term of the loss, or as running means of the outputs that chose them (van den Oord
    et al. 2017, appendix A.1). eq. vq-loss, eq. codebook-average

    Args:
        num_codes: K.
        code_dim: D.
        learn: ``"ema"``, the running means, or ``"gradient"``.
        commitment: weight of the pull on the encoder.
        decay: of the running means and counts.
        restart: a code whose running count is below this share of an even one moves onto an output of the batch (Dhariwal et al. 2020);
            at the first step all of them do. 0 leaves dead codes where they are.
        scale: standard deviation of the codes' first entries; see `kmeans_start` for a better start.

    Attributes:
        codes: (K, D), a parameter where it is learned by gradient, else a buffer.
        counts: (K,), running mean of how many outputs of a batch chose each code, in units of an even share, outputs / K.
        sums: (K, D), running mean of their sums, in the same units.
        batch_perplexity: running mean of the batches' perplexities, which starts at 0.
        steps: how many there were.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        learn: str = "ema",
        commitment: float = 0.25,
        decay: float = 0.99,
        restart: float = 0.05,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_codes, self.code_dim = check_int("num_codes", num_codes, minimum=2), check_int("code_dim", code_dim)
        self.learn = check_choice("learn", learn, ("ema", "gradient"))
        self.commitment, self.restart = check_number("commitment", commitment), check_number("restart", restart)
        if check_number("decay", decay) >= 1:
            raise ValueError(f"decay: got {decay}, expected a number from 0 up to, but not, 1")
        self.decay = decay
        codes = check_number("scale", scale, exclusive=True) * torch.randn(num_codes, code_dim)
        if learn == "gradient":
            self.codes: Tensor = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        known = float(restart == 0)  # with restarts the first entries count for nothing
        self.register_buffer("counts", torch.full((num_codes,), known))
        self.register_buffer("sums", known * codes.detach())
        self.register_buffer("batch_perplexity", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        self.counts: Tensor
        self.sums: Tensor
        self.batch_perplexity: Tensor
        self.steps: Tensor

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """The code nearest to each vector, the first of equals: (..., D) -> (...) int64. eq. nearest-code"""
        with torch.autocast(vectors.device.type, enabled=False):  # bf16 would take neighbours for one another
            distances = (self.codes**2).sum(1) - 2 * vectors @ self.codes.T  # (..., K), without the vector's own square
        return distances.argmin(-1)

    def forward(self, output: Tensor) -> OneHot:
        """The encoder's output (N, h, w, D) -> the posterior that puts the nearest code in each place."""
        tokens = self.nearest(output)
        codes = F.embedding(tokens, self.codes)  # (N, h, w, D)
        loss = self.commitment * (output - codes.detach()) ** 2
        if self.learn == "gradient":
            loss = loss + (codes - output.detach()) ** 2
        straight = codes.detach() + (output - output.detach())  # to the last bit the codes
        return OneHot(tokens, flat_map(straight), output, loss.flatten(1).sum(1))

    @torch.no_grad()
    def follow(self, output: Tensor, tokens: Tensor, eps: Tensor) -> None:
        """A step's part that no gradient does: running counts and means, and restarts; without a look at a number.

        Args:
            output: of the encoder, (N, h, w, D).
            tokens: the codes that it got, (N, h, w).
            eps: standard normal noise, with at least as many numbers as there are places.
        """
        vectors, chosen = output.flatten(0, -2), tokens.flatten()  # (M, D), (M,)
        counts = choices(chosen, self.num_codes)
        sums = over_processes(torch.zeros_like(self.sums).index_add_(0, chosen, vectors))
        share = self.num_codes / counts.sum()
        self.batch_perplexity.lerp_(perplexity(counts), 1 - self.decay)
        self.steps += 1
        self.counts.lerp_(share * counts, 1 - self.decay)
        self.sums.lerp_(share * sums, 1 - self.decay)
        if self.learn == "ema":
            total = self.counts.sum()
            smoothed = (self.counts + EPSILON) / (total + self.num_codes * EPSILON) * total
            self.codes.copy_(self.sums / smoothed[:, None])
        if self.restart:
            order = eps.flatten()[: len(chosen)].argsort()  # a random order of the batch's outputs
            onto = vectors[order[torch.arange(self.num_codes, device=order.device) % len(order)]]  # (K, D)
            if grouped():
                torch.distributed.broadcast(onto, 0)
            dead = self.counts < self.restart
            self.codes.copy_(torch.where(dead[:, None], onto, self.codes))
            self.sums.copy_(torch.where(dead[:, None], onto, self.sums))
            self.counts.masked_fill_(dead, 1.0)


class FiniteScalars(nn.Module):
    """Each of the D numbers rounded to one of a few levels between -1 and 1: K is the product, and no code is learned.

    "FSQ", Mentzer, Minnen, Agustsson and Tschannen 2023; the gradient goes straight through the rounding. eq. finite-scalars

    Args:
        levels: how many levels each number has, such as (8, 5, 5, 5).

    Attributes:
        codes: (K, D), all the maps of levels.
        counts: as in `Codebook`.
        batch_perplexity: likewise.
        steps: likewise.
    """

    def __init__(self, levels: Sequence[int], decay: float = 0.99) -> None:
        super().__init__()
        if not isinstance(levels, Sequence) or isinstance(levels, str) or len(levels) == 0:
            raise ValueError(f"levels: got {describe(levels)}, expected a sequence of integers such as (8, 5, 5, 5)")
        self.levels = tuple(check_int("levels", level, minimum=2) for level in levels)
        self.num_codes, self.code_dim, self.decay = math.prod(self.levels), len(self.levels), decay
        axes = [torch.linspace(-1, 1, level) for level in self.levels]
        steps = [math.prod(self.levels[i + 1 :]) for i in range(len(self.levels))]
        self.register_buffer("codes", torch.cartesian_prod(*axes).view(self.num_codes, self.code_dim))
        self.register_buffer("top", torch.tensor([level - 1.0 for level in self.levels]))  # (D,), the number of the highest level
        self.register_buffer("step", torch.tensor(steps))  # (D,), what a level of each number adds to the index
        self.register_buffer("counts", torch.ones(self.num_codes))
        self.register_buffer("batch_perplexity", torch.zeros(()))
        self.register_buffer("steps", torch.zeros(()))
        self.codes: Tensor
        self.top: Tensor
        self.step: Tensor
        self.counts: Tensor
        self.batch_perplexity: Tensor
        self.steps: Tensor

    def nearest(self, vectors: Tensor) -> Tensor:
        """The code nearest to each vector of [-1, 1]: (..., D) -> (...) int64."""
        level = ((vectors.detach() + 1) * (self.top / 2)).round().clamp(min=torch.zeros_like(self.top), max=self.top)
        return (level.long() * self.step).sum(-1)

    def forward(self, output: Tensor) -> OneHot:
        """The encoder's output (N, h, w, D), squashed to [-1, 1] by tanh, at its nearest levels."""
        squashed = output.tanh()
        tokens = self.nearest(squashed)
        straight = F.embedding(tokens, self.codes) + (squashed - squashed.detach())
        return OneHot(tokens, flat_map(straight), output, None)

    @torch.no_grad()
    def follow(self, output: Tensor, tokens: Tensor, eps: Tensor) -> None:
        """The running counts; there is nothing else to follow."""
        counts = choices(tokens.flatten(), self.num_codes)
        self.batch_perplexity.lerp_(perplexity(counts), 1 - self.decay)
        self.steps += 1
        self.counts.lerp_(self.num_codes / counts.sum() * counts, 1 - self.decay)


def flat_map(vectors: Tensor) -> Tensor:
    """(N, h, w, D) -> (N, D h w), channels first, as the networks take it."""
    return vectors.movedim(-1, 1).flatten(1)


class UniformCodes(nn.Module):
    """p(z): in each place any of the K codes with the same chance, so that a map costs h w log K nats. eq. uniform-rate

    Args:
        codebook: a `Codebook` or `FiniteScalars`, which is the model's too.
        places: (h, w).
    """

    def __init__(self, codebook: Any, places: Sequence[int]) -> None:
        super().__init__()
        self.codebook, self.places = codebook, (check_int("places", places[0]), check_int("places", places[1]))

    def tokens_of(self, z: Tensor) -> Tensor:
        """The codes nearest to a flat map of vectors: (..., L) -> (..., h w) int64."""
        vectors = z.unflatten(-1, (self.codebook.code_dim, math.prod(self.places))).movedim(-2, -1)  # (..., h w, D)
        tokens: Tensor = self.codebook.nearest(vectors)
        return tokens

    def z_of(self, tokens: Tensor) -> Tensor:
        """The flat map of the codes' vectors: (N, h w) int64 -> (N, L)."""
        return F.embedding(tokens, self.codebook.codes).movedim(-1, 1).flatten(1)

    def log_prob(self, z: Tensor) -> Tensor:
        """-h w log K, whatever the codes: (..., L) -> (...), nats."""
        return torch.full_like(z[..., 0], -math.prod(self.places) * math.log(self.codebook.num_codes))

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """`num` maps of codes, (num, L); row i does not depend on `num`."""
        u = torch.special.ndtr(noise.normal_rows(check_int("num", num), math.prod(self.places), generator).double())
        tokens = (u * self.codebook.num_codes).long().clamp(max=self.codebook.num_codes - 1)
        return self.z_of(tokens.to(self.codebook.codes.device))


class CausalBlock(nn.Module):
    """h + attention(h), then h + mlp(h): (N, P, width) -> the same; place i sees places up to i."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        parts = self.to_qkv(self.before(h)).unflatten(-1, (3, self.heads, -1))  # (N, P, 3, heads, width / heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.to_out(mixed.transpose(1, 2).flatten(2))
        h = h + self.mlp(self.between(h))
        return h


class CodePrior(UniformCodes):
    """p(z) as a product over the places, row by row, of p(code given those before), by a small causal transformer. eq. code-prior

    Args:
        codebook, places: as in `UniformCodes`.
        width: of the transformer; a multiple of `heads`.
        layers: how many blocks.
        heads: of its attention.
    """

    def __init__(self, codebook: Any, places: Sequence[int], width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__(codebook, places)
        if check_int("width", width) % check_int("heads", heads):
            raise ValueError(f"width: got {width}, expected a multiple of the {heads} heads")
        self.token = nn.Embedding(codebook.num_codes + 1, width)  # the last one stands before the first place
        self.place = nn.Parameter(0.02 * torch.randn(math.prod(self.places), width))
        self.blocks = nn.Sequential(*(CausalBlock(width, heads) for _ in range(check_int("layers", layers))))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codebook.num_codes)
        nn.init.normal_(self.token.weight, std=0.02)
        zero(self.head)  # it starts as the uniform prior

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the code in each of the first P places and of the next one: tokens (N, P) -> (N, P + 1, K), or (N, h w, K) for whole maps."""
        before = F.pad(tokens, (1, 0), value=self.codebook.num_codes)[:, : len(self.place)]  # (N, P + 1)
        logits: Tensor = self.head(self.norm(self.blocks(self.token(before) + self.place[: before.shape[1]])))
        return logits

    def nats(self, tokens: Tensor) -> Tensor:
        """-log p of the code in each place: (N, h w) -> (N, h w)."""
        return F.cross_entropy(self.logits(tokens).float().transpose(1, 2), tokens, reduction="none")

    def log_prob(self, z: Tensor) -> Tensor:
        """log p of the codes nearest to z: (..., L) -> (...), nats."""
        tokens = self.tokens_of(z)
        return -self.nats(tokens.flatten(0, -2)).sum(1).view(tokens.shape[:-1])

    def sample(self, num: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """`num` maps of codes, (num, L), place by place; the logits are divided by `temperature`, and 0 takes the likeliest code."""
        places, device = math.prod(self.places), self.place.device
        u = torch.special.ndtr(noise.normal_rows(check_int("num", num), places, generator).double()).to(device)
        parts = []
        for uniform in u.split(1000):
            tokens = torch.zeros(len(uniform), 0, dtype=torch.int64, device=device)
            for place in range(places):
                logits = self.logits(tokens)[:, -1].double() / max(temperature, 1e-6)
                edges = logits.softmax(-1).cumsum(-1)  # (N, K)
                code = torch.searchsorted(edges, uniform[:, place : place + 1] * edges[:, -1:])
                tokens = torch.cat([tokens, code.clamp(max=self.codebook.num_codes - 1)], 1)
            parts.append(tokens)
        return self.z_of(torch.cat(parts))


class VQVAE(VAE):
    """A VAE whose z is a map of codes; the codebook is that of its prior, which says where p(z) has its mass.

    `fit` trains it like any other: what pulls codes and encoder together is its `penalty`, and the running means move in the step itself,
    with the noise that a Gaussian posterior would have used. Of this noise its draws do not depend.

    Args:
        encoder: module from x (N, C, H, W) to a map (N, D, h, w).
        decoder: module from such a map, flat, (N, L), to the likelihood's params.
        likelihood, image_shape, latent_dim: as in `VAE`; latent_dim is (D, h, w).
        prior: a `UniformCodes` or `CodePrior`.
    """

    @property
    def codebook(self) -> Any:
        """The `Codebook` or `FiniteScalars` of encoder and prior."""
        return self.prior.codebook

    def encode(self, x: Tensor, validate: bool = True) -> OneHot:  # type: ignore[override]
        """q(z given x): x (N, C, H, W) -> one code for each place."""
        self.check_input(x, validate)
        posterior: OneHot = self.codebook(self.encoder(x).to(x.dtype).movedim(1, -1))
        return posterior

    def draw_with(self, x: Tensor, eps: Tensor) -> Draw:
        drawn = super().draw_with(x, eps)
        if self.training:
            self.codebook.follow(drawn.q.output, drawn.q.tokens, eps)
        return drawn

    def penalty(self, x: Tensor, draw: Draw) -> Tensor | None:
        loss: Tensor | None = draw.q.loss
        return loss

    def report(self) -> dict[str, float]:
        """Of the running counts, some hundred batches long: their perplexity, and how many codes have a count above a hundredth of an
        even one; and the mean perplexity of a batch."""
        book = self.codebook
        counts = book.counts
        begun = 1 - book.decay ** max(1.0, book.steps.item())  # the share of the running mean that is no start value
        return {
            "perplexity": perplexity(counts).item(),
            "batch_perplexity": book.batch_perplexity.item() / begun,
            "codes_used": int((counts > 0.01).sum()),
        }


class Narrow(nn.Module):
    """x + f(x) with f = ReLU, 3x3 to `narrow` channels, ReLU, 1x1 back: the block of the VQ-VAE's authors."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.f = activated_convolutions([width, narrow, width], (3, 1), "relu")

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.f(x)
        return x + change


def vq_encoder(channels: int, code_dim: int, width: int, narrow: int, blocks: int, halvings: int) -> nn.Sequential:
    """x (N, C, H, W) -> (N, D, h, w): `halvings` strided convolutions, one that keeps the sides, residual blocks, 1x1 to D numbers."""
    widths = [channels, *[width // 2] * (halvings - 1), width]
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(fan_in, fan_out, 4, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), *(Narrow(width, narrow) for _ in range(blocks)), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, code_dim, 1))


def vq_decoder(
    latent_shape: Sequence[int], param_channels: int, width: int, narrow: int, blocks: int, halvings: int
) -> nn.Sequential:
    """z (N, L) -> params (N, P, H, W): the encoder's mirror image."""
    widths = [width, *[width // 2] * (halvings - 1), param_channels]
    layers = [nn.Unflatten(1, tuple(latent_shape)), nn.Conv2d(latent_shape[0], width, 3, padding=1)]
    layers += [*(Narrow(width, narrow) for _ in range(blocks)), nn.ReLU()]
    for fan_in, fan_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.ConvTranspose2d(fan_in, fan_out, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@register_model("vq")
def vq_vae(
    image_shape: Sequence[int] = (3, 32, 32),
    num_codes: int = 512,
    code_dim: int = 64,
    likelihood: str | dict[str, Any] | Likelihood = "discretized_logistic",
    width: int = 128,
    narrow: int = 32,
    blocks: int = 2,
    halvings: int = 2,
    levels: Sequence[int] | None = None,
    learn: str = "ema",
    commitment: float = 0.25,
    decay: float = 0.99,
    restart: float = 0.05,
    scale: float = 0.1,
    prior: dict[str, Any] | None = None,
) -> VQVAE:
    """A VQ-VAE of strided convolutions: each side of the map of codes is the image's, halved `halvings` times.

    The sizes are those of the example that its authors published for CIFAR-10 (van den Oord, Vinyals and Kavukcuoglu 2017).

    Args:
        image_shape: (C, H, W), sides that can be halved so often.
        num_codes, code_dim: K and D of the codebook.
        likelihood: a name, a config or a `Likelihood`.
        width: channels of the convolutions; half of it before the last halving.
        narrow: channels inside a residual block.
        blocks: residual blocks in the encoder and in the decoder.
        levels: where given, `FiniteScalars` of these levels in place of the codebook; its K and D are then theirs.
        learn, commitment, decay, restart, scale: of the `Codebook`.
        prior: width, layers and heads of a `CodePrior`, as `fit_code_prior` sets them; None is the uniform prior.

    Example:
        >>> import vaelib
        >>> model = vaelib.vq_vae((1, 28, 28), num_codes=64, code_dim=8, likelihood="bernoulli", width=16)
        >>> x = model.likelihood.observe(vaelib.load_images("digits", "test").pixels[:5])
        >>> model.encode(x).tokens.shape
        torch.Size([5, 7, 7])
    """
    likelihood, image_shape = make_likelihood(likelihood), check_image_shape("image_shape", image_shape)
    for name, value in (("width", width), ("narrow", narrow), ("halvings", halvings)):
        check_int(name, value, minimum=2 if name == "width" else 1)
    check_int("blocks", blocks, minimum=0)
    if any(side % 2**halvings for side in image_shape[1:]):
        raise ValueError(f"image_shape: got {tuple(image_shape)}, expected sides that can be divided by {2**halvings}")
    book: Any = FiniteScalars(levels, decay) if levels is not None else None
    book = book or Codebook(num_codes, code_dim, learn, commitment, decay, restart, scale)
    shape = (book.code_dim, image_shape[1] >> halvings, image_shape[2] >> halvings)
    encoder = vq_encoder(image_shape[0], book.code_dim, width, narrow, blocks, halvings)
    decoder = vq_decoder(shape, likelihood.param_channels(image_shape[0]), width, narrow, blocks, halvings)
    over = UniformCodes(book, shape[1:]) if prior is None else CodePrior(book, shape[1:], **prior)
    return VQVAE(encoder, decoder, likelihood, image_shape, shape, prior=over)


def with_codes(model: Any) -> VQVAE:
    """`model`, or a ValueError where it has no codes."""
    if not isinstance(model, VQVAE):
        raise ValueError(f"model: got {type(model).__name__}, expected a VQVAE")
    return model


def codes_of(model: VAE, x: Tensor) -> OneHot:
    """q(z given x) of a model with codes."""
    posterior: Any = model.encode(x, validate=False)
    return posterior  # type: ignore[no-any-return]


def code_maps(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """The codes of every image: (N, h, w) int64, on the CPU."""
    with_codes(model)
    return over_images(model, images, batch_size, seed, lambda model, x, keys: (codes_of(model, x).tokens,))[0]


class CodeUsage(NamedTuple):
    """Which codes a set of images uses.

    Attributes:
        counts: how many places have each code, (K,).
        perplexity: of all places together. eq. perplexity
        batch_perplexity: the mean of the perplexities of whole batches.
        used: how many codes occur at all.
    """

    counts: Tensor
    perplexity: float
    batch_perplexity: float
    used: int


def code_usage(model: VAE, images: ImageSet | Tensor, batch_size: int = 128) -> CodeUsage:
    """Counts and perplexity of a set's codes, and the mean perplexity of its batches, in their order.

    A batch of M places has a perplexity of at most M, so that numbers of different batch sizes do not compare.
    """
    tokens, num_codes = code_maps(model, images).flatten(1), with_codes(model).codebook.num_codes
    batches = [part.flatten().bincount(minlength=num_codes).double() for part in tokens.split(check_int("batch_size", batch_size))]
    whole = [counts for counts in batches if counts.sum() == batches[0].sum()]
    counts = torch.stack(batches).sum(0)
    each = torch.stack([perplexity(part) for part in whole])
    return CodeUsage(counts.long(), perplexity(counts).item(), each.mean().item(), int((counts > 0).sum()))


@torch.no_grad()
def kmeans_start(model: VAE, images: ImageSet | Tensor, rounds: int = 10, num_vectors: int = 20000, seed: int = 0) -> None:
    """Put the codes onto the centres of `rounds` rounds of k-means over outputs of the encoder, before training.

    The centres start at outputs; one that no output is nearest to stays where it is. (Lancucki et al. 2020.)

    Args:
        num_vectors: outputs at most, chosen at random.

    Raises:
        ValueError: If the model has no codebook to move, or there are fewer outputs than codes.
    """
    book, generator = with_codes(model).codebook, torch.Generator().manual_seed(check_seed("seed", seed))
    if not isinstance(book, Codebook):
        raise ValueError(f"model: got {type(book).__name__}, whose codes are fixed, expected a Codebook")
    (output,) = over_images(model, images, 1000, seed, lambda model, x, keys: (codes_of(model, x).output,))
    vectors = output.flatten(0, -2)
    if len(vectors) < book.num_codes:
        raise ValueError(
            f"images: got {len(vectors)} outputs of the encoder, expected at least one for each of {book.num_codes} codes"
        )
    vectors = vectors[torch.randperm(len(vectors), generator=generator, device="cpu")[: check_int("num_vectors", num_vectors)]].to(
        book.codes.device
    )
    book.codes.copy_(vectors[: book.num_codes])
    for _ in range(check_int("rounds", rounds)):
        chosen = book.nearest(vectors)
        counts = torch.zeros_like(book.counts).index_add_(0, chosen, torch.ones_like(vectors[:, 0]))
        means = torch.zeros_like(book.sums).index_add_(0, chosen, vectors) / counts.clamp(min=1)[:, None]
        book.codes.copy_(torch.where(counts[:, None] > 0, means, book.codes))
    book.sums.copy_(book.codes)
    book.counts.fill_(1.0)


def fit_code_prior(
    model: VAE,
    images: ImageSet | Tensor,
    epochs: int = 20,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    tf32: bool = False,
    seed: int = 0,
) -> list[float]:
    """Give a trained model a `CodePrior`, and train that alone on the codes of the images; the rest of the model stays as it is.

    It is trained on the model's device by AdamW, along a cosine to 0 after a short warm-up; no step waits for the host.

    Args:
        images: the training set.
        epochs: passes over its codes.
        width, layers, heads: of the transformer.
        tf32: as in `TrainConfig`.
        seed: of its first weights and of the order.

    Returns:
        The mean cross-entropy of each epoch while the weights moved, nats per image.
    """
    tokens = code_maps(model, images).flatten(1).to(model.device)  # (N, h w)
    with_codes(model)
    sizes = {"width": width, "layers": layers, "heads": heads}
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(check_seed("seed", seed))
        prior = CodePrior(model.prior.codebook, model.prior.places, **sizes).to(model.device)
    own = [value for name, value in prior.named_parameters() if not name.startswith("codebook.")]
    optimizer = torch.optim.AdamW(
        own, learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=model.device.type in ("cpu", "cuda")
    )
    steps = check_int("epochs", epochs) * math.ceil(len(tokens) / check_int("batch_size", batch_size))
    warm_up = min(100, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator, course = torch.Generator().manual_seed(seed), []
    with float32_products(model.device, tf32):
        for _ in range(epochs):
            total = tokens.new_zeros((), dtype=torch.float32)
            for rows in torch.randperm(len(tokens), generator=generator, device="cpu").to(tokens.device).split(batch_size):
                optimizer.zero_grad()
                nats = prior.nats(tokens[rows]).sum()
                (nats / len(rows)).backward()
                torch.nn.utils.clip_grad_norm_(own, 1.0 * math.prod(prior.places))
                optimizer.step()
                schedule.step()
                total += nats.detach()
            course.append(total.item() / len(tokens))
    model.prior = prior.eval()
    if model.config is not None:
        model.config["prior"] = sizes
    return course


def gaussian_tokens(q: Posterior, num_codes: int, group: int = 1, nearest: bool = True, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of a Gaussian posterior, without training: each group of latents gets one of K codes drawn once from N(0, I).

    Decoder and encoder know the K codes from the seed, so that a group costs log K nats. A code near q is among them once log K exceeds
    the group's KL, its bits-back rate: below it the code that is found lies further from the mean than a draw of q does.
    eq. gaussian-tokens

    Args:
        q: of N images, each (N, L).
        num_codes: K, for each group.
        group: how many latents, one after the other, share a token.
        nearest: take the code with the largest density under q (Xu et al. 2025); else draw one with weights q / p, of which the mean over
            codebooks tends to q (Havasi, Peharz and Hernandez-Lobato 2019).
        seed: of the codes, and of the draw.

    Returns:
        The tokens, (N, L / group) int64, and the codes that they stand for as z, (N, L).
    """
    num_codes, group = check_int("num_codes", num_codes, minimum=2), check_int("group", group)
    count, size = q.mean.shape
    if size % group:
        raise ValueError(f"group: got {group}, expected a divisor of the {size} latents")
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    codes = torch.randn(size // group, num_codes, group, generator=generator, device="cpu").to(q.mean)  # (G, K, group)
    coins = None if nearest else torch.rand(count, size // group, num_codes, generator=generator, device="cpu").to(q.mean)
    tokens, values = [], []
    for g, ((mean, log_var), book) in enumerate(zip(q.split([group] * (size // group)), codes, strict=True)):
        weight = Posterior(mean[:, None], log_var[:, None]).log_prob(book)  # (N, K)
        if coins is not None:
            weight = (
                weight - StandardNormal(group).log_prob(book) - (-coins[:, g].log()).log()
            )  # + Gumbel noise: its largest is a draw
        tokens.append(weight.argmax(1))
        values.append(book[tokens[-1]])
    return torch.stack(tokens, 1), torch.cat(values, 1)
