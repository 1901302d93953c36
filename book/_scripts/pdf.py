"""The book as one PDF, _build/vae-book.pdf, from its built pages (`make book`), printed by Chromium.

python book/_scripts/pdf.py [--html FOLDER] [--out FILE]

The pages of the table of contents become one document: links between them lead inside it, a figure to touch is its still picture,
hints and solutions stand open at their place, and cells that the page folds away (set-up, plotting) are left out.
It is printed twice: the page numbers of the contents are read from the first print.
How things look on paper is said in `book/_static/custom.css`, under `@media print`.
"""

import argparse
import io
import logging
import posixpath
import re
import shutil
import sys
import tempfile
from html import escape
from pathlib import Path
from urllib.parse import quote, unquote, urlparse

import yaml
from bs4 import BeautifulSoup

from vaelib.storage import atomic

ROOT = Path(__file__).resolve().parents[2]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SITE = CONFIG["html"]["baseurl"]
CHROMIUM = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PAPER = 658  # pixels between the margins of A4

STYLE = """
html, body { display: block; height: auto; overflow: visible; background: #fff; color: #000; font-size: 13.3px; }
main.bd-article { padding: 0; }
article { padding: 0 !important; }
article.title, article.contents { page: front; break-after: page; }
article.title { height: 240mm; display: flex; flex-direction: column; }
article.title h1 { margin-top: 70mm; font-size: 40px; }
article.title p { font-size: 16px; }
article.title footer { margin-top: auto; font-size: 13px; }
article.contents ol { list-style: none; padding: 0; }
article.contents li { display: flex; gap: 6px; padding: 3px 0; }
article.contents li::after { content: attr(data-page); order: 3; }
article.contents li::before { content: ""; order: 2; flex: 1; border-bottom: 1px dotted #888; margin-bottom: 5px; }
@page { size: A4; margin: 20mm 18mm 20mm; @bottom-center { content: counter(page); font: 9pt sans-serif; color: #444; } }
@page front { @bottom-center { content: none; } }
"""
# Shrinks display equations and tables that are wider than the paper.
FIT = """async () => {
    await MathJax.startup.promise;
    await Promise.all([...document.images].map(image => image.decode().catch(() => null)));
    await document.fonts.ready;
    for (const part of document.querySelectorAll("div.math, table")) {
        const inner = part.querySelector("mjx-container svg") ?? part;
        const room = (part.closest("div.math") ?? part.parentElement).clientWidth - (part.querySelector(".eqno") ? 55 : 0);
        for (let size = 100; size > 50 && inner.getBoundingClientRect().width > room; size -= 4) part.style.fontSize = `${size}%`;
    }
    return [...document.images].filter(image => image.naturalWidth === 0).map(image => image.alt);
}"""
HEADINGS = (
    """() => [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(part => part.textContent.replace(/\\s+/g, " ").trim())"""
)
NUMBER = """numbers => document.querySelectorAll("article.contents li").forEach((row, i) => { row.dataset.page = numbers[i]; })"""


def find_chromium():
    """The path of Chromium or Chrome; RuntimeError where there is none."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        names = ", ".join(CHROMIUM)
        raise RuntimeError(f"there is no Chromium to print with: looked for {names} on the PATH; try apt install chromium")
    return found


def parts():
    """(caption, pages) of each part of the book, in the order of the table of contents; the first page stands alone."""
    contents = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    return [
        ("", [contents["root"]]),
        *((part["caption"], [page["file"] for page in part["chapters"]]) for part in contents["parts"]),
    ]


def anchor(page, fragment=""):
    """The name in the one document of a page, or of a place in it."""
    return re.sub(r"[^\w-]", "-", page) + (f"--{fragment}" if fragment else "")


def link(href, page, pages):
    """Where a link of a page leads in the one document; to the published book where the page is none of these."""
    address = urlparse(href)
    if address.scheme or address.netloc:
        return href
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(address.path))) if address.path else f"{page}.html"
    if target.removesuffix(".html") in pages:
        return f"#{anchor(target.removesuffix('.html'), unquote(address.fragment))}"
    return f"{SITE}{quote(target)}" + (f"#{address.fragment}" if address.fragment else "")


def article(html, page, pages):
    """The text of a built page, with its names, links and images made to fit the one document."""
    path = html / f"{page}.html"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such page, expected the built book: run make book first")
    text = re.search(r'<article class="bd-article".*</article>', path.read_text(encoding="utf-8"), re.DOTALL)[0]
    body = BeautifulSoup(text, "html.parser").article
    for tag in body.select("script, iframe, a.headerlink, details.hide, nav"):
        tag.decompose()
    for tag in body.select("details"):
        tag["open"] = ""
    here = posixpath.dirname(page)
    for tag in body.find_all(True):
        if tag.get("id") and not tag.find_parent("svg"):  # a drawing refers to its own parts
            tag["id"] = anchor(page, tag["id"])
        if tag.name == "a" and tag.get("href"):
            tag["href"] = link(tag["href"], page, pages)
        elif tag.name == "img":
            del tag["loading"]
            if not tag["src"].startswith("data:"):
                tag["src"] = posixpath.normpath(posixpath.join(here, tag["src"]))
            if "still" in tag.get("class", []):
                del tag["class"]
    body["id"] = anchor(page)
    return body


def quoted(words):
    """A string of a style sheet."""
    return '"' + words.replace("\\", r"\\").replace('"', r"\"") + '"'


def document(html):
    """The book as one page."""
    outline = parts()
    pages = [page for _, group in outline for page in group]
    texts = {page: article(html, page, pages) for page in pages}
    titles = {page: text.h1.get_text().strip() for page, text in texts.items()}
    rows = []
    for caption, group in outline:
        rows += [f"<h2>{escape(caption)}</h2>"] if caption else []
        items = (f'<li data-page="000"><a href="#{anchor(page)}">{escape(titles[page])}</a></li>' for page in group)
        rows.append(f"<ol>{''.join(items)}</ol>")
    first = BeautifulSoup((html / f"{pages[0]}.html").read_text(encoding="utf-8").partition("</head>")[0], "html.parser")
    sheets = "\n".join(str(sheet) for sheet in first.select("link[rel=stylesheet]"))
    maths = next(str(script) for script in first.select("script") if "window.MathJax" in script.text)
    heads = "\n".join(
        f"article#{anchor(page)} {{ page: {anchor(page)}; break-before: page; }}\n"
        f"@page {anchor(page)} {{ @top-right {{ content: {quoted(titles[page])}; font: 9pt sans-serif; color: #444; }} }}"
        for page in pages
    )
    title, author, year = CONFIG["title"], CONFIG["author"], CONFIG["copyright"]
    return f"""<!doctype html>
<html lang="en" data-theme="light" data-mode="light">
<head>
<meta charset="utf-8">
<title>{escape(title)}</title>
<base href="{html.resolve().as_uri()}/">
{sheets}
<style>{STYLE}{heads}</style>
{maths}
<script defer src="_static/tex-svg-full.js"></script>
</head>
<body>
<main class="bd-article">
<article class="title">
<h1>{escape(title)}</h1>
<p>{escape(author)}, {year}</p>
<footer><p>The book for reading and running: <a href="{SITE}">{SITE}</a>.</p>
<p>Figures to touch are still pictures here.
Cells that only set up or plot are left out; they stand in the notebooks.</p></footer>
</article>
<article class="contents"><h1>Contents</h1>
{"".join(rows)}
</article>
{"".join(map(str, texts.values()))}
</main>
</body>
</html>
"""


def starts(pdf, pages):
    """The number of the page on which each page of the book begins, read from a print."""
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it remarks on Chromium's counting of objects
    reader = PdfReader(io.BytesIO(pdf))
    places = {name.lstrip("/"): reader.get_destination_page_number(place) + 1 for name, place in reader.named_destinations.items()}
    return {page: places[anchor(page)] for page in pages}


def finished(pdf, titles):
    """The PDF with its author, and with the headings of the page as its outline: Chromium's own runs lines together."""
    from pypdf import PdfWriter
    from pypdf.generic import NameObject, TextStringObject

    def entries(item):
        while item:
            item = item.get_object()
            yield item
            yield from entries(item.get("/First"))
            item = item.get("/Next")

    writer = PdfWriter(clone_from=io.BytesIO(pdf))
    found = list(entries(writer.root_object["/Outlines"].get("/First")))
    if len(found) != len(titles):
        raise RuntimeError(f"the outline has {len(found)} entries, the book {len(titles)} headings")
    for entry, title in zip(found, titles, strict=True):
        entry[NameObject("/Title")] = TextStringObject(title)
    writer.add_metadata({"/Title": CONFIG["title"], "/Author": CONFIG["author"]})
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def make(browser, html, out):
    """Prints the book in a browser of playwright's, which loads nothing but files."""
    pages = [page for _, group in parts() for page in group]
    options = {"prefer_css_page_size": True, "print_background": True, "tagged": True, "outline": True}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "book.html"
        source.write_text(document(html), encoding="utf-8")
        tab = browser.new_page(viewport={"width": PAPER, "height": 1000}, color_scheme="light")
        try:
            tab.set_default_timeout(0)
            tab.route(
                "**/*", lambda route: route.continue_() if route.request.url.startswith(("file:", "data:")) else route.abort()
            )
            tab.emulate_media(media="print")
            tab.goto(source.as_uri())
            missing = tab.evaluate(FIT)
            if missing:
                raise RuntimeError(f"pictures that did not load: {missing}")
            numbers = starts(tab.pdf(**options), pages)
            tab.evaluate(NUMBER, [numbers[page] for page in pages])
            pdf = tab.pdf(**options)
            titles = tab.evaluate(HEADINGS)
        finally:
            tab.close()
    if starts(pdf, pages) != numbers:
        raise RuntimeError("the contents moved the pages that they name")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as partial:
        partial.write_bytes(finished(pdf, titles))


def main(html, out):
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        make(browser, html, out)
        browser.close()
    print(out)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--html", type=Path, default=ROOT / "_build" / "html", help="the built book")
    arguments.add_argument("--out", type=Path, default=ROOT / "_build" / "vae-book.pdf")
    options = arguments.parse_args()
    try:
        main(options.html, options.out)
    except ImportError as error:
        sys.exit(f"pdf.py: {error}; make setup installs what printing needs")
    except (RuntimeError, FileNotFoundError) as error:
        sys.exit(f"pdf.py: {error}")
