"""What decoders are told, what they are given, and what they give back."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]
Content: TypeAlias = bytes | memoryview  # of an encoded file


class DecoderOptions(NamedTuple):
    """What a decoder is made for: decoders with equal options can stand in for each other."""

    device: str  # "cpu" or "gpu"
    num_threads: int
    batch_size: int
    resize: int | tuple[int, int] | None = None  # shorter side, or (height, width)
    output: str = "host"  # or "device": the arrays stay where they were decoded
    decoder: str = "auto"  # or "dali": on a CPU too
    scaled_decoding: bool = True

    def choose_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that an upright image of this size comes out with."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short = min(height, width)
        # A half is rounded up, as DALI does it.
        rows, columns = (
            (2 * side * self.resize + short) // (2 * short) for side in (height, width)
        )
        return rows, columns


class Header(NamedTuple):
    """What an image's first bytes say.

    ``width`` and ``height`` are in pixels and upright: the EXIF orientation is applied.
    ``channels`` is the number stored in the file; a palette counts as the colours in it.
    ``plain`` says that this is a whole JPEG, PNG or WebP that every decoder reads alike, with the
    same pixels but for the orientation. ``orientation`` is EXIF's, from 1 to 8, where the
    stored pixels are to be turned by it. ``progressive`` says that a JPEG's pixels come in any
    number of scans.
    """

    format: str
    width: int
    height: int
    channels: int
    plain: bool
    orientation: int = 1
    progressive: bool = False

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width before the orientation is applied."""
        size = self.height, self.width
        return size if self.orientation < 5 else size[::-1]


class Encoded(NamedTuple):
    """An image that is to be decoded."""

    name: str  # for log records
    content: Content
    header: Header
    backend: str  # what is to decode it: "libjpeg-turbo", "dali-gpu", "dali-cpu" or "pillow"

    def count_bytes(self, options: DecoderOptions) -> int:
        """Return how many bytes this takes while its batch is in memory.

        DALI resizes a batch once all of it is decoded, the others each picture by itself.
        """
        height, width = self.header.height, self.header.width
        if options.resize is None:
            return 3 * height * width
        rows, columns = options.choose_size(height, width)
        before = 3 * height * width if self.backend.startswith("dali") else len(self.content)
        return max(3 * rows * columns, before)


class PendingDecoding(Protocol):
    """A batch on its way through the decoders."""

    def result(self) -> list[Decoded]:
        """Return what became of each image, in order."""


class Decoded(NamedTuple):
    """The pixels of one image and what decoded it, or the error.

    Of an error its text: an exception's traceback would hold on to the batch's memory.
    """

    pixels: Pixels | None
    backend: str | None = None
    error: str | None = None
