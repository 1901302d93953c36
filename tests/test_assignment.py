"""The assignments: one source each gives stub and solution, and each task's points answer to that task's code alone."""

import copy
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
LADDER = assignment.LADDER
OF_ALL = {
    "vae": ["sums-and-means", "silent-latents"],
    "likelihoods": ["which-mse", "mean-or-draw"],
    "evaluation": ["sign-of-the-error", "which-is-better"],
    "hierarchy": ["one-or-two", "silent-layer"],
}
ESSAYS = OF_ALL["vae"]
PARTS = {"vae": "eight", "likelihoods": "seven", "evaluation": "eight", "hierarchy": "six"}
STUBS = {"vae": 11, "likelihoods": 10, "evaluation": 10, "hierarchy": 10}  # a class has several methods
EXTRAS = {"vae": [], "likelihoods": [], "evaluation": [], "hierarchy": ["quantize"]}  # of 0 points
TABLES = {
    "kl": checks.KL_MISTAKES,
    "reparameterize": checks.REPARAMETERIZE_MISTAKES,
    "elbo": checks.ELBO_MISTAKES,
    "iwae": checks.IWAE_MISTAKES,
    "retrieval": checks.RETRIEVAL_MISTAKES,
    "training_step": checks.TRAINING_MISTAKES,
}
LATER = {  # of the assignments after the first: task -> table
    "optimal_scale": checks.SCALE_MISTAKES,
    "bits_per_dim": checks.BITS_MISTAKES,
    "level_mean": checks.LEVEL_MEAN_MISTAKES,
    "level_draw": checks.LEVEL_DRAW_MISTAKES,
    "log_weights": checks.LOG_WEIGHTS_MISTAKES,
    "bound": checks.IWAE_MISTAKES,
    "effective_sample_size": checks.ESS_MISTAKES,
    "pooled": checks.POOLED_MISTAKES,
    "standard_error": checks.STANDARD_ERROR_MISTAKES,
    "log_likelihood": checks.LOG_LIKELIHOOD_MISTAKES,
    "kl_between": checks.KL_BETWEEN_MISTAKES,
    "layered_elbo": checks.LAYERED_ELBO_MISTAKES,
    "layered_evidence": checks.LAYERED_EVIDENCE_MISTAKES,
    "ancestral": checks.ANCESTRAL_MISTAKES,
    "quantize": checks.VQ_MISTAKES,
}


def source(of):
    return assignment.source_of(of)


def execute(notebook, of_task=None):
    """What `assignment.run` does, in this process: outputs in the cells, and the places of those that ended well.

    With `of_task` the answers and tests of other tasks are taken as right, and not run.
    """
    ended, namespace, plain = set(), {}, TransformerManager().transform_cell
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        flags = cell.metadata.get("nbgrader", {})
        if of_task and (flags.get("solution") or flags.get("grade")) and cell.id not in (of_task, f"{of_task}-test"):
            ended.add(place)
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


@functools.cache
def instructor_s(of):
    return assignment.instructor_notebook(source(of))


def solved(of="vae", /, **changes):
    """A submission: the instructor's notebook with other sources for some cells, less the ungraded look at each verdict."""
    notebook = copy.deepcopy(instructor_s(of))
    notebook.cells = [cell for cell in notebook.cells if "print(checks." not in cell.source]
    for cell in notebook.cells:
        cell.source = changes.pop(cell.id, cell.source)
    assert not changes
    return notebook


def answer(name, of="vae"):
    return next(cell.source for cell in instructor_s(of).cells if cell.id == name)


def lost(report):
    """The tasks without their points, or failed where there are none to win, and what the grader says of each."""
    return {row["task"]: row["message"] for row in report["tasks"] if row["points"] == 0 and not row.get("passed")}


@functools.cache
def full_marks(of="vae"):
    return assignment.grade(solved(of), execute, source(of))


every = pytest.mark.parametrize("of", LADDER)


def test_each_source_is_one_of_the_ladder_and_no_two_share_a_task():
    folder = assignment.SOURCE.parent
    assert {path.stem for path in folder.glob("*.py")} == set(LADDER) == set(OF_ALL)
    assert {path.name for path in folder.glob("*.ipynb")} == {f"{name}-assignment.ipynb" for name in LADDER}
    assert (assignment.source_of("vae"), assignment.student_of("vae")) == (assignment.SOURCE, assignment.STUDENT)
    tasks = [
        cell.id for of in LADDER for role, _, cell in assignment.read_source(source(of)) if role in ("answer", "test", "essay")
    ]
    assert len(set(tasks)) == len(tasks)  # so that a submission says which assignment it is


@every
def test_the_committed_notebook_is_what_the_source_gives(of):
    committed, path = assignment.student_notebook(source(of)), assignment.student_of(of)
    assert nbformat.read(path, as_version=4) == committed
    assert path.read_text() == nbformat.writes(committed) + "\n"


@every
def test_the_notebooks_are_valid_and_begin_as_the_chapters_do(of):
    for notebook in (assignment.student_notebook(source(of)), assignment.instructor_notebook(source(of))):
        nbformat.validate(notebook)
        assert notebook.metadata == chapter("elbo").metadata
        first, expected = (
            next(cell.source for cell in book.cells if cell.cell_type == "code") for book in (notebook, chapter("elbo"))
        )
        assert first == expected
        ids = [cell.id for cell in notebook.cells]
        assert len(set(ids)) == len(ids)
        assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@every
def test_the_student_s_notebook_holds_no_line_of_a_solution_and_no_note_for_teachers(of):
    text = "\n".join(cell.source for cell in assignment.student_notebook(source(of)).cells)
    tasks = [cell.id for role, _, cell in assignment.read_source(source(of)) if role == "test"]
    solutions = 0
    for role, _, cell in assignment.read_source(source(of)):
        if role == "answer":
            lines = [line for found in assignment.SOLUTION.finditer(cell.source) for line in found[0].splitlines()[1:-1]]
            assert lines
        elif role == "essay":
            lines = cell.source.splitlines()
        else:
            continue
        solutions += 1
        assert not [line for line in lines if line.strip() not in ("", ")") and line.strip() in text]
    assert solutions == len(tasks) + len(OF_ALL[of])
    assert len(tasks) == {"six": 6, "seven": 7, "eight": 8}[PARTS[of]] + len(EXTRAS[of])
    assert not re.search("BEGIN|END SOLUTION|For teachers|ruff", text)
    assert text.count("raise NotImplementedError()") == STUBS[of] + 1  # the introduction names the stub


@every
def test_an_assignment_begins_with_what_it_needs_and_its_hours_which_the_guide_repeats(of):
    first = assignment.student_notebook(source(of)).cells[0].source
    (hours,) = re.findall(r"\*\*Hours\.\*\* About (\d+): an estimate, for it was not tried with a class\.", first)
    assert "**Needs.** The chapters [ELBO](../elbo.ipynb)" in first
    guide = (ROOT / "book" / "teaching.md").read_text()
    assert re.search(rf"\| \[\]\(assignments/{of}-assignment\.ipynb\) \|.*\| {hours} \| 84 \+ 16 \|", guide)
    assert f"assignments/{of}-assignment" in (ROOT / "book" / "_toc.yml").read_text()


def headings(name):
    return {line.lstrip("# ") for cell in chapter(name).cells for line in cell.source.splitlines() if re.match("##+ ", line)}


def sections_named(line):
    """The sections that a line of text names in quotes, and those of the chapters that it links to."""
    return set(re.findall('"([^"]+)"', line)), set().union(*map(headings, linked(line)))


def linked(line):
    return [name for name in re.findall(r"([\w-]+)\.ipynb\)", line) if not name.endswith("-assignment")]


@every
def test_the_sections_that_an_assignment_needs_are_headings_of_the_chapters_that_it_links_to(of):
    first = assignment.student_notebook(source(of)).cells[0].source
    needs = first.partition("**Needs.**")[2].partition("**Hours.**")[0]
    named, there = sections_named(needs)
    assert named <= there


def test_the_guide_names_sections_exercises_and_objectives_that_the_chapters_have():
    guide = (ROOT / "book" / "teaching.md").read_text(encoding="utf-8")
    sessions = re.findall(r"^\| \d+ \| \[\]\(.*$", guide, re.MULTILINE)
    assert len(sessions) == 15
    for line in sessions:
        named, there = sections_named(line.split("|")[2])
        assert named <= there
    contents = (ROOT / "book" / "_toc.yml").read_text(encoding="utf-8")
    table, of = {}, None
    for line in guide.partition("## Objectives and exercises")[2].partition("##")[0].splitlines():
        cells = line.split(" | ")
        if len(cells) == 3 and cells[1] not in ("after it you can", "---"):
            of = (linked(line) or [of])[0] if cells[0] != "|" else of
            table[of] = table.get(of, 0) + 1
    for name in table:
        assert f"file: {name}\n" in contents
    for name in re.findall(r"file: ([\w-]+)\n", contents.partition("numbered: true")[2].partition("caption:")[0]):
        text = "\n".join(cell.source for cell in chapter(name).cells)
        objectives = text.partition("**Objectives.**")[2].partition("**Prerequisites.**")[0]
        assert table[name] == objectives.count("\n- ")
        for label in re.findall(r"^:label: (ex-[\w-]+)$", text, re.MULTILINE):
            assert f"`{label}`" in guide


@every
def test_code_of_an_assignment_fits_a_page_of_80_columns(of):
    wide = [line for line in source(of).read_text().splitlines() if len(line) > 80 and not line.startswith("#")]
    assert of == "vae" or not wide


@every
def test_points_add_up_to_100_and_stand_in_the_headings(of):
    cells = assignment.student_notebook(source(of)).cells
    given = [cell.metadata.nbgrader.points for cell in cells if "points" in cell.metadata.get("nbgrader", {})]
    headings = [int(n) for cell in cells for n in re.findall(r"^#+ .*\((\d+) points\)$", cell.source, re.MULTILINE)]
    assert headings == given
    assert sum(given) == 100
    by_hand = sum(cell.metadata.nbgrader.points for cell in cells if cell.id in OF_ALL[of])
    assert by_hand == 16
    assert f"100 points: {100 - by_hand} by tests, {by_hand} by hand" in cells[0].source


@every
def test_the_metadata_are_nbgrader_s_schema_3(of):
    known = [cell for cell in assignment.student_notebook(source(of)).cells if "nbgrader" in cell.metadata]
    roles = [role for role, *_ in assignment.read_source(source(of))]
    for cell in known:
        fields = dict(cell.metadata.nbgrader)
        points = fields.pop("points", None)
        assert {key: type(value) for key, value in fields.items()} == {
            "cell_type": str, "grade": bool, "grade_id": str, "locked": bool, "schema_version": int, "solution": bool, "task": bool,
        }  # fmt: skip
        assert (fields["cell_type"], fields["grade_id"], fields["schema_version"]) == (cell.cell_type, cell.id, 3)
        extra = cell.id.removesuffix("-test") in EXTRAS[of]
        assert (isinstance(points, int) and (points == 0 if extra else points > 0)) if fields["grade"] else points is None
        assert fields["solution"] != fields["locked"]  # what students write is open, all else of these is not
        assert (cell.cell_type == "markdown") == (fields["grade"] and fields["solution"])
        assert cell.metadata.get("editable", True) != fields["locked"]
    assert len({cell.metadata.nbgrader.grade_id for cell in known}) == len(known)
    assert len(known) == roles.count("setup") + roles.count("locked") + 2 * roles.count("test") + len(OF_ALL[of])
    assert roles.count("answer") == roles.count("test")


@every
def test_nbgrader_makes_the_same_stub_of_the_instructor_s_copy(of):
    preprocessors = pytest.importorskip("nbgrader.preprocessors", reason="compares with nbgrader itself: pip install nbgrader")
    notebook, resources = assignment.instructor_notebook(source(of)), {}
    for step in ("LockCells", "ClearSolutions", "ClearHiddenTests", "CheckCellMetadata"):
        notebook, resources = getattr(preprocessors, step)().preprocess(notebook, resources)
    assert notebook == assignment.student_notebook(source(of))


def test_hidden_tests_stay_out_of_the_student_s_notebook_and_a_marker_without_its_partner_is_refused(tmp_path):
    path = tmp_path / "source.py"
    hidden = '# %% test="a" points=1\nassert a\n### BEGIN HIDDEN TESTS\nassert a == 5\n### END HIDDEN TESTS\n'
    path.write_text('# %% answer="a"\na = 5\n\n' + hidden)
    assert [cell.source for cell in assignment.student_notebook(path).cells] == [assignment.STUBS["code"], "assert a"]
    assert "a == 5" in assignment.instructor_notebook(path).cells[1].source
    for wrong in ("### BEGIN SOLUTION\na = 5", "a = 5\n### END SOLUTION"):
        path.write_text(f'# %% answer="a"\n{wrong}\n')
        with pytest.raises(ValueError, match="a: got a marker without its partner"):
            assignment.student_notebook(path)
    path.write_text("# %%\n### BEGIN SOLUTION\na = 5\n### END SOLUTION\n")
    with pytest.raises(ValueError, match="a solution outside an answer"):
        assignment.student_notebook(path)


def test_the_stub_scores_nothing_in_a_real_kernel(capsys):
    assignment.main(["--grade", str(assignment.STUDENT), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["points"], report["by_hand"], report["of"], report["notes"]) == (0, 0, 100, [])
    assert set(lost(report)) == {*TABLES, "likelihood", "networks", *ESSAYS}
    assert all("NotImplementedError" in message for task, message in lost(report).items() if task not in ESSAYS)


@every
def test_the_instructor_s_copy_earns_full_marks(of):
    report = full_marks(of)
    assert (report["points"], report["by_hand"], report["of"], report["notes"]) == (84, 16, 100, [])
    assert report["assignment"] == of
    assert lost(report) == {}
    assert all(row["message"].startswith("passed: ") for row in report["tasks"] if row["points"])
    assert [row["task"] for row in report["tasks"] if row["points"] is None] == OF_ALL[of]


def test_the_report_says_of_an_extra_task_whether_it_passed_and_counts_it_for_nothing():
    assert "\n    extra  quantize        passed: " in assignment.told(full_marks("hierarchy"))
    report = assignment.grade(solved("hierarchy", quantize="def quantize(*of):\n    pass"), execute, source("hierarchy"))
    assert (list(lost(report)), report["points"], report["of"]) == (["quantize"], 84, 100)
    assert "\n    extra  quantize        not yet" in assignment.told(report)


@every
def test_of_a_submission_that_is_all_stubs_every_task_says_so_and_its_cells_say_which_assignment_it_is(of):
    notebook = assignment.student_notebook(source(of))
    assert assignment.assignment_of(notebook) == of
    report = assignment.grade(notebook, execute, source(of))
    assert (report["points"], report["by_hand"]) == (0, 0)
    assert all("NotImplementedError" in message for task, message in lost(report).items() if task not in OF_ALL[of])


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
    ("likelihood", "no-tails", "torch.where(x.abs() > 0.999, ends, inner)", "inner"),
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


WRITTEN_LATER = [
    ("likelihoods", "optimal_scale", "variance", ".sqrt()", ""),
    ("likelihoods", "optimal_scale", "sum", ".mean()", ".sum()"),
    ("likelihoods", "optimal_scale", "absolute", ".square().mean().sqrt()", ".abs().mean()"),
    ("likelihoods", "optimal_scale", "per-image", ".mean()", ".flatten(1).mean(1)"),
    ("likelihoods", "optimal_scale", "detached", "(x - mean)", "(x - mean.detach())"),
    ("likelihoods", "gaussian", "no-log-scale", "- log_scale - constant", "- constant"),
    ("likelihoods", "gaussian", "constant", " - constant", ""),
    ("likelihoods", "gaussian", "swapped", "mean, log_scale = params", "log_scale, mean = params"),
    ("likelihoods", "gaussian", "not-summed", ".flatten(1).sum(1)", ""),
    ("likelihoods", "gaussian", "mean-pixels", ".flatten(1).sum(1)", ".flatten(1).mean(1)"),
    ("likelihoods", "gaussian", "interleaved", "params.chunk(2, dim=1)", "params[:, 0::2], params[:, 1::2]"),
    ("likelihoods", "laplace", "sign", "return log_mass", "return -log_mass"),
    ("likelihoods", "laplace", "no-tails", "log_mass = torch.where(x > 0.999, above, log_mass)", "log_mass = inner"),
    ("likelihoods", "laplace", "mean-pixels", ".flatten(1).sum(1)", ".flatten(1).mean(1)"),
    ("likelihoods", "laplace", "swapped", "location, log_scale = params", "log_scale, location = params"),
    ("likelihoods", "laplace", "inverse-scale", "torch.exp(-log_scale)", "torch.exp(log_scale)"),
    ("likelihoods", "laplace", "fixed-scale", "torch.exp(-log_scale)", "torch.exp(-0 * log_scale)"),
    ("likelihoods", "laplace", "detached", "torch.exp(-log_scale)", "torch.exp(-log_scale.detach())"),
    (
        "likelihoods",
        "laplace",
        "overflow",
        "torch.log(-torch.expm1(-2 / 255 * inverse))",
        "torch.log(1 - torch.exp(-2 / 255 * inverse))",
    ),
    (
        "likelihoods",
        "laplace",
        "another-density",
        "return log_mass.flatten",
        "return vaelib.DiscretizedLogistic().log_prob(x, params)\n        return log_mass.flatten",
    ),
    ("likelihoods", "bits_per_dim", "nats", " * math.log(2)", ""),
    ("likelihoods", "bits_per_dim", "sign", "-log_prob", "log_prob"),
    ("likelihoods", "bits_per_dim", "pixels", "math.prod(image_shape)", "math.prod(image_shape[1:])"),
    ("likelihoods", "level_mean", "location", "return -1", "return location\n    return -1"),
    ("likelihoods", "level_mean", "inverse-scale", "torch.exp(-log_scale[", "torch.exp(log_scale["),
    ("likelihoods", "level_mean", "detached", "(edges - location[", "(edges - location.detach()["),
    ("likelihoods", "level_mean", "another-density", "torch.where(t < 0, 1 - tail, tail)", "torch.sigmoid(-t)"),
    ("likelihoods", "level_draw", "not-rounded", ".round()", ""),
    ("likelihoods", "level_draw", "not-clamped", ".clamp(0, 255)", ""),
    ("likelihoods", "level_draw", "flipped", "-v.sign()", "v.sign()"),
    ("likelihoods", "level_draw", "own-noise", "uniform - 0.5", "torch.rand_like(uniform) - 0.5"),
    ("likelihoods", "conv_networks", "no-log-var", "return self.mean(h), self.log_var(h)", "return self.mean(h)"),
    ("likelihoods", "conv_networks", "positive-log-var", "self.log_var(h)", "F.softplus(self.log_var(h))"),
    ("likelihoods", "conv_networks", "param-channels", "out = 2 * channels", "out = channels"),
    ("likelihoods", "conv_networks", "batch-dependence", "nn.Flatten(),", "nn.BatchNorm2d(32), nn.Flatten(),"),
    ("likelihoods", "conv_networks", "tanh", "return self.layers(z)", "return self.layers(z).tanh()"),
    ("evaluation", "log_weights", "no-prior", "log_likelihood + log_p", "log_likelihood"),
    ("evaluation", "log_weights", "q-added", "- log_q", "+ log_q"),
    ("evaluation", "log_weights", "no-log-det", "(squares + log_var)", "squares"),
    ("evaluation", "log_weights", "multiplied", "(-log_var).exp()", "log_var.exp()"),
    ("evaluation", "bound", "no-log-k", " - math.log(len(log_weights))", ""),
    ("evaluation", "bound", "elbo", "torch.logsumexp(log_weights, 0) - math.log(len(log_weights))", "log_weights.mean(0)"),
    (
        "evaluation",
        "bound",
        "overflow",
        "torch.logsumexp(log_weights, 0) - math.log(len(log_weights))",
        "log_weights.exp().mean(0).log()",
    ),
    ("evaluation", "effective_sample_size", "inverse", "1 / ", ""),
    ("evaluation", "effective_sample_size", "wrong-axis", ".softmax(0).square().sum(0)", ".softmax(1).square().sum(1)"),
    ("evaluation", "effective_sample_size", "largest", ".square().sum(0)", ".amax(0)"),
    ("evaluation", "effective_sample_size", "overflow", "log_weights.softmax(0)", "(log_weights.exp() / log_weights.exp().sum(0))"),
    (
        "evaluation",
        "pooled",
        "mean-logs",
        "torch.logsumexp(estimates + log_counts[:, None], 0)",
        "estimates.mean(0) + torch.logsumexp(log_counts, 0)",
    ),
    ("evaluation", "pooled", "no-log", "counts.float().log()", "counts.float()"),
    ("evaluation", "pooled", "no-total", " - torch.logsumexp(log_counts, 0)", ""),
    ("evaluation", "standard_error", "deviation", " / math.sqrt(len(values))", ""),
    ("evaluation", "standard_error", "over-n", "math.sqrt(len(values))", "len(values)"),
    ("evaluation", "standard_error", "biased", "values.std()", "values.std(unbiased=False)"),
    ("evaluation", "log_likelihood", "no-log-k", " - math.log(num_samples)", ""),
    ("evaluation", "log_likelihood", "elbo", "torch.logsumexp(weights, 0) - math.log(num_samples)", "weights.mean(0)"),
    ("evaluation", "log_likelihood", "weights-no-prior", " + log_p", ""),
    ("evaluation", "log_likelihood", "noise-variance", "(log_var / 2).exp()", "log_var.exp()"),
    ("evaluation", "mixture_prior", "unnormalized", ".log_softmax(0)", ""),
    ("evaluation", "mixture_prior", "unnormalized", " + math.log(2 * math.pi)", ""),
    ("evaluation", "mixture_prior", "sample", "(self.log_var[m] / 2).exp()", "self.log_var[m].exp()"),
    (
        "evaluation",
        "mixture_prior",
        "generator",
        "torch.randn(num, self.mean.shape[1], generator=generator)",
        "torch.randn(num, self.mean.shape[1])",
    ),
    ("evaluation", "mixture_prior", "shape", "torch.logsumexp(parts, -1)", "torch.logsumexp(parts, -1).sum(-1)"),
    ("evaluation", "full_posterior", "unnormalized", " - diagonal.log().sum(-1)", ""),
    ("evaluation", "full_posterior", "sample", "self.factor @ eps", "self.factor.mT @ eps"),
    ("evaluation", "full_posterior", "detached", "column = (z - ", "column = (z.detach() - "),
    ("evaluation", "full_posterior", "own-noise", "self.factor @ eps", "self.factor @ torch.randn_like(eps)"),
    ("hierarchy", "kl_between", "no-precision", " * (-prior_log_var).exp()", ""),
    ("hierarchy", "kl_between", "no-half", "0.5 * ", ""),
    ("hierarchy", "kl_between", "means-added", "mean - prior_mean", "mean + prior_mean"),
    ("hierarchy", "layered_prior", "sample", "(log_var / 2).exp()", "log_var.exp()"),
    ("hierarchy", "layered_prior", "sample", "self.below(z2)\n        return", "self.below(0 * z2)\n        return"),
    ("hierarchy", "layered_prior", "generator", "torch.randn(num, self.dim2, generator=generator)", "torch.randn(num, self.dim2)"),
    ("hierarchy", "layered_prior", "unnormalized", "upper + vaelib", "vaelib"),
    ("hierarchy", "layered_posterior", "sample", "self.below(z2)\n        z1", "self.below(self.mean2.expand_as(z2))\n        z1"),
    ("hierarchy", "layered_posterior", "unnormalized", "return log_q + ", "return "),
    ("hierarchy", "layered_posterior", "sample", "(self.log_var2 / 2).exp() * eps", "self.log_var2.exp() * eps"),
    ("hierarchy", "layered_posterior", "shape", "torch.cat([mean2, below(mean2)[0]], dim=-1)", "mean2[0]"),
    ("hierarchy", "layered_posterior", "other-mean", "below(mean2)[0]], dim", "below(0 * mean2)[0]], dim"),
    ("hierarchy", "layered_elbo", "standard-prior", "(mean1, log_var1, *model.prior1(z2))", "(mean1, log_var1)"),
    ("hierarchy", "layered_elbo", "no-upper", " - upper", ""),
    ("hierarchy", "layered_elbo", "prior-at-mean", "model.prior1(z2)", "model.prior1(mean2)"),
    ("hierarchy", "layered_elbo", "detached", "mean1 + (log_var1", "mean1.detach() + (log_var1"),
    ("hierarchy", "layered_evidence", "no-middle", " + scale1**2 * torch.eye(len(upper))", ""),
    ("hierarchy", "layered_evidence", "not-squared", "    of_z1 = ", "    scale1, scale = scale1**0.5, scale**0.5\n    of_z1 = "),
    ("hierarchy", "layered_evidence", "sign", "return normal", "return -normal"),
    ("hierarchy", "ancestral", "mean-decoded", "mean + (log_var / 2).exp() * eps1", "mean"),
    ("hierarchy", "ancestral", "variance", "(log_var / 2).exp()", "log_var.exp()"),
    ("hierarchy", "ancestral", "top-mean", "model.prior1(eps2)", "model.prior1(0 * eps2)"),
    ("hierarchy", "quantize", "inner-product", "codes.square().sum(1) - 2 * output", "-output"),
    ("hierarchy", "quantize", "no-straight-through", "output + (chosen - output).detach()", "chosen.detach()"),
    ("hierarchy", "quantize", "no-stop-commitment", "(output - chosen.detach())", "(output - chosen)"),
    ("hierarchy", "quantize", "beta-on-codebook", "pull + beta * commitment", "beta * pull + commitment"),
]


@pytest.mark.parametrize(
    ("of", "task", "mistake", "piece", "instead"),
    [("vae", *row) for row in WRITTEN] + WRITTEN_LATER,
    ids=lambda value: value[:16],
)
def test_a_mistake_in_a_task_costs_its_points_and_is_named(of, task, mistake, piece, instead):
    text = answer(task, of)
    assert text.count(piece) == 1
    if mistake == "unregistered":
        text = text.replace("self.mean(h)", "self.heads[0](h)")
    notebook = solved(of, **{task: text.replace(piece, instead)})
    report = assignment.grade(notebook, functools.partial(execute, of_task=task), source(of))
    assert list(lost(report)) == [task]
    assert report["points"] == 84 - next(row["of"] for row in report["tasks"] if row["task"] == task)
    assert lost(report)[task].startswith(f"not yet [{mistake}]: ")
    known = {**TABLES, **LATER}.get(task, {})
    if mistake in known:
        assert known[mistake][0] in lost(report)[task]


@every
def test_a_task_asks_for_no_other_one_s_answer(of):
    roles = [(role, cell.id) for role, _, cell in assignment.read_source(source(of))]
    stubs = {cell.id: cell.source for cell in assignment.student_notebook(source(of)).cells}
    tasks = [name for role, name in roles if role == "answer"]
    for task in tasks:
        alone = solved(of, **{other: stubs[other] for other in tasks if other != task})
        assert set(lost(assignment.grade(alone, execute, source(of)))) == set(tasks) - {task}


@every
def test_every_task_has_at_least_three_of_these_mistakes_and_one_whose_sentence_is_the_checker_s(of):
    rows = [("vae", *row) for row in WRITTEN] + WRITTEN_LATER
    tasks = [task for name, task, *_ in rows if name == of]
    assert set(tasks) == {cell.id.removesuffix("-test") for role, _, cell in assignment.read_source(source(of)) if role == "test"}
    assert min(map(tasks.count, tasks)) >= 3
    for task in set(tasks) & {*TABLES, *LATER}:
        assert {mistake for _, name, mistake, *_ in rows if name == task} & set({**TABLES, **LATER}[task]), task


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


of_kl = functools.partial(execute, of_task="kl")


def test_what_a_task_does_without_is_noted_and_costs_nothing():
    report = assignment.grade(solved(kl="def kl(mean, log_var):\n    return vaelib.gaussian_kl(mean, log_var)"), of_kl)
    assert report["points"] == 84
    assert report["notes"] == ["kl: the answer holds 'vaelib', which the task does without"]


def test_an_answer_that_the_checkers_give_is_noted():
    report = assignment.grade(solved(kl="kl = checks.terms.kl_recipe"), of_kl)
    assert [note.split(", ")[0] for note in report["notes"]] == [
        f"kl: the answer holds {word!r}" for word in ("checks.", "_recipe")
    ]


def test_an_essay_left_as_it_was_gets_no_points_and_a_deleted_one_neither():
    notebook = solved(**{ESSAYS[0]: " YOUR ANSWER HERE\n"})
    notebook.cells = [cell for cell in notebook.cells if cell.id != ESSAYS[1]]
    notebook.cells.append(new_markdown_cell("a note of my own"))
    report = assignment.grade(notebook, of_kl)
    assert lost(report) == dict.fromkeys(ESSAYS, "no answer")
    assert (report["points"], report["by_hand"]) == (84, 0)


def test_a_run_goes_on_after_an_error_and_an_endless_cell_and_ends_with_the_kernel(tmp_path, capsys):
    sources = ["a = 1", "1 / 0", "import time\nwhile True:\n    time.sleep(0.1)", "assert a", "import os; os._exit(0)", "a"]
    notebook = assignment.new_notebook(cells=[new_code_cell(source) for source in sources])
    assert assignment.run(notebook, tmp_path, timeout=5) == {0, 3}
    assert "the run broke off" in capsys.readouterr().err


def last_cells(notebook, monkeypatch):
    """A notebook after a fast run: whether its two last cells ended well, and what the cells after the last test said."""
    monkeypatch.setenv("VAELIB_FAST", "1")
    ended = execute(notebook)
    code = [place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    last, graded = code[-2:], max(place for place in code if notebook.cells[place].metadata.get("nbgrader", {}).get("grade"))
    outputs = [output for place in code if place > graded for output in notebook.cells[place].outputs]
    return [place in ended for place in last], "".join(output.get("text", "") + output.get("evalue", "") for output in outputs)


LAST = {  # of an assignment's last part: how FAST is written in its text, what it prints, how far five trainings lie apart, figures
    "vae": (r"about (-\d+) with `FAST`", r"bound (-[\d.]+) nats", 3, 2),
    "likelihoods": (r"about ([\d.]+) with `FAST`", r"test set: ([\d.]+) bits per dimension", 0.7, 1),
    "evaluation": (r"about (-\d+) with `FAST`", r"log p\(x\) (-[\d.]+) \+- ", 5, 1),
    "hierarchy": (r"about (-\d+) with `FAST`", r"ELBO (-[\d.]+) nats", 8, 1),
}


@every
def test_the_last_part_trains_the_student_s_own_model_once_all_parts_pass_and_reaches_the_number_it_names(of, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    in_text, printed, room, figures = LAST[of]
    ended, told = last_cells(assignment.student_notebook(source(of)), monkeypatch)
    assert ended == [True, True]
    assert f"All {PARTS[of]} parts must pass first." in told
    notebook = assignment.instructor_notebook(source(of))
    notebook.cells = [cell for cell in notebook.cells if of == "vae" or "print(checks." not in cell.source]
    ended, told = last_cells(notebook, monkeypatch)
    assert ended == [True, True], told
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").replace("−", "-")
    (named,) = (float(n) for n in re.findall(in_text, text))
    reached = [float(n) for n in re.findall(printed, told)][-1]
    assert abs(reached - named) < room
    assert len(shown) == figures
    plt.close("all")


@every
def test_the_last_part_names_a_number_that_five_trainings_reached_and_a_limit_beyond_them(of):
    text = "\n".join(cell.source for cell in assignment.student_notebook(source(of)).cells).replace("−", "-")
    (usual, low, high) = (
        float(n)
        for n in re.search(
            r"reaches about (-?[\d.]+) .*five trainings of the model answer: (-?[\d.]+) to (-?[\d.]+)[,)]", text
        ).groups()
    )
    fast_limit, limit = (
        float(n)
        for n in re.search(r"(?:usual, \w+) = \(-?[\d.]+, (-?[\d.]+)\) if FAST else \(-?[\d.]+, (-?[\d.]+)\)", text).groups()
    )
    assert min(low, high) - 0.5 <= usual <= max(low, high) + 0.5
    assert (limit > max(low, high)) if of == "likelihoods" else (limit < min(low, high))
    assert f"{limit:g}" in text.split("The cell fails")[1]
    assert f"{fast_limit:g}" in text.split("The cell fails")[1]


def test_the_last_part_fails_where_the_parts_do_not_reach_the_number_together(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    bounded = answer("networks").replace("nn.Unflatten(1, tuple(image_shape))", "nn.Unflatten(1, tuple(image_shape)), nn.Sigmoid()")
    notebook = solved(networks=bounded, **{"networks-test": "verdicts['networks'] = True"})
    ended, told = last_cells(notebook, monkeypatch)
    assert ended == [True, False]
    assert "a right solution reaches about -176" in told
    plt.close("all")


@every
def test_the_instructor_s_copy_of_each_is_written_and_graded_without_its_name(of, tmp_path, capsys, monkeypatch):
    path = tmp_path / "copy.ipynb"
    assignment.main(["--instructor", str(path), "--of", of])
    assert nbformat.read(path, as_version=4) == assignment.instructor_notebook(source(of))
    capsys.readouterr()
    monkeypatch.setattr(assignment, "run", lambda notebook, folder, timeout: set())
    assignment.main(["--grade", str(path)])
    assert capsys.readouterr().out.startswith(f"assignment {of}\n")
    assignment.main(["--grade", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["assignment"] == of


def test_all_students_notebooks_are_written_or_those_that_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assignment, "student_of", lambda name: tmp_path / f"{name}-assignment.ipynb")
    assignment.main(["likelihoods"])
    assert [path.name for path in tmp_path.iterdir()] == ["likelihoods-assignment.ipynb"]
    assignment.main([])
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}-assignment.ipynb" for name in LADDER}
    assert (tmp_path / "vae-assignment.ipynb").read_text() == assignment.STUDENT.read_text()
    for arguments, words in (
        (["vea"], "got vea, expected some of vae, likelihoods"),
        (["vae", "--grade", "x.ipynb"], "expected none"),
        (["--of", "vae"], "got no --instructor OUT"),
    ):
        with pytest.raises(SystemExit):
            assignment.main(arguments)
        assert words in capsys.readouterr().err


def test_a_notebook_of_no_assignment_is_refused_in_words_and_a_mixed_one_is_the_one_it_has_most_of(tmp_path, capsys):
    path = tmp_path / "other.ipynb"
    nbformat.write(assignment.new_notebook(cells=[new_code_cell("a = 1")]), path)
    with pytest.raises(SystemExit):
        assignment.main(["--grade", str(path)])
    assert "got a notebook with no cell of an assignment, expected one of vae, likelihoods" in capsys.readouterr().err
    mixed = assignment.student_notebook(source("hierarchy"))
    mixed.cells += [cell for cell in assignment.student_notebook().cells if cell.id in ("kl", "kl-test")]
    assert assignment.assignment_of(mixed) == "hierarchy"


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
    assert not [of for of in LADDER if str(ROOT) in assignment.student_of(of).read_text()]
