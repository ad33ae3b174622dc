"""Read ranges of a remote file, each with one request. Thread-safe."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, TypeVar

import fsspec

from dask_imgread.buffers import BLOCKS
from dask_imgread.storage.filesystems import reach_hub
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import find_status, until_stopped

Result = TypeVar("Result")

_PARTIAL, _NOT_SATISFIABLE = 206, 416
_PIECE_BYTES = 1 << 16  # received at a time
_REUSED_BYTES = 256 << 10  # the memory of ranges from this size on is reused
# A shard begins with smaller ranges. Once it has come to these, the memory of those would lie idle.
_LARGE_BYTES = 8 << 20
_SILENCE = 30.0  # seconds without a byte of a whole file, after which it is asked for again
_KINDS = {"abfs", "gs", "http", "s3"}  # of stores that `ask` knows, by one of their protocols
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(?:(\d+)|\*)")  # RFC 9110, 14.4


class NoRangesError(OSError):
    """The server sends whole files only."""


class _Answer(NamedTuple):
    content: bytes | memoryview | None  # None: the server sends no ranges
    marks: Mapping[str, Any]  # see Marks


class Marks:
    """What tells a file from another that replaced it: its size, and its ETag or its date."""

    def __init__(self, name: str) -> None:
        self._name, self._seen = redact_url(name), dict[str, Any]()

    def compare(self, marks: Mapping[str, Any]) -> None:
        """Keep those that are seen for the first time; raise OSError if another has changed."""
        for mark, value in marks.items():
            if value is None:
                continue
            seen = self._seen.setdefault(mark, value)
            if seen != value:
                raise OSError(
                    f"{self._name} changed while it was read: its {mark} was {seen} and is {value}"
                )


def list_marks(headers: Mapping[str, str], size: int | None) -> dict[str, Any]:
    """Return the marks that an answer has."""
    kind = "ETag" if headers.get("etag") else "Last-Modified"
    return {"size": size, kind: headers.get(kind.lower())}


class Requests:
    """Requests on fsspec's event loop, all of which can be cancelled. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Future[Any]] = set()
        self.stopped = threading.Event()

    def run(self, fs: fsspec.AbstractFileSystem, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Wait for a request's result; raise CancelledError once ``stop`` was called."""
        with self._lock:
            if self.stopped.is_set():
                coroutine.close()
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(coroutine, fs.loop)
            self._running.add(future)
        try:
            return future.result()
        finally:
            with self._lock:
                self._running.discard(future)

    def stop(self) -> None:
        """Cancel what is under way, and all that follows."""
        self.stopped.set()
        with self._lock:
            for future in self._running:
                future.cancel()


class Stopper:
    """Stops all requests for a shard, from another thread. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: list[Requests] = []
        self._stopped = False

    def make_requests(self) -> Requests:
        """Return new requests; they are stopped already if ``stop`` was called."""
        requests = Requests()
        with self._lock:
            self._made.append(requests)
            if self._stopped:
                requests.stop()
        return requests

    def stop(self) -> None:
        """Stop all requests."""
        with self._lock:
            self._stopped = True
            for requests in self._made:
                requests.stop()


def look_up(
    fs: fsspec.AbstractFileSystem, name: str, url: str, requests: Requests
) -> dict[str, Any]:
    """Return what a file system tells about a file; errors name the URL."""

    def find() -> dict[str, Any]:
        info: dict[str, Any] = requests.run(fs, fs._info(name)) if fs.async_impl else fs.info(name)
        return info

    return until_stopped(requests.stopped, find, url)


def can_ask(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether ``ask`` knows the kind of store; else fsspec's own requests must do."""
    return not _KINDS.isdisjoint(fs.protocol)


async def ask(
    fs: fsspec.AbstractFileSystem, url: str, **headers: str
) -> tuple[Any, int, Mapping[str, str]]:
    """Ask a web server or a store for a file, or the range that a header names.

    Returns aiohttp's response, its status and its headers. The time that a range takes is limited;
    that of a whole file is not, as long as its bytes keep coming.
    """
    if "s3" in fs.protocol:
        return await _ask_s3(fs, url, headers)
    if "abfs" in fs.protocol:
        return await _ask_azure(fs, url, headers)
    if "gs" in fs.protocol:
        session, url = await fs._set_session(), fs.url(url)
        options = {"params": fs._get_params({}), "timeout": fs.requests_timeout}
        # Else what is stored as gzip's encoding is sent decompressed, and without ranges.
        headers = {**fs._get_headers(None), "Accept-Encoding": "gzip", **headers}
    else:
        session, url, options = await fs.set_session(), fs.encode_url(url), dict(fs.kwargs)
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity", **headers}
    # Offsets are those of the file, even if the server says that its format is an encoding.
    options["auto_decompress"] = False
    if "Range" not in headers:
        from aiohttp import ClientTimeout

        limits = options.get("timeout") or getattr(session, "timeout", None)
        silence = getattr(limits, "sock_read", None) or _SILENCE
        options["timeout"] = ClientTimeout(sock_connect=silence, sock_read=silence)
    response = await session.get(url, headers=headers, **options)
    response.raise_for_status()
    return response, response.status, response.headers


async def _ask_s3(
    fs: fsspec.AbstractFileSystem, url: str, headers: Mapping[str, str]
) -> tuple[Any, int, Mapping[str, str]]:
    bucket, key, version = fs.split_path(url)
    options = {"VersionId": version} if version else {}
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, **options, **headers)
    about = answer["ResponseMetadata"]
    return answer["Body"].raw_stream, about["HTTPStatusCode"], about["HTTPHeaders"]


async def _ask_azure(
    fs: fsspec.AbstractFileSystem, url: str, headers: Mapping[str, str]
) -> tuple[Any, int, Mapping[str, str]]:
    """Ask by the method beneath the client's ``download_blob``.

    That would read the body itself, in pieces of 4 KiB, and ask again by itself.
    """
    container, key, version = fs.split_path(url)
    blob = fs.service_client.get_blob_client(container, key)._client.blob
    options = {"range": headers.get("Range"), "version_id": version, "retry_total": 0}
    answer = await blob.download(**options, **fs._timeout_kwargs, cls=lambda found, *_: found)
    response = answer.http_response.internal_response
    return response, response.status, response.headers


class RangeReader:
    """Read ranges of a remote file.

    For web servers, S3, Google Cloud Storage and Azure no request is made before the first read:
    each answer has the file's size. It has its ETag or date, too, so that a file that changes
    meanwhile is noticed. Other stores are asked for the size, if it is not given, and the Hugging
    Face Hub for the revision.

    Parameters
    ----------
    fs, name
        The file system, and the file's name in it.
    size
        The file's size, if it is known already.
    stopper
        To stop it from another thread.
    """

    workers = 16  # requests at a time
    problem = ""

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        name: str,
        size: int | None = None,
        stopper: Stopper | None = None,
    ) -> None:
        self._name = self._url = name
        self._requests = (stopper or Stopper()).make_requests()
        if "hf" in fs.protocol:
            fs, self._url = until_stopped(self._requests.stopped, reach_hub, name, fs, name)
        self._fs = fs
        self._lock = threading.Lock()
        self._marks = Marks(name)
        self.size = size or None  # some servers say 0 of a file whose size they don't know
        self._sized = False  # whether an answer has confirmed `size`
        self._asks = can_ask(fs)
        if not self._asks:
            if self.size is None:
                self.size = self._find_size()
            self._sized = True

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes of a range, fewer where the file ends.

        Raises
        ------
        StorageError
            If they can't be fetched (see ``with_retries``), or ``stop`` was called.
        NoRangesError
            If the server sends whole files only.
        OSError
            If the file has changed since the first read, or the server sends another range.
        """
        pieces: list[bytes | memoryview] = []
        while (end := self._clip(start, stop)) > start:  # servers may send less than they are asked
            stopped = self._requests.stopped
            answer = until_stopped(stopped, self._request, self._name, start, end)
            if answer.content is None:
                raise NoRangesError(f"{redact_url(self._name)}: the server sends whole files only")
            self._compare(answer.marks)
            if not answer.content:
                break
            pieces.append(answer.content)
            start += len(answer.content)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def stop(self) -> None:
        """Cancel all requests; reads raise from now on."""
        self._requests.stop()

    def close(self) -> None:
        """Do nothing: no file is open between requests."""

    def _clip(self, start: int, stop: int) -> int:
        """Return where a read ends; a size that is not confirmed ends none before it begins."""
        if self.size is None or (start >= self.size and not self._sized):
            return stop
        return min(stop, self.size)

    def _compare(self, marks: Mapping[str, Any]) -> None:
        """Raise OSError if the file has changed; keep the size that the first answer tells."""
        size = marks.get("size")
        if size is None and self.size is None:
            size = self._find_size()
        with self._lock:
            self._marks.compare(marks)
            if not self._sized:  # what the caller gave may be outdated
                self.size, self._sized = self.size if size is None else size, True

    def _find_size(self) -> int:
        size: int | None = look_up(self._fs, self._url, self._name, self._requests).get("size")
        if size is None:
            raise NoRangesError(f"{redact_url(self._name)}: its size is not known")
        return size

    def _request(self, start: int, stop: int) -> _Answer:
        if self._asks:
            answer = self._requests.run(self._fs, self._ask(start, stop))
            if answer.content is None and self._sized:
                raise ConnectionError("the server sent the whole file, and ranges before")
            return answer
        if self._fs.async_impl:
            request = self._fs._cat_file(self._name, start=start, end=stop)
            content = self._requests.run(self._fs, request)
        else:  # opens the file, and by default would read more than the range
            opened = {"cache_type": "none", "size": self.size}
            content = self._fs.cat_file(self._name, start=start, end=stop, **opened)
        if not content:
            raise ConnectionError(f"0 bytes came of {stop - start}")
        return _Answer(content, {})

    async def _ask(self, start: int, stop: int) -> _Answer:
        try:
            response, status, headers = await ask(
                self._fs, self._url, Range=f"bytes={start}-{stop - 1}"
            )
        except Exception as error:
            if find_status(error) != _NOT_SATISFIABLE:
                raise
            match = _CONTENT_RANGE.match(
                (getattr(error, "headers", None) or {}).get("content-range", "")
            )
            return _Answer(b"", {"size": int(match[3]) if match and match[3] else start})
        try:
            if status != _PARTIAL:
                return _Answer(None, {})
            match = _CONTENT_RANGE.match(headers.get("content-range", ""))
            first, last, size = map(_to_int, match.groups()) if match else (None, None, None)
            if first not in (None, start):
                raise OSError(
                    f"{redact_url(self._name)}: the server sent the range from {first} on, "
                    f"not that from {start} on"
                )
            content = await _receive(response, stop - start)
        finally:
            response.close()  # unless the answer is complete: then its connection is used again
        wanted = max(1, min(last + 1, stop) - start) if last is not None else 1
        if len(content) < wanted:
            raise ConnectionError(f"{len(content)} bytes came of {wanted}")
        return _Answer(content, list_marks(headers, size))


def _to_int(digits: str | None) -> int | None:
    return None if digits is None else int(digits)


async def _receive(response: Any, most: int) -> memoryview:
    """Return the first bytes of the body of an aiohttp response, in reused memory.

    Dask sets MALLOC_TRIM_THRESHOLD_=65536 for its workers. Each of the pieces of 256 KiB that
    asyncio receives is then mapped and unmapped, which takes three times as long; with TLS, too,
    where it takes such a piece for each record of 16 KiB.
    """
    transport = response.connection and response.connection.transport
    receiver = getattr(transport, "_ssl_protocol", transport)
    if hasattr(receiver, "max_size"):  # asyncio's own
        receiver.max_size = _PIECE_BYTES
    if hasattr(receiver, "_ssl_buffer_view"):  # what is decrypted and handed on at a time
        receiver._ssl_buffer_view = receiver._ssl_buffer_view[:_PIECE_BYTES]
    if most >= _LARGE_BYTES:
        BLOCKS.clear(below=_LARGE_BYTES)
    reused = most >= _REUSED_BYTES
    content = BLOCKS.take(most, spare=False).data if reused else memoryview(bytearray(most))
    position = 0
    async for piece in response.content.iter_any():
        used = piece[: most - position]
        content[position : position + len(used)] = used
        position += len(used)
        if len(used) < len(piece):
            break  # more than was asked for
    return content[:position]
