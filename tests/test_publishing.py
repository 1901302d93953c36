"""What carries the project to others: workflows, the matrix of versions, the repository's address."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import test_book
import yaml

import vaelib

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MADE = {"_build/html", "_build/notebooks", "dist"}  # what the commands of a workflow make


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps_of(path):
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


def commands_of(path):
    return "\n".join(step.get("run", "") for step in steps_of(path))


def targets():
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_workflows_are_there():
    assert {"ci", "pages", "weekly", "links", "release"} <= {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_triggers_few_permissions_and_actions_by_version(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True]  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more says so itself
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert job["steps"]
        assert not set(job.get("needs", "").split()) - set(workflow["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@v\d+(\.\d+)*", step.get("uses", "actions/checkout@v4"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_target_and_path_that_a_workflow_names_exists(path):
    commands = commands_of(path)
    assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets()
    named = set(re.findall(r"(?<![\w/.-])((?:\.?[\w-]+/)+[\w-]+(?:\.\w+)?)(?![\w/])", commands))
    for step in steps_of(path):
        options = step.get("with", {})
        named |= {options[key] for key in ("path", "cache-dependency-path") if key in options}
    assert {name for name in named - MADE if not (ROOT / name).exists()} == set()


def test_every_target_has_a_line_of_help_and_all_are_phony():
    makefile = (ROOT / "Makefile").read_text()
    help_of = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^make ([a-z-]+) +\w", help_of, re.MULTILINE)) == targets()
    assert set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()) == targets()


def test_make_runs_the_chapters_of_the_contents_or_those_it_is_given():
    notebooks = [f"book/{name}.ipynb" for name in test_book.CHAPTERS]
    asked = {"": notebooks} | {f"CHAPTERS={notebook}": [notebook] for notebook in notebooks[:2]}
    for choice, expected in asked.items():
        for target in ("test-notebooks", "execute"):
            done = subprocess.run(["make", "-n", target, *choice.split()], cwd=ROOT, capture_output=True, text=True, check=True)
            lines = [line for line in done.stdout.splitlines() if "nbval" in line or "execute.py" in line]
            assert all("book/" in line for line in lines)  # without a notebook pytest would run all that it finds
            assert re.findall(r"book/[a-z-]+\.ipynb", "\n".join(lines)) == expected


def test_the_workflow_s_matrix_is_that_of_make_matrix_and_starts_with_the_oldest_python_allowed():
    matrix = load(ROOT / "tests" / "matrix.py")
    cells = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["matrix"]["strategy"]["matrix"]
    assert tuple(cells["python"]) == matrix.PYTHONS
    assert cells["versions"] == ["oldest", "newest"]
    assert f'requires-python = ">={matrix.PYTHONS[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_oldest_releases_are_the_lower_bounds_of_pyproject_where_they_have_wheels():
    matrix = load(ROOT / "tests" / "matrix.py")
    text = (ROOT / "pyproject.toml").read_text()
    bounds = dict(line.split("==") for line in matrix.oldest("3.10").split())
    assert {"torch", "torchvision", "numpy", "typer"} <= set(bounds)
    for name, version in bounds.items():
        assert f'"{name}>={version}"' in text
    for python in matrix.FIRST_WHEELS:
        pinned = dict(line.split("==") for line in matrix.oldest(python).split())
        assert set(pinned) == set(bounds)
        assert all([*map(int, pinned[name].split("."))] >= [*map(int, bounds[name].split("."))] for name in bounds)


def test_a_python_that_is_not_here_is_named_and_fails_only_where_it_was_asked_for(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "matrix.py")]
    run = lambda *more: subprocess.run([*command, *more], capture_output=True, text=True, env={"PATH": str(tmp_path)})  # noqa: E731
    result = run()
    assert result.returncode == 0
    assert result.stdout.count("not here") == 8
    assert run("--python", "3.10").returncode == 1


def test_the_release_is_refused_unless_the_tag_is_the_version(tmp_path):
    steps = [
        step["run"] for step in steps_of(ROOT / ".github" / "workflows" / "release.yml") if "GITHUB_REF_NAME" in step.get("run", "")
    ]
    assert len(steps) == 1
    for tag, code in ((f"v{vaelib.__version__}", 0), ("v99.0", 1), (f"v{vaelib.__version__}.1", 1)):
        done = subprocess.run(["bash", "-e", "-c", steps[0]], cwd=ROOT, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"})
        assert done.returncode == code


@pytest.fixture
def copy(tmp_path):
    """The parts of the project that know its address."""
    skipped = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("book", "vaelib/assets"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    for file in ("README.md", "CITATION.cff", "_config.yml", "pyproject.toml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / file, tmp_path)
    for file in (ROOT / "vaelib").glob("*.py"):
        shutil.copy(file, tmp_path / "vaelib")
    return tmp_path


def move(copy, address):
    """What the command does in this copy of the project."""
    load(copy / "book" / "_scripts" / "address.py").main(address)


def texts_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".png")]
    return {path.relative_to(folder): path.read_text(encoding="utf-8") for path in files}


def test_one_command_changes_the_address_everywhere(copy, monkeypatch):
    old = yaml.safe_load((copy / "_config.yml").read_text())["repository"]["url"]
    owner, name = old.split("/")[-2:]
    before = texts_of(copy)
    move(copy, "https://github.com/Ada-L/my_vae-course")
    after = texts_of(copy)
    assert set(after) == set(before)
    assert not [path for path, text in after.items() if f"{owner}/{name}" in text or f"{owner}.github.io" in text]
    assert "ogp_site_url: https://ada-l.github.io/my_vae-course/" in after[Path("_config.yml")]
    assert "git clone https://github.com/Ada-L/my_vae-course && cd my_vae-course" in after[Path("README.md")]
    nbformat.validate(nbformat.read(copy / "book" / "elbo.ipynb", as_version=4))
    monkeypatch.setattr(test_book, "ROOT", copy)
    monkeypatch.setattr(test_book, "BOOK", copy / "book")
    test_book.test_the_address_of_the_repository_is_the_same_everywhere()
    move(copy, old)
    assert texts_of(copy) == before
    for wrong in ("github.com/a/b", "https://github.com/a", "https://github.com/a/b/", "https://github.com/a/b.git"):
        with pytest.raises(SystemExit, match="address: got"):
            move(copy, wrong)
    assert texts_of(copy) == before


def test_the_address_stands_nowhere_that_the_command_does_not_reach():
    address = load(ROOT / "book" / "_scripts" / "address.py")
    reached = {path for pattern in address.USERS for path in ROOT.glob(pattern)}
    old = "/".join(yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"].split("/")[-2:])
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in ("book", "vaelib", "tests", "benchmarks", ".github", ".ci") for path in (ROOT / folder).rglob("*")]
    files = [path for path in files if path.suffix in (".cff", ".html", ".ipynb", ".js", ".md", ".py", ".toml", ".txt", ".yml")]
    assert [path for path in files if old in path.read_text(encoding="utf-8") and path not in reached] == []


def test_the_colab_check_replaces_the_address_in_the_first_cell_alone(tmp_path):
    script = load(ROOT / "book" / "_scripts" / "colab_check.py")
    assert set(test_book.CHAPTERS) < set(script.chapters())
    for name in set(script.chapters()) - set(test_book.CHAPTERS):  # of the chapters `test_notebooks.py` says so
        notebook = script.with_local_address(name, Path("somewhere"), tmp_path)
        cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert ["%pip install -q somewhere\n" in source for source in cells] == [True] + [False] * (len(cells) - 1)
