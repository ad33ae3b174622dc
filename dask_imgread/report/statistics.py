"""Statistics of a job's images, gathered part by part in bounded memory."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from dask_imgread.jobs.parts import FOOTER, Footer
from dask_imgread.storage.files import open_bytes
from dask_imgread.storage.retries import with_retries

LISTED = 10  # failures that are kept for each cause
NEWEST = 6  # images that are kept of the newest run
EXTREMES = 6  # of each kind
MEASURES = {  # title and unit of each histogram
    "width": ("Width", "px"),
    "height": ("Height", "px"),
    "aspect": ("Aspect ratio (width / height)", ""),
    "megapixels": ("Area", "MP"),
    "bytes": ("Encoded size", "B"),
}

_THREADS, _REMOTE_THREADS = 4, 32  # that read parts; those that read a remote store mostly wait
_ROWS = 1 << 14  # held by each thread
_BINS = 1 << 10  # of a histogram
_OCTAVES = range(-20, 44)  # of a logarithmic one: from 1 pixel, as megapixels, to 17 TB, as bytes
_MAX_DRAWN_BINS = 48

Floats = NDArray[np.float64]


class Row(NamedTuple):
    """The columns of an image's row that the report needs, and the part that it is in."""

    image_id: str
    shard: str
    offset: int
    size: int
    width: int
    height: int
    format: str
    error: str = ""
    part: int = 0
    is_new: bool = False


_SCHEMA = pa.schema(
    {
        "image_id": pa.large_string(),
        "shard": pa.large_string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "format": pa.large_string(),
        "error": pa.large_string(),
        "warning": pa.large_string(),
    }
)
Trio = tuple[Row | None, Row, Row | None]  # a failed image between two that were read
_get_offset = attrgetter("offset")


@dataclass
class Lowest:
    """The rows with the lowest numbers: a random sample, if these are random; can be merged."""

    size: int
    numbers: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, rows: pa.Table, numbers: Floats) -> None:
        """Add rows with their numbers."""
        limit = self.numbers[-1] if self.numbers and len(self.numbers) == self.size else inf
        low = np.flatnonzero(numbers < limit)
        low = low[np.argsort(numbers[low], kind="stable")][: self.size]
        self.merge(Lowest(self.size, numbers[low].tolist(), _list_rows(rows.take(low))))

    def merge(self, other: Lowest) -> None:
        """Add the rows of another one."""
        pairs = zip(self.numbers + other.numbers, self.rows + other.rows, strict=True)
        kept = sorted(pairs, key=lambda pair: pair[0])[: self.size]
        self.numbers, self.rows = [number for number, _ in kept], [row for _, row in kept]


@dataclass
class Causes:
    """How often there is each cause of a problem, and a random sample of its images."""

    size: int
    counts: Counter[str] = field(default_factory=Counter)
    samples: dict[str, Lowest] = field(default_factory=dict)

    def add(self, rows: pa.Table, problem: str, rng: np.random.Generator) -> None:
        """Add rows that have a problem: a text that begins with its cause."""
        place = rows.column_names.index("error")
        rows = rows.set_column(place, "error", rows[problem])
        causes = pc.replace_substring_regex(rows["error"], r"(?s)^(sidecar) .*|:.*", r"\1")
        for cause, number in count_values(causes).items():
            found = Lowest(self.size)
            found.add(rows.filter(pc.equal(causes, cause)), rng.random(number))
            self.merge(Causes(self.size, Counter({cause: number}), {cause: found}))

    def merge(self, other: Causes) -> None:
        """Add those of other rows."""
        self.counts += other.counts
        for cause, sample in other.samples.items():
            self.samples.setdefault(cause, Lowest(self.size)).merge(sample)

    def list_rows(self) -> list[Row]:
        """Return the sampled images, ordered so that the first differ in cause and in shard."""
        samples = [self.samples[cause].rows for cause, _ in self.counts.most_common()]
        seen: Counter[str] = Counter()
        ranked = []
        for row in (row for turn in zip_longest(*samples) for row in turn if row):
            ranked.append((seen[row.shard], row))
            seen[row.shard] += 1
        return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


@dataclass
class Histogram:
    """The distribution of a number, in bins of equal width on an axis.

    Parameters
    ----------
    limit
        Where the axis ends that begins with 0; if it is 0, the axis is logarithmic.
    """

    limit: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    low: float = np.inf
    high: float = 0.0

    @property
    def is_log(self) -> bool:
        """Whether the axis is logarithmic."""
        return not self.limit

    def add(self, values: Floats) -> None:
        """Add values."""
        if self.limit:
            shares = values / self.limit
        else:
            shares = (np.log2(values) - _OCTAVES.start) / len(_OCTAVES)
        bins = np.floor(shares * _BINS).astype(np.int64).clip(0, _BINS - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.low = values.min(initial=self.low)
        self.high = values.max(initial=self.high)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self.counts += other.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def median(self) -> float:
        """Return the approximate median: the middle of its bin."""
        half = np.searchsorted(self.counts.cumsum(), self.counts.sum() / 2)
        middle = self._place(half + 0.5)
        return float(np.clip(middle, self.low, self.high))

    def bins(self) -> tuple[Floats, NDArray[np.int64]]:
        """Return edges and counts of at most ``_MAX_DRAWN_BINS`` bins, as fine as that allows."""
        low, high = np.flatnonzero(self.counts)[[0, -1]]
        if self.limit:  # not less than a part of the axis, or a narrow range would seem wide
            low, high = 0, max(high, _BINS // 16)
        width = 1
        while high // width - low // width >= _MAX_DRAWN_BINS:
            width *= 2
        first, last = low // width, high // width + 1
        counts = self.counts.reshape(-1, width).sum(axis=1)[first:last]
        return self._place(np.arange(first, last + 1) * width), counts

    def _place(self, bins: Any) -> Any:
        """Return the numbers at which bins begin."""
        shares = bins / _BINS
        if self.limit:
            return shares * self.limit
        return 2 ** (_OCTAVES.start + shares * len(_OCTAVES))


@dataclass
class Statistics:
    """Statistics of any number of rows, in memory that does not grow with them."""

    samples: Lowest
    newest: Lowest = field(default_factory=lambda: Lowest(NEWEST))
    images: int = 0
    failed: int = 0
    pixels: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)  # images, failed ones included
    broken: Counter[str] = field(default_factory=Counter)  # the failed ones of each shard
    failures: Causes = field(default_factory=lambda: Causes(LISTED))
    warnings: Causes = field(default_factory=lambda: Causes(1))
    extremes: dict[str, Lowest] = field(
        default_factory=lambda: {kind: Lowest(EXTREMES) for kind in ("small", "large", "odd")}
    )
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram() for name in MEASURES}
    )
    # Images, began, ended and place of each part, one after the other.
    times: array[float] = field(default_factory=lambda: array("d"))
    workers: set[str] = field(default_factory=set)

    def add(self, rows: pa.Table, rng: np.random.Generator) -> None:
        """Add rows."""
        fine = rows["error"].is_null()
        good, bad = rows.filter(fine), rows.filter(pc.invert(fine))
        self.images += len(good)
        self.failed += len(bad)
        self.formats += count_values(good["format"])
        self.shards += count_values(rows["shard"])
        self.broken += count_values(bad["shard"])
        self.samples.add(good, rng.random(len(good)))
        new = good.filter(good["is_new"])
        self.newest.add(new, rng.random(len(new)))
        self.failures.add(bad, "error", rng)
        self.warnings.add(rows.filter(rows["warning"].is_valid()), "warning", rng)
        width, height, size = (
            good[name].to_numpy().astype(np.float64).clip(1) for name in ("width", "height", "size")
        )
        pixels, aspect = width * height, width / height
        self.pixels += int(pixels.sum())
        self.bytes += int(size.sum())
        values = (width, height, aspect, pixels / 1e6, size)
        for histogram, added in zip(self.histograms.values(), values, strict=True):
            histogram.add(added)
        ranks = (pixels, -pixels, -np.abs(np.log(aspect)))
        for lowest, rank in zip(self.extremes.values(), ranks, strict=True):
            lowest.add(good, rank)

    def add_footer(self, footer: Footer, part: int) -> None:
        """Add when and by which worker a part was written."""
        images = footer.images + footer.failed
        self.times.extend((images, footer.began, footer.ended, part, footer.is_merged))
        self.workers.add(footer.worker)

    def merge(self, other: Statistics) -> None:
        """Add the statistics of other rows."""
        self.images += other.images
        self.failed += other.failed
        self.pixels += other.pixels
        self.bytes += other.bytes
        self.formats += other.formats
        self.shards += other.shards
        self.broken += other.broken
        self.times += other.times
        self.workers |= other.workers
        self.samples.merge(other.samples)
        self.newest.merge(other.newest)
        for name, histogram in self.histograms.items():
            histogram.merge(other.histograms[name])
        self.failures.merge(other.failures)
        self.warnings.merge(other.warnings)
        for kind, lowest in self.extremes.items():
            lowest.merge(other.extremes[kind])


def count_parts(
    fs: AbstractFileSystem,
    parts: Sequence[str],
    samples: int,
    since: float = inf,
) -> Statistics:
    """Gather the statistics of all parts.

    Parameters
    ----------
    fs
        The parts' file system.
    parts
        Their paths, in order.
    samples
        How many images to draw at random.
    since
        When the newest run began. Of the parts that were written since, the images of the last
        shard are new: others may be earlier ones, which were merged with them.
    """
    threads = count_threads(fs)

    def read(first: int, stats: Statistics) -> Iterator[pa.Table]:
        for number in range(first, len(parts), threads):
            with open_part(fs, parts[number]) as parquet:
                metadata, old = parquet.metadata.metadata or {}, inf
                if FOOTER in metadata:
                    footer = Footer.from_metadata(metadata)
                    stats.add_footer(footer, number)
                    if footer.began >= since and footer.runs:
                        old = parquet.metadata.num_rows - footer.runs[-1].records
                yield from _read_tables(parquet, number, old)

    def count(first: int) -> Statistics:
        stats = Statistics(Lowest(samples))
        rng = np.random.default_rng(first)  # so that the same rows give the same page
        for rows in join_tables(read(first, stats)):
            stats.add(rows, rng)
        return stats

    total = Statistics(Lowest(samples))
    with ThreadPoolExecutor(threads) as pool:
        for stats in pool.map(count, range(threads)):
            total.merge(stats)
    return total


def count_threads(fs: AbstractFileSystem) -> int:
    """Return how many threads read parts."""
    return _THREADS if isinstance(fs, LocalFileSystem) else _REMOTE_THREADS


@contextmanager
def open_part(fs: AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    """Open a local part in place; download a remote one whole."""
    local = isinstance(fs, LocalFileSystem)
    with pa.OSFile(path) if local else open_bytes(with_retries(fs.cat_file, path, path)) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        yield parquet


def _read_tables(parquet: pq.ParquetFile, part: int, old: float = inf) -> Iterator[pa.Table]:
    """Yield the rows of a part, of which the first ``old`` are not new."""
    first = 0
    for rows in read_columns(parquet, _SCHEMA):
        is_new = np.arange(first, first + len(rows)) >= old
        rows = rows.append_column("part", pa.repeat(part, len(rows)))
        yield rows.append_column("is_new", pa.array(is_new))
        first += len(rows)


def read_parts(
    fs: AbstractFileSystem, paths: Iterable[str], schema: pa.Schema
) -> Iterator[pa.Table]:
    """Yield some columns of parts, cast to the types of a schema."""
    for path in paths:
        with open_part(fs, path) as parquet:
            yield from read_columns(parquet, schema)


def read_columns(parquet: pq.ParquetFile, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield some columns of a part, cast to the types of a schema."""
    for batch in parquet.iter_batches(_ROWS, columns=schema.names, use_threads=False):
        yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


def join_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate small tables: adding one costs as much as thousands of rows do."""
    held: list[pa.Table] = []
    total = 0
    for table in tables:
        held.append(table)
        total += len(table)
        if total >= _ROWS:
            yield pa.concat_tables(held)
            held, total = [], 0
    if held:
        yield pa.concat_tables(held)


def sort_rows(rows: Iterable[Row]) -> list[Row]:
    """Return rows in the order in which they lie in the parts."""
    return sorted(rows, key=lambda row: (row.part, row.offset))


def _list_rows(table: pa.Table) -> list[Row]:
    names = [name for name in Row._fields if name in table.column_names]
    return [Row(**row) for row in table.select(names).to_pylist()]


def count_values(column: pa.ChunkedArray) -> Counter[Any]:
    """Return how often each value is in a column."""
    return Counter({v["values"]: v["counts"] for v in column.value_counts().to_pylist()})


def find_neighbours(
    fs: AbstractFileSystem, parts: Sequence[str], failed: Iterable[Row]
) -> list[Trio]:
    """Return each failed image with the readable images before and after it in its shard."""

    def find(row: Row) -> Trio:
        before = after = None
        near: list[Row] = []
        # The parts before and after may hold images of the same shard.
        for number in (row.part, row.part - 1, row.part + 1):
            if 0 <= number < len(parts) and not (before and after):
                near += _list_near(fs, parts[number], row)
                earlier = (other for other in near if other.offset < row.offset)
                later = (other for other in near if other.offset > row.offset)
                before = max(earlier, key=_get_offset, default=None)
                after = min(later, key=_get_offset, default=None)
        return before, row, after

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(find, failed))


def _list_near(fs: AbstractFileSystem, part: str, row: Row) -> list[Row]:
    """Return readable images of a part that are near ``row`` in its shard, the nearest included."""
    same = (pc.field("shard") == row.shard) & pc.field("error").is_null()
    near: list[Row] = []
    with open_part(fs, part) as parquet:
        for table in _read_tables(parquet, row.part):
            rows = table.filter(same).sort_by("offset")
            place = int(np.searchsorted(rows["offset"].to_numpy(), row.offset))
            near += _list_rows(rows.slice(max(0, place - 1), 2))
    return near
