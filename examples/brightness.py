"""How wide and how bright each image is: a function for `run_job`, and for the command line.

Modules are looked up in the current folder too:

    cd examples
    dask-imgread apply brightness:measure "../shards/*.tar" --out ../brightness
"""

import pandas as pd

from dask_imgread import ImageBatch


def measure(batch: ImageBatch) -> pd.DataFrame:
    """Return one row for each image; runs on the worker that decoded them."""
    ids = [image.image_id for image in batch.data]
    return pd.DataFrame(
        {
            # Types are named, since a batch without a single good image has none of its own.
            "width": pd.array([image.width for image in batch.data], dtype="int64"),
            "brightness": pd.array([i.image_data.mean() for i in batch.data], dtype="float64"),
        },
        index=pd.Index(ids, dtype="string[pyarrow]", name="image_id"),
    )
