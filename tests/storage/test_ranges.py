"""Remote files on servers that fail, lie, or answer in unusual but legal ways."""

import gzip

import numpy as np
import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.testing import write_shard
from tests.helpers.images import encode
from tests.helpers.servers import Handler, Server

MIB = 1 << 20
READER = ImageReaderStage(device="cpu", verbose=False)
ETAG = ("ETag", '"x"')


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
def few_attempts(monkeypatch):
    monkeypatch.setattr("dask_imgread.storage.retries.ATTEMPTS", 2)
    monkeypatch.setattr("dask_imgread.storage.retries.FIRST_PAUSE", 0.01)


def read(path, **task):
    """Return the key, pixels, sidecars and error of each image."""
    batches = READER.process(FileGroupTask(data=[str(path)], **task))
    images = [image for batch in batches for image in (*batch.data, *batch.failed)]
    pixels = [image.image_data is not None and image.image_data.tobytes() for image in images]
    return [(i.key, p, i.metadata, i.error) for i, p in zip(images, pixels, strict=True)]


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
    content = gzip.compress(shard, 1) if compressed else shard

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
    content = gzip.compress(shard, 1) if compressed else shard

    def answer(handler):
        start, stop = handler.asked(len(content))
        handler.send_part(content, start, stop, ("ETag", '"y"') if start > MIB else ETAG)

    with serve(answer) as server:
        error = read_until_lost(f"{server.url}/a.tar", expected)
    assert error.startswith("unreadable shard: ")
    assert 'changed while it was read: its ETag was "x" and is "y"' in error
