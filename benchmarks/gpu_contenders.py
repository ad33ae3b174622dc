"""What is measured on a GPU; see `contenders`. ``device="cpu"`` is for rehearsals without one."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders import Round, run_in_threads
from benchmarks.photographs import CORES, read_all
from benchmarks.rounds import Contender


def prepare_dali(
    shards: list[str],
    device: str,
    source: str = "webdataset",
    copy: str = "",
    batch: int = 100,
    **options: Any,
) -> Round:
    """One pipeline, told all that it is to read: what DALI can do at best.

    Parameters
    ----------
    source
        ``"webdataset"``, DALI's own reader of tars, or ``"external"``, bytes in memory.
    copy
        To the host: ``"graph"``, within the pipeline; ``"as_cpu"``, after it; or not at all.
    options
        Of the decoder.
    """
    import numpy as np
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
        images = fn.decoders.image(encoded, device=place.decoder, output_type=types.RGB, **options)
        pipeline.set_outputs(images.cpu() if copy == "graph" else images)
    pipeline.build()

    def run() -> int:
        count = 0
        for _ in batches:
            (decoded,) = pipeline.run()
            count += len(decoded.as_cpu() if copy == "as_cpu" else decoded)
        return count

    return run


def prepare_stream(shards: list[str], device: str, readers: int = 1, **options: Any) -> Round:
    """``ImageReaderStage.stream``, so many readers in one process."""
    from dask_imgread import FileGroupTask, ImageReaderStage

    reader = ImageReaderStage(device=device, decoder="dali", verbose=False, **options)

    def read(number: int) -> int:
        batches = reader.stream(FileGroupTask(data=shards[number::readers]))
        return sum(batch.num_items + len(batch.failed) for batch in batches)

    return lambda: run_in_threads(read, list(range(readers)))


def prepare_processes(count: int, module: str, name: str, shards: list[str], *given: Any) -> Round:
    """Run so many processes of a contender, each with its part of the shards."""
    children = [Contender(name, shards[n::count], *given, module=module) for n in range(count)]
    for child in children:
        child.wait()
    images = len(read_all(shards))

    def run(child: Contender) -> int:
        child.run()
        return 0

    def run_all() -> int:
        run_in_threads(run, children)
        return images

    return run_all
