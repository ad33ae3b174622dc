"""Batch jobs: read shards on a cluster and write a Parquet dataset, resumed where they stopped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from distributed.scheduler import KilledWorker

from dask_imgread.cluster.start import connect_client, wait_for_workers
from dask_imgread.cluster.window import run_one, run_tasks
from dask_imgread.errors import JobError, NoWorkersError, OtherJobError, ReadError, SchemaError
from dask_imgread.jobs.folder import SCHEMA, Count, JobFolder
from dask_imgread.jobs.plan import iterate_tasks, prepare_plan
from dask_imgread.jobs.writer import PartWriter, describe_batch
from dask_imgread.progress import Progress, choose_progress
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.rows import (
    INFERRED_BATCH,
    INFERRED_TASKS,
    BatchFunction,
    describe_failure,
    name_function,
    to_table,
)
from dask_imgread.shards.find import Paths, Shard, find_shards
from dask_imgread.shards.partition import Division
from dask_imgread.storage.filesystems import is_local, resolve_path
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.tasks import FileGroupTask, ImageBatch

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger("dask_imgread")

_SMALLEST_WINDOW = 16  # counts are all that tasks return
_MOST_ERRORS = 20  # partitions that could not be done, until a job is given up


@dataclass(frozen=True)
class Summary:
    """What a job came to.

    Parameters
    ----------
    images, failed
        Images in the whole output that were read, and that could not be.
    function_failed
        Those of the failed that could be read, but for which the function raised.
    partitions
        How many there are.
    new_images, new_failed, new_partitions
        The same of this run alone.
    seconds
        How long this run took, from finding the shards on.
    images_per_second
        The images of this run, those that failed too, in a second of the time in which it read
        partitions; 0 if there was nothing left to do.
    decoded
        Whether pixels were decoded. If not, only headers were read, and images that seem fine
        may be broken.
    """

    images: int
    failed: int
    function_failed: int
    partitions: int
    new_images: int
    new_failed: int
    new_partitions: int
    seconds: float
    images_per_second: float
    decoded: bool


def run_job(
    paths: Paths,
    out: str | os.PathLike[str],
    fn: BatchFunction | None = None,
    *,
    client: Client | None = None,
    scheduler: str | None = None,
    scheduler_file: str | None = None,
    n_workers: int | None = None,
    reader: ImageReaderStage | None = None,
    meta: pd.DataFrame | None = None,
    files_per_partition: int | None = None,
    images_per_partition: int | None = None,
    blocksize: int | None = None,
    storage_options: dict[str, Any] | None = None,
    out_options: dict[str, Any] | None = None,
    retries: int = 2,
    retry_failed: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    relative_to: str | None = None,
) -> Summary:
    """Read shards on a cluster and write a row for each image, or what a function makes of them.

    The output is a Parquet dataset of one file for each partition, written by the worker
    that read it, whole or not at all. Killed at any moment and called again, a job does what
    is missing, and nothing twice. No more than a window of tasks is in flight.

    Parameters
    ----------
    paths
        Shards, as ``partition_shards`` takes them.
    out
        A folder, or a URL that fsspec can write to.
    fn
        Takes an ``ImageBatch`` and returns rows, as for ``map_images``; arrays of one shape
        become lists of a fixed size. If it raises, it is run again on each image of the batch
        as a batch of its own, and those for which it raises again are recorded as failed, with
        the cause ``function failed``. If not given, the rows are the images'
        metadata, with the columns of ``dask_imgread.tasks.COLUMNS``, and ``sidecars``, as
        JSON, if the reader reads them.
    client
        The cluster to work on.
    scheduler, scheduler_file
        Where no client is given: the address of a scheduler that is there, or the file that
        it has written. If neither is given, a cluster on this machine is started, if there
        is anything left to do.
    n_workers
        Workers to start; or to wait for.
    reader
        The reader. If not given, ``ImageReaderStage()`` for a function, and for metadata one
        that reads headers alone.
    meta
        An empty DataFrame with the columns, dtypes and index of what ``fn`` returns;
        ``fn.meta`` if not given, and what ``fn`` returns for a few images if there is none.
    files_per_partition, images_per_partition, blocksize
        How the shards are divided, as in ``partition_shards``.
    storage_options
        Options for the shards' file system, and for that of ``out`` if it is remote. They are
        written nowhere.
    out_options
        Options for the file system of ``out``, if they are others.
    retries
        How often a partition is tried again that raises, or whose worker dies.
    retry_failed
        Read those partitions again in which an image could not be read, and replace their
        rows.
    overwrite
        Remove what another job has written to ``out``, and begin anew.
    progress
        Show it on stderr: a bar on a terminal, else a line every ten seconds.
    relative_to
        The reader's option, if not given there: ids from the shards' paths below it.

    Returns
    -------
    Summary

    Raises
    ------
    OtherJobError
        If ``out`` holds the output of other shards or options; a ValueError.
    FileExistsError
        If ``out`` holds what no job has written.
    FileNotFoundError
        If a path, or all that a folder or a glob stands for, does not exist.
    ReadError
        If an image can't be read, under ``on_error="raise"``.
    JobError
        If partitions could not be done, the scheduler is lost, or the cluster has no workers
        for ten minutes; for one if it is on this machine. Dask's setting
        ``imgread.wait-for-workers`` says otherwise.

    Examples
    --------
    >>> from distributed import Client
    >>> from dask_imgread.testing import make_shards
    >>> shards = make_shards("shards", shards=2, images_per_shard=4, broken=1)
    >>> reader = ImageReaderStage(device="cpu", verbose=False)
    >>> with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
    ...     first = run_job(shards, "out", reader=reader, client=client)
    ...     again = run_job(shards, "out", reader=reader, client=client)
    >>> first.images, first.failed, again.images, again.new_partitions
    (7, 1, 7, 0)
    >>> len(pd.read_parquet("out"))
    8
    """
    start = time.monotonic()
    options = storage_options or {}
    job = _make_job(fn, reader, _open_folder(str(out), options, out_options))
    if relative_to is not None:
        job = replace(job, reader=job.reader.with_options(relative_to=relative_to))
    division = Division(files_per_partition, images_per_partition, blocksize)
    shards = find_shards(paths, options)
    job_id, partitions = prepare_plan(
        job.folder, shards, job.describe(), division, options, overwrite
    )
    job = replace(job, job_id=job_id, retrying=retry_failed)
    done, before = _find_done(job, partitions)
    count, rate = Count(), 0.0
    if sum(done) < partitions:
        tasks = _Tasks(job.folder, job_id, shards, options, bytearray(not mark for mark in done))
        with (
            _tell_lost_cluster(),
            (
                nullcontext(client)
                if client is not None
                else _connect(job.reader, scheduler, scheduler_file, n_workers)
            ) as used,
        ):
            wait_for_workers(used)  # what they declare decides on what tasks ask for
            job = replace(job, schema=_find_schema(used, job, meta, tasks))
            with choose_progress(partitions, sum(done), hidden=not progress) as shown:
                count = _run(used, job, tasks, retries, shown)
                rate = shown.measure_rate()
    if not all(job.folder.mark_done(partitions)):
        raise JobError(
            f"what workers wrote is not in {redact_url(job.folder.url)}: give a folder that client "
            "and workers share"
        )
    job.folder.tidy()
    return Summary(
        **asdict(before + count),
        partitions=partitions,
        new_images=count.images,
        new_failed=count.failed,
        new_partitions=partitions - sum(done),
        seconds=time.monotonic() - start,
        images_per_second=round(rate, 1),
        decoded=job.reader.decode,
    )


def _make_job(
    fn: BatchFunction | None, reader: ImageReaderStage | None, out: JobFolder
) -> PartWriter:
    if fn is None:
        return PartWriter(reader or ImageReaderStage(decode=False, sidecars=False), None, out)
    reader = reader or ImageReaderStage()
    if not reader.decode:
        raise ValueError("a function of images needs a reader with decode=True")
    return PartWriter(reader, fn, out)


def _open_folder(
    out: str, options: dict[str, Any], out_options: dict[str, Any] | None
) -> JobFolder:
    if out_options is None:
        out_options = {} if is_local(out) else options
    return JobFolder(resolve_path(os.path.expanduser(out)), out_options)


def _find_done(job: PartWriter, partitions: int) -> tuple[bytearray, Count]:
    """Return 1 for each partition that needs no more work, and what they came to."""
    done = job.folder.mark_done(partitions)
    total = Count()
    numbers = (number for number, mark in enumerate(bytes(done)) if mark)
    for number, footer in job.folder.read_footers(numbers):
        if footer is None or footer.job != job.job_id or (job.retrying and footer.failed):
            done[number] = 0
        else:
            total += footer.count()
    return done, total


def _connect(
    reader: ImageReaderStage, scheduler: str | None, scheduler_file: str | None, workers: int | None
) -> AbstractContextManager[Client]:
    return connect_client(
        scheduler=scheduler,
        scheduler_file=scheduler_file,
        n_workers=workers,
        # Headers are read by cores: one process for each, not one for each GPU.
        device=reader.device if reader.decode else "cpu",
        num_gpus_per_worker=reader.num_gpus_per_worker,
        verbose=False,
    )


@contextmanager
def _tell_lost_cluster() -> Iterator[None]:
    """Raise JobError where the scheduler or all workers are lost."""
    try:
        yield
    except CancelledError:
        raise JobError("the scheduler was lost") from None
    except NoWorkersError as error:
        raise JobError(str(error)) from None


@dataclass(frozen=True)
class _Tasks:
    """The partitions that are to be done, made when they are taken, as often as is asked."""

    folder: JobFolder
    job_id: str
    shards: list[Shard]
    options: dict[str, Any]
    wanted: bytearray

    def __iter__(self) -> Iterator[tuple[int, FileGroupTask]]:
        return iterate_tasks(self.folder, self.job_id, self.shards, self.options, self.wanted)


def _run(client: Client, job: PartWriter, tasks: _Tasks, retries: int, progress: Progress) -> Count:
    """Do the tasks on the cluster; return what they came to.

    Raises
    ------
    JobError
        If a task ends in an error that is not an image's, and so is still to be done.
    """
    total = Count()
    errors: list[str] = []
    options = job.reader.annotations(client) | {"pure": False, "retries": retries}
    options |= {"smallest_window": _SMALLEST_WINDOW}
    for done, ((number, task), result) in enumerate(run_tasks(client, job, tasks, **options), 1):
        if isinstance(result, KilledWorker):
            result = job.write_lost(number, task, result)
        if isinstance(result, ReadError | OtherJobError):
            raise result
        if isinstance(result, SchemaError):
            raise JobError(str(result)) from None
        if isinstance(result, Exception):
            reason = hide_secrets(f"{type(result).__name__}: {result}", task.storage_options)
            errors.append(f"partition {number}, {task!r}: {reason}")
            logger.error("%s", errors[-1])
            if len(errors) == _MOST_ERRORS:
                break
        else:
            total += result
        progress.update(done - len(errors), total.images, total.failed)
    if errors:
        raise JobError(
            f"{len(errors)} partitions could not be done, such as {errors[0]}. The same call tries "
            "them again"
        )
    return total


def _find_schema(
    client: Client, job: PartWriter, meta: pd.DataFrame | None, tasks: _Tasks
) -> pa.Schema:
    """Return the columns and types of all parts; for a function, written when first found."""
    if job.fn is None:
        return to_table(describe_batch(ImageBatch(), job.reader.sidecars)).schema
    try:
        return job.folder.read_table(SCHEMA).schema
    except FileNotFoundError:
        pass
    meta = getattr(job.fn, "meta", None) if meta is None else meta
    schema = None if meta is None else _read_meta(meta)
    if schema is None or any(pa.types.is_null(field.type) for field in schema):
        schema = _infer_schema(client, job, tasks, schema)
    job.folder.write_table(SCHEMA, schema.empty_table())
    return schema


def _read_meta(meta: pd.DataFrame) -> pa.Schema:
    """Return the types of an empty frame; null where it tells none, as an empty Index does."""
    schema = to_table(meta).schema
    if isinstance(meta.index, pd.RangeIndex) and meta.index.name is not None:
        place = schema.get_field_index(meta.index.name)
        schema = schema.set(place, pa.field(meta.index.name, pa.null()))
    return schema


def _infer_schema(
    client: Client, job: PartWriter, tasks: _Tasks, known: pa.Schema | None
) -> pa.Schema:
    """Run the function on a few images, on a worker; keep the types that are known."""
    assert job.fn is not None
    name = name_function(job.fn)
    small = replace(job, reader=job.reader.with_options(dali_batch_size=INFERRED_BATCH))
    options = job.reader.annotations(client)
    for _, task in islice(tasks, INFERRED_TASKS):
        try:
            schemas = _infer_schemas(client, small, task, options)
        except (CancelledError, NoWorkersError):
            raise
        except Exception as error:
            reason = hide_secrets(describe_failure(error), task.storage_options)
            raise JobError(f"{name} fails on the first images of {task!r}: {reason}") from error
        if schemas:
            return _unify(schemas, known, name)
    raise JobError(
        f"no image of the first {INFERRED_TASKS} partitions could be read, to tell the columns "
        f"of {name} by: give them with meta"
    )


def _infer_schemas(
    client: Client, job: PartWriter, task: FileGroupTask, options: dict[str, Any]
) -> list[pa.Schema]:
    """Do so on a worker; if it dies, once more with a picture's death costing only itself."""
    try:
        return run_one(client, job.infer_schemas, task, **options)
    except KilledWorker:
        return run_one(client, job.isolated().infer_schemas, task, **options)


def _unify(schemas: list[pa.Schema], known: pa.Schema | None, name: str) -> pa.Schema:
    try:
        found = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise JobError(f"{name} gives rows of several types: {error}") from None
    if known is not None:
        if set(known.names) != set(found.names):
            raise JobError(f"{name} gives the columns {found.names}, meta has {known.names}")
        for field in known:
            if pa.types.is_null(field.type):
                place = known.get_field_index(field.name)
                known = known.set(place, found.field(field.name))
        found = known
    empty = [field.name for field in found if pa.types.is_null(field.type)]
    if empty:
        raise JobError(
            f"{name}: the first images do not tell the type of {', '.join(empty)}: give it with "
            f"meta, an empty DataFrame, such as {name}.meta"
        )
    return found
