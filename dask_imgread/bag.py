"""Images as a Dask bag."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dask.bag as db
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from dask_imgread.partition import PathsOrTasks, list_tasks
from dask_imgread.reader import ImageReaderStage
from dask_imgread.tasks import FileGroupTask, ImageBatch

if TYPE_CHECKING:
    from dask.bag import Bag


def read_bag(
    paths_or_tasks: PathsOrTasks, *, reader: ImageReaderStage | None = None, **partitioning: Any
) -> Bag:
    """Make a lazy bag of ImageBatch, one partition for each task.

    A partition is read batch by batch: what is mapped over the bag sees each batch as it
    is decoded, and only what it returns is kept. Without such a function the whole
    partition's pixels are held in memory.

    Parameters
    ----------
    paths_or_tasks
        Shards, as ``partition_shards`` takes them, or the tasks that it made.
    reader
        The reader; ``ImageReaderStage()`` if not given.
    **partitioning
        Options of ``partition_shards``, for paths.

    Returns
    -------
    dask.bag.Bag
        Of ``ImageBatch``.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> bag = read_bag(make_shards("shards", shards=2, images_per_shard=3))
    >>> bag.map(lambda batch: batch.num_items).sum().compute(scheduler="sync")
    6
    """
    reader = reader or ImageReaderStage()
    tasks = list_tasks(paths_or_tasks, **partitioning)
    if not tasks:
        return db.from_sequence([], npartitions=1)
    name = f"read-images-{tokenize(reader, tasks)}"
    # `reify` is what Dask's optimization takes away where a function follows, so that it streams.
    graph = {
        (name, number): (db.core.reify, (_stream, reader, task))
        for number, task in enumerate(tasks)
    }
    return db.Bag(HighLevelGraph.from_collections(name, graph), name, len(tasks))


def _stream(reader: ImageReaderStage, task: FileGroupTask) -> Iterator[ImageBatch]:
    return reader.read(task)
