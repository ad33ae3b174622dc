"""Every image accounted for: decoded, or recorded with the reason."""

import ctypes
import io
import logging
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dask_imgread import FileGroupTask, ImageReaderStage, ReadError, partition_shards
from dask_imgread.decoding.contract import DecoderOptions
from dask_imgread.decoding.decode import choose_backend
from dask_imgread.decoding.header import read_header
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.conftest import both_decoders, encode, members_of, read_with_pillow

PICTURE = draw_picture(3, (64, 48))
JPEG = encode_picture(PICTURE)
PNG = encode_picture(PICTURE, "png")


def break_table(jpeg, start=0):
    """Make a Huffman table one that can't be, the first from some place on."""
    table = jpeg.index(b"\xff\xc4", start) + 5
    return jpeg[:table] + b"\xff" * 16 + jpeg[table + 16 :]


# DALI is given it, and only decoding finds out: a later scan's coefficients can't be.
_SCANS = encode(PICTURE, "JPEG", progressive=True)
_LATER = _SCANS.index(b"\xff\xda", _SCANS.index(b"\xff\xda") + 2)
BROKEN = _SCANS[: _LATER + 7] + b"\x3f\0" + _SCANS[_LATER + 9 :]
STORED = 512 + -(-len(JPEG) // 512) * 512  # bytes of the JPEG in a tar, its header included


def read(path, **options):
    """Return (all images read, all that failed)."""
    batches = ImageReaderStage(device="cpu", **options)(FileGroupTask(data=[str(path)]))
    return [i for b in batches for i in b.data], [i for b in batches for i in b.failed]


def read_members(tmp_path, *members, **options):
    return read(write_shard(tmp_path / "s.tar", members), **options)


BAD = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated.png": (PNG[: len(PNG) // 2], "truncated"),
    "text.jpg": (b"<html>404 not found</html>", "not an image"),
    "empty.jpg": (b"", "empty"),
    "header.png": (PNG[:20], "truncated"),
    "heic.avif": (b"\0\0\0\x1cftypheic" + bytes(100), "unsupported codec"),
    "lossless.jpg": (JPEG.replace(b"\xff\xc0", b"\xff\xcb", 1), "unsupported codec"),
    "table.jpg": (break_table(JPEG), "corrupt"),
    "later table.jpg": (break_table(_SCANS, _LATER), "corrupt"),
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


def variants():
    """One picture in every mode and compression that Pillow writes."""
    modes = ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "LAB"]
    pictures = {mode: PICTURE.convert(mode) for mode in modes if mode != "LAB"}
    pictures["LAB"] = Image.merge("LAB", PICTURE.split())
    saves = {
        "jpg": [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}],
        "png": [{}, {"bits": 4}, {"interlace": 1}],
        "webp": [{}, {"lossless": True}],
        "gif": [{}],
        "avif": [{}],
        "bmp": [{}],
        "tif": [
            {"compression": c}
            for c in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4")
        ],
        "jp2": [{}, {"irreversible": True}],
        "ppm": [{}],
    }
    codecs = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
    for extension, choices in saves.items():
        for mode, picture in pictures.items():
            for number, options in enumerate(choices):
                try:
                    content = encode(picture, codecs.get(extension, extension.upper()), **options)
                except (OSError, ValueError, KeyError, SystemError):
                    continue  # a mode that the format does not have
                yield f"{mode}-{number}.{extension}", content


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


# Any tar that people have


def test_names_with_several_dots(tmp_path):
    good, _ = read_members(tmp_path, ("a.left.jpg", JPEG), ("a.right.jpg", JPEG), ("a.json", b"{}"))
    assert [i.key for i in good] == ["a", "a"]
    assert len({i.image_id for i in good}) == 2
    assert [i.metadata for i in good] == [{"json": {}}] * 2


def test_names_that_are_no_images_and_odd_ones_that_are(tmp_path):
    names = [
        "README",
        "a.jpg.txt",
        ".jpg",
        "x/.hidden.jpg",
        "../../etc/passwd.jpg",
        "/root.jpg",
        "日本.JPG",
    ]
    good, failed = read_members(tmp_path, *[(name, JPEG) for name in names])
    assert [i.image_path.removeprefix(str(tmp_path / "s.tar") + "/") for i in good] == names[3:]
    assert not failed
    assert sorted(os.listdir(tmp_path)) == ["s.tar"]


def test_duplicate_names_are_never_silent(tmp_path, caplog):
    other = encode_picture(draw_picture(4, (32, 32)))
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.jpg", other)])
    good, _ = read(shard)
    assert [i.image_data.shape[:2] for i in good] == [(48, 64), (48, 64), (32, 32)]
    assert len({i.image_id for i in good}) == 3
    assert "duplicate name" in good[2].warning
    assert "duplicate name" in caplog.text
    parts = partition_shards(shard, images_per_partition=1)
    assert len(parts) == 3
    in_parts = [i.image_id for task in parts for b in ImageReaderStage()(task) for i in b.data]
    assert in_parts == [i.image_id for i in good]


def test_empty_shards(tmp_path):
    assert read_members(tmp_path) == ([], [])
    assert read_members(tmp_path, ("a.txt", b"x")) == ([], [])


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_shards(tmp_path, ending, photo_shards):
    members = list(members_of(photo_shards[0]).items())
    shard = write_shard(tmp_path / f"s{ending}", members)
    good, failed = read(shard, dali_batch_size=7)
    plain, _ = read(photo_shards[0])
    assert not failed
    assert [(i.key, i.offset, i.metadata) for i in good] == [
        (i.key, i.offset, i.metadata) for i in plain
    ]
    for image, expected in zip(good, plain, strict=True):
        np.testing.assert_array_equal(image.image_data, expected.image_data)
    assert len(partition_shards(shard, images_per_partition=5)) == 1
    assert len(partition_shards(str(tmp_path))) == 1


def test_a_compressed_shard_larger_than_what_is_kept(tmp_path, monkeypatch):
    from dask_imgread.shards import sources as shards

    monkeypatch.setattr(shards, "_BLOCK_BYTES", 2048)
    monkeypatch.setattr(shards, "_CACHE_BYTES", 4096)
    members = [(f"{n}.{e}", c) for n in range(20) for e, c in (("jpg", JPEG), ("txt", b"%d" % n))]
    good, failed = read(write_shard(tmp_path / "s.tar.gz", members), dali_batch_size=6)
    assert [i.metadata["txt"] for i in good] == [str(n) for n in range(20)]
    assert not failed


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.zst"])
def test_a_truncated_shard_gives_all_before_the_cut_and_one_record(tmp_path, ending):
    members = [(f"{n}.jpg", JPEG) for n in range(20)]
    members += [("noise.jpg", np.random.default_rng(0).bytes(300_000))]  # nothing compresses it
    path = Path(write_shard(tmp_path / f"s{ending}", members))
    path.write_bytes(path.read_bytes()[:-100_000])
    good, failed = read(path)
    assert len(good) == 20
    (cut,) = failed
    assert cut.cause == "truncated archive"
    assert cut.image_path.endswith("/noise.jpg")


def test_a_cut_between_members_is_recorded(tmp_path):
    path = Path(write_shard(tmp_path / "s.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)]))
    path.write_bytes(path.read_bytes()[:STORED])
    good, failed = read(path)
    assert len(good) == 1
    assert failed[0].error.startswith("truncated archive: it ends at byte")


def test_a_damaged_header_in_the_middle(tmp_path):
    path = Path(write_shard(tmp_path / "s.tar", [(f"{n}.jpg", JPEG) for n in range(5)]))
    content = bytearray(path.read_bytes())
    content[3 * STORED + 10] ^= 0xFF
    path.write_bytes(content)
    good, failed = read(path)
    assert [image.key for image in good] == ["0", "1", "2", "4"]
    assert [i.cause for i in failed] == ["damaged archive"]


def test_a_lost_or_wrong_shard_is_recorded(tmp_path):
    (tmp_path / "text.tar").write_text("hello")
    for name in ("text.tar", "lost.tar"):
        good, failed = read(tmp_path / name)
        assert not good
        assert [i.cause for i in failed] == ["unreadable shard"]
        assert failed[0].shard == str(tmp_path / name)
    with pytest.raises(ReadError, match=r"text\.tar"):
        read(tmp_path / "text.tar", on_error="raise")


def test_a_sparse_member_is_refused_with_a_record(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in [
            ("a.jpg", {}),
            (
                "b.jpg",
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "real.jpg"},
            ),
            ("c.jpg", {}),
        ]:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(JPEG), headers
            tar.addfile(info, io.BytesIO(JPEG))
    good, failed = read(path)
    assert len(good) == 2
    assert failed[0].image_path.endswith("/real.jpg")
    assert failed[0].error == "unsupported: stored as a sparse file"


def test_sizes_in_base_256_and_in_pax(tmp_path):
    path = tmp_path / "s.tar"
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + len(JPEG).to_bytes(11, "big")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    padded = JPEG + bytes(-len(JPEG) % 512)
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = {"size": str(len(JPEG))}
    pax = info.tobuf(tarfile.PAX_FORMAT)
    path.write_bytes(bytes(header) + padded + pax + padded + bytes(1024))
    good, failed = read(path)
    assert [(i.size, i.image_data.shape) for i in good] == [(len(JPEG), (48, 64, 3))] * 2
    assert not failed


# Nothing to make a mess with


def test_bad_sidecars_do_not_fail_their_image(tmp_path, caplog):
    members = [
        ("a.jpg", JPEG), ("a.json", b"{broken"),
        ("b.jpg", JPEG), ("b.json", b"[" * 100_000),
        ("c.jpg", JPEG), ("c.json", b'"' + b"x" * (17 << 20) + b'"'),
        ("d.jpg", JPEG), ("d.txt", b"\xff\xfe"), ("d.cls", b"7"),
    ]  # fmt: skip
    good, failed = read_members(tmp_path, *members)
    assert len(good) == 4
    assert not failed
    for image, word in zip(good, ["Expecting", "nested", "17825794 bytes", "codec"], strict=True):
        assert word in image.warning
        assert image.image_path in caplog.text
    assert good[3].metadata == {"cls": 7}
    assert good[0].metadata == {}


def test_nothing_is_written_to_disk(tmp_path):
    shard = write_shard(tmp_path / "s.tar", [("../../x.jpg", JPEG), ("y.jpg", JPEG[:100])])
    before = sorted(os.walk(tmp_path))
    opened = []

    def watch(event, arguments):
        if event == "open" and arguments[1] is not None and set(str(arguments[1])) & set("wxa+"):
            opened.append(arguments[0])

    sys.addaudithook(watch)
    read(shard)
    # Only what DALI prints is caught in a file, which lies in memory and not on a disk.
    assert [path for path in opened if str(path).startswith(str(tmp_path))] == []
    assert sorted(os.walk(tmp_path)) == before


@both_decoders
def test_the_decoders_chatter_becomes_log_records(tmp_path, capfd, caplog, decoder):
    caplog.set_level(logging.WARNING, "dask_imgread")
    tiff = encode(PICTURE.convert("1"), "TIFF", compression="group4")
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[64:68] = b"\1\0\0\0"  # no such rendering intent: libpng says so
    png = encode(PICTURE, "PNG", icc_profile=bytes(profile))
    members = ("a.jpg", JPEG), ("b.tif", tiff), ("c.jpg", BROKEN), ("d.png", png), ("e.png", PNG)
    read_members(tmp_path, *members, decoder=decoder)
    printed = capfd.readouterr().err
    assert "[ERROR]" not in printed
    assert "lib" not in printed
    records = [r.getMessage() for r in caplog.records if r.name == "dask_imgread"]
    assert any(r.startswith(str(tmp_path / "s.tar" / "c.jpg")) for r in records), records
    shown = f"{tmp_path / 's.tar' / 'd.png'} to {tmp_path / 's.tar' / 'e.png'}"
    if decoder == "auto":
        assert any(r.startswith(f"one of 2 images, {shown}: libpng warning: iCCP") for r in records)


def print_in_c(text):
    """Print as a C library does."""
    libc = ctypes.CDLL(None)
    libc.fputs(text.encode(), ctypes.c_void_p.in_dll(libc, "stderr"))


def test_what_others_print_meanwhile_reaches_stderr(capfd, caplog):
    from dask_imgread.decoding import stderr

    with stderr.catch(["a.jpg"]):
        print("from Python", file=sys.__stderr__, flush=True)
        os.write(2, b"from the system\n")
        subprocess.run("echo from a program >&2", shell=True, check=True)
        print_in_c("from C\n")
        seen = capfd.readouterr().err
    assert seen == "from Python\nfrom the system\nfrom a program\n"
    assert [r.getMessage() for r in caplog.records] == ["a.jpg: from C"]
    print_in_c("from C afterwards\n")
    assert capfd.readouterr().err == "from C afterwards\n"


DYING = """
import faulthandler, logging, os, subprocess, sys, threading, time
faulthandler.enable()
logging.disable(logging.CRITICAL)
from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.decoding import stderr

def act():
    while not stderr._tap._holders:
        time.sleep(0.0001)
    if sys.argv[2] == "crash":
        faulthandler._sigsegv()
    elif sys.argv[2] == "abort":
        os.abort()
    else:
        children.append(subprocess.Popen("sleep 0.5; echo last words >&2", shell=True))

children = []
thread = threading.Thread(target=act)
thread.start()
reader = ImageReaderStage(device="cpu", verbose=False, decoder="dali")
while thread.is_alive():
    reader.process(FileGroupTask(data=[sys.argv[1]]))
children[0].wait()
"""


@pytest.mark.parametrize(
    ("end", "words", "status"),
    [
        ("crash", "Fatal Python error: Segmentation fault", -11),
        ("abort", "Fatal Python error: Aborted", -6),
        ("child", "last words", 0),
    ],
)
def test_last_words_while_decoding_are_seen(photo_shards, end, words, status):
    command = [sys.executable, "-c", DYING, photo_shards[0], end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert words in done.stderr


# verify


def test_verify(tmp_path):
    from dask_imgread import verify_shards

    good = write_shard(tmp_path / "good.tar", [("a.jpg", JPEG)])
    bad = write_shard(tmp_path / "bad.tar", [("a.jpg", JPEG), ("b.jpg", b""), ("c.jpg", b"x" * 50)])
    found = verify_shards(str(tmp_path))
    assert found.table.to_dict("index") == {
        bad: {"good": 1, "empty": 1, "not an image": 1},
        good: {"good": 1, "empty": 0, "not an image": 0},
    }
    assert not found.ok
    assert list(found.bad["key"]) == ["b", "c"]
    text = str(found)
    assert "bad.tar" in text
    assert "good.tar" not in text
    assert "2 good images in 2 shards: 2 bad, in 1 of them" in text
    assert verify_shards(good).ok
    assert str(verify_shards(good)) == "1 good images in 1 shards: all good"


def test_verify_on_the_command_line(tmp_path, client, capsys, monkeypatch):
    import pandas as pd

    from dask_imgread.cli.commands import main

    monkeypatch.setattr("dask_imgread.progress.start_logging", lambda log_format: None)
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", JPEG), ("b.jpg", JPEG[:500])])
    out = str(tmp_path / "bad.parquet")
    assert main(["verify", shard, "--out", out, "--workers", "1", "--device", "cpu"]) == 1
    assert "truncated" in capsys.readouterr().out
    assert len(pd.read_parquet(out)) == 1
    good = write_shard(tmp_path / "t.tar", [("a.jpg", JPEG)])
    assert main(["verify", good, "--workers", "1", "--device", "cpu"]) == 0
    assert "all good" in capsys.readouterr().out
