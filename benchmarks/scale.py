"""Measure the cost of scheduling, by which scaling is estimated: ``python -m benchmarks.scale``.

The reader returns at once, so that only the scheduling is measured.
"""

from __future__ import annotations

import argparse
import pickle
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dask_imgread import FileGroupTask, ImageBatch, ImageReaderStage, map_windowed, read_metadata
from dask_imgread.testing import make_shards

IMAGES_PER_SECOND_A_GPU = 4000  # assumed, not measured


@dataclass
class InstantReader(ImageReaderStage):
    """Reads nothing."""

    def stream(self, task: FileGroupTask) -> Any:
        """Yield one empty batch."""
        yield ImageBatch(task_id=task.task_id)


def make_tasks(count: int, path: str) -> list[FileGroupTask]:
    """Return many tasks for one shard, as `partition_shards` makes them."""
    task = FileGroupTask(data=[path], versions=("1",))
    return [
        replace(task, task_id=f"file_group_{n}", byte_range=(512 * n, None)) for n in range(count)
    ]


def read_memory() -> float:
    """Return this process's resident memory in MB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1000


def time_call(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that a call takes, and the MB by which its result grows the process."""
    before, start = read_memory(), time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    grown = read_memory() - before
    del kept
    return seconds, grown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, compute, and print."""
    from distributed import Client, LocalCluster

    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--partitions", type=int, default=1_000_000)
    args = parser.parse_args(argv)
    reader = InstantReader(verbose=False)
    with TemporaryDirectory() as folder:
        (path,) = make_shards(folder, shards=1, images_per_shard=1)
        few, many = make_tasks(args.tasks, path), make_tasks(args.partitions, path)
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            client.gather(client.map(reader, few[:100]))

            def run() -> None:
                for _, future in map_windowed(client, reader, few, window=200, pure=False):
                    future.result()

            seconds, grown = time_call(run)
            cost = seconds / len(few)
            print(f"map_windowed, {len(few):,} tasks: {1e3 * cost:.2f} ms a task, +{grown:.0f} MB")
            slice_ = few[: len(few) // 10]
            seconds, grown = time_call(
                lambda: client.gather(client.map(reader, slice_, pure=False), direct=False)
            )
            plain = seconds / len(slice_)
            print(
                f"client.map, {len(slice_):,} tasks: {1e3 * plain:.2f} ms a task, +{grown:.0f} MB"
            )
        seconds, grown = time_call(lambda: read_metadata(many, reader=reader))
        each = 1e6 * seconds / len(many)
        size = grown * 1e6 / len(many)
        sent = len(pickle.dumps(many[: len(few)])) / len(few)
        print(
            f"read_metadata, {len(many):,} partitions: {each:.0f} us and {size:.0f} bytes each "
            f"in the graph, {sent:.0f} bytes each when sent"
        )
    images = 100 * cost * IMAGES_PER_SECOND_A_GPU
    print(f"images a task that keep scheduling under 1 % of one GPU's time: {images:,.0f}")
    print(f"  of a hundred GPUs' time, which one scheduler serves: {100 * images:,.0f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"peak memory of client and scheduler: {peak:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
