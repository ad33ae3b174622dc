"""What is measured: each function prepares, and returns what one round runs.

A round returns the number of images, or of members, that it went through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.photographs import CORES, read_all

Round = Callable[[], int]


def run_in_threads(work: Callable[[Any], int], parts: list[Any]) -> int:
    """Run ``work`` on each part in a thread of its own, and add up what it returns."""
    counts = [0] * len(parts)

    def run(number: int) -> None:
        counts[number] = work(parts[number])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts)


def prepare_floor(shards: list[str]) -> Round:
    """libjpeg-turbo on all cores, bytes in memory, results thrown away."""
    import simplejpeg

    contents = read_all(shards)

    def decode(part: list[bytes]) -> int:
        for content in part:
            simplejpeg.decode_jpeg(content, "RGB")
        return len(part)

    return lambda: run_in_threads(decode, [contents[n::CORES] for n in range(CORES)])


def prepare_bare_dali(shards: list[str]) -> Round:
    """One DALI pipeline a core, bytes in memory, outputs thrown away."""
    from nvidia.dali import Pipeline, fn, types

    contents = [np.frombuffer(content, np.uint8) for content in read_all(shards)]

    def make() -> Pipeline:
        pipeline = Pipeline(100, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB))
        pipeline.build()
        return pipeline

    pipelines = [make() for _ in range(CORES)]

    def decode(number: int) -> int:
        part = contents[number::CORES]
        for start in range(0, len(part), 100):
            pipelines[number].feed_input("encoded", part[start : start + 100])
            pipelines[number].run()
        return len(part)

    return lambda: run_in_threads(decode, list(range(CORES)))


def prepare_stream(shards: list[str]) -> Round:
    """``ImageReaderStage.stream`` in one process, a reader a core."""
    from dask_imgread import FileGroupTask, ImageReaderStage

    reader = ImageReaderStage(verbose=False)

    def read(part: list[str]) -> int:
        return sum(batch.num_items for batch in reader.stream(FileGroupTask(data=part)))

    return lambda: run_in_threads(read, [shards[n::CORES] for n in range(CORES)])


def prepare_headers(shards: list[str]) -> Round:
    """``read_metadata`` without decoding, on one core."""
    from dask_imgread import read_metadata

    return lambda: len(read_metadata(shards).compute(scheduler="sync"))


def prepare_decoded_rows(shards: list[str]) -> Round:
    """``read_metadata(decode=True)`` on one core."""
    from dask_imgread import ImageReaderStage, read_metadata

    reader = ImageReaderStage(verbose=False, num_threads=1)
    frame = read_metadata(shards, reader=reader, decode=True)
    return lambda: len(frame.compute(scheduler="sync"))


def prepare_curator(shards: list[str]) -> Round:
    """Read as NeMo Curator does on a CPU: with DALI's own tar reader, copying each picture."""
    from nvidia.dali import Pipeline, fn, types

    def read_shard(shard: str) -> int:
        pipeline = Pipeline(100, num_threads=CORES, device_id=None)
        with pipeline:
            encoded = fn.readers.webdataset(
                paths=shard, ext=["jpg"], missing_component_behavior="skip", pad_last_batch=False
            )
            pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB))
        pipeline.build()
        left = size = pipeline.epoch_size()[next(iter(pipeline.epoch_size()))]
        kept = []
        while left > 0:
            (images,) = pipeline.run()
            kept += [images.at(n) for n in range(min(len(images), left))]
            left -= len(images)
        return int(size)

    return lambda: sum(map(read_shard, shards))


def _start_cluster() -> Any:
    from dask_imgread import start_cluster

    return start_cluster(device="cpu", verbose=False, dashboard_address=":0").get_client()


def _make_row(batch: Any) -> Any:
    import pandas as pd

    ids = pd.Index([image.image_id for image in batch.data], name="image_id")
    return pd.DataFrame({"width": [image.width for image in batch.data]}, index=ids)


def prepare_cluster(shards: list[str]) -> Round:
    """``map_images`` through a LocalCluster: shards in, one row for each image out."""
    import pandas as pd

    from dask_imgread import ImageReaderStage, map_images, partition_shards

    client = _start_cluster()
    meta = pd.DataFrame({"width": pd.Series(dtype="int64")}).rename_axis("image_id")
    tasks = partition_shards(shards, images_per_partition=250)
    reader = ImageReaderStage(verbose=False)
    frame = map_images(_make_row, tasks, reader=reader, meta=meta)
    return lambda: len(client.compute(frame).result())


def prepare_by_hand(shards: list[str]) -> Round:
    """Do what a Dask user writes: a bag over shards, tarfile and Pillow, on the same cluster."""
    import dask.bag as db

    client = _start_cluster()

    def read(path: str) -> list[tuple[str, int]]:
        import io
        import tarfile

        from PIL import Image

        rows = []
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    image = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                    rows.append((member.name, image.shape[1]))
        return rows

    bag = db.from_sequence(shards, npartitions=len(shards)).map(read).flatten()
    return lambda: len(client.compute(bag).result())


def prepare_partition(shards: list[str]) -> Round:
    """``partition_shards(images_per_partition=...)``: members walked, three for each image."""
    from dask_imgread import ImageReaderStage, partition_shards

    images = sum(
        batch.num_items
        for task in partition_shards(shards)
        for batch in ImageReaderStage(decode=False, sidecars=False, verbose=False).stream(task)
    )

    def run() -> int:
        partition_shards(shards, images_per_partition=100)
        return 3 * images

    return run


def prepare_tarfile(shards: list[str]) -> Round:
    """``tarfile.getmembers()``."""
    import tarfile

    def run() -> int:
        count = 0
        for shard in shards:
            with tarfile.open(shard) as tar:
                count += len(tar.getmembers())
        return count

    return run
