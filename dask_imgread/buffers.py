"""Memory for decoded images and for blocks of shards, reused when no array refers to it.

Fresh memory is expensive: the system clears each page on its first use, which takes a quarter of
the time of decoding a large JPEG.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_GRANULARITY = 1 << 16  # bytes; sizes are rounded up to multiples of it
_MIN_HUGE_PAGE_BYTES = 1 << 22  # below this huge pages don't pay off
_ALIGNMENT = 64  # bytes of a cache line, at which arrays in a shared buffer start
_IDLE_SECONDS = 30.0  # after which idle memory is released
_IDLE_BYTES = 640 << 20  # kept at most: two batches of the default size
_IDLE_BLOCKS = 128 << 20  # of stores: sixteen large blocks


class _Lease:
    """Returns a piece of memory to its pool when no array refers to it any more.

    NumPy keeps the object that an array was made from alive as long as the array, any view of it
    and any buffer exported by it. So the memory is returned when the last of them is gone.
    """

    __slots__ = ("__array_interface__", "_memory", "_pool")

    def __init__(self, memory: NDArray[np.uint8], size: int, pool: BufferPool) -> None:
        self.__array_interface__: dict[str, Any] = memory[:size].__array_interface__
        self._memory, self._pool = memory, pool

    def __del__(self) -> None:
        self._pool._take_back(self._memory)


class BufferPool:
    """Lends memory to arrays. Thread-safe.

    Parameters
    ----------
    idle_bytes
        How much idle memory is kept at most.
    idle_seconds
        How long it is kept.
    """

    def __init__(self, idle_bytes: int = _IDLE_BYTES, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._idle_bytes, self._idle_seconds = idle_bytes, idle_seconds
        self._lock = threading.Lock()
        self._idle: list[tuple[float, NDArray[np.uint8]]] = []  # and since when; oldest first
        # The garbage collector may return memory at any point, even while a method of this class
        # holds the lock: a deque needs none.
        self._returned: deque[NDArray[np.uint8]] = deque()
        self._last_taken = 0.0  # by `time.monotonic()`
        self._sweeping = False  # whether a thread releases idle memory

    def take(self, size: int, *, spare: bool = True) -> NDArray[np.uint8]:
        """Return a flat, uninitialized array of ``size`` bytes."""
        with self._lock:
            self._collect()
            memory = self._find(size)
            self._last_taken = time.monotonic()
            if not self._sweeping:
                self._start_sweeping()
        if memory is None:
            # An eighth to spare, so that a slightly larger next batch fits, too.
            memory = _map_memory(size + size // 8 if spare else size)
        return np.asarray(_Lease(memory, size, self))

    def clear(self, below: float = math.inf) -> None:
        """Release idle memory to the system: all, or those pieces that are smaller."""
        with self._lock:
            self._collect()
            self._idle = [entry for entry in self._idle if entry[1].nbytes >= below]

    @property
    def idle_bytes(self) -> int:
        """Bytes of memory that are kept, but not in use."""
        with self._lock:
            self._collect()
            return sum(memory.nbytes for _, memory in self._idle)

    def _start_sweeping(self) -> None:
        self._sweeping = True
        thread = threading.Thread(target=self._sweep, name="dask-imgread-buffers", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be started: keep nothing
            self._sweeping = False

    def _reset_after_fork(self) -> None:
        """Start afresh in a forked process, in which only the forking thread exists."""
        self._lock, self._sweeping = threading.Lock(), False
        self._idle.clear()
        self._returned.clear()

    def _take_back(self, memory: NDArray[np.uint8]) -> None:
        if self._sweeping:  # otherwise nothing would ever release it
            self._returned.append(memory)
            if self._lock.acquire(blocking=False):  # else the next call collects it
                try:
                    self._collect()
                finally:
                    self._lock.release()

    def _find(self, size: int) -> NDArray[np.uint8] | None:
        """Take the most recently returned memory that fits and is at most about twice as large."""
        for place in range(len(self._idle) - 1, -1, -1):
            if size <= self._idle[place][1].nbytes <= 2 * size + _GRANULARITY:
                return self._idle.pop(place)[1]
        return None

    def _collect(self) -> None:
        """Make returned memory idle; release the oldest if there is too much."""
        while self._returned:
            self._idle.append((time.monotonic(), self._returned.popleft()))
        total = sum(memory.nbytes for _, memory in self._idle)
        while total > self._idle_bytes:
            total -= self._idle.pop(0)[1].nbytes

    def _sweep(self) -> None:
        while self._sweeping:
            time.sleep(self._idle_seconds / 2)
            with self._lock:
                oldest = time.monotonic() - self._idle_seconds
                self._collect()
                self._idle = [entry for entry in self._idle if entry[0] > oldest]
                self._sweeping = bool(self._idle) or self._last_taken > oldest


def take_array(dtype: DTypeLike, *shape: int) -> NDArray[Any]:
    """Return an uninitialized array in reused memory, for large intermediate results.

    Dask sets MALLOC_TRIM_THRESHOLD_=65536 for its workers. Each array that NumPy makes of more is
    then fresh memory.
    """
    kind = np.dtype(dtype)
    return BUFFERS.take(kind.itemsize * math.prod(shape)).view(kind).reshape(shape)


def _map_memory(size: int) -> NDArray[np.uint8]:
    """Get memory from the system: malloc would hold on to some, and fragment it."""
    size = max(_GRANULARITY, -(-size // _GRANULARITY) * _GRANULARITY)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for a buffer of {size} bytes") from error
    if size >= _MIN_HUGE_PAGE_BYTES:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def count_bytes_held(arrays: Iterable[NDArray[Any]]) -> int:
    """Return how many bytes these arrays keep alive; a view keeps all of its array."""
    owners = {}
    for array in arrays:
        while isinstance(array.base, np.ndarray):
            array = array.base
        owners[id(array)] = array.nbytes
    return sum(owners.values())


BUFFERS = BufferPool()  # for images, and for local shards
BLOCKS = BufferPool(_IDLE_BLOCKS)  # for what comes from stores
for _pool in (BUFFERS, BLOCKS):
    os.register_at_fork(after_in_child=_pool._reset_after_fork)


class SharedBuffer:
    """One buffer for many arrays, which are taken from it one after another.

    If there is not enough memory for it, the arrays are empty.

    Parameters
    ----------
    sizes
        The sizes of all arrays in bytes. Several may be taken as one.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        try:
            self._left = BUFFERS.take(sum(map(_align, sizes)))
        except (MemoryError, OverflowError):
            self._left = np.empty(0, np.uint8)

    def take(self, *shape: int) -> NDArray[np.uint8]:
        """Return an uninitialized array, or an empty one if this is more than is left."""
        size = math.prod(shape)
        if size > self._left.size:
            return np.empty([0] * len(shape), np.uint8)
        array, self._left = self._left[:size], self._left[_align(size) :]
        return array.reshape(shape)


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
