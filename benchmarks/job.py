"""Measure client and scheduler in jobs of many partitions: ``python -m benchmarks.job``.

The reader returns at once, so that planning, scheduling and writing remain. Each job runs in its
own process, which is both client and scheduler; two workers write. With ``--shards 1000000`` it is
measured how long it takes to plan so many shards that were listed, and to find that none of them
is new.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.scale import InstantReader
from dask_imgread import run_job
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.jobs.plan import Inputs, prepare_plan
from dask_imgread.shards.find import Shard
from dask_imgread.shards.partition import Division
from dask_imgread.testing import write_shard

MEMBERS_IN_A_SHARD = 10_000
DESCRIPTION = {"command": "metadata", "function": None, "code": {}, "options": {}}


def make_shards(folder: Path, partitions: int) -> list[str]:
    """Write shards with one empty image for each partition."""

    def name_members(start: int) -> Iterable[tuple[str, bytes]]:
        stop = min(start + MEMBERS_IN_A_SHARD, partitions)
        return [(f"{number:09d}.jpg", b"") for number in range(start, stop)]

    return [
        write_shard(folder / f"{start:09d}.tar", name_members(start))
        for start in range(0, partitions, MEMBERS_IN_A_SHARD)
    ]


def measure(partitions: int) -> None:
    """Run a job of ``partitions`` partitions and print memory and times."""
    from distributed import Client, LocalCluster

    with TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), partitions)
        reader = InstantReader(verbose=False, decode=False, sidecars=False)
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            before, start = read_peak(), time.perf_counter()
            run_job(shards, f"{folder}/out", client=client, reader=reader, images_per_partition=1)
            seconds, peak = time.perf_counter() - start, read_peak()
            start = time.perf_counter()
            run_job(shards, f"{folder}/out", reader=reader, images_per_partition=1)
            again = time.perf_counter() - start
            shards.append(write_shard(f"{folder}/new.tar", [("0.jpg", b"")]))
            start = time.perf_counter()
            run_job(
                shards,
                f"{folder}/out",
                client=client,
                reader=reader,
                images_per_partition=1,
                update=True,
            )
            update = time.perf_counter() - start
    print(
        f"{partitions:,} partitions: {peak:.0f} MB at the peak, {before:.0f} MB before; "
        f"{1e3 * seconds / partitions:.1f} ms a partition; "
        f"{again:.1f} s to find that nothing is left, {update:.1f} s for an update by one",
        flush=True,
    )


def measure_planning(count: int) -> None:
    """Plan a job of ``count`` shards, and plan it again; print memory and times."""
    shards = [
        Shard(f"/pictures/shards/{number:07d}.tar", 10**8 + number, f"{10**8 + number}-{number}.5")
        for number in range(count)
    ]
    with TemporaryDirectory() as out:
        inputs = Inputs(JobFolder(out), shards, DESCRIPTION, Division(), {})
        times, before = [], read_peak()
        for _ in range(2):
            start = time.perf_counter()
            prepare_plan(inputs)
            times.append(time.perf_counter() - start)
    print(
        f"{count:,} shards: {times[0]:.1f} s to plan, {times[1]:.1f} s to find that none is new; "
        f"{read_peak():.0f} MB at the peak, {before:.0f} MB before",
        flush=True,
    )


def read_peak() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each number of partitions in its own process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.job", description=__doc__)
    parser.add_argument("partitions", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--shards", type=int, help="only plan so many")
    arguments = parser.parse_args(argv)
    numbers = arguments.partitions
    if arguments.shards:
        measure_planning(arguments.shards)
    elif len(numbers) == 1:
        measure(numbers[0])
    else:
        for number in numbers:
            subprocess.run([sys.executable, "-m", "benchmarks.job", str(number)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
