"""Thumbnails: pixels made small, and tiles of HTML that show images in a notebook."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np
from PIL import Image

from dask_imgread.decoding.contract import Pixels
from dask_imgread.decoding.geometry import resize
from dask_imgread.texts import LONGEST, escape_line, shorten

_SIDE = 112  # pixels
_QUALITIES = (70, 40, 10)  # the first at which a picture takes no more than
_MOST = 3200  # characters: 24 tiles then take less than 100 kB, unless their texts are long

# Inline, since some notebooks drop style sheets; in the page's own colours, light or dark.
_SHEET = "display:flex;flex-wrap:wrap;gap:10px;margin:6px 0;color:inherit"
_TILE = (
    f"width:{_SIDE + 8}px;font-size:11px;line-height:1.35;text-align:left;overflow-wrap:anywhere"
)
_PICTURE = (
    f"box-sizing:border-box;width:100%;height:{_SIDE + 8}px;padding:3px;overflow:hidden;"
    "margin-bottom:3px;display:flex;flex-direction:column;align-items:center;"
    "justify-content:safe center;text-align:center;border-radius:4px;border:1px solid"
)
_PLAIN = "rgba(128,128,128,.35)"
_FAILED = "rgba(224,86,106,.8);background:rgba(224,86,106,.12)"
_IMAGE = "display:block;margin:0;max-width:100%;max-height:100%"
_LINES = "display:-webkit-box;-webkit-box-orient:vertical;overflow:hidden;-webkit-line-clamp:"
_SOFT = "opacity:.65"


class Record(Protocol):
    """What is shown of an image: an ImageObject has it all."""

    image_id: str
    image_path: str
    image_data: Pixels | None
    metadata: dict[str, Any]
    size: int
    width: int | None
    height: int | None
    error: str | None


def shrink(pixels: Pixels, side: int) -> Pixels:
    """Return pixels of which the longer side is at most ``side``."""
    height, width = pixels.shape[:2]
    scale = min(1, side / max(height, width))
    return resize(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))


def embed_thumbnail(pixels: Pixels, side: int, quality: int = 82) -> str:
    """Return a data URL with a thumbnail, as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(shrink(pixels, side)).save(buffer, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _embed_small(pixels: Pixels) -> str:
    small = shrink(pixels, _SIDE)
    for quality in _QUALITIES:
        source = embed_thumbnail(small, _SIDE, quality)
        if len(source) <= _MOST:
            break
    return source


def render_images(images: Sequence[Record], count: int = 24, title: str = "") -> str:
    """Return HTML with a tile for each of at most ``count`` images, and how many more there are."""
    shown = _choose(images, count)
    tiles = "".join(map(_render_tile, shown))
    more = f"and {len(images) - len(shown):,} more" if len(shown) < len(images) else ""
    return (
        f"<div>{escape_line(title, 2 * LONGEST)}</div>" * bool(title)
        + f'<div style="{_SHEET}">{tiles}</div>' * bool(tiles)
        + f"<div>{more}</div>" * bool(more)
    )


def _choose(images: Sequence[Record], count: int) -> list[Record]:
    """Return the first images, in order; failed ones have a quarter of the places at least."""
    failed = [place for place, image in enumerate(images) if image.error]
    read = [place for place, image in enumerate(images) if not image.error]
    failed = failed[: max(count // 4, count - len(read))]
    return [images[place] for place in sorted(failed + read[: count - len(failed)])]


def _render_tile(image: Record) -> str:
    image_id = image.image_id or image.image_path
    shard, _, name = image_id.partition("/")
    lines = [
        _render_lines(shorten(name, 48), 3),
        _render_lines(shorten(shard, 24), 1, _SOFT),
        _render_lines(_describe_size(image), 1, _SOFT),
    ]
    caption = image.metadata.get("txt", image.metadata.get("caption"))
    if isinstance(caption, str):
        lines.append(_render_lines(caption, 3))
    title = escape_line(shorten(image_id, LONGEST))
    return f'<div style="{_TILE}" title="{title}">{_render_picture(image)}{"".join(lines)}</div>'


def _render_lines(text: str, most: int, style: str = "") -> str:
    return f'<div style="{_LINES}{most};{style}">{escape_line(text)}</div>' if text else ""


def _render_picture(image: Record) -> str:
    if image.error:
        cause, _, detail = image.error.partition(":")
        content = f"<b>{escape_line(cause)}</b>{_render_lines(detail, 5)}"
    elif _can_show(image.image_data):
        source = _embed_small(image.image_data)
        content = f'<img alt="" style="{_IMAGE}" src="{source}">'
    else:
        content = _render_lines(_explain(image.image_data), 5, _SOFT)
    border = _FAILED if image.error else _PLAIN
    return f'<div style="{_PICTURE} {border}">{content}</div>'


def _can_show(pixels: Any) -> TypeGuard[Pixels]:
    return (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.shape[2:] == (3,)
        and pixels.size > 0
    )


def _explain(pixels: Any) -> str:
    """Say why there is no thumbnail."""
    if pixels is None:
        return "not decoded"
    if hasattr(pixels, "__cuda_array_interface__"):
        return "its pixels are in a GPU's memory"
    shape = " x ".join(map(str, getattr(pixels, "shape", ())))
    return f"no RGB image: {shape} {getattr(pixels, 'dtype', type(pixels).__name__)}"


def _describe_size(image: Record) -> str:
    sides = f"{image.width:,} \u00d7 {image.height:,}" if image.width and image.height else ""
    kib = f"{image.size / 1024:,.1f} KiB" if image.size else ""
    return " · ".join(filter(None, [sides, kib]))
