"""Measure ``find_duplicates`` on made-up hashes: ``python -m benchmarks.duplicates``.

One hash in ten is a copy of another one with up to four other bits, four in a hundred are zero, as
those of blank images are, and one in a hundred has few bits set, so that these are near to each
other. Two workers have one thread and 2 GB each. Each size is measured in its own process.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence

import dask.dataframe as dd
import numpy as np
import pandas as pd

from benchmarks.job import read_peak
from dask_imgread import find_duplicates

ROWS_IN_A_PARTITION = 50_000
FEW, MOST_FLIPS = 6, 4


def mix(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return a random number of 64 bits for each number (SplitMix64)."""
    mixed = (numbers + np.uint64(seed << 40)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def make_hashes(numbers: np.ndarray, count: int) -> np.ndarray:
    """Return the hashes of some of ``count`` images."""
    kinds = numbers % np.uint64(100)
    copied, near = kinds >= 90, kinds == 4
    hashes = mix(np.where(copied, mix(numbers, 1) % np.uint64(count), numbers), 0)
    hashes[kinds <= 4] = 0
    for turn in range(FEW):
        flips = np.uint64(1) << mix(numbers, 2 + turn) % np.uint64(64)
        flipped = near | (copied & (turn < MOST_FLIPS))
        hashes = np.where(flipped, hashes ^ flips, hashes)
    return hashes


def make_rows(start: int, count: int) -> pd.DataFrame:
    """Return the rows of one partition, with the columns of metadata that are kept."""
    numbers = np.arange(start, min(start + ROWS_IN_A_PARTITION, count), dtype=np.uint64)
    places = pd.array(numbers.astype(np.int64) % 10_000 * 50_176, "int64[pyarrow]")
    shards = [f"{number // 10_000:05d}" for number in numbers]
    keys = [f"{number:09d}" for number in numbers]
    columns = {
        "shard": [f"/pictures/shards/{shard}.tar" for shard in shards],
        "shard_version": "1024000000-1790000000000000000",
        "key": keys,
        "offset": places,
        "size": 50_000,
        "sample_offset": places,
        "sample_size": 50_176,
        "format": "jpeg",
        "width": mix(numbers, 9).astype(np.int64) % 4000 + 100,
        "height": 1000,
        "phash": pd.array(make_hashes(numbers, count), "uint64[pyarrow]"),
    }
    ids = [f"{s}-0123456789/{key}.jpg" for s, key in zip(shards, keys, strict=True)]
    return pd.DataFrame(columns, pd.Index(ids, dtype="string[pyarrow]", name="image_id"))


def measure(count: int, distance: int) -> None:
    """Find the duplicates among so many rows, and print time and memory."""
    from distributed import Client, LocalCluster

    warnings.simplefilter("ignore")  # of the many that are blank
    logging.getLogger("distributed.shuffle").setLevel(logging.ERROR)
    frame = dd.from_map(
        make_rows, range(0, count, ROWS_IN_A_PARTITION), count=count, meta=make_rows(0, 1)
    )
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit="2GB", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        start = time.perf_counter()
        len(frame)
        made = time.perf_counter()
        found = find_duplicates(frame, "phash", distance=distance)
        groups = int(found["keep"].sum().compute())
        seconds = time.perf_counter() - made
        peak = max(client.run(read_peak).values())
    print(
        f"{count:,} rows: {groups:,} groups in {seconds:.1f} s, {made - start:.1f} s to make the "
        f"rows; {peak:.0f} MB at the peak of a worker, {read_peak():.0f} MB of the client",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each size in its own process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.duplicates", description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", default=[100_000, 500_000, 2_000_000])
    parser.add_argument("--distance", type=int, default=4, help="the most bits")
    arguments = parser.parse_args(argv)
    if len(arguments.rows) == 1:
        measure(arguments.rows[0], arguments.distance)
        return 0
    for rows in arguments.rows:
        command = [sys.executable, "-m", "benchmarks.duplicates", str(rows)]
        subprocess.run([*command, "--distance", str(arguments.distance)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
