"""The assignment: one source gives stub and solution, and each task's points answer to that task's code alone."""

import functools
import io
import json
import re
from contextlib import redirect_stdout

import matplotlib.pyplot as plt
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from test_book import ROOT, chapter, load_script

from vaelib import checks

assignment = load_script("assignment")
ESSAYS = ["sums-and-means", "silent-latents"]
TABLES = {
    "kl": checks.KL_MISTAKES,
    "reparameterize": checks.REPARAMETERIZE_MISTAKES,
    "elbo": checks.ELBO_MISTAKES,
    "iwae": checks.IWAE_MISTAKES,
    "retrieval": checks.RETRIEVAL_MISTAKES,
    "training_step": checks.TRAINING_MISTAKES,
}


def execute(notebook):
    """What `assignment.run` does, in this process: outputs in the cells, and the places of those that ended well."""
    ended, namespace, plain = set(), {}, TransformerManager().transform_cell
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                exec(plain(cell.source), namespace)
            ended.add(place)
        except Exception as error:  # as in a kernel: it becomes the cell's output, and the next cell runs
            cell.outputs.append(new_output("error", ename=type(error).__name__, evalue=str(error), traceback=[]))
        cell.outputs.append(new_output("stream", name="stdout", text=printed.getvalue()))
    return ended


def solved(**changes):
    """A submission: the instructor's notebook with other sources for some cells, less the ungraded look at each verdict."""
    notebook = assignment.instructor_notebook()
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("print(checks.")]
    for cell in notebook.cells:
        cell.source = changes.pop(cell.id, cell.source)
    assert not changes
    return notebook


def answer(name):
    return next(cell.source for cell in assignment.instructor_notebook().cells if cell.id == name)


def lost(report):
    """The tasks without their points, and what the grader says of each."""
    return {row["task"]: row["message"] for row in report["tasks"] if row["points"] == 0}


@functools.cache
def full_marks():
    return assignment.grade(solved(), execute)


def test_the_committed_notebook_is_what_the_source_gives():
    committed = nbformat.read(assignment.STUDENT, as_version=4)
    assert committed == assignment.student_notebook()
    assert assignment.STUDENT.read_text() == nbformat.writes(assignment.student_notebook()) + "\n"


def test_the_notebooks_are_valid_and_begin_as_the_chapters_do():
    for notebook in (assignment.student_notebook(), assignment.instructor_notebook()):
        nbformat.validate(notebook)
        assert notebook.metadata == chapter("elbo").metadata
        first, expected = (
            next(cell.source for cell in book.cells if cell.cell_type == "code") for book in (notebook, chapter("elbo"))
        )
        assert first == expected
        ids = [cell.id for cell in notebook.cells]
        assert len(set(ids)) == len(ids)
        assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


def test_the_student_s_notebook_holds_no_line_of_a_solution_and_no_note_for_teachers():
    text = "\n".join(cell.source for cell in assignment.student_notebook().cells)
    solutions = 0
    for role, _, cell in assignment.read_source():
        if role == "answer":
            lines = [line for found in assignment.SOLUTION.finditer(cell.source) for line in found[0].splitlines()[1:-1]]
            assert lines
        elif role == "essay":
            lines = cell.source.splitlines()
        else:
            continue
        solutions += 1
        assert not [line for line in lines if line.strip() not in ("", ")") and line.strip() in text]
    assert solutions == 8 + len(ESSAYS)
    assert not re.search("BEGIN|END SOLUTION|For teachers|ruff", text)
    assert text.count("raise NotImplementedError()") == 11 + 1  # networks have four methods; the introduction names the stub


def test_points_add_up_to_100_and_stand_in_the_headings():
    cells = assignment.student_notebook().cells
    given = [cell.metadata.nbgrader.points for cell in cells if "points" in cell.metadata.get("nbgrader", {})]
    headings = [int(n) for cell in cells for n in re.findall(r"^#+ .*\((\d+) points\)$", cell.source, re.MULTILINE)]
    assert headings == given
    assert sum(given) == 100
    by_hand = sum(cell.metadata.nbgrader.points for cell in cells if cell.id in ESSAYS)
    assert f"100 points: {100 - by_hand} by tests, {by_hand} by hand" in cells[0].source


def test_the_metadata_are_nbgrader_s_schema_3():
    known = [cell for cell in assignment.student_notebook().cells if "nbgrader" in cell.metadata]
    for cell in known:
        fields = dict(cell.metadata.nbgrader)
        points = fields.pop("points", None)
        assert {key: type(value) for key, value in fields.items()} == {
            "cell_type": str, "grade": bool, "grade_id": str, "locked": bool, "schema_version": int, "solution": bool, "task": bool,
        }  # fmt: skip
        assert (fields["cell_type"], fields["grade_id"], fields["schema_version"]) == (cell.cell_type, cell.id, 3)
        assert (isinstance(points, int) and points > 0) if fields["grade"] else points is None
        assert fields["solution"] != fields["locked"]  # what students write is open, all else of these is not
        assert (cell.cell_type == "markdown") == (fields["grade"] and fields["solution"])
        assert cell.metadata.get("editable", True) != fields["locked"]
    assert len({cell.metadata.nbgrader.grade_id for cell in known}) == len(known) == 2 + 2 * 8 + len(ESSAYS)


def test_nbgrader_makes_the_same_stub_of_the_instructor_s_copy():
    preprocessors = pytest.importorskip("nbgrader.preprocessors", reason="compares with nbgrader itself: pip install nbgrader")
    notebook, resources = assignment.instructor_notebook(), {}
    for step in ("LockCells", "ClearSolutions", "ClearHiddenTests", "CheckCellMetadata"):
        notebook, resources = getattr(preprocessors, step)().preprocess(notebook, resources)
    assert notebook == assignment.student_notebook()


def test_hidden_tests_stay_out_of_the_student_s_notebook_and_a_marker_without_its_partner_is_refused(tmp_path):
    source = tmp_path / "source.py"
    hidden = '# %% test="a" points=1\nassert a\n### BEGIN HIDDEN TESTS\nassert a == 5\n### END HIDDEN TESTS\n'
    source.write_text('# %% answer="a"\na = 5\n\n' + hidden)
    assert [cell.source for cell in assignment.student_notebook(source).cells] == [assignment.STUBS["code"], "assert a"]
    assert "a == 5" in assignment.instructor_notebook(source).cells[1].source
    for wrong in ("### BEGIN SOLUTION\na = 5", "a = 5\n### END SOLUTION"):
        source.write_text(f'# %% answer="a"\n{wrong}\n')
        with pytest.raises(ValueError, match="a: got a marker without its partner"):
            assignment.student_notebook(source)
    source.write_text("# %%\n### BEGIN SOLUTION\na = 5\n### END SOLUTION\n")
    with pytest.raises(ValueError, match="a solution outside an answer"):
        assignment.student_notebook(source)


def test_the_stub_scores_nothing_in_a_real_kernel(capsys):
    assignment.main(["--grade", str(assignment.STUDENT), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["points"], report["by_hand"], report["of"], report["notes"]) == (0, 0, 100, [])
    assert set(lost(report)) == {*TABLES, "likelihood", "networks", *ESSAYS}
    assert all("NotImplementedError" in message for task, message in lost(report).items() if task not in ESSAYS)


def test_the_instructor_s_copy_earns_full_marks():
    report = full_marks()
    assert (report["points"], report["by_hand"], report["of"], report["notes"]) == (84, 16, 100, [])
    assert lost(report) == {}
    assert all(row["message"].startswith("passed: ") for row in report["tasks"] if row["points"])
    assert [row["task"] for row in report["tasks"] if row["points"] is None] == ESSAYS


# mistakes: task, name, a piece of the solution, what a student writes instead; "" for the sentence of the table
WRITTEN = [
    ("kl", "no-half", "0.5 * ", ""),
    ("kl", "mean-latents", ".sum(-1)", ".mean(-1)"),
    ("kl", "variance", "log_var.exp() - 1 - log_var", "log_var - 1 - log_var.log()"),
    ("kl", "detached", "return 0.5", "mean, log_var = mean.detach(), log_var.detach()\n    return 0.5"),
    ("reparameterize", "variance", "(log_var / 2).exp()", "log_var.exp()"),
    ("reparameterize", "no-exp", "(log_var / 2).exp()", "log_var"),
    ("reparameterize", "own-noise", ".exp() * eps", ".exp() * torch.randn_like(eps)"),
    ("elbo", "kl-added", "log_likelihood - vaelib", "log_likelihood + vaelib"),
    ("elbo", "mean-pixels", ".flatten(1).sum(1)", ".flatten(1).mean(1)"),
    ("elbo", "sigmoid-twice", "(logits, x", "(logits.sigmoid(), x"),
    ("likelihood", "not-summed", ".flatten(1).sum(1)", ""),
    ("likelihood", "mean-pixels", ".flatten(1).sum(1)", ".flatten(1).mean(1)"),
    ("likelihood", "sign", "return log_mass", "return -log_mass"),
    ("likelihood", "no-tails", "torch.where(x < -0.999, upper, torch.where(x > 0.999, lower, inner))", "inner"),
    ("likelihood", "overflow", "torch.log(-torch.expm1(-2 / 255 * inverse))", "torch.log(1 - torch.exp(-2 / 255 * inverse))"),
    ("likelihood", "detached", "torch.exp(-log_scale)", "torch.exp(-log_scale.detach())"),
    ("likelihood", "swapped", "location, log_scale = params", "log_scale, location = params"),
    ("likelihood", "inverse-scale", "torch.exp(-log_scale)", "torch.exp(log_scale)"),
    ("likelihood", "interleaved", "params.chunk(2, dim=1)", "params[:, 0::2], params[:, 1::2]"),
    ("likelihood", "fixed-scale", "torch.exp(-log_scale)", "torch.exp(-0 * log_scale)"),
    ("iwae", "no-log-k", " - math.log(len(log_weights))", ""),
    ("iwae", "elbo", "torch.logsumexp(log_weights, 0) - math.log(len(log_weights))", "log_weights.mean(0)"),
    ("iwae", "overflow", "torch.logsumexp(log_weights, 0) - math.log(len(log_weights))", "log_weights.exp().mean(0).log()"),
    ("networks", "no-log-var", "return self.mean(h), self.log_var(h)", "return self.mean(h)"),
    ("networks", "sigmoid", "nn.Unflatten(1, tuple(image_shape))", "nn.Unflatten(1, tuple(image_shape)), nn.Sigmoid()"),
    ("networks", "relu", "nn.Unflatten(1, tuple(image_shape))", "nn.ReLU(), nn.Unflatten(1, tuple(image_shape))"),
    ("networks", "tanh", "nn.Unflatten(1, tuple(image_shape))", "nn.Tanh(), nn.Unflatten(1, tuple(image_shape))"),
    ("networks", "softmax", "nn.Unflatten(1, tuple(image_shape))", "nn.Softmax(1), nn.Unflatten(1, tuple(image_shape))"),
    ("networks", "detached", "return self.layers(z)", "return self.layers(z).detach()"),
    ("networks", "detached", "self.log_var(h)", "self.log_var(h).detach()"),
    ("networks", "same-head", "self.log_var(h)", "self.mean(h)"),
    ("networks", "positive-log-var", "self.log_var(h)", "F.softplus(self.log_var(h))"),
    ("networks", "batch-dependence", "(image_shape), 200)", "(image_shape), 200), nn.BatchNorm1d(200)"),
    ("networks", "unregistered", "self.mean = nn.Linear(200, latent_dim)", "self.heads = [nn.Linear(200, latent_dim)]"),
    ("networks", "new-layers", "self.log_var(h)", "nn.Linear(200, self.mean.out_features)(h)"),
    ("training_step", "elbo-minimized", "loss.backward()", "(-loss).backward()"),
    ("training_step", "no-zero-grad", "    optimizer.zero_grad()\n", ""),
    ("training_step", "no-step", "    optimizer.step()\n", ""),
    ("training_step", "no-scale", "vaelib.reparameterize(mean, log_var, torch.randn_like(mean))", "mean + torch.randn_like(mean)"),
    ("training_step", "sigmoid-twice", "(logits, x", "(logits.sigmoid(), x"),
    ("training_step", "kl-sum-batch", "(mean, log_var) - log_l", "(mean, log_var).sum() - log_l"),
    ("training_step", "detached", "model.decode(z)", "model.decode(z).detach()"),
    ("training_step", "sum-batch", "- log_likelihood).mean()", "- log_likelihood).sum()"),
    ("training_step", "mean-decoded", "model.decode(z)", "model.decode(mean)"),
    ("retrieval", "farthest", ", largest=False", ""),
    ("retrieval", "distances", ".indices", ".values"),
    ("retrieval", "swapped", "cdist(query_codes, database_codes)", "cdist(database_codes, query_codes)"),
]


@pytest.mark.parametrize(("task", "mistake", "piece", "instead"), WRITTEN, ids=lambda value: value[:16])
def test_a_mistake_in_a_task_costs_that_task_s_points_alone_and_is_named(task, mistake, piece, instead):
    source = answer(task)
    assert source.count(piece) == 1
    if mistake == "unregistered":
        source = source.replace("self.mean(h)", "self.heads[0](h)")
    report = assignment.grade(solved(**{task: source.replace(piece, instead)}), execute)
    assert list(lost(report)) == [task]
    assert report["points"] == 84 - next(row["of"] for row in report["tasks"] if row["task"] == task)
    assert lost(report)[task].startswith(f"not yet [{mistake}]: ")
    if mistake in TABLES.get(task, {}):
        assert TABLES[task][mistake][0] in lost(report)[task]


def test_every_task_has_at_least_three_of_these_mistakes():
    tasks = [task for task, *_ in WRITTEN]
    assert set(tasks) == {row["task"] for row in full_marks()["tasks"]} - set(ESSAYS)
    assert min(map(tasks.count, tasks)) >= 3


@pytest.mark.parametrize(("task", "mistake"), [(task, mistake) for task, table in TABLES.items() for mistake in table])
def test_every_mistake_of_the_checkers_tables_fails_its_task_s_test_with_its_sentence(task, mistake):
    table = next(name for name, value in vars(checks).items() if value is TABLES[task])
    notebook = solved(**{task: f"{task} = checks.{table}[{mistake!r}][1]"})
    notebook.cells = [cell for cell in notebook.cells if cell.id in ("imports", task, f"{task}-test")]
    assert execute(notebook) == {0, 1}
    assert TABLES[task][mistake][0] in assignment.message_of(notebook.cells[2], passed=False)


# what students do to a notebook


def tampered():
    """A solved notebook, but its KL is wrong and its test says it is right; a test is gone, another is there twice, the imports too."""
    notebook = solved(
        kl=answer("kl").replace("0.5 * ", ""),
        **{"kl-test": "print('passed: kl is right')", "elbo-test": "pass  # see above", "setup": ""},
    )
    cells = {cell.id: cell for cell in notebook.cells}
    cells["imports"].cell_type = "markdown"
    twice = new_code_cell("verdicts.clear()", metadata={"nbgrader": {"grade_id": "iwae-test", "grade": True}})
    notebook.cells = [cell for cell in notebook.cells if cell.id != "retrieval-test"] + [twice]
    return notebook


def test_locked_cells_are_graded_as_they_were_and_the_report_says_so():
    report = assignment.grade(tampered(), execute)
    assert list(lost(report)) == ["kl"]
    assert lost(report)["kl"].startswith("not yet [no-half]")
    edited = [f"{name}: was edited, the original was used" for name in ("setup", "imports", "kl-test", "elbo-test")]
    assert report["notes"] == [
        *edited, "iwae-test: stands there twice, the second was left out", "retrieval-test: was deleted, the original was used",
    ]  # fmt: skip


def test_a_notebook_that_lost_its_metadata_or_has_strange_ones_is_graded_all_the_same():
    bare = solved()
    for cell in bare.cells:
        cell.metadata = {"nbgrader": "?"} if cell.id == "kl" else {}
    assert assignment.grade(bare, execute) == full_marks()


def test_outputs_of_the_student_s_own_run_count_for_nothing():
    notebook = assignment.student_notebook()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = 1, [new_output("stream", name="stdout", text="passed: all")]
    assert assignment.grade(notebook, execute)["points"] == 0
    report = assignment.grade(notebook, lambda notebook: set())
    assert "kernel died" in lost(report)["kl"]


def test_what_a_task_does_without_is_noted_and_costs_nothing():
    report = assignment.grade(solved(kl="def kl(mean, log_var):\n    return vaelib.gaussian_kl(mean, log_var)"), execute)
    assert report["points"] == 84
    assert report["notes"] == ["kl: the answer holds 'vaelib', which the task does without"]


def test_an_essay_left_as_it_was_gets_no_points_and_a_deleted_one_neither():
    notebook = solved(**{ESSAYS[0]: " YOUR ANSWER HERE\n"})
    notebook.cells = [cell for cell in notebook.cells if cell.id != ESSAYS[1]]
    notebook.cells.append(new_markdown_cell("a note of my own"))
    report = assignment.grade(notebook, execute)
    assert lost(report) == dict.fromkeys(ESSAYS, "no answer")
    assert (report["points"], report["by_hand"]) == (84, 0)


def test_a_run_goes_on_after_an_error_and_an_endless_cell_and_ends_with_the_kernel(tmp_path, capsys):
    sources = ["a = 1", "1 / 0", "while True:\n    pass", "assert a", "import os; os._exit(0)", "a"]
    notebook = assignment.new_notebook(cells=[new_code_cell(source) for source in sources])
    assert assignment.run(notebook, tmp_path, timeout=10) == {0, 3}
    assert "the run broke off" in capsys.readouterr().err


def last_cells(notebook, monkeypatch):
    """The two last cells of a notebook after a fast run: whether each ended well, and what they said."""
    monkeypatch.setenv("VAELIB_FAST", "1")
    ended = execute(notebook)
    last = [place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code"][-2:]
    outputs = [output for place in last for output in notebook.cells[place].outputs]
    return [place in ended for place in last], "".join(output.get("text", "") + output.get("evalue", "") for output in outputs)


def test_the_last_part_trains_the_student_s_own_model_once_all_parts_pass_and_reaches_the_number_it_names(monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    ended, told = last_cells(assignment.student_notebook(), monkeypatch)
    assert ended == [True, True]
    assert "All eight parts must pass first." in told
    ended, told = last_cells(assignment.instructor_notebook(), monkeypatch)
    assert ended == [True, True]
    assert "loss in the last epoch" in told
    (text,) = (cell.source for cell in assignment.student_notebook().cells if "All together" in cell.source)
    (named,) = (float(n) for n in re.findall(r"about (-\d+) with `FAST`", text))
    (reached,) = (float(n) for n in re.findall(r"bound (-[\d.]+) nats", told))
    assert abs(reached - named) < 3  # five trainings differ by 1.7
    assert len(shown) == 2
    plt.close("all")


def test_the_last_part_fails_where_the_parts_do_not_reach_the_number_together(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    bounded = answer("networks").replace("nn.Unflatten(1, tuple(image_shape))", "nn.Unflatten(1, tuple(image_shape)), nn.Sigmoid()")
    notebook = solved(networks=bounded, **{"networks-test": "verdicts['networks'] = True"})
    ended, told = last_cells(notebook, monkeypatch)
    assert ended == [True, False]
    assert "a right solution reaches about -176" in told
    plt.close("all")


def test_the_commands_write_whole_files_and_refuse_what_is_none(tmp_path, capsys):
    assignment.main(["--instructor", str(tmp_path / "copy.ipynb")])
    assert nbformat.read(tmp_path / "copy.ipynb", as_version=4) == assignment.instructor_notebook()
    assert [path.name for path in tmp_path.iterdir()] == ["copy.ipynb"]
    (tmp_path / "broken.ipynb").write_text("{")
    for arguments, words in (
        (["--instructor", str(assignment.STUDENT)], "expected a place outside assignments"),
        (["--grade", str(tmp_path / "broken.ipynb")], "expected a notebook"),
        (["--grade", str(tmp_path / "none.ipynb")], "expected a notebook"),
    ):
        with pytest.raises(SystemExit):
            assignment.main(arguments)
        assert words in capsys.readouterr().err
    assert str(ROOT) not in assignment.STUDENT.read_text()
