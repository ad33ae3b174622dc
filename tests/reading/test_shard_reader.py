"""A task's shards in a store: the next ones are begun early, and nothing else is changed by it."""

import threading
import time
from contextlib import closing

import pandas as pd
import pytest

from dask_imgread import (
    FileGroupTask,
    ImageReaderStage,
    map_images,
    partition_shards,
    read_metadata,
)
from dask_imgread.shards import ahead
from dask_imgread.testing import write_shard
from tests.helpers.images import PNG, write_noise
from tests.helpers.servers import Faults, serve, serve_http

MIB = 1 << 20
READER = ImageReaderStage(device="cpu", verbose=False)
HEADERS = READER.with_options(decode=False)
SHARDS, IMAGES = 10, 6

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten shards of six large images, whose headers are requests of their own; one is damaged."""
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


def list_threads():
    return {t.name for t in threading.enumerate() if t.name.startswith("dask-imgread-")} - {
        "dask-imgread-buffers"
    }


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def order_shards(requests):
    """Return the number of the shard of each request for a range."""
    return [int(r.path.rpartition("/")[2].partition(".")[0]) for r in requests if r.range]


@pytest.mark.parametrize("reader", [READER, HEADERS], ids=["whole", "headers"])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("kind", ["http", "s3"])
def test_several_shards_are_as_from_the_disk(folder, reader, chosen, kind):
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
    assert list_threads() == set()


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
        task = make_task([], rows.assign(shard=list_urls(server)))
        images = [image for batch in READER.read(task) for image in batch]
        order = [int(r.path[1]) for r in server.requests]
    assert [image.key for image in images] == ["000"] * SHARDS
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
                if image.key == "005":
                    wait_for(lambda last=shard: max(order_shards(server.requests)) == last + 1)
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


@pytest.mark.parametrize("kind", ["http", "https", "s3", "gs", "abfs"])
@pytest.mark.parametrize("what", ["whole", "headers", "chosen"])
def test_closing_ends_what_was_begun(folder, kind, what):
    """At once: what waits for an answer, or was about to be asked for."""
    local = [str(folder / f"{number}.tar") for number in range(SHARDS)]
    rows = read_metadata(local).compute(scheduler="sync").drop(columns="shard_version")
    with serve(kind, folder) as server:
        options = {"storage_options": server.storage_options}
        urls = list_urls(server)
        chosen = rows.assign(shard=[urls[local.index(path)] for path in rows["shard"]])
        task = make_task(urls, chosen if what == "chosen" else None, **options)
        reader = HEADERS if what == "headers" else READER
        sizes = tuple((folder / f"{number}.tar").stat().st_size for number in range(SHARDS))
        task.sizes = sizes
        server.faults = Faults(every=1, kinds=("slow",), delay=60, match="/1.tar")
        batches = reader.read(task)
        next(batches)
        wait_for(lambda: server.faults.injected)
        begin = time.monotonic()
        batches.close()
        assert time.monotonic() - begin < 5
    assert list_threads() == set()
    assert ahead.BUDGET._left == ahead._WORKER_BYTES


def test_an_error_of_a_begun_shard_is_raised_in_its_turn(folder, monkeypatch):
    from dask_imgread.reading import shard_reader

    def describe(entry, shown, shard_id, version):
        if shown.endswith("2.tar"):
            raise RuntimeError("a fault of our own")
        return original(entry, shown, shard_id, version)

    original = shard_reader.describe_image
    monkeypatch.setattr(shard_reader, "describe_image", describe)
    with serve_http(folder) as server:
        batches = HEADERS.read(FileGroupTask(data=list_urls(server, 5)))
        assert [len(next(batches)), len(next(batches))] == [IMAGES, IMAGES]
        with pytest.raises(RuntimeError, match="a fault of our own"):
            next(batches)
    assert list_threads() == set()


def test_partitions_of_several_shards(folder, client):
    """As many as there are threads to read them, and none that somebody has divided."""
    paths = [str(folder / f"{number}.tar") for number in range(SHARDS)]
    threads = sum(client.nthreads().values())
    expected = read_metadata(paths).compute()
    assert read_metadata(paths).npartitions == SHARDS
    with serve_http(folder) as server:
        urls = list_urls(server)
        frame = read_metadata(urls)
        assert frame.npartitions == -(-SHARDS // min(8, SHARDS // threads))
        rows = frame.compute()
        assert rows["key"].tolist() == expected["key"].tolist()
        assert rows["offset"].tolist() == expected["offset"].tolist()
        assert read_metadata(urls, files_per_partition=1).npartitions == SHARDS
        assert read_metadata(urls, limit=3).npartitions == 3
        assert read_metadata(partition_shards(urls)).npartitions == SHARDS
        assert read_metadata(urls, decode=True).npartitions == SHARDS
        sidecars = read_metadata(urls, sidecars={"txt": "number"})
        assert sidecars.npartitions == frame.npartitions
        good = rows[rows["error"].isna()]
        numbers = sidecars["number"].compute()[good.index]
        assert numbers.astype(int).tolist() == good["key"].astype(int).tolist()

        def count(batch):
            return pd.DataFrame({"n": [len(batch)]}, index=[batch.data[0].shard])

        meta = pd.DataFrame({"n": [1]}, index=["a"])
        read = map_images(count, good, reader=READER, meta=meta)
        assert read.npartitions == frame.npartitions
        assert read["n"].compute().to_dict() == good.groupby("shard").size().to_dict()
        divided = map_images(count, good, reader=READER, meta=meta, files_per_partition=1)
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
