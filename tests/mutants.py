"""Break the library's heart in every way that mutmut knows and list the mutants that no test notices: `make mutants`.

A survivor must stand in CONTRIBUTING.md under "Mutants that survive", with the reason; any other ends this command with status 1.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def mutmut(*arguments):
    return subprocess.run([sys.executable, "-m", "mutmut", *arguments], cwd=ROOT, capture_output=True, text=True)


def main():
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)
    run = subprocess.run([sys.executable, "-m", "mutmut", "run"], cwd=ROOT)
    listed = mutmut("results", "--all", "true").stdout
    counts = {}
    survivors = []
    for name, status in re.findall(r"^\s*(\S+): (.+)$", listed, re.MULTILINE):
        counts[status] = counts.get(status, 0) + 1
        if status not in ("killed", "timeout", "caught by type check"):
            survivors.append((name, status))
    excused = (ROOT / "CONTRIBUTING.md").read_text()
    for name, status in survivors:
        known = f"`{name}`" in excused
        print(f"\n{name}: {status}{' (excused in CONTRIBUTING.md)' if known else ''}")
        if not known:
            print(mutmut("show", name).stdout)
    print(counts)
    if run.returncode or not counts or any(f"`{name}`" not in excused for name, _ in survivors):
        sys.exit(1)


if __name__ == "__main__":
    main()
