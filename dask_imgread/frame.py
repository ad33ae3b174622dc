"""Images as rows of a Dask DataFrame."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import dask
import dask.dataframe as dd
import pandas as pd
from dask.base import tokenize
from distributed.protocol import pickle

from dask_imgread.partition import PathsOrTasks, list_tasks
from dask_imgread.reader import ImageReaderStage
from dask_imgread.tasks import FileGroupTask, ImageBatch, make_frame

if TYPE_CHECKING:
    from dask.dataframe import DataFrame

BatchFunction = Callable[[ImageBatch], pd.DataFrame]


def read_metadata(
    paths_or_tasks: PathsOrTasks,
    *,
    reader: ImageReaderStage | None = None,
    decode: bool = False,
    **partitioning: Any,
) -> DataFrame:
    """Make a lazy DataFrame with one row for each image member, indexed by ``image_id``.

    Parameters
    ----------
    paths_or_tasks
        Shards, as ``partition_shards`` takes them, or the tasks that it made.
    reader
        The reader; ``ImageReaderStage()`` if not given.
    decode
        By default only headers are read, which is many times faster. If True, each image
        is decoded, and ``error`` says which can't be.
    **partitioning
        Options of ``partition_shards``, for paths.

    Returns
    -------
    dask.dataframe.DataFrame
        With the columns and dtypes of ``dask_imgread.tasks.COLUMNS``: ``image_path``,
        ``shard``, ``key``, ``offset``, ``size`` (bytes), ``format``, ``width``, ``height``
        (pixels, upright), ``channels``, ``backend``, ``error``, ``warning``. An image that
        can't be read has its row too, with ``error`` set.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> frame = read_metadata(make_shards("shards", shards=2, images_per_shard=3))
    >>> len(frame), int(frame.width.max().compute(scheduler="sync"))
    (6, 128)
    """
    reader = replace(reader or ImageReaderStage(), decode=decode)
    if not decode:
        reader = replace(reader, sidecars=False)
    return map_images(to_rows, paths_or_tasks, reader=reader, meta=make_frame([]), **partitioning)


def map_images(
    fn: BatchFunction,
    paths_or_tasks: PathsOrTasks,
    *,
    reader: ImageReaderStage | None = None,
    meta: pd.DataFrame,
    **partitioning: Any,
) -> DataFrame:
    """Make a lazy DataFrame of what ``fn`` returns for each batch of images.

    ``fn`` runs where the images are decoded, in the same task, batch by batch: pixels
    never leave it, and no more than a few batches are in memory at once.

    Parameters
    ----------
    fn
        Takes an ``ImageBatch`` and returns a DataFrame with the columns of ``meta``.
        It sees failed images too, in ``batch.failed``.
    paths_or_tasks
        Shards, as ``partition_shards`` takes them, or the tasks that it made.
    reader
        The reader; ``ImageReaderStage()`` if not given.
    meta
        An empty DataFrame with the columns, dtypes and index of what ``fn`` returns.
    **partitioning
        Options of ``partition_shards``, for paths.

    Returns
    -------
    dask.dataframe.DataFrame
        One partition for each task.

    Examples
    --------
    >>> import pandas as pd
    >>> from dask_imgread.testing import make_shards
    >>> def brightness(batch):
    ...     ids = pd.Index([image.image_id for image in batch.data], name="image_id")
    ...     return pd.DataFrame({"mean": [i.image_data.mean() for i in batch.data]}, index=ids)
    >>> meta = pd.DataFrame({"mean": pd.Series(dtype=float)}, index=pd.Index([], name="image_id"))
    >>> frame = map_images(brightness, make_shards("shards"), meta=meta)
    >>> frame["mean"].compute(scheduler="sync").between(0, 255).all()
    np.True_
    """
    tasks = list_tasks(paths_or_tasks, **partitioning)
    if not tasks:
        return dd.from_pandas(meta, npartitions=1)
    # The rows have the types of `meta` already: Dask would add a second task to each partition,
    # to turn objects into strings.
    with dask.config.set({"dataframe.convert-string": False}):
        read = PartitionReader(reader or ImageReaderStage(), fn, meta)
        return dd.from_map(read, tasks, meta=meta, enforce_metadata=False, label="map-images")


def to_rows(batch: ImageBatch) -> pd.DataFrame:
    """Return a batch's metadata."""
    return batch.to_frame()


class PartitionReader:
    """Reads one task, and returns the rows of all its batches.

    Every task of a frame has one. It is pickled once for all of them, and unpickled on workers
    alone: pickling a function anew for each task takes the scheduler longer than all else.

    Parameters
    ----------
    reader
        The reader.
    fn
        What makes the rows of a batch.
    empty
        The rows of a task without any batch.
    """

    def __init__(self, reader: ImageReaderStage, fn: BatchFunction, empty: pd.DataFrame) -> None:
        self._parts = reader, fn, empty

    def __call__(self, task: FileGroupTask) -> pd.DataFrame:
        """Read a task."""
        reader, fn, empty = self._parts
        rows = [fn(batch) for batch in reader.read(task)]
        return pd.concat(rows) if rows else empty

    def __dask_tokenize__(self) -> object:
        """Name what is read, alike in every process."""
        return type(self).__name__, tokenize(self._parts)

    @functools.cached_property
    def _pickled(self) -> bytes:
        pickled: bytes = pickle.dumps(self._parts)
        return pickled

    def __reduce__(self) -> tuple[type[_PickledReader], tuple[bytes]]:
        """Pickle as something that stays pickled until it is called."""
        return _PickledReader, (self._pickled,)


class _PickledReader:
    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __call__(self, task: FileGroupTask) -> pd.DataFrame:
        return PartitionReader(*pickle.loads(self._pickled))(task)
