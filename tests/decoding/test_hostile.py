"""Hostile JPEGs are refused, or decoded as Pillow does, in bounded time and memory."""

import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import both_decoders, encode, read_with_pillow

PICTURE = draw_picture(2, (120, 90))
JPEG = encode_picture(PICTURE)
PROGRESSIVE = encode(PICTURE, "JPEG", progressive=True)
SOF, SOS = JPEG.index(b"\xff\xc0"), JPEG.index(b"\xff\xda")
FRAME = JPEG[SOF : SOF + 19]


def with_size(height, width, jpeg=JPEG, marker=b"\xff\xc0"):
    place = jpeg.index(marker) + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


LARGE_FRAME = with_size(4000, 4000)[SOF : SOF + 19]


def with_frame(marker, bits=8):
    return JPEG[:SOF] + bytes([0xFF, marker, 0, 17, bits]) + JPEG[SOF + 5 :]


def with_restarts(interval):
    return JPEG[:SOF] + b"\xff\xdd\0\4" + struct.pack(">H", interval) + JPEG[SOF:]


def with_scans(jpeg, count):
    """Repeat the last scan."""
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * count + b"\xff\xd9"


HOSTILE = {
    "restart interval of 1": with_restarts(1),
    "restart interval of 65535": with_restarts(65535),
    "restart interval of 0": with_restarts(0),
    "true restarts": encode(PICTURE, "JPEG", restart_marker_blocks=1),
    "restart markers only": JPEG[: SOS + 14] + b"\xff\xd0\xff\xd1" * 5000 + b"\xff\xd9",
    "300 scans": with_scans(PROGRESSIVE, 300),
    "more scans than components": with_scans(JPEG, 5),
    "arithmetic coding": with_frame(0xC9),
    "arithmetic and progressive": with_frame(0xCA),
    "12 bits": with_frame(0xC1, 12),
    "lossless": with_frame(0xC3),
    "hierarchical": with_frame(0xC5),
    "16 bits": with_frame(0xC0, 16),
    "0 bits": with_frame(0xC0, 0),
    "a frame header behind the scan": JPEG[:-2] + FRAME + b"\xff\xd9",
    "a larger frame behind the scan": JPEG[:-2]
    + with_size(4000, 4000)[SOF : SOF + 19]
    + JPEG[SOS:],
    "a frame header in the scan": JPEG[: SOS + 200] + FRAME + JPEG[SOS + 200 :],
    "two frame headers": JPEG[:SOF] + FRAME + JPEG[SOF:],
    "height 0": with_size(0, 120),
    "width 0": with_size(90, 0),
    "no size": with_size(0, 0),
    "taller than its pixels": with_size(900, 120),
    "wider than its pixels": with_size(90, 1200),
    "smaller than its pixels": with_size(9, 12),
    "sampled by 0": JPEG[: SOF + 11] + b"\0" + JPEG[SOF + 12 :],
    "sampled by 4 x 4": JPEG[: SOF + 11] + b"\x44" + JPEG[SOF + 12 :],
    "sampled by 3 x 1": JPEG[: SOF + 11] + b"\x31" + JPEG[SOF + 12 :],
    "a quantization table that is not there": JPEG[: SOF + 12] + b"\3" + JPEG[SOF + 13 :],
    "no quantization tables": JPEG[: JPEG.index(b"\xff\xdb")] + JPEG[SOF:],
    "no Huffman tables": JPEG[: JPEG.index(b"\xff\xc4")] + JPEG[SOS:],
    "one component twice": JPEG[: SOF + 13] + b"\1" + JPEG[SOF + 14 :],
    "no pixels": JPEG[: SOS + 14] + b"\xff\xd9",
    "pixels of FF": JPEG[: SOS + 14] + b"\xff" * 9000 + b"\xff\xd9",
    "pixels of zeros": JPEG[: SOS + 14] + bytes(9000) + b"\xff\xd9",
    "a huge comment": JPEG[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 200 + JPEG[2:],
    "CMYK": encode(PICTURE.convert("CMYK"), "JPEG"),
}


# Of these DALI shows the first picture, where Pillow refuses all.
LENIENT = {
    "more scans than components",
    "a frame header behind the scan",
    "a larger frame behind the scan",
    "a frame header in the scan",
}


def try_pillow(content):
    try:
        return read_with_pillow(content)
    except Exception:  # whatever Pillow runs into
        return None


@both_decoders
def test_hostile_pictures_are_read_as_pillow_reads_them(tmp_path, decoder):
    members = [(f"{name}.jpg", content) for name, content in HOSTILE.items()]
    shard = write_shard(tmp_path / "s.tar", members)
    reader = ImageReaderStage(device="cpu", decoder=decoder)
    began = time.monotonic()
    (batch,) = reader.process(FileGroupTask(data=[shard]))
    assert time.monotonic() - began < 20
    assert batch.num_items + len(batch.failed) == len(HOSTILE)
    for image in batch.data + batch.failed:
        name = image.image_path.rpartition("/")[2].removesuffix(".jpg")
        expected = try_pillow(HOSTILE[name])
        if expected is None:
            assert image.error or (decoder == "dali" and name in LENIENT), name
        else:
            assert image.error is None, (name, image.error)
            np.testing.assert_array_equal(image.image_data, expected, name)
            assert (image.height, image.width) == expected.shape[:2], name
    assert batch.num_items > 12


@both_decoders
@pytest.mark.parametrize("prefix", [b"", b"\xff\xfe\0\4ab\0"], ids=["plain", "odd"])
def test_scans_without_end_are_refused(tmp_path, decoder, prefix):
    """A hundred thousand scans of 16 megapixels are a megabyte and take 15 minutes."""
    large = encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True)
    content = with_scans(large[:2] + prefix + large[2:], 50_000)
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", content), ("b.jpg", PROGRESSIVE)])
    began = time.monotonic()
    (batch,) = ImageReaderStage(device="cpu", decoder=decoder).process(FileGroupTask(data=[shard]))
    assert time.monotonic() - began < 5
    assert batch.num_items == 1
    assert batch.failed[0].error == "too large: 50010 scans of 4000 x 4000 pixels"


BOMBS = """
import sys
from pathlib import Path
from dask_imgread import FileGroupTask, ImageReaderStage
for decoder in ("auto", "dali"):
    reader = ImageReaderStage(device="cpu", verbose=False, decoder=decoder, max_pixels=1 << 24)
    (batch,) = reader.process(FileGroupTask(data=[sys.argv[1]]))
    print(batch.num_items, [image.cause for image in batch.failed])
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10)
"""


def test_bombs_take_no_memory(tmp_path):
    members = [
        ("a.jpg", with_size(65_000, 65_000)),
        ("b.jpg", with_size(65_000, 65_000, PROGRESSIVE, b"\xff\xc2")),
        ("c.jpg", JPEG),
        ("d.jpg", with_size(4096, 4096)),  # just small enough: Pillow makes it grey
    ]
    shard = write_shard(tmp_path / "s.tar", members)
    command = [sys.executable, "-c", BOMBS, shard]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    *counts, peak = done.stdout.splitlines()
    assert counts == ["2 ['too large', 'too large']"] * 2
    assert int(peak) < 600  # MiB


@both_decoders
def test_what_no_memory_is_large_enough_for_costs_itself(tmp_path, decoder):
    """Whatever sizes a header states, where ``max_pixels`` does not stop it."""
    png = encode(PICTURE, "PNG")
    header = png[12:16] + struct.pack(">II", (1 << 31) - 1, (1 << 31) - 1) + png[24:29]
    huge = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    members = [("a.jpg", JPEG), ("b.png", huge), ("c.png", png)]
    shard = write_shard(tmp_path / "s.tar", members)
    reader = ImageReaderStage(
        device="cpu", decoder=decoder, max_pixels=None, max_batch_bytes=1 << 60
    )
    batches = reader.process(FileGroupTask(data=[shard]))
    assert sorted(image.key for batch in batches for image in batch.data) == ["a", "c"]
    assert sorted(image.key for batch in batches for image in batch.failed) == ["b"]
