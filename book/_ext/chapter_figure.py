"""`{chapter-figure} fig-gap`: the picture of a chapter's figure on another page, out of the chapter's outputs, with a caption of its own.

    ```{chapter-figure} fig-gap
    :name: short-gap

    What this page says of it.
    ```

The alternative text is the chapter's, and after the caption stands a link to the figure there.
"""

import base64
import io
import json
import os
from pathlib import Path

from dark_figures import lossless
from docutils import nodes
from docutils.parsers.rst import directives
from PIL import Image
from sphinx.util.docutils import SphinxDirective


def drawn(folder: Path, name: str) -> tuple[Path, str, bytes]:
    """The chapter that draws the figure `name`, its alternative text, and its PNG; ValueError where no chapter or more than one does."""
    found = []
    for path in sorted(folder.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            about = cell["metadata"].get("mystnb", {})
            if about.get("figure", {}).get("name") == name:
                pictures = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
                found += [(path, about["image"]["alt"], base64.b64decode(picture)) for picture in pictures]
    if len(found) != 1:
        raise ValueError(
            f"chapter-figure: got {name!r}, which is drawn {len(found)} times, expected a figure that one chapter draws"
        )
    return found[0]


class ChapterFigure(SphinxDirective):
    """The directive: its argument is the name of the figure, its content the caption."""

    required_arguments = 1
    has_content = True
    option_spec = {"name": directives.unchanged}  # noqa: RUF012 - as docutils has it

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        try:
            chapter, alt, picture = drawn(Path(self.env.srcdir), name)
        except ValueError as error:
            raise self.error(str(error)) from error
        self.env.note_dependency(str(chapter))
        copy = Path(self.env.doctreedir) / "chapter-figures" / f"{name}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(picture)) as drawing:
            lossless(drawing).save(copy, "PNG", optimize=True)
        page = Path(self.env.doc2path(self.env.docname)).parent
        figure = nodes.figure("", nodes.image(uri=Path(os.path.relpath(copy, page)).as_posix(), alt=alt))
        parsed = self.parse_text_to_nodes(f"{' '.join(self.content)} (In the chapter: {{numref}}`{name}`.)")
        figure += nodes.caption("", "", *parsed[0].children)
        self.set_source_info(figure)
        self.add_name(figure)
        return [figure]


def setup(app):
    app.add_directive("chapter-figure", ChapterFigure)
    return {"parallel_read_safe": True}
