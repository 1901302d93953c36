"""The unit tests on each Python that is here, with the oldest and with the newest releases that pyproject.toml allows: `make matrix`.

    python tests/matrix.py --python 3.10 --versions oldest

Each cell of the matrix is an environment of its own in a temporary folder (up to 6 GB, minutes of installing), removed after its run.
A Python that is not here is named, and fails the matrix only where it was asked for.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The lower bounds of pyproject.toml have no wheels for these Pythons; these are the first releases that have.
FIRST_WHEELS = {
    "3.13": {"numpy": "2.1.0", "matplotlib": "3.9.2", "scikit-learn": "1.5.2", "safetensors": "0.4.4", "pillow": "10.4.0"},
}


def oldest(python):
    """Constraints that pin each dependency of the library to its lower bound, or to the first release for that Python."""
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', dependencies))
    return "".join(f"{name}=={version}\n" for name, version in (bounds | FIRST_WHEELS.get(python, {})).items())


def interpreter(python):
    """The command of a Python that is here and runs, or None."""
    command = shutil.which(f"python{python}")
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    found = command and subprocess.run([command, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    return command if found == python else None


def run(command, python, versions, tests):
    """Install and test in a fresh environment: "passed", or what failed."""
    with tempfile.TemporaryDirectory(prefix="vaelib-matrix-") as folder:
        own = str(Path(folder, "bin", "python"))
        pins = Path(folder, "pins.txt")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        steps = {
            "venv": [command, "-m", "venv", folder],
            "install": [own, "-m", "pip", "install", "--quiet", "--editable", ".[book,test]", "--constraint", str(pins)],
            "check": [own, "-m", "pip", "check"],
            "tests": [own, "-m", "pytest", "-m", "not real_data", "-p", "no:cacheprovider", *(tests or ["tests"])],
        }
        for name, step in steps.items():
            if name == "install":
                pins.write_text(oldest(python) if versions == "oldest" else "")
            if subprocess.run(step, cwd=ROOT, env=environment, check=False).returncode:
                return f"failed: {name}"
        return "passed"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", choices=PYTHONS, action="append", help="only this Python; may be given again")
    parser.add_argument("--versions", choices=("oldest", "newest"), help="only these releases of the dependencies")
    parser.add_argument("tests", nargs="*", help="what to run instead of all unit tests")
    asked = parser.parse_args()
    results = {}
    for python in asked.python or PYTHONS:
        command = interpreter(python)
        for versions in (asked.versions,) if asked.versions else ("oldest", "newest"):
            results[python, versions] = run(command, python, versions, asked.tests) if command else "not here"
    for (python, versions), result in results.items():
        print(f"Python {python}  {versions}  {result}")
    fine = ("passed",) if asked.python else ("passed", "not here")
    sys.exit(any(result not in fine for result in results.values()))


if __name__ == "__main__":
    main()
