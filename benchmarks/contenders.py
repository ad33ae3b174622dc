"""What is measured: each function prepares, and returns what one round runs.

A round returns the number of images, or of members, that it went through.
"""

from __future__ import annotations

import os
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


def take_cores(count: int) -> list[int]:
    """Leave this process so many cores, and return their numbers within it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    return list(range(count))


def prepare_floor(shards: list[str], cores: int = CORES, times: int = 1) -> Round:
    """libjpeg-turbo, bytes in memory, results thrown away."""
    import simplejpeg

    contents = read_all(shards)

    def decode(number: int) -> int:
        part = contents[number::cores] * times
        for content in part:
            simplejpeg.decode_jpeg(content, "RGB")
        return len(part)

    numbers = take_cores(cores)
    return lambda: run_in_threads(decode, numbers)


def prepare_resized_floor(shards: list[str], side: int, scale: int) -> Round:
    """libjpeg-turbo at 1/``scale`` and Pillow's bilinear, on one core, results thrown away."""
    import simplejpeg
    from PIL import Image

    contents = read_all(shards)
    take_cores(1)

    def run() -> int:
        for content in contents:
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
            pixels = simplejpeg.decode_jpeg(
                content,
                "RGB",
                min_height=-(-height // scale),
                min_width=-(-width // scale),
                min_factor=scale,
            )
            ratio = side / min(height, width)
            size = round(width * ratio), round(height * ratio)
            np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        return len(contents)

    return run


def prepare_pillow(shards: list[str], side: int | None = None) -> Round:
    """Pillow on one core, with ``draft`` where it resizes, results thrown away."""
    import io

    from PIL import Image

    contents = read_all(shards)
    take_cores(1)

    def run() -> int:
        for content in contents:
            image = Image.open(io.BytesIO(content))
            if side is not None:
                ratio = side / min(image.size)
                size = round(image.width * ratio), round(image.height * ratio)
                image.draft("RGB", size)
                np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
            else:
                np.asarray(image.convert("RGB"))
        return len(contents)

    return run


def choose_batch(images: int) -> int:
    """Return 100, as is usual; less for a few large pictures, of which no more are there."""
    return max(1, min(100, images // 4))


def prepare_bare_dali(shards: list[str], cores: int = CORES, side: int | None = None) -> Round:
    """One DALI pipeline a core, bytes in memory, outputs thrown away."""
    from nvidia.dali import Pipeline, fn, types

    contents = [np.frombuffer(content, np.uint8) for content in read_all(shards)]
    numbers = take_cores(cores)
    batch = choose_batch(len(contents))

    def make() -> Pipeline:
        pipeline = Pipeline(batch, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            images = fn.decoders.image(encoded, output_type=types.RGB)
            if side is not None:
                images = fn.resize(images, resize_shorter=float(side))
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    pipelines = [make() for _ in numbers]

    def decode(number: int) -> int:
        part = contents[number::cores]
        for start in range(0, len(part), batch):
            pipelines[number].feed_input("encoded", part[start : start + batch])
            pipelines[number].run()
        return len(part)

    return lambda: run_in_threads(decode, numbers)


def prepare_stream(shards: list[str], cores: int = CORES, side: int | None = None) -> Round:
    """``ImageReaderStage.stream`` in one process, a reader a core."""
    from dask_imgread import FileGroupTask, ImageReaderStage

    reader = ImageReaderStage(device="cpu", verbose=False, resize=side, num_threads=1)
    numbers = take_cores(cores)

    def read(number: int) -> int:
        batches = reader.stream(FileGroupTask(data=shards[number::cores]))
        return sum(batch.num_items + len(batch.failed) for batch in batches)

    return lambda: run_in_threads(read, numbers)


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


def prepare_curator(shards: list[str], cores: int = CORES, device: str = "cpu") -> Round:
    """Read as NeMo Curator does: with DALI's own tar reader, copying each picture."""
    from nvidia.dali import Pipeline, fn, types

    from dask_imgread.decoding.dali import DALI_DEVICES

    if device == "cpu":
        take_cores(cores)
    batch = choose_batch(len(read_all(shards[:1])))

    def read_shard(shard: str) -> int:
        pipeline = Pipeline(batch, num_threads=cores, device_id=DALI_DEVICES[device].device_id)
        with pipeline:
            encoded = fn.readers.webdataset(
                paths=shard, ext=["jpg"], missing_component_behavior="skip", pad_last_batch=False
            )
            images = fn.decoders.image(
                encoded, device=DALI_DEVICES[device].decoder, output_type=types.RGB
            )
            pipeline.set_outputs(images)
        pipeline.build()
        left = size = pipeline.epoch_size()[next(iter(pipeline.epoch_size()))]
        kept = []
        while left > 0:
            images = pipeline.run()[0].as_cpu()
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


def prepare_cluster(shards: list[str], images_per_partition: int) -> Round:
    """``map_images`` through a LocalCluster: shards in, one row for each image out."""
    import pandas as pd

    from dask_imgread import ImageReaderStage, map_images, partition_shards

    client = _start_cluster()
    ids = pd.Index([], dtype="str", name="image_id")
    meta = pd.DataFrame({"width": pd.Series(dtype="int64")}, index=ids)
    tasks = partition_shards(shards, images_per_partition=images_per_partition)
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
