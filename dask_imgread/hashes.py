"""Perceptual hashes of images: those of the package ``imagehash`` 4.3.2, bit for bit.

Two images with similar hashes look alike. Such hashes are compared by the number of bits that
differ, and stored as integers of 64 bits, of which the highest is the first of imagehash's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dask_imgread.buffers import take_array
from dask_imgread.decoding.contract import Box, Pixels

Floats = NDArray[np.float64]

_SIDE = 8  # bits in a row, and rows
_DCT_SIDE = 4 * _SIDE
_SIZES = (_DCT_SIDE, _DCT_SIDE), (_SIDE + 1, _SIDE)  # columns and rows
_BAND = 128  # rows that are converted to floats at a time
# Lines of which the weights are kept, and their most pixels. If all lines differ, those of reduced
# pictures take some 50 MB; the longest would take 340.
_KEPT, _KEPT_LENGTH = 1024, 1024

# Of Pillow's resize: how far the filter reaches, and the precision of its weights.
_REACH = 3
_PRECISION = 1 << 22


def shrink(grey: Pixels, box: Box) -> tuple[Floats, Floats]:
    """Return what ``compute_phashes`` and ``compute_dhashes`` take of a grey picture.

    These are its levels at 32 x 32 and at 9 x 8 pixels, as ``resize`` of Pillow 13 computes them
    with the filter Lanczos. Pillow's weights are whole numbers, so that a product of matrices gives
    the same sums. It takes a third of the time for small pictures: the weights are kept, and both
    sizes are computed at once.

    Parameters
    ----------
    grey
        uint8 ``(height, width)``.
    box
        The part of it that counts, in pixels.
    """
    height, width = grey.shape
    across = _weigh((_DCT_SIDE, _SIDE + 1), width, *box[::2])
    down = _weigh((_DCT_SIDE, _SIDE), height, *box[1::2])
    # Between the passes levels are rounded, so that it matters which one is first.
    tall = [height - rows > max(0, 2 * (width - columns)) for columns, rows in _SIZES]
    levels = {
        True: lambda: _multiply(_multiply(grey.T, down).T, across),
        False: lambda: _multiply(_multiply(grey, across).T, down).T,
    }
    both = {first: levels[first]() for first in {*tall}}
    return both[tall[0]][:_DCT_SIDE, :_DCT_SIDE], both[tall[1]][_DCT_SIDE:, _DCT_SIDE:]


def _multiply(levels: Pixels | Floats, weights: Floats) -> Floats:
    # In bands: converted to floats, a large picture would need eight times its memory.
    bands = [levels[n : n + _BAND].astype(float) @ weights for n in range(0, len(levels), _BAND)]
    rounded: Floats = np.floor(np.concatenate(bands) + 0.5).clip(0, 255)
    return rounded


def _weigh(sides: tuple[int, ...], length: int, start: float, stop: float) -> Floats:
    """Return how much each pixel of a line counts for each one of the lines made of it."""
    weigh = _weigh_once if length <= _KEPT_LENGTH else _weigh_once.__wrapped__
    return weigh(sides, length, start, stop)


@functools.lru_cache(_KEPT)
def _weigh_once(sides: tuple[int, ...], length: int, start: float, stop: float) -> Floats:
    return np.hstack([_weigh_for(side, length, start, stop) for side in sides])


def _weigh_for(side: int, length: int, start: float, stop: float) -> Floats:
    scale = (stop - start) / side
    shrinkage = max(scale, 1.0)
    centres = start + (np.arange(side) + 0.5) * scale
    reach = _REACH * shrinkage
    first = np.trunc(centres - reach + 0.5).clip(min=0)
    last = np.trunc(centres + reach + 0.5).clip(max=length)
    pixels = np.arange(length)[:, None]
    distances = (pixels - centres + 0.5) * (1 / shrinkage)
    weights = np.sinc(distances) * np.sinc(distances / _REACH)
    weights[(pixels < first) | (pixels >= last) | (np.abs(distances) > _REACH)] = 0
    weights *= _PRECISION / weights.sum(axis=0)
    rounded: Floats = np.trunc(weights + np.copysign(0.5, weights)) / _PRECISION
    return rounded


def compute_phashes(pictures: Sequence[Floats]) -> NDArray[np.uint64]:
    """Return for each picture which of its low frequencies are above their median."""
    waves = _transform(np.stack(pictures).swapaxes(1, 2))
    waves = _transform(waves[..., :_SIDE].swapaxes(1, 2))[..., :_SIDE]
    low = np.ascontiguousarray(waves).reshape(len(pictures), -1)
    return _pack(low > np.median(low, axis=1, keepdims=True))


def compute_dhashes(pictures: Sequence[Floats]) -> NDArray[np.uint64]:
    """Return for each picture where it becomes brighter from left to right."""
    levels = np.stack(pictures)
    return _pack(levels[..., 1:] > levels[..., :-1])


def _pack(bits: NDArray[np.bool_]) -> NDArray[np.uint64]:
    packed = np.packbits(bits.reshape(len(bits), -1), axis=1)
    return packed.view(">u8").ravel().astype(np.uint64)


def _make_twiddles() -> NDArray[np.float64]:
    """Return cos(k pi / 64) for k from 1 to 31, rounded as pocketfft rounds them.

    From 16 on it multiplies complex numbers, of which one has the cosine of 45 degrees from the
    sine, and the sine from the cosine.
    """
    angles = [k * math.pi / (2 * _DCT_SIDE) for k in range(16)]
    cosine, sine = math.sin(math.pi / 4), math.cos(math.pi / 4)
    first = [math.cos(angle) for angle in angles]
    second = [math.cos(angle) * cosine - math.sin(angle) * sine for angle in angles]
    return np.array([*first[1:], *second])


_TWIDDLES = _make_twiddles()


def _transform(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine transforms (type 2, as SciPy scales it) of 32 values each.

    Many frequencies of a drawn picture are zero but for rounding, and whether they are above the
    median depends on it. So this takes the steps of pocketfft, the library of SciPy and NumPy,
    which reduces the transform to a Fourier transform. Another way to the same numbers, such as a
    product of matrices, gives such pictures other hashes.
    """
    even, odd = values[..., 2::2], values[..., 1:-1:2]
    lines = values.shape[:-1]
    spectrum = take_array(complex, *lines, _DCT_SIDE // 2 + 1)
    np.multiply(values[..., :1], 2.0, out=spectrum[..., :1])
    np.add(even, odd, out=spectrum[..., 1:-1].real)
    np.subtract(even, odd, out=spectrum[..., 1:-1].imag)
    np.multiply(values[..., -1:], 2.0, out=spectrum[..., -1:])
    waves = np.fft.irfft(
        spectrum, _DCT_SIDE, norm="forward", out=take_array(float, *lines, _DCT_SIDE)
    )
    half = _DCT_SIDE // 2
    first, last = waves[..., 1:half], waves[..., :half:-1]
    cosines, sines = _TWIDDLES[: half - 1], _TWIDDLES[: half - 1 : -1]
    total, difference, part = take_array(float, 3, *first.shape)
    np.multiply(cosines, last, out=total)
    total += np.multiply(sines, first, out=part)
    np.multiply(cosines, first, out=difference)
    difference -= np.multiply(sines, last, out=part)
    np.multiply(np.add(total, difference, out=part), 0.5, out=first)
    np.multiply(np.subtract(total, difference, out=part), 0.5, out=last)
    waves[..., half] *= _TWIDDLES[half - 1]
    return waves
