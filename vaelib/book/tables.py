"""The book's tables: numbered and captioned on the page, a plain table with header cells in Jupyter and Colab, text elsewhere."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vaelib._validation import check_int, describe

MISSING = "–"
NOT_RUN = "not run"


class Table:
    """Rows under a header, shown by a notebook as its cell's value; the first column names the rows.

    The page gets a directive of MyST, which Sphinx numbers and `{numref}` finds by `name`; Jupyter and Colab get HTML.

    Args:
        header: one title a column.
        rows: one cell a column: text, a number, None where there is nothing to say, or numbers of several trainings, of which the
            mean and the standard deviation are shown.
        caption: what the table shows and in which unit; it has to do without the text around it.
        name: of the table, as `tab-widths`.
        digits: behind the point, of each number that is no int; for all columns, or one a column.

    Raises:
        ValueError: If a row has not as many cells as the header, a title or the caption is empty, or the name does not begin with 'tab-'.
    """

    def __init__(
        self, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, name: str, digits: int | Sequence[int] = 2
    ) -> None:
        if not caption or not name.startswith("tab-") or not all(header):
            raise ValueError(
                f"header, caption, name: got {list(header)}, {caption!r} and {name!r}, expected a title for each column, a sentence, "
                "and a name that begins with 'tab-'"
            )
        places = [digits] * len(header) if isinstance(digits, int) else list(digits)
        if len(places) != len(header):
            raise ValueError(f"digits: got {len(places)}, expected one number, or one for each of {len(header)} columns")
        for number, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"rows: got {len(row)} cells in row {number}, expected {len(header)} as the header has")
        self.header, self.caption, self.name = list(header), caption, name
        self.rows = [[cell_text(cell, place) for cell, place in zip(row, places, strict=True)] for row in rows]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/markdown": self.directive(), "text/html": self.html(), "text/plain": str(self)}

    def directive(self) -> str:
        """As MyST, for the page."""
        lines = [f":::{{list-table}} {self.caption}", ":header-rows: 1", ":stub-columns: 1", f":name: {self.name}", ""]
        for row in (self.header, *self.rows):
            lines += [f"{'  -' if column else '* -'} {cell}".rstrip() for column, cell in enumerate(row)]
        return "\n".join([*lines, ":::", ""])

    def html(self) -> str:
        """As HTML with a caption, and with header cells that a screen reader reads out with each number."""
        head = "".join(f'<th scope="col">{escape(title)}</th>' for title in self.header)
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
            for row in self.rows
        )
        return f"<table><caption>{escape(self.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        text = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        return "\n".join([self.caption, "", *text])

    __repr__ = __str__


def cell_text(cell: Any, digits: int = 2) -> str:
    """A number as the book writes it: with a true minus sign, a comma at thousands from five digits on, and of several trainings
    "mean ± standard deviation".
    """
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Mapping):  # of a ledger: {"mean": ..., "deviation": ..., "each": [...]}
        cell = cell["each"]
    if isinstance(cell, Sequence):
        if len(cell) > 1:
            mean = cell_text(statistics.fmean(cell), digits)
            return f"{mean} ± {statistics.stdev(cell):.{digits}f}"
        (cell,) = cell
    places = 0 if isinstance(cell, int) else check_int("digits", digits, minimum=0)
    plain = f"{cell:.{places}f}"
    return (plain if abs(float(plain)) < 10_000 else f"{cell:,.{places}f}").replace("-", "−")


def ledger_table(
    ledger: str | Path, rows: Mapping[str, str], columns: Mapping[str, str], caption: str, name: str, first: str,
    digits: int | Sequence[int] = 2,
) -> Table:  # fmt: skip
    """A `Table` of what stands in `results/`: numbers of finished runs, none written by hand.

    A row or a file that is not there shows "not run" in each of its cells, a number that its row lacks shows a dash.

    Args:
        ledger: the file, a JSON object.
        rows: from a row's title to its key in the file; a key may be a path, with "/" between the steps.
        columns: from a column's title to the path below the row's key, as "metrics/elbo".
        caption, name: see `Table`.
        first: the title of the first column, as "network".
        digits: of the numbers, for all or one for each of `columns`.
    """
    path = Path(ledger)
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(record, Mapping):
        raise ValueError(f"ledger: got {describe(record)} in {path.name}, expected a JSON object")
    cells = [[title, *row_cells(follow(record, key), columns)] for title, key in rows.items()]
    places = digits if isinstance(digits, int) else [0, *digits]
    return Table([first, *columns], cells, caption, name, places)


def row_cells(row: Any, columns: Mapping[str, str]) -> list[Any]:
    """What stands at each column's path below a row; a row that is not there was not run."""
    return [NOT_RUN if row is None else follow(row, below) for below in columns.values()]


def follow(record: Any, path: str) -> Any:
    """What stands at "a/b/c" in nested objects and lists, or None."""
    for key in path.split("/"):
        if isinstance(record, Mapping):
            record = record.get(key)
        elif isinstance(record, Sequence) and not isinstance(record, str) and key.isdigit() and int(key) < len(record):
            record = record[int(key)]
        else:
            return None
    return record
