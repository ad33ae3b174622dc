"""The contenders on a GPU; see `contenders`. ``device="cpu"`` is for rehearsals without one."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.contenders import run_in_threads
from benchmarks.photographs import CORES, read_all
from benchmarks.rounds import Contender


class Dali:
    """One pipeline that is given everything at once: the best that DALI can do.

    Parameters
    ----------
    source
        ``"webdataset"``, DALI's own reader of tars, or ``"external"``, bytes in memory.
    copy
        To the host: ``"graph"``, within the pipeline; ``"as_cpu"``, after it; or not at all.
    **decoder
        Options of DALI's decoder.
    """

    def __init__(
        self,
        shards: list[str],
        device: str,
        source: str = "webdataset",
        copy: str = "",
        batch: int = 100,
        **decoder: Any,
    ) -> None:
        from nvidia.dali import Pipeline, fn, types

        from dask_imgread.decoding.dali import DALI_DEVICES

        place = DALI_DEVICES[device]
        contents = [np.frombuffer(content, np.uint8) for content in read_all(shards)]
        batches = [contents[n : n + batch] for n in range(0, len(contents), batch)]
        pipeline = Pipeline(batch, num_threads=min(16, CORES), device_id=place.device_id)
        with pipeline:
            if source == "webdataset":
                encoded = fn.readers.webdataset(
                    paths=shards, ext=["jpg"], missing_component_behavior="skip"
                )
            else:
                encoded = fn.external_source(batches, cycle="quiet", no_copy=True)
            images = fn.decoders.image(
                encoded, device=place.decoder, output_type=types.RGB, **decoder
            )
            pipeline.set_outputs(images.cpu() if copy == "graph" else images)
        pipeline.build()
        self._pipeline, self._batches, self._copy = pipeline, len(batches), copy

    def run(self) -> int:
        """Decode as many batches as there are."""
        count = 0
        for _ in range(self._batches):
            (decoded,) = self._pipeline.run()
            count += len(decoded.as_cpu() if self._copy == "as_cpu" else decoded)
        return count


class Stream:
    """``ImageReaderStage.stream`` with several readers in one process."""

    def __init__(self, shards: list[str], device: str, readers: int = 1, **reader: Any) -> None:
        from dask_imgread import ImageReaderStage

        self._reader = ImageReaderStage(device=device, decoder="dali", verbose=False, **reader)
        self._parts = [shards[number::readers] for number in range(readers)]

    def run(self) -> int:
        """Read all shards."""
        return run_in_threads(self._read, self._parts)

    def _read(self, shards: list[str]) -> int:
        from dask_imgread import FileGroupTask

        batches = self._reader.stream(FileGroupTask(data=shards))
        return sum(batch.num_items + len(batch.failed) for batch in batches)


class Processes:
    """Several processes of a contender, each with its part of the shards."""

    def __init__(self, count: int, module: str, name: str, shards: list[str], *args: Any) -> None:
        self._children = [
            Contender(name, shards[n::count], *args, module=module) for n in range(count)
        ]
        for child in self._children:
            child.wait()
        self._images = len(read_all(shards))

    def run(self) -> int:
        """Run a round in each process, all at the same time."""
        run_in_threads(self._run_child, self._children)
        return self._images

    def _run_child(self, child: Contender) -> int:
        child.run()
        return 0
