"""The tables of a job's plan: its shards, its partitions, and what is read again."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dask_imgread.jobs.parts import make_token
from dask_imgread.shards.find import Shard
from dask_imgread.storage.redaction import drop_signature, redact_url
from dask_imgread.tasks import FileGroupTask

PIECE: dict[str, pa.DataType] = {
    "start": pa.int64(),  # null: whole shards
    "stop": pa.int64(),
    "index": pa.large_string(),  # ShardIndex as JSON, if the task has one
}
PLAN = pa.schema(
    {
        "first": pa.int32(),  # the number of the first shard
        "count": pa.int32(),
        "is_home": pa.bool_(),  # its part gets rows of a shard that is read again as a whole
    }
    | PIECE
)
AGAIN = pa.schema({"shard": pa.int32(), "token": pa.int64()} | PIECE)
SHARDS = pa.schema(
    {
        "shard": pa.string(),  # without secrets
        "identity": pa.int64(),  # of the URL as it is
        "size": pa.int64(),
        "version": pa.string(),
        "state": pa.int8(),
    }
)
_LOGGED_EVERY = 10  # seconds
_ROWS = 10_000  # converted to Arrow at the same time
_CHARACTERS = 1 << 26  # of indexes, likewise

logger = logging.getLogger("dask_imgread")


class ShardState(IntEnum):
    """Whether a shard is there."""

    PRESENT = 0
    GONE = 1  # its rows are kept
    PRUNED = 2  # its rows are removed


def to_frame(table: pa.Table | pa.Schema) -> pd.DataFrame:
    """Return the table of shards, or an empty one, as a DataFrame; its sizes may be missing."""
    if isinstance(table, pa.Schema):
        table = table.empty_table()
    nullable = {pa.int64(): pd.Int64Dtype()}
    frame = table.to_pandas(types_mapper=lambda kind: nullable.get(kind))
    return frame.astype({"identity": np.int64})


def list_shards(shards: Iterable[Shard]) -> pd.DataFrame:
    """Return one row for each shard, without the secrets in its URL."""
    shards = list(shards)
    return pd.DataFrame(
        {
            "shard": pd.Series([redact_url(shard.path) for shard in shards], dtype=object),
            "identity": np.array([make_token(drop_signature(s.path)) for s in shards], np.int64),
            "size": pd.array([shard.size for shard in shards], pd.Int64Dtype()),
            "version": pd.Series([shard.version for shard in shards], dtype=object),
            "state": np.full(len(shards), ShardState.PRESENT, np.int8),
        }
    )


def make_homes(partitions: pa.Table, changed: NDArray[np.int64]) -> pa.Table:
    """Note which partitions were pieces of shards that have changed: the pieces are no longer."""
    moved = pc.and_(
        pc.is_valid(partitions["start"]),
        pc.is_in(partitions["first"], pa.array(changed, pa.int32())),
    )
    if not pc.any(moved).as_py():
        return partitions
    columns = {"is_home": pc.or_(partitions["is_home"], moved)}
    columns |= {name: pc.if_else(moved, None, partitions[name]) for name in PIECE}
    for name, column in columns.items():
        partitions = partitions.set_column(PLAN.get_field_index(name), name, column)
    return partitions.cast(PLAN)


def make_table(tasks: Iterator[FileGroupTask], shards: list[Shard], number: int = 0) -> pa.Table:
    """Return one row for each task, which refers to its shards by number.

    Parameters
    ----------
    tasks
        The tasks, in the order of the shards.
    shards
        The shards.
    number
        That of the first shard.
    """
    batches: list[pa.RecordBatch] = []
    rows: list[dict[str, Any]] = []
    first = characters = 0
    logged = time.monotonic()
    for task in tasks:
        while shards[first].path != task.data[0]:  # tasks and shards are in the same order
            first += 1
        start, stop = task.byte_range or (None, None)
        index = task.index and task.index.to_json()
        row = {"first": number + first, "count": len(task.data), "is_home": False}
        rows.append(row | {"start": start, "stop": stop, "index": index})
        characters += len(index or "")
        if len(rows) == _ROWS or characters > _CHARACTERS:
            batches.append(pa.RecordBatch.from_pylist(rows, PLAN))
            rows.clear()
            characters = 0
        if time.monotonic() - logged > _LOGGED_EVERY:
            logged = time.monotonic()
            logger.info("planning: %d of %d shards read", first, len(shards))
    batches.append(pa.RecordBatch.from_pylist(rows, PLAN))
    return pa.Table.from_batches(batches, PLAN)
