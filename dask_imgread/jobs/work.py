"""What is left to do of a job: what its plan asks for, less what the footers of its parts say."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from dask_imgread.jobs.merge import Merge, Replacement
from dask_imgread.jobs.parts import Ledger, PartName, Place
from dask_imgread.jobs.plan import Plan
from dask_imgread.jobs.tables import ShardState

Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]

logger = logging.getLogger("dask_imgread")


@dataclass(frozen=True)
class Work:
    """What is left to do.

    Parameters
    ----------
    read
        For each partition whether it is to be read.
    again
        Numbers of shards that are to be read again as a whole, and merged into parts that have rows
        of other shards, or of other pieces.
    retried
        Those of them that have not changed: their rows are replaced only if no image is lost by it.
    pruned
        Numbers of shards whose rows are to be removed.
    merges
        Whether partitions wait to be merged into the dataset.
    """

    read: Mask
    again: Numbers
    retried: Numbers
    pruned: Numbers
    merges: bool

    def __bool__(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.read.any() or len(self.again) or len(self.pruned) or self.merges)


class _Runs(NamedTuple):
    """The shard runs of all parts in one place, as columns; without those of no shard."""

    number: Numbers
    shard: Numbers
    token: Numbers
    rows: Numbers
    images: Numbers
    failed: Numbers
    claim: Numbers

    @classmethod
    def of(cls, ledger: Ledger, place: Place) -> Self:
        runs = ledger.select(place)
        runs = runs[runs["shard"] >= 0]
        return cls(*(runs[name].to_numpy(np.int64) for name in cls._fields))


class Inventory:
    """Compares a plan with the parts that are there.

    Parameters
    ----------
    plan
        The plan.
    ledger
        What the footers of the parts say.
    """

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self._plan, self._rows_per_file = plan, plan.rows_per_file
        self._tokens, self._states = plan.tokens, plan.states
        self._out, self._staged, self._again = (_Runs.of(ledger, place) for place in Place)
        self._first, self._count = (
            plan.partitions[name].to_numpy().astype(np.int64) for name in ("first", "count")
        )
        self._is_home = plan.partitions["is_home"].to_numpy().astype(bool)
        # Each partition with each of its shards.
        numbers = np.arange(len(self._first))
        self._partition = np.repeat(numbers, self._count)
        begins = np.repeat(np.cumsum(self._count) - self._count, self._count)
        self._shard = self._first[self._partition] + np.arange(len(begins)) - begins
        # The dataset's files, and which of them has the rows of each partition; -1: none.
        files = ledger.select(Place.OUT)[["number", "last"]].drop_duplicates("number")
        files = files.sort_values("number")
        self._files, self._lasts = (files[name].to_numpy(np.int64) for name in files)
        places = np.searchsorted(self._files, numbers, "right") - 1
        is_covered = (places >= 0) & (numbers <= np.append(self._lasts, -1)[places])
        self._homes = np.where(is_covered, np.append(self._files, -1)[places], -1)
        self._is_staged = np.isin(numbers, ledger.select(Place.STAGED)["number"]) & ~is_covered
        # Which tasks of `plan.again` are of shards as they are now, and which of them are done.
        self._task_shard, token = (
            plan.again[name].to_numpy().astype(np.int64) for name in ("shard", "token")
        )
        tasks = np.arange(len(self._task_shard))
        is_present = self._states[self._task_shard] == ShardState.PRESENT
        self._is_task = is_present & (token == self._tokens[self._task_shard])
        self._is_done = np.isin(tasks, self._again.number[self._match(self._again)])

    @property
    def is_there(self) -> Mask:
        """For each partition whether the dataset has a file of its number."""
        return np.isin(np.arange(len(self._first)), self._files)

    def find_work(self, retry_failed: bool = False) -> Work:
        """Return what is left to do; with ``retry_failed``, what failed is read again, too."""
        is_present = self._states[self._shard] == ShardState.PRESENT
        stale = is_present & ~self._is_fresh(self._out, self._homes[self._partition])
        waiting = np.where(self._is_staged, np.arange(len(self._first)), -1)
        stale &= ~self._is_fresh(self._staged, waiting[self._partition])
        can_read = ~self._is_home & ~self._is_staged
        if self._rows_per_file is None:  # a part may be written anew if it keeps nothing
            states = self._states[self._out.shard]
            keeps = states == ShardState.GONE
            keeps |= (states == ShardState.PRESENT) & self._match(self._out)
            can_read[self._out.number[keeps]] = False
        else:
            can_read &= self._homes < 0
        read = self._mark(stale) & can_read
        changed = np.unique(self._shard[stale & ~can_read[self._partition]])
        # What a run that was killed has begun to read again is read to the end.
        begun = np.setdiff1d(self._task_shard[self._is_task], self.list_shards(read))
        again = np.union1d(changed, begun)
        if retry_failed:
            more, failed = self._find_failed(again)
            read |= more
            again = np.union1d(again, failed)
        pruned = self._out.shard[self._states[self._out.shard] == ShardState.PRUNED]
        merges = self._rows_per_file is not None and bool((self._homes < 0).any())
        return Work(read, again, np.setdiff1d(again, changed), np.unique(pruned), merges)

    def is_complete(self) -> bool:
        """Return whether the dataset has everything, though a retry may have been in vain."""
        work = self.find_work()
        return not (
            work.read.any()
            or work.merges
            or len(work.pruned)
            or len(work.again) > len(work.retried)
        )

    def _mark(self, pairs: Mask) -> Mask:
        """Return which partitions are among some pairs of a partition and a shard."""
        marked = np.zeros(len(self._first), bool)
        marked[self._partition[pairs]] = True
        return marked

    def _is_fresh(self, runs: _Runs, numbers: Numbers) -> Mask:
        """Return whether a part has the rows of a shard as it is now; a number for each pair."""
        has = runs.number << 32 | runs.shard
        return np.isin(numbers << 32 | self._shard, has[self._match(runs)])

    def _match(self, runs: _Runs) -> Mask:
        matches: Mask = runs.token == self._tokens[runs.shard]
        return matches

    def _find_failed(self, again: Numbers) -> tuple[Mask, Numbers]:
        """Return the partitions in which images failed, and shards where these can't be read.

        What this retry has read already, before it was killed, is left out.
        """
        retries = np.array(self._plan.description["retries"], np.int64)
        failed = (self._out.failed > 0) & ~np.isin(self._out.claim, retries)
        failed &= self._states[self._out.shard] == ShardState.PRESENT
        read = np.zeros(len(self._first), bool)
        if self._rows_per_file is None:
            read[self._out.number[failed]] = True
            is_absent = self._states[self._shard] != ShardState.PRESENT
            read &= ~self._is_home & ~self._mark(is_absent | np.isin(self._shard, again))
            failed &= ~read[self._out.number]
        return read, np.unique(self._out.shard[failed])

    def list_shards(self, partitions: Mask) -> Numbers:
        """Return the numbers of the shards that some partitions are made of."""
        return np.unique(self._shard[partitions[self._partition]])

    def find_tasks(self, work: Work) -> Mask:
        """Return which tasks of ``plan.again`` are to be run."""
        tasks: Mask = np.isin(self._task_shard, work.again) & self._is_task & ~self._is_done
        return tasks

    def find_prunes(self) -> Iterator[Merge]:
        """Yield parts of the dataset from which rows are to be removed."""
        yield from self._make_merges(self._find_pruned(self._out, self._out.number), {})

    def find_merges(self, work: Work) -> Iterator[Merge]:
        """Yield what is to be merged, once everything has been read."""
        groups = {} if self._rows_per_file is None else self._group_partitions(self._rows_per_file)
        homes = np.where(self._homes >= 0, self._homes, np.arange(len(self._homes)))
        for number, members in groups.items():
            homes[members] = number
        replaced = self._find_pruned(self._staged, homes[self._staged.number])
        homes_of = _group(self._shard, homes[self._partition])
        tasks_of = _group(self._task_shard[self._is_task], np.flatnonzero(self._is_task))
        before, now = (_sum_images(runs) for runs in (self._out, self._again))
        retried, files = set(work.retried.tolist()), set(self._files.tolist())
        for shard in work.again.tolist():
            if shard in retried and self._loses_images(shard, before, now):
                continue
            where = np.unique(homes_of[shard]).tolist()
            names = tuple(PartName(Place.AGAIN, task) for task in tasks_of[shard].tolist())
            there = [home for home in where[:-1] if home in files]
            for home in where:
                replaced[home][shard] = Replacement(shard, names, (*there, where[-1]))
        yield from self._make_merges(replaced, groups)

    def _find_pruned(self, runs: _Runs, numbers: Numbers) -> dict[int, dict[int, Replacement]]:
        """Return the shards whose rows are to be removed, by the part; numbers of a part a run."""
        replaced: dict[int, dict[int, Replacement]] = defaultdict(dict)
        is_pruned = self._states[runs.shard] == ShardState.PRUNED
        pairs = zip(numbers[is_pruned].tolist(), runs.shard[is_pruned].tolist(), strict=True)
        for number, shard in pairs:
            replaced[number][shard] = Replacement(shard)
        return replaced

    def _make_merges(
        self, replaced: dict[int, dict[int, Replacement]], groups: dict[int, list[int]]
    ) -> Iterator[Merge]:
        lasts = dict(zip(self._files.tolist(), self._lasts.tolist(), strict=True))
        for number in sorted({*replaced, *groups}):
            members = groups.get(number, [])
            yield Merge(
                number,
                number in lasts,
                members[-1] if members else lasts.get(number, number),
                tuple(PartName(Place.STAGED, m) for m in members if self._is_staged[m]),
                tuple(replaced.get(number, {}).values()),
            )

    def _group_partitions(self, rows_per_file: int) -> dict[int, list[int]]:
        """Return which partitions that no file has are to be merged into which file."""
        groups: dict[int, list[int]] = {}
        staged = np.bincount(self._staged.number, self._staged.rows, len(self._first))
        in_files = np.bincount(self._out.number, self._out.rows, len(self._first))
        file, rows = -1, 0
        for number in range(len(self._first)):
            if self._homes[number] >= 0:
                file, rows = int(self._homes[number]), int(in_files[self._homes[number]])
                continue
            more = int(staged[number])
            if file < 0 or rows + more > rows_per_file:
                file, rows = number, 0
            groups.setdefault(file, []).append(number)
            rows += more
        return groups

    def _loses_images(self, shard: int, before: Counter[int], now: Counter[int]) -> bool:
        """Return whether fewer images of a shard could be read again than before."""
        if now[shard] < before[shard]:
            logger.warning(
                "%s: %d images could be read before, and %d now: earlier rows stay",
                *(self._plan.table["shard"][shard], before[shard], now[shard]),
            )
        return now[shard] < before[shard]


def _group(keys: Numbers, values: Numbers) -> dict[int, Numbers]:
    """Return the values of each key."""
    order = np.argsort(keys, kind="stable")
    found, starts = np.unique(keys[order], return_index=True)
    pieces = np.split(values[order], starts[1:]) if len(keys) else []
    return dict(zip(found.tolist(), pieces, strict=True))


def _sum_images(runs: _Runs) -> Counter[int]:
    """Return how many images of each shard were read."""
    counts: Counter[int] = Counter()
    for shard, images in zip(runs.shard.tolist(), runs.images.tolist(), strict=True):
        counts[shard] += images
    return counts
