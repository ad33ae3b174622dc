"""Decode JPEG on the CPU with libjpeg-turbo, into memory that is there already.

Through simplejpeg 1.9.0, whose wheels carry libjpeg-turbo 3 and which releases the interpreter
lock. It refuses whatever libjpeg-turbo warns of.
"""

from __future__ import annotations

import simplejpeg

from dask_imgread.decoding.buffers import BUFFERS
from dask_imgread.decoding.contract import Content, DecoderOptions, Header, Pixels
from dask_imgread.decoding.geometry import resize, turn

# libjpeg-turbo has fast code for these; at other eighths it is slower than at full size.
_SCALES = (8, 4, 2)
# What it leaves is to be so much larger than what is wanted: of a picture that is hardly larger,
# too little is left to be smoothed, and the error grows from 46 dB to 35.
_LEFT = 5 / 3


def decode_jpeg(content: Content, header: Header, options: DecoderOptions, out: Pixels) -> None:
    """Decode one JPEG, upright and resized, into ``out``.

    Parameters
    ----------
    content
        The whole file.
    header
        What its header says.
    options
        Whether to resize, and whether to decode at 1/2, 1/4 or 1/8 on the way.
    out
        uint8 ``(height, width, 3)``, contiguous, of the size that ``options`` choose.

    Raises
    ------
    ValueError
        If libjpeg-turbo refuses it, or warns of anything.
    """
    height, width = header.stored_size
    if options.resize is None and header.orientation == 1:
        _decode(content, 1, out)
        return
    wanted = out.shape[:2] if header.orientation < 5 else out.shape[1::-1]
    scale = 1
    if options.resize is not None and options.scaled_decoding:
        scale = _choose_scale((height, width), wanted)
    rows, columns = -(-height // scale), -(-width // scale)
    pixels = BUFFERS.take(rows * columns * 3).reshape(rows, columns, 3)
    _decode(content, scale, pixels)
    if options.resize is not None:
        # Of the last row and column a part may lie outside of the picture.
        pixels = resize(pixels, wanted, box=(0, 0, width / scale, height / scale))
    turn(pixels, header.orientation, out)


def _choose_scale(size: tuple[int, int], wanted: tuple[int, ...]) -> int:
    """Return by how much to divide a size, so that enough is left to be resized."""
    least = min(side / target for side, target in zip(size, wanted, strict=True))
    return next((scale for scale in _SCALES if least >= scale * _LEFT), 1)


def _decode(content: Content, scale: int, out: Pixels) -> None:
    height, width, _ = out.shape
    options = {} if scale == 1 else {"min_height": height, "min_width": width, "min_factor": scale}
    decoded = simplejpeg.decode_jpeg(content, "RGB", buffer=out, **options)
    if decoded.shape != out.shape:
        raise ValueError(f"decoded to {decoded.shape}, the header says {out.shape}")
