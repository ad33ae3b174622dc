"""Classify DALI's errors: which image is at fault, if it is an image at all.

DALI raises RuntimeError for nearly everything; only the message differs. The patterns are those
of DALI 2.4.0 (``include/dali/core/cuda_error.h``) and nvImageCodec 0.9.0 (``nvimgcodec.h``).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TRACEBACK_END = "encountered:"  # ends a traceback of the code that created the operator
_SAMPLE = re.compile(r"Failed to decode sample #(\d+)")
_STATUS = re.compile(r"nvImageCodec failure: '#(\d+)'")
_NO_MEMORY = re.compile(
    r"std::bad_alloc|Can't allocate \d+ bytes on|CUDA allocation failed"
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
)
_DRIVER = re.compile(r"CUDA \w+ API error|CUDA is not available|requires a CUDA-capable GPU")
# Values of nvimgcodecStatus_t: failed allocations; and errors that have nothing to do with the
# image, such as missing libraries, unsupported hardware and failed kernels.
_MEMORY_STATUS = {5, 15}
_DRIVER_STATUS = {1, 6, 7, 10, 11, 16, 20, 21}


class Fault(NamedTuple):
    """What is at fault: ``"image"``, ``"memory"`` or ``"driver"``.

    ``sample`` is the image's index in its batch, None if the error doesn't say.
    """

    kind: str
    sample: int | None = None


def classify_error(error: Exception) -> Fault:
    r"""Return what is at fault for a RuntimeError or MemoryError that DALI has raised.

    An unknown message is blamed on an image, which is right in most cases.

    Examples
    --------
    >>> classify_error(RuntimeError("... encountered:\n\nFailed to decode sample #5 : "))
    Fault(kind='image', sample=5)
    >>> classify_error(RuntimeError("Can't allocate 1048576 bytes on device 0."))
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
    return Fault("image", int(sample[1]) if sample else None)


def extract_message(error: Exception) -> str:
    """Return an error's message without the traceback that DALI puts in it."""
    text = str(error).rpartition(_TRACEBACK_END)[2]
    return text.partition("Current pipeline object")[0].strip().rstrip(".")
