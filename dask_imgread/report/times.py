"""How long a job has read: by the times of its parts or, where these were merged, of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_imgread.report.statistics import Floats

Run = Mapping[str, Any]  # as `_job.json` has it


@dataclass(frozen=True)
class Reading:
    """What was read, and how long that took.

    Parameters
    ----------
    times
        Rows: images, began and ended of each part that was written as it was read.
    runs
        Runs whose own figures are to be added.
    """

    times: Floats
    runs: Sequence[Run] = ()

    def __bool__(self) -> bool:
        """Whether anything was read of which the time is known."""
        return bool(self.times.size or self.runs)

    @property
    def images(self) -> float:
        """How many images were read, failed ones included."""
        return sum(map(count_images, self.runs), start=float(self.times[0].sum()))

    @property
    def seconds(self) -> float:
        """For how long."""
        parts = float(close_gaps(self.times)[2].max()) if self.times.size else 0.0
        return sum((count_images(run) / run["images_per_second"] for run in self.runs), parts)

    @property
    def began(self) -> float:
        """When the first of them was begun, in seconds since 1970."""
        return float(min([*self.times[1], *(run["began"] for run in self.runs)]))


def find_reading(
    description: Mapping[str, Any], times: Floats, is_staged: NDArray[np.bool_]
) -> Reading:
    """Return what was read, and how long that took.

    Parts that were merged from others have the times of the merge. If there are any, the figures
    of the runs that ended are taken instead.

    Parameters
    ----------
    description
        What ``_job.json`` holds.
    times
        Rows: images, began, ended and place of each part, and whether it was merged.
    is_staged
        For each place whether the part waits to be merged: then it is as it was read.
    """
    runs = [run for run in description.get("runs", []) if "ended" in run]
    if times[4].any():
        parts = times[:3, is_staged[times[3].astype(int)]]
        return Reading(parts, [run for run in runs if run["images_per_second"]])
    return Reading(times[:3])


def count_images(run: Run) -> int:
    """Return how many images a run that has ended has read, failed ones included."""
    return int(run["new_images"] + run["new_failed"])


def close_gaps(times: Floats) -> Floats:
    """Return times in seconds of reading: without the pauses in which no part was read.

    Parameters
    ----------
    times
        Rows: images, began and ended of each part.

    Returns
    -------
    numpy.ndarray
        The same rows, ordered by when parts were begun, and a row by how much each was moved.
    """
    images, began, ended = times[:, times[1].argsort()]
    reached = np.maximum.accumulate(ended)
    pauses = (began[1:] - reached[:-1]).clip(0)
    moved = began[0] + np.append(0.0, pauses.cumsum())
    return np.stack([images, began - moved, ended - moved, moved])
