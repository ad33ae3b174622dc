"""The parts of a job's output: where each lies, and what its footer says of the rows in it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_imgread.storage.redaction import redact_url

FOOTER = b"dask_imgread"

logger = logging.getLogger("dask_imgread")


class Place(IntEnum):
    """Where a part lies, and by what it is numbered."""

    OUT = 0  # in the dataset, by the partition that it begins with
    STAGED = 1  # waits to be merged into a part of the dataset; by its partition
    AGAIN = 2  # the same, for a shard that is read again; by the task in `_again-*.arrow`


class PartName(NamedTuple):
    """The place and the number of a part."""

    place: Place
    number: int

    @property
    def file(self) -> str:
        """The name of its file: PyArrow skips folders with ``_``, Dask what is no ``.parquet``.

        >>> PartName(Place.OUT, 7).file, PartName(Place.AGAIN, 7).file
        ('part-0000007.parquet', '_staged/again-0000007.rows')
        """
        return _FILES[self.place].format(self.number)

    def name_records(self, attempt: int) -> str:
        """Return the name of the file with the images' records that one attempt has written.

        >>> PartName(Place.OUT, 7).name_records(255)
        '_images/part-0000007-00000000000000ff.records'
        """
        return _RECORDS[self.place].format(self.number, attempt)


IMAGES, STAGING = "_images", "_staged"
_FILES = {
    Place.OUT: "part-{:07d}.parquet",
    Place.STAGED: STAGING + "/part-{:07d}.rows",
    Place.AGAIN: STAGING + "/again-{:07d}.rows",
}
_RECORDS = {
    Place.OUT: IMAGES + "/part-{:07d}-{:016x}.records",
    Place.STAGED: STAGING + "/part-{:07d}-{:016x}.records",
    Place.AGAIN: STAGING + "/again-{:07d}-{:016x}.records",
}


@dataclass(frozen=True)
class Count:
    """How many images were read, how many failed, and for how many of these the function raised."""

    images: int = 0
    failed: int = 0
    function_failed: int = 0

    def __add__(self, other: Count) -> Count:
        """Add the numbers."""
        return Count(
            self.images + other.images,
            self.failed + other.failed,
            self.function_failed + other.function_failed,
        )


class ShardRun(NamedTuple):
    """The rows and records of one shard, or of a piece of it, which are adjacent in a part."""

    shard: int  # its number in the plan
    token: int  # of its content, as `make_token` returns it
    rows: int
    records: int
    images: int
    failed: int
    function_failed: int


@dataclass(frozen=True)
class Footer:
    """How a part was made, as JSON in the metadata of its Parquet schema."""

    job: str  # the `id` in `_job.json`
    runs: tuple[ShardRun, ...]  # what lies in it, in this order
    last: int  # the last of the partitions whose rows it has; its number is the first
    began: float  # seconds since 1970
    ended: float
    worker: str
    memory: int = 0  # the most that the worker's process has had until then, in bytes
    claim: int = 0  # the token of the run's claim, as `make_token` returns it
    is_merged: bool = False  # made of other parts, and not by reading
    # The number by which its records are named, and their size in bytes; 0 if it has none.
    attempt: int = 0
    records_size: int = 0

    @property
    def images(self) -> int:
        """How many images were read."""
        return sum(run.images for run in self.runs)

    @property
    def failed(self) -> int:
        """How many images failed."""
        return sum(run.failed for run in self.runs)

    def count(self) -> Count:
        """Return how many images the part is about."""
        return Count(self.images, self.failed, sum(run.function_failed for run in self.runs))

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> Self:
        """Return what a Parquet file's metadata holds.

        Raises
        ------
        KeyError, TypeError, ValueError
            If that is no footer.
        """
        fields = json.loads((metadata or {})[FOOTER])
        return cls(**fields | {"runs": tuple(ShardRun(*run) for run in fields["runs"])})


def make_token(text: str) -> int:
    """Return a number of 64 bits that stands for a text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


_PART_COLUMNS = {"place": "int8", "number": "int32", "stamp": "int64"}
_COLUMNS = _PART_COLUMNS | {
    "last": "int32",
    "claim": "int64",
    "attempt": "int64",
    "records_size": "int64",
    "shard": "int32",  # -1 in the row of a part that has none
    "token": "int64",
    "rows": "int64",
    "records": "int64",
    "images": "int64",
    "failed": "int64",
    "function_failed": "int64",
}
_NO_RUN = ShardRun(-1, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Ledger:
    """What the footers of all parts say, so that they need not be read again.

    Parameters
    ----------
    runs
        One row for each ``ShardRun`` of each part, with the part's ``place`` and ``number``, what
        its footer says, and ``stamp``, which changes when the file does.
    """

    runs: pd.DataFrame

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Return one that was kept as a table.

        Raises
        ------
        KeyError, TypeError, ValueError
            If it was not.
        """
        return cls(table.to_pandas(ignore_metadata=True)[[*_COLUMNS]].astype(_COLUMNS))

    @classmethod
    def from_footers(cls, footers: Iterable[tuple[PartName, Footer]]) -> Self:
        """Make one; the stamps are yet to be set."""
        rows = [
            (*name, 0, footer.last, footer.claim, footer.attempt, footer.records_size, *run)
            for name, footer in footers
            for run in footer.runs or (_NO_RUN,)
        ]
        return cls(_make_frame(rows, _COLUMNS))

    def to_table(self) -> pa.Table:
        """Return it as a table."""
        return pa.Table.from_pandas(self.runs, preserve_index=False)

    def replace_parts(self, other: Ledger) -> Ledger:
        """Return this one, with what another says of the parts in it."""
        kept = ~index_parts(self.runs).isin(index_parts(other.runs))
        return Ledger(pd.concat([self.runs[kept], other.runs], ignore_index=True))

    def keep_unchanged(self, parts: pd.DataFrame) -> Ledger:
        """Return what it says of parts that are there with the same stamp."""
        places = index_parts(parts).get_indexer(index_parts(self.runs))
        same = places >= 0
        stamps = parts["stamp"].to_numpy()[places[same]]
        same[same] = stamps == self.runs["stamp"].to_numpy()[same]
        return Ledger(self.runs[same].reset_index(drop=True))

    def keep_parts(self, parts: pd.DataFrame) -> Ledger:
        """Return what it says of some parts, whatever their stamps."""
        there = index_parts(self.runs).isin(index_parts(parts))
        return Ledger(self.runs[there].reset_index(drop=True))

    def set_stamps(self, parts: pd.DataFrame) -> Ledger:
        """Return it with the stamps that parts have now; those that are not there are left out."""
        places = index_parts(parts).get_indexer(index_parts(self.runs))
        there = places >= 0
        stamps = parts["stamp"].to_numpy()[places[there]]
        return Ledger(self.runs[there].reset_index(drop=True).assign(stamp=stamps))

    def select(self, place: Place) -> pd.DataFrame:
        """Return the rows of the parts in one place."""
        return self.runs[self.runs["place"] == place]

    def count(self) -> Count:
        """Return how many images the dataset is about."""
        sums = self.select(Place.OUT)[["images", "failed", "function_failed"]].sum()
        return Count(*map(int, sums))


def index_parts(rows: pd.DataFrame) -> pd.Index:
    """Return a number for each row: which part it is about."""
    return pd.Index(rows["place"].to_numpy(np.int64) << 32 | rows["number"].to_numpy(np.int64))


def tabulate_parts(found: Iterable[tuple[PartName, int]]) -> pd.DataFrame:
    """Return one row for each part, with its stamp."""
    rows = [(*name, stamp) for name, stamp in found]
    return _make_frame(rows, _PART_COLUMNS)


def _make_frame(rows: Sequence[tuple[int, ...]], dtypes: Mapping[str, str]) -> pd.DataFrame:
    columns: Iterable[tuple[int, ...]] = zip(*rows, strict=True) if rows else [()] * len(dtypes)
    return pd.DataFrame(
        {
            name: np.array(values, dtype)
            for (name, dtype), values in zip(dtypes.items(), columns, strict=True)
        }
    )


def warn_damaged(path: str, error: object) -> None:
    """Log that a part is damaged, and is taken for missing."""
    logger.warning("%s is damaged: %s", redact_url(path), error)
