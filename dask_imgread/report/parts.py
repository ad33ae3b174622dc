"""The parts that a job has written so far: the dataset's files, and what waits to be merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from dask_imgread.jobs.folder import JobFolder
from dask_imgread.jobs.parts import PartName, Place
from dask_imgread.jobs.tables import ShardState


@dataclass(frozen=True)
class Parts:
    """The parts of a job.

    Parameters
    ----------
    paths
        Their paths, in order; where a function makes the rows, those of the images' records.
    rows
        The paths of their rows, in order, where a function makes these; else the same as ``paths``.
    is_staged
        For each whether it waits to be merged into the dataset.
    merged
        How many partitions the dataset has.
    """

    paths: list[str]
    rows: list[str]
    is_staged: NDArray[np.bool_]
    merged: int

    @property
    def read(self) -> int:
        """How many partitions were read."""
        return self.merged + int(self.is_staged.sum())


def list_shards(folder: JobFolder, description: Mapping[str, Any]) -> list[str]:
    """Return the shards of a job that were there when it ran last, none if they are not known."""
    try:
        table = folder.read_table(description["tables"]["shards"])
    except (KeyError, FileNotFoundError):  # the job has begun to write another table
        return []
    shards: list[str] = table.filter(pc.field("state") == ShardState.PRESENT)["shard"].to_pylist()
    return shards


def find_parts(folder: JobFolder, description: Mapping[str, Any]) -> Parts:
    """Find the parts of a job; ``description`` is what ``_job.json`` holds."""
    _, root = folder.connect()
    ledger, _ = folder.look_up_parts(description["id"])
    known = ledger.runs[["place", "number", "last", "attempt"]]
    known = known[known["place"] != Place.AGAIN].drop_duplicates().sort_values(["number", "place"])
    is_staged = (known["place"] == Place.STAGED).to_numpy()
    # The last partition that the files up to there have: what was merged stays for a while.
    reached = known["last"].where(~is_staged, -1).cummax()
    known = known[~is_staged | (known["number"] > reached).to_numpy()]
    files = known[known["place"] == Place.OUT]
    columns = known[["place", "number", "attempt"]].itertuples(index=False)
    names = [(PartName(Place(place), number), attempt) for place, number, attempt in columns]
    paths = (name.name_records(attempt) if attempt else name.file for name, attempt in names)
    return Parts(
        [f"{root}/{path}" for path in paths],
        [f"{root}/{name.file}" for name, _ in names],
        (known["place"] == Place.STAGED).to_numpy(),
        int((files["last"] - files["number"] + 1).sum()),
    )
