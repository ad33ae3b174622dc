"""Frames of rows that say which images to read, and where their bytes lie."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import pandas as pd
from dask.base import is_dask_collection
from dask.utils import is_dataframe_like
from pandas.api.types import is_numeric_dtype

from dask_imgread.errors import StorageError
from dask_imgread.shards.find import SHARD_SUFFIXES
from dask_imgread.storage.filesystems import connect, resolve_path
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import with_retries
from dask_imgread.tasks import COLUMNS, OWN_COLUMNS, FileGroupTask

if TYPE_CHECKING:
    from dask.dataframe import DataFrame

    Frame: TypeAlias = pd.DataFrame | DataFrame

JOB = "_job.json"  # marks a job's output folder
_NEEDED = ("shard", "offset", "size")


def is_frame(given: object) -> TypeGuard[Frame]:
    """Return whether this is a DataFrame, of pandas or of Dask."""
    return isinstance(given, pd.DataFrame) or is_lazy(given)


def is_lazy(given: object) -> TypeGuard[DataFrame]:
    """Return whether this is a DataFrame of Dask."""
    return bool(is_dask_collection(given) and is_dataframe_like(given))


def open_frame(given: Any, storage_options: Mapping[str, Any] | None = None) -> Frame | None:
    """Return a frame, or that in a job's output folder; None for anything else.

    Raises
    ------
    ValueError
        If the frame lacks a column that is needed to find the images.
    """
    if isinstance(given, str | os.PathLike) and _is_job(os.fspath(given), storage_options or {}):
        import dask.dataframe as dd

        given = dd.read_parquet(
            os.fspath(given), dtype_backend="pyarrow", storage_options=storage_options
        )
    if not is_frame(given):
        return None
    names = list(given.columns)
    twice = [name for name in (*_NEEDED, *COLUMNS, "image_id") if names.count(name) > 1]
    if twice:
        raise ValueError(f"a frame of images has two columns {twice[0]}: leave out one")
    lacking = [name for name in _NEEDED if name not in names]
    if "key" not in names and "image_id" not in (*names, given.index.name):
        lacking.append("image_id or key")
    if lacking:
        raise ValueError(
            f"a frame of images needs the columns {', '.join(_NEEDED)}, and image_id or key; "
            f"this one has no {', no '.join(lacking)}"
        )
    numeric = "key" in names and is_numeric_dtype(given.dtypes["key"])
    if numeric and (is_lazy(given) or given["key"].notna().any()):
        raise ValueError(
            "a frame's keys are text, and this one's are numbers, without their leading zeros: "
            "read the file with dtype={'key': str}"
        )
    return given


def require_frame(given: Any, storage_options: Mapping[str, Any] | None = None) -> Frame:
    """Return a frame, or that in a job's output folder.

    Raises
    ------
    ValueError
        If it is neither, or lacks a column that is needed to find the images.
    """
    frame = open_frame(given, storage_options)
    if frame is None:
        shown = redact_url(given) if isinstance(given, str) else type(given).__name__
        raise ValueError(f"a DataFrame of images is expected, or a job's folder, not {shown}")
    return frame


def _is_job(path: str, storage_options: Mapping[str, Any]) -> bool:
    if path.endswith(SHARD_SUFFIXES) or any(sign in path for sign in "*[{") or "::" in path:
        return False
    fs, root = connect(path, dict(storage_options))
    if "http" in fs.protocol:  # no job writes there
        return False
    try:
        with_retries(fs.info, path, f"{root.rstrip('/')}/{JOB}")
    except StorageError:
        raise
    except OSError:  # there is none; some stores forbid to ask for what is not there
        return False
    return True


def divide_rows(
    rows: pd.DataFrame,
    config: dict[str, Any],
    *,
    files_per_partition: int | None = None,
    images_per_partition: int | None = None,
    blocksize: int | None = None,
) -> Iterator[FileGroupTask]:
    """Yield tasks that read the images of some rows; without a division, one for each shard.

    Shards are in the order in which the rows name them first; the rows of each are read in the
    order of their offsets.
    """
    if not len(rows):
        return
    rows = free_ids(rows)
    paths = np.array([str(path) for path in rows["shard"]], object)
    shards, _ = pd.factorize(paths)
    offsets = pd.to_numeric(rows["offset"], errors="coerce")
    order = np.lexsort((offsets.fillna(-1).to_numpy(float), shards))
    rows, paths, shards = rows.iloc[order], paths[order], shards[order]
    if images_per_partition is not None:
        parts = np.arange(len(rows)) // images_per_partition
    elif blocksize is not None:
        sizes = pd.to_numeric(rows["size"], errors="coerce").fillna(0).to_numpy(float)
        parts = (np.cumsum(sizes.clip(1, blocksize)) - 1) // blocksize
    else:
        parts = shards // (files_per_partition or 1)
    cuts = [0, *(np.flatnonzero(np.diff(parts)) + 1), len(rows)]
    for start, stop in pairwise(cuts):
        yield _make_task(rows.iloc[start:stop], list(paths[start:stop]), config)


def _make_task(rows: pd.DataFrame, paths: Sequence[str], config: dict[str, Any]) -> FileGroupTask:
    shards, versions = list(dict.fromkeys(paths)), dict[str, Any]()
    if "shard_version" in rows:
        versions = dict(zip(paths, rows["shard_version"], strict=True))
    known = all(isinstance(version, str) for version in versions.values())
    return FileGroupTask(
        data=shards,
        reader_config=config,
        versions=tuple(versions.values()) if known else (),
        rows=rows,
    )


def free_ids(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows with their ids, if they are the index, as a column."""
    return rows.reset_index(drop="image_id" in rows) if rows.index.name == "image_id" else rows


def index_by_id(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows indexed by ``image_id``, if they have it, and by nothing else that has a name."""
    named = [name for name in rows.index.names if name is not None and name not in rows]
    rows = rows.reset_index(named) if named and named != ["image_id"] else rows
    return rows.set_index("image_id") if "image_id" in rows else rows


def list_extra_columns(rows: pd.DataFrame) -> list[str]:
    """Return the columns that are not the package's own: sidecars', or the user's."""
    return [name for name in rows.columns if name not in OWN_COLUMNS]


def group_by_shard(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each shard, by its path in the form of ``resolve_path``."""
    resolved = {path: resolve_path(path) for path in {str(path) for path in rows["shard"]}}
    if len(resolved) == 1:  # a group costs more than to read a few images
        return dict.fromkeys(resolved.values(), rows)
    paths = np.array([resolved[str(path)] for path in rows["shard"]], object)
    return dict(iter(rows.groupby(paths, sort=False)))
