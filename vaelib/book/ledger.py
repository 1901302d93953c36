"""The ledger of runs: what ran, how long, on what, and what came out, as JSON that prose and tables quote."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vaelib._validation import as_path
from vaelib.storage import writable_folder, write_text

PACKAGES = ("vaelib", "torch", "torchvision", "numpy", "scikit-learn")


def hardware() -> dict[str, Any]:
    """Processor, cores, accelerator and operating system."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The commit of the source tree, with "+changes" where it was edited since; None outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not some other project's repository
        changed = git("status", "--porcelain", "--", ":/vaelib", ":/book/_scripts", ":/benchmarks", ":/pyproject.toml")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def entry(command: str, seed: int, seconds: float, metrics: dict[str, Any]) -> dict[str, Any]:
    """One record: command, seed, commit, date, versions, hardware, wall time and metrics."""
    return {
        "command": command,
        "seed": seed,
        "commit": commit(),
        "date": date.today().isoformat(),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": round(seconds, 1),
        "metrics": metrics,
    }


def record(name: str, command: str, seed: int, seconds: float, metrics: dict[str, Any]) -> dict[str, Any]:
    """An `entry`, written to ``$VAELIB_RESULTS/<name>.json`` where that variable is set (as `make execute` does)."""
    made = entry(command, seed, seconds, metrics)
    if folder := os.environ.get("VAELIB_RESULTS"):
        write_text(writable_folder("VAELIB_RESULTS", folder) / f"{name}.json", json.dumps(made, indent=2) + "\n")
    return made


def finished(name: str, folder: str | Path = "../results") -> dict[str, Any]:
    """The metrics of the finished runs in ``<folder>/<name>.json``, by the name of the run.

    A file of one run, as `record` writes it, gives that run under the name of the file. Where there is no file there are no runs:
    a chapter that is read alone, as on Colab, has no results beside it.
    """
    path = as_path(folder) / f"{name}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {key: run["metrics"] for key, run in ({name: found} if "metrics" in found else found).items()}
