"""Blocks that are fetched in advance: once, in bounded memory, and ended at once."""

import gzip
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import trustme
from distributed import Client
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage, partition_shards, read_metadata, run_job
from dask_imgread.shards import ahead
from dask_imgread.shards.ahead import ReadAhead
from dask_imgread.storage.ranges import RangeReader
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import encode, members_of, read_rows, write_noise
from tests.helpers.servers import Faults, count_bytes, serve, serve_http, serve_s3
from tests.helpers.waiting import close_at_once

MIB = 1 << 20
READER = ImageReaderStage(device="cpu", verbose=False)

pytestmark = pytest.mark.usefixtures("short_pauses")


class Bytes:
    """Blocks of known bytes, each of which takes a while; notes which were read."""

    problem = ""

    def __init__(self, content, workers, seconds=0.0):
        self.content, self.workers, self.seconds = content, workers, seconds
        self.size = len(content) if workers > 1 else None
        self.reads = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def read(self, start, stop):
        with self.lock:
            self.reads.append((start, min(stop, len(self.content))))
            self.running += 1
            self.most = max(self.most, self.running)
        self.stopped.wait(self.seconds)
        with self.lock:
            self.running -= 1
        if stop >= len(self.content):
            self.size = len(self.content)
        return self.content[start:stop]

    def stop(self):
        self.stopped.set()

    def close(self):
        self.stopped.set()


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(0).bytes(60 * MIB)


@pytest.mark.parametrize("workers", [1, 8])
def test_every_byte_is_fetched_once_and_in_bounded_memory(content, workers):
    blocks = Bytes(content, workers, 0.001)
    source = ReadAhead(blocks, 16 * MIB)
    rng = np.random.default_rng(1)
    offset = 0
    while offset < len(content):
        size = int(rng.integers(1, 700_000))
        assert source.view_at(offset, size) == content[offset : offset + size]
        held = sum(block.stop - start for start, block in source._held.items())
        assert held <= (16 + 16 + 8 + 8) * MIB
        offset += size
    source.close()
    reads = sorted(blocks.reads)
    assert sum(stop - start for start, stop in reads if stop > start) == len(content)
    assert blocks.most == (1 if workers == 1 else pytest.approx(5, abs=3))
    assert ahead.BUDGET._left == ahead._WORKER_BYTES


def test_more_are_fetched_at_a_time_where_the_reader_waits(content):
    slow = Bytes(content, 16, 0.02)
    source = ReadAhead(slow)
    for offset in range(0, len(content), MIB):
        source.view_at(offset, MIB)
    source.close()
    assert slow.most >= 8

    fast = Bytes(content, 16)
    source = ReadAhead(fast)
    for offset in range(0, len(content), MIB):
        source.view_at(offset, MIB)
        time.sleep(0.002)
    source.close()
    assert fast.most <= 5


def test_readers_of_a_process_share_a_budget(content, monkeypatch):
    monkeypatch.setattr(ahead, "BUDGET", ahead._Budget(10 * MIB))
    sources = [ReadAhead(Bytes(content, 8)) for _ in range(4)]
    for offset in range(0, len(content), 8 * MIB):
        for source in sources:
            assert source.view_at(offset, 100) == content[offset : offset + 100]
            source.keep(offset)
        taken = [block.taken for source in sources for block in source._held.values()]
        assert sum(taken) <= 10 * MIB
    for source in sources:
        source.close()
    assert ahead.BUDGET._left == 10 * MIB


def test_what_is_needed_is_kept_and_what_is_not_is_let_go(content):
    source = ReadAhead(Bytes(content, 1), 4 * MIB)
    source.keep(0)
    source.read_at(50 * MIB, 100)
    assert source.read_at(5, 100) == content[5:105]
    source.keep(45 * MIB)
    source.read_at(58 * MIB, 100)
    with pytest.raises(OSError, match="were discarded"):
        source.read_at(5, 100)
    source.close()


def test_an_error_costs_its_block_alone_and_is_not_asked_for_again(content):
    blocks = Bytes(content, 8)
    read, failed = blocks.read, Counter()

    def fail_one(start, stop):
        if start <= 20 * MIB < stop:
            failed[start] += 1
            raise OSError("gone")
        return read(start, stop)

    blocks.read = fail_one
    source = ReadAhead(blocks)
    errors = 0
    for offset in range(0, len(content), MIB):
        try:
            assert source.read_at(offset, 1000) == content[offset : offset + 1000]
        except OSError:
            errors += 1
    source.close()
    assert 0 < errors <= 8
    assert list(failed.values()) == [1]


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    path = write_noise(folder / "a.tar", 30, 800)
    content = Path(path).read_bytes()
    with pa.CompressedOutputStream(str(folder / "a.tar.zst"), "zstd") as file:
        file.write(content)
    half = len(content) // 2
    (folder / "a.tar.gz").write_bytes(
        gzip.compress(content[:half], 1) + gzip.compress(content[half:], 1)
    )
    frames = [content[n : n + 5 * MIB] for n in range(0, len(content), 5 * MIB)]
    (folder / "frames.tar.zst").write_bytes(
        b"".join(pa.compress(frame, "zstd", asbytes=True) for frame in frames)
    )
    return folder


@pytest.fixture(scope="module")
def rows(large_folder):
    """What the shard holds, read from the disk."""
    return read_rows(large_folder / "a.tar")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("http", name) for name in ("a.tar", "a.tar.zst", "a.tar.gz", "frames.tar.zst")),
        *((kind, "a.tar") for kind in ("https", "gs", "abfs")),
    ],
)
@pytest.mark.parametrize("failing", [False, True])
def test_a_shard_larger_than_what_is_kept_is_fetched_once(
    large_folder, rows, kind, name, failing, monkeypatch
):
    monkeypatch.setattr(ahead, "_MAX_KEPT_BYTES", 8 * MIB)
    assert len(rows) == 30
    assert all(error is None for *_, error, _ in rows)
    size = os.path.getsize(large_folder / name)
    with serve(
        kind, large_folder, faults=Faults(every=4, delay=0.2) if failing else None
    ) as server:
        options = {"reader_config": {"storage_options": server.storage_options}}
        assert read_rows(f"{server.base}/{name}", task=options) == rows
        good = [r for r in server.requests if r.status == 206]
        assert not failing or server.faults.injected.total() >= 3
    if not failing:
        assert count_bytes(good, size) == size


@pytest.mark.parametrize("name", ["a.tar.zst", "a.tar.gz", "frames.tar.zst"])
def test_a_local_compressed_shard_gives_the_same(large_folder, rows, name):
    assert read_rows(large_folder / name) == rows


def test_headers_of_large_images_take_few_bytes(tmp_path):
    path = write_noise(tmp_path / "a.tar", 60, 1200)
    size = os.path.getsize(path)
    with serve_http(tmp_path) as server:
        url = f"{server.url}/a.tar"
        frame = read_metadata(url).compute()
        fetched = count_bytes(server.requests, size)
        server.requests.clear()
        tasks = partition_shards(url, images_per_partition=10)
        walked = count_bytes(server.requests, size)
    assert len(frame) == 60
    assert frame["width"].eq(1200).all()
    assert len(tasks) == 6
    assert fetched < 0.05 * size
    assert walked < 0.05 * size


def test_headers_of_small_images_are_read_through(tmp_path):
    path = write_noise(tmp_path / "a.tar", 99, 200)
    with serve_http(tmp_path) as server:
        assert len(read_metadata(f"{server.url}/a.tar").compute()) == 99
        gets = [r for r in server.requests if r.method == "GET"]
        assert count_bytes(gets, os.path.getsize(path)) == os.path.getsize(path)
        assert len(gets) < 15


@pytest.mark.parametrize("kind", ["http", "gs", "abfs"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, kind):
    path = write_noise(tmp_path / "a.tar", 30, 800)
    with serve(kind, tmp_path) as server:
        place = f"{server.base}/a.tar".removeprefix("gs://").removeprefix("abfs://")
        task = FileGroupTask(
            data=[f"{server.base}/a.tar"],
            reader_config={"storage_options": server.storage_options},
        )
        reader = ImageReaderStage(device="cpu", dali_batch_size=4, read_ahead=MIB, verbose=False)
        batches = reader.stream(task)
        good = [next(batches)]
        os.utime(path, (1, 1))
        good += list(batches)
    failed = [image for batch in good for image in batch.failed]
    assert failed
    assert all("changed while it was read: its ETag was" in image.error for image in failed)
    assert all(place in image.error for image in failed)
    keys = [image.key for batch in good for image in batch.data]
    assert keys == [f"{n:03d}" for n in range(len(keys))]
    assert len(keys) < 30


def test_an_object_that_changes_is_named_too(large_folder):
    content = (large_folder / "a.tar").read_bytes()
    with serve_s3() as server:
        server.make_bucket("bucket")
        server.put("bucket", "a.tar", content)
        task = FileGroupTask(
            data=["s3://bucket/a.tar"], reader_config={"storage_options": server.storage_options}
        )
        reader = ImageReaderStage(device="cpu", dali_batch_size=4, read_ahead=MIB, verbose=False)
        batches = reader.stream(task)
        next(batches)
        server.put("bucket", "a.tar", content[::-1])
        failed = [image for batch in batches for image in batch.failed]
    assert any("s3" in image.error or "bucket" in image.error for image in failed)
    assert all("changed while it was read" in image.error for image in failed)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("http", "a.tar"), ("http", "a.tar.zst"), *((k, "a.tar") for k in ("https", "gs", "abfs"))],
)
def test_a_closed_generator_ends_all_requests_at_once(large_folder, kind, name):
    with serve(kind, large_folder) as server:
        reader = ImageReaderStage(
            device="cpu", dali_batch_size=2, read_ahead=2 * MIB, verbose=False
        )
        options = {"storage_options": server.storage_options}
        task = FileGroupTask(data=[f"{server.base}/{name}"], reader_config=options)
        batches = reader.stream(task)
        next(batches)
        time.sleep(0.5)
        server.faults = Faults(every=1, kinds=("slow",), delay=60)
        while not server.faults.injected:
            next(batches)
        close_at_once(batches)


@pytest.mark.parametrize("tls", [False, True])
def test_ctrl_c_ends_it(large_folder, tmp_path, tls):
    code = """
import sys
from dask_imgread import FileGroupTask, ImageReaderStage
reader = ImageReaderStage(device="cpu", dali_batch_size=2, read_ahead=4 << 20, verbose=False)
for batch in reader.stream(FileGroupTask(data=[sys.argv[1]])):
    print(batch.num_items, flush=True)
"""
    authority = trustme.CA() if tls else None
    environment = dict(os.environ)
    if tls:
        environment["SSL_CERT_FILE"] = str(tmp_path / "authority.pem")
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    with serve_http(large_folder, authority=authority) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", code, f"{server.url}/a.tar"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "2\n"
        server.faults = Faults(every=1, kinds=("slow",), delay=60)
        time.sleep(1)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert time.monotonic() - begin < 10


def test_the_size_need_not_be_asked_for(large_folder):
    with serve_http(large_folder) as server:
        (task,) = partition_shards(f"{server.url}/a.tar")
        assert task.sizes == (os.path.getsize(large_folder / "a.tar"),)
        server.requests.clear()
        READER.process(task)
        assert {request.method for request in server.requests} == {"GET"}


@pytest.mark.parametrize("said", [10, 1 << 40])
def test_a_wrong_size_is_corrected_by_the_first_answer(large_folder, said):
    content = (large_folder / "a.tar").read_bytes()
    with serve_http(large_folder) as server:
        source = ReadAhead(RangeReader(fsspec.filesystem("http"), f"{server.url}/a.tar", said))
        assert source.read_at(0, 5) == content[:5]
        file = io.BytesIO()
        while piece := source.read_at(file.tell(), MIB):
            file.write(piece)
        source.close()
    assert file.getvalue() == content


def test_a_far_sidecar_of_a_compressed_shard_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "_STARTS", [0])
    monkeypatch.setattr(ahead, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr("dask_imgread.shards.samples._WINDOW", 1 << 16)
    picture = encode_picture(draw_picture(0, (64, 48)))
    noise = encode(draw_picture(1, (600, 400)), "PNG")
    members = [("z.txt", b"far"), *((f"{n}.png", noise) for n in range(20)), ("z.jpg", picture)]
    plain = write_shard(tmp_path / "s.tar", members)
    packed = write_shard(tmp_path / "s.tar.gz", members)
    with serve_http(tmp_path) as server:
        assert read_rows(f"{server.url}/s.tar") == read_rows(plain)
    *others, (key, _, metadata, error, warning) = read_rows(packed, max_batch_bytes=MIB)
    assert len(others) == 20
    assert (key, metadata, error) == ("z", {}, None)
    assert "z.txt" in warning
    assert "were discarded" in warning


def test_parts_of_a_scattered_shard_are_not_walked_again(large_folder, tmp_path):
    members = members_of(large_folder / "a.tar")
    path = write_shard(tmp_path / "s.tar", sorted(members.items(), key=lambda m: m[0][-3:]))
    size = os.path.getsize(path)
    whole = READER.process(FileGroupTask(data=[path]))
    expected = [(i.key, i.metadata) for b in whole for i in b.data]
    with serve_http(tmp_path) as server:
        tasks = partition_shards(f"{server.url}/s.tar", images_per_partition=7)
        assert len(tasks) == 5
        server.requests.clear()
        batches = [b for task in pickle.loads(pickle.dumps(tasks)) for b in READER.process(task)]
        assert [(i.key, i.metadata) for b in batches for i in b.data] == expected
        assert count_bytes(server.requests, size) < 1.1 * size
        out = tmp_path / "out"
        with Client(processes=False, n_workers=1, dashboard_address=":0") as client:
            job = {"client": client, "reader": READER, "images_per_partition": 7}
            assert run_job(f"{server.url}/s.tar", out, fn=count_pixels, **job).images == 30
            assert run_job(f"{server.url}/s.tar", out, fn=count_pixels, **job).new_images == 0
    assert len(pd.read_parquet(out)) == 30


def count_pixels(batch):
    return {"pixels": [image.image_data.size for image in batch.data]}


@pytest.mark.parametrize("name", ["a.tar", "a.tar.zst", "a.tar.gz"])
def test_an_outage_is_never_a_mixture(large_folder, rows, name, monkeypatch):
    """Images before it are right, and what follows is recorded as unreachable."""
    monkeypatch.setattr("dask_imgread.storage.retries.ATTEMPTS", 1)
    expected = {key: pixels for key, pixels, *_ in rows}
    for first_good in (3, 6, 9):
        with serve_http(large_folder) as server:
            server.faults = Faults(every=first_good, kinds=("500",))
            found = read_rows(f"{server.url}/{name}", read_ahead=4 * MIB)
        good = {key: pixels for key, pixels, _, error, _ in found if error is None}
        assert good == {key: expected[key] for key in good}
        errors = {error for *_, error, _ in found if error is not None}
        assert errors
        assert all(error.startswith("unreachable") for error in errors), errors


def test_sidecars_long_before_their_images_are_fetched_by_themselves(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (400, 400, 3), np.uint8)
    noise = encode(Image.fromarray(pixels), "PNG")
    names = [f"{n:03d}" for n in range(60)]
    members = [(f"{name}.txt", name.encode()) for name in names]
    members += [(f"{name}.png", noise + name.encode()) for name in names]
    path = write_shard(tmp_path / "s.tar", members)
    size = os.path.getsize(path)
    with serve_http(tmp_path) as server:
        assert read_rows(f"{server.url}/s.tar", read_ahead=4 * MIB) == read_rows(path)
        gets = [request for request in server.requests if request.method == "GET"]
    assert count_bytes(gets, size) < 1.1 * size
    assert len(gets) < 110


@pytest.mark.parametrize("name", ["s.tar", "s.tar.zst"])
def test_a_very_large_member_costs_no_image_and_little_memory(tmp_path, name, monkeypatch):
    monkeypatch.setattr(ahead, "_MAX_KEPT_BYTES", 16 * MIB)
    picture = encode_picture(draw_picture(0, (64, 48)))
    members = [("a.jpg", picture), ("big.bin", bytes(60 * MIB)), ("b.jpg", picture)]
    plain = write_shard(tmp_path / "plain.tar", members)
    write_shard(tmp_path / name, members)
    most = 0
    drop = ReadAhead._drop

    def watch(source, offset):
        nonlocal most
        drop(source, offset)
        most = max(most, sum(block.stop - start for start, block in source._held.items()))

    monkeypatch.setattr(ReadAhead, "_drop", watch)
    with serve_http(tmp_path) as server:
        assert read_rows(f"{server.url}/{name}", read_ahead=8 * MIB) == read_rows(plain)
    assert most < 50 * MIB


def test_small_images_far_apart_pin_no_blocks(tmp_path):
    picture = encode_picture(draw_picture(0, (16, 16)))
    members = [
        member
        for n in range(20)
        for member in ((f"{n:02d}.jpg", picture), (f"{n:02d}.bin", bytes(4 * MIB)))
    ]
    write_shard(tmp_path / "s.tar", members)
    with serve_http(tmp_path) as server:
        source = ReadAhead(RangeReader(fsspec.filesystem("http"), f"{server.url}/s.tar"))
        views = [source.view_at(512 + n * (4 * MIB + 2048), len(picture)) for n in range(20)]
        source.close()
    assert all(view == picture for view in views)
    assert sum(view.nbytes == len(memoryview(view.obj).cast("B")) for view in views) >= 19


def test_a_server_without_ranges_is_not_cut(large_folder):
    with serve_http(large_folder, ranges=False) as server:
        (task,) = partition_shards(f"{server.url}/a.tar", images_per_partition=5)
        assert sum(batch.num_items for batch in READER.process(task)) == 30


def test_a_size_beyond_all_bounds_ends_the_archive_alone(tmp_path):
    """In a compressed shard the end is known only once all is inflated."""
    picture = encode_picture(draw_picture(0, (64, 48)))
    noise = np.random.default_rng(4).bytes(MIB // 2)
    content = Path(
        write_shard(tmp_path / "s.tar", [("a.jpg", picture), ("b.bin", noise)])
    ).read_bytes()
    evil = tarfile.TarInfo("evil.jpg")
    evil.size = 1 << 60
    content = content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512)
    content += evil.tobuf(tarfile.GNU_FORMAT) + bytes(40 * MIB)
    plain, packed = tmp_path / "s.tar", tmp_path / "s.tar.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content, 1))
    expected = read_rows(plain)
    assert [key for key, *_ in expected] == ["a", "evil"]
    assert "truncated archive" in expected[1][3]
    assert read_rows(packed) == expected
