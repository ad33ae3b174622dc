"""Links: of files outside of this folder that are pages here, and of public names in code font."""

import os
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import dask_imgread
from dask_imgread import testing

DOCS = Path(__file__).parents[1]
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
# What public names are called in text, and in full.
NAMES = {name: f"dask_imgread.{name}" for name in dask_imgread.__all__}
NAMES |= {name: name for name in NAMES.values()}
NAMES |= {name: name for name in (f"dask_imgread.testing.{name}" for name in testing.__all__)}
# The page that includes each file.
PAGES = {
    (DOCS / path).resolve(): page
    for page in DOCS.glob("*.md")
    for path in INCLUDE.findall(page.read_text())
} | {DOCS.parent / "README.md": DOCS / "index.md"}


def include_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Include files, and turn links, right where the files are, to the pages that include them."""

    def include(match: re.Match[str]) -> str:
        file = (DOCS / match[1]).resolve()
        app.env.note_dependency(str(file), docname=docname)
        return turn_links(file.read_text(), file.parent)

    source[0] = INCLUDE.sub(include, turn_links(source[0], DOCS))


def turn_links(text: str, folder: Path) -> str:
    """Return a text of a file in a folder with its relative links as they are in ``docs``."""

    def turn(match: re.Match[str]) -> str:
        target = (folder / match[0]).resolve()
        unchanged = folder == DOCS and target not in PAGES
        return match[0] if unchanged else os.path.relpath(PAGES.get(target, target), DOCS)

    return LINK.sub(turn, text)


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Link each public name in code font to its reference."""
    for literal in list(doctree.findall(nodes.literal)):
        name = NAMES.get(literal.astext().removesuffix("()"))
        linked = isinstance(literal.parent, nodes.reference | addnodes.pending_xref | nodes.title)
        if name and not linked and not app.env.docname.endswith(f"/{name}"):
            reference = addnodes.pending_xref(
                refdomain="py",
                reftype="obj",
                reftarget=name,
                refdoc=app.env.docname,
                refexplicit=True,
            )
            literal.replace_self(reference)
            reference += literal


def setup(app: Sphinx) -> dict[str, bool]:
    """Include and link when a page is read."""
    app.connect("source-read", include_files)
    app.connect("doctree-read", link_names)
    return {"parallel_read_safe": True}
