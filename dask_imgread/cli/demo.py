"""What ``demo`` makes, reads and prints."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distributed import Client

from dask_imgread.cli.arguments import SUCCESS
from dask_imgread.cli.commands import make_reader, print_summary
from dask_imgread.cluster.start import connect_client
from dask_imgread.jobs.run import run_job
from dask_imgread.pictures import make_shards
from dask_imgread.progress import start_logging
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.report.contact_sheet import draw_contact_sheet, make_thumbnails
from dask_imgread.report.page import write_report
from dask_imgread.shards.partition import partition_shards
from dask_imgread.tasks import FileGroupTask

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
