"""Read an image's format, upright size and channels from its first bytes."""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

# Read when the module is loaded; what it would print is in the errors already.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

HEAD_BYTES = 4096 - 512  # with its tar header, one page
HEAD_BYTES = 4096 - 512  # with its tar header, one page
_ORIENTATION = 0x0112
_METADATA_BYTES = 1 << 17  # a JPEG's EXIF fills 64 KiB at most, and comes first
_FORMATS = {"jpeg2000": "jp2", "ppm": "pnm", "mpo": "jpeg"}  # Pillow's names that are not ours

# What nvImageCodec and DALI get to see: where both read, their pixels are Pillow's, and what is
# cut short or broken they refuse. Not so the others that they know (nvImageCodec 0.9.0, DALI
# 2.4.0): a truncated BMP, PNM or TIFF comes out half black without an error, some TIFFs with
# wrong colours, and a JPEG 2000 with tiles of no size ends the process.
_FOR_DALI = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
_IMAGE = re.compile(
    rb"GIF8|BM|II[*+]\0|MM\0[*+]|P[1-7]\s|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftyp", re.DOTALL
)
_pillow_limit = threading.Lock()

# Pillow warns of what it could read all the same.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Header(NamedTuple):
    """What an image's first bytes say.

    ``width`` and ``height`` are in pixels and upright: the EXIF orientation is applied.
    ``channels`` is the number stored in the file; a palette counts as the colours in it.
    ``backend`` names what decodes this variant of the format: ``"dali"`` where DALI
    gives Pillow's pixels, else ``"pillow"``.
    """

    format: str
    width: int
    height: int
    channels: int
    backend: str


class ImageError(ValueError):
    """An image can't be read. The message is ``"<cause>: <detail>"``."""


def read_header(content: bytes) -> Header:
    """Read an image's header from its bytes, or from the first of them.

    Raises
    ------
    ImageError
        If this is no image that Pillow or DALI knows. The first bytes alone may not do:
        a JPEG's thumbnail can come before its size, and a TIFF's header can stand at its end.
    """
    if not content:
        raise ImageError("empty: 0 bytes")
    if _FOR_DALI.match(content):
        try:
            stream = nvimgcodec.CodeStream(content)
            width, height, channels = stream.width, stream.height, stream.num_channels
        except (RuntimeError, ValueError):
            pass
        else:
            if width > 0 and height > 0:
                name, plain = stream.codec_name, _is_plain(stream, content)
                return _complete(content, name, width, height, channels, plain)
    with open_with_pillow(content) as image:
        name = (image.format or "unknown").lower()
        width, height = image.size[::-1] if _read_orientation(image) >= 5 else image.size
        palette = image.palette.mode if image.mode == "P" and image.palette else None
        channels = len(palette or image.getbands())
        return Header(_FORMATS.get(name, name), width, height, channels, "pillow")


def _complete(
    content: bytes, name: str, width: int, height: int, channels: int, plain: bool
) -> Header:
    """Add the orientation: DALI applies a JPEG's from EXIF, and Pillow every other."""
    orientation = 1
    if _may_be_turned(content, name):
        try:
            with open_with_pillow(content) as image:
                orientation = _read_orientation(image)
        except ImageError:
            pass
        from_exif = name == "jpeg" and b"tiff:Orientation" not in content[:_METADATA_BYTES]
        # A PNG's may come after its pixels, and is found only when they are decoded.
        plain = plain and (from_exif or (orientation == 1 and name != "png"))
    if orientation >= 5:
        width, height = height, width
    return Header(name, width, height, channels, "dali" if plain else "pillow")


def _may_be_turned(content: bytes, name: str) -> bool:
    """Whether there is EXIF or XMP metadata, in which an orientation can stand."""
    if name == "jpeg":
        return _has_app1(content)
    if name == "png":
        return b"eXIf" in content or b"XML:com.adobe.xmp" in content or b"Raw profile" in content
    return content[12:16] == b"VP8X" and bool(content[20] & 0b1100)


def _has_app1(content: bytes) -> bool:
    """Whether a JPEG has an APP1 segment, the home of EXIF and XMP (ITU T.81, B.1.1)."""
    position, last = 2, len(content) - 4
    while position <= last and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xE1:
            return True
        if marker in (0xDA, 0xC0, 0xC2):  # the picture begins
            return False
        position += 2 + (content[position + 2] << 8) + content[position + 3]
    return False


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


def _is_plain(stream: nvimgcodec.CodeStream, content: bytes) -> bool:
    """Whether DALI 2.4.0 decodes this variant of the format to Pillow's pixels."""
    if stream.codec_name == "jpeg":  # CMYK is rounded otherwise
        return bool(stream.num_channels != 4)
    if stream.codec_name == "png":  # an animation shows another frame, 16 bits are rounded
        return b"acTL" not in content[:_METADATA_BYTES] and stream.precision <= 8
    return True


def open_with_pillow(content: bytes) -> Image.Image:
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
            brand = content[8:12].decode("ascii", "replace")
            raise ImageError(f"unsupported codec: an ISO media file of brand {brand!r}") from None
        if _FOR_DALI.match(content) or _IMAGE.match(content):
            raise ImageError(f"corrupt: no known header in {len(content)} bytes") from None
        raise ImageError(f"not an image: it begins with {content[:16]!r}") from None
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
