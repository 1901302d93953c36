"""The project's own files agree with each other, and importing the library is cheap."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tokenize
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

import vaelib

ROOT = Path(__file__).parent.parent

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


STEPS = ("data", "likelihoods", "objectives", "networks", "vae", "training", "generation", "retrieval", "evaluation")


def lines_of_code(path):
    """The lines of a module without docstrings, comments and blank lines."""
    bodies = [
        node.body for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
    ]
    firsts = [body[0] for body in bodies if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)]
    strings = {line for first in firsts for line in range(first.lineno, first.end_lineno + 1)}
    blank = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.ENCODING,
    )
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in blank]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - strings)


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def test_environment_yml_asks_for_what_pyproject_asks_for(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    by_pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    wanted = [*project["dependencies"], *project["optional-dependencies"]["book"], *project["optional-dependencies"]["test"]]
    assert sorted(r for r in by_pip if not r.startswith("-")) == sorted(wanted)
    assert [r for r in by_pip if r.startswith("-")] == ["--constraint constraints.txt", "--editable ."]


def test_the_client_s_packages_are_all_there(project):
    names = {name_of(r) for r in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]}
    assert {"jupyter-book", "torch", "torchvision", "matplotlib", "nbval", "ipywidgets", "pytest"} <= names


def test_requirements_have_lower_bounds_only_and_constraints_pin_them_all(project):
    assert not [r for r in project["dependencies"] if "<" in r or "==" in r]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)  # no address, no path
    pinned = {name_of(line) for line in lines}
    wanted = {name_of(r) for r in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]}
    assert wanted <= pinned


def test_importing_vaelib_costs_at_most_0_3_seconds_over_torch():
    code = "import time, torch; start = time.process_time(); import vaelib; print(time.process_time() - start)"
    command = [sys.executable, "-c", code]
    tries = (float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3))
    assert any(seconds <= 0.3 for seconds in tries)  # a second and a third try on a busy machine alone


def imports_of(module):
    """The vaelib modules that a module imports at its top level."""
    found, folder = set(), ROOT / "vaelib" / module
    sources = folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    for node in (node for source in sources for node in ast.parse(source.read_text()).body):
        if isinstance(node, ast.ImportFrom) and node.module == "vaelib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vaelib."):
            found.add(node.module.split(".")[1])
    return found - ({module} if folder.is_dir() else set())


ORDER = [
    *("_validation", "files", "data", "likelihoods", "objectives", "noise", "densities", "networks", "vae", "fixed"),
    *("heldout", "hierarchical", "conditional", "storage", "coding", "config", "checkpoints", "distributed"),
    *("graphs", "step", "training", "evaluation", "predictive"),
    *("generation", "quantize", "priors", "diffusion", "retrieval", "quality", "factors", "checks", "book", "cli"),
]


def test_the_modules_of_the_book_s_steps_can_be_read_in_an_evening():
    lengths = {name: lines_of_code(ROOT / "vaelib" / f"{name}.py") for name in STEPS}
    assert max(lengths.values()) <= 400, lengths
    assert sum(lengths.values()) <= 2200, lengths
    assert lines_of_code(ROOT / "vaelib" / "step.py") <= 150  # the tenth, which `training` calls


def test_imports_run_one_way_down_the_order_of_the_modules():
    modules = {path.stem for path in (ROOT / "vaelib").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    modules -= {"__init__", "__main__"}
    assert set(ORDER) == modules
    for place, module in enumerate(ORDER):
        assert imports_of(module) <= set(ORDER[:place]), module
    assert not {"training", "cli"} & (imports_of("book/plotting") | imports_of("book/widgets"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the source archive, built without network from a copy: a build leaves files behind."""
    for needed, lowest in (("build", 1), ("setuptools", 77)):
        try:
            found = version(needed)
        except PackageNotFoundError:
            pytest.skip(f"{needed} is not installed, and without a network nothing can be built: pip install {needed}")
        if int(found.split(".")[0]) < lowest:
            pytest.skip(f"{needed} {found} is here, but {lowest} is the oldest that builds the library")
    folder = tmp_path_factory.mktemp("build") / "project"
    skipped = shutil.ignore_patterns(".*", "_*", "*.egg-info", "build", "dist", "mutants", "runs", "results")
    shutil.copytree(
        ROOT, folder, ignore=lambda here, names: skipped(here, names) - {"__init__.py", "__main__.py", "_validation.py"}
    )
    made = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    subprocess.run(made, cwd=folder, capture_output=True, check=True)
    (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, source


def library_files():
    files = [path for path in (ROOT / "vaelib").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in files}


def test_the_wheel_holds_the_library_its_assets_and_its_types_and_nothing_else(distributions):
    names = set(zipfile.ZipFile(distributions[0]).namelist())
    assert {"vaelib/py.typed", "vaelib/assets/page.js", "vaelib/assets/mnist-features.safetensors"} <= names
    released = {
        f"vaelib/assets/models/{name}/{file}" for name in vaelib.released() for file in ("config.json", "model.safetensors")
    }
    assert released | {"vaelib/assets/models/released.json"} <= names
    assert {name for name in names if ".dist-info/" not in name} == library_files()


def test_the_source_archive_holds_what_the_wheel_is_built_from_and_no_book(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert library_files() | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not {name for name in names if name.split("/")[0] in ("book", "results", "benchmarks")}


def test_the_version_has_one_source_and_the_citation_repeats_it(distributions):
    wheel = zipfile.ZipFile(distributions[0])
    read = lambda name: wheel.read(f"vaelib-{vaelib.__version__}.dist-info/{name}").decode()  # noqa: E731
    assert f"\nVersion: {vaelib.__version__}\n" in read("METADATA")
    assert "vaelib = vaelib.cli:main" in read("entry_points.txt")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == vaelib.__version__


def test_every_ignored_type_names_its_code_and_ruff_and_mypy_are_what_make_lint_runs():
    for path in (ROOT / "vaelib").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "type: ignore" not in line or re.search(r"# type: ignore\[[a-z, -]+\]", line), f"{path.name}: {line}"
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert [line.split("/")[-1].split()[0] for line in recipe.splitlines()] == ["ruff", "ruff", "mypy"]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["strict"] is True


def test_a_name_of_the_library_means_one_thing():
    places = {}
    for path in (ROOT / "vaelib").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = [node] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else getattr(node, "targets", [])
            for name in {getattr(target, "name", None) or getattr(target, "id", None) for target in targets} - {None}:
                places.setdefault(name, []).append(path.stem)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert twice.keys() == {"__all__", "T", "Function", "evaluate"}, (
        twice
    )  # types of annotations; the command that calls the function
    assert sorted(twice["evaluate"]) == ["cli", "evaluation"]


def test_every_name_that_the_reference_lists_exists():
    text = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"automodule:: (\S+)\n +:members: (.+)", text)
    assert len(listed) > 20
    for module, names in listed:
        assert [name for name in names.split(", ") if not hasattr(importlib.import_module(module), name)] == [], module


def test_the_first_try_of_the_readme_runs_as_it_stands_in_under_a_minute(tmp_path):
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## `vaelib` on the first try\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.+?)```", section, re.DOTALL)
    assert len([line for line in blocks[0].splitlines() if line and line != "import vaelib"]) == 5
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VAELIB_DATA": str(tmp_path / "none"), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = float(re.search(r"near (-\d+)", blocks[0])[1])
    assert abs(float(done.stdout) - said) < 4  # no seed is set: a training's spread
    pictures = [path.name for path in tmp_path.iterdir()]
    assert sorted(pictures) == ["digits.png", "samples.png"]
