"""Perceptual hashes of images: those of the package ``imagehash`` 4.3.2, bit for bit.

Two images with similar hashes look alike. Such hashes are compared by the number of bits that
differ, and stored as integers of 64 bits, of which the highest is the first of imagehash's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]

_SIDE = 8  # bits in a row, and rows
_DCT_SIDE = 4 * _SIDE


def shrink_for_phash(grey: Image.Image, box: Box) -> Image.Image:
    """Return what ``compute_phashes`` takes of the part of a grey picture that is in a box."""
    return grey.resize((_DCT_SIDE, _DCT_SIDE), Image.Resampling.LANCZOS, box)


def shrink_for_dhash(grey: Image.Image, box: Box) -> Image.Image:
    """Return what ``compute_dhashes`` takes of the part of a grey picture that is in a box."""
    return grey.resize((_SIDE + 1, _SIDE), Image.Resampling.LANCZOS, box)


def compute_phashes(pictures: Sequence[Image.Image]) -> NDArray[np.uint64]:
    """Return for each picture which of its low frequencies are above their median."""
    waves = _transform(np.stack([np.asarray(picture) for picture in pictures]).swapaxes(1, 2))
    waves = _transform(waves[..., :_SIDE].swapaxes(1, 2))[..., :_SIDE]
    low = np.ascontiguousarray(waves).reshape(len(pictures), -1)
    return _pack(low > np.median(low, axis=1, keepdims=True))


def compute_dhashes(pictures: Sequence[Image.Image]) -> NDArray[np.uint64]:
    """Return for each picture where it becomes brighter from left to right."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return _pack(pixels[..., 1:] > pixels[..., :-1])


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
    even, odd = values[..., 2::2].astype(float), values[..., 1:-1:2].astype(float)
    spectrum = np.empty((*values.shape[:-1], _DCT_SIDE // 2 + 1), complex)
    spectrum[..., 0] = 2.0 * values[..., 0]
    spectrum[..., 1:-1].real = even + odd
    spectrum[..., 1:-1].imag = even - odd
    spectrum[..., -1] = 2.0 * values[..., -1]
    waves = np.fft.irfft(spectrum, _DCT_SIDE, norm="forward")
    half = _DCT_SIDE // 2
    first, last = waves[..., 1:half], waves[..., :half:-1]
    cosines, sines = _TWIDDLES[: half - 1], _TWIDDLES[: half - 1 : -1]
    total, difference = cosines * last + sines * first, cosines * first - sines * last
    first[...], last[...] = 0.5 * (total + difference), 0.5 * (total - difference)
    waves[..., half] *= _TWIDDLES[half - 1]
    return waves
