"""The record of each image: what is known of it before it is decoded, or why it can't be."""

from __future__ import annotations

import logging

from dask_imgread.decoding.contract import Content
from dask_imgread.decoding.header import Header, ImageError, read_header, read_header_only
from dask_imgread.samples import MAX_SIDECAR_BYTES, ImageEntry, make_shard_id, parse_sidecar
from dask_imgread.shards import is_local, resolve_path
from dask_imgread.storage import StorageError, hide_secrets, name_url
from dask_imgread.tar import ByteSource, Member
from dask_imgread.tasks import FileGroupTask, ImageObject

UNREACHABLE = "unreachable"  # the cause where a store did not give what it has

logger = logging.getLogger("dask_imgread")


def describe_image(entry: ImageEntry, path: str, shard_id: str) -> ImageObject:
    """Make the record of an image before it is read."""
    name, start, offset, size, _ = entry.member
    image_id = f"{shard_id}/{name}"
    image = ImageObject(
        f"{path}/{name}", image_id, shard=path, key=entry.key, offset=offset, size=size
    )
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


def describe_lost(path: str, reason: str) -> ImageObject:
    """Make the record of a whole shard that can't be read."""
    shown = name_url(path)
    return ImageObject(shown, f"{make_shard_id(path)}/", shard=shown, error=reason)


def explain_lost(error: Exception, path: str) -> str:
    """Return why a shard, or some bytes of it, could not be read."""
    refused = isinstance(error, PermissionError) and not is_local(path)
    if refused or isinstance(error, StorageError):
        return f"{UNREACHABLE}: {error}"
    return f"unreadable shard: {error}"


def describe_lost_shards(task: FileGroupTask, error: BaseException) -> list[ImageObject]:
    """Make a record for each shard of a task that could not be run."""
    paths = map(resolve_path, task.data)
    reason = hide_secrets(f"killed its worker: {error}", task.storage_options)
    return [describe_lost(path, reason) for path in paths]


def read_encoded(source: ByteSource, member: Member, whole: bool) -> tuple[Header, Content]:
    """Read an image's header, and all its bytes if ``whole``."""
    if not whole:
        header = read_header_only(lambda at, n: source.read_at(member.offset + at, n), member.size)
        return header, b""
    content = source.view_at(member.offset, member.size)
    if len(content) < member.size:
        raise ImageError(f"truncated archive: {len(content)} of {member.size} bytes are there")
    return read_header(content), content


def read_sidecars(source: ByteSource, entry: ImageEntry, image: ImageObject) -> None:
    """Read the sample's other members; one that can't be read is a warning."""
    for extension, member in entry.sidecars:
        try:
            if member.problem is not None:
                raise ValueError(member.problem)
            if member.size > MAX_SIDECAR_BYTES:
                raise ValueError(f"{member.size} bytes are more than {MAX_SIDECAR_BYTES}")
            content = source.read_at(member.offset, member.size)
            if len(content) < member.size:
                raise ValueError("truncated")
            image.metadata[extension] = parse_sidecar(extension, content)
        except (ValueError, OSError) as error:
            problem = f"sidecar {member.name}: {error}"
            image.warning = f"{image.warning}; {problem}" if image.warning else problem
            logger.warning("%s: %s", image.image_path, problem)
