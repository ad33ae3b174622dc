"""Measure how well planted copies and useless pictures are found: ``python -m benchmarks.planted``.

The originals are tiles of photographs, which don't overlap and are enlarged to 320-960 pixels, and
drawn pictures. Copies of each, altered in several ways, and pictures that have a flag are written
with them as shards. The job ``fingerprint`` reads these on a cluster, with JPEGs decoded at a scale
and whole, and ``find_duplicates`` groups its rows.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance, ImageFile, ImageOps

from benchmarks.photographs import load_different_photographs
from dask_imgread import find_duplicates, fingerprint, run_job
from dask_imgread.testing import draw_picture, write_shard

if TYPE_CHECKING:
    from distributed import Client

    from dask_imgread import ImageReaderStage

TILE = 128, 96  # pixels of a photograph
WIDTHS = 320, 960  # to which it is enlarged
DISTANCES = 2, 4, 6, 8
FLAGS = "blank", "grey", "flat_tail", "border"
IMAGES_IN_A_SHARD = 500
EVERY = 3  # of how many originals one has the copies that have a flag


class Picture(NamedTuple):
    """An encoded picture, how it was made, and the number of its original."""

    kind: str
    original: int
    content: bytes


def cut_tiles(photographs: Sequence[Image.Image]) -> list[Image.Image]:
    """Return tiles that don't overlap."""
    width, height = TILE
    return [
        photo.crop((left, top, left + width, top + height))
        for photo in photographs
        for top in range(0, photo.height - height + 1, height)
        for left in range(0, photo.width - width + 1, width)
    ]


def make_originals(count: int) -> list[Image.Image]:
    """Return originals: two thirds are tiles, if there are so many, and the rest is drawn."""
    rng = np.random.default_rng(0)
    tiles = cut_tiles(load_different_photographs())
    chosen = np.linspace(0, len(tiles) - 1, min(len(tiles), 2 * count // 3)).astype(int)
    widths = rng.integers(*WIDTHS, count)
    sizes = [(int(width), int(width) * TILE[1] // TILE[0]) for width in widths]
    photos = [
        tiles[tile].resize(size, Image.Resampling.LANCZOS)
        for tile, size in zip(chosen, sizes, strict=False)
    ]
    return photos + [draw_picture(n, sizes[n]) for n in range(len(photos), count)]


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
KINDS = "exact", *COPIES
FLAGGED: dict[str, Callable[[Image.Image], bytes]] = {
    "grey": lambda image: encode(image.convert("L").convert("RGB")),
    "flat_tail": truncate,
    "border": add_border,
}


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
    for number, image in enumerate(make_originals(count)):
        grey = image.mode == "L"
        content = encode(image)
        yield Picture("grey original" if grey else "original", number, content)
        yield Picture("exact", number, content)
        decoded = Image.open(io.BytesIO(content))
        for kind, make in {**COPIES, **(FLAGGED if number % EVERY == 0 else {})}.items():
            if not (grey and kind == "grey"):
                yield Picture(kind, number, make(decoded))
    for number in range(count, count + count // EVERY):
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


def tell_origin(rows: pd.DataFrame) -> pd.DataFrame:
    """Add what the keys say: the kind of picture, and the number of its original."""
    parts = rows["key"].str.rpartition("_")
    return rows.assign(kind=parts[0].astype(str), original=parts[2].astype(int))


def score_groups(rows: pd.DataFrame, found: pd.DataFrame) -> dict[str, float]:
    """Return the share of each kind that is in the group of its original, and of pure groups."""
    grouped = rows.assign(group=found["group"].reindex(rows.index))
    originals = grouped[grouped["kind"].str.endswith("original")].set_index("original")["group"]
    together = grouped["group"].eq(grouped["original"].map(originals)).fillna(False)
    shares = together.groupby(grouped["kind"]).mean()
    sources = grouped.groupby("group")["original"].nunique()
    return {**{kind: shares[kind] for kind in KINDS}, "groups": (sources == 1).mean()}


def score_pairs(rows: pd.DataFrame, by: str, distance: int) -> float:
    """Return which share of the pairs within the distance are copies of one original."""
    rows = rows[~rows["blank"].astype(bool)]
    hashes, originals = rows[by].to_numpy(np.uint64), rows["original"].to_numpy()
    found = right = 0
    for start in range(1, len(hashes)):
        bits = np.bitwise_count(hashes[start - 1] ^ hashes[start:])
        near = bits <= distance
        found += near.sum()
        right += (near & (originals[start:] == originals[start - 1])).sum()
    return right / found


