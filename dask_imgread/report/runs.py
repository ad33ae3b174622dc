"""The runs of a job: what each of them did, and what is new since the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from math import ceil, inf

from dask_imgread.report.elements import render_grid, render_image, render_panel, render_section
from dask_imgread.report.plots import (
    draw_growth,
    draw_pace,
    draw_rates,
    format_number,
    format_time,
)
from dask_imgread.report.statistics import Floats, Row, sort_rows
from dask_imgread.report.times import Run, count_images

_LISTED = 20
_HEADINGS = (
    *("began (UTC)", "took", "images read", "failed", "images/s"),
    *("new shards", "changed", "gone", "memory of a worker"),
)


def list_working(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that have changed the dataset, or have not ended."""
    working, totals = [], None
    for run in runs:
        if "ended" not in run:
            working.append(run)
            continue
        # A run that only merged or removed rows has read nothing.
        if run["new_partitions"] or totals != (run["images"], run["failed"]):
            working.append(run)
        totals = run["images"], run["failed"]
    return working


def find_news(runs: Iterable[Run]) -> float:
    """Return since when images are new: since the newest run, if there was one before it."""
    working = list_working(runs)
    run = working[-1] if len(working) > 1 else None
    return run["began"] if run and ("ended" not in run or count_images(run)) else inf


def render_runs(
    runs: Sequence[Run],
    rows: Sequence[Row],
    pictures: Mapping[str, str],
) -> str:
    """Return the section about a job's runs.

    Parameters
    ----------
    runs
        The runs, in order.
    rows
        Images that the newest one has read.
    pictures
        Thumbnails by image id.
    """
    working = list_working(runs)
    if not working:
        return ""
    panels = [_render_table(working, len(runs) - len(working))]
    ended = [run for run in working if "ended" in run]
    if len(ended) > 1:
        growth = render_panel("Images in the dataset", "after each run", draw_growth(ended))
        pace = render_panel("Images per second", "while a run read partitions", draw_pace(ended))
        panels.append(render_grid("halves", [growth, pace]))
    if len(working) > 1:
        panels.append(_render_newest(working[-1], rows, pictures))
    return render_section("Runs", render_grid("", panels))


def _render_table(working: Sequence[Run], idle: int) -> str:
    shown = working[: -_LISTED - 1 : -1]
    headings = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
    lines = "".join(_render_line(run, is_last=run is working[-1]) for run in shown)
    note = f"the last {_LISTED} of {len(working):,}" if len(working) > _LISTED else ""
    others = f"{idle:,} other{'s' if idle > 1 else ''} had nothing to do" if idle else ""
    table = f'<div class="wide"><table class="runs"><tr>{headings}</tr>{lines}</table></div>'
    return render_panel("What each did", "; ".join(filter(None, [note, others])), table)


def _render_line(run: Run, is_last: bool) -> str:
    counts = [f"{run[name]:,}" for name in ("new_shards", "changed_shards", "gone_shards")]
    if "ended" in run:
        took = str(timedelta(seconds=ceil(run["ended"] - run["began"])))
        read = [f"{run[name]:,}" for name in ("new_images", "new_failed")]
        rate, memory = run["images_per_second"], run["memory"]
        read.append(format_number(rate) if rate else "")
        counts.append(format_number(memory, "B") if memory else "")
    else:
        took = "has not ended" if is_last else "did not end"
        read, counts = [""] * 3, [*counts, ""]
    cells = (format_time(run["began"]), took, *read, *counts)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _render_newest(run: Run, rows: Sequence[Row], pictures: Mapping[str, str]) -> str:
    note = "it has not ended"
    if "ended" in run:
        note = f"{run['new_images']:,} images read, {run['new_failed']:,} failed"
    if rows:
        note += f"; {len(rows)} drawn at random from what it wrote"
    tiles = (render_image(row, pictures) for row in sort_rows(rows))
    return render_panel("New in the newest run", note, render_grid("sheet", tiles))


def render_rate(times: Floats) -> str:
    """Return the section about throughput, if there are two parts, of which it is drawn.

    Parameters
    ----------
    times
        Rows: images, began and ended of each part.
    """
    if times.shape[1] < 2:
        return ""
    note = (
        "read or failed, over the time of reading, without pauses; each part's images are spread "
        "evenly over the time it took"
    )
    panel = render_panel("Images per second", note, draw_rates(times))
    return render_section("Throughput", panel)
