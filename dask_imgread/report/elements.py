"""The elements of a report's page, as HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from dask_imgread.report.statistics import Row

TOP = 20  # causes, formats and values that are listed


def render_badge(text: str, good: bool) -> str:
    """Return a badge: green if it is good news, else yellow."""
    return f'<span class="badge {"good" if good else "warn"}">{text}</span>'


def render_section(title: str, content: str) -> str:
    """Return a section with its heading, or nothing if it has no content."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def render_banner(text: str, kind: str) -> str:
    """Return a line across the page, ``good`` or ``warn``."""
    return f'<p class="banner {kind}">{text}</p>'


def render_grid(kind: str, items: Iterable[str]) -> str:
    """Return a grid of items, or nothing if there are none; the page's style has its kinds."""
    content = "".join(items)
    return f'<div class="grid {kind}">{content}</div>' if content else ""


def render_panel(title: str, note: str, content: str) -> str:
    """Return a panel with a title and a note."""
    return f'<div class="panel"><h3>{title}</h3><p class="soft">{note}</p>{content}</div>'


def render_card(title: str, number: str, note: str, alarm: bool = False) -> str:
    """Return a card that shows a number."""
    return (
        f'<div class="card {"alarm" if alarm else ""}">'
        f'<span class="soft">{title}</span><b>{number}</b><span class="soft">{note}</span></div>'
    )


def render_thumbnail(source: str, captions: Iterable[str]) -> str:
    """Return a picture that is enlarged on a click, and the texts beneath it."""
    lines = "".join(f"<p>{escape(text)}</p>" for text in captions)
    return f'<button class="picture" title="enlarge"><img alt="" src="{source}"></button>{lines}'


def render_tile(picture: str, image_id: str, note: str) -> str:
    """Return a picture with the image's name, its shard and a note below it."""
    shard, _, name = image_id.partition("/")
    return (
        f'<figure title="{escape(image_id)}">{picture}<figcaption><span>{escape(name)}</span>'
        f'<span class="soft">{escape(shard)}</span><span class="soft">{escape(note)}</span>'
        "</figcaption></figure>"
    )


def render_image(row: Row, pictures: Mapping[str, str]) -> str:
    """Return the tile of an image that was read; ``pictures`` are by image id."""
    note = f"{row.width:,} \u00d7 {row.height:,} · {row.format}"
    return render_tile(pictures[row.image_id], row.image_id, note)


def render_placeholder(reason: str) -> str:
    """Return what stands in place of a picture."""
    return f'<div class="picture gone"><span>{escape(reason)}</span></div>'


def render_command(command: str) -> str:
    """Return a command line with a button that copies it."""
    words = " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))
    return f'<div class="command"><code>{words}</code><button>Copy</button></div>'


def render_cell(text: str) -> str:
    """Return a table's cell, of which a long text is cut short."""
    return f'<td title="{escape(text)}"><span>{escape(text)}</span></td>'


def render_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts."""
    heads = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = "".join(f"<tr>{''.join(map(render_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{heads}</tr>{lines}</table></div>'


def render_ranking(counts: Counter[str], kind: str = "") -> str:
    """Return a bar for each of the most frequent names; if there is one alone, only its count."""
    total, most = counts.total(), max(counts.values())
    lines = (
        f'<div title="{escape(name)}"><span>{escape(name)}</span>'
        f"<span>{number:,} ({number / total:.1%})</span>"
        + f'<i style="width:{100 * number / most:.4g}%"></i>' * (len(counts) > 1)
        + "</div>"
        for name, number in counts.most_common(TOP)
    )
    return f'<div class="ranking {kind}">{"".join(lines)}</div>'


def describe_top(counts: Counter[str], thing: str) -> str:
    """Return how many things there are, and how many of them a ranking has."""
    counted = f"{len(counts):,} {thing}{'s' if len(counts) != 1 else ''}"
    return counted if len(counts) <= TOP else f"the top {TOP} of {counted}"
