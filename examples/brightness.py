"""How wide and how bright each image is: a function for `run_job`, and for the command line.

Modules are looked up in the current folder too:

    cd examples
    dask-imgread apply brightness:measure "../shards/*.tar" --out ../brightness
"""

from dask_imgread import ImageBatch


def measure(batch: ImageBatch) -> dict[str, list[float]]:
    """Return one value for each image and column; runs on the worker that decoded them."""
    return {
        "width": [image.width for image in batch.data],
        "brightness": [image.image_data.mean() for image in batch.data],
    }
