"""Walk the headers of JPEG, PNG and WebP, from the first byte to the pixels.

What is odd is Pillow's to decide, and DALI most of all must be given nothing odd. What its
parsers refuse they throw, while other threads still parse the rest of the batch, and the process
ends. What they read otherwise than the decoders behind them is written past the end of its
memory. So these walks are at least as strict as nvImageCodec's parsers (0.8.0 in source, 0.9.0 in
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

# ITU T.81, B.1.1.3: tables, comments and application segments. Not among them are markers that
# have no length (TEM, RST), and frames other than those below.
_JPEG_SEGMENTS = frozenset((0xC4, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)))
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_CODINGS = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "hierarchical JPEG"),
    0xF7: "JPEG-LS",
}
_HUFFMAN, _QUANTIZATION, _SCAN, _APP1 = 0xC4, 0xDB, 0xDA, 0xE1
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_CODE_SPACE = tuple(1 << 15 - n for n in range(16))  # what a code of 1 to 16 bits takes of 2**16
_LONGEST_TABLES = 8 * (1 + 16 + 256)  # bytes: all that there can be at a time
_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]", re.DOTALL)  # that may follow upon a scan
_JPEG_END, _AFTER_END = b"\xff\xd9", 4096  # bytes at most
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type
_PNG_TYPE = re.compile(rb"[0-9A-Za-z_]{4}")
_PNG_TEXTS = (b"iTXt", b"tEXt", b"zTXt")
_PNG_KEYWORDS = {
    b"exif": "exif",
    b"XML:com.adobe.xmp": "xmp",
    b"Raw profile type exif": "Raw profile type exif",  # as ImageMagick writes it
}
_MOST_TEXT = 1 << 20  # bytes, of which more are no metadata of a picture
# What is kept of a file whose pixels are skipped.
_NO_PIXELS = {b"IHDR", b"acTL", b"fcTL", b"eXIf", *_PNG_TEXTS, b"VP8X", b"EXIF", b"XMP "}
_LEAST_WEBP = 32  # bytes: OpenCV, which decodes it in DALI, refuses fewer


# In which an orientation may stand, under the names that Pillow gives them in ``Image.info``.
Metadata: TypeAlias = dict[str, bytes]


class ParsedHeader(NamedTuple):
    """What the bytes before the pixels say, of an image as it is stored."""

    width: int
    height: int
    channels: int
    plain: bool  # every decoder reads it alike, and gives the same pixels
    metadata: Metadata
    settled: bool  # nothing was met that is odd, nor do the bytes end before all metadata
    progressive: bool = False


def parse_jpeg(content: Content) -> ParsedHeader:
    """Walk all segments up to the scan's (ITU T.81, B.2).

    Raises
    ------
    ValueError
        If there is no frame header, or none with a size, before the bytes end or turn odd.
    """
    frame: tuple[int, ...] | None = None
    sound = settled = False
    segments: list[bytes] = []
    with suppress(IndexError, struct.error):  # the bytes end
        for marker, body, length in _walk_jpeg(content):
            if marker in _JPEG_SEGMENTS:
                if length < (8 if marker == _APP1 else 2):  # of APP1 six bytes are looked at
                    break
                if marker == _APP1:
                    segments.append(bytes(content[body : body + length - 2]))
            elif marker in _JPEG_FRAMES and frame is None:
                frame = marker, length, *struct.unpack_from(">BHHB", content, body)
            else:
                settled = marker == _SCAN
                sound = settled and length == 6 + 2 * content[body]
                break
    if frame is None or not all(frame[3:5]):
        raise ValueError("no frame header, or its size in another segment")
    marker, length, bits, height, width, channels = frame
    sound &= length == 8 + 3 * channels and _has_jpeg_end(content)
    # Huffman-coded baseline or progressive, 8 bits; CMYK is rounded in several ways.
    plain = sound and marker <= 0xC2 and bits == 8 and channels in (1, 3)
    progressive = marker in (0xC2, 0xCA)
    metadata = _join_app1(segments)
    return ParsedHeader(width, height, channels, plain, metadata, settled, progressive)


def _join_app1(segments: list[bytes]) -> Metadata:
    """Return the EXIF and XMP of segments. EXIF goes on in the next one; of XMP the last counts."""
    metadata: Metadata = {}
    exif = [segment.removeprefix(_EXIF) for segment in segments if segment.startswith(_EXIF)]
    if exif:
        metadata["exif"] = _EXIF + b"".join(exif)
    for segment in segments:
        if segment.startswith(_XMP):
            metadata["xmp"] = segment.removeprefix(_XMP)
    return metadata


def name_jpeg_coding(content: Content) -> str | None:
    """Return how a JPEG is coded that no decoder here may know; None if it is a usual one."""
    with suppress(IndexError):
        for marker, body, _ in _walk_jpeg(content):
            if marker in _JPEG_CODINGS:
                return _JPEG_CODINGS[marker]
            if marker in _JPEG_FRAMES:
                return "JPEG of 12 bits" if content[body] == 12 and marker != 0xC0 else None
            if marker == _SCAN:
                break
    return None


def _walk_jpeg(content: Content) -> Iterator[tuple[int, int, int]]:
    """Yield each segment's marker, its body's offset, and its length, which counts itself.

    Raises
    ------
    IndexError
        If the bytes end.
    """
    position = 2
    while content[position] == 0xFF:
        position += 1
        while (marker := content[position]) == 0xFF:  # any number of fill bytes
            position += 1
        length = content[position + 1] << 8 | content[position + 2]
        yield marker, position + 3, length
        position += 1 + length


def is_whole(content: Content, format: str) -> bool:
    """Say whether a file with a sound header is whole, as far as can be seen without decoding it.

    In DALI one picture that fails takes its whole batch with it. Damage in a JPEG's scan does not
    fail: it is seen in the picture.
    """
    if format == "jpeg":
        return _has_sound_tables(content)
    return format != "png" or all(
        zlib.crc32(content[start - 4 : start + length])
        == int.from_bytes(content[start + length : start + length + 4], "big")
        for kind, start, length in _list_png_chunks(content)
        if not kind[0] & 0x20  # a lower-case letter: decoders need not know it
    )


def _has_sound_tables(content: Content) -> bool:
    """Say whether the tables of a JPEG can be, and those of its first scan stand before it.

    After ITU T.81, B.2.2 to B.2.4 and C.2.
    """
    tables: set[tuple[int, int]] = set()
    for marker, body, length in _walk_jpeg(content):
        segment = bytes(content[body : body + length - 2])
        if marker in (_HUFFMAN, _QUANTIZATION):
            found = _list_tables(marker, segment)
            if not found:
                return False
            tables |= found
        elif marker in _JPEG_FRAMES:
            progressive = marker == 0xC2
            frame = {segment[n]: segment[n + 1 : n + 3] for n in range(6, len(segment), 3)}
        elif marker == _SCAN:
            break
    for n in range(1, len(segment) - 3, 2):  # what follows the components are three bytes
        sampling, quantization = frame.get(segment[n], b"\0\0")
        first, others = divmod(segment[n + 1], 16)
        needed = {(_QUANTIZATION, quantization), (_HUFFMAN, first)}
        if not progressive:  # in whose first scan is only each block's first coefficient
            needed.add((_HUFFMAN, 0x10 | others))
        if not needed <= tables or not all(1 <= side <= 4 for side in divmod(sampling, 16)):
            return False
    return not progressive or _has_sound_later_tables(bytes(content), body)


def _has_sound_later_tables(content: bytes, position: int) -> bool:
    """Say whether the Huffman tables between scans can be, up to the end mark."""
    while marker := _MARKER.search(content, position):
        kind, position = content[marker.start() + 1], marker.end()
        if kind == _JPEG_END[1]:
            break
        length = int.from_bytes(content[position : position + 2], "big")
        segment = content[position + 2 : position + length]
        if kind == _HUFFMAN and not _list_tables(kind, segment):
            return False
        position += max(2, length)
    return True


@functools.lru_cache(4096)  # most encoders write the tables of ITU T.81's annex K
def _list_tables(marker: int, segment: bytes) -> frozenset[tuple[int, int]]:
    """Return the tables that a segment defines, as marker and number; none if one can't be."""
    found, position = set(), 0
    if len(segment) > _LONGEST_TABLES:
        return frozenset()
    while position < len(segment):
        kind, number = divmod(segment[position], 16)
        position += 1
        sound = kind < 2 and number < 4
        if marker == _QUANTIZATION:
            position += 64 * (kind + 1)  # bytes a coefficient
        else:
            number |= kind << 4
            counts = segment[position : position + 16]
            values = segment[position + 16 : position + 16 + sum(counts)]
            position += 16 + sum(counts)
            # No code may be all ones, and a first coefficient differs by 15 bits at most.
            sound &= sum(map(mul, counts, _CODE_SPACE)) < 1 << 16
            sound &= kind == 1 or max(values, default=0) < 16
        if not sound or position > len(segment):
            return frozenset()
        found.add((marker, number))
    return frozenset(found)


def _has_jpeg_end(content: Content) -> bool:
    """Say whether there is an end mark: what is cut short would be decoded twice, in vain."""
    return content[-2:] == _JPEG_END or _JPEG_END in bytes(content[-_AFTER_END:])


def parse_png(content: Content) -> ParsedHeader:
    """Read IHDR and walk all chunks up to the last (PNG specification, 5.3 and 11.2.1).

    Of a chunk that is longer than the file, OpenCV, which decodes PNG in DALI, allocates and
    clears the length stated, up to 4 GiB.

    Raises
    ------
    ValueError
        If it does not begin with IHDR.
    """
    length, kind, width, height, bits, colour = struct.unpack_from(">I4sIIBB", content, 8)
    channels = _PNG_CHANNELS.get(colour)
    if length != 13 or kind != b"IHDR" or not width or not height or channels is None:
        raise ValueError("no IHDR")
    # 16 bits are rounded in several ways; of 2 and 4 DALI takes memory where it can't say that
    # there is none. Of an animation DALI shows another frame.
    plain = bits == 8
    for kind, start, length in _list_png_chunks(content):
        if kind == b"IHDR" and start != 16:
            raise ValueError("two IHDR")
        plain &= kind != b"acTL" and start + length + 4 <= len(content)
    metadata, settled = find_png_metadata(content)
    return ParsedHeader(width, height, channels, plain and kind == b"IEND", metadata, settled)


def find_png_metadata(content: Content) -> tuple[Metadata, bool]:
    """Return a PNG's metadata, and whether all of it is within these bytes."""
    found: dict[bytes, tuple[bytes, bytes]] = {}  # by keyword; the last counts
    animations, pixels, ended = 0, False, False
    for kind, start, length in _list_png_chunks(content):
        animations += kind == b"acTL" and not pixels
        pixels |= kind == b"IDAT"
        # At these Pillow ends, too: of an animation the next frame begins.
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
    metadata = {_PNG_KEYWORDS[keyword]: _unpack_text(*text) for keyword, text in found.items()}
    return metadata, ended


def _unpack_text(kind: bytes, text: bytes) -> bytes:
    """Return what stands behind the keyword of a text chunk, or all of another chunk."""
    packed = kind == b"zTXt"
    if kind == b"zTXt":
        text = text[1:]
    elif kind == b"iTXt":
        packed = text[:1] != b"\0"
        parts = text[2:].split(b"\0", 2)  # a language, and the keyword in it
        if len(parts) < 3 or (packed and text[1]):  # it may be packed in one way
            return b""
        text = parts[2]
    if not packed:
        return text
    try:
        return zlib.decompressobj().decompress(text, _MOST_TEXT)
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
    """Read the first chunk, and look for what it promises (RFC 9649, 2.5 to 2.7).

    Raises
    ------
    ValueError
        If the first chunk has no size of a picture.
    """
    form, kind, length, flags = struct.unpack_from("<4s4sIB", content, 8)
    complete = len(content) >= 8 + int.from_bytes(content[4:8], "little")
    whole = complete and len(content) >= _LEAST_WEBP
    if form == b"WEBP" and kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
        if not width or not height:
            raise ValueError("no size")
        return ParsedHeader(width, height, 3, whole, {}, settled=True)
    if form == b"WEBP" and kind == b"VP8L" and flags == 0x2F:
        packed = int.from_bytes(content[21:25], "little")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
        return ParsedHeader(width, height, 3 + (packed >> 28 & 1), whole, {}, settled=True)
    if form == b"WEBP" and kind == b"VP8X" and len(content) >= 30:
        width = int.from_bytes(content[24:27], "little") + 1
        height = int.from_bytes(content[27:30], "little") + 1
        still = not flags & 0b10
        plain = whole and still and length == 10 and _has_promised_exif(content, flags)
        metadata = _find_webp_metadata(content, flags) if flags & 0b1100 else {}
        settled = complete or not flags & 0b1100
        return ParsedHeader(width, height, 3 + (flags >> 4 & 1), plain, metadata, settled)
    raise ValueError(f"no picture in chunk {kind!r}")


def _find_webp_metadata(content: Content, flags: int) -> Metadata:
    """Return the first EXIF and XMP chunks, where the VP8X chunk's flags promise them."""
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
    """Return a PNG or WebP without its pixels, over which it skips: metadata may lie behind.

    Where it is cut short, it is made to end.
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
            length += 4  # its sum
        else:
            kind, length = struct.unpack("<4sI", header)
            length += length % 2
        if kind in _NO_PIXELS:
            pieces.append(header + file.read(length))
        elif png:
            pieces.append(bytes(4) + kind + bytes(4))  # of no length
        position += 8 + length
    if png and kind != b"IEND":
        pieces.append(bytes(4) + b"IEND")
    content = b"".join(pieces)
    if png:
        return content
    return content[:4] + struct.pack("<I", max(0, len(content) - 8)) + content[8:]


def _has_promised_exif(content: Content, flags: int) -> bool:
    """Say whether the EXIF that a VP8X chunk promises is found where DALI's parser looks for it.

    It forgets the byte that is added to a chunk of odd length.
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
