"""How good a trained model is: held-out ELBO, log-likelihood by two ways, inference gaps, bits/dim, active units."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaelib import noise
from vaelib._validation import check_int, check_number, describe, plain
from vaelib.data import ImageSet
from vaelib.densities import Posterior, kl_divergence
from vaelib.heldout import AtLeast, evaluating, exact, heldout_elbo, latent_noise, over_images
from vaelib.likelihoods import bits_per_dim
from vaelib.objectives import gaussian_log_density, importance_weighted_bound
from vaelib.vae import VAE

REFINE, ANNEAL, ACCEPT = 3, 4, 5  # streams of noise beside those of `vaelib.noise`: draws for the ascent, z and momenta, acceptance
FEW_DRAWS = 10  # an estimate on which fewer draws count is not to be relied on
TWENTY, HUNDRED = AtLeast(20), AtLeast(100)  # images to a chunk, so few that a CPU's cache holds what is made of their codes
PILOTS = 4  # chains of annealed importance sampling that set the step sizes and do not count


@dataclass(frozen=True)
class Evaluation:
    """Means over a held-out set, in nats per image; standard errors are over images.

    Attributes:
        elbo: the mean ELBO; `elbo_standard_error` its standard error.
        expected_log_likelihood: its likelihood term, minus the distortion.
        kl: its KL term, the rate.
        bits_per_dim: of the ELBO; None where x is continuous.
        log_likelihood: importance-weighted estimate of log p(x) from `num_samples` draws; None where it was not asked for.
        effective_sample_size: how many of these draws count, the median over images; None where none were drawn.
        share_of_few_draws: the share of images where fewer than ten draws count, so that a few codes carry the estimate; None likewise.
        num_images: how many images it was measured on.
        elbo_samples: draws of z per image for the ELBO.
        num_samples: draws of z per image for `log_likelihood`.
        seed: of the noise.
        normalized: False if the model's score is no likelihood: then `elbo` bounds no log p(x).
    """

    elbo: float
    elbo_standard_error: float
    expected_log_likelihood: float
    kl: float
    bits_per_dim: float | None
    log_likelihood: float | None
    log_likelihood_standard_error: float | None
    effective_sample_size: float | None
    share_of_few_draws: float | None
    num_images: int
    elbo_samples: int
    num_samples: int
    seed: int
    normalized: bool

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        values: dict[str, Any] = plain(asdict(self))
        return values


def standard_error(values: Tensor) -> float:
    """Standard deviation over images, divided by the square root of their number; 0 for a single image."""
    return (values.double().std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def evaluate(
    model: VAE, images: ImageSet, num_samples: int = 0, elbo_samples: int = 10, batch_size: int = 1000, seed: int = 0
) -> Evaluation:
    """The held-out ELBO with its terms and, with `num_samples` above 0, the importance-weighted log-likelihood.

    Args:
        images: the held-out set.
        num_samples: draws per image for the importance-weighted estimate (the field reports 5000); 0 leaves it out.
        elbo_samples: draws per image for the ELBO.
        batch_size: images per chunk; the result does not depend on it.

    Example:
        >>> import vaelib
        >>> model = vaelib.mlp_vae((1, 28, 28), hidden_dims=(32,), latent_dim=2)
        >>> scores = vaelib.evaluate(model, vaelib.load_images("digits", "test"), num_samples=10)
        >>> scores.elbo < scores.log_likelihood  # nats per image
        True
    """
    check_int("num_samples", num_samples, minimum=0)
    terms = heldout_elbo(model, images, elbo_samples, batch_size, seed)
    elbo = terms.elbo.double().mean().item()
    estimate = importance_weighted_estimate(model, images, num_samples, seed=seed) if num_samples else None
    discrete = model.likelihood.values is not None
    return Evaluation(
        elbo=elbo,
        elbo_standard_error=standard_error(terms.elbo),
        expected_log_likelihood=terms.log_likelihood.double().mean().item(),
        kl=terms.kl.double().mean().item(),
        bits_per_dim=bits_per_dim(elbo, math.prod(model.image_shape), model.likelihood) if discrete else None,
        log_likelihood=estimate and estimate.log_likelihood.double().mean().item(),
        log_likelihood_standard_error=estimate and standard_error(estimate.log_likelihood),
        effective_sample_size=estimate and estimate.effective_sample_size.median().item(),
        share_of_few_draws=estimate and (estimate.effective_sample_size < FEW_DRAWS).double().mean().item(),
        num_images=len(terms.elbo),
        elbo_samples=elbo_samples,
        num_samples=num_samples,
        seed=seed,
        normalized=model.likelihood.normalized,
    )


def log_likelihood(
    model: VAE, images: ImageSet | Tensor, num_samples: int = 5000, batch_size: int = TWENTY, sample_batch: int = 100, seed: int = 0
) -> Tensor:
    """Importance-weighted estimate of log p(x) of each image: (N,), nats, on the CPU. eq. importance-weighted-bound

    It is the first part of `importance_weighted_estimate`, which also says how many of the draws count.

    Raises:
        ValueError: If the model's score is no likelihood.
    """
    return importance_weighted_estimate(model, images, num_samples, batch_size, sample_batch, seed).log_likelihood


class ImportanceWeightedEstimate(NamedTuple):
    """An estimate for each image with what it rests on, each (N,), on the CPU.

    Attributes:
        log_likelihood: of log p(x), nats, low on average. eq. importance-weighted-bound
        effective_sample_size: how many of the draws count, from 1 to `num_samples`. eq. effective-sample-size
    """

    log_likelihood: Tensor
    effective_sample_size: Tensor


def importance_weighted_estimate(
    model: VAE, images: ImageSet | Tensor, num_samples: int = 5000, batch_size: int = TWENTY, sample_batch: int = 100, seed: int = 0
) -> ImportanceWeightedEstimate:
    """log p(x) of each image by importance sampling, and the effective sample size of its draws, in one pass.

    Where the size is near 1 a single code carries the estimate, and another seed may give another one by nats. A large size is no
    proof: codes that q never draws are missing from it too. eq. importance-weighted-bound, eq. effective-sample-size

    Memory is bounded: batch_size * sample_batch codes are decoded at once; on a CPU, few enough to stay in its cache are several
    times as fast, and on CUDA chunks grow to what memory holds unless `batch_size` is given. The result depends on neither number, nor
    on the order of the images. Burda, Grosse and Salakhutdinov 2016.

    Raises:
        ValueError: If the model's score is no likelihood.
    """
    num_samples, sample_batch = check_int("num_samples", num_samples), check_int("sample_batch", sample_batch)
    check_normalized(model)

    def measure(model: VAE, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        total = squares = torch.full_like(exact(x[:, 0, 0, 0]), -math.inf)  # of w and w^2
        for start in range(0, num_samples, sample_batch):
            count = min(sample_batch, num_samples - start)
            eps = latent_noise(keys, count, model.latent_dim, start)
            log_weights = exact(model.log_weights(x, count, eps, validate=False))  # (K, N)
            total = torch.logaddexp(total, torch.logsumexp(log_weights, 0))
            squares = torch.logaddexp(squares, torch.logsumexp(2 * log_weights, 0))
        return (total - math.log(num_samples)).float(), (2 * total - squares).exp().float()

    return ImportanceWeightedEstimate(*over_images(model, images, batch_size, seed, measure))


def check_normalized(model: VAE) -> None:
    """ValueError for a model whose score is no likelihood."""
    if not model.likelihood.normalized:
        raise ValueError(f"model: got the score {model.likelihood.config['name']!r}, expected a likelihood; it defines no log p(x)")


def annealed_log_likelihood(
    model: VAE,
    images: ImageSet | Tensor,
    num_steps: int = 1000,
    num_chains: int = 16,
    batch_size: int = HUNDRED,
    leapfrog_steps: int = 10,
    seed: int = 0,
) -> Tensor:
    """log p(x) of each image by annealed importance sampling: (N,), nats, on the CPU. eq. annealed-importance-sampling

    Each chain starts at a draw of the prior and goes through p(z) p(x given z)^t from t = 0 to 1 (a sigmoid's course), by one
    transition of Hamiltonian Monte Carlo at each t (Neal 2001; Wu, Burda, Salakhutdinov and Grosse 2017). The encoder is not used, so
    this checks `log_likelihood`. It is a lower bound in expectation, tighter with more steps and chains. For that the step size must
    not follow the chain that it moves: `PILOTS` more chains adapt it towards 65 % acceptance, for each image, and are left out.
    Where the prior has ``from_noise``, chains move in that noise, else in z. The noise belongs to the image.

    Args:
        num_steps: steps from t = 0 to 1.
        num_chains: chains per image; (num_chains + PILOTS) * batch_size codes are decoded at once.
        batch_size: images per chunk; on CUDA chunks grow to what memory holds unless it is given.
        leapfrog_steps: gradients in each transition.

    Raises:
        ValueError: If the model's score is no likelihood.
    """
    check_normalized(model)
    schedule = _schedule(num_steps, num_chains, leapfrog_steps)

    def measure(model: VAE, x: Tensor, keys: Tensor) -> tuple[Tensor]:
        log_weights, _ = _anneal(model, x, keys, schedule, num_chains, leapfrog_steps)  # (chains, N)
        return (importance_weighted_bound(log_weights).float(),)

    return over_images(model, images, batch_size, seed, measure)[0]


class BidirectionalBounds(NamedTuple):
    """log p(x) between two bounds, for images that the model has drawn: each (N,), nats, on the CPU.

    Attributes:
        lower: by annealing from the prior, a lower bound in expectation. eq. annealed-importance-sampling
        upper: by annealing back from the image's own code, an upper bound in expectation. eq. reverse-annealing
    """

    lower: Tensor
    upper: Tensor


def bidirectional_bounds(
    model: VAE, x: Tensor, z: Tensor, num_steps: int = 1000, num_chains: int = 16, batch_size: int = 100, leapfrog_steps: int = 10,
    seed: int = 0,
) -> BidirectionalBounds:  # fmt: skip
    """Bidirectional Monte Carlo: log p(x) of simulated images from below and from above. eq. reverse-annealing

    Who draws z of the prior and then x of p(x given z) has an exact draw of p(z given x): z itself. From there chains walk back to the
    prior, and the mean of their inverse weights is 1 / p(x) without bias, so minus its logarithm is too high on average. The step sizes
    on the way back are those of the way there, which no chain that starts at z has moved. For images of a data set there is no such z,
    hence no upper bound. Grosse, Ghahramani and Adams 2015; Wu, Burda, Salakhutdinov and Grosse 2017.

    Args:
        x: (N, C, H, W), drawn of p(x given z), as the likelihood's `sample` gives it.
        z: (N, L), drawn of the prior; where the prior has ``from_noise``, the noise that it was made of, for N(0, I) the same.
        num_steps, num_chains, leapfrog_steps: see `annealed_log_likelihood`; as many steps and chains lead back.
        batch_size: images per chunk.

    Raises:
        ValueError: If the model's score is no likelihood, or x and z differ in number.
    """
    check_normalized(model)
    schedule, batch_size = _schedule(num_steps, num_chains, leapfrog_steps), check_int("batch_size", batch_size)
    x, z, found = x.to(model.device), z.to(model.device), []
    model.check_input(x, validate=True)
    model.check_code(z)
    if len(x) != len(z):
        raise ValueError(f"x, z: got {describe(x)} and {describe(z)}, expected as many codes as images")
    with evaluating(model):
        for images, codes in zip(x.split(batch_size), z.split(batch_size), strict=True):
            keys = noise.image_keys(images.contiguous().view(torch.uint8), seed)
            there, back = _anneal(model, images, keys, schedule, num_chains, leapfrog_steps, codes)
            found.append(torch.stack([importance_weighted_bound(there), -importance_weighted_bound(back)]).float().cpu())
    return BidirectionalBounds(*torch.cat(found, 1))


def _schedule(num_steps: int, num_chains: int, leapfrog_steps: int) -> list[float]:
    """The exponents from 0 to 1, a sigmoid's course, after a check of what they are asked for with."""
    for name, value in (("num_steps", num_steps), ("num_chains", num_chains), ("leapfrog_steps", leapfrog_steps)):
        check_int(name, value)
    course = torch.linspace(-4, 4, num_steps + 1, dtype=torch.float64, device="cpu").sigmoid()
    schedule: list[float] = ((course - course[0]) / (course[-1] - course[0])).tolist()
    return schedule


def _anneal(
    model: VAE, x: Tensor, keys: Tensor, schedule: list[float], num_chains: int, leapfrog_steps: int, end: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The log-weight of each chain, float64 (num_chains, N), and of the chains back from `end`, (N, L), an exact draw of the posterior.

    Chains move in u: the noise that z is made of, or z itself. No step reads anything back from the device.
    """
    chains, dim, prior = PILOTS + num_chains, model.latent_dim, model.prior
    from_noise = getattr(prior, "from_noise", None)

    def normal(step: int, count: int) -> Tensor:  # (count, N, L)
        return noise.normal_noise(keys, (count, dim), ANNEAL, step * chains * dim).transpose(0, 1).to(x)

    def score(u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x given z), (chains, N), and its gradient (chains, N, L)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = model.log_likelihood(x, u if from_noise is None else from_noise(u.flatten(0, 1)).view_as(u))
            return value.detach(), torch.autograd.grad(value.sum(), u)[0]

    def energy_of(u: Tensor, momentum: Tensor) -> Tensor:
        """Minus the log-density of u under its prior and of the momentum, up to a constant: (chains, N)."""
        if from_noise is not None:
            return 0.5 * (u.square() + momentum.square()).sum(-1)
        energy: Tensor = 0.5 * momentum.square().sum(-1) - prior.log_prob(u)
        return energy

    def pull(u: Tensor) -> Tensor:
        """The gradient of u's log-density under its prior: (chains, N, L)."""
        if from_noise is not None:
            return -u
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_prior = prior.log_prob(u)
            gradient = torch.autograd.grad(log_prior.sum(), u, allow_unused=True)[0] if log_prior.requires_grad else None
            if gradient is None:
                found = f"the prior {type(prior).__name__}, whose log_prob has no gradient"
                raise ValueError(f"model: got one with {found}, expected a density of continuous z: the chains follow its gradient")
            return gradient

    def move(u: Tensor, value: Tensor, gradient: Tensor, t: float, step_size: Tensor, step: int) -> tuple[Tensor, ...]:
        """One transition that leaves p(z) p(x given z)^t as it is: u, its score, and the probability of acceptance."""
        new, new_value, new_gradient, momentum = u, value, gradient, normal(step + 1, len(u))
        energy = energy_of(u, momentum) - t * value
        for _ in range(leapfrog_steps):
            momentum = momentum + 0.5 * step_size * (t * new_gradient + pull(new))
            new = new + step_size * momentum
            new_value, new_gradient = score(new)
            momentum = momentum + 0.5 * step_size * (t * new_gradient + pull(new))
        new_energy = energy_of(new, momentum) - t * new_value
        acceptance = (energy - new_energy).exp().clamp(max=1).nan_to_num(0)  # (chains, N); NaN where the path diverged
        moved = acceptance > noise.uniform_noise(keys, (len(u),), ACCEPT, step * chains).T
        u, gradient = (torch.where(moved[..., None], *pair) for pair in ((new, u), (new_gradient, gradient)))  # (chains, N, L)
        return u, torch.where(moved, new_value, value), gradient, acceptance

    if from_noise is not None:
        u = normal(0, chains)
    else:  # each image has a generator of its own
        own = (torch.Generator().manual_seed(key) for key in keys.tolist())
        u = torch.stack([prior.sample(chains, generator=generator) for generator in own], dim=1).to(x)
    value, gradient = score(u)
    step_size = torch.full_like(x[:, :1, 0, 0], 0.5)  # (N, 1)
    log_weights = exact(x.new_zeros(num_chains, len(x)))
    step_sizes = []
    for step, (before, t) in enumerate(pairwise(schedule)):
        log_weights += (t - before) * exact(value[PILOTS:])
        step_sizes.append(step_size)
        u, value, gradient, acceptance = move(u, value, gradient, t, step_size, step)
        step_size = step_size * (0.3 * (acceptance[:PILOTS].mean(0) - 0.65)).exp()[:, None]
    back = torch.zeros_like(log_weights)
    if end is not None:  # the same moves, each its own reverse, in the opposite order
        u = end.expand(num_chains, *end.shape)
        value, gradient = score(u)
        for step in reversed(range(len(step_sizes))):
            before, t = schedule[step : step + 2]
            u, value, gradient, _ = move(u, value, gradient, t, step_sizes[step], len(step_sizes) + step)
            back -= (t - before) * exact(value)
    return log_weights, back


def refine_posterior(
    model: VAE, x: Tensor, steps: int = 300, learning_rate: float = 0.1, num_samples: int = 8, seed: int = 0, validate: bool = True
) -> Posterior:
    """Towards the best diagonal Gaussian q for each image on its own, not through the encoder: mean and log_var, each (N, L), where x is.

    From the encoder's q the ELBO is ascended over mean and log_var by Adam, with fresh draws at each step and a learning rate that
    falls to 0; the networks stay as they are. An image that it does not help, by 64 fresh draws, keeps the encoder's q. The draws
    belong to the image. Kim et al. 2018; Cremer, Li and Duvenaud 2018.

    Args:
        x: (N, C, H, W), as `likelihood.observe` gives it.
        steps: of the ascent; 0 gives the encoder's q.
        learning_rate: of the first step, above 0.
        num_samples: draws per image and step.
        validate: whether the values of x are checked.

    Raises:
        ValueError: For a model whose q is not one diagonal Gaussian for each image, such as a hierarchical one.
    """
    check_int("steps", steps, minimum=0)
    check_number("learning_rate", learning_rate, exclusive=True)
    check_int("num_samples", num_samples)
    with evaluating(model):
        start = model.draw(x, 1, x.new_zeros(1, len(x), model.latent_dim), validate=validate).gaussian()
        keys = noise.image_keys(x.contiguous().view(torch.uint8), seed)
        q = Posterior(*(value.clone().requires_grad_() for value in start))

        def elbo(q: Posterior, count: int, at: int) -> Tensor:
            """(N,), from `count` draws of each image, with noise from place `at` on."""
            eps = noise.normal_noise(keys, (count, model.latent_dim), REFINE, at).transpose(0, 1).to(x)
            z = q.sample(eps)
            return model.log_likelihood(x, z).mean(0) - mean_kl(q, model.prior, z)

        optimizer = torch.optim.Adam(q, betas=(0.9, 0.95))  # a short memory: the first gradients may be huge
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps) ** 2
            with torch.enable_grad():
                objective = elbo(q, num_samples, step * num_samples * model.latent_dim).sum()
                q.mean.grad, q.log_var.grad = (-gradient for gradient in torch.autograd.grad(objective, q))
            optimizer.step()
        ends = [elbo(density, 64, steps * num_samples * model.latent_dim) for density in (start, q)]
        better = (ends[1] > ends[0])[:, None]  # False where the ascent diverged
    return Posterior(*(torch.where(better, new.detach(), old) for new, old in zip(q, start, strict=True)))


def mean_kl(q: Posterior, p: Any, z: Tensor) -> Tensor:
    """KL(q || p) of each image, (N,), nats: closed form, or the mean over the draws z (K, N, L)."""
    kl = kl_divergence(q, p, z).mean(0)
    return kl.sum(1) if kl.dim() == 2 else kl


class InferenceGaps(NamedTuple):
    """What a better q would gain, image by image: each (N,), nats, on the CPU. eq. amortization-gap

    Attributes:
        elbo: of the encoder's q.
        refined_elbo: of the best diagonal q found, see `refine_posterior`.
        log_likelihood: an importance-weighted estimate of log p(x); itself a lower bound in expectation.
    """

    elbo: Tensor
    refined_elbo: Tensor
    log_likelihood: Tensor

    @property
    def amortization(self) -> Tensor:
        """(N,), nats, what the encoder loses against the best diagonal q. eq. amortization-gap"""
        return self.refined_elbo - self.elbo

    @property
    def approximation(self) -> Tensor:
        """(N,), nats, what the refined q loses against the posterior. eq. amortization-gap

        It is too large by what the ascent missed, and too small by what the estimate of log p(x) did.
        """
        return self.log_likelihood - self.refined_elbo


def inference_gaps(
    model: VAE,
    images: ImageSet | Tensor,
    num_samples: int = 1000,
    steps: int = 300,
    learning_rate: float = 0.1,
    batch_size: int = HUNDRED,
    sample_batch: int = 100,
    seed: int = 0,
) -> InferenceGaps:
    """The gap log p(x) - ELBO of each image, split at the best diagonal q. Cremer, Li and Duvenaud 2018. eq. amortization-gap

    Both ELBOs meet the same noise, so that their difference is not noise. The proposal for log p(x) is the even mixture of the two
    q's, whose draws are there already: every weight has the density of the mixture below it (the balance heuristic, Veach and
    Guibas 1995), so that one good q of the two is enough. To take the larger of two estimates would be no lower bound.

    Args:
        num_samples: draws per image from each q.
        steps, learning_rate: of `refine_posterior`.
        batch_size: images per chunk; batch_size * sample_batch codes are decoded at once. The result depends on neither number. On CUDA
            chunks grow to what memory holds unless it is given.

    Raises:
        ValueError: If the model's score is no likelihood, or its q is not one diagonal Gaussian for each image.
    """
    num_samples, sample_batch = check_int("num_samples", num_samples), check_int("sample_batch", sample_batch)
    check_normalized(model)

    def measure(model: VAE, x: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        proposals = (model.encode(x, validate=False), refine_posterior(model, x, steps, learning_rate, seed=seed, validate=False))
        elbos = [exact(x.new_zeros(len(x))) for _ in proposals]
        total = torch.full_like(elbos[0], -math.inf)
        for start in range(0, num_samples, sample_batch):
            eps = latent_noise(keys, min(sample_batch, num_samples - start), model.latent_dim, start).to(x)  # (K, N, L)
            for side, q in enumerate(proposals):
                z = q.sample(eps)
                log_likelihood, kl = model.log_likelihood(x, z), exact(mean_kl(q, model.prior, z))
                elbos[side] += exact(log_likelihood).sum(0) / num_samples - kl * (len(eps) / num_samples)
                mixture = torch.logaddexp(*(proposal.log_prob(z) for proposal in proposals))  # twice the mixture's density
                log_weights = log_likelihood + model.prior.log_prob(z) - mixture
                total = torch.logaddexp(total, exact(torch.logsumexp(log_weights, 0)))
        # K draws of each q, weights of half the size: 2 cancels
        return tuple(value.float() for value in (*elbos, total - math.log(num_samples)))

    return InferenceGaps(*over_images(model, images, batch_size, seed, measure))


def posteriors(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Posterior:
    """q(z given x) of each image, in chunks: mean and log_var, each (N, latent_dim), on the CPU. Nothing is sampled from it.

    Where the likelihood binarizes, its noise belongs to the image (`vaelib.noise`): the same image has the same code in every chunk.
    For a `HierarchicalVAE` it is q along the path of the means.

    Raises:
        ValueError: For a model whose posterior is no `Posterior`.
    """

    def measure(model: VAE, x: Tensor, keys: Tensor) -> Posterior:
        q = model.encode(x)
        if not isinstance(q, Posterior):
            raise ValueError(f"model: got one with the posterior {type(q).__name__}, expected a Gaussian q(z given x)")
        return q

    return Posterior(*over_images(model, images, batch_size, seed, measure))


def posterior_means(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """The posterior mean of each image: (N, latent_dim), on the CPU."""
    return over_images(model, images, batch_size, seed, lambda model, x, keys: (model.encode(x).mean,))[0]


def active_units(model: VAE, images: ImageSet | Tensor, threshold: float = 0.01, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """Which latent dimensions the posterior mean moves in: Var over images of E[z given x] above the threshold, bool (L,).

    eq. active-units. Burda, Grosse and Salakhutdinov 2016, section 5.
    """
    check_number("threshold", threshold)
    if len(images) < 2:
        raise ValueError("images: got one image, expected at least two: a variance over images is asked for")
    return posterior_means(model, images, batch_size, seed).var(0) > threshold


def kl_per_unit(model: VAE, images: ImageSet | Tensor, batch_size: int = 1000, seed: int = 0) -> Tensor:
    """The mean over images of each latent unit's KL: (L,), nats, on the CPU. Their sum is the mean rate. eq. gaussian-kl

    A unit at 0 carries nothing: its posterior has collapsed onto the prior.
    """

    def measure(model: VAE, x: Tensor, keys: Tensor) -> tuple[Tensor]:
        terms = model.elbo(x, 1, latent_noise(keys, 1, model.latent_dim), validate=False)
        if terms.kl_per_unit is None:
            expected = "a pair whose KL is closed form, see vaelib.densities.register_kl"
            raise ValueError(f"model: got one whose KL to the prior {type(model.prior).__name__} has no units, expected {expected}")
        return (terms.kl_per_unit.sum(0, keepdim=True),)  # of a chunk

    return (over_images(model, images, batch_size, seed, measure)[0].double().sum(0) / len(images)).float()


class RateDecomposition(NamedTuple):
    """The mean rate split in two, in nats, each with its standard error over the draws. eq. rate-decomposition"""

    mutual_information: float
    marginal_kl: float
    mutual_information_standard_error: float
    marginal_kl_standard_error: float


def rate_decomposition(model: VAE, images: ImageSet | Tensor, num_draws: int = 2000, seed: int = 0) -> RateDecomposition:
    """What the codes tell of the images, and what the prior misses of the codes.

    The rate is I(x; z) + KL(q(z) || p(z)) with the aggregate posterior q(z), the mean of q(z given x) over the N images. Estimated
    from one code each of the first `num_draws` images in random order; log q(z) is a log-sum-exp over all N posteriors.
    The mutual information cannot exceed log N. Hoffman and Johnson 2016. eq. aggregate-posterior, eq. rate-decomposition

    Raises:
        ValueError: For a model whose q is not one diagonal Gaussian for each image, such as a hierarchical one.
    """

    def measure(model: VAE, x: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        draw = model.draw(x, 1, latent_noise(keys, 1, model.latent_dim), validate=False)
        return *draw.gaussian(), draw.z[0], draw.p.log_prob(draw.z)[0]

    mean, log_var, z, log_prior = (value.double() for value in over_images(model, images, 1000, seed, measure))
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(int(seed)), device="cpu")
    chosen = order[: check_int("num_draws", num_draws)]
    precision = (-log_var).exp()
    constant = (mean.square() * precision + log_var).sum(1) + model.latent_dim * math.log(2 * math.pi)  # (N,)
    own, marginal = [], []
    for these in chosen.split(200):
        # -2 log q(z_m given x_n), (M, N)
        squares = z[these].square() @ precision.T - 2 * z[these] @ (mean * precision).T + constant
        marginal.append(torch.logsumexp(-0.5 * squares, 1) - math.log(len(z)))
        own.append(gaussian_log_density(z[these], mean[these], log_var[these]))
    information, gap = torch.cat(own) - torch.cat(marginal), torch.cat(marginal) - log_prior[chosen]
    return RateDecomposition(information.mean().item(), gap.mean().item(), standard_error(information), standard_error(gap))
