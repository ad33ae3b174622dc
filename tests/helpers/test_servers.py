"""The tests' own servers do what they say."""

import http.client
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import fsspec
import pytest

from tests.helpers.servers import KEY, SECRET, Faults, serve, serve_http, serve_s3

CONTENT = bytes(range(256)) * 1000
SIZE = len(CONTENT)
IMPATIENT = {"config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.fixture
def folder(tmp_path):
    for name in "a.tar", "deep/b.tar", "deep/two words.txt", "secret/c.tar":
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(CONTENT)
    return tmp_path


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture
def bucket(s3):
    """The server with one object and without faults."""
    s3.put("bucket", "deep/a b.tar", CONTENT)
    s3.faults = None
    s3.requests.clear()
    return s3


@contextmanager
def connected(protocol, **options):
    """A file system whose connections close here, not in whichever thread collects garbage.

    s3fs closes them in the event loop that runs there, the wrong one where it is not fsspec's.
    """
    fs = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    try:
        yield fs
    finally:
        session = fs._s3creator if protocol == "s3" else getattr(fs, "_session", None)
        if session is not None:
            fs.close_session(fs.loop, session)


def ask(server, path, method="GET", body=None, **headers):
    """Return the answer to one request on a connection of its own, and its body."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer, answer.read()


def exchange(server, path):
    """Return all that a bare socket receives until the server closes it."""
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


class TestHttp:
    @pytest.mark.parametrize(
        ("asked", "status", "expected"),
        [
            ("bytes=10-19", 206, slice(10, 20)),
            ("bytes=255990-", 206, slice(255990, None)),
            ("bytes=-10", 206, slice(-10, None)),
            ("bytes=-999999", 206, slice(None)),
            ("bytes=10-999999", 206, slice(10, None)),
            ("bytes=-", 200, slice(None)),
            ("lines=1-2", 200, slice(None)),
        ],
    )
    def test_ranges(self, folder, asked, status, expected):
        with serve_http(folder) as server:
            answer, body = ask(server, "/a.tar", range=asked)
        assert (answer.status, body) == (status, CONTENT[expected])
        assert answer.headers["Accept-Ranges"] == "bytes"
        if status == 206:
            start, end, _ = expected.indices(SIZE)
            assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"

    def test_a_range_past_the_end(self, folder):
        with serve_http(folder) as server:
            answer, _ = ask(server, "/a.tar", range="bytes=256000-")
        assert (answer.status, answer.headers["Content-Range"]) == (416, "bytes */256000")

    @pytest.mark.parametrize(("ranges", "said"), [(False, None), ("none", "none")])
    def test_without_ranges(self, folder, ranges, said):
        with serve_http(folder, ranges=ranges) as server:
            answer, body = ask(server, "/a.tar", range="bytes=10-19")
        assert (answer.status, answer.headers["Accept-Ranges"], body) == (200, said, CONTENT)

    def test_head(self, folder):
        with serve_http(folder) as server:
            answer, body = ask(server, "/a.tar?signature=x", "HEAD", range="bytes=10-19")
            assert server.requests == [("HEAD", "/a.tar?signature=x", "bytes=10-19", 200)]
        assert (body, answer.headers["Content-Length"]) == (b"", str(SIZE))
        assert answer.headers["ETag"]
        assert answer.headers["Last-Modified"].endswith("GMT")

    @pytest.mark.parametrize(
        ("path", "status"),
        [("/nothing", 404), ("/../x/../../etc/hostname", 404), ("/secret/c.tar", 403)],
    )
    def test_refusals(self, folder, path, status):
        with serve_http(folder) as server:
            assert ask(server, path)[0].status == status

    def test_fsspec(self, folder):
        with serve_http(folder) as server, connected("http") as fs:
            url = f"{server.url}/deep"
            assert fs.find(url) == [f"{url}/b.tar", f"{url}/two%20words.txt"]
            assert fs.glob(f"{server.url}/**/*.tar")[:2] == [f"{server.url}/a.tar", f"{url}/b.tar"]
            assert fs.cat_file(f"{url}/two%20words.txt", start=-5) == CONTENT[-5:]
            with fs.open(f"{url}/b.tar", block_size=1000) as file:
                assert file.read(5000) == CONTENT[:5000]
            assert server.requests[-1].range == "bytes=0-5999"

    def test_password(self, folder):
        with serve_http(folder, password="user:pw") as server, connected("http") as fs:
            answer, _ = ask(server, "/a.tar")
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (
                401,
                'Basic realm="test"',
            )
            assert fs.cat_file(server.url.replace("//", "//user:pw@") + "/a.tar") == CONTENT

    def test_connections_are_kept(self, folder):
        with serve_http(folder) as server:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
            with closing(connection):
                sockets = set()
                for path in "/a.tar", "/nothing", "/deep":
                    connection.request("GET", path)
                    connection.getresponse().read()
                    sockets.add(connection.sock)
        assert len(sockets) == 1


class TestFaults:
    def test_every(self):
        faults = Faults(every=3, kinds=("503", "cut"))
        drawn = [faults.draw("GET", "/") for _ in range(9)]
        assert drawn == [None, None, "503", None, None, "cut", None, None, "503"]
        assert faults.injected == {"503": 2, "cut": 1}

    def test_first(self):
        faults = Faults(first=2, kinds=("reset",))
        assert [faults.draw("GET", p) for p in "abc"] == ["reset", "reset", None]
        faults = Faults(first=1, kinds=("reset",), per_path=True)
        assert [faults.draw("GET", p) for p in "aabb"] == ["reset", None, "reset", None]

    def test_match(self):
        faults = Faults(every=1, kinds=("404",), match="GET /a")
        asked = [("GET", "/a.tar"), ("HEAD", "/a.tar"), ("GET", "/b.tar")]
        assert [faults.draw(*request) for request in asked] == ["404", None, None]

    def test_an_unknown_kind(self):
        with pytest.raises(ValueError, match="'cutt' is no kind"):
            Faults(kinds=("cutt",))

    def test_threads_count_together(self):
        faults = Faults(every=20)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: faults.draw("GET", "/"), range(4000)))
        assert faults.injected == dict.fromkeys(faults.kinds, 40)

    def test_status(self, folder):
        with serve_http(folder, faults=Faults(first=1, kinds=("503",))) as server:
            assert [ask(server, "/a.tar")[0].status for _ in range(2)] == [503, 200]
            assert [request.status for request in server.requests] == [503, 200]

    def test_cut(self, folder):
        with serve_http(folder, faults=Faults(every=1, kinds=("cut",))) as server:
            head, _, body = exchange(server, "/a.tar").partition(b"\r\n\r\n")
        assert b"Content-Length: 256000" in head
        assert body == CONTENT[: SIZE // 2]

    def test_reset(self, folder):
        with serve_http(folder, faults=Faults(every=1, kinds=("reset",))) as server:
            with pytest.raises(ConnectionResetError):
                exchange(server, "/a.tar")
            assert server.requests == [("GET", "/a.tar", None, None)]

    def test_slow(self, folder):
        with serve_http(folder, faults=Faults(every=1, kinds=("slow",), delay=0.2)) as server:
            start = time.perf_counter()
            assert ask(server, "/a.tar")[1] == CONTENT
        assert time.perf_counter() - start >= 0.2


class TestS3:
    def test_reading(self, bucket):
        with connected("s3", **bucket.storage_options) as fs:
            assert fs.find("bucket/deep") == ["bucket/deep/a b.tar"]
            assert fs.info("bucket/deep/a b.tar")["size"] == SIZE
            assert fs.cat_file("bucket/deep/a b.tar", start=5, end=10) == CONTENT[5:10]
        assert bucket.requests[-1] == ("GET", "/bucket/deep/a%20b.tar", "bytes=5-9", 206)

    def test_writing(self, bucket):
        large = CONTENT * 30
        with connected("s3", **bucket.storage_options) as fs:
            fs.pipe_file("bucket/small", CONTENT)
            with fs.open("bucket/large", "wb", block_size=5 << 20) as file:  # in two parts
                file.write(large)
            assert fs.cat_file("bucket/small") == CONTENT
            assert fs.cat_file("bucket/large") == large
            fs.rm(["bucket/small", "bucket/large"])
            assert fs.ls("bucket", refresh=True) == ["bucket/deep"]

    @pytest.mark.parametrize("chunked", [False, True])
    def test_aws_chunked_bodies(self, bucket, chunked):
        body = b"5;chunk-signature=0\r\nhello\r\n0;chunk-signature=0\r\n\r\n"
        answer, _ = ask(
            bucket,
            "/bucket/streamed",
            "PUT",
            iter([body[:9], body[9:]]) if chunked else body,
            authorization=f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request",
            content_encoding="aws-chunked",
            x_amz_content_sha256="STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
            x_amz_decoded_content_length="5",
        )
        assert answer.status == 200
        with connected("s3", **bucket.storage_options) as fs:
            assert fs.cat_file("bucket/streamed") == b"hello"
            fs.rm("bucket/streamed")

    @pytest.mark.parametrize(
        ("kind", "error", "message"),
        [
            ("403", PermissionError, "Access Denied"),
            ("404", FileNotFoundError, "The specified key does not exist"),
            ("500", OSError, r"\[Errno 121\] We encountered an internal error"),
            ("503", OSError, r"\[Errno 16\] Please reduce your request rate"),
        ],
    )
    def test_errors(self, bucket, kind, error, message):
        bucket.faults = Faults(every=1, kinds=(kind,))
        with connected("s3", **bucket.storage_options, **IMPATIENT) as fs:
            fs.retries = 1
            with pytest.raises(error, match=message):
                fs.cat_file("bucket/deep/a b.tar", start=5, end=10)
            with pytest.raises(error, match=message):
                fs.pipe_file("bucket/new", CONTENT)

    @pytest.mark.parametrize("kind", ["cut", "reset"])
    def test_s3fs_survives_a_broken_connection(self, bucket, kind):
        bucket.faults = Faults(first=1, kinds=(kind,))
        with connected("s3", **bucket.storage_options, **IMPATIENT) as fs:
            assert fs.cat_file("bucket/deep/a b.tar", start=5, end=10) == CONTENT[5:10]
        assert bucket.faults.injected == {kind: 1}
        assert len(bucket.requests) == 2

    def test_credentials_are_recognizable(self, s3):
        assert (s3.storage_options["key"], s3.storage_options["secret"]) == (KEY, SECRET)


@pytest.mark.parametrize("kind", ["gs", "abfs"])
class TestObjects:
    def test_reading(self, folder, kind):
        with serve(kind, folder) as server, connected(kind, **server.storage_options) as fs:
            assert fs.find("bucket/deep") == ["bucket/deep/b.tar", "bucket/deep/two words.txt"]
            assert fs.glob("bucket/*.tar") == ["bucket/a.tar"]
            (listed,) = fs.find("bucket/deep/", prefix="b", detail=True).values()
            fs.invalidate_cache()
            info = fs.info("bucket/deep/b.tar")
            assert (info["etag"], info["size"]) == (listed["etag"], listed["size"])
            assert info["size"] == SIZE
            assert fs.cat_file("bucket/deep/two words.txt", start=5, end=10) == CONTENT[5:10]
        # Not always the last one: gcsfs asks for two things at a time to tell what a name is.
        (request,) = (each for each in server.requests if each.range == "bytes=5-9")
        assert request.status == 206
        assert f"{request.method} {request.path}".startswith(server.reads)

    def test_refusals(self, folder, kind):
        with serve(kind, folder) as server, connected(kind, **server.storage_options) as fs:
            with pytest.raises(FileNotFoundError):
                fs.cat_file("bucket/nope.tar")
            server.faults = Faults(every=1, kinds=("403",))
            with pytest.raises(Exception, match=r"Forbidden|A fault"):
                fs.cat_file("bucket/a.tar")


def test_tls(folder):
    with serve("https", folder) as server:
        with connected("https", **server.storage_options) as fs:
            assert fs.cat_file(f"{server.base}/a.tar", start=5, end=10) == CONTENT[5:10]
        with connected("https") as fs, pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            fs.cat_file(f"{server.base}/a.tar")


def test_servers_end(folder):
    """They wait neither for idle clients nor for slow answers, and leave nothing running."""
    before = set(threading.enumerate())
    start = time.perf_counter()
    faults = Faults(every=1, kinds=("slow",), delay=60)
    with serve_http(folder) as server, serve_s3(faults=faults) as s3:
        s3.make_bucket("bucket")
        s3.put("bucket", "key", b"content")
        idle = socket.create_connection(("127.0.0.1", server.server_port))
        waiting = socket.create_connection(("127.0.0.1", s3.server_port))
        waiting.sendall(b"GET /bucket/key HTTP/1.1\r\nHost: test\r\n\r\n")
        while not faults.injected:
            time.sleep(0.01)
    idle.close()
    waiting.close()
    assert time.perf_counter() - start < 30
    assert set(threading.enumerate()) <= before
    for ended in server, s3:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ended.server_port))


def test_an_s3_starts_empty():
    with serve_s3() as first:
        first.make_bucket("bucket")
    with serve_s3() as second, connected("s3", **second.storage_options) as fs:
        assert fs.ls("") == []
