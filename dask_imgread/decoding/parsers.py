"""Parse the headers of JPEG, PNG and WebP strictly, from the first byte to the pixels.

Files with irregular headers are left to Pillow; above all, they must not reach DALI. When one of
its parsers refuses a file, it throws while other threads still parse the rest of the batch, and the
process ends. When a parser finds another size than the decoder, pixels are written past the end of
the buffer. So the parsers here are at least as strict as nvImageCodec's (0.8.0 in source, 0.9.0 in
DALI 2.4.0).
"""

from __future__ import annotations

import functools
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from operator import mul
from typing import BinaryIO, NamedTuple, TypeAlias

from dask_imgread.decoding.contract import Content

# ITU T.81, B.1.1.3: tables, comments and application segments, but no markers without a length
# (TEM, RST).
_JPEG_SEGMENTS = frozenset((0xC4, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)))
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_CODINGS = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "hierarchical JPEG"),
    0xF7: "JPEG-LS",
}
_DHT, _DQT, _SOS, _APP1, _APP14 = 0xC4, 0xDB, 0xDA, 0xE1, 0xEE
_SEGMENT_HEADER = struct.Struct(">BBH")  # 0xFF, marker, length
_GREY_SAMPLING = (0x11,)  # horizontal and vertical factor of each component, four bits each
_COLOUR_SAMPLING = tuple((luma, 0x11, 0x11) for luma in (0x11, 0x12, 0x21, 0x22, 0x41, 0x42))
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_CODE_SPACE = tuple(1 << 15 - n for n in range(16))  # taken of 2**16 by a code of 1 to 16 bits
_MAX_TABLES_BYTES = 8 * (1 + 16 + 256)  # of all tables that can be defined at a time
_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]", re.DOTALL)  # that may follow a scan
_EOI, _MAX_TRAILING_BYTES = b"\xff\xd9", 4096
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type
_PNG_TYPE = re.compile(rb"[0-9A-Za-z_]{4}")
_PNG_TEXTS = (b"iTXt", b"tEXt", b"zTXt")
_PNG_KEYWORDS = {
    b"exif": "exif",
    b"XML:com.adobe.xmp": "xmp",
    b"Raw profile type exif": "Raw profile type exif",  # as ImageMagick writes it
}
_MAX_TEXT_BYTES = 1 << 20  # no image's metadata is longer
# What `read_without_pixels` keeps.
_METADATA_CHUNKS = {b"IHDR", b"acTL", b"fcTL", b"eXIf", *_PNG_TEXTS, b"VP8X", b"EXIF", b"XMP "}
_MIN_WEBP_BYTES = 32  # DALI's OpenCV refuses fewer


# All that may contain an orientation, by its key in Pillow's `Image.info`.
Metadata: TypeAlias = dict[str, bytes]


class ParsedHeader(NamedTuple):
    """What a header says of an image as stored, before any orientation is applied."""

    width: int
    height: int
    channels: int
    unambiguous: bool  # all decoders give the same pixels
    metadata: Metadata
    conclusive: bool  # the header is regular, and all metadata is in these bytes
    progressive: bool = False


def parse_jpeg(content: Content) -> ParsedHeader:
    """Parse all segments up to the first scan (ITU T.81, B.2).

    Raises
    ------
    ValueError
        If no frame header with a size is found before the bytes end or become irregular.
    """
    frame: tuple[int, ...] | None = None
    valid = conclusive = False
    segments: list[bytes] = []
    with suppress(IndexError, struct.error):  # the bytes end
        for marker, body, length in _walk_jpeg(content):
            if marker in _JPEG_SEGMENTS:
                if length < (8 if marker == _APP1 else 2):  # six bytes of APP1 are compared
                    break
                if marker == _APP1:
                    segments.append(bytes(content[body : body + length - 2]))
            elif marker in _JPEG_FRAMES and frame is None:
                frame = marker, length, *struct.unpack_from(">BHHB", content, body)
            else:
                conclusive = marker == _SOS
                valid = conclusive and length == 6 + 2 * content[body]
                break
    if frame is None or not all(frame[3:5]):
        raise ValueError("no frame header, or its size in another segment")
    marker, length, bits, height, width, channels = frame
    valid &= length == 8 + 3 * channels and _has_eoi(content)
    # Huffman-coded baseline or progressive, 8 bits; decoders round CMYK in different ways.
    unambiguous = valid and marker <= 0xC2 and bits == 8 and channels in (1, 3)
    progressive = marker in (0xC2, 0xCA)
    metadata = _join_app1(segments)
    return ParsedHeader(width, height, channels, unambiguous, metadata, conclusive, progressive)


def _join_app1(segments: list[bytes]) -> Metadata:
    """Return the EXIF of all segments, joined, and the XMP of the last that has some."""
    metadata: Metadata = {}
    exif = [segment.removeprefix(_EXIF) for segment in segments if segment.startswith(_EXIF)]
    if exif:
        metadata["exif"] = _EXIF + b"".join(exif)
    for segment in segments:
        if segment.startswith(_XMP):
            metadata["xmp"] = segment.removeprefix(_XMP)
    return metadata


def find_unsupported_coding(content: Content) -> str | None:
    """Return the name of a JPEG's coding if decoders may not support it, None if it is common."""
    with suppress(IndexError, struct.error):
        for marker, body, _ in _walk_jpeg(content):
            if marker in _JPEG_CODINGS:
                return _JPEG_CODINGS[marker]
            if marker in _JPEG_FRAMES:
                return "JPEG of 12 bits" if content[body] == 12 and marker != 0xC0 else None
            if marker == _SOS:
                break
    return None


def _walk_jpeg(content: Content) -> Iterator[tuple[int, int, int]]:
    """Yield each segment's marker, the offset of its body, and its length field.

    The length includes the two bytes of the field itself.

    Raises
    ------
    struct.error
        If the bytes end.
    """
    position, unpack = 2, _SEGMENT_HEADER.unpack_from
    while True:
        prefix, marker, length = unpack(content, position)
        if prefix != 0xFF:
            return
        if marker == 0xFF:  # any number of fill bytes
            position += 1
            continue
        yield marker, position + 4, length
        position += 2 + length


def is_plain_jpeg(content: Content) -> bool:
    """Return whether nvJPEG decodes a JPEG with a valid header to the same pixels as libjpeg.

    That is one of a single component, or of YCbCr, in an interleaved scan or progressive. Of RGB,
    and of a single component with sampling factors of 2, nvJPEG 12.4 returns wrong pixels, but no
    error (seen on an H200).
    """
    for marker, body, length in _walk_jpeg(content):
        if marker == _APP14 and bytes(content[body : body + 5]) == b"Adobe" and length >= 14:
            if content[body + 11] != 1:  # not YCbCr
                return False
        elif marker in _JPEG_FRAMES:
            progressive, components = marker == 0xC2, content[body + 5]
            fields = bytes(content[body + 6 : body + 6 + 3 * components])
        elif marker == _SOS:
            break
    if fields[::3] == b"RGB" or not (progressive or content[body] == components):
        return False
    sampling = tuple(fields[1::3])
    return sampling == _GREY_SAMPLING or sampling in _COLOUR_SAMPLING


def is_intact(content: Content, format: str) -> bool:
    """Return whether a file with a valid header is intact, as far as can be seen without decoding.

    In DALI one image that fails makes its whole batch fail. Damage within a JPEG's scan is not an
    error there: it shows in the image.
    """
    if format == "jpeg":
        return _has_valid_tables(content)
    return format != "png" or all(
        zlib.crc32(content[start - 4 : start + length])
        == int.from_bytes(content[start + length : start + length + 4], "big")
        for kind, start, length in _list_png_chunks(content)
        if not kind[0] & 0x20  # lower case: an ancillary chunk
    )


def _has_valid_tables(content: Content) -> bool:
    """Return whether a JPEG's tables are valid, and those of its first scan are defined before it.

    ITU T.81, B.2.2 to B.2.4 and C.2.
    """
    tables: frozenset[tuple[int, int]] = frozenset()
    for marker, body, length in _walk_jpeg(content):
        if marker in (_DHT, _DQT):
            found = _parse_tables(marker, bytes(content[body : body + length - 2]))
            if not found:
                return False
            tables |= found
        elif marker in _JPEG_FRAMES:
            progressive, frame = marker == 0xC2, bytes(content[body + 6 : body + length - 2])
        elif marker == _SOS:
            scan = bytes(content[body + 1 : body + length - 2])
            break
    return _has_needed_tables(tables, frame, scan, progressive) and (
        not progressive or _has_valid_later_tables(bytes(content), body)
    )


@functools.lru_cache(4096)
def _has_needed_tables(
    tables: frozenset[tuple[int, int]], frame: bytes, scan: bytes, progressive: bool
) -> bool:
    """Return whether the tables are there that the components of the first scan name."""
    components = {frame[n]: frame[n + 1 : n + 3] for n in range(0, len(frame), 3)}
    for n in range(0, len(scan) - 3, 2):  # three bytes follow the components
        sampling, quantization = components.get(scan[n], b"\0\0")
        first, others = divmod(scan[n + 1], 16)
        needed = {(_DQT, quantization), (_DHT, first)}
        if not progressive:  # whose first scan has DC coefficients only
            needed.add((_DHT, 0x10 | others))
        if not needed <= tables or not all(1 <= side <= 4 for side in divmod(sampling, 16)):
            return False
    return True


def _has_valid_later_tables(content: bytes, position: int) -> bool:
    """Return whether all Huffman tables between scans are valid, up to EOI."""
    while marker := _MARKER.search(content, position):
        kind, position = content[marker.start() + 1], marker.end()
        if kind == _EOI[1]:
            break
        length = int.from_bytes(content[position : position + 2], "big")
        segment = content[position + 2 : position + length]
        if kind == _DHT and not _parse_tables(kind, segment):
            return False
        position += max(2, length)
    return True


@functools.lru_cache(4096)  # most encoders write the tables of ITU T.81's annex K
def _parse_tables(marker: int, segment: bytes) -> frozenset[tuple[int, int]]:
    """Return the marker and number of each table in a segment; nothing if one is invalid."""
    found, position = set(), 0
    if len(segment) > _MAX_TABLES_BYTES:
        return frozenset()
    while position < len(segment):
        kind, number = divmod(segment[position], 16)
        position += 1
        valid = kind < 2 and number < 4
        if marker == _DQT:
            position += 64 * (kind + 1)  # kind + 1 bytes a coefficient
        else:
            number |= kind << 4
            counts = segment[position : position + 16]
            values = segment[position + 16 : position + 16 + sum(counts)]
            position += 16 + sum(counts)
            # No code may be all ones, and a DC difference has at most 15 bits.
            valid &= sum(map(mul, counts, _CODE_SPACE)) < 1 << 16
            valid &= kind == 1 or max(values, default=0) < 16
        if not valid or position > len(segment):
            return frozenset()
        found.add((marker, number))
    return frozenset(found)


def _has_eoi(content: Content) -> bool:
    """Return whether EOI is there: a truncated file would be decoded twice, in vain."""
    return content[-2:] == _EOI or _EOI in bytes(content[-_MAX_TRAILING_BYTES:])


def parse_png(content: Content) -> ParsedHeader:
    """Read IHDR, and check the lengths of all chunks (PNG specification, 5.3 and 11.2.1).

    OpenCV, which decodes PNG in DALI, would allocate and clear the stated length of a chunk that
    is longer than the file, up to 4 GiB.

    Raises
    ------
    ValueError
        If the first chunk is not a valid IHDR, or there are two.
    """
    length, kind, width, height, bits, colour = struct.unpack_from(">I4sIIBB", content, 8)
    channels = _PNG_CHANNELS.get(colour)
    if length != 13 or kind != b"IHDR" or not width or not height or channels is None:
        raise ValueError("no IHDR")
    # Decoders round 16 bits in different ways; for 2 and 4 bits DALI allocates memory where it
    # can't report that there is none. Of an animation DALI returns another frame.
    unambiguous = bits == 8
    for kind, start, length in _list_png_chunks(content):
        if kind == b"IHDR" and start != 16:
            raise ValueError("two IHDR")
        unambiguous &= kind != b"acTL" and start + length + 4 <= len(content)
    metadata, conclusive = find_png_metadata(content)
    return ParsedHeader(
        width, height, channels, unambiguous and kind == b"IEND", metadata, conclusive
    )


def find_png_metadata(content: Content) -> tuple[Metadata, bool]:
    """Return a PNG's metadata, and whether all of it is within these bytes."""
    found: dict[bytes, tuple[bytes, bytes]] = {}  # by keyword; the last counts
    animations, pixels, ended = 0, False, False
    for kind, start, length in _list_png_chunks(content):
        animations += kind == b"acTL" and not pixels
        pixels |= kind == b"IDAT"
        # Pillow stops here, too: at the next frame of an animation, or at an invalid type.
        next_frame = kind == b"fcTL" and animations == 1 and pixels
        if next_frame or kind == b"IEND" or not _PNG_TYPE.fullmatch(kind):
            ended = pixels or kind == b"IEND"
            break
        if kind == b"eXIf":
            found[b"exif"] = kind, bytes(content[start : start + length])
        elif kind in _PNG_TEXTS:
            keyword, _, text = bytes(content[start : start + length]).partition(b"\0")
            if keyword in _PNG_KEYWORDS:
                found[keyword] = kind, text
    metadata = {_PNG_KEYWORDS[keyword]: _extract_text(*text) for keyword, text in found.items()}
    return metadata, ended


def _extract_text(kind: bytes, text: bytes) -> bytes:
    """Return the text of a PNG chunk, decompressed, given what follows its keyword."""
    compressed = kind == b"zTXt"
    if kind == b"zTXt":
        text = text[1:]
    elif kind == b"iTXt":
        compressed = text[:1] != b"\0"
        parts = text[2:].split(b"\0", 2)  # language tag and translated keyword
        if len(parts) < 3 or (compressed and text[1]):  # the only compression method is 0
            return b""
        text = parts[2]
    if not compressed:
        return text
    try:
        return zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def _list_png_chunks(content: Content) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's type, and its body's offset and length, up to IEND or the bytes' end."""
    position = 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        yield kind, position + 8, length
        if kind == b"IEND":
            return
        position += 12 + length


def parse_webp(content: Content) -> ParsedHeader:
    """Read the first chunk, and the metadata that its flags announce (RFC 9649, 2.5 to 2.7).

    Raises
    ------
    ValueError
        If the first chunk is not that of an image, or has no size.
    """
    form, kind, length, flags = struct.unpack_from("<4s4sIB", content, 8)
    complete = len(content) >= 8 + int.from_bytes(content[4:8], "little")
    whole = complete and len(content) >= _MIN_WEBP_BYTES
    if form == b"WEBP" and kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
        if not width or not height:
            raise ValueError("no size")
        return ParsedHeader(width, height, 3, whole, {}, conclusive=True)
    if form == b"WEBP" and kind == b"VP8L" and flags == 0x2F:
        packed = int.from_bytes(content[21:25], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        return ParsedHeader(width, height, 3 + (packed >> 28 & 1), whole, {}, conclusive=True)
    if form == b"WEBP" and kind == b"VP8X" and len(content) >= 30:
        width = int.from_bytes(content[24:27], "little") + 1
        height = int.from_bytes(content[27:30], "little") + 1
        still = not flags & 0b10
        unambiguous = (
            whole and still and length == 10 and _has_exif_where_dali_looks(content, flags)
        )
        metadata = _find_webp_metadata(content, flags) if flags & 0b1100 else {}
        conclusive = complete or not flags & 0b1100
        return ParsedHeader(width, height, 3 + (flags >> 4 & 1), unambiguous, metadata, conclusive)
    raise ValueError(f"no image in chunk {kind!r}")


def _find_webp_metadata(content: Content, flags: int) -> Metadata:
    """Return the first EXIF and XMP chunks, where the VP8X chunk's flags announce them."""
    names = {b"EXIF": ("exif", 0b1000), b"XMP ": ("xmp", 0b100)}
    found: Metadata = {}
    position, end = 30, min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", content, position)
        chunk = bytes(content[position + 8 : position + 8 + length]) if kind in names else b""
        if chunk and flags & names[kind][1]:
            found.setdefault(names[kind][0], chunk)
        position += 8 + length + length % 2
    return found


def read_without_pixels(file: BinaryIO) -> bytes:
    """Return a PNG or WebP without its pixels, which are skipped to reach metadata behind them.

    A truncated file is given a proper end.
    """
    file.seek(0)
    magic = file.read(12)
    png = magic[:4] == b"\x89PNG"
    position = 8 if png else 12
    pieces = [magic[:position]]
    end = 1 << 63 if png else 8 + int.from_bytes(magic[4:8], "little")
    kind = b""
    while kind != b"IEND" and position < end:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            break
        if png:
            length, kind = struct.unpack(">I4s", header)
            length += 4  # its checksum
        else:
            kind, length = struct.unpack("<4sI", header)
            length += length % 2
        if kind in _METADATA_CHUNKS:
            pieces.append(header + file.read(length))
        elif png:
            pieces.append(bytes(4) + kind + bytes(4))  # an empty chunk
        position += 8 + length
    if png and kind != b"IEND":
        pieces.append(bytes(4) + b"IEND")
    content = b"".join(pieces)
    if png:
        return content
    return content[:4] + struct.pack("<I", max(0, len(content) - 8)) + content[8:]


def _has_exif_where_dali_looks(content: Content, flags: int) -> bool:
    """Return whether DALI's parser finds the EXIF that a VP8X chunk's flags announce, if any.

    It ignores the padding byte after a chunk of odd length.
    """
    position = 30
    while flags & 0b1000:
        if position + 8 > len(content):
            return False
        kind, length = struct.unpack_from("<4sI", content, position)
        position += 8 + length
        if position > len(content):
            return False
        if kind == b"EXIF":
            break
        if length % 2:
            return False
    return True
