"""Files: written whole or not at all, and read into Arrow's own memory."""

from __future__ import annotations

import io
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import IO, TYPE_CHECKING

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.storage.retries import with_retries

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

# These stores show an object only when all of it has arrived. Elsewhere a file is written under
# a draft name and renamed when it is complete.
_WHOLE_ON_PUT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory"}
_BUFFER_BYTES = 1 << 20
_STARTED_BYTES = 4 << 20  # that are written to a file before they begin to go to the disk
_MAX_PIECES = 1024  # written at once, the limit of Linux
DRAFT = "_tmp-"  # what the name of a draft begins with


def write_whole(fs: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file so that readers see all of it or nothing, even if the writer is killed."""
    if isinstance(fs, LocalFileSystem):
        with open_whole(fs, path) as file:
            file.write(content)
    else:
        with _draft(fs, path) as draft:
            fs.pipe_file(draft, content)


@contextmanager
def open_whole(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[IO[bytes]]:
    """Open a file for writing, which appears under its name at the end of the ``with`` block.

    If the block is left by an exception, nothing appears. What goes to a store lies in a temporary
    file until then.
    """
    with _draft(fs, path) as draft:
        if isinstance(fs, LocalFileSystem):
            with _LocalFile(_Disk(draft, "w"), _BUFFER_BYTES) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # the bytes must reach the disk before the name does
        else:
            with tempfile.NamedTemporaryFile(prefix=DRAFT) as copy:
                yield copy
                copy.flush()
                with_retries(fs.put_file, path, copy.name, draft)


class _LocalFile(io.BufferedWriter):
    """A local file, of which many pieces can be written without copying them together first."""

    raw: _Disk

    def writelines(self, pieces: Iterable[Buffer]) -> None:
        """Write pieces one after another."""
        self.flush()
        self.raw.writelines(pieces)


class _Disk(io.FileIO):
    """A file whose bytes begin to go to the disk while more are written.

    ``os.fsync`` has to wait for little then.
    """

    _position = _started = 0

    def write(self, piece: Buffer) -> int:
        """Write a piece, or the beginning of it; return how many bytes."""
        return self._count(super().write(piece))

    def writelines(self, pieces: Iterable[Buffer]) -> None:
        """Write pieces one after another."""
        waiting = deque(memoryview(piece).cast("B") for piece in pieces)
        while waiting:
            written = self._count(os.writev(self.fileno(), list(islice(waiting, _MAX_PIECES))))
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.popleft())
            if waiting:
                waiting[0] = waiting[0][written:]

    def _count(self, written: int) -> int:
        self._position += written
        if self._position - self._started >= _STARTED_BYTES:
            place = self._started, self._position - self._started
            with suppress(OSError):  # a file system that takes no advice
                # This starts to write them; it would discard what has been written already.
                os.posix_fadvise(self.fileno(), *place, os.POSIX_FADV_DONTNEED)
            self._started = self._position
        return written


@contextmanager
def _draft(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[str]:
    """Yield a name to write to, and move that to its own name at the end."""
    if shows_whole_objects(fs):
        yield path
        return
    folder, _, name = path.rpartition("/")
    fs.makedirs(folder, exist_ok=True)
    draft = f"{folder}/{DRAFT}{name}-{uuid.uuid4().hex}"
    try:
        yield draft
        if isinstance(fs, LocalFileSystem):
            os.replace(draft, path)
        else:
            fs.mv(draft, path)
    except BaseException:
        with suppress(OSError):
            fs.rm_file(draft)
        raise


def shows_whole_objects(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether a file that is written there appears when all of it has arrived."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(protocols & _WHOLE_ON_PUT)


def open_bytes(content: bytes) -> pa.NativeFile:
    """Return bytes as a file for Arrow to read, copied into Arrow's own memory.

    Arrow reads files in threads of its own, and one of them may be the last to hold the file. If
    it releases a Python object while the interpreter shuts down, the process ends with SIGABRT.
    """
    memory = pa.BufferOutputStream()
    memory.write(content)
    return pa.BufferReader(memory.getvalue())
