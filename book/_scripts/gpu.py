"""Do what waits for a GPU: `python book/_scripts/gpu.py [job ...] [--minutes 12]`, all that is missing in results/ by default.

The jobs, in the order of their worth: the tests that need CUDA, the benchmark of the trainer, two rows of the CIFAR table, the rows
of the table of importance-weighted autoencoders. Each is a command in a process of its own. When the time is up it gets what Ctrl-C
sends, writes its checkpoint and ends; the next call goes on from there. Only ledger files are written, beside models and logs in
runs/. At the end a table says what became of each job; the exit status is 1 where one failed. `--rehearse` does the same on the CPU
with few epochs and the bundled images, into a temporary folder, and there cuts a training off and resumes it.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vaelib.book.ledger import entry
from vaelib.book.reproduce import PAPER
from vaelib.storage import read_object, writable_folder, write_text

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20.0  # seconds that a job has for its checkpoint, once it was told to end
IWAE = sorted(PAPER, key=lambda row: row[1] == "vae" and row[2] > 1)  # averaging draws is of the least interest
TINY = "--batch-size 256 --valid-size 64 --checkpoint-epochs 1"  # of a rehearsal: options that override a row's own
TINY_LEVELS = '{"levels": [[4, 1], [4, 1]], "width": 8, "bottleneck": 4, "blocks": 1}'
CIFAR = {
    "spatial-gpu": f"{TINY} --epochs 8 --channels 8,8 --latent-dim 4x7x7",
    "hierarchical-gpu": f"{TINY} --epochs 1 --model-options {shlex.quote(TINY_LEVELS)}",
}
TINY_BUDGET = "from vaelib import cli as c; c.BUDGETS['gpu'] = type(c.BUDGETS['gpu'])({1: 2, 5: 1, 50: 1}, num_samples=5); c.main()"


@dataclass(frozen=True)
class Job:
    """A command, and the entry of a ledger file that says that it is done.

    Attributes:
        command: run in the repository's root; it writes the entry itself, unless there is an `outcome`.
        key: of the entry in the file `ledger`; None where the file is the entry.
        result: metrics of the entry -> what the table says.
        least: seconds below which it is not worth a start.
        folder: where its checkpoint and history are, from which it is resumed; None where it starts again.
        outcome: its output -> the metrics of the entry.
        done: whether an entry with these metrics is what was wanted.
    """

    name: str
    command: list[str]
    ledger: Path
    key: str | None
    result: Callable[[dict[str, Any]], str]
    least: float = 45.0
    folder: Path | None = None
    outcome: Callable[[str], dict[str, Any]] | None = None
    done: Callable[[dict[str, Any]], bool] = lambda metrics: True
    environment: dict[str, str] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any] | None:
        """Those of its entry; None where there is none."""
        found = read_object("ledger", self.ledger) if self.ledger.exists() else {}
        made = found if self.key is None else found.get(self.key)
        return made["metrics"] if made else None

    def epochs(self) -> int:
        """How many are done."""
        history = self.folder and self.folder / "history.jsonl"
        return len(history.read_text().splitlines()) if history and history.exists() else 0


class Line(NamedTuple):
    """A row of the table."""

    job: str
    state: str
    result: str = ""
    seconds: float = 0.0


def tests_of(output: str) -> dict[str, Any]:
    """pytest's last line -> how many tests passed, failed, had errors and were skipped."""
    last = re.findall(r"^.* in [\d.]+s.*$", output, re.MULTILINE)[-1:]
    return {word: sum(map(int, re.findall(rf"(\d+) {word}", "".join(last)))) for word in ("passed", "failed", "error", "skipped")}


def rates_of(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {metrics[name]['images_per_second']['fit']} images/s" for name in ("mnist", "cifar"))


def bits_of(metrics: dict[str, Any]) -> str:
    return f"{metrics['test']['bits_per_dim']:.3f} bits/dim"


def nats_of(metrics: dict[str, Any]) -> str:
    paper = f", the paper's {metrics['paper_nll']}" if metrics["paper_nll"] else ""
    return f"{metrics['nll']:.2f} ± {metrics['nll_standard_error']:.2f} nats{paper}"


def all_jobs(results: Path, runs: Path, rehearse: bool) -> list[Job]:
    """The table of jobs. A relative `results` or `runs` is one of the repository, and named so in the ledger."""
    python, at = sys.executable, ROOT / results
    jobs = [
        Job(
            "gpu-tests", [python, "-m", "pytest", "tests/test_step.py" if rehearse else "tests", "-m", "gpu", "--color", "no"],
            at / "gpu.json", "gpu-tests", lambda m: ", ".join(f"{number} {word}" for word, number in m.items()),
            outcome=tests_of, done=lambda m: (m["passed"] or rehearse) and not m["failed"] + m["error"],
        ),
        Job(
            "train-throughput-gpu",
            [python, "benchmarks/train_throughput.py", "--entry", "train-throughput-gpu"]
            + (["--rehearse", "--rounds", "1"] if rehearse else ["--rounds", "4"]),
            at / "train-throughput-gpu.json", None, rates_of, least=180.0, environment={"VAELIB_RESULTS": str(at)},
        ),
    ]  # fmt: skip
    for name, tiny in CIFAR.items():
        command = [python, "book/_scripts/rows.py", name, "--ledger", str(results / "cifar-rows.json"), "--runs", str(runs)]
        command += ["--data", "digits", "--further", tiny] if rehearse else []
        jobs.append(Job(name, command, at / "cifar-rows.json", name, bits_of, folder=ROOT / runs / "rows" / name))
    for row in [IWAE[0], IWAE[4]] if rehearse else IWAE:  # of ten alike
        data, (layers, objective, k) = "digits" if rehearse else "mnist", row
        key = f"{data}-{layers}-{objective}-{k}.gpu"
        command = [python, *(["-c", TINY_BUDGET] if rehearse else ["-m", "vaelib"]), "reproduce", "iwae"]
        command += f"--budget gpu --data {data} --layers {layers} --objective {objective} -k {k} --json".split()
        command += ["--ledger", str(results / "iwae.json"), "--out", str(runs / "iwae")]
        jobs.append(Job(key, command, at / "iwae.json", key, nats_of, folder=ROOT / runs / "iwae" / key))
    if rehearse:  # the CPU, whatever there is; a start is never too late
        jobs = [Job(**vars(job) | {"least": 0.0, "environment": job.environment | {"CUDA_VISIBLE_DEVICES": ""}}) for job in jobs]
    return jobs


def work(job: Job, left: Callable[[], float], log: Path) -> tuple[int, bool]:
    """Run the job's command, in less than `left()` seconds: its exit status, and whether it was told to end."""
    environment = os.environ | job.environment
    with (
        log.open("wb") as file,
        subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True) as process,
        suppress(ProcessLookupError),  # all of them have ended
    ):
        while process.poll() is None and left() > GRACE:
            time.sleep(0.1)
        cut = process.poll() is None
        if cut:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, cut


def run(job: Job, left: Callable[[], float], logs: Path) -> Line:
    """Do the job, or a part of it."""
    began, log = time.monotonic(), writable_folder("logs", logs) / f"{job.name}.log"
    status, cut = work(job, left, log)
    seconds, output = time.monotonic() - began, log.read_text(errors="replace")
    if status != 0 and (cut or status == 130):
        stands = f"after epoch {job.epochs()}" if job.folder else ""
        return Line(job.name, "cut, resumes" if job.folder else "cut, starts again", stands, seconds)
    if job.outcome:
        made = entry(shlex.join(["python", *job.command[1:]]), 0, seconds, job.outcome(output))
        found = read_object("ledger", job.ledger) if job.ledger.exists() else {}
        write_text(job.ledger, json.dumps(found | {job.key: made}, indent=2) + "\n")
    metrics = job.metrics()
    if metrics is not None and status == 0 and job.done(metrics):
        return Line(job.name, "done", job.result(metrics), seconds)
    said = job.result(metrics) if job.outcome and metrics else output.strip().rpartition("\n")[2]
    return Line(job.name, "failed", f"status {status}: {said[:100]}", seconds)


def do(jobs: list[Job], left: Callable[[Job], float], logs: Path, again: bool = False) -> list[Line]:
    """Do the jobs in their order while there is time, but, unless `again`, for those that the ledger has."""
    lines = []
    for job in jobs:
        metrics = None if again else job.metrics()
        if metrics is not None and job.done(metrics):
            lines.append(Line(job.name, "was done", job.result(metrics)))
        elif left(job) < job.least + GRACE:
            lines.append(Line(job.name, "not run", f"after epoch {job.epochs()}" if job.epochs() else ""))
        else:
            lines.append(run(job, lambda job=job: left(job), logs))
            print(f"{job.name}: {lines[-1].state}", flush=True)
    return lines


def table(lines: list[Line]) -> str:
    """The lines, aligned."""
    rows = [Line._fields] + [(*line[:3], f"{line.seconds:.0f}" if line.seconds else "") for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[3].rjust(7)]).rstrip() for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="jobs to do, even if they were done; default: those that are missing")
    parser.add_argument("--minutes", type=float, default=12.0, help="after which all has ended; default: 12")
    parser.add_argument("--rehearse", action="store_true", help="all of them on the CPU, small, into a temporary folder")
    asked = parser.parse_args()
    jobs = all_jobs(Path("results"), Path("runs"), rehearse=False)
    if not 0 < asked.minutes < math.inf:
        parser.error(f"minutes: got {asked.minutes}, expected a positive number")
    if unknown := set(asked.names) - {job.name for job in jobs}:
        parser.error(f"names: got {', '.join(sorted(unknown))}, expected some of {', '.join(job.name for job in jobs)}")
    if not asked.rehearse and not torch.cuda.is_available():
        print("gpu: found no CUDA device, expected one; --rehearse does the same jobs on the CPU, small", file=sys.stderr)
        return 2
    end, told = time.monotonic() + 60 * asked.minutes, []
    for number in (signal.SIGINT, signal.SIGTERM):  # a job is in a session of its own, and hears of them through `left`
        signal.signal(number, lambda *_: told.append(True))

    def left(job: Job) -> float:
        return 0.0 if told else end - time.monotonic()

    if asked.rehearse:
        with tempfile.TemporaryDirectory() as folder:
            jobs = all_jobs(Path(folder), Path(folder) / "runs", rehearse=True)
            cut_off = [job for job in jobs if job.name == "spatial-gpu"]
            lines = do(cut_off, lambda job: min(left(job), GRACE if job.epochs() else math.inf), Path(folder))
            lines += do(jobs, left, Path(folder))
    else:
        wanted = [job for job in jobs if not asked.names or job.name in asked.names]
        lines = do(wanted, left, ROOT / "runs" / "gpu", again=bool(asked.names))
    print(table(lines))
    return 130 if told else int(any(line.state == "failed" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
