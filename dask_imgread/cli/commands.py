"""The command line."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dask_imgread import __version__
from dask_imgread.cli.arguments import (
    UsageError,
    add_cluster,
    add_device,
    add_job,
    add_reader,
    add_shards,
    load_function,
    make_reader,
    merge_pairs,
    parse_arguments,
    parse_pair,
    read_storage_options,
    require,
)

if TYPE_CHECKING:
    from distributed import Client

    from dask_imgread.jobs.run import Summary
    from dask_imgread.reading.reader import ImageReaderStage
    from dask_imgread.rows import BatchFunction
    from dask_imgread.shards.find import Shard
    from dask_imgread.tasks import FileGroupTask

logger = logging.getLogger("dask_imgread")

_SHEET_IMAGES = 24
_EXAMPLES = {  # of each command, after the program's name
    "demo": "demo --images 200 --workers 2",
    "metadata": 'metadata "shards/*.tar" --out result\n'
    "metadata shards/ --out decoded --decode --blocksize 64MB",
    "apply": 'apply brightness:measure "shards/*.tar" --out brightness --workers 4',
    "verify": 'verify "shards/{00000..00099}.tar" --out bad.parquet',
    "report": "report result",
}
_STATUSES = """\
exit status:
  0 all was read or recorded     1 images failed (verify, --fail-on-error)
  2 wrong usage                  3 the job could not finish
  4 the function of apply raised for images"""
SUCCESS, BAD_IMAGES, WRONG_USAGE, UNFINISHED, FUNCTION_FAILED = range(5)
_JOBS = ("metadata", "apply")  # go on where they stopped


class Stopped(BaseException):
    """A signal asks the process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


class _StandardStream(io.FileIO):
    """Standard output or error, of which a reader may have had enough, as ``head`` has."""

    def write(self, content: Any) -> int:
        """Write, or drop what nobody reads any more."""
        try:
            return super().write(content)
        except BrokenPipeError:
            return len(content)


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Go on as if nothing had happened when nobody reads stdout or stderr any more."""
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if isinstance(stream, io.TextIOWrapper) and stream in (sys.__stdout__, sys.__stderr__):
                stream.flush()
                patient = io.TextIOWrapper(
                    io.BufferedWriter(_StandardStream(stream.fileno(), "w", closefd=False)),
                    encoding=stream.encoding,
                    errors=stream.errors,
                    line_buffering=stream.line_buffering,
                )
                stack.enter_context(redirect(patient))
                stack.callback(patient.flush)
        yield


@outlive_readers()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0 if all was read or recorded; 1 if `verify`, or a job with `--fail-on-error`, found an
    image that can't be read; 2 if the command, its paths or its options are wrong; 3 if the
    job could not finish; 4 if the function of `apply` raised for an image that could be read;
    130 and 143 after SIGINT and SIGTERM.
    """
    from dask_imgread.errors import StorageError
    from dask_imgread.storage.redaction import hide_secrets

    parser = make_parser()
    secrets: dict[str, Any] = {}
    options = argparse.Namespace(command=None)
    try:
        with stop_on_signals():
            options = parse_arguments(parser, arguments)
            for name in ("storage_option", "out_option"):
                secrets |= merge_pairs(getattr(options, name, None) or [])
            return int(options.run(options))
    except Stopped as stopped:
        kept = "; what is done is kept" if options.command in _JOBS else ""
        say_error(f"stopped by {stopped.signal.name}{kept}")
        return 128 + stopped.signal
    except Exception as error:
        wrong = isinstance(error, UsageError | FileNotFoundError | PermissionError | ValueError)
        wrong = wrong or isinstance(error, ImportError | FileExistsError | NotADirectoryError)
        status = UNFINISHED if isinstance(error, StorageError) or not wrong else WRONG_USAGE
        logger.debug("%s", type(error).__name__, exc_info=error)
        say_error(hide_secrets(str(error) or repr(error), secrets))
        return status


def say_error(text: str) -> None:
    """Say in one line on stderr why a command ends."""
    from dask_imgread.progress import logs_json

    if logs_json():
        logger.error("%s", text)
    else:
        print(f"dask-imgread: {text}", file=sys.stderr)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise Stopped at SIGTERM and SIGINT, so that clusters are closed; the second one kills."""
    from dask_imgread.storage.retries import GIVEN_UP

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in earlier:
            signal.signal(each, signal.SIG_DFL)
        GIVEN_UP.set()  # else threads that wait to ask again would keep the process
        raise Stopped(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    earlier = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        GIVEN_UP.clear()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="dask-imgread",
        description="Read WebDataset tar shards of images on a Dask cluster.",
        epilog=_show_examples(*_EXAMPLES.values()) + "\n\n" + _STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dask-imgread {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    demo = _add_command(commands, "demo", run_demo, "make a few shards of pictures and read them")
    demo.add_argument("--folder", help="a new one, for everything (default dask-imgread-demo)")
    demo.add_argument("--images", type=int, default=1000, help="how many pictures (default 1000)")
    demo.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="worker processes (default: one for each GPU or core)",
    )
    add_device(demo)

    metadata = _add_command(
        commands, "metadata", run_metadata, "write one row for each image as Parquet"
    )
    add_shards(metadata)
    metadata.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="decode, and so find broken images (default no: only headers are read)",
    )

    apply = _add_command(commands, "apply", run_apply, "write what a function makes of the images")
    apply.add_argument("function", nargs="?", metavar="MODULE:FUNCTION", help="as for map_images")
    add_shards(apply)

    for command in (metadata, apply):
        add_job(command)
        add_reader(command, sidecars=command is apply)
        add_cluster(command)

    verify = _add_command(
        commands, "verify", run_verify, "decode everything and say what is broken"
    )
    add_shards(verify)
    verify.add_argument(
        "--out", metavar="FILE", help="Parquet file for the list of bad images (default: none)"
    )
    add_device(verify)
    add_cluster(verify)

    report = _add_command(
        commands, "report", run_report, "write a page to look at from a job's output"
    )
    report.add_argument("folder", metavar="DIR", help="the output of metadata or apply")
    report.add_argument("--out", metavar="FILE", help="the page (default DIR/_report.html)")
    for name, what in (
        ("storage", "of the shards' file system, and of DIR's if it is remote (default: none)"),
        ("out", "of the file system of DIR (default: as --storage-option)"),
    ):
        report.add_argument(
            f"--{name}-option", action="append", type=parse_pair, metavar="KEY=VALUE", help=what
        )
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=_show_examples(_EXAMPLES[name]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _show_examples(*examples: str) -> str:
    lines = [f"  dask-imgread {line}" for example in examples for line in example.splitlines()]
    return "\n".join(["examples:", *lines])


def run_demo(options: argparse.Namespace) -> int:
    """Make shards, one of their pictures broken, read them, and draw what was read."""
    from dask_imgread.cluster.start import connect_client
    from dask_imgread.jobs.run import run_job
    from dask_imgread.pictures import make_shards
    from dask_imgread.progress import start_logging
    from dask_imgread.report.page import write_report
    from dask_imgread.shards.partition import partition_shards

    start_logging("text")
    if options.images < 1:
        raise UsageError(f"--images must be at least 1, not {options.images}: give a larger number")
    folder = Path(options.folder or find_free("dask-imgread-demo"))
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty, and stays as it is: give another --folder")
    per_shard = -(-options.images // 4)
    print(f"Drawing {4 * per_shard} pictures into {folder / 'shards'}", file=sys.stderr)
    shards = make_shards(
        folder / "shards", shards=4, images_per_shard=per_shard, size=(480, 360), broken=1
    )
    reader = make_reader(options, sidecars=False)
    out = str(folder / "metadata")
    with connect_client(n_workers=options.workers, device=options.device, verbose=False) as client:
        print(f"Dask dashboard: {client.dashboard_link}", file=sys.stderr)
        summary = run_job(shards, out, client=client, reader=reader, progress=True)
        sheet = folder / "contact-sheet.png"
        save_contact_sheet(client, partition_shards(shards), reader, sheet)
    print_summary(summary, out, {})
    print(f"contact sheet  {sheet}")
    print(f"report         {write_report(out, str(folder / 'report.html'))}")
    return SUCCESS


def find_free(name: str) -> str:
    """Return a name that nothing has: this one, or with a number behind it."""
    numbered = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    return next(path for path in numbered if not os.path.lexists(path))


def run_metadata(options: argparse.Namespace) -> int:
    """Write shards' metadata."""
    require(options, "shards", "out")
    if options.resize is not None and not options.decode:
        raise UsageError(
            "--resize is for pixels, and only headers are read: add --decode, or leave --resize out"
        )
    with keep_stdout(options):
        summary = do_job(options, None, make_reader(options, sidecars=False))
    return tell_summary(options, summary)


def run_apply(options: argparse.Namespace) -> int:
    """Write what a function makes of shards' images."""
    require(options, "function", "shards", "out")
    with keep_stdout(options):
        summary = do_job(options, load_function(options.function), make_reader(options))
    return tell_summary(options, summary)


@contextmanager
def keep_stdout(options: argparse.Namespace) -> Iterator[None]:
    """Begin the log, and send to stderr what functions and workers print meanwhile."""
    from dask_imgread.progress import start_logging

    start_logging(options.log_format)
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def do_job(
    options: argparse.Namespace, fn: BatchFunction | None, reader: ImageReaderStage
) -> Summary:
    """Run a job as the options say."""
    from dask_imgread.jobs.run import connect_for_reader, run_job
    from dask_imgread.shards.find import find_shards

    storage_options, out_options = read_storage_options(options)
    shards = find_shards(options.shards, storage_options)
    check_readable(shards, storage_options)
    return run_job(
        shards,
        options.out,
        fn,
        client=connect_for_reader(
            reader,
            scheduler=options.scheduler,
            scheduler_file=options.scheduler_file,
            n_workers=options.workers,
        ),
        reader=reader,
        files_per_partition=options.files_per_partition,
        images_per_partition=options.images_per_partition,
        blocksize=options.blocksize,
        storage_options=storage_options,
        out_options=out_options,
        retries=options.retries,
        retry_failed=options.retry_failed,
        overwrite=options.overwrite,
        progress=True,
    )


def tell_summary(options: argparse.Namespace, summary: Summary) -> int:
    """Print what a job came to; return the exit status."""
    from dask_imgread.storage.redaction import redact_url

    if options.log_format == "json":
        print(json.dumps(asdict(summary) | {"out": redact_url(options.out)}))
    else:
        storage_options, out_options = read_storage_options(options)
        print_summary(summary, options.out, out_options or storage_options)
    if summary.function_failed:
        return FUNCTION_FAILED
    return BAD_IMAGES if options.fail_on_error and summary.failed else SUCCESS


def run_verify(options: argparse.Namespace) -> int:
    """Decode everything, and print what was found per shard and per cause."""
    from dask_imgread.cluster.start import connect_client
    from dask_imgread.progress import start_logging
    from dask_imgread.shards.find import find_shards
    from dask_imgread.shards.partition import Division, divide_shards
    from dask_imgread.verify import verify_shards

    require(options, "shards")
    start_logging("text")
    storage_options = merge_pairs(options.storage_option)
    shards = find_shards(options.shards, storage_options)
    check_readable(shards, storage_options)
    division = Division(
        options.files_per_partition, options.images_per_partition, options.blocksize
    )
    tasks = list(divide_shards(shards, division, storage_options))
    with connect_client(
        scheduler=options.scheduler,
        scheduler_file=options.scheduler_file,
        n_workers=options.workers,
        device=options.device,
        verbose=False,
    ) as client:
        found = verify_shards(tasks, reader=make_reader(options), client=client, progress=True)
    print(found)
    if options.out is not None:
        found.bad.to_parquet(options.out)
        print(f"bad images     {options.out}")
    return SUCCESS if found.ok else BAD_IMAGES


def run_report(options: argparse.Namespace) -> int:
    """Write the page of a job's output."""
    from dask_imgread.report.page import write_report
    from dask_imgread.storage.redaction import redact_url

    storage_options, out_options = read_storage_options(options)
    page = write_report(
        options.folder, options.out, storage_options=storage_options, out_options=out_options
    )
    print(redact_url(page))
    return SUCCESS


def check_readable(shards: Sequence[Shard], storage_options: dict[str, Any]) -> None:
    """Raise UsageError if not one shard is a tar: a wrong path, rather than a broken shard."""
    from dask_imgread.shards.sources import open_shard
    from dask_imgread.shards.tar import NotTarError, walk_members
    from dask_imgread.storage.redaction import redact_url

    first: Exception | None = None
    for shard in shards:
        try:
            with open_shard(shard.path, storage_options) as source:
                next(walk_members(source), None)
            return
        except (OSError, NotTarError) as error:
            first = first or UsageError(f"{redact_url(shard.path)}: {error}; give tar shards")
    if first is not None:
        raise first


def save_contact_sheet(
    client: Client, tasks: Sequence[FileGroupTask], reader: ImageReaderStage, path: Path
) -> None:
    """Decode a few images of a few tasks on the cluster, and save a sheet of them."""
    from dataclasses import replace

    from dask_imgread.report.contact_sheet import draw_contact_sheet, make_thumbnails

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


def print_summary(summary: Summary, out: str, options: dict[str, Any]) -> None:
    """Print what was read, and where it is."""
    from dask_imgread.cli.preview import read_samples, show_rows
    from dask_imgread.jobs.folder import JobFolder
    from dask_imgread.storage.redaction import redact_url

    of_function = f", {summary.function_failed} of them in the function"
    told = of_function if summary.function_failed else ""
    print(f"{summary.images} images, {summary.failed} failed{told}")
    if not summary.decoded:
        print("only headers were read: pixels were not checked (--decode checks them)")
    if summary.new_partitions:
        print(f"{summary.new_partitions} of {summary.partitions} partitions now", end=": ")
        rate = f"{summary.images_per_second:.0f} images/s while reading"
        print(f"{summary.seconds:.1f} s in all, {rate}")
    else:
        print(f"nothing left to do: all {summary.partitions} partitions are done")
    print()
    first, failures = read_samples(JobFolder(out, options))
    print(show_rows(first))
    for image_id, error in failures:
        print(f"failed: {image_id}: {error}")
    if len(failures) < summary.failed:
        print(f"and {summary.failed - len(failures)} more failed")
    print()
    print(f"rows           {redact_url(out)}")
