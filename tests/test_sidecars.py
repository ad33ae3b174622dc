"""Columns of the metadata for what sidecars hold, and for checksums."""

import hashlib
import json
import math
import re
import subprocess
import sys

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dask_imgread import FileGroupTask, ImageReaderStage, StorageError, read_metadata
from dask_imgread.sidecars import MetadataColumns, name_type
from dask_imgread.tasks import COLUMNS
from dask_imgread.testing import make_shards, write_shard
from tests.helpers.images import encode
from tests.helpers.servers import Faults, count_bytes, serve_http

INFERRED = 32  # images of a partition from which types are found


@pytest.fixture(scope="module")
def picture(photographs):
    return encode(photographs[0].crop((0, 0, 40, 30)), "JPEG")


@pytest.fixture
def write(tmp_path, picture):
    """Write a shard of samples, each a dict of sidecars; values are dumped for ``json``."""

    def write(*samples, name="a.tar", image=picture):
        members = []
        for number, sidecars in enumerate(samples):
            members.append((f"{number:03d}.jpg", image))
            for extension, value in sidecars.items():
                content = value if isinstance(value, bytes) else json.dumps(value).encode()
                members.append((f"{number:03d}.{extension}", content))
        return write_shard(tmp_path / name, members)

    return write


def read(*paths, **options):
    return read_metadata(list(paths), **options).compute(scheduler="sync")


def list_column(rows, name):
    """Return a column's values, None where they are null."""
    return pa.array(rows[name]).to_pylist()


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.zst"])
def test_values_of_all_kinds(write, decode, suffix):
    shard = write(
        {"txt": "été\n".encode(), "cls": b"7", "npy": b"\x93\0", "json": {"a": 1, "b": {"c": 0.5}}},
        {"json": {"a": 2, "b": {"c": None}, "b.c": 3, "l": ["x"], "t": True, "o": {"k": 1}}},
        {},
        name=f"a.{suffix}",
    )
    keys = ["a", "b.c", "l", "t", "o", "never"]
    wanted = {"txt": "caption", "cls": "label", "npy": "vector", "json": keys}
    rows = read(shard, sidecars=wanted, decode=decode)
    names = ["caption", "label", "vector", *keys, "error_sidecar"]
    assert [*rows.columns] == [*COLUMNS, *names]
    assert {name: str(rows[name].dtype) for name in names} == {
        "caption": "string",
        "label": "int64[pyarrow]",
        "vector": "binary[pyarrow]",
        "a": "int64[pyarrow]",
        "b.c": "double[pyarrow]",
        "l": "list<item: string>[pyarrow]",
        "t": "bool[pyarrow]",
        "o": "string",
        "never": "string",
        "error_sidecar": "string",
    }
    assert [list_column(rows, name) for name in names] == [
        ["été\n", None, None],
        [7, None, None],
        [b"\x93\0", None, None],
        [1, 2, None],
        [0.5, 3.0, None],  # the key with a dot comes first
        [None, ["x"], None],
        [None, True, None],
        [None, '{"k": 1}', None],
        [None] * 3,
        [None] * 3,
    ]
    assert rows["error"].isna().all()


def test_a_whole_json_is_text(write):
    values = [{"a": [1, math.nan]}, [1], None, "\ud800"]
    rows = read(write(*({"json": value} for value in values), {}), sidecars={"json": "all"})
    texts = list_column(rows, "all")
    expected = [{"a": [1, None]}, [1], None, "\ud800"]
    assert [text and json.loads(text) for text in texts] == [*expected, None]
    assert texts[2:] == ["null", '"\\ud800"', None]
    assert rows["error_sidecar"].isna().all()


def test_every_partition_has_the_same_schema(client, write, tmp_path):
    shards = [
        write({"json": {"a": 1, "l": [1, 2]}}, {"json": {"a": 0.5}}),
        write_shard(tmp_path / "empty.tar", []),
        write({"json": {"a": None}}, {}, name="nulls.tar"),
        write({"json": {"a": 3, "l": [4]}}, name="integers.tar"),
    ]
    frame = read_metadata(shards, sidecars={"json": ["a", "l"], "txt": "text"})
    partitions = [frame.get_partition(number).compute() for number in range(4)]
    assert [len(partition) for partition in partitions] == [2, 0, 2, 1]
    for partition in partitions:
        assert partition.dtypes.equals(frame._meta.dtypes)
        assert partition.index.dtype == frame._meta.index.dtype
    assert [list_column(each, "a") for each in partitions] == [[1.0, 0.5], [], [None] * 2, [3.0]]
    frame.drop(columns="l").to_parquet(str(tmp_path / "out"))  # pandas reads back no lists
    assert list_column(dd.read_parquet(str(tmp_path / "out")).compute(), "a")[-1] == 3.0


def test_types_are_found_in_later_partitions_where_the_first_has_only_nulls(write, tmp_path):
    shards = [write_shard(tmp_path / "empty.tar", []), write({"json": {"a": None, "b": 1}})]
    shards.append(write({"json": {"a": [0.5], "b": "late"}}, name="b.tar"))
    rows = read(*shards, sidecars={"json": ["a", "b", "c"]})
    assert list_column(rows, "a") == [None, [0.5]]
    assert list_column(rows, "b") == [1, None]
    assert rows["error_sidecar"].iloc[1] == "b: 'late' is no int64"
    assert str(rows["c"].dtype) == "string"
    assert str(read_metadata([], sidecars={"json": ["a"]}).compute()["a"].dtype) == "string"


def test_what_does_not_fit_is_null_with_a_note(write):
    fits = [{"n": 1, "x": 0.5, "s": "a", "t": True, "l": [1], "m": 1}] * INFERRED
    odd = [
        {"n": 1.5, "x": "n/a", "s": 5, "t": 1, "l": [1, "b"], "m": {"k": 1}},
        {"n": True, "x": True, "s": "\ud800", "t": "true", "l": 3, "m": "1"},
        {"n": 1 << 63, "x": 10**400, "s": {"k": 1}, "t": [], "l": [[1]], "m": []},
        {"n": 7.0, "x": (1 << 60) + 1, "s": "b", "t": False, "l": [None, 2], "m": 2},
    ]
    shard = write(*({"json": value} for value in fits + odd))
    rows = read(shard, sidecars={"json": ["n", "x", "s", "t", "l"]})[INFERRED:]
    assert rows["error_sidecar"].iloc[0] == (
        "n: 1.5 is no int64; x: 'n/a' is no float64; s: 5 is no string; t: 1 is no bool; "
        "l: [1, 'b'] is no list<int64>"
    )
    assert [text.count(" is no ") for text in rows["error_sidecar"][:3]] == [5, 5, 5]
    assert max(map(len, rows["error_sidecar"][:3])) < 300
    assert rows[["n", "x", "s", "t", "l"]].iloc[:3].isna().all(axis=None)
    last = rows.iloc[3]  # a whole number is an integer, and any integer a float
    assert [last["n"], last["x"], last["s"], last["t"]] == [7, float(1 << 60), "b", False]
    assert list_column(rows, "l")[3] == [None, 2]
    assert pd.isna(last["error_sidecar"])


def test_values_of_several_types_are_json(write):
    values = [1, "a", None, {"k": 1}, True, [1, "b"]]
    rows = read(write(*({"json": {"m": value}} for value in values)), sidecars={"json": ["m"]})
    assert list_column(rows, "m") == ["1", '"a"', None, '{"k": 1}', "true", '[1, "b"]']


def test_declared_types(write):
    value = {"a": 1, "b": 2, "c": [0.5], "d": {"k": 1}, "e": None, "f": 300}
    types = {"a": "float32", "b": np.int16, "c": "list<float32>", "d": "json", "e": bool}
    types |= {"f": "int8[pyarrow]", "g": pd.ArrowDtype(pa.list_(pa.string()))}
    shard = write({"json": value, "cls": b"9", "prompt": b"words", "md": b"\xff"})
    wholes = {"cls": {"label": "int32"}, "prompt": {"prompt": "string"}, "md": {"note": str}}
    rows = read(shard, sidecars={".JSON": types, **wholes})
    kinds = [str(dtype).removesuffix("[pyarrow]") for dtype in rows.dtypes[len(COLUMNS) : -1]]
    assert kinds == [
        *("float", "int16", "list<item: float>", "string", "bool", "int8"),
        *("list<item: string>", "int32", "string", "string"),
    ]
    found = {name: list_column(rows, name)[0] for name in rows.columns[len(COLUMNS) : -1]}
    plain = {"a": 1.0, "b": 2, "c": [0.5], "d": '{"k": 1}', "label": 9, "prompt": "words"}
    assert found == {**dict.fromkeys(found), **plain}
    assert rows["error_sidecar"].tolist() == [r"f: 300 is no int8; note: b'\xff' is no string"]


def test_sidecars_that_can_not_be_read(write, monkeypatch, caplog):
    monkeypatch.setattr("dask_imgread.reading.members.MAX_SIDECAR_BYTES", 100)
    samples = [
        {"json": b'{"a": 1', "txt": b"good"},
        {"json": {"a": 2}, "txt": b"\xff\xfe"},
        {"json": {"a": 3}, "txt": b"x" * 101},
        {"json": [1], "txt": b"good", "cls": b"not asked for"},
    ]
    rows = read(write(*samples), sidecars={"json": ["a"], "txt": "text"})
    assert list_column(rows, "a") == [None, 2, 3, None]
    assert list_column(rows, "text") == ["good", None, None, "good"]
    assert rows["error"].isna().all()
    assert rows["warning"].isna().tolist() == [False, False, False, True]
    assert (rows["error_sidecar"] == rows["warning"]).tolist()[:3] == [True] * 3
    for text, told in zip(
        rows["error_sidecar"],
        ["sidecar 000.json: Expecting", "'utf-8' codec", "101 bytes are more", "json: [1] is no"],
        strict=True,
    ):
        assert told in text
    assert "not asked for" not in caplog.text


def test_images_of_one_sample_share_its_sidecars(tmp_path, picture):
    members = [("a.left.jpg", picture), ("a.json", b'{"n": 5}'), ("a.right.jpg", picture)]
    shard = write_shard(tmp_path / "a.tar", [*members, ("a.left.txt", b"of the left")])
    rows = read(shard, sidecars={"json": ["n"], "left.txt": "left", "txt": "text"})
    assert list_column(rows, "n") == [5, 5]
    assert list_column(rows, "left") == ["of the left"] * 2
    assert list_column(rows, "text") == [None, None]


@pytest.mark.parametrize("decode", [False, True])
def test_failed_images_have_their_columns(write, picture, decode):
    sample = {"txt": b"a caption", "json": {"n": 1}}
    shard = write(sample, sample, image=b"no image")
    options = {"sidecars": {"txt": "caption", "json": ["n"]}, "checksum": True, "decode": decode}
    rows = read(shard, **options)
    assert rows["error"].notna().all()
    assert list_column(rows, "caption") == ["a caption"] * 2
    assert list_column(rows, "n") == [1, 1]
    assert set(rows["sha256"]) == {hashlib.sha256(b"no image").hexdigest()}
    assert rows["error_sidecar"].isna().all()


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_checksums(tmp_path, photographs, decode, suffix):
    """Of images larger than what is hashed at a time, and of broken ones, too."""
    contents = [encode(photo, "BMP") for photo in (photographs[0], photographs[4])]
    contents += [encode(photographs[3], "JPEG"), contents[0][:-9000], b""]
    assert max(map(len, contents)) > 1 << 20
    members = [(f"{n}.bmp", content) for n, content in enumerate(contents)]
    path = write_shard(tmp_path / f"a.{suffix}", members)
    reader = ImageReaderStage(md5=True, verbose=False)
    rows = read(path, reader=reader, checksum=True, decode=decode).sort_values("key")
    assert list_column(rows, "sha256") == [hashlib.sha256(c).hexdigest() for c in contents]
    assert list_column(rows, "md5") == [hashlib.md5(c).hexdigest() for c in contents]
    assert "error_sidecar" not in rows
    plain = read(path, decode=decode).sort_values("key")
    pd.testing.assert_frame_equal(rows.drop(columns=["sha256", "md5"]), plain)


def test_no_checksum_where_bytes_are_missing(tmp_path, picture):
    path = write_shard(tmp_path / "a.tar", [("a.jpg", picture), ("b.jpg", picture)])
    with open(path, "r+b") as file:
        file.truncate(1024 + len(picture) + 900)
    rows = read(path, checksum=True)
    assert rows["sha256"].notna().tolist() == [True, False]
    assert rows["error"].notna().tolist() == [False, True]


def test_a_reader_that_computes_checksums_has_their_column(write):
    for options, names in ({"checksum": True}, ["sha256"]), ({"md5": True}, ["md5"]):
        reader = ImageReaderStage(verbose=False, **options)
        rows = read(write({}), reader=reader)
        assert [name for name in ("sha256", "md5") if name in rows] == names
        assert rows[names].notna().all(axis=None)
    (batch,) = ImageReaderStage(decode=False, verbose=False)(FileGroupTask(data=[write({})]))
    assert batch.data[0].sha256 is None


def test_of_a_remote_shard_other_sidecars_are_not_fetched(write, tmp_path):
    large = np.random.default_rng(0).bytes(3 << 20)
    shard = write(*({"json": {"n": n}, "npy": large} for n in range(4)))
    size = (tmp_path / "a.tar").stat().st_size
    with serve_http(tmp_path) as server:
        url = f"{server.url}/a.tar"
        frame = read_metadata([url], sidecars={"json": {"n": "int64"}})
        server.requests.clear()
        rows = frame.compute(scheduler="sync")
        assert count_bytes(server.requests, size) < 2 << 20
        all_read = read(url, sidecars={"json": ["n"], "npy": "vector"}, checksum=True)
    assert list_column(rows, "n") == [0, 1, 2, 3]
    assert list_column(all_read, "vector") == [large] * 4
    local = read(shard, sidecars={"json": ["n"]}, checksum=True)
    assert list_column(all_read, "sha256") == list_column(local, "sha256")


def test_no_types_are_taken_from_a_store_that_refuses(write, tmp_path):
    """They would be wrong, and for good in a job."""
    write({"json": {"n": 1}})
    with serve_http(tmp_path) as server:
        task = FileGroupTask(data=[f"{server.url}/a.tar"])
        server.faults = Faults(every=1, kinds=("403",))
        assert "caption" in read_metadata(task, sidecars={"txt": "caption"})
        with pytest.raises(StorageError, match=r"unreachable: .*403"):
            read_metadata(task, sidecars={"json": ["n"]})


def test_the_first_images_alone_are_read_to_find_types(write, monkeypatch):
    shard = write(*({"json": {"n": n}} for n in range(200)))
    parsed = []
    monkeypatch.setattr("dask_imgread.shards.samples._parse_json", lambda c: parsed.append(c) or {})
    read_metadata([shard], sidecars={"json": {"n": "int64"}, "txt": "text"})
    assert not parsed
    read_metadata([shard], sidecars={"json": {"n": None, "m": None}})
    assert len(parsed) <= INFERRED + 2


@pytest.mark.parametrize(
    ("sidecars", "told"),
    [
        ({"json": ["url", "width", "key"]}, "width, key: the metadata would have two columns"),
        ({"txt": "image_id"}, "image_id"),
        ({"txt": "sha256", "cls": "error_sidecar"}, "sha256, error_sidecar"),
        ({"txt": "text", "json": ["text"]}, "text: the metadata would have two"),
        ({"json": ["a", "a"]}, "a: the metadata would have two"),
        ({"json": {"a": "complex"}}, "'complex' is no type of a column: give bool, int8"),
        ({"json": {"a": "list<json>"}}, "'list<json>' is no type of a column"),
        ({"txt": ["a", "b"]}, "give a name or {name: dtype}"),
        ({"txt": {"a": "string", "b": "string"}}, "give a name or {name: dtype}"),
        ({"json": 5}, "5 are no columns of .json"),
        ({"json": [5]}, "5 is no column's name"),
        ({"txt": ""}, "'' is no column's name"),
        ({"jpg": "image"}, ".jpg members are images"),
        (["txt"], 'give columns by extension, such as {"txt": "caption"}, not [\'txt\']'),
        (True, "not True"),
    ],
)
def test_refusals(write, sidecars, told):
    with pytest.raises(ValueError, match=f"^sidecars: .*{re.escape(told)}"):
        read_metadata([write({})], sidecars=sidecars)


@pytest.mark.parametrize("extensions", ["json", 5, None])
def test_a_readers_sidecars_are_a_collection(extensions):
    with pytest.raises(ValueError, match="sidecars must be True, False or a collection"):
        ImageReaderStage(sidecars=extensions)
    assert ImageReaderStage(sidecars={".TXT", "json"}).sidecars == ("json", "txt")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("double[pyarrow]", "float64"),
        ("float[pyarrow]", "float32"),
        (pa.float32(), "float32"),
        (pd.Int64Dtype(), "int64"),
        (pd.StringDtype(), "string"),
        (np.dtype("uint16"), "uint16"),
        (int, "int64"),
        ("list<list<float>>", "list<list<float64>>"),
        (pa.list_(pa.list_(pa.float32())), "list<list<float32>>"),
    ],
)
def test_names_of_types(dtype, name):
    assert name_type(dtype) == name
    assert name_type(name) == name


TOKENS = """
import sys
from dask_imgread import read_metadata
frame = read_metadata(sys.argv[1], sidecars={"txt": "t", "json": ["n"]}, checksum=True)
print(frame._name)
"""


def test_keys_are_the_same_in_every_process_and_differ_with_the_columns(write):
    shard = write({"json": {"n": 1}, "txt": b"a"})
    command = [sys.executable, "-c", TOKENS, shard]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    asked = {"sidecars": {"txt": "t", "json": ["n"]}, "checksum": True}
    assert read_metadata(shard, **asked)._name == name
    others = [
        {**asked, "checksum": False},
        {**asked, "sidecars": {"txt": "t", "json": {"n": "float64"}}},
        {**asked, "sidecars": {"json": ["n"], "txt": "t"}},
        {},
    ]
    assert len({name, *(read_metadata(shard, **other)._name for other in others)}) == 5


def test_it_works_on_a_cluster(client, tmp_path):
    shards = make_shards(tmp_path / "s", shards=3, images_per_shard=4)
    frame = read_metadata(shards, sidecars={"txt": "text", "json": ["number"]}, checksum=True)
    rows = frame.compute()
    assert sorted(rows["number"]) == list(range(12))
    assert (rows["text"] == "landscape number " + rows["number"].astype(str)).all()


def test_no_columns_give_the_records_alone():
    assert [*MetadataColumns().meta.columns] == [*COLUMNS]
