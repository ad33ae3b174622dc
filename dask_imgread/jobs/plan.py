"""A job's plan: its shards, and the partitions that they are divided into."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from dask_imgread.errors import OtherJobError
from dask_imgread.jobs.folder import CLEARED, PLAN, SHARDS, JobFolder
from dask_imgread.shards.find import Shard
from dask_imgread.shards.partition import Division, divide_shards
from dask_imgread.storage.redaction import drop_signature, redact_url
from dask_imgread.tasks import FileGroupTask

_ID = b"job"
FORMAT = 1  # of the folder; a folder of another is refused
_SCHEMA = pa.schema(
    {
        "first": pa.int32(),  # of the shards
        "count": pa.int32(),
        "start": pa.int64(),  # null: all of them
        "stop": pa.int64(),
        "whole": pa.bool_(),
    }
)
logger = logging.getLogger("dask_imgread")

_TOLD_EVERY = 10  # seconds
_ROWS = 10_000  # turned into Python objects at a time
_SHOWN = 3


def prepare_plan(
    folder: JobFolder,
    shards: list[Shard],
    identity: dict[str, Any],
    division: Division,
    storage_options: dict[str, Any],
    overwrite: bool,
) -> tuple[str, int]:
    """Make a job's plan, or find the one that it has; return its id and number of partitions.

    Parameters
    ----------
    folder
        Where the plan is written.
    shards
        What is read.
    identity
        Everything that decides on what the rows are.
    division
        How the shards are divided. To cut them by their images all their headers are read:
        once, as the plan is kept.
    storage_options
        Options for the shards' file system.
    overwrite
        Remove the output of another job, and of this one.

    Raises
    ------
    OtherJobError
        If the folder holds the output of other inputs or options.
    FileExistsError
        If it holds what no job has written.
    """
    job = {
        "format": FORMAT,
        **identity,
        "options": json.loads(json.dumps(identity["options"] | asdict(division))),
        "shards": len(shards),
        "inputs": _digest(shards),
    }
    earlier = folder.read_job()
    if earlier is not None and not overwrite and earlier["format"] != CLEARED:
        differences = _compare(folder, earlier, job, shards)
        if differences:
            raise OtherJobError(
                f"{redact_url(folder.url)} holds the output of another job: "
                f"{'; '.join(differences)}. Give another folder, or overwrite it (--overwrite)"
            )
        return str(earlier["id"]), int(earlier["partitions"])
    plan = _make_table(divide_shards(shards, division, storage_options), shards)
    if folder.read_job() != earlier:  # planning can take long
        raise OtherJobError(
            f"{redact_url(folder.url)}: another job has begun there meanwhile: give another folder"
        )
    folder.clear()
    job |= {"id": uuid.uuid4().hex, "partitions": plan.num_rows}
    folder.write_table(SHARDS, _list_shards(shards))
    folder.write_table(PLAN, plan.replace_schema_metadata({_ID: job["id"]}))
    folder.write_job(job)
    return job["id"], plan.num_rows


def iterate_tasks(
    folder: JobFolder, job_id: str, shards: list[Shard], options: dict[str, Any], wanted: bytearray
) -> Iterator[tuple[int, FileGroupTask]]:
    """Yield the wanted partitions of a plan, each with its number, made when it is taken."""
    config = {"storage_options": options} if options else {}
    number = 0
    plan = folder.read_table(PLAN)
    if plan.schema.metadata[_ID].decode() != job_id:
        raise OtherJobError(
            f"{redact_url(folder.url)} has become another job's: give another folder"
        )
    for batch in plan.to_batches(_ROWS):
        for row in batch.to_pylist():
            if wanted[number]:
                chosen = shards[row["first"] : row["first"] + row["count"]]
                whole_file = row["start"] is None
                yield (
                    number,
                    FileGroupTask(
                        data=[shard.path for shard in chosen],
                        task_id=f"file_group_{number}",
                        reader_config=config,
                        byte_range=None if whole_file else (row["start"], row["stop"]),
                        index_whole_shard=row["whole"],
                        versions=tuple(shard.version for shard in chosen),
                    ),
                )
            number += 1


def _make_table(tasks: Iterator[FileGroupTask], shards: list[Shard]) -> pa.Table:
    """Return one row for each task, with its shards by their numbers."""
    batches: list[pa.RecordBatch] = []
    rows: list[dict[str, Any]] = []
    first = 0
    told = time.monotonic()
    for task in tasks:
        while shards[first].path != task.data[0]:  # both are in the same order
            first += 1
        start, stop = task.byte_range or (None, None)
        whole = task.index_whole_shard
        rows.append(
            {"first": first, "count": len(task.data), "start": start, "stop": stop, "whole": whole}
        )
        if len(rows) == _ROWS:
            batches.append(pa.RecordBatch.from_pylist(rows, _SCHEMA))
            rows.clear()
        if time.monotonic() - told > _TOLD_EVERY:
            told = time.monotonic()
            logger.info("planning: %d of %d shards looked through", first, len(shards))
    batches.append(pa.RecordBatch.from_pylist(rows, _SCHEMA))
    return pa.Table.from_batches(batches, _SCHEMA)


def _compare(
    folder: JobFolder, earlier: dict[str, Any], job: dict[str, Any], shards: list[Shard]
) -> list[str]:
    """Return what is different from an earlier job, in words."""
    if earlier["format"] != FORMAT:
        return [f"it has the format {earlier['format']}, not {FORMAT}"]
    differences = [
        f"{name} was {earlier[name]!r}, and is {job[name]!r}"
        for name in ("command", "function")
        if earlier[name] != job[name]
    ]
    was, is_ = earlier["options"], job["options"]
    differences += [
        f"{name} was {was.get(name)!r}, and is {is_.get(name)!r}"
        for name in sorted({*was, *is_})
        if was.get(name) != is_.get(name)
    ]
    if earlier["inputs"] != job["inputs"]:
        differences += _compare_shards(folder.read_table(SHARDS), _list_shards(shards))
    return differences


def _compare_shards(earlier: pa.Table, now: pa.Table) -> list[str]:
    was, is_ = (
        dict(zip(table["shard"].to_pylist(), table["version"].to_pylist(), strict=True))
        for table in (earlier, now)
    )
    found = {
        "new": [path for path in is_ if path not in was],
        "gone": [path for path in was if path not in is_],
        "changed": [path for path in is_ if path in was and was[path] != is_[path]],
    }
    differences = []
    for what, paths in found.items():
        if paths:
            more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
            number = "1 shard is" if len(paths) == 1 else f"{len(paths)} shards are"
            differences.append(f"{number} {what}: {', '.join(paths[:_SHOWN])}{more}")
    return differences or ["the shards are in another order, or their URLs in what is not shown"]


def _digest(shards: list[Shard]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update(f"{drop_signature(shard.path)}\0{shard.version}\0".encode())
    return digest.hexdigest()


def _list_shards(shards: list[Shard]) -> pa.Table:
    return pa.table(
        {
            "shard": pa.array([redact_url(shard.path) for shard in shards], pa.string()),
            "size": pa.array([shard.size for shard in shards], pa.int64()),
            "version": pa.array([shard.version for shard in shards], pa.string()),
        }
    )
