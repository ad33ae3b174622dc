"""What DALI's errors mean: which picture is at fault, if it is a picture at all.

DALI raises RuntimeError for nearly everything; only its text says more. The forms are DALI 2.4.0's
(``include/dali/core/cuda_error.h``) with nvImageCodec 0.9.0 (``nvimgcodec.h``).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TRACEBACK_END = "encountered:"  # before it are an operator's name, and lines of our own code
_SAMPLE = re.compile(r"Failed to decode sample #(\d+)")
_STATUS = re.compile(r"nvImageCodec failure: '#(\d+)'")
_NO_MEMORY = re.compile(
    r"std::bad_alloc|Can't allocate \d+ bytes on|CUDA allocation failed"
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
)
_DRIVER = re.compile(r"CUDA \w+ API error|CUDA is not available|requires a CUDA-capable GPU")
# Of nvimgcodecStatus_t: allocators; and what has nothing to do with what is decoded, that is
# missing libraries, other hardware, kernels that fail.
_MEMORY_STATUS = {5, 15}
_DRIVER_STATUS = {1, 6, 7, 10, 11, 16, 20, 21}


class Fault(NamedTuple):
    """What is at fault: ``"picture"``, ``"memory"`` or ``"driver"``.

    ``sample`` is the picture's number in its batch, None if it is not told.
    """

    kind: str
    sample: int | None = None


def read_fault(error: Exception) -> Fault:
    r"""Return what an error that DALI has raised means: RuntimeError, or MemoryError.

    One of unknown form is taken for a picture's, since in most cases it is.

    Examples
    --------
    >>> read_fault(RuntimeError("... encountered:\n\nFailed to decode sample #5 : "))
    Fault(kind='picture', sample=5)
    >>> read_fault(RuntimeError("Can't allocate 1048576 bytes on device 0."))
    Fault(kind='memory', sample=None)
    """
    text = str(error).rpartition(_TRACEBACK_END)[2]
    status = _STATUS.search(text)
    code = int(status[1]) if status else None
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text) or code in _MEMORY_STATUS:
        return Fault("memory")
    if _DRIVER.search(text) or code in _DRIVER_STATUS:
        return Fault("driver")
    sample = _SAMPLE.search(text)
    return Fault("picture", int(sample[1]) if sample else None)


def shorten(error: Exception) -> str:
    """Return what an error says, without where in our code the operator was made."""
    text = str(error).rpartition(_TRACEBACK_END)[2]
    return text.partition("Current pipeline object")[0].strip().rstrip(".")
