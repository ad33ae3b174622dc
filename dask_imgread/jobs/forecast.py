"""What a job would do: numbers that are known, and those that its last run lets one expect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_imgread.jobs.parts import Ledger, Place
from dask_imgread.jobs.plan import Changes, Plan
from dask_imgread.jobs.tables import ShardState
from dask_imgread.jobs.work import Inventory, Work
from dask_imgread.shards.ahead import BLOCK_BYTES
from dask_imgread.storage.filesystems import is_local


@dataclass(frozen=True)
class Forecast:
    """What a job would do.

    Parameters
    ----------
    shards
        How many shards would be read, whole or in part.
    new_shards, changed_shards, gone_shards
        How many shards are new, have changed, or are gone; with ``prune`` the rows of the latter
        would be removed.
    partitions
        How many partitions would be read; None if that is known only once headers of the shards
        are read.
    bytes
        The size of what would be read, in bytes. Where only headers are needed, less is.
    images
        How many images that are, judged by the size of those in the dataset; None if it has none.
    requests
        How many requests a store would get, at most; 0 if the shards are local.
    seconds, memory
        How long it would take at the rate of the last run, and how much memory a worker had in it,
        in bytes; None if no run has ended yet.

    Examples
    --------
    >>> from dask_imgread import forecast_job
    >>> from dask_imgread.testing import make_shards
    >>> forecast_job(make_shards("shards", shards=3, images_per_shard=2), "out").partitions
    3
    """

    shards: int
    new_shards: int
    changed_shards: int
    gone_shards: int
    partitions: int | None
    bytes: int
    images: int | None
    requests: int
    seconds: float | None
    memory: int | None


def forecast(plan: Plan, changes: Changes, retry_failed: bool) -> Forecast:
    """Return what a job would do whose plan was looked up."""
    ledger = Ledger.from_footers([])
    if "id" in plan.description:
        ledger, _ = plan.folder.look_up_parts(plan.job_id)
    inventory = Inventory(plan, ledger)
    work = inventory.find_work(retry_failed or bool(plan.description["retries"]))
    pieces = list(_list_pieces(plan, changes, inventory, work))
    size = sum(size for _, size in pieces)
    images = _estimate_images(plan, ledger, size)
    last = _find_last_run(plan)
    return Forecast(
        shards=len({path for path, _ in pieces}),
        new_shards=len(changes.new),
        changed_shards=len(changes.changed),
        gone_shards=plan.gone + len(work.pruned),
        partitions=_count_partitions(plan, changes, work),
        bytes=size,
        images=images,
        requests=sum(1 + ceil(size / BLOCK_BYTES) for path, size in pieces if not is_local(path)),
        seconds=None if not last or images is None else images / last["images_per_second"],
        memory=last.get("memory"),
    )


def _list_pieces(
    plan: Plan, changes: Changes, inventory: Inventory, work: Work
) -> Iterator[tuple[str, int]]:
    """Yield the path of each shard, or piece of one, that is to be read, and its size."""
    starts, stops = (plan.partitions[name].to_numpy() for name in ("start", "stop"))
    is_whole = np.isnan(starts)
    whole = np.union1d(
        inventory.list_shards(work.read & is_whole), _list_again(plan, inventory, work)
    )
    whole = whole[plan.states[whole] == ShardState.PRESENT]
    for shard in [*(plan.shards[number] for number in whole), *changes.new]:
        yield shard.path, shard.size or 0
    first = plan.partitions["first"].to_numpy()
    for number in np.flatnonzero(work.read & ~is_whole):
        shard = plan.shards[first[number]]
        stop = (shard.size or 0) if np.isnan(stops[number]) else stops[number]
        yield shard.path, int(stop - starts[number])


def _list_again(plan: Plan, inventory: Inventory, work: Work) -> NDArray[np.int64]:
    """Return the numbers of the shards that are to be read again, and are not yet."""
    planned = plan.again["shard"].to_numpy()
    left = planned[inventory.find_tasks(work)]
    return np.union1d(left, np.setdiff1d(work.again, planned))


def _count_partitions(plan: Plan, changes: Changes, work: Work) -> int | None:
    added = [*changes.new, *(plan.shards[number] for number in work.again)]
    division, known = plan.division, int(work.read.sum())
    if division.images_per_partition is None and division.blocksize is None:
        new = ceil(len(changes.new) / (division.files_per_partition or 1))
        return known + new + len(work.again)
    return None if added else known


def _estimate_images(plan: Plan, ledger: Ledger, size: int) -> int | None:
    """Return how many images so many bytes hold, judged by those of the dataset."""
    runs = ledger.select(Place.OUT)
    count = ledger.count()
    numbers = np.unique(runs["shard"][runs["shard"] >= 0])
    known = sum(plan.shards[number].size or 0 for number in numbers)
    return round(size / known * (count.images + count.failed)) if known else None


def _find_last_run(plan: Plan) -> dict[str, Any]:
    """Return the numbers of the last run that has read anything."""
    ended = (run for run in reversed(plan.description["runs"]) if run.get("images_per_second"))
    return next(ended, {})
