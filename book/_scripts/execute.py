"""Run chapters at the full tier and store their outputs: `python book/_scripts/execute.py book/elbo.ipynb ...`

Each chapter runs in a fresh kernel in the folder of its file. Results that it records go to results/ (VAELIB_RESULTS), and so does
results/ran-on.json: which chapter ran when, how long, on what. Metadata that changes from run to run is not stored.
"""

import json
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from vaelib.book.ledger import entry
from vaelib.storage import atomic

ROOT = Path(__file__).resolve().parents[2]


def coalesced(outputs):
    """Printed text in one piece, however the kernel happened to flush it."""
    merged = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream" and output.name == merged[-1].name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def tidy(notebook):
    """Keep what a reader needs; drop time stamps, kernel versions, machine paths."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = coalesced(cell.outputs)
        for output in cell.outputs:
            assert output.output_type != "error", f"{cell.id}: {output.get('evalue')}"
            for text in [output.get("text", ""), *output.get("data", {}).values()]:
                assert str(ROOT) not in str(text), f"{cell.id}: the output holds a path of this machine"


def run(path):
    """Execute one chapter in place; on an error the file stays as it was."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    seconds = time.perf_counter() - start
    tidy(notebook)
    with atomic(path) as partial:
        nbformat.write(notebook, partial)
    print(f"{path.name}: {seconds:.0f} s", flush=True)
    return seconds


def main(names):
    if os.environ.get("VAELIB_FAST"):
        sys.exit("VAELIB_FAST is set: the committed outputs are those of the full tier")
    os.environ["VAELIB_RESULTS"] = str(ROOT / "results")
    ledger = ROOT / "results" / "ran-on.json"
    ran = json.loads(ledger.read_text()) if ledger.exists() else {}
    for name in names:
        path = Path(name).resolve()
        seconds = run(path)
        ran[path.stem] = entry(f"make execute: {path.stem}", 0, seconds, {})
        ledger.write_text(json.dumps(ran, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
