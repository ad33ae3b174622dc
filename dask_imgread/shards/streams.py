"""Sequential sources: compressed shards, and files on servers without range requests."""

from __future__ import annotations

import io
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import IO

import fsspec
import pyarrow as pa

from dask_imgread.shards.ahead import ReadAhead
from dask_imgread.shards.local import LocalSource
from dask_imgread.storage.ranges import Marks, Requests, Stopper, ask, can_ask, list_marks
from dask_imgread.storage.retries import until_stopped

_PIECE_BYTES = 512  # what is lost at most where a compressed stream breaks off
_SKIPPED_BYTES = 4 << 20  # at a time, to get back to where a connection broke


class Stream:
    """Blocks of a file that is read once, in order.

    Parameters
    ----------
    file
        What is read.
    codec
        How it is compressed, as Arrow names it; None if it is not. All members of a gzip file and
        all frames of zstd are read.
    """

    workers = 1

    def __init__(self, file: SourceFile | ResumedFile, codec: str | None = None) -> None:
        self._file, self._compressed = file, codec is not None
        self._stream = file if codec is None else pa.CompressedInputStream(file, codec)
        self._position = 0
        self.size: int | None = None
        self.problem = ""
        self._lost: OSError | None = None

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes of a block, fewer where the file ends or can't be decompressed.

        Raises
        ------
        OSError
            If they can't be fetched, or any before them could not.
        """
        if self._lost is not None:
            raise self._lost
        while self._position < start and self._take(min(start - self._position, _SKIPPED_BYTES)):
            pass
        return self._take(stop - start) if self._position == start else b""

    def stop(self) -> None:
        """End what is under way."""
        self._file.stop()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # closing fails after a failed read
            self._stream.close()
        self._file.close()

    def _take(self, size: int) -> bytes:
        pieces: list[bytes] = []
        missing = 0 if self.size is not None else size
        while missing:
            try:
                piece = self._stream.read(
                    min(_PIECE_BYTES, missing) if self._compressed else missing
                )
            except OSError as error:
                self._lost = self._file.error if isinstance(self._file, SourceFile) else error
                if self._lost is not None:  # later bytes would be at wrong offsets
                    raise self._lost from None
                self.problem = str(error)  # truncated or damaged: what came before is kept
                piece = b""
            if not piece:
                self.size = self._position + size - missing
                break
            pieces.append(piece)
            missing -= len(piece)
        content = b"".join(pieces)
        self._position += len(content)
        return content


class SourceFile(io.RawIOBase):
    """A source of bytes as a file, for Arrow to read from its beginning on."""

    def __init__(self, source: LocalSource | ReadAhead) -> None:
        super().__init__()
        self._source, self._position = source, 0
        self.error: OSError | None = None  # Arrow's own errors are of the same classes

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, fewer where the source ends; keep the source's error."""
        try:
            content = self._source.read_at(self._position, size)
        except OSError as error:
            self.error = error
            raise
        self._position += len(content)
        self._source.keep(self._position)
        return content

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def stop(self) -> None:
        """End what is under way."""
        self._source.stop()

    def close(self) -> None:
        """Close the source."""
        if not self.closed:
            self._source.close()
        super().close()


class ResumedFile(io.RawIOBase):
    """A remote file, read from its beginning on, and reopened where its connection breaks."""

    def __init__(
        self, fs: fsspec.AbstractFileSystem, name: str, stopper: Stopper | None = None
    ) -> None:
        super().__init__()
        self._fs, self._name = fs, name
        self._file: IO[bytes] | _Body | None = None
        self._done = 0
        self._requests, self._marks = (stopper or Stopper()).make_requests(), Marks(name)

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; transient errors are retried."""
        return until_stopped(self._requests.stopped, self._read_once, self._name, size)

    def _read_once(self, size: int) -> bytes:
        try:
            if self._requests.stopped.is_set():
                raise CancelledError
            if self._file is None:
                self._file = self._open()
            content = self._file.read(size)
        except Exception:
            self._drop()
            raise
        self._done += len(content)
        return content

    def _open(self) -> IO[bytes] | _Body:
        if not can_ask(self._fs):
            file: IO[bytes] = self._fs.open(self._name, "rb")
            file.seek(self._done)
            return file
        body = _Body(self._requests, self._fs, self._name)
        try:
            self._marks.compare(body.marks)
            skipped = 0
            while skipped < self._done:
                piece = body.read(min(_SKIPPED_BYTES, self._done - skipped))
                if not piece:
                    raise ConnectionError(f"the file ended after {skipped} bytes")
                skipped += len(piece)
        except BaseException:
            body.close()
            raise
        return body

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def stop(self) -> None:
        """Cancel the request that is under way; reads raise from now on."""
        self._requests.stop()

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()


class _Body:
    """A whole file of a web server or a store: the body of one answer."""

    def __init__(self, requests: Requests, fs: fsspec.AbstractFileSystem, name: str) -> None:
        self._requests, self._fs = requests, fs
        self._response, _, headers = requests.run(fs, ask(fs, name))
        length = headers.get("content-length")
        self.marks = list_marks(headers, None if length is None else int(length))

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        content: bytes = self._requests.run(self._fs, self._response.content.read(size))
        return content

    def close(self) -> None:
        """End the answer."""
        self._fs.loop.call_soon_threadsafe(self._response.close)
