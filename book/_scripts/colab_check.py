"""Run the chapters as a fresh Colab machine would: `make colab-check`, or `python book/_scripts/colab_check.py --only elbo`

What runs is what Colab opens: the notebooks of `make notebooks`, and the assignments.
Colab has the newest torch and torchvision, no checkout and no vaelib. So does the environment that is made here, without constraints.
Each chapter gets a new environment on top of it and runs there, alone in an empty folder, in the fast tier. Its own first cell must
install vaelib within a minute; only the address in it is replaced, by a copy of this checkout. The torch that was there must be there
afterwards.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOUND = filter(None, map(shutil.which, ("python3.12", "python3.11")))  # of which some may be a stand-in that starts nothing
PYTHON = next((name for name in FOUND if not subprocess.run([name, "-c", ""], capture_output=True).returncode), sys.executable)
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
TORCH = "import torch, torchvision; print(torch.__version__, torchvision.__version__, torch.__file__)"
VAELIB = "import vaelib; print(vaelib.__file__)"
RUN = """
import sys, nbformat, nbclient
from datetime import datetime
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
first = next(cell for cell in notebook.cells if cell.cell_type == "code").metadata.execution
begin, end = (datetime.fromisoformat(first[key].replace("Z", "+00:00")) for key in ("iopub.execute_input", "shell.execute_reply"))
print((end - begin).total_seconds())
"""
SECONDS = 60  # of the first cell


def chapters():
    """The notebooks of the table of contents that open on Colab."""
    found = [path.stem for path in sorted((ROOT / "book").glob("*.ipynb"))]
    return [*found, *(f"assignments/{path.stem}" for path in sorted((ROOT / "book" / "assignments").glob("*.ipynb")))]


def call(python, *arguments, **options):
    """What a Python prints, in an environment that knows no constraints and no other packages."""
    hidden = ("PIP_CONSTRAINT", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"VAELIB_FAST": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    arguments = [str(python), *map(str, arguments)]
    return subprocess.run(arguments, env=environment, check=True, stdout=subprocess.PIPE, text=True, **options).stdout.strip()


def machine(folder):
    """A Python with the newest torch, and what runs notebooks; an environment that is there is taken as it is."""
    python = folder / "bin" / "python"
    if not python.exists():
        call(PYTHON, "-m", "venv", folder)
        call(python, "-m", "pip", "install", "--quiet", "torch", "torchvision", "ipykernel", "nbclient", "ipywidgets")
    return python


def on_top_of(base, folder):
    """A new environment that sees the packages of another and changes none of them."""
    call(base, "-m", "venv", folder)
    python = folder / "bin" / "python"
    Path(call(python, "-c", SITE), "machine.pth").write_text(call(base, "-c", SITE) + "\n")
    return python


def checkout(folder):
    """A copy of what builds vaelib: a build leaves files behind."""
    shutil.copytree(ROOT / "vaelib", folder / "vaelib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def solved(path, folder):
    """The instructor's copy of an assignment: the students' stops at the first part that is not written yet."""
    spec = importlib.util.spec_from_file_location("assignment", ROOT / "book" / "_scripts" / "assignment.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    out = folder / path.name
    nbformat.write(script.instructor_notebook(script.source_of(path.stem.removesuffix("-assignment"))), out)
    return out


def with_local_address(name, source, folder):
    """The chapter with `git+ADDRESS` replaced by the copy, in its first code cell and once."""
    if name.startswith("assignments/"):
        path = solved(ROOT / "book" / f"{name}.ipynb", folder)
    else:
        path = ROOT / "_build" / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    wanted = "git+" + yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if first.source.count(wanted) != 1:
        raise ValueError(f"{name}: its first cell does not install {wanted}")
    first.source = first.source.replace(wanted, str(source))
    return notebook


def check(name, base, source):
    """Raises unless the chapter installs vaelib, leaves torch alone, and runs."""
    with tempfile.TemporaryDirectory(prefix="vaelib-colab-") as folder:
        folder = Path(folder)
        python, alone = on_top_of(base, folder / "environment"), folder / "content"
        alone.mkdir()
        before = call(python, "-c", TORCH)
        nbformat.write(with_local_address(name, source, folder), alone / "chapter.ipynb")
        seconds = float(call(python, "-c", RUN, "chapter.ipynb", cwd=alone).splitlines()[-1])
        if seconds > SECONDS:
            raise ValueError(f"{name}: its first cell took {seconds:.0f} seconds, expected at most {SECONDS}")
        if call(python, "-c", TORCH, cwd=alone) != before:
            raise ValueError(f"{name}: torch was {before}, and is now {call(python, '-c', TORCH)}")
        installed = Path(call(python, "-c", VAELIB, cwd=alone))
        if folder / "environment" not in installed.parents:
            raise ValueError(f"{name}: vaelib came from {installed}, not from the first cell")
    return before, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=chapters(), help="only this chapter; may be given again")
    parser.add_argument("--machine", type=Path, help="folder of the environment with torch; made where it is missing, and kept")
    asked = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory(prefix="vaelib-colab-") as folder:
        base = machine((asked.machine or Path(folder, "machine")).absolute())
        source = checkout(Path(folder, "checkout"))
        for name in asked.only or chapters():
            try:
                versions, seconds = check(name, base, source)
                torch, torchvision, _ = versions.split(maxsplit=2)
                kept = f"leaves torch {torch} and torchvision {torchvision} alone"
                print(f"{name}: installs in {seconds:.0f} seconds, runs, and {kept}", flush=True)
            except (subprocess.CalledProcessError, ValueError) as error:
                failed.append(name)
                print(f"{name}: FAILED: {error}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
