"""Shared pieces of the tests: one torch thread, small models, and the switch for the real data sets."""

import functools
import http.server
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlparse

import hypothesis
import pytest
import torch
import yaml

import vaelib
from vaelib.data import CHECKSUMS, data_folder

torch.set_num_threads(1)
hypothesis.settings.register_profile("book", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("book")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    return vaelib.load_images("digits")


@pytest.fixture
def small_vae():
    """An untrained VAE for the digits, with weights large enough that the posterior depends on the image."""
    torch.manual_seed(0)
    model = vaelib.mlp_vae((1, 28, 28), (32,), 4)
    with torch.no_grad():
        model.encoder.head.weight.mul_(4)
    return model


@pytest.fixture(scope="session")
def real_data():
    """Load a real data set, or skip where its files are not at hand."""

    def load(name, split="train"):
        missing = [file for file in CHECKSUMS[name] if not (data_folder() / file).is_file()]
        if missing:
            pytest.skip(f"{name} is not in {data_folder()}: set VAELIB_DATA to a folder that has it")
        return vaelib.load_images(name, split, download=False)

    return load


@pytest.fixture(scope="session")
def vaelib_command():
    """Run `vaelib ...` in a process of its own, as a user does."""

    def run(*arguments, cwd=None, **environment):
        return subprocess.run(
            [sys.executable, "-m", "vaelib", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=250,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    return run


@pytest.fixture
def vaelib_here(monkeypatch, capfd):
    """The same in this process, which has loaded torch already: what a command says and does, without the seconds of a start."""
    from vaelib.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vaelib", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that asks nobody, or a skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are driven through playwright: pip install playwright")
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium or Chrome to drive pages in")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=flags.split())
        yield browser
        browser.close()


class Pages(http.server.SimpleHTTPRequestHandler):
    """Serves a book below a prefix, and its 404 page for what is not there, as GitHub Pages does; says nothing."""

    def __init__(self, *arguments, prefix, **options):
        self.prefix = prefix
        super().__init__(*arguments, **options)

    def translate_path(self, path):
        return super().translate_path(path.removeprefix(self.prefix.rstrip("/")))

    def send_error(self, code, message=None, explain=None):
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write((Path(self.directory) / "404.html").read_bytes())

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def address():
    """Where the built book is served, with the prefix that its published address has."""
    root = Path(__file__).parent.parent
    prefix = urlparse(yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["html"]["baseurl"]).path
    handler = functools.partial(Pages, directory=root / "_build" / "html", prefix=prefix)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}{prefix}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def binary():
    """Images of black and white, of which nothing is drawn."""
    pixels = 255 * torch.randint(2, (12, 1, 4, 4), generator=torch.Generator().manual_seed(4))
    return vaelib.image_set(pixels.to(torch.uint8))


@pytest.fixture(scope="module")
def plane():
    """Points of the plane, (M, 2), and the log of the area that each stands for."""
    line = torch.linspace(-9.0, 9.0, 401)
    return torch.cartesian_prod(line, line), 2 * math.log(18.0 / 400)
