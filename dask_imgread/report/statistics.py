"""What is known of a job's images, counted part by part in bounded memory."""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from dask_imgread.jobs.folder import FOOTER, Footer
from dask_imgread.storage.files import open_bytes
from dask_imgread.storage.retries import with_retries

LISTED = 10  # failures of a cause that are kept
MEASURES = {  # title and unit of what is drawn as a histogram
    "width": ("Width", "px"),
    "height": ("Height", "px"),
    "aspect": ("Aspect ratio (width / height)", ""),
    "megapixels": ("Area", "MP"),
    "bytes": ("Encoded size", "B"),
}

_THREADS, _REMOTE_THREADS = 4, 32  # that read parts: of a remote store they mostly wait
_ROWS = 1 << 14  # that a thread holds
_OCTAVES = range(-20, 44)  # from 1 pixel, in megapixels, to 17 TB, in bytes
_STEPS = 16  # histogram bins in an octave
_MOST_BINS = 48

Floats = NDArray[np.float64]


class Row(NamedTuple):
    """What the report needs of an image's row."""

    image_id: str
    shard: str
    offset: int
    size: int
    width: int
    height: int
    format: str
    error: str
    part: int


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
    }
)
Trio = tuple[Row | None, Row, Row | None]  # a failed image between two that were read
_get_offset = attrgetter("offset")


@dataclass
class _Draw:
    """Some rows out of all: those with the lowest of random numbers, so that draws add up."""

    size: int
    numbers: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def offer(self, rows: pa.Table, rng: np.random.Generator) -> None:
        numbers = rng.random(len(rows))
        limit = self.numbers[-1] if self.numbers and len(self.numbers) == self.size else 1.0
        low = np.flatnonzero(numbers < limit)
        low = low[np.argsort(numbers[low])][: self.size]
        self.add(_Draw(self.size, numbers[low].tolist(), _list_rows(rows.take(low))))

    def add(self, other: _Draw) -> None:
        pairs = zip(self.numbers + other.numbers, self.rows + other.rows, strict=True)
        kept = sorted(pairs, key=lambda pair: pair[0])[: self.size]
        self.numbers, self.rows = [number for number, _ in kept], [row for _, row in kept]


@dataclass
class Spread:
    """The distribution of a number, in bins of equal width on a logarithmic axis."""

    counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(len(_OCTAVES) * _STEPS, np.int64)
    )
    low: float = np.inf
    high: float = 0.0

    def count(self, values: Floats) -> None:
        """Count some numbers."""
        bins = np.floor((np.log2(values) - _OCTAVES.start) * _STEPS).astype(np.int64)
        bins = bins.clip(0, len(self.counts) - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))
        self.low = values.min(initial=self.low)
        self.high = values.max(initial=self.high)

    def add(self, other: Spread) -> None:
        """Add what another has counted."""
        self.counts += other.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def median(self) -> float:
        """Return about the median, from the middle of its bin."""
        half = np.searchsorted(self.counts.cumsum(), self.counts.sum() / 2)
        middle = 2 ** (_OCTAVES.start + (half + 0.5) / _STEPS)
        return float(np.clip(middle, self.low, self.high))

    def bins(self) -> tuple[Floats, NDArray[np.int64]]:
        """Return the edges and counts of bins as fine as can be drawn."""
        used = np.flatnonzero(self.counts)
        wide = 1
        while (used[-1] // wide) - (used[0] // wide) >= _MOST_BINS:
            wide *= 2
        first, last = used[0] // wide, used[-1] // wide + 1
        counts = self.counts.reshape(-1, wide).sum(axis=1)[first:last]
        return 2 ** (_OCTAVES.start + np.arange(first, last + 1) * wide / _STEPS), counts


@dataclass
class Tally:
    """What is known of any number of rows; of one size however many they are."""

    samples: _Draw
    images: int = 0
    failed: int = 0
    pixels: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)
    failures: dict[str, _Draw] = field(default_factory=lambda: defaultdict(lambda: _Draw(LISTED)))
    spreads: dict[str, Spread] = field(
        default_factory=lambda: {name: Spread() for name in MEASURES}
    )
    times: array[float] = field(default_factory=lambda: array("d"))  # images, began, ended of each
    workers: set[str] = field(default_factory=set)

    def count(self, rows: pa.Table, rng: np.random.Generator) -> None:
        """Count some rows."""
        fine = rows["error"].is_null()
        good, bad = rows.filter(fine), rows.filter(pc.invert(fine))
        self.images += len(good)
        self.failed += len(bad)
        self.formats += _count_values(good["format"])
        self.shards += _count_values(bad["shard"])
        self.samples.offer(good, rng)
        causes = pc.replace_substring_regex(bad["error"], "(?s):.*", "")
        for cause, number in _count_values(causes).items():
            self.causes[cause] += number
            self.failures[cause].offer(bad.filter(pc.equal(causes, cause)), rng)
        width, height, size = (
            good[name].to_numpy().astype(np.float64).clip(1) for name in ("width", "height", "size")
        )
        self.pixels += int((width * height).sum())
        self.bytes += int(size.sum())
        values = (width, height, width / height, width * height / 1e6, size)
        for spread, counted in zip(self.spreads.values(), values, strict=True):
            spread.count(counted)

    def note(self, footer: Footer) -> None:
        """Note when and where a part was made."""
        self.times.extend((footer.images + footer.failed, footer.began, footer.ended))
        self.workers.add(footer.worker)

    def add(self, other: Tally) -> None:
        """Add what another knows."""
        self.images += other.images
        self.failed += other.failed
        self.pixels += other.pixels
        self.bytes += other.bytes
        self.formats += other.formats
        self.causes += other.causes
        self.shards += other.shards
        self.times += other.times
        self.workers |= other.workers
        self.samples.add(other.samples)
        for name, spread in self.spreads.items():
            spread.add(other.spreads[name])
        for cause, draw in other.failures.items():
            self.failures[cause].add(draw)

    def list_failures(self) -> list[Row]:
        """Return failures with the causes in turn, and first those of shards not yet seen."""
        draws = [self.failures[cause].rows for cause, _ in self.causes.most_common()]
        seen: Counter[str] = Counter()
        ranked = []
        for row in (row for turn in zip_longest(*draws) for row in turn if row):
            ranked.append((seen[row.shard], row))
            seen[row.shard] += 1
        return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def count_parts(fs: AbstractFileSystem, parts: Sequence[str], samples: int) -> Tally:
    """Count the rows of all parts; keep as many samples, drawn at random."""
    threads = _THREADS if isinstance(fs, LocalFileSystem) else _REMOTE_THREADS

    def read(first: int, tally: Tally) -> Iterator[pa.Table]:
        for number in range(first, len(parts), threads):
            with _open_part(fs, parts[number]) as file:
                try:
                    parquet = pq.ParquetFile(file)
                except pa.ArrowInvalid as error:
                    raise ValueError(f"{parts[number]} is damaged: {error}") from error
                yield from _read_tables(parquet, number)
                footer = (parquet.metadata.metadata or {}).get(FOOTER)
            if footer:
                tally.note(Footer(**json.loads(footer)))

    def count(first: int) -> Tally:
        tally = Tally(_Draw(samples))
        rng = np.random.default_rng(first)  # the same page for the same rows
        for rows in _join(read(first, tally)):
            tally.count(rows, rng)
        return tally

    total = Tally(_Draw(samples))
    with ThreadPoolExecutor(threads) as pool:
        for tally in pool.map(count, range(threads)):
            total.add(tally)
    return total


def _open_part(fs: AbstractFileSystem, path: str) -> pa.NativeFile:
    """Open a local part in place; fetch any other whole."""
    if isinstance(fs, LocalFileSystem):
        return pa.OSFile(path)
    return open_bytes(with_retries(fs.cat_file, path, path))


def _read_tables(parquet: pq.ParquetFile, part: int) -> Iterator[pa.Table]:
    for batch in parquet.iter_batches(_ROWS, columns=_SCHEMA.names, use_threads=False):
        rows = pa.Table.from_batches([batch]).select(_SCHEMA.names).cast(_SCHEMA)
        yield rows.append_column("part", pa.repeat(part, len(rows)))


def _join(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put small tables together: each that is counted costs as much as thousands of rows."""
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


def _list_rows(table: pa.Table) -> list[Row]:
    return [Row(**row) for row in table.to_pylist()]


def _count_values(column: pa.ChunkedArray) -> Counter[str]:
    return Counter({v["values"]: v["counts"] for v in column.value_counts().to_pylist()})


def find_neighbours(
    fs: AbstractFileSystem, parts: Sequence[str], failed: Iterable[Row]
) -> list[Trio]:
    """Put each failed image between the images before and after it in its shard."""

    def find(row: Row) -> Trio:
        before = after = None
        near: list[Row] = []
        for number in (row.part, row.part - 1, row.part + 1):  # a shard's parts are neighbours too
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
    """Return images that lie close to ``row`` in its shard, the closest among them."""
    same = (pc.field("shard") == row.shard) & pc.field("error").is_null()
    near: list[Row] = []
    with _open_part(fs, part) as file:
        for table in _read_tables(pq.ParquetFile(file), row.part):
            rows = table.filter(same).sort_by("offset")
            place = int(np.searchsorted(rows["offset"].to_numpy(), row.offset))
            near += _list_rows(rows.slice(max(0, place - 1), 2))
    return near
