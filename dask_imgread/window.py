"""Run more tasks on a cluster than may be in flight at one time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from distributed import Client, Future

Item = TypeVar("Item")


def map_windowed(
    client: Client,
    fn: Callable[[Item], Any],
    items: Iterable[Item],
    *,
    window: int | None = None,
    **options: Any,
) -> Iterator[tuple[Item, Future]]:
    """Do what ``client.map`` does with a bound on the tasks in flight, and yield them as they end.

    Dask sends tasks with a resource restriction to the workers all at once, and keeps
    every result until its future is dropped. Where results are pixels that fills the
    cluster's memory; here at most ``window`` results exist at any time, if the caller
    drops each future before taking the next.

    Parameters
    ----------
    client
        A client of the cluster.
    fn
        What to run, such as an ``ImageReaderStage``.
    items
        Its arguments, taken as they are needed; may be endless.
    window
        Tasks in flight at most; twice the cluster's threads if not given.
    **options
        Options of ``client.submit``, such as ``reader.annotations(client)`` or ``retries``.

    Yields
    ------
    item, future
        In the order in which they end. A future may hold an error.

    Examples
    --------
    >>> from distributed import Client
    >>> with Client(n_workers=1, processes=False, dashboard_address=None) as client:
    ...     sorted(future.result() for _, future in map_windowed(client, abs, [-3, -1, 2]))
    [1, 2, 3]
    """
    from distributed import as_completed

    if window is None:
        window = 2 * max(1, sum(client.nthreads().values()))
    waiting = iter(items)
    ended = as_completed()
    running: dict[Future, Item] = {}

    def submit(count: int) -> None:
        for item in islice(waiting, count):
            future = client.submit(fn, item, **options)
            running[future] = item
            ended.add(future)

    submit(window)
    while running:
        future = next(ended)
        item = running.pop(future)
        yield item, future
        del future
        submit(1)
