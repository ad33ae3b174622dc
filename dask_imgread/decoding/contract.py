"""The types that decoders share: their options, what they are given and what they return."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]
Content: TypeAlias = bytes | memoryview  # of an encoded file
Box: TypeAlias = tuple[float, float, float, float]  # left, upper, right, lower

# libjpeg-turbo has fast code for these; other eighths are slower than full size.
SCALES = (8, 4, 2)


class DecoderOptions(NamedTuple):
    """What a decoder is built with. Decoders with equal options are interchangeable."""

    device: str  # "cpu" or "gpu"
    num_threads: int
    batch_size: int
    resize: int | tuple[int, int] | None = None  # a side, or (height, width)
    output: str = "host"  # or "device": the arrays stay where they were decoded
    decoder: str = "auto"  # or "dali": DALI on a CPU too
    scaled_decoding: bool = True
    min_side: int | None = None  # reduce by one of SCALES to no less than that
    fit: str = "auto"  # or "shorter", "exact", "crop"
    resample: str = "bilinear"  # the filter; in lower case what Pillow calls it

    @property
    def on_device(self) -> bool:
        """Whether pixels stay in the GPU's memory."""
        return self.device == "gpu" and self.output == "device"

    @property
    def target(self) -> tuple[int, int] | None:
        """The height and width to which all images are resized; None if theirs differ."""
        if isinstance(self.resize, int):
            return (self.resize, self.resize) if self.fit in ("exact", "crop") else None
        return self.resize

    def choose_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the output height and width of an upright image of this size."""
        if self.target is not None:
            return self.target
        if not isinstance(self.resize, int):
            scale = self.choose_scale(height, width)
            return -(-height // scale), -(-width // scale)
        short = min(height, width)
        # Halves are rounded up, as in DALI.
        rows, columns = (
            (2 * side * self.resize + short) // (2 * short) for side in (height, width)
        )
        return rows, columns

    def choose_box(self, height: int, width: int) -> Box:
        """Return the region of an upright image of this size that is resized.

        To crop, it is computed step by step as in ``ImageOps.fit``, whose pixels it gives.
        """
        if self.target is None or self.fit != "crop":
            return 0, 0, width, height
        rows, columns = self.target
        aspect = columns / rows
        if width / height > aspect:
            taken = aspect * height
            left = (width - taken) * 0.5
            return left, 0, left + taken, height
        if width / height < aspect:
            taken = width / aspect
            upper = (height - taken) * 0.5
            return 0, upper, width, upper + taken
        return 0, 0, width, height

    def choose_scale(self, height: int, width: int) -> int:
        """Return by what an image of this size is to be divided for ``min_side``; 1 without it."""
        if self.min_side is None:
            return 1
        short = min(height, width)
        return next((scale for scale in SCALES if short >= scale * self.min_side), 1)


class Header(NamedTuple):
    """What an image's header says.

    Attributes
    ----------
    format
        Such as ``"jpeg"``.
    width, height
        In pixels, with the EXIF orientation applied.
    channels
        As stored in the file; for a palette, the channels of its colours.
    unambiguous
        Whether this is a complete JPEG, PNG or WebP for which all decoders give the same pixels,
        before the orientation is applied.
    orientation
        The EXIF orientation, from 1 to 8, that is still to be applied to the stored pixels.
    progressive
        Whether this is a JPEG whose pixels may be spread over any number of scans.
    """

    format: str
    width: int
    height: int
    channels: int
    unambiguous: bool
    orientation: int = 1
    progressive: bool = False

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width before the orientation is applied."""
        size = self.height, self.width
        return size if self.orientation < 5 else size[::-1]


class Encoded(NamedTuple):
    """An image to decode."""

    name: str  # for log records
    content: Content
    header: Header
    backend: str  # the decoder to use: "libjpeg-turbo", "dali-gpu", "dali-cpu" or "pillow"

    def count_bytes(self, decoder_options: DecoderOptions) -> int:
        """Return how many bytes this image takes while its batch is in memory.

        DALI keeps a whole batch at full size before it resizes; the other decoders resize image
        by image.
        """
        height, width = self.header.height, self.header.width
        rows, columns = decoder_options.choose_size(height, width)
        if (rows, columns) == (height, width) and decoder_options.resize is None:
            return 3 * height * width
        before = 3 * height * width if self.backend.startswith("dali") else len(self.content)
        return max(3 * rows * columns, before)


class PendingDecoding(Protocol):
    """A batch that is being decoded."""

    def result(self) -> list[Decoded]:
        """Wait, and return an entry for each image, in order."""


class Decoded(NamedTuple):
    """The pixels of one image and the decoder that produced them, or an error message.

    Not the exception itself: its traceback would keep the batch's memory alive.
    """

    pixels: Pixels | None
    backend: str | None = None
    error: str | None = None
