"""Draw small pictures and write them into shards, for the demo and for tests."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from dask_imgread.shards.samples import IMAGE_EXTENSIONS

_PILLOW_FORMATS = {
    "jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000", "ppm": "PPM", "pgm": "PPM", "pbm": "PPM"
}  # fmt: skip


def draw_picture(seed: int, size: tuple[int, int] = (128, 96)) -> Image.Image:
    """Draw a landscape.

    Parameters
    ----------
    seed
        The same seed gives the same picture.
    size
        Width and height in pixels.

    Returns
    -------
    PIL.Image.Image
        An RGB picture.

    Examples
    --------
    >>> draw_picture(1).size
    (128, 96)
    """
    rng = np.random.default_rng(seed)
    width, height = size
    top, bottom = rng.integers(60, 256, (2, 3, 1, 1))
    fade = np.linspace(0, 1, height)[:, None]
    sky = top * (1 - fade) + bottom * fade
    # Noise, as a camera has it, so that no two rows compress alike.
    pixels = sky + rng.normal(0, 3, (height, width))
    planes = pixels.clip(0, 255, out=pixels).astype(np.uint8)
    image = Image.merge("RGB", [Image.fromarray(plane) for plane in planes])
    draw = ImageDraw.Draw(image)
    radius = min(size) * rng.uniform(0.08, 0.2)
    x, y = rng.uniform(0.15, 0.85) * width, rng.uniform(0.15, 0.45) * height
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 244, 200))
    for layer in range(3):
        colour = tuple(int(c) for c in rng.integers(20, 130, 3) * (3 - layer) // 3)
        base, swing = height * (0.55 + 0.14 * layer), height * rng.uniform(0.04, 0.14)
        phase, waves = rng.uniform(0, 6), rng.uniform(0.7, 2.2)
        ridge = [
            (i, base - swing * math.sin(phase + waves * 2 * math.pi * i / width))
            for i in range(width + 1)
        ]
        draw.polygon([(0, height), *ridge, (width, height)], fill=colour)
    return image


def encode_picture(image: Image.Image, extension: str = "jpg") -> bytes:
    """Encode a picture in the format of a file extension.

    Parameters
    ----------
    image
        The picture.
    extension
        One of ``dask_imgread.shards.samples.IMAGE_EXTENSIONS``.

    Returns
    -------
    bytes
        The content of a file.

    Raises
    ------
    KeyError
        If Pillow knows no such format.

    Examples
    --------
    >>> encode_picture(draw_picture(1), "png")[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    mode = {"pgm": "L", "pbm": "1"}.get(extension)
    image = image.convert(mode) if mode else image
    kwargs = {"quality": 90} if extension in ("jpg", "jpeg", "webp") else {}
    image.save(buffer, _PILLOW_FORMATS.get(extension, extension.upper()), **kwargs)
    return buffer.getvalue()


def write_shard(
    path: str | os.PathLike[str],
    members: Sequence[tuple[str, bytes]],
    format: int = tarfile.PAX_FORMAT,
) -> str:
    """Write a tar shard, compressed if its name says so.

    Parameters
    ----------
    path
        The file to write; its folder is made if it is missing. With ``.gz``, ``.tgz`` or ``.zst``
        at its end it is compressed.
    members
        Name and content of each member.
    format
        One of tarfile's formats.

    Returns
    -------
    str
        The path.

    Examples
    --------
    >>> picture = encode_picture(draw_picture(1))
    >>> write_shard("shards/a.tar", [("000001.jpg", picture), ("000001.txt", b"a landscape")])
    'shards/a.tar'
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    codec = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
    with (
        pa.CompressedOutputStream(path, codec) if codec else open(path, "wb") as file,
        tarfile.open(fileobj=file, mode="w|", format=format) as tar,
    ):
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def make_shards(
    folder: str | os.PathLike[str],
    *,
    shards: int = 2,
    images_per_shard: int = 8,
    extensions: Sequence[str] = ("jpg",),
    sidecars: Sequence[str] = ("json", "txt", "cls"),
    size: tuple[int, int] = (128, 96),
    broken: int = 0,
    seed: int = 0,
) -> list[str]:
    """Write WebDataset shards of drawn pictures with sidecars.

    Parameters
    ----------
    folder
        Where to write ``00000.tar`` and so on; created if missing.
    shards, images_per_shard
        How many shards, and how many images in each.
    extensions
        Extensions of the images, used in turn: any of
        ``dask_imgread.shards.samples.IMAGE_EXTENSIONS``.
    sidecars
        Which of ``json``, ``txt`` and ``cls`` each sample has.
    size
        Width and height in pixels.
    broken
        How many of all images to truncate, evenly spread, so that they can't be decoded.
    seed
        Seed of the random numbers: another seed gives other pictures.

    Returns
    -------
    list of str
        The shards' paths.

    Raises
    ------
    FileExistsError
        If one of the shards exists already: nothing is overwritten.
    ValueError
        If there is no extension, or an unknown one.

    Examples
    --------
    >>> make_shards("shards", shards=2)
    ['shards/00000.tar', 'shards/00001.tar']
    """
    unknown = set(extensions) - IMAGE_EXTENSIONS
    if unknown or not extensions:
        raise ValueError(f"extensions must be among {sorted(IMAGE_EXTENSIONS)}, not {extensions!r}")
    paths = [Path(folder) / f"{number:05d}.tar" for number in range(shards)]
    existing = [path for path in paths if path.exists()]
    if existing:
        raise FileExistsError(
            f"{existing[0]} exists already, and is not overwritten: give another folder"
        )
    total = shards * images_per_shard
    cut = {total * (2 * n + 1) // (2 * broken) for n in range(broken)}
    for shard, path in enumerate(paths):
        members: list[tuple[str, bytes]] = []
        for number in range(shard * images_per_shard, (shard + 1) * images_per_shard):
            extension = extensions[number % len(extensions)]
            content = encode_picture(draw_picture(seed * 1_000_003 + number, size), extension)
            content = content[: len(content) // 2] if number in cut else content
            sample = {
                extension: content,
                "json": json.dumps({"number": number, "width": size[0]}).encode(),
                "txt": f"landscape number {number}".encode(),
                "cls": str(number % 10).encode(),
            }
            wanted = [extension, *sidecars]
            members += [(f"{number:06d}.{name}", sample[name]) for name in wanted]
        write_shard(path, members)
    return [str(path) for path in paths]
