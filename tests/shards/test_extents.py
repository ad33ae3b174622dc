"""Where whole samples lie: the same wherever a shard is read from, and exactly their members."""

import gzip
import io
import tarfile

import pandas as pd
import pyarrow as pa
import pytest

from dask_imgread import partition_shards, read_metadata
from dask_imgread.shards.samples import ShardIndex, index_members
from dask_imgread.shards.sources import open_shard
from dask_imgread.shards.tar import walk_members
from dask_imgread.testing import draw_picture, encode_picture
from tests.helpers.servers import serve_http

JPEG = encode_picture(draw_picture(0, (32, 24)))
APPLE = b"\0\5\x16\7" + bytes(100)
LONG = "é" * 120


def link(target, kind=tarfile.SYMTYPE):
    return kind, target


# The members, and the keys whose samples are in one piece, each with the names of its members.
SHARDS = {
    "before and behind": (
        [("a.json", b"{}"), ("a.jpg", JPEG), ("a.txt", b"x"), ("b.jpg", JPEG)],
        {"a": ["a.json", "a.jpg", "a.txt"], "b": ["b.jpg"]},
    ),
    "several images": (
        [("a.0.jpg", JPEG), ("a.1.jpg", JPEG), ("a.json", b"{}"), ("b.jpg", JPEG)],
        {"a": ["a.0.jpg", "a.1.jpg", "a.json"], "b": ["b.jpg"]},
    ),
    "long names": (
        [(f"{LONG}.txt", b"x"), (f"{LONG}.jpg", JPEG), ("b.jpg", JPEG)],
        {LONG: [f"{LONG}.txt", f"{LONG}.jpg"], "b": ["b.jpg"]},
    ),
    "links ahead": (
        [("a.jpg", link("b.jpg")), ("b.jpg", JPEG), ("c.txt", b"x"), ("c.jpg", link("b.jpg"))],
        {"b": ["b.jpg"]},
    ),
    "links back": (
        [
            *(("a.jpg", JPEG), ("a.txt", b"x")),
            *(("b.jpg", link("a.jpg", tarfile.LNKTYPE)), ("b.txt", b"y")),
            *(("c.jpg", link("a.jpg")), ("c.txt", b"y")),
        ],
        {"a": ["a.jpg", "a.txt"]},
    ),
    "of macOS": (
        [("._a.jpg", APPLE), ("a.jpg", JPEG), ("._a.txt", APPLE), ("a.txt", b"x"), ("b.jpg", JPEG)],
        {"b": ["b.jpg"]},
    ),
    "scattered": (
        [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.txt", b"x"), ("c.jpg", JPEG)],
        {"b": ["b.jpg"], "c": ["c.jpg"]},
    ),
    "a folder between": (
        [("d/a.jpg", JPEG), ("e/", (tarfile.DIRTYPE, "")), ("d/a.txt", b"x"), ("d/b.jpg", JPEG)],
        {"d/b": ["d/b.jpg"]},
    ),
    "a key again": (
        [("a.jpg", JPEG), ("a.txt", b"x"), ("b.jpg", JPEG), ("a.jpg", JPEG), ("a.txt", b"y")],
        {"a": ["a.jpg", "a.txt"], "b": ["b.jpg"]},
    ),
}
FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def write(path, members, form):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    content = path.read_bytes()
    path.with_name("s.tar.gz").write_bytes(gzip.compress(content))
    with pa.CompressedOutputStream(str(path.with_name("s.tar.zst")), "zstd") as file:
        file.write(content)
    return content


def read_extents(path):
    rows = read_metadata(path).compute(scheduler="sync").reset_index(drop=True)
    return rows[["key", "offset", "size", "sample_offset", "sample_size"]]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", SHARDS)
def test_extents(tmp_path, name, form):
    members, whole = SHARDS[name]
    content = write(tmp_path / "s.tar", members, FORMATS[form])
    rows = read_extents(tmp_path / "s.tar")
    found = rows[rows["sample_offset"].notna()]
    assert set(found["key"]) == set(whole)
    assert rows["sample_size"].isna().equals(rows["sample_offset"].isna())
    for row in found.itertuples():
        stop = row.sample_offset + row.sample_size
        sample = content[row.sample_offset : stop] + bytes(1024)
        with tarfile.open(fileobj=io.BytesIO(sample)) as tar:
            assert tar.getnames() == whole[row.key]
        assert stop % 512 == row.sample_offset % 512 == 0
        assert content[stop : stop + 5] == bytes(5) or tarfile.TarInfo.frombuf(
            content[stop : stop + 512], "utf-8", "strict"
        )
    with serve_http(tmp_path) as server:
        for other in ("s.tar.gz", "s.tar.zst"):
            pd.testing.assert_frame_equal(read_extents(tmp_path / other), rows)
            pd.testing.assert_frame_equal(read_extents(f"{server.url}/{other}"), rows)
        pd.testing.assert_frame_equal(read_extents(f"{server.url}/s.tar"), rows)


@pytest.mark.parametrize("name", SHARDS)
def test_parts_of_a_shard_give_the_same(tmp_path, name):
    path = tmp_path / "s.tar"
    write(path, SHARDS[name][0], tarfile.PAX_FORMAT)
    tasks = partition_shards(path, images_per_partition=1)
    pd.testing.assert_frame_equal(read_extents(tasks), read_extents(path))


def test_an_index_keeps_its_extents(tmp_path):
    write(tmp_path / "s.tar", SHARDS["scattered"][0], tarfile.PAX_FORMAT)
    with open_shard(str(tmp_path / "s.tar")) as source:
        index = index_members(walk_members(source))
    assert ShardIndex.from_json(index.to_json()) == index
    assert [entry.extent for entry in index.images].count(None) == 1
