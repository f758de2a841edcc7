"""Sphinx extension: every figure of the book on one page, as files for slides.

The directive `figures` lists the figures that the notebooks hold, chapter by chapter, with their captions.
Each is copied into `slides/` beside the pages, named by chapter and figure; `slides/figures.zip` holds all.
"""

import base64
import json
import zipfile
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class Figures(SphinxDirective):
    """A list of links to the figures of the chapters that the table of contents names."""

    def run(self):
        named = [page for page in self.env.found_docs if page[:2].isdigit()]
        archive = nodes.reference("", "All figures in one archive", refuri="slides/figures.zip")
        found = [nodes.paragraph("", "", archive, nodes.Text(", or one by one:"))]
        for page in sorted(named):
            source = Path(self.env.doc2path(page))
            self.env.note_dependency(str(source))
            if figures := list(figures_of(source)):
                found += self.chapter(page, source, figures)
        return found

    def chapter(self, page, source, figures):
        folder = Path(self.env.app.outdir, "slides")
        folder.mkdir(parents=True, exist_ok=True)
        listed = nodes.bullet_list()
        for name, caption, picture in figures:
            file = folder / f"{page}-{name}.png"
            file.write_bytes(picture)
            text = nodes.paragraph()
            text += nodes.reference("", caption, refuri=f"{page}.html#{name}")
            text += nodes.Text(" (")
            text += nodes.reference("", "PNG", refuri=f"slides/{file.name}")
            text += nodes.Text(")")
            listed += nodes.list_item("", text)
        return [nodes.rubric("", f"Chapter {int(page[:2])}: {title_of(source)}"), listed]


def read(source):
    return json.loads(source.read_text(encoding="utf-8"))["cells"]


def title_of(source):
    """The first heading of a notebook."""
    text = "".join(read(source)[0]["source"])
    return text.splitlines()[0].lstrip("# ")


def figures_of(source):
    """(name, caption, PNG) of each figure in a notebook."""
    for cell in read(source):
        described = cell["metadata"].get("mystnb", {}).get("figure", {})
        for output in cell.get("outputs", ()):
            if described.get("name") and "image/png" in output.get("data", {}):
                picture = "".join(output["data"]["image/png"])
                yield described["name"], described["caption"], base64.b64decode(picture)


def pack(app, exception):
    """Put the figures into one archive, the same for the same figures."""
    folder = Path(app.outdir, "slides")
    if exception or not folder.is_dir():
        return
    with zipfile.ZipFile(folder / "figures.zip", "w") as archive:
        for file in sorted(folder.glob("*.png")):
            archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes())


def setup(app):
    app.add_directive("figures", Figures)
    app.connect("build-finished", pack)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
