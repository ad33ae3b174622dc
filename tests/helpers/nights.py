"""A set of shards that changes every night, and what a job's output must then be."""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dask_imgread import ImageReaderStage
from dask_imgread.pictures import draw_picture, encode_picture
from dask_imgread.testing import write_shard

JPEGS = [encode_picture(draw_picture(seed, (24, 16))) for seed in range(8)]


def sum_pixels(batch):
    return {
        "width": [image.width for image in batch.data],
        "sum": [int(image.image_data.sum()) for image in batch.data],
    }


sum_pixels.meta = pd.DataFrame({"width": [0], "sum": [0]})[:0].rename_axis("image_id")


@dataclass
class OpenedReader(ImageReaderStage):
    """Notes each shard, or piece of one, that it has read, and in which version."""

    log: str = ""
    pause: float = 0.0

    def stream(self, task):
        time.sleep(self.pause)
        yield from super().stream(task)
        with open(self.log, "a") as file:
            for path, version in zip(task.data, task.versions, strict=True):
                print(Path(path).name, version, task.byte_range, file=file)


class ShardSet:
    """A folder of shards that changes at random."""

    def __init__(self, folder, seed):
        self.folder, self.random, self.written = Path(folder), random.Random(seed), 0
        self.folder.mkdir()

    def add(self, count):
        for _ in range(count):
            self.write(self.folder / f"{self.written:03d}.tar")
            self.written += 1

    def write(self, path):
        names = self.random.sample(range(30), self.random.randrange(14))
        pictures = [self.random.choice(JPEGS) for _ in names]
        cut = [p[: len(p) // 2] if self.random.random() < 0.1 else p for p in pictures]
        write_shard(path, [(f"{n:04d}.jpg", p) for n, p in zip(names, cut, strict=True)])
        moment = self.random.randrange(1, 10**9)  # else two within a tick of the clock look alike
        os.utime(path, (moment, moment))

    def change(self):
        """Change, remove and damage a few."""
        for path in sorted(self.folder.glob("*.tar")):
            chance = self.random.random()
            if chance < 0.15:
                self.write(path)
            elif chance < 0.22:
                path.unlink()
            elif chance < 0.26:
                path.write_bytes(path.read_bytes()[:700])


def read_rows(out):
    return pd.read_parquet(out, dtype_backend="pyarrow").sort_index()


def read_all(out, function):
    """The rows, and the images' records if they are apart."""
    records = [pd.read_parquet(Path(out) / "_images", dtype_backend="pyarrow")] if function else []
    return [read_rows(out), *(rows.sort_index() for rows in records)]


def keep_gone(before, fresh, shards):
    """What there must be: the rows of a fresh job, and those of shards that are gone."""
    there = {path.name for path in Path(shards).glob("*.tar")}
    names = before.index.str.replace(r"-[0-9a-f]{10}/.*|-[0-9a-f]{10}$", ".tar", regex=True)
    return pd.concat([fresh, before[~names.isin(there)]]).sort_index()
