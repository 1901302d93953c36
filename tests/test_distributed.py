"""Several processes follow the trajectory of one; only one writes; a failed one ends the run with a message."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from vaelib.distributed import Group

# batches of 7 and a last one of a single image: shares of unequal size, and one process with nothing of its own
TRAIN = (
    "train", "--data", "digits", "--hidden", "16", "--latent-dim", "3", "--epochs", "1", "--batch-size", "7", "--valid-size", "1352",
    "--optimizer", "SGD", "--learning-rate", "1e-4", "--flip", "--free-bits", "0.05", "--ema-decay", "0.9", "--device", "cpu",
)  # fmt: skip


def launch(processes, *arguments, **environment):
    """`vaelib ...` in one process, or through torchrun in several."""
    runner = [] if processes == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.run(
        [sys.executable, "-m", *runner, "vaelib", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"processes-{processes}") / "run"
        done = launch(processes, *TRAIN, "--out", folders[processes], "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["processes"] == processes  # one process prints, once
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
    models = []
    for processes in (1, 2):
        arguments = ("train", "--data", "digits", "--model", "vq", "--likelihood", "bernoulli", "--model-options", sizes)
        done = launch(processes, *arguments, *options, "--device", "cpu", "--out", tmp_path / str(processes), "--json")
        assert done.returncode == 0, done.stderr
        models.append(load_file(tmp_path / str(processes) / "model.safetensors"))
    one, two = models
    assert (one["prior.codebook.counts"] - 1).abs().max() > 0.01
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_the_first_process_alone_writes(runs):
    names = ["checkpoint.pt", "config.json", "history.jsonl", "model.safetensors", "run.json"]
    for folder in runs.values():
        assert sorted(path.name for path in folder.iterdir()) == names


def fails_at(tmp_path, batch, ranks):
    """A folder for PYTHONPATH with which these ranks fail at a batch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        f"if os.environ.get('RANK') in {ranks}:\n"
        "    import vaelib\n"
        "    observe, calls = vaelib.Bernoulli.observe, []\n"
        "    def fails(self, *args, **kwargs):\n"
        "        calls.append(1)\n"
        f"        if len(calls) > {batch}: raise RuntimeError('this GPU fell off the bus')\n"
        "        return observe(self, *args, **kwargs)\n"
        "    vaelib.Bernoulli.observe = fails\n"
    )
    return str(tmp_path)


def test_a_run_of_two_processes_that_was_cut_off_goes_on_with_two_or_with_one(runs, tmp_path):
    often = ("--checkpoint-minutes", "1e-9")
    broken = fails_at(tmp_path, 9, ("0", "1"))
    assert launch(2, *TRAIN, *often, "--out", tmp_path / "run", PYTHONPATH=broken).returncode != 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    expected = load_file(runs[1] / "model.safetensors")
    for processes, folder in ((2, "run"), (1, "again")):
        done = launch(processes, *TRAIN, *often, "--out", tmp_path / folder, "--resume", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] < 21  # of 21, nine were done
        for name, value in load_file(tmp_path / folder / "model.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_failed_process_ends_the_run_with_a_clear_message(tmp_path):
    done = launch(2, *TRAIN, "--out", tmp_path / "run", PYTHONPATH=fails_at(tmp_path, 5, ("1",)))
    assert done.returncode != 0
    assert "vaelib: error (process 1 of 2): this GPU fell off the bus" in done.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


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
