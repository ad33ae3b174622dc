"""Write the parts of a job's output: one for each partition, by the worker that read it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from dask_imgread.cluster.worker import find_worker
from dask_imgread.errors import StorageError
from dask_imgread.jobs.folder import Count, Footer, JobFolder
from dask_imgread.jobs.row_makers import RowMaker
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.reading.records import UNREACHABLE, describe_lost_shards
from dask_imgread.rows import to_table
from dask_imgread.tasks import FileGroupTask, ImageBatch, make_frame

logger = logging.getLogger("dask_imgread")


@dataclass(frozen=True)
class PartWriter:
    """Reads a partition and writes its rows; all that a worker needs to know about a job.

    Parameters
    ----------
    folder
        Where the parts are written.
    job_id
        The job that they belong to.
    reader
        The reader.
    row_maker
        What makes the rows of a batch.
    schema
        The columns and types that all parts have.
    replaces_parts
        Whether a part that is there may be replaced, provided that no image is lost by it.
    """

    folder: JobFolder
    job_id: str
    reader: ImageReaderStage
    row_maker: RowMaker
    schema: pa.Schema
    replaces_parts: bool

    __name__ = "write_part"  # Dask names tasks after it

    def isolated(self) -> PartWriter:
        """Return the same writer with a reader that decodes each image in a child process."""
        return replace(self, reader=self.reader.isolated())

    def __call__(self, numbered: tuple[int, FileGroupTask]) -> Count:
        """Read one partition and write its rows."""
        number, task = numbered
        began = time.time()
        rows, records = [self.schema.empty_table()], [to_table(make_frame([]))]
        count = Count()
        for batch in self.reader.read(task):
            _check_reached(batch)
            read = batch.num_items
            rows.append(self.row_maker.make_rows(batch, self.schema))
            records.append(to_table(batch.to_frame()))
            failed = len(batch.failed) + batch.skipped
            count += Count(batch.num_items, failed, read - batch.num_items)
        return self._write(number, pa.concat_tables(rows), pa.concat_tables(records), count, began)

    def write_lost(self, number: int, task: FileGroupTask, error: Exception) -> Count:
        """Write a record for each shard of a partition that kills its workers."""
        batch = ImageBatch(failed=describe_lost_shards(task, self.reader.relative_to, error))
        records = to_table(batch.to_frame())
        if self.row_maker.keeps_records:
            rows = self.schema.empty_table()
        else:
            rows = self.row_maker.make_rows(batch, self.schema)
        return self._write(number, rows, records, Count(0, len(batch.failed)), time.time())

    def _write(
        self, number: int, rows: pa.Table, records: pa.Table, count: Count, began: float
    ) -> Count:
        earlier = self.folder.read_footer(number) if self.replaces_parts else None
        if earlier is not None and earlier.images > count.images:
            logger.warning(
                "partition %d: %d images could be read before, and %d now: earlier rows stay",
                *(number, earlier.images, count.images),
            )
            return earlier.count()
        worker = find_worker()
        name = worker.address if worker is not None else "client"
        footer = Footer(self.job_id, **asdict(count), began=began, ended=time.time(), worker=name)
        kept = records if self.row_maker.keeps_records else None
        self.folder.write_part(number, rows, kept, footer)
        return count


def _check_reached(batch: ImageBatch) -> None:
    """Raise StorageError if a store refused an image: it is there, and may be read later."""
    for image in batch.failed:
        if image.cause == UNREACHABLE:
            raise StorageError(image.error)
