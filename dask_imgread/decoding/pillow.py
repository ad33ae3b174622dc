"""Decode any image on the CPU with Pillow: the first frame, upright, as RGB."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dask_imgread.decoding.contract import Content, Header, Pixels
from dask_imgread.decoding.geometry import turn
from dask_imgread.decoding.header import ImageError, explain_error, open_with_pillow

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_BITS_PER_SAMPLE = 258  # TIFF's tag


def decode_with_pillow(content: Content, header: Header) -> Pixels:
    """Return an image's pixels, uint8 ``(height, width, 3)``, perhaps read-only.

    Raises
    ------
    ImageError
        If it can't be decoded, or is of another size than its header has told.
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
    except Exception as error:  # Pillow's decoders let through whatever they run into
        raise explain_error(error, content) from error
    if header.orientation == 1:
        return pixels
    upright = np.empty((header.height, header.width, 3), np.uint8)
    turn(np.ascontiguousarray(pixels), header.orientation, upright)
    return upright


def _to_rgb(image: ImageFile) -> Pixels:
    """Convert to 8-bit RGB. Of 16 bits the upper 8 are kept; Pillow would clip some of them."""
    if image.format == "PPM" and image.tile and image.tile[0][3] == ("RGB", 0xFFFF):
        return _read_wide_ppm(image)
    if image.format == "TIFF":
        # Else its plugin compares the size with `Image.MAX_IMAGE_PIXELS`, the whole process's.
        size = getattr(image, "_tile_size", image.size)
        image.im = Image.new(image.mode, size, None).im
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if wide:
        bits: int = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        grey = np.asarray(image) >> (bits - 8)
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    image.load()
    image.info.pop("transparency", None)  # which is dropped: of that of a palette Pillow warns
    rgb: Pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return rgb


def _read_wide_ppm(image: ImageFile) -> Pixels:
    """Read a binary colour PPM of 16 bits, the one source of which Pillow rounds the upper 8."""
    assert image.fp is not None  # it is open: nothing was loaded yet
    image.fp.seek(image.tile[0][2])
    content = image.fp.read(image.width * image.height * 6)
    if len(content) < image.width * image.height * 6:
        raise OSError(f"image file is truncated ({len(content)} bytes of pixels)")
    wide = np.frombuffer(content, ">u2").reshape(image.height, image.width, 3)
    return (wide >> 8).astype(np.uint8)
