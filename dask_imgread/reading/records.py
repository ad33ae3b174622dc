"""The record of each image: what is known of it before it is decoded, or why it can't be."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence
from typing import Any

from dask_imgread.decoding.contract import Content, Header
from dask_imgread.decoding.header import ImageError, read_header, read_header_only
from dask_imgread.errors import StorageError
from dask_imgread.shards.samples import MAX_SIDECAR_BYTES, ImageEntry, parse_sidecar
from dask_imgread.shards.tar import ByteSource, Member
from dask_imgread.storage.filesystems import is_local
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.tasks import FileGroupTask, ImageObject

UNREACHABLE = "unreachable"  # the cause where a store did not give what it has

_APPLE_FILES = (b"\0\5\x16\7", b"\0\5\x16\0")
_PARSED_GROWTH = 8  # of JSON: a number in a list takes some eight times its text

logger = logging.getLogger("dask_imgread")


def describe_image(entry: ImageEntry, path: str, shard_id: str) -> ImageObject:
    """Make the record of an image before it is read."""
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
    """Make the record of a shard that can't be read, or of its part from an offset on."""
    shown = redact_url(path)
    part = f"@{start}" if start else ""
    return ImageObject(shown, f"{shard_id}/{part}", shard=shown, offset=start, error=reason)


def explain_lost(error: Exception, path: str) -> str:
    """Return why a shard, or some bytes of it, could not be read."""
    refused = isinstance(error, PermissionError) and not is_local(path)
    if refused or isinstance(error, StorageError):
        return f"{UNREACHABLE}: {error}"
    return f"unreadable shard: {error}"


def describe_lost_shards(
    task: FileGroupTask, relative_to: str | None, error: BaseException
) -> list[ImageObject]:
    """Make a record for each shard of a task that could not be run."""
    reason = hide_secrets(f"killed its worker: {error}", task.storage_options)
    shards = task.name_shards(relative_to)
    return [describe_lost(path, shard_id, task.start, reason) for path, shard_id in shards.items()]


def read_encoded(source: ByteSource, member: Member, whole: bool) -> tuple[Header, Content]:
    """Read an image's header, and all its bytes if ``whole``."""
    if not whole:
        header = read_header_only(lambda at, n: source.read_at(member.offset + at, n), member.size)
        return header, b""
    content = source.view_at(member.offset, member.size)
    if len(content) < member.size:
        raise ImageError(f"truncated archive: {len(content)} of {member.size} bytes are there")
    return read_header(content), content


def is_dropping(source: ByteSource, member: Member) -> bool:
    """Say whether a member is what macOS puts beside each file (AppleDouble, RFC 1740)."""
    if "._" not in member.name or not posixpath.basename(member.name).startswith("._"):
        return False
    return source.read_at(member.offset, 4) in _APPLE_FILES


class SidecarReader:
    """Reads samples' other members, those of one sample once for all of its images."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._members: Sequence[tuple[str, Member]] = ()
        self._values: dict[str, Any] = {}
        self._problems: list[str] = []
        self._parsed: dict[int, Any] = {}  # of the last sample, by offset: some share sidecars

    def attach(self, members: Sequence[tuple[str, Member]], image: ImageObject) -> int:
        """Put sidecars into the record of an image; what went wrong with one is a warning.

        Returns how many bytes that takes: none but for the first image of a sample.
        """
        size = 0
        if members is not self._members:
            size = self._read(members)
            for problem in self._problems:
                logger.warning("%s: %s", image.image_path, problem)
        image.metadata = dict(self._values)
        image.warning = "; ".join(filter(None, [image.warning, *self._problems])) or None
        return size

    def _read(self, members: Sequence[tuple[str, Member]]) -> int:
        self._members, self._values, self._problems = members, {}, []
        before, self._parsed = self._parsed, {}
        size = 0
        for extension, member in members:
            try:
                if member.problem is not None:
                    raise ValueError(member.problem)
                if member.size > MAX_SIDECAR_BYTES:
                    raise ValueError(f"{member.size} bytes are more than {MAX_SIDECAR_BYTES}")
                if member.offset in before:
                    value = before[member.offset]
                else:
                    content = self._source.read_at(member.offset, member.size)
                    if len(content) < member.size:
                        raise ValueError("truncated")
                    value = parse_sidecar(extension, content)
                    size += len(content) * (_PARSED_GROWTH if isinstance(value, dict | list) else 1)
                self._values[extension] = self._parsed[member.offset] = value
            except (ValueError, OSError) as error:
                self._problems.append(f"sidecar {member.name}: {error}")
        return size
