"""A job's plan: its shards, and the partitions into which they are divided."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from dask_imgread.errors import OtherJobError
from dask_imgread.jobs.folder import CLEARED, PLAN, SHARDS, JobFolder
from dask_imgread.shards.find import Shard
from dask_imgread.shards.partition import Division, divide_shards
from dask_imgread.shards.samples import ShardIndex
from dask_imgread.storage.redaction import drop_signature, redact_url
from dask_imgread.tasks import FileGroupTask

FORMAT = 3  # of the folder; a folder of another format is refused
_ID = b"job"  # where the plan's metadata hold the job's id
_SCHEMA = pa.schema(
    {
        "first": pa.int32(),  # the number of the first shard
        "count": pa.int32(),
        "start": pa.int64(),  # null: whole shards
        "stop": pa.int64(),
        "index": pa.large_string(),  # ShardIndex as JSON, if the task has one
    }
)
_LOGGED_EVERY = 10  # seconds
_ROWS = 10_000  # converted to Python objects at the same time
_CHARACTERS = 1 << 26  # of indexes, likewise
_SHOWN = 3  # shards named in a difference

logger = logging.getLogger("dask_imgread")


@dataclass(frozen=True)
class Plan:
    """The partitions of a job: which part of which shards each of them is.

    Parameters
    ----------
    folder
        Where the plan is kept.
    job_id
        The job's id.
    partitions
        How many there are.
    shards
        All shards of the job, to which the plan refers by number.
    storage_options
        Options for the shards' file system. Left out of ``repr``: they may hold credentials.
    """

    folder: JobFolder
    job_id: str
    partitions: int
    shards: list[Shard]
    storage_options: dict[str, Any] = field(repr=False)

    def iterate_tasks(self, wanted: bytearray) -> Iterator[tuple[int, FileGroupTask]]:
        """Yield the number and the task of each partition that is wanted, made when it is taken.

        Parameters
        ----------
        wanted
            A number for each partition: not 0 if it is wanted.

        Raises
        ------
        OtherJobError
            If the folder has been given to another job since.
        """
        config = {"storage_options": self.storage_options} if self.storage_options else {}
        table = self.folder.read_table(PLAN)
        if table.schema.metadata[_ID].decode() != self.job_id:
            raise OtherJobError(
                f"{redact_url(self.folder.url)} now belongs to another job: give another folder"
            )
        rows = (row for batch in table.to_batches(_ROWS) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            if wanted[number]:
                shards = self.shards[row["first"] : row["first"] + row["count"]]
                whole_file = row["start"] is None
                yield (
                    number,
                    FileGroupTask(
                        data=[shard.path for shard in shards],
                        task_id=f"file_group_{number}",
                        reader_config=config,
                        byte_range=None if whole_file else (row["start"], row["stop"]),
                        index=row["index"] and ShardIndex.from_json(row["index"]),
                        versions=tuple(shard.version for shard in shards),
                        sizes=tuple(shard.size for shard in shards),
                    ),
                )


def prepare_plan(
    folder: JobFolder,
    shards: list[Shard],
    description: dict[str, Any],
    division: Division,
    storage_options: dict[str, Any],
    overwrite: bool,
) -> Plan:
    """Return the plan that a job has in its folder, or make and write one.

    Parameters
    ----------
    folder
        The job's folder.
    shards
        The shards to read.
    description
        What decides the rows, as ``describe_job`` returns it.
    division
        How the shards are divided. To cut them by their images, the headers of all shards are
        read; only once, as the plan is kept.
    storage_options
        Options for the shards' file system.
    overwrite
        Remove the output of any earlier job, this one's too.

    Raises
    ------
    OtherJobError
        If the folder holds the output of other inputs or options.
    FileExistsError
        If it holds something that no job has written.
    """
    description = {
        "format": FORMAT,
        **description,
        # As they come back from JSON: with lists in place of tuples.
        "options": json.loads(json.dumps(description["options"] | asdict(division))),
        "shards": len(shards),
        "inputs": _digest(shards),
    }
    earlier = folder.read_job()
    if earlier is not None and not overwrite and earlier["format"] != CLEARED:
        differences = _compare(folder, earlier, description, shards)
        if differences:
            raise OtherJobError(
                f"{redact_url(folder.url)} holds the output of another job: "
                f"{'; '.join(differences)}. Give another folder, or overwrite it (--overwrite)"
            )
        return Plan(folder, earlier["id"], earlier["partitions"], shards, storage_options)
    table = _make_table(divide_shards(shards, division, storage_options), shards)
    if folder.read_job() != earlier:  # planning can take long
        raise OtherJobError(
            f"{redact_url(folder.url)}: another job has begun there meanwhile: give another folder"
        )
    folder.clear()
    plan = Plan(folder, uuid.uuid4().hex, table.num_rows, shards, storage_options)
    folder.write_table(SHARDS, _list_shards(shards))
    folder.write_table(PLAN, table.replace_schema_metadata({_ID: plan.job_id}))
    # Last: a folder has a job only when its plan is complete.
    folder.write_job(description | {"id": plan.job_id, "partitions": plan.partitions})
    return plan


def _make_table(tasks: Iterator[FileGroupTask], shards: list[Shard]) -> pa.Table:
    """Return one row for each task, which refers to its shards by number."""
    batches: list[pa.RecordBatch] = []
    rows: list[dict[str, Any]] = []
    first = characters = 0
    logged = time.monotonic()
    for task in tasks:
        while shards[first].path != task.data[0]:  # tasks and shards are in the same order
            first += 1
        start, stop = task.byte_range or (None, None)
        index = task.index and task.index.to_json()
        rows.append(
            {"first": first, "count": len(task.data), "start": start, "stop": stop, "index": index}
        )
        characters += len(index or "")
        if len(rows) == _ROWS or characters > _CHARACTERS:
            batches.append(pa.RecordBatch.from_pylist(rows, _SCHEMA))
            rows.clear()
            characters = 0
        if time.monotonic() - logged > _LOGGED_EVERY:
            logged = time.monotonic()
            logger.info("planning: %d of %d shards read", first, len(shards))
    batches.append(pa.RecordBatch.from_pylist(rows, _SCHEMA))
    return pa.Table.from_batches(batches, _SCHEMA)


def _compare(
    folder: JobFolder, earlier: dict[str, Any], now: dict[str, Any], shards: list[Shard]
) -> list[str]:
    """Return in words how the description of an earlier job differs from this one's."""
    if earlier["format"] != FORMAT:
        return [f"it has the format {earlier['format']}, not {FORMAT}"]
    pairs = [(name, earlier[name], now[name]) for name in ("command", "function")]
    was, is_ = earlier["options"], now["options"]
    pairs += [(name, was.get(name), is_.get(name)) for name in sorted({*was, *is_})]
    differences = [f"{name} was {old!r}, and is {new!r}" for name, old, new in pairs if old != new]
    if earlier["inputs"] != now["inputs"]:
        differences += _compare_shards(folder.read_table(SHARDS), _list_shards(shards))
    return differences


def _compare_shards(earlier: pa.Table, now: pa.Table) -> list[str]:
    """Return in words which shards are new, gone or changed."""
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
    return differences or ["the shards are in another order, or their URLs differ in hidden parts"]


def _digest(shards: list[Shard]) -> str:
    """Return a digest of the shards and their versions, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update(f"{drop_signature(shard.path)}\0{shard.version}\0".encode())
    return digest.hexdigest()


def _list_shards(shards: list[Shard]) -> pa.Table:
    """Return one row for each shard, without the secrets in its URL."""
    return pa.table(
        {
            "shard": pa.array([redact_url(shard.path) for shard in shards], pa.string()),
            "size": pa.array([shard.size for shard in shards], pa.int64()),
            "version": pa.array([shard.version for shard in shards], pa.string()),
        }
    )
