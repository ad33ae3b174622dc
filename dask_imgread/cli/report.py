"""What ``report`` writes."""

from __future__ import annotations

import argparse

from dask_imgread.cli.arguments import SUCCESS
from dask_imgread.cli.commands import read_storage_options
from dask_imgread.report.page import write_report
from dask_imgread.storage.redaction import redact_url


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
