"""Decode shards with workers that are Slurm jobs of one GPU each, and write their metadata.

    python examples/slurm/slurm_cluster.py "shards/*.tar" --out result --jobs 8

The scheduler lives in this process, the head, which therefore must live as long as the job.
Where login nodes end long processes, let it be a small Slurm job itself:

    sbatch --requeue --time=2-00 --cpus-per-task=2 --mem=8G --wrap \
        'python examples/slurm/slurm_cluster.py "shards/*.tar" --out result --jobs 8'

If the head is killed, its workers end by themselves; started again, it goes on where it
stopped, with new ones. With `--update` the same command reads shards that have come since; where
there are none, no worker is started. Needs `pip install dask-jobqueue`.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dask_jobqueue import SLURMCluster
from distributed import Client

from dask_imgread import ImageReaderStage, run_job

READERS = 4  # that share a GPU


def make_cluster() -> SLURMCluster:
    """Return a cluster without workers; change here what your site asks for."""
    return SLURMCluster(
        job_name="imgread-worker",
        processes=1,
        cores=READERS,  # the worker's threads ...
        job_cpu=16,  # ... and the CPU cores that Slurm gives it
        memory="64GB",
        walltime="04:00:00",
        job_extra_directives=["--gpus-per-node=1"],
        worker_extra_args=["--resources", "GPU=1"],
        log_directory="slurm-logs",
        scheduler_options={"dashboard_address": ":0"},  # a free port, for a second job beside it
    )


@contextmanager
def start_workers(jobs: int) -> Iterator[Client]:
    """Start a cluster, and keep as many workers as jobs."""
    with make_cluster() as cluster, cluster.get_client() as client:
        # Unlike scale, adapt submits a new job when the time of one is up.
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
        client.wait_for_workers(1)
        yield client


def main(path: str | list[str], out: str, update: bool = False, jobs: int = 8) -> None:
    # Raised as an exception, SIGTERM closes the cluster, which cancels its workers' jobs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    reader = ImageReaderStage(num_gpus_per_worker=1 / READERS, sidecars=False)
    summary = run_job(
        path,
        out,
        client=start_workers(jobs),  # if anything is left to do
        reader=reader,
        update=update,
        progress=True,
    )
    print(f"{summary.images} images, {summary.failed} failed, {summary.seconds:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", help="file, folder, glob or URL")
    parser.add_argument("--out", required=True, help="folder or URL for the metadata")
    parser.add_argument("--update", action="store_true", help="read what is new or has changed")
    parser.add_argument("--jobs", type=int, default=8, help="Slurm jobs, one GPU each")
    args = parser.parse_args()
    main(args.shards, args.out, args.update, args.jobs)
