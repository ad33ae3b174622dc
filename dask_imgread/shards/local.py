"""The bytes of a shard on a local disk."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from operator import itemgetter

from dask_imgread.buffers import BUFFERS

_AHEAD_BYTES = 2 << 20  # read at once where reads are sequential; two such blocks may be in use
_AHEAD_GAP = 64 << 10  # that sequential reads may skip


class LocalSource:
    """A local file, not memory-mapped: truncating a mapped file kills the process.

    Parameters
    ----------
    path
        The file.
    parts
        What will be viewed, in ascending order, if not all: nothing beyond a part is read ahead.
    """

    streamed, sequential, problem = False, False, ""

    def __init__(self, path: str, parts: list[tuple[int, int]] | None = None) -> None:
        # Without O_NONBLOCK the opening of a pipe would wait for a writer.
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise OSError(f"{path} is not a regular file")
        self._end = status.st_size
        self._ahead = 0, memoryview(b"")  # the bytes read ahead, and their offset
        self._next = -1  # where the last view ended
        self._parts = parts

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``; fewer if the file ends before."""
        if offset + size > self._end:  # a forged size must not be allocated
            size = max(0, self._end - offset)
        content = os.pread(self._descriptor, size, offset)
        while len(content) < size:  # Linux reads at most 2 GiB at a time
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                self._end = offset + len(content)
                break
            content += more
        return content

    def view_at(self, offset: int, size: int) -> memoryview:
        """Return the same as a view, perhaps of a larger buffer that was read ahead.

        If reads are sequential, some megabytes are read at once: for small images a system call
        each takes longer than copying the bytes.
        """
        start, ahead = self._ahead
        last, self._next = self._next, offset + size
        if not start <= offset <= start + len(ahead) - size:
            wanted = self._count_ahead(offset, last)
            if wanted <= size or size > _AHEAD_BYTES // 8 or offset + size > self._end:
                return memoryview(self.read_at(offset, size))
            memory = BUFFERS.take(min(wanted, self._end - offset)).data
            count = os.preadv(self._descriptor, [memory], offset)
            if count < size:  # interrupted, or the file was cut short meanwhile
                return memoryview(self.read_at(offset, size))
            start, ahead = self._ahead = offset, memory[:count]
        return ahead[offset - start :][:size]

    def _count_ahead(self, offset: int, last: int) -> int:
        """Return how many bytes to read at once, given where the last view ended."""
        if self._parts is None:
            return _AHEAD_BYTES if 0 <= offset - last <= _AHEAD_GAP else 0
        number = bisect_right(self._parts, offset, key=itemgetter(0)) - 1
        return min(_AHEAD_BYTES, self._parts[number][1] - offset) if number >= 0 else 0

    def end(self) -> int:
        """Return the file's size."""
        return self._end

    def keep(self, offset: int) -> None:
        """Do nothing: any part of a file can be read at any time."""

    def stop(self) -> None:
        """Do nothing: no read blocks for long."""

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
