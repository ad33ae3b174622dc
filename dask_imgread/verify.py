"""Decode every image, keep none, and report those that are broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import pandas as pd
from dask.system import CPU_COUNT
from distributed.scheduler import KilledWorker

from dask_imgread.cluster.start import wait_for_workers
from dask_imgread.cluster.window import run_tasks
from dask_imgread.progress import choose_progress
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.reading.records import describe_lost_shards
from dask_imgread.shards.partition import PartitionOptions, PathsOrTasks, list_tasks
from dask_imgread.storage.filesystems import resolve_path
from dask_imgread.storage.redaction import redact_url
from dask_imgread.tasks import FileGroupTask, ImageObject, make_frame

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify_shards` found. As text, a table of the shards with bad images.

    Parameters
    ----------
    bad
        One row for each image that can't be read and for each place at which a shard is
        damaged, with the columns of ``dask_imgread.tasks.COLUMNS``, indexed by ``image_id``.
    table
        One row for each shard: ``good`` images, and the number of each cause of failure.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> found = verify_shards(make_shards("shards", shards=2, images_per_shard=3, broken=1))
    >>> found.ok, int(found.table["truncated"].sum())
    (False, 1)
    >>> found
    <Verification: 5 good images in 2 shards: 1 bad, in 1 of them>
    """

    bad: pd.DataFrame
    table: pd.DataFrame

    @property
    def ok(self) -> bool:
        """Whether nothing is bad."""
        return len(self.bad) == 0

    def __str__(self) -> str:
        """Return the table of shards with bad images, and the totals."""
        if self.ok:
            return self._summarize()
        total = self.table.sum().to_frame("total").T
        shown = pd.concat([self._find_bad_shards(), total]).rename_axis("shard")
        return f"{shown.to_string()}\n\n{self._summarize()}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._summarize()}>"

    def _find_bad_shards(self) -> pd.DataFrame:
        return self.table[self.table.drop(columns="good").sum(axis=1) > 0]

    def _summarize(self) -> str:
        bad_shards = len(self._find_bad_shards())
        verdict = "all good" if self.ok else f"{len(self.bad)} bad, in {bad_shards} of them"
        return f"{int(self.table['good'].sum())} good images in {len(self.table)} shards: {verdict}"


@dataclass(frozen=True)
class _TaskResult:
    """How many images of a task are good, and which are not."""

    good: Counter[str]  # by shard
    bad: list[ImageObject]


@dataclass(frozen=True)
class _Verify:
    """Decodes the images of one task and keeps only the records of bad ones."""

    reader: ImageReaderStage

    def isolated(self) -> _Verify:
        return _Verify(self.reader.isolated())

    def __call__(self, task: FileGroupTask) -> _TaskResult:
        good = Counter({redact_url(resolve_path(path)): 0 for path in task.data})
        bad: list[ImageObject] = []
        for batch in self.reader.read(task):
            good.update(image.shard for image in batch.data)
            bad += batch.failed
        return _TaskResult(good, bad)


def verify_shards(
    paths_or_tasks: PathsOrTasks,
    *,
    reader: ImageReaderStage | None = None,
    client: Client | None = None,
    progress: bool = False,
    **partitioning: Unpack[PartitionOptions],
) -> Verification:
    """Decode every image of some shards and report those that can't be read.

    Parameters
    ----------
    paths_or_tasks
        Shards, as ``partition_shards`` takes them, or the tasks that it made.
    reader
        The reader; ``ImageReaderStage()`` if not given. Failures are recorded, whatever its
        ``on_error`` is.
    client
        The cluster to work on; the threads of this process if not given.
    progress
        Show it on stderr: a bar on a terminal, else a line every ten seconds.
    **partitioning
        For paths, how they are divided: ``files_per_partition``, ``images_per_partition`` or
        ``blocksize``, and the other options of ``partition_shards``.

    Returns
    -------
    Verification
        The images that can't be read, and how many of each shard can.

    Raises
    ------
    FileNotFoundError, PermissionError, StorageError
        If ``partition_shards`` raises them for the paths.
    ValueError
        If ``partition_shards`` raises it, or if both tasks and ``partitioning`` are given.
    NoWorkersError
        If the cluster has no workers for too long; a TimeoutError.
    RuntimeError
        If the reader is to use a GPU where there is none, or no worker declares one.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> found = verify_shards(make_shards("shards", shards=2, images_per_shard=4, broken=1))
    >>> found.ok, list(found.bad.index.str[-10:]), found.table["good"].tolist()
    (False, ['000004.jpg'], [4, 3])
    """
    # Sidecars are read too: a broken one is logged as a warning.
    reader = reader or ImageReaderStage(verbose=False)
    verify = _Verify(reader.with_options(on_error="record"))
    tasks = list_tasks(paths_or_tasks, **partitioning)
    good: Counter[str] = Counter()
    bad: list[ImageObject] = []
    with choose_progress(len(tasks), hidden=not progress) as shown:
        for done, result in enumerate(_run(verify, tasks, client), 1):
            good.update(result.good)  # a Counter's update adds
            bad += result.bad
            shown.update(done, good.total(), len(bad))
    bad.sort(key=lambda image: (image.shard, image.offset))
    return Verification(make_frame(bad), _make_table(good, bad))


def _run(
    verify: _Verify, tasks: list[FileGroupTask], client: Client | None
) -> Iterator[_TaskResult]:
    if client is None:
        with ThreadPoolExecutor(CPU_COUNT) as pool:
            yield from pool.map(verify, tasks)
        return
    wait_for_workers(client)
    annotations = verify.reader.annotations(client)
    for task, result in run_tasks(client, verify, tasks, pure=False, **annotations):
        if isinstance(result, _TaskResult):
            yield result
        elif not isinstance(result, KilledWorker):
            raise result
        else:
            lost = describe_lost_shards(task, verify.reader.relative_to, result)
            yield _TaskResult(Counter(dict.fromkeys((image.shard for image in lost), 0)), lost)


def _make_table(good: Counter[str], bad: list[ImageObject]) -> pd.DataFrame:
    table = pd.DataFrame({"good": pd.Series(good, dtype="int64")}).sort_index()
    if bad:
        shards, causes = [image.shard for image in bad], [image.cause for image in bad]
        table = table.join(pd.crosstab(pd.Index(shards), pd.Index(causes))).fillna(0)
    return table.astype("int64").rename_axis("shard")
