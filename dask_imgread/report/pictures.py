"""The pictures of a report: thumbnails of images, read from the shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dask_imgread.decoding.contract import Pixels
from dask_imgread.decoding.header import ImageError, read_header
from dask_imgread.decoding.pillow import decode_with_pillow
from dask_imgread.report.elements import render_placeholder, render_thumbnail
from dask_imgread.report.statistics import Row
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import ByteSource
from dask_imgread.storage.redaction import hide_secrets
from dask_imgread.thumbnails import embed_thumbnail

_THREADS = 4
_SIDE = 320  # pixels, at most: they are shown with half of that, and enlarged on a click
_MAX_PIXELS = 1 << 28


def load_pictures(
    rows: Iterable[Row], captions: Mapping[str, Sequence[str]], storage_options: dict[str, Any]
) -> dict[str, str]:
    """Return, by image id, the HTML of each image's picture, or of why it can't be shown."""
    by_shard: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_shard[row.shard][row.image_id] = row

    def load(shard: str) -> dict[str, str]:
        wanted = sorted(by_shard[shard].values(), key=lambda row: row.offset)
        try:
            with open_shard(shard, storage_options) as source:
                return {row.image_id: render(source, row) for row in wanted}
        except Exception as error:  # no error of a file system may keep the page from being written
            return dict.fromkeys(by_shard[shard], render_error(error))

    def render(source: ByteSource, row: Row) -> str:
        try:
            thumbnail = embed_thumbnail(_decode(source, row), _SIDE)
        except Exception as error:
            return render_error(error)
        return render_thumbnail(thumbnail, captions.get(row.image_id, ()))

    def render_error(error: Exception) -> str:
        reason = str(error) or type(error).__name__
        return render_placeholder(hide_secrets(reason, storage_options))

    with ThreadPoolExecutor(_THREADS) as pool:
        return {
            image_id: html
            for loaded in pool.map(load, by_shard)
            for image_id, html in loaded.items()
        }


def _decode(source: ByteSource, row: Row) -> Pixels:
    if row.size > 4 * _MAX_PIXELS:
        raise ImageError(f"too large: {row.size} bytes")
    content = source.read_at(row.offset, row.size)
    header = read_header(content)
    if header.width * header.height > _MAX_PIXELS:
        raise ImageError(f"too large: {header.width} x {header.height} pixels")
    return decode_with_pillow(content, header)
