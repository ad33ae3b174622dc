"""A picture that kills its decoder costs itself, and nothing else."""

import os
import sys

import dask
import numpy as np
import pandas as pd
import psutil
import pytest
from distributed import Client, LocalCluster
from distributed.scheduler import KilledWorker

from dask_imgread import (
    FileGroupTask,
    ImageBatch,
    ImageReaderStage,
    map_images,
    map_windowed,
    partition_shards,
    read_bag,
    read_metadata,
    run_job,
    verify_shards,
)
from dask_imgread.tasks import make_frame
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import read_with_pillow

# No picture is known that kills libjpeg-turbo. So processes that load this module die, and truly,
# of one that has a mark in it.
SITE = """
import faulthandler
import simplejpeg

def decode_or_die(content, *args, decode=simplejpeg.decode_jpeg, **options):
    if b"deadly" in bytes(content):
        faulthandler._sigsegv()
    return decode(content, *args, **options)

simplejpeg.decode_jpeg = decode_or_die
"""
JPEG = encode_picture(draw_picture(1, (60, 40)))
DEADLY = JPEG[:2] + b"\xff\xfe\0\x08deadly" + JPEG[2:]  # a comment


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of ten pictures, the second with one that kills, and one that is broken."""
    folder = tmp_path_factory.mktemp("shards")
    contents = [[JPEG] * 10 for _ in range(3)]
    contents[1][4], contents[1][7] = DEADLY, b"nothing"
    return [
        write_shard(folder / f"{s}.tar", [(f"{n}.jpg", c) for n, c in enumerate(shard)])
        for s, shard in enumerate(contents)
    ]


@pytest.fixture
def deadly_site(tmp_path, monkeypatch):
    """Let new processes die of the deadly picture; this one does not."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "sitecustomize.py"


@pytest.fixture
def fragile_client(deadly_site, forked_workers):
    """Connect to workers that are forked, and so load it when they start."""
    settings = {
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.preload": [str(deadly_site)],
    }
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def new_children():
    """Return the processes that were started since."""
    before = set(psutil.Process().children())  # other tests' clusters
    return lambda: set(psutil.Process().children()) - before


def check_rows(errors):
    """30 images, two of which failed, each with its own cause."""
    assert len(errors) == 30
    lost = errors.dropna().sort_index()
    assert [key.rpartition("/")[2] for key in lost.index] == ["4.jpg", "7.jpg"]
    assert lost.iloc[0].startswith("kills its decoder: ")
    assert "SIGSEGV" in lost.iloc[0]
    assert lost.iloc[1].startswith("not an image")


def test_one_picture_is_lost_and_the_next_ones_are_read(deadly_site, shards, capfd, new_children):
    reader = ImageReaderStage(device="cpu", isolate=True, dali_batch_size=4)
    batches = reader(FileGroupTask(data=shards))
    images = [image for batch in batches for image in batch.data]
    for image in images:
        np.testing.assert_array_equal(image.image_data, read_with_pillow(JPEG))
        assert image.backend == "libjpeg-turbo"
    check_rows(pd.concat(batch.to_frame() for batch in batches)["error"])
    assert "Segmentation fault" in capfd.readouterr().err, "its last words are seen"
    assert not new_children()


def test_the_same_images_as_without_a_child(photo_shards):
    options = {"device": "cpu", "resize": 50, "dali_batch_size": 6}
    with_child = ImageReaderStage(isolate=True, **options)(FileGroupTask(data=photo_shards[:1]))
    without = ImageReaderStage(**options)(FileGroupTask(data=photo_shards[:1]))
    for one, other in zip(with_child, without, strict=True):
        assert one.to_frame().equals(other.to_frame())
        for image, expected in zip(one.data, other.data, strict=True):
            np.testing.assert_array_equal(image.image_data, expected.image_data)
            assert image.metadata == expected.metadata


def test_a_stream_that_is_left_early_leaves_no_child(shards, new_children):
    stream = ImageReaderStage(device="cpu", isolate=True, dali_batch_size=2).stream(
        FileGroupTask(data=shards)
    )
    next(stream)
    assert len(new_children()) == 1
    stream.close()
    assert not new_children()


@pytest.mark.parametrize(
    ("program", "reason"),
    [("/bin/false", "to decode in ended with status 1"), ("/bin/nothing", "no child process")],
)
def test_a_child_that_does_not_start_is_no_fault_of_a_picture(shards, monkeypatch, program, reason):
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(RuntimeError, match=reason):
        ImageReaderStage(device="cpu", isolate=True)(FileGroupTask(data=shards))


def test_a_module_in_the_current_folder_is_not_taken_for_pythons(tmp_path, shards, monkeypatch):
    (tmp_path / "logging.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    (batch,) = ImageReaderStage(device="cpu", isolate=True)(FileGroupTask(data=shards[:1]))
    assert batch.num_items == 10


# On a cluster whose workers the picture kills


def test_a_job_loses_the_picture_alone(fragile_client, shards, tmp_path):
    reader = ImageReaderStage(device="cpu", verbose=False)
    summary = run_job(shards, tmp_path / "out", client=fragile_client, reader=reader)
    assert (summary.images, summary.failed) == (28, 2)
    check_rows(pd.read_parquet(tmp_path / "out")["error"])


def test_a_job_of_a_function_loses_the_picture_alone(fragile_client, shards, tmp_path):
    reader = ImageReaderStage(device="cpu", verbose=False)
    # First comes the one that kills: its images are to tell the columns.
    first = [shards[1], shards[0], shards[2]]
    summary = run_job(
        first, tmp_path / "out", ImageBatch.to_frame, client=fragile_client, reader=reader
    )
    assert (summary.images, summary.failed) == (28, 2)


def test_verify_names_the_picture(fragile_client, shards):
    found = verify_shards(shards, client=fragile_client)
    assert found.table["good"].tolist() == [10, 8, 10]
    assert found.table["kills its decoder"].tolist() == [0, 1, 0]


def test_map_windowed_loses_the_picture_alone(fragile_client, shards):
    reader = ImageReaderStage(device="cpu")
    tasks = partition_shards(shards)
    frames, order = [], []
    for task, future in map_windowed(fragile_client, reader, tasks):
        order.append(task.data[0])
        frames += [batch.to_frame() for batch in future.result()]
    assert sorted(order) == shards
    check_rows(pd.concat(frames)["error"])


def test_map_windowed_tells_what_else_kills_its_workers(fragile_client, shards):
    def die(task):
        if task.data[0] == shards[1]:
            os.kill(os.getpid(), 9)
        return len(task.data)

    ended = dict.fromkeys(shards)
    for task, future in map_windowed(fragile_client, die, partition_shards(shards)):
        ended[task.data[0]] = future.exception() or future.result()
    assert [ended[shards[0]], ended[shards[2]]] == [1, 1]
    assert isinstance(ended[shards[1]], KilledWorker)


def test_collections_have_an_option_of_the_reader(fragile_client, shards):
    reader = ImageReaderStage(device="cpu", isolate=True)
    check_rows(read_metadata(shards, reader=reader, decode=True).compute()["error"])
    rows = map_images(ImageBatch.to_frame, shards, reader=reader, meta=make_frame([]))
    check_rows(rows.compute()["error"])
    frames = read_bag(shards, reader=reader).map(lambda batch: batch.to_frame()).compute()
    check_rows(pd.concat(frames)["error"])
    with pytest.raises(KilledWorker):
        read_metadata(shards, reader=ImageReaderStage(device="cpu"), decode=True).compute()
