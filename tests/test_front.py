"""The first page and the glossary: the plane and the map are what the script makes, every word leads to where it is introduced."""

import base64
import functools
import itertools
import json
import re
from html import unescape
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from test_book import CHAPTERS, load_script, prose

from vaelib.quality import mnist_features

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
HTML = ROOT / "_build" / "html"
INTRO = (BOOK / "intro.md").read_text(encoding="utf-8")
PLANE = (BOOK / "_static" / "front-plane.html").read_text(encoding="utf-8")
built = pytest.mark.skipif(not (HTML / "glossary.html").exists(), reason="the book is not built: run make book first")


def entries():
    """The glossary: each entry's names and its text."""
    text = (BOOK / "glossary.md").read_text(encoding="utf-8")
    body = re.search(r"```\{glossary\}\n:sorted:\n\n(.*?)\n```", text, re.DOTALL)[1]
    for block in body.split("\n\n"):
        lines = block.splitlines()
        names = [line for line in lines if not line.startswith("  ")]
        yield names, " ".join(line.strip() for line in lines[len(names) :])


def terms_of(name):
    return re.findall(r"\{term\}`(?:[^`<]*<([^>`]+)>|([^`]+))`", prose(name))


def page_decoder():
    """The images (225, 784) that the decoder of the first page draws on a grid, computed from the page's own numbers."""
    page = unescape(re.search(r'srcdoc="([^"]*)"', PLANE)[1])
    data = json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])
    steps = torch.linspace(-data["extent"], data["extent"], 15)
    h = torch.cartesian_prod(steps, steps)
    for depth, layer in enumerate(data["layers"], 1):
        read = {name: base64.b64decode(text) for name, text in layer.items()}
        bias = torch.tensor(np.frombuffer(read["bias"], np.float32))
        weight = torch.tensor(np.frombuffer(read["weight"], np.int8 if "scale" in read else np.float32)).reshape(len(bias), -1)
        scale = torch.tensor(np.frombuffer(read["scale"], np.float32))[:, None] if "scale" in read else 1
        h = h @ (weight * scale).T + bias
        h = getattr(torch.nn.functional, data["activation"])(h) if depth < len(data["layers"]) else h.sigmoid()
    return h


def test_the_map_is_what_the_script_draws_with_every_chapter_and_modules_that_exist():
    script = load_script("front")
    script.check()
    for kind, drawn in (("wide", script.wide_map()), ("tall", script.tall_map())):
        assert (BOOK / "_static" / f"front-map-{kind}.svg").read_text(encoding="utf-8") == drawn
        assert {link["href"] for link in BeautifulSoup(drawn, "html.parser").select("a")} == {f"{name}.html" for name in CHAPTERS}


@pytest.mark.parametrize("kind", ["wide", "tall"])
def test_the_links_of_the_map_lie_inside_of_it_and_beside_each_other(kind):
    drawn = BeautifulSoup((BOOK / "_static" / f"front-map-{kind}.svg").read_text(encoding="utf-8"), "html.parser")
    left, top, width, height = (float(edge) for edge in drawn.svg["viewbox"].split())
    bars = [[float(bar[name]) for name in ("x", "y", "width", "height")] for bar in drawn.select("a rect")]
    for x, y, w, h in bars:
        assert left <= x < x + w <= left + width
        assert top <= y < y + h <= top + height
    for (x, y, w, h), (other_x, other_y, other_w, other_h) in itertools.combinations(bars, 2):
        assert x + w <= other_x or other_x + other_w <= x or y + h <= other_y or other_y + other_h <= y


def test_a_map_without_a_chapter_is_refused(monkeypatch):
    script = load_script("front")
    monkeypatch.delitem(script.CHAPTERS, "retrieval")
    with pytest.raises(SystemExit, match="retrieval"):
        script.check()


def test_the_plane_is_small_lazy_sandboxed_and_described():
    frame, still = (BeautifulSoup(PLANE, "html.parser").select_one(tag) for tag in ("iframe", "img.still"))
    assert len(PLANE.encode()) <= 400_000
    assert frame["loading"] == "lazy"
    assert 'sandbox="allow-scripts"' in PLANE
    assert len(frame["title"]) > 40
    assert frame["title"] == still["alt"]


def test_the_plane_of_the_first_page_decodes_to_digits_of_every_class():
    pixels = (255 * page_decoder()).round().to(torch.uint8).reshape(-1, 1, 28, 28)
    with torch.no_grad():
        probabilities = mnist_features()(pixels).softmax(1)
    assert len(probabilities.argmax(1).unique()) == 10
    assert (probabilities.amax(1) > 0.5).float().mean() > 0.8  # between two digits the classifier may hesitate


def test_the_number_of_mistakes_is_that_of_the_chapters_table():
    cells = nbformat.read(BOOK / "mistakes.ipynb", as_version=4).cells
    outputs = [output.get("data", {}) for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    (table,) = (data["text/markdown"] for data in outputs if ":name: tab-damage\n" in data.get("text/markdown", ""))
    rows = str(table.count("\n* - ") - 1)  # without the head
    assert re.findall(r"\[(\d+) popular mistakes\]\(mistakes\.ipynb\)", INTRO) == [rows]


def test_the_rows_of_the_papers_table_that_were_run_are_counted():
    rows = json.loads((ROOT / "results" / "iwae.json").read_text(encoding="utf-8"))
    number = {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six"}[len(rows)]
    assert f"{{ref}}`{number} one-layer rows <sec-papers-table>`" in INTRO  # another row is another sentence
    assert {row["metrics"]["layers"] for row in rows.values()} == {1}


def test_each_road_of_the_first_page_has_four_or_five_stations():
    cards = re.findall(r":::\{grid-item-card\} (\w+)\n(.*?)\n:::", INTRO, re.DOTALL)
    assert [name for name, _ in cards] == ["Student", "Practitioner", "Teacher"]
    for name, text in cards:
        stations = re.findall(r"^\d\. (?:\[.+\]\(.+\)|\{ref\}`.+`)$", text, re.MULTILINE)
        assert len(stations) == len(re.findall(r"^\d\. ", text, re.MULTILINE)), name
        assert 4 <= len(stations) <= 5, name


def test_every_entry_of_the_glossary_links_into_a_chapter():
    texts = {name: prose(name) for name in CHAPTERS}
    labels = {label for text in texts.values() for label in re.findall(r"^\$\$ \((\S+)\)$", text, re.MULTILINE)}
    places = [place for text in texts.values() for place in re.findall(r"^\((\S+)\)=$|^:label: (\S+)$", text, re.MULTILINE)]
    labels |= {label for place in places for label in place}
    found = list(entries())
    assert len(found) >= 40
    for names, text in found:
        used = set(re.findall(r"\{(?:eq|ref)\}`(?:[^`<]*<)?([^>`]+)>?`", text))
        chapters = set(re.findall(r"\]\(([\w-]+)\.ipynb\)", text)) & set(CHAPTERS)
        assert used & labels or chapters, names
        assert used <= labels, names
        assert 30 < len(text) < 400, names


@functools.cache
def places(text):
    """Where each equation, section and exercise of a chapter begins."""
    found = {
        label: text.rindex("\n$$\n", 0, text.index(f"$$ ({label})"))
        for label in re.findall(r"^\$\$ \((\S+)\)$", text, re.MULTILINE)
    }
    return found | {
        match[1] or match[2]: match.start() for match in re.finditer(r"^\((\S+)\)=$|^:label: (\S+)$", text, re.MULTILINE)
    }


def test_a_link_of_the_glossary_does_not_point_past_the_definition():
    """The word's first use comes after the link's target, or in the few lines before an equation, which stay in view above it."""
    past = []
    for names, entry in entries():
        for name in CHAPTERS:
            text, targets = prose(name), places(prose(name))
            uses = [text.find(form) for word in names for form in (f"{{term}}`{word}`", f"<{word}>`")]
            first = min((use for use in uses if use >= 0), default=None)
            linked = [targets[label] for label in re.findall(r"\{(?:eq|ref)\}`(?:[^`<]*<)?([^>`]+)>?`", entry) if label in targets]
            if first is not None and linked and first < min(linked):
                between = text[first : min(linked)]
                if len(between) > 300 or re.search(r"^#+ ", between, re.MULTILINE):
                    past.append((names[0], name, len(between)))
    assert past == []


@built
def test_a_link_to_an_equation_leaves_the_lines_that_lead_to_it_in_view(browser, address):
    page = browser.new_page()
    try:
        page.goto(f"{address}elbo.html#equation-posterior")
        page.wait_for_timeout(300)
        top = page.locator("[id='equation-posterior']").bounding_box()["y"]
        assert 120 < top < 400
    finally:
        page.close()


def test_no_word_stands_twice_in_the_glossary():
    names = [name.lower() for names, _ in entries() for name in names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_leads_to_the_glossary_at_three_words_or_more_and_once_at_each(name):
    known = {entry for names, _ in entries() for entry in names}
    used = [target or text for target, text in terms_of(name)]
    assert len(used) >= 3
    assert len(set(used)) == len(used)
    assert set(used) <= known


@built
def test_a_word_of_a_chapter_leads_to_its_entry_and_the_entry_back():
    elbo, glossary = (
        BeautifulSoup((HTML / f"{name}.html").read_text(encoding="utf-8"), "html.parser") for name in ("elbo", "glossary")
    )
    assert elbo.select_one('article a[href="glossary.html#term-posterior"]')
    entry = glossary.select_one("dt#term-posterior").find_next_sibling("dd")
    assert entry.select_one('a[href="elbo.html#equation-posterior"]')


@built
def test_the_index_has_the_words_and_the_names_of_the_library_and_is_linked():
    glossary = (HTML / "glossary.html").read_text(encoding="utf-8")
    assert 'href="genindex.html"' in glossary
    index = BeautifulSoup((HTML / "genindex.html").read_text(encoding="utf-8"), "html.parser")
    links = {link["href"]: link.text for link in index.select("article a[href]")}
    assert links["glossary.html#term-hub"] == "hub"
    assert "fit()" in links["api.html#vaelib.training.fit"]


@built
@pytest.mark.parametrize("asked", ["ELBO", "KL", "log_var", "elbo_samples", "mAP"])
def test_the_search_finds_a_symbol_by_its_name(asked, browser, address):
    context = browser.new_context()
    try:
        tab = context.new_page()
        tab.goto(f"{address}search.html?q={asked}")
        tab.locator("#search-results li a").first.wait_for()
        found = tab.locator("#search-results li a").evaluate_all("all => all.map(link => link.getAttribute('href'))")
        assert any(page.partition(".")[0] in [*CHAPTERS, "glossary", "notation", "api"] for page in found), found
    finally:
        context.close()


@built
@pytest.mark.parametrize(("width", "shown", "hidden"), [(1280, "wide", "tall"), (390, "tall", "wide")])
def test_the_map_suits_the_width_and_its_stations_are_links(width, shown, hidden, browser, address):
    context = browser.new_context(viewport={"width": width, "height": 900})
    try:
        tab = context.new_page()
        tab.goto(address + "intro.html", wait_until="domcontentloaded")
        drawing = tab.locator(f"svg.route-{shown}")
        assert drawing.is_visible()
        assert not tab.locator(f"svg.route-{hidden}").is_visible()
        box, letters = drawing.bounding_box(), drawing.locator("text.module").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert letters["height"] >= 11
        drawing.locator("a", has_text="Retrieval").click()
        tab.wait_for_url("**/retrieval.html")
    finally:
        context.close()


@built
@pytest.mark.parametrize("medium", ["print", "no script"])
def test_in_print_and_without_scripts_the_first_page_has_a_still_picture(medium, browser, address):
    context = browser.new_context(java_script_enabled=medium == "print")
    try:
        tab = context.new_page()
        tab.emulate_media(media="print" if medium == "print" else "screen")
        tab.goto(address + "intro.html", wait_until="domcontentloaded")
        for figure in (".front-plane", ".front-board"):
            assert tab.locator(f"{figure} img.still").is_visible()
            assert not tab.locator(f"{figure} iframe").is_visible()
    finally:
        context.close()
