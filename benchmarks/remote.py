"""Measure shards in a far store beside the same on this disk: ``python -m benchmarks.remote``.

A server in a process of its own answers each request after a latency, gives each connection a
bandwidth, and counts requests and bytes. Readers run on a cluster of two workers; all decode with
libjpeg-turbo. What they read is discarded.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from benchmarks.memory import measure_peak_batches
from benchmarks.photographs import make_large_shard, make_photo_shards, read_all
from benchmarks.slow_server import SlowServer, serve
from benchmarks.table import describe_machine
from dask_imgread.testing import write_shard

if TYPE_CHECKING:
    from distributed import Client

    from dask_imgread import ImageBatch

_STORES = ((0.02, 80e6), (0.05, 80e6), (0.1, 30e6))  # latency in s, bytes/s of a connection
_SHARDS = 4
_FLOORS = {"read_metadata": "local headers", "1 % of the images": "local 1 %"}  # else all images

Read = Callable[["Client", list[str]], int]


@dataclass(frozen=True)
class Result:
    """The result of one way to read, from one store."""

    what: str
    ratio: float  # of its rate to ours on the local disk
    seconds: float
    bytes: float  # to the size of the shards
    requests: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("--images", type=int, default=2000, help="of 40 kB; 1/50 as many of 2 MB")
    parser.add_argument("--copies", type=int, default=1, help="of each of the four shards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stores", type=int, default=len(_STORES))
    parser.add_argument("--threads", type=int, default=1, help="of each of the two workers")
    parser.add_argument("--gigabytes", type=float, default=1, help="of the shard for the memory")
    parser.add_argument("--only", metavar="WORD", default="", help="rows whose name has the word")
    args = parser.parse_args(arguments)
    from dask_imgread import connect_client

    results: list[Result] = []
    cluster = connect_client(
        device="cpu", n_workers=2, threads_per_worker=args.threads, verbose=False
    )
    with tempfile.TemporaryDirectory() as folder, cluster as client:
        sets = make_sets(Path(folder), args.images, args.copies)
        for latency, bandwidth in _STORES[: args.stores]:
            with serve(folder, latency, bandwidth) as server:
                for name, shards in sets.items():
                    store = f"{name}, {1000 * latency:.0f} ms, {bandwidth / 1e6:.0f} MB/s"
                    if args.only in store:
                        results += measure(client, server, folder, store, shards, args.rounds)
    for line in format_results(results):
        print(line)
    if args.gigabytes:
        print(f"\n{measure_memory(args.gigabytes)}")
    return 0


def measure_memory(gigabytes: float) -> str:
    """Return a line on the peak memory of reading a long shard, from a store and from this disk."""
    from dask_imgread.shards.ahead import READ_AHEAD

    with tempfile.TemporaryDirectory() as folder:
        photographs = min(1000, math.ceil(gigabytes * 1e9 / 40_000))  # of some 40 kB
        contents = read_all(make_photo_shards(Path(folder, "few"), photographs, shards=1))
        count = int(gigabytes * 1e9 / sum(map(len, contents)) * len(contents))
        members = [(f"{n:07d}.jpg", contents[n % len(contents)]) for n in range(count)]
        shard = write_shard(Path(folder, "long.tar"), members)
        local, _ = measure_peak_batches(shard)
        with serve(folder, *_STORES[1]) as server:
            remote, _ = measure_peak_batches(f"{server.url}/long.tar")
    allowed = 1.2 * local + READ_AHEAD
    return (
        f"peak memory of a shard of {gigabytes:g} GB: {local / 1e6:.0f} MB from this disk, "
        f"{remote / 1e6:.0f} MB from the store (at most {allowed / 1e6:.0f} MB are wanted)"
    )


def make_sets(folder: Path, images: int, copies: int = 1) -> dict[str, list[str]]:
    """Write shards of small and of large photographs, each as they are and compressed.

    Each shard has as many names as ``copies`` says, and is read under each of them.
    """
    small = make_photo_shards(folder / "small", images, shards=_SHARDS, sidecars=("json",))
    large = [
        path
        for number in range(_SHARDS)
        for path in make_large_shard(
            folder / f"large-{number}", (3500, 2500), max(1, images // 50 // _SHARDS)
        )
    ]
    sets = {}
    for name, shards in (("40 kB", small), ("2 MB", large)):
        sets[f"{name}, .tar"] = shards
        sets[f"{name}, .tar.zst"] = [_compress(path) for path in shards]
    return {
        name: [_link(path, number) for number in range(copies) for path in shards]
        for name, shards in sets.items()
    }


def _link(path: str, number: int) -> str:
    link = Path(path).with_name(f"{number}-{Path(path).name}")
    os.link(path, link)
    return str(link)


def _compress(path: str) -> str:
    import pyarrow as pa

    with pa.CompressedOutputStream(f"{path}.zst", "zstd") as file:
        file.write(Path(path).read_bytes())
    return f"{path}.zst"


def measure(
    client: Client, server: SlowServer, folder: str, store: str, shards: list[str], rounds: int
) -> list[Result]:
    """Read one set with each reader in turn, after a first round that does not count."""
    from dask_imgread import read_metadata

    urls = [f"{server.url}/{Path(path).relative_to(folder)}" for path in shards]
    ways: dict[str, tuple[Read, list[str]]] = {
        "local": (read_images, shards),
        "map_images": (read_images, urls),
        "local headers": (read_headers, shards),
        "read_metadata": (read_headers, urls),
    }
    local, remote = (client.compute(read_metadata(paths)).result() for paths in (shards, urls))
    ways |= {"local 1 %": (_choose(local), shards), "1 % of the images": (_choose(remote), urls)}
    if shards[0].endswith(".tar"):
        ways |= {"webdataset": (read_with_webdataset, urls), "by hand": (read_by_hand, urls)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    stats = {}
    for round_ in range(rounds + 1):
        for name, (read, paths) in ways.items():
            server.read_stats()
            start = time.perf_counter()
            count = read(client, paths)
            if round_:
                seconds[name].append(time.perf_counter() - start)
            stats[name] = server.read_stats()
            assert count, name
    size = sum(os.path.getsize(path) for path in shards)
    results = []
    for name, taken in seconds.items():
        if not name.startswith("local"):
            floor = seconds[_FLOORS.get(name, "local")]
            ratio = statistics.median(a / b for a, b in zip(floor, taken, strict=True))
            fetched, requests = stats[name]["bytes"] / size, stats[name]["requests"]
            median = statistics.median(taken)
            results.append(Result(f"{store}: {name}", ratio, median, fetched, requests))
    return results


def read_images(client: Client, paths: list[str] | pd.DataFrame) -> int:
    """Decode all images with ``map_images``."""
    from dask_imgread import map_images

    meta = pd.DataFrame({"height": pd.Series(dtype="int64")}).rename_axis("image_id")
    return len(client.compute(map_images(_measure_height, paths, meta=meta)).result())


def _choose(rows: pd.DataFrame) -> Read:
    """Return a function that decodes 1 % of the images that rows name, chosen at random."""
    chosen = rows.sample(max(1, len(rows) // 100), random_state=0)
    return lambda client, _: read_images(client, chosen)


def _measure_height(batch: ImageBatch) -> dict[str, list[int]]:
    return {"height": [image.image_data.shape[0] for image in batch.data]}


def read_headers(client: Client, paths: list[str]) -> int:
    """Read all headers with ``read_metadata``."""
    from dask_imgread import read_metadata

    return len(client.compute(read_metadata(paths)).result())


def read_with_webdataset(client: Client, urls: list[str]) -> int:
    """Decode with webdataset's pipe reader, a shard a task."""
    return sum(client.gather(client.map(_read_with_webdataset, urls, pure=False)))


def _read_with_webdataset(url: str) -> int:
    import simplejpeg
    import webdataset

    samples = webdataset.WebDataset(f"pipe:curl -s {url}", shardshuffle=False)
    return sum(simplejpeg.decode_jpeg(sample["jpg"], "RGB").ndim == 3 for sample in samples)


def read_by_hand(client: Client, urls: list[str]) -> int:
    """Decode what fsspec and tarfile give, a shard a task."""
    return sum(client.gather(client.map(_read_by_hand, urls, pure=False)))


def _read_by_hand(url: str) -> int:
    import fsspec
    import simplejpeg

    count = 0
    with fsspec.open(url) as file, tarfile.open(fileobj=io.BufferedReader(file), mode="r|") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                content = tar.extractfile(member)
                assert content is not None
                simplejpeg.decode_jpeg(content.read(), "RGB")
                count += 1
    return count


def format_results(results: Sequence[Result]) -> list[str]:
    """Return the results as a Markdown table."""
    lines = [f"{key}: {text}" for key, text in describe_machine().items()]
    lines += ["", "| images, shards, store: reader | rate to local | s | bytes | requests |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    return lines + [
        f"| {r.what} | {r.ratio:.2f} | {r.seconds:.2f} | {r.bytes:.2f} | {r.requests} |"
        for r in results
    ]


if __name__ == "__main__":
    sys.exit(main())
