"""Give the repository another address: `python book/_scripts/address.py https://github.com/OWNER/REPO`

The address is set in _config.yml. This changes it there and wherever else it is used: the first cells of the notebooks, README,
CITATION.cff, pyproject.toml, the pages, the figures to touch, the messages of the library, and the address of the published book on
GitHub's pages.
"""

import re
import sys
from pathlib import Path

import yaml

from vaelib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"https://github\.com/([\w-]+)/([\w-]+)")
USERS = (
    "*.md",
    "*.cff",
    "*.toml",
    "_config.yml",
    "book/**/*.md",
    "book/**/*.ipynb",
    "book/**/*.py",
    "vaelib/*.py",
    "vaelib/assets/*.[jh]*",
)


def moved(text, old, new):
    """The text with the old address, the name of its clone and the address of its published pages replaced."""
    (old_owner, old_name), (owner, name) = (ADDRESS.fullmatch(address).groups() for address in (old, new))
    text = re.sub(rf"{re.escape(old)}(?![\w-])", new, text)
    text = re.sub(rf"(git clone {re.escape(new)} && cd ){old_name}(?![\w-])", rf"\g<1>{name}", text)
    pages = re.escape(f"https://{old_owner.lower()}.github.io/{old_name}/")
    return re.sub(pages, f"https://{owner.lower()}.github.io/{name}/", text)


def main(new):
    if not ADDRESS.fullmatch(new):
        sys.exit(f"address: got {new!r}, expected https://github.com/OWNER/REPO of letters, digits, - and _")
    old = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    changed = {}
    for path in sorted({path for pattern in USERS for path in ROOT.glob(pattern) if path.is_file()}):
        text = path.read_text(encoding="utf-8")
        if (after := moved(text, old, new)) != text:
            changed[path] = after
    for path, text in changed.items():
        write_text(path, text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else sys.exit(__doc__)
