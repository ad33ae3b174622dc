"""Chosen images are read by themselves: few bytes, few requests, several at a time."""

import gc
import gzip
import os
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageBatch, ImageReaderStage, map_images, partition_shards
from dask_imgread.shards import ahead, local
from dask_imgread.shards.parts import Parts, join_parts
from dask_imgread.tasks import make_frame
from dask_imgread.testing import write_shard
from tests.helpers import servers
from tests.helpers.images import encode
from tests.helpers.servers import Faults, count_bytes, serve_http, serve_s3
from tests.helpers.waiting import close_at_once, list_reader_threads

MIB = 1 << 20
READER = ImageReaderStage(device="cpu", verbose=False)

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A shard of 400 images of noise, 15 kB each, also compressed."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    members = []
    for number in range(400):
        noise = Image.fromarray(rng.integers(0, 256, (100, 100, 3), np.uint8))
        members.append((f"{number:03d}.jpg", encode(noise, "JPEG", quality=90)))
    content = Path(write_shard(folder / "a.tar", members)).read_bytes()
    (folder / "a.tar.gz").write_bytes(gzip.compress(content, 1))
    with pa.CompressedOutputStream(str(folder / "a.tar.zst"), "zstd") as file:
        file.write(content)
    (folder / "plain").write_bytes(gzip.compress(content, 1))  # its name does not tell
    return folder


@pytest.fixture(scope="module")
def images(folder):
    (*batches,) = READER.process(FileGroupTask(data=[str(folder / "a.tar")]))
    return {image.key: image for batch in batches for image in batch.data}


@pytest.fixture(scope="module")
def frame(images):
    return make_frame(images.values())


def read(frame, **options):
    tasks = partition_shards(frame, **options)
    return [batch for task in tasks for batch in READER.stream(task)]


def check(frame, images, **options):
    """Read a frame; each image must have the pixels that it has if all are read."""
    batches = read(frame, **options)
    assert [image.error for batch in batches for image in batch.failed] == []
    good = [image for batch in batches for image in batch.data]
    assert sorted(image.key for image in good) == sorted(frame["key"])
    for image in good:
        assert np.array_equal(image.image_data, images[image.key].image_data)


def place(frame, server, name="a.tar"):
    """Return the frame of the same shard on a server."""
    return frame.assign(shard=f"{server.url}/{name}").drop(columns="shard_version")


def pick(frame, share, seed=0):
    return frame.sample(frac=share, random_state=seed)


@pytest.fixture
def reads(monkeypatch):
    """The offsets and sizes of all reads of local files."""
    done = []
    pread, preadv = os.pread, os.preadv

    def note_pread(descriptor, size, offset):
        done.append((offset, size))
        return pread(descriptor, size, offset)

    def note_preadv(descriptor, memory, offset):
        done.append((offset, sum(map(len, memory))))
        return preadv(descriptor, memory, offset)

    monkeypatch.setattr(local.os, "pread", note_pread)
    monkeypatch.setattr(local.os, "preadv", note_preadv)
    return done


@pytest.mark.parametrize("seed", range(3))
def test_a_hundredth_takes_a_fiftieth_of_the_bytes(folder, frame, images, reads, seed):
    size = os.path.getsize(folder / "a.tar")
    chosen = pick(frame, 0.01, seed)
    check(chosen, images)
    assert sum(size for _, size in reads) <= 0.02 * size + 512
    assert len(reads) <= 1 + len(chosen)
    with serve_http(folder) as server:
        check(place(chosen, server), images)
        assert count_bytes(server.requests, size) <= 0.02 * size + 512
        assert Counter(r.method for r in server.requests)["GET"] <= 1 + len(chosen)
        assert Counter(r.method for r in server.requests)["HEAD"] == 1


def test_an_object_store_is_asked_for_as_much(folder, frame, images):
    size = os.path.getsize(folder / "a.tar")
    with serve_s3() as server:
        server.make_bucket("bucket")
        server.put("bucket", "a.tar", (folder / "a.tar").read_bytes())
        chosen = frame.assign(shard="s3://bucket/a.tar").drop(columns="shard_version")
        options = {"storage_options": server.storage_options}
        check(pick(chosen, 0.01), images, **options)
        assert count_bytes(server.requests, size) <= 0.02 * size + 512
        server.faults = Faults(every=3, kinds=("503", "cut", "reset", "500"))
        check(pick(chosen, 0.1), images, **options)
        assert server.faults.injected.total() >= 4


def test_neighbours_are_one_read(folder, frame, images, reads):
    few = frame[100:110]
    check(few.sample(frac=1, random_state=0), images)
    first, *others = reads
    assert first == (0, 512)
    start, last = few.iloc[0], few.iloc[-1]
    assert others == [(start["offset"], last["offset"] + last["size"] - start["offset"])]
    with serve_http(folder) as server:
        check(place(few, server), images)
        assert Counter(r.method for r in server.requests) == {"HEAD": 1, "GET": 2}
        assert count_bytes(server.requests, 1 << 40) == sum(size for _, size in reads[:2])


def test_far_ones_are_fetched_several_at_a_time(folder, frame, images):
    with serve_http(folder, faults=Faults(every=1, kinds=("slow",), delay=0.2)) as server:
        with count_running() as most:
            check(place(frame[::25], server), images)
        ranges = [r.range for r in server.requests if r.method == "GET"]
    assert len(ranges) == len(set(ranges)) == 16
    assert 4 <= max(most) <= 16


@contextmanager
def count_running():
    """Yield the numbers of requests that are answered at one time."""
    running, most, lock = set(), [0], threading.Lock()
    answer = servers.Handler.do_GET

    def count(handler):
        with lock:
            running.add(handler)
            most.append(len(running))
        try:
            answer(handler)
        finally:
            with lock:
                running.discard(handler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers.Handler, "do_GET", count)
        yield most


@pytest.mark.parametrize("share", [0.01, 0.3, 1])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.zst", "plain"])
def test_every_kind_of_shard_gives_the_same(folder, frame, images, name, share):
    chosen = pick(frame, share)
    check(chosen.assign(shard=str(folder / name)).drop(columns="shard_version"), images)
    size = os.path.getsize(folder / name)
    for ranges in (True, "none" if share == 0.3 else False):
        with serve_http(folder, ranges=ranges) as server:
            check(place(chosen, server, name), images)
            if ranges is True and name not in ("a.tar", "plain"):
                assert count_bytes(server.requests, size) <= size + 512


@pytest.mark.parametrize("every", [2, 5])
def test_faults_are_retried(folder, frame, images, every):
    with serve_http(folder) as server:
        server.faults = Faults(every=every, kinds=("503", "cut", "reset", "500"), match="GET")
        check(place(pick(frame, 0.2), server), images)
        assert server.faults.injected.total() > 2


def test_an_outage_costs_the_images_of_one_part_alone(folder, frame, images, monkeypatch):
    monkeypatch.setattr("dask_imgread.storage.retries.ATTEMPTS", 1)
    with serve_http(folder, faults=Faults(every=4, kinds=("500",), match="GET")) as server:
        batches = read(place(frame[::20], server))
    failed = [image for batch in batches for image in batch.failed]
    good = [image for batch in batches for image in batch.data]
    assert len(good) + len(failed) == 20
    assert 3 <= len(failed) <= 6
    assert {image.cause for image in failed} == {"unreachable"}
    for image in good:
        assert np.array_equal(image.image_data, images[image.key].image_data)


def test_a_file_that_changes_meanwhile_is_named(folder, frame, tmp_path):
    os.link(folder / "a.tar", tmp_path / "a.tar")
    reader = ImageReaderStage(device="cpu", dali_batch_size=2, read_ahead=40_000, verbose=False)
    stamp = os.stat(folder / "a.tar")
    with serve_http(tmp_path) as server:
        (task,) = partition_shards(place(frame[::40], server))
        batches = reader.stream(task)
        first = next(batches)
        os.utime(tmp_path / "a.tar", (1, 1))
        failed = [image for batch in batches for image in batch.failed]
    os.utime(folder / "a.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert first.num_items == 2
    assert failed
    assert all("changed while it was read" in image.error for image in failed)


# Rows that say too much


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.zst"])
@pytest.mark.parametrize("remote", [False, True])
def test_sizes_and_offsets_beyond_the_end(folder, frame, images, name, remote):
    end = os.path.getsize(folder / "a.tar")
    rows = frame[:12].astype({"offset": object, "size": object}).drop(columns="shard_version")
    rows["offset"] = [*rows["offset"][:6], end - 9, end, end + 1, 10**15, 10**18, 1 << 62]
    rows["size"] = [*rows["size"][:3], end, 1 << 30, 10**12, *rows["size"][6:]]
    memory = psutil.Process().memory_info().rss
    with serve_http(folder) as server:
        rows = rows.assign(shard=f"{server.url}/{name}" if remote else str(folder / name))
        batches = read(rows)
    good = {image.image_id: image for batch in batches for image in batch.data}
    failed = {image.image_id: image.error for batch in batches for image in batch.failed}
    assert len(good) + len(failed) == 12
    assert {*good} >= {*rows.index[:3]}
    for image in list(good.values())[:3]:
        assert np.array_equal(image.image_data, images[image.key].image_data)
    assert failed[rows.index[4]].startswith("truncated archive")
    assert failed[rows.index[5]].startswith("bad row")
    assert all(failed[name].startswith("truncated archive") for name in rows.index[6:])
    assert psutil.Process().memory_info().rss < memory + 300 * MIB


def test_overlapping_rows(folder, frame, images):
    size = int(frame["size"].iloc[0])
    rows = frame[:9].assign(size=[size * 50 + n for n in range(9)])
    with serve_http(folder) as server:
        for given in (rows, place(rows, server), place(rows, server, "a.tar.gz")):
            check(given, images)


# What is left behind


def test_nothing_is_left(folder, frame, images):
    chosen = pick(frame, 0.05)
    check(chosen, images)
    threads, files = list_reader_threads(), psutil.Process().num_fds()
    with serve_http(folder) as server:
        check(place(chosen, server), images)
        check(place(chosen, server, "a.tar.zst"), images)
    for _ in range(5):
        check(chosen, images)
        check(chosen.assign(shard=str(folder / "a.tar.zst"), shard_version=None), images)
        for nothing in ("/dev/null", str(folder)):
            read(chosen.assign(shard=nothing))
    gc.collect()
    assert list_reader_threads() == threads
    assert psutil.Process().num_fds() <= files + 4  # of fsspec's event loop
    assert ahead.BUDGET._left == ahead._WORKER_BYTES


@pytest.mark.parametrize("ranges", [True, False])
def test_a_closed_generator_ends_all_requests_at_once(folder, frame, ranges):
    reader = ImageReaderStage(device="cpu", dali_batch_size=2, read_ahead=200_000, verbose=False)
    with serve_http(folder, ranges=ranges) as server:
        (task,) = partition_shards(place(frame[::8], server))
        batches = reader.stream(task)
        next(batches)
        server.faults = Faults(every=1, kinds=("slow",), delay=60)
        if ranges:
            while not server.faults.injected:
                next(batches)
        close_at_once(batches)


class Bytes:
    """Blocks of known bytes; notes which are read."""

    workers, problem = 4, ""

    def __init__(self, content):
        self.content, self.size, self.reads = content, len(content), []

    def read(self, start, stop):
        self.reads.append((start, stop))
        return self.content[start:stop]

    def stop(self):
        pass

    close = stop


def test_any_part_is_read_in_any_order():
    content = np.random.default_rng(1).bytes(30 * MIB)
    blocks = Bytes(content)
    said = [(0, 512), (1 * MIB, 21 * MIB), (22 * MIB, 22 * MIB + 5), (29 * MIB, 40 * MIB)]
    source = Parts(blocks, said, 9 * MIB)
    rng = np.random.default_rng(2)
    for offset, size in rng.integers(0, (31 * MIB, 10 * MIB), (50, 2)).tolist():
        assert source.view_at(offset, size) == content[offset : offset + size]
    source.close()
    assert ahead.BUDGET._left == ahead._WORKER_BYTES


def test_parts_are_fetched_once_within_the_limit():
    content = np.random.default_rng(1).bytes(30 * MIB)
    blocks = Bytes(content)
    parts = [(start, start + 3000) for start in range(0, 30 * MIB - 3000, 100_000)]
    source = Parts(blocks, parts, 30_000)
    for start, stop in parts:
        assert source.read_at(start, 1000) == content[start : start + 1000]
        assert source.read_at(start + 1000, 2000) == content[start + 1000 : stop]
        assert len(source._held) <= 11
    source.close()
    assert sorted(blocks.reads) == parts


def test_other_readers_take_the_whole_budget(monkeypatch):
    monkeypatch.setattr("dask_imgread.shards.parts.BUDGET", ahead._Budget(0))
    blocks = Bytes(bytes(MIB))
    source = Parts(blocks, [(0, 10), (500_000, 500_010)])
    assert source.read_at(0, 10) == bytes(10)
    assert blocks.reads == [(0, 10)]
    assert source.read_at(500_000, 10) == bytes(10)
    source.close()


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        ([], []),
        ([(5, 9)], [(5, 9)]),
        ([(0, 100), (20, 50), (90, 120)], [(0, 120)]),
        ([(0, 10), (10 + 65536, 80_000)], [(0, 80_000)]),
        ([(0, 10), (10 + 65537, 80_000)], [(0, 10), (65547, 80_000)]),
    ],
)
def test_joined_parts(parts, joined):
    assert join_parts(parts) == joined
    assert join_parts(parts[::-1]) == joined


def test_headers_alone(folder, frame, images):
    with serve_http(folder) as server:
        for given in (frame, place(frame, server)):
            rows = map_images(
                ImageBatch.to_frame,
                given[::50],
                reader=ImageReaderStage(decode=False),
                meta=make_frame([]),
            ).compute(scheduler="sync")
            assert list(rows["key"]) == list(frame["key"][::50])
            assert set(rows["width"]) == {100}
