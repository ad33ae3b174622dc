"""Find duplicates and useless pictures, and write shards without them.

Fingerprints are computed by a job, which goes on where it stopped if it is killed:

    python examples/duplicates.py "shards/*.tar" clean
"""

import sys

import pandas as pd

from dask_imgread import connect_client, find_duplicates, fingerprint, run_job, write_shards


def choose(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of pictures that are worth keeping, each once."""
    useful = rows[~rows["blank"] & ~rows["flat_tail"]]
    # The sharpest of a group is the original more often than the copy that was made smaller.
    groups = find_duplicates(useful, "phash", distance=2, prefer="sharpness")
    return useful.drop(groups.index[~groups["keep"]])


def main(path: str, out: str = "clean") -> pd.DataFrame:
    """Write the clean shards to `out`, and return their rows."""
    fingerprints = f"{out}-fingerprints"
    with connect_client() as client:
        run_job(path, fingerprints, fingerprint, client=client, reader=fingerprint.reader)
        rows = pd.read_parquet(fingerprints)  # those of pictures that can be decoded
        chosen = choose(rows)
        written = write_shards(chosen, out, client=client).compute()
    print(f"{len(written)} of {len(rows)} images are in {out}")
    return written


if __name__ == "__main__":  # the worker processes import this file
    main(*sys.argv[1:])
