"""Contact sheets: thumbnails of the images that were read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from math import ceil

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from dask_imgread.decoding.contract import Pixels
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.tasks import FileGroupTask

_TILE, _LABEL, _GAP = 160, 16, 8


def make_thumbnails(
    task: FileGroupTask, *, reader: ImageReaderStage, count: int
) -> list[tuple[str, Pixels]]:
    """Decode the first ``count`` images of a task; return (key, thumbnail as RGB) for each."""
    images = (image for batch in reader.read(task) for image in batch.data)
    return [(image.key, _shrink(image.image_data)) for image in islice(images, count)]


def _shrink(pixels: Pixels | None) -> Pixels:
    assert pixels is not None
    return np.asarray(ImageOps.contain(Image.fromarray(pixels), (_TILE, _TILE)))


def draw_contact_sheet(
    thumbnails: Iterable[tuple[str, Pixels]], path: str | os.PathLike[str], columns: int = 6
) -> None:
    """Save a sheet of thumbnails, each with its key under it, as an image file."""
    tiles = list(thumbnails)
    rows = max(1, ceil(len(tiles) / columns))
    cell, height = _TILE + _GAP, _TILE + _LABEL + _GAP
    sheet = Image.new("RGB", (columns * cell + _GAP, rows * height + _GAP), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for number, (label, pixels) in enumerate(tiles):
        left, top = _GAP + number % columns * cell, _GAP + number // columns * height
        image = Image.fromarray(pixels)
        sheet.paste(image, (left + (_TILE - image.width) // 2, top + (_TILE - image.height) // 2))
        short = label if len(label) <= 24 else "…" + label[-23:]
        draw.text((left + _TILE // 2, top + _TILE + 2), short, fill=(70, 70, 70), anchor="ma")
    sheet.save(path)
