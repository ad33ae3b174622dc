"""Only the formats that are named are opened, and nothing in a shard makes anything happen."""

import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.testing import draw_picture, write_shard
from tests.helpers.images import both_decoders, encode, read_with_pillow
from tests.helpers.odd_headers import segment

NAMED = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF"}
PICTURE = draw_picture(4, (64, 48))
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n0 0 40 30 rectfill\n"
    b"showpage\n%%EOF\n"
)
# Of what Pillow does not write, as much as makes its plugins take it.
MADE = {
    "BUFR": b"BUFR" + bytes(99),
    "CUR": b"\0\0\2\0\1\0" + bytes(99),
    "DCX": (987654321).to_bytes(4, "little") + bytes(99),
    "EPS in a wrapper": b"\xc5\xd0\xd3\xc6" + bytes([30, 0, 0, 0, 99]) + bytes(21) + POSTSCRIPT,
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(80) + bytes(2720),
    "FLI": bytes(4) + b"\x11\xaf\1\0\x40\0\x30\0\x08\0\0\0" + bytes(112),
    "FTEX": b"FTEX" + bytes(99),
    "GBR": (28).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes(99),
    "GRIB": b"GRIB\0\0\0\1" + bytes(99),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "MCIDAS": b"\0\0\0\0\0\0\0\4" + bytes(999),
    "MPEG": b"\0\0\1\xb3\4\0\x30" + bytes(99),
    "OLE": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(999),
    "PIXAR": b"\200\350\0\0" + bytes(999),
    "PSD": b"8BPS\0\1" + bytes(99),
    "SUN": (0x59A66A95).to_bytes(4, "big") + bytes(99),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(99),
    "XPM": b'/* XPM */\nstatic char * x[] = {\n"1 1 1 1",\n"a c #000000",\n"a"};\n',
    "XVTHUMB": b"P7 332\n#END_OF_COMMENTS\n2 2 255\nabcd",
    "PCD": bytes(2048) + b"PCD_" + bytes(4096),
}


def make_files():
    """Files of every format of which there is a plugin."""
    Image.init()
    files = dict(MADE)
    for codec in Image.SAVE:
        for mode in ("RGB", "L", "1", "P", "F"):
            buffer = io.BytesIO()
            try:
                PICTURE.convert(mode).save(buffer, codec)
            except (OSError, ValueError, KeyError, TypeError):
                continue
            files[codec] = buffer.getvalue()
            break
    files["EPS"] = POSTSCRIPT
    return files


# Notes what a plugin is given that is not named, and what happens that should not.
WATCHED = """
import json, logging, os, sys
from PIL import Image
from dask_imgread import FileGroupTask, ImageReaderStage
logging.disable(logging.CRITICAL)
named, shard, usual = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]

def read(shard, decoder):
    task = FileGroupTask(data=[shard])
    (headers,) = ImageReaderStage(decode=False, verbose=False).process(task)
    (batch,) = ImageReaderStage(device="cpu", decoder=decoder, verbose=False).process(task)
    return headers, batch

for decoder in ("auto", "dali"):
    read(usual, decoder)  # so that all is imported
Image.init()
opened, events = [], []
for name, (factory, accept) in list(Image.OPEN.items()):
    if name not in named:
        def note(file, path="", name=name, factory=factory):
            opened.append(name)
            return factory(file, path)
        Image.OPEN[name] = note, accept
quiet = ("subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork",
         "socket.", "urllib.", "tempfile.", "shutil.", "os.remove", "os.rename", "os.mkdir",
         "os.link", "os.symlink", "os.truncate", "webbrowser.", "ctypes.dlopen", "import")

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if path != shard or flags & (os.O_WRONLY | os.O_RDWR):
            events.append(f"open {path}")
    elif event.startswith(quiet):
        events.append(f"{event} {arguments}")

sys.addaudithook(watch)
for decoder in ("auto", "dali"):
    headers, batch = read(shard, decoder)
    found = list(events)
    print(json.dumps({
        "opened": opened,
        "events": found,
        "formats": {i.key: i.format for i in batch.data},
        "causes": {i.key: i.cause for i in batch.failed},
        "headers": {i.key: i.cause for i in headers.failed},
    }))
"""


def test_nothing_in_a_shard_makes_anything_happen(tmp_path):
    files = make_files()
    taken = {
        codec
        for codec, (_, accept) in Image.OPEN.items()
        if accept is None or any(accept(content[:16]) is True for content in files.values())
    }
    assert taken == set(Image.OPEN)  # there is a file for each plugin
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    ghostscript.chmod(0o755)
    shard = write_shard(tmp_path / "s.tar", [(f"{k}.jpg", v) for k, v in files.items()])
    usual = write_shard(
        tmp_path / "usual.tar",
        [(f"{n}.jpg", encode(PICTURE, codec)) for n, codec in enumerate(("JPEG", "PNG", "WEBP"))],
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(sorted(NAMED)), shard, usual],
        env=os.environ | {"PATH": f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "called").exists()
    assert sorted(os.listdir(tmp_path)) == ["bin", "s.tar", "usual.tar"]
    formats = {"MPO": "jpeg", "JPEG2000": "jp2", "PPM": "pnm"}
    by_decoder = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(by_decoder) == 2
    for seen in by_decoder:
        assert seen["opened"] == []
        assert seen["events"] == []
        assert seen["formats"] == {name: formats.get(name, name.lower()) for name in NAMED}
        assert set(seen["causes"]) == set(files) - NAMED
        assert set(seen["causes"].values()) == {"not an image", "unsupported codec"}
        assert seen["headers"] == seen["causes"]


# What is known, but not decoded


def code_zeros(marker, bits, size=(64, 48)):
    """A grey JPEG that is sound by its own rules: all its differences are 0, a code of one bit."""
    width, height = size
    table = segment(0xDB, b"\0" + bytes([1] * 64))
    frame = segment(marker, bytes([bits, 0, height, 0, width, 1, 1, 0x11, 0]))
    codes = b"".join(segment(0xC4, bytes([kind, 1]) + bytes(15) + b"\0") for kind in (0x00, 0x10))
    lossless = marker == 0xC3
    scan = segment(0xDA, b"\1\1\0" + (b"\1\0\0" if lossless else b"\0\x3f\0"))
    count = width * height if lossless else width * height // 64 * 2  # of bits
    return b"\xff\xd8" + table + frame + codes + scan + bytes(count // 8) + b"\xff\xd9"


UNSUPPORTED = {
    "codestream.jxl": b"\xff\x0a\xfa\x1f\1\x91\x08\6\1\0" + bytes(50),
    "container.jxl": b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl " + bytes(50),
    "xr.jpg": b"II\xbc\1\x20\0\0\0" + bytes(50),
    "ls.jpg": b"\xff\xd8"
    + segment(0xF7, b"\x08\0\x30\0\x40\1\1\x11\0")
    + segment(0xDA, b"\1\1\0\0\0\0")
    + bytes(50)
    + b"\xff\xd9",
    "12 bits.jpg": code_zeros(0xC1, 12),
    "12 bits, progressive.jpg": code_zeros(0xC2, 12),
    "hierarchical.jpg": code_zeros(0xC5, 8),
    "lossless of 16 bits.jpg": code_zeros(0xC3, 16),
    "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50),
    "photoshop.png": MADE["PSD"],
    "pam.png": b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nTUPLTYPE GRAYSCALE\nENDHDR\n0",
    "icon.png": encode(PICTURE, "ICO"),
}
CORRUPT = {
    "9 bits.jpg": code_zeros(0xC1, 9),
    "garbage.jpg": b"\xff\xd8\xff" + bytes(500),
    "text.jpg": b"JXL is a format",
}


@both_decoders
def test_what_is_not_decoded_is_not_called_broken(tmp_path, decoder):
    members = UNSUPPORTED | CORRUPT
    shard = write_shard(tmp_path / "s.tar", [(f"{k}.jpg", v) for k, v in members.items()])
    reader = ImageReaderStage(device="cpu", decoder=decoder)
    (batch,) = reader.process(FileGroupTask(data=[shard]))
    assert batch.data == []
    for image in batch.failed:
        name = image.image_path.rpartition("/")[2].removesuffix(".jpg")
        assert (image.cause == "unsupported codec") == (name in UNSUPPORTED), image.error
    details = {image.error for image in batch.failed}
    assert "unsupported codec: JPEG XL" in details
    assert "unsupported codec: JPEG-LS" in details
    assert "unsupported codec: JPEG of 12 bits" in details


@both_decoders
def test_a_lossless_jpeg_is_read_where_pillow_reads_it(tmp_path, decoder):
    content = code_zeros(0xC3, 8)
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", content)])
    reader = ImageReaderStage(device="cpu", decoder=decoder)
    (batch,) = reader.process(FileGroupTask(data=[shard]))
    try:
        expected = read_with_pillow(content)
    except OSError:
        assert [i.error for i in batch.failed] == ["unsupported codec: lossless JPEG"]
    else:
        assert (batch.data[0].image_data == expected).all()


@pytest.mark.parametrize("cut", [50, 150, 200])
def test_a_cut_jpeg_is_still_truncated(tmp_path, cut):
    content = encode(PICTURE, "JPEG")
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", content[:-cut])])
    (batch,) = ImageReaderStage(device="cpu").process(FileGroupTask(data=[shard]))
    assert [i.cause for i in batch.failed] == ["truncated"]
