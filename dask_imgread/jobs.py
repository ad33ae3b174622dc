"""Batch jobs: read shards on a cluster and write what was read as a Parquet dataset."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fsspec
import pandas as pd

from dask_imgread.frame import read_partition, to_rows
from dask_imgread.reader import ImageReaderStage
from dask_imgread.records import describe_lost_shards
from dask_imgread.tasks import FileGroupTask, make_frame
from dask_imgread.window import run_tasks

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class Count:
    """How many images were read, and how many rows tell of one that could not be."""

    images: int = 0
    failed: int = 0

    def __add__(self, other: Count) -> Count:
        """Add the numbers."""
        return Count(self.images + other.images, self.failed + other.failed)


@dataclass(frozen=True)
class Summary:
    """What a job read, and how long it took."""

    count: Count
    seconds: float


@dataclass(frozen=True)
class _Job:
    """What a worker must know to do one partition of a job."""

    reader: ImageReaderStage
    out: str

    def __call__(self, numbered: tuple[int, FileGroupTask]) -> Count:
        """Read one task and write its rows."""
        number, task = numbered
        rows = read_partition(task, reader=self.reader, fn=to_rows, empty=make_frame([]))
        return self.write(number, rows)

    def write(self, number: int, rows: pd.DataFrame) -> Count:
        """Write the rows of one partition, whole or not at all."""
        fs, root = fsspec.url_to_fs(self.out)
        path = f"{root}/part-{number:06d}.parquet"
        with fs.transaction, fs.open(path, "wb") as file:
            rows.to_parquet(file)
        failed = int(rows["error"].notna().sum())
        return Count(len(rows) - failed, failed)


def write_metadata(
    client: Client,
    tasks: Sequence[FileGroupTask],
    reader: ImageReaderStage,
    out: str,
    report: Callable[[int, int, int], None] | None = None,
) -> Summary:
    """Read tasks on a cluster and write one row for each image to ``out``.

    Parameters
    ----------
    client
        A client of the cluster.
    tasks
        What to read; each becomes one file ``part-<number>.parquet``, written by its worker.
    reader
        The reader; with ``decode=False`` it reads headers only.
    out
        A folder or URL.
    report
        Called after each task with the numbers of tasks done, images and failures so far.

    Returns
    -------
    Summary
    """
    fs, root = fsspec.url_to_fs(out)
    fs.makedirs(root, exist_ok=True)
    start = time.monotonic()
    total = Count()
    job = _Job(reader, out)
    ended = run_tasks(client, job, enumerate(tasks), pure=False, **reader.annotations(client))
    for done, ((number, task), result) in enumerate(ended, 1):
        if isinstance(result, Count):
            total += result
        else:
            total += job.write(number, make_frame(describe_lost_shards(task, result)))
        if report is not None:
            report(done, total.images, total.failed)
    return Summary(total, time.monotonic() - start)
