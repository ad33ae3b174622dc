"""What GPUs there are, and the shares of them that readers hold."""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from distributed.diagnostics import nvml

from dask_imgread.worker import find_worker

RESOURCE = "GPU"  # what workers declare, and tasks ask for a share of


def count_gpus() -> int:
    """Return how many GPUs this process can use; 0 without a driver. Makes no CUDA context.

    NVML counts the machine's GPUs; ``CUDA_VISIBLE_DEVICES`` may leave fewer, as described
    in NVIDIA's CUDA C++ Programming Guide, "CUDA Environment Variables".
    """
    count: int = nvml.device_get_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    entries = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        if entry.lstrip("-").isdigit() and not 0 <= int(entry) < count:
            break  # CUDA, too, stops at the first index that is not there
        entries.append(entry)
    return min(count, len(entries))


class _Shares:
    """The shares that the threads of one worker hold; together at most what it declares."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._shares: dict[int, float] = {}  # by thread
        self._readers: Counter[int] = Counter()

    def acquire(self, thread: int, share: float, capacity: float) -> None:
        with self._free:
            # A thread that reads inside of what it reads waits for nobody: it would be itself.
            if not self._readers[thread]:
                self._free.wait_for(
                    lambda: sum(self._shares.values()) + share <= capacity + 1e-9  # 3 times 1/3
                )
                self._shares[thread] = share
            self._readers[thread] += 1

    def release(self, thread: int) -> None:
        with self._free:
            self._readers[thread] -= 1
            if not self._readers[thread]:
                del self._readers[thread], self._shares[thread]
                self._free.notify_all()


_shares: defaultdict[str, _Shares] = defaultdict(_Shares)  # by worker


@contextmanager
def hold_share(share: float) -> Iterator[None]:
    """Hold a share of this worker's GPU, waiting until it is free.

    Dask's scheduler holds shares for tasks that carry a resource annotation, but bags lose
    annotations in optimization, and DataFrames ignore them. This holds on every path, and
    never waits where the scheduler already did. Without a GPU, declared or real, there is
    nothing to hold.

    Raises
    ------
    RuntimeError
        If the worker declares less than ``share``.
    """
    worker = find_worker()
    if worker is not None and RESOURCE in worker.state.total_resources:
        capacity = worker.state.total_resources[RESOURCE]
    elif count_gpus():
        capacity = 1.0  # the process's first GPU is what it decodes on
    else:
        yield
        return
    if share > capacity:
        raise RuntimeError(
            f"a reader asks for {share} of a GPU, but its worker declares only {capacity}"
        )
    shares = _shares[worker.id if worker is not None else ""]
    thread = threading.get_ident()  # a generator may be closed by another one
    shares.acquire(thread, share, capacity)
    try:
        yield
    finally:
        shares.release(thread)
