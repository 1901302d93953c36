"""The book on paper and on the wall: one PDF and slides, from the built pages."""

import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from test_book import CHAPTERS

ROOT = Path(__file__).parent.parent
HTML = ROOT / "_build" / "html"
SITE = "https://example.org/"
SMALLEST = 15  # pixels of a letter on a slide of 1280 by 720

built = pytest.mark.skipif(not (HTML / "intro.html").exists(), reason="the book is not built: run make book first")


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / "_scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


slides = load_script("slides")
pdf = load_script("pdf")


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    """The folder of all decks, as `make slides` writes it."""
    folder = tmp_path_factory.mktemp("slides")
    slides.make(HTML, folder)
    return folder


def deck(folder, name):
    return BeautifulSoup((folder / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


# Slides: from a built chapter


@pytest.fixture
def converted(tmp_path):
    """What turns the inside of a built page into blocks."""

    def convert(html):
        page = tmp_path / "elbo.html"
        page.write_text(f'<article class="bd-article">{html}</article>', encoding="utf-8")
        return list(slides.blocks(slides.article(page, f"{SITE}elbo.html"), tmp_path, f"{SITE}elbo.html"))

    return convert


@pytest.mark.parametrize(
    ("source", "html"),
    [
        (
            'See <a class="reference internal" href="#fig-a"><span class="std std-numref">Fig. 1.2</span></a>.',
            f'See <a href="{SITE}elbo.html#fig-a">Fig. 1.2</a>.',
        ),
        (
            'So they say <span class="bibtex-citation" id="id1">[<a href="#id2" title="A title.">Ho <em>et al.</em>, 2020</a>]</span>.',
            "So they say [Ho <em>et al.</em>, 2020].",
        ),
        ('It is <a href="glossary.html#term-held-out"><span class="xref std std-term">held out</span></a>.', "It is held out."),
        ('See <a href="api.html#x"><code class="xref py"><span class="pre">fit</span></code></a>.', "See <code>fit</code>."),
        ("At −97.5 nats<!-- run:metrics/elbo -->, <em>not</em> more.", "At −97.5 nats, <em>not</em> more."),
        ('Here <span class="math notranslate">\\(a &lt;\nb\\)</span>.', "Here \\(a &lt; b\\)."),
    ],
)
def test_a_sentence_of_a_page_becomes_plain_words(source, html, converted):
    (block,) = converted(f"<p>{source}</p>")
    assert (block.kind, block.parts) == ("text", [html])


def test_a_paragraph_is_its_sentences_and_a_line_break_inside_an_emphasis_ends_none(converted):
    (block,) = converted("<p>One is short.\nTwo is <em>long\nand slanted</em>.\nThree.</p>")
    assert block.parts == ["One is short.", "Two is <em>long and slanted</em>.", "Three."]


def test_an_equation_bears_its_number_and_hidden_cells_hints_and_exercises_leave_nothing(converted):
    heading, equation, printed = converted(
        """<section id="sign"><span id="sec-a"></span><h2><span class="section-number">1.1. </span>Sign<a class="headerlink">#</a></h2>
        <div class="math notranslate" id="equation-a"><span class="eqno">(1.3)<a class="headerlink">#</a></span>\\[\\begin{split}
        a &lt; b\\end{split}\\]</div><div class="cell"><div class="cell_input"><pre>print(1)</pre></div><div class="cell_output">
        <div class="output stream highlight-myst-ansi"><div class="highlight"><pre>1 &lt; 2\n</pre></div></div></div></div>
        <details><p>Hint</p></details></section><section id="exercises"><h2>Exercises</h2><p>Why?</p></section>"""
    )
    assert (heading.kind, heading.html, heading.level, heading.label) == ("heading", "Sign", 2, "sec-a")
    assert "\\[a &lt; b\\]" in equation.html
    assert ">1.3<" in equation.html
    assert printed.html == '<pre class="printed">1 &lt; 2</pre>'


def test_a_list_too_long_for_a_slide_is_parted_and_loses_no_item(converted):
    (block,) = converted("<ul>" + "".join(f"<li><p>item {n} {'and so on ' * 20}</p></li>" for n in range(9)) + "</ul>")
    parted = list(slides.parted(block, 10))
    assert len(parted) > 1
    assert all(part.size <= slides.ROOM for part in parted)
    assert max(len(part.parts) for part in parted) <= 1 + min(len(part.parts) for part in parted)
    assert [n for part in parted for n in re.findall(r"item (\d)", part.html)] == [str(n) for n in range(9)]


def test_a_table_too_long_for_a_slide_has_its_number_and_head_on_each_part_and_its_name_once(converted):
    rows = "".join(f'<tr class="row"><th class="stub"><p>row {n}</p></th><td>{n}</td></tr>' for n in range(15))
    (block,) = converted(
        f"""<div class="cell_output"><table class="table" id="tab-a"><caption><span class="caption-number">Table 1.1 </span>
        <span class="caption-text">What was run.</span></caption><tr><th>run</th><th>nats</th></tr>{rows}</table></div>"""
    )
    parted = [part.html for part in slides.parted(block, 10)]
    assert len(parted) > 1
    assert all(re.search(r"<caption>Table 1\.1\.\s+What was run\.</caption>", html) for html in parted)
    assert all("<th>run</th>" in html for html in parted)
    assert [n for html in parted for n in re.findall(r"<th>row (\d+)</th>", html)] == [str(n) for n in range(15)]
    assert [place for place, html in enumerate(parted) if 'id="tab-a"' in html] == [0]


def test_an_equation_stands_on_the_slide_of_the_sentence_that_leads_to_it(converted):
    pieces = converted(
        """<h1>Title</h1><p>Why?</p><h2>Sign</h2><p>First.</p><p>It is this:</p><div class="math">\\[a\\]</div>
        <h2>Summary</h2><ul><li>All.</li></ul>"""
    )
    found = slides.arrange(pieces, "foot")
    assert [slide.title for slide in found] == ["Title", "Sign", "Summary"]
    assert found[1].shown == ["First.", "It is this:"]
    assert found[1].last == "equation"


def test_a_chapter_that_does_not_exist_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"chapter: got nothing, expected some of elbo, mnist-mlp"):
        slides.make(tmp_path, tmp_path, ["nothing"])
    assert list(tmp_path.iterdir()) == []


@built
@pytest.mark.parametrize("name", CHAPTERS)
def test_no_raw_markup_is_left_on_a_slide(name, decks):
    page = deck(decks, name)
    for sample in page.select("pre, code"):
        sample.decompose()
    text = page.select_one(".slides").get_text()
    for raw in (r"\{[a-z:]+\}`", r":::", r"```", r"<!--", r"^\$\$", r"^\(\S+\)=", r"\]\(", r"\*\*", r"\(\)"):
        assert not re.search(raw, text, re.MULTILINE), raw
    assert [link["href"] for link in page.select("a[href]") if re.search(r"\.(ipynb|md)\b", link["href"])] == []


@built
@pytest.mark.parametrize("name", CHAPTERS)
def test_a_deck_has_every_equation_and_every_figure_of_its_chapter_but_those_of_the_exercises(name, decks):
    cells = json.loads((ROOT / "book" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    end = next(place for place, source in enumerate(text) if re.search(r"^## Exercises", source, re.MULTILINE))
    equations = sum(len(re.findall(r"^\$\$ \(", source, re.MULTILINE)) for source in text[:end])
    figures = []
    for cell, source in zip(cells[:end], text, strict=False):
        said = cell["metadata"].get("mystnb", {}).get("image")
        figures += [said["alt"]] if said else re.findall(r"^!\[(.*?)\]\(", source, re.MULTILINE)
    page = deck(decks, name)
    assert len(page.select(".equation .number")) == equations
    assert [image["alt"] for image in page.select("figure img")] == figures
    assert "Exercises" not in [heading.get_text() for heading in page.select("h2")]


@built
def test_links_between_slides_lead_to_slides_that_are_there(decks):
    pages = {name: deck(decks, name) for name in CHAPTERS}
    places = {name: {tag["id"] for tag in page.select(".slides [id]")} for name, page in pages.items()}
    broken = []
    for name, page in pages.items():
        assert len(places[name]) == len(page.select(".slides [id]"))
        for address in (link["href"] for link in page.select("section a[href]")):
            target, _, place = address.partition("#/")
            if not address.startswith("https:") and (
                target.removesuffix(".html") not in pages or (place and place not in places[target.removesuffix(".html")])
            ):
                broken.append((name, address))
    assert broken == []
    assert [link["href"] for link in deck(decks, "index").select("li a")] == [f"{name}.html" for name in CHAPTERS]


@built
@pytest.mark.parametrize("name", CHAPTERS)
def test_numbers_on_slides_are_those_of_the_book(name, decks):
    book = BeautifulSoup((HTML / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    captions = [tag.get_text().strip() for tag in book.select("figcaption .caption-number")]
    page = deck(decks, name)
    shown = [re.match(r"Fig\.\s\d+\.\d+", caption.get_text())[0] for caption in page.select("figcaption")]
    assert [number.rstrip(".") for number in captions if number.startswith("Fig.")][: len(shown)] == shown
    numbers = [tag.get_text().strip("()#") for tag in book.select("span.eqno")]
    assert [tag.get_text() for tag in page.select(".equation .number")] == numbers[: len(page.select(".equation .number"))]


WALK = """async () => {
    const faults = [], stage = document.querySelector(".slides").getBoundingClientRect();
    for (const slide of Reveal.getSlides()) {
        const at = Reveal.getIndices(slide);
        Reveal.slide(at.h, at.v);
        const name = `${at.h}.${at.v} ${slide.querySelector("h1, h2").textContent}`;
        for (const part of slide.querySelectorAll("*")) {
            const box = part.getBoundingClientRect();
            if (box.width === 0 || part.closest("mjx-assistive-mml, defs")) continue;
            if (box.left < stage.left - 1 || box.right > stage.right + 1 || box.top < stage.top - 1 || box.bottom > stage.bottom + 1)
                faults.push(`${name}: ${part.tagName} lies outside`);
            const wide = part.matches(".equation") ? part.firstElementChild.offsetWidth : part.matches("pre") ? part.scrollWidth : 0;
            if (wide > part.clientWidth + 1) faults.push(`${name}: ${part.tagName} is cut off`);
            const letters = [...part.childNodes].some(node => node.nodeType === 3 && node.data.trim());
            if (letters && parseFloat(getComputedStyle(part).fontSize) < SMALLEST) faults.push(`${name}: small letters in ${part.tagName}`);
        }
        const picture = slide.querySelector("img");
        if (picture && (picture.clientHeight < 200 || picture.naturalWidth === 0)) faults.push(`${name}: the picture is small`);
        if (picture && picture.alt.length < 40) faults.push(`${name}: the picture is not described`);
        if (slide.querySelector("mjx-merror")) faults.push(`${name}: mathematics that is not understood`);
    }
    return faults;
}""".replace("SMALLEST", str(SMALLEST))


@built
@pytest.mark.parametrize("name", CHAPTERS)
def test_every_slide_fits_its_box_with_the_network_cut(name, decks, browser):
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    asked, said = [], []
    try:
        tab = context.new_page()
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("console", lambda message: message.type == "error" and said.append(message.text))
        tab.route("**/*", lambda route: (asked.append(route.request.url), route.continue_())[-1])
        tab.goto((decks / f"{name}.html").as_uri())
        tab.wait_for_function("window.Reveal && Reveal.isReady()", timeout=120_000)
        assert tab.evaluate("Reveal.getTotalSlides()") == len(deck(decks, name).select("section:not(.stack)"))
        assert tab.evaluate(WALK) == []
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    finally:
        context.close()


# PDF: from the built pages


def small_book(folder):
    """Two built pages, one in a folder, that point to each other and elsewhere."""
    head = '<html><head><link rel="stylesheet" href="a.css"><script>window.MathJax = {}</script></head><body>'
    first = """<article class="bd-article"><h1>First<a class="headerlink" href="#first">#</a></h1><p id="here">
        <a href="deep/second.html#there">x</a><a href="#here">y</a><a href="api/other.html#z">z</a><a href="https://example.org/q">q</a></p>
        <figure class="vaelib-widget"><iframe src="_frames/a.html"></iframe>
        <img class="still" src="data:image/png;base64,aa" alt="still"></figure>
        <details class="hide"><summary>Show</summary>folded</details>
        <details class="sd-dropdown"><summary>Hint</summary>Think.</details><img loading="lazy" src="_images/a.png" alt="a"></article>"""
    second = """<article class="bd-article"><h1 id="there">Second</h1><a href="../first.html">x</a>
        <img src="../_images/b.png" alt="b"></article>"""
    (folder / "deep").mkdir()
    (folder / "first.html").write_text(head + first, encoding="utf-8")
    (folder / "deep" / "second.html").write_text(head + second, encoding="utf-8")


@pytest.fixture
def two_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "parts", lambda: [("", ["first"]), ("Part", ["deep/second"])])
    monkeypatch.setattr(pdf, "SITE", SITE)
    small_book(tmp_path)
    return BeautifulSoup(pdf.document(tmp_path), "html.parser")


def test_pages_become_one_document_whose_links_lead_inside_it_where_they_can(two_pages):
    links = [link["href"] for link in two_pages.select("#first a")]
    assert links == ["#deep-second--there", "#first--here", f"{SITE}api/other.html#z", "https://example.org/q"]
    assert [link["href"] for link in two_pages.select("#deep-second a")] == ["#first"]
    assert all(two_pages.find(id=link[1:]) for link in links if link.startswith("#"))
    assert [image["src"] for image in two_pages.select("img")] == ["data:image/png;base64,aa", "_images/a.png", "_images/b.png"]
    assert [row.get_text() for row in two_pages.select("article.contents li")] == ["First", "Second"]


def test_on_paper_a_figure_to_touch_is_its_still_picture_and_folded_cells_are_left_out(two_pages):
    assert two_pages.select("iframe") == two_pages.select("details.hide") == two_pages.select(".headerlink") == []
    assert two_pages.select_one("details.sd-dropdown").has_attr("open")
    assert two_pages.select_one("figure img[alt=still]")["src"].startswith("data:")
    assert not two_pages.select("img[loading], img.still")
    assert two_pages.html["data-theme"] == "light"


def test_without_a_built_book_the_error_says_how_to_build_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="run make book first"):
        slides.make(tmp_path, tmp_path / "slides")
    with pytest.raises(FileNotFoundError, match="run make book first"):
        pdf.document(tmp_path)


def test_without_chromium_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt install chromium"):
        pdf.find_chromium()


def test_on_paper_a_caption_is_as_wide_as_its_table(browser):
    """As a block, which it is on the screen, it would be a cell of the first column, and widen it."""
    sheet = (ROOT / "book" / "_static" / "custom.css").read_text(encoding="utf-8")
    table = "<table><caption>What was run, on which machine, and how long it took.</caption><tr><th>a</th><td>1</td></tr></table>"
    tab = browser.new_page()
    try:
        tab.emulate_media(media="print")
        tab.set_content(f'<style>{sheet} table {{ width: 600px; }}</style><article class="bd-article">{table}</article>')
        assert tab.evaluate("[...document.querySelectorAll('table, caption')].map(part => part.clientWidth)") == [600, 600]
    finally:
        tab.close()


@built
def test_the_one_document_holds_every_page_and_every_place_that_it_points_to():
    book = pdf.document(HTML)
    pages = [page for _, group in pdf.parts() for page in group]
    assert re.findall(r'<article class="bd-article" id="([^"]*)"', book) == [pdf.anchor(page) for page in pages]
    names = set(re.findall(r'<\w[^<>]* id="([^"]*)"', book))
    assert [link for link in re.findall(r'<a [^<>]*href="#([^"]*)"', book) if link not in names] == []
    sources = [source for source in re.findall(r'<img [^<>]*src="([^"]*)"', book) if not source.startswith("data:")]
    assert len(sources) > 50
    assert [source for source in sources if not (HTML / source).is_file()] == []
    assert book.count('<figure class="vaelib-widget"') >= 4
    assert "<iframe" not in book


@built
def test_the_pdf_has_page_numbers_an_outline_links_and_still_pictures(tmp_path, monkeypatch, browser):
    pypdf = pytest.importorskip("pypdf", reason="the book's packages are missing: pip install -e .[book]")
    monkeypatch.setattr(pdf, "parts", lambda: [("", ["intro"]), ("Chapters", ["retrieval", "notation"])])
    pdf.make(browser, HTML, tmp_path / "book.pdf")
    reader = pypdf.PdfReader(io.BytesIO((tmp_path / "book.pdf").read_bytes()))
    texts = [page.extract_text() for page in reader.pages]
    contents = dict(re.findall(r"^(?:\d\. )?(Variational Auto|Retrieval|Notation)\D*?(\d+)$", texts[1], re.MULTILINE))
    assert len(contents) == 3
    for title, number in contents.items():
        page = texts[int(number) - 1]
        assert title in page
        assert re.search(rf"^{number}$", page, re.MULTILINE)  # at the page's foot
        assert title not in texts[int(number) - 2] or number == "3"
    outline = [entry.title for entry in reader.outline if not isinstance(entry, list)]
    assert [title for title in outline if "Retrieval" in title or title == "Notation"] == outline[-2:]
    kinds = [note.get_object().get("/A", {}).get("/S") for page in reader.pages for note in page.get("/Annots") or []]
    inside = [note for page in reader.pages for note in page.get("/Annots") or [] if "/Dest" in note.get_object()]
    assert len(inside) > 20
    assert "/URI" in kinds
    whole = "\n".join(texts)
    assert "Show code cell" not in whole
    assert "Solution to" in whole
    assert all(round(float(page.mediabox.height)) == 842 for page in reader.pages)
    assert not (tmp_path / "book.pdf.partial").exists()
