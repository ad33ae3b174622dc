"""The head of a report: what was read, with which options, and the numbers that matter most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from math import ceil
from typing import Any

from dask_imgread.report.command import describe_options, name_command, name_shards
from dask_imgread.report.elements import render_badge, render_card, render_command
from dask_imgread.report.parts import Parts
from dask_imgread.report.plots import format_number, format_time
from dask_imgread.report.statistics import Statistics
from dask_imgread.report.times import Reading

_NAMED = 3  # shards, if there is no short name for all
_HEADERS_ONLY = "only headers were read: pixels were not checked"


def render_status(description: Mapping[str, Any], decoded: bool, parts: Parts) -> str:
    """Return badges: whether the job is done, and whether pixels were decoded."""
    left = _describe_left(description, parts)
    done = render_badge(f"unfinished: {left}" if left else "done", not left)
    return done + ("" if decoded else render_badge(_HEADERS_ONLY, False))


def describe_made(description: Mapping[str, Any]) -> str:
    """Return in a line what has made the rows, and when the page was made."""
    made = [
        name_command(description),
        description.get("function") or "",
        f"dask-imgread {description.get('version', '')}",
        f"page made {format_time(datetime.now(UTC).timestamp())} UTC",
    ]
    return escape(" · ".join(filter(None, made)))


def render_facts(
    description: Mapping[str, Any], out: str, shards: Sequence[str], command: str
) -> str:
    """Return a list: inputs, options, output, and how to go on with a job that is unfinished.

    Parameters
    ----------
    description
        What ``_job.json`` holds.
    out
        The job's folder.
    shards
        The paths of its shards.
    command
        The command line that does the same; empty if there is none.
    """
    inputs = name_shards(shards)
    if inputs == ["SHARDS"]:
        more = [f"and {len(shards) - _NAMED:,} more"] if len(shards) > _NAMED else []
        inputs = [*shards[:_NAMED], *more]
    facts = {
        "Inputs": "\n".join(inputs),
        "Options": describe_options(description) or "as by default",
        "Output": out,
    }
    lines = "".join(
        f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items() if text
    )
    if command and not description["finished"]:
        lines += f"<dt>Go on</dt><dd>{render_command(command)}</dd>"
    return f"<dl>{lines}</dl>"


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


def render_cards(
    description: Mapping[str, Any],
    decoded: bool,
    parts: Parts,
    stats: Statistics,
    reading: Reading,
    runs: int,
) -> str:
    """Return the cards; ``runs`` is how many runs have done something."""
    images, rows = stats.images, stats.images + stats.failed
    cards = [
        ("Images read" if decoded else "Headers read", f"{images:,}", f"of {rows:,}"),
        ("Failed", f"{stats.failed:,}", f"{stats.failed / rows:.2%}" if rows else ""),
        ("Shards", f"{description['shards']:,}", f"{len(stats.broken):,} with failures"),
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
