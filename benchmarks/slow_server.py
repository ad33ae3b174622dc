"""A web server as far away as an object store: ``with serve(folder, 0.05, 80e6) as server``.

Each request is answered after a latency, and each connection has a bandwidth. It runs in a process
of its own, sends with ``sendfile``, and counts requests and bytes.
"""

from __future__ import annotations

import json
import os
import re
import socketserver
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

_PIECE = 1 << 18  # bytes between two looks at the clock
_STATS = "/.stats"


@dataclass(frozen=True)
class SlowServer:
    """A server that runs.

    Parameters
    ----------
    port
        Of the loopback interface.
    """

    port: int

    @property
    def url(self) -> str:
        """The URL of the folder."""
        return f"http://127.0.0.1:{self.port}"

    def read_stats(self) -> dict[str, int]:
        """Return how many requests and bytes there were since the last time."""
        connection = HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", _STATS)
        stats: dict[str, int] = json.loads(connection.getresponse().read())
        connection.close()
        return stats


@contextmanager
def serve(folder: str | Path, latency: float, bandwidth: float) -> Iterator[SlowServer]:
    """Serve a folder's files: ``latency`` in seconds, ``bandwidth`` in bytes a second."""
    command = [sys.executable, "-m", __name__, str(folder), str(latency), str(bandwidth)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield SlowServer(int(process.stdout.readline()))
        finally:
            process.terminate()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body may wait 40 ms for the answer to its headers
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self.path == _STATS:
            body = json.dumps(self.server.stats).encode()
            self.server.stats = dict.fromkeys(self.server.stats, 0)
            self._begin(200, len(body))
            self.wfile.write(body)
        else:
            self._answer()

    def _answer(self) -> None:
        self.server.stats["requests"] += 1
        time.sleep(self.server.latency)
        try:
            file = open(self.server.folder / self.path.lstrip("/"), "rb")  # noqa: SIM115
        except OSError:
            self._begin(404, 0)
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, stop = (int(asked[1]), int(asked[2] or size) + 1) if asked else (0, size)
            stop = min(stop, size)
            if start >= stop and asked:
                self._begin(416, 0, ("Content-Range", f"bytes */{size}"))
                return
            more = [("Content-Range", f"bytes {start}-{stop - 1}/{size}")] if asked else []
            self._begin(206 if asked else 200, stop - start, ("ETag", f'"{size}"'), *more)
            if self.command == "GET":
                with suppress(ConnectionError):
                    self._send(file.fileno(), start, stop)

    def _begin(self, status: int, length: int, *headers: tuple[str, str]) -> None:
        self.send_response_only(status)
        for name, value in (("Content-Length", str(length)), ("Accept-Ranges", "bytes"), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def _send(self, file: int, start: int, stop: int) -> None:
        begin, first = time.perf_counter(), start
        while start < stop:
            sent = os.sendfile(self.connection.fileno(), file, start, min(_PIECE, stop - start))
            self.server.stats["bytes"] += sent
            start += sent
            early = (start - first) / self.server.bandwidth - (time.perf_counter() - begin)
            if early > 0:
                time.sleep(early)

    def log_message(self, *_: Any) -> None:
        pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, latency: float, bandwidth: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency, self.bandwidth = folder, latency, bandwidth
        self.stats = {"requests": 0, "bytes": 0}


if __name__ == "__main__":
    server = _Server(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
    print(server.server_address[1], flush=True)
    server.serve_forever()
