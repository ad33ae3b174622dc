"""The bytes of a shard, at any offset, wherever it lies."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import IO, Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.decoding.buffers import BUFFERS
from dask_imgread.errors import StorageError
from dask_imgread.shards.find import ENDINGS
from dask_imgread.shards.tar import BLOCK, ByteSource, is_header
from dask_imgread.storage.filesystems import connect
from dask_imgread.storage.retries import with_retries

# A name may say anything: a file's first bytes tell how it is compressed. Skippable frames of zstd
# (RFC 8878, 3.1.2) may come first.
_MAGICS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\4\x22\x4d\x18": "lz4",
}
_MAGICS |= {bytes([0x50 + n]) + b"\x2a\x4d\x18": "zstd" for n in range(16)}
_BLOCK_BYTES = 4 << 20
_CACHE_BYTES = 256 << 20  # a reader of a remote or compressed shard keeps this much of it
_AHEAD_BYTES = 4 << 20  # of a local shard, read at once
_AHEAD_GAP = 64 << 10  # between two members that are read one after the other
_PIECE_BYTES = 512  # what is lost at most where a compressed stream breaks off


@contextmanager
def open_shard(
    path: str, storage_options: dict[str, Any] | None = None, *, plain: bool = False
) -> Iterator[ByteSource]:
    """Open a shard's tar bytes for reading at any offset, decompressed where it is compressed.

    Its first bytes tell; where it is known to be ``plain`` they are not looked at.

    A plain local file is read in place. Of any other, blocks of 4 MiB are fetched as
    they are needed and the last 256 MiB are kept. A shard that is compressed, or lies on a
    server without ranged reads, is read again from its beginning where more than that
    lies between two reads.

    Raises
    ------
    OSError
        If it can't be opened.
    """
    fs, name = connect(path, storage_options or {})
    local = isinstance(fs, LocalFileSystem)
    bare = path.partition("?")[0] if "://" in path else path
    if not local and not plain and bare.endswith(ENDINGS[1:]):  # else its head is fetched twice
        source: LocalSource | BlockSource = BlockSource(_Stream(fs, name, compressed=True))
    else:
        source = LocalSource(name) if local else BlockSource(_open_remote(fs, name))
        if not plain and find_compression(source.read_at(0, BLOCK)) is not None:
            source.close()
            source = BlockSource(_Stream(fs, name, compressed=True))
    with closing(source):
        yield source


def find_compression(head: bytes) -> str | None:
    """Return how a shard with these first bytes is compressed."""
    if is_header(head):
        return None
    return next((codec for magic, codec in _MAGICS.items() if head.startswith(magic)), None)


def _open_remote(fs: fsspec.AbstractFileSystem, name: str) -> _Ranges | _Stream:
    info = with_retries(fs.info, name, name)
    if info.get("size") is None or not info.get("partial", True):
        return _Stream(fs, name, compressed=False)
    if "http" in fs.protocol:
        return _HttpRanges(fs, name, info["size"])
    return _Ranges(fs, name, info["size"])


class LocalSource:
    """A local file. Reads, not a memory map: a file cut short while mapped kills the process."""

    compressed, problem = False, ""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._end = os.fstat(self._descriptor).st_size
        self._ahead = 0, memoryview(b"")  # what was read last, and from where
        self._next = -1  # where the last view ended

    def read_at(self, offset: int, size: int) -> bytes:
        """Return the bytes from ``offset``, fewer where the file ends."""
        if offset + size > self._end:  # a hostile size must not be allocated
            size = max(0, self._end - offset)
        content = os.pread(self._descriptor, size, offset)
        while len(content) < size:  # the system reads 2 GiB at most at a time
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                self._end = offset + len(content)
                break
            content += more
        return content

    def view_at(self, offset: int, size: int) -> memoryview:
        """Return the same in memory that may be shared with what was read along with it.

        Where one read follows the other, some megabytes are read at once: a system call for
        each small picture takes longer than the copy.
        """
        start, ahead = self._ahead
        follows = 0 <= offset - self._next <= _AHEAD_GAP
        self._next = offset + size
        if not start <= offset <= start + len(ahead) - size:
            if not follows or size > _AHEAD_BYTES // 8 or offset + size > self._end:
                return memoryview(self.read_at(offset, size))
            memory = BUFFERS.take(min(_AHEAD_BYTES, self._end - offset)).data
            count = os.preadv(self._descriptor, [memory], offset)
            if count < size:  # interrupted, or the file was cut short meanwhile
                return memoryview(self.read_at(offset, size))
            start, ahead = self._ahead = offset, memory[:count]
        return ahead[offset - start :][:size]

    def end(self) -> int:
        """Return the file's size."""
        return self._end

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class _Ranges:
    """Blocks of a remote file, each by a request for its range."""

    compressed, problem = False, ""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str, size: int) -> None:
        self._fs, self._name = fs, name
        self.end: int | None = size

    def fetch(self, block: int) -> bytes:
        start = block * _BLOCK_BYTES
        assert self.end is not None
        if start >= self.end:
            return b""
        return with_retries(self._request, self._name, start, min(start + _BLOCK_BYTES, self.end))

    def _request(self, start: int, stop: int) -> bytes:
        content = self._read(start, stop)
        if len(content) != stop - start:
            raise ConnectionError(f"{len(content)} bytes came of {stop - start}")
        return content

    def _read(self, start: int, stop: int) -> bytes:
        content: bytes = self._fs.cat_file(self._name, start=start, end=stop)
        return content

    def close(self) -> None:
        """Nothing is held open between two requests."""


class _HttpRanges(_Ranges):
    """Blocks of a file on a web server, which may turn out to give no ranges."""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str, size: int) -> None:
        super().__init__(fs, name, size)
        # Unlike `cat_file`, such a file sees whether the answer is the range asked for.
        self._file = fs.open(name, "rb", size=size, cache_type="none")
        self._stream: _Stream | None = None

    def fetch(self, block: int) -> bytes:
        if self._stream is None:
            try:
                return super().fetch(block)
            except ValueError:  # so fsspec says that the answer is no range
                self._stream = _Stream(self._fs, self._name, compressed=False)
        return self._stream.fetch(block)

    def _read(self, start: int, stop: int) -> bytes:
        self._file.seek(start)
        content: bytes = self._file.read(stop - start)
        return content

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class _ResumedFile(io.RawIOBase):
    """A file read from its beginning on, and taken up again where its connection breaks."""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str) -> None:
        super().__init__()
        self._fs, self._name = fs, name
        self._file: IO[bytes] | None = None
        self._done = 0
        self._peeked = b""

    def peek(self, size: int) -> bytes:
        """Return the next bytes, and give them again to who reads; fewer where the file ends."""
        while len(self._peeked) < size:
            piece = with_retries(self._read_once, self._name, size - len(self._peeked))
            if not piece:
                break
            self._peeked += piece
        return self._peeked

    def read(self, size: int = -1) -> bytes:
        if self._peeked:
            end = len(self._peeked) if size < 0 else size
            piece, self._peeked = self._peeked[:end], self._peeked[end:]
            return piece
        return with_retries(self._read_once, self._name, size)

    def _read_once(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
            content = self._file.read(size)
        except Exception:
            self._drop()
            raise
        self._done += len(content)
        return content

    def _open(self) -> IO[bytes]:
        # A web server's file is one stream: whether it gives ranges is not known yet.
        options = {"block_size": 0} if "http" in self._fs.protocol else {}
        file: IO[bytes] = self._fs.open(self._name, "rb", **options)
        try:
            if options:
                skipped = 0
                while skipped < self._done:
                    piece = file.read(min(_BLOCK_BYTES, self._done - skipped))
                    if not piece:
                        raise ConnectionError(f"the file ended after {skipped} bytes")
                    skipped += len(piece)
            else:
                file.seek(self._done)
        except BaseException:
            file.close()
            raise
        return file

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._drop()
        super().close()


class _Stream:
    """Blocks of a file that can only be read from its beginning on, such as a compressed one."""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str, *, compressed: bool) -> None:
        self._fs, self._name = fs, name
        self.compressed = compressed  # perhaps: its first bytes tell
        self.problem = ""
        self._file: _ResumedFile | None = None
        self._stream: pa.CompressedInputStream | _ResumedFile | None = None
        self._next = 0
        self.end: int | None = None

    def fetch(self, block: int) -> bytes:
        if self._stream is None or block < self._next:
            self.close()
            self._file = self._stream = _ResumedFile(self._fs, self._name)
            codec = find_compression(self._file.peek(BLOCK)) if self.compressed else None
            self.compressed = codec is not None
            if codec is not None:
                self._stream = pa.CompressedInputStream(self._file, codec)
            self._next = 0
        content = b""
        while self._next <= block:
            content = self._read_block(self._stream)
            self._next += 1
            if len(content) < _BLOCK_BYTES:
                self.end = (self._next - 1) * _BLOCK_BYTES + len(content)
                break
        return content if self._next == block + 1 else b""

    def _read_block(self, stream: pa.CompressedInputStream | _ResumedFile) -> bytes:
        pieces: list[bytes] = []
        missing = _BLOCK_BYTES
        while missing:
            try:
                piece = stream.read(min(_PIECE_BYTES, missing) if self.compressed else missing)
            except StorageError:
                raise
            except OSError as error:  # cut or damaged: what came before stands
                self.problem = str(error)
                break
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class BlockSource:
    """A source whose bytes come in blocks, of which the last used are kept."""

    def __init__(self, blocks: _Ranges | _Stream) -> None:
        self._blocks = blocks
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lost: tuple[int, StorageError] | None = None

    def read_at(self, offset: int, size: int) -> bytes:
        """Return the bytes from ``offset``, fewer where the source ends."""
        pieces = []
        while size > 0 and (self._blocks.end is None or offset < self._blocks.end):
            block, skip = divmod(offset, _BLOCK_BYTES)
            piece = self._load(block)[skip : skip + size]
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _load(self, block: int) -> bytes:
        if block not in self._kept:
            if self._lost is not None and self._lost[0] == block:
                raise self._lost[1]  # not half a minute again for each image in it
            try:
                self._kept[block] = self._blocks.fetch(block)
            except StorageError as error:
                self._lost = block, error
                raise
            while len(self._kept) * _BLOCK_BYTES > _CACHE_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(block)
        return self._kept[block]

    def view_at(self, offset: int, size: int) -> memoryview:
        """Return the same in memory that may be shared."""
        return memoryview(self.read_at(offset, size))

    def end(self) -> int:
        """Return where the source ends; 0 until a read has come upon it."""
        return self._blocks.end or 0

    @property
    def compressed(self) -> bool:
        """Whether offsets are those of what comes out, and not of the file."""
        return self._blocks.compressed

    @property
    def problem(self) -> str:
        """Why it ends where it does, if that is not the file's end."""
        return self._blocks.problem

    def close(self) -> None:
        """Close what the blocks come from."""
        self._blocks.close()
