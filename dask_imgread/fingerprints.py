"""Fingerprints of images: by which to find duplicates, and pictures that are of no use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from dask_imgread.buffers import take_array
from dask_imgread.decoding.contract import SCALES, Box, Pixels
from dask_imgread.hashes import (
    Floats,
    compute_dhashes,
    compute_phashes,
    shrink,
)
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.tasks import CHECKSUM, COLUMNS, ImageBatch, ImageObject, make_index

# Pixels of the shorter side. With 128 as many hashes of photographs differ from the exact ones in
# more than 2 bits; only with 192 do fewer, and then most pictures of 0.2 megapixels stay whole.
MIN_SIDE = 64

_GRID = 64  # pixels in a row, and rows, that stand for a picture
_SHARP_SIDE = 64  # pixels, no more than MIN_SIDE: what was reduced is not enlarged
_LUMA = 256  # levels
_KEPT = 256  # sizes of pictures whose places are kept

# Levels of 0 to 255. JPEG at low quality, and the rounding of its colours, change a picture of one
# colour by 2 or 3; scans and photographs of paper vary by more than 10.
BLANK_RANGE = 8
# Levels between the channels of one pixel. A grey picture that was saved with colours has up to 3;
# sepia has some 30.
GREY_RANGE = 8
# Levels by which the pixels of a margin may differ from its corner: those of BLANK_RANGE would let
# an evenly lit wall or sky pass for a margin.
MARGIN_RANGE = 3
# Of the height. A decoder that has no more data leaves whole rows of blocks, 16 pixels each.
TAIL_SHARE = 1 / 16
# Of the columns. The rest are those where the picture above has the colour of the tail, or where
# JPEG has blurred its edge. With less, hills and round things in drawings pass for tails.
STRAIGHT_SHARE = 0.8
# Of the width or height, on either side: less is a thin line, or chance.
BORDER_SHARE = 1 / 32

_IDENTITY = (
    *("shard", "shard_version", "key", "offset", "size", "sample_offset", "sample_size"),
    *("format", "width", "height"),
)
_TYPES = {
    **{name: COLUMNS[name] for name in _IDENTITY},
    CHECKSUM: "string[pyarrow]",
    **dict.fromkeys(("phash", "dhash"), "uint64[pyarrow]"),
    **dict.fromkeys(
        ("brightness", "spread", "contrast", "entropy", "colourfulness", "sharpness"),
        "float[pyarrow]",
    ),
    **dict.fromkeys(("blank", "grey", "flat_tail", "border"), "bool[pyarrow]"),
}


def fingerprint(batch: ImageBatch) -> pd.DataFrame:
    """Return hashes and measures of each image, by which to find duplicates and useless pictures.

    A function for ``map_images`` and ``run_job``, to be given with its reader, which decodes large
    JPEGs at 1/2, 1/4 or 1/8: ``map_images(fingerprint, shards, reader=fingerprint.reader)``. Then
    pictures of 0.2 megapixels take 1.3 times as long as if they were only decoded, at full size,
    and those of 3 or 12 megapixels 0.8 times as long. The rows are such as ``load_images``,
    ``write_shards`` and ``map_images`` take. A reader of your own needs ``checksum=True`` for
    ``sha256``; one without ``min_side`` decodes whole pictures, of which the hashes are exact:
    ``fingerprint.reader.with_options(min_side=None)``.

    Parameters
    ----------
    batch
        The images, decoded to host memory.

    Returns
    -------
    pandas.DataFrame
        A row for each image that was read, indexed by ``image_id``, with these columns. The types
        are those of ``fingerprint.meta``.

        shard, shard_version, key, offset, size, sample_offset, sample_size, format, width, height
            As in metadata.
        sha256
            The SHA-256 of the encoded bytes; null if the reader does not compute it.
        phash, dhash
            Perceptual hashes of 64 bits: ``phash`` and ``dhash`` of the package imagehash 4.3.2,
            ``format(value, "016x")`` being its text. ``phash`` has the signs, about their median,
            of the 8 x 8 lowest frequencies of the grey picture of 32 x 32 pixels. ``dhash`` says
            where the grey picture of 9 x 8 pixels becomes brighter from left to right.
        brightness, spread
            Mean and standard deviation of the luma (ITU-R BT.601, as ``convert("L")`` of Pillow
            computes it), in levels from 0 to 255.
        contrast
            The range from the 1st to the 99th percentile of the luma, as a share of 255, by which
            ``skimage.exposure.is_low_contrast`` judges: below 0.05 it is low.
        entropy
            That of the histogram of the luma (Shannon 1948), in bits, from 0 to 8.
        colourfulness
            Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003), their
            measure in RGB: from 0 for grey to some 110 for extremely colourful. Computed from 64 x
            64 pixels of the picture, evenly spread and not averaged.
        sharpness
            The variance of the Laplacian (Pech-Pacheco and others, "Diatom autofocusing in
            brightfield microscopy", 2000), with the kernel of four neighbours, of the luma resized
            to 64 x 64 pixels, so that sizes compare; in squared levels. It shows whether a
            picture has detail that can be seen in a thumbnail, and not fine blur.
        blank
            The picture is of one colour: levels differ by at most ``BLANK_RANGE``.
        grey
            The picture has no colours: the channels of a pixel differ by at most ``GREY_RANGE``.
        flat_tail
            The lower part, at least ``TAIL_SHARE`` of the height, is of one colour, the upper
            edge is not of the same, and the part ends straight, with one step at most: so it is
            after a truncated download that was decoded without an error and saved again. So it is
            in drawings with a straight ground, too. Not of blank pictures.
        border
            Margins of one colour, at least ``BORDER_SHARE`` of the side, lie left and right, or
            above and below, or all around. Not of blank pictures.

        The flags but ``blank`` look at 64 x 64 pixels of the picture, evenly spread and not
        averaged, and so overlook what is smaller than their distance.

    Raises
    ------
    ValueError
        If an image has no pixels, or they are in a GPU's memory.

    Notes
    -----
    Hashes of scaled pictures are mostly equal to those of whole ones. Of 3,500 crops of
    photographs, of 250 to 640 pixels a side, some of them enlarged threefold, 99.5 % had a
    ``phash`` within 2 bits of the exact one, and as many a ``dhash``; all were within 6. Of 300
    drawn pictures 99.7 % had such a ``phash``, and 90 % such a ``dhash``, all within 6: where a
    picture is even, rounding decides which of two pixels is brighter.

    The measures are those of the pixels that were decoded. Pixels that are means of others vary
    less than these, so that ``spread`` and ``contrast`` are lower by some 3 % in scaled pictures.

    Examples
    --------
    >>> from dask_imgread import map_images
    >>> from dask_imgread.testing import make_shards
    >>> frame = map_images(fingerprint, make_shards("shards"), reader=fingerprint.reader)
    >>> rows = frame.compute(scheduler="sync")
    >>> rows.blank.any(), rows.phash.map("{:016x}".format).str.len().unique().tolist()
    (False, [16])
    """
    if not batch.data:
        return META
    samples = [_take_sample(image) for image in batch.data]
    # Channel by channel: NumPy is slow at reductions of three values.
    grids = take_array(np.uint8, 3, len(samples), _GRID, _GRID)
    np.stack([sample.grid for sample in samples], out=np.moveaxis(grids, 0, 3))
    histograms = np.array([sample.histogram for sample in samples])
    columns: dict[str, Any] = {
        CHECKSUM: [image.sha256 for image in batch.data],
        "phash": compute_phashes([sample.for_phash for sample in samples]),
        "dhash": compute_dhashes([sample.for_dhash for sample in samples]),
        **_measure_luma(histograms),
        "colourfulness": _measure_colourfulness(grids),
        "sharpness": _measure_sharpness([sample.grey for sample in samples]),
        **_find_flags(grids, histograms),
    }
    columns |= {name: [getattr(image, name) for image in batch.data] for name in _IDENTITY}
    arrays = {name: pd.array(columns[name], dtype=dtype) for name, dtype in _TYPES.items()}
    return pd.DataFrame(arrays, index=make_index(batch.data))


META = pd.DataFrame(
    {name: pd.array([], dtype=dtype) for name, dtype in _TYPES.items()}, index=make_index([])
)
fingerprint.meta = META  # type: ignore[attr-defined]
fingerprint.reader = ImageReaderStage(  # type: ignore[attr-defined]
    min_side=MIN_SIDE, checksum=True, sidecars=False
)


class _Sample(NamedTuple):
    """What is taken of a picture: of a size that does not depend on the picture's."""

    for_phash: Floats
    for_dhash: Floats
    grey: Pixels
    grid: Pixels
    histogram: list[int]


def _take_sample(image: ImageObject) -> _Sample:
    grey = image.to_pil().convert("L")
    pixels: Any = image.image_data
    # Moving whole pixels is twice as fast as moving three channels.
    places = _find_places(*grey.size)
    grid = np.ascontiguousarray(pixels).view("V3").ravel().take(places).view(np.uint8)
    side = (_SHARP_SIDE, _SHARP_SIDE)
    box = _find_box(image, grey.size)
    return _Sample(
        *shrink(np.asarray(grey), box),
        np.asarray(grey.resize(side, Image.Resampling.BOX, box)),
        grid.reshape(_GRID, _GRID, 3),
        grey.histogram(),
    )


def _find_box(image: ImageObject, size: tuple[int, int]) -> Box:
    """Return the part of the pixels that the picture fills.

    Of one that was decoded at a scale, the last row and column may lie partly outside of it.
    """
    whole = image.width or size[0], image.height or size[1]
    for scale in SCALES:
        if size == (-(-whole[0] // scale), -(-whole[1] // scale)):
            return 0, 0, whole[0] / scale, whole[1] / scale
    return 0, 0, *size


@functools.lru_cache(_KEPT)
def _find_places(width: int, height: int) -> NDArray[np.intp]:
    """Return the places of ``_GRID`` x ``_GRID`` pixels, evenly spread from corner to corner."""
    steps = np.arange(_GRID)
    rows, columns = (steps * (side - 1) // (_GRID - 1) for side in (height, width))
    return rows[:, None] * width + columns


def _measure_luma(histograms: NDArray[np.int64]) -> dict[str, NDArray[np.floating]]:
    levels = np.arange(_LUMA)
    shares = histograms / histograms.sum(axis=1, keepdims=True)
    mean = shares @ levels
    variance = (shares * (levels - mean[:, None]) ** 2).sum(axis=1)
    low, high = (_find_percentile(histograms, share) for share in (0.01, 0.99))
    logarithms = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return {
        "brightness": mean,
        "spread": np.sqrt(variance),
        "contrast": (high - low) / (_LUMA - 1),
        "entropy": np.abs((shares * logarithms).sum(axis=1)),
    }


def _find_percentile(histograms: NDArray[np.int64], share: float) -> NDArray[np.floating]:
    """Return for each histogram the level below which a share of the pixels is.

    Between two pixels it is interpolated, as by ``np.percentile``.
    """
    totals = histograms.cumsum(axis=1)
    place = share * (totals[:, -1:] - 1)
    below = (totals <= np.floor(place)).sum(axis=1)
    above = (totals <= np.ceil(place)).sum(axis=1)
    level: NDArray[np.floating] = below + (above - below) * (place % 1)[:, 0]
    return level


# Red against green, and yellow against blue.
_OPPONENTS = np.array([[1, -1, 0], [0.5, 0.5, -1]], np.float32)
_EVEN = np.full(_GRID**2, 1 / _GRID**2, np.float32)


def _measure_colourfulness(grids: Pixels) -> NDArray[np.floating]:
    count = grids.shape[1]
    levels = take_array(np.float32, count, 3, _GRID**2)
    levels[...] = grids.reshape(3, count, -1).swapaxes(0, 1)
    opponents = np.matmul(_OPPONENTS, levels, out=take_array(np.float32, count, 2, _GRID**2))
    means = opponents @ _EVEN  # faster than the method mean
    opponents -= means[..., None]
    variances = np.einsum("ijk,ijk->i", opponents, opponents) / _GRID**2
    measures: NDArray[np.floating] = np.sqrt(variances) + 0.3 * np.linalg.norm(means, axis=1)
    return measures


def _measure_sharpness(greys: Sequence[Pixels]) -> NDArray[np.floating]:
    levels = np.stack(greys, out=take_array(np.float32, len(greys), _SHARP_SIDE, _SHARP_SIDE))
    inner = levels[:, 1:-1, 1:-1]
    laplacians = np.multiply(inner, -4, out=take_array(np.float32, *inner.shape))
    for neighbours in (
        levels[:, :-2, 1:-1],
        levels[:, 2:, 1:-1],
        levels[:, 1:-1, :-2],
        levels[:, 1:-1, 2:],
    ):
        laplacians += neighbours
    laplacians -= laplacians.mean(axis=(1, 2), keepdims=True)
    squares = np.einsum("ijk,ijk->i", laplacians, laplacians)
    variances: NDArray[np.floating] = squares / inner[0].size
    return variances


def _find_flags(grids: Pixels, histograms: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    levels = grids.reshape(3, -1, _GRID**2)
    ranges = levels.max(axis=2) - levels.min(axis=2)
    present = histograms > 0
    luma_ranges = _LUMA - 1 - present[:, ::-1].argmax(axis=1) - present.argmax(axis=1)
    blank = (ranges.max(axis=0) <= BLANK_RANGE) & (luma_ranges <= BLANK_RANGE)
    # Few pictures have an edge of one colour, and only these are looked at as a whole.
    edged = _have_edges(grids)
    tails, borders = np.zeros_like(blank), np.zeros_like(blank)
    tails[edged], borders[edged] = _find_margins(grids[:, edged])
    return {
        "blank": blank,
        "grey": (levels.max(axis=0) - levels.min(axis=0)).max(axis=1) <= GREY_RANGE,
        "flat_tail": tails & ~blank,
        "border": borders & ~blank,
    }


def _have_edges(grids: Pixels) -> NDArray[np.bool_]:
    """Return of which pictures the first or last row or column is of one colour."""
    edges = [grids[..., 0, :], grids[..., -1, ::-1], grids[..., 0], grids[..., ::-1, -1]]
    close = [_are_close(edge, edge[..., :1]).all(axis=1) for edge in edges]
    edged: NDArray[np.bool_] = np.logical_or.reduce(close)
    return edged


def _find_margins(grids: Pixels) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which pictures have a flat tail, and which have a border."""
    first, last = grids[..., :1, :1], grids[..., -1:, -1:]
    like_first, like_last = _are_close(grids, first), _are_close(grids, last)
    top, left = (_count_margin(like_first, axis) for axis in (1, 2))
    bottom, right = (_count_margin(like_last[:, ::-1, ::-1], axis) for axis in (1, 2))
    margins = np.maximum(np.minimum(top, bottom), np.minimum(left, right))
    alike = _are_close(first, last).ravel()
    tails = bottom >= TAIL_SHARE * _GRID
    tails[tails] = _end_straight(like_last[tails, ::-1])
    return tails & ~(alike & (top > 0)), alike & (margins >= BORDER_SHARE * _GRID)


def _are_close(colours: Pixels, other: Pixels) -> NDArray[np.bool_]:
    differences = np.maximum(colours, other) - np.minimum(colours, other)
    close: NDArray[np.bool_] = differences.max(axis=0) <= MARGIN_RANGE
    return close


def _count_margin(close: NDArray[np.bool_], axis: int) -> NDArray[np.integer]:
    """Return how many rows (axis 1) or columns (2) are true throughout, up to one that is not."""
    lines = np.logical_and.reduce(close, axis=3 - axis)
    count: NDArray[np.integer] = np.logical_and.accumulate(lines, axis=1).sum(axis=1)
    return count


def _end_straight(close: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where what is true from the first row on ends in a line with one step at most."""
    heights = np.sort(np.logical_and.accumulate(close, axis=1).sum(axis=1))
    # Without the outermost eighths, which are strays: a step in one of them is none.
    levels = heights[:, [_GRID // 8, -1 - _GRID // 8]]
    near = np.abs(heights[..., None] - levels[:, None]) <= 1
    straight: NDArray[np.bool_] = near.any(axis=2).mean(axis=1) >= STRAIGHT_SHARE
    return straight
