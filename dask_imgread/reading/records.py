"""The record of each image: what is known before it is decoded, or why it can't be read."""

from __future__ import annotations

from dask_imgread.errors import StorageError
from dask_imgread.shards.samples import ImageEntry
from dask_imgread.shards.tar import Member
from dask_imgread.storage.filesystems import is_local
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.tasks import FileGroupTask, ImageObject

UNREACHABLE = "unreachable"  # the cause if the store failed, not the image: worth a retry


def describe_image(entry: ImageEntry, path: str, shard_id: str) -> ImageObject:
    """Make the record of an image that is yet to be read."""
    name, start, offset, size, *_ = entry.member
    image_id = f"{shard_id}/{name}"
    image = ImageObject(
        f"{path}/{name}", image_id, shard=path, key=entry.key, offset=offset, size=size
    )
    image.warning = entry.warning
    if entry.repeated:
        image.image_id = f"{image_id}@{start}"
        image.warning = f"duplicate name: an earlier member of the shard has the id {image_id}"
    return image


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
