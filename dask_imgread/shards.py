"""Find shards by path, folder, glob, brace range or URL, and open their bytes."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.tar import ByteSource

COMPRESSIONS = {".tar": None, ".tar.gz": "gzip", ".tgz": "gzip", ".tar.zst": "zstd"}
_BLOCK_BYTES = 4 << 20
_CACHE_BYTES = 256 << 20  # a reader of a remote or compressed shard keeps this much of it
_PIECE_BYTES = 16 << 10  # what is lost at most where a compressed stream breaks off

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Shard(NamedTuple):
    """A tar shard: its absolute path or URL, its size in bytes, and a token of its content."""

    path: str
    size: int | None
    version: str


def find_shards(paths: Paths, storage_options: dict[str, Any] | None = None) -> list[Shard]:
    """List the shards that ``paths`` stand for, in the order given, each once.

    Parameters
    ----------
    paths
        A file, a folder (searched recursively), a glob, a brace range such as
        ``{00000..00099}.tar``, a URL that fsspec knows, or a list of these.
    storage_options
        Options for fsspec's file system.

    Raises
    ------
    FileNotFoundError
        If a path, or all that a folder or a glob stands for, does not exist.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    expanded = [name for path in given for name in expand_braces(os.fspath(path))]
    options = storage_options or {}

    def find(path: str) -> list[Shard]:
        return _find(path, options)

    if all(is_local(path) for path in expanded):
        found = [find(path) for path in expanded]
    else:  # each look is a request
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(find, expanded))
    return list({shard.path: shard for shards in found for shard in shards}.values())


def expand_braces(path: str) -> list[str]:
    """Expand ``{a,b}`` and ``{000..010}`` as a shell does, zero padding kept.

    >>> expand_braces("s-{08..10}.tar")
    ['s-08.tar', 's-09.tar', 's-10.tar']
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", path)
    if match is None:
        return [path]
    first, last, names = match.groups()
    if names is not None:
        choices = names.split(",")
    else:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
    head, tail = path[: match.start()], path[match.end() :]
    return [head + choice + rest for choice in choices for rest in expand_braces(tail)]


def resolve_path(path: str) -> str:
    """Return the one spelling of a shard's path that its ids are made from."""
    if is_local(path):
        return os.path.abspath(path.removeprefix("file://").removeprefix("local://"))
    return path


def is_local(path: str) -> bool:
    """Whether a path lies in the local file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


def _find(path: str, options: dict[str, Any]) -> list[Shard]:
    fs, root = url_to_fs(path, **options)
    if isinstance(fs, LocalFileSystem) and os.path.isfile(root):
        return [stat_shard(root, {})]
    if any(mark in path for mark in "*[") and not fs.exists(root):
        found = fs.glob(root, detail=True)
        kind = "no shard matches"
    else:
        try:
            info = fs.info(root)
        except FileNotFoundError:
            raise FileNotFoundError(f"no such shard or folder: {path}") from None
        if info["type"] != "directory":
            return [_make_shard(fs, root, info)]
        found = fs.find(root, detail=True)
        kind = f"no {' or '.join(COMPRESSIONS)} in the folder"
    shards = [
        _make_shard(fs, name, info)
        for name, info in sorted(found.items())
        if info["type"] == "file" and name.endswith(tuple(COMPRESSIONS))
    ]
    if not shards:
        raise FileNotFoundError(f"{kind} {path}")
    return shards


def _make_shard(fs: fsspec.AbstractFileSystem, name: str, info: dict[str, Any]) -> Shard:
    marks = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated")
    version = "-".join(str(info[mark]) for mark in ("size", *marks) if info.get(mark) is not None)
    path = name if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name)
    return Shard(path, info.get("size"), version)


def stat_shard(path: str, storage_options: dict[str, Any]) -> Shard:
    """Look one shard up: its size and the token of its content.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    fs, name = url_to_fs(path, **storage_options)
    return _make_shard(fs, name, fs.info(name))


@contextmanager
def open_shard(path: str, storage_options: dict[str, Any] | None = None) -> Iterator[ByteSource]:
    """Open a shard's tar bytes for reading at any offset, decompressed where it is compressed.

    A plain local file is read in place. Of any other, blocks of 4 MiB are fetched as
    they are needed and the last 256 MiB are kept; a compressed shard is read again from
    its beginning where more than that lies between two reads.

    Raises
    ------
    OSError
        If it can't be opened.
    """
    fs, name = url_to_fs(path, **(storage_options or {}))
    compression = next((COMPRESSIONS[s] for s in COMPRESSIONS if path.endswith(s)), None)
    source: LocalSource | BlockSource
    if compression is not None:
        source = BlockSource(_Stream(lambda: fs.open(name, "rb"), compression))
    elif isinstance(fs, LocalFileSystem):
        source = LocalSource(name)
    else:
        source = BlockSource(_Ranges(fs, name))
    with closing(source):
        yield source


class LocalSource:
    """A local file. Reads, not a memory map: a file cut short while mapped kills the process."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._end = os.fstat(self._descriptor).st_size

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

    def end(self) -> int:
        """Return the file's size."""
        return self._end

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class _Ranges:
    """Blocks of a remote file, each by a request for its range."""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str) -> None:
        self._fs, self._name = fs, name
        self.end: int | None = fs.info(name)["size"]

    def fetch(self, block: int) -> bytes:
        start = block * _BLOCK_BYTES
        assert self.end is not None
        if start >= self.end:
            return b""
        stop = min(start + _BLOCK_BYTES, self.end)
        content: bytes = self._fs.cat_file(self._name, start=start, end=stop)
        return content

    def close(self) -> None:
        """Nothing is held open between two requests."""


class _Stream:
    """Blocks of a compressed file, decompressed from its beginning on."""

    def __init__(self, open_file: Callable[[], IO[bytes]], compression: str) -> None:
        self._open_file, self._compression = open_file, compression
        self._file: IO[bytes] | None = None
        self._stream: pa.CompressedInputStream | None = None
        self._next = 0
        self.end: int | None = None

    def fetch(self, block: int) -> bytes:
        if self._stream is None or block < self._next:
            self.close()
            self._file = self._open_file()
            self._stream = pa.CompressedInputStream(self._file, self._compression)
            self._next = 0
        content = b""
        while self._next <= block:
            content = self._read_block(self._stream)
            self._next += 1
            if len(content) < _BLOCK_BYTES:
                self.end = (self._next - 1) * _BLOCK_BYTES + len(content)
                break
        return content if self._next == block + 1 else b""

    def _read_block(self, stream: pa.CompressedInputStream) -> bytes:
        pieces: list[bytes] = []
        missing = _BLOCK_BYTES
        while missing:
            try:
                piece = stream.read(min(_PIECE_BYTES, missing))
            except OSError:  # cut or damaged: what came before stands
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
            self._kept[block] = self._blocks.fetch(block)
            while len(self._kept) * _BLOCK_BYTES > _CACHE_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(block)
        return self._kept[block]

    def end(self) -> int:
        """Return where the source ends; 0 until a read has come upon it."""
        return self._blocks.end or 0

    def close(self) -> None:
        """Close what the blocks come from."""
        self._blocks.close()
