"""What the chapter on mistakes says of its rows: damage beyond chance, a symptom that tells, a refined q, a collapse that is one."""

import json
import subprocess
import sys

import pytest
from test_book import ROOT, load_script

METRICS = json.loads((ROOT / "results" / "mistakes.json").read_text())["metrics"]
SEEDS = json.loads((ROOT / "results" / "mistakes-rows.json").read_text())
EVERY_SEED = {"0": METRICS} | {seed: record["metrics"] for seed, record in SEEDS.items()}
WRONG = [
    key for key, row in METRICS["rows"].items() if "decoder_damage" in row and row["twin"] != key and not key.startswith("beta")
]


def values(*path):
    """What stands there in each training."""
    found = []
    for metrics in EVERY_SEED.values():
        for key in path:
            metrics = metrics[key]
        found.append(metrics)
    return found


def test_the_chapter_rests_on_three_trainings():
    assert sorted(EVERY_SEED) == ["0", "1", "2"]
    assert METRICS["trainings"] == 3
    for key in ("right", "no-kl", "density", "own-output"):
        assert METRICS["three"][key]["elbo"]["each"] == values("rows", key, "elbo")


def test_every_trained_row_is_judged_with_a_refined_q_too():
    assert len(WRONG) >= 24
    for key in WRONG:
        assert METRICS["rows"][key]["decoder_damage_standard_error"] >= 0, key


@pytest.mark.parametrize("key", METRICS["symptoms"])
def test_a_symptom_lies_outside_what_the_right_model_shows_in_each_training(key):
    right, wrong = values("symptoms", key, "right"), values("symptoms", key, "wrong")
    assert min(wrong) > max(right) or max(wrong) < min(right)


def test_most_of_what_noise_of_the_variance_costs_is_the_label_of_q():
    row = METRICS["rows"]["noise-variance"]
    assert row["damage_as_trained"] < row["damage"]
    assert row["decoder_damage"] < row["damage"] / 2
    decoded = METRICS["rows"]["mean-decoded"]
    assert decoded["decoder_damage"] < decoded["damage"] / 20


def test_only_the_likelihood_counted_twice_does_no_more_damage_than_chance():
    right = values("rows", "right", "elbo")
    spread = max(right) - min(right)
    trained = [key for key in WRONG if " " not in key]
    assert {key for key in trained if min(values("rows", key, "damage")) < 2 * spread} == {"twice"}


@pytest.mark.parametrize("seed", sorted(EVERY_SEED))
def test_the_collapse_is_one_and_of_the_two_kinds_that_the_text_names(seed):
    tracks = EVERY_SEED[seed]["progress"]
    dear = tracks["dear, from right"]["rate"]
    assert dear[0] > 20
    assert dear[-1] < 0.02  # the optimum: a start with a high rate does not hold it
    mended, restarted, warm, free = (
        {term: tracks[name][term][-1] for term in ("rate", "elbo")}
        for name in ("mended", "from a high rate", "mended, warm-up", "mended, free bits")
    )
    assert mended["rate"] < 1 < 10 < restarted["rate"]
    assert restarted["elbo"] > mended["elbo"] + 0.5  # the optimization: the objective is higher with the code
    assert warm["rate"] < restarted["rate"] / 2  # "neither cures"
    assert free["elbo"] < mended["elbo"]


def test_the_script_runs_the_chapters_own_cells_with_another_seed():
    cells = list(load_script("mistakes_rows").training_cells())
    assert sum("SEED = 0" in source for source in cells) == 1
    code = "\n".join(["FAST = True", *(source for source in cells if "%pip" not in source)])
    for key in ("noise-variance", "twice", "mean-latents", "one-noise", "sampled-codes"):
        assert key in code
    assert "refined_elbos" not in code  # it stops where the chapter measures no more
    unknown = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise", "-"]
    found = subprocess.run(unknown, input=code, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout  # no name of theirs comes from a cell that is left out
