"""Run many tasks on a cluster, with a bound on those in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from distributed.scheduler import KilledWorker

from dask_imgread.cluster.start import WorkerWatch, check_resources
from dask_imgread.errors import NoWorkersError

if TYPE_CHECKING:
    from distributed import Client, Future, as_completed

_RESIZE_INTERVAL = 5.0  # seconds between adjustments of the window to the cluster

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_windowed(
    client: Client,
    fn: Callable[[Item], Any],
    items: Iterable[Item],
    *,
    window: int | None = None,
    smallest_window: int = 2,
    **map_options: Any,
) -> Generator[tuple[Item, Future]]:
    """Run ``client.map`` with a bound on the tasks in flight, and yield them as they complete.

    Dask sends all tasks with resource restrictions to the workers at once, and keeps every
    result until its future is released. Results that are pixels would fill the cluster's
    memory. Here at most ``window`` results exist at any time: a future is released when the
    next one is taken, and only then is another task submitted.

    When workers keep dying, Dask raises ``KilledWorker`` for every task that they had. Such items
    are run again at the end, one at a time, with ``fn.isolated()`` if ``fn`` has that method,
    as ``ImageReaderStage`` does: if an image kills its decoder, only that image is lost.

    Parameters
    ----------
    client
        A client of the cluster.
    fn
        What to run, such as an ``ImageReaderStage``.
    items
        Its arguments, consumed as they are needed; may be infinite.
    window
        Maximum number of tasks in flight; by default twice that of the cluster's threads, and
        adjusted as that changes.
    smallest_window
        A lower bound for the default; more than 2 if results are small and an adaptive
        cluster should see at once how much work there is.
    **map_options
        Keyword arguments of ``client.map``, such as ``reader.annotations(client)`` or ``retries``.

    Yields
    ------
    item, future
        In the order of completion. A future may hold an error: ``KilledWorker`` if the item
        killed its workers even when run alone.

    Raises
    ------
    RuntimeError
        If no worker declares the requested ``resources``.
    NoWorkersError
        If the cluster has no workers for too long; a TimeoutError.

    Examples
    --------
    >>> from distributed import Client
    >>> with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
    ...     sorted(future.result() for _, future in map_windowed(client, abs, [-3, -1, 2]))
    [1, 2, 3]
    """
    check_resources(client, map_options.get("resources") or {})
    suspects: list[Item] = []
    with closing(
        _run_windowed(client, fn, items, window, smallest_window, map_options)
    ) as completed:
        for item, future in completed:
            if _killed_its_workers(future):
                suspects.append(item)
            else:
                yield item, future
    if suspects:
        isolated = fn.isolated() if hasattr(fn, "isolated") else fn
        # Not pure: the same key would return the error again.
        yield from _run_windowed(client, isolated, suspects, 1, 1, map_options | {"pure": False})


def _run_windowed(
    client: Client,
    fn: Callable[[Item], Any],
    items: Iterable[Item],
    window: int | None,
    smallest_window: int,
    map_options: dict[str, Any],
) -> Generator[tuple[Item, Future]]:
    from distributed import as_completed

    waiting = iter(items)
    completed = as_completed()
    running: dict[Future, Item] = {}

    def submit(count: int) -> None:
        chosen = list(islice(waiting, count))
        for item, future in zip(chosen, client.map(fn, chosen, **map_options), strict=True):
            running[future] = item
            completed.add(future)

    limit = window or _compute_window(client, smallest_window)
    resized = time.monotonic()
    try:
        submit(limit)
        while running:
            future = _wait_for_next(client, completed, map_options.get("resources") or {})
            item = running.pop(future)
            yield item, future
            future.release()
            if window is None and time.monotonic() - resized > _RESIZE_INTERVAL:
                limit, resized = _compute_window(client, smallest_window), time.monotonic()
            # Several at a time: a message for each task would cost more than scheduling it.
            if limit - len(running) >= max(1, limit // 4):
                submit(limit - len(running))
    finally:  # a traceback may keep this frame, as in a notebook, and the futures with it
        for future in running:
            future.release()


def _wait_for_next(client: Client, completed: as_completed, resources: dict[str, float]) -> Future:
    """Return the next completed future; raise NoWorkersError if there are no workers for long."""
    watch = WorkerWatch(client, resources)
    while not completed.has_ready():
        with completed.thread_condition:
            completed.thread_condition.wait(0.1)  # as Dask does; wake-ups can be spurious
        watch.check()
    return next(completed)


def run_one(client: Client, fn: Callable[[Item], Result], item: Item, **map_options: Any) -> Result:
    """Run a function on one item on a worker; return its result, or raise its exception.

    Raises
    ------
    NoWorkersError
        If the cluster has no workers for too long.
    """
    _, future = next(_run_windowed(client, fn, [item], 1, 1, map_options | {"pure": False}))
    result: Result = _fetch_result(client, future, map_options.get("resources") or {})
    return result


def _fetch_result(client: Client, future: Future, resources: dict[str, float]) -> Any:
    """Return the result of a completed task; raise NoWorkersError if there are no workers for long.

    If its worker dies before the result is fetched, Dask runs the task again.
    """
    watch = WorkerWatch(client, resources)
    seconds = watch.interval
    while future.status != "error":
        try:
            return future.result(timeout=seconds)
        except TimeoutError:
            watch.check()
            seconds *= 2  # large results take time
    return future.result()


def _compute_window(client: Client, smallest: int) -> int:
    threads: int = sum(client.nthreads().values())
    return max(smallest, 2 * threads)


def _killed_its_workers(future: Future) -> bool:
    return future.status == "error" and isinstance(future.exception(), KilledWorker)


def run_tasks(
    client: Client, fn: Callable[[Item], Result], items: Iterable[Item], **map_options: Any
) -> Generator[tuple[Item, Result | Exception]]:
    """Run ``map_windowed``, and yield results or errors instead of futures.

    Raises
    ------
    CancelledError
        If the connection to the scheduler is lost.
    NoWorkersError
        If the cluster has no workers for too long.
    """
    with closing(map_windowed(client, fn, items, **map_options)) as completed:
        for item, future in completed:
            try:
                result = _fetch_result(client, future, map_options.get("resources") or {})
            except (CancelledError, NoWorkersError):
                raise
            except Exception as error:
                result = error
            yield item, result
