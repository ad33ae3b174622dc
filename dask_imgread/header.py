"""Read an image's format, upright size and channels from its first bytes."""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

# Read when the module is loaded; what it would print is in the errors already.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

HEAD_BYTES = 4096 - 512  # with its tar header, one page
_ORIENTATION = 0x0112
_FORMATS = {"jpeg2k": "jp2", "jpeg2000": "jp2", "ppm": "pnm", "mpo": "jpeg"}
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM|II\*\0|MM\0\*|II\+\0|MM\0\+|P[1-6]\s"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
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
    if _MAGIC.match(content):
        try:
            stream = nvimgcodec.CodeStream(content)
            width, height, channels = stream.width, stream.height, stream.num_channels
        except (RuntimeError, ValueError):
            pass
        else:
            name = _FORMATS.get(stream.codec_name, stream.codec_name)
            if width and height:
                turned, usual = _find_orientation(content, name)
                size = (height, width) if turned else (width, height)
                backend = "dali" if usual and _is_plain(stream, name) else "pillow"
                return Header(name, *size, channels, backend)
    with open_with_pillow(content) as image:
        name = (image.format or "unknown").lower()
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        size = image.size[::-1] if turned else image.size
        palette = image.palette.mode if image.mode == "P" and image.palette else None
        channels = len(palette or image.getbands())
        return Header(_FORMATS.get(name, name), *size, channels, "pillow")


def _is_plain(stream: nvimgcodec.CodeStream, name: str) -> bool:
    """Whether DALI decodes this to Pillow's pixels (all variants compared, DALI 2.4.0)."""
    if name not in ("tiff", "jp2"):
        return True
    kind = (stream.color_spec, stream.num_channels)
    srgb, grey = nvimgcodec.ColorSpec.SRGB, nvimgcodec.ColorSpec.GRAY
    return kind in ((srgb, 3), (srgb, 4), (grey, 1))


def _find_orientation(content: bytes, name: str) -> tuple[bool, bool]:
    """Return whether width and height change places, and whether DALI turns it as Pillow does."""
    if name == "jpeg":
        marked = b"Exif\0\0" in content[: 1 << 17]
        if not marked and b"tiff:Orientation" not in content[: 1 << 17]:
            return False, True
    elif name == "png":
        if b"eXIf" not in content and b"XML:com.adobe.xmp" not in content:
            return False, True
    elif name == "webp":
        if content[12:16] != b"VP8X" or not content[20] & 0b1100:  # neither EXIF nor XMP
            return False, True
    elif name != "tiff":
        return False, True
    try:
        with open_with_pillow(content) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
    except ImageError:
        return False, True
    plain = orientation in (0, 1) or (name == "jpeg" and b"tiff:Orientation" not in content)
    return 5 <= orientation <= 8, plain


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
        if _MAGIC.match(content) or content[:3] == b"GIF" or content[4:8] == b"ftyp":
            raise ImageError(f"corrupt: no readable header in {len(content)} bytes") from None
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


def turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    return ImageOps.exif_transpose(image)
