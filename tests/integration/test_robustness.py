"""Memory stays bounded, a lost worker costs time but no data, keys are the same everywhere."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
from dask.base import tokenize
from distributed import Client, LocalCluster
from PIL import Image

from dask_imgread import (
    FileGroupTask,
    ImageReaderStage,
    map_images,
    map_windowed,
    partition_shards,
    read_bag,
    read_metadata,
    run_job,
    verify_shards,
)
from dask_imgread.decoding.dali import DECODERS
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.workers import META, add_up

pytestmark = pytest.mark.usefixtures("forked_workers")


def start(**options):
    return LocalCluster(
        **({"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"} | options)
    )


# Memory


@pytest.fixture(scope="module")
def large_pictures(tmp_path_factory):
    """Four shards of 50 pictures, 27 MB each when decoded: 5.4 GB in all."""
    picture = Image.fromarray(np.full((3000, 3000, 3), 128, np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=20)
    folder = tmp_path_factory.mktemp("large")
    return [
        write_shard(folder / f"{s}.tar", [(f"{n}.jpg", buffer.getvalue()) for n in range(50)])
        for s in range(4)
    ]


def count_bytes(batch):
    return {"total": [image.image_data.nbytes for image in batch.data]}


PATHS = {
    "map_images": lambda client, reader, shards: len(
        map_images(count_bytes, shards, reader=reader, meta=META).compute()
    ),
    "metadata": lambda client, reader, shards: len(
        read_metadata(shards, reader=reader, decode=True).compute()
    ),
    "bag": lambda client, reader, shards: (
        read_bag(shards, reader=reader).map(lambda b: b.num_items).sum().compute()
    ),
    "windowed": lambda client, reader, shards: sum(
        client.submit(lambda batches: sum(b.num_items for b in batches), future).result()
        for _, future in map_windowed(
            client, reader, partition_shards(shards, images_per_partition=2), window=1
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_ten_times_the_workers_memory(large_pictures, path):
    reader = ImageReaderStage(max_batch_bytes=60 << 20)
    with start(memory_limit="540 MB") as cluster, Client(cluster) as client:
        pid = client.run(os.getpid)
        assert PATHS[path](client, reader, large_pictures) == 200
        assert client.run(os.getpid) == pid, "the worker was killed on the way"


@pytest.fixture(scope="module")
def short_and_long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    contents = [encode_picture(draw_picture(n, (64, 48))) for n in range(50)]
    return [
        write_shard(folder / f"{n}.tar", [(f"{i:05d}.jpg", contents[i % 50]) for i in range(n)])
        for n in (500, 20_000)
    ]


@pytest.fixture
def worker_of_its_own():
    settings = {
        "multiprocessing-method": "spawn",  # a forked worker has less memory of its own at first
        "profile.enabled": False,  # a worker that takes longer has longer profiles, by megabytes
    }
    with (
        dask.config.set({f"distributed.worker.{name}": value for name, value in settings.items()}),
        start() as cluster,
        Client(cluster) as client,
    ):
        yield client


def read_peak():
    """Return the most memory, in MB, that this process has ever had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


@pytest.mark.slow
@pytest.mark.parametrize("way", ["map_images", "metadata", "bag"])
def test_a_long_shard_takes_no_more_memory_than_a_short_one(worker_of_its_own, short_and_long, way):
    reader = ImageReaderStage()
    read = {
        "map_images": lambda shard: map_images(add_up, shard, reader=reader, meta=META),
        "metadata": lambda shard: read_metadata(shard, reader=reader).width.sum(),
        "bag": lambda shard: read_bag(shard, reader=reader).map(lambda b: b.num_items),
    }[way]
    peaks = []
    for shard in short_and_long:
        read(shard).compute()
        peaks += worker_of_its_own.run(read_peak).values()
    short, long = peaks
    print(f"{way}: {short:.0f} MB, {long:.0f} MB")
    assert long < 1.15 * short, f"{short:.0f} MB for 500 images, {long:.0f} MB for 20,000"


# Lost workers


@dataclass
class Killer(ImageReaderStage):
    """Kills its worker when it reads a certain shard, the first ``times`` times."""

    target: str = ""
    marks: str = ""
    times: int = 1

    def stream(self, task):
        if any(self.target in path for path in task.data):
            seen = len(os.listdir(self.marks))
            if seen < self.times:
                Path(self.marks, f"{seen}-{time.time()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        yield from super().stream(task)


@pytest.fixture
def fragile_client():
    with start(n_workers=2) as cluster, Client(cluster) as client:
        yield client


@pytest.mark.parametrize("way", ["client.map", "map_images", "bag"])
def test_a_worker_killed_in_the_middle_changes_nothing(fragile_client, photo_shards, tmp_path, way):
    def read(reader):
        if way == "client.map":
            futures = fragile_client.map(reader, partition_shards(photo_shards))
            frames = [add_up(b) for result in fragile_client.gather(futures) for b in result]
        elif way == "map_images":
            frames = [map_images(add_up, photo_shards, reader=reader, meta=META).compute()]
        else:
            frames = read_bag(photo_shards, reader=reader).map(add_up).compute()
        return pd.concat(frames)["total"].sort_index().to_dict()

    killer = Killer(target="photos-02", marks=str(tmp_path), times=1)
    assert read(killer) == read(ImageReaderStage())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def client_that_gives_up_early():
    # The scheduler lives in this process, and reads its configuration when it starts.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        start(n_workers=2) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_shard_that_always_kills_its_worker_is_reported_by_name(
    client_that_gives_up_early, photo_shards, tmp_path
):
    (tmp_path / "marks").mkdir()
    killer = Killer(target="photos-01", marks=str(tmp_path / "marks"), times=99)
    found = verify_shards(photo_shards, reader=killer, client=client_that_gives_up_early)
    assert found.table["good"].tolist() == [25, 0, 25, 25]
    (lost,) = found.bad.itertuples()
    assert lost.image_path == photo_shards[1]
    assert lost.error.startswith("killed its worker: ")

    options = {"client": client_that_gives_up_early, "reader": killer}
    summary = run_job(photo_shards, tmp_path / "out", **options)
    assert (summary.images, summary.failed) == (75, 1)
    rows = pd.read_parquet(tmp_path / "out")
    assert rows["error"].dropna().str.startswith("killed its worker").all()


@dataclass
class Flaky(ImageReaderStage):
    """Raises the first time that it reads a task."""

    marks: str = ""

    def stream(self, task):
        mark = Path(self.marks, task.task_id)
        if not mark.exists():
            mark.touch()
            raise ConnectionError("try again")
        yield from super().stream(task)


def test_a_reader_that_raises_is_retried(client, photo_shards, tmp_path):
    tasks = partition_shards(photo_shards)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    results = client.gather(client.map(Flaky(marks=str(tmp_path / "a")), tasks, retries=1))
    assert sum(b.num_items for result in results for b in result) == 100
    frame = map_images(add_up, tasks, reader=Flaky(marks=str(tmp_path / "b")), meta=META)
    assert len(client.compute(frame, retries=1).result()) == 100
    (tmp_path / "c").mkdir()
    with pytest.raises(ConnectionError):
        client.gather(client.map(Flaky(marks=str(tmp_path / "c")), tasks))


# Keys


def test_keys_are_the_same_in_every_process(photo_shards):
    code = (
        "import sys; from dask.base import tokenize;"
        "from dask_imgread import *;"
        "tasks = partition_shards(sys.argv[1:], images_per_partition=9);"
        "print(tokenize(ImageReaderStage(), tasks), read_bag(tasks).name,"
        "read_metadata(tasks)._name, tokenize(FileGroupTask(data=sys.argv[1:])))"
    )
    tasks = partition_shards(photo_shards, images_per_partition=9)
    here = [
        tokenize(ImageReaderStage(), tasks),
        read_bag(tasks).name,
        read_metadata(tasks)._name,
        tokenize(FileGroupTask(data=photo_shards)),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *photo_shards],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # here it is a random one
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == here


def test_a_changed_shard_gives_a_new_key(make_shards):
    shards = make_shards(shards=1)
    before = tokenize(partition_shards(shards)), tokenize(FileGroupTask(data=shards))
    assert (tokenize(partition_shards(shards)), tokenize(FileGroupTask(data=shards))) == before
    os.utime(shards[0], ns=(1, 1))
    touched = tokenize(partition_shards(shards)), tokenize(FileGroupTask(data=shards))
    with open(shards[0], "ab") as file:
        file.write(bytes(512))
    os.utime(shards[0], ns=(1, 1))
    longer = tokenize(partition_shards(shards)), tokenize(FileGroupTask(data=shards))
    assert len({before, touched, longer}) == 3
    os.remove(shards[0])
    assert tokenize(FileGroupTask(data=shards)) not in (before[1], touched[1], longer[1])


def test_credentials_stay_out_of_keys(make_shards):
    options = {"storage_options": {"auto_mkdir": True}}
    task = FileGroupTask(data=make_shards(shards=1), reader_config=options)
    assert "auto_mkdir" not in repr(task)
    assert "auto_mkdir" not in repr(task.__dask_tokenize__())


# Threads and processes


def test_threads_of_one_process_and_the_release_of_decoders(photo_shards):
    DECODERS.clear()
    readers = [ImageReaderStage(dali_batch_size=n, decoder="dali") for n in (3, 7)]
    expected = sorted(
        i.image_id for b in readers[0](FileGroupTask(data=photo_shards)) for i in b.data
    )
    DECODERS.clear()
    options = {"processes": False, "dashboard_address": ":0"}
    with (
        LocalCluster(n_workers=1, threads_per_worker=4, **options) as cluster,
        Client(cluster) as client,
    ):
        tasks = partition_shards(photo_shards, images_per_partition=5)
        futures = [client.submit(reader, task) for task in tasks for reader in readers]
        for reader, results in ((r, client.gather(futures[n::2])) for n, r in enumerate(readers)):
            batches = [batch for result in results for batch in result]
            assert sorted(i.image_id for b in batches for i in b.data) == expected
            assert max(b.num_items for b in batches) <= reader.dali_batch_size
        waiting = sum(map(len, DECODERS._idle.values()))
        assert 1 <= waiting <= 8, (
            "a decoder for each thread and each reader, used again by the next task"
        )
    assert sum(map(len, DECODERS._idle.values())) == 0


def test_idle_decoders_are_bounded():
    from dask_imgread.decoding.contract import DecoderOptions
    from dask_imgread.decoding.dali import DecoderPool

    pool = DecoderPool(limit=3)
    for size in range(1, 8):
        options = DecoderOptions("cpu", 1, size)
        pool.give_back(options, pool.take(options))
    assert sum(map(len, pool._idle.values())) == 3
