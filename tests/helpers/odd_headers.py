"""JPEG, PNG and WebP with odd headers, made by editing sound ones; and what DALI does with them.

REFUSED
    DALI's header parsers throw: in a batch of 32 and more, while other threads still parse.
KILLERS
    The parsers find another size than the decoders behind them, or take memory without a limit:
    one picture corrupts memory, or ends the process.
SOUND
    Odd too, but read by DALI as by Pillow: not to be kept from it.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

_rng = np.random.default_rng(0)


def draw(size=(24, 20), mode="RGB"):
    noise = _rng.integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


def encode(codec, mode="RGB", size=(24, 20), **options):
    buffer = io.BytesIO()
    draw(size, mode).save(buffer, codec, **options)
    return buffer.getvalue()


def make_exif(*entries, count=None):
    """A TIFF header and its first directory of (tag, type, count, 4 bytes)."""
    count = len(entries) if count is None else count
    body = b"II*\0" + struct.pack("<IH", 8, count)
    return body + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries) + bytes(4)


def turned(orientation):
    return make_exif((0x112, 3, 1, struct.pack("<HH", orientation, 0)))


BROKEN_ENTRY = (0x10F, 2, 99, b"\xff\xff\0\0")

# JPEG


def segment(marker, body, length=None):
    length = len(body) + 2 if length is None else length
    return bytes([0xFF, marker]) + struct.pack(">H", length) + body


def exif_segment(exif):
    return segment(0xE1, b"Exif\0\0" + exif)


JPEG = encode("JPEG", quality=85)
DQT, SOF, DHT, SOS = (JPEG.index(bytes([0xFF, m])) for m in (0xDB, 0xC0, 0xC4, 0xDA))
TALL, WIDE = encode("JPEG", size=(40, 400)), encode("JPEG", size=(400, 40))


def insert(place, content, jpeg=JPEG):
    return jpeg[:place] + content + jpeg[place:]


def with_frame(height=20, width=24, bits=8, channels=3, marker=0xC0):
    body = struct.pack(">BHHB", bits, height, width, channels)
    body += b"".join(bytes([n + 1, 0x11, 0]) for n in range(channels))
    return JPEG[:SOF] + segment(marker, body) + JPEG[DHT:]


def hide_frame(marker):
    """Put a frame header where a reader finds it that takes a length behind ``marker``."""
    content = insert(SOF, bytes([0xFF, marker]))
    content += bytes(SOF + 2 + 0xFFC0 - len(content))
    frame = struct.pack(">BHHB", 8, 3000, 3000, 3) + b"\1\x22\0\2\x11\1\3\x11\1"
    return content + segment(0xC0, frame) + b"\xff\xda" + bytes(10)


REFUSED = {
    "a zero byte before DHT.jpg": insert(DHT, b"\0"),
    "a byte before SOS.jpg": insert(SOS, b"A"),
    "a zero byte before DQT.jpg": insert(DQT, b"\0"),
    "16 zero bytes before SOF.jpg": insert(SOF, bytes(16)),
    "FF 00 before DHT.jpg": insert(DHT, b"\xff\0"),
    "FF FF 00 before DHT.jpg": insert(DHT, b"\xff\xff\0"),
    "COM of length 0.jpg": insert(DQT, segment(0xFE, b"", 0)),
    "COM of length 1.jpg": insert(DQT, segment(0xFE, b"", 1)),
    "COM shorter than its text.jpg": insert(DQT, segment(0xFE, b"comment", 8)),
    "COM longer than its text.jpg": insert(DQT, segment(0xFE, b"comment", 10)),
    "ends after a marker.jpg": JPEG[:4],
    "ends within a length.jpg": JPEG[:5],
    "ends within DQT.jpg": JPEG[: DQT + 20],
    "ends within SOF.jpg": JPEG[: SOF + 8],
    "ends after SOF.jpg": JPEG[:DHT],
    "ends within DHT.jpg": JPEG[: SOS - 5],
    "ends before SOS.jpg": JPEG[:SOS],
    "ends in fill bytes.jpg": JPEG[:SOS] + b"\xff" * 50,
    "no SOF.jpg": JPEG[:SOF] + JPEG[DHT:],
    "tables only.jpg": JPEG[:SOF] + JPEG[DHT:SOS] + b"\xff\xd9",
    "EOI in SOS's place.jpg": JPEG[:SOS] + b"\xff\xd9",
    **{f"{n} components.jpg": with_frame(channels=n) for n in (0, 2, 5, 255)},
    "Exif of length 7.jpg": insert(2, segment(0xE1, b"Exif\0\0", 7)),
    "Exif of length 2.jpg": insert(2, segment(0xE1, b"Exif\0\0", 2)),
    "Exif longer than the file.jpg": insert(2, segment(0xE1, b"Exif\0\0" + turned(1), 0xFFFF)),
    "ends with an empty APP1.jpg": JPEG[:SOS] + segment(0xE1, b""),
    "ends with an empty APP14.jpg": JPEG[:SOS] + segment(0xEE, b""),
    "17 bits.jpg": with_frame(bits=17),
    "255 bits.jpg": with_frame(bits=255),
    "a PNG behind FF D8 FF.jpg": b"\xff\xd8\xff" + encode("PNG"),
    "RST0 before DHT.jpg": insert(DHT, b"\xff\xd0"),
    "TEM before DHT.jpg": insert(DHT, b"\xff\x01"),
}
KILLERS = {
    **{f"{m:02X} hides SOF.jpg": hide_frame(m) for m in (0x01, 0xD0, 0xD7)},
    "two Exif, 1 and 6.jpg": insert(2, exif_segment(turned(1)) + exif_segment(turned(6)), TALL),
    "two Exif, 6 and 3.jpg": insert(2, exif_segment(turned(6)) + exif_segment(turned(3)), WIDE),
    "two Exif, the first broken.jpg": insert(
        2,
        exif_segment(make_exif((0x112, 3, 1, b"\3\0\0\0"), BROKEN_ENTRY)) + exif_segment(turned(6)),
        TALL,
    ),
}
SOUND = {
    "plain.jpg": JPEG,
    "grey and progressive.jpg": encode("JPEG", "L", progressive=True),
    "a fill byte before DHT.jpg": insert(DHT, b"\xff"),
    "5000 fill bytes before DHT.jpg": insert(DHT, b"\xff" * 5000),
    "empty COM.jpg": insert(DQT, segment(0xFE, b"")),
    "empty APP14.jpg": insert(DQT, segment(0xEE, b"")),
    "empty Exif.jpg": insert(2, exif_segment(b"")),
    "garbage in Exif.jpg": insert(2, exif_segment(b"garbage")),
    "Exif whose directory lies outside.jpg": insert(2, exif_segment(b"II*\0\xff\xff\xff\xff")),
    "Exif of too many entries.jpg": insert(2, exif_segment(make_exif(count=0xFFFF))),
    "Exif with a broken entry.jpg": insert(2, exif_segment(make_exif(BROKEN_ENTRY))),
    "orientation 0.jpg": insert(2, exif_segment(turned(0))),
    "orientation 9.jpg": insert(2, exif_segment(turned(9))),
    "orientation 6.jpg": insert(2, exif_segment(turned(6)), TALL),
    "Exif behind SOF.jpg": insert(DHT, exif_segment(turned(1))),
    "odd Adobe segment.jpg": insert(2, segment(0xEE, b"Adobe\0d\0\0\0\0\1xyz")),
    "RGB without YCbCr.jpg": insert(2, segment(0xEE, b"Adobe\0d\0\0\0\0\0")),
    "DRI of 0.jpg": insert(DHT, segment(0xDD, b"\0\0")),
    "garbage behind EOI.jpg": JPEG + b"garbage" * 9,
    "two pictures.jpg": JPEG + JPEG,
}

# PNG


def chunk(kind, body, length=None, check=None):
    length = len(body) if length is None else length
    check = zlib.crc32(kind + body) if check is None else check
    return struct.pack(">I", length) + kind + body + struct.pack(">I", check)


def ihdr(width=24, height=20, bits=8, colour=2):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


def with_idat_length(length):
    return PNG[:IDAT] + struct.pack(">I", length) + PNG[IDAT + 4 :]


PNG = encode("PNG")
MAGIC, REST = PNG[:8], PNG[33:]
IDAT, IEND = PNG.index(b"IDAT") - 4, PNG.index(b"IEND") - 4
WIDE_PNG = encode("PNG", size=(400, 40))
_BAD_TYPES = [(8, c) for c in (1, 5, 7, 255)] + [(b, 2) for b in (0, 3, 4, 5, 32)]
_BAD_TYPES += [(1, 4), (4, 4), (2, 6), (16, 3)]

REFUSED |= {
    "only the magic.png": MAGIC,
    "ends within IHDR.png": PNG[:22],
    "ends after IHDR.png": PNG[:33],
    "ends within IDAT.png": PNG[: IDAT + 100],
    "no IEND.png": PNG[:IEND],
    "IEND cut.png": PNG[: IEND + 6],
    "IHDR of 14 bytes.png": MAGIC + chunk(b"IHDR", ihdr()[8:21] + b"\0") + REST,
    "IHDR comes second.png": MAGIC + chunk(b"tEXt", b"Comment\0text!") + PNG[8:],
    "Apple's.png": MAGIC + chunk(b"CgBI", b"\x50\0\x20\2") + PNG[8:],
    **{f"{b} bits, type {c}.png": MAGIC + ihdr(bits=b, colour=c) + REST for b, c in _BAD_TYPES},
    "eXIf longer than the file.png": PNG[:33] + chunk(b"eXIf", turned(1), 5000) + REST,
    "a byte between chunks.png": PNG[:33] + b"\0" + REST,
    "tEXt longer than the file.png": PNG[:33] + chunk(b"tEXt", b"Comment\0text?", 1 << 20) + REST,
    "IDAT shorter than it is.png": PNG[:IDAT]
    + struct.pack(">I", IEND - IDAT - 13)
    + PNG[IDAT + 4 :],
    "IDAT longer than the file.png": PNG[:IDAT] + struct.pack(">I", 1 << 20) + PNG[IDAT + 4 :],
}
KILLERS |= {
    "a broken entry behind orientation 6.png": WIDE_PNG[:33]
    + chunk(b"eXIf", make_exif((0x112, 3, 1, b"\6\0\0\0"), BROKEN_ENTRY))
    + WIDE_PNG[33:],
    "4 bits, larger than memory.png": MAGIC + ihdr(100_000, 100_000, 4, 0) + REST,
    "2 bits, larger than memory.png": MAGIC + ihdr(100_000, 100_000, 2, 0) + REST,
}
SOUND |= {
    "plain.png": PNG,
    **{f"{mode}.png": encode("PNG", mode) for mode in ("L", "LA", "P", "RGBA")},
    "garbage behind IEND.png": PNG + b"garbage" * 9,
    "a chunk behind IEND.png": PNG + chunk(b"tEXt", b"Comment\0text"),
    "an unknown chunk.png": PNG[:33] + chunk(b"teSt", b"x") + REST,
}

# WebP


def riff(*parts, size=None, form=b"WEBP"):
    body = form + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def part(kind, body, size=None, padding=b"\0"):
    size = len(body) if size is None else size
    return kind + struct.pack("<I", size) + body + padding * (len(body) % 2)


def vp8x(flags, width=24, height=20, size=None):
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return part(b"VP8X", bytes([flags, 0, 0, 0]) + sides, size)


LOSSY, LOSSLESS = encode("WEBP"), encode("WEBP", lossless=True)
VP8, ODD_ICC, EXIF = LOSSY[12:], part(b"ICCP", bytes(101)), part(b"EXIF", turned(1))
_pixels = LOSSLESS[20 : 20 + int.from_bytes(LOSSLESS[16:20], "little")]
ODD_VP8L = part(b"VP8L", _pixels + b"\0" * (1 - len(_pixels) % 2))  # a byte more does not hurt

REFUSED |= {
    "no promised EXIF.webp": riff(vp8x(8), VP8),
    "EXIF behind an odd VP8L.webp": riff(vp8x(8), ODD_VP8L, EXIF),
    "EXIF behind an odd ICCP.webp": riff(vp8x(0x28), ODD_ICC, VP8, EXIF),
    "EXIF behind an odd XMP.webp": riff(vp8x(12), VP8, part(b"XMP ", b"<x/>!"), EXIF),
    "EXIF longer than the file.webp": riff(vp8x(8), VP8, part(b"EXIF", turned(1), 5000)),
    "EXIF header cut.webp": riff(vp8x(8), VP8, b"EXIF\x05\0"),
    "pixels cut before EXIF.webp": riff(vp8x(8), VP8, EXIF)[:200],
    "VP8X of a wrong length.webp": riff(vp8x(8, size=14), VP8, EXIF),
    "a wrong code in VP8.webp": LOSSY[:23] + b"\x9d\x01\x2b" + LOSSY[26:],
    "a wrong code in VP8L.webp": LOSSLESS[:20] + b"\x2e" + LOSSLESS[21:],
    "first an ALPH.webp": riff(part(b"ALPH", bytes(8)), VP8),
    "first an EXIF.webp": riff(EXIF, VP8),
    "another form.webp": riff(VP8, form=b"AVI "),
    **{f"ends after {n} bytes.webp": LOSSY[:n] for n in (11, 12, 15, 16, 19, 22, 26, 29)},
    "VP8L ends after 24 bytes.webp": LOSSLESS[:24],
    "VP8X ends after 29 bytes.webp": riff(vp8x(0), VP8)[:29],
}
SOUND |= {
    "lossy.webp": LOSSY,
    "lossless.webp": LOSSLESS,
    "RGBA.webp": encode("WEBP", "RGBA"),
    "EXIF.webp": riff(vp8x(8), VP8, EXIF),
    "EXIF of odd length at the end.webp": riff(vp8x(8), VP8, part(b"EXIF", turned(1) + b"\0")),
    "orientation 6.webp": riff(vp8x(8), VP8, part(b"EXIF", turned(6))),
    "an odd chunk and no EXIF.webp": riff(vp8x(0), ODD_VP8L),
    "no promised XMP.webp": riff(vp8x(4), VP8),
    "no promised ICC profile.webp": riff(vp8x(0x20), VP8),
    "garbage behind.webp": LOSSY + b"garbage" * 9,
}
