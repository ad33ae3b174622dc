"""Run more tasks on a cluster than may be in flight at one time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from distributed.scheduler import KilledWorker

from dask_imgread.cluster.start import WorkerWatch, check_resources
from dask_imgread.errors import NoWorkersError

if TYPE_CHECKING:
    from distributed import Client, Future, as_completed

_LOOKED_EVERY = 5.0  # seconds, at the number of threads

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_windowed(
    client: Client,
    fn: Callable[[Item], Any],
    items: Iterable[Item],
    *,
    window: int | None = None,
    smallest_window: int = 2,
    **options: Any,
) -> Iterator[tuple[Item, Future]]:
    """Do what ``client.map`` does with a bound on the tasks in flight, and yield them as they end.

    Dask sends tasks with a resource restriction to the workers all at once, and keeps
    every result until its future is dropped. Where results are pixels that fills the
    cluster's memory; here at most ``window`` results exist at any time: a future is
    released when the next one is taken, and no sooner is another task submitted.

    When a worker dies again and again, Dask blames whatever it had been given. What was blamed
    is run once more at the end, one item at a time, with ``fn.isolated()`` where ``fn`` has that,
    as an ``ImageReaderStage`` has: so of a task that holds a picture which kills its decoder,
    that picture alone is lost.

    Parameters
    ----------
    client
        A client of the cluster.
    fn
        What to run, such as an ``ImageReaderStage``.
    items
        Its arguments, taken as they are needed; may be endless.
    window
        Tasks in flight at most; if not given, twice the threads that the cluster has at
        the time.
    smallest_window
        The least that this comes to; more than 2 where results are small and an adaptive
        cluster is to see at once how much work there is.
    **options
        Options of ``client.map``, such as ``reader.annotations(client)`` or ``retries``.

    Yields
    ------
    item, future
        In the order in which they end. A future may hold an error; a ``KilledWorker`` if the
        item killed its workers when it was run alone, too.

    Raises
    ------
    RuntimeError
        If no worker declares the ``resources`` that are asked for.
    NoWorkersError
        If the cluster has no workers for too long; a TimeoutError.

    Examples
    --------
    >>> from distributed import Client
    >>> with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
    ...     sorted(future.result() for _, future in map_windowed(client, abs, [-3, -1, 2]))
    [1, 2, 3]
    """
    check_resources(client, options.get("resources") or {})
    blamed: list[Item] = []
    for item, future in _map(client, fn, items, window, smallest_window, options):
        if _is_blamed(future):
            blamed.append(item)
        else:
            yield item, future
    if blamed:
        alone = fn.isolated() if hasattr(fn, "isolated") else fn
        # Not pure: the key of the error is not to be asked for again.
        yield from _map(client, alone, blamed, 1, 1, options | {"pure": False})


def _map(
    client: Client,
    fn: Callable[[Item], Any],
    items: Iterable[Item],
    window: int | None,
    smallest_window: int,
    options: dict[str, Any],
) -> Iterator[tuple[Item, Future]]:
    from distributed import as_completed

    waiting = iter(items)
    ended = as_completed()
    running: dict[Future, Item] = {}

    def submit(count: int) -> None:
        chosen = list(islice(waiting, count))
        for item, future in zip(chosen, client.map(fn, chosen, **options), strict=True):
            running[future] = item
            ended.add(future)

    limit = window or _look_up_window(client, smallest_window)
    looked = time.monotonic()
    submit(limit)
    while running:
        future = _take_ended(client, ended, options.get("resources") or {})
        item = running.pop(future)
        yield item, future
        future.release()
        if window is None and time.monotonic() - looked > _LOOKED_EVERY:
            limit, looked = _look_up_window(client, smallest_window), time.monotonic()
        # Several at a time: one by one, telling the scheduler costs more than the scheduling.
        if limit - len(running) >= max(1, limit // 4):
            submit(limit - len(running))


def _take_ended(client: Client, ended: as_completed, resources: dict[str, float]) -> Future:
    """Return the next future that ends, as long as there are workers to end it."""
    watch = WorkerWatch(client, resources)
    while not ended.has_ready():
        with ended.thread_condition:
            ended.thread_condition.wait(0.1)  # as Dask does: it may be told too early
        watch.look()
    return next(ended)


def run_one(client: Client, fn: Callable[[Item], Result], item: Item, **options: Any) -> Result:
    """Return what a function makes of one item on a worker, or raise what it raises there.

    Raises
    ------
    NoWorkersError
        If the cluster has no workers for too long.
    """
    _, future = next(_map(client, fn, [item], 1, 1, options | {"pure": False}))
    result: Result = _fetch(client, future, options.get("resources") or {})
    return result


def _fetch(client: Client, future: Future, resources: dict[str, float]) -> Any:
    """Return the result of a task that has ended, as long as there are workers.

    The worker that has it may go before it gives it: then the task runs again.
    """
    watch = WorkerWatch(client, resources)
    seconds = watch.interval
    while future.status != "error":
        try:
            return future.result(timeout=seconds)
        except TimeoutError:
            watch.look()
            seconds *= 2  # what is large takes its time
    return future.result()


def _look_up_window(client: Client, smallest: int) -> int:
    threads: int = sum(client.nthreads().values())
    return max(smallest, 2 * threads)


def _is_blamed(future: Future) -> bool:
    return future.status == "error" and isinstance(future.exception(), KilledWorker)


def run_tasks(
    client: Client, fn: Callable[[Item], Result], items: Iterable[Item], **options: Any
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield what ``map_windowed`` does, as results or errors.

    Raises
    ------
    CancelledError
        If the scheduler is lost.
    NoWorkersError
        If the cluster has no workers for too long.
    """
    for item, future in map_windowed(client, fn, items, **options):
        try:
            result = _fetch(client, future, options.get("resources") or {})
        except (CancelledError, NoWorkersError):
            raise
        except Exception as error:
            result = error
        yield item, result
