"""Train the rows of the chapter mistakes with other seeds: `python book/_scripts/mistakes_rows.py [seed ...]`, 1 and 2 by default.

The code is the chapter's own: its code cells up to the section that measures nothing more, run with another SEED. Figures, and cells
that are tagged `one-seed`, are left out. Records go to results/mistakes-rows.json, by seed: command, commit, versions, hardware,
seconds and what the chapter measures of each row, its symptom and the collapse. A seed that is there already is not run again.
"""

import argparse
import json
import os
import time
from pathlib import Path

import nbformat

from vaelib.book.ledger import entry
from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "results" / "mistakes-rows.json"
END = "(sec-damage)="  # from here on the chapter compares what it has measured


def training_cells():
    """The sources of the chapter's cells that train, in order."""
    for cell in nbformat.read(ROOT / "book" / "mistakes.ipynb", as_version=4).cells:
        if cell.cell_type == "markdown" and END in cell.source:
            return
        if cell.cell_type == "code" and "mystnb" not in cell.metadata and "one-seed" not in cell.metadata.get("tags", ()):
            yield cell.source


def run(seed):
    """What the chapter's cells leave behind with this seed: their names and values."""
    names = {"FAST": bool(os.environ.get("VAELIB_FAST"))}
    for source in training_cells():
        if "%pip" not in source:  # the first cell, for Colab
            exec(source.replace("SEED = 0", f"SEED = {seed}"), names)
    assert names["SEED"] == seed
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=(1, 2))
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    arguments = parser.parse_args()
    ledger = arguments.ledger.resolve()
    os.chdir(ROOT / "book")  # where the chapter runs
    for seed in arguments.seeds:
        if ledger.exists() and str(seed) in json.loads(ledger.read_text()):
            continue
        start = time.perf_counter()
        names = run(seed)
        rows = {key.replace("/", "~"): row for key, row in names["rows"].items()}
        metrics = {"rows": rows, **{name: names[name] for name in ("symptoms", "progress", "collapse")}}
        record = entry(f"python book/_scripts/mistakes_rows.py {seed}", seed, time.perf_counter() - start, metrics)
        done = json.loads(ledger.read_text()) if ledger.exists() else {}
        write_text(ledger, json.dumps(dict(sorted((done | {str(seed): record}).items())), indent=2) + "\n")
        print(f"seed {seed}: {len(rows)} rows, {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
