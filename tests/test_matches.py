"""Images on a list of digests or hashes: every kind of list, and what is none."""

import hashlib
from pathlib import Path

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_imgread import ImageReaderStage, load_images, match_hashes, read_metadata, run_job
from dask_imgread.testing import make_shards, write_shard

DIGESTS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(4)]


def make_rows(hashes, digests=None):
    ids = [f"s-1/{n:02}.jpg" for n in range(len(hashes))]
    return pd.DataFrame(
        {
            "shard": pd.array(["s.tar"] * len(hashes), "string[pyarrow]"),
            "offset": 512,
            "size": 100,
            "sha256": pd.array(digests or [None] * len(hashes), "string[pyarrow]"),
            "phash": pd.array(hashes, "uint64[pyarrow]"),
        },
        index=pd.Index(ids, dtype="string[pyarrow]", name="image_id"),
    )


def sum_up(found):
    names = [name[-6:-4] for name in found.index]
    return [*zip(names, found["matched"], found["distance"], strict=True)]


@pytest.fixture
def write(tmp_path):
    """Write a list to a file."""

    def write(*lines):
        path = tmp_path / "list.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
        return path

    return write


def test_digests(write):
    rows = make_rows([0] * 5, [*DIGESTS[:3], None, DIGESTS[1]])
    path = write("# to be taken down", "", f"  {DIGESTS[1].upper()} # twice", DIGESTS[3])
    wanted = [("01", DIGESTS[1], 0), ("04", DIGESTS[1], 0)]
    for listed in (path, str(path), [DIGESTS[3], DIGESTS[1]], pd.Series(DIGESTS[1:2])):
        found = match_hashes(rows, listed)
        assert sum_up(found) == wanted
        assert list(found) == [*rows, "matched", "distance"]
        lazy = match_hashes(dd.from_pandas(rows, 2), listed)
        pd.testing.assert_frame_equal(lazy.compute(scheduler="sync"), found)
        assert lazy.dtypes.equals(found.dtypes)
    assert len(match_hashes(rows, DIGESTS[3:])) == 0
    numbered = rows.reset_index()
    assert sum_up(match_hashes(numbered, path)) == wanted


def test_md5_while_reading(tmp_path):
    contents = [b"no image", b"none either"]
    members = [(f"{n}.jpg", content) for n, content in enumerate(contents)]
    shard = write_shard(tmp_path / "s.tar", members)
    reader = ImageReaderStage(md5=True, verbose=False)
    found = match_hashes(
        read_metadata(shard, reader=reader), [hashlib.md5(contents[1]).hexdigest()]
    )
    assert found.compute(scheduler="sync")["key"].tolist() == ["1"]


def test_md5_needs_a_column():
    rows = make_rows([0, 1])
    with pytest.raises(ValueError, match=r"no column md5: make the rows with .* \(--md5\)"):
        match_hashes(rows, ["0" * 32])
    assert sum_up(match_hashes(rows.assign(md5=["A" * 32, None]), ["a" * 32])) == [
        ("00", "a" * 32, 0)
    ]


def test_hashes_of_pixels(write):
    rows = make_rows([0, 0b111, 0b11_1111, None, 1 << 63])
    path = write("0" * 16, "F000000000000000")
    zero, f = "0" * 16, "f" + "0" * 15
    assert sum_up(match_hashes(rows, path)) == [("00", zero, 0), ("01", zero, 3), ("04", zero, 1)]
    assert sum_up(match_hashes(rows, path, distance=0)) == [("00", zero, 0)]
    assert sum_up(match_hashes(rows, [0xF << 60])) == [("00", f, 4), ("04", f, 3)]
    assert sum_up(match_hashes(rows, rows["phash"][1:2], distance=0)) == [("01", f"{7:016x}", 0)]
    assert sum_up(match_hashes(rows, np.array([-1]), distance=0)) == []
    renamed = rows.rename(columns={"phash": "dhash"})
    assert len(match_hashes(renamed, path, by="dhash")) == 3
    assert len(match_hashes(rows[:0], path)) == 0


HASHES = st.lists(st.sampled_from([0, 1, 3, 7, 255, 1 << 63, (1 << 64) - 1, None]), max_size=8)


@settings(max_examples=100, deadline=None)
@given(HASHES, HASHES.map(lambda some: [x for x in some if x is not None] or [5]), st.data())
def test_as_in_plain_python(hashes, listed, data):
    distance = data.draw(st.integers(0, 16))
    nearest = [
        min(((one ^ other).bit_count(), other) for other in listed) if one is not None else (99, 0)
        for one in hashes
    ]
    wanted = [
        (f"{number:02}", f"{value:016x}", bits)
        for number, (bits, value) in enumerate(nearest)
        if bits <= distance
    ]
    assert sum_up(match_hashes(make_rows(hashes), listed, distance=distance)) == wanted


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((DIGESTS[0], "", "0" * 16), "list.txt, line 3: 0{16} is one of 64-bit hashes, and those "),
        ((DIGESTS[0], "x" * 64), "list.txt, line 2: x{64} is none: give .* 64 for SHA-256 digest"),
        (("0" * 15,), "list.txt, line 1: 0{15} is none"),
        ((f"{DIGESTS[0]} s/a.jpg",), "list.txt, line 1: .*jpg is none"),
        (("# nothing",), "list.txt: there are none: give one in each line"),
    ],
)
def test_what_is_no_list(write, lines, message):
    with pytest.raises(ValueError, match=message):
        match_hashes(make_rows([0]), write(*lines))


def test_what_can_not_be_matched(tmp_path):
    rows = make_rows([0])
    with pytest.raises(ValueError, match="hashes, entry 2: b is none"):
        match_hashes(rows, [DIGESTS[0], "b"])
    with pytest.raises(ValueError, match="no column dhash: make the rows with the function finger"):
        match_hashes(rows, [0], by="dhash")
    with pytest.raises(ValueError, match="the list has 64-bit hashes, and the column sha256 does"):
        match_hashes(rows, [0], by="sha256")
    with pytest.raises(ValueError, match="distance is 17"):
        match_hashes(rows, [0], distance=17)
    with pytest.raises(FileNotFoundError):
        match_hashes(rows, tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"binary: .*: give a text file"):
        match_hashes(rows, tmp_path / "binary")


def test_while_reading_and_afterwards(tmp_path, client):
    shards = make_shards(tmp_path / "shards", shards=3, images_per_shard=4)
    frame = read_metadata(shards, checksum=True)
    digests = frame["sha256"].compute().iloc[[2, 9]].tolist()
    store = fsspec.filesystem("memory")
    store.pipe("/lists/takedown.txt", "\n".join(digests).encode())
    run_job(shards, str(tmp_path / "out"), client=client, checksum=True)
    for given_frame in (frame, Path(tmp_path / "out")):
        found = match_hashes(given_frame, "memory://lists/takedown.txt").compute()
        assert sorted(found["matched"]) == sorted(digests)
    assert len(load_images(found)) == 2
    store.rm("/lists", recursive=True)
