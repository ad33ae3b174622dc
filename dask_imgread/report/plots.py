"""The plots of a job's report, as HTML and SVG, and how its numbers are formatted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from math import ceil, floor, log, log10
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dask_imgread.report.statistics import Floats
from dask_imgread.report.times import Run, close_gaps

_TIME_BINS = 60
_SHORT = 5  # seconds
_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800)


class Distribution(Protocol):
    """What a histogram is drawn of."""

    low: float
    high: float

    @property
    def is_log(self) -> bool:
        """Whether the axis is logarithmic."""

    def bins(self) -> tuple[Floats, NDArray[np.int64]]:
        """Return edges and counts."""

    def median(self) -> float:
        """Return the approximate median."""


class _Axis(NamedTuple):
    label: str
    low: float
    high: float
    ticks: Mapping[float, str]
    is_log: bool = False

    def place(self, number: float) -> float:
        """Return where a number lies, in percent of the axis."""
        low, high = self.low, self.high
        if self.is_log:
            number, low, high = log(number), log(low), log(high)
        return 100 * (number - low) / (high - low)


def draw_histogram(histogram: Distribution, title: str, unit: str, thing: str = "images") -> str:
    """Return a plot of how numbers are distributed, nothing if they are all the same.

    ``thing`` is what has these numbers.
    """
    if histogram.low >= histogram.high:
        return ""
    edges, counts = histogram.bins()
    labels = [
        f"{format_number(low, unit)} to {format_number(high, unit)}: {count:,} {thing}"
        for (low, high), count in zip(pairwise(edges.tolist()), counts.tolist(), strict=True)
    ]
    low, high = float(edges[0]), float(edges[-1])
    if histogram.is_log:
        margin = max(1.05, (2 * low / high) ** 0.5)  # so that the axis spans an octave
        low, high = low / margin, high * margin
    ticks = _label_ticks(choose_ticks(low, high, histogram.is_log))
    name = f"{title} ({unit})" if unit else title
    x = _Axis(name, low, high, ticks, histogram.is_log)
    return _draw_bars(edges, counts, labels, x, thing)


def choose_ticks(low: float, high: float, is_log: bool = False, least: float = 0) -> list[float]:
    """Return round numbers for an axis, as many as stay legible, and ``least`` apart.

    >>> choose_ticks(90, 600, is_log=True), choose_ticks(99, 126)
    ([100.0, 200.0, 500.0], [100.0, 105.0, 110.0, 115.0, 120.0, 125.0])
    """
    if is_log and high >= 4 * low:
        decades = 10.0 ** np.arange(floor(log10(low)) - 1, ceil(log10(high)) + 1)
        digits = (1,), (1, 3), (1, 2, 5)
        choices = [decades[::4], decades[::2], *(np.outer(decades, d).ravel() for d in digits)]
        inside = [ticks[(ticks >= low) & (ticks <= high)].tolist() for ticks in choices]
        return max((ticks for ticks in inside if len(ticks) <= 6), key=len)
    size = 10.0 ** floor(log10((high - low) / 6))
    step = next(n * size for n in (1, 2, 5, 10) if (high - low) / (n * size) < 6)
    step = max(step, least)
    return [n * step for n in range(ceil(low / step), floor(high / step) + 1)]


def _label_ticks(ticks: Sequence[float]) -> dict[float, str]:
    """Return ticks with their labels: with all digits where fewer would make them alike."""
    labels = list(map(format_number, ticks))
    if len({*labels}) < len(labels):
        labels = [f"{tick:.10g}" for tick in ticks]
    return dict(zip(ticks, labels, strict=True))


def draw_rates(times: Floats) -> str:
    """Return a plot of images per second over time; each part's are spread over its time.

    Parameters
    ----------
    times
        Rows: images, began and ended of each part.
    """
    images, began, ended, moved = close_gaps(times)
    edges = np.linspace(0, ended.max(), _TIME_BINS + 1)
    done = [(images * ((edge - began) / (ended - began)).clip(0, 1)).sum() for edge in edges]
    rates = np.diff(done) / np.diff(edges)
    clock = edges + moved[np.searchsorted(began, edges, "right") - 1]
    labels = [
        f"{format_time(start)}: {format_number(rate)} images/s"
        for start, rate in zip(clock[:-1].tolist(), rates.tolist(), strict=True)
    ]
    end = float(edges[-1])
    if end < _SHORT:
        x = _Axis("seconds", 0, end, _label_ticks(choose_ticks(0, end)))
    else:
        step = next((step for step in _SECONDS if end / step < 6), 86_400 * ceil(end / 518_400))
        ticks = {float(tick): _format_clock(tick) for tick in range(0, floor(end) + 1, step)}
        x = _Axis("hours, minutes, seconds", 0, end, ticks)
    return _draw_bars(edges, rates, labels, x, "images/s")


def _format_clock(seconds: int) -> str:
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def draw_growth(runs: Sequence[Run]) -> str:
    """Return a plot of how many images the dataset had after each run."""
    images = [run["images"] for run in runs]
    times = [run["ended"] for run in runs]
    return _draw_runs(times, images, "images", is_step=True)


def draw_pace(runs: Sequence[Run]) -> str:
    """Return a plot of how many images each run read per second."""
    rates = [run["images_per_second"] for run in runs]
    return _draw_runs([run["began"] for run in runs], rates, "images/s", is_step=False)


def _draw_runs(times: Sequence[float], numbers: Sequence[float], unit: str, is_step: bool) -> str:
    """Draw a point for each run, on steps or on stems."""
    margin = 0.03 * (times[-1] - times[0]) or 1
    low, high = times[0] - margin, times[-1] + margin
    ends = {time: format_time(time)[:-3] for time in (times[0], times[-1])}
    x = _Axis("time (UTC)", low, high, ends)
    y = _make_height(max(numbers), unit)
    places = [(x.place(time), 100 - y.place(n)) for time, n in zip(times, numbers, strict=True)]
    if is_step:
        (left, top), *others = places
        line = f"M{left:.4g} {top:.4g}" + "".join(f"H{left:.4g}V{top:.4g}" for left, top in others)
    else:
        line = "".join(f"M{left:.4g} {top:.4g}V100" for left, top in places)
    dots = (
        f'<path class="dot" d="M{left:.4g} {top:.4g}h0"><title>{format_time(time)}: '
        f"{format_number(number)} {unit}</title></path>"
        for (left, top), time, number in zip(places, times, numbers, strict=True)
    )
    return _draw(x, y, [f'<path class="line" d="{line}"/>', *dots])


def _draw_bars(
    edges: Floats, heights: NDArray[Any], labels: Sequence[str], x: _Axis, y_label: str
) -> str:
    is_count = heights.dtype.kind == "i"
    y = _make_height(float(heights.max()), y_label, least=1 if is_count else 0)
    spans = pairwise([x.place(edge) for edge in edges.tolist()])
    bars = []
    for (left, right), height, label in zip(spans, heights.tolist(), labels, strict=True):
        if height:
            place = f'x="{left:.4g}" width="{right - left:.4g}"'
            top = min(y.place(height), 100)
            bars.append(
                f'<g><title>{escape(label)}</title><rect {place} height="100" class="hit"/>'
                f'<rect {place} y="{100 - top:.4g}" height="{top:.4g}"/></g>'
            )
    return _draw(x, y, bars)


def _make_height(most: float, label: str, least: float = 0) -> _Axis:
    """Return the vertical axis, from 0 to somewhat more than the most."""
    high = 1.05 * most or 1.0
    return _Axis(label, 0, high, _label_ticks(choose_ticks(0, high, least=least)))


def _draw(x: _Axis, y: _Axis, shapes: Iterable[str]) -> str:
    """Return a plot: shapes are stretched to its width, texts are not."""
    lines = "".join(
        f'<i style="bottom:{y.place(tick):.4g}%"><span>{text}</span></i>'
        for tick, text in y.ticks.items()
    )
    ticks = "".join(
        f'<span style="left:{x.place(tick):.4g}%">{text}</span>' for tick, text in x.ticks.items()
    )
    return (
        f'<div class="plot"><div>{escape(y.label)}</div><div class="area">{lines}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(shapes)}</svg></div>'
        f'<div class="ticks">{ticks}</div><div>{escape(x.label)}</div></div>'
    )


def format_number(number: float, unit: str = "") -> str:
    """Return a number in a few digits, with an SI prefix from 10,000 on.

    >>> format_number(1.618, "MP"), format_number(1024, "px")
    ('1.62 MP', '1,024 px')
    >>> format_number(31_400_000, "B"), format_number(-20_000)
    ('31.4 MB', '-20 k')
    """
    prefix = ""
    if abs(number) >= 10_000:
        power = min(int(log10(abs(number)) // 3), 6)
        number, prefix = number / 1000**power, "kMGTPE"[power - 1]
    digits = f"{number:,.0f}" if 100 <= abs(number) < 10_000 else f"{number:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()


def describe_range(histogram: Distribution, unit: str) -> str:
    """Return between which numbers those of a histogram are, and their median."""
    low, middle, high = (
        format_number(n, unit) for n in (histogram.low, histogram.median(), histogram.high)
    )
    if low == high:
        return f"{'all' if histogram.low == histogram.high else 'about'} {low}"
    return f"{low} to {high}, median about {middle}"


def format_time(seconds: float) -> str:
    """Return the date and time of day, in UTC, of a time in seconds since 1970."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
