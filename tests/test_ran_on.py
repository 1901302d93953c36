"""The page that says where the chapters ran."""

import copy
import json

from test_book import BOOK, CHAPTERS, ROOT, load_script

ran_on = load_script("ran_on")
RUNS = json.loads((ROOT / "results" / "ran-on.json").read_text(encoding="utf-8"))


def test_the_committed_page_is_what_the_script_writes():
    assert (BOOK / "ran-on.md").read_text(encoding="utf-8") == ran_on.page(RUNS)


def test_every_chapter_has_one_row():
    rows = [line for line in ran_on.page(RUNS).splitlines() if line.startswith("| [](")]
    assert [row.split("](")[1].split(".ipynb")[0] for row in rows] == CHAPTERS


def test_a_run_on_a_gpu_or_without_a_commit_says_so():
    runs = copy.deepcopy({"elbo": RUNS["elbo"]})
    runs["elbo"]["hardware"] |= {"gpu": "Tesla T4", "threads": 1}
    runs["elbo"]["commit"] = None
    row = next(line for line in ran_on.page(runs).splitlines() if line.startswith("| []("))
    assert "1 thread, Tesla T4 |" in row
    assert row.endswith("| not known |")


def test_a_commit_is_short_and_keeps_its_changes():
    assert ran_on.short("0123456789ab+changes") == "0123456+changes"
    assert ran_on.short("0123456789ab") == "0123456"
