"""Shards that are damaged, compressed or odd: nothing in them is lost in silence."""

import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dask_imgread import ImageReaderStage, ReadError, partition_shards
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.images import JPEG, members_of, read, read_members

STORED = 512 + -(-len(JPEG) // 512) * 512  # bytes of the JPEG in a tar, its header included


def test_names_with_several_dots(tmp_path):
    good, _ = read_members(tmp_path, ("a.left.jpg", JPEG), ("a.right.jpg", JPEG), ("a.json", b"{}"))
    assert [i.key for i in good] == ["a", "a"]
    assert len({i.image_id for i in good}) == 2
    assert [i.metadata for i in good] == [{"json": {}}] * 2


def test_names_that_are_no_images_and_odd_ones_that_are(tmp_path):
    names = [
        "README",
        "a.jpg.txt",
        ".jpg",
        "x/.hidden.jpg",
        "../../etc/passwd.jpg",
        "/root.jpg",
        "日本.JPG",
    ]
    good, failed = read_members(tmp_path, *[(name, JPEG) for name in names])
    assert [i.image_path.removeprefix(str(tmp_path / "s.tar") + "/") for i in good] == names[3:]
    assert not failed
    assert sorted(os.listdir(tmp_path)) == ["s.tar"]


def test_duplicate_names_are_never_silent(tmp_path, caplog):
    other = encode_picture(draw_picture(4, (32, 32)))
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.jpg", other)])
    good, _ = read(shard)
    assert [i.image_data.shape[:2] for i in good] == [(48, 64), (48, 64), (32, 32)]
    assert len({i.image_id for i in good}) == 3
    assert "duplicate name" in good[2].warning
    assert "duplicate name" in caplog.text
    parts = partition_shards(shard, images_per_partition=1)
    assert len(parts) == 3
    in_parts = [i.image_id for task in parts for b in ImageReaderStage()(task) for i in b.data]
    assert in_parts == [i.image_id for i in good]


def test_empty_shards(tmp_path):
    assert read_members(tmp_path) == ([], [])
    assert read_members(tmp_path, ("a.txt", b"x")) == ([], [])


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_shards(tmp_path, ending, photo_shards):
    members = list(members_of(photo_shards[0]).items())
    shard = write_shard(tmp_path / f"s{ending}", members)
    good, failed = read(shard, dali_batch_size=7)
    plain, _ = read(photo_shards[0])
    assert not failed
    assert [(i.key, i.offset, i.metadata) for i in good] == [
        (i.key, i.offset, i.metadata) for i in plain
    ]
    for image, expected in zip(good, plain, strict=True):
        np.testing.assert_array_equal(image.image_data, expected.image_data)
    assert len(partition_shards(shard, images_per_partition=5)) == 1
    assert len(partition_shards(str(tmp_path))) == 1


def test_a_compressed_shard_larger_than_what_is_kept(tmp_path, monkeypatch):
    from dask_imgread.shards import ahead, samples

    monkeypatch.setattr(ahead, "_STARTS", [0])
    monkeypatch.setattr(ahead, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(samples, "_WINDOW", 4096)
    members = [(f"{n}.{e}", c) for n in range(20) for e, c in (("jpg", JPEG), ("txt", b"%d" % n))]
    good, failed = read(write_shard(tmp_path / "s.tar.gz", members), dali_batch_size=6)
    assert [i.metadata["txt"] for i in good] == [str(n) for n in range(20)]
    assert not failed


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.zst"])
def test_a_truncated_shard_gives_all_before_the_cut_and_one_record(tmp_path, ending):
    members = [(f"{n}.jpg", JPEG) for n in range(20)]
    members += [("noise.jpg", np.random.default_rng(0).bytes(300_000))]  # nothing compresses it
    path = Path(write_shard(tmp_path / f"s{ending}", members))
    path.write_bytes(path.read_bytes()[:-100_000])
    good, failed = read(path)
    assert len(good) == 20
    (cut,) = failed
    assert cut.cause == "truncated archive"
    assert cut.image_path.endswith("/noise.jpg")


def test_a_cut_between_members_is_recorded(tmp_path):
    path = Path(write_shard(tmp_path / "s.tar", [("a.jpg", JPEG), ("b.jpg", JPEG)]))
    path.write_bytes(path.read_bytes()[:STORED])
    good, failed = read(path)
    assert len(good) == 1
    assert failed[0].error.startswith("truncated archive: it ends at byte")


def test_a_damaged_header_in_the_middle(tmp_path):
    path = Path(write_shard(tmp_path / "s.tar", [(f"{n}.jpg", JPEG) for n in range(5)]))
    content = bytearray(path.read_bytes())
    content[3 * STORED + 10] ^= 0xFF
    path.write_bytes(content)
    good, failed = read(path)
    assert [image.key for image in good] == ["0", "1", "2", "4"]
    assert [i.cause for i in failed] == ["damaged archive"]


def test_a_lost_or_wrong_shard_is_recorded(tmp_path):
    (tmp_path / "text.tar").write_text("hello")
    for name in ("text.tar", "lost.tar"):
        good, failed = read(tmp_path / name)
        assert not good
        assert [i.cause for i in failed] == ["unreadable shard"]
        assert failed[0].shard == str(tmp_path / name)
    with pytest.raises(ReadError, match=r"text\.tar"):
        read(tmp_path / "text.tar", on_error="raise")


def test_a_sparse_member_is_refused_with_a_record(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in [
            ("a.jpg", {}),
            (
                "b.jpg",
                {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "real.jpg"},
            ),
            ("c.jpg", {}),
        ]:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(JPEG), headers
            tar.addfile(info, io.BytesIO(JPEG))
    good, failed = read(path)
    assert len(good) == 2
    assert failed[0].image_path.endswith("/real.jpg")
    assert failed[0].error == "unsupported: stored as a sparse file"


def test_sizes_in_base_256_and_in_pax(tmp_path):
    path = tmp_path / "s.tar"
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + len(JPEG).to_bytes(11, "big")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    padded = JPEG + bytes(-len(JPEG) % 512)
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = {"size": str(len(JPEG))}
    pax = info.tobuf(tarfile.PAX_FORMAT)
    path.write_bytes(bytes(header) + padded + pax + padded + bytes(1024))
    good, failed = read(path)
    assert [(i.size, i.image_data.shape) for i in good] == [(len(JPEG), (48, 64, 3))] * 2
    assert not failed


def test_bad_sidecars_do_not_fail_their_image(tmp_path, caplog):
    members = [
        ("a.jpg", JPEG), ("a.json", b"{broken"),
        ("b.jpg", JPEG), ("b.json", b"[" * 100_000),
        ("c.jpg", JPEG), ("c.json", b'"' + b"x" * (17 << 20) + b'"'),
        ("d.jpg", JPEG), ("d.txt", b"\xff\xfe"), ("d.cls", b"7"),
    ]  # fmt: skip
    good, failed = read_members(tmp_path, *members)
    assert len(good) == 4
    assert not failed
    for image, word in zip(good, ["Expecting", "nested", "17825794 bytes", "codec"], strict=True):
        assert word in image.warning
        assert image.image_path in caplog.text
    assert good[3].metadata == {"cls": 7}
    assert good[0].metadata == {}


def test_nothing_is_written_to_disk(tmp_path):
    shard = write_shard(tmp_path / "s.tar", [("../../x.jpg", JPEG), ("y.jpg", JPEG[:100])])
    before = sorted(os.walk(tmp_path))
    opened = []

    def watch(event, arguments):
        if event == "open" and arguments[1] is not None and set(str(arguments[1])) & set("wxa+"):
            opened.append(arguments[0])

    sys.addaudithook(watch)
    read(shard)
    # Only what DALI prints is caught in a file, which lies in memory and not on a disk.
    assert [path for path in opened if str(path).startswith(str(tmp_path))] == []
    assert sorted(os.walk(tmp_path)) == before
