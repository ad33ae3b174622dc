"""Merge parts into the dataset: small ones into one, and those of shards that were read again.

A reader of the dataset sees each image once at every moment, though files are replaced one at a
time. So a part of the dataset never gives rows to another. If a shard's rows lie in several parts,
each of them gets the new rows of the images that it had; the last one gets those of all others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dask_imgread.jobs.parts import Footer, PartName, Place, ShardRun
from dask_imgread.jobs.writer import PartSink, make_no_records


@dataclass(frozen=True)
class Replacement:
    """A shard whose rows in a part are replaced.

    Parameters
    ----------
    shard
        Its number.
    parts
        The parts with its new rows; none if it was pruned.
    homes
        The parts of the dataset that have rows of it, in order, and the last one that is to have.
    """

    shard: int
    parts: tuple[PartName, ...] = ()
    homes: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False)
class Merge:
    """One part of the dataset that is to be written.

    Parameters
    ----------
    number
        The part's number.
    exists
        Whether it is there: then its rows are kept, but for those that are replaced.
    last
        The last of the partitions whose rows it has afterwards.
    added
        Parts whose rows are added.
    replaced
        Shards whose rows are replaced.
    """

    number: int
    exists: bool
    last: int
    added: tuple[PartName, ...] = ()
    replaced: tuple[Replacement, ...] = ()

    def __repr__(self) -> str:
        """Return which file it writes."""
        return PartName(Place.OUT, self.number).file


class _Piece(NamedTuple):
    """A run with its rows and records."""

    run: ShardRun
    rows: pa.Table
    records: pa.Table


@dataclass(frozen=True)
class PartMerger:
    """Writes parts of the dataset from others.

    Parameters
    ----------
    sink
        Where the parts are written.
    """

    sink: PartSink

    __name__ = "merge_parts"  # Dask names tasks after it

    def __call__(self, merge: Merge) -> tuple[PartName, Footer]:
        """Write one part; return its name and footer. May be repeated: the result is the same."""
        began = time.time()
        name = PartName(Place.OUT, merge.number)
        earlier, old = self._read(name) if merge.exists else (None, [])
        last = -1 if earlier is None else earlier.last
        # What was added before, by an attempt that was killed later, is not added twice.
        added = self._read_all(part for part in merge.added if part.number > last)
        replaced = {each.shard for each in merge.replaced}
        pieces = [piece for piece in chain(old, added) if piece.run.shard not in replaced]
        for each in merge.replaced:
            new = self._read_all(each.parts, each.shard)
            if each.homes[-1:] == (merge.number,):
                others = self._read_all(
                    (PartName(Place.OUT, n) for n in each.homes[:-1]), each.shard
                )
                gone = [piece.records for piece in others]
                pieces += [_filter(piece, gone, False) for piece in new] if gone else new
            else:
                known = [piece.records for piece in old if piece.run.shard == each.shard]
                pieces += [_filter(piece, known, True) for piece in new]
        footer = self.sink.write(
            name,
            [piece.rows for piece in pieces],
            [piece.records for piece in pieces],
            [piece.run for piece in pieces],
            began,
            earlier,
            max(last, merge.last),
        )
        return name, footer

    def _read_all(self, names: Iterable[PartName], shard: int | None = None) -> Iterator[_Piece]:
        """Yield the runs of parts, or those of one shard."""
        for name in names:
            for piece in self._read(name)[1]:
                if shard is None or piece.run.shard == shard:
                    yield piece

    def _read(self, name: PartName) -> tuple[Footer, list[_Piece]]:
        """Return a part's footer and its runs."""
        rows, records, footer = self.sink.folder.read_part(name)
        if self.sink.keeps_records:
            records = records.cast(make_no_records().schema)
        rows = rows.cast(self.sink.schema)  # Parquet does not keep every type as it was
        pieces: list[_Piece] = []
        row = record = 0
        for run in footer.runs:
            part = rows.slice(row, run.rows), records.slice(record, run.records)
            pieces.append(_Piece(run, *part))
            row, record = row + run.rows, record + run.records
        return footer, pieces


def _filter(piece: _Piece, records: list[pa.Table], among: bool) -> _Piece:
    """Return the rows and records of images that are among others; or, for the last home, are not.

    Rows without ids can't be told apart: all of them go to the last home.
    """
    known = (_list_ids(table).chunks for table in records)
    ids = pa.concat_arrays([pa.array([], pa.large_string()), *chain.from_iterable(known)])

    def take(table: pa.Table) -> pa.Table:
        if "image_id" not in table.column_names:
            return table.slice(0, 0) if among else table
        is_among = pc.is_in(_list_ids(table), ids)
        return table.filter(is_among if among else pc.invert(is_among))

    run, kept = piece.run, take(piece.records)
    counts = np.array(_count_failed(kept))
    if not among:  # those without a record, which were skipped
        counts += np.array([run.failed, run.function_failed]) - _count_failed(piece.records)
    failed, function_failed = counts.tolist()
    images = len(kept) - _count_failed(kept)[0]
    rows = take(piece.rows)
    numbers = (len(rows), len(kept), images, failed, function_failed)
    return _Piece(ShardRun(run.shard, run.token, *numbers), rows, kept)


def _count_failed(records: pa.Table) -> tuple[int, int]:
    """Return how many images failed, and how many of these in the function."""
    errors = records["error"]
    of_function = pc.sum(pc.starts_with(errors, "function failed")).as_py() or 0
    return len(errors) - errors.null_count, of_function


def _list_ids(table: pa.Table) -> pa.ChunkedArray:
    return table["image_id"].cast(pa.large_string())
