"""Images per second of `fit`, beside the usual ways to feed the same network, in one run on one machine.

    python benchmarks/train_throughput.py [mnist] [cifar] [--rounds 8] [--device auto] [--entry NAME] [--rehearse] [--json]

Two workloads, batch 128 and Adam: `mnist`, the 784-400-20 Bernoulli VAE with dynamic binarization on 12800 MNIST images, and
`cifar`, `conv_vae` with 128 latents and a discretized logistic on 2560 CIFAR-10 images. Rows:

- `fit`: vaelib's trainer as it comes, which on CUDA replays whole steps from a graph; `fit, bf16` (with channels_last on `cifar`)
  and `fit, compiled` the same with these settings. On CUDA alone: `fit, plain steps`, without a graph, and `fit, graphs`, compiled in
  the mode in which torch records graphs of its own.
- `DataLoader`: torchvision's data set with `ToTensor` through a `DataLoader`, as in the official PyTorch example; same model and
  loss, the optimizer as torch makes it.
- `pythae`: its `BaseTrainer`, same network and batch, where it is installed (`pip install pythae`).
- `matrix products` (`mnist`): only the products of the forward and backward pass, the floor for any trainer.

The rows take turns, round by round, so that a slow minute of the machine meets them all; the fastest round of each counts, since
other work on the machine only ever adds time. On CUDA a round of `fit` has 20 epochs, so that the recording is paid once for
2000 or 400 steps.
Wanted on an H100 or H200: on `mnist` `fit` at least 25 times as fast as `DataLoader` and 10 times as `pythae`, on `cifar` at least
5 times as `pythae`; an H100 gave 27, 9.1 and 2.5 (results/train-throughput-gpu.json). `share of the chip` is a row's
multiplications and additions per second over those of one large square matrix product in float32, measured in the same run.
`memory` is the most that the device held (CUDA only).
With VAELIB_RESULTS set the table is entered into the ledger as `train-throughput`, or as NAME. `--rehearse` only shows that it runs,
on few images of `digits` and `shapes`, without the rows that need torchvision's data or a compiler.
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
from functools import partial

import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

import vaelib
from vaelib.book.ledger import hardware, record
from vaelib.distributed import choose_device

HIDDEN, LATENT, BATCH = 400, 20, 128
COUNT = {"mnist": 12800, "cifar": 2560}
SETS = {"mnist": ("mnist", datasets.MNIST), "cifar": ("cifar10", datasets.CIFAR10)}
BUNDLED = {"mnist": "digits", "cifar": "shapes"}  # images of the same shapes, for a rehearsal


def timed(work, device):
    """Seconds of one call, the accelerator's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def new_model(workload):
    return vaelib.mlp_vae((1, 28, 28), (HIDDEN,), LATENT) if workload == "mnist" else vaelib.conv_vae()


def passes(name, device):
    """Epochs in a round: several where a graph has to be recorded first."""
    return 20 if device.type == "cuda" and name.startswith("fit") else 1


def by_fit(workload, images, device, **options):
    model = new_model(workload)
    config = vaelib.TrainConfig(epochs=passes("fit", device), batch_size=BATCH, progress=False, device=str(device), **options)
    images = images.to(device)
    return lambda: vaelib.fit(model, images, config=config)


def by_data_loader(workload, images, device):
    model = new_model(workload).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = SETS[workload][1](str(vaelib.data.data_folder()), train=True, transform=transforms.ToTensor())
    options = {"num_workers": 1, "pin_memory": True} if device.type == "cuda" else {}
    loader = DataLoader(Subset(data, range(len(images))), batch_size=BATCH, shuffle=True, **options)

    def epoch():
        for grey, _ in loader:
            grey = grey.to(device)
            x = torch.bernoulli(grey) if workload == "mnist" else 2 * grey - 1
            loss = vaelib.loss(model.elbo(x, validate=False))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def by_matrix_products(workload, images, device):
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


def by_pythae(workload, images, device):
    """pythae's BaseTrainer for one epoch; its set-up and its final save are not counted."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    logging.getLogger("pythae").setLevel(logging.ERROR)
    ours = new_model(workload)  # its very networks, under pythae's interface
    shape = ours.image_shape

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.network = ours.encoder

        def forward(self, x):
            mean, log_var = self.network(x)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.network = ours.decoder

        def forward(self, z):
            return ModelOutput(reconstruction=self.network(z)[:, : shape[0]].sigmoid())

    folder = tempfile.mkdtemp(prefix="pythae-")
    loss = "bce" if workload == "mnist" else "mse"
    config = VAEConfig(input_dim=shape, latent_dim=ours.latent_dim, reconstruction_loss=loss)
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


def flops_per_image(workload):
    """Multiplications and additions of one image's forward and backward pass, as torch counts them."""
    model = new_model(workload)
    x = model.likelihood.observe(torch.zeros(2, *model.image_shape, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        vaelib.loss(model.elbo(x)).backward()
    return counter.get_total_flops() / 2


def calibration(device, size=2048, rounds=5):
    """Multiplications and additions per second of a large square matrix product in float32: the chip's attainable rate."""
    a, b = torch.randn(2, size, size, device=device)
    times = [timed(lambda: a @ b, device) for _ in range(rounds + 1)]
    return 2 * size**3 / min(times[1:])


def measure(workload, rounds, device, rehearse=False):
    """Row -> images per second in its fastest round, after one round to warm up; row -> most memory held, in MB (CUDA)."""
    images = vaelib.load_images(BUNDLED[workload])[:256] if rehearse else vaelib.load_images(SETS[workload][0])[: COUNT[workload]]
    torch.manual_seed(0)
    layout = {"channels_last": workload == "cifar"}
    ways = {
        "fit": by_fit,
        "fit, bf16": partial(by_fit, precision="bf16", **layout),
        "fit, compiled": partial(by_fit, compile=True, **layout),
        "DataLoader": by_data_loader,
    }
    if device.type == "cuda":
        ways["fit, plain steps"] = partial(by_fit, cuda_graph=False)
        ways["fit, graphs"] = partial(by_fit, compile="reduce-overhead", cuda_graph=False, **layout)
    if workload == "mnist":
        ways["matrix products"] = by_matrix_products
    if importlib.util.find_spec("pythae"):
        ways["pythae"] = by_pythae
    if rehearse:
        ways = {name: way for name, way in ways.items() if name in ("fit", "fit, bf16", "matrix products")}
    epochs = {name: way(workload, images, device) for name, way in ways.items()}
    seconds, memory = {name: [] for name in ways}, {}
    for turn in range(rounds + 1):
        for name, epoch in epochs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = timed(epoch, device)
            if device.type == "cuda":
                memory[name] = round(torch.cuda.max_memory_allocated() / 1e6)
            if turn:
                seconds[name].append(took)
    return {name: passes(name, device) * len(images) / min(times) for name, times in seconds.items()}, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help="mnist, cifar; default: both")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--entry", default="train-throughput", help="name in the ledger; default: train-throughput")
    parser.add_argument("--rehearse", action="store_true", help="few bundled images and few rows, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    workloads = arguments.workloads or list(COUNT)
    if set(workloads) - set(COUNT):
        parser.error(f"workloads: got {', '.join(workloads)}, expected some of {', '.join(COUNT)}")
    device = choose_device(arguments.device)
    start = time.perf_counter()
    attainable = calibration(device)
    metrics = {"device": str(device), "attainable_gflops": round(attainable / 1e9, 1)}
    for workload in workloads:
        rates, memory = measure(workload, arguments.rounds, device, arguments.rehearse)
        work = flops_per_image(workload)
        metrics[workload] = {
            "images_per_second": {name: round(rate) for name, rate in rates.items()},
            "share_of_the_chip": {name: round(rate * work / attainable, 3) for name, rate in rates.items()},
            "fit_over": {name: round(rates["fit"] / rate, 3) for name, rate in rates.items() if name != "fit"},
            "memory_mb": memory,
        }
    command = f"python benchmarks/train_throughput.py {' '.join(workloads)} --rounds {arguments.rounds}"
    command += f" --entry {arguments.entry}" * (arguments.entry != "train-throughput") + " --rehearse" * arguments.rehearse
    made = record(arguments.entry, command, 0, time.perf_counter() - start, metrics)
    if arguments.json:
        print(json.dumps(made))
        return
    print(
        f"{hardware()['processor']}, {torch.get_num_threads()} threads, device {device}, {attainable / 1e9:.0f} GFLOP/s in one product"
    )
    for workload in workloads:
        print(workload)
        table = metrics[workload]
        for name, rate in table["images_per_second"].items():
            over = table["fit_over"].get(name, 1.0)
            print(
                f"  {name:16} {rate:9} images/s  {table['share_of_the_chip'][name]:6.1%} of the chip   fit is {over:5.2f} times as fast"
            )
        if "pythae" not in table["images_per_second"]:
            print("  pythae           not run: not installed")


if __name__ == "__main__":
    sys.exit(main())
