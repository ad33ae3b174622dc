"""Read ranges of a remote file, each with one request. Thread-safe."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import fsspec

from dask_imgread.buffers import BUFFERS
from dask_imgread.errors import StorageError
from dask_imgread.storage.filesystems import reach_hub
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import find_status, until_stopped, with_retries

Result = TypeVar("Result")

_PARTIAL, _NOT_SATISFIABLE = 206, 416
_PIECE_BYTES = 1 << 16  # received at a time
_CONTENT_RANGE = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")  # RFC 9110, 14.4


class NoRangesError(OSError):
    """The server sends whole files only."""


class _Answer(NamedTuple):
    content: bytes | memoryview | None  # None: the server sends no ranges
    size: int | None  # of the whole file, if the answer has it
    etag: str | None


class RangeReader:
    """Read ranges of a remote file.

    For S3 and web servers no request is made before the first read: each answer has the file's
    size. It has its ETag, too, so that a file that changes meanwhile is noticed. Other stores are
    asked for the size, if it is not given, and the Hugging Face Hub for the file's revision.

    Parameters
    ----------
    fs, name
        The file system, and the file's name in it.
    size
        The file's size, if it is known already.
    """

    workers = 16  # requests at a time
    compressed, problem = False, ""

    def __init__(self, fs: fsspec.AbstractFileSystem, name: str, size: int | None = None) -> None:
        self._name = self._url = name
        if "hf" in fs.protocol:
            fs, self._url = with_retries(reach_hub, name, fs, name)
        self._fs = fs
        self._protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._running: set[Future[Any]] = set()
        self._etag: str | None = None
        self.size = size
        self._sized = False  # whether an answer has confirmed `size`
        if not self._protocols & {"http", "s3"}:
            if self.size is None:
                self.size = with_retries(fs.info, name, name).get("size")
            self._sized = True
            if self.size is None:
                raise NoRangesError(f"{redact_url(name)}: its size is not known")

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes of a range, fewer where the file ends.

        Raises
        ------
        StorageError
            If they can't be fetched (see ``with_retries``), or ``stop`` was called.
        NoRangesError
            If the server sends whole files only.
        OSError
            If the file has changed since the first read.
        """
        if self.size is not None:
            stop = min(stop, self.size)
        if start >= stop:
            return b""
        try:
            answer = until_stopped(self._stopped, self._request, self._name, start, stop)
        except CancelledError:
            raise StorageError(f"{redact_url(self._name)}: stopped") from None
        if answer.content is None:
            raise NoRangesError(f"{redact_url(self._name)}: the server sends whole files only")
        self._compare(answer)
        return answer.content

    def stop(self) -> None:
        """Cancel all requests; reads raise from now on."""
        self._stopped.set()
        with self._lock:
            for future in self._running:
                future.cancel()

    def close(self) -> None:
        """Do nothing: no file is open between requests."""

    def _compare(self, answer: _Answer) -> None:
        """Keep the size and ETag of the first answer; raise OSError if a later ETag differs."""
        with self._lock:
            if not self._sized:  # what the caller gave may be outdated
                self.size, self._sized = answer.size, True
            if self._etag is None:
                self._etag = answer.etag
            elif answer.etag not in (None, self._etag):
                raise OSError(
                    f"{redact_url(self._name)} changed while it was read: "
                    f"its ETag was {self._etag} and is {answer.etag}"
                )

    def _request(self, start: int, stop: int) -> _Answer:
        if "http" in self._protocols:
            answer = self._run(self._ask_web_server(start, stop))
        elif "s3" in self._protocols:
            answer = self._run(self._ask_s3(start, stop))
        elif self._fs.async_impl:
            request = self._fs._cat_file(self._name, start=start, end=stop)
            answer = _Answer(self._run(request), self.size, None)
        else:  # opens the file, and by default would read more than the range
            opened = {"cache_type": "none", "size": self.size}
            content = self._fs.cat_file(self._name, start=start, end=stop, **opened)
            answer = _Answer(content, self.size, None)
        if answer.content is None:
            return answer
        wanted = (stop if answer.size is None else min(stop, answer.size)) - start
        if len(answer.content) < wanted:
            raise ConnectionError(f"{len(answer.content)} bytes came of {wanted}")
        return answer

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a request on fsspec's event loop, where it can be cancelled."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop)
        with self._lock:
            self._running.add(future)
            if self._stopped.is_set():
                future.cancel()
        try:
            return future.result()
        finally:
            with self._lock:
                self._running.discard(future)

    async def _ask_web_server(self, start: int, stop: int) -> _Answer:
        session = await self._fs.set_session()
        options = dict(self._fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}"}
        headers["Accept-Encoding"] = "identity"  # offsets are those of the file
        url = self._fs.encode_url(self._url)
        async with session.get(url, headers=headers, **options) as response:
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            size = int(match[1]) if match else None
            etag = response.headers.get("ETag")
            if response.status == _NOT_SATISFIABLE:
                return _Answer(b"", start if size is None else size, etag)
            response.raise_for_status()
            if response.status != _PARTIAL:
                response.close()  # otherwise the whole file would be transferred
                return _Answer(None, None, etag)
            return _Answer(await _receive(response, stop - start), size, etag)

    async def _ask_s3(self, start: int, stop: int) -> _Answer:
        bucket, key, version = self._fs.split_path(self._name)
        options = {"VersionId": version} if version else {}
        options |= {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}"}
        try:
            response = await self._fs._call_s3("get_object", **options)
        except Exception as error:
            if find_status(error) == _NOT_SATISFIABLE:
                return _Answer(b"", start, None)
            raise
        match = _CONTENT_RANGE.match(response.get("ContentRange", ""))
        try:
            content = await _receive(response["Body"].raw_stream, stop - start)
        finally:
            with suppress(Exception):
                response["Body"].close()
        return _Answer(content, int(match[1]) if match else len(content), response.get("ETag"))


async def _receive(response: Any, most: int) -> memoryview:
    """Return the body of an aiohttp response, in reused memory.

    Dask sets MALLOC_TRIM_THRESHOLD_=65536 for its workers. Each of the pieces of 256 KiB that
    asyncio receives is then mapped and unmapped, which takes three times as long.
    """
    transport = response.connection and response.connection.transport
    if hasattr(transport, "max_size"):  # asyncio's own transport, without TLS
        transport.max_size = _PIECE_BYTES
    content, position = BUFFERS.take(most).data, 0
    async for piece in response.content.iter_any():
        content[position : position + len(piece)] = piece
        position += len(piece)
    return content[:position]
