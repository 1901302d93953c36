"""What lines of well-known tutorials cost: `python book/_scripts/errata_rows.py [row.seed ...]`, all that are missing by default.

The page `errata` says whose lines they are and at which commit. Each is written anew here, trained on MNIST by one loop, with the
sizes of its source where the table says so, and judged by the library's ELBO of the test images. Not the sources': Adam in place of
another optimizer, batches of 128, ten epochs, binarized pixels but where the row is about grey ones. Records go to
results/errata-rows.json, one for each row and seed.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import vaelib
from vaelib.book.ledger import entry
from vaelib.evaluation import inference_gaps
from vaelib.heldout import evaluating
from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "errata-rows.json"
SEEDS = (0, 1, 2)
EPOCHS, BATCH, RATE = 10, 128, 1e-3
SMALL, USUAL = ((256,), 2), ((400,), 20)  # hidden layers, latent dimensions


def pixels_summed(logits, x):
    """The cross-entropy of each image, summed over its pixels: (N,)."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def right(model, x, eps):
    """Minus the ELBO."""
    mean, log_var = model.encode(x)
    logits = model.decode(mean + (log_var / 2).exp() * eps)
    return (pixels_summed(logits, x) + vaelib.gaussian_kl(mean, log_var)).mean()


def small_noise(model, x, eps):
    """Noise of a hundredth of the deviation that the KL charges for, and a mean over pixels beside a sum over latents."""
    mean, log_var = model.encode(x)
    logits = model.decode(mean + 0.01 * (log_var / 2).exp() * eps)
    return (pixels_summed(logits, x) / x[0].numel() + vaelib.gaussian_kl(mean, log_var)).mean()


def two_readings(model, x, eps):
    """The same, with a mean over latents too, and one output read as log-deviation by the noise and as log-variance by the KL."""
    mean, out = model.encode(x)
    logits = model.decode(mean + 0.01 * out.exp() * eps)
    return (pixels_summed(logits, x) / x[0].numel() + vaelib.gaussian_kl(mean, out) / mean.shape[1]).mean()


ROWS = {  # name: loss, sizes, likelihood
    "right-2": (right, SMALL, "bernoulli"),
    "small-noise": (small_noise, SMALL, "bernoulli"),
    "two-readings": (two_readings, SMALL, "bernoulli"),
    "right-20": (right, USUAL, "bernoulli"),
    "grey": (right, USUAL, "grey_bce_not_a_likelihood"),
}


def trained(loss_of, sizes, likelihood, images, seed):
    """A model, trained to lower `loss_of(model, x, eps)`."""
    torch.manual_seed(seed)
    hidden, latents = sizes
    model = vaelib.mlp_vae(images.image_shape, hidden, latents, likelihood)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for pixels in vaelib.minibatches(images, BATCH, order):
            loss = loss_of(model, model.likelihood.observe(pixels), torch.randn(len(pixels), latents))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def reported(model, images, decode_mean):
    """What a test loop prints: its cross-entropy plus KL, mean over the images, with one draw of z or with the mean in its place."""
    torch.manual_seed(0)
    total = 0.0
    with evaluating(model):
        for pixels in images.pixels.split(1000):
            x = model.likelihood.observe(pixels)
            mean, log_var = model.encode(x)
            z = mean if decode_mean else vaelib.reparameterize(mean, log_var, torch.randn_like(mean))
            total += (pixels_summed(model.decode(z), x) + vaelib.gaussian_kl(mean, log_var)).sum().item()
    return total / len(images)


def run(name, seed, images, test):
    """The record of one row and seed."""
    loss_of, sizes, likelihood = ROWS[name]
    start = time.perf_counter()
    model = trained(loss_of, sizes, likelihood, images, seed)
    seconds = time.perf_counter() - start
    metrics = {"printed": reported(model, test, False), "printed_with_the_mean": reported(model, test, True)}
    model.likelihood = vaelib.Bernoulli()  # the judge's pixels are binarized
    judged = vaelib.evaluate(model, test)
    some = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:100]]
    refined = inference_gaps(model, some, 64, 100, learning_rate=1.0, sample_batch=16).refined_elbo
    metrics |= {
        "elbo": judged.elbo,
        "elbo_standard_error": judged.elbo_standard_error,
        "likelihood_term": judged.expected_log_likelihood,
        "rate": judged.kl,
        "refined_elbo": refined.double().mean().item(),
    }
    return entry(f"python book/_scripts/errata_rows.py {name}.{seed}", seed, seconds, metrics)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="row.seed; all that are missing by default")
    done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    every = [f"{name}.{seed}" for name in ROWS for seed in SEEDS]
    rows = parser.parse_args().rows or [row for row in every if row not in done]
    if unknown := set(rows) - set(every):
        parser.error(f"rows: got {', '.join(sorted(unknown))}, expected some of {', '.join(every)}")
    torch.set_num_threads(1)
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    for row in rows:
        name, seed = row.rsplit(".", 1)
        done[row] = run(name, int(seed), images, test)
        write_text(LEDGER, json.dumps({key: done[key] for key in every if key in done}, indent=2) + "\n")
        print(f"{row}: {done[row]['metrics']} {done[row]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
