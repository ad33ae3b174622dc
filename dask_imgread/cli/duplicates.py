"""What ``duplicates`` finds, writes and prints."""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from typing import Any

import dask
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.utils import format_bytes

from dask_imgread.cli.arguments import SUCCESS, merge_pairs
from dask_imgread.cli.commands import keep_stdout
from dask_imgread.cli.diff import warn_of_unfinished
from dask_imgread.duplicates import find_duplicates
from dask_imgread.jobs.folder import resolve_out
from dask_imgread.shards.frames import require_frame
from dask_imgread.storage.files import open_whole
from dask_imgread.storage.filesystems import connect
from dask_imgread.storage.redaction import redact_url

_LISTED = 5  # groups that are printed

logger = logging.getLogger("dask_imgread")


def run_duplicates(arguments: argparse.Namespace) -> int:
    """Print which images of a job's output are duplicates."""
    with keep_stdout(arguments):
        found = find_groups(arguments)
    if arguments.log_format == "json":
        print(json.dumps(count_groups(*found, arguments)))
    else:
        print(format_groups(*found, arguments))
    return SUCCESS


def find_groups(arguments: argparse.Namespace) -> tuple[int, pd.DataFrame]:
    """Return how many rows a job's output has, and those that are duplicates; write these, too."""
    options = merge_pairs(arguments.storage_option)
    folder = os.path.expanduser(arguments.folder)
    warn_of_unfinished(folder, options)
    # In the threads of this process, where rows are shuffled on the disk.
    with (
        dask.config.set({"scheduler": "threads", "dataframe.shuffle.method": "disk"}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", UserWarning)
        count = len(require_frame(folder, options))
        found = find_duplicates(
            folder,
            arguments.by,
            distance=arguments.distance,
            prefer=arguments.prefer,
            storage_options=options,
        )
        rows = found.compute().reset_index()
    for warning in caught:
        logger.warning("%s", warning.message)
    rows = rows.sort_values(["group", "keep", "image_id"], ascending=[True, False, True])
    rows = rows.set_index("image_id")
    if arguments.out is not None:
        _write(rows, *resolve_out(arguments.out, options, None))
    return count, rows


def _write(rows: pd.DataFrame, path: str, options: dict[str, Any]) -> None:
    """Write all rows as Parquet, or to a text file the ids of those that are not kept."""
    with open_whole(*connect(path, options)) as file:
        if path.endswith(".txt"):
            names = rows.index[~rows["keep"]].unique()
            file.write("".join(["# all duplicates but one\n", *(f"{n}\n" for n in names)]).encode())
        else:
            pq.write_table(pa.Table.from_pandas(rows), file)


def count_groups(count: int, rows: pd.DataFrame, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers, and where all rows are, for JSON."""
    others = rows[~rows["keep"]]
    return {
        "images": count,
        "groups": int(rows["group"].nunique()),
        "duplicates": len(rows),
        "to_drop": len(others),
        "bytes_to_drop": int(others["size"].sum()),
        "out": arguments.out and redact_url(arguments.out),
    }


def format_groups(count: int, rows: pd.DataFrame, arguments: argparse.Namespace) -> str:
    """Return the numbers, and the first groups, to print."""
    numbers = count_groups(count, rows, arguments)
    width = len(f"{count:,}")
    others = f"{numbers['to_drop']:,} beside one of each, {format_bytes(numbers['bytes_to_drop'])}"
    lines = [
        f"images         {count:>{width},} in {redact_url(arguments.folder)}",
        f"duplicates     {len(rows):>{width},} in {numbers['groups']:,} groups: {others}",
    ]
    lines += [""] * bool(len(rows))
    for group in rows["group"].unique()[:_LISTED]:
        some = rows[(rows["group"] == group).to_numpy(bool)]
        names = some.index[some["keep"]][0], *some.index[~some["keep"]]
        more = f" and {len(names) - 2:,} more" if len(names) > 2 else ""
        lines.append(f"{names[0]}: {names[1]}{more}")
    if (more_groups := numbers["groups"] - _LISTED) > 0:
        lines.append(f"groups not shown: {more_groups:,}")
    if arguments.out is not None:
        lines += ["", f"written to     {redact_url(arguments.out)}"]
    return "\n".join(lines)
