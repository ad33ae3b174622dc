"""Decode JPEG on the CPU with libjpeg-turbo, into memory that is already allocated.

Through simplejpeg 1.9.0, whose wheels contain libjpeg-turbo 3 and which releases the GIL.
simplejpeg raises an error for whatever libjpeg-turbo warns about.
"""

from __future__ import annotations

import numpy as np
import simplejpeg

from dask_imgread.buffers import take_array
from dask_imgread.decoding.contract import SCALES, Content, DecoderOptions, Header, Pixels
from dask_imgread.decoding.geometry import apply_orientation, resize

# A scaled decoding must stay this much larger than the target size. If it is only slightly larger,
# the resize that follows smooths too little, and the error grows from 46 dB to 35.
_MIN_OVERSIZE = 5 / 3


def decode_jpeg(
    content: Content, header: Header, decoder_options: DecoderOptions, out: Pixels
) -> None:
    """Decode one JPEG, upright and resized, into ``out``.

    Parameters
    ----------
    content
        The whole file.
    header
        Its header.
    decoder_options
        Whether to resize, and whether to decode at 1/2, 1/4 or 1/8 first.
    out
        uint8 ``(height, width, 3)``, contiguous, of the size that ``decoder_options`` choose.

    Raises
    ------
    ValueError
        If libjpeg-turbo refuses the file, or warns about it.
    """
    height, width = header.stored_size
    scale = decoder_options.choose_scale(height, width)
    if decoder_options.resize is None and header.orientation == 1:
        _decode(content, scale, out)
        return
    left, upper, right, lower = decoder_options.choose_box(header.height, header.width)
    target = out.shape[:2]
    if header.orientation >= 5:  # what is mirrored besides has the same box: it is in the middle
        left, upper, right, lower = upper, left, lower, right
        target = target[::-1]
    if decoder_options.resize is not None and decoder_options.scaled_decoding:
        scale = _choose_scale((lower - upper, right - left), target)
    rows, columns = -(-height // scale), -(-width // scale)
    pixels = take_array(np.uint8, rows, columns, 3)
    _decode(content, scale, pixels)
    if decoder_options.resize is not None:
        # The last row and column may lie partly outside of the image.
        box = left / scale, upper / scale, right / scale, lower / scale
        pixels = resize(pixels, target, box, decoder_options.resample)
    apply_orientation(pixels, header.orientation, out)


def _choose_scale(size: tuple[float, float], target: tuple[int, ...]) -> int:
    """Return the largest divisor that leaves enough pixels to resize to the target size."""
    ratio = min(side / target_side for side, target_side in zip(size, target, strict=True))
    return next((scale for scale in SCALES if ratio >= scale * _MIN_OVERSIZE), 1)


def _decode(content: Content, scale: int, out: Pixels) -> None:
    height, width, _ = out.shape
    scaling = {} if scale == 1 else {"min_height": height, "min_width": width, "min_factor": scale}
    decoded = simplejpeg.decode_jpeg(content, "RGB", buffer=out, **scaling)
    if decoded.shape != out.shape:
        raise ValueError(f"decoded to {decoded.shape}, the header says {out.shape}")
