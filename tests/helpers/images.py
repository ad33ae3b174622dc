"""Encoded pictures for tests, broken ones too; and what other libraries read of them."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from dask_imgread import FileGroupTask, ImageReaderStage
from dask_imgread.testing import draw_picture, encode_picture, write_shard

both_decoders = pytest.mark.parametrize("decoder", ["auto", "dali"])


def encode(image, format, /, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read_with_pillow(content):
    """What every 8-bit image must come out as."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def members_of(path):
    """What Python's own tarfile sees in a shard."""
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}


PICTURE = draw_picture(3, (64, 48))
JPEG = encode_picture(PICTURE)
PNG = encode_picture(PICTURE, "png")


def break_table(jpeg, start=0):
    """Make a Huffman table one that can't be, the first from some place on."""
    table = jpeg.index(b"\xff\xc4", start) + 5
    return jpeg[:table] + b"\xff" * 16 + jpeg[table + 16 :]


# DALI is given it, and only decoding finds out: a later scan's coefficients can't be.
SCANS = encode(PICTURE, "JPEG", progressive=True)
LATER = SCANS.index(b"\xff\xda", SCANS.index(b"\xff\xda") + 2)
BROKEN = SCANS[: LATER + 7] + b"\x3f\0" + SCANS[LATER + 9 :]


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


def write_noise(path, images, side):
    """Write a shard of images of noise with sidecars: many bytes that are decoded soon."""
    rng = np.random.default_rng(2)
    noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
    image = encode(noise, "JPEG", quality=90)
    members = []
    for number in range(images):
        comment = b"\xff\xfe\0\4%02d" % number  # no two are the same
        members += [
            (f"{number:03d}.jpg", image[:2] + comment + image[2:]),
            (f"{number:03d}.json", b"{}"),
            (f"{number:03d}.txt", b"%d" % number),
        ]
    return write_shard(path, members)


def read(path, **options):
    """Return (all images read, all that failed)."""
    batches = ImageReaderStage(device="cpu", **options)(FileGroupTask(data=[str(path)]))
    return [i for b in batches for i in b.data], [i for b in batches for i in b.failed]


def read_rows(path, *, task=None, **options):
    """Return the key, pixels, sidecars, error and warning of each image; failed ones last."""
    reader = ImageReaderStage(device="cpu", verbose=False, **options)
    return [
        (i.key, i.image_data is not None and i.image_data.tobytes(), i.metadata, i.error, i.warning)
        for batch in reader.stream(FileGroupTask(data=[str(path)], **(task or {})))
        for i in (*batch.data, *batch.failed)
    ]


def read_members(tmp_path, *members, **options):
    return read(write_shard(tmp_path / "s.tar", members), **options)
