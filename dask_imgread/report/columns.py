"""The columns of a job's rows that are not the images' records: what is in each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html import escape
from math import frexp, inf
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from dask_imgread.report.elements import (
    describe_top,
    render_grid,
    render_panel,
    render_ranking,
    render_section,
    render_table,
)
from dask_imgread.report.plots import describe_range, draw_histogram
from dask_imgread.report.statistics import (
    Floats,
    Histogram,
    count_threads,
    count_values,
    join_tables,
    open_part,
    read_parts,
)

_LISTED, _READ = 200, 40  # columns
_BINS = 1 << 10  # at least, once there are so many different numbers
_DRAWN = 48  # of these bins, joined
_VALUES = 1000  # different ones that are counted
_CATEGORIES = 20  # numbers that are drawn as categories
_CHARACTERS = 100  # by which texts are told apart
_SKEWED = 200  # how many times the least number is the greatest, on a logarithmic axis
_LOGARITHMIC = 1e-6, 1e13  # what such an axis has


@dataclass
class Spread:
    """The distribution of any numbers, in bins whose width, a power of two, grows with the range.

    So it needs no limits in advance, and the order of the numbers makes no difference.
    """

    power: int = -1074
    counts: Counter[int] = field(default_factory=Counter)
    logarithmic: Histogram = field(default_factory=Histogram)
    low: float = inf
    high: float = -inf
    is_integer: bool = False

    def add(self, values: Floats, is_integer: bool = False) -> None:
        """Add finite numbers."""
        if not len(values):
            return
        self.is_integer = is_integer
        values = values.clip(-1e300, 1e300)
        self._widen(float(values.min()), float(values.max()), 0 if is_integer else self.power)
        bins, counts = np.unique(np.floor(np.ldexp(values, -self.power)), return_counts=True)
        self.counts.update(dict(zip(map(int, bins), counts.tolist(), strict=True)))
        self.logarithmic.add(values[values > 0])

    def merge(self, other: Spread) -> None:
        """Add the numbers of another one."""
        if other.counts:
            self.is_integer = other.is_integer
            self._widen(other.low, other.high, other.power)
            self.counts += _join_bins(other.counts, self.power - other.power)
            self.logarithmic.merge(other.logarithmic)

    def _widen(self, low: float, high: float, power: int) -> None:
        """Include a range; let bins be wide enough for it, and at least 2 ** ``power``."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        most = max(abs(self.low), abs(self.high))
        span = self.high - self.low
        power = max(self.power, power, _find_exponent(span / _BINS), _find_exponent(most) - 52)
        self.counts = _join_bins(self.counts, power - self.power)
        self.power = power

    @property
    def is_log(self) -> bool:
        """Whether the numbers are drawn on a logarithmic axis."""
        low, high = _LOGARITHMIC
        return low < self.low and _SKEWED * self.low < self.high < high

    def median(self) -> float:
        """Return the approximate median: the middle of its bin."""
        if self.is_log:
            return self.logarithmic.median()
        places = sorted(self.counts)
        reached = np.cumsum([self.counts[place] for place in places])
        half = places[int(np.searchsorted(reached, reached[-1] / 2))] + 0.5
        middle = float(np.ldexp(half, self.power)) - 0.5 * self.is_integer  # 7 is alone in [7, 8)
        return min(max(middle, self.low), self.high)

    def bins(self) -> tuple[Floats, NDArray[np.int64]]:
        """Return edges and counts of the bins that are drawn."""
        if self.is_log:
            return self.logarithmic.bins()
        low, high = min(self.counts), max(self.counts)
        joined = next(n for n in range(64) if (high >> n) - (low >> n) < _DRAWN)
        counts = _join_bins(self.counts, joined)
        places = np.arange(low >> joined, (high >> joined) + 2)
        edges = np.ldexp(places.astype(np.float64), self.power + joined)
        return edges, np.array([counts[place] for place in places[:-1].tolist()])


def _find_exponent(number: float) -> int:
    """Return that of the next greater power of two."""
    return frexp(number)[1] if number else -1074


def _join_bins(counts: Counter[int], doublings: int) -> Counter[int]:
    joined: Counter[int] = Counter()
    for place, count in counts.items():
        joined[place >> doublings] += count
    return joined


@dataclass
class Column:
    """What is in a column, in memory that does not grow with its rows."""

    name: str
    type: pa.DataType
    rows: int = 0
    missing: int = 0  # null or NaN
    values: Counter[Any] | None = field(default_factory=Counter)  # None: there are too many
    spread: Spread = field(default_factory=Spread)  # of numbers, or of texts' lengths

    @property
    def present(self) -> int:
        """How many values are not missing."""
        return self.rows - self.missing

    @property
    def is_text(self) -> bool:
        """Whether it holds texts."""
        return bool(_simplify(self.type) == pa.large_string())

    @property
    def categories(self) -> Counter[str]:
        """How often each value is there, if they are few, and each is there twice on average."""
        most = _VALUES if self.is_text else _CATEGORIES
        values = self.values or Counter()
        is_bool = pa.types.is_boolean(self.type)
        if len(values) > most or not (is_bool or 2 * len(values) <= self.present):
            return Counter()
        named: Counter[str] = Counter()
        for value, count in values.items():
            named[_name_value(value)] += count
        return named if len(named) == len(values) else Counter()  # else digits are missing

    def add(self, column: pa.ChunkedArray) -> None:
        """Add rows."""
        values = column.cast(_simplify(self.type), safe=False).drop_null()
        is_float = pa.types.is_floating(values.type)
        if is_float:
            values = values.filter(pc.invert(pc.is_nan(values)))
        self.rows += len(column)
        self.missing += len(column) - len(values)
        if self.values is not None:
            named = pc.utf8_slice_codeunits(values, 0, _CHARACTERS) if self.is_text else values
            self._add_values(count_values(named))
        numbers = pc.utf8_length(values) if self.is_text else values.cast(pa.float64(), safe=False)
        floats = numbers.to_numpy().astype(np.float64)
        self.spread.add(floats[np.isfinite(floats)], is_integer=not is_float)

    def merge(self, other: Column) -> None:
        """Add the rows of another one."""
        self.rows += other.rows
        self.missing += other.missing
        self._add_values(other.values)
        self.spread.merge(other.spread)

    def _add_values(self, values: Counter[Any] | None) -> None:
        if self.values is None or values is None or len(self.values | values) > _VALUES:
            self.values = None
        else:
            self.values += values


def _simplify(kind: pa.DataType) -> pa.DataType | None:
    """Return the type as which a column is counted; None if it is not."""
    if pa.types.is_dictionary(kind):
        return _simplify(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_string()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    return kind if pa.types.is_integer(kind) or pa.types.is_boolean(kind) else None


def _name_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"


def survey_columns(
    fs: AbstractFileSystem, paths: Sequence[str], known: Collection[str]
) -> list[Column]:
    """Return what is in the columns of a job's rows, but for those that are known.

    Parameters
    ----------
    fs
        The parts' file system.
    paths
        The parts of the job's rows.
    known
        Columns that are left out.
    """
    if not paths:
        return []
    with open_part(fs, paths[0]) as parquet:
        schema = parquet.schema_arrow
    fields = [each for each in schema if each.name not in known]
    read = pa.schema([each for each in fields if _simplify(each.type) is not None][:_READ])
    total = [Column(each.name, each.type) for each in fields]
    if not read.names:
        return total
    threads = count_threads(fs)

    def survey(first: int) -> dict[str, Column]:
        found = {each.name: Column(each.name, each.type) for each in read}
        for rows in join_tables(read_parts(fs, paths[first::threads], read)):
            for name, column in found.items():
                column.add(rows[name])
        return found

    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(survey, range(threads)):
            for column in total:
                if column.name in found:
                    column.merge(found[column.name])
    return total


def render_columns(columns: Sequence[Column]) -> str:
    """Return the section: a table of all columns, and plots of those that vary."""
    if not columns:
        return ""
    lines = (
        (c.name, str(c.type).replace("large_", ""), _describe_missing(c), _describe(c))
        for c in columns[:_LISTED]
    )
    table = render_table(("column", "type", "missing", "values"), lines)
    shown = f"{min(len(columns), _LISTED):,} of {len(columns):,}"
    plots = (_render_plot(column) for column in columns[:_READ])
    panels = [render_panel("What is in them", shown, table), render_grid("thirds", plots)]
    return render_section("Columns", render_grid("", panels))


def _describe_missing(column: Column) -> str:
    if not column.rows:
        return ""
    return f"{column.missing:,} ({column.missing / column.rows:.1%})" if column.missing else "0"


def _describe(column: Column) -> str:
    if not column.rows:
        return "not counted"
    if not column.present:
        return "none"
    if column.values and len(column.values) == 1:
        name = next(map(_name_value, column.values))
        cut = column.is_text and column.spread.high > _CHARACTERS
        return f"all begin with {name}" if cut else f"all {name}"
    if column.categories:
        return f"{len(column.categories):,} different"
    if not column.spread.counts:
        return "none finite"
    if not column.is_text:
        return describe_range(column.spread, "")
    lengths = describe_range(column.spread, "")
    different = f"more than {_VALUES:,}" if column.values is None else f"{len(column.values):,}"
    return f"{different} different; characters: {lengths}"


def _render_plot(column: Column) -> str:
    """Return the plot of a column, nothing if all its values are the same."""
    if column.values and len(column.values) == 1:
        return ""
    if categories := column.categories:
        plot = render_ranking(categories)
        return render_panel(escape(column.name), describe_top(categories, "value"), plot)
    title = f"Length of {column.name}" if column.is_text else column.name
    plot = draw_histogram(column.spread, title, "characters" * column.is_text, "rows")
    return render_panel(escape(title), describe_range(column.spread, ""), plot) if plot else ""
