"""Load the images of a few rows, for a notebook."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.shards.frames import free_ids, is_lazy, require_frame
from dask_imgread.shards.partition import partition_shards
from dask_imgread.tasks import ImageObject

if TYPE_CHECKING:
    import pandas as pd

    from dask_imgread.shards.frames import Frame

_POSITION = "_position"  # a column that is added for the order
_READERS = 8


def load_images(
    frame: Frame | str | os.PathLike[str],
    ids: str | Iterable[str] | None = None,
    *,
    reader: ImageReaderStage | None = None,
    storage_options: dict[str, Any] | None = None,
) -> list[ImageObject]:
    """Load the images of a few rows into memory, in this process.

    For more rows than fit into memory use ``map_images`` or ``read_bag``, which take the same
    frames.

    Parameters
    ----------
    frame
        Rows of pandas or Dask, as ``read_metadata`` makes them, or the output folder of a job.
    ids
        The images to load, or the one, by their ``image_id``; all rows if not given.
    reader
        The reader; ``ImageReaderStage(verbose=False)`` if not given.
    storage_options
        Options for fsspec's file system.

    Returns
    -------
    list of ImageObject
        In the order of ``ids``, or of the rows. An image that can't be read has no ``image_data``,
        and says why in ``error``. The frame's further columns are in ``metadata``.

    Raises
    ------
    KeyError
        If the frame has no row with one of the ``ids``.
    ValueError
        If the frame lacks columns, or this is no frame.
    ReadError
        If an image can't be read and the reader has ``on_error="raise"``.

    Examples
    --------
    >>> from dask_imgread import read_metadata
    >>> from dask_imgread.testing import make_shards
    >>> frame = read_metadata(make_shards("shards")).compute(scheduler="sync")
    >>> [image.image_data.shape for image in load_images(frame.sample(2, random_state=1))]
    [(96, 128, 3), (96, 128, 3)]
    """
    rows = require_frame(frame, storage_options)
    if ids is not None:
        if "image_id" not in (*rows.columns, rows.index.name):
            raise ValueError("the frame has no image_id, by which ids are found")
        ids = [ids] if isinstance(ids, str) else list(ids)
        rows = rows.map_partitions(_pick, ids) if is_lazy(rows) else _pick(rows, ids)
    rows = rows.compute() if is_lazy(rows) else rows
    if ids is not None:
        rows = rows.drop_duplicates("image_id").set_index("image_id")
        missing = [name for name in ids if name not in rows.index]
        if missing:
            raise KeyError(f"{len(missing)} ids are not in the frame, such as {missing[0]}")
        rows = rows.loc[ids]
    tasks = partition_shards(
        rows.assign(**{_POSITION: range(len(rows))}), storage_options=storage_options
    )
    reader = reader or ImageReaderStage(verbose=False)
    with ThreadPoolExecutor(_READERS) as pool:
        batches = [batch for read in pool.map(reader.process, tasks) for batch in read]
    images = [image for batch in batches for image in (*batch.data, *batch.failed)]
    return sorted(images, key=lambda image: image.metadata.pop(_POSITION))


def _pick(rows: pd.DataFrame, ids: list[str]) -> pd.DataFrame:
    rows = free_ids(rows)
    return rows[rows["image_id"].isin(ids)]
