"""What headers alone tell is what comes out, wherever in a file it stands."""

import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage, read_metadata
from dask_imgread.decoding.header import HEAD_BYTES, ImageError, read_header, read_header_only
from dask_imgread.decoding.orientation import find_orientation
from dask_imgread.testing import write_shard
from tests.helpers.images import both_decoders, encode, read_with_pillow
from tests.helpers.odd_headers import chunk, exif_segment, part, riff, segment, turned, vp8x

NOISE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (96, 128, 3), np.uint8))
JPEG, PNG, WEBP = (encode(NOISE, codec) for codec in ("JPEG", "PNG", "WEBP"))
SOF, SOS, IDAT, IEND = JPEG.index(b"\xff\xc0"), JPEG.index(b"\xff\xda"), 33, len(PNG) - 12
AFTER_SOF = SOF + 2 + int.from_bytes(JPEG[SOF + 2 : SOF + 4], "big")
PROFILE = b"".join(segment(0xE2, b"ICC_PROFILE\0\1\3" + bytes(60_000)) for _ in range(3))


def xmp(orientation):
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="%d"/></x:xmpmeta>' % orientation
    )


def raw_profile(orientation):
    exif = b"Exif\0\0" + turned(orientation)
    return f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()


def into_jpeg(place, content):
    return JPEG[:place] + content + JPEG[place:]


def into_png(place, content):
    return PNG[:place] + content + PNG[place:]


def split_idat(content, size=500):
    """A PNG whose pixels are many chunks, as most encoders write them."""
    pixels = content[IDAT + 8 : IEND - 4]
    parts = [chunk(b"IDAT", pixels[n : n + size]) for n in range(0, len(pixels), size)]
    return content[:IDAT] + b"".join(parts)


def write_tiff(orientation, padding):
    """A TIFF whose directory stands behind ``padding`` bytes, and its pixels behind that."""
    tags = [(256, 128), (257, 96), (258, 8), (259, 1), (262, 1), (273, 0), (274, orientation)]
    tags += [(277, 1), (278, 96), (279, 128 * 96)]
    place = 8 + padding
    end = place + 2 + 12 * len(tags) + 4
    tags[5] = 273, end
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", place) + bytes(padding)
    return head + struct.pack("<H", len(tags)) + entries + bytes(4) + NOISE.convert("L").tobytes()


def make_files(n):
    """Files in which an orientation stands in every place that it can."""
    exif = exif_segment(turned(n))
    with_exif = {274: n}
    saved = Image.Exif()
    saved.update(with_exif)
    packed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(n))
    return {
        "behind a profile.jpg": into_jpeg(2, PROFILE + exif),
        "behind a short profile.jpg": into_jpeg(2, segment(0xE2, bytes(3000)) + exif),
        "behind other segments.jpg": into_jpeg(2, segment(0xED, bytes(65_000)) * 4 + exif),
        "behind a comment.jpg": into_jpeg(2, segment(0xFE, bytes(9000)) + exif),
        "behind the frame header.jpg": into_jpeg(AFTER_SOF, exif),
        "far behind the frame header.jpg": into_jpeg(AFTER_SOF, PROFILE + exif),
        "across the head's end.jpg": into_jpeg(
            AFTER_SOF, segment(0xE2, bytes(HEAD_BYTES - 700)) + exif
        ),
        "before the scan.jpg": into_jpeg(SOS, segment(0xFE, bytes(4000)) + exif),
        "behind the scan.jpg": JPEG[:-2] + exif + JPEG[-2:],
        "behind garbage.jpg": into_jpeg(AFTER_SOF, b"garbage" + exif),
        "with a large thumbnail.jpg": into_jpeg(2, exif_segment(turned(n) + bytes(60_000))),
        "in two segments.jpg": into_jpeg(2, exif + exif_segment(bytes(50_000))),
        "twice.jpg": into_jpeg(2, exif + PROFILE + exif_segment(turned(1))),
        "xmp.jpg": into_jpeg(
            2, PROFILE + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(n))
        ),
        "xmp against exif.jpg": into_jpeg(
            2, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(3)) + PROFILE + exif
        ),
        "before the pixels.png": into_png(IDAT, chunk(b"eXIf", turned(n))),
        "behind a profile.png": into_png(
            IDAT, chunk(b"prVt", bytes(9000)) + chunk(b"eXIf", turned(n))
        ),
        "behind the pixels.png": into_png(IEND, chunk(b"eXIf", turned(n))),
        "behind many pixels.png": split_idat(PNG) + chunk(b"eXIf", turned(n)) + PNG[IEND:],
        "with a wrong sum.png": into_png(IEND, chunk(b"eXIf", turned(n), check=1)),
        "behind an odd type.png": into_png(IEND, chunk(b"a-b!", b"") + chunk(b"eXIf", turned(n))),
        "before an odd type.png": into_png(IEND, chunk(b"eXIf", turned(n)) + chunk(b"a-b!", b"")),
        "of two headers.png": PNG[:IDAT] + PNG[8:IEND] + chunk(b"eXIf", turned(n)) + PNG[IEND:],
        "without an end.png": PNG[:IEND] + chunk(b"eXIf", turned(n)),
        "behind the end.png": PNG + chunk(b"eXIf", turned(n)),
        "xmp.png": into_png(IEND, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(n))),
        "packed xmp.png": into_png(IEND, chunk(b"iTXt", packed)),
        "raw.png": into_png(IEND, chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile(n))),
        "packed raw.png": into_png(
            IEND,
            chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(n))),
        ),
        "animated.png": encode(
            NOISE, "PNG", save_all=True, append_images=[NOISE.convert("L").convert("RGB")]
        )[:-12]
        + chunk(b"eXIf", turned(n))
        + PNG[IEND:],
        "pillow's.webp": encode(NOISE, "WEBP", exif=saved),
        "exif.webp": riff(vp8x(8, 128, 96), WEBP[12:], part(b"EXIF", turned(n))),
        "exif not promised.webp": riff(vp8x(0, 128, 96), WEBP[12:], part(b"EXIF", turned(n))),
        "behind the end.webp": riff(
            vp8x(8, 128, 96), WEBP[12:], part(b"EXIF", turned(n)), size=22 + len(WEBP) - 12
        ),
        "exif first.webp": riff(vp8x(8, 128, 96), part(b"EXIF", turned(n)), WEBP[12:]),
        "two.webp": riff(
            vp8x(8, 128, 96), WEBP[12:], part(b"EXIF", turned(n)), part(b"EXIF", turned(1))
        ),
        "xmp.webp": riff(vp8x(4, 128, 96), WEBP[12:], part(b"XMP ", xmp(n))),
        "first.tif": write_tiff(n, 0),
        "last.tif": write_tiff(n, 60_000),
        **{f"across {k}.tif": write_tiff(n, HEAD_BYTES - k) for k in (40, 80, 90, 94, 100)},
        "exif.avif": encode(NOISE, "AVIF", exif=saved),
        "pages.tif": encode(NOISE, "TIFF", save_all=True, append_images=[NOISE], exif=saved),
    }


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@both_decoders
def test_sizes_are_upright_wherever_the_orientation_stands(tmp_path, orientation, decoder):
    files = make_files(orientation)
    shard = write_shard(tmp_path / "s.tar", files.items())
    task = FileGroupTask(data=[shard])
    (headers,) = ImageReaderStage(decode=False).process(task)
    (batch,) = ImageReaderStage(device="cpu", decoder=decoder).process(task)
    assert headers.failed == batch.failed == []
    turned = 0
    for name, header, image in zip(files, headers.data, batch.data, strict=True):
        expected = read_with_pillow(files[name])
        np.testing.assert_array_equal(image.image_data, expected, name)
        assert (image.height, image.width) == expected.shape[:2], name
        assert (header.height, header.width, header.format) == (
            image.height,
            image.width,
            image.format,
        ), name
        turned += expected.shape[0] == 128
    assert (turned > 25) == (orientation > 4)


def test_the_frame_of_metadata_says_the_same(tmp_path):
    files = make_files(8)
    shard = write_shard(tmp_path / "s.tar", files.items())
    columns = ["image_id", "width", "height"]
    frames = [
        read_metadata(shard, decode=decode).compute(scheduler="sync").reset_index()[columns]
        for decode in (False, True)
    ]
    assert frames[0].sort_values("image_id").equals(frames[1].sort_values("image_id"))


def count_reads(content):
    """Read a header only; return it, and the bytes and the number of reads that it took."""
    reads = []

    def read_at(offset, size):
        reads.append(size)
        return content[offset : offset + size]

    return read_header_only(read_at, len(content)), sum(reads), len(reads)


def test_no_more_is_read_than_will_tell():
    large = NOISE.resize((1200, 900), Image.Resampling.NEAREST)
    saved = Image.Exif()
    saved[274] = 6
    for codec in ("JPEG", "GIF", "BMP", "PPM", "JPEG2000", "WEBP"):
        content = encode(large, codec)
        header, size, reads = count_reads(content)
        assert (size, reads) == (HEAD_BYTES, 1), codec
        assert header[:4] == read_header(content)[:4]
    for content in (
        encode(large, "PNG", compress_level=0),
        encode(large, "WEBP", exif=saved, quality=100),
        write_tiff(6, 3_000_000),
        JPEG[:2] + PROFILE + exif_segment(turned(6)) + JPEG[2:] + bytes(1 << 20),
    ):
        header, size, reads = count_reads(content)
        assert header[:4] == read_header(content)[:4]
        assert size < len(content) / 4
        assert reads < 70


def test_a_source_that_fails_is_no_broken_picture():
    """Whether Pillow would take it for the picture's fault, or for no orientation."""
    for content in make_files(6).values():
        for sound_reads in range(1, 4):
            left = [sound_reads]

            def read_at(offset, size, content=content, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise ConnectionError("gone")
                return content[offset : offset + size]

            try:
                header = read_header_only(read_at, len(content))
            except ConnectionError:
                continue
            assert left[0] >= 0
            assert header[:4] == read_header(content)[:4]


def test_broken_metadata_breaks_no_picture(tmp_path):
    broken = {
        "a.png": into_png(IEND, chunk(b"tEXt", b"Raw profile type exif\0\n\n\nno hex")),
        "b.png": into_png(IEND, chunk(b"tEXt", b"xmp\0text")),
        "c.jpg": into_jpeg(2, exif_segment(b"MM\0*")),
        "d.webp": riff(vp8x(8, 128, 96), WEBP[12:], part(b"EXIF", b"II*\0\xff\xff\xff\xff")),
    }
    shard = write_shard(tmp_path / "s.tar", broken.items())
    for options in ({"decode": False}, {}, {"decoder": "dali"}):
        (batch,) = ImageReaderStage(device="cpu", **options).process(FileGroupTask(data=[shard]))
        assert [(i.height, i.width) for i in batch.data] == [(96, 128)] * 4


def test_the_size_that_comes_out_is_the_one_that_limits_are_compared_with(tmp_path):
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    larger = into_jpeg(SOS, JPEG[SOF : SOF + 5] + b"\xff\xff\xff\xff" + JPEG[SOF + 9 : SOF + 19])
    shard = write_shard(tmp_path / "s.tar", [("a.png", into_png(IDAT, ihdr)), ("b.jpg", larger)])
    for decoder in ("auto", "dali"):
        reader = ImageReaderStage(device="cpu", decoder=decoder)
        (batch,) = reader.process(FileGroupTask(data=[shard]))
        assert {i.key: i.error for i in batch.failed} == {
            "a": "too large: 30000 x 30000 pixels, max_pixels is 268435456",
            "b": "too large: 65535 x 65535 pixels, max_pixels is 268435456",
        }


def test_cut_files_are_told_as_such_or_upright():
    for name, content in make_files(6).items():
        for size in (*range(1, 40), 100, 1000, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 1, 5000):
            cut = content[:size]
            for read in (read_header, lambda c: count_reads(c)[0]):
                try:
                    header = read(cut)
                except ImageError:
                    continue
                assert header.width + header.height == 128 + 96, (name, size)


def draw_exif(rng):
    """Draw a directory in which anything may be odd."""
    order = rng.choice("<>")
    marks = {"<": [b"II*\0", b"II\0*", b"II+\0"], ">": [b"MM\0*", b"MM*\0", b"MM\0+"]}[order]
    count = rng.randrange(4)
    exif = rng.choice(marks[:1] * 9 + marks)
    exif += struct.pack(order + "L", rng.choice([8] * 9 + [9, 20, 999, 0xFFFFFFFF]))
    exif += struct.pack(order + "H", rng.choice([count] * 9 + [count + 1, 65535]))
    for _ in range(count):
        tag = rng.choice([0x112] * 3 + [271, 256, 34665])
        kind = rng.choice([3] * 5 + list(range(19)))
        number = rng.choice([1] * 8 + [0, 2, 3, 8, 100, 0xFFFFFFFF])
        n = rng.randrange(10)
        value = rng.choice(
            [
                struct.pack(order + "HH", n, 0),
                struct.pack(order + "L", n),
                struct.pack(order + "f", n),
                struct.pack(order + "L", 8 * n),
                bytes([n]) * 4,
                rng.randbytes(4),
            ]
        )
        exif += struct.pack(order + "HHL", tag, kind, number) + value
    behind = [bytes(4), struct.pack(order + "6L", 6, 1, 6, 1, 8, 0), struct.pack(order + "d", 6)]
    return exif + rng.choice([b"", *behind, rng.randbytes(rng.randrange(60))])


def ask_pillow(metadata):
    """Return what ``ImageOps.exif_transpose`` would turn by; where it raises there is no answer."""
    image = Image.Image()
    image.info = dict(metadata)
    try:
        orientation = image.getexif().get(0x112, 1)
    except Exception:
        return 1
    return orientation if orientation in range(2, 9) else 1


def test_the_orientation_is_pillows():
    rng = random.Random(5)
    turned = 0
    for _ in range(20_000):
        exif = b"Exif\0\0" * rng.randrange(3) + draw_exif(rng)
        metadata = {}
        if rng.random() < 0.8:
            metadata["exif"] = exif
        elif rng.random() < 0.8:
            metadata["Raw profile type exif"] = f"\nexif\n  12\n{exif.hex()}{rng.choice('x ')}"
        if rng.random() < 0.3:
            metadata["xmp"] = rng.choice([xmp(6), b"<tiff:Orientation>8</", b"tiff:Orientation=6"])
        expected = ask_pillow(metadata)
        turned += expected > 1
        assert find_orientation(metadata) == expected, metadata
    assert turned > 2000
