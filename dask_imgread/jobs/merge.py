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

import pyarrow as pa
import pyarrow.compute as pc

from dask_imgread.jobs.parts import Footer, PartName, Place, ShardRun
from dask_imgread.jobs.writer import PartSink


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
        The parts of the dataset that have rows of it, in order.
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
        replaced = {each.shard for each in merge.replaced}
        sources = ([name] if merge.exists else []) + list(merge.added)
        old = list(self._read(sources))
        pieces = [piece for piece in old if piece.run.shard not in replaced]
        for each in merge.replaced:
            known = [piece.records for piece in old if piece.run.shard == each.shard]
            new = (piece for piece in self._read(each.parts) if piece.run.shard == each.shard)
            if each.homes[-1:] == (merge.number,):
                others = self._read(PartName(Place.OUT, home) for home in each.homes[:-1])
                gone = [piece.records for piece in others if piece.run.shard == each.shard]
                pieces += [_filter(piece, gone, False, True) for piece in new] if gone else new
            else:
                pieces += [_filter(piece, known, True, False) for piece in new]
        footer = self.sink.write(
            name,
            [piece.rows for piece in pieces],
            [piece.records for piece in pieces],
            [piece.run for piece in pieces],
            began,
            merge.last,
        )
        return name, footer

    def _read(self, names: Iterable[PartName]) -> Iterator[_Piece]:
        """Yield the runs of parts."""
        folder = self.sink.folder
        for name in names:
            try:
                rows, footer = folder.read_rows(name)
                records = rows
                if self.sink.keeps_records:
                    records, _ = folder.read_rows(name, records=True)
            except FileNotFoundError:
                if name.place == Place.OUT:  # the home of a piece that was never read
                    continue
                raise
            row = record = 0
            for run in footer.runs:
                yield _Piece(run, rows.slice(row, run.rows), records.slice(record, run.records))
                row, record = row + run.rows, record + run.records


def _filter(piece: _Piece, records: list[pa.Table], among: bool, last: bool) -> _Piece:
    """Return the rows and records of images that are, or are not, among others.

    Rows without ids can't be told apart: all of them go to the last home.
    """
    known = (_list_ids(table).chunks for table in records)
    ids = pa.concat_arrays([pa.array([], pa.large_string()), *chain.from_iterable(known)])

    def take(table: pa.Table) -> pa.Table:
        if "image_id" not in table.column_names:
            return table if last else table.slice(0, 0)
        is_among = pc.is_in(_list_ids(table), ids)
        return table.filter(is_among if among else pc.invert(is_among))

    rows, kept = take(piece.rows), take(piece.records)
    errors = kept["error"]
    failed = len(kept) - errors.null_count
    of_function = pc.sum(pc.starts_with(errors, "function failed")).as_py() or 0
    run = piece.run
    skipped = run.images + run.failed - run.records  # images without a record
    return _Piece(
        run._replace(
            rows=len(rows),
            records=len(kept),
            images=len(kept) - failed,
            failed=failed + (skipped if last else 0),
            function_failed=of_function,
        ),
        rows,
        kept,
    )


def _list_ids(table: pa.Table) -> pa.ChunkedArray:
    return table["image_id"].cast(pa.large_string())
