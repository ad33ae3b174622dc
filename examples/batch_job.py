"""Decode every image of some shards and write a table of what they are.

Runs on all GPUs of the machine, or on its CPU cores where there is none:

    python examples/batch_job.py "shards/*.tar" --out brightness
"""

import argparse

import pandas as pd
from dask.distributed import Client, progress

from dask_imgread import ImageBatch, ImageReaderStage, map_images, start_cluster

META = pd.DataFrame(
    {"width": pd.Series(dtype="int64"), "brightness": pd.Series(dtype="float64")},
    index=pd.Index([], dtype="string[pyarrow]", name="image_id"),
)


def measure(batch: ImageBatch) -> pd.DataFrame:
    """Return one row for each image; runs on the worker that decoded them."""
    rows = {
        "width": [image.width for image in batch.data],
        "brightness": [image.image_data.mean() for image in batch.data],
    }
    ids = pd.Index(
        [image.image_id for image in batch.data], dtype="string[pyarrow]", name="image_id"
    )
    return pd.DataFrame(rows, index=ids).astype(META.dtypes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    reader = ImageReaderStage(num_gpus_per_worker=0.25)
    with start_cluster(num_gpus_per_worker=0.25) as cluster, Client(cluster) as client:
        frame = map_images(measure, options.shards, reader=reader, meta=META)
        frame = client.persist(frame, **reader.annotations(client))
        progress(frame)
        frame.to_parquet(options.out)
        print(f"\n{len(frame)} images, mean brightness {frame.brightness.mean().compute():.1f}")


if __name__ == "__main__":
    main()
