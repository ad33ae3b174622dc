"""Decode any image on the CPU with Pillow: the first frame, upright, as RGB."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dask_imgread.decoding.contract import Content, Header, Pixels
from dask_imgread.decoding.geometry import apply_orientation
from dask_imgread.decoding.header import ImageError, open_with_pillow, to_image_error

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_BITS_PER_SAMPLE = 258  # TIFF's tag


def decode_with_pillow(content: Content, header: Header) -> Pixels:
    """Return an image's pixels, uint8 ``(height, width, 3)``; they may be read-only.

    Raises
    ------
    ImageError
        If it can't be decoded, or its size differs from the header's.
    """
    try:
        with open_with_pillow(io.BytesIO(content)) as image:
            height, width = header.stored_size
            if image.size != (width, height):
                sizes = f"{width} x {height} pixels, or {image.width} x {image.height}"
                raise ImageError(f"corrupt: {sizes}")
            pixels = _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        raise to_image_error(error, content) from error
    if header.orientation == 1:
        return pixels
    upright = np.empty((header.height, header.width, 3), np.uint8)
    apply_orientation(np.ascontiguousarray(pixels), header.orientation, upright)
    return upright


def _to_rgb(image: ImageFile) -> Pixels:
    """Convert to 8-bit RGB. Of 16 bits the upper 8 are kept, where Pillow clips some formats."""
    if image.format == "PPM" and image.tile and image.tile[0][3] == ("RGB", 0xFFFF):
        return _read_wide_ppm(image)
    if image.format == "TIFF":
        # Otherwise the plugin checks the size against `Image.MAX_IMAGE_PIXELS`, which is global.
        size = getattr(image, "_tile_size", image.size)
        image.im = Image.new(image.mode, size, None).im
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if wide:
        bits: int = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        grey = np.asarray(image) >> (bits - 8)
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    image.load()
    image.info.pop("transparency", None)  # unused; Pillow warns about a palette's
    rgb: Pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return rgb


def _read_wide_ppm(image: ImageFile) -> Pixels:
    """Read a binary 16-bit colour PPM, the only format in which Pillow rounds to 8 bits."""
    assert image.fp is not None  # still open: no pixels were loaded yet
    image.fp.seek(image.tile[0][2])
    content = image.fp.read(image.width * image.height * 6)
    if len(content) < image.width * image.height * 6:
        raise OSError(f"image file is truncated ({len(content)} bytes of pixels)")
    wide = np.frombuffer(content, ">u2").reshape(image.height, image.width, 3)
    return (wide >> 8).astype(np.uint8)
