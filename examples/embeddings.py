"""Embeddings on the workers: vectors of a small model, and for each image the most similar one.

The model is a principal component analysis of thumbnails, in NumPy alone; put your own network in
its place. Pixels stay on the workers, only vectors leave them:

    python examples/embeddings.py "shards/*.tar" embeddings
"""

import sys

import numpy as np
import pandas as pd

from dask_imgread import ImageBatch, ImageReaderStage, connect_client, map_images, read_bag

SIDE, DIMENSIONS = 32, 16


def flatten(batch: ImageBatch) -> np.ndarray:
    """Return the pixels of a batch as one vector for each image."""
    return batch.stack().reshape(len(batch), SIDE * SIDE * 3) / np.float32(255)


class Model:
    """Is pickled to get to the workers: a large one should load its weights there."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.mean = pixels.mean(axis=0)
        self.axes = np.linalg.svd(pixels - self.mean, full_matrices=False)[2][:DIMENSIONS]

    def __call__(self, batch: ImageBatch) -> dict[str, np.ndarray]:
        """Return a vector of length 1 for each image, so that products are cosines."""
        vectors = (flatten(batch) - self.mean) @ self.axes.T
        return {"embedding": vectors / np.linalg.norm(vectors, axis=1, keepdims=True)}


def find_nearest(vectors: np.ndarray) -> np.ndarray:
    """Return for each vector which other one is nearest; a million need an index instead."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    return cosines.argmax(axis=1)


def main(path: str, out: str = "embeddings") -> pd.DataFrame:
    """Write the embeddings of all images to `out`, and return them with the nearest image's id."""
    reader = ImageReaderStage(resize=(SIDE, SIDE), sidecars=False)
    with connect_client():
        some = read_bag(path, reader=reader, images_per_partition=200, limit=5)
        model = Model(np.concatenate(some.map(flatten).compute()))
        map_images(model, path, reader=reader).to_parquet(out)
    rows = pd.read_parquet(out, dtype_backend="pyarrow")  # pandas has no lists of its own
    vectors = np.stack(rows["embedding"].to_numpy())
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers are in {out}")
    return rows.assign(nearest=rows.index[find_nearest(vectors)])


if __name__ == "__main__":  # the worker processes import this file
    main(*sys.argv[1:])
