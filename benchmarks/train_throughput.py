"""Images per second of `fit` on MNIST, beside the usual ways to feed the same network, in one run on one machine.

    python benchmarks/train_throughput.py [--rounds 8] [--images 12800] [--device auto] [--json]

Rows, all with the 784-400-20 Bernoulli VAE, batch 128, dynamic binarization and Adam:

- `fit`: vaelib's trainer.
- `DataLoader`: torchvision's `MNIST` with `ToTensor` through a `DataLoader`, as in the official PyTorch example; same model and loss.
- `pythae`: its `BaseTrainer`, same network and batch, where it is installed (`pip install pythae`).
- `matrix products`: only the products of the forward and backward pass, the floor for any trainer.

The rows take turns, round by round, so that a slow minute of the machine meets them all; the fastest round of each counts, since
other work on the machine only ever adds time. With
VAELIB_RESULTS set the table is entered into the ledger as `train-throughput`.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import sys
import tempfile
import time

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

import vaelib
from vaelib.ledger import hardware, record
from vaelib.training import choose_device

HIDDEN, LATENT, BATCH = 400, 20, 128


def timed(work, device):
    """Seconds of one call, the accelerator's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_fit(images, device):
    model = vaelib.mlp_vae((1, 28, 28), (HIDDEN,), LATENT)
    config = vaelib.TrainConfig(epochs=1, batch_size=BATCH, progress=False, device=str(device))
    images = images.to(device)
    return lambda: vaelib.fit(model, images, config=config)


def by_data_loader(images, device):
    model = vaelib.mlp_vae((1, 28, 28), (HIDDEN,), LATENT).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    mnist = datasets.MNIST(str(vaelib.data.data_folder()), train=True, transform=transforms.ToTensor())
    options = {"num_workers": 1, "pin_memory": True} if device.type == "cuda" else {}
    loader = DataLoader(Subset(mnist, range(len(images))), batch_size=BATCH, shuffle=True, **options)

    def epoch():
        for grey, _ in loader:
            x = torch.bernoulli(grey.to(device))
            loss = vaelib.loss(model.elbo(x, validate=False))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def by_matrix_products(images, device):
    """Each layer's x W forward, and g^T x and (but for the first) g W backward, for every batch of an epoch."""
    layers = [(784, HIDDEN), (HIDDEN, 2 * LATENT), (LATENT, HIDDEN), (HIDDEN, 784)]
    operands = [
        (
            torch.randn(BATCH, fan_in, device=device),
            torch.randn(fan_in, fan_out, device=device),
            torch.randn(BATCH, fan_out, device=device),
        )
        for fan_in, fan_out in layers
    ]

    def epoch():
        for _ in range(len(images) // BATCH):
            for i, (x, weight, gradient) in enumerate(operands):
                x @ weight
                gradient.T @ x
                if i > 0:
                    gradient @ weight.T

    return epoch


def by_pythae(images, device):
    """pythae's BaseTrainer for one epoch; its set-up and its final save are not counted."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.getLogger("pythae").setLevel(logging.ERROR)

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.hidden = torch.nn.Sequential(torch.nn.Linear(784, HIDDEN), torch.nn.ReLU())
            self.mean, self.log_var = torch.nn.Linear(HIDDEN, LATENT), torch.nn.Linear(HIDDEN, LATENT)

        def forward(self, x):
            hidden = self.hidden(x.flatten(1))
            return ModelOutput(embedding=self.mean(hidden), log_covariance=self.log_var(hidden))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            layers = torch.nn.Linear(LATENT, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 784), torch.nn.Sigmoid()
            self.layers = torch.nn.Sequential(*layers)

        def forward(self, z):
            return ModelOutput(reconstruction=self.layers(z).view(-1, 1, 28, 28))

    folder = tempfile.mkdtemp(prefix="pythae-")
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce")
    model = VAE(config, encoder=Encoder(), decoder=Decoder())
    data = BaseDataset(images.pixels.float() / 255, torch.zeros(len(images)))
    options = {
        "output_dir": folder,
        "num_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "no_cuda": device.type != "cuda",
    }
    trainer = BaseTrainer(model=model, train_dataset=data, training_config=BaseTrainerConfig(**options))
    trainer.prepare_training()

    def epoch():
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.train_step(epoch=1)

    return epoch


def measure(rounds, count, device):
    """Row -> images per second in its fastest round, after one round to warm up."""
    images = vaelib.load_images("mnist")[:count]
    torch.manual_seed(0)
    ways = {"fit": by_fit, "DataLoader": by_data_loader, "matrix products": by_matrix_products}
    if importlib.util.find_spec("pythae"):
        ways["pythae"] = by_pythae
    epochs = {name: way(images, device) for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, epoch in epochs.items():
            took = timed(epoch, device)
            if turn:
                seconds[name].append(took)
    return {name: len(images) / min(times) for name, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=12800)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    start = time.perf_counter()
    rates = measure(arguments.rounds, arguments.images, device)
    command = f"python benchmarks/train_throughput.py --rounds {arguments.rounds} --images {arguments.images}"
    metrics = {
        "device": str(device),
        "images_per_second": {name: round(rate) for name, rate in rates.items()},
        "fit_over": {name: round(rates["fit"] / rate, 3) for name, rate in rates.items() if name != "fit"},
    }
    made = record("train-throughput", command, 0, time.perf_counter() - start, metrics)
    if arguments.json:
        print(json.dumps(made))
        return
    print(f"{hardware()['processor']}, {torch.get_num_threads()} threads, device {device}")
    for name, rate in rates.items():
        print(f"{name:16} {rate:10.0f} images/s   fit is {rates['fit'] / rate:5.2f} times as fast")
    if "pythae" not in rates:
        print("pythae           not run: not installed")


if __name__ == "__main__":
    sys.exit(main())
