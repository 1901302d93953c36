"""A table says the numbers of a ledger, in a form for each place where it is read."""

import json

import pytest
from bs4 import BeautifulSoup

from vaelib.book.ledger import finished
from vaelib.book.tables import Table, cell_text, ledger_table

ROWS = {
    "small": {"metrics": {"elbo": {"mean": -101.5, "deviation": 0.7, "each": [-101.0, -102.0]}, "active": 12}},
    "large": {"metrics": {"elbo": {"mean": -99.0, "deviation": None, "each": [-99.0]}}},
}
COLUMNS = {"ELBO": "metrics/elbo", "active units": "metrics/active"}


@pytest.fixture
def shown(tmp_path):
    ledger = tmp_path / "rows.json"
    ledger.write_text(json.dumps(ROWS))
    titles = {"784-100-20": "small", "784-400-20": "large", "784-<800>-20": "never"}
    return ledger_table(ledger, titles, COLUMNS, "Held-out ELBO, nats.", "tab-widths", "network", digits=[1, 0])


def test_a_ledgers_numbers_stand_under_their_titles_and_what_was_not_run_says_so(shown):
    assert shown.header == ["network", "ELBO", "active units"]
    assert shown.rows == [
        ["784-100-20", "−101.5 ± 0.7", "12"],
        ["784-400-20", "−99.0", "–"],
        ["784-<800>-20", "not run", "not run"],
    ]


def test_without_the_file_every_number_was_not_run(tmp_path):
    shown = ledger_table(tmp_path / "none.json", {"a": "small"}, COLUMNS, "Of nothing.", "tab-none", "network")
    assert shown.rows == [["a", "not run", "not run"]]


def test_finished_runs_have_their_metrics_by_name_and_without_the_file_there_are_none(tmp_path, monkeypatch):
    results, book, alone = tmp_path / "results", tmp_path / "book", tmp_path / "far" / "content"
    for folder in (results, book, alone):
        folder.mkdir(parents=True)
    (results / "rows.json").write_text(json.dumps(ROWS))
    (results / "one.json").write_text(json.dumps({"command": "make one", "seed": 0, "metrics": {"elbo": -99.0}}))
    assert finished("rows", results) == {"small": ROWS["small"]["metrics"], "large": ROWS["large"]["metrics"]}
    assert finished("one", str(results)) == {"one": {"elbo": -99.0}}
    monkeypatch.chdir(book)  # as a chapter runs
    assert finished("one") == {"one": {"elbo": -99.0}}
    assert finished("none") == {}
    monkeypatch.chdir(alone)  # as a chapter runs that was downloaded alone
    assert finished("one") == {}


def test_jupyter_gets_a_caption_and_header_cells_both_ways(shown):
    page = BeautifulSoup(shown._repr_mimebundle_()["text/html"], "html.parser")
    assert page.caption.text == "Held-out ELBO, nats."
    assert [cell.text for cell in page.select('th[scope="col"]')] == shown.header
    assert [cell.text for cell in page.select('th[scope="row"]')] == ["784-100-20", "784-400-20", "784-<800>-20"]
    assert [cell.text for cell in page.select("td")] == [cell for row in shown.rows for cell in row[1:]]


def test_the_page_gets_a_directive_that_sphinx_can_number(shown):
    text = shown._repr_mimebundle_()["text/markdown"]
    assert text.startswith(
        ":::{list-table} Held-out ELBO, nats.\n:header-rows: 1\n:stub-columns: 1\n:name: tab-widths\n\n* - network\n"
    )
    assert text.count("\n* - ") == 4
    assert text.count("\n  - ") == 8
    assert text.endswith("\n:::\n")


def test_as_text_the_columns_are_flush(shown):
    lines = str(shown).splitlines()
    assert lines[0] == "Held-out ELBO, nats."
    assert len({len(line) for line in lines[2:]}) == 1


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (-1234.567, "−1234.57"),
        (9999.6, "9999.60"),
        (-15974.127, "−15,974.13"),
        (60000, "60,000"),
        (8, "8"),
        (None, "–"),
        ("a word", "a word"),
        (True, "yes"),
        ([1.0, 3.0], "2.00 ± 1.41"),
        ([-2.5], "−2.50"),
    ],
)
def test_a_cell_is_written_as_the_book_writes_numbers(cell, text):
    assert cell_text(cell) == text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": [["only one"]]}, "rows: got 1 cells in row 0, expected 2"),
        ({"digits": [1]}, "digits: got 1, expected one number, or one for each of 2"),
        ({"name": "widths"}, "begins with 'tab-'"),
        ({"caption": ""}, "a sentence"),
        ({"header": ["", "b"]}, "a title for each column"),
    ],
)
def test_a_table_that_would_read_wrongly_is_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        Table(**({"header": ["a", "b"], "rows": [["x", 1.0]], "caption": "A table.", "name": "tab-x"} | changed))
