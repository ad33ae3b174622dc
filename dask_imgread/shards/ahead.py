"""Blocks of a shard, fetched or inflated before they are needed.

While the reader decodes a batch, threads get the blocks that follow: several at a time if they are
ranges of a remote file, one thread in order if the shard can only be read from its beginning on.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

MIB = 1 << 20
READ_AHEAD = 64 * MIB  # bytes, by default: four readers fit a worker of 2 GB
SHARDS_AT_ONCE = 8  # of which a reader reads only headers, or some images
_WORKER_BYTES = 512 * MIB  # fetched in advance by all readers of a process
_KEPT_BYTES = 16 * MIB  # before the last read, if `keep` was not called
_MAX_KEPT_BYTES = 256 * MIB  # whatever `keep` says
_IN_FLIGHT = 16  # blocks, at most
_FIRST_SKIPPED = MIB // 2  # bytes fetched to begin with, if only headers may be needed
# The first blocks are small, so that decoding can begin soon; the others are large, since each
# request costs a latency.
_SIZES = [size << 10 for size in 4 * [256] + 4 * [1024] + 8 * [2048] + 4 * [4096]]
BLOCK_BYTES = 8 * MIB
_STARTS = [0, *accumulate(_SIZES)]
# If only headers are needed and more than this lies between two of them, each is a request of its
# own. Requests double in size while their answers are read to the end.
_SKIPPED_BYTES = 512 << 10
_PIECE_BYTES = 32 << 10
_KEPT_PIECES = 64
_SPARSE = 16  # a view is a copy if it is so many times farther from the one before than its size


class Blocks(Protocol):
    """Where blocks come from."""

    workers: int  # threads that may read at a time; one if blocks come only in order
    size: int | None  # None until it is known
    problem: str

    def read(self, start: int, stop: int) -> bytes | memoryview:
        """Return the bytes of a block, fewer where the source ends."""

    def stop(self) -> None:
        """Cancel all reads."""

    def close(self) -> None:
        """Close the source, once no read is running."""


class _Budget:
    """The bytes that all readers of a process may fetch in advance."""

    def __init__(self, size: int) -> None:
        self._left, self._lock = size, threading.Lock()

    def take(self, size: int) -> bool:
        with self._lock:
            enough = size <= self._left
            self._left -= size if enough else 0
        return enough

    def give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


BUDGET = _Budget(_WORKER_BYTES)


@dataclass(slots=True)
class _Block:
    """A block that was fetched, or is in flight."""

    stop: int
    future: Future[bytes | memoryview]
    taken: int  # bytes of the process's budget


class ReadAhead:
    """A byte source that fetches the next blocks in advance. Not thread-safe.

    Parameters
    ----------
    blocks
        Where the blocks come from.
    read_ahead
        Maximum number of bytes fetched in advance.
    start
        The offset at which reading begins.
    skipping
        Whether to leave out large gaps between two reads.
    """

    streamed = True

    def __init__(
        self,
        blocks: Blocks,
        read_ahead: int = READ_AHEAD,
        *,
        start: int = 0,
        skipping: bool = False,
    ) -> None:
        self._blocks, self._read_ahead, self._skipping = blocks, read_ahead, skipping
        self._base = start  # where the first, small block begins
        self._pool = ThreadPoolExecutor(blocks.workers, "dask-imgread-ahead")
        self._held: dict[int, _Block] = {}  # by their starts
        self._content = memoryview(b"")  # of the block that was read last
        self._content_start = 0
        self._submitted = start  # the end of the last block; a stream's come once, in order
        self._needed: int | None = None
        self._next = start  # where the last read ended
        self._viewed = start  # where the last view ended
        self._front = start  # where the farthest read ended
        self._pieces: deque[tuple[int, memoryview]] = deque(maxlen=_KEPT_PIECES)
        self._piece_bytes = 0  # of the next request for headers alone; 0 while reading blocks

    def read_at(self, offset: int, size: int) -> bytes:
        """Return the bytes from ``offset``, fewer where the source ends."""
        return bytes(self._view(offset, size))

    def view_at(self, offset: int, size: int) -> memoryview:
        """Return the same, as a view of the block if most of that is viewed.

        A view keeps its whole block in memory.
        """
        view = self._view(offset, size)
        gap, self._viewed = offset - self._viewed, offset + size
        return memoryview(bytes(view)) if gap > _SPARSE * (size + _SIZES[0] // 4) else view

    def keep(self, offset: int) -> None:
        """Allow the bytes before an offset to be discarded, and keep those after it."""
        self._needed = offset

    def stop(self) -> None:
        """Cancel all requests; reads raise from now on."""
        self._blocks.stop()

    def end(self) -> int:
        """Return where the source ends; 0 until that is known."""
        return self._blocks.size or 0

    @property
    def sequential(self) -> bool:
        """Whether it can be read only once, and from its beginning on."""
        return self._blocks.workers == 1

    @property
    def problem(self) -> str:
        """The decompressor's error, if the source ends before the file does."""
        return self._blocks.problem

    def close(self) -> None:
        """End all requests, and wait for their threads."""
        self._blocks.stop()
        self._pool.shutdown(cancel_futures=True)
        for block in self._held.values():
            BUDGET.give_back(block.taken)
        self._held.clear()
        self._blocks.close()

    def _view(self, offset: int, size: int) -> memoryview:
        place = offset - self._content_start
        if not 0 <= place <= place + size <= len(self._content):
            return self._gather(offset, size)
        self._next = offset + size
        return self._content[place : place + size]

    def _gather(self, offset: int, size: int) -> memoryview:
        """Assemble bytes from several blocks, or wait for them."""
        pieces: list[memoryview] = []
        while size > 0 and (self._blocks.size is None or offset < self._blocks.size):
            self._load(offset, size)
            place = offset - self._content_start
            piece = self._content[place : place + size]
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
            self._next = offset
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _load(self, offset: int, size: int) -> None:
        """Make the block that holds an offset the current one."""
        start, stop = self._find_block(offset)
        if start not in self._held and not self.sequential:
            if self._load_piece(offset, size):
                return
            if self._piece_bytes:
                self._piece_bytes, self._base = 0, offset
                start, stop = self._find_block(offset)
        self._front = max(self._front, offset + size)
        block = self._held.get(start) or self._fetch(start, stop)
        self._drop(offset)
        if not self._piece_bytes:
            self._submit_ahead(stop)
        self._show(start, memoryview(block.future.result()))

    def _load_piece(self, offset: int, size: int) -> bool:
        """Load a piece by itself, not a block, and return True, if nothing around it is needed."""
        for place, piece in self._pieces:
            if place <= offset < place + len(piece):
                self._show(place, piece)
                return True
        wanted = min(size, BLOCK_BYTES)
        if offset >= self._front:
            if not self._skipping:
                return False
            if not 0 <= offset - self._next <= _SKIPPED_BYTES:
                self._piece_bytes = _PIECE_BYTES
            if not 0 < self._piece_bytes <= _SKIPPED_BYTES:
                return False
            wanted = max(self._piece_bytes, wanted)
            self._piece_bytes *= 2
            self._front = offset + wanted
        # Otherwise it was read before, and discarded.
        self._show(offset, memoryview(self._blocks.read(offset, offset + wanted)))
        if wanted <= _SKIPPED_BYTES:
            self._pieces.append((offset, self._content))
        return True

    def _fetch(self, start: int, stop: int) -> _Block:
        """Fetch a block that is needed now; of a stream, first those before it.

        More than would be kept of them the stream skips: a tar header may state any size.
        """
        if self.sequential:
            if start < self._submitted:
                raise OSError(f"the bytes at offset {start} were discarded")
            if start - self._submitted <= _MAX_KEPT_BYTES:
                while self._submitted < start:
                    self._submit(*self._find_block(self._submitted))
        return self._submit(start, stop)

    def _show(self, start: int, content: memoryview) -> None:
        self._content_start, self._content = start, content

    def _find_block(self, offset: int) -> tuple[int, int]:
        """Return the start and stop of the block in which an offset lies."""
        place = offset - self._base
        if place < 0:  # before where reading began: rare
            start = max(0, self._base + place // _SIZES[0] * _SIZES[0])
            return start, min(start + _SIZES[0], self._base)
        if place < _STARTS[-1]:
            number = bisect_right(_STARTS, place)
            return self._base + _STARTS[number - 1], self._base + _STARTS[number]
        start = self._base + _STARTS[-1] + (place - _STARTS[-1]) // BLOCK_BYTES * BLOCK_BYTES
        return start, start + BLOCK_BYTES

    def _submit(self, start: int, stop: int, *, taken: int = 0) -> _Block:
        future = self._pool.submit(self._blocks.read, start, stop)
        self._held[start] = block = _Block(stop, future, taken)
        self._submitted = stop
        return block

    def _submit_ahead(self, position: int) -> None:
        """Fetch the next blocks, within the limits of what may be in flight and in memory."""
        size = self._blocks.size
        if size is None and not self.sequential:
            return  # there may be no more
        last = position + self._read_ahead
        if self._skipping and position <= self._base + _SIZES[0]:
            last = self._base + _FIRST_SKIPPED  # the second block may be skipped, and all others
        running = sum(not block.future.done() for block in self._held.values())
        while running < _IN_FLIGHT and (size is None or position < size):
            start, stop = self._find_block(position)
            if stop > last:
                return
            if start not in self._held:
                if not BUDGET.take(stop - start):
                    return
                self._submit(start, stop, taken=stop - start)
                running += 1
            position = stop

    def _drop(self, offset: int) -> None:
        """Discard blocks that are not needed any more, or lie too far behind."""
        needed = offset - _KEPT_BYTES if self._needed is None else min(self._needed, offset)
        # In the middle of too much lies a very large member, most likely no image.
        middle = needed + _MAX_KEPT_BYTES // 2, offset - _MAX_KEPT_BYTES // 2
        for start, block in list(self._held.items()):
            if block.stop <= needed or (start >= middle[0] and block.stop <= middle[1]):
                BUDGET.give_back(self._held.pop(start).taken)
