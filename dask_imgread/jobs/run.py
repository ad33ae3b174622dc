"""Batch jobs: read shards on a cluster and write a Parquet dataset, resumed where they stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, Unpack

import pandas as pd
from distributed import Client

from dask_imgread.cluster.start import connect_client, end_unguarded_worker, wait_for_workers
from dask_imgread.errors import JobError, NoWorkersError
from dask_imgread.jobs.claim import claim_folder
from dask_imgread.jobs.description import describe_job
from dask_imgread.jobs.execution import Execution
from dask_imgread.jobs.folder import JobFolder, resolve_out
from dask_imgread.jobs.forecast import Forecast, forecast
from dask_imgread.jobs.merge import PartMerger
from dask_imgread.jobs.plan import Inputs, look_up_plan, prepare_plan
from dask_imgread.jobs.row_makers import FunctionRows, MetadataRows, RowMaker
from dask_imgread.jobs.schema import SchemaFinder, read_meta
from dask_imgread.jobs.writer import PartSink, PartWriter
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.rows import BatchFunction
from dask_imgread.shards.find import Paths, find_shards
from dask_imgread.shards.frames import is_frame
from dask_imgread.shards.partition import Division, Partitioning
from dask_imgread.sidecars import MetadataColumns, Sidecars
from dask_imgread.tasks import count_images, count_shards
from dask_imgread.texts import render_table


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
        How many partitions the job has, those of shards that are gone included.
    new_images, new_failed, new_partitions
        The same numbers for this run alone; shards that are read again count as partitions.
    seconds
        How long this run took, finding the shards included.
    images_per_second
        The images of this run, failed ones included, for each second in which it read
        partitions; 0 if there was nothing left to do.
    decoded
        Whether pixels were decoded. If not, only headers were read, and images that seem fine
        may be broken.
    new_shards, changed_shards
        How many shards are new or have changed since the last run.
    gone_shards
        How many shards are gone. Their rows are counted among the others.

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
    new_shards: int = 0
    changed_shards: int = 0
    gone_shards: int = 0

    def __repr__(self) -> str:
        """Return a line with the numbers that matter most."""
        failed = f" ({self.function_failed:,} in the function)" if self.function_failed else ""
        headers = "" if self.decoded else "; only headers were read"
        partitions = f"{self.new_partitions:,} of {self.partitions:,} partitions in this run"
        return (
            f"<{type(self).__name__}: {count_images(self.images, self.failed)}{failed}; "
            f"{partitions}, {self.seconds:.1f} s{headers}>"
        )

    def _repr_html_(self) -> str:
        new = count_images(self.new_images, self.new_failed)
        rows = {
            "images": f"{self.images:,}",
            "failed": f"{self.failed:,}",
            "of which in the function": f"{self.function_failed:,}" * bool(self.function_failed),
            "partitions": f"{self.partitions:,}",
            "shards": count_shards(self.new_shards, self.changed_shards, self.gone_shards),
            "in this run": f"{new}; {self.new_partitions:,} partitions",
            "seconds": f"{self.seconds:,.1f}",
            "images/s": f"{self.images_per_second:,.1f}" * bool(self.images_per_second),
            "pixels": "" if self.decoded else "not decoded: only headers were read",
        }
        return render_table([row for row in rows.items() if row[1]], type(self).__name__)


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
    update: bool = False,
    prune: bool = False,
    overwrite: bool = False,
    rows_per_file: int | None = None,
    progress: bool = False,
    relative_to: str | None = None,
    **partitioning: Unpack[Partitioning],
) -> Summary:
    """Read shards on a cluster and write a row for each image, or what a function makes of them.

    The output is a Parquet dataset of one file for each partition. The worker that read the
    partition writes its file, in one piece or not at all. A job that was killed, at any moment,
    and is called again does what is missing, and nothing twice. Only a window of tasks is in
    flight at any time.

    With ``update`` the same call follows a set that changes. Whoever reads the dataset meanwhile
    sees each image once, as it was or as it is now. (Of a function whose rows have no ``image_id``
    that holds only for shards that are not cut into several partitions.)

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
    update
        Read the shards that are new, read those again that have changed, and leave the others
        unopened. If the function was edited, all are read again. Shards that are gone keep their
        rows.
    prune
        Remove the rows of shards that are gone; only with ``update``.
    overwrite
        Remove what another job has written to ``out``, and begin anew.
    rows_per_file
        Merge partitions at the end into files of so many rows, or fewer; a partition with more is
        one file. Rows of a new partition are in the dataset only then. If not given, each partition
        is a file.
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
        The numbers of the whole output, and of this run.

    Raises
    ------
    OtherJobError
        If ``out`` holds the output of other shards, of other options or of another function, or
        if another process works on it (``FolderInUseError``); a ValueError.
    FileExistsError
        If ``out`` holds files that no job has written.
    FileNotFoundError
        If a path does not exist, or a folder or a glob has no shards.
    PermissionError, StorageError
        If a store denies access, or can't be reached.
    ValueError
        If more than one way to divide shards is given, or a number below 1, if ``prune`` is given
        without ``update``, if ``fn`` is given
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
    end_unguarded_worker()  # before it finds that the folder is in use
    _check_prune(update, prune)
    job = _Job.of(
        paths,
        out,
        fn,
        reader=reader,
        meta=meta,
        sidecars=sidecars,
        checksum=checksum,
        storage_options=storage_options,
        out_options=out_options,
        relative_to=relative_to,
        rows_per_file=rows_per_file,
        **partitioning,
    )
    with claim_folder(job.inputs.folder) as claim:
        plan, changes = prepare_plan(job.inputs, overwrite=overwrite, update=update, prune=prune)
        run = Execution(plan, changes, retry_failed, claim.token)
        if run.work:
            with raise_job_errors(), choose_client(client, job.reader) as opened:
                wait_for_workers(opened)  # what they declare decides what tasks request
                run.begin()
                tasks = (partition.task for partition in run.iterate_partitions())
                finder = SchemaFinder(opened, plan.folder, job.reader, tasks)
                sink = PartSink(
                    plan.folder,
                    plan.job_id,
                    claim.token,
                    job.row_maker.find_schema(finder),
                    job.row_maker.keeps_records,
                )
                writer, merger = PartWriter(sink, job.reader, job.row_maker), PartMerger(sink)
                run.prune(opened, merger, retries, hidden=not progress)
                run.read(opened, writer, retries, hidden=not progress)
                run.merge(opened, merger, retries, hidden=not progress)
        run.finish()
    return Summary(
        **asdict(run.count()),
        **run.describe(),
        partitions=len(plan.partitions),
        seconds=time.monotonic() - start,
        decoded=job.reader.decode,
        new_shards=len(changes.new),
        changed_shards=len(changes.changed),
        gone_shards=plan.gone,
    )


def forecast_job(
    paths: Paths,
    out: str | os.PathLike[str],
    fn: BatchFunction | None = None,
    *,
    retry_failed: bool = False,
    update: bool = False,
    prune: bool = False,
    overwrite: bool = False,
    **options: Unpack[JobOptions],
) -> Forecast:
    """Say what ``run_job`` would do, without a cluster, and without opening a shard.

    Parameters
    ----------
    paths, out, fn, retry_failed, update, prune, overwrite, **options
        As for ``run_job``.

    Returns
    -------
    Forecast
        What would be read; and how long that takes, if an earlier run lets one expect it.

    Raises
    ------
    OtherJobError, FileNotFoundError, ValueError
        As ``run_job`` does.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> shards = make_shards("shards", shards=2, images_per_shard=4)
    >>> forecast = forecast_job(shards, "out")
    >>> forecast.shards, forecast.partitions, forecast.seconds
    (2, 2, None)
    """
    _check_prune(update, prune)
    job = _Job.of(paths, out, fn, **options)
    plan, changes = look_up_plan(job.inputs, overwrite=overwrite, update=update, prune=prune)
    return forecast(plan, changes, retry_failed)


class JobOptions(Partitioning, total=False):
    """Keyword arguments of ``run_job`` that decide what its rows are."""

    reader: ImageReaderStage | None
    meta: pd.DataFrame | None
    sidecars: Sidecars | None
    checksum: bool
    storage_options: dict[str, Any] | None
    out_options: dict[str, Any] | None
    relative_to: str | None
    rows_per_file: int | None


@dataclass(frozen=True)
class _Job:
    """What is to be planned, and how the shards are read and made into rows."""

    inputs: Inputs
    reader: ImageReaderStage
    row_maker: RowMaker

    @classmethod
    def of(
        cls,
        paths: Paths,
        out: str | os.PathLike[str],
        fn: BatchFunction | None,
        *,
        reader: ImageReaderStage | None = None,
        meta: pd.DataFrame | None = None,
        sidecars: Sidecars | None = None,
        checksum: bool = False,
        storage_options: dict[str, Any] | None = None,
        out_options: dict[str, Any] | None = None,
        relative_to: str | None = None,
        rows_per_file: int | None = None,
        **partitioning: Unpack[Partitioning],
    ) -> Self:
        """Check the arguments of ``run_job``, and find the shards."""
        if is_frame(paths):
            raise ValueError(
                "run_job reads whole shards: for the rows of a frame use map_images(fn, frame), or "
                "write_shards first"
            )
        division = Division.of("run_job", partitioning)
        if rows_per_file is not None and rows_per_file < 1:
            raise ValueError(f"rows_per_file must be at least 1, not {rows_per_file!r}")
        columns = MetadataColumns.parse(sidecars)
        reader = _choose_reader(reader, fn is not None, relative_to, columns.extensions, checksum)
        row_maker = _choose_row_maker(fn, reader, meta, columns)
        options = storage_options or {}
        folder = JobFolder(*resolve_out(out, options, out_options))
        shards = find_shards(paths, options)
        description = describe_job(reader, row_maker, rows_per_file)
        return cls(Inputs(folder, shards, description, division, options), reader, row_maker)


def _check_prune(update: bool, prune: bool) -> None:
    if prune and not update:
        raise ValueError("prune removes rows of shards that are gone: only with update=True")


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
    relative_to = None if relative_to is None else os.fspath(relative_to)
    given = {"relative_to": relative_to, "sidecars": extensions, "checksum": checksum}
    return reader.with_options(**{name: value for name, value in given.items() if value})


def _choose_row_maker(
    fn: BatchFunction | None,
    reader: ImageReaderStage,
    meta: pd.DataFrame | None,
    columns: MetadataColumns,
) -> RowMaker:
    if fn is None:
        return MetadataRows(replace(columns, digests=reader.digests))
    if columns.sidecars:
        raise ValueError(
            "sidecars: columns of the metadata, not of a function's rows: it finds what sidecars "
            "hold in image.metadata"
        )
    if not reader.decode:
        raise ValueError("a function of images needs a reader with decode=True")
    meta = getattr(fn, "meta", None) if meta is None else meta
    return FunctionRows(fn, reader.on_error, None if meta is None else read_meta(meta))


@contextmanager
def raise_job_errors() -> Iterator[None]:
    """Raise JobError where the scheduler or all workers are lost."""
    try:
        yield
    except CancelledError:
        raise JobError("the scheduler was lost") from None
    except NoWorkersError as error:
        raise JobError(str(error)) from None
