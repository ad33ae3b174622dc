"""The table of results."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.photographs import CORES
from benchmarks.rounds import compare

_PACKAGES = (
    "dask",
    "distributed",
    "nvidia-dali-cuda120",
    "numpy",
    "pandas",
    "pillow",
    "simplejpeg",
)

Pair = tuple[str, str, str, float]  # title, our contender, the other, and the target ratio


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: float
    other: float
    ratio: float
    target: str
    met: bool


def make_rows(rates: Mapping[str, list[float]], pairs: Sequence[Pair]) -> list[Row]:
    """Compare pairs of contenders by their rates, round by round."""
    rows = []
    for what, ours, other, target in pairs:
        ratio = compare(rates[ours], rates[other])
        medians = (statistics.median(rates[name]) for name in (ours, other))
        wanted = f">= {target}" if target else ""
        rows.append(Row(what, *medians, ratio, wanted, ratio >= target))
    return rows


def describe_machine() -> dict[str, str]:
    """Return the machine and the versions that the figures depend on."""
    return {
        "machine": f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    }


def format_table(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    """Return the rows as a Markdown table."""
    lines = [f"{key}: {text}" for key, text in about.items()]
    lines += ["", "| what : to what | ours | other | ratio | target | met |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    for row in rows:
        met = ("yes" if row.met else "no") if row.target else ""
        numbers = f"{row.ours:,.0f} | {row.other:,.0f} | {row.ratio:.2f}"
        lines.append(f"| {row.what} | {numbers} | {row.target} | {met} |")
    return "\n".join(lines)


def write_json(path: Path, rows: Sequence[Row], about: Mapping[str, str], **more: Any) -> None:
    """Write the table, with any further results, as JSON."""
    table = {"about": dict(about), "rows": [asdict(row) for row in rows], **more}
    path.write_text(json.dumps(table, indent=2) + "\n")
