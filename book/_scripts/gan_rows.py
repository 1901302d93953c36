"""Train the GAN of the chapter `generation` three times: `python book/_scripts/gan_rows.py [gan-0 stages ...]`, default: all missing.

Each `gan-SEED` is one training, scored as it goes with the chapter's protocol: of 256 epochs where there is a GPU, which replays whole
steps from a CUDA graph, and of 16 where there is none. Scored beside the generator is the running mean of its weights. The clock is CPU
time without the scoring, so that a busy machine does not lengthen it, and wall time on a GPU. A record keeps the scores at each
checkpoint, and for the last one samples, as a picture. `--minutes M` ends at the first checkpoint after so long. `stages` fits the second
stage in several sizes to the codes of the chapter's VAE, trained with the seed 0 by `sample_rows.py`, and scores held-out codes. Records
go to results/gan-rows.json; "summary" has the mean and the standard deviation over the GANs' trainings.
"""

import argparse
import base64
import copy
import io
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import vaelib
from vaelib.book.ledger import entry
from vaelib.heldout import evaluating
from vaelib.likelihoods import Gaussian
from vaelib.priors import SecondStagePrior, fit_mixture, fit_second_stage, posterior_samples
from vaelib.quality import features_of, frechet_distance, manifold_scores, mnist_features, nearest_training_images
from vaelib.storage import write_text

sys.path.insert(0, str(Path(__file__).parent))
from sample_rows import drawn, thresholded, trained

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "gan-rows.json"
SEEDS = (0, 1, 2)
BATCH, LATENTS, WIDTH, N = 64, 64, 32, 10000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHECKPOINTS = (1, 2, 4, 8, 12, 16) + ((24, 32, 48, 64, 96, 128, 160, 192, 224, 256) if DEVICE.type == "cuda" else ())  # epochs
DECAY = 0.999  # of the mean of the generator's weights, a step
STAGES = {
    "as in the chapter": {},
    "its own scales": None,  # `OwnScales`
    "twice as long": {"epochs": 40},
    "twice as wide": {"hidden_dims": (1024, 1024)},
}


def networks(seed):
    """Generator and discriminator of a small DCGAN, with the paper's first weights."""
    torch.manual_seed(seed)
    w = WIDTH
    generator = nn.Sequential(
        nn.Linear(LATENTS, 2 * w * 49, bias=False), nn.Unflatten(1, (2 * w, 7, 7)), nn.BatchNorm2d(2 * w), nn.ReLU(),
        nn.ConvTranspose2d(2 * w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(),
        nn.ConvTranspose2d(w, 1, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(1, w, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(2 * w * 49, 1),
    )  # fmt: skip
    for layer in [*generator.modules(), *discriminator.modules()]:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, 0, 0.02)
    return [net.to(DEVICE, memory_format=torch.channels_last) for net in (generator, discriminator)]


class Game:
    """Generator, its running mean, and discriminator, with their step; on a GPU it is recorded once and replayed."""

    def __init__(self, seed):
        self.generator, self.discriminator = networks(seed)
        self.mean = copy.deepcopy(self.generator).eval()
        options = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": True, "capturable": DEVICE.type == "cuda"}
        self.optimizers = [torch.optim.Adam(net.parameters(), **options) for net in (self.generator, self.discriminator)]
        self.states = [[v for v in net.state_dict().values() if v.is_floating_point()] for net in (self.mean, self.generator)]
        self.average, self.steps, self.graph = get_ema_multi_avg_fn(DECAY), 0, None

    def play(self, pixels, noise):
        """One step of both: levels (N, 1, 28, 28), noise (N, LATENTS)."""
        half, softplus = torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False), nn.functional.softplus
        step_g, step_d = self.optimizers
        with half:
            fake = self.generator(noise)
            told = self.discriminator(pixels / 255).float(), self.discriminator(fake.detach()).float()
        step_d.zero_grad()
        (softplus(-told[0]) + softplus(told[1])).mean().backward()
        step_d.step()
        self.discriminator.requires_grad_(False)
        with half:
            told = self.discriminator(fake).float()
        step_g.zero_grad()
        softplus(-told).mean().backward()
        step_g.step()
        self.discriminator.requires_grad_(True)
        self.average(*self.states, None)

    def step(self, pixels, noise):
        """The same, replayed where it can be: the first steps, which make the optimizers' states, and a batch of another size cannot."""
        self.steps += 1
        if DEVICE.type != "cuda" or self.steps <= 5 or len(pixels) != BATCH:
            return self.play(pixels, noise)
        if self.graph is None:
            self.given = pixels.clone(), noise.clone()
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):  # records, and takes no step
                self.play(*self.given)
        for into, value in zip(self.given, (pixels, noise), strict=True):
            into.copy_(value)
        self.graph.replay()


def sampled(generator, num, seed):
    """Images as levels, (num, 1, 28, 28), of the generator as it is when it is used: with its running means and variances."""
    training = generator.training
    generator.eval()
    with torch.no_grad():
        z = torch.randn(num, LATENTS, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        pixels = torch.cat([(255 * generator(part)).round().to(torch.uint8) for part in z.split(500)]).cpu()
    generator.train(training)
    return pixels


def gan(seed, left=lambda: math.inf):
    """The record of one training: scores against epochs and seconds."""
    began = time.perf_counter()
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    train, _ = vaelib.train_valid_split(images, len(images) // 12, seed=0)
    game, here, draw = Game(seed), train.to(DEVICE), torch.Generator().manual_seed(seed)
    net, kinds = mnist_features().to(DEVICE), {"grey": lambda p: p, "drawn": lambda p: drawn(p, 1), "thresholded": thresholded}
    real = {kind: features_of(net, drawn(test.pixels, 0) if kind == "drawn" else of(test.pixels)) for kind, of in kinds.items()}

    def clock():
        if DEVICE.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def scored(generator):
        """Of 10000 samples the pixels, the features of each kind, and their distances."""
        pixels = sampled(generator, N, 1)
        features = {kind: features_of(net, of(pixels)) for kind, of in kinds.items()}
        return pixels, features, {kind: frechet_distance(real[kind], features[kind]) for kind in kinds}

    curve, seconds = [], 0.0
    for epoch in range(1, CHECKPOINTS[-1] + 1):
        at = clock()
        for pixels in vaelib.minibatches(here, BATCH, draw):
            game.step(pixels, torch.randn(len(pixels), LATENTS, generator=draw).to(DEVICE))
        seconds += clock() - at
        if epoch in CHECKPOINTS:
            scores = scored(game.generator)[-1]
            scores["averaged"] = frechet_distance(real["thresholded"], features_of(net, thresholded(sampled(game.mean, N, 1))))
            curve.append({"epoch": epoch, "seconds": round(seconds, 1), **scores})
            shown = f"thresholded {scores['thresholded']:.1f}, averaged {scores['averaged']:.1f}"
            print(f"gan-{seed}: epoch {epoch:3}, {seconds:4.0f} s, {shown}", flush=True)
            if left() <= 0:
                break
    some = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:1000]

    def judged(generator):
        """All scores of 10000 samples."""
        pixels, features, scores = scored(generator)
        near = nearest_training_images(pixels[some], train).distances
        scores |= manifold_scores(real["thresholded"], features["thresholded"])._asdict()
        return scores | {"nearest": near.median().item(), "nearest_hundredth": near.quantile(0.01).item()}

    side_by_side = sampled(game.generator, 14, 2)[:, 0].permute(1, 0, 2).reshape(28, -1)  # (28, 14 * 28)
    row = Image.fromarray(side_by_side.numpy())
    row.save(png := io.BytesIO(), format="png", optimize=True)
    metrics = {"curve": curve, "final": curve[-1] | judged(game.generator), "mean": judged(game.mean)}
    metrics |= {"samples": base64.b64encode(png.getvalue()).decode(), "num_images": N}
    return entry(f"python book/_scripts/gan_rows.py gan-{seed}", seed, time.perf_counter() - began, metrics)


class OwnScales(Gaussian):
    """A Gaussian whose mean and log-scale are both the decoder's, so that the noise of each dimension may differ from code to code."""

    params_per_value = 2

    def log_prob(self, x, params, validate=True):
        mean, log_scale = params.chunk(2, 1)
        error = (x - mean) * (-log_scale).exp()
        return -(0.5 * error**2 + log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


class OwnScalesPrior(SecondStagePrior):
    """A second stage with that likelihood."""

    def sample(self, num, generator=None, temperature=1.0):
        u, eps = (temperature * torch.randn(num, 2 * len(self.mean), generator=generator)).chunk(2, 1)
        with evaluating(self.model):
            mean, log_scale = self.model.decode(u).flatten(1).chunk(2, 1)
        return self.mean + self.std * (mean + log_scale.exp() * eps)


def fit_own_scales(codes, epochs=20):
    """`fit_second_stage` with `OwnScales`: the same network, optimizer, schedule and number of steps."""
    mean, std = codes.mean(0), codes.std(0)
    x, draw = ((codes - mean) / std)[:, :, None, None], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    stage = vaelib.mlp_vae(x.shape[1:], (512, 512), len(mean), OwnScales())
    last = [part for part in stage.decoder.modules() if isinstance(part, nn.Linear)][-1]
    with torch.no_grad():  # its scales start at 0.3 of the codes' own, as that of `fit_second_stage` does: from 1 it collapses
        last.bias[last.bias.numel() // 2 :] += math.log(0.3)
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 100))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draw).split(100):
            optimizer.zero_grad()
            vaelib.loss(stage(x[rows], torch.randn(1, len(rows), len(mean), generator=draw))).backward()
            optimizer.step()
            schedule.step()
    return OwnScalesPrior(stage.eval(), mean, std)


def log_density(prior, z, draws):
    """The importance-weighted bound on a second stage's log-density of codes, nats: (N, L) -> (N,); its ELBO for one draw."""
    x = ((z - prior.mean) / prior.std)[:, :, None, None]
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        parts = [prior.model.log_weights(part, draws, generator=noise, validate=False) for part in x.split(250)]
    return torch.cat([vaelib.importance_weighted_bound(w) for w in parts]) - prior.std.log().sum()


def stages():
    """A mixture and second stages of several sizes, by the log-density of codes of test images: their records, one by one."""
    began = time.perf_counter()
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    train, _ = vaelib.train_valid_split(images, len(images) // 12, seed=0)
    vae, about = trained(0, images)
    codes, z = posterior_samples(vae, train), posterior_samples(vae, test)
    some = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[: len(z)]]
    net, real = mnist_features(), features_of(mnist_features(), thresholded(test.pixels))

    def distance(prior):
        return frechet_distance(real, features_of(net, thresholded(vaelib.generate(vae, N, seed=1, prior=prior))))

    mixture = fit_mixture(vae, train, 50)
    row = {"test": mixture.log_prob(z).mean().item(), "train": mixture.log_prob(some).mean().item()}
    row |= {"thresholded": distance(mixture), "trained": about}
    row["of_mixture"] = mixture.log_prob(mixture.sample(N, torch.Generator().manual_seed(1))).mean().item()
    yield "mixture", entry("python book/_scripts/gan_rows.py stages", 0, time.perf_counter() - began, row)
    for name, options in STAGES.items():
        began, clock = time.perf_counter(), time.process_time()
        prior = fit_own_scales(codes) if options is None else fit_second_stage(vae, train, **options)
        row = {"seconds": round(time.process_time() - clock, 1), "thresholded": distance(prior)}
        for which, of in (("test", z), ("train", some)):
            x = ((of - prior.mean) / prior.std)[:, :, None, None]
            with torch.no_grad():
                bound = prior.model.elbo(x, 10, generator=torch.Generator().manual_seed(0), validate=False)
            row[which] = (bound.elbo - prior.std.log().sum()).mean().item()
        row["iwae"] = log_density(prior, z, 100).mean().item()
        if options is not None:
            row["scale"] = prior.model.likelihood.log_scale.exp().item()
        row["of_mixture"] = mixture.log_prob(prior.sample(N, torch.Generator().manual_seed(1))).mean().item()
        print(name, {key: round(value, 2) for key, value in row.items()}, flush=True)
        yield f"stage, {name}", entry("python book/_scripts/gan_rows.py stages", 0, time.perf_counter() - began, row)


def summary(records):
    """Mean and standard deviation of the GANs' scores at each checkpoint."""
    curves = [record["metrics"]["curve"] for record in records]
    finals = [record["metrics"]["final"] for record in records]

    def spread(values):
        return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "each": list(values)}

    keys = [key for key in curves[-1][-1] if all(key in point for curve in curves for point in curve)]
    points = [{key: spread([point[key] for point in points]) for key in keys} for points in zip(*curves, strict=False)]
    final = {key: spread([each[key] for each in finals]) for key in finals[0]}
    means = [record["metrics"]["mean"] for record in records]
    mean = {key: spread([each[key] for each in means]) for key in means[0]}
    metrics = {"curve": points, "final": final, "mean": mean, "trainings": len(records)}
    return entry("python book/_scripts/gan_rows.py", 0, sum(record["seconds"] for record in records), metrics)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="gan-0, gan-1, gan-2 or stages; default: those that the ledger lacks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which a training ends, at its next checkpoint")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes

    def left():
        return end - time.monotonic()

    done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    missing = [f"gan-{seed}" for seed in SEEDS if f"gan-{seed}" not in done]
    missing += ["stages"] if any(f"stage, {name}" not in done for name in STAGES) else []
    for name in asked.names or missing:
        for key, record in stages() if name == "stages" else [(name, gan(int(name.removeprefix("gan-")), left))]:
            done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
            done[key] = record
            write_text(LEDGER, json.dumps(done, indent=2) + "\n")  # before the summary, which may not fit older records
            gans = [value for key, value in sorted(done.items()) if key.startswith("gan-")]
            done |= {"summary": summary(gans)} if len(gans) > 1 else {}
            write_text(LEDGER, json.dumps(done, indent=2) + "\n")


if __name__ == "__main__":
    main()
