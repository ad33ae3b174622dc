"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Client

    from dask_imgread.jobs import Summary
    from dask_imgread.reader import ImageReaderStage
    from dask_imgread.tasks import FileGroupTask

_SHEET_IMAGES = 24


class UsageError(Exception):
    """What the user asked for can't be done; the message says why in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0 if all was read or recorded, 1 if `verify` found something bad, 2 if the command or
    its paths are wrong.
    """
    options = make_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (UsageError, OSError, ValueError) as error:
        print(f"dask-imgread: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dask-imgread: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="dask-imgread", description="Read WebDataset tar shards of images on a Dask cluster."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make a few shards of pictures and read them")
    demo.set_defaults(run=run_demo, decode=True)
    demo.add_argument("--folder", default="dask-imgread-demo", help="where to put everything")
    demo.add_argument("--images", type=int, default=1000, help="how many pictures (default 1000)")

    metadata = commands.add_parser("metadata", help="write one row for each image as Parquet")
    metadata.set_defaults(run=run_metadata)
    metadata.add_argument("shards", nargs="+", metavar="SHARDS", help="file, folder, glob or URL")
    metadata.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    metadata.add_argument("--decode", action="store_true", help="decode, and so find broken images")

    verify = commands.add_parser("verify", help="decode everything and say what is broken")
    verify.set_defaults(run=run_verify)
    verify.add_argument("shards", nargs="+", metavar="SHARDS", help="file, folder, glob or URL")
    verify.add_argument("--out", metavar="FILE", help="Parquet file for the list of bad images")

    for command in (demo, metadata, verify):
        command.add_argument("--images-per-partition", type=int, metavar="N")
        command.add_argument("--workers", type=int, metavar="N", help="worker processes")
        command.add_argument("--device", choices=("auto", "gpu", "cpu"), default="auto")
    return parser


@dataclass
class _Paths:
    """Where a command's results go."""

    out: Path

    @property
    def metadata(self) -> Path:
        return self.out / "metadata"

    @property
    def sheet(self) -> Path:
        return self.out / "contact-sheet.png"


def run_demo(options: argparse.Namespace) -> int:
    """Make shards, one of their pictures broken, and read them."""
    from dask_imgread.pictures import make_shards

    if options.images < 1:
        raise UsageError(f"--images must be at least 1, not {options.images}")
    folder = Path(options.folder) / "shards"
    per_shard = -(-options.images // 4)
    print(f"Drawing {4 * per_shard} pictures into {folder}", file=sys.stderr)
    options.shards = make_shards(
        folder, shards=4, images_per_shard=per_shard, size=(480, 360), broken=1
    )
    options.out = options.folder
    return run_metadata(options)


def run_metadata(options: argparse.Namespace) -> int:
    """Read shards and write their metadata, with a contact sheet to look at."""
    from distributed import Client

    from dask_imgread.cluster import start_cluster
    from dask_imgread.jobs import write_metadata
    from dask_imgread.partition import partition_shards
    from dask_imgread.progress import ProgressBar
    from dask_imgread.reader import ImageReaderStage

    tasks = partition_shards(options.shards, images_per_partition=options.images_per_partition)
    check_readable(tasks)
    paths = _Paths(Path(options.out))
    reader = ImageReaderStage(
        device=options.device, decode=options.decode, sidecars=False, verbose=False
    )
    with (
        start_cluster(device=options.device, n_workers=options.workers, verbose=False) as cluster,
        Client(cluster) as client,
    ):
        print(f"Dask dashboard: {client.dashboard_link}", file=sys.stderr)
        with ProgressBar(len(tasks)) as bar:
            summary = write_metadata(client, tasks, reader, str(paths.metadata), bar.update)
        save_contact_sheet(client, tasks, reader, paths.sheet)
    print_summary(summary, paths)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Decode everything, and print what was found per shard and per cause."""
    from distributed import Client

    from dask_imgread.cluster import start_cluster
    from dask_imgread.partition import partition_shards
    from dask_imgread.reader import ImageReaderStage
    from dask_imgread.verify import verify_shards

    tasks = partition_shards(options.shards, images_per_partition=options.images_per_partition)
    check_readable(tasks)
    with (
        start_cluster(device=options.device, n_workers=options.workers, verbose=False) as cluster,
        Client(cluster) as client,
    ):
        reader = ImageReaderStage(device=options.device, verbose=False)
        found = verify_shards(tasks, reader=reader, client=client, progress=True)
    print(found)
    if options.out is not None:
        found.bad.to_parquet(options.out)
        print(f"bad images     {options.out}")
    return 0 if found.ok else 1


def check_readable(tasks: Sequence[FileGroupTask]) -> None:
    """Raise UsageError if not one shard is a tar: a wrong path, rather than a broken shard."""
    from dask_imgread.shards import open_shard
    from dask_imgread.tar import NotTarError, walk_members

    first: Exception | None = None
    for task in tasks:
        for path in task.data:
            try:
                with open_shard(path, task.storage_options) as source:
                    next(walk_members(source), None)
                return
            except (OSError, NotTarError) as error:
                first = first or UsageError(f"{path}: {error}")
    if first is not None:
        raise first


def save_contact_sheet(
    client: Client, tasks: Sequence[FileGroupTask], reader: ImageReaderStage, path: Path
) -> None:
    """Decode a few images of a few tasks on the cluster, and save a sheet of them."""
    from dataclasses import replace

    from dask_imgread.report import draw_contact_sheet, make_thumbnails

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


def print_summary(summary: Summary, paths: _Paths) -> None:
    """Print what was read, and where it is."""
    import pyarrow.dataset as ds

    count = summary.count
    rate = (count.images + count.failed) / summary.seconds
    rows = ds.dataset(paths.metadata)
    first = rows.head(5, columns=["image_id", "format", "width", "height", "size"])
    failures = rows.head(5, columns=["image_id", "error"], filter=ds.field("error").is_valid())
    print(f"{count.images} images, {count.failed} failed")
    print(f"{summary.seconds:.1f} s, {rate:.0f} images/s")
    print()
    print(first.to_pandas().reset_index().to_string(index=False))
    for row in failures.to_pylist():
        print(f"failed: {row['image_id']}: {row['error']}")
    print()
    print(f"metadata       {paths.metadata}")
    print(f"contact sheet  {paths.sheet}")
