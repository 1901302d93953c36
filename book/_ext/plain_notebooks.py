"""Writes each chapter as a notebook in plain Markdown, for Colab and Jupyter, which know no roles and no directives: `make notebooks`.

The text comes from the document that Sphinx parsed and resolved, so that numbers, links and citations are those of the page; code and
outputs are the chapter's own. A node without a rule here stops the build: `tests/test_notebooks.py` has one of each that has a rule.
"""

import json
import re
import struct
from base64 import b64encode
from functools import cache, partialmethod
from html import escape
from mimetypes import guess_type
from pathlib import Path

import nbformat
from docutils import nodes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from sphinx.builders import Builder
from sphinx.errors import SphinxError
from sphinx.locale import admonitionlabels
from unbroken import unbroken

SPECIAL = re.compile(r"[\\`*_$~]|(?<=\])\(")  # what Markdown would read as markup in a line of text
CLOSING = re.compile(r"[.,;]*")  # what stays on the line of the formula before it
OPENING = re.compile(r"^([#>+-]|\d+[.)])(?=\s)", re.MULTILINE)  # and at its beginning
DEVICE = """

import torch

if torch.cuda.is_available():
    print(f"{{torch.cuda.get_device_name()}}. On a GPU this chapter {gpu}.")
else:
    print("No GPU. On a CPU this chapter {cpu}.")"""


class NoRule(SphinxError):
    """A node that the notebooks cannot show."""

    category = "The notebooks have no rule"


class Notebooks(Builder):
    """Builds `NAME.ipynb` for each numbered notebook of the contents."""

    name = "notebooks"
    format = "markdown"
    supported_image_types = ("image/png", "image/jpeg", "image/svg+xml")

    def get_outdated_docs(self):
        numbered = (name for name, numbers in self.env.toc_secnumbers.items() if numbers)
        return sorted(name for name in numbered if self.env.doc2path(name).endswith(".ipynb"))

    def get_target_uri(self, docname, typ=None):
        return f"{self.config.html_baseurl}{docname}.html"

    def get_relative_uri(self, from_, to, typ=None):
        return "" if from_ == to else self.get_target_uri(to)

    def prepare_writing(self, docnames):
        self.env.get_doctree = cache(self.env.get_doctree)  # else each reference to a figure reads a document again
        path = Path(self.srcdir).parent / "results" / "ran-on.json"
        self.runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_doc(self, docname, doctree):
        if docname in self.get_outdated_docs():  # Sphinx asks for the pages that list them, too
            source = nbformat.read(self.env.doc2path(docname), as_version=4)
            notebook = Chapter(self, docname, doctree, source).notebook(self.runs.get(docname))
            Path(self.outdir, f"{docname}.ipynb").write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


class Chapter:
    """One chapter. The method `paragraph` gives the Markdown of a paragraph, and so on for every kind of node."""

    def __init__(self, builder, docname, doctree, source):
        self.env, self.config, self.docname, self.doctree, self.source = builder.env, builder.config, docname, doctree, source
        self.page = builder.get_target_uri(docname)
        self.cells, self.blocks, self.level, self.in_table = [], [], 0, False
        links = [node.get("refid") or node.get("refuri", "") for node in doctree.findall(nodes.reference)]
        self.linked = {link.lstrip("#") for link in links if "://" not in link}

    def notebook(self, run):
        """The whole, with a run of the chapter as `results/ran-on.json` tells of it."""
        self.walk(node for node in self.doctree.children if not isinstance(node, nodes.raw))  # what is raw there are scripts
        self.flush()
        first = next(cell for cell in self.cells if cell.cell_type == "code")
        first.source += DEVICE.format(**times(run))
        return new_notebook(cells=self.cells, metadata=self.source.metadata)

    # Cells

    def walk(self, children):
        """Turns what follows a heading into cells: code stands alone, a heading or an exercise begins a new cell of text."""
        for node in children:
            kind = type(node).__name__
            if kind == "section":
                self.level += 1
                self.walk(node.children)
                self.level -= 1
            elif node.get("nb_element") == "cell_code":
                self.code(node)
            elif kind == "solution_node":
                self.solution(node)
            else:
                if kind in ("title", "exercise_enumerable_node"):
                    self.flush()
                self.blocks.append(self.render(node))

    def flush(self):
        """Ends a cell of text."""
        if text := "\n\n".join(filter(None, self.blocks)):
            self.cells.append(new_markdown_cell(text, id=f"text-{len(self.cells)}"))
        self.blocks = []

    def code(self, node, title="", hide_outputs=False):
        """A cell of the chapter, folded if it has a title or the page folds it, and under it the captions of what it shows."""
        self.flush()
        cell = self.source.cells[node["cell_index"]]
        shown = [part for kind in (nodes.figure, nodes.table) for part in node.findall(kind) if part["ids"]]
        tags = cell.metadata.get("tags", [])
        if not title and "hide-input" in tags:
            begun = any(earlier.cell_type == "code" for earlier in self.cells)
            title = f"Code of {self.number(shown[0])}" if shown else "Code" if begun else "Setup"
        metadata = {"tags": tags} if tags else {}
        if title:
            metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}  # in Colab, in Jupyter
        if hide_outputs:
            metadata["jupyter"]["outputs_hidden"] = metadata["collapsed"] = True
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
        for output in cell.outputs:
            if "text/html" in output.get("data", {}):
                output.data.pop("text/markdown", None)  # a directive, for the page
            if alt and "image/png" in output.get("data", {}):
                output.metadata["image/png"] = output.metadata.get("image/png", {}) | {"alt": alt}
        text = f"# @title {title}\n" * bool(title) + cell.source
        count = cell.execution_count
        self.cells.append(new_code_cell(text, id=cell.id, metadata=metadata, outputs=cell.outputs, execution_count=count))
        pages = [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]
        captioned = any("</figcaption>" in page for page in pages)
        for part in shown:
            number = self.number(part)
            if isinstance(part, nodes.figure) and not captioned:
                words = f"**{number}**. {self.inline(next(part.findall(nodes.caption)))}"
                words = fold(f"Caption of {number}", [words]) if hide_outputs else words
            elif hide_outputs:
                words = f"↑ **{number}**, folded"
            else:
                words = f"↑ **{number}**"  # the output has its words
            if any("vaelib-widget" in page for page in pages):
                words += ". It is a still picture until the cell is run or the notebook trusted."
            self.blocks = [self.anchors(part) + words]
            self.flush()

    def solution(self, node):
        """Text that opens at a click, and folded code that runs; what follows the first part says that it goes on."""
        self.flush()
        title, section = node.children
        name, more = title.astext(), title.astext() + ", continued"
        for child in section.children:
            if child.get("nb_element") == "cell_code":
                name = self.close(name, more)
                self.code(child, name, hide_outputs=True)
                name = more
            else:
                self.blocks.append(self.render(child))
        self.close(name, more)

    def close(self, name, more):
        """Folds the text that has gathered, if there is any, under `name`, and gives the name of the part that follows."""
        if not self.blocks:
            return name
        self.blocks = [fold(name, self.blocks)]
        self.flush()
        return more

    # Nodes

    def render(self, node):
        """A node in Markdown."""
        rule = getattr(self, type(node).__name__, None)
        if rule is None:
            self.stop(node)
        return rule(node)

    def stop(self, node, what=""):
        place = node
        while not place.line and place.parent:
            place = place.parent
        cell, line = divmod((place.line or 1) - 1, 10_000)  # as myst-nb counts
        raise NoRule(f"for {what or type(node).__name__} ({self.docname}, cell {cell}, line {line}): {node.astext()[:60]!r}")

    def inline(self, node):
        """A line of text. Jupyter may break it behind a formula, so the comma or full stop that follows goes inside."""
        parts = [*map(self.render, node.children), ""]
        for index, child in enumerate(node.children):
            if isinstance(child, nodes.math):
                closing = CLOSING.match(parts[index + 1])[0]
                parts[index] = f"{parts[index][:-1]}{closing}$"
                parts[index + 1] = parts[index + 1][len(closing) :]
        return unbroken("".join(parts))

    def group(self, node):
        """Blocks, one after another."""
        return "\n\n".join(filter(None, map(self.render, node.children)))

    def nothing(self, node):
        return ""

    def anchors(self, node):
        """Where links lead to; Jupyter goes by id, Colab by name."""
        return "".join(f'<a id="{name}" name="{name}"></a>' for name in node["ids"] if name in self.linked)

    def number(self, node):
        """As "Fig. 1.2"."""
        kind = self.env.get_domain("std").get_enumerable_node_type(node)
        return self.config.numfig_format[kind] % self.dotted(self.env.toc_fignumbers[self.docname][kind], node)

    def dotted(self, numbers, node):
        return ".".join(map(str, next(numbers[name] for name in node["ids"] if name in numbers)))

    def Text(self, node):
        text = SPECIAL.sub(r"\\\g<0>", node.astext()).replace("<", "&lt;")
        return text.replace("|", r"\|") if self.in_table else text

    def title(self, node):
        section, numbers = node.parent, self.env.toc_secnumbers[self.docname]
        keys = [f"#{name}" for name in section["ids"]] if self.level > 1 else [""]
        number = ".".join(map(str, next(numbers[key] for key in keys if key in numbers)))
        heading = f"{'#' * self.level} {self.anchors(section)}{number}. {self.inline(node)}"
        about = f"\n\n*A chapter of [{self.config.html_title}]({self.page}), as a notebook to run.*"
        return heading + about * (self.level == 1)

    def paragraph(self, node):
        return OPENING.sub(lambda match: "\\".join((match[1][:-1], match[1][-1])), self.inline(node))

    def emphasis(self, node):
        return f"*{self.inline(node)}*"

    def strong(self, node):
        return f"**{self.inline(node)}**"

    def literal(self, node):
        text = node.astext().replace("|", r"\|") if self.in_table else node.astext()
        return f"`` {text} ``" if "`" in text else f"`{text}`"

    def math(self, node):
        tex = " ".join(node.astext().split())
        if self.in_table:
            tex = tex.replace(r"\|", r"\Vert ").replace("|", r"\vert ")
        return f"${tex}$"

    def math_block(self, node):
        if node["nowrap"]:
            self.stop(node, "math_block with an environment of its own")
        numbers = self.env.toc_fignumbers.get(self.docname, {}).get("displaymath", {})
        tag = f"\\tag{{{self.dotted(numbers, node)}}}\n" if node.get("number") else ""
        return f"{self.anchors(node)}\n$$\n{node.astext().strip()}\n{tag}$$".strip()

    def reference(self, node):
        address = node.get("refuri") or f"#{node['refid']}"
        return f"[{self.inline(node)}]({address})"

    def raw(self, node):
        if not re.fullmatch(r"\s*<!--.*?-->\s*", node.astext(), re.DOTALL):  # the source of a number
            self.stop(node)
        return ""

    def bullet_list(self, node):
        return "\n".join("- " + indented(self.render(item), 2) for item in node.children)

    def enumerated_list(self, node):
        first = node.get("start", 1)
        return "\n".join(f"{number}. " + indented(self.render(item), 3) for number, item in enumerate(node.children, first))

    def literal_block(self, node):
        language = node.get("language", "text")
        return f"```{'' if language == 'default' else language}\n{node.astext().rstrip()}\n```"

    def block_quote(self, node):
        return quoted(self.group(node))

    def admonition(self, node, label=""):
        title, content = (label, node.children) if label else (self.inline(node[0]), node[1:])
        return quoted("\n\n".join([f"**{title}.**", *map(self.render, content)]))

    def image(self, node):
        path = Path(self.env.srcdir, node["uri"])
        if not node.get("alt"):
            self.stop(node, "a picture without alt text")
        data, kind = path.read_bytes(), guess_type(path.name)[0]
        width = f' width="{struct.unpack(">I", data[16:20])[0] // 2}"' if kind == "image/png" else ""  # two dots a pixel
        return f'<img alt="{escape(node["alt"])}"{width} src="data:{kind};base64,{b64encode(data).decode()}">'

    def figure(self, node):
        picture, caption = node.children
        return f"{self.anchors(node)}{self.render(picture)}\n\n**{self.number(node)}**. {self.inline(caption)}"

    def table(self, node):
        self.in_table = True
        rows = [[self.group(entry).replace("\n\n", "<br>").replace("\n", " ") for entry in row] for row in node.findall(nodes.row)]
        self.in_table = False
        lines = [f"| {' | '.join(line)} |" for line in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
        if isinstance(node[0], nodes.title):
            lines = [f"{self.anchors(node)}**{self.number(node)}**. {self.inline(node[0])}\n", *lines]
        return "\n".join(lines)

    def container(self, node):
        if node.get("design_component") == "dropdown":
            return fold(node[0].astext(), map(self.render, node.children[1:]))
        if node.get("design_component") or node.get("nb_element"):
            self.stop(node, f"container of {node.get('design_component') or node.get('nb_element')}")
        return self.group(node)

    def exercise_enumerable_node(self, node):
        title, content = node.children
        return f"{self.anchors(node)}**{self.number(node)}**{self.inline(title)}\n\n{self.group(content)}"

    def citation(self, node):
        return f"- {self.anchors(node)}" + indented("\n\n".join(map(self.render, node[1:])), 2)  # without its label

    target = comment = nothing
    list_item = group
    number_reference = reference


def indented(text, width):
    return re.sub(r"\n(?!\n)", "\n" + " " * width, text)


def quoted(text):
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def fold(title, blocks):
    """What opens at a click; the blank lines let Markdown be read inside."""
    return f"<details>\n<summary>{escape(title)}</summary>\n\n" + "\n\n".join(filter(None, blocks)) + "\n\n</details>"


def times(run):
    """What a chapter's run says of its time on a GPU and on a CPU, as ends of a sentence."""
    known = dict.fromkeys(("gpu", "cpu"), "was not timed")
    if run:
        hardware, seconds = run["hardware"], run["seconds"]
        took = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
        where = hardware["gpu"] or f"{hardware['processor']}, {hardware['cores']} cores"
        known["gpu" if hardware["gpu"] else "cpu"] = f"took {took} ({where})"
    return known


for kind, label in admonitionlabels.items():
    setattr(Chapter, kind, partialmethod(Chapter.admonition, label=str(label)))


def setup(app):
    app.add_builder(Notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
