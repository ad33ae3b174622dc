"""Write the parts of a job's output: one for each partition, by the worker that read it."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pyarrow as pa

from dask_imgread.cluster.worker import find_worker
from dask_imgread.errors import StorageError
from dask_imgread.jobs.claim import check_claim
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.jobs.parts import Footer, PartName, ShardRun, make_token
from dask_imgread.jobs.plan import Partition
from dask_imgread.jobs.row_makers import RowMaker
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.reading.records import UNREACHABLE, describe_lost_shards
from dask_imgread.rows import to_table
from dask_imgread.tasks import FileGroupTask, ImageBatch, make_frame

logger = logging.getLogger("dask_imgread")


@dataclass(frozen=True)
class PartSink:
    """Where parts are written, and in whose name.

    Parameters
    ----------
    folder
        The job's folder.
    job_id
        The job that they belong to.
    claim
        The token of the process that runs the job: a cluster may still run tasks of another one,
        which is gone.
    schema
        The columns and types that all parts have.
    keeps_records
        Whether the images' records are written beside the rows.
    """

    folder: JobFolder
    job_id: str
    claim: str
    schema: pa.Schema
    keeps_records: bool

    def write(
        self,
        name: PartName,
        rows: list[pa.Table],
        records: list[pa.Table],
        runs: list[ShardRun],
        began: float,
        earlier: Footer | None = None,
        last: int | None = None,
    ) -> Footer:
        """Write a part that holds some tables, in place of an earlier one; return its footer.

        If ``last`` is given, it is made of other parts, and has the partitions up to that.

        Raises
        ------
        OtherJobError
            If the folder has been given to another job since, or to another run of this one.
        """
        worker = find_worker()
        footer = Footer(
            self.job_id,
            tuple(runs),
            name.number if last is None else last,
            began,
            time.time(),
            worker.address if worker is not None else "client",
            memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            claim=make_token(self.claim),
            is_merged=last is not None,
        )
        kept = None
        if self.keeps_records:
            kept = pa.concat_tables([make_no_records(), *records])
        check_claim(self.folder, self.claim)
        whole = pa.concat_tables([self.schema.empty_table(), *rows])
        return self.folder.write_part(name, whole, kept, footer, earlier)


@dataclass(frozen=True)
class PartWriter:
    """Reads a partition and writes its rows; all that a worker needs to know about a job.

    Parameters
    ----------
    sink
        Where the parts are written.
    reader
        The reader.
    row_maker
        What makes the rows of a batch.
    """

    sink: PartSink
    reader: ImageReaderStage
    row_maker: RowMaker

    __name__ = "write_part"  # Dask names tasks after it

    def isolated(self) -> PartWriter:
        """Return the same writer with a reader that decodes each image in a child process."""
        return replace(self, reader=self.reader.isolated())

    def __call__(self, partition: Partition) -> Footer:
        """Read one partition and write its rows, shard by shard."""
        began = time.time()
        rows: list[pa.Table] = []
        records: list[pa.Table] = []
        runs: list[ShardRun] = []
        for run, task in _split(partition):
            for batch in self.reader.read(task):
                _check_reached(batch)
                run = self._add(run, batch, rows, records)
                del batch  # or its pixels would stay in memory while the next one is decoded
            runs.append(run)
        return self._write(partition, rows, records, runs, began)

    def write_lost(self, partition: Partition, error: Exception) -> Footer:
        """Write a record for each shard of a partition that kills its workers."""
        rows: list[pa.Table] = []
        records: list[pa.Table] = []
        runs = []
        for run, task in _split(partition):
            batch = ImageBatch(failed=describe_lost_shards(task, self.reader.relative_to, error))
            records.append(to_table(batch.to_frame()))
            if not self.row_maker.keeps_records:
                rows.append(self.row_maker.make_rows(batch, self.sink.schema))
            lost = len(batch.failed)
            runs.append(run._replace(rows=lost * len(rows[-1:]), records=lost, failed=lost))
        return self._write(partition, rows, records, runs, time.time())

    def _add(
        self, run: ShardRun, batch: ImageBatch, rows: list[pa.Table], records: list[pa.Table]
    ) -> ShardRun:
        """Add a batch's rows and records to the others; return the run with their numbers."""
        read = batch.num_items
        rows.append(self.row_maker.make_rows(batch, self.sink.schema))
        records.append(to_table(batch.to_frame()))  # after the rows: the function's failures, too
        return run._replace(
            rows=run.rows + len(rows[-1]),
            records=run.records + len(records[-1]),
            images=run.images + batch.num_items,
            failed=run.failed + len(batch.failed) + batch.skipped,
            function_failed=run.function_failed + read - batch.num_items,
        )

    def _write(
        self,
        partition: Partition,
        rows: list[pa.Table],
        records: list[pa.Table],
        runs: list[ShardRun],
        began: float,
    ) -> Footer:
        earlier = self.sink.folder.read_footer(partition.name) if partition.replaces else None
        if earlier is not None and _name_content(earlier.runs) == _name_content(runs):
            images = sum(run.images for run in runs)
            if earlier.images > images:
                logger.warning(
                    "partition %d: %d images could be read before, and %d now: earlier rows stay",
                    *(partition.name.number, earlier.images, images),
                )
                return earlier
        return self.sink.write(partition.name, rows, records, runs, began, earlier)


@cache
def make_no_records() -> pa.Table:
    """Return a table of images' records that has none."""
    return to_table(make_frame([]))


def _split(partition: Partition) -> Iterator[tuple[ShardRun, FileGroupTask]]:
    """Yield a task for each shard of a partition, and the empty run of its rows."""
    task = partition.task
    for place, (shard, token) in enumerate(zip(partition.shards, partition.tokens, strict=True)):
        only = slice(place, place + 1)
        single = replace(
            task,
            data=task.data[only],
            task_id=task.task_id if len(task.data) == 1 else f"{task.task_id}_{place}",
            versions=task.versions[only],
            sizes=task.sizes[only],
        )
        yield ShardRun(shard, token, 0, 0, 0, 0, 0), single


def _name_content(runs: list[ShardRun] | tuple[ShardRun, ...]) -> set[tuple[int, int]]:
    return {(run.shard, run.token) for run in runs}


def _check_reached(batch: ImageBatch) -> None:
    """Raise StorageError if a store refused an image: it is there, and may be read later."""
    for image in batch.failed:
        if image.cause == UNREACHABLE:
            raise StorageError(image.error)
