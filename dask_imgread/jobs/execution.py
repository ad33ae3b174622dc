"""One run of a job: what is left to do is done on the cluster, and kept count of."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from distributed import Client
from distributed.scheduler import KilledWorker

from dask_imgread.cluster.window import run_tasks
from dask_imgread.errors import JobError, OtherJobError, ReadError, SchemaError
from dask_imgread.jobs.merge import Merge, PartMerger
from dask_imgread.jobs.parts import (
    STAGING,
    Count,
    Footer,
    Ledger,
    PartName,
    Place,
    make_token,
    tabulate_parts,
)
from dask_imgread.jobs.plan import Changes, Partition, Plan
from dask_imgread.jobs.work import Inventory
from dask_imgread.jobs.writer import PartWriter
from dask_imgread.progress import choose_progress
from dask_imgread.storage.redaction import hide_secrets, redact_url

logger = logging.getLogger("dask_imgread")

_SMALLEST_WINDOW = 16  # larger than for pixels: a task returns nothing but counts
_MOST_ERRORS = 20  # tasks that fail before the job gives up
_SAVED_EVERY = 60.0  # seconds, or longer if it takes long
_SAVING_SHARE = 50  # runs last at least so many times as long as saving what is known
_MOST_RUNS = 1000  # that a job remembers

Item = TypeVar("Item")


class Execution:
    """One run of a job.

    Parameters
    ----------
    plan
        The job's plan.
    changes
        What is new in it.
    retry_failed
        Whether what failed is read again. A retry that was killed goes on in any case.
    claim
        The token of the run's claim.
    """

    def __init__(self, plan: Plan, changes: Changes, retry_failed: bool, claim: str) -> None:
        self._plan = plan
        self._retries: list[int] = plan.description["retries"]
        self._began, self._rate, self._memory = time.time(), 0.0, 0
        self._written: dict[PartName, Footer] = {}  # since the ledger was saved
        self._read, self._partitions = Count(), 0
        self._known, self._is_new = plan.folder.look_up_parts(plan.job_id)
        self._inventory = Inventory(plan, self._known)
        self._saved, self._save_interval = time.monotonic(), _SAVED_EVERY
        self.work = self._inventory.find_work(retry_failed or bool(self._retries))
        if retry_failed or self._retries:
            self._retries = [*self._retries, make_token(claim)]
        self._run: dict[str, Any] = {
            "began": self._began,
            "host": socket.gethostname(),
            "new_shards": len(changes.new),
            "changed_shards": len(changes.changed),
            "gone_shards": plan.gone,
            "pruned_shards": len(self.work.pruned),
        }

    def begin(self) -> None:
        """Plan what is to be read again, and note in the folder that a run has begun."""
        plan = self._plan
        if not len(plan.again):  # what a run has left that was killed at its end
            left = self._known.select(Place.AGAIN)["number"].unique().tolist()
            plan.folder.remove(PartName(Place.AGAIN, number).file for number in left)
            self._known = Ledger(self._known.runs[self._known.runs["place"] != Place.AGAIN])
        plan.description |= {
            "retries": self._retries,
            "runs": [*plan.description["runs"][1 - _MOST_RUNS :], self._run],
        }
        plan.read_again(self.work.again)
        plan.modified.add("description")
        plan.save()
        self._inventory = Inventory(plan, self._known)

    def iterate_partitions(self) -> Iterator[Partition]:
        """Yield what is to be read."""
        place = Place.OUT if self._plan.rows_per_file is None else Place.STAGED
        tasks = self._inventory.find_tasks(self.work)
        return chain(
            self._plan.iterate_partitions(self.work.read, place, self._inventory.is_there),
            self._plan.iterate_partitions(tasks, Place.AGAIN, np.zeros(len(tasks), bool)),
        )

    def read(self, client: Client, writer: PartWriter, retries: int, hidden: bool) -> None:
        """Read what is to be read on the cluster.

        Raises
        ------
        JobError
            If tasks end in errors that are not an image's; their partitions are still to be done.
        """
        tasks = self._inventory.find_tasks(self.work)
        self._partitions = int(self.work.read.sum() + tasks.sum())
        total = len(self.work.read) + len(tasks)
        run = partial(self._run_tasks, client, writer, lose=writer.write_lost, retries=retries)
        annotations = writer.reader.annotations(client)
        with choose_progress(total, total - self._partitions, hidden=hidden) as shown:
            for done, (partition, footer) in enumerate(
                run(self.iterate_partitions(), **annotations)
            ):
                self._read += footer.count()
                self._note(partition.name, footer)
                shown.update(done + 1, self._read.images, self._read.failed)
            self._rate = shown.measure_rate()

    def prune(self, client: Client, merger: PartMerger, retries: int, hidden: bool) -> None:
        """Remove rows of shards that are gone, before any of these may come back."""
        if len(self.work.pruned):
            self._merge(client, merger, list(self._inventory.find_prunes()), retries, hidden)

    def merge(self, client: Client, merger: PartMerger, retries: int, hidden: bool) -> None:
        """Merge what was read into the dataset, where it is not written there at once.

        Raises
        ------
        JobError
            If a part could not be written.
        """
        work = self._inventory.find_work()
        if work.read.any() or self._inventory.find_tasks(work).any():
            raise JobError(_tell_missing(self._plan))
        self._merge(client, merger, list(self._inventory.find_merges(work)), retries, hidden)

    def _merge(
        self, client: Client, merger: PartMerger, merges: list[Merge], retries: int, hidden: bool
    ) -> None:
        if not merges:
            return
        count = Count()
        logger.info("writing %d files of the dataset from what was read", len(merges))
        with choose_progress(len(merges), hidden=hidden) as shown:
            merged = self._run_tasks(client, merger, merges, retries=retries)
            for done, (_, (name, footer)) in enumerate(merged):
                count += footer.count()
                self._note(name, footer)
                shown.update(done + 1, count.images, count.failed)

    def finish(self) -> None:
        """Check that everything is there, and keep count of it.

        Raises
        ------
        JobError
            If a part is missing that a worker has written.
        """
        plan = self._plan
        description = plan.description
        if self.work and not self._inventory.is_complete():
            raise JobError(_tell_missing(plan))
        if self._is_new:
            plan.folder.write_ledger(self._known)
        count = self.count()
        self._run |= {
            "ended": time.time(),
            **self.describe(),
            "memory": self._memory,
            "images": count.images,
            "failed": count.failed,
        }
        description["retries"] = []
        if self._run not in description["runs"]:  # nothing was left to do
            description["runs"] = [*description["runs"][1 - _MOST_RUNS :], self._run]
        plan.finish()
        plan.folder.remove([STAGING])
        plan.folder.tidy(description["tables"].values(), self._known, len(plan.partitions))

    def describe(self) -> dict[str, Any]:
        """Return the numbers of this run."""
        return {
            "new_images": self._read.images,
            "new_failed": self._read.failed,
            "new_partitions": self._partitions,
            "images_per_second": float(f"{self._rate:.4g}"),
        }

    def count(self) -> Count:
        """Return how many images the dataset is about."""
        return self._known.count()

    def _run_tasks(
        self,
        client: Client,
        fn: Callable[[Any], Any],
        items: Iterable[Item],
        *,
        lose: Callable[[Item, Exception], Any] | None = None,
        **options: Any,
    ) -> Iterator[tuple[Item, Any]]:
        """Run a function on items on the cluster; yield the results; raise JobError at the end."""
        errors: list[str] = []
        options = {"pure": False, "smallest_window": _SMALLEST_WINDOW} | options
        try:
            for item, result in run_tasks(client, fn, items, **options):
                if isinstance(result, KilledWorker) and lose is not None:
                    result = lose(item, result)
                if isinstance(result, ReadError | OtherJobError):
                    raise result
                if isinstance(result, SchemaError):
                    raise JobError(str(result)) from None
                if not isinstance(result, Exception):
                    yield item, result
                    continue
                reason = f"{item!r}: {type(result).__name__}: {result}"
                errors.append(hide_secrets(reason, self._plan.storage_options))
                logger.error("%s", errors[-1])
                if len(errors) == _MOST_ERRORS:
                    break
        finally:
            self._save()
        if errors:
            raise JobError(
                f"{len(errors)} partitions could not be done, such as {errors[0]}. The same call "
                "tries them again"
            )

    def _note(self, name: PartName, footer: Footer) -> None:
        """Keep count of a part that was written."""
        self._written[name] = footer
        self._memory = max(self._memory, footer.memory)
        if time.monotonic() - self._saved > self._save_interval:
            self._save()

    def _save(self) -> None:
        """Keep count in the folder of the parts that were written, so that it can be looked up."""
        if not self._written:
            return
        began = time.monotonic()
        folder = self._plan.folder
        parts = tabulate_parts(folder.find_parts())
        # Others may have been written, too, of which the client does not know yet.
        written = Ledger.from_footers(self._written.items()).set_stamps(parts)
        self._known = self._known.replace_parts(written).keep_parts(parts)
        folder.write_ledger(self._known)
        self._written.clear()
        self._is_new = False
        self._inventory = Inventory(self._plan, self._known)
        self._saved = time.monotonic()
        self._save_interval = max(_SAVED_EVERY, _SAVING_SHARE * (self._saved - began))


def _tell_missing(plan: Plan) -> str:
    return (
        f"what workers wrote is not in {redact_url(plan.folder.url)}: give a folder that client "
        "and workers share"
    )
