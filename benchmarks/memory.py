"""The peak memory of a stream, beyond that of an interpreter that has imported DALI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def read_peak() -> int:
    """Return this process's peak resident memory in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_peak_batches(shard: str) -> tuple[int, int]:
    """Return the stream's peak memory and the size of its largest batch, in bytes."""
    command = [sys.executable, "-m", "benchmarks.memory", shard]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    above, batch = map(int, printed.split())
    return above, batch


def main(shard: str) -> None:
    """Stream one shard in this process, and print both numbers."""
    from nvidia.dali import Pipeline, fn, types  # noqa: F401

    from dask_imgread import FileGroupTask, ImageReaderStage

    reader = ImageReaderStage(verbose=False)
    before, largest = read_peak(), 0
    for batch in reader.stream(FileGroupTask(data=[shard])):
        sizes = (image.image_data.nbytes for image in batch.data if image.image_data is not None)
        largest = max(largest, sum(sizes))
    print(read_peak() - before, largest)


if __name__ == "__main__":
    main(sys.argv[1])
