"""Shards of drawn pictures, for tests of image pipelines. See also ``pytest_plugin``."""

from __future__ import annotations

from dask_imgread.pictures import draw_picture, encode_picture, make_shards, write_shard

__all__ = ["draw_picture", "encode_picture", "make_shards", "write_shard"]
