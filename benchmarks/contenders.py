"""The contenders: each is prepared when it is made, and then runs rounds.

A round returns the number of images, or of members, that it went through.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.photographs import CORES, read_all


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


def pin_to_cores(count: int) -> list[int]:
    """Pin this process to its first ``count`` cores, and number them."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    return list(range(count))


class Floor:
    """libjpeg-turbo; input in memory, output discarded."""

    def __init__(self, shards: list[str], cores: int = CORES, times: int = 1) -> None:
        self._contents = read_all(shards)
        self._times = times
        self._cores = pin_to_cores(cores)

    def run(self) -> int:
        """Decode everything ``times`` times."""
        return run_in_threads(self._decode, self._cores)

    def _decode(self, core: int) -> int:
        import simplejpeg

        part = self._contents[core :: len(self._cores)] * self._times
        for content in part:
            simplejpeg.decode_jpeg(content, "RGB")
        return len(part)


class ResizedFloor:
    """libjpeg-turbo at 1/``scale`` and Pillow's bilinear, on one core, output discarded."""

    def __init__(self, shards: list[str], side: int, scale: int) -> None:
        self._contents = read_all(shards)
        self._side, self._scale = side, scale
        pin_to_cores(1)

    def run(self) -> int:
        """Decode and resize everything."""
        import simplejpeg
        from PIL import Image

        for content in self._contents:
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
            pixels = simplejpeg.decode_jpeg(
                content,
                "RGB",
                min_height=-(-height // self._scale),
                min_width=-(-width // self._scale),
                min_factor=self._scale,
            )
            ratio = self._side / min(height, width)
            size = round(width * ratio), round(height * ratio)
            np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
        return len(self._contents)


class Pillow:
    """Pillow on one core, with ``draft`` where it resizes, output discarded."""

    def __init__(self, shards: list[str], side: int | None = None) -> None:
        self._contents = read_all(shards)
        self._side = side
        pin_to_cores(1)

    def run(self) -> int:
        """Decode, and perhaps resize, everything."""
        from PIL import Image

        for content in self._contents:
            image = Image.open(io.BytesIO(content))
            if self._side is not None:
                ratio = self._side / min(image.size)
                size = round(image.width * ratio), round(image.height * ratio)
                image.draft("RGB", size)
                np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
            else:
                np.asarray(image.convert("RGB"))
        return len(self._contents)


def choose_batch(images: int) -> int:
    """Return the usual batch size, 100; less where there are only a few large pictures."""
    return max(1, min(100, images // 4))


class BareDali:
    """One DALI pipeline for each core, input in memory, output discarded."""

    def __init__(self, shards: list[str], cores: int = CORES, side: int | None = None) -> None:
        self._contents = [np.frombuffer(content, np.uint8) for content in read_all(shards)]
        self._cores = pin_to_cores(cores)
        self._batch = choose_batch(len(self._contents))
        self._pipelines = [self._build(side) for _ in self._cores]

    def _build(self, side: int | None) -> Any:
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(self._batch, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", no_copy=True)
            images = fn.decoders.image(encoded, output_type=types.RGB)
            if side is not None:
                images = fn.resize(images, resize_shorter=float(side))
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def run(self) -> int:
        """Decode, and perhaps resize, everything."""
        return run_in_threads(self._decode, self._cores)

    def _decode(self, core: int) -> int:
        part = self._contents[core :: len(self._cores)]
        pipeline = self._pipelines[core]
        for start in range(0, len(part), self._batch):
            pipeline.feed_input("encoded", part[start : start + self._batch])
            pipeline.run()
        return len(part)


class Stream:
    """``ImageReaderStage.stream`` in one process, one reader for each core."""

    def __init__(self, shards: list[str], cores: int = CORES, side: int | None = None) -> None:
        from dask_imgread import ImageReaderStage

        self._reader = ImageReaderStage(device="cpu", verbose=False, resize=side, num_threads=1)
        self._shards = shards
        self._cores = pin_to_cores(cores)

    def run(self) -> int:
        """Read all shards."""
        return run_in_threads(self._read, self._cores)

    def _read(self, core: int) -> int:
        return sum(batch.num_items + len(batch.failed) for batch in self._stream(core))

    def _stream(self, core: int) -> Iterator[Any]:
        from dask_imgread import FileGroupTask

        return self._reader.stream(FileGroupTask(data=self._shards[core :: len(self._cores)]))


class Fingerprints(Stream):
    """The function ``fingerprint`` of batches, in one process, with its reader for each core."""

    def __init__(self, shards: list[str], cores: int = CORES) -> None:
        from dask_imgread import fingerprint

        super().__init__(shards, cores)
        self._reader = fingerprint.reader.with_options(device="cpu", verbose=False, num_threads=1)

    def _read(self, core: int) -> int:
        from dask_imgread import fingerprint

        return sum(map(len, map(fingerprint, self._stream(core))))


class Headers:
    """``read_metadata`` without decoding, on one core."""

    def __init__(self, shards: list[str]) -> None:
        self._shards = shards

    def run(self) -> int:
        """Read the headers of all images."""
        from dask_imgread import read_metadata

        return len(read_metadata(self._shards).compute(scheduler="sync"))


class Sidecars(Headers):
    """The same, with columns for a caption and three keys of JSON."""

    def run(self) -> int:
        """Read headers and sidecars of all images."""
        from dask_imgread import read_metadata

        keys = {"url": "string", "similarity": "float64", "nsfw": "int32"}
        frame = read_metadata(self._shards, sidecars={"txt": "caption", "json": keys})
        return len(frame.compute(scheduler="sync"))


class DecodedRows:
    """``read_metadata(decode=True)`` on one core."""

    def __init__(self, shards: list[str]) -> None:
        from dask_imgread import ImageReaderStage, read_metadata

        reader = ImageReaderStage(verbose=False, num_threads=1)
        self._frame = read_metadata(shards, reader=reader, decode=True)

    def run(self) -> int:
        """Decode all images."""
        return len(self._frame.compute(scheduler="sync"))


class Chosen:
    """``map_images`` of a share of the images, chosen at random from a frame of all."""

    def __init__(self, shards: list[str], share: float) -> None:
        import pandas as pd

        from dask_imgread import ImageReaderStage, read_metadata

        self._reader = ImageReaderStage(verbose=False, sidecars=False)
        rows = read_metadata(shards, reader=self._reader).compute(scheduler="sync")
        self._chosen = rows.sample(max(1, round(share * len(rows))), random_state=0)
        self._meta = pd.DataFrame({"width": pd.Series(dtype="int64")}, self._chosen.index[:0])

    def run(self) -> int:
        """Decode the images."""
        from dask_imgread import map_images

        frame = map_images(_make_row, self._chosen, reader=self._reader, meta=self._meta)
        return len(frame.compute(scheduler="sync"))


class Curator:
    """NeMo Curator's way to read: DALI's own tar reader, and a copy of each picture."""

    def __init__(self, shards: list[str], cores: int = CORES, device: str = "cpu") -> None:
        if device == "cpu":
            pin_to_cores(cores)
        self._shards, self._threads, self._device = shards, cores, device
        self._batch = choose_batch(len(read_all(shards[:1])))

    def run(self) -> int:
        """Read all shards."""
        return sum(map(self._read, self._shards))

    def _read(self, shard: str) -> int:
        from nvidia.dali import Pipeline, fn, types

        from dask_imgread.decoding.dali import DALI_DEVICES

        place = DALI_DEVICES[self._device]
        pipeline = Pipeline(self._batch, num_threads=self._threads, device_id=place.device_id)
        with pipeline:
            encoded = fn.readers.webdataset(
                paths=shard, ext=["jpg"], missing_component_behavior="skip", pad_last_batch=False
            )
            images = fn.decoders.image(encoded, device=place.decoder, output_type=types.RGB)
            pipeline.set_outputs(images)
        pipeline.build()
        left = size = pipeline.epoch_size()[next(iter(pipeline.epoch_size()))]
        kept = []
        while left > 0:
            images = pipeline.run()[0].as_cpu()
            kept += [images.at(n) for n in range(min(len(images), left))]
            left -= len(images)
        return int(size)


def _make_row(batch: Any) -> Any:
    import pandas as pd

    ids = pd.Index([image.image_id for image in batch.data], name="image_id")
    return pd.DataFrame({"width": [image.width for image in batch.data]}, index=ids)


class OnCluster:
    """A contender that has a LocalCluster."""

    def __init__(self) -> None:
        from dask_imgread import start_cluster

        self._cluster = start_cluster(device="cpu", verbose=False, dashboard_address=":0")
        self._client = self._cluster.get_client()

    def close(self) -> None:
        """End the cluster, before its workers' end is taken for a failure."""
        self._client.close()
        self._cluster.close()


class Cluster(OnCluster):
    """``map_images`` through a LocalCluster: shards in, one row for each image out."""

    def __init__(self, shards: list[str], images_per_partition: int) -> None:
        import pandas as pd

        from dask_imgread import ImageReaderStage, map_images, partition_shards

        super().__init__()
        ids = pd.Index([], dtype="str", name="image_id")
        meta = pd.DataFrame({"width": pd.Series(dtype="int64")}, index=ids)
        tasks = partition_shards(shards, images_per_partition=images_per_partition)
        reader = ImageReaderStage(verbose=False)
        self._frame = map_images(_make_row, tasks, reader=reader, meta=meta)

    def run(self) -> int:
        """Compute the rows of all images."""
        return len(self._client.compute(self._frame).result())


class Write(OnCluster):
    """``write_shards`` through a LocalCluster: all samples into new shards."""

    def __init__(self, shards: list[str], images_per_shard: int) -> None:
        from dask_imgread import read_metadata

        super().__init__()
        self._images_per_shard = images_per_shard
        self._rows = read_metadata(shards).compute()
        self._folder = tempfile.mkdtemp(dir=os.path.dirname(shards[0]))

    def prepare(self) -> None:
        """Remove what was written before."""
        shutil.rmtree(self._folder)

    def run(self) -> int:
        """Write all images."""
        from dask_imgread import write_shards

        length = self._images_per_shard
        write_shards(self._rows, self._folder, images_per_shard=length, client=self._client)
        return len(self._rows)


class Copy:
    """``cp`` of the same shards; with ``sync``, until they are on the disk."""

    def __init__(self, shards: list[str], sync: bool = False) -> None:
        self._shards, self._sync = shards, sync
        self._images = len(read_all(shards))
        self._folder = tempfile.mkdtemp(dir=os.path.dirname(shards[0]))

    def prepare(self) -> None:
        """Remove the copies made before."""
        shutil.rmtree(self._folder)
        os.mkdir(self._folder)

    def run(self) -> int:
        """Copy all shards."""
        subprocess.run(["cp", *self._shards, self._folder], check=True)
        if self._sync:
            subprocess.run(["sync", *Path(self._folder).iterdir()], check=True)
        return self._images


class ByHand(OnCluster):
    """What a Dask user would write: a bag over shards, tarfile and Pillow, on such a cluster."""

    def __init__(self, shards: list[str]) -> None:
        import dask.bag as db

        super().__init__()
        bag = db.from_sequence(shards, npartitions=len(shards))
        self._rows = bag.map(_read_by_hand).flatten()

    def run(self) -> int:
        """Compute the rows of all images."""
        return len(self._client.compute(self._rows).result())


def _read_by_hand(path: str) -> list[tuple[str, int]]:
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


class Partition:
    """``partition_shards(images_per_partition=...)``, which walks three members for each image."""

    def __init__(self, shards: list[str]) -> None:
        from dask_imgread import ImageReaderStage, partition_shards

        reader = ImageReaderStage(decode=False, sidecars=False, verbose=False)
        tasks = partition_shards(shards)
        self._shards = shards
        self._images = sum(batch.num_items for task in tasks for batch in reader.stream(task))

    def run(self) -> int:
        """Walk all members."""
        from dask_imgread import partition_shards

        partition_shards(self._shards, images_per_partition=100)
        return 3 * self._images


class Tarfile:
    """``tarfile.getmembers()``."""

    def __init__(self, shards: list[str]) -> None:
        self._shards = shards

    def run(self) -> int:
        """Walk all members."""
        count = 0
        for shard in self._shards:
            with tarfile.open(shard) as tar:
                count += len(tar.getmembers())
        return count
