"""A task's shards in a store: the next ones are begun early, and nothing else is changed by it."""

import asyncio
import gc
import signal
import threading
import time
import weakref
from contextlib import closing
from dataclasses import replace

import dask.dataframe as dd
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from dask_imgread import (
    FileGroupTask,
    ImageReaderStage,
    collections,
    map_images,
    partition_shards,
    read_bag,
    read_metadata,
)
from dask_imgread.reading import shard_reader
from dask_imgread.shards.partition import split_task
from dask_imgread.storage.ranges import Stopper
from dask_imgread.testing import write_shard
from tests.helpers.images import PNG, write_noise
from tests.helpers.servers import Faults, serve, serve_http
from tests.helpers.waiting import close_at_once, list_reader_threads, wait_for

MIB = 1 << 20
READER = ImageReaderStage(device="cpu", verbose=False)
HEADERS = READER.with_options(decode=False)
SHARDS, IMAGES = 10, 4
SAMPLE = (("png", PNG), ("txt", bytes(100)))

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten shards of large images, whose headers are requests of their own; one is damaged."""
    folder = tmp_path_factory.mktemp("several")
    for number in range(SHARDS):
        write_noise(folder / f"{number}.tar", IMAGES, 900)
    content = (folder / "7.tar").read_bytes()
    (folder / "7.tar").write_bytes(content[: len(content) // 2])
    return folder


def list_urls(server, count=SHARDS):
    return [f"{server.base}/{number}.tar" for number in range(count)]


def list_records(batches, folder):
    """Return what there is to know of each image, by its batch; without where the shards lie."""
    return [
        [
            (
                image.shard.rpartition("/")[2],
                image.key,
                image.image_data is not None and hash(image.image_data.tobytes()),
                *(image.width, image.offset, image.sample_size, tuple(image.metadata)),
                image.error and image.error.replace(str(folder), "").partition(":")[0],
            )
            for image in (*batch.data, *batch.failed)
        ]
        for batch in batches
    ]


def count_by_shard(batch):
    return pd.DataFrame({"n": [len(batch)]}, index=[batch.data[0].shard])


def order_shards(requests):
    """Return the number of the shard of each request for a range."""
    return [int(r.path.rpartition("/")[2].partition(".")[0]) for r in requests if r.range]


@pytest.mark.parametrize(
    ("kind", "chosen", "reader"),
    [
        *(("http", chosen, reader) for chosen in (False, True) for reader in (READER, HEADERS)),
        *(("s3", False, HEADERS), ("s3", True, READER)),
    ],
)
def test_several_shards_are_as_from_the_disk(folder, kind, chosen, reader):
    paths = [str(folder / f"{number}.tar") for number in range(SHARDS)]
    rows = read_metadata(paths).compute(scheduler="sync").iloc[::2].drop(columns="shard_version")
    expected = list_records(reader.read(make_task(paths, rows if chosen else None)), folder)
    faults = Faults(every=7, kinds=("503", "cut", "reset"))
    with serve(kind, folder, faults=faults) as server:
        urls = list_urls(server)
        there = rows.assign(shard=[urls[paths.index(path)] for path in rows["shard"]])
        task = make_task(urls, there if chosen else None, storage_options=server.storage_options)
        assert list_records(reader.read(task), folder) == expected
        assert faults.injected.total() >= 3
    assert list_reader_threads() == set()


def make_task(paths, rows, **options):
    if rows is None:
        return FileGroupTask(data=paths, reader_config=options)
    (task,) = partition_shards(rows, files_per_partition=SHARDS, **options)
    return task


def test_headers_of_eight_shards_are_read_at_a_time(folder):
    with serve_http(folder, faults=Faults(every=1, kinds=("slow",), delay=0.1)) as server:
        task = FileGroupTask(data=list_urls(server))
        images = [image for batch in HEADERS.read(task) for image in batch]
        order = order_shards(server.requests)
    assert len(images) > (SHARDS - 1) * IMAGES
    assert set(order[:8]) == set(range(8))


def test_chosen_images_of_eight_shards_are_read_at_a_time(folder):
    rows = read_metadata([str(folder / f"{n}.tar") for n in range(SHARDS)])
    rows = rows.compute(scheduler="sync").groupby("shard").head(1).drop(columns="shard_version")
    with serve_http(folder, faults=Faults(every=1, kinds=("slow",), delay=0.1)) as server:
        rows = rows.assign(shard=list_urls(server))
        images = [image for batch in READER.read(make_task([], rows)) for image in batch]
        first, server.requests = server.requests, []
        assert [image.key for image in images] == ["000"] * SHARDS
        frame = dd.from_pandas(rows.reset_index(), npartitions=1, sort=False)
        meta = pd.DataFrame({"n": [1]}, index=["a"])
        read = map_images(count_by_shard, frame, reader=READER, meta=meta)
        assert len(read.compute(scheduler="sync")) == SHARDS
        for requests in (first, server.requests):
            order = [int(request.path[1]) for request in requests]
            assert set(order[:8]) == set(range(8))
            assert len(order) == 2 * SHARDS  # to look it up; the image, and the bytes before it


def test_the_next_shard_is_begun_as_the_last_bytes_of_one_are_decoded(folder):
    sizes = tuple((folder / f"{number}.tar").stat().st_size for number in range(SHARDS))
    reader = READER.with_options(read_ahead=2 * MIB, dali_batch_size=1)
    with serve_http(folder) as server:
        task = FileGroupTask(data=list_urls(server), sizes=sizes)
        with closing(reader.read(task)) as batches:
            for image in (image for batch in batches for image in batch):
                shard = int(image.shard.rpartition("/")[2].partition(".")[0])
                if image.offset < sizes[shard] - 1 * MIB:
                    assert max(order_shards(server.requests)) == shard
                if image.key == f"{IMAGES - 1:03d}":
                    begun = shard + 1
                    wait_for(lambda n=begun: max(order_shards(server.requests)) == n, 10)
                if shard == 2:
                    break
    # Without the size it is not known where the end is.
    with serve_http(folder) as server:
        for batch in reader.read(FileGroupTask(data=list_urls(server, 2))):
            shard = int(batch[0].shard.rpartition("/")[2].partition(".")[0])
            assert max(order_shards(server.requests)) == shard


def test_shards_on_this_disk_are_read_one_after_another(folder, monkeypatch):
    monkeypatch.setattr("dask_imgread.reading.shard_reader.ShardReader.begin", None)
    task = FileGroupTask(data=[str(folder / f"{number}.tar") for number in range(3)])
    for reader in (READER, HEADERS):
        assert sum(map(len, reader.read(task))) == 3 * IMAGES


@pytest.mark.parametrize("reader", [READER, HEADERS], ids=["whole", "headers"])
def test_a_shard_that_is_not_there_fails_in_its_place(folder, reader):
    with serve_http(folder) as server:
        urls = [*list_urls(server, 2), f"{server.url}/none.tar", *list_urls(server, 4)[3:]]
        sizes = (None,) * 4
        batches = list(reader.read(FileGroupTask(data=urls, sizes=sizes)))
    assert [len(batch) for batch in batches] == [IMAGES, IMAGES, 0, IMAGES]
    (image,) = batches[2].failed
    assert image.image_path == urls[2]
    assert "404" in image.error


@pytest.mark.parametrize(
    ("kind", "what", "slow"),
    [
        *((kind, "whole", 1) for kind in ("http", "https", "abfs", "no ranges")),
        *((kind, "headers", 2) for kind in ("http", "s3", "no ranges")),
        *((kind, "chosen", n) for kind in ("http", "gs") for n in (1, 2)),
    ],
)
def test_closing_ends_what_was_begun(folder, kind, what, slow):
    """At once: what waits for an answer to its first or second request."""
    local = [str(folder / f"{number}.tar") for number in range(SHARDS)]
    rows = read_metadata(local).compute(scheduler="sync").drop(columns="shard_version")
    serving = serve_http(folder, ranges=False) if kind == "no ranges" else serve(kind, folder)
    with serving as server:
        options = {"storage_options": server.storage_options}
        urls = list_urls(server)
        chosen = rows.assign(shard=[urls[local.index(path)] for path in rows["shard"]])
        task = make_task(urls, chosen if what == "chosen" else None, **options)
        reader = HEADERS if what == "headers" else READER
        sizes = tuple((folder / f"{number}.tar").stat().st_size for number in range(SHARDS))
        task.sizes = sizes
        server.faults = Faults(every=slow, kinds=("slow",), delay=60, match="/1.tar")
        batches = reader.read(task)
        next(batches)
        wait_for(lambda: server.faults.injected, 10)
        close_at_once(batches)


def test_an_error_of_a_begun_shard_is_raised_in_its_turn(folder, monkeypatch):
    def describe(entry, shown, shard_id, version):
        if shown.endswith("2.tar") and entry.key == "002":
            raise RuntimeError("a fault of our own")
        return original(entry, shown, shard_id, version)

    original = shard_reader.describe_image
    monkeypatch.setattr(shard_reader, "describe_image", describe)
    with serve_http(folder) as server:
        reader = HEADERS.with_options(sidecars=True, max_batch_bytes=1)
        batches = reader.read(FileGroupTask(data=list_urls(server, 5)))
        assert sum(len(next(batches)) for _ in range(2 * IMAGES + 1)) == 2 * IMAGES + 1
        with pytest.raises(RuntimeError, match="a fault of our own"):
            next(batches)
    assert list_reader_threads() == set()


def test_partitions_of_several_shards(folder, client, monkeypatch):
    """As many as there are threads to read them, and none that somebody has divided."""
    paths = [str(folder / f"{number}.tar") for number in range(SHARDS)]
    threads = sum(client.nthreads().values())
    expected = read_metadata(paths).compute()
    assert read_metadata(paths).npartitions == SHARDS
    with serve_http(folder) as server:
        urls = list_urls(server)
        frame = read_metadata(urls)
        assert frame.npartitions == threads
        rows = frame.compute()
        assert rows["key"].tolist() == expected["key"].tolist()
        assert rows["offset"].tolist() == expected["offset"].tolist()
        assert read_metadata(urls, files_per_partition=1).npartitions == SHARDS
        assert read_metadata(urls, limit=3).npartitions == 3
        assert read_metadata(partition_shards(urls)).npartitions == SHARDS
        assert read_metadata(urls, decode=True).npartitions == threads
        monkeypatch.setattr(collections, "_JOINED_BYTES", 6 * MIB)  # two of these shards
        assert read_metadata(urls, decode=True).npartitions == SHARDS // 2
        assert read_bag(urls).npartitions == SHARDS
        assert read_bag(urls, reader=HEADERS).npartitions == threads
        assert rows["shard_version"].nunique() == SHARDS
        sidecars = read_metadata(urls, sidecars={"txt": "number"})
        assert sidecars.npartitions == frame.npartitions
        good = rows[rows["error"].isna()]
        numbers = sidecars["number"].compute()[good.index]
        assert numbers.astype(int).tolist() == good["key"].astype(int).tolist()

        meta = pd.DataFrame({"n": [1]}, index=["a"])
        read = map_images(count_by_shard, good, reader=READER, meta=meta)
        assert read.npartitions == frame.npartitions
        assert read["n"].compute().to_dict() == good.groupby("shard").size().to_dict()
        divided = map_images(count_by_shard, good, reader=READER, meta=meta, files_per_partition=1)
        assert divided.npartitions == SHARDS


def test_many_chosen_images_are_not_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("dask_imgread.collections._count_threads", lambda: 2)
    rows = []
    with serve_http(tmp_path) as server:
        for number in range(8):
            members = [(f"{n:03d}.png", PNG) for n in range(400)]
            path = write_shard(tmp_path / f"{number}.tar", members)
            frame = read_metadata(path).compute(scheduler="sync")
            rows.append(frame.assign(shard=f"{server.url}/{number}.tar"))
        many = pd.concat(rows)
        few = many.groupby("shard").head(125)
        meta = pd.DataFrame({"n": [1]}, index=["a"])
        assert map_images(len, many, meta=meta).npartitions == 8
        assert map_images(len, few, meta=meta).npartitions == 2


@pytest.mark.parametrize(
    ("shards", "threads", "most", "expected"),
    [
        *((4, 2, 8, 2), (11, 3, 8, 4), (9, 8, 8, 2), (8, 9, 8, 1), (17, 2, 8, 5), (99, 2, 8, 8)),
        *((99, 0, 8, 1), (1, 1, 8, 1), (32, 2, 9, 8), (32, 2, 3, 3), (9, 2, 1, 1), (9, 2, 0, 1)),
    ],
)
def test_each_thread_has_equally_many_shards(monkeypatch, shards, threads, most, expected):
    monkeypatch.setattr(collections, "_count_threads", lambda: threads)
    paths = [f"s3://bucket/{number}.tar" for number in range(shards)]
    assert collections._count_joined(paths, most) == expected
    assert collections._count_joined([*paths, "/local.tar"], most) == 1


def test_a_scheduler_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(collections, "_PATIENCE", "0.2s")

    async def never(**_):
        await asyncio.sleep(100)

    options = {"n_workers": 0, "processes": False, "dashboard_address": ":0"}
    with LocalCluster(**options) as cluster, Client(cluster) as client:
        client.cluster.scale(2)
        client.wait_for_workers(2)
        assert collections._count_threads() >= 2
        monkeypatch.setattr(client.scheduler, "ncores", never, raising=False)
        assert collections._count_threads() == 0


def test_a_task_is_split_as_it_was_put_together(folder):
    with serve_http(folder) as server:
        urls = list_urls(server, 3)
        (task,) = partition_shards(urls, files_per_partition=3, relative_to=server.url)
        ones = partition_shards(urls, relative_to=server.url)
        for each, one in zip(split_task(task), ones, strict=True):
            assert replace(each, task_id=one.task_id) == one
        rows = read_metadata(urls).compute(scheduler="sync")
        (task,) = partition_shards(rows, files_per_partition=3)
        for each, one in zip(split_task(task), partition_shards(rows), strict=True):
            assert replace(each, task_id=one.task_id) == one
            pd.testing.assert_frame_equal(each.rows, one.rows)


def test_types_are_inferred_from_one_shard(folder):
    with serve_http(folder) as server:
        tasks = partition_shards(list_urls(server), files_per_partition=SHARDS)
        server.requests.clear()
        read_metadata(tasks, sidecars={"json": ["none"]})
        map_images(lambda batch: {"width": [i.width for i in batch]}, tasks, reader=HEADERS)
        assert set(order_shards(server.requests)) < set(range(SHARDS))


def test_a_wait_for_a_begun_shard_is_interrupted(folder):
    """As by Ctrl-C: where the main thread waits for the shard's first images."""
    with serve_http(folder) as server:
        server.faults = Faults(every=1, kinds=("slow",), delay=60, match="/1.tar")
        batches = HEADERS.read(FileGroupTask(data=list_urls(server, 3)))
        assert len(next(batches)) == IMAGES
        wait_for(lambda: server.faults.injected, 10)
        main = threading.main_thread().ident
        timer = threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT])
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # dask-jobqueue's
        begin = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert time.monotonic() - begin < 10
        timer.join()
        signal.signal(signal.SIGINT, before)
    gc.collect()
    assert list_reader_threads() == set()


def test_what_was_read_early_is_not_kept(folder):
    with serve_http(folder) as server:
        seen = []
        for batch in HEADERS.read(FileGroupTask(data=list_urls(server, 4))):
            seen += map(weakref.ref, batch.data)
            del batch
            gc.collect()
            assert sum(image() is not None for image in seen) <= IMAGES


def test_what_is_read_early_is_bounded(tmp_path, monkeypatch):
    members = [(f"{n:03d}.{ext}", content) for n in range(9) for ext, content in SAMPLE]
    path = write_shard(tmp_path / "a.tar", members)
    task = FileGroupTask(data=[path])
    for reader, name, value, expected in (
        (READER, "_EARLY_IMAGES", 2, 2),
        (HEADERS, "_EARLY_HEADERS", 4, 4),
        (HEADERS, "_EARLY_BYTES", 250, 3),  # of captions of 100 bytes
    ):
        with monkeypatch.context() as patch:
            patch.setattr(shard_reader, name, value)
            with closing(reader._list_shards(task, reader._choose_decoder())) as shards:
                shard = next(iter(shards))
                shard._read_early()
                early = list(shard._first)
                rest = list(shard.read(lambda: None))
        assert len(early) == expected
        keys = [found.image.key for found in early + rest]
        assert keys == [f"{n:03d}" for n in range(9)]


def test_shards_read_at_a_time_share_what_is_read_ahead():
    reader = READER.with_options(read_ahead=64 * MIB)
    for decode, count, expected in ((True, 9, 64), (False, 9, 8), (False, 2, 32), (False, 1, 64)):
        task = FileGroupTask(data=[f"http://host/{n}.tar" for n in range(count)])
        some = reader.with_options(decode=decode)
        with closing(some._list_shards(task, some._choose_decoder())) as shards:
            assert {shard._read_ahead for shard in shards} == {expected * MIB}


def test_requests_made_after_a_stop_are_stopped():
    stopper = Stopper()
    before = stopper.make_requests()
    assert not before.stopped.is_set()
    stopper.stop()
    assert before.stopped.is_set()
    assert stopper.make_requests().stopped.is_set()
