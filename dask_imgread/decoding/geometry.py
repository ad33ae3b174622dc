"""Apply an EXIF orientation to pixels, resize and reduce them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dask_imgread.decoding.contract import Box, Pixels

_PIXEL = np.dtype("V3")  # moving whole pixels is twice as fast as moving three channels


def apply_orientation(pixels: Pixels, orientation: int, out: Pixels) -> None:
    """Copy pixels to ``out``, rotated and mirrored by an EXIF orientation from 1 to 8.

    CIPA DC-008-2019 (Exif 2.32), 4.6.4, tag 274. Both arrays are uint8 ``(height, width, 3)``
    and contiguous.
    """
    upright = pixels.view(_PIXEL)[..., 0]
    if orientation >= 5:
        upright = upright.T
    if orientation in (2, 3, 6, 7):
        upright = upright[:, ::-1]
    if orientation in (3, 4, 7, 8):
        upright = upright[::-1]
    out.view(_PIXEL)[..., 0] = upright


def resize(
    pixels: Pixels,
    size: tuple[int, ...],
    box: Box | None = None,
    resample: str = "bilinear",
) -> Pixels:
    """Resize to ``size`` (height, width) as DALI does: antialiased where it shrinks.

    ``box`` is the region to take, in fractions of a pixel if need be. The result is read-only.
    """
    height, width = size
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((width, height), Image.Resampling[resample.upper()], box))


def reduce(pixels: Pixels, scale: int) -> Pixels:
    """Replace squares of ``scale`` x ``scale`` pixels by their means, as a JPEG decoded at 1/8 has.

    The last row and column are the means of what is left. The result is read-only.
    """
    return np.asarray(Image.fromarray(pixels).reduce(scale))
