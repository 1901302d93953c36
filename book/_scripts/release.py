"""Train, store and score the models that come with vaelib: `python book/_scripts/release.py [name ...]`, all by default.

1. Train. Models are taken from runs/ where they are there, else trained: mnist-mlp as the chapter of that name trains it, mnist-plane as
   front.py does, minutes each on one core; cifar-map is the row spatial-mixture of rows.py, a quarter of an hour on two.
2. Store, by vaelib.save, in vaelib/assets/models/<name>, with the checksum of the weights in released.json beside these folders.
   Where this changed a file, the script ends: commit the files, and give the same command again.
3. Score the weights as they are stored, on the whole test set. The record goes to results/released.json, which book/models.md quotes,
   and the numbers into the library's released.json.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import front
import torch

import vaelib
from vaelib.book.ledger import commit, entry
from vaelib.storage import MANIFEST, RELEASED, WEIGHTS, read_object, write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "released.json"
RUNS = ROOT / "runs"
ROW = "spatial-mixture"
COMMAND = "python book/_scripts/release.py"
KEPT = ("command", "seed", "commit", "date", "versions", "hardware", "seconds")  # of a training's record


def digits(folder):
    """The 784-400-20 of the chapter mnist-mlp: 30 epochs of 55000 images."""
    images = vaelib.load_images("mnist")
    train, valid = vaelib.train_valid_split(images, len(images) // 12, seed=0)
    torch.manual_seed(0)
    model = vaelib.mlp_vae(train.image_shape, (400,), 20)
    config = vaelib.TrainConfig(epochs=30, learning_rate=6e-3, seed=0, device="cpu", progress=False)
    began = time.perf_counter()
    vaelib.fit(model, train, valid, config)
    return model, entry(f"{COMMAND} mnist-mlp", 0, time.perf_counter() - began, {}) | {"training": config.as_dict()}


def plane(folder):
    """The plane of the first page."""
    model, record = front.train()
    return model, record | {"command": f"{COMMAND} mnist-plane"}


def photographs(folder):
    """The row of the CIFAR-10 tables that is a map with a mixture."""
    subprocess.run([sys.executable, "book/_scripts/rows.py", "--again", ROW], cwd=ROOT, check=True)
    return vaelib.load(folder), read_object("run", folder / "run.json")


SOURCES = {  # name: where its training is kept, what trains it, what it is of, draws per image for log p(x): 0 where few would carry it
    "mnist-mlp": (RUNS / "released" / "mnist-mlp", digits, "mnist", 1000),
    "mnist-plane": (RUNS / "released" / "mnist-plane", plane, "mnist", 1000),
    "cifar-map": (RUNS / "rows" / ROW, photographs, "cifar10", 0),
}


def trained(name):
    """The model of a name and the record of its training, from runs/ where they are there."""
    folder, train, _, _ = SOURCES[name]
    if not all((folder / file).exists() for file in (WEIGHTS, "run.json")):
        if commit() is None or commit().endswith("+changes"):
            sys.exit(f"{name}: the training is recorded with its commit, so commit the changes first")
        model, record = train(folder)
        vaelib.save(model, folder)
        write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")
    return vaelib.load(folder), read_object("run", folder / "run.json")


def store(name):
    """Put a model into the library; whether a file changed."""
    model, record = trained(name)
    folder = RELEASED / name
    manifest = read_object("manifest", MANIFEST) if MANIFEST.exists() else {}
    before = manifest.get(name, {}).get("sha256")
    vaelib.save(model.eval(), folder)
    found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if found == before:
        return False
    training = {key: record[key] for key in KEPT if key in record}
    manifest[name] = {"data": SOURCES[name][2], "sha256": found, "training": training}
    write_text(MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    return True


def score(name):
    """The record of a stored model's scores on the whole test set of its data."""
    _, _, data, draws = SOURCES[name]
    began = time.perf_counter()
    model = vaelib.load(name)
    result = vaelib.evaluate(model, vaelib.load_images(data, "test"), num_samples=draws)
    metrics = {"data": data, "sha256": vaelib.released()[name]["sha256"], "model": model.config, "test": result.as_dict()}
    return entry(f"{COMMAND} {name}", 0, time.perf_counter() - began, metrics)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(SOURCES)}; all by default")
    parser.add_argument("--train", action="store_true", help="train what is missing in runs/, and no more")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(SOURCES):
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(SOURCES)}")
    names = arguments.names or list(SOURCES)
    torch.set_num_threads(1)
    if arguments.train:
        for name in names:
            trained(name)
        return
    if changed := [name for name in names if store(name)]:
        sys.exit(f"stored {', '.join(changed)}: commit vaelib/assets/models, and run the same command again for the scores")
    if commit() is None or commit().endswith("+changes"):
        sys.exit("the scores are recorded with their commit, so commit the changes first")
    records = {}
    for name in names:
        records[name] = score(name)
        test = records[name]["metrics"]["test"]
        print(
            f"{name:12} ELBO {test['elbo']:.2f}, log p(x) {test['log_likelihood']} nats, {records[name]['seconds']:.0f} s",
            flush=True,
        )
    done = read_object("ledger", LEDGER) if LEDGER.exists() else {}
    write_text(LEDGER, json.dumps(done | records, indent=2) + "\n")
    manifest = read_object("manifest", MANIFEST)
    for name, record in records.items():
        manifest[name]["test"] = record["metrics"]["test"]
    write_text(MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
