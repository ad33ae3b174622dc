"""Pages of Markdown, taken apart: their blocks of code, tables, links and headings."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^( *)(```+)(.*)$")


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, its text, the line before it."""

    language: str
    line: int
    text: str
    before: str


def list_blocks(text):
    lines, blocks = text.splitlines(), []
    numbers = iter(range(len(lines)))
    for start in numbers:
        if fence := _FENCE.match(lines[start]):
            stop = next(n for n in numbers if lines[n].strip() == fence[2])
            inner = [line.removeprefix(fence[1]) for line in lines[start + 1 : stop]]
            blocks.append(
                Block(fence[3].strip(), start + 2, "\n".join(inner) + "\n", lines[start - 1])
            )
    return blocks


def strip_code(text):
    """Return a page without its blocks, and without what is in code font."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def list_links(text):
    """Return the targets of a page's links."""
    return re.findall(r"\]\(([^)\s]+)\)", strip_code(text))


def list_anchors(text):
    """Return what the page's headings are called in links: as GitHub calls them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    anchors = []
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", a) is not None for a in anchors)
        anchors.append(f"{anchor}-{count}" if count else anchor)
    return anchors


def list_tables(text, title):
    """Return the tables below a heading, each a list of rows without code font."""
    section = re.split(r"^#+ ", text.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[
        0
    ]
    found = re.findall(r"^\|.*\n\| ---.*\n((?:\|.*\n?)+)", section, re.MULTILINE)
    return [
        [
            [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
            for line in t.splitlines()
        ]
        for t in found
    ]
