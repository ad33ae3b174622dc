"""Turn what the libraries beneath DALI print into log records that name the images.

They are C and C++, and print to the C library's stream ``stderr``. Meanwhile that stream, and
nothing else, is led into memory. File descriptor 2 stays what it is: what Python, other
programs, ``faulthandler`` and the C library itself print in a crash is seen at once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger("dask_imgread")

_COLOUR = re.compile(rb"\x1b\[[0-9;]*m|\[0;\d+m|\[0m")
# Where glibc's FILE has the descriptor that it writes to: part of its ABI, since programs were
# compiled with it (bits/types/struct_FILE.h; 64 bits).
_FILENO_OFFSET = 112


@functools.cache
def _find_descriptor() -> ctypes.c_int | None:
    """Return the descriptor of the C stream, to be read and set; None if it is not to be found."""
    libc = ctypes.CDLL(None)
    if ctypes.sizeof(ctypes.c_void_p) != 8 or not hasattr(libc, "gnu_get_libc_version"):
        return None
    stream = ctypes.c_void_p.in_dll(libc, "stderr")
    if stream.value is None:
        return None
    descriptor = ctypes.c_int.from_address(stream.value + _FILENO_OFFSET)
    return descriptor if descriptor.value == libc.fileno(stream) else None


class _Tap:
    """The C stream ``stderr``, led into memory while any thread of this process decodes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._usual = self._memory = -1

    def open(self) -> None:
        descriptor = _find_descriptor()
        if descriptor is None:
            return
        with self._lock:
            if self._memory < 0:
                self._memory = os.memfd_create("stderr")
            self._holders += 1
            if self._holders == 1:
                self._usual, descriptor.value = descriptor.value, self._memory

    def close(self) -> bytes:
        """Let go; return what was printed since the last time."""
        descriptor = _find_descriptor()
        if descriptor is None:
            return b""
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                descriptor.value = self._usual
            size = os.lseek(self._memory, 0, os.SEEK_CUR)
            printed = os.pread(self._memory, size, 0) if size else b""
            if size:
                os.ftruncate(self._memory, 0)
                os.lseek(self._memory, 0, os.SEEK_SET)
            return printed


_tap = _Tap()


@contextmanager
def catch(names: Sequence[str]) -> Iterator[None]:
    """Log what C libraries print meanwhile, naming the images ``names``.

    Of a batch that fails nothing is logged: its images are decoded again, and what makes one fail
    Pillow says.
    """
    try:
        _tap.open()
    except OSError as error:  # no more descriptors: it is printed where it always was
        logger.warning("what DALI prints can't be caught: %s", error)
        yield
        return
    failed = True
    try:
        yield
        failed = False
    finally:
        printed = _tap.close()
        if not failed or len(names) == 1:
            _log(printed, names)


def _log(printed: bytes, names: Sequence[str]) -> None:
    where = names[0]
    if len(names) > 1:
        where = f"one of {len(names)} images, {names[0]} to {names[-1]}"
    for line in _COLOUR.sub(b"", printed).decode("utf-8", "replace").splitlines():
        if line.strip():
            logger.warning("%s: %s", where, line.strip())
