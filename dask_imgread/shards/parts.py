"""Some parts of a remote shard, fetched before they are needed, and nothing else of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from dask_imgread.shards.ahead import BUDGET, MIB, READ_AHEAD, Blocks

_GAP = 64 << 10  # parts with less between them are one
_PIECE_BYTES = 8 * MIB  # fetched with one request


def join_parts(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return parts, each from its first offset to its last, in ascending order, neighbours joined.

    >>> join_parts([(1_000_000, 1_000_512), (0, 512), (600, 1000)])
    [(0, 1000), (1000000, 1000512)]
    """
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(parts):
        if joined and start - joined[-1][1] <= _GAP:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


class Parts:
    """A byte source that fetches some parts of a file, several at a time. Not thread-safe.

    Parameters
    ----------
    blocks
        Where the bytes come from.
    parts
        What will be viewed, in ascending order.
    read_ahead
        Maximum number of bytes fetched in advance.
    """

    streamed, sequential, problem = False, False, ""

    def __init__(
        self, blocks: Blocks, parts: list[tuple[int, int]], read_ahead: int = READ_AHEAD
    ) -> None:
        self._blocks, self._read_ahead = blocks, read_ahead
        self._pieces = [
            (begin, min(begin + _PIECE_BYTES, stop))
            for start, stop in parts
            for begin in range(start, stop, _PIECE_BYTES)
        ]
        self._pool = ThreadPoolExecutor(blocks.workers, "dask-imgread-parts")
        self._held: dict[int, Future[bytes | memoryview]] = {}  # by the piece's number
        self._next = 0  # the first piece that was not asked for yet
        self._taken: dict[int, int] = {}  # bytes of the process's budget
        self._ahead = 0  # the sum of them

    def read_at(self, offset: int, size: int) -> bytes:
        """Return the bytes from ``offset``, fewer where the file ends."""
        return bytes(self.view_at(offset, size))

    def view_at(self, offset: int, size: int) -> memoryview:
        """Return the same, as a view of the piece if they lie in one."""
        found: list[memoryview] = []
        while size > 0:
            number = bisect_right(self._pieces, (offset, 1 << 63)) - 1
            start, stop = self._pieces[number] if number >= 0 else (0, 0)
            if offset < stop:
                view = self._load(number)[offset - start :][:size]
            else:  # it was not said to be viewed
                view = memoryview(self._blocks.read(offset, offset + min(size, _PIECE_BYTES)))
            if not view:
                break
            found.append(view)
            offset += len(view)
            size -= len(view)
        return found[0] if len(found) == 1 else memoryview(b"".join(found))

    def keep(self, offset: int) -> None:
        """Do nothing: any part can be fetched at any time."""

    def end(self) -> int:
        """Return the file's size; 0 until that is known."""
        return self._blocks.size or 0

    def stop(self) -> None:
        """Cancel all requests; reads raise from now on."""
        self._blocks.stop()

    def close(self) -> None:
        """End all requests, and wait for their threads."""
        self._blocks.stop()
        self._pool.shutdown(cancel_futures=True)
        self._drop(len(self._pieces))
        self._blocks.close()

    def _load(self, number: int) -> memoryview:
        """Return a piece, once those that follow are on their way."""
        self._drop(number)
        if number not in self._held:
            self._submit(number)
        self._next = max(self._next, number + 1)
        while self._next < len(self._pieces):
            start, stop = self._pieces[self._next]
            if self._ahead + stop - start > self._read_ahead or not BUDGET.take(stop - start):
                break
            self._taken[self._next] = stop - start
            self._ahead += stop - start
            self._submit(self._next)
            self._next += 1
        return memoryview(self._held[number].result())

    def _submit(self, number: int) -> None:
        self._held[number] = self._pool.submit(self._blocks.read, *self._pieces[number])

    def _drop(self, number: int) -> None:
        """Discard the pieces before one, in the order in which they were asked for."""
        while self._held and (first := next(iter(self._held))) < number:
            del self._held[first]
            size = self._taken.pop(first, 0)
            self._ahead -= size
            BUDGET.give_back(size)
