"""Long texts cut short, and texts as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

LONGEST = 100  # characters of a text in HTML


def shorten(text: str, length: int, mark: str = "…") -> str:
    """Leave out the middle of a text that is too long, not its end, in which paths differ.

    >>> shorten("shards/first/000017.jpg", 15)
    'shard…00017.jpg'
    """
    if len(text) <= length:
        return text
    head = length // 3
    return f"{text[:head]}{mark}{text[head + len(mark) - length :]}"


def escape_line(text: str, length: int = LONGEST) -> str:
    """Return the beginning of a text, on one line, as HTML.

    >>> escape_line("a < b and so on", 8)
    'a &lt; b a…'
    """
    line = " ".join(text[: 2 * length].split())
    line = line if len(line) <= length else f"{line[: length - 1]}…"
    # A notebook is UTF-8, in which half a surrogate pair can't be written.
    return escape(line.encode("utf-8", "replace").decode())


def render_table(rows: Iterable[tuple[str, str]], title: str = "") -> str:
    """Return an HTML table of names and values, with inline styles, as notebooks keep them."""
    left = "text-align:left;vertical-align:top;overflow-wrap:anywhere"
    lines = "".join(
        f'<tr><th style="{left}">{escape_line(name)}</th>'
        f'<td style="{left}">{escape_line(shorten(value, LONGEST))}</td></tr>'
        for name, value in rows
    )
    heading = f"<div>{escape_line(title, 2 * LONGEST)}</div>" if title else ""
    return heading + (f"<table>{lines}</table>" if lines else "")
