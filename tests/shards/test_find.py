"""How shards are found, and opened by what is in them and not by what they are called."""

import bz2
import gzip
import io
import os
import struct
import tarfile

import pyarrow as pa
import pytest

from dask_imgread import FileGroupTask, ImageReaderStage, partition_shards, read_metadata
from dask_imgread.shards.find import find_shards
from dask_imgread.testing import draw_picture, encode_picture, make_shards, write_shard

PNGS = [encode_picture(draw_picture(n, (48, 32)), "png") for n in range(6)]
SKIPPED = struct.pack("<II", 0x184D2A50, 100_000) + bytes(100_000)


def read(path):
    batches = ImageReaderStage(device="cpu").process(FileGroupTask(data=[str(path)]))
    good = [image.key for batch in batches for image in batch.data]
    return good, [image.error for batch in batches for image in batch.failed]


def make_tar(names="abcdef"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in zip(names, PNGS, strict=False):
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


TAR = make_tar()
CODECS = {
    "plain": lambda content: content,
    "gzip": gzip.compress,
    "zstd": lambda content: pa.compress(content, "zstd", asbytes=True),
    "bz2": bz2.compress,
    "zstd with a skippable frame first": lambda c: SKIPPED + CODECS["zstd"](c),
    "zstd in frames": lambda c: CODECS["zstd"](c[:5000]) + SKIPPED + CODECS["zstd"](c[5000:]),
    "gzip in members": lambda c: gzip.compress(c[:5000]) + gzip.compress(c[5000:]),
}


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
@pytest.mark.parametrize("codec", CODECS)
def test_names_may_say_anything(tmp_path, codec, ending):
    path = tmp_path / f"s{ending}"
    path.write_bytes(CODECS[codec](TAR))
    assert read(path) == ([*"abcdef"], [])
    parts = partition_shards(str(path), images_per_partition=2)
    assert len(parts) == (3 if codec == "plain" else 1)


@pytest.mark.parametrize("scheme", ["memory", "http"])
@pytest.mark.parametrize("codec", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_names_may_say_anything_elsewhere_too(tmp_path, scheme, codec, ending):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    import fsspec

    content = CODECS[codec](TAR)
    if scheme == "memory":
        fsspec.filesystem("memory").pipe(f"/s{ending}", content)
        assert read(f"memory://s{ending}") == ([*"abcdef"], [])
        return
    (tmp_path / f"s{ending}").write_bytes(content)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/s{ending}"
            assert read(url) == ([*"abcdef"], [])
        finally:
            server.shutdown()


def test_a_member_whose_name_looks_compressed(tmp_path):
    (tmp_path / "s.tar").write_bytes(make_tar(["BZhang", "b"]))
    assert read(tmp_path / "s.tar") == (["BZhang", "b"], [])


@pytest.mark.parametrize(
    ("codec", "damage"), [("gzip", "cut"), ("zstd", "cut"), ("gzip", "overwritten")]
)
def test_what_is_sound_before_the_damage_is_read(tmp_path, codec, damage):
    """And the decompressor's own error is told."""
    members = [
        (f"{n:03d}.ppm", encode_picture(draw_picture(n, (48, 32)), "ppm")) for n in range(200)
    ]
    with open(write_shard(tmp_path / "plain.tar", members), "rb") as file:
        content = CODECS[codec](file.read())
    place = len(content) // 2
    later = content[place + 500 :] if damage == "overwritten" else b""
    (tmp_path / "s.tar").write_bytes(content[:place] + b"\xff" * 500 * bool(later) + later)
    good, errors = read(tmp_path / "s.tar")
    assert good == [f"{n:03d}" for n in range(len(good))]
    assert len(good) > 50
    said = "Truncated compressed stream" if damage == "cut" else "zlib inflate failed"
    assert said in errors[0]


def test_a_window_that_is_too_large(tmp_path):
    """As ``zstd --long=28`` asks for: a frame of one raw block (RFC 8878, 3.1.1)."""
    window = (28 - 10) << 3
    block = (len(TAR) << 3 | 1).to_bytes(3, "little") + TAR
    (tmp_path / "s.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([window]) + block)
    good, (error,) = read(tmp_path / "s.tar.zst")
    assert good == []
    assert "can't be decompressed: ZSTD decompress failed: Frame requires too much memory" in error


@pytest.mark.parametrize("content", [b"\x1f\x8b" + b"garbage" * 9, b"\x28\xb5\x2f\xfd" + b"x" * 99])
def test_the_decompressors_error_is_told(tmp_path, content):
    (tmp_path / "s.tar.gz").write_bytes(content)
    good, (error,) = read(tmp_path / "s.tar.gz")
    assert good == []
    assert error.startswith("unreadable shard: it can't be decompressed: ")
    assert "failed" in error


def test_shards_that_are_symbolic_links(tmp_path):
    """As in the caches of the Hugging Face hub, of DVC and of git-annex."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(make_shards(blobs, shards=3, images_per_shard=2)):
        blob = blobs / f"{number}ab"
        os.rename(path, blob)
        (snapshot / f"{number:05d}.tar").symlink_to(os.path.relpath(blob, snapshot))
    make_shards(tmp_path / "real", shards=1, images_per_shard=2)
    os.rename(tmp_path / "real" / "00000.tar", snapshot / "00003.tar")
    (snapshot / "folder.tar").symlink_to(blobs)  # no shard
    for path in (
        snapshot,
        f"{snapshot}/*.tar",
        f"{snapshot}/0000?.tar",
        f"{snapshot}/0000[0-9].tar",
    ):
        found = find_shards(str(path))
        assert [os.path.basename(shard.path) for shard in found] == [
            f"0000{n}.tar" for n in range(4)
        ]
        assert len(read_metadata(str(path)).compute(scheduler="sync")) == 8
    before = find_shards(str(snapshot))[0]
    os.utime(blobs / "0ab", (1, 1))
    after = find_shards(str(snapshot))[0]
    assert before.version != after.version
    assert before.size == os.path.getsize(blobs / "0ab")


def test_a_link_to_a_shard_that_is_not_there_is_recorded(tmp_path):
    make_shards(tmp_path, shards=1, images_per_shard=2)
    (tmp_path / "00001.tar").symlink_to("annex/objects/none")
    frame = read_metadata(str(tmp_path)).compute(scheduler="sync")
    assert frame.error.dropna().str.startswith("unreadable shard: ").tolist() == [True]
    assert len(frame) == 3


def test_a_question_mark_is_a_glob_unless_it_is_a_name(tmp_path):
    paths = make_shards(tmp_path, shards=12, images_per_shard=1)
    assert [s.path for s in find_shards(f"{tmp_path}/0000?.tar")] == paths[:10]
    os.rename(paths[0], tmp_path / "what?.tar")
    assert len(find_shards(f"{tmp_path}/what?.tar")) == 1
    with pytest.raises(FileNotFoundError, match="no shard matches"):
        find_shards(f"{tmp_path}/none?.tar")


def test_lists_joined_as_webdataset_does(tmp_path):
    paths = make_shards(tmp_path, shards=4, images_per_shard=2)
    joined = f"{paths[0]}::{tmp_path}/{{00001..00002}}.tar::{tmp_path}/0000[3].tar"
    assert [shard.path for shard in find_shards(joined)] == paths
    assert len(read_metadata(joined).compute(scheduler="sync")) == 8
    task = FileGroupTask(data=[f"{paths[0]}::{paths[1]}"])
    assert task.data == paths[:2]


def test_no_shard_is_overwritten(tmp_path):
    (tmp_path / "00001.tar").write_text("mine")
    with pytest.raises(FileExistsError, match=r"00001\.tar exists already, and is not"):
        make_shards(tmp_path, shards=3, images_per_shard=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00001.tar"]
    assert (tmp_path / "00001.tar").read_text() == "mine"


def test_a_folder_of_rows_is_no_folder_of_shards(tmp_path):
    (tmp_path / "part.0.parquet").touch()
    with pytest.raises(
        FileNotFoundError, match=r"no \.tar .* the frame dd\.read_parquet\(\.\.\.\)$"
    ):
        find_shards(str(tmp_path))
