"""Read an image's format, upright size and channels from its first bytes."""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
from typing import NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

from dask_imgread.decoding.contract import Content, DecoderOptions
from dask_imgread.decoding.parsers import parse_jpeg, parse_png, parse_webp

HEAD_BYTES = 4096 - 512  # with its tar header, one page
_ORIENTATION = 0x0112
_MOST_SCANNED = 1 << 33  # pixels, in all scans: some five seconds; ten scans are usual
_FORMATS = {"jpeg2000": "jp2", "ppm": "pnm", "mpo": "jpeg"}  # Pillow's names that are not ours

_IMAGE = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF|GIF8|BM|II[*+]\0|MM\0[*+]|P[1-7]\s"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftyp",
    re.DOTALL,
)
_pillow_limit = threading.Lock()

# Pillow warns of what it could read all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")


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


class ImageError(ValueError):
    """An image can't be read. The message is ``"<cause>: <detail>"``."""


def read_header(content: Content) -> Header:
    """Read an image's header from its bytes, or from the first of them.

    Raises
    ------
    ImageError
        If this is no image that Pillow or DALI knows. The first bytes alone may not do:
        a JPEG's thumbnail can come before its size, and a TIFF's header can stand at its end.
    """
    if not content:
        raise ImageError("empty: 0 bytes")
    for magic, (name, parse) in _PARSERS.items():
        if content[: len(magic)] == magic:
            try:
                parsed = parse(content)
            except (ValueError, struct.error):
                break  # cut short or odd: Pillow has the last word
            width, height, channels, plain, metadata, progressive = parsed
            orientation = _find_orientation(content) if metadata else 1
            if orientation >= 5:
                width, height = height, width
            # A PNG's may stand behind the pixels, and is found only when they are decoded.
            plain &= not (metadata and name == "png")
            return Header(name, width, height, channels, plain, orientation, progressive)
    try:
        return _read_with_pillow(content)
    except ImageError:
        raise
    except Exception as error:  # what Pillow finds out only when it is asked
        raise explain_error(error) from error


def _read_with_pillow(content: Content) -> Header:
    with open_with_pillow(content) as image:
        name = (image.format or "unknown").lower()
        orientation = _read_orientation(image)
        width, height = image.size[::-1] if orientation >= 5 else image.size
        if not width or not height:
            raise ImageError(f"corrupt: {width} x {height} pixels")
        palette = image.palette.mode if image.mode == "P" and image.palette else None
        channels = len(palette or image.getbands())
        progressive = bool(image.info.get("progressive"))
        return Header(
            _FORMATS.get(name, name), width, height, channels, False, orientation, progressive
        )


def check_size(
    content: Content, header: Header, max_pixels: int | None, options: DecoderOptions | None
) -> None:
    """Raise ImageError if an image has more than ``max_pixels``, or goes over them too often.

    What it comes out with counts too: of a picture one pixel wide ``resize`` makes thousands of
    times as many.

    Every scan of a progressive JPEG goes over all pixels, and takes a few bytes of the file: a
    hundred thousand of them would take minutes.
    """
    width, height = header.width, header.height
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, max_pixels is {max_pixels}")
    if max_pixels is not None and options is not None and options.resize is not None:
        rows, columns = options.choose_size(height, width)
        if rows * columns > max_pixels:
            raise ImageError(
                f"too large: resized to {columns} x {rows} pixels, max_pixels is {max_pixels}"
            )
    if header.progressive:
        scans = bytes(content).count(b"\xff\xda")
        if width * height * scans > _MOST_SCANNED:
            raise ImageError(f"too large: {scans} scans of {width} x {height} pixels")


_PARSERS = {
    b"\xff\xd8\xff": ("jpeg", parse_jpeg),
    b"\x89PNG\r\n\x1a\n": ("png", parse_png),
    b"RIFF": ("webp", parse_webp),
}


def _find_orientation(content: Content) -> int:
    try:
        with open_with_pillow(content) as image:
            return _read_orientation(image)
    except ImageError:
        return 1


def _read_orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns it by itself, its size at once
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole picture to look behind it
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata does not break the picture
        return 1
    return orientation if orientation in range(2, 9) else 1


def open_with_pillow(content: Content) -> ImageFile.ImageFile:
    """Open an image with Pillow, reading its header only, whatever its size.

    Raises
    ------
    ImageError
        If Pillow does not know it.
    """
    if not content:
        raise ImageError("empty: 0 bytes")
    try:
        with _pillow_limit:  # the size is compared with our own limit, max_pixels
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(io.BytesIO(content))
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except UnidentifiedImageError:
        if content[4:8] == b"ftyp" and content[8:12] not in (b"avif", b"avis"):
            brand = bytes(content[8:12]).decode("ascii", "replace")
            raise ImageError(f"unsupported codec: an ISO media file of brand {brand!r}") from None
        if _IMAGE.match(content):
            raise ImageError(f"corrupt: no known header in {len(content)} bytes") from None
        raise ImageError(f"not an image: it begins with {bytes(content[:16])!r}") from None
    except Exception as error:  # Pillow's plugins let through whatever struct and zlib raise
        raise explain_error(error) from error


def explain_error(error: Exception) -> ImageError:
    """Turn what Pillow raises into an ImageError with its cause."""
    text = str(error) or type(error).__name__
    cut = ("truncat", "unexpected end", "end of", "not enough", "eof", "unpack requires")
    if any(word in text.lower() for word in cut) or isinstance(error, EOFError):
        return ImageError(f"truncated: {text}")
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return ImageError(f"too large: {text}")
    if isinstance(error, NotImplementedError | KeyError) or "not supported" in text.lower():
        return ImageError(f"unsupported codec: {text}")
    return ImageError(f"corrupt: {type(error).__name__}: {text}")
