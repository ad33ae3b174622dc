"""The HTML report of a batch job: its statistics, plots, failures and a sample of its images."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from html import escape
from math import ceil
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from dask_imgread.decoding.contract import Pixels
from dask_imgread.decoding.header import ImageError, read_header
from dask_imgread.decoding.pillow import decode_with_pillow
from dask_imgread.diff import survey_changes
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.report.changes import list_changed, render_changes
from dask_imgread.report.elements import (
    render_badge,
    render_banner,
    render_card,
    render_grid,
    render_image,
    render_panel,
    render_placeholder,
    render_section,
    render_table,
    render_tile,
)
from dask_imgread.report.fingerprints import (
    Fingerprints,
    list_measures,
    list_pictured,
    render_fingerprints,
    survey_fingerprints,
)
from dask_imgread.report.parts import Parts, find_parts
from dask_imgread.report.plots import (
    TOP,
    describe_range,
    embed_plots,
    format_number,
    format_time,
)
from dask_imgread.report.runs import find_news, list_working, render_runs
from dask_imgread.report.statistics import (
    LISTED,
    MEASURES,
    Row,
    Statistics,
    Trio,
    count_parts,
    find_neighbours,
    sort_rows,
)
from dask_imgread.report.times import Reading, find_reading
from dask_imgread.shards.frames import JOB
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import ByteSource
from dask_imgread.storage.files import write_whole
from dask_imgread.storage.filesystems import connect, resolve_path
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.storage.retries import with_retries
from dask_imgread.thumbnails import embed_thumbnail

_THREADS = 4  # that load thumbnails
_IN_CONTEXT = 6  # failures that are shown between their neighbours
_THUMBNAIL = 220  # pixels
_HEADERS_ONLY = "only headers were read: pixels were not checked"
_MAX_PIXELS = 1 << 28


def write_report(
    out: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    since: str | os.PathLike[str] | None = None,
    storage_options: dict[str, Any] | None = None,
    out_options: dict[str, Any] | None = None,
    samples: int = 24,
) -> str:
    """Write an HTML page with the statistics, plots, failures and sample images of a batch job.

    The page is one self-contained file. It may be written while the job is still running, and
    then shows what the job has written so far. If the rows have the columns of ``fingerprint``, it
    also shows what these have measured, and the biggest groups of duplicates: to find these takes
    most of a minute if there are 2,000,000 rows; if there are more, they are not looked for.

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
        parts, stats, neighbours, fingerprints = _gather(folder, description, samples)
    except FileNotFoundError:  # the job has merged parts meanwhile, and removed them
        parts, stats, neighbours, fingerprints = _gather(folder, description, samples)
    survey = None
    if since is not None:
        since = os.path.expanduser(since)
        survey = survey_changes(since, out, listed=LISTED, storage_options=out_options)
    changed = list_changed(survey) if survey else {}
    shown = [*stats.samples.rows, *stats.newest.rows]
    shown += [row for trio in neighbours for row in trio if row]
    shown += [row for rows in changed.values() for row in rows]
    shown += list_pictured(fingerprints)
    pictures = _load_thumbnails(shown, shard_options)
    changes = ""
    if since and survey:
        done = description["finished"]
        changes = render_changes(redact_url(since), survey, changed, pictures, done)
    html = _render_page(
        redact_url(folder.url), description, parts, stats, neighbours, fingerprints, pictures,
        changes,
    )  # fmt: skip
    with_retries(write_whole, path, *connect(path, out_options), html.encode())
    return path


def _gather(
    folder: JobFolder, description: Mapping[str, Any], samples: int
) -> tuple[Parts, Statistics, list[Trio], Fingerprints | None]:
    fs, _ = folder.connect()
    parts = find_parts(folder, description)
    stats = count_parts(fs, parts.paths, samples, find_news(description.get("runs", [])))
    inside = [row for row in stats.list_failures() if row.offset > 0]
    neighbours = find_neighbours(fs, parts.paths, inside[:_IN_CONTEXT])
    return parts, stats, neighbours, survey_fingerprints(folder, parts)


# Thumbnails


def _load_thumbnails(rows: Iterable[Row], storage_options: dict[str, Any]) -> dict[str, str]:
    """Return, by image id, the HTML of each image's thumbnail, or of why it can't be shown."""
    by_shard: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_shard[row.shard][row.image_id] = row

    def load(shard: str) -> dict[str, str]:
        wanted = sorted(by_shard[shard].values(), key=lambda row: row.offset)
        try:
            with open_shard(shard, storage_options) as source:
                return {
                    row.image_id: _render_thumbnail(source, row, storage_options) for row in wanted
                }
        except Exception as error:  # no error of a file system may keep the page from being written
            return dict.fromkeys(by_shard[shard], _render_error(error, storage_options))

    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            image_id: html
            for loaded in pool.map(load, by_shard)
            for image_id, html in loaded.items()
        }


def _render_thumbnail(source: ByteSource, row: Row, storage_options: dict[str, Any]) -> str:
    try:
        thumbnail = embed_thumbnail(_decode(source, row), _THUMBNAIL)
    except Exception as error:
        return _render_error(error, storage_options)
    return f'<div class="picture"><img alt="" src="{thumbnail}"></div>'


def _render_error(error: Exception, storage_options: dict[str, Any]) -> str:
    return render_placeholder(hide_secrets(str(error) or type(error).__name__, storage_options))


def _decode(source: ByteSource, row: Row) -> Pixels:
    if row.size > 4 * _MAX_PIXELS:
        raise ImageError(f"too large: {row.size} bytes")
    content = source.read_at(row.offset, row.size)
    header = read_header(content)
    if header.width * header.height > _MAX_PIXELS:
        raise ImageError(f"too large: {header.width} x {header.height} pixels")
    return decode_with_pillow(content, header)


# The page


def _render_page(
    out: str,
    description: Mapping[str, Any],
    parts: Parts,
    stats: Statistics,
    neighbours: Sequence[Trio],
    fingerprints: Fingerprints | None,
    pictures: Mapping[str, str],
    changes: str,
) -> str:
    """Return the page's HTML."""
    times = np.array(stats.times).reshape(-1, 5).T
    times[2] = times[2].clip(times[1] + 1e-3)
    reading = find_reading(description, times, parts.is_staged)
    runs = description.get("runs", [])
    working = list_working(runs)
    ended = [run for run in working if "ended" in run]
    measures = list_measures(fingerprints)
    divs, script, bokeh = embed_plots(stats, reading.times, ended, measures)
    decoded = description.get("options", {}).get("decode", True)
    about_runs = render_runs(runs, stats.newest.rows, pictures, divs)
    if stats.images or stats.failed:
        sections = [
            _render_failures(decoded, stats, neighbours, pictures, divs),
            about_runs,
            _render_samples(stats, pictures),
            _render_histograms(stats, divs),
            render_fingerprints(fingerprints, pictures, divs),
            _render_rate(divs),
        ]
    else:
        none = render_banner("None: no part has a row.", "warn")
        sections = [render_section("Images", none), about_runs]
    left = _describe_left(description, parts)
    made = [
        description["command"],
        description.get("function"),
        out,
        f"dask-imgread {description.get('version', '')}",
    ]
    made += [f"page made {format_time(datetime.now(UTC).timestamp())} UTC"]
    template = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    return template.substitute(
        title=escape(posixpath.basename(out.rstrip("/"))),
        status=render_badge(f"unfinished: {left}" if left else "done", not left)
        + ("" if decoded else render_badge(_HEADERS_ONLY, False)),
        made=escape(" · ".join(filter(None, made))),
        cards=_render_cards(description, decoded, parts, stats, reading, len(working)),
        sections="".join([changes, *sections]),
        bokeh=bokeh,
        script=script,
    )


def _describe_left(description: Mapping[str, Any], parts: Parts) -> str:
    """Return in words what is left to do, nothing if the job is done."""
    if description["finished"]:
        return ""
    partitions = description["partitions"]
    if parts.is_staged.any():
        merged = f"{parts.merged:,} of them in the dataset"
        return f"{parts.read:,} of {partitions:,} partitions read, {merged}"
    if parts.read < partitions:
        return f"{parts.read:,} of {partitions:,} partitions done"
    return "the last run has not ended"


def _render_cards(
    description: Mapping[str, Any],
    decoded: bool,
    parts: Parts,
    stats: Statistics,
    reading: Reading,
    runs: int,
) -> str:
    images, rows = stats.images, stats.images + stats.failed
    cards = [
        ("Images read" if decoded else "Headers read", f"{images:,}", f"of {rows:,}"),
        ("Failed", f"{stats.failed:,}", f"{stats.failed / rows:.2%}" if rows else ""),
        ("Shards", f"{description['shards']:,}", f"{len(stats.shards):,} with failures"),
        ("Partitions", f"{parts.read:,}", f"of {description['partitions']:,}"),
    ]
    for title, total, unit in (("Pixels", stats.pixels, "px"), ("Encoded", stats.bytes, "B")):
        mean = f"{format_number(total / images, unit)} an image" if images else ""
        cards.append((title, format_number(total, unit), mean))
    if reading:
        by = f"in {runs:,} runs" if runs > 1 else f"workers: {len(stats.workers):,}"
        began = f"from {format_time(reading.began)} UTC"
        cards.append(("Time", str(timedelta(seconds=ceil(reading.seconds))), began))
        speed = format_number(reading.images / reading.seconds)
        cards.append(("Images per second", speed, by))
    alarming = "Failed" if stats.failed else None
    return "".join(render_card(*card, alarm=card[0] == alarming) for card in cards)


def _render_failures(
    decoded: bool,
    stats: Statistics,
    neighbours: Sequence[Trio],
    pictures: Mapping[str, str],
    divs: Mapping[str, str],
) -> str:
    if not stats.failed:
        none = "None: every image could be read."
        if not decoded:
            none = (
                "None seen in the headers. Decoding finds the broken images that seem fine there."
            )
        return render_section("Failures", render_banner(none, "good" if decoded else "warn"))
    listed = stats.list_failures()[:LISTED]
    table = render_table("error", ((row.image_id, row.error) for row in listed))
    causes = [
        render_panel("By cause", _format_top(len(stats.causes), "cause"), divs["causes"]),
        render_panel("Examples", f"{len(listed):,} of {stats.failed:,}", table),
    ]
    shards = render_panel("By shard", _format_top(len(stats.shards), "shard"), divs["shards"])
    trios = [_render_trio(trio, pictures) for trio in neighbours]
    return render_section(
        "Failures", render_grid("halves", [render_grid("", causes), shards])
    ) + render_section(
        f"Failures between their neighbours, {len(trios):,} of {stats.failed:,}",
        render_grid("halves", trios),
    )


def _render_trio(trio: Trio, pictures: Mapping[str, str]) -> str:
    before, failed, after = trio
    cause, _, detail = failed.error.partition(":")
    tile = (
        f'<div class="picture bad"><strong>{escape(cause)}</strong>'
        f"<span>{escape(detail)}</span></div>"
    )
    tiles = [
        render_image(before, pictures) if before else render_placeholder("none before it"),
        render_tile(tile, failed.image_id, f"{failed.size:,} bytes"),
        render_image(after, pictures) if after else render_placeholder("none after it"),
    ]
    place = f"at byte {failed.offset:,}"
    return render_panel(escape(failed.shard), place, render_grid("trio", tiles))


def _render_samples(stats: Statistics, pictures: Mapping[str, str]) -> str:
    tiles = [render_image(row, pictures) for row in sort_rows(stats.samples.rows)]
    title = f"Samples, drawn at random, {len(tiles):,} of {stats.images:,}"
    return render_section(title, render_grid("sheet", tiles))


def _render_histograms(stats: Statistics, divs: Mapping[str, str]) -> str:
    if not stats.images:
        return ""
    panels = []
    for name, (title, unit) in MEASURES.items():
        note = describe_range(stats.histograms[name], unit)
        panels.append(render_panel(title, note, divs[name]))
    formats = _format_top(len(stats.formats), "format")
    panels.append(render_panel("Format", formats, divs["format"]))
    return render_section("Sizes and formats", render_grid("thirds", panels))


def _render_rate(divs: Mapping[str, str]) -> str:
    if "rate" not in divs:
        return ""
    note = (
        "read or failed, over the time of reading, without pauses; each part's images are spread "
        "evenly over the time it took"
    )
    return render_section("Throughput", render_panel("Images per second", note, divs["rate"]))


def _format_top(count: int, thing: str) -> str:
    counted = f"{count:,} {thing}{'s' if count > 1 else ''}"
    return counted if count <= TOP else f"the top {TOP} of {counted}"
