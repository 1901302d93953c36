"""Train and score the rows of the CIFAR-10 tables: `python book/_scripts/rows.py [name ...]`, all that are missing by default.

Each row is a `vaelib train` with the seed 0, then a `vaelib evaluate`, each in a process of its own; runs/rows/<name> keeps the
model, so that a run that was cut off goes on where it stood. The record goes to results/cifar-rows.json: command, commit,
versions, hardware, seconds and the scores on the test set.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "cifar-rows.json"
CONV = "--model conv --flip --precision bf16 --channels-last"
SCALE_1 = '{"name": "gaussian", "scale": 1.0, "discretized": true}'
LEARNED = '{"name": "gaussian", "scale": 0.3, "learned": true, "discretized": true}'
MIXTURE = '{"name": "discretized_logistic_mixture", "num_mixtures": 5}'
RESIDUAL = f"{CONV} --latent-dim 64x8x8 --residual-blocks 1 --likelihood {shlex.quote(MIXTURE)}"
ROWS = {
    "vector-gaussian-1": f"{CONV} --epochs 12 --likelihood {shlex.quote(SCALE_1)}",
    "vector-gaussian-learned": f"{CONV} --epochs 12 --likelihood {shlex.quote(LEARNED)}",
    "vector-logistic": f"{CONV} --epochs 12",
    "vector-mixture": f"{CONV} --epochs 12 --likelihood {shlex.quote(MIXTURE)}",
    "spatial-logistic": f"{CONV} --epochs 12 --latent-dim 64x8x8",
    "spatial-mixture": f"{CONV} --epochs 12 --latent-dim 64x8x8 --likelihood {shlex.quote(MIXTURE)}",
    "residual-mixture": f"{RESIDUAL} --epochs 12 --learning-rate 1e-3",
    "residual-mixture-hot": f"{RESIDUAL} --epochs 12",  # as the others: it collapses in its first epoch
}
# a hierarchical VAE as small as two CPU cores need it: the default of `vaelib.hierarchical_vae` takes over an hour an epoch there
SMALL = '{"levels": [[16, 1], [16, 2], [8, 2], [4, 0]], "width": 64, "bottleneck": 24, "blocks": 1}'
ROWS["hierarchical-small"] = (
    "--model hierarchical --flip --precision bf16 --channels-last --epochs 6 --batch-size 64 --learning-rate 1e-3 "
    f"--ema-decay 0.999 --likelihood {shlex.quote(MIXTURE)} --model-options {shlex.quote(SMALL)}"
)
# layouts of the latents, the same short training for each
for layout in ("16", "128", "512", "4x4x4", "16x4x4", "4x8x8", "16x8x8", "64x8x8", "16x16x16"):
    ROWS[f"layout-{layout}"] = f"{CONV} --epochs 3 --latent-dim {layout}"


def vaelib(*arguments):
    """`vaelib ... --json` as a user runs it; its one JSON object."""
    command = [sys.executable, "-m", "vaelib", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def run(name, data):
    """The record of one row."""
    folder = Path("runs") / "rows" / name
    vaelib("train", "--data", data, *shlex.split(ROWS[name]), "--out", folder, "--resume")
    record = json.loads((ROOT / folder / "run.json").read_text())
    record["seconds"] = record["metrics"]["seconds_of_all_epochs"]
    record["metrics"]["test"] = vaelib("evaluate", folder, "--elbo-samples", 5)
    record["metrics"]["epochs_list"] = [json.loads(line) for line in (ROOT / folder / "history.jsonl").read_text().splitlines()]
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows to make; default: those that are missing")
    parser.add_argument("--again", action="store_true", help="from the start, whatever there is")
    parser.add_argument("--data", default="cifar10")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ROWS)
    if unknown:
        sys.exit(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(ROWS)}")
    done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
    for name in arguments.names or [name for name in ROWS if name not in done]:
        if arguments.again:
            shutil.rmtree(ROOT / "runs" / "rows" / name, ignore_errors=True)
        record = run(name, arguments.data)
        done = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        LEDGER.write_text(json.dumps(done | {name: record}, indent=2) + "\n")
        print(f"{name:24} {record['metrics']['test']['bits_per_dim']:.3f} bits/dim, {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
