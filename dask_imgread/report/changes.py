"""What differs from another job, or from an earlier state of it: a section of the report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from dask_imgread.diff import Survey, describe_change
from dask_imgread.report.elements import (
    render_banner,
    render_grid,
    render_panel,
    render_section,
    render_table,
    render_tile,
)
from dask_imgread.report.statistics import Row

_CHANGED = 6  # images of each kind that are shown


def list_changed(survey: Survey) -> dict[str, list[Row]]:
    """Return a few images of each kind of change of which there is something to show."""
    names = ("shard", "offset", "size", "width", "height", "format")
    return {
        kind: [
            Row(row["image_id"], *(row[f"{name}_new"] for name in names))
            for row in [row for row in rows if row["error_new"] is None][:_CHANGED]
        ]
        for kind, rows in survey.list_first()
        if kind in ("added", "changed", "newly readable")
    }


def render_changes(
    since: str,
    survey: Survey,
    changed: Mapping[str, list[Row]],
    pictures: Mapping[str, str],
    done: bool,
) -> str:
    """Return the section; ``done`` says whether the job has read everything."""
    title = escape(f"Since {since}: {survey.old:,} images then, {survey.new:,} now")
    if not survey.counts:
        return render_section(title, render_banner("No image differs.", "good"))
    panels = [
        render_panel(
            kind.capitalize() if done or kind != "gone" else "Gone, or not read yet",
            f"{len(rows):,} of {survey.counts[kind]:,}",
            render_table(
                ("image_id", ""), ((row["image_id"], describe_change(row)) for row in rows)
            ),
        )
        for kind, rows in survey.list_first()
    ]
    tiles = [
        render_tile(pictures[row.image_id], row.image_id, kind)
        for kind, rows in changed.items()
        for row in rows
    ]
    new = sum(survey.counts[kind] for kind in changed)
    shown = f"{', '.join(changed).capitalize()}: {len(tiles):,} of {new:,}"
    return render_section(title, render_grid("halves", panels)) + render_section(
        shown, render_grid("sheet", tiles)
    )
