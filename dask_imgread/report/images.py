"""The images that were read: some at random, how large they are, and the extremes."""

from __future__ import annotations

from collections.abc import Mapping

from dask_imgread.report.elements import (
    describe_top,
    render_grid,
    render_image,
    render_panel,
    render_ranking,
    render_section,
)
from dask_imgread.report.plots import describe_range, draw_histogram
from dask_imgread.report.statistics import MEASURES, Row, Statistics, sort_rows

_EXTREMES = {  # titles, and the measure without which there are none
    "small": ("The smallest", "the least area first", "megapixels"),
    "large": ("The largest", "the most area first", "megapixels"),
    "odd": ("The oddest aspect ratios", "the farthest from a square first", "aspect"),
}


def render_samples(stats: Statistics, pictures: Mapping[str, str]) -> str:
    """Return the section of images that were drawn at random."""
    tiles = [render_image(row, pictures) for row in sort_rows(stats.samples.rows)]
    title = f"Samples, drawn at random, {len(tiles):,} of {stats.images:,}"
    return render_section(title, render_grid("sheet", tiles))


def render_sizes(stats: Statistics) -> str:
    """Return the section of sizes and formats; what is the same for all images has no plot."""
    if not stats.images:
        return ""
    plots: list[str] = []
    constants: list[str] = []
    for name, (title, unit) in MEASURES.items():
        histogram = stats.histograms[name]
        plot = draw_histogram(histogram, title.lower(), unit)
        panel = render_panel(title, describe_range(histogram, unit), plot)
        (plots if plot else constants).append(panel)
    formats = describe_top(stats.formats, "format")
    plots.append(render_panel("Format", formats, render_ranking(stats.formats)))
    grids = render_grid("thirds", plots), render_grid("cards", constants)
    return render_section("Sizes and formats", render_grid("", grids))


def list_extremes(stats: Statistics) -> dict[str, list[Row]]:
    """Return the smallest, largest and oddest images, unless all are alike."""
    varying = {name for name, found in stats.histograms.items() if found.low < found.high}
    return {
        kind: stats.extremes[kind].rows
        for kind, (_, _, measure) in _EXTREMES.items()
        if measure in varying
    }


def render_extremes(stats: Statistics, pictures: Mapping[str, str]) -> str:
    """Return the section of the smallest, largest and oddest images."""
    panels = []
    for kind, rows in list_extremes(stats).items():
        title, order, _ = _EXTREMES[kind]
        tiles = (render_image(row, pictures) for row in rows)
        note = f"{len(rows):,} of {stats.images:,}, {order}"
        panels.append(render_panel(title, note, render_grid("sheet", tiles)))
    return render_section("Extremes", render_grid("", panels))
