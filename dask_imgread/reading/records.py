"""The record of each image: what is known before it is decoded, or why it can't be read."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import pandas as pd
import pyarrow as pa

from dask_imgread.errors import StorageError
from dask_imgread.shards.frames import free_ids, list_extra_columns
from dask_imgread.shards.parts import join_parts
from dask_imgread.shards.samples import ImageEntry, split_name
from dask_imgread.shards.tar import Member
from dask_imgread.storage.filesystems import is_local
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.tasks import DIGESTS, PROBLEMS, FileGroupTask, ImageObject

_MAX_BYTES = 1 << 30  # of one encoded image that a row names: it is read at once
_MAX_OFFSET = 1 << 62
# The package's columns of a row that are read; what its others say comes from the image itself.
_READ = {
    *("image_id", "image_path", "shard", "shard_version", "key", "offset", "size"),
    *("sample_offset", "sample_size", "error", "warning", *DIGESTS, PROBLEMS),
}
UNREACHABLE = "unreachable"  # the cause if the store failed, not the image: worth a retry


def describe_image(entry: ImageEntry, path: str, shard_id: str, version: str | None) -> ImageObject:
    """Make the record of an image that is yet to be read."""
    name, start, offset, size, *_ = entry.member
    image_id = f"{shard_id}/{name}"
    image = ImageObject(
        f"{path}/{name}", image_id, shard=path, key=entry.key, offset=offset, size=size
    )
    image.shard_version = version
    if entry.extent is not None:
        image.sample_offset, end = entry.extent
        image.sample_size = end - image.sample_offset
    image.warning = entry.warning
    if entry.repeated:
        image.image_id = f"{image_id}@{start}"
        image.warning = f"duplicate name: an earlier member of the shard has the id {image_id}"
    return image


def describe_rows(rows: pd.DataFrame, path: str, shard_id: str) -> Iterator[ImageObject]:
    """Make the record of each image that a shard's rows name.

    A row that can't be one of an image gets an ``error``, or keeps the one that it has.
    """
    rows = free_ids(rows)
    extra = list_extra_columns(rows)
    names = [name for name in rows.columns if name in _READ or name in extra]
    columns = [_to_list(rows[name]) for name in names]
    for values in zip(*columns, strict=True):
        known = zip(names, values, strict=True)
        row = {name: value for name, value in known if _is_known(value)}
        yield _describe_row(row, extra, path, shard_id)


def _describe_row(row: dict[str, Any], extra: list[str], path: str, shard_id: str) -> ImageObject:
    name = _find_name(row)
    image = ImageObject(
        f"{path}/{name}" if name else path,
        str(row.get("image_id", f"{shard_id}/{name}")),
        metadata={column: row[column] for column in extra if column in row},
        shard=path,
        key=str(row.get("key", split_name(name)[0])),
        sample_offset=_to_int(row.get("sample_offset")),
        sample_size=_to_int(row.get("sample_size")),
    )
    if "shard_version" in row:
        image.shard_version = str(row["shard_version"])
    if "warning" in row:
        image.warning = str(row["warning"])
    image.sha256, image.md5 = (row.get(name) for name in DIGESTS)
    image.sidecar_error = row.get(PROBLEMS)
    offset, size = _to_int(row.get("offset")), _to_int(row.get("size"))
    if not row.get("shard") or not isinstance(row["shard"], str):
        image.error = f"bad row: shard {row.get('shard')!r:.40}"
    elif offset is None or size is None or size > _MAX_BYTES:
        image.error = f"bad row: offset {row.get('offset')!r:.40}, size {row.get('size')!r:.40}"
    else:
        image.offset, image.size = offset, size
        if not size and "error" in row:  # of damage, or of a whole shard
            image.error = str(row["error"])
    return image


def _find_name(row: dict[str, Any]) -> str:
    """Return a member's name, even if its shard was moved, or the row has no path."""
    path, name, key = (str(row.get(column, "")) for column in ("image_path", "image_id", "key"))
    shard = str(row.get("shard"))
    if path == shard:  # the record of a whole shard
        return ""
    if path.startswith(f"{shard}/"):
        return path[len(shard) + 1 :]
    for text in (path, name):
        _, found, extension = text.rpartition(f"/{key}.")
        if key and found:
            return f"{key}.{extension}"
    return key or name.partition("/")[2]


def list_parts(images: list[ImageObject], end: int | None) -> list[tuple[int, int]]:
    """Return where the bytes of images lie, as far as the shard goes, neighbours joined."""
    last = _MAX_OFFSET if end is None else end
    return join_parts(
        (image.offset, min(image.offset + image.size, last))
        for image in images
        if image.error is None and image.offset < last
    )


def find_change(image: ImageObject, version: str | None) -> str | None:
    """Return an error if the image's row was made from another content of its shard."""
    if image.shard_version in (None, version):
        return None
    return (
        f"changed shard: {image.shard} is not what the row was made from: its version was "
        f"{image.shard_version}, and is {version}"
    )


def _to_list(column: pd.Series) -> list[Any]:
    """Return a column's values as Python's own, where Arrow has such a type."""
    try:
        values: list[Any] = pa.array(column).to_pylist()
    except (pa.ArrowException, OverflowError):
        return list(column)
    return values


def _is_known(value: Any) -> bool:
    return not (value is None or value is pd.NA or (isinstance(value, float) and value != value))


def _to_int(value: Any) -> int | None:
    """Return a whole number, None for anything else and for what can't be a place in a file.

    Pandas makes floats of a column that lacks some.
    """
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    place = int(value) if whole else -1
    return place if 0 <= place <= _MAX_OFFSET else None


def describe_damage(member: Member, path: str, shard_id: str) -> ImageObject:
    """Make the record of a place where the archive is damaged."""
    where = f"@{member.start}"
    return ImageObject(
        f"{path}/{where}",
        f"{shard_id}/{where}",
        shard=path,
        offset=member.start,
        error=member.problem,
    )


def describe_lost(path: str, shard_id: str, start: int, reason: str) -> ImageObject:
    """Make the record of a shard that can't be read, at all or from the offset ``start``."""
    shown = redact_url(path)
    part = f"@{start}" if start else ""
    return ImageObject(shown, f"{shard_id}/{part}", shard=shown, offset=start, error=reason)


def explain_lost(error: Exception, path: str) -> str:
    """Return the error that is recorded for a shard that could not be read to its end."""
    refused = isinstance(error, PermissionError) and not is_local(path)
    if refused or isinstance(error, StorageError):
        return f"{UNREACHABLE}: {error}"
    return f"unreadable shard: {error}"


def describe_lost_shards(
    task: FileGroupTask, relative_to: str | None, error: BaseException
) -> list[ImageObject]:
    """Make a record for each shard of a task that killed its workers."""
    reason = hide_secrets(f"killed its worker: {error}", task.storage_options)
    shards = task.name_shards(relative_to)
    return [describe_lost(path, shard_id, task.start, reason) for path, shard_id in shards.items()]
