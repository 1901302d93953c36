"""Train the VAEs of the chapter `generation` with other seeds and score their samples: `python book/_scripts/sample_rows.py [seed ...]`.

The chapter shows one training of each model. Here each has three, and each sampler three seeds of its own, so that a difference can be
held against chance. runs/samples/<seed> keeps the models. Records go to results/sample-rows.json, one for each training, and one,
"summary", with the mean and the standard deviation over the trainings.
"""

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import vaelib
from vaelib import noise
from vaelib.ledger import commit, entry
from vaelib.priors import fit_mixture, fit_second_stage, posterior_samples
from vaelib.quality import features_of, frechet_distance, manifold_scores, mnist_features
from vaelib.storage import write_text
from vaelib.vae import evaluating

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "sample-rows.json"
VAES = ("VAE", "conv VAE", "VAE given the label")
SEEDS = (0, 1, 2)  # of a training: weights, order and noise
DRAWS = (1, 2, 3)  # of the samples
TEMPERATURES = (0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 2.0, 2.5, 3.0, 4.0)
SOFTENED = ("VAE, prior", "VAE, mixture", "conv VAE, prior", "conv VAE, mixture", "reconstructions", "training images")
N = 10000


def trained(name, seed, images):
    """One of the chapter's three VAEs, trained with `seed`, and the seconds and the commit of its training; kept under runs/."""
    folder = ROOT / "runs" / "samples" / str(seed) / name.replace(" ", "-")
    if not (folder / "trained.json").exists():
        train, valid = vaelib.train_valid_split(images, len(images) // 12, seed=0)
        shape, common = images.image_shape, {"seed": seed, "progress": False}
        config = vaelib.TrainConfig(epochs=20, batch_size=128, learning_rate=5e-3, **common)
        torch.manual_seed(seed)
        if name == "VAE":
            model = vaelib.mlp_vae(shape, (256,), 20)
        elif name == "VAE given the label":
            model = vaelib.conditional_vae(shape, 10, (256,), 20)
        else:
            model = vaelib.conv_vae(shape, 20, "bernoulli", channels=(32, 64), activation="relu")
            config = vaelib.TrainConfig(epochs=5, learning_rate=3e-3, channels_last=True, **common)
        began = time.perf_counter()
        vaelib.fit(model, train, valid, config)
        vaelib.save(model, folder)
        write_text(folder / "trained.json", json.dumps({"seconds": round(time.perf_counter() - began, 1), "commit": commit()}))
        print(f"seed {seed}: {name} {(folder / 'trained.json').read_text()}", flush=True)
    return vaelib.load(folder), json.loads((folder / "trained.json").read_text())


def contrast(pixels, factor):
    """Grey levels with their logits multiplied: ``uint8`` -> ``uint8``."""
    return (255 * (factor * torch.logit(pixels / 255)).sigmoid()).round().to(torch.uint8)


def binary_draws(pixels, seed):
    """Each pixel 255 with the probability level / 255, else 0; the noise belongs to the image."""
    return 255 * (noise.uniform_noise(noise.image_keys(pixels, seed), pixels.shape[1:], noise.OBSERVE) < pixels / 255).to(
        torch.uint8
    )


def log_density(prior, z, seed=0):
    """log r(z) of codes (N, L) under a fitted prior, nats; for a second stage its ELBO, with ten draws, which is a lower bound."""
    if hasattr(prior, "roots"):
        parts = MultivariateNormal(prior.means, scale_tril=prior.roots)
        return torch.cat([MixtureSameFamily(Categorical(prior.weights), parts).log_prob(part) for part in z.split(1000)])
    x = ((z - prior.mean) / prior.std)[:, :, None, None]
    with evaluating(prior.model):
        return prior.model.elbo(x, 10, generator=torch.Generator().manual_seed(seed)).elbo - prior.std.log().sum()


def run(seed, images, test):
    """The record of one training of each VAE."""
    began = time.perf_counter()
    models = {name: trained(name, seed, images) for name in VAES}
    train, _ = vaelib.train_valid_split(images, len(images) // 12, seed=0)
    net = mnist_features()
    real = {"grey": features_of(net, test), "binary": features_of(net, binary_draws(test.pixels, 0))}
    (vae, _), (conditional, _), (conv, _) = models.values()
    mixture, stage, conv_mixture = fit_mixture(vae, train, 50), fit_second_stage(vae, train), fit_mixture(conv, train, 50)

    def code_seeds(draw):  # one for each label
        return zip(range(10), range(10 * draw, 10 * draw + 10), strict=True)

    codes = posterior_samples(vae, train)
    samplers = {
        "VAE, prior": lambda s: vaelib.generate(vae, N, seed=s),
        "VAE, prior, T = 0.7": lambda s: vaelib.generate(vae, N, 0.7, seed=s),
        "VAE, mixture": lambda s: vaelib.generate(vae, N, seed=s, prior=mixture),
        "VAE, second stage": lambda s: vaelib.generate(vae, N, seed=s, prior=stage),
        "VAE, codes of training images": lambda s: vaelib.generation.decode_pixels(
            vae, codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(s))[:N]]
        ),
        "VAE given the label": lambda s: torch.cat(
            [vaelib.generate(conditional.given(y), N // 10, seed=code) for y, code in code_seeds(s)]
        ),
        "conv VAE, prior": lambda s: vaelib.generate(conv, N, seed=s),
        "conv VAE, mixture": lambda s: vaelib.generate(conv, N, seed=s, prior=conv_mixture),
        "reconstructions": lambda s: vaelib.reconstruct(vae, test.pixels, seed=s),
        "training images": lambda s: train.pixels[torch.randperm(len(train), generator=torch.Generator().manual_seed(s))[:N]],
    }

    def distances(pixels, draw):
        """Squared Frechet distances, as they are and of binary draws; what of the images is grey."""
        features = features_of(net, pixels), features_of(net, binary_draws(pixels, draw))
        return {
            "frechet": frechet_distance(real["grey"], features[0]),
            "frechet_binary": frechet_distance(real["binary"], features[1]),
            "grey": (pixels / 255 * (1 - pixels / 255)).mean().item(),
        }, features

    rows, of_first = {}, {}
    for name, sampler in samplers.items():
        drawn = [distances(sampler(s), s) for s in DRAWS]
        row = {key: statistics.mean(d[key] for d, _ in drawn) for key in drawn[0][0]}
        row |= {f"{key}_of_draws": [d[key] for d, _ in drawn] for key in ("frechet", "frechet_binary")}
        for kind, features in zip(("", "_binary"), drawn[0][1], strict=True):
            scores = manifold_scores(real["binary" if kind else "grey"], features)._asdict()
            row |= {key + kind: value for key, value in scores.items()}
        rows[name] = row
        of_first[name] = sampler(DRAWS[0])
        print(f"seed {seed}: {name:30} {row['frechet']:7.1f} {row['frechet_binary']:7.1f}", flush=True)

    softness = {}
    for name in SOFTENED:
        pixels = of_first[name]
        kinds = {"logits halved": contrast(pixels, 0.5), "logits doubled": contrast(pixels, 2)}
        kinds["thresholded"] = 255 * (pixels >= 128).to(torch.uint8)
        kinds["blurred"] = F.avg_pool2d(pixels.float(), 3, 1, 1).round().to(torch.uint8)
        softness[name] = {}
        for kind, changed in kinds.items():
            features = features_of(net, changed)
            scores = {"frechet": frechet_distance(real["grey"], features)}
            softness[name][kind] = scores | manifold_scores(real["grey"], features)._asdict()

    temperatures = {}
    for temperature in TEMPERATURES:
        scores, features = distances(vaelib.generate(vae, N, temperature, seed=DRAWS[0]), DRAWS[0])
        for kind, f in zip(("", "_binary"), features, strict=True):
            found = manifold_scores(real["binary" if kind else "grey"], f)
            scores |= {"density" + kind: found.density, "coverage" + kind: found.coverage}
        temperatures[str(temperature)] = scores

    elbo = {name: vaelib.evaluate(model, test).elbo for name, (model, _) in models.items()}
    z = {"VAE": posterior_samples(vae, test), "conv VAE": posterior_samples(conv, test)}
    log_prior = {of: MultivariateNormal(torch.zeros(20), torch.eye(20)).log_prob(codes) for of, codes in z.items()}
    gain, error = {}, {}
    for name, prior in (("VAE, mixture", mixture), ("VAE, second stage", stage), ("conv VAE, mixture", conv_mixture)):
        of = name.partition(",")[0]
        gains = log_density(prior, z[of]) - log_prior[of]
        gain[name], error[name] = gains.mean().item(), vaelib.evaluation.standard_error(gains)
    for temperature in TEMPERATURES:
        wide = MultivariateNormal(torch.zeros(20), temperature**2 * torch.eye(20))
        gains = wide.log_prob(z["VAE"]) - log_prior["VAE"]
        temperatures[str(temperature)]["elbo"] = elbo["VAE"] + gains.mean().item()
    for name, value in {
        "VAE, prior": elbo["VAE"],
        "VAE, prior, T = 0.7": temperatures["0.7"]["elbo"],
        "VAE, mixture": elbo["VAE"] + gain["VAE, mixture"],
        "VAE, second stage": elbo["VAE"] + gain["VAE, second stage"],
        "VAE given the label": elbo["VAE given the label"] - torch.log(torch.tensor(10.0)).item(),
        "conv VAE, prior": elbo["conv VAE"],
        "conv VAE, mixture": elbo["conv VAE"] + gain["conv VAE, mixture"],
    }.items():
        rows[name]["elbo"] = value
    metrics = {"rows": rows, "softness": softness, "temperatures": temperatures}
    metrics |= {"gain": gain, "gain_standard_error": error, "trained": {name: about for name, (_, about) in models.items()}}
    seconds = time.perf_counter() - began
    return entry(f"python book/_scripts/sample_rows.py {seed}", seed, seconds, metrics)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, help="trainings to make; default: 0, 1 and 2")
    parser.add_argument("--train-only", action="store_true", help="keep the models, score nothing")
    arguments = parser.parse_args()
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    if arguments.train_only:
        for name, seed in product(VAES, arguments.seeds or SEEDS):
            trained(name, seed, images)
        return
    for seed in arguments.seeds or SEEDS:
        record = run(seed, images, test)
        done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        write_text(LEDGER, json.dumps(done | {f"seed-{seed}": record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
