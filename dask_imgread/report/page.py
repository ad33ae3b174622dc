"""The HTML report of a batch job: a page about its images, its failures and its rows."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from dask_imgread.diff import survey_changes
from dask_imgread.fingerprints import META
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.report.captions import find_captions
from dask_imgread.report.changes import list_changed, render_changes
from dask_imgread.report.columns import Column, render_columns, survey_columns
from dask_imgread.report.command import write_command
from dask_imgread.report.elements import render_banner, render_section
from dask_imgread.report.failures import render_failures, render_shards, render_warnings
from dask_imgread.report.fingerprints import (
    Fingerprints,
    list_pictured,
    render_duplicates,
    render_fingerprints,
    survey_fingerprints,
)
from dask_imgread.report.head import describe_made, render_cards, render_facts, render_status
from dask_imgread.report.images import list_extremes, render_extremes, render_samples, render_sizes
from dask_imgread.report.parts import Parts, find_parts, list_shards
from dask_imgread.report.pictures import load_pictures
from dask_imgread.report.runs import find_news, list_working, render_rate, render_runs
from dask_imgread.report.statistics import (
    LISTED,
    Row,
    Statistics,
    Trio,
    count_parts,
    find_neighbours,
)
from dask_imgread.report.times import find_reading
from dask_imgread.shards.frames import JOB
from dask_imgread.storage.files import write_whole
from dask_imgread.storage.filesystems import connect, resolve_path
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import with_retries
from dask_imgread.tasks import OWN_COLUMNS, PROBLEMS

_IN_CONTEXT = 6  # failures that are shown between their neighbours
# Columns that other sections are about, or that only say which image a row is of.
_RECORDS = OWN_COLUMNS - {PROBLEMS}
_IDENTITY = {"image_id", "image_path", "shard", "shard_version", "key"}


@dataclass(frozen=True)
class _Found:
    """What is known of a job's rows."""

    parts: Parts
    stats: Statistics
    neighbours: list[Trio]
    columns: list[Column]
    fingerprints: Fingerprints | None
    captions: dict[str, list[str]]


def write_report(
    out: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    since: str | os.PathLike[str] | None = None,
    storage_options: dict[str, Any] | None = None,
    out_options: dict[str, Any] | None = None,
    samples: int = 24,
) -> str:
    """Write an HTML page about a batch job: its failures, its images, and what is in its columns.

    The page is one self-contained file, of bounded size however many images there are. It may be
    written while the job is still running, and then shows what the job has written so far. If the
    rows have the columns of ``fingerprint``, it also shows what these have measured, and the
    biggest groups of duplicates: to find these takes most of a minute if there are 2,000,000 rows;
    if there are more, they are not looked for.

    Parameters
    ----------
    out
        The folder or URL that the job writes to.
    path
        Where to write the page; ``_report.html`` in ``out`` by default.
    since
        The output of an earlier job: the page then begins with what has changed since, as
        ``diff_frames`` finds it.
    storage_options
        Options for the shards' file system, and for those of ``out``, ``path`` and ``since`` unless
        ``out_options`` is given.
    out_options
        Options for the file systems of ``out``, ``path`` and ``since``, if they differ.
    samples
        How many images to show, drawn at random.

    Returns
    -------
    str
        The page's path or URL.

    Raises
    ------
    FileNotFoundError
        If there is no batch job in ``out``.
    FileExistsError
        If the ``_job.json`` there was not written by a job.
    PermissionError, StorageError
        If a store denies access, or can't be reached.
    ValueError
        If ``samples`` is negative; if ``since`` is no job's folder, or it or ``out`` has the rows
        of a function, not those of images.

    Examples
    --------
    >>> from distributed import Client
    >>> from dask_imgread import run_job
    >>> from dask_imgread.testing import make_shards
    >>> with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
    ...     summary = run_job(make_shards("shards"), "out", client=client)
    >>> write_report("out")
    'out/_report.html'
    """
    if samples < 0:
        raise ValueError(f"samples must be at least 0, not {samples!r}")
    out = os.path.expanduser(out)
    path = os.path.expanduser(path) if path else f"{out.rstrip('/')}/_report.html"
    shard_options = storage_options or {}
    out_options = shard_options if out_options is None else out_options
    folder = JobFolder(resolve_path(out), out_options)
    description = folder.read_job()
    if description is None:
        raise FileNotFoundError(
            f"no batch job in {redact_url(out)}: no {JOB} there; give the folder that a job "
            "writes to"
        )
    try:
        found = _gather(folder, description, samples)
    except FileNotFoundError:  # the job has merged parts meanwhile, and removed them
        found = _gather(folder, description, samples)
    survey = None
    if since is not None:
        since = os.path.expanduser(since)
        survey = survey_changes(since, out, listed=LISTED, storage_options=out_options)
    changed = list_changed(survey) if survey else {}
    shown = [*_list_shown(found.stats, found.neighbours), *list_pictured(found.fingerprints)]
    shown += [row for rows in changed.values() for row in rows]
    pictures = load_pictures(shown, found.captions, shard_options)
    changes = ""
    if since and survey:
        done = description["finished"]
        changes = render_changes(redact_url(since), survey, changed, pictures, done)
    shards = list_shards(folder, description)
    html = _render_page(redact_url(folder.url), description, shards, found, pictures, changes)
    with_retries(write_whole, path, *connect(path, out_options), html.encode())
    return path


def _gather(folder: JobFolder, description: Mapping[str, Any], samples: int) -> _Found:
    fs, _ = folder.connect()
    parts = find_parts(folder, description)
    stats = count_parts(fs, parts.paths, samples, find_news(description.get("runs", [])))
    inside = [row for row in stats.failures.list_rows() if row.offset > 0]
    neighbours = find_neighbours(fs, parts.paths, inside[:_IN_CONTEXT])
    fingerprints = survey_fingerprints(folder, parts)
    known = _RECORDS if parts.rows == parts.paths else _IDENTITY
    known = known if fingerprints is None else known | {*META}
    return _Found(
        parts,
        stats,
        neighbours,
        survey_columns(fs, parts.rows, known),
        fingerprints,
        find_captions(fs, parts.rows, _list_shown(stats, neighbours)),
    )


def _list_shown(stats: Statistics, neighbours: Sequence[Trio]) -> list[Row]:
    """Return the images that are shown because of what the records say."""
    shown = [*stats.samples.rows, *stats.newest.rows]
    shown += [row for rows in list_extremes(stats).values() for row in rows]
    return shown + [row for trio in neighbours for row in trio if row]


def _render_page(
    out: str,
    description: Mapping[str, Any],
    shards: Sequence[str],
    found: _Found,
    pictures: Mapping[str, str],
    changes: str,
) -> str:
    """Return the page's HTML."""
    parts, stats, fingerprints = found.parts, found.stats, found.fingerprints
    times = np.array(stats.times).reshape(-1, 5).T
    times[2] = times[2].clip(times[1] + 1e-3)
    reading = find_reading(description, times, parts.is_staged)
    runs = description.get("runs", [])
    decoded = description.get("options", {}).get("decode", True)
    again = write_command(description, shards, out, "--retry-failed")
    sections = {
        "Changes": changes,
        "Failures": render_failures(decoded, stats, found.neighbours, pictures, again),
        "Shards": render_shards(stats),
        "Warnings": render_warnings(stats),
        "Samples": render_samples(stats, pictures),
        "Sizes": render_sizes(stats),
        "Extremes": render_extremes(stats, pictures),
        "Columns": render_columns(found.columns),
        "Fingerprints": render_fingerprints(fingerprints, pictures),
        "Duplicates": render_duplicates(fingerprints, pictures),
        "Runs": render_runs(runs, stats.newest.rows, pictures),
        "Throughput": render_rate(reading.times),
    }
    if not stats.shards:
        none = render_section("Images", render_banner("None: no part has a row.", "warn"))
        sections = {"Changes": changes, "Images": none, "Runs": sections["Runs"]}
    given = {name: html for name, html in sections.items() if html}
    template = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    return template.substitute(
        title=escape(posixpath.basename(out.rstrip("/"))),
        status=render_status(description, decoded, parts),
        made=describe_made(description),
        facts=render_facts(description, out, shards, write_command(description, shards, out)),
        cards=render_cards(description, decoded, parts, stats, reading, len(list_working(runs))),
        contents="".join(f'<a href="#{name}">{name}</a>' for name in given),
        sections="".join(f'<div id="{name}">{html}</div>' for name, html in given.items()),
    )
