"""Batch jobs: read shards on a cluster and write a Parquet dataset, resumed where they stopped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Unpack

import pandas as pd
from distributed import Client
from distributed.scheduler import KilledWorker

from dask_imgread.cluster.start import connect_client, wait_for_workers
from dask_imgread.cluster.window import run_tasks
from dask_imgread.errors import JobError, NoWorkersError, OtherJobError, ReadError, SchemaError
from dask_imgread.jobs.description import describe_job
from dask_imgread.jobs.folder import Count, JobFolder
from dask_imgread.jobs.plan import Plan, prepare_plan
from dask_imgread.jobs.row_makers import FunctionRows, MetadataRows, RowMaker
from dask_imgread.jobs.schema import SchemaFinder, read_meta
from dask_imgread.jobs.writer import PartWriter
from dask_imgread.progress import Progress, choose_progress
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.rows import BatchFunction
from dask_imgread.shards.find import Paths, find_shards
from dask_imgread.shards.frames import is_frame
from dask_imgread.shards.partition import Division, Partitioning
from dask_imgread.sidecars import MetadataColumns, Sidecars
from dask_imgread.storage.filesystems import is_local, resolve_path
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.tasks import count_images

logger = logging.getLogger("dask_imgread")

_SMALLEST_WINDOW = 16  # larger than for pixels: a task returns nothing but counts
_MOST_ERRORS = 20  # partitions that fail before the job gives up


@dataclass(frozen=True, repr=False)
class Summary:
    """The numbers of a job.

    Parameters
    ----------
    images, failed
        Images in the whole output that were read, and that failed.
    function_failed
        How many of the failed could be read, but made the function raise.
    partitions
        How many partitions the job has.
    new_images, new_failed, new_partitions
        The same numbers for this run alone.
    seconds
        How long this run took, finding the shards included.
    images_per_second
        The images of this run, failed ones included, for each second in which it read
        partitions; 0 if there was nothing left to do.
    decoded
        Whether pixels were decoded. If not, only headers were read, and images that seem fine
        may be broken.

    Examples
    --------
    >>> numbers = dict(images=7, failed=1, function_failed=0, partitions=2)
    >>> this_run = dict(new_images=7, new_failed=1, new_partitions=2, seconds=0.5)
    >>> summary = Summary(**numbers, **this_run, images_per_second=20.0, decoded=True)
    >>> summary.failed
    1
    >>> summary
    <Summary: 7 images, 1 failed; 2 of 2 partitions in this run, 0.5 s>
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

    def __repr__(self) -> str:
        """Return a line with the numbers that matter most."""
        failed = f" ({self.function_failed:,} in the function)" if self.function_failed else ""
        headers = "" if self.decoded else "; only headers were read"
        partitions = f"{self.new_partitions:,} of {self.partitions:,} partitions in this run"
        return (
            f"<{type(self).__name__}: {count_images(self.images, self.failed)}{failed}; "
            f"{partitions}, {self.seconds:.1f} s{headers}>"
        )


def run_job(
    paths: Paths,
    out: str | os.PathLike[str],
    fn: BatchFunction | None = None,
    *,
    client: Client | AbstractContextManager[Client] | None = None,
    reader: ImageReaderStage | None = None,
    meta: pd.DataFrame | None = None,
    sidecars: Sidecars | None = None,
    checksum: bool = False,
    storage_options: dict[str, Any] | None = None,
    out_options: dict[str, Any] | None = None,
    retries: int = 2,
    retry_failed: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    relative_to: str | None = None,
    **partitioning: Unpack[Partitioning],
) -> Summary:
    """Read shards on a cluster and write a row for each image, or what a function makes of them.

    The output is a Parquet dataset of one file for each partition. The worker that read the
    partition writes its file, in one piece or not at all. A job that was killed, at any moment,
    and is called again does what is missing, and nothing twice. Only a window of tasks is in
    flight at any time.

    Parameters
    ----------
    paths
        Shards, as ``partition_shards`` takes them.
    out
        A folder, or a URL that fsspec can write to.
    fn
        Takes an ``ImageBatch`` and returns rows, as for ``map_images``; arrays of one shape
        become lists of a fixed size. If it raises, it is run again on each image of the batch
        as a batch of its own. Images for which it raises again are recorded as failed, with
        the cause ``function failed``. If not given, the rows are the images'
        metadata, with the columns of ``dask_imgread.tasks.COLUMNS``, and ``sidecars``, as
        JSON, if the reader reads them and ``sidecars`` is not given.
    client
        The cluster to work on: a client, which stays open, or a context manager that gives one,
        such as ``connect_client(scheduler_file="scheduler.json")``. The latter is entered only
        if anything is left to do, and exited at the end. If not given, a cluster that fits the
        reader is started on this machine, likewise only if anything is left to do.
    reader
        The reader. If not given, ``ImageReaderStage()`` for a function, and for metadata one
        that reads headers alone.
    meta
        An empty DataFrame with the columns, dtypes and index of what ``fn`` returns. If not
        given, ``fn.meta``; without that, ``fn`` is run on a few images.
    sidecars
        Columns of what the samples' sidecars hold, and ``error_sidecar``, as for ``read_metadata``;
        only without ``fn``. Types that the first images show are kept with the job.
    checksum
        Whether to add ``sha256``, as for ``read_metadata``. A function finds it in
        ``image.sha256``.
    storage_options
        Options for the shards' file system, and for that of ``out`` if it is remote. They are
        not stored.
    out_options
        Options for the file system of ``out``, if it needs others.
    retries
        How often a partition is tried again if it raises or its worker dies.
    retry_failed
        Read those partitions again in which an image failed, and replace their rows, unless fewer
        images can be read than before.
    overwrite
        Remove what another job has written to ``out``, and begin anew.
    progress
        Show it on stderr: a bar on a terminal, else a line every ten seconds.
    relative_to
        Overrides the reader's ``relative_to``: ids are made from the shards' paths below it.
    **partitioning
        How the shards are divided: ``files_per_partition``, ``images_per_partition`` or
        ``blocksize``, as in ``partition_shards``.

    Returns
    -------
    Summary

    Raises
    ------
    OtherJobError
        If ``out`` holds the output of other shards or options; a ValueError.
    FileExistsError
        If ``out`` holds files that no job has written.
    FileNotFoundError
        If a path does not exist, or a folder or a glob has no shards.
    PermissionError, StorageError
        If a store denies access, or can't be reached.
    ValueError
        If more than one way to divide shards is given, or a number below 1, if ``fn`` is given
        and the reader has ``decode=False``, or for ``sidecars``, as in ``read_metadata``.
    ReadError
        If an image can't be read, under ``on_error="raise"``.
    TimeoutError
        If ``client`` is ``connect_client(...)`` and there is no scheduler after ten minutes.
    JobError
        If partitions could not be done, the scheduler is lost, or the cluster has had no workers
        for ten minutes; for one minute if it is on this machine. Dask's setting
        ``imgread.wait-for-workers`` changes that.

    Examples
    --------
    >>> import pandas as pd
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
    if is_frame(paths):
        raise ValueError(
            "run_job reads whole shards: for the rows of a frame use map_images(fn, frame), or "
            "write_shards first"
        )
    division = Division.of("run_job", partitioning)
    storage_options = storage_options or {}
    columns = MetadataColumns.parse(sidecars)
    reader = _choose_reader(reader, fn is not None, relative_to, columns.extensions, checksum)
    row_maker = _choose_row_maker(fn, reader, meta, columns)
    folder = _open_folder(str(out), storage_options, out_options)
    shards = find_shards(paths, storage_options)
    plan = prepare_plan(
        folder, shards, describe_job(reader, row_maker), division, storage_options, overwrite
    )
    wanted, before = _find_wanted(plan, retry_failed)
    count, rate = Count(), 0.0
    if any(wanted):
        with raise_job_errors(), choose_client(client, reader) as opened:
            wait_for_workers(opened)  # the resources that they declare decide what tasks request
            finder = SchemaFinder(opened, folder, reader, plan.iterate_tasks(wanted))
            schema = row_maker.find_schema(finder)
            writer = PartWriter(folder, plan.job_id, reader, row_maker, schema, retry_failed)
            done = plan.partitions - sum(wanted)
            with choose_progress(plan.partitions, done, hidden=not progress) as shown:
                count = _write_parts(opened, writer, plan, wanted, retries, shown)
                rate = shown.measure_rate()
    _check_parts(plan)
    folder.remove_drafts()
    return Summary(
        **asdict(before + count),
        partitions=plan.partitions,
        new_images=count.images,
        new_failed=count.failed,
        new_partitions=sum(wanted),
        seconds=time.monotonic() - start,
        images_per_second=round(rate, 1),
        decoded=reader.decode,
    )


def connect_for_reader(reader: ImageReaderStage, **options: Any) -> AbstractContextManager[Client]:
    """Return ``connect_client`` with options that fit a reader, if a cluster is to be started."""
    return connect_client(
        # Headers are read by cores: with a process for each core, not for each GPU.
        device=reader.device if reader.decode else "cpu",
        num_gpus_per_worker=reader.num_gpus_per_worker,
        verbose=False,
        **options,
    )


def choose_client(
    client: Client | AbstractContextManager[Client] | None, reader: ImageReaderStage
) -> AbstractContextManager[Client]:
    """Return a context that gives the client to work with; without one, of a cluster here."""
    if isinstance(client, Client):
        return nullcontext(client)  # not entered: the caller closes it
    return connect_for_reader(reader) if client is None else client


def _choose_reader(
    reader: ImageReaderStage | None,
    decode: bool,
    relative_to: str | None,
    extensions: tuple[str, ...],
    checksum: bool,
) -> ImageReaderStage:
    reader = reader or ImageReaderStage(decode=decode, sidecars=decode)
    given = {"relative_to": relative_to, "sidecars": extensions, "checksum": checksum}
    return reader.with_options(**{name: value for name, value in given.items() if value})


def _choose_row_maker(
    fn: BatchFunction | None,
    reader: ImageReaderStage,
    meta: pd.DataFrame | None,
    columns: MetadataColumns,
) -> RowMaker:
    if fn is None:
        return MetadataRows(replace(columns, checksum=reader.checksum))
    if columns.sidecars:
        raise ValueError(
            "sidecars: columns of the metadata, not of a function's rows: it finds what sidecars "
            "hold in image.metadata"
        )
    if not reader.decode:
        raise ValueError("a function of images needs a reader with decode=True")
    meta = getattr(fn, "meta", None) if meta is None else meta
    return FunctionRows(fn, reader.on_error, None if meta is None else read_meta(meta))


def _open_folder(
    out: str, storage_options: dict[str, Any], out_options: dict[str, Any] | None
) -> JobFolder:
    if out_options is None:
        out_options = {} if is_local(out) else storage_options
    return JobFolder(resolve_path(os.path.expanduser(out)), out_options)


def _find_wanted(plan: Plan, retry_failed: bool) -> tuple[bytearray, Count]:
    """Return 1 for each partition that is to be done, and the count of the others."""
    wanted = bytearray(not done for done in plan.folder.mark_done(plan.partitions))
    total = Count()
    parts = (number for number, missing in enumerate(bytes(wanted)) if not missing)
    for number, footer in plan.folder.read_footers(parts):
        if footer is None or footer.job != plan.job_id or (retry_failed and footer.failed):
            wanted[number] = 1
        else:
            total += footer.count()
    return wanted, total


def _check_parts(plan: Plan) -> None:
    """Raise JobError if a part is missing that a worker has written."""
    if not all(plan.folder.mark_done(plan.partitions)):
        raise JobError(
            f"what workers wrote is not in {redact_url(plan.folder.url)}: give a folder that "
            "client and workers share"
        )


@contextmanager
def raise_job_errors() -> Iterator[None]:
    """Raise JobError where the scheduler or all workers are lost."""
    try:
        yield
    except CancelledError:
        raise JobError("the scheduler was lost") from None
    except NoWorkersError as error:
        raise JobError(str(error)) from None


def _write_parts(
    client: Client,
    writer: PartWriter,
    plan: Plan,
    wanted: bytearray,
    retries: int,
    progress: Progress,
) -> Count:
    """Do the partitions that are wanted on the cluster; return the count of their images.

    Raises
    ------
    JobError
        If tasks end in errors that are not an image's; their partitions are still to be done.
    """
    total = Count()
    errors: list[str] = []
    tasks = run_tasks(
        client,
        writer,
        plan.iterate_tasks(wanted),
        pure=False,
        retries=retries,
        smallest_window=_SMALLEST_WINDOW,
        **writer.reader.annotations(client),
    )
    for ended, ((number, task), result) in enumerate(tasks, 1):
        if isinstance(result, KilledWorker):
            result = writer.write_lost(number, task, result)
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
        progress.update(ended - len(errors), total.images, total.failed)
    if errors:
        raise JobError(
            f"{len(errors)} partitions could not be done, such as {errors[0]}. The same call tries "
            "them again"
        )
    return total
