"""Turn what the decoders print on stderr into log records that name the images."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger("dask_imgread")

_COLOUR = re.compile(rb"\x1b\[[0-9;]*m|\[0;\d+m|\[0m")
_PRINTED = re.compile(  # what nvImageCodec, OpenCV, libtiff, libpng and libjpeg print
    rb"\[ ?(?:ERROR|WARN|WARNING|INFO|FATAL)[:\]@]|^TIFF\w*:|^(?:tempfile\.tif)?: |^lib\w+ \w+:"
    rb"|^More samples per pixel|^(?:Corrupt|Premature end of) JPEG|^Invalid SOS|\A\s*\Z"
)


class _Tap:
    """File descriptor 2, held while any thread of this process decodes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._kept = -1  # the true stderr, while it is held
        self._memory = -1

    def open(self) -> None:
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                if sys.stderr is not None:
                    sys.stderr.flush()
                self._memory = os.memfd_create("stderr") if self._memory < 0 else self._memory
                self._kept = os.dup(2)
                os.dup2(self._memory, 2)

    def close(self) -> bytes:
        """Let go; return what the decoders printed, and print what others did."""
        with self._lock:
            self._holders -= 1
            size = os.lseek(self._memory, 0, os.SEEK_CUR)
            printed = os.pread(self._memory, size, 0) if size else b""
            if size:
                os.ftruncate(self._memory, 0)
                os.lseek(self._memory, 0, os.SEEK_SET)
            mine = []
            for line in printed.splitlines(keepends=True):
                if _PRINTED.search(line):
                    mine.append(line)
                else:
                    os.write(self._kept, line)
            if self._holders == 0:
                os.dup2(self._kept, 2)
                os.close(self._kept)
            return b"".join(mine)


_tap = _Tap()


@contextmanager
def catch(names: Sequence[str]) -> Iterator[None]:
    """Log what is printed on file descriptor 2 meanwhile, naming the images ``names``.

    What other threads print meanwhile reaches stderr a moment later. Of a batch that fails
    nothing is logged: its images are decoded again one by one, each under its own name.
    """
    _tap.open()
    failed = True
    try:
        yield
        failed = False
    finally:
        printed = _tap.close()
    if printed and not (failed and len(names) > 1):
        where = (
            names[0]
            if len(names) == 1
            else f"one of {len(names)} images, {names[0]} to {names[-1]}"
        )
        for line in _COLOUR.sub(b"", printed).decode("utf-8", "replace").splitlines():
            logger.warning("%s: %s", where, line.strip())
