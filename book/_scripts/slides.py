"""Slides for teaching, made from the built chapters (`make book`): _build/slides/index.html and one deck for each.

python book/_scripts/slides.py [--html FOLDER] [--out FOLDER] [CHAPTER ...]

What goes on a slide follows from a chapter's structure. A section opens with its heading and its first sentences. Each numbered
equation, list, table and listing stands under the sentence that leads to it, with what the cell after it printed where there is room;
each figure stands alone with its caption. Exercises, code and references stay in the book.
The decks need no network: reveal.js and MathJax are copied beside them.
"""

import argparse
import base64
import re
import shutil
import struct
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import urljoin

import yaml
from bs4 import BeautifulSoup, Comment
from pygments.formatters import HtmlFormatter

from vaelib.storage import atomic, write_text

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
VENDOR = ["reveal.js", "reveal.css", "tex-svg-full.js"]
LEFT_OUT = (  # of a built page
    "#exercises, #references, script, style, iframe, details, .cell_input, .admonition, .headerlink, .section-number"
)
WIDTH, HEIGHT = 1280, 720  # of a slide, in pixels
CHARACTERS = 68  # of a line of text
ROOM = 12.5  # lines of text under a heading
OPENING = 300  # characters of the sentences that open a section, of those that lead to an equation
LEAD = 200
TALL = 1.4  # a picture whose width is less than so many heights has its caption beside it
PRINTED = (5, 20, 92)  # a table that a cell printed: least and most lines (of any table the most rows), most characters in a line

COLOURS = HtmlFormatter(style="sas", nobackground=True).get_style_defs(".reveal pre")  # of listings
STYLE = """
:root { --ink: #1d2127; --muted: #565d67; --accent: #0f5bc4; --line: #cfd4da; --ground: #f4f6f8; }
body, .reveal-viewport { margin: 0; background: #fff; }
.reveal { color: var(--ink); font: 34px/1.32 "Source Sans 3", "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
.reveal .slides { text-align: left; }
.reveal .slides section { box-sizing: border-box; height: 720px; padding: 28px 50px 44px; flex-direction: column; gap: 18px; }
.reveal .slides section.stack { padding: 0; }
.reveal section > * { flex: none; margin: 0; }
.reveal h1 { margin-top: auto; font-size: 2.1em; line-height: 1.12; font-weight: 700; }
.reveal h2 { padding-bottom: 8px; border-bottom: 3px solid var(--accent); font-size: 1.25em; line-height: 1.15; font-weight: 700; }
.reveal h2 small { display: block; color: var(--muted); font-size: 0.6em; font-weight: 400; }
.reveal p + p { margin-top: -6px; }
.reveal a { color: var(--accent); text-decoration: none; }
.reveal ul, .reveal ol { padding-left: 1.1em; }
.reveal li { margin-bottom: 0.3em; }
.reveal code, .reveal pre { font-family: "DejaVu Sans Mono", "Liberation Mono", monospace; }
.reveal code { font-size: 0.84em; }
.reveal pre { padding: 12px 18px; border-radius: 8px; background: var(--ground); font-size: 0.7em; line-height: 1.32; white-space: pre; }
.reveal pre.printed { background: none; border-left: 4px solid var(--line); border-radius: 0; padding: 4px 18px; color: var(--muted); }
.reveal pre.alone { color: var(--ink); }
.reveal .equation { display: flex; align-items: center; justify-content: center; position: relative; margin: 0 70px 0 0; padding: 6px 0; }
.reveal .equation > span { font-size: 1.15em; }
.reveal .equation mjx-container { margin: 0 !important; }
.reveal .equation .number { position: absolute; right: -70px; color: var(--muted); font-size: 24px; }
.reveal figure { flex: 1 1 0 !important; min-height: 0; display: flex; flex-direction: column; gap: 14px; }
.reveal figure img { flex: 1 1 0; min-height: 0; width: 100%; object-fit: contain; }
.reveal figure.tall { flex-direction: row; gap: 30px; }
.reveal figure.tall figcaption { width: 320px; align-self: center; }
.reveal figcaption { font-size: 0.8em; color: var(--ink); }
.reveal table { border-collapse: collapse; font-size: 0.8em; }
.reveal caption { padding-bottom: 8px; text-align: left; }
.reveal td, .reveal th { padding: 6px 14px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.reveal .title { justify-content: center; }
.reveal .title p:last-child { margin: auto 0 0; color: var(--muted); font-size: 0.7em; }
.reveal .slide-number { left: 16px; right: auto; background: none; color: var(--muted); font: 18px sans-serif; }
.reveal .controls { font-size: 4px; color: var(--accent); }
.measuring .reveal, .measuring .reveal .slides { width: 1280px !important; height: 720px !important; }
.measuring .reveal .slides section { display: flex !important; visibility: visible !important; transform: none !important; }
.measuring .reveal .slides section.stack { display: block !important; height: auto; }
"""

# Shrinks what is too large for its slide: an equation or a listing by its width, then all of a slide by its height.
SCRIPT = """
MathJax = {options: {enableMenu: false}, startup: {pageReady: () => MathJax.startup.defaultPageReady().then(show)}};
function show() {
  const size = part => parseFloat(getComputedStyle(part).fontSize);
  const shrink = (part, tooLarge) => {
    const whole = size(part) / size(part.parentElement);
    for (let share = 1; share > 0.5 && tooLarge(); share -= 0.02) part.style.fontSize = `${share * whole}em`;
  };
  for (const part of document.querySelectorAll(".equation"))
    shrink(part, () => part.firstElementChild.offsetWidth > part.clientWidth);
  for (const part of document.querySelectorAll("section > :is(pre, table)"))
    shrink(part, () => part.scrollWidth > part.clientWidth || part.offsetWidth > 1180);
  for (const slide of document.querySelectorAll("section:not(.stack)"))
    shrink(slide, () => slide.scrollHeight > slide.clientHeight);
  document.body.classList.remove("measuring");
  return Reveal.initialize({width: 1280, height: 720, margin: 0.02, center: false, display: "flex", hash: true, slideNumber: "c/t",
    transition: "none", backgroundTransition: "none", controls: true, progress: true});
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="reveal.css">
<style>{style}</style>
</head>
<body class="measuring">
<div class="reveal"><div class="slides">
{slides}
</div></div>
<script src="reveal.js"></script>
<script>{script}</script>
<script src="tex-svg-full.js"></script>
</body>
</html>
"""

INDEX = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: slides</title>
<style>
body {{ max-width: 42rem; margin: 3rem auto; padding: 0 1rem; color: #1d2127; font: 1.1rem/1.5 "Helvetica Neue", Arial, sans-serif; }}
a {{ color: #0f5bc4; }}
</style>
</head>
<body>
<main>
<h1>{title}: slides</h1>
<p>One deck for each chapter, made from its text, equations and figures.
Arrow keys turn the slides: right to the next section, down through the slides of one, space through all.
<kbd>F</kbd> fills the screen, <kbd>Esc</kbd> shows all slides.
<code>?view=print</code> behind a deck's address lays it out for print.
No network is needed.</p>
<ol>
{decks}
</ol>
<p><a href="{address}">The book</a></p>
</main>
</body>
</html>
"""


@dataclass
class Block:
    """A piece of a chapter: heading, text, list, equation, listing, table, printed or figure."""

    kind: str
    html: str = ""
    parts: list[str] = field(default_factory=list)  # sentences of a text, items of a list
    level: int = 0  # of a heading
    label: str = ""
    size: float = 0  # lines that it takes on a slide


@dataclass
class Slide:
    """A slide under construction; `shown` holds the sentences that stand on it, `room` the lines that are left."""

    title: str
    above: str = ""  # the heading of the section, over that of a subsection
    label: str = ""
    starts: bool = False  # a column of slides
    kind: str = ""
    parts: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    last: str = ""  # kind of what was put last
    room: float = ROOM

    def put(self, block):
        self.parts.append(block.html)
        self.room -= block.size
        self.last = block.kind

    def say(self, sentences):
        self.parts += [f"<p>{sentence}</p>" for sentence in sentences]
        self.shown += sentences
        self.room -= lines_of(sentences)

    def html(self):
        above = f"<small>{self.above}</small>" if self.above else ""
        heading = f"<h1>{self.title}</h1>" if self.kind == "title" else f"<h2>{above}{self.title}</h2>"
        names = (f' id="{self.label}"' if self.label else "") + (f' class="{self.kind}"' if self.kind else "")
        return "\n".join([f"<section{names}>", heading, *self.parts, "</section>"])


def plain(html):
    """The words of a piece of HTML; a formula counts as what is seen of it, roughly."""
    text = re.sub(r"\\\(.*?\\\)", lambda match: "x" * (len(re.sub(r"\\[a-zA-Z]+|[{}^_\\ ]", "", match[0])) or 1), html)
    return re.sub(r"<[^>]*>", "", text)


def lines_of(sentences):
    """How many lines sentences take, each beginning its own."""
    return sum(-(-len(plain(sentence)) // CHARACTERS) + 0.15 for sentence in sentences)


def article(page, address):
    """The text of a built page, without what no slide shows; links lead to the published book."""
    if not page.is_file():
        raise FileNotFoundError(f"{page}: no such page, expected the built book: run make book first")
    body = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select_one("article.bd-article")
    for tag in body.select(LEFT_OUT):
        tag.decompose()
    for text in body.find_all(string=True):
        if isinstance(text, Comment):
            text.extract()
        elif "\n" in text and text.parent.name != "p" and not text.find_parent("pre"):
            text.replace_with(text.replace("\n", " "))  # so that in a paragraph each line is a sentence
    for tag in body.select("a[href]"):
        tag["href"] = urljoin(address, tag["href"])
        if tag.code or tag.img or tag.find_parent(class_="bibtex-citation") or "/glossary.html#" in tag["href"]:
            tag.unwrap()
    for tag in body.select(".caption-number"):
        tag.string = f"{tag.get_text().strip().rstrip('.')}. "
    for tag in body.select(":is(p, h1, h2, h3, h4, caption, td, th) span, :is(li, td, th) p"):
        tag.unwrap()
    for tag in body.select("a, code, li, tr, td, th"):
        tag.attrs = {"href": tag["href"]} if tag.name == "a" else {}
    return body


def inner(tag):
    return tag.decode_contents().strip()


def fits(table):
    """Whether a table comes on slides: a long one stays in the book, where links to it lead."""
    return len(table.find_all("tr")) <= PRINTED[1]


def blocks(part, folder, address):
    """The blocks of a section, in order."""
    for tag in part.find_all(True, recursive=False):
        kinds = tag.get("class", [])
        if re.fullmatch(r"h\d", tag.name):
            label = tag.find_previous_sibling("span", id=True)
            yield Block("heading", inner(tag), level=int(tag.name[1]), label=label["id"] if label else "")
        elif tag.name == "p" and inner(tag):
            yield Block("text", parts=[line.strip() for line in inner(tag).splitlines()])
        elif tag.name in {"ul", "ol"}:
            yield Block("list", tag.name, [inner(item) for item in tag.find_all("li", recursive=False)])
        elif tag.name == "table":
            if fits(tag):
                rows = [str(row) for row in tag.find_all("tr")]
                yield Block("table", str(tag.caption or ""), rows, label=tag.get("id", ""))
        elif tag.name == "figure":
            yield figure(tag, folder, address)
        elif "math" in kinds:
            yield equation(tag)
        elif "stream" in kinds:
            yield from printed(tag.pre.get_text())
        elif tag.name == "div" and any(kind.startswith("highlight-") for kind in kinds):
            if "output" not in kinds:
                yield Block("listing", f"<pre>{inner(tag.pre)}</pre>", size=0.75 * len(tag.pre.get_text().strip().splitlines()) + 1)
        elif tag.name in {"div", "section"}:
            yield from blocks(tag, folder, address)


def equation(tag):
    """A display equation with its number in the book."""
    number = tag.find(class_="eqno")
    number = f'<span class="number">{number.extract().get_text().strip("()")}</span>' if number else ""
    source = re.fullmatch(r"\\\[(?:\\begin\{split\})?(.*?)(?:\\end\{split\})?\\\]", tag.get_text().strip(), re.DOTALL)[1].strip()
    if "qquad" in source and len(re.sub(r"\\[a-zA-Z]+|[{}^_\s]", "", source)) > 55:  # conditions go to a line of their own
        source = rf"\begin{{gathered}}{source.replace(chr(92) + 'qquad', chr(92) * 2)}\end{{gathered}}"
    rows = len(re.findall(r"\\\\(?![a-z])", source)) + 1
    name = f' id="{tag["id"]}"' if tag.get("id") else ""
    html = f'<div class="equation"{name}><span>\\[{escape(source)}\\]</span>{number}</div>'
    return Block("equation", html, size=2.6 * rows + 0.8)


def figure(tag, folder, address):
    """A figure with its number and caption; of one to touch the still picture, and a caption that says where it can be touched."""
    name, source, caption = tag["id"], tag.img["src"], tag.find_all("figcaption")[-1].p
    data = base64.b64decode(source.partition(",")[2]) if source.startswith("data:") else (folder / source).read_bytes()
    words = inner(caption) + (f' <a href="{address}#{name}">Touch it in the book.</a>' if tag.find(class_="vaelib-widget") else "")
    width, height = struct.unpack(">II", data[16:24])  # of a PNG file
    tall = ' class="tall"' if width < TALL * height else ""
    source, alt = f"data:image/png;base64,{base64.b64encode(data).decode()}", escape(tag.img["alt"])
    html = f'<figure id="{name}"{tall}><img src="{source}" alt="{alt}"><figcaption>{words}</figcaption></figure>'
    return Block("figure", html, size=ROOM if tall else min(8.5, max(5, 26 * height / width)) + len(plain(words)) / 100 + 0.6)


def printed(text):
    """What a cell printed, as blocks: blank lines part them."""
    for piece in re.split(r"\n\s*\n", text.strip("\n")):
        lines = [line.rstrip() for line in piece.splitlines()]
        size = 0.75 * len(lines) + 0.3
        yield Block("printed", f'<pre class="printed">{escape(chr(10).join(lines), quote=False)}</pre>', lines, size=size)


def opening(sentences, limit):
    """The first sentences, at least one, of at most so many characters together."""
    count = 1
    while count < len(sentences) and sum(len(plain(sentence)) for sentence in sentences[: count + 1]) <= limit:
        count += 1
    return sentences[:count]


def leading(sentences, limit):
    """The last sentences, at least one."""
    return opening(sentences[::-1], limit)[::-1]


def lines_of_row(row):
    """How many lines a row of a table takes, its columns equally wide."""
    cells = [plain(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
    return 0.85 * max(-(-len(cell) * len(cells) // 82) or 1 for cell in cells) + 0.3


def parted(block, room):
    """A list or a table as blocks of about equal size that each leave room on a slide; each part of a table has its head and caption."""
    if block.kind not in {"list", "table"}:
        yield block
        return
    head = block.parts[0] if block.kind == "table" else ""
    items = block.parts[1:] if head else block.parts
    sizes = [lines_of_row(item) if head else lines_of([item]) + 0.2 for item in items]
    room -= lines_of_row(head) + lines_of([block.html]) if head else 0
    share = sum(sizes) / -(-sum(sizes) // room)
    groups, used = [[]], 0
    for item, size in zip(items, sizes, strict=True):
        if groups[-1] and used + size / 2 > share * len(groups):
            groups.append([])
        groups[-1].append(item)
        used += size
    for number, group in enumerate(groups):
        if head:
            name = f' id="{block.label}"' if block.label and number == 0 else ""
            html = f"<table{name}>\n{block.html}<thead>\n{head}\n</thead>\n<tbody>\n{chr(10).join(group)}\n</tbody>\n</table>"
        else:
            html = "\n".join([f"<{block.html}>", *(f"<li>{item}</li>" for item in group), f"</{block.html}>"])
        yield Block(block.kind, html, group, size=share)


def arrange(pieces, foot):
    """The slides of a chapter from its blocks."""
    slides, section, lead, skipped = [], "", [], False

    def begin(title, above="", label="", starts=False, kind=""):
        slides.append(Slide(title, above, label, starts, kind))

    def place(block, sentences):
        """On this slide where there is room for it and for the sentences that lead to it, else on the next."""
        now = slides[-1]
        missing = [sentence for sentence in sentences if block.kind != "figure" and sentence not in now.shown]
        if now.kind or (now.parts and now.room < lines_of(missing) + block.size):
            before = now
            begin(now.title, now.above, starts=now.kind == "title")
            now = slides[-1]
            missing = [] if block.kind == "figure" else list(sentences)  # a caption says what its figure shows
            if block.kind == "printed" and set(missing) <= set(before.shown):
                missing = []
            while missing and lines_of(missing) + block.size > ROOM:
                missing.pop(0)
        now.say(missing)
        now.put(block)

    for block in pieces:
        if block.kind == "heading" and block.level == 1:
            begin(block.html, starts=True, kind="title")
        elif block.kind == "heading":
            if block.level == 2:
                section, skipped = block.html, False
            if not skipped:
                empty = block.level > 2 and not slides[-1].parts and slides.pop()
                begin(block.html, section if block.level > 2 else "", block.label, block.level == 2 or bool(empty and empty.starts))
            lead = []
        elif skipped:
            continue
        elif block.kind == "text":
            first = block.parts[0]
            if first.startswith("<strong>Objectives.</strong>"):
                begin("Objectives", starts=True)
                lead = [first.partition("</strong> ")[2]]
                section = "Objectives"
            elif first.startswith("<strong>Prerequisites.</strong>") or first.startswith("The cell above enters"):
                skipped = True
            else:
                now, first = slides[-1], opening(block.parts, OPENING)
                if not now.parts or (not now.shown and now.last == "listing" and now.room > lines_of(first)):
                    now.say(first)
                lead = leading(block.parts, LEAD)
        elif block.kind == "printed":
            least, most, width = PRINTED
            now, wide = slides[-1], max(map(len, block.parts))
            if wide > width or len(block.parts) > most:
                continue
            if now.last in {"equation", "listing"} and now.room >= block.size:
                now.put(block)
            elif len(block.parts) >= least:
                block.html = block.html.replace("printed", "printed alone", 1)
                place(block, lead)
        else:
            for number, part in enumerate(parted(block, max(ROOM - lines_of(lead), ROOM / 2))):
                slides[-1].room = 0 if number else slides[-1].room
                place(part, lead if number == 0 else [])
    slides[0].parts.append(f"<p>{foot}</p>")
    return slides


def chapters():
    """The names of the chapters, in the order of the book."""
    contents = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    return [page["file"] for part in contents["parts"] if part.get("numbered") for page in part["chapters"]]


def deck(slides):
    """One chapter's slides as a page."""
    columns = []
    for slide in slides:
        if slide.starts or not columns:
            columns.append([])
        columns[-1].append(slide.html())
    html = "\n".join(
        f'<section class="stack">\n{chr(10).join(column)}\n</section>' if len(column) > 1 else column[0] for column in columns
    )
    return PAGE.format(title=plain(slides[0].title), style=COLOURS + STYLE, script=SCRIPT, slides=html)


def make(folder, out, only=()):
    """Writes the decks, their index and what they load, from the built pages in a folder; returns the number of slides of each."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    title, site, book = escape(config["title"]), config["html"]["baseurl"], chapters()
    unknown = set(only) - set(book)
    if unknown:
        raise ValueError(f"chapter: got {', '.join(sorted(unknown))}, expected some of {', '.join(book)}")
    pages = {name: article(folder / f"{name}.html", f"{site}{name}.html") for name in book}
    decks = {f"{site}{name}.html": f"{name}.html" for name in book}  # where a link leads that can lead to a slide
    for name, page in pages.items():
        places = [tag["id"] for tag in page.select("div.math[id], figure[id], table[id]") if tag.name != "table" or fits(tag)]
        decks |= {f"{site}{name}.html#{place}": f"{name}.html#/{place}" for place in places}
    out.mkdir(parents=True, exist_ok=True)
    counts, rows = {}, []
    for name, page in pages.items():
        rows.append(f'<li><a href="{name}.html">{inner(page.h1)}</a></li>')
        if only and name not in only:
            continue
        for tag in page.select("a[href]"):
            tag["href"] = decks.get(tag["href"], tag["href"])
        address = f"{site}{name}.html"
        slides = arrange(blocks(page, folder, address), f'{title} · <a href="{address}">this chapter</a>')
        write_text(out / f"{name}.html", deck(slides))
        counts[name] = len(slides)
    for file in VENDOR:
        with atomic(out / file) as partial:
            shutil.copyfile(BOOK / "_vendor" / file, partial)
    write_text(out / "index.html", INDEX.format(title=title, decks="\n".join(rows), address=site))
    return counts


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("chapters", nargs="*", metavar="CHAPTER", help="make these alone")
    arguments.add_argument("--html", type=Path, default=ROOT / "_build" / "html", help="the built book")
    arguments.add_argument("--out", type=Path, default=ROOT / "_build" / "slides")
    options = arguments.parse_args()
    try:
        counts = make(options.html, options.out, options.chapters)
    except (ValueError, FileNotFoundError) as error:
        arguments.error(str(error))
    for name, count in counts.items():
        print(f"{options.out / name}.html: {count} slides")
