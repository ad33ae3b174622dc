"""Whether a header is as every reader of it expects; what is odd is Pillow's to decide.

DALI most of all must be given nothing odd. What its parsers refuse they throw, while other
threads still parse the rest of the batch, and the process ends. What they read otherwise than
the decoders behind them is written past the end of its memory. So everything up to the pixels
is walked here, at least as strictly.

The rules follow nvImageCodec's parsers (0.8.0 in source, 0.9.0 in DALI 2.4.0), and for each
format its own specification.
"""

from __future__ import annotations

import struct

from dask_imgread.decoding.header import Header

# ITU T.81, B.1.1.3: tables, comments and application segments. Not among them are markers that
# have no length (TEM, RST), and all that is no plain baseline or progressive JPEG.
_JPEG_SEGMENTS = frozenset((0xC4, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)))
_JPEG_END, _AFTER_END = b"\xff\xd9", 4096  # bytes at the most
_LEAST_WEBP = 32  # bytes: OpenCV, which decodes it, refuses fewer


class _OddError(ValueError):
    """A header is not as every reader of it expects."""


def has_sound_header(content: bytes, header: Header) -> bool:
    """Say whether all parsers accept a plain JPEG, PNG or WebP, and find the same size in it."""
    walk = {"jpeg": _walk_jpeg, "png": _walk_png, "webp": _walk_webp}[header.format]
    try:
        return walk(content) == header.stored_size
    except (_OddError, IndexError, struct.error):  # odd, or cut short
        return False


def _walk_jpeg(content: bytes) -> tuple[int, int]:
    """Walk all segments up to the scan's (ITU T.81, B.2); return height and width."""
    # One that is cut short would fail its batch, or be decoded twice. Behind the end mark there
    # may be a little more.
    if not content.endswith(_JPEG_END) and content.rfind(_JPEG_END, -_AFTER_END) < 0:
        raise _OddError
    size: tuple[int, int] | None = None
    position = 2
    while True:
        if content[position] != 0xFF:
            raise _OddError
        while content[position] == 0xFF:  # any number of fill bytes
            position += 1
        marker = content[position]
        position += 1
        length = content[position] << 8 | content[position + 1]
        if length < 2 or position + length > len(content):
            raise _OddError
        if 0xC0 <= marker <= 0xC2:
            bits, height, width, channels = struct.unpack_from(">BHHB", content, position + 2)
            if size or bits != 8 or length != 8 + 3 * channels:
                raise _OddError
            size = height, width
        elif marker == 0xDA:
            if size is None or length != 6 + 2 * content[position + 2]:
                raise _OddError
            return size
        elif marker not in _JPEG_SEGMENTS or (marker == 0xE1 and length < 8):
            raise _OddError
        position += length


def _walk_png(content: bytes) -> tuple[int, int]:
    """Walk all chunks up to the last (PNG specification, 5.3); return height and width.

    Of one that is longer than the file, OpenCV, which decodes PNG in DALI, allocates and clears
    the length stated, up to 4 GiB.
    """
    if content[12:16] != b"IHDR" or content[8:12] != b"\0\0\0\r":
        raise _OddError
    width, height, bits = struct.unpack_from(">IIB", content, 16)
    if bits != 8:
        raise _OddError
    position = 33
    while True:
        length, kind = struct.unpack_from(">I4s", content, position)
        position += 12 + length
        if position > len(content) or kind in (b"acTL", b"eXIf"):
            raise _OddError
        if kind == b"IEND":
            return height, width


def _walk_webp(content: bytes) -> tuple[int, int]:
    """Check the first chunk of a WebP, and what it promises (RFC 9649, 2.5 to 2.7)."""
    if len(content) < max(_LEAST_WEBP, 8 + int.from_bytes(content[4:8], "little")):
        raise _OddError
    kind, length, flags = struct.unpack_from("<4sIB", content, 12)
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
        sound = content[23:26] == b"\x9d\x01\x2a"
    elif kind == b"VP8L":
        packed = int.from_bytes(content[21:25], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        sound = flags == 0x2F
    else:
        width = int.from_bytes(content[24:27], "little") + 1
        height = int.from_bytes(content[27:30], "little") + 1
        sound = kind == b"VP8X" and length == 10 and _has_promised_exif(content, flags)
    if not sound:
        raise _OddError
    return height, width


def _has_promised_exif(content: bytes, flags: int) -> bool:
    """Say whether the EXIF that a VP8X chunk promises is found where DALI's parser looks for it.

    It forgets the byte that is added to a chunk of odd length.
    """
    position = 30
    while flags & 0b1000:
        kind, length = struct.unpack_from("<4sI", content, position)
        position += 8 + length
        if position > len(content):
            return False
        if kind == b"EXIF":
            break
        if length % 2:
            return False
    return True
