"""Dask collections of images: a bag of batches, and DataFrames of rows."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from math import ceil
from typing import TYPE_CHECKING, Any, Unpack, cast

import dask
import dask.bag as db
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from dask.system import CPU_COUNT
from distributed import default_client
from distributed.protocol import pickle
from pandas.api.types import is_object_dtype

from dask_imgread.errors import SchemaError
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.rows import (
    INFERRED_BATCH,
    INFERRED_BATCHES,
    INFERRED_TASKS,
    BatchFunction,
    make_rows,
    name_function,
    to_array,
)
from dask_imgread.shards.ahead import SHARDS_AT_ONCE
from dask_imgread.shards.find import Shard
from dask_imgread.shards.frames import is_frame, is_lazy, open_frame
from dask_imgread.shards.partition import (
    Partitioning,
    PartitionOptions,
    PathsOrTasks,
    list_tasks,
    split_task,
)
from dask_imgread.sidecars import MetadataColumns, Sidecars
from dask_imgread.storage.filesystems import is_local
from dask_imgread.tasks import FileGroupTask, ImageBatch, is_task, make_index

if TYPE_CHECKING:
    from dask.bag import Bag
    from dask.dataframe import DataFrame

_JOINED_IMAGES = 500  # of a task, on average, if they are chosen from several shards
_JOINED_BYTES = 128 << 20  # likewise, if they are decoded whole
_PATIENCE = "5s"  # with a scheduler that does not answer


def read_bag(
    paths_or_tasks: PathsOrTasks,
    *,
    reader: ImageReaderStage | None = None,
    **partitioning: Unpack[PartitionOptions],
) -> Bag:
    """Make a lazy bag of ImageBatch, one partition for each task, or for each of a Dask frame.

    A partition is read batch by batch: what is mapped over the bag sees each batch as it
    is decoded, and only what it returns is kept. Without such a function the whole
    partition's pixels are held in memory.

    Parameters
    ----------
    paths_or_tasks
        Shards, as ``partition_shards`` takes them, the tasks that it made, or a frame of rows: then
        only its images are read. A frame of Dask stays lazy, and each of its partitions is one of
        the result, unless it is to be divided; then it is computed.
    reader
        The reader; ``ImageReaderStage()`` if not given.
    **partitioning
        For paths and frames, how they are divided: ``files_per_partition``,
        ``images_per_partition`` or ``blocksize``, and the other options of ``partition_shards``.
        Without any of these, up to eight shards in a store are joined to a partition where only
        their headers, or images that rows name, are read, since a reader reads so many at a time.

    Returns
    -------
    dask.bag.Bag
        Of ``ImageBatch``.

    Raises
    ------
    FileNotFoundError, PermissionError, StorageError
        If ``partition_shards`` raises them for the paths.
    ValueError
        If ``partition_shards`` raises it, or if both tasks and ``partitioning`` are given.
    ReadError
        When it is computed, if an image can't be read and the reader has ``on_error="raise"``.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> bag = read_bag(make_shards("shards", shards=2, images_per_shard=3))
    >>> bag.map(lambda batch: batch.num_items).sum().compute(scheduler="sync")
    6
    """
    reader = reader or ImageReaderStage()
    # A bag may hold the pixels of a whole partition.
    frame, parts, options = _list_parts(paths_or_tasks, partitioning, reader, streamed=False)
    if not parts:
        return db.from_sequence([], npartitions=1)
    name = f"read-images-{tokenize(reader, parts, options)}"
    # If a function follows, Dask's optimization removes `reify`, so that batches are streamed.
    graph = {
        (name, number): (db.core.reify, (_stream, reader, getattr(part, "key", part), options))
        for number, part in enumerate(parts)
    }
    delayed = [] if frame is None else parts
    return db.Bag(
        HighLevelGraph.from_collections(name, graph, dependencies=delayed), name, len(parts)
    )


def _list_parts(
    given: PathsOrTasks,
    partitioning: PartitionOptions,
    reader: ImageReaderStage,
    *,
    streamed: bool = True,
) -> tuple[DataFrame | None, list[Any], PartitionOptions]:
    """Return tasks; or a frame of Dask, its partitions, and the options with which to read each.

    Shards that nobody has divided are joined where a reader reads several at a time: their headers,
    or images that rows name, or those of small shards, if no partition's pixels are ever held.
    """
    frame = open_frame(given, partitioning.get("storage_options"))
    divisions = (*Partitioning.__optional_keys__, "limit")
    undivided = all(partitioning.get(name) is None for name in divisions)
    if undivided and is_lazy(frame):
        return frame, frame.to_delayed(), partitioning
    if frame is not None:
        if undivided and len(frame):
            paths = list(map(str, frame["shard"].unique()))
            count = _count_joined(paths, _JOINED_IMAGES * len(paths) // len(frame))
            partitioning = {**partitioning, "files_per_partition": count}
        return None, list_tasks(frame, **partitioning), {}
    if isinstance(given, str | os.PathLike):
        given = [given]  # else it would be asked once more whether this is a job's folder
    elif is_task(given):
        undivided = False
    else:
        given = list(cast("Iterable[Any]", given))
        undivided &= not any(map(is_task, given))
    tasks = list_tasks(given, **partitioning)
    if undivided and tasks:
        shards = [Shard(task.data[0], task.sizes[0], task.versions[0]) for task in tasks]
        most = SHARDS_AT_ONCE
        if reader.decode:
            size = sum(shard.size or _JOINED_BYTES for shard in shards)
            most = _JOINED_BYTES * len(shards) // size if streamed else 1
        count = _count_joined([shard.path for shard in shards], most)
        if count > 1:
            partitioning = {**partitioning, "files_per_partition": count}
            tasks = list_tasks(shards, **partitioning)
    return None, tasks, {}


def _count_joined(shards: list[str], most: int) -> int:
    """Return how many shards a task should have, so that all threads have equally many."""
    most = min(most, SHARDS_AT_ONCE)
    if len(shards) < 2 or most < 2 or any(map(is_local, shards)):
        return 1
    threads = _count_threads() or len(shards)
    rounds = ceil(len(shards) / (threads * most))
    return ceil(len(shards) / (threads * rounds))


def _count_threads() -> int:
    """Return how many tasks run at a time where the collection will be computed; 0 if unknown."""
    try:
        client = default_client()
    except ValueError:  # there is none
        return int(CPU_COUNT)
    with suppress(OSError, RuntimeError):  # its scheduler is gone
        if not client.asynchronous:
            return sum(client.nthreads(callback_timeout=_PATIENCE).values())
    return 0


def _stream(
    reader: ImageReaderStage,
    part: FileGroupTask | pd.DataFrame,
    options: PartitionOptions,
    *,
    together: bool = True,
) -> Iterator[ImageBatch]:
    """Read a task, or a partition of rows: its shards together, or strictly one after another."""
    if together and not isinstance(part, FileGroupTask):
        options = {**options, "files_per_partition": max(1, len(part))}
    for task in list_tasks(part, **options):
        for each in [task] if together else split_task(task):
            yield from reader.read(each)


def read_metadata(
    paths_or_tasks: PathsOrTasks,
    *,
    reader: ImageReaderStage | None = None,
    decode: bool = False,
    sidecars: Sidecars | None = None,
    checksum: bool = False,
    **partitioning: Unpack[PartitionOptions],
) -> DataFrame:
    """Make a lazy DataFrame with one row for each image member, indexed by ``image_id``.

    Parameters
    ----------
    paths_or_tasks
        Shards, as ``partition_shards`` takes them, the tasks that it made, or a frame of rows: then
        only its images are read. A frame of Dask stays lazy, and each of its partitions is one of
        the result, unless it is to be divided; then it is computed.
    reader
        The reader; ``ImageReaderStage()`` if not given.
    decode
        By default only headers are read, which is many times faster. If True, each image
        is decoded, and ``error`` says which can't be.
    sidecars
        Columns of what the samples' sidecars hold, by their extension; other sidecars are not
        read. A name takes the whole sidecar: ``{"txt": "caption", "cls": "label"}``, text as a
        string, ``.cls`` as an int64, ``.json`` as JSON text, others as bytes. A list takes keys of
        a JSON object, each into a column of its name: ``{"json": ["url", "meta.width"]}``, where
        ``a.b`` is the ``b`` in ``a`` unless the object has a key ``a.b``. A dict gives types, too:
        ``{"json": {"similarity": "float64", "url": None}, "cls": {"label": "int32"}}``. Types are
        ``bool``, ``int8`` to ``int64``, ``uint8`` to ``uint64``, ``float32``, ``float64``,
        ``string``, ``binary``, ``json`` (JSON text of any value), and ``list<...>`` of the others.
        Where a key has none, this call reads a few images to find it: integers and floats are
        ``float64``, objects and values of several types ``json``; ``string`` if all are missing.
    checksum
        Whether to add ``sha256``, the SHA-256 of each image's encoded bytes in hexadecimal. This
        reads all bytes, even if nothing is decoded.
    **partitioning
        For paths and frames, how they are divided: ``files_per_partition``,
        ``images_per_partition`` or ``blocksize``, and the other options of ``partition_shards``.
        Without any of these, up to eight shards in a store are joined to a partition where only
        their headers, or images that rows name, are read, since a reader reads so many at a time;
        and small ones, up to 128 MiB, as the next is begun before one is at its end.

    Returns
    -------
    dask.dataframe.DataFrame
        With the columns and dtypes of ``dask_imgread.tasks.COLUMNS``: ``image_path``,
        ``shard``, ``shard_version`` (a token for its content), ``key``, ``offset``, ``size``
        (of the image, in bytes), ``sample_offset``, ``sample_size`` (of the whole sample; null if
        its members are not adjacent), ``format``, ``width``, ``height`` (pixels, upright),
        ``channels``, ``backend``, ``error``, ``warning``. An image that can't be read has its row
        too, with ``error`` set. Then come ``sha256`` and the columns of ``sidecars``, if they are
        asked for, null where something is missing. The last one is then ``error_sidecar``, which
        says which sidecar can't be read, or which value is null as it does not fit its column's
        type. Any selection of the rows may take the place of shards. What ``to_parquet`` writes of
        columns of lists, pandas and Dask read only with ``dtype_backend="pyarrow"``.

    Raises
    ------
    FileNotFoundError, PermissionError, StorageError, ValueError, ReadError
        As ``read_bag`` does. ValueError, too, if a column of ``sidecars`` has a name that is taken,
        or a type that there is not, or if they are asked for of a frame.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> frame = read_metadata(make_shards("shards", shards=2, images_per_shard=3))
    >>> len(frame), int(frame.width.max().compute(scheduler="sync"))
    (6, 128)
    >>> frame = read_metadata("shards", sidecars={"txt": "caption", "json": {"number": "int32"}})
    >>> frame[["caption", "number"]].compute(scheduler="sync").iloc[5].tolist()
    ['landscape number 5', 5]
    """
    reader = reader or ImageReaderStage()
    reader = reader.with_options(decode=decode, checksum=checksum or reader.checksum)
    columns = MetadataColumns.parse(sidecars, reader.digests)
    if columns.sidecars or not decode:
        reader = reader.with_options(sidecars=columns.extensions)
    if columns.sidecars:
        frame, tasks = paths_or_tasks, list[Any]()
        if not is_frame(frame):
            frame, tasks, _ = _list_parts(paths_or_tasks, partitioning, reader)
        if frame is not None or any(task.rows is not None for task in tasks):
            raise ValueError("sidecars: of a frame's images nothing else is read; give the shards")
        columns = columns.infer_types(reader, tasks, _compute)
        paths_or_tasks, partitioning = tasks, {}
    return map_images(columns, paths_or_tasks, reader=reader, **partitioning)


def _compute(fn: Callable[[Any], Any], part: Any) -> Any:
    """Run a function on a task, or on a delayed partition, where Dask computes."""
    if isinstance(part, FileGroupTask):  # Dask would look into it for delayed values
        return dask.delayed(functools.partial(fn, part), pure=False)().compute()
    return dask.delayed(fn, pure=False)(part).compute()


def map_images(
    fn: BatchFunction,
    paths_or_tasks: PathsOrTasks,
    *,
    reader: ImageReaderStage | None = None,
    meta: pd.DataFrame | None = None,
    **partitioning: Unpack[PartitionOptions],
) -> DataFrame:
    """Make a lazy DataFrame of what ``fn`` returns for each batch of images.

    ``fn`` runs where the images are decoded, in the same task, batch by batch: pixels
    never leave it, and no more than a few batches are in memory at once.

    Parameters
    ----------
    fn
        Takes an ``ImageBatch`` and returns rows: a dict of arrays or a list of dicts with one
        entry for each image of ``batch.data``, which get the images' ids as their index, or a
        DataFrame. It sees failed images too, in ``batch.failed``.
    paths_or_tasks
        Shards, as ``partition_shards`` takes them, the tasks that it made, or a frame of rows: then
        only its images are read. A frame of Dask stays lazy, and each of its partitions is one of
        the result, unless it is to be divided; then it is computed.
    reader
        The reader; ``ImageReaderStage()`` if not given.
    meta
        An empty DataFrame with the columns, dtypes and index of the rows. If neither it nor
        ``fn.meta`` is given, this call computes ``fn`` for a few images to infer them; arrays of
        one shape are then Arrow's lists of a fixed size.
    **partitioning
        For paths and frames, how they are divided: ``files_per_partition``,
        ``images_per_partition`` or ``blocksize``, and the other options of ``partition_shards``.
        Without any of these, up to eight shards in a store are joined to a partition where only
        their headers, or images that rows name, are read, since a reader reads so many at a time;
        and small ones, up to 128 MiB, as the next is begun before one is at its end.

    Returns
    -------
    dask.dataframe.DataFrame
        One partition for each task.

    Raises
    ------
    SchemaError
        When it is computed, if rows do not have the columns and types of ``meta``; at once if
        ``meta`` is inferred and ``fn`` does not return rows. A ValueError.
    ValueError
        If ``meta`` is not given and the first partitions give no rows, or as in ``read_bag``.
    FileNotFoundError, PermissionError, StorageError, ReadError
        As ``read_bag`` does.
    Exception
        What ``fn`` raises for a batch with images; when it is computed, or at once if
        ``meta`` is inferred.

    Examples
    --------
    >>> from dask_imgread.testing import make_shards
    >>> def brightness(batch):
    ...     return {"mean": [image.image_data.mean() for image in batch.data]}
    >>> frame = map_images(brightness, make_shards("shards"))
    >>> frame["mean"].compute(scheduler="sync").between(0, 255).all()
    np.True_
    """
    reader = reader or ImageReaderStage()
    frame, parts, options = _list_parts(paths_or_tasks, partitioning, reader)
    meta = getattr(fn, "meta", None) if meta is None else meta
    meta = _infer_meta(reader, fn, parts, options) if meta is None else _complete_meta(meta)
    if not parts:
        return dd.from_pandas(meta, npartitions=1)
    read = PartitionReader(reader, fn, meta, options)
    if frame is not None:
        return frame.map_partitions(
            read, meta=meta, enforce_metadata=False, clear_divisions=True, align_dataframes=False
        )
    # The rows have the types of `meta` already. Without this setting Dask would add a second task
    # to each partition, to convert objects to strings.
    with dask.config.set({"dataframe.convert-string": False}):
        return dd.from_map(read, parts, meta=meta, enforce_metadata=False, label="map-images")


def _complete_meta(meta: pd.DataFrame) -> pd.DataFrame:
    """Return ``meta`` with the ids' type for its index: pandas gives an empty index another."""
    untyped = isinstance(meta.index, pd.RangeIndex) or is_object_dtype(meta.index.dtype)
    return meta[:0].set_axis(make_index([])) if meta.index.name == "image_id" and untyped else meta


def _infer_meta(
    reader: ImageReaderStage, fn: BatchFunction, parts: list[Any], options: PartitionOptions
) -> pd.DataFrame:
    """Run the function on a few images, where Dask computes; return an empty frame of the types."""
    small = reader.with_options(dali_batch_size=INFERRED_BATCH)
    for part in parts[:INFERRED_TASKS]:
        infer = functools.partial(_infer_from_part, small, fn, options=options)
        meta: pd.DataFrame | None = _compute(infer, part)
        if meta is not None:
            return meta
    raise ValueError(
        f"the first {INFERRED_TASKS} partitions give no row from which to infer the columns of "
        f"{name_function(fn)}: give them with meta"
    )


def _infer_from_part(
    reader: ImageReaderStage,
    fn: BatchFunction,
    part: FileGroupTask | pd.DataFrame,
    options: PartitionOptions,
) -> pd.DataFrame | None:
    batches = (b for b in _stream(reader, part, options, together=False) if b.data)
    made = (make_rows(fn, batch) for batch in itertools.islice(batches, INFERRED_BATCHES))
    rows = [each for each in made if len(each)]  # an empty frame has no reliable types
    if not rows:
        return None
    seen = pd.concat(rows)
    types = {name: _infer_type(column) for name, column in seen.items()}
    return seen[:0].astype(types)


def _infer_type(column: pd.Series) -> Any:
    """Return a column's type; of objects the Arrow type, if there is one."""
    if is_object_dtype(column.dtype):
        with suppress(pa.ArrowException):
            found = to_array(column).type
            return column.dtype if pa.types.is_null(found) else pd.ArrowDtype(found)
    return column.dtype


class PartitionReader:
    """Reads one task, or one partition of a frame, and returns the rows of all its batches.

    All tasks of a frame share one. It is pickled once and unpickled only on workers: pickling the
    function for each task would cost the scheduler more than everything else.

    Parameters
    ----------
    reader
        The reader.
    fn
        What makes the rows of a batch.
    meta
        The columns and types of the rows; returned for a task without any batch.
    options
        Those of ``partition_shards``, for a partition of a frame.
    """

    __name__ = "map-images"  # by which Dask names the tasks of a frame

    def __init__(
        self,
        reader: ImageReaderStage,
        fn: BatchFunction,
        meta: pd.DataFrame,
        options: PartitionOptions,
    ) -> None:
        self._parts = reader, fn, meta, options

    def __call__(self, part: FileGroupTask | pd.DataFrame) -> pd.DataFrame:
        """Read a task, or a partition."""
        reader, fn, meta, options = self._parts
        with_ids = "image_id" in {*meta.index.names, *meta.columns}
        rows = [
            _conform(make_rows(fn, batch, with_ids), meta, name_function(fn))
            for batch in _stream(reader, part, options)
        ]
        return pd.concat(rows) if rows else meta

    def __dask_tokenize__(self) -> object:
        """Return a token that is the same in every process."""
        return type(self).__name__, tokenize(self._parts)

    @functools.cached_property
    def _pickled(self) -> bytes:
        pickled: bytes = pickle.dumps(self._parts)
        return pickled

    def __reduce__(self) -> tuple[type[_PickledReader], tuple[bytes]]:
        """Pickle as a reader whose parts stay pickled until it is called."""
        return _PickledReader, (self._pickled,)


class _PickledReader:
    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __call__(self, part: FileGroupTask | pd.DataFrame) -> pd.DataFrame:
        return PartitionReader(*pickle.loads(self._pickled))(part)


def _conform(rows: pd.DataFrame, meta: pd.DataFrame, name: str) -> pd.DataFrame:
    """Convert rows to the columns and types of ``meta``, where that loses nothing."""
    if not len(rows):
        return meta
    index = rows.index
    same = set(rows.columns) == set(meta.columns) and index.names == meta.index.names
    if same and rows.dtypes.equals(meta.dtypes) and index.dtype == meta.index.dtype:
        return rows
    try:
        if not same:
            raise TypeError("other columns")
        if index.dtype != meta.index.dtype:
            index = pd.Index(_cast(index.to_series(), meta.index.dtype), name=index.name)
        columns = {column: _cast(rows[column], meta[column].dtype) for column in meta.columns}
        return pd.DataFrame(columns, columns=meta.columns).set_axis(index)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SchemaError(
            f"rows of {name} have {_format_types(rows)}, where meta has {_format_types(meta)} "
            f"({error}): leave meta out to have it inferred from the first images, or "
            "make it match what the function returns"
        ) from None


def _cast(column: pd.Series, dtype: Any) -> pd.Series:
    if column.dtype == dtype:
        return column
    if isinstance(dtype, pd.ArrowDtype) and is_object_dtype(column.dtype):
        array = pd.arrays.ArrowExtensionArray(to_array(column).cast(dtype.pyarrow_dtype))
        return pd.Series(array, index=column.index, name=column.name)
    cast = column.astype(dtype)
    if is_object_dtype(dtype):
        lost = not isinstance(column.dtype, pd.StringDtype)
    elif dtype.kind == column.dtype.kind == "f":
        lost = False  # precision may differ
    else:
        lost = not ((cast == column) | column.isna()).fillna(False).all()
    if lost:
        raise TypeError(f"column {column.name!r} is {column.dtype}, not {dtype}")
    return cast


def _format_types(rows: pd.DataFrame) -> str:
    index = [
        f"{name}: {rows.index.get_level_values(level).dtype} (index)"
        for level, name in enumerate(rows.index.names)
    ]
    return ", ".join(index + [f"{name}: {dtype}" for name, dtype in rows.dtypes.items()])
