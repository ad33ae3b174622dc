"""The Dask worker whose task the calling thread runs, if any."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from dask.system import CPU_COUNT
from distributed import WorkerPlugin, get_worker

if TYPE_CHECKING:
    from distributed import Worker


def find_worker() -> Worker | None:
    """Return the worker whose task the calling thread runs, None in other threads."""
    try:
        return get_worker()
    except ValueError:
        return None


def count_own_cores(num_gpus: int, share: float) -> int:
    """Return how many CPU cores the calling thread may use.

    A thread of a CPU worker has one, since Dask starts as many threads as there are cores. On a
    machine with GPUs the cores are divided among the GPUs, and the readers on each. The main
    thread, which is not a worker's, may use all cores.
    """
    cores: int = CPU_COUNT
    if num_gpus:
        return max(1, int(cores / num_gpus * share))
    return cores if threading.current_thread() is threading.main_thread() else 1


class _CloseCallback(WorkerPlugin):  # type: ignore[misc]  # distributed is not typed
    """Calls a function when its worker closes."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        self._release()


def release_with_worker(name: str, release: Callable[[], None]) -> None:
    """Call ``release`` when the calling thread's worker closes; do nothing without a worker."""
    worker = find_worker()
    if worker is not None and name not in worker.plugins:
        worker.plugins[name] = _CloseCallback(release)
