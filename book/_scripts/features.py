"""Train the net whose features the book's sample scores use: `python book/_scripts/features.py`, two minutes on one core.

It reads MNIST, writes vaelib/assets/mnist-features.safetensors (float16) and the record results/mnist-features.json. The accuracy
is that of the weights as they are stored.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vaelib
from vaelib.book.ledger import entry
from vaelib.heldout import evaluating
from vaelib.quality import FEATURES_FILE, FeatureNet
from vaelib.storage import atomic, write_text

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "python book/_scripts/features.py"


def accuracy(net, images):
    """The share of images whose largest logit is that of their class."""
    with evaluating(net):
        right = [
            (net(p).argmax(1) == y).sum().item() for p, y in zip(images.pixels.split(1000), images.labels.split(1000), strict=True)
        ]
    return sum(right) / len(images)


def train(images, epochs, seed):
    """Adam with a cosine schedule; each batch is shifted by up to two pixels, which the black margin allows."""
    torch.manual_seed(seed)
    net = FeatureNet().to(memory_format=torch.channels_last)
    steps = epochs * -(-len(images) // 128)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for batch in torch.randperm(len(images)).split(128):
            pixels = images.pixels[batch].roll(tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
            loss = F.cross_entropy(net(pixels), images.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.4f}", flush=True)
    return net


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for so small a net a second one gains little
    images, test = vaelib.load_images("mnist"), vaelib.load_images("mnist", "test")
    start = time.perf_counter()
    net = train(images, arguments.epochs, arguments.seed)
    seconds = time.perf_counter() - start
    weights = {name: weight.half().contiguous() for name, weight in net.state_dict().items()}
    net.load_state_dict({name: weight.float() for name, weight in weights.items()})
    metrics = {"test": {"accuracy": accuracy(net, test), "num_images": len(test)}, "epochs": arguments.epochs}
    command = f"{COMMAND} --epochs {arguments.epochs} --seed {arguments.seed}"
    record = entry(command, arguments.seed, seconds, metrics)
    folder = ROOT / "vaelib" / "assets"
    folder.mkdir(exist_ok=True)
    about = {"seed": str(arguments.seed), "test_accuracy": str(metrics["test"]["accuracy"]), "command": command}
    with atomic(folder / FEATURES_FILE) as partial:
        save_file(weights, partial, about)
    write_text(ROOT / "results" / "mnist-features.json", json.dumps(record, indent=2) + "\n")
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
