"""Read an image's format, upright size and channels from its first bytes."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from dask_imgread.decoding.contract import Content, DecoderOptions, Header
from dask_imgread.decoding.orientation import find_orientation
from dask_imgread.decoding.parsers import (
    find_png_metadata,
    find_unsupported_coding,
    parse_jpeg,
    parse_png,
    parse_webp,
    read_without_pixels,
)

HEAD_BYTES = 4096 - 512  # one page together with the tar header
_MAX_SCANNED_PIXELS = 1 << 33  # in all scans: some five seconds; ten scans are usual
_FORMATS = {"jpeg2000": "jp2", "ppm": "pnm", "mpo": "jpeg"}  # by Pillow's name, where ours differs

_IMAGE_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM|II[*+]\0|MM\0[*+]|P[1-6]\s"
    rb"|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftyp",
    re.DOTALL,
)
# The only formats that are opened: others of Pillow's plugins start programs or open files.
_PILLOW_FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        Jpeg2KImagePlugin.Jpeg2KImageFile,
        PpmImagePlugin.PpmImageFile,
        AvifImagePlugin.AvifImageFile,
    )
)
_UNSUPPORTED = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"II\xbc\1": "JPEG XR",
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "ICO",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"P7\n": "PAM",
    b"P7 332": "XV thumbnail",
}
_MAX_DIAGNOSED_BYTES = 1 << 20  # of an unreadable file, read for the error message


class ImageError(ValueError):
    """An image can't be read. The message is ``"<cause>: <detail>"``."""


def read_header(content: Content) -> Header:
    """Read an image's header, given all its bytes.

    Raises
    ------
    ImageError
        If this is no image that Pillow or DALI knows.
    """
    if not content:
        raise ImageError("empty: 0 bytes")
    return _parse_strictly(content) or _read_with_fallback(io.BytesIO(content))


def read_header_only(read_at: Callable[[int, int], bytes], size: int) -> Header:
    """Read an image's header from as few of its bytes as possible.

    The first ``HEAD_BYTES`` are usually enough. More is read where the size, or metadata that may
    contain an orientation, can follow later; pixels are skipped.

    Parameters
    ----------
    read_at
        Returns the bytes of the image at an offset (first argument), so many (second).
    size
        The image's size in bytes.

    Raises
    ------
    ImageError
        If this is no image that Pillow or DALI knows.
    OSError
        If ``read_at`` does.
    """
    head = read_at(0, min(size, HEAD_BYTES))
    if len(head) == size:
        return read_header(head)
    header = _parse_strictly(head)
    if header is not None:
        return header
    source = _RangeFile(read_at, size, head)
    try:
        return _read_with_fallback(io.BufferedReader(source, HEAD_BYTES))
    finally:
        if source.failure is not None:  # Pillow may have blamed the image, or ignored it
            raise source.failure


class _RangeFile(io.RawIOBase):
    """An image as a file, which is read through ``read_at``."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int, head: bytes) -> None:
        self._read_at, self._size, self._head = read_at, size, head
        self._position = 0
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + (0, self._position, self._size)[whence]
        if position < 0:
            raise ValueError(f"no offset: {position}")
        self._position = position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._size - self._position))
        content = self._head[self._position :][:size]
        if len(content) < size:
            try:
                content = self._read_at(self._position, size)
            except OSError as error:
                self.failure = error
                raise
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _read_with_fallback(file: BinaryIO) -> Header:
    """Read a header that ``_parse_strictly`` could not: parse more of the file, or use Pillow."""
    if file.read(4) in (b"\x89PNG", b"RIFF"):
        header = _parse_strictly(read_without_pixels(file))
        if header is not None:
            return header._replace(unambiguous=False)
    return _read_with_pillow(file)


def _parse_strictly(content: Content) -> Header | None:
    """Read a header without Pillow; None if it is irregular, or not all of it is here."""
    for magic, (name, parse) in _PARSERS.items():
        if content[: len(magic)] == magic:
            try:
                parsed = parse(content)
            except (ValueError, struct.error):
                return None
            if not parsed.conclusive:
                return None
            width, height, channels, unambiguous, metadata, _, progressive = parsed
            orientation = find_orientation(metadata)
            if orientation >= 5:
                width, height = height, width
            unambiguous &= not (metadata and name == "png")  # DALI's OpenCV applies some of it
            return Header(name, width, height, channels, unambiguous, orientation, progressive)
    return None


def _read_with_pillow(file: BinaryIO) -> Header:
    try:
        with open_with_pillow(file) as image:
            name = (image.format or "unknown").lower()
            metadata: Mapping[Any, Any] = image.info
            if name == "png":  # Pillow has not read what follows the pixels
                metadata, _ = find_png_metadata(read_without_pixels(file))
            # Pillow applies a TIFF's orientation itself, and to the size at once.
            orientation = 1 if name == "tiff" else find_orientation(metadata)
            width, height = image.size[::-1] if orientation >= 5 else image.size
            palette = image.palette.mode if image.mode == "P" and image.palette else None
            channels = len(palette or image.getbands())
            progressive = bool(image.info.get("progressive"))
            return Header(
                _FORMATS.get(name, name), width, height, channels, False, orientation, progressive
            )
    except ImageError:
        raise
    except Exception as error:  # lazily parsed metadata may raise anything
        raise to_image_error(error) from error


def check_size(
    content: Content, header: Header, max_pixels: int | None, decoder_options: DecoderOptions | None
) -> None:
    """Raise ImageError if an image has more than ``max_pixels``, or too many scans.

    The pixels after ``resize`` count too: an image one pixel wide may grow a thousandfold.

    Each scan of a progressive JPEG updates all pixels, but takes as little as a few bytes of the
    file. A hundred thousand scans would take minutes.
    """
    width, height = header.width, header.height
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, max_pixels is {max_pixels}")
    if (
        max_pixels is not None
        and decoder_options is not None
        and decoder_options.resize is not None
    ):
        rows, columns = decoder_options.choose_size(height, width)
        if rows * columns > max_pixels:
            raise ImageError(
                f"too large: resized to {columns} x {rows} pixels, max_pixels is {max_pixels}"
            )
    if header.progressive:
        scans = bytes(content).count(b"\xff\xda")
        if width * height * scans > _MAX_SCANNED_PIXELS:
            raise ImageError(f"too large: {scans} scans of {width} x {height} pixels")


_PARSERS = {
    b"\xff\xd8\xff": ("jpeg", parse_jpeg),
    b"\x89PNG\r\n\x1a\n": ("png", parse_png),
    b"RIFF": ("webp", parse_webp),
}


def open_with_pillow(file: BinaryIO) -> ImageFile.ImageFile:
    """Open an image with Pillow, if it is of a supported format; read its header only.

    Unlike ``Image.open`` this ignores ``Image.MAX_IMAGE_PIXELS``, which is global:
    ``check_size`` applies our own limit.

    Raises
    ------
    ImageError
        If its format is not supported, or the header is broken.
    """
    file.seek(0)
    prefix = file.read(16)
    refusal: Exception | None = None
    try:
        for name in _PILLOW_FORMATS:
            factory, accept = Image.OPEN[name]
            accepted = accept is None or accept(prefix)
            if isinstance(accepted, str):
                raise ImageError(f"unsupported codec: {accepted}")
            if accepted:
                file.seek(0)
                if name == "WEBP":
                    file = _ShortFirstRead(file.read())
                try:
                    return factory(file, "")
                except (SyntaxError, IndexError, TypeError, struct.error) as error:
                    refusal = error
    except ImageError:
        raise
    except Exception as error:  # plugins let errors of struct and zlib through
        refusal = error
    file.seek(0)
    raise _make_open_error(file.read(_MAX_DIAGNOSED_BYTES), refusal) from refusal


class _ShortFirstRead(io.BytesIO):
    """A file whose first read is too short for the WebP plugin to find the image's size.

    Otherwise the plugin would check it against ``Image.MAX_IMAGE_PIXELS``.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(16 if self.tell() == 0 else size)


def _make_open_error(content: bytes, refusal: Exception | None) -> ImageError:
    if refusal is not None:
        return to_image_error(refusal, content)
    for magic, name in _UNSUPPORTED.items():
        if content.startswith(magic):
            return ImageError(f"unsupported codec: {name}")
    if content[4:8] == b"ftyp":
        brand = content[8:12].decode("ascii", "replace")
        return ImageError(f"unsupported codec: an ISO media file of brand {brand!r}")
    if _IMAGE_MAGIC.match(content):
        return ImageError("corrupt: no known header behind its first bytes")
    return ImageError(f"not an image: it begins with {content[:16]!r}")


def to_image_error(error: Exception, content: Content = b"") -> ImageError:
    """Turn an exception of Pillow's into an ImageError that names the cause."""
    coding = find_unsupported_coding(content) if content[:3] == b"\xff\xd8\xff" else None
    if coding is not None:
        return ImageError(f"unsupported codec: {coding}")
    text = str(error) or type(error).__name__
    cut = ("truncat", "unexpected end", "end of", "not enough", "eof", "unpack requires")
    if any(word in text.lower() for word in cut) or isinstance(error, EOFError):
        return ImageError(f"truncated: {text}")
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        return ImageError(f"too large: {text}")
    if isinstance(error, NotImplementedError | KeyError) or "not supported" in text.lower():
        return ImageError(f"unsupported codec: {text}")
    return ImageError(f"corrupt: {type(error).__name__}: {text}")
