"""What can only be seen on a GPU. Everything here skips itself where there is none."""

import numpy as np
import pytest

from dask_imgread import FileGroupTask, ImageReaderStage, partition_shards, start_cluster
from dask_imgread.gpu import count_gpus
from tests.conftest import members_of, read_with_pillow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus() == 0, reason="NVML finds no NVIDIA GPU on this machine"),
]

# nvJPEG's inverse transform rounds otherwise than libjpeg-turbo's; of two chroma upsamplings
# both are within this of each other on all but isolated pixels.
MEAN_TOLERANCE = 1.5


def test_same_pixels_as_the_cpu(photo_shards):
    task = FileGroupTask(data=photo_shards[:1])
    (batch,) = ImageReaderStage(device="gpu").process(task)
    members = members_of(photo_shards[0])
    for image in batch.data:
        expected = read_with_pillow(members[image.image_path.rpartition("/")[2]])
        assert image.backend == "dali-gpu"
        assert image.image_data.shape == expected.shape
        assert np.abs(image.image_data.astype(int) - expected).mean() < MEAN_TOLERANCE


def test_a_cuda_cluster_reads_on_each_gpu(photo_shards):
    reader = ImageReaderStage(num_gpus_per_worker=0.25)
    with start_cluster(verbose=False) as cluster, cluster.get_client() as client:
        assert len(cluster.workers) == count_gpus()
        assert reader.annotations(client) == {"resources": {"GPU": 0.25}}
        tasks = partition_shards(photo_shards)
        results = client.gather(client.map(reader, tasks, **reader.annotations(client)))
    images = [image for batches in results for batch in batches for image in batch.data]
    assert len(images) == 100
    assert {image.backend for image in images} == {"dali-gpu"}
