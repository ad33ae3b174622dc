"""Run a user's function on batches of images, and convert what it returns to rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import cloudpickle
import numpy as np
import pandas as pd
import pyarrow as pa
from dask.base import tokenize
from pandas.api.extensions import ExtensionArray
from pandas.api.types import is_object_dtype

from dask_imgread.errors import SchemaError
from dask_imgread.storage.redaction import hide_secrets
from dask_imgread.tasks import ImageBatch, ImageObject, make_index

Rows: TypeAlias = pd.DataFrame | Mapping[str, Any] | Sequence[Mapping[str, Any]]
BatchFunction: TypeAlias = Callable[[ImageBatch], Rows]

# Columns and types are inferred from at most as many images per batch, batches per task, and tasks.
INFERRED_BATCH, INFERRED_BATCHES, INFERRED_TASKS = 8, 4, 10

_MAX_ERROR_LENGTH = 2000  # characters

logger = logging.getLogger("dask_imgread")


def name_function(fn: BatchFunction) -> str:
    """Return ``module:function``."""
    if isinstance(fn, partial):  # only a token of its arguments, which may be secret
        return f"{name_function(fn.func)} with {tokenize(fn.args, fn.keywords)[:8]}"
    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    return f"{fn.__module__}:{name}"


class ByValue:
    """A function wrapped for pickling; unpickled, it is the function itself.

    If its module is registered with ``cloudpickle.register_pickle_by_value``, it is pickled with
    its code. Distributed's pickle would do that only if the outermost object were of that module.
    """

    def __init__(self, fn: BatchFunction) -> None:
        self._fn = fn

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it with cloudpickle, to be unpickled as the function itself."""
        return cloudpickle.loads, (cloudpickle.dumps(self._fn),)


def make_rows(fn: BatchFunction, batch: ImageBatch, with_ids: bool = True) -> pd.DataFrame:
    """Run a function on a batch, and return its rows as a DataFrame.

    A dict of arrays and a list of dicts have one entry for each image of ``batch.data``, and
    get the images' ids as their index. So does a DataFrame with one row for each image, unless
    it has an index with a name, or the ids in a column.

    Parameters
    ----------
    fn
        The function.
    batch
        What ``fn`` is called with; its lists are copied, so that ``fn`` may change them.
    with_ids
        Whether a DataFrame may get the images' ids as its index.

    Raises
    ------
    SchemaError
        If ``fn`` returns anything else.

    Examples
    --------
    >>> batch = ImageBatch([ImageObject(image_id="s/a.jpg"), ImageObject(image_id="s/b.jpg")])
    >>> make_rows(lambda batch: {"mean": np.array([0.5, 1.5])}, batch)
              mean
    image_id
    s/a.jpg    0.5
    s/b.jpg    1.5
    """
    ids = make_index(batch.data)
    try:
        made = fn(replace(batch, data=list(batch.data), failed=list(batch.failed)))
    except Exception as error:
        if batch.data:
            raise
        # Such as np.stack of an empty list: there is no image to record as failed.
        logger.warning(
            "%s fails on a batch of which no image could be read: %s",
            *(name_function(fn), describe_failure(error)),
        )
        return pd.DataFrame()
    if made is None and not batch.data:
        return pd.DataFrame()
    if isinstance(made, pd.DataFrame):
        return _set_ids(made, ids) if with_ids else made
    if isinstance(made, Mapping):
        columns = {
            name: _to_column(f"{name_function(fn)}: column {name!r}", values, len(ids))
            for name, values in made.items()
        }
        rows = pd.DataFrame(columns, index=range(len(ids)))
    elif isinstance(made, list | tuple) and all(isinstance(row, Mapping) for row in made):
        _check_count(f"{name_function(fn)}: a list of dicts", len(made), len(ids))
        rows = pd.DataFrame(list(made))
    else:
        raise SchemaError(
            f"{name_function(fn)}: a DataFrame, a dict of arrays or a list of dicts is expected, "
            f"not {type(made).__name__}"
        )
    return rows.set_index("image_id") if "image_id" in rows else rows.set_axis(ids)


def describe_failure(error: Exception) -> str:
    """Return an exception as text to store: valid UTF-8, short, without secrets."""
    try:
        text = str(error)
    except Exception:  # a broken __str__
        text = "(no text)"
    text = text[:_MAX_ERROR_LENGTH].encode("utf-8", "backslashreplace").decode()
    return hide_secrets(f"{type(error).__name__}: {text}")


def make_rows_singly(
    fn: BatchFunction, batch: ImageBatch, with_ids: bool = True
) -> tuple[list[pd.DataFrame], list[tuple[ImageObject, Exception]]]:
    """Run a function on a batch; if it raises, on each image as a batch of its own.

    Returns
    -------
    rows, failures
        The rows of all images but those for which the function raises; those images, each with
        the exception.
    """
    try:
        return [make_rows(fn, batch, with_ids)], []
    except SchemaError:  # the function is at fault, not an image
        raise
    except Exception as error:
        if len(batch.data) == 1 and not batch.failed:
            return [], [(batch.data[0], error)]
        logger.warning(
            "%s fails on a batch of %d images, and is run again image by image: %s",
            *(name_function(fn), len(batch.data), describe_failure(error)),
        )
    rows: list[pd.DataFrame] = []
    failures: list[tuple[ImageObject, Exception]] = []
    for single in _split(batch):
        more, failed = make_rows_singly(fn, single, with_ids)
        rows += more
        failures += failed
    return rows, failures


def _split(batch: ImageBatch) -> Iterator[ImageBatch]:
    """Yield a batch for each image, and one for all that could not be read."""
    for image in batch.data:
        yield replace(batch, data=[image], failed=[], skipped=0)
    if batch.failed or batch.skipped:
        yield replace(batch, data=[])


def _set_ids(rows: pd.DataFrame, ids: pd.Index) -> pd.DataFrame:
    """Index rows by image id, if there is one row for each image and no index of the user's own."""
    named = any(name is not None for name in rows.index.names)
    if named or "image_id" in rows or not len(rows):
        return rows
    if rows.index.isin(ids).all():
        return rows.rename_axis("image_id")
    numbered = rows.index.dtype.kind == "i" and sorted(rows.index) == list(range(len(ids)))
    return rows.set_axis(ids.take(rows.index)) if numbered else rows  # perhaps reordered


def _to_column(what: str, values: Any, count: int) -> Any:
    """Return a column of one value for each image; of a stack of arrays, one array for each."""
    if isinstance(values, pd.Series):
        values = values.array  # without its index, by which pandas would align it
    elif hasattr(values, "__array__") and not isinstance(values, ExtensionArray):
        values = np.asarray(values)
    dimensions = getattr(values, "ndim", 1)
    if not dimensions or not isinstance(values, list | tuple | np.ndarray | ExtensionArray):
        raise SchemaError(f"{what}: an array or a list is expected, not {values!r:.40}")
    _check_count(what, len(values), count)
    return list(values) if dimensions > 1 else values


def _check_count(what: str, entries: int, images: int) -> None:
    if entries != images:
        raise SchemaError(f"{what} has {entries} entries for {images} images")


def to_table(rows: pd.DataFrame) -> pa.Table:
    """Convert rows to an Arrow table, with their index as a column if it has a name.

    Arrays of one shape become a column of fixed-size lists.
    """
    packed = {name: array for name, column in rows.items() if (array := _pack(column)) is not None}
    named = any(name is not None for name in rows.index.names)
    # Converted on its own: if the table's pandas metadata named an Arrow list type, pandas could
    # not read the file.
    rest = rows.copy(deep=False)
    for name in packed:
        rest[name] = None
    table = pa.Table.from_pandas(rest, preserve_index=named)
    for name, array in packed.items():
        table = table.set_column(table.column_names.index(str(name)), str(name), array)
    return table


def to_array(column: pd.Series) -> pa.Array:
    """Convert a column to an Arrow array."""
    packed = _pack(column)
    return pa.array(column, from_pandas=True) if packed is None else packed


def _pack(column: pd.Series) -> pa.Array | None:
    """Convert a column of Arrow lists, or of arrays of one shape; None for any other column."""
    if isinstance(column.dtype, pd.ArrowDtype):
        return pa.array(column) if pa.types.is_nested(column.dtype.pyarrow_dtype) else None
    if not is_object_dtype(column.dtype) or not all(
        isinstance(value, np.ndarray) for value in column
    ):
        return None
    kinds = {(value.shape, value.dtype) for value in column}
    if len(kinds) != 1:
        return None
    shape, dtype = kinds.pop()
    if not shape or 0 in shape or dtype.hasobject:  # empty arrays stay lists of any size
        return None
    packed = pa.array(np.stack(list(column)).ravel())
    for size in reversed(shape):
        packed = pa.FixedSizeListArray.from_arrays(packed, size)
    return packed
