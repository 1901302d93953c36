"""Several processes follow the trajectory of one; only one writes; a failed one ends the run with a message."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vaelib.cli import main
from vaelib.distributed import Group

ROOT = Path(__file__).parent.parent
# batches of 7 and a last one of a single image: shares of unequal size, and one process with nothing of its own
TRAIN = (
    "train", "--data", "digits", "--hidden", "16", "--latent-dim", "3", "--epochs", "1", "--batch-size", "7", "--valid-size", "1352",
    "--optimizer", "SGD", "--learning-rate", "1e-4", "--flip", "--free-bits", "0.05", "--ema-decay", "0.9", "--device", "cpu",
)  # fmt: skip


def torchrun(*arguments, **environment):
    """`vaelib ...` in two processes, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vaelib"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=250, env=environment)


def alone(*arguments):
    """`vaelib ...` in this process: the JSON object that it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["vaelib", *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            main()
    return json.loads(printed.getvalue())


def one_of_two(rank, port, arguments, out):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with out.with_suffix(f".{rank}").open("w") as file, contextlib.redirect_stdout(file):
        sys.argv = ["vaelib", *map(str, arguments)]
        main()


def in_two(*arguments, out):
    """The same in two processes without the seconds that each takes to load torch: they are forked from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vaelib", "vaelib.training", "sklearn.datasets", "torch._dynamo", "torch.optim"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=one_of_two, args=(rank, port, (*arguments, "--out", out), out)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return json.loads(out.with_suffix(".0").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {processes: tmp_path_factory.mktemp(f"processes-{processes}") / "run" for processes in (1, 2)}
    assert alone(*TRAIN, "--out", folders[1], "--json")["processes"] == 1
    assert in_two(*TRAIN, "--json", out=folders[2])["processes"] == 2
    assert folders[2].with_suffix(".1").read_text() == ""  # one process prints, once
    return folders


def test_two_processes_follow_the_trajectory_of_one_at_the_same_global_batch(runs):
    one, two = (load_file(folder / "model.safetensors") for folder in runs.values())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    first, second = (json.loads((folder / "history.jsonl").read_text()) for folder in runs.values())
    for key in set(first) - {"seconds"}:
        assert second[key] == pytest.approx(first[key], rel=1e-5), key


def test_two_processes_share_the_running_means_of_a_codebook(tmp_path):
    sizes = '{"num_codes": 4, "code_dim": 2, "width": 8, "narrow": 4, "blocks": 1, "restart": 0.0, "scale": 1.0}'
    options = ("--epochs", "1", "--batch-size", "8", "--valid-size", "1420", "--optimizer", "SGD", "--learning-rate", "1e-5")
    arguments = ("train", "--data", "digits", "--model", "vq", "--likelihood", "bernoulli", "--model-options", sizes, *options)
    alone(*arguments, "--device", "cpu", "--out", tmp_path / "1", "--json")
    in_two(*arguments, "--device", "cpu", "--json", out=tmp_path / "2")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    assert (one["prior.codebook.counts"] - 1).abs().max() > 0.01
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_the_first_process_alone_writes(runs):
    names = ["checkpoint.pt", "config.json", "history.jsonl", "model.safetensors", "run.json"]
    for folder in runs.values():
        assert sorted(path.name for path in folder.iterdir()) == names


def fails_at(tmp_path, batch, rank):
    """A folder for PYTHONPATH with which the process of this rank fails at a batch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"if os.environ.get('RANK') == '{rank}':\n"
        "    import vaelib\n"
        "    observe, calls = vaelib.Bernoulli.observe, []\n"
        "    def fails(self, *args, **kwargs):\n"
        "        calls.append(1)\n"
        f"        if len(calls) > {batch}: raise RuntimeError('this GPU fell off the bus')\n"
        "        return observe(self, *args, **kwargs)\n"
        "    vaelib.Bernoulli.observe = fails\n"
    )
    return str(tmp_path)


def test_a_failed_process_ends_the_run_with_a_clear_message_and_it_goes_on_with_two_or_with_one(runs, tmp_path):
    often = ("--checkpoint-minutes", "1e-9")
    done = torchrun(*TRAIN, *often, "--out", tmp_path / "run", PYTHONPATH=f"{fails_at(tmp_path, 9, 1)}{os.pathsep}{ROOT}")
    assert done.returncode != 0
    assert "vaelib: error (process 1 of 2): this GPU fell off the bus" in done.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    told = in_two(*TRAIN, *often, "--resume", "--json", out=tmp_path / "run")
    again = alone(*TRAIN, *often, "--out", tmp_path / "again", "--resume", "--json")
    assert told["steps"] == again["steps"] < 21  # of 21, some nine were done
    expected = load_file(runs[1] / "model.safetensors")
    for folder in ("run", "again"):
        for name, value in load_file(tmp_path / folder / "model.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shares_of_a_batch_are_disjoint_complete_and_weighted_by_their_size(count, size):
    values = torch.arange(1.0, count + 1)
    groups = [Group(rank, size) for rank in range(size)]
    counted = [values[group.share(count)] for group in groups if group.weight(count)]
    assert sorted(torch.cat(counted).tolist()) == values.tolist()
    average = sum(group.weight(count) * values[group.share(count)].mean() for group in groups) / size
    assert average.item() == pytest.approx(values.mean().item())


def test_without_torchrun_the_group_has_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    from vaelib.distributed import join

    assert join(torch.device("cpu")) == Group(0, 1)
    assert Group().leads
    assert torch.equal(Group().sum(torch.ones(2)), torch.ones(2))
