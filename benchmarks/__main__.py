"""Measure, and print one table: ``python -m benchmarks``.

Each contender runs in a process of its own; the rounds alternate; a ratio is the median of
the ratios round by round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.memory import measure_peak_batches
from benchmarks.photographs import CORES, make_photo_shards
from benchmarks.rounds import Contender, alternate, compare

PACKAGES = ("dask", "distributed", "nvidia-dali-cuda120", "numpy", "pandas", "pillow", "simplejpeg")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    images: int = 2000
    rounds: int = 5
    long: int = 20_000


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: float
    other: float
    ratio: float
    target: str
    met: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--images", type=int, default=Size.images)
    parser.add_argument("--long", type=int, default=Size.long, help="images of the longest run")
    parser.add_argument("--rounds", type=int, default=Size.rounds)
    parser.add_argument("--only", metavar="WORD", default="", help="rows whose name has the word")
    options = parser.parse_args(arguments)
    size = Size(options.images, options.rounds, options.long)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name, measure in MEASURES.items()
            if options.only in name
            for row in measure(Path(folder), size)
        ]
    about = describe_machine(size)
    print_table(rows, about)
    if options.json:
        table = {"about": about, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(table, indent=2) + "\n")
    return 0


def _race(
    shards: list[str],
    names: Sequence[str],
    rounds: int,
    pairs: Sequence[tuple[str, str, str, float]],
) -> list[Row]:
    """Run contenders in turn, and make a row of each pair."""
    contenders = [Contender(f"prepare_{name}", shards) for name in names]
    rates = dict(zip(names, alternate(contenders, rounds), strict=True))
    for contender in contenders:
        contender.close()
    rows = []
    for what, ours, other, target in pairs:
        ratio = compare(rates[ours], rates[other])
        medians = (statistics.median(rates[name]) for name in (ours, other))
        rows.append(Row(what, *medians, ratio, f">= {target}", ratio >= target))
    return rows


def measure_decoding(folder: Path, size: Size) -> list[Row]:
    """Compare what decodes in one process with the floor and with peers."""
    shards = make_photo_shards(folder / "photos", size.images)
    pairs = [
        ("stream, two readers : floor", "stream", "floor", 0.90),
        ("stream, two readers : bare DALI", "stream", "bare_dali", 0.98),
        ("bare DALI : floor (DALI's own share of the gap)", "bare_dali", "floor", 0),
        ("stream : as NeMo Curator reads on a CPU", "stream", "curator", 1.6),
    ]
    return _race(shards, ["stream", "bare_dali", "floor", "curator"], size.rounds, pairs)


def measure_cluster(folder: Path, size: Size) -> list[Row]:
    """Compare what goes through a cluster with the floor and with what one writes by hand."""
    shards = make_photo_shards(folder / "photos-for-a-cluster", size.images)
    pairs = [
        ("cluster, map_images : floor", "cluster", "floor", 0.87),
        ("cluster : Dask by hand", "cluster", "by_hand", 2.0),
    ]
    return _race(shards, ["cluster", "floor", "by_hand"], size.rounds, pairs)


def measure_headers(folder: Path, size: Size) -> list[Row]:
    """Compare what reads headers only with what decodes, and with tarfile."""
    shards = make_photo_shards(folder / "triples", size.images, sidecars=("json", "txt"))
    walk = [
        ("header-only metadata : decoding, one core", "headers", "decoded_rows", 25),
        ("partition_shards : tarfile.getmembers, members", "partition", "tarfile", 4),
    ]
    return [row for pair in walk for row in _race(shards, [pair[1], pair[2]], size.rounds, [pair])]


def measure_length(folder: Path, size: Size) -> list[Row]:
    """Compare the time for an image in a long run with that in a short one."""
    short = make_photo_shards(folder / "short", size.images)
    long = make_photo_shards(folder / "long", size.long)
    contenders = [Contender("prepare_stream", shards) for shards in (long, short)]
    rates = alternate(contenders, size.rounds)
    for contender in contenders:
        contender.close()
    ratio = compare(rates[1], rates[0])  # times are the inverse of rates
    medians = (statistics.median(rate) for rate in rates)
    what = f"time per image, {size.long} images : {size.images} images"
    return [Row(what, *medians, ratio, "<= 1.05", ratio <= 1.05)]


def measure_memory(folder: Path, size: Size) -> list[Row]:
    """Compare the peak memory of a stream with one decoded batch."""
    (shard,) = make_photo_shards(folder / "one", min(size.images, 2000), shards=1)
    above, batch = measure_peak_batches(shard)
    ratio = above / batch
    what = "peak memory of stream : one decoded batch, MB"
    return [Row(what, above / 1e6, batch / 1e6, ratio, "<= 4", ratio <= 4)]


MEASURES: dict[str, Callable[[Path, Size], list[Row]]] = {
    "decoding": measure_decoding,
    "cluster": measure_cluster,
    "headers": measure_headers,
    "length": measure_length,
    "memory": measure_memory,
}


def describe_machine(size: Size) -> dict[str, str]:
    """Return what the figures depend on."""
    return {
        "machine": f"{platform.machine()}, {CORES} cores, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "size": f"{size.images} images, {size.rounds} alternating rounds",
    }


def print_table(rows: list[Row], about: dict[str, str]) -> None:
    """Print the rows as a Markdown table."""
    for key, text in about.items():
        print(f"{key}: {text}")
    print("\n| what : to what | ours | other | ratio | target | met |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        met = "yes" if row.met else "no"
        numbers = f"{row.ours:,.0f} | {row.other:,.0f} | {row.ratio:.2f}"
        print(f"| {row.what} | {numbers} | {row.target} | {met} |")


if __name__ == "__main__":
    sys.exit(main())
