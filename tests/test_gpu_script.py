"""`make gpu`: which jobs are done and in which order, the deadline, what a cut leaves behind, what the table and the status say."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_book import ROOT, load_script

from vaelib.book.reproduce import PAPER

gpu, rows = load_script("gpu"), load_script("rows")
ENTER = "import json, pathlib; p = pathlib.Path({ledger!r}); d = json.loads(p.read_text()) if p.exists() else {{}}; "
ENTER += "p.write_text(json.dumps(d | {{{name!r}: {{'metrics': {{'order': len(d)}}}}}}))"
# says that it is there, and takes two tenths of a second for its checkpoint after Ctrl-C
LONG = """
import pathlib, sys, time
try:
    pathlib.Path({started!r}).touch(); time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.2); pathlib.Path({saved!r}).touch(); sys.exit(130)
"""
# hears nothing, and neither does the process that it started
DEAF = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({started!r}).write_text(str(child.pid)); time.sleep(60)
"""


@pytest.fixture
def job(tmp_path):
    """name, code -> a job that runs this code of Python, with the ledger rows.json."""

    def make(name, code=ENTER, **options):
        ledger = tmp_path / "rows.json"
        paths = {"ledger": str(ledger), "name": name, "started": str(tmp_path / "started"), "saved": str(tmp_path / "saved")}
        command = [sys.executable, "-c", code.format(**paths)]
        return gpu.Job(name, command, ledger, name, lambda m: f"number {m['order']}", **{"least": 1.0} | options)

    return make


@pytest.fixture
def plenty():
    return lambda job: 1000.0


@pytest.fixture
def until_started(tmp_path):
    """A clock whose time is up as soon as the job has started."""
    return lambda job: gpu.GRACE if (tmp_path / "started").exists() else 1000.0


@pytest.fixture
def main(monkeypatch, tmp_path):
    """jobs, arguments -> the exit status of the script with these jobs, as on a machine with a GPU."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)

    def call(jobs, *arguments):
        monkeypatch.setattr(gpu, "all_jobs", lambda *_, **__: jobs)
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        return gpu.main()

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def states(lines):
    return {line.job: line.state for line in lines}


def test_tests_and_benchmark_come_first_then_the_cifar_rows_then_the_whole_table_of_the_paper():
    jobs = gpu.all_jobs(Path("results"), Path("runs"), rehearse=False)
    names = [job.name for job in jobs]
    assert names[:4] == ["gpu-tests", "train-throughput-gpu", "spatial-gpu", "hierarchical-gpu"]
    assert names[4:7] == ["mnist-1-vae-1.gpu", "mnist-1-iwae-5.gpu", "mnist-1-iwae-50.gpu"]
    assert len(set(names)) == len(names) == 4 + len(PAPER)


def test_no_job_writes_over_the_record_of_a_cpu_and_none_names_a_folder_of_this_machine():
    for job in gpu.all_jobs(Path("results"), Path("runs"), rehearse=False):
        entry = job.key or job.ledger.stem
        assert entry.endswith("gpu") or entry == "gpu-tests"
        assert job.ledger.parent == ROOT / "results"
        assert not any(argument.startswith("/") for argument in job.command[1:])
        assert job.folder is None or (ROOT / "runs") in job.folder.parents
    assert set(gpu.CIFAR) <= set(rows.GPU_ROWS)
    assert not set(rows.GPU_ROWS) & (set(rows.ROWS) | set(rows.PPCA) | set(rows.LINEAR))


def test_a_rehearsal_has_every_kind_of_job_and_a_few_of_those_that_are_alike(tmp_path):
    real, small = gpu.all_jobs(Path("results"), Path("runs"), False), gpu.all_jobs(tmp_path, tmp_path / "runs", True)
    assert [job.name for job in small[:4]] == [job.name for job in real[:4]]
    assert [job.name for job in small[4:]] == ["digits-1-vae-1.gpu", "digits-2-iwae-5.gpu"]
    assert all(job.ledger.parent == tmp_path and job.environment["CUDA_VISIBLE_DEVICES"] == "" for job in small)


def test_what_the_ledger_has_is_left_out_and_the_rest_done_in_order(job, plenty, tmp_path):
    (tmp_path / "rows.json").write_text('{"b": {"metrics": {"order": 7}}}')
    lines = gpu.do([job("a"), job("b"), job("c")], plenty, tmp_path)
    assert [tuple(line)[:3] for line in lines] == [
        ("a", "done", "number 1"),
        ("b", "was done", "number 7"),
        ("c", "done", "number 2"),
    ]
    assert states(gpu.do([job("b")], plenty, tmp_path, again=True)) == {"b": "done"}


def test_a_job_is_not_begun_where_too_little_time_is_left(job, tmp_path):
    jobs = [job("long", least=50.0), job("short", least=5.0)]
    assert states(gpu.do(jobs, lambda job: gpu.GRACE + 10, tmp_path)) == {"long": "not run", "short": "done"}


def test_when_the_time_is_up_a_job_has_the_grace_to_write_its_checkpoint(job, until_started, tmp_path):
    (tmp_path / "rows.json").write_text('{"old": {}}')
    began = time.monotonic()
    lines = gpu.do([job("a", LONG, folder=tmp_path), job("b", LONG)], until_started, tmp_path)
    assert states(lines) == {"a": "cut, resumes", "b": "not run"}
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - began < 15
    assert (tmp_path / "rows.json").read_text() == '{"old": {}}'  # nothing of what was cut is in the ledger


def test_after_the_grace_a_job_is_killed_with_all_that_it_started(job, until_started, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    lines = gpu.do([job("a", DEAF)], until_started, tmp_path)
    assert states(lines) == {"a": "cut, starts again"}
    child = Path("/proc") / (tmp_path / "started").read_text() / "stat"
    if child.parents[1].exists():
        time.sleep(0.2)
        assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_job_that_fails_stops_no_other_and_the_status_says_so(job, main, capsys):
    jobs = [job("a", "raise SystemExit('no such data')"), job("b"), job("c", "pass")]
    assert main(jobs) == 1
    printed = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line for line in printed[-3:]}
    assert "failed" in table["a"]
    assert "status 1: no such data" in table["a"]
    assert "done" in table["b"]
    assert "failed" in table["c"]  # it ended well, and entered nothing
    assert main([job("b")]) == 0


def test_a_job_that_is_named_is_done_alone_and_again(job, main, tmp_path):
    assert main([job("a"), job("b")], "b") == 0
    assert set(json.loads((tmp_path / "rows.json").read_text())) == {"b"}
    assert main([job("a"), job("b", "raise SystemExit(3)")], "b") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c"], "names: got c, expected some of a, b"),
        (["--minutes", "0"], "minutes: got 0.0, expected a positive number"),
        (["--minutes", "nan"], "minutes: got nan, expected a positive number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(job, main, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main([job("a"), job("b")], *arguments)
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so_in_one_line_and_does_nothing(job, main, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([job("a")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "found no CUDA device" in said.err
    assert not (tmp_path / "rows.json").exists()


def test_ctrl_c_ends_the_job_as_the_deadline_does_and_the_table_is_printed(job, main, monkeypatch, capsys, tmp_path):
    pause = time.sleep

    def press(seconds):
        if (tmp_path / "started").exists():
            signal.raise_signal(signal.SIGINT)
        pause(seconds)

    monkeypatch.setattr(time, "sleep", press)
    assert main([job("a", LONG, folder=tmp_path), job("b")]) == 130
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-2:]] == [["a", "cut,"], ["b", "not"]]
    assert (tmp_path / "saved").exists()


def test_the_outcome_of_the_tests_is_entered_beside_what_is_there_and_done_only_if_all_passed(job, plenty, tmp_path):
    (tmp_path / "rows.json").write_text('{"old": 1}')
    for said, status, state in (("1 failed, 2 passed, 9 deselected", 1, "failed"), ("3 passed, 1 skipped", 0, "done")):
        code = f"print('warned in 3 tests'); print('{said} in 4.25s'); raise SystemExit({status})"
        options = {"outcome": gpu.tests_of, "done": lambda m: not m["failed"]}
        tests = gpu.Job(**vars(job("gpu-tests", code, **options)) | {"result": str})
        assert states(gpu.do([tests], plenty, tmp_path)) == {"gpu-tests": state}
        found = json.loads((tmp_path / "rows.json").read_text())
        assert set(found) == {"old", "gpu-tests"}
        assert {"command", "seed", "commit", "date", "versions", "hardware", "seconds", "metrics"} <= set(found["gpu-tests"])
    assert found["gpu-tests"]["metrics"] == {"passed": 3, "failed": 0, "error": 0, "skipped": 1}
    assert gpu.tests_of("2 errors in 1.00s")["error"] == 2
    assert set(gpu.tests_of("nothing").values()) == {0}


def test_a_row_that_the_deadline_cut_goes_on_where_it_stood(tmp_path, plenty):
    row = gpu.all_jobs(tmp_path, tmp_path / "runs", rehearse=True)[4]
    row.command[2] = row.command[2].replace("1: 2,", "1: 15,")
    cut = gpu.do([row], lambda job: gpu.GRACE if job.epochs() else 1000.0, tmp_path)
    assert states(cut) == {row.name: "cut, resumes"}
    assert 1 <= row.epochs() < 15
    assert cut[0].result == f"after epoch {row.epochs()}"
    assert not row.ledger.exists()
    first = (row.folder / "history.jsonl").read_text().splitlines()[0]
    assert states(gpu.do([row], plenty, tmp_path)) == {row.name: "done"}
    assert row.metrics()["epochs"] == row.epochs() == 15
    assert (row.folder / "history.jsonl").read_text().splitlines()[0] == first  # its seconds too: it was not trained again
    assert states(gpu.do([row], plenty, tmp_path)) == {row.name: "was done"}


@pytest.mark.parametrize("pressed", [True, False])
def test_a_row_of_cifar_that_is_cut_waits_for_the_checkpoint_of_its_training(pressed, tmp_path, monkeypatch):
    train, saved = tmp_path / "train", tmp_path / "saved"
    train.write_text(f"#!/bin/sh\nsleep 0.5\ntouch {saved}\nexit 130\n")
    train.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(train))

    def press(*_):
        raise KeyboardInterrupt

    if pressed:
        monkeypatch.setattr(subprocess.Popen, "communicate", press)
    with pytest.raises(KeyboardInterrupt):
        rows.vaelib("train")
    assert saved.exists()
