"""Divide shards into tasks, each of whole shards or of a part of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypedDict, Unpack

from dask_imgread.hints import check_keywords
from dask_imgread.reading.options import ReaderOptions
from dask_imgread.shards.ahead import SHARDS_AT_ONCE
from dask_imgread.shards.find import Paths, Shard, find_shards
from dask_imgread.shards.frames import divide_rows, group_by_shard, is_frame, is_lazy, open_frame
from dask_imgread.shards.samples import cut_at_samples, index_members
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import NotTarError, walk_members
from dask_imgread.storage.filesystems import is_local, resolve_path
from dask_imgread.tasks import FileGroupTask, adopt_task, is_task

if TYPE_CHECKING:
    from dask_imgread.shards.frames import Frame

PathsOrTasks: TypeAlias = "Paths | FileGroupTask | Iterable[FileGroupTask] | Frame"

_FOR_READERS = {
    field.name: f"it is an option of the reader: reader=ImageReaderStage({field.name}=...)"
    for field in fields(ReaderOptions)
}


class Partitioning(TypedDict, total=False):
    """How shards are divided into tasks: at most one of these; see ``partition_shards``."""

    files_per_partition: int | None
    images_per_partition: int | None
    blocksize: int | None


class PartitionOptions(Partitioning, total=False):
    """All keyword arguments of ``partition_shards``."""

    storage_options: dict[str, Any] | None
    limit: int | None
    dataset_name: str
    relative_to: str | None


def partition_shards(
    paths: Paths | Frame,
    *,
    files_per_partition: int | None = None,
    images_per_partition: int | None = None,
    blocksize: int | None = None,
    storage_options: dict[str, Any] | None = None,
    limit: int | None = None,
    dataset_name: str = "",
    relative_to: str | None = None,
) -> list[FileGroupTask]:
    """Find shards and divide them into tasks, on the client.

    Given a frame of rows, as ``read_metadata`` makes them, only its images are read, and nothing
    else of their shards.

    At most one of ``files_per_partition``, ``images_per_partition`` and ``blocksize`` may be
    given; without any, each shard is a task.

    Parameters
    ----------
    paths
        A file, a folder (searched recursively for ``.tar``, ``.tar.gz``, ``.tgz`` and
        ``.tar.zst``), a glob, a brace range such as ``{00000..00099}.tar``, a URL that
        fsspec supports, or a list of these. Or a frame of pandas or Dask (which is computed), or
        the output folder of a job, with at least the columns ``shard``, ``offset`` and ``size``,
        and ``image_id`` or ``key``. A row that names no image is recorded as failed when it is
        read, and one whose ``shard_version`` is not the shard's any more, as ``changed shard``;
        without that column nothing is compared. Further columns become ``metadata``.
    files_per_partition
        Number of whole shards per task; of a frame, those of its images.
    images_per_partition
        Approximate number of images per task. A shard with more is split into several tasks,
        each of which reads only its part of the file; samples are never split. For this, the
        call itself reads the shards' headers. A compressed shard can't be split. Of a frame it is
        the exact number, and nothing is read.
    blocksize
        Approximate number of bytes per task: small shards are grouped, larger ones are split as
        with ``images_per_partition``.
    storage_options
        Options for fsspec's file system, such as credentials.
    limit
        Maximum number of tasks; further ones are left out.
    dataset_name
        A name for the dataset, stored in the tasks and their batches.
    relative_to
        A folder or URL that contains the shards: their ids are then made from paths relative to
        it, not from absolute ones.

    Returns
    -------
    list of FileGroupTask
        In the order of ``paths``; the shards of a folder or a glob in the order of their names,
        those of a frame in the order of its rows.

    Raises
    ------
    FileNotFoundError
        If a path does not exist, or a folder or a glob has no shards.
    PermissionError, StorageError
        If a store denies access, or can't be reached.
    ValueError
        If more than one way to divide shards is given, or a number below 1, if a shard is not
        in ``relative_to``, or if a frame lacks columns.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> shards = make_shards("shards", shards=4, images_per_shard=6)
    >>> len(partition_shards("shards", files_per_partition=3))
    2
    >>> len(partition_shards(shards, images_per_partition=2))
    12
    >>> from dask_imgread import read_metadata
    >>> rows = read_metadata(shards).compute(scheduler="sync")
    >>> [len(task.rows) for task in partition_shards(rows[rows.key < "000008"])]
    [6, 2]
    """
    division = Division(files_per_partition, images_per_partition, blocksize)
    _check_positive("limit", limit)
    frame = open_frame(paths, storage_options)
    if frame is None:
        shards = find_shards(paths, storage_options)
        divided = divide_shards(shards, division, storage_options)
    else:
        rows = frame.compute() if is_lazy(frame) else frame
        divided = divide_rows(rows, _make_config(storage_options), **asdict(division))
    chosen = list(islice(divided, limit))
    config = {} if relative_to is None else {"relative_to": os.fspath(relative_to)}
    tasks = [
        replace(
            task,
            task_id=f"file_group_{number}",
            dataset_name=dataset_name,
            reader_config=task.reader_config | config,
        )
        for number, task in enumerate(chosen)
    ]
    if relative_to is not None:
        for task in tasks:
            task.name_shards()  # raises if a shard is not in relative_to
    return tasks


@dataclass(frozen=True)
class Division:
    """A validated ``Partitioning``."""

    files_per_partition: int | None = None
    images_per_partition: int | None = None
    blocksize: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        given = {name: number for name, number in asdict(self).items() if number is not None}
        for name, number in given.items():
            _check_positive(name, number)
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} can't be given together: they divide differently; give one"
            )

    @classmethod
    def of(cls, function: str, partitioning: Partitioning) -> Self:
        """Make one from the keyword arguments of a function.

        Raises
        ------
        TypeError
            If the function has no such argument.
        """
        check_keywords(function, partitioning, Partitioning.__optional_keys__, _FOR_READERS)
        return cls(**partitioning)


def _check_positive(name: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ValueError(f"{name} must be at least 1, not {number!r}")


def divide_shards(
    shards: list[Shard], division: Division, storage_options: dict[str, Any] | None = None
) -> Iterator[FileGroupTask]:
    """Yield tasks that read some shards, in the shards' order; they are made lazily."""
    config = _make_config(storage_options)
    if division.images_per_partition is not None:
        return _cut_by_images(shards, division.images_per_partition, config)
    if division.blocksize is not None:
        return _divide_by_bytes(shards, division.blocksize, config)
    return _group(shards, division.files_per_partition or 1, config)


def _make_config(storage_options: dict[str, Any] | None) -> dict[str, Any]:
    return {"storage_options": storage_options} if storage_options else {}


def list_tasks(
    paths_or_tasks: PathsOrTasks, **partitioning: Unpack[PartitionOptions]
) -> list[FileGroupTask]:
    """Return tasks as they are; divide paths into tasks with ``partition_shards``."""
    known = PartitionOptions.__optional_keys__
    check_keywords("partition_shards", partitioning, known, _FOR_READERS)
    if is_task(paths_or_tasks):
        return [adopt_task(paths_or_tasks)]
    frame = is_frame(paths_or_tasks)
    if not frame and not isinstance(paths_or_tasks, str) and isinstance(paths_or_tasks, Iterable):
        paths_or_tasks = list(paths_or_tasks)
        if all(map(is_task, paths_or_tasks)):
            if any(value is not None for value in partitioning.values()):
                raise ValueError(
                    f"{', '.join(partitioning)}: for paths, not for tasks already made"
                )
            return list(map(adopt_task, paths_or_tasks))
    return partition_shards(paths_or_tasks, **partitioning)


def _group(shards: list[Shard], count: int, config: dict[str, Any]) -> Iterator[FileGroupTask]:
    for start in range(0, len(shards), count):
        yield _make_task(shards[start : start + count], config)


def _make_task(shards: list[Shard], config: dict[str, Any]) -> FileGroupTask:
    return FileGroupTask(
        data=[shard.path for shard in shards],
        reader_config=config,
        versions=tuple(shard.version for shard in shards),
        sizes=tuple(shard.size for shard in shards),
    )


def split_task(task: FileGroupTask) -> Iterator[FileGroupTask]:
    """Yield a task for each shard of a task."""
    if len(task.data) == 1:
        yield task
        return
    rows = None if task.rows is None else group_by_shard(task.rows)
    for number, path in enumerate(task.data):
        yield replace(
            task,
            data=[path],
            versions=task.versions[number : number + 1],
            sizes=task.sizes[number : number + 1],
            rows=None if rows is None else rows[resolve_path(path)],
        )


def _cut_by_images(
    shards: list[Shard], count: int, config: dict[str, Any]
) -> Iterator[FileGroupTask]:
    def cut(shard: Shard) -> list[FileGroupTask]:
        return list(_cut(shard, count, config))

    if all(is_local(shard.path) for shard in shards):
        for shard in shards:  # walking local headers is bound by the GIL: threads don't help
            yield from cut(shard)
        return
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for tasks in pool.map(cut, shards):
            yield from tasks


def _cut(
    shard: Shard, images: int | None, config: dict[str, Any], blocksize: int = 0
) -> Iterator[FileGroupTask]:
    """Yield tasks for the parts of one shard, with about as many images, or bytes, in each."""
    task = _make_task([shard], config)
    try:
        with open_shard(
            shard.path, config.get("storage_options"), size=shard.size, skipping=True
        ) as source:
            if source.sequential:
                yield task
                return
            index = index_members(walk_members(source))
    except (OSError, NotTarError):  # the reader will record it
        yield task
        return
    if images is None:
        parts = -(-(shard.size or 0) // blocksize)
        images = max(1, -(-len(index.images) // max(1, parts)))
    for part in cut_at_samples(index, images):
        if part == (0, None):
            yield task
        else:
            yield replace(
                task, byte_range=part, index=index.cut(*part) if index.scattered else None
            )


def _divide_by_bytes(
    shards: list[Shard], blocksize: int, config: dict[str, Any]
) -> Iterator[FileGroupTask]:
    group: list[Shard] = []
    total = 0
    for shard in shards:
        size = shard.size or 0
        if group and total + size > blocksize:
            yield _make_task(group, config)
            group, total = [], 0
        if size > blocksize:
            yield from _cut(shard, None, config, blocksize)
        else:
            group.append(shard)
            total += size
    if group:
        yield _make_task(group, config)
