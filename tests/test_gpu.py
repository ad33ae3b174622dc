"""What can only be seen on a GPU. Everything here skips itself where there is none."""

import io

import numpy as np
import pytest
from PIL import Image

from dask_imgread import (
    FileGroupTask,
    ImageReaderStage,
    map_images,
    partition_shards,
    start_cluster,
)
from dask_imgread.gpu import count_gpus
from dask_imgread.testing import write_shard
from tests.conftest import members_of, read_with_pillow
from tests.test_robustness import META, add_up
from tests.test_shares import WatchedReader, count_most_at_once

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus() == 0, reason="NVML finds no NVIDIA GPU on this machine"),
]

# nvJPEG's inverse transform rounds otherwise than libjpeg-turbo's: the mean over an image of the
# absolute difference, in levels of 0 to 255, and the largest on 99.9 % of the pixels.
MEAN_TOLERANCE, MOST_TOLERANCE = 1.0, 8


@pytest.fixture(scope="module")
def gpu_client():
    with start_cluster(verbose=False) as cluster, cluster.get_client() as client:
        yield client


def test_same_pixels_as_the_cpu(photo_shards):
    (batch,) = ImageReaderStage(device="gpu").process(FileGroupTask(data=photo_shards[:1]))
    members = members_of(photo_shards[0])
    assert batch.num_items == 25
    for image in batch.data:
        expected = read_with_pillow(members[image.image_path.rpartition("/")[2]])
        assert image.backend == "dali-gpu"
        assert isinstance(image.image_data, np.ndarray)
        difference = np.abs(image.image_data.astype(int) - expected)
        assert difference.mean() < MEAN_TOLERANCE
        assert np.quantile(difference, 0.999) <= MOST_TOLERANCE


def test_one_bad_image_costs_one_image(tmp_path, photo_shards):
    members = list(members_of(photo_shards[0]).items())
    jpeg = members[0][1]
    table = jpeg.index(b"\xff\xc4") + 5  # a Huffman table that can't be
    broken = jpeg[:table] + b"\xff" * 16 + jpeg[table + 16 :]
    shard = write_shard(tmp_path / "s.tar", [*members[:5], ("bad.jpg", broken), *members[5:]])
    (batch,) = ImageReaderStage(device="gpu").process(FileGroupTask(data=[shard]))
    assert batch.num_items == 25
    assert [image.key for image in batch.failed] == ["bad"]


def test_each_worker_has_its_gpu(gpu_client, photo_shards):
    import os

    assert len(gpu_client.scheduler_info(n_workers=-1)["workers"]) == count_gpus()
    visible = gpu_client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0])
    assert len(set(visible.values())) == count_gpus()
    reader = ImageReaderStage(num_gpus_per_worker=0.25)
    annotations = reader.annotations(gpu_client)
    assert annotations == {"resources": {"GPU": 0.25}}
    tasks = partition_shards(photo_shards, images_per_partition=5)
    results = gpu_client.gather(gpu_client.map(reader, tasks, **annotations))
    images = [image for batches in results for batch in batches for image in batch.data]
    assert len(images) == 100
    assert {image.backend for image in images} == {"dali-gpu"}


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_shares_hold_and_readers_work_side_by_side(gpu_client, photo_shards, tmp_path, share):
    reader = WatchedReader(num_gpus_per_worker=share, notes=str(tmp_path))
    tasks = partition_shards(photo_shards, images_per_partition=5)
    frame = map_images(add_up, tasks, reader=reader, meta=META)
    assert len(frame.compute()) == 100
    assert count_most_at_once(tmp_path) <= int(1 / share)


def test_batches_are_cut_to_their_decoded_size(tmp_path):
    """Ten pictures of 100 megapixels in a row: 3 GB decoded, in batches of at most 600 MB."""
    buffer = io.BytesIO()
    Image.new("RGB", (10_000, 10_000), (90, 120, 30)).save(buffer, "JPEG")
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", buffer.getvalue()) for n in range(10)])
    reader = ImageReaderStage(device="gpu", max_batch_bytes=600_000_000)
    counts = [batch.num_items for batch in reader.stream(FileGroupTask(data=[shard]))]
    assert counts == [2] * 5
