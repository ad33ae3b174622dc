"""Turn pixels upright, and resize them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dask_imgread.decoding.contract import Pixels

_PIXEL = np.dtype("V3")  # whole pixels are moved at twice the speed of three channels


def turn(pixels: Pixels, orientation: int, out: Pixels) -> None:
    """Copy pixels to ``out``, turned and mirrored as an EXIF orientation from 1 to 8 asks for.

    CIPA DC-008-2019 (Exif 2.32), 4.6.4, tag 274. Both arrays are uint8 ``(height, width, 3)``
    and contiguous.
    """
    turned = pixels.view(_PIXEL)[..., 0]
    if orientation >= 5:
        turned = turned.T
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    out.view(_PIXEL)[..., 0] = turned


def resize(
    pixels: Pixels,
    size: tuple[int, ...],
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    """Resize to ``size`` (height, width) as DALI does: linear, and smoothed where it shrinks.

    ``box`` is the part of the pixels to take: left, upper, right, lower, fractions of a pixel
    included. The result is read-only.
    """
    height, width = size
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
