"""The plots of a job's report, and how its numbers are formatted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import ceil, floor, log10
from typing import Any

import numpy as np
from bokeh.core.properties import value
from bokeh.embed import components
from bokeh.models import (
    AdaptiveTicker,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.themes import Theme
from bokeh.transform import dodge
from numpy.typing import NDArray

from dask_imgread.report.statistics import MEASURES, Floats, Histogram, Statistics
from dask_imgread.report.times import Run, close_gaps
from dask_imgread.texts import shorten

TOP = 20  # causes, shards and formats that are drawn
_TIME_BINS = 60

_INK, _BLUE, _RED = "#76828f", "#4a86e8", "#e0566a"  # legible on a light and on a dark background
_FONT = "system-ui, sans-serif"
_THEME = Theme(
    json={
        "attrs": {
            "Plot": {
                "background_fill_color": None,
                "border_fill_color": None,
                "outline_line_color": None,
                "sizing_mode": "stretch_width",
                "toolbar_location": None,
            },
            "Axis": {
                "axis_line_color": None,
                "axis_label_text_color": _INK,
                "axis_label_text_font": _FONT,
                "axis_label_text_font_size": "12px",
                "axis_label_text_font_style": "normal",
                "major_label_text_color": _INK,
                "major_label_text_font": _FONT,
                "major_label_text_font_size": "12px",
                "major_tick_line_color": None,
                "minor_tick_line_color": None,
            },
            "Grid": {"grid_line_color": _INK, "grid_line_alpha": 0.2},
        }
    }
)


def embed_plots(
    stats: Statistics,
    times: Floats,
    runs: Sequence[Run],
    measures: Mapping[str, tuple[Histogram, str, str]],
) -> tuple[dict[str, str], str, str]:
    """Return HTML: each plot's div by name, the script that draws them, and Bokeh's scripts.

    Parameters
    ----------
    stats
        The job's statistics.
    times
        Rows: images, began and ended of each part.
    runs
        The runs that are drawn over time.
    measures
        Further histograms by name, each with its title and unit.
    """
    plots: dict[str, figure] = {}
    if stats.failed:
        plots["causes"] = _draw_ranking(stats.causes, _RED)
        plots["shards"] = _draw_ranking(stats.shards, _RED)
    if stats.images:
        plots["format"] = _draw_ranking(stats.formats, _BLUE)
        plots |= {
            name: _draw_histogram(stats.histograms[name], *MEASURES[name]) for name in MEASURES
        }
    plots |= {name: _draw_histogram(*measure) for name, measure in measures.items()}
    if times.size:
        plots["rate"] = _draw_rates(times)
    if len(runs) > 1:
        plots["growth"] = _draw_growth(runs)
        plots["pace"] = _draw_pace(runs)
    if not plots:
        return {}, "", ""
    script, divs = components(plots, theme=_THEME)
    return divs, script, Resources(mode="inline", components=["bokeh"]).render()


def _draw_ranking(counts: Counter[str], color: str) -> figure:
    """Draw a bar for each of the most frequent names, with name and count above it."""
    names, numbers = zip(*counts.most_common(TOP), strict=True)
    total = counts.total()
    source = ColumnDataSource(
        {
            "place": list(range(len(names))),
            "name": names,
            "short": [shorten(name, 40) for name in names],
            "number": numbers,
            "label": [f"{number:,} ({number / total:.1%})" for number in numbers],
        }
    )
    plot = figure(
        height=20 + 34 * len(names),
        tools="",
        x_range=Range1d(0, max(numbers)),
        y_range=Range1d(len(names) - 0.5, -0.6),
    )
    plot.hbar(y="place", right="number", height=0.25, source=source, color=color)
    lines = plot.hbar(y="place", right=max(numbers), height=1, source=source, alpha=0)
    style = {"text_color": _INK, "text_font": value(_FONT), "text_font_size": "13px"}
    y = dodge("place", -0.2)
    plot.text(0, y, "short", source=source, **style)
    plot.text(max(numbers), y, "label", source=source, text_align="right", **style)
    plot.add_tools(HoverTool(renderers=[lines], tooltips="@name: @label"))
    plot.axis.visible = plot.grid.visible = False
    return plot


def _draw_histogram(histogram: Histogram, title: str, unit: str) -> figure:
    edges, counts = histogram.bins()
    spans = [
        f"{format_number(low, unit)} to {format_number(high, unit)}"
        for low, high in pairwise(edges)
    ]
    labels = [
        f"{span}: {count:,} images" for span, count in zip(spans, counts.tolist(), strict=True)
    ]
    name = title.lower()
    axes = {"x_axis_label": f"{name} ({unit})" if unit else name, "y_axis_label": "images"}
    low, high = edges[0], edges[-1]
    if not histogram.limit:
        margin = max(1.05, (2 * low / high) ** 0.5)  # so that the axis spans an octave
        low, high = low / margin, high * margin
        axes["x_axis_type"] = "log"
    plot = _draw_bars(edges, counts, labels, x_range=Range1d(low, high), **axes)
    plot.yaxis.ticker.min_interval = 1
    if histogram.limit:
        return plot
    ticks = _choose_ticks(low, high)
    plot.xaxis.ticker = FixedTicker(ticks=ticks)
    plot.xaxis.major_label_overrides = {tick: format_number(tick) for tick in ticks}
    return plot


def _choose_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis, as many as stay legible.

    >>> _choose_ticks(90, 600), _choose_ticks(99, 126)
    ([100.0, 200.0, 500.0], [100.0, 105.0, 110.0, 115.0, 120.0, 125.0])
    """
    decades = 10.0 ** np.arange(floor(log10(low)) - 1, ceil(log10(high)) + 1)
    if high < 4 * low:
        steps = np.outer(decades, (1, 2, 5)).ravel().tolist()
        step = next(step for step in steps if (high - low) / step < 6)
        return [n * step for n in range(ceil(low / step), floor(high / step) + 1)]
    digits = (1,), (1, 3), (1, 2, 5)
    choices = [decades[::4], decades[::2], *(np.outer(decades, d).ravel() for d in digits)]
    inside = [ticks[(ticks >= low) & (ticks <= high)].tolist() for ticks in choices]
    return max((ticks for ticks in inside if len(ticks) <= 6), key=len)


def _draw_rates(times: Floats) -> figure:
    """Draw images per second over time; each part's images are spread over its time."""
    images, began, ended, moved = close_gaps(times)
    edges = np.linspace(0, ended.max(), _TIME_BINS + 1)
    done = [(images * ((edge - began) / (ended - began)).clip(0, 1)).sum() for edge in edges]
    rates = np.diff(done) / np.diff(edges)
    clock = edges + moved[np.searchsorted(began, edges, "right") - 1]
    labels = [
        f"{format_time(start)}: {format_number(rate)} images/s"
        for start, rate in zip(clock[:-1], rates, strict=True)
    ]
    plot = _draw_bars(
        edges,
        rates,
        labels,
        x_range=Range1d(0, edges[-1]),
        x_axis_label="hours, minutes, seconds",
        y_axis_label="images/s",
    )
    plot.xaxis.ticker = AdaptiveTicker(base=60, mantissas=[1, 2, 5, 10, 20, 30], min_interval=1)
    plot.xaxis.formatter = NumeralTickFormatter(format="00:00:00")
    return plot


def _draw_growth(runs: Sequence[Run]) -> figure:
    """Draw how many images the dataset had after each run."""
    images = [run["images"] for run in runs]
    plot, source = _draw_runs(runs, "ended", images, "images")
    plot.step(x="time", y="number", source=source, mode="after", color=_BLUE, line_width=2)
    return plot


def _draw_pace(runs: Sequence[Run]) -> figure:
    """Draw how many images each run read per second."""
    rates = [run["images_per_second"] for run in runs]
    plot, source = _draw_runs(runs, "began", rates, "images/s")
    plot.segment(x0="time", x1="time", y0=0, y1="number", source=source, color=_BLUE, line_width=2)
    return plot


def _draw_runs(
    runs: Sequence[Run], moment: str, numbers: Sequence[float], unit: str
) -> tuple[figure, ColumnDataSource]:
    """Draw a point for each run."""
    source = ColumnDataSource(
        {
            "time": [run[moment] * 1000 for run in runs],
            "number": numbers,
            "label": [
                f"{format_time(run[moment])}: {format_number(number)} {unit}"
                for run, number in zip(runs, numbers, strict=True)
            ],
        }
    )
    plot = figure(
        height=220,
        tools="",
        y_range=Range1d(0, 1.1 * max(numbers) or 1),
        x_axis_type="datetime",
        x_axis_label="time (UTC)",
        y_axis_label=unit,
    )
    points = plot.scatter(x="time", y="number", source=source, color=_BLUE, size=8, hover_alpha=0.6)
    plot.add_tools(HoverTool(renderers=[points], tooltips="@label", mode="vline"))
    plot.xgrid.visible = False
    _format_numbers(plot)
    return plot, source


def _draw_bars(
    edges: Floats, heights: NDArray[Any], labels: Sequence[str], **kwargs: Any
) -> figure:
    source = ColumnDataSource(
        {"left": edges[:-1], "right": edges[1:], "height": heights, "label": labels}
    )
    plot = figure(height=220, tools="", y_range=Range1d(0, 1.05 * heights.max() or 1), **kwargs)
    bars = plot.quad(
        left="left", right="right", top="height", bottom=0, source=source, color=_BLUE,
        hover_alpha=0.6,
    )  # fmt: skip
    plot.add_tools(HoverTool(renderers=[bars], tooltips="@label", mode="vline"))
    plot.xgrid.visible = False
    _format_numbers(plot)
    return plot


def _format_numbers(plot: figure) -> None:
    plot.yaxis.ticker.desired_num_ticks = 4
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0.[000000]")


def format_number(number: float, unit: str = "") -> str:
    """Return a number in a few digits, with an SI prefix from 10,000 on.

    >>> format_number(1.618, "MP"), format_number(1024, "px")
    ('1.62 MP', '1,024 px')
    >>> format_number(31_400_000, "B"), format_number(20_000)
    ('31.4 MB', '20 k')
    """
    prefix = ""
    if number >= 10_000:
        power = min(int(log10(number) // 3), 6)
        number, prefix = number / 1000**power, "kMGTPE"[power - 1]
    digits = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()


def describe_range(histogram: Histogram, unit: str) -> str:
    """Return between which numbers those of a histogram are, and their median."""
    low, middle, high = (
        format_number(n, unit) for n in (histogram.low, histogram.median(), histogram.high)
    )
    return f"all {low}" if low == high else f"{low} to {high}, median about {middle}"


def format_time(seconds: float) -> str:
    """Return the date and time of day, in UTC, of a time in seconds since 1970."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
