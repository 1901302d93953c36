"""Priors learned by diffusion, scored: `python book/_scripts/diffusion_rows.py [row ...]`, all rows of the CPU that are missing by default.

`--gpu` takes the rows that a GPU makes in minutes: longer fits for the digits, the codes of CIFAR-10, and VAEs as latent diffusion has
them. `--minutes M` ends after so long: each row is written when it is done, and the next call goes on with the others. `--rehearse` does
every row on the CPU, small, on the bundled images, into a temporary folder. Records go to results/diffusion-rows.json; "summary" has mean
and standard deviation over the seeds of each kind of row.
"""

import argparse
import base64
import functools
import io
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import vaelib
from vaelib.book.ledger import entry
from vaelib.book.plotting import tile
from vaelib.diffusion import fit_diffusion
from vaelib.evaluation import standard_error
from vaelib.generation import decode_pixels
from vaelib.heldout import evaluating
from vaelib.priors import fit_mixture, fit_second_stage, posterior_samples
from vaelib.quality import features_of, frechet_distance, manifold_scores, mnist_features
from vaelib.storage import read_object, write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "diffusion-rows.json"
SEEDS = (0, 1, 2)
BUDGETS = {  # of the fit on the codes of MNIST
    "cpu": {"steps": 8000, "batch_size": 256, "width": 256, "depth": 3},
    "gpu": {"steps": 20000, "batch_size": 1024, "width": 512, "depth": 4},
}
SAMPLERS = {  # (stochastic, steps)
    "cpu": ((True, 100), (False, 50), (False, 10)),
    "gpu": ((True, 200), (True, 100), (True, 50), (False, 100), (False, 50), (False, 20), (False, 10), (False, 5)),
}
WEIGHTS = {"cpu": (1.0, 2.0, 4.0), "gpu": (0.0, 1.0, 2.0, 4.0, 8.0)}  # of the guidance
DRAWS = {"cpu": 32, "gpu": 200}  # of a bound
KINDS = ("beta-1", "kl", "perceptual", "adversarial")  # of VAEs, see `autoencoder`
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Setting:
    """What a rehearsal makes small."""

    def __init__(self, small):
        self.small = small
        self.digits, self.photographs = ("digits", "shapes") if small else ("mnist", "cifar10")
        self.num = 200 if small else 10000  # images on each side of a comparison

    def few(self, options):
        """The options of a fit, as a rehearsal has them."""
        small = {"steps": 30, "batch_size": 64, "width": 16}
        return options | {key: small[key] for key in options if key in small} if self.small else options

    @functools.cached_property
    def mnist(self):
        """Training images, without those held out, and test images."""
        images = vaelib.load_images(self.digits)
        return vaelib.train_valid_split(images, len(images) // 12, seed=0)[0], vaelib.load_images(self.digits, "test")

    @functools.cached_property
    def cifar(self):
        images = vaelib.load_images(self.photographs)
        return vaelib.train_valid_split(images, len(images) // 12, seed=0)[0], vaelib.load_images(self.photographs, "test")


def now():
    """Seconds, with what was launched on the GPU; on a CPU those of this process, which a busy machine does not lengthen."""
    if DEVICE.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def thresholded(pixels):
    """Binary images: white where the level is at least 128."""
    return 255 * (pixels >= 128).to(torch.uint8)


def picture(pixels, columns):
    """Images as one PNG in base64, side by side without gaps."""
    png = io.BytesIO()
    Image.fromarray(tile(pixels, columns, gap=0)).save(png, format="png", optimize=True)
    return base64.b64encode(png.getvalue()).decode()


def scores(net, real, pixels):
    """The protocol of the chapter on generation: distance, precision and recall of thresholded digits."""
    fake = features_of(net, thresholded(pixels))
    return {"frechet": frechet_distance(real, fake)} | manifold_scores(real, fake)._asdict()


def timed_samples(model, prior, num, seed=1):
    """`num` images, and the milliseconds that the codes of one take and that one takes with its decoding."""
    began = now()
    source = model.prior if prior is None else prior
    codes = source.sample(num, generator=torch.Generator().manual_seed(seed))
    drawn = now()
    pixels = decode_pixels(model, codes)
    return pixels, {"ms_code": 1000 * (drawn - began) / num, "ms": 1000 * (now() - began) / num}


def digits(name, seed, setting):
    """A source of codes for the released VAE of digits: `name` is prior, mixture[-COMPONENTS], second-stage, or diffusion-BUDGET."""
    train, test = setting.mnist
    model, net = vaelib.load("mnist-mlp").to(DEVICE), mnist_features().to(DEVICE)
    z, real = posterior_samples(model, test), features_of(net, thresholded(test.pixels))
    began, gain = now(), None
    if name.startswith("diffusion"):
        prior = fit_diffusion(model, train, labels=True, seed=seed, **setting.few(BUDGETS[name.removeprefix("diffusion-")]))
    elif name == "prior":
        prior = None
    elif name.startswith("mixture"):
        prior = fit_mixture(model, train, int(name[len("mixture-") :] or 50), seed)
    else:
        prior = fit_second_stage(model, train, seed=seed)
    row = {"fit_seconds": now() - began}
    pixels, times = timed_samples(model, prior, setting.num, 1 + seed)
    row |= times | scores(net, real, pixels) | {"num_images": setting.num}
    standard = model.prior.log_prob(z)
    if name.startswith("diffusion"):
        few, budget = slice(None, 100) if setting.small else slice(None), name.removeprefix("diffusion-")
        gain = prior.bound(z[few], num_draws=DRAWS[budget]) - standard[few]
        row["discrete"] = {
            str(steps): (prior.bound(z[few], steps, min(steps, DRAWS[budget])) - standard[few]).mean().item()
            for steps in (20, 100, 1000)
        }
        row |= sampled(model, prior, net, real, setting, SAMPLERS[budget])
        row |= guided(model, prior, net, real, setting, WEIGHTS[budget])
        row |= {"loss": prior.history, "parameters": sum(p.numel() for p in prior.network.parameters())}
    elif name.startswith("mixture"):
        gain = prior.log_prob(z) - standard
    elif name == "second-stage":
        x = ((z - prior.mean) / prior.std)[:, :, None, None]
        with torch.no_grad():
            bound = prior.model.elbo(x, 10, generator=torch.Generator().manual_seed(0), validate=False).elbo
        gain = bound - prior.std.log().sum() - standard
    if gain is not None:
        row |= {"gain": gain.mean().item(), "gain_standard_error": standard_error(gain)}
    return row | {"samples": picture(pixels[:20], 10)}


def sampled(model, prior, net, real, setting, samplers):
    """Distance and time of a code for several numbers of steps, along the stochastic way and the deterministic one."""
    rows = []
    for stochastic, steps in samplers:
        way = prior.given(None)
        way.stochastic, way.steps = stochastic, steps
        pixels, times = timed_samples(model, way, setting.num)
        fake = features_of(net, thresholded(pixels))
        rows.append({"stochastic": stochastic, "steps": steps, "frechet": frechet_distance(real, fake)} | times)
    return {"samplers": rows}


def guided(model, prior, net, real, setting, weights):
    """For each weight of the label: the share of samples that the classifier reads as it, and the scores of the samples."""
    rows, labels = [], torch.arange(10).repeat(setting.num // 10)
    for weight in weights:
        told = prior.given(labels, weight)
        told.steps, told.stochastic = 25, False
        pixels = vaelib.generate(model, len(labels), seed=1, prior=told)
        with evaluating(net):
            read = torch.cat([net(part).argmax(1).cpu() for part in pixels.split(1000)])
        row = {"weight": weight, "share": (read == labels).double().mean().item()} | scores(net, real, pixels)
        rows.append(row | {"samples": picture(pixels[:20], 10)})
    return {"guidance": rows}


class Judge(nn.Module):
    """A small convolutional classifier of photographs, for features to score samples with."""

    def __init__(self, classes):
        super().__init__()
        layers, fan_in = [], 3
        for width, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (256, 2)):
            layers += [nn.Conv2d(fan_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            fan_in = width
        self.hidden, self.head = nn.Sequential(*layers), nn.Linear(256, classes)

    def features(self, pixels):
        x = pixels.to(self.head.weight.device).float() / 127.5 - 1
        return self.hidden(x).mean((2, 3))

    def forward(self, pixels):
        return self.head(self.features(pixels))


def judge(setting):
    """The classifier, trained on the photographs, and its accuracy on the test set."""
    train, test = setting.cifar
    torch.manual_seed(0)
    net = Judge(len(train.classes)).to(DEVICE)
    pixels, labels = train.pixels.to(DEVICE), train.labels.to(DEVICE)
    epochs, size = (1 if setting.small else 12), 250
    steps = epochs * (len(train) // size)
    optimizer = torch.optim.SGD(net.parameters(), 0.2, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps)
    for _ in range(epochs):
        order = torch.randperm(len(train), device=DEVICE)
        for rows in order[: len(train) // size * size].split(size):
            batch = pixels[rows].roll(tuple(torch.randint(-3, 4, (2,)).tolist()), (2, 3))
            batch = torch.where(torch.rand(len(rows), 1, 1, 1, device=DEVICE) < 0.5, batch.flip(3), batch)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                loss = F.cross_entropy(net(batch), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        read = torch.cat([net(part).argmax(1).cpu() for part in test.pixels.split(1000)])
    return net, (read == test.labels).double().mean().item()


JUDGES = {}


def photographs(seed, setting):
    """Diffusion over the maps of the released VAE of photographs: bits that the prior saves, and samples under a judge."""
    train, test = setting.cifar
    if setting.small:
        torch.manual_seed(0)
        model = vaelib.conv_vae(train.image_shape, (4, 8, 8), channels=(8, 8)).to(DEVICE)
    else:
        model = vaelib.load("cifar-map").to(DEVICE)
    net, accuracy = JUDGES.setdefault("net", None) or JUDGES.update(net=judge(setting)) or JUDGES["net"]
    num = min(setting.num // 2, len(test))
    real = features_of(net, test.pixels[:num])
    began = now()
    options = {"steps": 5000, "batch_size": 512, "width": 192, "depth": 2, "learning_rate": 5e-4}
    prior = fit_diffusion(model, train, labels=True, seed=seed, **setting.few(options))
    row = {"fit_seconds": now() - began, "judge_accuracy": accuracy, "num_images": num, "loss": prior.history}
    row["parameters"] = sum(p.numel() for p in prior.network.parameters())
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: 50 if setting.small else 2000]
    z = posterior_samples(model, test[some])
    gain = prior.bound(z, num_draws=50, batch_size=500) - model.prior.log_prob(z)
    elbo = vaelib.heldout_elbo(model, test[some]).elbo
    row |= {"gain": gain.mean().item(), "gain_standard_error": standard_error(gain), "num_bounds": len(z)}
    bits = -1 / (math.log(2) * test.pixels[0].numel())
    row |= {"bits_per_dim": bits * elbo.mean().item(), "bits_per_dim_diffusion": bits * (elbo + gain).mean().item()}
    prior.steps, prior.stochastic = 25, False
    labels, sheets = torch.arange(len(train.classes)).repeat(math.ceil(num / len(train.classes)))[:num], []
    sources = {"prior": None, "diffusion": prior} | {f"guided {w:g}": prior.given(labels, w) for w in (1.0, 3.0)}
    for name, source in sources.items():
        pixels, times = timed_samples(model, source, num)
        fake = features_of(net, pixels)
        with evaluating(net):
            read = torch.cat([net(part).argmax(1).cpu() for part in pixels.split(1000)])
        row[name] = times | {"frechet": frechet_distance(real, fake)} | manifold_scores(real, fake)._asdict()
        if name.startswith("guided"):
            row[name]["share"] = (read == labels).double().mean().item()
        sheets += [pixels[:10]] if name in ("prior", "diffusion", "guided 3") else []
    rebuilt = vaelib.reconstruct(model, test.pixels[:num])
    row["rebuilt"] = {"frechet": frechet_distance(real, features_of(net, rebuilt))}
    return row | {"samples": picture(torch.cat(sheets), 10)}


class LatentVAE(vaelib.VAE):
    """A VAE with what latent diffusion adds to its loss: distance in features of a classifier, and a discriminator's opinion.

    Attributes:
        eye: convolutions whose outputs are compared; in a list, so that they are not trained with the model.
        critic: the discriminator and its optimizer, which takes its own step each time that the penalty is computed.
    """

    eye, critic, weights = None, None, (0.0, 0.0)

    def looks(self, x):
        """The layers' outputs, each place scaled to length 1 (Zhang et al. 2018)."""
        outputs, h = [], (x + 1) / 2
        for layer in self.eye[0]:
            h = layer(h)
            if isinstance(layer, nn.ReLU):
                outputs.append(F.normalize(h, dim=1, eps=1e-3))
        return outputs

    def penalty(self, x, draw):
        if self.eye is None:
            return None
        rebuilt = self.likelihood.mean(self.decode(draw.z[0]))
        pairs = zip(self.looks(x), self.looks(rebuilt), strict=True)
        total = self.weights[0] * sum((a - b).square().sum(1).mean((1, 2)) for a, b in pairs)  # (N,)
        if self.critic is not None and self.training:
            critic, optimizer = self.critic
            if torch.is_grad_enabled():
                told = F.relu(1 - critic(x)).mean() + F.relu(1 + critic(rebuilt.detach())).mean()
                optimizer.zero_grad()
                told.backward()
                optimizer.step()
            critic.requires_grad_(False)
            total = total - self.weights[1] * critic(rebuilt).mean((1, 2, 3))
            critic.requires_grad_(True)
        return total


def autoencoder(kind, seed, setting, epochs=8):
    """A VAE of digits with codes of (4, 7, 7) and a Gaussian likelihood of scale 1: with the whole KL, or with 1e-6 of it and more."""
    train, _ = setting.mnist
    torch.manual_seed(seed)
    plain = vaelib.conv_vae((1, 28, 28), (4, 7, 7), {"name": "gaussian", "scale": 1.0}, (32, 64), 1)
    model = LatentVAE(plain.encoder, plain.decoder, plain.likelihood, plain.image_shape, plain.latent_shape).to(DEVICE)
    if kind in ("perceptual", "adversarial"):
        model.eye = [mnist_features().to(DEVICE).hidden[:6].requires_grad_(False)]
        model.weights = (20.0, 0.0)
    if kind == "adversarial":
        critic = nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(64, 1, 3, 1, 1)
        ).to(DEVICE)
        model.critic = (critic, torch.optim.Adam(critic.parameters(), 2e-4, betas=(0.5, 0.9)))
        model.weights = (20.0, 2.0)
    config = vaelib.TrainConfig(
        epochs=1 if setting.small else epochs, batch_size=256, learning_rate=1e-3, beta=1.0 if kind == "beta-1" else 1e-6, seed=seed,
        progress=False, cuda_graph=kind != "adversarial", device=str(DEVICE),
    )  # fmt: skip
    began = now()
    history = vaelib.fit(model, train, config=config)
    if history.diverged:
        raise RuntimeError(f"{kind}, seed {seed}: the training diverged")
    return model.to(DEVICE), now() - began


def sharpness(pixels):
    """The mean size of the difference of neighbouring pixels, in grey levels."""
    x = pixels.float()
    return ((x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()).item() / 2


def latent_vae(kind, seed, setting):
    """One VAE as latent diffusion has it: rate, deviation of the codes, distortion, and samples from N(0, I) and by diffusion."""
    train, test = setting.mnist
    model, seconds = autoencoder(kind, seed, setting)
    net = mnist_features().to(DEVICE)
    real, terms = features_of(net, test.pixels), vaelib.heldout_elbo(model, test)
    codes, rebuilt = posterior_samples(model, test), vaelib.reconstruct(model, test.pixels)
    row = {"fit_seconds": seconds, "rate": terms.kl.mean().item(), "std": codes.std().item(), "factor": 1 / codes.std().item()}
    with evaluating(model):
        q = model.encode(model.likelihood.observe(test.pixels[:1000]).to(DEVICE))
        row["posterior_std"] = (q.log_var / 2).exp().mean().item()
    row["mse"] = (rebuilt.float() - test.pixels.float()).div(255).square().mean().item()
    row |= {"sharpness": sharpness(rebuilt), "sharpness_real": sharpness(test.pixels)}
    row["rebuilt_frechet"] = frechet_distance(real, features_of(net, rebuilt))
    normal = vaelib.generate(model, setting.num, seed=1)
    row["normal_frechet"] = frechet_distance(real, features_of(net, normal))
    sheet = [test.pixels[:10], rebuilt[:10], normal[:10]]
    if kind == "kl":
        options, began = {"steps": 4000, "batch_size": 512, "width": 64, "depth": 2}, now()
        prior = fit_diffusion(model, train, labels=True, seed=seed, **setting.few(options))
        row["diffusion_seconds"] = now() - began
        prior.steps, prior.stochastic = 50, False
        pixels, times = timed_samples(model, prior, setting.num)
        row |= {"diffusion_frechet": frechet_distance(real, features_of(net, pixels))} | times
        sheet.append(pixels[:10])
    return row | {"samples": picture(torch.cat(sheet), 10)}


def all_rows():
    """Name -> (where it is made, kind, seed, what makes it of a `Setting`), in the order of their worth."""
    rows = {"digits-prior-0": ("cpu", "digits-prior", 0, lambda s: digits("prior", 0, s))}
    for seed in SEEDS:
        for name in ("mixture", "mixture-100", "mixture-200", "second-stage", "diffusion-cpu"):
            rows[f"digits-{name}-{seed}"] = ("cpu", f"digits-{name}", seed, functools.partial(digits, name, seed))
    fits = {
        f"digits-diffusion-gpu-{s}": ("gpu", "digits-diffusion-gpu", s, functools.partial(digits, "diffusion-gpu", s))
        for s in SEEDS
    }
    first = SEEDS[0]
    rows |= {f"digits-diffusion-gpu-{first}": fits[f"digits-diffusion-gpu-{first}"]} | large(first) | fits
    for seed in SEEDS[1:]:
        rows |= large(seed)
    return rows


def large(seed):
    """The rows of one seed whose networks are convolutions."""
    rows = {f"photographs-{seed}": ("gpu", "photographs", seed, functools.partial(photographs, seed))}
    for kind in KINDS:
        rows[f"latent-{kind}-{seed}"] = ("gpu", f"latent-{kind}", seed, functools.partial(latent_vae, kind, seed))
    return rows


def spread(values):
    """Mean and standard deviation of numbers of several seeds, as deep as they lie; what is no number is left out."""
    if isinstance(values[0], dict):
        return {key: found for key in values[0] if (found := spread([value[key] for value in values])) is not None}
    if isinstance(values[0], list):
        return [spread(list(parts)) for parts in zip(*values, strict=True)]
    if isinstance(values[0], str):
        return None
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values), "each": list(values)}


def summary(done, rows):
    """For each kind of row with at least two seeds, the spread of its metrics."""
    kinds, seconds = {}, 0.0
    for name, (_, kind, *_) in rows.items():
        if name in done:
            kinds.setdefault(kind, []).append(done[name]["metrics"])
            seconds += done[name]["seconds"]
    metrics = {kind: spread(found) | {"seeds": len(found)} for kind, found in kinds.items() if len(found) > 1}
    return entry("python book/_scripts/diffusion_rows.py", 0, seconds, metrics)


def make(names, rows, setting, ledger, left):
    """Make the rows one after the other while there is time, each written when it is done."""
    for name in names:
        if left() <= 0:
            print(f"{name}: not run", flush=True)
            continue
        began = time.perf_counter()
        _, _, seed, maker = rows[name]
        metrics = maker(setting)
        done = read_object("ledger", ledger) if ledger.exists() else {}
        done[name] = entry(f"python book/_scripts/diffusion_rows.py {name}", seed, time.perf_counter() - began, metrics)
        done["summary"] = summary(done, rows)
        write_text(ledger, json.dumps(done, indent=2) + "\n")
        shown = {key: round(value, 3) for key, value in metrics.items() if isinstance(value, float)}
        print(f"{name}: {time.perf_counter() - began:.0f} s, {shown}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = all_rows()
    parser.add_argument("names", nargs="*", help="rows to make; default: those that are missing")
    parser.add_argument("--gpu", action="store_true", help="the rows for a GPU, not those for a CPU")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no row is begun")
    parser.add_argument("--rehearse", action="store_true", help="each row small, on the bundled images, into a temporary folder")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(rows):
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(rows)}")
    end = time.monotonic() + 60 * asked.minutes
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / LEDGER.name if asked.rehearse else LEDGER
        done = read_object("ledger", ledger) if ledger.exists() else {}
        place = "gpu" if asked.gpu else "cpu"
        missing = [name for name, (where, *_) in rows.items() if name not in done and (where == place or asked.rehearse)]
        make(asked.names or missing, rows, Setting(asked.rehearse), ledger, lambda: end - time.monotonic())


if __name__ == "__main__":
    main()
