"""One HTML page that shows what a batch job has read, for people who would rather look."""

from __future__ import annotations

import base64
import io
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
from PIL import Image

from dask_imgread.decoding.geometry import resize
from dask_imgread.decoding.header import ImageError, read_header
from dask_imgread.decoding.pillow import decode_with_pillow
from dask_imgread.jobs.folder import JOB, JobFolder, name_records
from dask_imgread.report.plots import TOP, embed_plots, say, tell_time
from dask_imgread.report.statistics import (
    LISTED,
    MEASURES,
    Floats,
    Row,
    Tally,
    Trio,
    count_parts,
    find_neighbours,
)
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import ByteSource
from dask_imgread.storage.files import write_whole
from dask_imgread.storage.filesystems import connect, resolve_path
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.storage.retries import with_retries

_THREADS = 4  # that load pictures
_NEIGHBOURS = 6  # failures that are shown between their neighbours
_THUMBNAIL = 220  # pixels
_HEADERS_ONLY = "only headers were read: pixels were not checked"
_MAX_PIXELS = 1 << 28


def write_report(
    out: str,
    path: str | None = None,
    *,
    storage_options: dict[str, Any] | None = None,
    out_options: dict[str, Any] | None = None,
    samples: int = 24,
) -> str:
    """Write an HTML page with the numbers, plots, pictures and failures of a batch job.

    The page is one file that needs no network. The job may still be running: what it has
    written so far is shown.

    Parameters
    ----------
    out
        The folder or URL that the job writes to.
    path
        The page's path or URL; ``_report.html`` in ``out`` if not given.
    storage_options
        Options for the shards' file system, and for those of ``out`` and ``path`` if they
        are remote.
    out_options
        Options for the file systems of ``out`` and ``path``, if they are others.
    samples
        How many images, drawn at random, to show.

    Returns
    -------
    str
        The page's path or URL.

    Raises
    ------
    FileNotFoundError
        If there is no batch job in ``out``.
    FileExistsError
        If what stands in its place was not written by a job.
    PermissionError, StorageError
        If a store refuses what is asked of it, or can't be reached.
    ValueError
        If ``samples`` is negative.

    Examples
    --------
    >>> from dask_imgread import read_metadata
    >>> from dask_imgread.testing import make_shards
    >>> rows = read_metadata(make_shards("shards")).compute(scheduler="sync")
    >>> Path("out").mkdir()
    >>> rows.to_parquet("out/part-0000000.parquet")
    >>> job = {"format": 1, "command": "metadata", "partitions": 1, "shards": 2}
    >>> JobFolder("out").write_job(job)
    >>> write_report("out")
    'out/_report.html'
    """
    if samples < 0:
        raise ValueError(f"samples must be at least 0, not {samples!r}")
    path = path or f"{out.rstrip('/')}/_report.html"
    shard_options = storage_options or {}
    options = shard_options if out_options is None else out_options
    folder = JobFolder(resolve_path(out), options)
    job = folder.read_job()
    if job is None:
        raise FileNotFoundError(
            f"no batch job in {redact_url(out)}: no {JOB} there; give the folder that a job "
            "writes to"
        )
    fs, root = folder.connect()
    names = folder.list_parts()
    if job["command"] == "apply":
        names = [name_records(name) for name in names]
    parts = [f"{root}/{name}" for name in names]
    tally = count_parts(fs, parts, samples)
    inside = [row for row in tally.list_failures() if row.offset > 0]
    neighbours = find_neighbours(fs, parts, inside[:_NEIGHBOURS])
    shown = [*tally.samples.rows, *(row for trio in neighbours for row in trio if row)]
    pictures = _load_pictures(shown, shard_options)
    html = _compose(redact_url(folder.url), job, len(parts), tally, neighbours, pictures)
    with_retries(write_whole, path, *connect(path, options), html.encode())
    return path


# Pictures


def _load_pictures(rows: Iterable[Row], options: dict[str, Any]) -> dict[str, str]:
    """Return HTML for the pixels of each image by its id, or for the reason why there are none."""
    by_shard: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_shard[row.shard][row.image_id] = row

    def load(shard: str) -> dict[str, str]:
        wanted = sorted(by_shard[shard].values(), key=lambda row: row.offset)
        try:
            with open_shard(shard, options) as source:
                return {row.image_id: _show(source, row, options) for row in wanted}
        except Exception as error:  # whatever a file system raises, the page is made
            return dict.fromkeys(by_shard[shard], _show_gone(error, options))

    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            name: shown for loaded in pool.map(load, by_shard) for name, shown in loaded.items()
        }


def _show(source: ByteSource, row: Row, options: dict[str, Any]) -> str:
    try:
        content = base64.b64encode(_shrink(source, row)).decode()
    except Exception as error:
        return _show_gone(error, options)
    return f'<div class="picture"><img alt="" src="data:image/jpeg;base64,{content}"></div>'


def _show_gone(error: Exception, options: dict[str, Any]) -> str:
    return _show_none(hide_secrets(str(error) or type(error).__name__, options))


def _show_none(reason: str) -> str:
    return f'<div class="picture gone"><span>{escape(reason)}</span></div>'


def _shrink(source: ByteSource, row: Row) -> bytes:
    """Return an image as a small JPEG."""
    if row.size > 4 * _MAX_PIXELS:
        raise ImageError(f"too large: {row.size} bytes")
    content = source.read_at(row.offset, row.size)
    header = read_header(content)
    width, height = header.width, header.height
    if width * height > _MAX_PIXELS:
        raise ImageError(f"too large: {width} x {height} pixels")
    scale = min(1, _THUMBNAIL / max(width, height))
    sides = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = resize(decode_with_pillow(content, header), sides)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


# The page


def _compose(
    out: str,
    job: Mapping[str, Any],
    parts: int,
    tally: Tally,
    neighbours: Sequence[Trio],
    pictures: Mapping[str, str],
) -> str:
    """Return the page's HTML."""
    times = np.array(tally.times).reshape(-1, 3).T
    times[2:] = times[2:].clip(times[1] + 1e-3)
    divs, script, bokeh = embed_plots(tally, times)
    decoded = job.get("options", {}).get("decode", True)
    if tally.images or tally.failed:
        sections = [
            _show_failures(decoded, tally, neighbours, pictures, divs),
            _show_samples(tally, pictures),
            _show_spreads(tally, divs),
            _show_rate(divs),
        ]
    else:
        sections = [_show_section("Images", _show_banner("None: no part has a row.", "warn"))]
    done = parts >= job["partitions"]
    status = "done" if done else f"unfinished: {parts:,} of {job['partitions']:,} partitions done"
    made = [job["command"], job.get("function"), out, f"dask-imgread {job.get('version', '')}"]
    made += [f"page made {tell_time(datetime.now(UTC).timestamp())} UTC"]
    template = Template(Path(__file__).with_suffix(".html").read_text("utf-8"))
    return template.substitute(
        title=escape(posixpath.basename(out.rstrip("/"))),
        status=_show_badge(status, done)
        + (
            "" if decoded else _show_badge("only headers were read: pixels were not checked", False)
        ),
        made=escape(" · ".join(filter(None, made))),
        cards=_show_cards(job, decoded, parts, tally, times),
        sections="".join(sections),
        bokeh=bokeh,
        script=script,
    )


def _show_badge(text: str, good: bool) -> str:
    return f'<span class="badge {"good" if good else "warn"}">{text}</span>'


def _show_cards(
    job: Mapping[str, Any], decoded: bool, parts: int, tally: Tally, times: Floats
) -> str:
    images, rows = tally.images, tally.images + tally.failed
    cards = [
        ("Images read" if decoded else "Headers read", f"{images:,}", f"of {rows:,}"),
        ("Failed", f"{tally.failed:,}", f"{tally.failed / rows:.2%}" if rows else ""),
        ("Shards", f"{job['shards']:,}", f"{len(tally.shards):,} with failures"),
        ("Partitions", f"{parts:,}", f"of {job['partitions']:,}"),
    ]
    for title, total, unit in (("Pixels", tally.pixels, "px"), ("Encoded", tally.bytes, "B")):
        mean = f"{say(total / images, unit)} an image" if images else ""
        cards.append((title, say(total, unit), mean))
    if times.size:
        seconds = _count_seconds(times)
        speed = say(times[0].sum() / seconds)
        began = f"from {tell_time(times[1].min())} UTC"
        cards.append(("Time", str(timedelta(seconds=ceil(seconds))), began))
        cards.append(("Images per second", speed, f"workers: {len(tally.workers):,}"))
    alarming = "Failed" if tally.failed else None
    return "".join(
        f'<div class="card {"alarm" if title == alarming else ""}">'
        f'<span class="soft">{title}</span><b>{number}</b><span class="soft">{note}</span></div>'
        for title, number, note in cards
    )


def _count_seconds(times: Floats) -> float:
    """Return how long parts were being read; not the time between a job's runs."""
    _, began, ended = times[:, times[1].argsort()]
    reached = np.maximum.accumulate(ended)
    pauses = (began[1:] - reached[:-1]).clip(0)
    return float(reached[-1] - began[0] - pauses.sum())


def _show_failures(
    decoded: bool,
    tally: Tally,
    neighbours: Sequence[Trio],
    pictures: Mapping[str, str],
    divs: Mapping[str, str],
) -> str:
    if not tally.failed:
        none = "None: every image could be read."
        if not decoded:
            none = (
                "None seen in the headers. Decoding finds the broken images that seem fine there."
            )
        return _show_section("Failures", _show_banner(none, "good" if decoded else "warn"))
    listed = tally.list_failures()[:LISTED]
    lines = "".join(f"<tr>{_show_cell(row.image_id)}{_show_cell(row.error)}</tr>" for row in listed)
    table = f"<table><tr><th>image_id</th><th>error</th></tr>{lines}</table>"
    causes = [
        _show_panel("By cause", _tell_top(len(tally.causes), "cause"), divs["causes"]),
        _show_panel("Examples", f"{len(listed):,} of {tally.failed:,}", table),
    ]
    shards = _show_panel("By shard", _tell_top(len(tally.shards), "shard"), divs["shards"])
    trios = [_show_trio(trio, pictures) for trio in neighbours]
    return _show_section(
        "Failures", _show_grid("halves", [_show_grid("", causes), shards])
    ) + _show_section(
        f"Failures between their neighbours, {len(trios):,} of {tally.failed:,}",
        _show_grid("halves", trios),
    )


def _show_cell(text: str) -> str:
    return f'<td title="{escape(text)}"><span>{escape(text)}</span></td>'


def _show_trio(trio: Trio, pictures: Mapping[str, str]) -> str:
    before, failed, after = trio
    cause, _, detail = failed.error.partition(":")
    tile = (
        f'<div class="picture bad"><strong>{escape(cause)}</strong>'
        f"<span>{escape(detail)}</span></div>"
    )
    tiles = [
        _show_image(before, pictures) if before else _show_none("none before it"),
        _show_tile(tile, failed.image_id, f"{failed.size:,} bytes"),
        _show_image(after, pictures) if after else _show_none("none after it"),
    ]
    place = f"at byte {failed.offset:,}"
    return _show_panel(escape(failed.shard), place, _show_grid("trio", tiles))


def _show_samples(tally: Tally, pictures: Mapping[str, str]) -> str:
    rows = sorted(tally.samples.rows, key=lambda row: (row.part, row.offset))
    tiles = [_show_image(row, pictures) for row in rows]
    title = f"Samples, drawn at random, {len(tiles):,} of {tally.images:,}"
    return _show_section(title, _show_grid("sheet", tiles))


def _show_image(row: Row, pictures: Mapping[str, str]) -> str:
    note = f"{row.width:,} \u00d7 {row.height:,} · {row.format}"
    return _show_tile(pictures[row.image_id], row.image_id, note)


def _show_spreads(tally: Tally, divs: Mapping[str, str]) -> str:
    if not tally.images:
        return ""
    panels = []
    for name, (title, unit) in MEASURES.items():
        spread = tally.spreads[name]
        low, middle, high = (say(n, unit) for n in (spread.low, spread.median(), spread.high))
        note = f"all {low}" if low == high else f"{low} to {high}, median about {middle}"
        panels.append(_show_panel(title, note, divs[name]))
    formats = _tell_top(len(tally.formats), "format")
    panels.append(_show_panel("Format", formats, divs["format"]))
    return _show_section("Sizes and formats", _show_grid("thirds", panels))


def _show_rate(divs: Mapping[str, str]) -> str:
    if "rate" not in divs:
        return ""
    note = "read or failed, each part's images spread evenly over the time it took"
    return _show_section("Throughput", _show_panel("Images per second", note, divs["rate"]))


def _show_section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _show_banner(text: str, kind: str) -> str:
    return f'<p class="banner {kind}">{text}</p>'


def _show_grid(kind: str, items: Iterable[str]) -> str:
    content = "".join(items)
    return f'<div class="grid {kind}">{content}</div>' if content else ""


def _show_panel(title: str, note: str, content: str) -> str:
    return f'<div class="panel"><h3>{title}</h3><p class="soft">{note}</p>{content}</div>'


def _show_tile(picture: str, image_id: str, note: str) -> str:
    shard, _, name = image_id.partition("/")
    return (
        f'<figure title="{escape(image_id)}">{picture}<figcaption><span>{escape(name)}</span>'
        f'<span class="soft">{escape(shard)}</span><span class="soft">{escape(note)}</span>'
        "</figcaption></figure>"
    )


def _tell_top(count: int, thing: str) -> str:
    told = f"{count:,} {thing}{'s' if count > 1 else ''}"
    return told if count <= TOP else f"the top {TOP} of {told}"
