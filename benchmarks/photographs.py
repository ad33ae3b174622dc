"""Shards of photograph crops, cut from the pictures in scikit-image's and scikit-learn's wheels."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dask_imgread.testing import write_shard

_NAMES = [
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "motorcycle_right.png", "retina.jpg", "rocket.jpg",
]  # fmt: skip
_GREY_NAMES = [
    "brick.png", "camera.png", "cell.png", "coins.png", "grass.png", "gravel.png", "moon.png",
]  # fmt: skip
_TILE = 500  # pixels: the tiles of the mosaics


@functools.cache
def load_photographs() -> list[Image.Image]:
    """Return the colour photographs as RGB."""
    import skimage
    import sklearn.datasets

    data = Path(skimage.__file__).parent / "data"
    more = Path(sklearn.datasets.__file__).parent / "images"
    paths = [data / name for name in _NAMES] + [more / "china.jpg", more / "flower.jpg"]
    return [Image.open(path).convert("RGB") for path in paths]


def load_different_photographs() -> list[Image.Image]:
    """Return the photographs but one of the two that show the same, and grey ones, as they are."""
    import skimage

    data = Path(skimage.__file__).parent / "data"
    twin = _NAMES.index("motorcycle_right.png")
    photographs = load_photographs()
    greys = [Image.open(data / name) for name in _GREY_NAMES]
    return [*photographs[:twin], *photographs[twin + 1 :], *greys]


_SIDECARS = {
    "json": b'{"url": "https://example.com/00/17/photo.jpg", "similarity": 0.3125, "nsfw": 0}',
    "txt": b"a photograph with a caption of about the usual length, cropped at random",
}


def make_photo_shards(
    folder: Path, images: int, shards: int = 4, sidecars: tuple[str, ...] = ()
) -> list[str]:
    """Write crops of 300-640 x 250-512 pixels as JPEG, the same each time; return the paths."""
    photographs = load_photographs()
    rng = np.random.default_rng(0)
    paths = []
    for shard in range(shards):
        members = []
        for number in range(shard * images // shards, (shard + 1) * images // shards):
            photo = photographs[number % len(photographs)]
            width = int(rng.integers(300, min(640, photo.width) + 1))
            height = int(rng.integers(250, min(512, photo.height) + 1))
            left = int(rng.integers(0, photo.width - width + 1))
            top = int(rng.integers(0, photo.height - height + 1))
            buffer = io.BytesIO()
            crop = photo.crop((left, top, left + width, top + height))
            crop.save(buffer, "JPEG", quality=90)
            members.append((f"{number:07d}.jpg", buffer.getvalue()))
            members += [(f"{number:07d}.{ending}", _SIDECARS[ending]) for ending in sidecars]
        paths.append(write_shard(folder / f"photos-{shard:03d}.tar", members))
    return paths


def make_large_shard(folder: Path, size: tuple[int, int], images: int) -> list[str]:
    """Write pictures of ``size`` (width, height), each a mosaic of unscaled photographs."""
    photographs = load_photographs()
    rng = np.random.default_rng(0)
    members = []
    for number in range(images):
        picture = Image.new("RGB", size)
        for left in range(0, size[0], _TILE):
            for top in range(0, size[1], _TILE):
                photo = photographs[int(rng.integers(len(photographs)))]
                picture.paste(photo.crop((0, 0, _TILE, _TILE)), (left, top))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        members.append((f"{number:07d}.jpg", buffer.getvalue()))
    return [write_shard(folder / "large.tar", members)]


def repeat_shards(folder: Path, shards: list[str], times: int) -> list[str]:
    """Write the samples of some shards ``times`` times, under new names."""
    members = [member for shard in shards for member in _read_members(shard)]
    return [
        write_shard(
            folder / f"repeated-{number:03d}.tar",
            [(f"{number:03d}-{name}", content) for name, content in members],
        )
        for number in range(times)
    ]


def break_shards(folder: Path, shards: list[str], share: float) -> list[str]:
    """Copy shards with a share of their images truncated or overwritten in part."""
    rng = np.random.default_rng(0)
    paths = []
    for number, shard in enumerate(shards):
        members = []
        for n, content in enumerate(read_all([shard])):
            if rng.random() < share:
                content = _break(content, n)
            members.append((f"{n:07d}.jpg", content))
        paths.append(write_shard(folder / f"broken-{number:03d}.tar", members))
    return paths


def _break(content: bytes, number: int) -> bytes:
    half = len(content) // 2
    if number % 2:
        return content[:half]
    return content[:half] + bytes(20) + content[half + 20 :]


def read_all(shards: list[str]) -> list[bytes]:
    """Return the encoded images of some shards, in memory."""
    members = (member for shard in shards for member in _read_members(shard))
    return [content for name, content in members if name.endswith(".jpg")]


def _read_members(shard: str) -> list[tuple[str, bytes]]:
    import tarfile

    with tarfile.open(shard) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar)
        return [(name, file.read()) for name, file in files if file is not None]


CORES = len(os.sched_getaffinity(0))
