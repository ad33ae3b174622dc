"""Read WebDataset tar shards into decoded RGB images on a Dask cluster."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the second list of the public names, for type checkers
    from dask_imgread.cluster.start import connect_client as connect_client
    from dask_imgread.cluster.start import start_cluster as start_cluster
    from dask_imgread.cluster.window import map_windowed as map_windowed
    from dask_imgread.collections import map_images as map_images
    from dask_imgread.collections import read_bag as read_bag
    from dask_imgread.collections import read_metadata as read_metadata
    from dask_imgread.diff import diff_frames as diff_frames
    from dask_imgread.duplicates import find_duplicates as find_duplicates
    from dask_imgread.errors import FolderInUseError as FolderInUseError
    from dask_imgread.errors import JobError as JobError
    from dask_imgread.errors import NoWorkersError as NoWorkersError
    from dask_imgread.errors import OtherJobError as OtherJobError
    from dask_imgread.errors import ReadError as ReadError
    from dask_imgread.errors import SchemaError as SchemaError
    from dask_imgread.errors import StorageError as StorageError
    from dask_imgread.fingerprints import fingerprint as fingerprint
    from dask_imgread.jobs.forecast import Forecast as Forecast
    from dask_imgread.jobs.run import Summary as Summary
    from dask_imgread.jobs.run import forecast_job as forecast_job
    from dask_imgread.jobs.run import run_job as run_job
    from dask_imgread.matches import match_hashes as match_hashes
    from dask_imgread.reading.reader import ImageReaderStage as ImageReaderStage
    from dask_imgread.report.contact_sheet import show as show
    from dask_imgread.report.page import write_report as write_report
    from dask_imgread.selection.load import load_images as load_images
    from dask_imgread.selection.write import write_shards as write_shards
    from dask_imgread.shards.partition import partition_shards as partition_shards
    from dask_imgread.stage import ProcessingStage as ProcessingStage
    from dask_imgread.stage import Resources as Resources
    from dask_imgread.tasks import FileGroupTask as FileGroupTask
    from dask_imgread.tasks import ImageBatch as ImageBatch
    from dask_imgread.tasks import ImageObject as ImageObject
    from dask_imgread.verify import Verification as Verification
    from dask_imgread.verify import verify_shards as verify_shards

__version__ = version("dask-imgread")

_PUBLIC = {  # by the module that they live in
    "cluster.start": ["connect_client", "start_cluster"],
    "cluster.window": ["map_windowed"],
    "collections": ["map_images", "read_bag", "read_metadata"],
    "diff": ["diff_frames"],
    "duplicates": ["find_duplicates"],
    "errors": [
        *("FolderInUseError", "JobError", "NoWorkersError", "OtherJobError", "ReadError"),
        *("SchemaError", "StorageError"),
    ],
    "fingerprints": ["fingerprint"],
    "jobs.forecast": ["Forecast"],
    "jobs.run": ["Summary", "forecast_job", "run_job"],
    "matches": ["match_hashes"],
    "reading.reader": ["ImageReaderStage"],
    "report.contact_sheet": ["show"],
    "report.page": ["write_report"],
    "selection.load": ["load_images"],
    "selection.write": ["write_shards"],
    "shards.partition": ["partition_shards"],
    "stage": ["ProcessingStage", "Resources"],
    "tasks": ["FileGroupTask", "ImageBatch", "ImageObject"],
    "verify": ["Verification", "verify_shards"],
}
_HOMES = {name: home for home, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: Dask and pandas take a second to load."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dask_imgread.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
