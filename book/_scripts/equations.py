"""The table of labelled equations: equation -> function whose docstring names it -> test that bears its label.

`make equations` prints it and exits with 1 where a label has no function or no test, or a function or test names a label that
the book does not have.
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LABEL = re.compile(r"^\$\$ \(([a-z0-9-]+)\)\s*$", re.MULTILINE)
NAMED = re.compile(r"eq\. ([a-z0-9]+(?:-[a-z0-9]+)*)")


def labels_in(path):
    """Labels of the display equations of a page, in order."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
    return LABEL.findall(text)


def pages():
    """The pages of the book, in the order of the table of contents."""
    names = re.findall(r"(?:root|file): (\S+)", (ROOT / "book" / "_toc.yml").read_text())
    return [path for name in names for suffix in (".ipynb", ".md") if (path := ROOT / "book" / (name + suffix)).exists()]


def functions():
    """Label -> the functions and classes of vaelib whose docstrings name it."""
    found = {}
    for path in sorted((ROOT / "vaelib").rglob("*.py")):
        tree = ast.parse(path.read_text())
        nodes = [(node, "") for node in tree.body]
        nodes += [(child, f"{node.name}.") for node in tree.body if isinstance(node, ast.ClassDef) for child in node.body]
        for node, prefix in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                for label in NAMED.findall(ast.get_docstring(node) or ""):
                    found.setdefault(label, []).append(f"{path.stem}.{prefix}{node.name}")
    return found


def tests():
    """Label -> the tests marked `@pytest.mark.equation(label)`."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.equation":
                    found.setdefault(mark.args[0].value, []).append(f"{path.stem}::{node.name}")
    return found


def table():
    """Rows (label, page, functions, tests) and the list of holes."""
    by_function, by_test = functions(), tests()
    rows, holes = [], []
    for page in pages():
        for label in labels_in(page):
            if label in [row[0] for row in rows]:
                holes.append(f"{label}: labelled twice")
            rows.append((label, page.stem, by_function.get(label, []), by_test.get(label, [])))
            if label not in by_function:
                holes.append(f"{label}: no function's docstring names it")
            if label not in by_test:
                holes.append(f"{label}: no test bears its label")
    known = {row[0] for row in rows}
    holes += [
        f"{label}: named by {', '.join(names)}, but no page has it" for label, names in by_function.items() if label not in known
    ]
    holes += [f"{label}: borne by {', '.join(names)}, but no page has it" for label, names in by_test.items() if label not in known]
    return rows, holes


if __name__ == "__main__":
    rows, holes = table()
    for label, page, named, borne in rows:
        print(f"{label:32} {page:10} {named[0] if named else '-':44} {borne[0] if borne else '-'}")
    print(f"{len(rows)} labelled equations")
    for hole in holes:
        print("HOLE", hole)
    sys.exit(bool(holes))
