"""The Dask worker that the calling thread works for, if any."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from dask.system import CPU_COUNT
from distributed import WorkerPlugin, get_worker

if TYPE_CHECKING:
    from distributed import Worker


def find_worker() -> Worker | None:
    """Return the worker whose task this thread runs, None in any other thread."""
    try:
        return get_worker()
    except ValueError:
        return None


def count_own_cores(num_gpus: int, share: float) -> int:
    """Return how many CPU cores the calling thread has a right to.

    A thread of a CPU worker has one, since Dask gives a machine as many threads as cores.
    Beside GPUs the machine's cores are divided among its GPUs and the readers on each. In
    the main thread of a process that is no worker all cores are free.
    """
    cores: int = CPU_COUNT
    if num_gpus:
        return max(1, int(cores / num_gpus * share))
    return cores if threading.current_thread() is threading.main_thread() else 1


class _Release(WorkerPlugin):  # type: ignore[misc]  # distributed is not typed
    """Calls a function when its worker closes."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        self._release()


def release_with_worker(name: str, release: Callable[[], None]) -> None:
    """Call ``release`` when the calling thread's worker closes; do nothing without a worker."""
    worker = find_worker()
    if worker is not None and name not in worker.plugins:
        worker.plugins[name] = _Release(release)
