"""Files: written whole or not at all, and read into Arrow's own memory."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

# These stores show an object only when all of it has arrived. Elsewhere a file is written under
# a draft name and renamed when it is complete.
_WHOLE_ON_PUT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory"}
DRAFT = "_tmp-"  # what the name of a draft begins with


def write_whole(fs: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file so that readers see all of it or nothing, even if the writer is killed."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & _WHOLE_ON_PUT:
        fs.pipe_file(path, content)
        return
    folder, _, name = path.rpartition("/")
    fs.makedirs(folder, exist_ok=True)
    draft = f"{folder}/{DRAFT}{name}-{uuid.uuid4().hex}"
    try:
        if isinstance(fs, LocalFileSystem):
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # the bytes must reach the disk before the name does
            os.replace(draft, path)
        else:
            fs.pipe_file(draft, content)
            fs.mv(draft, path)
    except BaseException:
        with suppress(OSError):
            fs.rm_file(draft)
        raise


def open_bytes(content: bytes) -> pa.NativeFile:
    """Return bytes as a file for Arrow to read, copied into Arrow's own memory.

    Arrow reads files in threads of its own, and one of them may be the last to hold the file. If
    it releases a Python object while the interpreter shuts down, the process ends with SIGABRT.
    """
    memory = pa.BufferOutputStream()
    memory.write(content)
    return pa.BufferReader(memory.getvalue())
