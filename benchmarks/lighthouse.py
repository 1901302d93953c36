"""Lighthouse's scores of the built book, as a desktop and as a phone: performance, accessibility, best practices, search engines.

    python benchmarks/lighthouse.py [--pages intro elbo generation] [--rounds 3] [--phone-rounds 1] [--json]

Without names all pages of the table of contents are scored.

Needs the built book (`make book`), node (18.16 or newer) and Chromium or Chrome; `npx` gets Lighthouse itself, in the version below,
or LIGHTHOUSE names its command. The pages are served from this machine, compressed as a public server does, below the path where they
are published. Performance varies with what else the machine does: the median of the rounds counts. The other scores do not, and the
first round measures them.

With VAELIB_RESULTS set the table is entered into the ledger as `lighthouse`.
"""

import argparse
import functools
import gzip
import http.server
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from vaelib.book.ledger import hardware, record

VERSION = "12.8.2"  # the last that runs on node 18 and 20
BOOK = Path(__file__).parent.parent / "book"
HTML = BOOK.parent / "_build" / "html"
PREFIX = "/vae-book"
CATEGORIES = ("performance", "accessibility", "best-practices", "seo")
FORMS = {"desktop": ["--preset=desktop"], "phone": []}  # a slow phone on a slow network is Lighthouse's default
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update --disable-sync"


class Compressed(http.server.SimpleHTTPRequestHandler):
    """Serves the book below PREFIX, text compressed with gzip."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = Path(self.translate_path(self.path.removeprefix(PREFIX)))
        if not path.is_file():
            self.send_error(404)
            return
        data, kind = path.read_bytes(), self.guess_type(path)
        self.send_response(200)
        if path.suffix in {".html", ".css", ".js", ".svg"}:
            data = gzip.compress(data)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def contents():
    """The pages of the table of contents, in its order."""
    return [
        re.sub(r"\.\w+$", "", name) for name in re.findall(r"(?:file|root): (\S+)", (BOOK / "_toc.yml").read_text(encoding="utf-8"))
    ]


def scores(address, chrome, form, categories):
    """One run of Lighthouse: the scores from 0 to 100, and the kilobytes that the page loads."""
    command = shlex.split(os.environ.get("LIGHTHOUSE", f"npx --yes lighthouse@{VERSION}"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        options = [*FORMS[form], "--quiet", "--output=json", f"--output-path={out}", f"--chrome-flags={FLAGS}"]
        options.append(f"--only-categories={','.join(categories)}")
        subprocess.run([*command, address, *options], check=True, env={**os.environ, "CHROME_PATH": chrome})
        report = json.loads(out.read_text(encoding="utf-8"))
    found = {name: round(100 * report["categories"][name]["score"]) for name in categories}
    return found | {"kilobytes": round(report["audits"]["total-byte-weight"]["numericValue"] / 1000)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", nargs="+", default=contents())
    parser.add_argument("--rounds", type=int, default=3, help="of the desktop; the median counts")
    parser.add_argument("--phone-rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    chrome = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    missing = [name for name in arguments.pages if not (HTML / f"{name}.html").is_file()]
    if missing:
        raise SystemExit(f"pages: got {', '.join(missing)}, expected pages of the built book: run make book first")
    if chrome is None:
        raise SystemExit("there is no Chromium or Chrome to measure in")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Compressed, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    start, metrics = time.perf_counter(), {"lighthouse": VERSION, "pages": {}}
    times = {"desktop": arguments.rounds, "phone": arguments.phone_rounds}
    for name in arguments.pages:
        address = f"http://127.0.0.1:{server.server_port}{PREFIX}/{name}.html"
        for form in [form for form in FORMS if times[form]]:
            rounds = [scores(address, chrome, form, CATEGORIES[: 1 if k else None]) for k in range(times[form])]
            medians = {key: statistics.median(found[key] for found in rounds if key in found) for key in rounds[0]}
            metrics["pages"].setdefault(name, {})[form] = medians
            print(f"{name:28} {form:8}" + "  ".join(f"{key} {value:g}" for key, value in medians.items()), file=sys.stderr)
    server.shutdown()
    command = f"python benchmarks/lighthouse.py --rounds {arguments.rounds} --phone-rounds {arguments.phone_rounds}"
    if arguments.pages != contents():
        command += f" --pages {' '.join(arguments.pages)}"
    made = record("lighthouse", command, 0, time.perf_counter() - start, metrics)
    if arguments.json:
        print(json.dumps(made))
        return
    print(f"{hardware()['processor']}, Lighthouse {VERSION}, the lowest over {len(arguments.pages)} pages")
    for form in [form for form in FORMS if times[form]]:
        rows = [row[form] for row in metrics["pages"].values()]
        lowest = {key: min(row[key] for row in rows) for key in CATEGORIES}
        print(f"  {form:10}" + "  ".join(f"{key} {value:g}" for key, value in lowest.items()))


if __name__ == "__main__":
    sys.exit(main())
