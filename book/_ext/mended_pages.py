"""Mends what the theme leaves wrong in the built pages: names for screen readers, noise in the console, weight, descriptions.

`tests/test_web.py` holds the pages to it. A build that leaves pages as they are may run the rules on them again: that changes nothing.
"""

import hashlib
import itertools
import re
import shutil
from html import escape, unescape
from pathlib import Path
from urllib.parse import urljoin, urlparse

from dark_figures import dark, lossless
from docutils import nodes
from PIL import Image
from pybtex.plugin import register_plugin
from pybtex.style.formatting.alpha import Style
from sphinx.util.osutil import relative_uri
from unbroken import unbroken

LENGTH = 110  # a description ends with the sentence that reaches so many characters
MATHS = "\ufffc"  # stands for a formula
SYSTEM_THEME = '(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")'
# The theme looks for what scrolls, to let the keyboard reach it, at load and when the window changes: let it look when a fold opens too.
UNFOLDED = """["toggle", "click"].forEach(kind => document.addEventListener(kind, event => {
    if (event.target.closest?.("details, .toggle")) window.dispatchEvent(new Event("resize"));
}, true));"""

# MathJax sets a few formulas at a time: a page of hundreds answers the reader meanwhile.
TYPESET = """if (window.MathJax) MathJax.startup = {pageReady: async () => {
    const formulas = [...document.querySelectorAll(".math")];
    while (formulas.length) {
        await MathJax.typesetPromise(formulas.splice(0, 4));
        await new Promise(done => setTimeout(done));
    }
}};"""

# An excerpt on the search page is a page's bare text: without code, and of formulas only letters and numbers.
EXCERPTS = r"""const text = Search.htmlToText;
Search.htmlToText = (source, anchor) => {
    const page = new DOMParser().parseFromString(source, "text/html");
    page.querySelectorAll("div.cell_input, div.math").forEach(part => part.remove());
    page.querySelectorAll("span.math").forEach(part => {
        const formula = part.textContent.replace(/^\\\(|\\\)$/g, "");
        part.textContent = /^[\w ,=]+$/.test(formula) ? formula : "…";
    });
    return text(page.documentElement.outerHTML, anchor);
};"""


def in_parts(name: re.Match) -> str:
    """A name with places to break behind the signs that join its parts."""
    return re.sub(r"(?<=[\w)\]])([_./(,=]+)(?=[^\W\d_]\w{3})", r"\1<wbr>", name[0])


def in_columns(table: re.Match) -> str:
    """A table with a mark on columns of plain numbers: they stand flush right, their digits one below the other."""
    rows = [re.findall(r"<(t[dh])[ >](.*?)</\1>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", table[0], re.DOTALL)]
    if len({*map(len, rows)}) != 1:
        return table[0]
    marks = []
    for column in zip(*rows, strict=True):
        texts = [re.sub(r"[^<]*>|<[^>]*>", "", text) for kind, text in column if kind == "td"]
        marks.append(len(texts) > 1 and all(re.fullmatch(r"[−-]?[\d,.]*\d%?|–|not run", text) for text in texts))
    marks = itertools.cycle(' data-number=""' if mark else "" for mark in marks)
    return re.sub(r'<(t[dh])(?: data-number="")?(?=[ >])', lambda cell: f"<{cell[1]}{next(marks)}", table[0])


FORMULA = r'<span class="math notranslate nohighlight">\\\([^<]*\\\)</span>'
RULES = [  # pattern, what replaces it
    # The accessible name has to contain the words that are seen (WCAG 2.5.3).
    (r'(<button class="btn search-button-field[^>]*?) aria-label="[^"]*"', r"\1"),
    (r'(<i class="theme-switch [^>]*?) title="[^"]*"', r'\1 aria-hidden="true"'),
    (r'<summary aria-label="Toggle hidden content">', "<summary>"),
    # A formula keeps the comma or full stop behind it, and the bracket before it, on its line, and a number in a table its spread.
    (
        rf'(?<!<span class="unbroken">)(?<!<span class="unbroken">\()(\({FORMULA}[.,;:!?)]*|{FORMULA}[.,;:!?)]+)',
        r'<span class="unbroken">\1</span>',
    ),
    (r"(<td[^>]*>)<p>([^<]*\d) ± (\d[^<]*</p></td>)", r'\1<p class="spread">\2 ±&nbsp;\3'),
    (r"(<td[^>]*>)<p>([^<]*\d) \(([\d.]+) to ([\d.]+\)</p></td>)", r'\1<p class="spread">\2 (\3&nbsp;to&nbsp;\4'),
    (r"([^<> ]) = ([^<> ]+</p></t[dh]>)", r"\1&nbsp;=&nbsp;\2"),
    (r"<td><p>(\d{4}-\d\d-\d\d)</p>", r'<td><p class="unbroken">\1</p>'),
    (r"<p>.*?</p>|<(?:caption|figcaption)>.*?</(?:caption|figcaption)>", lambda text: unbroken(text[0], "&nbsp;")),
    (r"<td><p>\((?:[\w/]{1,3}, )+[\w/.]{0,3}\)", lambda shape: shape[0].replace(", ", ",&nbsp;")),
    # So do the two parts of a reference, and the parts of a date; a space before a link is not underlined.
    (r">(Fig\.|Table|Eq\.|Exercise) (?=[\d.]+</)", r">\1&nbsp;"),
    (r"(, )(\d{4}-\d\d-\d\d)(?=\.</strong>)", r'\1<span class="unbroken">\2</span>'),
    (r'(Solution to)(<a class="reference internal" href="[^"]*">) ', r"\1 \2"),
    # A long name of code, if it has to break, breaks behind the signs that join its parts; in a table it has to sooner.
    (r"<td[^>]*>.*?</td>", lambda cell: re.sub(r'<span class="pre">[^<]{14,}</span>', in_parts, cell[0])),
    (r'<span class="pre">[^<]{26,}</span>', in_parts),
    # The two hyphens of an option are not torn apart.
    (r'<span class="pre">(-[^<]{1,20})</span>', r'<span class="pre option">\1</span>'),
    (r'<table (?:tabindex="0" )?class="table".*?</table>', in_columns),
    # A table that scrolls inside its box on a phone is reached by keyboard.
    (r'<table class="table', r'<table tabindex="0" class="table'),
    # A role that ARIA dropped; the list around it stays.
    (r'role="doc-biblioentry"', 'role="listitem"'),
    # Thebe's constants stand twice on each page, which is an error, and nothing here uses Thebe.
    (r"\s*<script>const THEBE_JS_URL.*?</script>", ""),
    (r'\s*<script [^>]*src="[^"]*sphinx-thebe\.js[^>]*></script>', ""),
    (r'\s*<link [^>]*href="[^"]*sphinx-thebe\.css[^>]*>', ""),
    (r'\s*<script type="text/x-thebe-config">.*?</script>\s*<script>kernelName = [^<]*</script>', ""),
    # Without a choice of the reader's, the system's scheme: from the first paint on, and with nothing in the console.
    (r'localStorage\.getItem\("mode"\) \|\| ""', 'localStorage.getItem("mode") || "auto"'),
    (r'localStorage\.getItem\("theme"\) \|\| ""', f'localStorage.getItem("theme") || {SYSTEM_THEME}'),
    (r'data-default-mode=""', 'data-default-mode="auto"'),
    # Icons are drawn by the style sheet and its fonts; the script draws them again, in half a megabyte.
    (r"\s*<!-- So that users can add custom icons -->\s*<script [^>]*fontawesome\.js[^>]*></script>", ""),
    # Only the search page searches; there the three scripts stand before this tag.
    (r'(<meta name="docsearch:version"[^>]*>)(\s*<script src="[^"]*"></script>){3}', r"\1"),
    # A module runs in its turn among the deferred scripts: after the search's code, before the index that a search waits for.
    (
        r'(?<!</script>)<script [^>]*src="searchindex\.js"></script>',
        lambda tag: f'<script type="module">{EXCERPTS}</script>{tag[0]}',
    ),
    # No script holds up the page; what two of them set is what is the case without them.
    (r"\s*<script>DOCUMENTATION_OPTIONS\.\w+ = [^<]*</script>", ""),
    (r"<script (?=[^>]*src=)(?![^>]*(?:defer|async))", "<script defer "),
    (r'\s*<!-- Pre-loaded scripts[^>]*-->(\s*<link rel="preload" as="script"[^>]*>)+', ""),
    (r'<meta name="viewport" content="width=device-width, initial-scale=1"\s*/>\s*', ""),
    # Colab shows no roles and directives: it opens the notebook in plain Markdown, which the workflow `pages` puts on a branch.
    (r'(href="https://colab[^"]*/blob/)[\w.-]+/book/([\w-]+\.ipynb")', r"\1notebooks/\2"),
    # A page without text of its own (index, search, source) is described by its title.
    (r'\A((?:(?!name="description").)*?)(<title>([^<]*)</title>)', r'\1<meta name="description" content="\3" />\n\2'),
]


def description(doctree: nodes.document) -> str:
    """The sentences that begin a page and can stand alone: without mathematics, in a paragraph that points to no figure."""
    for paragraph in next(doctree.findall(nodes.section)).findall(nodes.paragraph):
        copy = paragraph.deepcopy()
        for formula in list(copy.findall(nodes.math)):
            formula.replace_self(nodes.Text(MATHS))
        text = re.sub(r"<!--.*?-->", "", copy.astext())  # without the sources of numbers
        text = re.sub(r" \[[^][]*\d{4}[a-z]?\]", "", text)  # without citations
        if re.search(r"(Fig\.|Table|Eq\.) \d", text):
            continue
        sentences = ""
        for line in text.splitlines():  # one sentence per source line
            if MATHS not in line and len(sentences) < LENGTH:
                sentences = f"{sentences} {line}".strip()
        if sentences:
            return sentences
    return ""


def add_description(app, pagename, templatename, context, doctree):
    """Gives a page its description, which opengraph then takes over."""
    if doctree:
        text = escape(description(doctree))
        context["metatags"] += f'\n<meta name="description" content="{text}" />\n'
        context["meta"] = (context["meta"] or {}) | {"og:description": text}


def tidy_docstring(app, what, name, obj, options, lines):
    """A docstring names equations by their labels; on its page these are links. What torch says of every `forward` is left out."""
    if lines and lines[0].startswith("Define the computation performed at every call"):
        lines.clear()
    lines[:] = [re.sub(r"\beq\. ([a-z][a-z0-9-]*[a-z0-9])", r":eq:`\1`", line) for line in lines]


def skip_fields(app, what, name, obj, skip, options):
    """The fields of a named tuple are told in its docstring; "Alias for field number 0" adds nothing."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def not_found(app):
    """The page that a server shows in place of one that it does not have."""
    home = relative_uri("404.html", app.builder.get_target_uri(app.config.root_doc))
    body = f'<h1>There is no such page</h1>\n<p>It may have moved. Begin at the <a href="{home}">first page</a>, or search.</p>'
    return [("404", {"title": "Page not found", "pagetitle": "Page not found", "body": body}, "page.html")]


def lighter(page: str, address: str, folder: Path) -> str:
    """The page with its figures loaded as the reader comes to them: images keep their place, figures to touch get files of their own.

    Each image gets a second drawing for dark pages, of which a reader loads one.
    """

    def image(match):
        path = (folder / address).parent / match[1]
        other = path.with_suffix(".dark.png")
        with Image.open(path) as figure:
            width, height = figure.size
            if not other.exists() or other.stat().st_mtime < path.stat().st_mtime:
                lossless(dark(figure, free=path.name.startswith("open-"))).save(other)
        rest = re.sub(r' class="[^"]*"', "", match[0][4:])
        pair = [
            f'<img loading="lazy" class="only-{scheme}" width="{width}" height="{height}"{text}'
            for scheme, text in (("light", rest), ("dark", rest.replace(match[1], match[1][:-3] + "dark.png")))
        ]
        linked = re.search(r"<a [^>]*>\s*\Z", page[: match.start()])
        return "".join(pair) if linked else f'<a href="{match[1]}">{"".join(pair)}</a>'  # a tap enlarges it

    def frame(match):
        data = unescape(match[1]).encode()
        name = f"_frames/{hashlib.sha256(data).hexdigest()[:16]}.html"
        (folder / "_frames").mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        return f'<iframe src="{relative_uri(address, name)}"'

    page = re.sub(r'<img (?!loading)[^>]*?src="([^":]*_images/[^"]*\.png)"[^>]*>', image, page)
    return re.sub(r'<iframe srcdoc="([^"]*)"', frame, page)


def mend(app, error):
    """Makes every page lighter and applies the rules to it; writes the site map and the index."""
    if error or app.builder.format != "html":
        return
    folder, root = Path(app.outdir), app.config.html_baseurl
    for path in folder.rglob("*.html"):
        address = path.relative_to(folder).as_posix()
        if address.startswith(("_static/", "_frames/")):
            continue
        text = path.read_text(encoding="utf-8")
        page = lighter(text, address, folder)
        for pattern, replacement in RULES:
            page = re.sub(pattern, replacement, page, flags=re.DOTALL)
        if 'class="math' not in page:  # half the weight of a page that shows no formula
            page = re.sub(r"\s*<script [^>]*tex-svg-full\.js[^>]*></script>", "", page)
        if address == "404.html":  # shown at any depth, so its addresses start at the site's root
            page = re.sub(r'((?:href|src|action|content_root)=")(?![a-z]+:|#|/)', rf"\g<1>{urlparse(root).path}", page)
        if page != text:
            path.write_text(page, encoding="utf-8")
    pages = sorted(urljoin(root, app.builder.get_target_uri(name)) for name in app.env.found_docs)
    urls = "".join(f"<url><loc>{escape(page)}</loc></url>\n" for page in pages)
    site_map = (
        f'<?xml version="1.0" encoding="utf-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{urls}</urlset>\n'
    )
    (folder / "sitemap.xml").write_text(site_map, encoding="utf-8")
    shutil.copyfile(folder / app.builder.get_target_uri(app.config.root_doc), folder / "index.html")  # in place of a redirect


class SurnamesFirst(Style):
    """An entry of the references begins with the name that it is sorted by and cited under."""

    default_name_style = "lastfirst"


register_plugin("pybtex.style.formatting", "surnames", SurnamesFirst)


def setup(app):
    app.add_js_file(None, body=UNFOLDED)
    app.add_js_file(None, body=TYPESET, priority=800)  # after MathJax's configuration
    app.connect("html-page-context", add_description, priority=400)  # before opengraph
    app.connect("autodoc-process-docstring", tidy_docstring)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("html-collect-pages", not_found)
    app.connect("build-finished", mend, priority=900)  # after the theme
    return {"parallel_read_safe": True, "parallel_write_safe": True}
