"""Decode every image of some shards and write a table of how bright each is.

Runs on all GPUs of the machine, or on its CPU cores where there is none. Killed and called
again, it goes on where it stopped; with --update it also reads shards that have come since:

    python examples/batch_job.py "shards/*.tar" --out brightness
"""

import argparse

import pandas as pd
from brightness import measure

from dask_imgread import ImageReaderStage, connect_client, run_job

SHARE = 0.25  # of a GPU for each reader: four decode on it at a time


def main(path: str | list[str], out: str, update: bool = False) -> None:
    reader = ImageReaderStage(num_gpus_per_worker=SHARE, sidecars=False)
    cluster = connect_client(num_gpus_per_worker=SHARE)  # started if anything is left to do
    summary = run_job(
        path, out, measure, client=cluster, reader=reader, update=update, progress=True
    )
    rows = pd.read_parquet(out, columns=["brightness"])
    print(f"{summary.images} images, mean brightness {rows['brightness'].mean():.1f}")


if __name__ == "__main__":  # the worker processes import this file
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", help="file, folder, glob or URL")
    parser.add_argument("--out", required=True, help="folder or URL for the table")
    parser.add_argument("--update", action="store_true", help="read what is new or has changed")
    args = parser.parse_args()
    main(args.shards, args.out, args.update)
