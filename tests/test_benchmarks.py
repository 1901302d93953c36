"""The benchmarks still run with the library that they measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_search_benchmark_runs_and_compares_like_with_like():
    pytest.importorskip("faiss", reason="the approximate methods are FAISS's: pip install faiss-cpu")
    command = [sys.executable, "benchmarks/retrieval.py", "--size", "3000", "--flat", "3000", "--rounds", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    metrics = json.loads(done.stdout)["metrics"]
    rates = metrics["flat"]["queries_per_second"]
    assert set(rates) == {f"{who}, {size} a call" for who in ("vaelib", "faiss flat") for size in (1000, 100)}
    assert metrics["flat"]["same_neighbours"] > 0.999
    for method in ("hnsw", "ivf_pq"):
        efforts = metrics["methods"][method]["efforts"].values()
        assert max(row["recall_at_10"] for row in efforts) > 0.9


def test_the_training_benchmark_is_rehearsed_on_bundled_images_and_entered_under_the_name_that_it_is_given(tmp_path):
    command = [sys.executable, "benchmarks/train_throughput.py", "mnist", "--rehearse", "--rounds", "1", "--device", "cpu"]
    environment = os.environ | {"VAELIB_RESULTS": str(tmp_path), "VAELIB_DATA": str(tmp_path / "none")}
    subprocess.run([*command, "--entry", "other"], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
    entry = json.loads((tmp_path / "other.json").read_text())
    assert "--entry other --rehearse" in entry["command"]
    assert set(entry["metrics"]["mnist"]["images_per_second"]) == {"fit", "fit, bf16", "matrix products"}


def test_a_step_of_the_hierarchical_model_passes_over_memory_no_more_often_than_it_need():
    options = {"levels": [[2, 1], [2, 3]], "width": 128, "bottleneck": 4, "blocks": 1, "likelihood": "discretized_logistic"}
    command = [sys.executable, "benchmarks/memory_passes.py", "--batch", "1", "--model-options", json.dumps(options)]
    report = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    found = report["megabytes_per_image"]
    assert found == pytest.approx(sum(report["forward"].values()) + sum(report["backward"].values()))
    assert 80 < found < 110  # 152 before the branches of a group shared their activation and its sums were one convolution
