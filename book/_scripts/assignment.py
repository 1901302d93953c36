"""The assignments: notebooks from one source each, and a grader that needs no nbgrader.

    python book/_scripts/assignment.py                        write all students' notebooks, book/assignments/NAME-assignment.ipynb
    python book/_scripts/assignment.py vae likelihoods        write these
    python book/_scripts/assignment.py --instructor OUT --of NAME    write the copy with the solutions (of vae, unless NAME is given),
                                                              which nbgrader takes as its source
    python book/_scripts/assignment.py --grade NOTEBOOK       run a submission and print its points; --json for machines

The sources are book/assignments/NAME.py; the first cell of vae.py says what the cells are. To which assignment a submission belongs, its
cells say. A submission is run with your rights.
"""

import argparse
import copy
import functools
import json
import re
import sys
import textwrap
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from vaelib.storage import atomic

BOOK = Path(__file__).resolve().parents[1]
LADDER = ("vae", "likelihoods", "evaluation", "hierarchy")  # in the order in which they are handed out


def source_of(name):
    return BOOK / "assignments" / f"{name}.py"


def student_of(name):
    return BOOK / "assignments" / f"{name}-assignment.ipynb"


SOURCE, STUDENT = source_of("vae"), student_of("vae")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ROLES = {  # nbgrader's flags: grade, locked, solution
    "setup": (False, True, False),
    "locked": (False, True, False),
    "answer": (False, False, True),
    "test": (True, True, False),
    "essay": (True, False, True),
}
# What a student meets, in nbgrader's own words: no code is missing here.
STUBS = {"code": "# YOUR CODE HERE\nraise NotImplementedError()", "markdown": "YOUR ANSWER HERE"}
SOLUTION, HIDDEN = (
    re.compile(rf"^([ \t]*)### BEGIN {what}\n(?:.*\n)*?[ \t]*### END {what}(?:\n|$)", re.MULTILINE)
    for what in ("SOLUTION", "HIDDEN TESTS")
)


def read_source(path=SOURCE):
    """The cells of the source: triples of role (None for a plain one), options and cell with its solution."""
    return copy.deepcopy(parsed(path.read_text(encoding="utf-8")))


@functools.cache
def parsed(text):
    """The same of a source's text; nobody changes these."""
    found = []
    for place, cell in enumerate(jupytext.reads(text, fmt="py:percent").cells):
        options = dict(cell.metadata)
        role = next((key for key in options if key in ROLES), None)
        if "teacher" in options:
            continue
        source, name = cell.source, options.get(role)
        if role == "setup":
            chapter = nbformat.read(BOOK / f"{name}.ipynb", as_version=4)
            source, name = next(cell.source for cell in chapter.cells if cell.cell_type == "code"), "setup"
        if role == "test":
            name = f"{name}-test"
        new = new_code_cell if cell.cell_type == "code" else new_markdown_cell
        made = new(source, id=name or f"assignment-{place:03}")
        if role:
            flags = dict(zip(("grade", "locked", "solution"), ROLES[role], strict=True))
            points = {"points": options["points"]} if flags["grade"] else {}
            made.metadata["nbgrader"] = {
                "cell_type": cell.cell_type, "grade_id": name, **flags, **points, "schema_version": 3, "task": False,
            }  # fmt: skip
            made.metadata["deletable"] = False
            if flags["locked"]:
                made.metadata["editable"] = False
        found.append((role, options, made))
    return found


def instructor_notebook(path=SOURCE):
    """The notebook with its solutions and hidden tests."""
    return new_notebook(cells=[cell for _, _, cell in read_source(path)], metadata=METADATA)


def student_notebook(path=SOURCE):
    """The notebook with stubs: what nbgrader's ClearSolutions and ClearHiddenTests would make of the instructor's.

    Raises:
        ValueError: If a marker has no partner, or a solution stands in a cell that is no answer.
    """
    notebook = new_notebook(metadata=METADATA)
    for role, _, cell in read_source(path):
        stub = STUBS[cell.cell_type]
        cell.source, count = SOLUTION.subn(lambda match, stub=stub: textwrap.indent(stub, match[1]) + "\n", cell.source)
        cell.source = HIDDEN.sub("", cell.source).rstrip("\n")
        if re.search("(BEGIN|END) (SOLUTION|HIDDEN TESTS)", cell.source) or (count and role != "answer"):
            raise ValueError(f"{cell.id}: got a marker without its partner, or a solution outside an answer, expected neither")
        if role in ("answer", "essay") and not count:
            cell.source = stub
        notebook.cells.append(cell)
    return notebook


def grade_id(cell):
    """nbgrader's name of a cell; its id, which is the same, where the metadata was lost."""
    metadata = cell.metadata.get("nbgrader")
    return str(metadata["grade_id"] if isinstance(metadata, dict) and metadata.get("grade_id") else cell.get("id"))


def assignment_of(submission):
    """The name of the assignment that a submission belongs to: the one most of whose own cells it has.

    Raises:
        ValueError: If it has none of any.
    """
    names = {grade_id(cell) for cell in submission.cells}
    shared = {}
    for name in LADDER:
        own = {cell.id for role, _, cell in read_source(source_of(name)) if role in ("answer", "test", "essay")}
        shared[name] = len(own & names) / len(own)
    best = max(LADDER, key=shared.__getitem__)
    if not shared[best]:
        raise ValueError(f"got a notebook with no cell of an assignment, expected one of {', '.join(LADDER)}")
    return best


def restored(submission, path=SOURCE):
    """What is run of a submission, up to its last test, and notes: locked cells are those of the source, whatever was done to them."""
    originals = {cell.id: cell for role, _, cell in read_source(path) if role in ("setup", "locked", "test")}
    released = {cell.id: cell for cell in student_notebook(path).cells}
    cells, notes, found = [], [], set()
    for cell in submission.cells:
        name = grade_id(cell)
        if name not in originals:
            cells.append(cell)
        elif name in found:
            notes.append(f"{name}: stands there twice, the second was left out")
        else:
            if (cell.cell_type, cell.source.strip()) != (originals[name].cell_type, released[name].source.strip()):
                notes.append(f"{name}: was edited, the original was used")
            found.add(name)
            cells.append(originals[name])
    missing = [cell for name, cell in originals.items() if name not in found]
    notes += [f"{cell.id}: was deleted, the original was used" for cell in missing]
    graded = [cell.metadata["nbgrader"]["grade"] for cell in missing]
    cells = [cell for cell, late in zip(missing, graded, strict=True) if not late] + cells
    cells += [cell for cell, late in zip(missing, graded, strict=True) if late]
    last = max(
        place for place, cell in enumerate(cells) if cell is originals.get(grade_id(cell)) and cell.metadata["nbgrader"]["grade"]
    )
    notebook = new_notebook(cells=cells[: last + 1], metadata=METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook, notes


def run(notebook, folder, timeout=300):
    """Executes the cells in a fresh kernel, errors or not; the places of those that ended well. `timeout` s for each cell."""
    ended = set()

    def note(cell, cell_index, execute_reply):
        if execute_reply and execute_reply["content"]["status"] == "ok":
            ended.add(cell_index)

    settings = {
        "timeout": timeout,
        "iopub_timeout": 60,
        "interrupt_on_timeout": True,
        "allow_errors": True,
        "kernel_name": "python3",
    }
    client = NotebookClient(notebook, **settings, on_cell_executed=note, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    except (DeadKernelError, CellControlSignal) as error:  # the submission's doing: cells that were not reached earn no points
        print(f"the run broke off: {error}", file=sys.stderr)
    return ended


def message_of(cell, passed):
    """What a test cell said: the last line that it printed, or its error."""
    errors = [output for output in cell.outputs if output.output_type == "error"]
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
    if passed:
        return text.strip().rpartition("\n")[2]
    if not errors:
        return "not run to its end: the kernel died, or time was up"
    return errors[-1].evalue if errors[-1].ename == "AssertionError" else f"{errors[-1].ename}: {errors[-1].evalue}".rstrip(": ")


def grade(submission, execute, path=SOURCE):
    """Points and messages, task by task, as JSON has them; `execute` runs a notebook and gives the places of the cells that passed.

    An essay that is answered has points None: they are given by hand. An extra task is one of 0 points: `passed` says how it went.
    """
    notebook, notes = restored(submission, path)
    ended = execute(notebook)
    places = {grade_id(cell): place for place, cell in reversed(list(enumerate(notebook.cells)))}
    written = {}
    for cell in submission.cells:
        written[grade_id(cell)] = written.get(grade_id(cell), "") + cell.source
    tasks = []
    for role, options, cell in read_source(path):
        row = {"task": options.get(role), "points": 0, "of": options.get("points")}
        if role == "test":
            passed = places[cell.id] in ended
            message = message_of(notebook.cells[places[cell.id]], passed)
            row.update(points=row["of"] if passed else 0, passed=passed, message=message)
        elif role == "essay":
            text = written.get(cell.id, "").strip()
            answered = text not in ("", STUBS["markdown"])
            row.update(
                points=None if answered else 0, message="to be read" if answered else "no answer", answer=text if answered else ""
            )
        elif role == "answer":
            words = [*options.get("without", "").split(), "checks.", "_recipe"]  # the checkers know the answers
            used = [word for word in words if word in written.get(cell.id, "")]
            notes += [f"{cell.id}: the answer holds {word!r}, which the task does without" for word in used]
        if role in ("test", "essay"):
            tasks.append(row)
    return {
        "assignment": path.stem,
        "points": sum(row["points"] or 0 for row in tasks),
        "by_hand": sum(row["of"] for row in tasks if row["points"] is None),
        "of": sum(row["of"] for row in tasks),
        "tasks": tasks,
        "notes": notes,
    }


def told(report):
    """A report as lines of text."""
    lines = []
    for row in report["tasks"]:
        points = "?" if row["points"] is None else row["points"]
        worth = f"{points:>3} of {row['of']:>2}" if row["of"] else "    extra"
        lines.append(f"{worth}  {row['task']:15} {row['message']}")
    by_hand = f", and up to {report['by_hand']} by hand" if report["by_hand"] else ""
    return "\n".join(
        [*lines, f"{report['points']} of {report['of']} points{by_hand}", *(f"note: {note}" for note in report["notes"])]
    )


def write(notebook, path):
    """Writes the notebook whole or not at all."""
    with atomic(path) as partial:
        nbformat.write(notebook, partial)
    print(path)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(LADDER)}; all where none is given")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--instructor", type=Path, metavar="OUT", help="write the copy with the solutions")
    what.add_argument("--grade", type=Path, metavar="NOTEBOOK", help="run a submission and print its points")
    parser.add_argument("--of", choices=LADDER, metavar="NAME", help="of which assignment --instructor writes the copy (vae)")
    parser.add_argument("--json", action="store_true", help="print the points as JSON")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for each cell of a submission (300)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in LADDER]:
        parser.error(f"NAME: got {', '.join(unknown)}, expected some of {', '.join(LADDER)}")
    if options.names and (options.instructor or options.grade):
        parser.error("NAME: got a name beside --instructor or --grade, expected none; --of NAME says whose copy to write")
    if options.of and not options.instructor:
        parser.error("--of: got no --instructor OUT, which it belongs to")
    if options.grade:
        try:
            submission = nbformat.read(options.grade, as_version=4)
        except (OSError, ValueError, nbformat.ValidationError) as error:
            parser.error(f"--grade: got {options.grade}, expected a notebook ({str(error).splitlines()[0]})")
        try:
            source = source_of(assignment_of(submission))
        except ValueError as error:
            parser.error(f"--grade {options.grade}: {error}")
        report = grade(submission, lambda notebook: run(notebook, options.grade.resolve().parent, options.timeout), source)
        print(json.dumps(report, indent=2) if options.json else f"assignment {report['assignment']}\n{told(report)}")
    elif options.instructor:
        if options.instructor.resolve().parent == STUDENT.parent:
            parser.error(
                f"--instructor: got {options.instructor}, expected a place outside {STUDENT.parent.name}, where stubs are kept"
            )
        write(instructor_notebook(source_of(options.of or "vae")), options.instructor)
    else:
        for name in options.names or LADDER:
            write(student_notebook(source_of(name)), student_of(name))


if __name__ == "__main__":
    main()
