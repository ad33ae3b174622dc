"""Remote files on servers that fail, lie, or answer in unusual but legal ways."""

import functools
import gzip
import io
import tarfile
import threading
import time
from pathlib import Path

import aiohttp
import fsspec
import numpy as np
import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.buffers import BLOCKS
from dask_imgread.errors import StorageError
from dask_imgread.storage.ranges import RangeReader
from dask_imgread.testing import write_shard
from tests.helpers.images import encode, read_rows
from tests.helpers.servers import KEY, SECRET, Handler, Server
from tests.helpers.servers import serve as serve_kind

MIB = 1 << 20
ETAG = ("ETag", '"x"')

compress = functools.lru_cache(1)(functools.partial(gzip.compress, compresslevel=1))


class OddHandler(Handler):
    """Answers as the server's function does."""

    def respond(self):
        self.server.answer(self)

    def asked(self, size):
        """Return the first byte that is asked for and the one after the last."""
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(first), min(int(last or size - 1) + 1, size)

    def send_part(self, content, start, stop, *headers, total="", status=206):
        """Send a range with the headers that belong to it."""
        where = ("Content-Range", f"bytes {start}-{stop - 1}/{total or len(content)}")
        self.send_bytes(status, "application/x-tar", content[start:stop], where, *headers)


class OddServer(Server):
    """A server all of whose answers come from a function of the handler."""

    def __init__(self, answer):
        super().__init__(OddHandler, None)
        self.answer = answer


def serve(answer):
    return OddServer(answer).running()


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """The bytes of a shard of 7 MB."""
    rng = np.random.default_rng(0)
    members = []
    for number in range(60):
        pixels = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
        members += [
            (f"{number:03d}.png", encode(Image.fromarray(pixels), "PNG")),
            (f"{number:03d}.txt", b"label"),
        ]
    path = write_shard(tmp_path_factory.mktemp("odd") / "a.tar", members)
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture(scope="module")
def expected(shard, tmp_path_factory):
    path = tmp_path_factory.mktemp("odd") / "a.tar"
    path.write_bytes(shard)
    return read(path)


@pytest.fixture(autouse=True)
def few_attempts(monkeypatch, short_pauses):
    monkeypatch.setattr("dask_imgread.storage.retries.ATTEMPTS", 2)


def read(path, **task):
    """Return the key, pixels, sidecars and error of each image."""
    return [row[:4] for row in read_rows(path, task=task)]


def read_until_lost(url, expected):
    """Check the images that could be read, and return the error of the one record of the rest."""
    *good, (_, _, _, error) = read(url)
    assert good == expected[: len(good)]
    assert 0 < len(good) < len(expected)
    return error


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("status", "error"),
    [(403, "unreachable: "), (404, "unreadable shard: "), (503, "unreachable: ")],
)
def test_a_refusal_in_the_middle_is_no_truncation(shard, expected, status, error, compressed):
    content = compress(shard) if compressed else shard

    def answer(handler):
        start, stop = handler.asked(len(content))
        if start > MIB:
            handler.fail(status)
        else:
            handler.send_part(content, start, stop, ETAG)

    with serve(answer) as server:
        found = read_until_lost(f"{server.url}/a.tar", expected)
    assert found.startswith(error)
    assert f"HTTP {status}" in found


@pytest.mark.parametrize("compressed", [False, True])
def test_a_change_in_the_middle_is_no_truncation(shard, expected, compressed):
    content = compress(shard) if compressed else shard

    def answer(handler):
        start, stop = handler.asked(len(content))
        handler.send_part(content, start, stop, ("ETag", '"y"') if start > MIB else ETAG)

    with serve(answer) as server:
        error = read_until_lost(f"{server.url}/a.tar", expected)
    assert error.startswith("unreadable shard: ")
    assert 'changed while it was read: its ETag was "x" and is "y"' in error


def send_more(handler, content, start, stop):
    handler.send_part(content, start, min(stop + 100, len(content)), ETAG)


def send_less(handler, content, start, stop):
    handler.send_part(content, start, min(stop, start + MIB // 2), ETAG)


def hide_the_size(handler, content, start, stop):
    handler.send_part(content, start, stop, ETAG, total="*")


def hide_the_range(handler, content, start, stop):
    handler.send_bytes(206, "application/x-tar", content[start:stop], ETAG)


def call_it_an_encoding(handler, content, start, stop):
    handler.send_part(content, start, stop, ETAG, ("Content-Encoding", "gzip"))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "send", [send_more, send_less, hide_the_size, hide_the_range, call_it_an_encoding]
)
def test_unusual_answers_are_understood(shard, expected, send, compressed):
    content = compress(shard) if compressed else shard

    def answer(handler):
        start, stop = handler.asked(len(content))
        send(handler, content, start, stop)

    with serve(answer) as server:
        assert read(f"{server.url}/a.tar") == expected


def test_another_range_than_was_asked_for_is_an_error(shard, expected):
    def answer(handler):
        start, stop = handler.asked(len(shard))
        shift = 51_200 if start > MIB else 0
        handler.send_part(shard, start - shift, stop - shift, ETAG)

    with serve(answer) as server:
        error = read_until_lost(f"{server.url}/a.tar", expected)
    assert error.startswith(f"unreadable shard: {server.url}/a.tar: the server sent the range from")


@pytest.mark.parametrize(
    ("mark", "more"), [("size", 512), ("Last-Modified", 0)], ids=["size", "date"]
)
def test_a_change_shows_without_an_etag(shard, expected, mark, more):
    def answer(handler):
        start, stop = handler.asked(len(shard))
        late = start > 2 * MIB
        content = shard + bytes(more if late else 0)
        date = f"Mon, 0{1 + late} Jan 2024 00:00:00 GMT" if not more else "Mon, 01 Jan 2024"
        handler.send_part(content, start, stop, ("Last-Modified", date))

    with serve(answer) as server:
        error = read_until_lost(f"{server.url}/a.tar", expected)
    assert f"changed while it was read: its {mark} was" in error


def test_a_whole_file_amid_ranges_is_tried_again(shard, expected):
    refused = []

    def answer(handler):
        start, stop = handler.asked(len(shard))
        if start > 2 * MIB and (handler.server.broken or not refused):
            refused.append(start)
            handler.send_bytes(200, "application/x-tar", shard, ETAG)
        else:
            handler.send_part(shard, start, stop, ETAG)

    with serve(answer) as server:
        server.broken = False
        assert read(f"{server.url}/a.tar") == expected
        assert refused
        server.broken = True
        error = read_until_lost(f"{server.url}/a.tar", expected)
    assert error.startswith("unreachable: ")
    assert "the server sent the whole file" in error


@pytest.mark.parametrize("said", [0, 1, 512, 1 << 50])
@pytest.mark.parametrize("first", [0, 30])
def test_a_wrong_size_loses_nothing(shard, expected, said, first):
    def answer(handler):
        handler.send_part(shard, *handler.asked(len(shard)), ETAG)

    start = shard.index(b"%03d.png" % first)
    with serve(answer) as server:
        rows = read(f"{server.url}/a.tar", sizes=(said,), byte_range=(start, None))
    assert rows == expected[first:]


def test_a_stopped_read_says_so(shard):
    with serve(lambda handler: handler.fail(503)) as server:
        ranges = RangeReader(fsspec.filesystem("http"), f"{server.url}/a.tar")
        ranges.stop()
        with pytest.raises(StorageError, match=r"a\.tar: stopped$"):
            ranges.read(0, 10)


def break_off(handler, content, length):
    """Send the first bytes of a whole file, and close the connection."""
    handler.send_response_only(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.send_header(*ETAG)
    handler.end_headers()
    handler.wfile.write(content[:length])
    handler.wfile.flush()
    handler.close_connection = True


@pytest.mark.parametrize("compressed", [False, True])
def test_a_whole_file_that_changes_is_no_mixture(shard, expected, compressed):
    content = compress(shard) if compressed else shard
    opened = []

    def answer(handler):
        opened.append(handler.path)
        if len(opened) <= 2:  # to see whether it sends ranges, and to be read
            break_off(handler, content, 3 * MIB)
        else:
            handler.send_bytes(200, "application/x-tar", bytes(len(content)), ("ETag", '"y"'))

    with serve(answer) as server:
        error = read_until_lost(f"{server.url}/a.tar", expected)
    assert len(opened) == 3
    assert 'changed while it was read: its ETag was "x" and is "y"' in error


def test_a_refusal_amid_a_whole_file_is_unreachable(shard, expected):
    opened = []

    def answer(handler):
        opened.append(handler.path)
        if len(opened) <= 2:
            break_off(handler, shard, 3 * MIB)
        else:
            handler.fail(403)

    with serve(answer) as server:
        error = read_until_lost(f"{server.url}/a.tar", expected)
    assert error.startswith(f"unreachable: {server.url}/a.tar: HTTP 403")


@pytest.mark.parametrize("compressed", [False, True])
def test_closing_does_not_wait_for_a_server_that_stalls(shard, compressed):
    content = compress(shard) if compressed else shard
    closed, waited = threading.Event(), []

    def answer(handler):
        break_off(handler, content, 6 * MIB)
        waited.append(closed.wait(60))

    with serve(answer) as server:
        reader = ImageReaderStage(device="cpu", verbose=False, dali_batch_size=2)
        batches = reader.stream(FileGroupTask(data=[f"{server.url}/a.tar"]))
        next(batches)
        batches.close()
        closed.set()
    assert all(waited)


def test_a_whole_file_may_take_long_if_its_bytes_keep_coming(shard, expected):
    """The time limit of a session holds for each of its other requests."""
    limit = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=0.5)}}

    def answer(handler):
        break_off(handler, shard, 0)
        for start in range(0, len(shard), MIB):
            handler.wfile.write(shard[start : start + MIB])
            time.sleep(0.1)

    with serve(answer) as server:
        options = {"reader_config": {"storage_options": limit}}
        assert read(f"{server.url}/a.tar", **options) == expected


def test_a_whole_file_that_stops_coming_is_a_time_out(shard, expected, monkeypatch):
    monkeypatch.setattr("dask_imgread.storage.ranges._SILENCE", 0.2)
    done = threading.Event()

    def answer(handler):
        break_off(handler, shard, 3 * MIB)
        done.wait(60)

    with serve(answer) as server:
        error = read_until_lost(f"{server.url}/a.tar", expected)
        done.set()
    assert error.startswith("unreachable: ")
    assert "Timeout" in error


STORES = {
    "s3": lambda url: {"key": KEY, "secret": SECRET, "endpoint_url": url},
    "gs": lambda url: {"token": "anon", "endpoint_url": url, "requester_pays": "payer"},
    "abfs": lambda url: {
        "connection_string": f"AccountName=a;AccountKey=Zm9v;BlobEndpoint={url}/a"
    },
}


def read_from_store(kind, server):
    options = {"storage_options": STORES[kind](server.url)}
    return read(f"{kind}://bucket/a.tar", reader_config=options)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", STORES)
def test_a_store_without_ranges_sends_whole_files(shard, expected, kind, compressed):
    content = compress(shard) if compressed else shard

    def answer(handler):
        handler.send_bytes(200, "application/x-tar", content, ETAG)

    with serve(answer) as server:
        assert read_from_store(kind, server) == expected


def test_what_google_stores_as_an_encoding_is_read_by_ranges(shard, expected):
    """It is sent decompressed, without ranges, unless the client says that it knows gzip."""
    content = compress(shard)

    def answer(handler):
        if handler.headers["Accept-Encoding"] == "gzip":
            handler.send_part(content, *handler.asked(len(content)), ETAG)
        else:
            handler.send_bytes(200, "application/x-tar", shard, ETAG)

    with serve(answer) as server:
        assert read_from_store("gs", server) == expected
        assert {request.status for request in server.requests} == {206}
        assert all("userProject=payer" in request.path for request in server.requests)


@pytest.mark.parametrize("kind", ["http", "https"])
def test_pieces_are_small(tmp_path, monkeypatch, kind):
    """On Dask's workers, larger ones are mapped and unmapped one by one."""
    sizes = []
    feed = aiohttp.StreamReader.feed_data

    def note(stream, data, *rest):
        sizes.append(len(data))
        return feed(stream, data, *rest)

    (tmp_path / "a.bin").write_bytes(bytes(9 * MIB))
    with serve_kind(kind, tmp_path) as server:
        fs = fsspec.filesystem("http", **server.storage_options)
        ranges = RangeReader(fs, f"{server.url}/a.bin")
        ranges.read(0, MIB)
        monkeypatch.setattr(aiohttp.StreamReader, "feed_data", note)
        assert len(ranges.read(MIB, 9 * MIB)) == sum(sizes) == 8 * MIB
    assert max(sizes) <= 1 << 16


def test_the_memory_of_small_blocks_goes_when_large_ones_come(tmp_path):
    BLOCKS.clear()
    (tmp_path / "a.bin").write_bytes(bytes(20 * MIB))
    with serve_kind("http", tmp_path) as server:
        ranges = RangeReader(fsspec.filesystem("http"), f"{server.url}/a.bin")
        for start in range(4):
            ranges.read(start * MIB, (start + 1) * MIB)
        assert BLOCKS.idle_bytes == MIB  # used again and again
        large = ranges.read(4 * MIB, 12 * MIB)
        assert BLOCKS.idle_bytes == 0
        del large
        ranges.read(12 * MIB, 13 * MIB)
        assert BLOCKS.idle_bytes == 9 * MIB
    BLOCKS.clear()


@pytest.mark.parametrize("status", [403, 503])
def test_a_sidecar_that_cannot_be_fetched_fails_its_image_alone(
    shard, expected, tmp_path, monkeypatch, status
):
    monkeypatch.setattr("dask_imgread.shards.ahead._MAX_KEPT_BYTES", 5 * MIB)
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}
    pictures = [(name, content) for name, content in files.items() if name.endswith("png")]
    path = Path(write_shard(tmp_path / "b.tar", [("058.txt", b"far before"), *pictures]))
    content = path.read_bytes()
    begun = []

    def answer(handler):
        start, stop = handler.asked(len(content))
        if start < 1024 and begun:
            handler.fail(status)
        else:
            begun.append(start)
            handler.send_part(content, start, stop, ETAG)

    with serve(answer) as server:
        rows = {key: row for key, *row in read(f"{server.url}/b.tar")}
    pixels, metadata, error = rows.pop("058")
    assert (pixels, metadata) == (False, {})
    assert error.startswith(f"unreachable: {server.url}/b.tar: HTTP {status}")
    assert rows == {key: [pixels, {}, None] for key, pixels, *_ in expected if key != "058"}
