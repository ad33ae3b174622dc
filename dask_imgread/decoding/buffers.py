"""Memory for decoded pictures, used again as soon as nobody holds an array over it.

Fresh memory is dear: the system clears each page when it is first written to, which takes a
quarter of the time of decoding a large JPEG.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GRAIN = 1 << 16  # bytes, of which sizes are multiples
_LARGE = 1 << 22  # bytes, from which on huge pages are worth while
_IDLE_SECONDS = 30.0  # for which unused memory is kept
_IDLE_BYTES = 640 << 20  # of unused memory that are kept: two batches of the default size


class _Lease:
    """Owns a piece of memory while arrays over it live.

    NumPy keeps the object that an array was made from alive as long as the array, a view of it,
    or a buffer taken from it. So the memory comes back when the last of them is gone, and not
    before, whoever holds it.
    """

    __slots__ = ("__array_interface__", "_memory", "_pool")

    def __init__(self, memory: NDArray[np.uint8], size: int, pool: BufferPool) -> None:
        self.__array_interface__: dict[str, Any] = memory[:size].__array_interface__
        self._memory, self._pool = memory, pool

    def __del__(self) -> None:
        self._pool._take_back(self._memory)


class BufferPool:
    """Memory that is lent to arrays. Thread-safe.

    Parameters
    ----------
    idle_bytes
        Unused memory that is kept, at most.
    idle_seconds
        How long it is kept.
    """

    def __init__(self, idle_bytes: int = _IDLE_BYTES, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._idle_bytes, self._idle_seconds = idle_bytes, idle_seconds
        self._lock = threading.Lock()
        self._idle: list[tuple[float, NDArray[np.uint8]]] = []  # since when; the last used last
        # Memory may come back in the middle of anything, even of a method of this class, when
        # the garbage collector runs: a deque takes it without the lock.
        self._returned: deque[NDArray[np.uint8]] = deque()
        self._used = 0.0  # when memory was last asked for
        self._swept = False  # whether a thread looks after what is idle

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return a flat array of ``size`` bytes, of any content; its memory is lent."""
        with self._lock:
            self._collect()
            memory = self._find(size)
            self._used = time.monotonic()
            if not self._swept:
                self._start_sweeping()
        if memory is None:
            # An eighth more, so that the next batch, a little larger, fits too.
            memory = _allocate(size + size // 8)
        return np.asarray(_Lease(memory, size, self))

    def clear(self) -> None:
        """Give all unused memory back to the system."""
        with self._lock:
            self._collect()
            self._idle.clear()

    @property
    def idle_bytes(self) -> int:
        """Bytes of memory that are kept and that nobody uses."""
        with self._lock:
            self._collect()
            return sum(memory.nbytes for _, memory in self._idle)

    def _start_sweeping(self) -> None:
        self._swept = True
        thread = threading.Thread(target=self._sweep, name="dask-imgread-buffers", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: then nothing is kept
            self._swept = False

    def _forget_parent(self) -> None:
        """Begin anew in a forked process, in which no other thread lives."""
        self._lock, self._swept = threading.Lock(), False
        self._idle.clear()
        self._returned.clear()

    def _take_back(self, memory: NDArray[np.uint8]) -> None:
        if self._swept:  # else nobody would look after it
            self._returned.append(memory)
            if self._lock.acquire(blocking=False):  # else who holds it will see to it
                try:
                    self._collect()
                finally:
                    self._lock.release()

    def _find(self, size: int) -> NDArray[np.uint8] | None:
        """Take out the last used memory that fits, without wasting as much again."""
        for place in range(len(self._idle) - 1, -1, -1):
            if size <= self._idle[place][1].nbytes <= 2 * size + _GRAIN:
                return self._idle.pop(place)[1]
        return None

    def _collect(self) -> None:
        """Put what has come back to what is idle, and drop the oldest of too much."""
        while self._returned:
            self._idle.append((time.monotonic(), self._returned.popleft()))
        total = sum(memory.nbytes for _, memory in self._idle)
        while total > self._idle_bytes:
            total -= self._idle.pop(0)[1].nbytes

    def _sweep(self) -> None:
        while self._swept:
            time.sleep(self._idle_seconds / 2)
            with self._lock:
                oldest = time.monotonic() - self._idle_seconds
                self._collect()
                self._idle = [entry for entry in self._idle if entry[0] > oldest]
                self._swept = bool(self._idle) or self._used > oldest


def _allocate(size: int) -> NDArray[np.uint8]:
    """Get memory from the system itself: malloc would keep some, or cut it up."""
    size = max(_GRAIN, -(-size // _GRAIN) * _GRAIN)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {size} bytes for decoded pictures") from error
    if size >= _LARGE:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def count_bytes_held(arrays: Iterable[NDArray[Any]]) -> int:
    """Return how much memory stays in use because of some arrays, whatever they are views of."""
    owners = {}
    for array in arrays:
        while isinstance(array.base, np.ndarray):
            array = array.base
        owners[id(array)] = array.nbytes
    return sum(owners.values())


BUFFERS = BufferPool()
os.register_at_fork(after_in_child=BUFFERS._forget_parent)
