"""What ``diff`` finds, writes and prints."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dask_imgread.cli.arguments import BAD_IMAGES, SUCCESS, merge_pairs
from dask_imgread.cli.commands import keep_stdout
from dask_imgread.diff import KINDS, NO_CHANGES, Survey, describe_change, survey_changes
from dask_imgread.jobs.folder import JobFolder, resolve_out
from dask_imgread.storage.files import open_whole
from dask_imgread.storage.filesystems import connect, resolve_path
from dask_imgread.storage.redaction import redact_url

_LISTED = 5  # changes of each kind that are printed

logger = logging.getLogger("dask_imgread")


def run_diff(arguments: argparse.Namespace) -> int:
    """Print what changed between two jobs' outputs."""
    with keep_stdout(arguments):
        survey = find_changes(arguments)
    if arguments.log_format == "json":
        print(json.dumps(count_changes(survey, arguments)))
    else:
        print(format_changes(survey, arguments))
    return BAD_IMAGES if arguments.exit_code and survey.counts else SUCCESS


def find_changes(arguments: argparse.Namespace) -> Survey:
    """Compare two jobs' outputs; write all changes to a file, if one is named."""
    options = merge_pairs(arguments.storage_option)
    old, new = (os.path.expanduser(folder) for folder in (arguments.old, arguments.new))
    for folder in (old, new):
        warn_of_unfinished(folder, options)
    how: dict[str, Any] = {"listed": _LISTED, "storage_options": options}
    if arguments.out is None:
        return survey_changes(old, new, **how)
    with _open_table(*resolve_out(arguments.out, options, None)) as write:
        return survey_changes(old, new, write=write, **how)


def warn_of_unfinished(folder: str, options: dict[str, Any]) -> None:
    """Say if a job's folder may not have all rows yet."""
    job = JobFolder(resolve_path(folder), options).read_job() or {}
    if not job.get("finished"):
        logger.warning("%s is unfinished, and may lack images", redact_url(folder))


@contextmanager
def _open_table(path: str, options: dict[str, Any]) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Yield a function that adds rows to a Parquet file, which appears when all are written."""
    schema = pa.Schema.from_pandas(NO_CHANGES)
    with open_whole(*connect(path, options)) as file, pq.ParquetWriter(file, schema) as writer:

        def write(changes: pd.DataFrame) -> None:
            if len(changes):
                writer.write_table(pa.Table.from_pandas(changes, schema))

        yield write


def count_changes(survey: Survey, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers, and where all changes are, for JSON."""
    kinds = {kind.replace(" ", "_"): survey.counts[kind] for kind in KINDS}
    out = arguments.out and redact_url(arguments.out)
    return {"old": survey.old, "new": survey.new, **kinds, "out": out}


def format_changes(survey: Survey, arguments: argparse.Namespace) -> str:
    """Return the numbers, and some changes of each kind, to print."""
    width = max(len(f"{count:,}") for count in (survey.old, survey.new))
    new = f"{survey.new:,} in {redact_url(arguments.new)}"
    lines = [f"images         {survey.old:>{width},} in {redact_url(arguments.old)}, {new}"]
    lines += [f"{kind:<15}{survey.counts[kind]:>{width},}" for kind in KINDS]
    lines += [""] * bool(survey.counts)
    for kind, rows in survey.list_first():
        told = ([kind, row["image_id"], describe_change(row)] for row in rows)
        lines += [": ".join(filter(None, texts)) for texts in told]
        if more := survey.counts[kind] - len(rows):
            lines.append(f"and {more:,} more {kind}")
    if arguments.out is not None:
        lines += ["", f"changes        {redact_url(arguments.out)}"]
    return "\n".join(lines)
