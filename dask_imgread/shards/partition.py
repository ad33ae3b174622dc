"""Divide shards into tasks: the shards, or the part of one, that are read together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Self, TypeAlias, TypedDict, Unpack

from dask_imgread.shards.find import Paths, Shard, find_shards
from dask_imgread.shards.samples import cut_at_samples, index_members
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import NotTarError, walk_members
from dask_imgread.storage.filesystems import is_local
from dask_imgread.tasks import FileGroupTask

PathsOrTasks: TypeAlias = Paths | FileGroupTask | Iterable[FileGroupTask]

_WALKERS = 8  # shards whose headers are read at the same time


class Partitioning(TypedDict, total=False):
    """How shards are divided into tasks: one of these, or none; see ``partition_shards``."""

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
    paths: Paths,
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

    One of ``files_per_partition``, ``images_per_partition`` and ``blocksize`` may be
    given; without any, each shard is a task.

    Parameters
    ----------
    paths
        A file, a folder (searched recursively for ``.tar``, ``.tar.gz``, ``.tgz`` and
        ``.tar.zst``), a glob, a brace range such as ``{00000..00099}.tar``, a URL that
        fsspec knows, or a list of these.
    files_per_partition
        Whole shards in a task.
    images_per_partition
        Images in a task, about: a shard with more is cut into several tasks, each of
        which reads only its part of the file. Samples are never cut. The shards' headers
        are read for this, here and now. A compressed shard can't be cut.
    blocksize
        Bytes of shards in a task, about: small shards are put together, and larger ones
        cut as with ``images_per_partition``.
    storage_options
        Options for fsspec's file system, such as credentials.
    limit
        The number of tasks, at most; the rest is left out.
    dataset_name
        A name that the tasks and their batches carry.
    relative_to
        A folder or URL below which the shards lie: their ids are made from their paths below
        it, and not from their whole paths.

    Returns
    -------
    list of FileGroupTask
        In the order of ``paths``; a folder's or a glob's shards by name.

    Raises
    ------
    FileNotFoundError
        If a path, or all that a folder or a glob stands for, does not exist.
    PermissionError, StorageError
        If a store refuses to tell what is there, or can't be reached.
    ValueError
        If more than one way to divide is given, or a number below 1, or if a shard does
        not lie below ``relative_to``.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> shards = make_shards("shards", shards=4, images_per_shard=6)
    >>> len(partition_shards("shards", files_per_partition=3))
    2
    >>> len(partition_shards(shards, images_per_partition=2))
    12
    """
    division = Division(files_per_partition, images_per_partition, blocksize)
    _check_positive("limit", limit)
    shards = find_shards(paths, storage_options)
    chosen = list(islice(divide_shards(shards, division, storage_options), limit))
    for number, task in enumerate(chosen):
        task.task_id = f"file_group_{number}"
        task.dataset_name = dataset_name
        if relative_to is not None:
            task.reader_config = task.reader_config | {"relative_to": os.fspath(relative_to)}
            task.name_shards()  # or raise, here and now
    return chosen


@dataclass(frozen=True)
class Division:
    """A ``Partitioning`` whose values are checked."""

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
        """Make one of a function's keyword arguments.

        Raises
        ------
        TypeError
            If the function has no such argument, with the message that Python itself gives.
        """
        for name in partitioning:
            if name not in Partitioning.__optional_keys__:
                raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        return cls(**partitioning)


def _check_positive(name: str, number: int | None) -> None:
    if number is not None and number < 1:
        raise ValueError(f"{name} must be at least 1, not {number!r}")


def divide_shards(
    shards: list[Shard], division: Division, storage_options: dict[str, Any] | None = None
) -> Iterator[FileGroupTask]:
    """Yield the tasks of some shards, in the shards' order, each made when it is taken."""
    config = {"storage_options": storage_options} if storage_options else {}
    if division.images_per_partition is not None:
        return _cut_by_images(shards, division.images_per_partition, config)
    if division.blocksize is not None:
        return _divide_by_bytes(shards, division.blocksize, config)
    return _group(shards, division.files_per_partition or 1, config)


def list_tasks(
    paths_or_tasks: PathsOrTasks, **partitioning: Unpack[PartitionOptions]
) -> list[FileGroupTask]:
    """Return tasks as they are; divide paths into tasks with ``partition_shards``."""
    if isinstance(paths_or_tasks, FileGroupTask):
        return [paths_or_tasks]
    if not isinstance(paths_or_tasks, str) and isinstance(paths_or_tasks, Iterable):
        paths_or_tasks = list(paths_or_tasks)  # type: ignore[assignment]
        if all(isinstance(item, FileGroupTask) for item in paths_or_tasks):
            if any(value is not None for value in partitioning.values()):
                raise ValueError(
                    f"{', '.join(partitioning)}: for paths, not for tasks already made"
                )
            return paths_or_tasks  # type: ignore[return-value]
    return partition_shards(paths_or_tasks, **partitioning)  # type: ignore[arg-type]


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


def _cut_by_images(
    shards: list[Shard], count: int, config: dict[str, Any]
) -> Iterator[FileGroupTask]:
    def cut(shard: Shard) -> list[FileGroupTask]:
        return list(_cut(shard, count, config))

    if all(is_local(shard.path) for shard in shards):
        for shard in shards:  # a walk is Python's own work: threads would wait for each other
            yield from cut(shard)
        return
    with ThreadPoolExecutor(_WALKERS) as pool:
        for tasks in pool.map(cut, shards):
            yield from tasks


def _cut(
    shard: Shard, images: int | None, config: dict[str, Any], blocksize: int = 0
) -> Iterator[FileGroupTask]:
    """Yield tasks for the parts of one shard, cut by a number of images or of bytes."""
    task = _make_task([shard], config)
    try:
        with open_shard(
            shard.path, config.get("storage_options"), size=shard.size, skipping=True
        ) as source:
            if source.compressed:
                yield task
                return
            index = index_members(walk_members(source))
    except (OSError, NotTarError):  # the reader will say so, where it can be recorded
        yield task
        return
    if images is None:
        parts = -(-(shard.size or 0) // blocksize)
        images = max(1, -(-len(index.images) // max(1, parts)))
    for byte_range in cut_at_samples(index, images):
        yield FileGroupTask(
            data=task.data,
            reader_config=config,
            byte_range=None if byte_range == (0, None) else byte_range,
            index_whole_shard=index.scattered,
            versions=task.versions,
            sizes=task.sizes,
        )


def _divide_by_bytes(
    shards: list[Shard], blocksize: int, config: dict[str, Any]
) -> Iterator[FileGroupTask]:
    together: list[Shard] = []
    total = 0
    for shard in shards:
        size = shard.size or 0
        if together and total + size > blocksize:
            yield _make_task(together, config)
            together, total = [], 0
        if size > blocksize:
            yield from _cut(shard, None, config, blocksize)
        else:
            together.append(shard)
            total += size
    if together:
        yield _make_task(together, config)
