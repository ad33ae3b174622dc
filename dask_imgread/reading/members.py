"""A member's bytes: an image's, or its header's alone, and a sidecar's."""

from __future__ import annotations

import hashlib
import logging
import posixpath
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from dask_imgread.decoding.contract import Content, Header
from dask_imgread.decoding.header import ImageError, read_header, read_header_only
from dask_imgread.errors import StorageError
from dask_imgread.reading.records import UNREACHABLE
from dask_imgread.shards.samples import MAX_SIDECAR_BYTES, parse_sidecar
from dask_imgread.shards.tar import ByteSource, Member
from dask_imgread.storage.redaction import hide_secrets
from dask_imgread.tasks import ImageObject

_APPLE_MAGICS = (b"\0\5\x16\7", b"\0\5\x16\0")  # AppleDouble and AppleSingle
_HASHED_BYTES = 1 << 20  # at a time, of an image that is read for its checksum alone
_PARSED_GROWTH = 8  # JSON grows about this much when parsed: a list of numbers does

logger = logging.getLogger("dask_imgread")


def read_encoded(
    source: ByteSource, member: Member, image: ImageObject, *, whole: bool, digests: Sequence[str]
) -> tuple[Header, Content]:
    """Read an image's header, and all its bytes if ``whole``.

    Its record gets the bytes' digests first (``sha256``, ``md5``), so that a broken image has them,
    too.
    """
    content = _read_whole(source, member) if whole else b""
    if digests:
        pieces = iter([content]) if whole else _read_pieces(source, member)
        _hash(pieces, image, digests)
    if whole:
        return read_header(content), content
    return read_header_only(lambda at, n: source.read_at(member.offset + at, n), member.size), b""


def _read_whole(source: ByteSource, member: Member) -> Content:
    content = source.view_at(member.offset, member.size)
    if len(content) < member.size:
        raise ImageError(f"truncated archive: {len(content)} of {member.size} bytes are there")
    return content


def _read_pieces(source: ByteSource, member: Member) -> Iterator[Content]:
    for start in range(0, member.size, _HASHED_BYTES):
        yield source.view_at(member.offset + start, min(_HASHED_BYTES, member.size - start))


def _hash(pieces: Iterator[Content], image: ImageObject, names: Sequence[str]) -> None:
    """Set the digests of these names, unless not all bytes of the image are there."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in names}
    size = 0
    for piece in pieces:
        size += len(piece)
        for digest in digests.values():
            digest.update(piece)
    if size == image.size:
        for name, digest in digests.items():
            setattr(image, name, digest.hexdigest())


def is_apple_double(source: ByteSource, member: Member) -> bool:
    """Return whether a member is a file that macOS adds beside another (AppleDouble, RFC 1740)."""
    if "._" not in member.name or not posixpath.basename(member.name).startswith("._"):
        return False
    return source.read_at(member.offset, 4) in _APPLE_MAGICS


class SidecarReader:
    """Reads the sidecars of samples, each sample's once for all of its images.

    Parameters
    ----------
    source
        The shard.
    extensions
        Those of the sidecars to read; None for all.
    """

    def __init__(self, source: ByteSource, extensions: Collection[str] | None = None) -> None:
        self._source, self._extensions = source, extensions
        self._members: Sequence[tuple[str, Member]] | None = None  # read last, without an error
        self._values: dict[str, Any] = {}
        self._problems: list[str] = []
        # The last sample's values by offset: the next sample may share a sidecar with it.
        self._parsed: dict[int, Any] = {}

    def attach(self, members: Sequence[tuple[str, Member]], image: ImageObject) -> int:
        """Add sidecars to an image's record, with a warning for each that can't be read.

        If one can't be fetched, the image fails instead, since a later attempt may succeed.

        Returns the bytes of memory they add: 0 if the image before has the same sidecars.
        """
        size = 0
        if members is not self._members:
            try:
                size = self._read(members)
            except (StorageError, PermissionError) as error:
                image.error = image.sidecar_error = hide_secrets(f"{UNREACHABLE}: {error}")
                return 0
            for problem in self._problems:
                logger.warning("%s: %s", image.image_path, problem)
        image.metadata = dict(self._values)
        if self._problems:
            image.sidecar_error = "; ".join(self._problems)
            image.warning = "; ".join(filter(None, [image.warning, image.sidecar_error]))
        return size

    def _read(self, members: Sequence[tuple[str, Member]]) -> int:
        self._members, self._values, self._problems = None, {}, []
        before, self._parsed = self._parsed, {}
        size = 0
        for extension, member in members:
            if self._extensions is not None and extension not in self._extensions:
                continue
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
            except (StorageError, PermissionError):
                raise
            except (ValueError, OSError) as error:
                self._problems.append(f"sidecar {member.name}: {error}")
        self._members = members
        return size
