"""The page book/ran-on.md: when and where each chapter was run, from results/ran-on.json.

python book/_scripts/ran_on.py    writes the page; a test holds it to the file.
"""

import json
import re
from pathlib import Path

from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "book" / "ran-on.md"
HEAD = """# Where it ran

The outputs that you see are those of one full run of each chapter; a cell that was changed since was run again with what it needs.
`make execute` makes them, and writes down when, on what and for how long.
This page is made from that record, `results/ran-on.json`, by `python book/_scripts/ran_on.py`.

| chapter | date | minutes | hardware | Python | torch | commit |
|---|---|---|---|---|---|---|
"""
TAIL = """
The sum, before rounding, is {total:.1f} minutes.
Minutes are the wall time of the whole notebook, with imports and figures.
{changes}Long runs that the chapters only read, such as the rows of the CIFAR-10 tables, are not in these minutes.
Their own files in `results/` say how long they took.
[](troubleshooting.md) says which of the numbers you should get again.
"""
CHANGES = '"+changes" behind a commit says that the library or a script had been edited since that commit.\n'


def hardware(record):
    """Processor, cores, threads and GPU of a record, in words."""
    threads = f"{record['threads']} thread{'s' * (record['threads'] != 1)}"
    return f"{record['processor']}, {record['cores']} cores, {threads}, {record['gpu'] or 'no GPU'}"


def short(commit):
    """The first seven digits of a commit, as git shows it, with what is behind."""
    return re.sub(r"^([0-9a-f]{7})[0-9a-f]*", r"\1", commit) if commit else "not known"


def page(runs):
    """The page's text: one row for each chapter of `runs`, the content of ran-on.json, in the order of the book."""
    contents = re.findall(r"file: (\S+)", (ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    rows = [
        f"| []({name}.ipynb) | {run['date']} | {run['seconds'] / 60:.1f} | {hardware(run['hardware'])} "
        f"| {run['versions']['python']} | {run['versions']['torch']} | {short(run['commit'])} |\n"
        for name, run in sorted(runs.items(), key=lambda item: contents.index(item[0]))
    ]
    total = sum(run["seconds"] for run in runs.values()) / 60
    return HEAD + "".join(rows) + TAIL.format(total=total, changes=CHANGES * ("+changes" in "".join(rows)))


if __name__ == "__main__":
    write_text(PAGE, page(json.loads((ROOT / "results" / "ran-on.json").read_text(encoding="utf-8"))))
    print(PAGE)
