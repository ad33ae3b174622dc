"""What GPUs there are, and the shares of them that readers hold."""

from __future__ import annotations

import os

from distributed.diagnostics import nvml


def count_gpus() -> int:
    """Return how many GPUs this process can use; 0 without a driver. Makes no CUDA context.

    NVML counts the machine's GPUs; ``CUDA_VISIBLE_DEVICES`` may leave fewer, as described
    in NVIDIA's CUDA C++ Programming Guide, "CUDA Environment Variables".
    """
    count: int = nvml.device_get_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    entries = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        if entry.lstrip("-").isdigit() and not 0 <= int(entry) < count:
            break  # CUDA, too, stops at the first index that is not there
        entries.append(entry)
    return min(count, len(entries))
