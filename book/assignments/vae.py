# %% [markdown] teacher="notes"
# For teachers: this file is the one source of the assignment, the first of four; the others are `likelihoods.py`, `evaluation.py` and
# `hierarchy.py`.
# `python book/_scripts/assignment.py` writes the students' notebooks from them, `--instructor OUT.ipynb --of NAME` the copy with the
# solutions for nbgrader, and `--grade NOTEBOOK` gives a submission its points without nbgrader.
#
# It is public, solutions included.
# Change the numbers and the questions each term, or keep a private fork.
# A submission runs as you: grade in a container or with an account that owns nothing.
#
# Each cell is one of these:
#
# - `setup="elbo"`: the first code cell of that chapter is put here.
# - `locked="NAME"`: code that students shall not change.
# - `answer="NAME" without="WORDS"`: what stands between the markers is the solution.
#   The grader says so where an answer holds one of the words, or calls the checkers; it takes no points for it.
# - `test="NAME" points=8`: passes or raises. Hidden tests, between nbgrader's markers, stay out of the students' notebook.
#   With 0 points it is the test of an extra task.
# - `essay="NAME" points=8`: a model answer to a question; the points are given by hand.
# - `teacher="NAME"`: in no notebook.
# - with none of these: the same for all.
#
# A number of points stands twice, in the cell of a test and in the heading of its task; a test holds the two together.
#
# ruff: noqa: E402

# %% [markdown]
# # Assignment 1: a variational autoencoder, part by part
#
# You write the eight parts of a VAE, and two short answers.
# Then your parts train together on handwritten digits.
#
# **Needs.** The chapters [ELBO](../elbo.ipynb), which has the mathematics of parts 1 to 5, and [MNIST](../mnist-mlp.ipynb), whose section "A VAE from nothing but torch" has the networks and the step of parts 6 and 7, and whose section "How large should the code be?" has what the question on silent latents needs; part 8 stands on its own.
# Parts 1, 2, 3, 5 and 7 are as in these chapters, or in their exercises: write them without looking, and look after you have asked the checker.
# **Hours.** About 6: an estimate, for it was not tried with a class.
#
# - Replace each `raise NotImplementedError()` with your code, and each `YOUR ANSWER HERE` with your words.
# - The cell below your code runs a *checker*.
#   It says whether you are right, and it knows the usual mistakes by name.
#   Ask it as often as you like.
# - The cell after that gives the points: all of them, or none.
#   Leave these cells as they are; the grader puts the original back.
# - The parts do not depend on each other: an error in one costs nothing in the next.
# - Unless a part says otherwise, use torch and no function of `vaelib`.
# - Before you hand in: restart the kernel, run all cells, and read what they say.
#
# Throughout, $N$ is the number of images, $L$ of latents, $K$ of samples; $\log$ is natural, so the unit is the nat.
# `log_var` is the logarithm of the *variance*, $\log s^2$.
# 100 points: 84 by tests, 16 by hand.

# %% setup="elbo"
FAST = False  # the first code cell of the chapter stands here

# %% locked="imports"
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import vaelib
from vaelib import checks
from vaelib.book.plotting import show_images, use_style

use_style()
verdicts = {}  # task -> what its checker found

# %% [markdown]
# ## 1. The KL divergence (8 points)
#
# For a diagonal Gaussian $q = \mathcal N(\mu, \operatorname{diag} s^2)$ and the prior $p = \mathcal N(0, I)$,
#
# $$
# \mathrm{KL}(q \,\|\, p) = \frac12 \sum_{l=1}^{L} \left( \mu_l^2 + s_l^2 - 1 - \log s_l^2 \right) .
# $$
#
# In: `mean` and `log_var`, each $(N, L)$.
# Out: one number for each image, $(N,)$, nats.


# %% answer="kl" without="vaelib kl_divergence"
def kl(mean, log_var):
    """KL(N(mean, exp(log_var)) || N(0, I)): (N, L) and (N, L) -> (N,), nats."""
    ### BEGIN SOLUTION
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1)
    ### END SOLUTION


# %%
print(checks.check_kl(kl))

# %% test="kl" points=8
verdicts["kl"] = checks.check_kl(kl)
assert verdicts["kl"], verdicts["kl"]
print(verdicts["kl"])

# %% [markdown]
# ## 2. A sample with a gradient (8 points)
#
# A draw from $q$ is a function of its parameters and of noise that does not depend on them:
#
# $$
# z = \mu + s \odot \varepsilon, \qquad \varepsilon \sim \mathcal N(0, I) .
# $$
#
# In: `mean`, `log_var` and the noise `eps`, each $(N, L)$.
# Out: $z$, $(N, L)$, with a gradient for `mean` and `log_var`.


# %% answer="reparameterize" without="vaelib"
def reparameterize(mean, log_var, eps):
    """z = mean + exp(log_var / 2) * eps: all (N, L)."""
    ### BEGIN SOLUTION
    return mean + (log_var / 2).exp() * eps
    ### END SOLUTION


# %%
print(checks.check_reparameterize(reparameterize))

# %% test="reparameterize" points=8
verdicts["reparameterize"] = checks.check_reparameterize(reparameterize)
assert verdicts["reparameterize"], verdicts["reparameterize"]
print(verdicts["reparameterize"])

# %% [markdown]
# ## 3. The ELBO (12 points)
#
# For binary pixels $x_d$ and the decoder's logits $o_d$ at one sample of $z$, the estimate of the ELBO is
#
# $$
# \mathrm{ELBO}(x) = \sum_{d} \Big[ x_d \log \operatorname{sigmoid}(o_d) + (1 - x_d) \log \operatorname{sigmoid}(-o_d) \Big]
# - \mathrm{KL}(q \,\|\, p) .
# $$
#
# In: `x` and `logits`, each $(N, C, H, W)$; `mean` and `log_var`, each $(N, L)$.
# Out: one number for each image, $(N,)$, nats; higher is better.
# For the KL you may call `vaelib.gaussian_kl(mean, log_var)`.


# %% answer="elbo" without="vaelib.Bernoulli ElboTerms"
def elbo(x, mean, log_var, logits):
    """Log-likelihood minus KL, nats (N,).

    x and logits are (N, C, H, W), mean and log_var (N, L).
    """
    ### BEGIN SOLUTION
    bce = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    log_likelihood = -bce.flatten(1).sum(1)
    return log_likelihood - vaelib.gaussian_kl(mean, log_var)
    ### END SOLUTION


# %%
print(checks.check_elbo(elbo))

# %% test="elbo" points=12
verdicts["elbo"] = checks.check_elbo(elbo)
assert verdicts["elbo"], verdicts["elbo"]
print(verdicts["elbo"])

# %% [markdown]
# ### Question: sums and means (8 points)
#
# A fellow student adds the log-likelihood up over the pixels, but takes the *mean* of the KL over 20 latents.
# This trains a $\beta$-VAE: with which $\beta$?
# What would you expect of its reconstructions, and of images decoded from samples of the prior, beside those of the ELBO?
# Three to five sentences.

# %% [markdown] essay="sums-and-means" points=8
# The mean over 20 latents is the sum divided by 20, so this is a $\beta$-VAE with $\beta = 1/20$. (2 points)
# The rate is cheap, so the encoder spends more nats on each image, with means farther apart and smaller variances. (2 points)
# Reconstructions become sharper. (2 points)
# The codes of images no longer fill the prior as a whole: a sample of the prior often falls where the decoder was never trained,
# and its image looks worse. (2 points)

# %% [markdown]
# ## 4. The likelihood of stored pixels (12 points)
#
# Grey pixels are stored on 256 levels; here they are spread evenly over $[-1, 1]$, so that neighbours lie $\frac{2}{255}$ apart.
# The discretized logistic gives each level the mass of a logistic density, of location $m$ and scale $\sigma$, between
# $a = (x - \frac{1}{255} - m) / \sigma$ and $b = (x + \frac{1}{255} - m) / \sigma$:
#
# $$
# \log p(x) = \sum_{d} \log \big[ \operatorname{sigmoid}(b_d) - \operatorname{sigmoid}(a_d) \big] ,
# $$
#
# but the lowest level reaches down to $a = -\infty$ and the highest up to $b = \infty$.
# Written so, as in the chapter, the difference rounds to 0 when $m$ is far from $x$.
# This form does not:
#
# $$
# \begin{aligned}
# \log \big[ \operatorname{sigmoid}(b) - \operatorname{sigmoid}(a) \big]
# ={}& \log \operatorname{sigmoid}(b) + \log \operatorname{sigmoid}(-a) \\
# &+ \log \big( 1 - e^{-(b - a)} \big) .
# \end{aligned}
# $$
#
# In: `x`, $(N, C, H, W)$; `params`, $(N, 2C, H, W)$: all $m$, then all $\log \sigma$.
# Out: one number for each image, $(N,)$, nats, finite also where a parameter is $\pm 30$.
# Helpful: `F.logsigmoid`, `torch.expm1`, and $b - a = \frac{2}{255\, \sigma}$ computed directly.


# %% answer="likelihood" without="vaelib"
class Likelihood:
    """The discretized logistic on 256 levels."""

    values, lowest, highest = 256, -1.0, 1.0
    params_per_value = 2  # location and log of the scale

    def log_prob(self, x, params):
        """log p(x): x (N, C, H, W) and params (N, 2C, H, W) -> (N,), nats."""
        location, log_scale = params.chunk(2, dim=1)
        ### BEGIN SOLUTION
        inverse = torch.exp(-log_scale)
        upper = F.logsigmoid((x + 1 / 255 - location) * inverse)
        lower = F.logsigmoid((location - x + 1 / 255) * inverse)
        inner = upper + lower + torch.log(-torch.expm1(-2 / 255 * inverse))
        ends = torch.where(x > 0, lower, upper)
        log_mass = torch.where(x.abs() > 0.999, ends, inner)
        return log_mass.flatten(1).sum(1)
        ### END SOLUTION


# %%
print(checks.check_likelihood(Likelihood()))

# %% test="likelihood" points=12
verdicts["likelihood"] = checks.check_likelihood(Likelihood())
assert verdicts["likelihood"], verdicts["likelihood"]
print(verdicts["likelihood"])

# %% [markdown]
# ## 5. A tighter bound (10 points)
#
# From $K$ samples $z_k$ of $q$ come the log-weights $\log w_k = \log p(x, z_k) - \log q(z_k \mid x)$, and the bound
#
# $$
# \mathrm{IW}_K(x) = \log \frac1K \sum_{k=1}^{K} w_k .
# $$
#
# In: `log_weights`, $(K, N)$, nats; they may be near $\pm 1000$.
# Out: one number for each image, $(N,)$, nats.


# %% answer="iwae" without="vaelib"
def iwae(log_weights):
    """log of the mean weight over the K samples: (K, N) -> (N,), nats."""
    ### BEGIN SOLUTION
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))
    ### END SOLUTION


# %%
print(checks.check_iwae(iwae))

# %% test="iwae" points=10
verdicts["iwae"] = checks.check_iwae(iwae)
assert verdicts["iwae"], verdicts["iwae"]
print(verdicts["iwae"])

# %% [markdown]
# ## 6. Encoder and decoder (12 points)
#
# Two networks:
#
# $$
# x \mapsto \big( \mu(x),\; \log s^2(x) \big), \qquad z \mapsto o(z) .
# $$
#
# The encoder takes $(N, C, H, W)$ and gives `mean` and `log_var`, each $(N, L)$.
# The decoder takes $(N, L)$ and gives logits, $(N, C, H, W)$: any real numbers, so no sigmoid at its end.
# Layers are your choice; one hidden layer of some 200 units is enough.
# The networks must work for `image_shape` $(1, 8, 8)$ and $(1, 28, 28)$, and what one image gives must not depend on its batch.


# %% answer="networks" without="vaelib"
class Encoder(nn.Module):
    """x (N, C, H, W) -> mean and log_var, each (N, L)."""

    def __init__(self, image_shape, latent_dim):
        super().__init__()
        ### BEGIN SOLUTION
        self.hidden = nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(image_shape), 200), nn.ReLU()
        )
        self.mean = nn.Linear(200, latent_dim)
        self.log_var = nn.Linear(200, latent_dim)
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        h = self.hidden(x)
        return self.mean(h), self.log_var(h)
        ### END SOLUTION


class Decoder(nn.Module):
    """z (N, L) -> logits (N, C, H, W)."""

    def __init__(self, latent_dim, image_shape):
        super().__init__()
        ### BEGIN SOLUTION
        pixels = math.prod(image_shape)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 200),
            nn.ReLU(),
            nn.Linear(200, pixels),
            nn.Unflatten(1, tuple(image_shape)),
        )
        ### END SOLUTION

    def forward(self, z):
        ### BEGIN SOLUTION
        return self.layers(z)
        ### END SOLUTION


# %%
print(
    checks.check_encoder_decoder(
        Encoder((1, 8, 8), 4), Decoder(4, (1, 8, 8)), (1, 8, 8), 4
    )
)

# %% test="networks" points=12
for image_shape, latent_dim in (((1, 8, 8), 4), ((1, 28, 28), 20)):
    torch.manual_seed(0)
    pair = Encoder(image_shape, latent_dim), Decoder(latent_dim, image_shape)
    verdicts["networks"] = checks.check_encoder_decoder(
        *pair, image_shape, latent_dim
    )
    assert verdicts["networks"], verdicts["networks"]
print(verdicts["networks"])

# %% [markdown]
# ### Question: silent latents (8 points)
#
# You train a VAE with 20 latents.
# At the end the KL of 14 of them is 0.00 nats for every image, rounded to two decimals.
# Can one of the 14 still count as active, by the variance of its mean and the threshold of the chapter?
# What would happen to the ELBO and to the reconstructions if you removed these 14 latents and changed nothing else?
# Is it an error in the code?
# Three to five sentences.

# %% [markdown] essay="silent-latents" points=8
# No: a KL is at least $\mu^2 / 2$, since $s^2 - 1 - \log s^2$ is never negative; below 0.005 it leaves $\mu^2$ below 0.01 for every image, and so the variance of the mean, which the threshold of 0.01 asks for. (2 points)
# The decoder sees pure noise there and has learned to ignore it, so reconstructions stay as they are. (2 points)
# The ELBO stays too: the unit's rate is 0, and its noise does not help the likelihood. (2 points)
# It is no error: a unit is switched off where what it could tell about the image costs more nats than it gains. (2 points)

# %% [markdown]
# ## 7. A step of training (14 points)
#
# One step of the optimizer on the loss
#
# $$
# \mathcal L = -\frac1N \sum_{n=1}^{N} \mathrm{ELBO}(x_n) , \qquad z_n = \mu(x_n) + s(x_n) \odot \varepsilon_n .
# $$
#
# In: a `vaelib.VAE` with a Bernoulli likelihood, an optimizer of its parameters, and `x`, $(N, C, H, W)$, of 0 and 1.
# Out: the loss before the step, a Python float, nats per image.
# `model.encode(x)` gives `mean` and `log_var`, `model.decode(z)` the logits.
# You may call `vaelib.gaussian_kl` and `vaelib.reparameterize`, but not `model.elbo`: that is what you write here.


# %% answer="training_step" without=".elbo( .log_weights("
def training_step(model, optimizer, x):
    """One step on minus the mean ELBO of the batch, the loss.

    Returns that loss, a float, in nats.
    """
    ### BEGIN SOLUTION
    mean, log_var = model.encode(x)
    z = vaelib.reparameterize(mean, log_var, torch.randn_like(mean))
    logits = model.decode(z)
    bce = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    log_likelihood = -bce.flatten(1).sum(1)
    loss = (vaelib.gaussian_kl(mean, log_var) - log_likelihood).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
    ### END SOLUTION


# %%
print(checks.check_training_step(training_step))

# %% test="training_step" points=14
verdicts["training_step"] = checks.check_training_step(training_step)
assert verdicts["training_step"], verdicts["training_step"]
print(verdicts["training_step"])

# %% [markdown]
# ## 8. Retrieval (8 points)
#
# The images most like a given one are those whose codes lie nearest to its code:
#
# $$
# d(u, v) = \| u - v \|_2 .
# $$
#
# In: `query_codes`, $(Q, L)$; `database_codes`, $(N, L)$; a number $k \le N$.
# Out: the places of the $k$ nearest in the database, $(Q, k)$, int64, counted from 0, nearest first.


# %% answer="retrieval" without="vaelib"
def retrieval(query_codes, database_codes, k):
    """The k nearest codes of each query, nearest first.

    (Q, L) and (N, L) -> indices (Q, k).
    """
    ### BEGIN SOLUTION
    return (
        torch.cdist(query_codes, database_codes).topk(k, largest=False).indices
    )
    ### END SOLUTION


# %%
print(checks.check_retrieval(retrieval))

# %% test="retrieval" points=8
verdicts["retrieval"] = checks.check_retrieval(retrieval)
assert verdicts["retrieval"], verdicts["retrieval"]
print(verdicts["retrieval"])

# %% [markdown]
# ## All together (no points)
#
# Your step trains your networks on 1500 handwritten digits, in some seconds on one core.
# Below are samples of the prior, decoded.
# They are rough: the set is small, and so is the network.
#
# The last cell prints the bound with 50 samples on the 297 test digits.
# A right solution reaches about −133 nats (five trainings of the model answer: −134.1 to −132.4), and about −176 with `FAST`, whose run has 4 epochs instead of 40.
# The cell fails below −150 nats, with `FAST` below −195: then something is wrong that no part shows by itself.

# %%
ready = len(verdicts) == 8 and all(verdicts.values())
if ready:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    train = vaelib.load_images("digits")
    test = vaelib.load_images("digits", "test")
    shape = train.image_shape
    model = vaelib.VAE(
        Encoder(shape, 20), Decoder(20, shape), vaelib.Bernoulli(), shape, 20
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(4 if FAST else 40):  # epochs
        batches = vaelib.minibatches(train, 100, g)
        losses = [
            training_step(model, optimizer, model.likelihood.observe(pixels, g))
            for pixels in batches
        ]
    mean = sum(losses) / len(losses)
    print(f"loss in the last epoch: {mean:.1f} nats per image")
    show_images(vaelib.generate(model, 40, seed=0), columns=10)
    plt.show()
else:
    print("All eight parts must pass first.")

# %% [markdown]
# What your other functions say about this model: the rate, the bound with 50 samples, and what retrieval finds.
# Each row begins with a digit of the test set; the eight nearest of the training set follow.

# %%
if ready:
    with torch.no_grad():
        x = model.likelihood.observe(test.pixels, g)
        posterior = model.encode(x)
        codes, _ = model.encode(model.likelihood.observe(train.pixels, g))
        print(f"test set: rate {kl(*posterior).mean():.1f} nats, ", end="")
        reached = iwae(model.log_weights(x, 50, generator=g)).mean().item()
        print(f"bound {reached:.1f} nats")
        nearest = retrieval(posterior.mean[:4], codes, 8)  # (4, 8)
    rows = torch.cat([test.pixels[:4, None], train.pixels[nearest]], 1)
    show_images(rows.flatten(0, 1), columns=9)
    plt.show()
    usual, least = (-176, -195) if FAST else (-133, -150)
    assert reached > least, (
        f"bound {reached:.1f} nats: a right solution reaches about {usual}, "
        f"and this one must reach {least}"
    )
