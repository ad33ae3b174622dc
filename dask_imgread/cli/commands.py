"""What ``metadata``, ``apply``, ``fingerprint`` and ``verify`` do; what commands share."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Any

import cloudpickle
from distributed import Client

from dask_imgread.cli.arguments import (
    BAD_IMAGES,
    FUNCTION_FAILED,
    SUCCESS,
    merge_pairs,
    merge_sidecars,
)
from dask_imgread.cli.preview import format_rows, read_samples
from dask_imgread.fingerprints import MIN_SIDE, fingerprint
from dask_imgread.jobs.folder import JobFolder, resolve_out
from dask_imgread.jobs.forecast import Forecast
from dask_imgread.jobs.run import (
    Summary,
    connect_for_reader,
    forecast_job,
    run_job,
)
from dask_imgread.progress import start_logging
from dask_imgread.reading.options import ReaderOptions
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.rows import BatchFunction
from dask_imgread.shards.find import Shard, find_shards
from dask_imgread.shards.partition import Partitioning, partition_shards
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import NotTarError, walk_members
from dask_imgread.storage.redaction import redact_url
from dask_imgread.tasks import count_shards
from dask_imgread.verify import verify_shards


def run_metadata(arguments: argparse.Namespace) -> int:
    """Write shards' metadata."""
    return run_or_forecast(arguments, lambda: None)


def run_apply(arguments: argparse.Namespace) -> int:
    """Write what a function makes of shards' images."""
    return run_or_forecast(arguments, lambda: load_function(arguments.function))


def run_fingerprint(arguments: argparse.Namespace) -> int:
    """Write hashes and measures of shards' images."""
    arguments.sidecars, arguments.checksum = False, True
    arguments.min_side = None if arguments.exact else MIN_SIDE
    return run_or_forecast(arguments, lambda: fingerprint)


def run_or_forecast(
    arguments: argparse.Namespace, choose: Callable[[], BatchFunction | None]
) -> int:
    """Run the job that the arguments describe, or say what it would do."""
    if arguments.dry_run:
        with keep_stdout(arguments):
            expected = forecast_job(**read_job(arguments, choose()))
        print_forecast(expected, arguments)
        return SUCCESS
    with keep_stdout(arguments):
        summary = do_job(arguments, choose())
    return finish_job(arguments, summary)


@contextmanager
def keep_stdout(arguments: argparse.Namespace) -> Iterator[None]:
    """Start the log; in the ``with`` block, send what is printed to stdout to stderr."""
    start_logging(arguments.log_format)
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def do_job(arguments: argparse.Namespace, fn: BatchFunction | None) -> Summary:
    """Run the job that the arguments describe."""
    job = read_job(arguments, fn)
    return run_job(
        **job,
        client=connect(arguments, job["reader"]),
        retries=arguments.retries,
        progress=True,
    )


def read_job(arguments: argparse.Namespace, fn: BatchFunction | None) -> dict[str, Any]:
    """Return the arguments of ``run_job`` that say what is to be done."""
    storage_options, out_options = read_storage_options(arguments)
    shards = find_shards(arguments.shards, storage_options)
    folder = JobFolder(*resolve_out(arguments.out, storage_options, out_options))
    if not arguments.dry_run and (arguments.overwrite or folder.read_job() is None):
        check_readable(shards, storage_options)
    return {
        "paths": shards,
        "out": arguments.out,
        "fn": fn,
        "reader": make_reader(arguments),
        "storage_options": storage_options,
        "out_options": out_options,
        "sidecars": merge_sidecars(getattr(arguments, "sidecar", [])),  # apply has none
        "rows_per_file": arguments.rows_per_file,
        "retry_failed": arguments.retry_failed,
        "update": arguments.update,
        "prune": arguments.prune,
        "overwrite": arguments.overwrite,
        **read_partitioning(arguments),
    }


def connect(
    arguments: argparse.Namespace, reader: ImageReaderStage
) -> AbstractContextManager[Client]:
    """Return the cluster that the arguments name, or one on this machine that fits the reader."""
    return connect_for_reader(
        reader,
        scheduler=arguments.scheduler,
        scheduler_file=arguments.scheduler_file,
        n_workers=arguments.workers,
    )


def read_partitioning(arguments: argparse.Namespace) -> Partitioning:
    """Return how the shards are divided."""
    return {
        "files_per_partition": arguments.files_per_partition,
        "images_per_partition": arguments.images_per_partition,
        "blocksize": arguments.blocksize,
    }


def finish_job(arguments: argparse.Namespace, summary: Summary) -> int:
    """Print a job's summary; return the exit status."""
    if arguments.log_format == "json":
        print(json.dumps(asdict(summary) | {"out": redact_url(arguments.out)}))
    else:
        storage_options, out_options = read_storage_options(arguments)
        print_summary(summary, arguments.out, out_options or storage_options)
    if summary.function_failed:
        return FUNCTION_FAILED
    return BAD_IMAGES if arguments.fail_on_error and summary.failed else SUCCESS


def run_verify(arguments: argparse.Namespace) -> int:
    """Decode everything, and print what is broken, by shard and by cause."""
    start_logging("text")
    storage_options = merge_pairs(arguments.storage_option)
    shards = find_shards(arguments.shards, storage_options)
    check_readable(shards, storage_options)
    tasks = partition_shards(
        shards, storage_options=storage_options, **read_partitioning(arguments)
    )
    reader = make_reader(arguments)
    with connect(arguments, reader) as client:
        found = verify_shards(tasks, reader=reader, client=client, progress=True)
    print(found)
    if arguments.out is not None:
        found.bad.to_parquet(arguments.out)
        print(f"bad images     {arguments.out}")
    return SUCCESS if found.ok else BAD_IMAGES


def check_readable(shards: Sequence[Shard], storage_options: dict[str, Any]) -> None:
    """Raise ValueError if no shard is a tar: then the path is wrong, and no shard is broken."""
    first: Exception | None = None
    for shard in shards:
        try:
            with open_shard(shard.path, storage_options) as source:
                next(walk_members(source), None)
            return
        except (OSError, NotTarError) as error:
            first = first or ValueError(f"{redact_url(shard.path)}: {error}; give tar shards")
    if first is not None:
        raise first


def print_forecast(expected: Forecast, arguments: argparse.Namespace) -> None:
    """Print what a job would do."""
    if arguments.log_format == "json":
        print(json.dumps(asdict(expected) | {"out": redact_url(arguments.out)}))
        return
    changes = count_shards(expected.new_shards, expected.changed_shards, expected.gone_shards)
    rows = [
        ("shards", f"{expected.shards:,}"),
        ("of the set", changes or "nothing has changed"),
        ("bytes", f"{expected.bytes:,}"),
        ("images", "not known" if expected.images is None else f"about {expected.images:,}"),
        ("partitions", "not known" if expected.partitions is None else f"{expected.partitions:,}"),
    ]
    if expected.requests:
        rows.append(("requests", f"at most {expected.requests:,}"))
    if expected.seconds is not None:
        rows.append(("time", f"about {timedelta(seconds=ceil(expected.seconds))}"))
    if expected.memory is not None:
        rows.append(("memory", f"{expected.memory / 1e6:,.0f} MB a worker"))
    print("would read")
    for name, value in rows:
        print(f"  {name:<12} {value}")


def print_summary(summary: Summary, out: str, storage_options: dict[str, Any]) -> None:
    """Print how many images were read, the first rows and failures, and where the rows are."""
    of_function = f", {summary.function_failed} of them in the function"
    print(
        f"{summary.images} images, {summary.failed} failed"
        f"{of_function if summary.function_failed else ''}"
    )
    if not summary.decoded:
        print("only headers were read: pixels were not checked (--decode checks them)")
    changes = count_shards(summary.new_shards, summary.changed_shards, summary.gone_shards)
    if changes:
        print(f"shards: {changes}")
    if summary.new_partitions:
        print(f"{summary.new_partitions} of {summary.partitions} partitions now", end=": ")
        rate = f"{summary.images_per_second:.0f} images/s while reading"
        print(f"{summary.seconds:.1f} s in all, {rate}")
    else:
        print(f"nothing left to read: all {summary.partitions} partitions are done")
    print()
    first, failures = read_samples(JobFolder(out, storage_options))
    print(format_rows(first))
    for image_id, error in failures:
        print(f"failed: {image_id}: {error}")
    if len(failures) < summary.failed:
        print(f"and {summary.failed - len(failures)} more failed")
    print()
    print(f"rows           {redact_url(out)}")


def make_reader(arguments: argparse.Namespace, **options: Any) -> ImageReaderStage:
    """Return a reader with the options that the command has, and these."""
    names = {field.name for field in fields(ReaderOptions)} & vars(arguments).keys()
    return ImageReaderStage(
        verbose=False, **{name: getattr(arguments, name) for name in names}, **options
    )


def load_function(name: str) -> BatchFunction:
    """Import ``MODULE:FUNCTION``, from the current folder too.

    Raises
    ------
    ValueError
        If it can't be imported, or is no function.
    """
    module_name, _, path = name.partition(":")
    if module_name.endswith(".py") or not path:
        raise ValueError(f"{name}: MODULE:FUNCTION is expected{_hint_function(module_name, path)}")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module may raise anything
        raise ValueError(
            f"{name}: {type(error).__name__}: {error}. Modules are looked for in this folder and "
            "where Python finds its own: run the command where this one can be imported"
        ) from error
    if not callable(found):
        raise ValueError(f"{name} is no function: give one that takes an ImageBatch")
    here = Path.cwd()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).parent == here and module.__name__ != "__main__":
            cloudpickle.register_pickle_by_value(module)  # workers elsewhere can't import it
    function: BatchFunction = found
    return function


def _hint_function(module: str, path: str) -> str:
    """Return what was probably meant by a file's path, or by a name without a colon."""
    if not path and module.count(".") == 1 and not module.endswith(".py"):
        return f": do you mean {module.replace('.', ':')}?"
    folder, _, file = module.rpartition("/")
    where = f" in the folder {folder}" if folder else ""
    return f": do you mean {file.removesuffix('.py')}:{path or 'FUNCTION'}{where}?"


def read_storage_options(
    arguments: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the storage options of the shards, and those of the output, None if none are given."""
    out = merge_pairs(arguments.out_option) if arguments.out_option else None
    return merge_pairs(arguments.storage_option), out
