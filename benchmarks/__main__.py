"""Run the benchmarks and print one table: ``python -m benchmarks``.

Each contender runs in its own process, and the rounds alternate. A ratio is the median of the
ratios round by round.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import Chosen
from benchmarks.memory import measure_peak_batches
from benchmarks.photographs import (
    CORES,
    break_shards,
    make_large_shard,
    make_photo_shards,
    repeat_shards,
)
from benchmarks.rounds import Contender, alternate
from benchmarks.table import Pair, Row, describe_machine, format_table, make_rows, write_json

_REPEATS = 8  # of all images, in the benchmarks of a cluster
_SHARE, _SHARDS = 0.01, 20  # of the images that are chosen at random


@dataclass(frozen=True)
class Size:
    """How much to measure."""

    images: int = 2000
    rounds: int = 5
    kinds: int = 3  # sizes of pictures
    long: int = 20_000  # images of the longest run


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--images", type=int, default=Size.images)
    parser.add_argument("--long", type=int, default=Size.long, help="images of the longest run")
    parser.add_argument("--rounds", type=int, default=Size.rounds)
    parser.add_argument("--kinds", type=int, default=Size.kinds, help="sizes of pictures")
    parser.add_argument("--only", metavar="WORD", default="", help="measures whose name has it")
    args = parser.parse_args(argv)
    size = Size(args.images, args.rounds, args.kinds, args.long)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name, measure in MEASURES.items()
            if args.only in name
            for row in measure(Path(folder), size)
        ]
    about = describe_machine() | {
        "size": f"{size.images} images, {size.rounds} alternating rounds",
    }
    print(format_table(rows, about))
    if args.json:
        write_json(Path(args.json), rows, about)
    return 0


def _race(contenders: dict[str, tuple[Any, ...]], rounds: int, pairs: Sequence[Pair]) -> list[Row]:
    """Race contenders, each given as a class of `contenders` and its arguments; compare pairs."""
    running = [Contender(name, *args) for name, *args in contenders.values()]
    for contender in running:
        contender.wait()
    rates = dict(zip(contenders, alternate(running, rounds), strict=True))
    for contender in running:
        contender.close()
    return make_rows(rates, pairs)


def measure_decoding(folder: Path, size: Size) -> list[Row]:
    """Compare a reader on one core with the decoder alone and with peers, for each picture size."""
    shards = _make_sizes(folder, size)
    targets = {"0.2 MP": 0.97, "3 MP": 0.97, "12 MP": 1.0}
    rows = []
    for name, paths in list(shards.items())[: size.kinds]:
        contenders = {
            "ours": ("Stream", paths, 1),
            "floor": ("Floor", paths, 1),
            "DALI": ("BareDali", paths, 1),
            "Pillow": ("Pillow", paths),
            "Curator": ("Curator", paths, 1),
        }
        pairs = [
            (f"stream, {name} : floor", "ours", "floor", targets[name]),
            (f"stream, {name} : bare DALI", "ours", "DALI", 0),
            (f"stream, {name} : bare Pillow", "ours", "Pillow", 0),
            (f"stream, {name} : as NeMo Curator reads on a CPU", "ours", "Curator", 0),
        ]
        rows += _race(contenders, size.rounds, pairs)
    return rows


def _make_sizes(folder: Path, size: Size) -> dict[str, list[str]]:
    """Write shards of each picture size."""
    return {
        "0.2 MP": make_photo_shards(folder / "photos", size.images),
        "3 MP": make_large_shard(folder / "3", (2048, 1536), max(2, size.images // 25)),
        "12 MP": make_large_shard(folder / "12", (4000, 3000), max(2, size.images // 80)),
    }


def measure_fingerprints(folder: Path, size: Size) -> list[Row]:
    """Compare fingerprints on one core with decoding alone, for each picture size."""
    targets = {"0.2 MP": 0.85, "3 MP": 0, "12 MP": 2.5}
    rows = []
    for name, paths in list(_make_sizes(folder, size).items())[: size.kinds]:
        contenders = {"ours": ("Fingerprints", paths, 1), "decoding": ("Stream", paths, 1)}
        pair = f"fingerprint, {name} : decoding alone", "ours", "decoding", targets[name]
        rows += _race(contenders, size.rounds, [pair])
    return rows


def measure_resizing(folder: Path, size: Size) -> list[Row]:
    """Compare ``resize=224`` on one core with decoding at the same scale, and with peers."""
    rows = []
    cases = ((1024, 768, 2, 10), (2048, 1536, 4, 33), (4000, 3000, 8, 80))
    for width, height, scale, share in cases[: size.kinds]:
        name = f"resize=224 of {width} x {height}"
        images = max(2, size.images // share)
        paths = make_large_shard(folder / f"{width}", (width, height), images)
        contenders = {
            "ours": ("Stream", paths, 1, 224),
            "floor": ("ResizedFloor", paths, 224, scale),
            "Pillow": ("Pillow", paths, 224),
            "DALI": ("BareDali", paths, 1, 224),
        }
        pairs = [
            (f"{name} : simplejpeg at 1/{scale}, Pillow's bilinear", "ours", "floor", 0.95),
            (f"{name} : Pillow with draft", "ours", "Pillow", 0),
            (f"{name} : bare DALI", "ours", "DALI", 0),
        ]
        rows += _race(contenders, size.rounds, pairs)
    return rows


def measure_broken(folder: Path, size: Size) -> list[Row]:
    """Compare shards in which one picture in ten is broken with intact ones."""
    whole = make_photo_shards(folder / "whole", size.images)
    broken = break_shards(folder / "broken", whole, 0.1)
    contenders = {"ours": ("Stream", broken, 1), "whole": ("Stream", whole, 1)}
    return _race(
        contenders, size.rounds, [("stream, 10 % broken : none broken", "ours", "whole", 0.95)]
    )


def measure_cluster(folder: Path, size: Size) -> list[Row]:
    """Compare ``map_images`` on a cluster with the floor and with Dask code written by hand."""
    few = make_photo_shards(folder / "few", size.images)
    shards = repeat_shards(folder / "many", few, _REPEATS)
    contenders = {
        "500": ("Cluster", shards, 500),
        "125": ("Cluster", shards, 125),
        "floor": ("Floor", few, CORES, _REPEATS),
        "by hand": ("ByHand", shards),
    }
    name = f"map_images, {_REPEATS * size.images:,} photographs"
    pairs = [
        (f"{name}, 500 a task : floor", "500", "floor", 0.93),
        (f"{name}, 125 a task : floor", "125", "floor", 0.88),
        (f"{name}, 500 a task : Dask by hand", "500", "by hand", 2.0),
    ]
    return _race(contenders, size.rounds, pairs)


def measure_headers(folder: Path, size: Size) -> list[Row]:
    """Compare reading headers with decoding, and partitioning with tarfile."""
    shards = make_photo_shards(folder / "triples", size.images, sidecars=("json", "txt"))
    walks = [
        ("header-only metadata : decoding, one core", "Headers", "DecodedRows", 25),
        ("partition_shards : tarfile.getmembers, members", "Partition", "Tarfile", 4),
        ("metadata with a caption and three keys : without", "Sidecars", "Headers", 0.5),
    ]
    return [
        row
        for walk in walks
        for row in _race({name: (name, shards) for name in walk[1:3]}, size.rounds, [walk])
    ]


def measure_chosen(folder: Path, size: Size) -> list[Row]:
    """Compare 1 % of the images, chosen at random, with all: the time, and the bytes read."""
    shards = make_photo_shards(folder / "chosen", size.long, shards=_SHARDS)
    contenders = {"all": ("Stream", shards), "chosen": ("Chosen", shards, _SHARE)}
    what = f"{100 * _SHARE:.0f} % of {size.long:,} photographs, chosen at random : all"
    (rates,) = _race(contenders, size.rounds, [(what, "chosen", "all", 0)])
    count = max(1, round(_SHARE * size.long))
    time = count / size.long / rates.ratio
    chosen = Chosen(shards, _SHARE)
    chosen.run()  # imports what it needs
    read = _count_bytes_read()
    chosen.run()
    read = _count_bytes_read() - read
    whole = sum(map(os.path.getsize, shards))
    share = read / whole
    milliseconds = 1000 * count / rates.ours, 1000 * size.long / rates.other
    return [
        Row(f"{what}, ms", *milliseconds, time, "<= 0.03", time <= 0.03),
        Row(f"{what}, kB", read / 1e3, whole / 1e3, share, "<= 0.02", share <= 0.02),
    ]


def measure_writing(folder: Path, size: Size) -> list[Row]:
    """Compare new shards of all samples with copies of the old ones."""
    few = make_photo_shards(folder / "few", size.images, sidecars=("json", "txt"))
    shards = repeat_shards(folder / "sources", few, _REPEATS)
    contenders: dict[str, tuple[Any, ...]] = {
        "cp": ("Copy", shards),
        "cp and sync": ("Copy", shards, True),
    }
    pairs = []
    for length in (size.images // 2, 2 * size.images):
        ours = f"write_shards, {length:,} photographs with two sidecars a shard"
        contenders[ours] = ("Write", shards, length)
        pairs.append((f"{ours} : cp", ours, "cp", 0.7))
        pairs.append((f"{ours} : cp and sync", ours, "cp and sync", 0))
    return _race(contenders, size.rounds, pairs)


def _count_bytes_read() -> int:
    """Return how many bytes this process has read, from the page cache too."""
    import psutil

    return int(psutil.Process().io_counters().read_chars)


def measure_length(folder: Path, size: Size) -> list[Row]:
    """Compare the rate of a long run with that of a short one."""
    contenders = {
        "long": ("Stream", make_photo_shards(folder / "long", size.long)),
        "short": ("Stream", make_photo_shards(folder / "short", size.images)),
    }
    name = f"rate in {size.long:,} images : in {size.images:,}"
    return _race(contenders, size.rounds, [(name, "long", "short", 0.95)])


def measure_memory(folder: Path, size: Size) -> list[Row]:
    """Compare the peak memory of a stream with one decoded batch."""
    (shard,) = make_photo_shards(folder / "one", min(size.images, 2000), shards=1)
    above, batch = measure_peak_batches(shard)
    ratio = above / batch
    what = "peak memory of stream : one decoded batch, MB"
    return [Row(what, above / 1e6, batch / 1e6, ratio, "<= 3", ratio <= 3)]


MEASURES: dict[str, Callable[[Path, Size], list[Row]]] = {
    "decoding": measure_decoding,
    "resizing": measure_resizing,
    "fingerprints": measure_fingerprints,
    "broken": measure_broken,
    "cluster": measure_cluster,
    "headers": measure_headers,
    "length": measure_length,
    "chosen": measure_chosen,
    "writing": measure_writing,
    "memory": measure_memory,
}


if __name__ == "__main__":
    sys.exit(main())
