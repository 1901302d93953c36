"""The project's own files agree with each other, and importing the library is cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


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


@pytest.mark.parametrize("attempt", [3])
def test_importing_vaelib_costs_at_most_0_3_seconds_over_torch(attempt):
    code = "import time, torch; start = time.perf_counter(); import vaelib; print(time.perf_counter() - start)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(attempt)
    ]
    assert min(times) <= 0.3


def imports_of(module):
    """The vaelib modules that a module imports at its top level."""
    found = set()
    for node in ast.parse((ROOT / "vaelib" / f"{module}.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "vaelib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vaelib."):
            found.add(node.module.removeprefix("vaelib."))
    return found


ORDER = [
    *("_validation", "data", "likelihoods", "objectives", "noise", "networks", "vae", "hierarchical", "conditional", "storage"),
    *("checkpoints", "distributed", "training", "evaluation", "reproduce", "generation", "priors", "retrieval", "quality"),
    *("oracles", "checks", "ledger", "plotting", "widgets", "cli"),
]


def test_imports_run_one_way_down_the_order_of_the_modules():
    modules = {path.stem for path in (ROOT / "vaelib").glob("*.py")} - {"__init__", "__main__"}
    assert set(ORDER) == modules
    for place, module in enumerate(ORDER):
        assert imports_of(module) <= set(ORDER[:place]), module
    assert not {"training", "cli"} & imports_of("plotting")
