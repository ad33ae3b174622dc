"""Read WebDataset tar shards into decoded RGB images on a Dask cluster."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dask_imgread.bag import read_bag
    from dask_imgread.batches import ReadError
    from dask_imgread.cluster import start_cluster
    from dask_imgread.folder import OtherJobError
    from dask_imgread.frame import map_images, read_metadata
    from dask_imgread.jobs import JobError, Summary, run_job
    from dask_imgread.partition import partition_shards
    from dask_imgread.reader import ImageReaderStage
    from dask_imgread.stage import ProcessingStage, Resources
    from dask_imgread.tasks import FileGroupTask, ImageBatch, ImageObject
    from dask_imgread.verify import verify_shards
    from dask_imgread.window import map_windowed

__version__ = version("dask-imgread")

__all__ = [
    "FileGroupTask",
    "ImageBatch",
    "ImageObject",
    "ImageReaderStage",
    "JobError",
    "OtherJobError",
    "ProcessingStage",
    "ReadError",
    "Resources",
    "Summary",
    "map_images",
    "map_windowed",
    "partition_shards",
    "read_bag",
    "read_metadata",
    "run_job",
    "start_cluster",
    "verify_shards",
]

_HOMES = {
    "bag": ["read_bag"],
    "cluster": ["start_cluster"],
    "folder": ["OtherJobError"],
    "frame": ["map_images", "read_metadata"],
    "jobs": ["JobError", "Summary", "run_job"],
    "partition": ["partition_shards"],
    "batches": ["ReadError"],
    "reader": ["ImageReaderStage"],
    "stage": ["ProcessingStage", "Resources"],
    "tasks": ["FileGroupTask", "ImageBatch", "ImageObject"],
    "verify": ["verify_shards"],
    "window": ["map_windowed"],
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: Dask and pandas take a second to load."""
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"dask_imgread.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
