"""What each command does, once its arguments are parsed."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, fields, replace
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
from dask_imgread.cli.diff import count_changes, find_changes, format_changes
from dask_imgread.cli.duplicates import count_groups, find_groups, format_groups
from dask_imgread.cli.preview import format_rows, read_samples
from dask_imgread.cli.select import (
    Choice,
    concat_rows,
    format_selection,
    write_removal,
    write_selection,
)
from dask_imgread.cluster.start import connect_client
from dask_imgread.collections import read_metadata
from dask_imgread.fingerprints import MIN_SIDE, fingerprint
from dask_imgread.jobs.folder import JobFolder, resolve_out
from dask_imgread.jobs.forecast import Forecast
from dask_imgread.jobs.run import (
    Summary,
    connect_for_reader,
    forecast_job,
    run_job,
)
from dask_imgread.pictures import make_shards
from dask_imgread.progress import start_logging
from dask_imgread.reading.options import ReaderOptions
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.report.contact_sheet import draw_contact_sheet, make_thumbnails
from dask_imgread.report.page import write_report
from dask_imgread.rows import BatchFunction
from dask_imgread.selection.write import check_apart
from dask_imgread.shards.find import Shard, find_shards
from dask_imgread.shards.frames import is_lazy, open_frame
from dask_imgread.shards.partition import Partitioning, partition_shards
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import NotTarError, walk_members
from dask_imgread.storage.redaction import redact_url
from dask_imgread.tasks import FileGroupTask, count_shards
from dask_imgread.verify import verify_shards

_SHEET_IMAGES = 24


def run_demo(arguments: argparse.Namespace) -> int:
    """Make shards, one of their pictures broken, read them, and draw what was read."""
    start_logging("text")
    folder = Path(arguments.folder or find_free("dask-imgread-demo"))
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and stays as it is: give another --folder")
    per_shard = -(-arguments.images // 4)
    print(f"Drawing {4 * per_shard} pictures into {folder / 'shards'}", file=sys.stderr)
    shards = make_shards(
        folder / "shards", shards=4, images_per_shard=per_shard, size=(480, 360), broken=1
    )
    reader = make_reader(arguments, sidecars=False)
    out = str(folder / "metadata")
    with connect_client(
        n_workers=arguments.workers, device=arguments.device, verbose=False
    ) as client:
        print(f"Dask dashboard: {client.dashboard_link}", file=sys.stderr)
        summary = run_job(shards, out, client=client, reader=reader, progress=True)
        sheet = folder / "contact-sheet.png"
        save_contact_sheet(client, partition_shards(shards), reader, sheet)
    print_summary(summary, out, {})
    print(f"contact sheet  {sheet}")
    print(f"report         {write_report(out, str(folder / 'report.html'))}")
    return SUCCESS


def find_free(name: str) -> str:
    """Return the first of ``name``, ``name-2``, ``name-3`` that does not exist."""
    numbered = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    return next(path for path in numbered if not os.path.lexists(path))


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


def run_select(arguments: argparse.Namespace) -> int:
    """Write chosen images as new shards, or shards without some images."""
    with keep_stdout(arguments):
        result = select(arguments)
    if arguments.log_format == "json":
        print(json.dumps(result | {"out": arguments.out and redact_url(arguments.out)}))
    else:
        print(format_selection(result, arguments))
    return SUCCESS


def select(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do what ``select`` is to do; return the numbers."""
    choice = Choice(arguments)
    storage_options, out_options = read_storage_options(arguments)
    options = {
        "storage_options": storage_options,
        "out_options": out_options,
        "retries": arguments.retries,
        "overwrite": arguments.overwrite,
    }
    frames: list[Any] = []
    paths = []
    for path in arguments.shards:
        frame = open_frame(path, storage_options)
        paths += [path] if frame is None else []
        frames += [] if frame is None else [frame]
    if paths and arguments.failed and not arguments.decode:
        raise ValueError("--failed: only decoding shows which images are broken: add --decode")
    for name in ("sidecar", "checksum", "decode"):
        if getattr(arguments, name) and not paths:
            raise ValueError(
                f"--{name} is for shards: the output of metadata has its columns; leave it out"
            )
    if choice.digests and paths and not arguments.checksum:
        raise ValueError(
            f"{len(choice.digests)} of the ids are SHA-256 digests, and the rows have no column "
            "sha256: add --checksum"
        )
    if arguments.out:
        check_apart(resolve_out(arguments.out, {}, {})[0], paths)
    reader = make_reader(arguments, sidecars=False)
    client: Any = connect(arguments, reader)
    with ExitStack() as stack:
        if paths:
            shards = find_shards(paths, storage_options)
            check_readable(shards, storage_options)
            client = stack.enter_context(client)
            found = read_metadata(
                shards,
                reader=reader,
                decode=arguments.decode,
                sidecars=merge_sidecars(arguments.sidecar),
                storage_options=storage_options,
                **read_partitioning(arguments),
            )
            frames.append(found.compute(scheduler=client))
        rows = concat_rows([f.compute(scheduler="threads") if is_lazy(f) else f for f in frames])
        chosen = choice.find(rows)
        if arguments.not_ids:
            return write_removal(rows, chosen, choice.missing, arguments, client, **options)
        return write_selection(rows, chosen, arguments, client, **options)


def run_diff(arguments: argparse.Namespace) -> int:
    """Print what changed between two jobs' outputs."""
    with keep_stdout(arguments):
        survey = find_changes(arguments)
    if arguments.log_format == "json":
        print(json.dumps(count_changes(survey, arguments)))
    else:
        print(format_changes(survey, arguments))
    return BAD_IMAGES if arguments.exit_code and survey.counts else SUCCESS


def run_duplicates(arguments: argparse.Namespace) -> int:
    """Print which images of a job's output are duplicates."""
    with keep_stdout(arguments):
        found = find_groups(arguments)
    if arguments.log_format == "json":
        print(json.dumps(count_groups(*found, arguments)))
    else:
        print(format_groups(*found, arguments))
    return SUCCESS


def run_report(arguments: argparse.Namespace) -> int:
    """Write the page about a job's output."""
    storage_options, out_options = read_storage_options(arguments)
    page = write_report(
        arguments.folder,
        arguments.out,
        since=arguments.since,
        storage_options=storage_options,
        out_options=out_options,
    )
    print(redact_url(page))
    return SUCCESS


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


def save_contact_sheet(
    client: Client, tasks: Sequence[FileGroupTask], reader: ImageReaderStage, path: Path
) -> None:
    """Decode a few images of a few tasks on the cluster, and save a sheet of them."""
    chosen = tasks[:: max(1, len(tasks) // 4)][:_SHEET_IMAGES]
    small = replace(reader, decode=True, dali_batch_size=_SHEET_IMAGES)
    thumbnails = client.map(
        make_thumbnails,
        chosen,
        reader=small,
        count=-(-_SHEET_IMAGES // len(chosen)),
        pure=False,
        **small.annotations(client),
    )
    draw_contact_sheet([item for found in client.gather(thumbnails) for item in found], path)


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


COMMANDS = {
    "demo": run_demo,
    "metadata": run_metadata,
    "apply": run_apply,
    "fingerprint": run_fingerprint,
    "verify": run_verify,
    "select": run_select,
    "diff": run_diff,
    "duplicates": run_duplicates,
    "report": run_report,
}
