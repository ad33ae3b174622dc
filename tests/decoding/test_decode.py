"""Every image accounted for: decoded, or recorded with the reason."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage, ReadError
from dask_imgread.decoding.contract import DecoderOptions
from dask_imgread.decoding.decode import choose_backend
from dask_imgread.decoding.header import read_header
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import (
    BROKEN,
    JPEG,
    LATER,
    PICTURE,
    PNG,
    SCANS,
    both_decoders,
    break_table,
    encode,
    members_of,
    read,
    read_members,
    read_with_pillow,
    variants,
)

BAD = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated.png": (PNG[: len(PNG) // 2], "truncated"),
    "text.jpg": (b"<html>404 not found</html>", "not an image"),
    "empty.jpg": (b"", "empty"),
    "header.png": (PNG[:20], "truncated"),
    "heic.avif": (b"\0\0\0\x1cftypheic" + bytes(100), "unsupported codec"),
    "lossless.jpg": (JPEG.replace(b"\xff\xc0", b"\xff\xcb", 1), "unsupported codec"),
    "table.jpg": (break_table(JPEG), "corrupt"),
    "later table.jpg": (break_table(SCANS, LATER), "corrupt"),
    "later scan.jpg": (BROKEN, "corrupt"),
    "zeros.jpg": (bytes(500), "not an image"),
    "vector.gif": (b"%PDF-1.4 something", "not an image"),
}


# One bad image costs one image


@both_decoders
@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_recorded_with_its_cause(tmp_path, name, decoder):
    content, cause = BAD[name]
    members = ("a.jpg", JPEG), (name, content), ("z.png", PNG)
    good, failed = read_members(tmp_path, *members, decoder=decoder)
    assert [i.image_path.rpartition("/")[2] for i in good] == ["a.jpg", "z.png"]
    (bad,) = failed
    assert bad.image_path == str(tmp_path / "s.tar" / name)
    assert bad.image_id.endswith("/" + name)
    assert bad.cause == cause
    assert len(bad.error) > len(cause) + 2
    assert bad.image_data is None
    assert bad.size == len(content)


@both_decoders
def test_one_image_that_fails_its_batch_costs_no_other(tmp_path, photo_shards, decoder):
    """An error that only decoding finds: the header and the end mark are whole."""
    members = list(members_of(photo_shards[0]).items())
    clean = read(photo_shards[0], decoder=decoder)[0]
    backend = {"auto": "libjpeg-turbo", "dali": "dali-cpu"}[decoder]
    options = DecoderOptions("cpu", 1, 9, decoder=decoder)
    assert choose_backend(BROKEN, read_header(BROKEN), options) == backend
    members = *members[:9], ("bad.jpg", BROKEN), *members[9:]
    good, failed = read_members(tmp_path, *members, decoder=decoder)
    assert [i.image_path.rpartition("/")[2] for i in failed] == ["bad.jpg"]
    assert len(good) == len(clean) == 25
    for image, expected in zip(good, clean, strict=True):
        np.testing.assert_array_equal(image.image_data, expected.image_data)
        assert image.backend == expected.backend
        assert image.backend.startswith(backend)


def test_a_failed_decoder_is_not_used_again(tmp_path):
    from dask_imgread.decoding.dali import DECODERS

    DECODERS.clear()
    read_members(tmp_path, ("a.jpg", BROKEN), decoder="dali")
    assert not any(DECODERS._idle.values())
    read_members(tmp_path, ("a.jpg", JPEG), decoder="dali")
    assert sum(map(len, DECODERS._idle.values())) == 1


def test_on_error(tmp_path, caplog):
    members = [("a.jpg", JPEG), ("b.jpg", JPEG[:99]), ("c.jpg", b""), ("d.jpg", JPEG)]
    shard = write_shard(tmp_path / "s.tar", members)
    with pytest.raises(ReadError, match=r"s\.tar/[bc]\.jpg: (empty|truncated|corrupt): "):
        read(shard, on_error="raise")
    (batch,) = ImageReaderStage(on_error="skip")(FileGroupTask(data=[shard]))
    assert (batch.num_items, batch.failed, batch.skipped) == (2, [], 2)
    assert "c.jpg: empty: 0 bytes" in caplog.text


def test_the_metadata_frame_has_a_row_for_each_bad_image(tmp_path):
    from dask_imgread import read_metadata

    shard = write_shard(
        tmp_path / "s.tar", [("a.jpg", JPEG), ("b.jpg", JPEG[:-900]), ("c.jpg", b"")]
    )
    headers = read_metadata(shard).compute(scheduler="sync")
    assert headers["error"].notna().tolist() == [False, False, True]
    decoded = read_metadata(shard, decode=True).compute(scheduler="sync").sort_values("offset")
    assert decoded["error"].str.split(":").str[0].tolist()[1:] == ["truncated", "empty"]
    assert decoded["width"].tolist()[:2] == [64, 64]


# What DALI can't read, Pillow does


@both_decoders
def test_every_variant_has_pillows_pixels(tmp_path, decoder):
    members = dict(variants())
    assert len(members) > 80
    good, failed = read_members(tmp_path, *members.items(), decoder=decoder)
    assert failed == []
    for image in good:
        name = image.image_path.rpartition("/")[2]
        expected = read_with_pillow(members[name])
        assert (image.height, image.width) == expected.shape[:2], name
        np.testing.assert_array_equal(image.image_data, expected, err_msg=name)
    backends = {image.format: set() for image in good}
    for image in good:
        backends[image.format].add(image.backend)
    assert backends["gif"] == backends["avif"] == {"pillow"}
    if decoder == "dali":
        assert all("dali-cpu" in backends[f] for f in ("jpeg", "png", "webp"))
    else:
        assert backends["jpeg"] == {"libjpeg-turbo", "pillow"}
        assert "dali-cpu" in backends["png"]


@both_decoders
@pytest.mark.parametrize("codec", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, codec, orientation, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(PICTURE, codec, exif=exif)
    (image,), failed = read_members(tmp_path, ("a.jpg", content), decoder=decoder)
    assert not failed
    np.testing.assert_array_equal(image.image_data, read_with_pillow(content))
    assert (image.height, image.width) == image.image_data.shape[:2]
    (header,), _ = read_members(tmp_path, ("a.jpg", content), decode=False)
    assert (header.height, header.width) == (image.height, image.width)


@both_decoders
def test_orientation_from_xmp(tmp_path, decoder):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    content = encode(PICTURE, "JPEG", xmp=xmp)
    (image,), _ = read_members(tmp_path, ("a.jpg", content), decoder=decoder)
    np.testing.assert_array_equal(image.image_data, read_with_pillow(content))
    assert (image.height, image.width) == (64, 48)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [draw_picture(n, (40, 30)) for n in range(3)]
    members = {
        f"a{n}.{codec.lower()}": encode(frames[0], codec, save_all=True, append_images=frames[1:])
        for n, codec in enumerate(["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
    }
    good, failed = read_members(tmp_path, *members.items())
    assert not failed
    for image in good:
        expected = read_with_pillow(members[image.image_path.rpartition("/")[2]])
        np.testing.assert_array_equal(image.image_data, expected)


def test_16_bits_keep_the_upper_8_in_every_format(tmp_path):
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = Image.fromarray(wide)
    members = {
        "a.png": encode(grey, "PNG"),
        "b.tif": encode(grey, "TIFF"),
        "c.tif": encode(grey, "TIFF", compression="tiff_lzw"),
        "d.jp2": encode(grey, "JPEG2000"),
        "e.pgm": b"P5 256 256 65535\n" + wide.astype(">u2").tobytes(),
        "e.ppm": b"P6 256 256 65535\n" + wide.astype(">u2").repeat(3).tobytes(),
        "f.png": make_png(256, 256, 16, wide.astype(">u2").repeat(3).tobytes()),
    }
    good, failed = read_members(tmp_path, *members.items())
    assert not failed
    for image in good:
        for channel in range(3):
            np.testing.assert_array_equal(
                image.image_data[..., channel], wide >> 8, image.image_path
            )


# Size before pixels


def make_png(width, height, bits, rows):
    """An RGB PNG of these rows, whatever its header says of their number."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    length = width * 3 * bits // 8
    lines = b"".join(b"\0" + rows[n : n + length] for n in range(0, len(rows), length))
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("options", [{}, {"decode": False}])
def test_a_bomb_is_refused_unread(tmp_path, options):
    gif = bytearray(encode_picture(PICTURE, "gif"))
    gif[6:10] = b"\xff\xff\xff\xff"
    members = [
        ("a.png", make_png(60_000, 60_000, 8, bytes(100))),
        ("b.jpg", JPEG),
        ("c.gif", bytes(gif)),
    ]
    good, failed = read_members(tmp_path, *members, **options)
    assert [i.cause for i in failed] == ["too large", "too large"]
    assert "60000 x 60000 pixels, max_pixels is 268435456" in failed[0].error
    assert len(good) == 1


def test_a_png_chunk_longer_than_its_file_allocates_nothing(tmp_path):
    """The decoder behind DALI would allocate and clear what the chunk says: 4 GiB."""
    import resource

    at = PNG.index(b"IDAT") - 4
    for number, place in enumerate([at, len(PNG) - 12]):
        content = PNG[:place] + b"\xff\xff\xff\xf0" + PNG[place + 4 :]
        read_members(tmp_path, (f"{number}.png", content), ("b.png", PNG))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 << 20  # KiB


def test_a_jpeg_2000_header_that_ends_the_process_elsewhere(tmp_path):
    content = encode_picture(PICTURE, "jp2")
    size = content.index(b"\xff\x51")
    broken = content[: size + 22] + bytes(8) + content[size + 30 :]  # tiles of no width
    good, failed = read_members(tmp_path, ("a.jp2", broken), ("b.jp2", content))
    assert (len(good), len(failed)) == (1, 1)


def test_max_pixels(tmp_path):
    assert len(read_members(tmp_path, ("a.jpg", JPEG), max_pixels=64 * 48)[0]) == 1
    assert len(read_members(tmp_path, ("a.jpg", JPEG), max_pixels=64 * 48 - 1)[1]) == 1
    assert len(read_members(tmp_path, ("a.jpg", JPEG), max_pixels=None)[0]) == 1


def test_batches_are_cut_to_their_decoded_size(tmp_path):
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.jpg", JPEG) for n in range(10)])
    one = 64 * 48 * 3
    reader = ImageReaderStage(max_batch_bytes=3 * one)
    batches = reader(FileGroupTask(data=[shard]))
    assert [b.num_items for b in batches] == [3, 3, 3, 1]
    alone = ImageReaderStage(max_batch_bytes=one - 1)(FileGroupTask(data=[shard]))
    assert [b.num_items for b in alone] == [1] * 10
