"""Real servers on the loopback interface for tests: files, objects of several stores, and faults.

Each is a context manager: it listens on a free port for as long as its block runs, for clients in
any process, and leaves neither a thread nor a socket behind.
"""

import base64
import html
import io
import json
import logging
import mimetypes
import os
import re
import socket
import ssl
import struct
import sys
import threading
from collections import Counter
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import trustme

KEY, SECRET = "AKIATESTKEY0000000", "test-secret-4f1c9a"  # easy to find where they must not be
BLOCK = 1 << 16

S3_ERRORS = {
    403: ("AccessDenied", "Access Denied"),
    404: ("NoSuchKey", "The specified key does not exist."),
    500: ("InternalError", "We encountered an internal error. Please try again."),
    503: ("SlowDown", "Please reduce your request rate."),
}


class Request(NamedTuple):
    """What a client asked for, and the status it got: None for a connection that was reset."""

    method: str
    path: str
    range: str | None
    status: int | None


def count_bytes(requests, size):
    """Return how many bytes of a file were asked for, by all requests for ranges."""
    total = 0
    for request in requests:
        if request.method == "GET" and request.range:
            start, _, stop = request.range.removeprefix("bytes=").partition("-")
            total += min(int(stop), size - 1) - int(start) + 1
    return total


@dataclass
class Faults:
    """Which requests fail, and how: by their number, never by chance.

    Every `every`-th request fails; with `first`, the first so many do and no later one. The kinds
    take turns:

    - "403", "404", "500", "503" and so on: this status
    - "cut": the whole Content-Length and half of the body; where there is no body, "reset" once
      the request has been carried out
    - "reset": the connection is reset without an answer
    - "slow": the answer comes after `delay` seconds

    `match` limits them to requests whose "METHOD /path?query" contains it, the only ones counted;
    `per_path` counts each path by itself.
    """

    every: int = 20
    kinds: tuple[str, ...] = ("503", "cut", "slow", "reset", "500")
    delay: float = 1.0
    first: int | None = None
    per_path: bool = False
    match: str = ""
    injected: Counter[str] = field(default_factory=Counter, init=False)
    seen: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self):
        for kind in self.kinds:
            if not re.fullmatch(r"[45]\d\d|cut|reset|slow", kind):
                raise ValueError(f"{kind!r} is no kind of fault")

    def draw(self, method, path):
        """Count a request; return the kind of fault it gets, or None."""
        if self.match not in f"{method} {path}":
            return None
        with self.lock:
            key = path if self.per_path else ""
            self.seen[key] += 1
            number = self.seen[key]
            if number % self.every if self.first is None else number > self.first:
                return None
            kind = self.kinds[self.injected.total() % len(self.kinds)]
            self.injected[kind] += 1
            return kind


class Server(ThreadingHTTPServer):
    """An HTTP/1.1 server that injects faults, remembers requests and ends all it started."""

    daemon_threads = False  # so that server_close() waits for them
    request_queue_size = 128  # the workers of a cluster all connect at once

    def __init__(self, handler, faults, authority=None):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http{'s' * bool(authority)}://127.0.0.1:{self.server_port}"
        self.tls = authority and ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        if authority:
            authority.issue_cert("127.0.0.1").configure_cert(self.tls)
        self.faults = faults
        self.requests = []
        self.authorizations = []  # of the requests, in the same order
        self.connections = set()
        self.stopping = threading.Event()

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=self.url)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.stopping.set()
            for connection in list(self.connections):  # clients keep them open
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.server_close()

    def get_request(self):
        connection, address = super().get_request()
        if self.tls:  # the connection's own thread shakes hands
            connection = self.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        self.connections.add(connection)
        return connection, address

    def close_request(self, request):
        self.connections.discard(request)
        super().close_request(request)

    def handle_error(self, request, client_address):
        """Leave clients that hang up unmentioned."""
        if not isinstance(sys.exception(), ConnectionError | ssl.SSLError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Draws the fault of each request; `respond` of the subclasses answers the others."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    cut = False

    def do_GET(self):
        faults = self.server.faults
        kind = faults and faults.draw(self.command, self.path)
        self.cut = kind == "cut"
        if kind == "reset":
            self.reset()
        elif kind and kind.isdigit():
            for _ in self.body():
                pass
            self.fail(int(kind))
        else:
            if kind == "slow":
                self.server.stopping.wait(faults.delay)
            self.respond()

    do_HEAD = do_GET  # noqa: N815

    def body(self):
        """Yield what the client sends, in pieces."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        left = int(self.headers.get("Content-Length", 0))
        while left and (piece := self.rfile.read(min(left, BLOCK))):
            yield piece
            left -= len(piece)

    def send(self, status, headers, file, length):
        """Answer with `length` bytes of `file`, or half of them."""
        body = length if self.command != "HEAD" else 0
        if self.cut:
            if not body:
                self.reset()
                return
            self.close_connection = True
            body //= 2
        self.log_request(status)
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        while body and (piece := file.read(min(body, BLOCK))):
            self.wfile.write(piece)
            body -= len(piece)

    def send_bytes(self, status, content_type, content, *headers):
        headers = ("Content-Type", content_type), ("Content-Length", str(len(content))), *headers
        self.send(status, headers, io.BytesIO(content), len(content))

    def fail(self, status, *headers):
        self.send_bytes(status, "text/plain", b"%d\n" % status, *headers)

    def reset(self):
        """Close at once: the server's own way of closing says goodbye first."""
        self.log_request(None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        self.close_connection = True

    def log_request(self, code="-", size="-"):
        self.server.authorizations.append(self.headers.get("Authorization"))
        self.server.requests.append(
            Request(self.command, self.path, self.range(), code and int(code))
        )

    def range(self):
        """Return the range that is asked for, also in the way that Azure's client does."""
        return self.headers.get("Range") or self.headers.get("x-ms-range")

    def log_message(self, format, *args):
        """Keep the tests' output short."""


class FileHandler(Handler):
    """Answers with the files of the server's folder."""

    def respond(self):
        path = unquote(urlsplit(self.path).path)
        target = self.server.folder / os.path.normpath(path).lstrip("/")
        expected = self.server.authorization
        if expected and self.headers.get("Authorization") != expected:
            self.fail(401, ("WWW-Authenticate", 'Basic realm="test"'))
        elif path.startswith("/secret/"):
            self.fail(403)
        elif target.is_dir():
            self.send_listing(target)
        elif target.is_file():
            with target.open("rb") as file:
                self.send_file(file)
        else:
            self.fail(404)

    def send_listing(self, folder):
        names = sorted(child.name + "/" * child.is_dir() for child in folder.iterdir())
        links = (f'<a href="{quote(name)}">{html.escape(name)}</a><br>\n' for name in names)
        self.send_bytes(200, "text/html; charset=utf-8", "".join(links).encode())

    def send_file(self, file):
        stat = os.fstat(file.fileno())
        size = stat.st_size
        headers = [
            ("Content-Type", mimetypes.guess_type(file.name)[0] or "application/octet-stream"),
            ("ETag", make_etag(stat)),
            ("Last-Modified", formatdate(stat.st_mtime, usegmt=True)),
        ]
        status, start, end = 200, 0, size
        if self.server.ranges is True:
            headers.append(("Accept-Ranges", "bytes"))
            status, start, end = self.asked_range(size)
        elif self.server.ranges == "none":
            headers.append(("Accept-Ranges", "none"))
        if status == 416:
            self.fail(416, ("Content-Range", f"bytes */{size}"))
            return
        if status == 206:
            headers.append(("Content-Range", f"bytes {start}-{end - 1}/{size}"))
        headers.append(("Content-Length", str(end - start)))
        file.seek(start)
        self.send(status, headers, file, end - start)

    def asked_range(self, size):
        """Return the status, start and end of what the Range header asks of a file of `size`."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.range() or "")
        if not match or match[0] == "bytes=-" or self.command == "HEAD":
            return 200, 0, size
        if match[1]:
            start, end = int(match[1]), min(int(match[2] or size) + 1, size)
        else:
            start, end = max(size - int(match[2]), 0), size
        return (206, start, end) if start < end else (416, 0, 0)


def make_etag(stat):
    return f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'


class ObjectHandler(FileHandler):
    """Has the files of the server's folder as objects, in a bucket of any name."""

    def respond(self):
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        match = self.server.object_path.fullmatch(url.path)
        key = unquote(match["key"] or "")
        target = self.server.folder / os.path.normpath(f"/{key}").lstrip("/")
        if not key:
            self.send_bucket(query)
        elif not target.is_file():
            self.fail(404)
        else:
            with target.open("rb") as file:
                self.send_file(file)

    def list_keys(self, prefix=""):
        paths = (path for path in self.server.folder.rglob("*") if path.is_file())
        keys = (path.relative_to(self.server.folder).as_posix() for path in paths)
        return sorted(key for key in keys if key.startswith(prefix))


class GcsHandler(ObjectHandler):
    """Answers what gcsfs asks of the JSON API of Google Cloud Storage to find and read objects."""

    def send_bucket(self, query):
        prefix = query.get("prefix", "")
        keys = self.list_keys(prefix)
        deeper = query.get("delimiter") or "\0"
        nested = {key for key in keys if deeper in key[len(prefix) :]}
        prefixes = {prefix + key[len(prefix) :].partition(deeper)[0] + deeper for key in nested}
        items = [self.describe(key) for key in keys if key not in nested]
        self.send_json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def send_file(self, file):
        if self.path.startswith("/download/"):
            super().send_file(file)
        else:
            self.send_json(self.describe(os.path.relpath(file.name, self.server.folder)))

    def describe(self, key):
        stat = (self.server.folder / key).stat()
        about = {"kind": "storage#object", "name": key, "size": str(stat.st_size)}
        changed = datetime.fromtimestamp(stat.st_mtime, UTC).strftime("%FT%T.%fZ")
        about |= {"etag": make_etag(stat), "generation": str(stat.st_mtime_ns)}
        return about | {"metageneration": "1", "timeCreated": changed, "updated": changed}

    def send_json(self, value):
        self.send_bytes(200, "application/json", json.dumps(value).encode())

    def fail(self, status, *headers):
        error = {"error": {"code": status, "message": "A fault."}}
        self.send_bytes(status, "application/json", json.dumps(error).encode(), *headers)


class AzureHandler(ObjectHandler):
    """Answers what adlfs asks of the API of Azure's Blob Storage to find and read blobs."""

    def send_bucket(self, query):
        blobs = []
        for key in self.list_keys(query.get("prefix", "")):
            stat = (self.server.folder / key).stat()
            date = formatdate(stat.st_mtime, usegmt=True)
            blobs.append(
                f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{date}</Last-Modified>"
                f"<Etag>{make_etag(stat).strip(chr(34))}</Etag>"
                f"<Content-Length>{stat.st_size}</Content-Length><BlobType>BlockBlob</BlobType>"
                "</Properties></Blob>"
            )
        found = f"<Blobs>{''.join(blobs)}</Blobs><NextMarker/>"
        answer = f'<EnumerationResults ContainerName="bucket">{found}</EnumerationResults>'
        self.send_bytes(200, "application/xml", answer.encode())

    def fail(self, status, *headers):
        """Tell the signature, as the store does where it is not the right one."""
        signature = escape(self.headers.get("Authorization", ""))
        error = f"<Error><Code>A</Code><Message>A fault.\nRequestId:{signature}</Message></Error>"
        self.send_bytes(status, "application/xml", error.encode(), *headers)


class ProxyHandler(Handler):
    """Hands requests on to moto, and its answers back."""

    do_PUT = do_POST = do_DELETE = Handler.do_GET  # noqa: N815

    # Of one connection, not of the message: http.client and this class write their own.
    hop_by_hop = frozenset({"connection", "expect", "keep-alive", "transfer-encoding"})

    def respond(self):
        sends = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        with closing(HTTPConnection(*self.server.moto, timeout=60)) as moto:
            headers = self.end_to_end(self.headers)
            moto.request(self.command, self.path, self.body() if sends else None, headers)
            answer = moto.getresponse()
            headers = self.end_to_end(answer.headers)
            self.send(answer.status, headers.items(), answer, answer.length)

    def end_to_end(self, headers):
        """Return what to pass on, each name once: moto repeats Server, which aiohttp may mind."""
        names = (name for name in headers if name.lower() not in self.hop_by_hop)
        return {name.lower(): headers[name] for name in names}

    def fail(self, status, *headers):
        code, message = S3_ERRORS.get(status, (str(status), "A fault."))
        error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self.send_bytes(status, "application/xml", error.encode(), *headers)


class HttpServer(Server):
    """A server of a folder's files; see `serve_http`."""

    reads = "GET"

    def __init__(self, folder, faults=None, *, ranges=True, password=None, authority=None):
        super().__init__(FileHandler, faults, authority)
        self.base = self.url
        self.folder = Path(folder)
        self.ranges = ranges
        self.authorization = password and f"Basic {base64.b64encode(password.encode()).decode()}"
        self.storage_options = {}
        if authority:
            self.storage_options["ssl"] = trusted = ssl.create_default_context()
            authority.configure_trust(trusted)


class ObjectServer(Server):
    """A server of a folder's files as objects; see `serve`."""

    ranges = True

    def __init__(self, handler, folder, faults):
        super().__init__(handler, faults)
        self.folder = Path(folder)

    def put(self, bucket, key, content):
        """Replace an object at once: who reads the one before goes on with it."""
        path = self.folder / key
        new = path.with_name("new")
        new.write_bytes(content)
        new.replace(path)


class GcsServer(ObjectServer):
    """A server of Google Cloud Storage; see `serve`."""

    base, reads = "gs://bucket", "GET /download/"
    object_path = re.compile(r"(/download)?/storage/v1/b/[^/]+(/o(/(?P<key>[^/]+))?)?")

    def __init__(self, folder, faults=None):
        super().__init__(GcsHandler, folder, faults)
        self.storage_options = {"token": "anon", "endpoint_url": self.url}


class AzureServer(ObjectServer):
    """A server of Azure's Blob Storage; see `serve`."""

    base, reads = "abfs://bucket", "GET /account/bucket/"
    object_path = re.compile(r"/account/[^/]+(/(?P<key>.+))?")

    def __init__(self, folder, faults=None):
        super().__init__(AzureHandler, folder, faults)
        secret = base64.b64encode(SECRET.encode()).decode()
        account = f"AccountName=account;AccountKey={secret};BlobEndpoint={self.url}/account"
        self.storage_options = {"connection_string": f"DefaultEndpointsProtocol=http;{account}"}


class S3Server(Server):
    """A server of S3 buckets; see `serve_s3`."""

    base, reads = "s3://bucket", "GET /bucket/"

    def __init__(self, moto, faults):
        super().__init__(ProxyHandler, faults)
        self.moto = moto
        self.endpoint = self.url
        self.storage_options = {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": self.endpoint,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def make_bucket(self, name):
        self.ask_moto("PUT", f"/{name}")

    def put(self, bucket, key, content, **headers):
        self.ask_moto("PUT", f"/{bucket}/{quote(key)}", content, headers)

    def ask_moto(self, method, path, content=b"", headers=None):
        """Ask without faults, as the same user: moto reads the name of a signature's key."""
        credential = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request"
        with closing(HTTPConnection(*self.moto, timeout=60)) as moto:
            moto.request(method, path, content, {"Authorization": credential, **(headers or {})})
            answer = moto.getresponse()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {answer.read()!r}")


@contextmanager
def serve_http(folder, *, ranges=True, faults=None, password=None, authority=None):
    """Serve `folder` at `.url`; yield the server.

    It honours the Range header; with ``ranges=False`` it sends whole files all the same, and with
    ``ranges="none"`` says so too. Whatever lies below ``/secret/`` is forbidden, and with a
    `password`, "user:password", everything is to those who don't know it. With a certificate
    `authority` of trustme it speaks TLS. `.requests` lists the requests in order, and `.faults` may
    be replaced at any time.
    """
    how = {"ranges": ranges, "password": password, "authority": authority}
    with HttpServer(folder, faults, **how).running() as server:
        yield server


@contextmanager
def serve(kind, folder, *, faults=None):
    """Serve `folder` at `.base`, to clients with `.storage_options`, as a kind of store does.

    The kinds are those of a URL's protocol: http, https, s3, gs and abfs. `.reads` is what `match`
    of Faults limits them to where only reading files may fail.
    """
    if kind == "s3":
        with serve_s3(faults=faults) as server:
            server.make_bucket("bucket")
            for path in Path(folder).rglob("*.*"):
                server.put("bucket", path.relative_to(folder).as_posix(), path.read_bytes())
            yield server
        return
    servers = {"http": HttpServer, "https": HttpServer, "gs": GcsServer, "abfs": AzureServer}
    options = {"authority": trustme.CA()} if kind == "https" else {}
    with servers[kind](folder, faults, **options).running() as server:
        yield server


@contextmanager
def serve_s3(*, faults=None):
    """Serve an empty S3 at `.endpoint`, to s3fs with `.storage_options`; yield the server.

    moto's server does the work, behind a proxy that injects the faults and has `.requests` and
    `.faults` as `serve_http` does. `.make_bucket` and `.put` reach moto past the proxy.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or it prints each request
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    moto._server.daemon_threads = False  # so that stop() waits for them
    try:
        with S3Server(moto.get_host_and_port(), faults).running() as server:
            yield server
            server.ask_moto("POST", "/moto-api/reset")  # its state is the process's
    finally:
        moto.stop()
