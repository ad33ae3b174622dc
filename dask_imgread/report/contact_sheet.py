"""Contact sheets: thumbnails of images, in a notebook and in an image file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageDraw

from dask_imgread.decoding.contract import Pixels
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.shards.frames import open_frame
from dask_imgread.tasks import FileGroupTask, ImageBatch, ImageObject, count_images
from dask_imgread.thumbnails import render_images, shrink

_TILE, _LABEL, _GAP = 160, 16, 8
_PAGE = (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    '<meta name="color-scheme" content="light dark"><title>{title}</title></head>'
    '<body style="font-family:system-ui,sans-serif">{html}</body></html>'
)


@dataclass(frozen=True)
class ContactSheet:
    """Thumbnails that a notebook shows; it keeps none of the images.

    Parameters
    ----------
    title
        How many images there are.
    html
        The thumbnails.
    """

    title: str
    html: str = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained HTML page."""
        Path(path).write_text(_PAGE.format(title=escape(self.title), html=self.html), "utf-8")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.title}>"

    def _repr_html_(self) -> str:
        return self.html


def show(what: Any, n: int = 24) -> ContactSheet:
    """Show images in a notebook: thumbnails of those that were read, and why others were not.

    Parameters
    ----------
    what
        An ImageBatch, an ImageObject, a list of these, as ``process`` and ``client.gather`` return
        them, or a pandas or dask DataFrame of rows, as of ``read_metadata``, or the output folder
        of a job. Of a frame the first ``n`` rows are read from their shards, with the options of a
        new reader; pass ``load_images(rows, ...)`` for others. A column ``caption`` is shown, too.
    n
        How many images to show at most. A quarter of the places are for failed ones, if there are
        as many.

    Returns
    -------
    ContactSheet
        A notebook shows it; ``save(path)`` writes it as an HTML page. It keeps none of the
        images.

    Raises
    ------
    TypeError
        If ``what`` is anything else.
    ValueError
        If ``n`` is negative.

    Examples
    --------
    >>> from dask_imgread import FileGroupTask, ImageReaderStage
    >>> from dask_imgread.testing import make_shards
    >>> task = FileGroupTask(data=make_shards("shards", broken=1))
    >>> sheet = show(ImageReaderStage(device="cpu").process(task))
    >>> sheet
    <ContactSheet: 15 images, 1 failed>
    >>> sheet.save("sheet.html")
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, not {n!r}")
    if isinstance(what, str | os.PathLike):
        frame = open_frame(what)
        what = what if frame is None else frame
    if hasattr(what, "get_partition"):
        what = _compute_head(what, n)
    if isinstance(what, pd.DataFrame):
        loading = importlib.import_module("dask_imgread.selection.load")
        what = loading.load_images(what.head(n))
    found = list(_flatten(what))
    images = [
        image
        for item in found
        for image in ([*item.data, *item.failed] if isinstance(item, ImageBatch) else [item])
    ]
    failed = sum(bool(image.error) for image in images)
    skipped = sum(item.skipped for item in found if isinstance(item, ImageBatch))
    title = count_images(len(images) - failed, failed, skipped)
    return ContactSheet(title, render_images(images, n, title))


def _flatten(what: object) -> Iterator[ImageBatch | ImageObject]:
    if isinstance(what, ImageBatch | ImageObject):
        yield what
    elif isinstance(what, list | tuple):
        for item in what:
            yield from _flatten(item)
    else:
        raise TypeError(
            "an ImageBatch, a list of images or of batches, or a DataFrame of rows is expected, "
            f"not {type(what).__name__}"
        )


def _compute_head(frame: Any, n: int) -> pd.DataFrame:
    """Compute no more partitions of a dask DataFrame than have the first ``n`` rows."""
    parts = [frame.get_partition(0).compute()]
    while sum(map(len, parts)) < n and len(parts) < frame.npartitions:
        parts.append(frame.get_partition(len(parts)).compute())
    return pd.concat(parts)


def make_thumbnails(
    task: FileGroupTask, *, reader: ImageReaderStage, count: int
) -> list[tuple[str, Pixels]]:
    """Decode the first ``count`` images of a task; return (key, thumbnail as RGB) for each."""
    images = (image for batch in reader.read(task) for image in batch.data)
    return [
        (image.key, shrink(image.image_data, _TILE))
        for image in islice(images, count)
        if image.image_data is not None
    ]


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
