"""Shares of a GPU hold on every path, seen on CPU workers that declare the resource."""

import time

import dask
import pytest

from dask_imgread import (
    ImageBatch,
    ImageReaderStage,
    map_images,
    map_windowed,
    partition_shards,
    read_bag,
    read_metadata,
    verify_shards,
)
from dask_imgread.tasks import make_frame
from dask_imgread.testing import make_shards
from tests.helpers.workers import TASKS, WatchedReader, count_most_at_once


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return partition_shards(make_shards(folder, shards=TASKS, images_per_shard=2, size=(16, 12)))


def read_rows(tasks):
    return read_metadata(tasks).compute(scheduler="sync")


PATHS = {
    "client.map": lambda client, reader, tasks: client.gather(client.map(reader, tasks)),
    "client.map annotated": lambda client, reader, tasks: client.gather(
        client.map(reader, tasks, **reader.annotations(client))
    ),
    "client.submit": lambda client, reader, tasks: client.gather(
        [client.submit(reader, task) for task in tasks]
    ),
    "map_windowed": lambda client, reader, tasks: list(
        map_windowed(client, reader, tasks, window=99, **reader.annotations(client))
    ),
    "bag": lambda client, reader, tasks: read_bag(tasks, reader=reader).compute(),
    "bag.map": lambda client, reader, tasks: (
        read_bag(tasks, reader=reader).map(lambda b: b.num_items).compute()
    ),
    "bag.persist": lambda client, reader, tasks: (
        read_bag(tasks, reader=reader).persist().count().compute()
    ),
    "frame": lambda client, reader, tasks: read_metadata(
        tasks, reader=reader, decode=True
    ).compute(),
    "frame filtered": lambda client, reader, tasks: (lambda ddf: ddf[ddf.width > 512].compute())(
        read_metadata(tasks, reader=reader, decode=True)
    ),
    "to_parquet": lambda client, reader, tasks: read_metadata(
        tasks, reader=reader, decode=True
    ).to_parquet(reader.notes + "-out"),
    "map_images": lambda client, reader, tasks: map_images(
        ImageBatch.to_frame, tasks, reader=reader, meta=make_frame([])
    ).compute(),
    "map_images of rows": lambda client, reader, tasks: map_images(
        ImageBatch.to_frame, read_rows(tasks), reader=reader, meta=make_frame([])
    ).compute(),
    "map_images of a lazy frame": lambda client, reader, tasks: map_images(
        ImageBatch.to_frame, read_metadata(tasks), reader=reader, meta=make_frame([])
    ).compute(),
    "bag of a lazy frame": lambda client, reader, tasks: (
        read_bag(read_metadata(tasks), reader=reader).map(lambda b: b.num_items).compute()
    ),
    "verify_shards": lambda client, reader, tasks: verify_shards(
        tasks, reader=reader, client=client
    ),
    "stream in a function": lambda client, reader, tasks: client.gather(
        client.map(lambda task: sum(b.num_items for b in reader.read(task)), tasks)
    ),
}


@pytest.mark.filterwarnings("ignore:Dask annotations")  # the reader holds what dask ignores
@pytest.mark.parametrize("annotated", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_shares_hold(imgread_gpu_client, tmp_path, tasks, path, annotated):
    notes = tmp_path / "notes"
    notes.mkdir()
    reader = WatchedReader(num_gpus_per_worker=0.3, notes=str(notes))
    annotations = reader.annotations(imgread_gpu_client) if annotated else {}
    with dask.annotate(**annotations):
        PATHS[path](imgread_gpu_client, reader, tasks)
    assert 2 <= count_most_at_once(notes) <= 3


def test_without_a_share_they_would_run_together(imgread_gpu_client, tmp_path, tasks):
    """The test above can fail: on the CPU nothing is held."""
    reader = WatchedReader(device="cpu", notes=str(tmp_path))
    imgread_gpu_client.gather(imgread_gpu_client.map(reader, tasks))
    assert count_most_at_once(tmp_path) > 3


def test_different_shares_add_up():
    from concurrent.futures import ThreadPoolExecutor

    from dask_imgread.cluster.gpu import _Shares

    shares, held, most = _Shares(), [], []

    def run(number):
        share = (0.5, 1 / 3, 0.2)[number % 3]
        shares.acquire(number, share, 1.0)
        held.append(share)
        most.append(sum(held))
        time.sleep(0.002)
        held.remove(share)
        shares.release(number)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, range(60)))
    assert 0.5 < max(most) <= 1 + 1e-9


def test_a_reader_inside_a_reader_does_not_wait_for_itself(imgread_gpu_client, tasks):
    reader = ImageReaderStage(num_gpus_per_worker=0.8)

    def zipped(one, two):
        return sum(
            a.num_items + b.num_items
            for a, b in zip(reader.read(one), reader.read(two), strict=True)
        )

    assert imgread_gpu_client.submit(zipped, *tasks[:2]).result(timeout=30) == 4


def test_a_share_larger_than_what_is_declared(tasks):
    from distributed import Client

    with Client(
        n_workers=1, processes=False, resources={"GPU": 0.1}, dashboard_address=":0"
    ) as client:
        with pytest.raises(RuntimeError, match=r"0.25 of a GPU.*declares only 0.1"):
            client.submit(ImageReaderStage(), tasks[0]).result(timeout=20)
        with pytest.raises(RuntimeError, match=r"declared: \[0.1\]"):
            ImageReaderStage().annotations(client)
