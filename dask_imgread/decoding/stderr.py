"""Capture what the libraries beneath DALI print, and log it with the names of the images.

They are C and C++ libraries, which print to the C library's ``stderr`` stream. During a capture
only that stream is redirected, to memory. File descriptor 2 is untouched: what Python, child
processes, ``faulthandler`` and the C library itself print in a crash appears at once.
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
# Offset of the file descriptor in glibc's FILE, which is part of its ABI (64 bits,
# bits/types/struct_FILE.h).
_FILENO_OFFSET = 112


@functools.cache
def _find_descriptor() -> ctypes.c_int | None:
    """Return the C stream's descriptor field, to be read and set; None where it can't be found."""
    libc = ctypes.CDLL(None)
    if ctypes.sizeof(ctypes.c_void_p) != 8 or not hasattr(libc, "gnu_get_libc_version"):
        return None
    stream = ctypes.c_void_p.in_dll(libc, "stderr")
    if stream.value is None:
        return None
    descriptor = ctypes.c_int.from_address(stream.value + _FILENO_OFFSET)
    return descriptor if descriptor.value == libc.fileno(stream) else None


class _StderrCapture:
    """The C stream ``stderr``, redirected to memory while any thread of this process decodes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._original = self._memory = -1

    def open(self) -> None:
        descriptor = _find_descriptor()
        if descriptor is None:
            return
        with self._lock:
            if self._memory < 0:
                self._memory = os.memfd_create("stderr")
            self._users += 1
            if self._users == 1:
                self._original, descriptor.value = descriptor.value, self._memory

    def close(self) -> bytes:
        """End one thread's capture; return what was printed since the last call."""
        descriptor = _find_descriptor()
        if descriptor is None:
            return b""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                descriptor.value = self._original
            size = os.lseek(self._memory, 0, os.SEEK_CUR)
            printed = os.pread(self._memory, size, 0) if size else b""
            if size:
                os.ftruncate(self._memory, 0)
                os.lseek(self._memory, 0, os.SEEK_SET)
            return printed


_capture = _StderrCapture()


@contextmanager
def capture(names: Sequence[str]) -> Iterator[None]:
    """Log what C libraries print in the ``with`` block, with the images' names.

    Nothing is logged for a batch that fails: its images are decoded again, and Pillow's error is
    reported for the one at fault.
    """
    try:
        _capture.open()
    except OSError as error:  # too many open files: the output goes to stderr as usual
        logger.warning("the output of DALI can't be captured: %s", error)
        yield
        return
    failed = True
    try:
        yield
        failed = False
    finally:
        captured = _capture.close()
        if not failed or len(names) == 1:
            _log_lines(captured, names)


def _log_lines(captured: bytes, names: Sequence[str]) -> None:
    where = names[0]
    if len(names) > 1:
        where = f"one of {len(names)} images, {names[0]} to {names[-1]}"
    for line in _COLOUR.sub(b"", captured).decode("utf-8", "replace").splitlines():
        if line.strip():
            logger.warning("%s: %s", where, line.strip())
