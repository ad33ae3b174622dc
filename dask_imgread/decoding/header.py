"""Read an image's format, upright size and channels from its first bytes."""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
from typing import NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

HEAD_BYTES = 4096 - 512  # with its tar header, one page
_ORIENTATION = 0x0112
_MOST_SCANNED = 1 << 33  # pixels, in all scans: some five seconds; ten scans are usual
_METADATA_BYTES = 1 << 17  # a JPEG's EXIF fills 64 KiB at most, and comes first
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
    ``plain`` says that this is a JPEG, PNG or WebP of a variant of which every decoder gives
    the same pixels, but for the orientation. ``orientation`` is EXIF's, from 1 to 8, where the
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
    for magic, parse in _PARSERS.items():
        if content.startswith(magic):
            try:
                header, metadata = parse(content)
            except (IndexError, ValueError, struct.error):
                break  # cut short or odd: Pillow has the last word
            return _apply_orientation(content, header) if metadata else header
    with open_with_pillow(content) as image:
        name = (image.format or "unknown").lower()
        orientation = _read_orientation(image)
        width, height = image.size[::-1] if orientation >= 5 else image.size
        palette = image.palette.mode if image.mode == "P" and image.palette else None
        channels = len(palette or image.getbands())
        progressive = bool(image.info.get("progressive"))
        return Header(
            _FORMATS.get(name, name), width, height, channels, False, orientation, progressive
        )


def check_size(content: bytes, header: Header, max_pixels: int | None) -> None:
    """Raise ImageError if an image has more than ``max_pixels``, or goes over them too often.

    Every scan of a progressive JPEG goes over all pixels, and takes a few bytes of the file: a
    hundred thousand of them would take minutes.
    """
    pixels = header.width * header.height
    size = f"{header.width} x {header.height} pixels"
    if max_pixels is not None and pixels > max_pixels:
        raise ImageError(f"too large: {size}, max_pixels is {max_pixels}")
    if header.progressive and pixels * (scans := content.count(b"\xff\xda")) > _MOST_SCANNED:
        raise ImageError(f"too large: {scans} scans of {size}")


def _parse_jpeg(content: bytes) -> tuple[Header, bool]:
    """Walk to the frame header (ITU T.81, B.2), noting APP1, the home of EXIF and XMP."""
    metadata = False
    position = 2
    while content[position] == 0xFF:
        marker = content[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, high, low, wide, narrow, channels = content[position + 4 : position + 10]
            width, height = wide << 8 | narrow, high << 8 | low
            if not width or not height:
                raise ValueError("size in another segment")
            # Huffman-coded baseline or progressive, 8 bits; CMYK is rounded in several ways.
            plain = marker <= 0xC2 and bits == 8 and channels in (1, 3)
            header = Header("jpeg", width, height, channels, plain, progressive=marker == 0xC2)
            return header, metadata
        if marker == 0xDA or marker == 0x01 or 0xD0 <= marker <= 0xD7:
            break  # the scan, or a marker that has no length
        metadata |= marker == 0xE1
        position += 2 + (content[position + 2] << 8) + content[position + 3]
    raise ValueError("no frame header")


def _parse_png(content: bytes) -> tuple[Header, bool]:
    """Read IHDR (PNG specification, 11.2.1)."""
    width, height, bits, colour = struct.unpack(">8x4x4xIIBB", content[:26])
    channels = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(colour)
    if not width or not height or channels is None or content[12:16] != b"IHDR":
        raise ValueError("no IHDR")
    # Of an animation DALI (2.4.0) shows another frame, and 16 bits it rounds; of 2 and 4 bits it
    # takes memory where it can't say that there is none.
    plain = bits == 8 and b"acTL" not in content[:_METADATA_BYTES]
    metadata = any(word in content for word in (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile"))
    return Header("png", width, height, channels, plain), metadata


def _parse_webp(content: bytes) -> tuple[Header, bool]:
    """Read the first chunk of a WebP (RFC 9649, 2.5 to 2.7)."""
    chunk, flags = content[12:16], content[20]
    if content[8:16] == b"WEBPVP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", content[26:30]))
        return Header("webp", width, height, 3, True), False
    if content[8:16] == b"WEBPVP8L" and flags == 0x2F:
        packed = int.from_bytes(content[21:25], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        return Header("webp", width, height, 3 + (packed >> 28 & 1), True), False
    if content[8:16] == b"WEBPVP8X":
        width = int.from_bytes(content[24:27], "little") + 1
        height = int.from_bytes(content[27:30], "little") + 1
        still = not flags & 0b10
        return Header("webp", width, height, 3 + (flags >> 4 & 1), still), bool(flags & 0b1100)
    raise ValueError(f"no picture in chunk {chunk!r}")


_PARSERS = {b"\xff\xd8\xff": _parse_jpeg, b"\x89PNG\r\n\x1a\n": _parse_png, b"RIFF": _parse_webp}


def _apply_orientation(content: bytes, header: Header) -> Header:
    """Note the orientation, and apply it to the size."""
    try:
        with open_with_pillow(content) as image:
            orientation = _read_orientation(image)
    except ImageError:
        orientation = 1
    width, height = header.width, header.height
    if orientation >= 5:
        width, height = height, width
    # Of a PNG it may stand behind the pixels, and is found only when they are decoded.
    plain = header.plain and header.format != "png"
    return header._replace(width=width, height=height, plain=plain, orientation=orientation)


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


def open_with_pillow(content: bytes) -> ImageFile.ImageFile:
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
        if _IMAGE.match(content):
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
