"""Measure how well planted copies and useless pictures are found: ``python -m benchmarks.planted``.

The originals are tiles of photographs, which don't overlap and are enlarged to 320-960 pixels, and
drawn pictures. Copies of each, altered in several ways, and pictures that have a flag are written
with them as shards. The job ``fingerprint`` reads these on a cluster, with JPEGs decoded at a scale
and whole, and ``find_duplicates`` groups its rows.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance, ImageFile, ImageOps

from benchmarks.photographs import load_different_photographs
from dask_imgread import find_duplicates, fingerprint, run_job
from dask_imgread.fingerprints import BLANK_RANGE
from dask_imgread.testing import draw_picture, write_shard

if TYPE_CHECKING:
    from distributed import Client

    from dask_imgread import ImageReaderStage

TILE = 128, 96  # pixels of a photograph
WIDTHS = 320, 960  # to which it is enlarged
DISTANCES = 2, 4, 6, 8
FLAGS = "blank", "grey", "flat_tail", "border"
CONTRAST = 0.1  # of pictures that have more than a few faint things
IMAGES_IN_A_SHARD = 500
EVERY = 3  # of how many originals one has the copies that have a flag


class Picture(NamedTuple):
    """An encoded picture, how it was made, and the number of its original."""

    kind: str
    original: int
    content: bytes


def cut_tiles(photographs: Sequence[Image.Image]) -> list[Image.Image]:
    """Return tiles that don't overlap, without those of one colour."""
    width, height = TILE
    tiles = [
        photo.crop((left, top, left + width, top + height))
        for photo in photographs
        for top in range(0, photo.height - height + 1, height)
        for left in range(0, photo.width - width + 1, width)
    ]
    ranges = [np.ptp(np.asarray(tile), axis=(0, 1)).max() for tile in tiles]
    return [tile for tile, levels in zip(tiles, ranges, strict=True) if levels > BLANK_RANGE]


def make_originals(count: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield tiles, two thirds of the originals if there are so many, and drawn pictures."""
    rng = np.random.default_rng(0)
    widths = rng.integers(*WIDTHS, count).tolist()
    sizes = [(width, width * TILE[1] // TILE[0]) for width in widths]
    tiles = cut_tiles(load_different_photographs())
    chosen = np.linspace(0, len(tiles) - 1, min(len(tiles), 2 * count // 3)).astype(int)
    for tile, size in zip(chosen, sizes, strict=False):
        photo = tiles[tile].resize(size, Image.Resampling.LANCZOS)
        yield ("grey photograph" if photo.mode == "L" else "photograph"), photo
    for number in range(len(chosen), count):
        yield "drawn", draw_picture(number, sizes[number])


def encode(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def halve(image: Image.Image) -> bytes:
    return encode(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS))


def crop(image: Image.Image) -> bytes:
    """Cut off a fortieth of the width and height on each side."""
    x, y = image.width // 40, image.height // 40
    return encode(image.crop((x, y, image.width - x, image.height - y)))


def truncate(image: Image.Image) -> bytes:
    """Cut the file off at 30-90 %, and save what Pillow makes of it."""
    content = encode(image)
    share = 0.3 + 0.6 * (image.width % 100) / 100
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return encode(Image.open(io.BytesIO(content[: int(share * len(content))])).convert("RGB"))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def add_border(image: Image.Image) -> bytes:
    """Add white or black margins, all around or above and below."""
    margin = image.width // 12
    sides = (margin, margin) if image.width % 2 else (0, margin)
    return encode(ImageOps.expand(image, sides, "white" if image.width % 3 else "black"))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "quality 60": lambda image: encode(image, 60),
    "half": halve,
    "cropped": crop,
    "brighter": lambda image: encode(ImageEnhance.Brightness(image).enhance(1.1)),
}
FLAGGED: dict[str, Callable[[Image.Image], bytes]] = {
    "made grey": lambda image: encode(image.convert("L").convert("RGB")),
    "cut off": truncate,
    "bordered": add_border,
}

ORIGINALS = "photograph", "grey photograph", "drawn"
KINDS = "exact", *COPIES
PLANTED = "blank", "nearly blank", *FLAGGED


def make_blank(number: int) -> Image.Image:
    """Return a picture of one colour."""
    rng = np.random.default_rng(number)
    colour = "white" if number % 2 else tuple(rng.integers(0, 256, 3).tolist())
    width = int(rng.integers(*WIDTHS))
    return Image.new("RGB", (width, width * 3 // 4), colour)


def make_nearly_blank(number: int) -> Image.Image:
    """Return a page with a speck, a soft gradient, or a grainy one, in turn."""
    rng = np.random.default_rng(number)
    width = int(rng.integers(*WIDTHS))
    height = width * 3 // 4
    if number % 3 == 0:
        page = Image.new("RGB", (width, height), (250, 250, 247))
        x, y, size = rng.uniform(0, 1, 3) * (width, height, width // 12)
        ImageDraw.Draw(page).ellipse((x, y, x + size + 4, y + size + 4), fill=(60, 60, 70))
        return page
    levels = np.full((height, width), rng.uniform(30, 220))
    if number % 3 == 1:
        x, y = rng.uniform(-15, 15, 2)
        levels += np.linspace(0, x, width) + np.linspace(0, y, height)[:, None]
    else:
        levels += rng.normal(0, 5, levels.shape)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")


def make_pictures(count: int) -> Iterator[Picture]:
    """Yield ``count`` originals and what is planted beside them."""
    for number, (original, image) in enumerate(make_originals(count)):
        content = encode(image)
        yield Picture(original, number, content)
        yield Picture("exact", number, content)
        decoded = Image.open(io.BytesIO(content))
        for kind, make in {**COPIES, **(FLAGGED if number % EVERY == 0 else {})}.items():
            yield Picture(kind, number, make(decoded))
    for number in range(count, count + max(count // EVERY, 1)):
        yield Picture("blank", number, encode(make_blank(number), 60 + number % 36))
        yield Picture("nearly blank", number + count, encode(make_nearly_blank(number)))


def write_shards(folder: Path, pictures: Sequence[Picture]) -> list[str]:
    """Write the pictures in a random order, the same each time."""
    order = np.random.default_rng(0).permutation(len(pictures))
    members = [
        (f"{kind}_{original:05d}.jpg", content)
        for kind, original, content in (pictures[n] for n in order)
    ]
    return [
        write_shard(folder / f"{start:05d}.tar", members[start : start + IMAGES_IN_A_SHARD])
        for start in range(0, len(members), IMAGES_IN_A_SHARD)
    ]


def read_job(
    shards: list[str], out: Path, reader: ImageReaderStage, client: Client
) -> pd.DataFrame:
    """Fingerprint the shards; add what the keys say, the kind and the number of the original."""
    run_job(shards, str(out), fingerprint, reader=reader, client=client)
    rows = pd.read_parquet(out)
    parts = rows["key"].str.rpartition("_")
    return rows.assign(kind=parts[0].astype(str), original=parts[2].astype(int))


def score(rows: pd.DataFrame, by: str, distance: int = 0) -> list[float]:
    """Return the share of each kind that is in its original's group, and of what is right.

    Right are groups and pairs of one original, and pairs of pictures that have some contrast.
    """
    found = find_duplicates(rows, by, distance=distance)
    grouped = rows.assign(group=found["group"].reindex(rows.index))
    originals = grouped[grouped["kind"].isin(ORIGINALS)].set_index("original")["group"]
    together = grouped["group"].eq(grouped["original"].map(originals)).fillna(False)
    shares = together.groupby(grouped["kind"]).mean()
    sources = grouped.groupby("group")["original"].nunique()
    pairs = [
        count_right_pairs(chosen, by, distance)
        for chosen in (rows, rows[rows["contrast"] >= CONTRAST])
    ]
    return [*(float(shares[kind]) for kind in KINDS), float((sources == 1).mean()), *pairs]


def count_right_pairs(rows: pd.DataFrame, by: str, distance: int) -> float:
    """Return which share of the pairs within the distance are copies of one original."""
    if by == "sha256":
        numbers = pd.factorize(rows[by])[0].astype(np.uint64)
    else:
        rows = rows[~rows["blank"].astype(bool)]
        numbers = rows[by].to_numpy(np.uint64)
    originals = rows["original"].to_numpy()
    found = right = 0
    for place in range(len(numbers) - 1):
        bits = np.bitwise_count(numbers[place] ^ numbers[place + 1 :])
        near = originals[place + 1 :][bits <= distance]
        found += len(near)
        right += int((near == originals[place]).sum())
    return right / found


def score_flags(rows: pd.DataFrame) -> pd.DataFrame:
    """Return which share of each kind has each flag."""
    return rows[[*FLAGS]].astype(float).groupby(rows["kind"]).mean().loc[[*ORIGINALS, *PLANTED]]


def format_table(names: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return lines as a Markdown table, shares with three digits."""
    cells = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    marks = ["---", "---", *["---:"] * (len(names) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [[*names], marks, *cells])


def measure(count: int) -> None:
    """Plant, find, and print two tables."""
    from distributed import Client, LocalCluster

    groups: list[list[object]] = []
    flags: list[list[object]] = []
    with (
        TemporaryDirectory() as folder,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        pictures = list(make_pictures(count))
        shards = write_shards(Path(folder, "shards"), pictures)
        scaled = fingerprint.reader.with_options(device="cpu", verbose=False)
        for decoded, reader in (("scaled", scaled), ("whole", scaled.with_options(min_side=None))):
            rows = read_job(shards, Path(folder, decoded), reader, client)
            if decoded == "scaled":
                groups.append(["sha256", "", "", *score(rows, "sha256")])
            for by in ("phash", "dhash"):
                groups += [[by, decoded, bits, *score(rows, by, bits)] for bits in DISTANCES]
            flags += [[kind, decoded, *shares] for kind, *shares in score_flags(rows).itertuples()]
    print(f"{len(pictures):,} pictures, {count:,} of them originals\n")
    print(format_table(["by", "decoded", "bits", *KINDS, "groups", "pairs", "clear pairs"], groups))
    print()
    print(format_table(["kind", "decoded", *FLAGS], flags), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure with so many originals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted", description=__doc__)
    parser.add_argument("--originals", type=int, default=750)
    measure(parser.parse_args(argv).originals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
