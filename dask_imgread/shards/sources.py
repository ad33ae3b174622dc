"""The bytes of a shard, at any offset, wherever it lies and however it is compressed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.shards.ahead import READ_AHEAD, ReadAhead
from dask_imgread.shards.local import LocalSource
from dask_imgread.shards.parts import Parts, join_parts
from dask_imgread.shards.streams import ResumedFile, SourceFile, Stream
from dask_imgread.shards.tar import BLOCK, ByteSource, is_header
from dask_imgread.storage.filesystems import Place, connect
from dask_imgread.storage.ranges import NoRangesError, RangeReader, Stopper

# Names are not reliable: a file's first bytes show how it is compressed. Skippable frames of zstd
# (RFC 8878, 3.1.2) may come first.
_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\4\x22\x4d\x18": "lz4",
}
_MAGICS |= {bytes([0x50 + n]) + b"\x2a\x4d\x18": "zstd" for n in range(16)}
_COMPRESSED = (".gz", ".tgz", ".zst")  # whose parts are not even tried


@contextmanager
def open_shard(
    path: str,
    storage_options: dict[str, Any] | None = None,
    *,
    start: int = 0,
    plain: bool = False,
    size: int | None = None,
    read_ahead: int = READ_AHEAD,
    skipping: bool = False,
    parts: list[tuple[int, int]] | None = None,
    stopper: Stopper | None = None,
    place: Place | None = None,
) -> Iterator[ByteSource]:
    """Open a shard's tar bytes for reading at any offset, decompressed where it is compressed.

    A plain local file is read in place. Of any other, the next bytes are fetched, or inflated,
    while earlier ones are used. A compressed shard, or one on a server without ranges, is read
    once, from its beginning on: bytes far behind the last read are discarded.

    Parameters
    ----------
    path, storage_options
        The shard.
    start
        The offset at which reading begins.
    plain
        Whether it is known not to be compressed; otherwise its first bytes are examined.
    size
        The file's size, if known: this saves a request for it.
    read_ahead
        Bytes that are fetched or inflated in advance, at most.
    skipping
        Whether only headers may be needed, so that large gaps between reads are not fetched.
    parts
        What will be viewed, in ascending order, if not all: no more is read than that, and the
        first bytes, if the shard is not compressed.
    stopper
        To stop all requests from another thread; later reads raise.
    place
        Where the shard lies, if ``connect`` was called already, perhaps in another thread.

    Raises
    ------
    OSError
        If it can't be opened.
    """
    fs, name = place or connect(path, storage_options or {})
    stopper = stopper or Stopper()
    source: LocalSource | ReadAhead | Parts
    if isinstance(fs, LocalFileSystem):
        source = LocalSource(name, parts)
    elif parts is not None and not name.partition("?")[0].endswith(_COMPRESSED):
        source = _open_parts(fs, name, size, read_ahead, parts, stopper)
    else:
        source = _open_remote(fs, name, start, size, read_ahead, skipping, stopper)
    with ExitStack() as stack:
        stack.callback(source.close)
        codec = None if plain else find_compression(source.read_at(0, BLOCK))
        if codec is not None:
            if isinstance(source, Parts):  # of what is compressed all must be fetched
                stack.close()
                source = _open_remote(fs, name, 0, size, read_ahead, False, stopper)
            stack.pop_all()
            source = ReadAhead(Stream(SourceFile(source), codec), read_ahead)
            stack.callback(source.close)
        yield source


def _open_remote(
    fs: fsspec.AbstractFileSystem,
    name: str,
    start: int,
    size: int | None,
    read_ahead: int,
    skipping: bool,
    stopper: Stopper,
) -> ReadAhead:
    """Open a remote file, and read its first bytes: they tell whether its server sends ranges."""
    if size is not None and size <= start:
        size = None  # it is wrong
    try:
        ranges = RangeReader(fs, name, size, stopper)
        source = ReadAhead(ranges, read_ahead, start=start, skipping=skipping)
        try:
            source.view_at(start, BLOCK)
        except BaseException:
            source.close()
            raise
    except NoRangesError:
        return ReadAhead(Stream(ResumedFile(fs, name, stopper)), read_ahead)
    return source


def _open_parts(
    fs: fsspec.AbstractFileSystem,
    name: str,
    size: int | None,
    read_ahead: int,
    parts: list[tuple[int, int]],
    stopper: Stopper,
) -> ReadAhead | Parts:
    """Open some parts of a remote file, with its first bytes."""
    ranges = RangeReader(fs, name, size, stopper)
    source = Parts(ranges, join_parts([(0, BLOCK), *parts]), read_ahead)
    try:
        source.view_at(0, BLOCK)
    except NoRangesError:
        source.close()
        return ReadAhead(Stream(ResumedFile(fs, name, stopper)), read_ahead)
    except BaseException:
        source.close()
        raise
    return source


def find_compression(head: bytes) -> str | None:
    """Return how a shard with these first bytes is compressed."""
    if is_header(head):
        return None
    return next((codec for magic, codec in _MAGICS.items() if head.startswith(magic)), None)
