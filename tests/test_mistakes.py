"""What the chapter on mistakes says of its rows: damage beyond chance, a refined q, a collapse that is one."""

import json
import subprocess
import sys

import pytest
from test_book import ROOT, load_script

METRICS = json.loads((ROOT / "results" / "mistakes.json").read_text())["metrics"]
LEDGER = ROOT / "results" / "mistakes-rows.json"  # other seeds, where they were run
SEEDS = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
TRAINED = {key: row for key, row in METRICS["rows"].items() if row["rate"] is not None}
EVERY_SEED = {"0": METRICS} | {seed: record["metrics"] for seed, record in SEEDS.items()}


def test_every_trained_row_is_judged_with_a_refined_q_too():
    assert len(TRAINED) >= 30
    for key, row in TRAINED.items():
        assert row["refined_elbo"] is not None, key
        assert row["decoder_damage_standard_error"] >= 0, key
        twin = METRICS["rows"][row["twin"]]
        assert row["decoder_damage"] == pytest.approx(twin["refined_elbo"] - row["refined_elbo"], rel=1e-4, abs=1e-3), key


def test_most_of_what_noise_of_the_variance_costs_is_the_label_of_q():
    row = METRICS["rows"]["noise-variance"]
    assert row["damage_as_trained"] < row["damage"] / 2
    assert row["decoder_damage"] < row["damage"] / 2
    decoded = METRICS["rows"]["mean-decoded"]
    assert decoded["decoder_damage"] < decoded["damage"] / 20


def test_only_the_likelihood_counted_twice_does_no_more_damage_than_chance():
    right = [METRICS["rows"][key]["elbo"] for key in ("right", "right, seed 1", "right, seed 2")]
    assert max(right) - min(right) < 1
    wrong = {key: row for key, row in TRAINED.items() if not row["mistake"].startswith("none")}
    assert {key for key, row in wrong.items() if row["damage"] < 1} == {"twice"}


@pytest.mark.parametrize("seed", sorted(EVERY_SEED))
def test_the_collapse_is_one_and_of_the_two_kinds_that_the_text_names(seed):
    ends, tracks = (EVERY_SEED[seed][name] for name in ("collapse", "progress"))
    dear = tracks["too dear, from the right model"]["rate"]
    assert dear[0] > 20
    assert dear[-1] < 0.01  # the optimum: a start with a high rate does not hold it
    mended, restarted = ends["strong, mended"], ends["strong, from a high rate"]
    assert mended["rate"] < 1 < 10 < restarted["rate"]
    assert restarted["elbo"] > mended["elbo"] + 0.5  # the optimization: the objective is higher with the code
    assert ends["strong, mended, warm-up"]["rate"] < restarted["rate"] / 2  # "neither cures"
    assert ends["strong, mended, free bits"]["elbo"] < mended["elbo"]


def test_the_script_runs_the_chapters_own_cells_with_another_seed():
    cells = list(load_script("mistakes_rows").training_cells())
    assert sum("SEED = 0" in source for source in cells) == 1
    code = "\n".join(["FAST = True", *(source for source in cells if "%pip" not in source)])
    for key in ("noise-variance", "twice", "mean-latents", "one-noise"):
        assert key in code
    assert "judgement(" not in code  # it stops where the chapter stops training
    unknown = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise", "-"]
    found = subprocess.run(unknown, input=code, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout  # no name of theirs comes from a cell that is left out
