"""The notebooks in plain Markdown: a rule for each kind of node, a stop at every other, and, where they were built, the chapters' own."""

import functools
import io
import json
import re
import sys
from base64 import b64encode
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from docutils import nodes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace
from test_book import BOOK, CHAPTERS, chapter, load_script, prose

ROOT = Path(__file__).parent.parent
HTML, BUILT = ROOT / "_build" / "html", ROOT / "_build" / "notebooks"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SITE = CONFIG["html"]["baseurl"]
built = pytest.mark.skipif(not (BUILT / "elbo.ipynb").exists(), reason="the notebooks are not built: run make book first")
sys.path.insert(0, str(BOOK / "_ext"))
from plain_notebooks import Chapter, NoRule, times  # noqa: E402

DRAWN = io.BytesIO()
Image.new("L", (40, 20)).save(DRAWN, "PNG")
DOT = b64encode(DRAWN.getvalue()).decode()
TIED = "\N{NO-BREAK SPACE}"
OPENING = """# One

A *word*, a **strong** one, `code`, <https://example.org/a_b> and $a_1$, then 2*3_4<5 for \\$6.<!-- file:path -->
See {eq}`twice`, {ref}`sec-two`, {numref}`fig-dot`, {numref}`tab-three`, {numref}`fig-out`, {ref}`ex-why` and [](other.ipynb).
Also {cite}`someone` and {term}`latent`, 7<!-- file:path --> ± 2 nats<!-- file:path -->.

$$
a = b
$$ (twice)

- one
- two
  - deep

1. first
2. second

> A quote.

```python
x = 1
```

| what | $\\|x\\|$ |
|---|---|
| a | `b` |

:::{note}
Take care.
:::

:::{admonition} A title
Words.
:::

:::{figure-md} fig-dot
![A dot](dot.png)

A caption with $c$.
:::

:::{list-table} In words.
:header-rows: 1
:name: tab-words

* - b
* - 4
:::

(sec-two)=
## Two
"""
EXERCISE = """:::{exercise}
:label: ex-why

Why?
:::

:::{dropdown} Hint

Think.
:::
"""
SOLUTION = ":::{solution-start} ex-why\n:class: dropdown\n:::\n\nBecause $a$."
END = ":::{solution-end}\n:::\n\n## References\n\n```{bibliography}\n```"
FIGURE = {"figure": {"name": "fig-out", "caption": "What comes *out*."}, "image": {"alt": "A single dot."}}
TABLE = ":::{list-table} Three.\n:header-rows: 1\n:name: tab-three\n\n* - a\n* - 3\n:::\n"


def small_chapter():
    picture = new_output("display_data", {"image/png": DOT, "text/plain": "<Figure>"})
    table = {"text/markdown": TABLE, "text/html": "<table></table>", "text/plain": "a 3"}
    cells = [
        new_markdown_cell(OPENING),
        new_code_cell("x = 1", metadata={"tags": ["hide-input"]}, execution_count=1),
        new_code_cell("plot()", metadata={"tags": ["hide-input"], "mystnb": FIGURE}, outputs=[picture], execution_count=2),
        new_code_cell("table", outputs=[new_output("execute_result", table, execution_count=3)], execution_count=3),
        new_markdown_cell(EXERCISE),
        new_markdown_cell(SOLUTION),
        new_code_cell("print(1)", outputs=[new_output("stream", text="1\n")], execution_count=4),
        new_markdown_cell(END),
    ]
    return new_notebook(cells=cells, metadata=chapter(CHAPTERS[0]).metadata)


def build(folder, notebook):
    """What the builder makes of a book of two chapters and a glossary, with the settings that matter here."""
    book = folder / "book"
    book.mkdir()
    (folder / "results").mkdir()
    run = {"seconds": 90.0, "hardware": {"processor": "Some CPU", "cores": 2, "gpu": None}}
    (folder / "results" / "ran-on.json").write_text(json.dumps({"one": run}))
    contents = "# Book\n\n```{toctree}\n:numbered:\n\none.ipynb\nother.ipynb\n```\n\n```{toctree}\nglossary.md\n```\n"
    (book / "index.md").write_text(contents)
    (book / "glossary.md").write_text("# Glossary\n\n```{glossary}\nlatent\n  Hidden.\n```\n")
    (book / "refs.bib").write_text("@book{someone, author={Ann Someone}, title={A Book}, publisher={P}, year={2001}}")
    (book / "dot.png").write_bytes(DRAWN.getvalue())
    nbformat.write(notebook, book / "one.ipynb")
    other = new_notebook(cells=[new_markdown_cell("# Other"), new_code_cell("1")], metadata=notebook.metadata)
    nbformat.write(other, book / "other.ipynb")
    settings = CONFIG["sphinx"]["config"]
    options = {
        "extensions": ["myst_nb", "sphinx_design", "sphinx_exercise", "sphinxcontrib.bibtex", "plain_notebooks"],
        "html_baseurl": "https://book.example/",
        "html_title": "The book",
        "bibtex_bibfiles": ["refs.bib"],
        "nb_execution_mode": "off",
        "myst_enable_extensions": CONFIG["parse"]["myst_enable_extensions"],
    }
    options |= {key: settings[key] for key in settings if key.startswith(("nb_", "numfig", "math_num", "math_eqref", "bibtex_ref"))}
    with docutils_namespace():
        app = Sphinx(book, None, folder / "out", folder / "trees", "notebooks", options, status=None, warningiserror=True)
        app.build()
    return {path.stem: nbformat.read(path, as_version=4) for path in (folder / "out").glob("*.ipynb")}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build(tmp_path_factory.mktemp("small"), small_chapter())


@pytest.fixture(scope="module")
def text(small):
    return "\n\n".join(cell.source for cell in small["one"].cells if cell.cell_type == "markdown")


def test_the_numbered_notebooks_are_built_and_nothing_else(small):
    assert set(small) == {"one", "other"}
    nbformat.validate(small["one"])


@pytest.mark.parametrize(
    "line",
    [
        "# 1. One\n\n*A chapter of [The book](https://book.example/one.html), as a notebook to run.*",
        "A *word*, a **strong** one, `code`, [https://example.org/a\\_b](https://example.org/a_b) and $a_1,$",
        " $a_1,$ then 2\\*3\\_4&lt;5 for \\$6.\n",
        "See [Eq. 1.1](#equation-twice), [Two](#sec-two), [Fig. 1.1](#fig-dot), [Table 1.2](#tab-three), [Fig. 1.2](#fig-out)",
        "[Exercise 1.1](#ex-why) and [Other](https://book.example/other.html).",
        "[latent](https://book.example/glossary.html#term-latent)",
        '<a id="equation-twice" name="equation-twice"></a>\n$$\na = b\n\\tag{1.1}\n$$',
        "- one\n- two\n\n  - deep",
        "1. first\n2. second",
        "> A quote.",
        "```python\nx = 1\n```",
        "| what | $\\vert x\\vert $ |\n| --- | --- |\n| a | `b` |",
        "> **Note.**\n>\n> Take care.",
        "> **A title.**\n>\n> Words.",
        f'<a id="fig-dot" name="fig-dot"></a><img alt="A dot" width="20" src="data:image/png;base64,{DOT}">\n\n**Fig. 1.1**. A cap',
        "\n\n**Fig. 1.1**. A caption with $c.$",
        "**Table 1.1**. In words.\n\n| b |\n| --- |\n| 4 |",
        '## <a id="sec-two" name="sec-two"></a>1.1. Two',
        '<a id="fig-out" name="fig-out"></a>**Fig. 1.2**. What comes *out*.',
        '<a id="tab-three" name="tab-three"></a>↑ **Table 1.2**',
        '<a id="ex-why" name="ex-why"></a>**Exercise 1.1**\n\nWhy?\n\n<details>\n<summary>Hint</summary>\n\nThink.\n\n</details>',
        "<details>\n<summary>Solution to Exercise 1.1</summary>\n\nBecause $a.$\n\n</details>",
        "Ann Someone. *A Book*. P, 2001.",
    ],
)
def test_every_kind_of_node_becomes_plain_markdown(line, text):
    assert line in text.replace(TIED, " ")


def test_a_number_keeps_its_unit_and_its_spread_and_a_reference_its_number(text):
    assert f"7{TIED}±{TIED}2{TIED}nats" in text
    assert f"See [Eq.{TIED}1.1](#equation-twice), [Two](#sec-two), [Fig.{TIED}1.1](#fig-dot)" in text


def test_a_citation_names_author_and_year_and_leads_to_the_list(text):
    target = re.search(r"\[\[Someone, 2001\]\(#(\w+)\)\]", text)[1]
    assert f'- <a id="{target}" name="{target}"></a>Ann Someone' in text


def test_a_figure_that_brings_its_words_gets_its_number_alone(tmp_path):
    notebook = small_chapter()
    page = "<figure><figcaption>What comes out.</figcaption></figure>"
    notebook.cells[2].outputs = [new_output("display_data", {"text/html": page, "text/plain": "<Figure>"})]
    words = "\n".join(cell.source for cell in build(tmp_path, notebook)["one"].cells)
    assert '<a id="fig-out" name="fig-out"></a>↑ **Fig. 1.2**' in words
    assert "What comes" not in words


def test_code_is_the_chapter_s_folded_where_the_page_folds_it_with_its_outputs(small):
    setup, plot, table, solution = (cell for cell in small["one"].cells if cell.cell_type == "code")
    folded = {"cellView": "form", "jupyter": {"source_hidden": True}}
    assert setup.source.startswith("# @title Setup\nx = 1\n\nimport torch\n")
    assert plot.source == "# @title Code of Fig. 1.2\nplot()"
    assert table.source == "table"
    assert solution.source == "# @title Solution to Exercise 1.1, continued\nprint(1)"  # after the words
    assert setup.metadata == plot.metadata == folded | {"tags": ["hide-input"]}
    assert table.metadata == {}
    assert solution.metadata == {"cellView": "form", "collapsed": True, "jupyter": {"source_hidden": True, "outputs_hidden": True}}
    assert plot.outputs[0].metadata == {"image/png": {"alt": "A single dot."}}
    assert set(table.outputs[0].data) == {"text/html", "text/plain"}  # the directive is the page's
    assert solution.outputs[0].text == "1\n"
    assert [plot.execution_count, table.execution_count] == [2, 3]


def test_the_first_cell_says_how_long_the_chapter_takes_on_the_device_that_it_finds(small, capsys, monkeypatch):
    import torch

    def said(name):
        exec(next(cell for cell in small[name].cells if cell.cell_type == "code").source, {})
        return capsys.readouterr().out

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said("one") == "No GPU. On a CPU this chapter took 90 seconds (Some CPU, 2 cores).\n"
    assert said("other") == "No GPU. On a CPU this chapter was not timed.\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert said("one") == "Some GPU. On a GPU this chapter was not timed.\n"


def test_a_run_on_a_gpu_is_told_as_that():
    run = {"seconds": 600, "hardware": {"processor": "Some CPU", "cores": 2, "gpu": "Some GPU"}}
    assert times(run) == {"gpu": "took 10 minutes (Some GPU)", "cpu": "was not timed"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("Word\n: Its definition.", "definition_list (one, cell 1, line 3): 'Word"),
        ("<b>raw</b>", "raw (one, cell 1, line 3)"),
        ("::::{tab-set}\n:::{tab-item} A\nB\n:::\n::::", "container of tab-set (one, cell 1, line 3)"),
        ("![](dot.png)", "a picture without alt text (one, cell 1, line 3)"),
    ],
)
def test_a_node_without_a_rule_stops_the_build_with_its_name_and_place(source, message, tmp_path):
    notebook = small_chapter()
    notebook.cells = [new_markdown_cell(f"# One\n\n{source}"), new_code_cell("1")]
    with pytest.raises(NoRule, match=re.escape(message)):
        build(tmp_path, notebook)


def test_a_rule_is_never_found_by_chance():
    """A node named like a helper of the translator would be shown by it, and wrongly."""
    helpers = {"notebook", "walk", "flush", "code", "solution", "close"}  # of cells
    helpers |= {"render", "stop", "group", "nothing", "anchors", "number", "dotted"}  # of nodes
    known = {name for name in vars(Chapter) if not name.startswith("_")} - helpers
    named = {name for name in dir(nodes) if isinstance(getattr(nodes, name), type)}
    assert known - named == {"exercise_enumerable_node", "number_reference", "seealso"}
    assert helpers & named == set()


# The chapters

each_chapter = pytest.mark.parametrize("name", CHAPTERS, scope="module")  # tests of one chapter are neighbours: it is read once


@functools.lru_cache(maxsize=1)  # all look at the same one, and none changes it
def notebook_of(name):
    return nbformat.read(BUILT / f"{name}.ipynb", as_version=4)


def text_of(name):
    return "\n\n".join(cell.source for cell in notebook_of(name).cells if cell.cell_type == "markdown")


@functools.lru_cache(maxsize=1)
def page(name):
    return BeautifulSoup((HTML / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


@built
@each_chapter
def test_a_notebook_has_the_code_and_the_outputs_of_its_chapter(name):
    nbformat.validate(notebook_of(name))
    ours, theirs = ([cell for cell in whole.cells if cell.cell_type == "code"] for whole in (notebook_of(name), chapter(name)))
    for number, (ours_, cell) in enumerate(zip(ours, theirs, strict=True)):
        source = re.sub(r"\A# @title [^\n]+\n", "", ours_.source)
        assert (source.partition("\n\nimport torch\n\nif torch.cuda")[0] if number == 0 else source) == cell.source
        assert ours_.id == cell.id
        assert len(ours_.outputs) == len(cell.outputs)
        for output, original in zip(ours_.outputs, cell.outputs, strict=True):
            assert output.get("text") == original.get("text")
            assert output.get("data", {}) == {
                kind: data for kind, data in original.get("data", {}).items() if kind != "text/markdown"
            }


@built
@each_chapter
def test_a_notebook_shows_no_markup_that_colab_does_not_know(name):
    text = re.sub(r"```.*?```|``.+?``|`[^`\n]+`", "", text_of(name), flags=re.DOTALL)
    assert re.findall(r"\{[a-z:-]+\}`|:::|<!--|^\(\S+\)=$|\{bibliography\}", text, re.MULTILINE) == []
    hidden = prose(name).count("{dropdown} Hint") + prose(name).count("{solution-start}")
    captions = text.count("<summary>Caption of Fig")  # of what a solution shows
    inside, continued = False, 0  # text of a solution after its first cell
    for cell in chapter(name).cells:
        begins, ends = "{solution-start}" in cell.source, "{solution-end}" in cell.source
        continued += inside and cell.cell_type == "markdown" and not ends
        inside = begins or (inside and not ends)
    assert text.count("<details>") == text.count("</details>") == hidden + captions + continued
    assert re.findall(r"^\$\$.+$", text, re.MULTILINE) == []  # each stands on a line of its own
    code = [cell for cell in notebook_of(name).cells if cell.cell_type == "code"]
    assert all(cell.metadata.jupyter.source_hidden for cell in code if cell.source.startswith("# @title"))
    assert sum(cell.source.startswith("# @title Solution to Exercise") for cell in code) >= prose(name).count("{solution-start}")
    outputs = [output for cell in code for output in cell.outputs]
    assert not any("{list-table}" in text for output in outputs for text in output.get("data", {}).values())


@built
@each_chapter
def test_numbers_are_those_of_the_page(name):
    soup, text = page(name), text_of(name).replace(TIED, " ")
    tags = [f"({number})" for number in re.findall(r"^\\tag\{(.+)\}$", text, re.MULTILINE)]
    assert len(set(tags)) == len(tags)
    assert tags == [number.text.rstrip("#") for number in soup.select("article span.eqno")]
    captions = [number.text.strip().replace(TIED, " ") for number in soup.select("article .caption-number")]
    shown = re.findall(r"^(?:<a [^>]*></a>)*(?:↑ )?\*\*((?:Fig\.|Table|Exercise) [\d.]+)\*\*", text, re.MULTILINE)
    assert shown == captions
    titles = [re.sub(r"\s*#$", "", heading.text) for heading in soup.select("article :is(h1, h2, h3)")]
    found = re.findall(r"^#+ (?:<a [^>]*></a>)*([\d.]+)", text, re.MULTILINE)
    assert found == [title.split()[0] for title in titles]


@built
@each_chapter
def test_links_lead_to_an_anchor_of_the_notebook_or_of_a_page_that_the_book_has(name):
    text = text_of(name)
    anchors = re.findall(r'<a id="([^"]+)"', text)
    assert len(set(anchors)) == len(anchors)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert {link[1:] for link in links if link.startswith("#")} <= set(anchors)
    broken = set()
    for link in set(links) - {link for link in links if link.startswith("#")}:
        assert link.startswith("https://"), link
        if link.startswith(SITE):
            address, _, fragment = link.removeprefix(SITE).partition("#")
            target = HTML / address
            if not target.is_file() or (fragment and f'id="{unquote(fragment)}"' not in target.read_text(encoding="utf-8")):
                broken.add(link)
    assert broken == set()
    assert any(f"]({SITE}{name}.html)" in cell.source for cell in notebook_of(name).cells[:1])


@built
@each_chapter
def test_every_picture_has_words_and_stands_in_the_notebook(name):
    pictures = BeautifulSoup(text_of(name), "html.parser").select("img")
    assert len(pictures) >= 1
    assert all(picture["src"].startswith("data:image/png;base64,") and len(picture["alt"]) > 40 for picture in pictures)
    for cell in notebook_of(name).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 40, cell.id


@built
@each_chapter
def test_the_page_offers_the_notebook_for_download(name):
    links = [link["href"] for link in page(name).select('a[href$=".ipynb"].btn-download-source-button')]
    assert links == [f"_sources/{name}.ipynb"]
    assert (HTML / links[0]).read_bytes() == (BUILT / f"{name}.ipynb").read_bytes()


@built
@each_chapter
def test_the_first_cell_names_the_run_of_the_ledger(name):
    first = next(cell for cell in notebook_of(name).cells if cell.cell_type == "code")
    run = json.loads((ROOT / "results" / "ran-on.json").read_text(encoding="utf-8"))[name]
    assert f'print("No GPU. On a CPU this chapter {times(run)["cpu"]}.")' in first.source
    assert "pip install -q git+" in first.source


@built
def test_the_colab_check_runs_these_notebooks_with_the_address_in_the_first_cell_replaced(tmp_path):
    script = load_script("colab_check")
    for name in CHAPTERS:
        notebook, original = script.with_local_address(name, Path("somewhere"), tmp_path), notebook_of(name)
        changed = [new.source for new, old in zip(notebook.cells, original.cells, strict=True) if new.source != old.source]
        assert len(changed) == 1
        assert "%pip install -q somewhere\n" in changed[0]
