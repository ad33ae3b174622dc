"""Chosen samples written as new shards: nothing lost, nothing changed, nothing else written."""

import base64
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from wds2idx import IndexCreator
from webdataset import tariterators

from dask_imgread import (
    JobError,
    OtherJobError,
    connect_client,
    load_images,
    read_bag,
    read_metadata,
    run_job,
    write_shards,
)
from dask_imgread.selection import shard_writer
from dask_imgread.selection.shard_writer import SampleReader, list_samples, name_shard
from dask_imgread.selection.write import (
    _collect_rows,
    _cut_evenly,
    _name_samples,
    check_place,
    digest_rows,
)
from dask_imgread.testing import draw_picture, encode_picture, make_shards, write_shard
from tests.helpers.commands import ForkedProcess, start_server
from tests.helpers.servers import KEY, SECRET, Faults, serve_http, serve_s3

PNGS = [encode_picture(draw_picture(n, (24, 16)), "png") for n in range(6)]
A, B, C, D, E, F = PNGS
PLACES = ["image_path", "shard", "shard_version"]  # differ from folder to folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two shards of ten images with sidecars."""
    return make_shards(tmp_path_factory.mktemp("source"), images_per_shard=10, size=(48, 32))


@pytest.fixture(scope="module")
def frame(source):
    return read_metadata(source).compute(scheduler="sync")


def read(paths):
    return read_metadata(paths).compute(scheduler="sync")


def read_tars(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.tar"))}


def read_members(folder):
    """Return the name and content of each member, as Python's own module reads them."""
    members = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            members += [(info.name, tar.extractfile(info).read()) for info in tar]
    return members


def read_samples(folder):
    """Return the members of each sample by extension, as webdataset reads them."""
    samples = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with open(path, "rb") as file:
            members = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            for sample in tariterators.group_by_keys(members):
                assert sample["__key__"] not in samples
                members = {k: v for k, v in sample.items() if not k.startswith("__")}
                samples[sample["__key__"]] = members
    return samples


def write(client, rows, out, **options):
    return write_shards(rows, out, client=client, **options).compute(scheduler="sync")


# What is written, read by others


def test_three_readers_find_what_was_chosen(client, source, frame, tmp_path):
    chosen = frame[frame["key"].astype(int) % 3 > 0]
    index = ("dali", "wids")
    rows = write(client, chosen, tmp_path / "out", images_per_shard=5, index=index)
    old, new = read_samples(Path(source[0]).parent), read_samples(tmp_path / "out")
    assert new == {key: old[key] for key in chosen["key"]}
    assert list(new) == list(chosen["key"]) == list(rows["key"])
    assert list(rows["source_id"]) == list(chosen.index)

    pixels = [image.image_data for image in load_images(frame, list(chosen.index))]
    for there in (load_images(rows), load_images(read(sorted((tmp_path / "out").glob("*.tar"))))):
        for image, expected in zip(there, pixels, strict=True):
            np.testing.assert_array_equal(image.image_data, expected)

    found = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (found["__kind__"], found["wids_version"]) == ("wids-shard-index-v1", 1)
    counts = {shard["url"]: shard["nsamples"] for shard in found["shardlist"]}
    assert counts == {"00000.tar": 4, "00001.tar": 5, "00002.tar": 4}
    assert list(counts.values()) == list(rows.groupby("shard")["key"].nunique())
    for path in sorted((tmp_path / "out").glob("*.tar")):
        check_dali_index(path, tmp_path / "expected.idx")


def check_dali_index(path, scratch):
    with redirect_stdout(io.StringIO()), IndexCreator(str(path), str(scratch)) as creator:
        creator.create_index()
    assert path.with_suffix(".idx").read_bytes() == scratch.read_bytes()


def test_dali_reads_them_by_their_index(client, tmp_path):
    from nvidia.dali import fn, pipeline_def

    names = ["a/0001", "a/with space", "b/0002"]
    members = [(f"{name}.{e}", c) for name in names for e, c in (("cls", b"7"), ("png", A))]
    shard = write_shard(tmp_path / "s.tar", members)
    write(client, read(shard), tmp_path / "out", index="dali")

    @pipeline_def(batch_size=len(names), num_threads=1, device_id=None)
    def make():
        return tuple(
            fn.readers.webdataset(
                paths=[str(tmp_path / "out" / "00000.tar")],
                index_paths=[str(tmp_path / "out" / "00000.idx")],
                ext=["png", "cls"],
            )
        )

    pipeline = make()
    pipeline.build()
    images, classes = pipeline.run()
    assert [np.array(images[n]).tobytes() for n in range(3)] == [A] * 3
    assert [np.array(classes[n]).tobytes() for n in range(3)] == [b"7"] * 3


# The same, however it is called


def test_the_shards_depend_on_nothing_but_the_rows(client, frame, tmp_path):
    rows = frame.assign(
        mark=pd.array([None, True, False, None] * 5, dtype="bool[pyarrow]"),
        words=pd.array([None, ["a", None], [], ["b"]] * 5, pd.ArrowDtype(pa.list_(pa.string()))),
    )
    options = {"images_per_shard": 7, "json_columns": ["mark", "words"], "shuffle": 3}
    first = write(client, rows, tmp_path / "first", **options)
    expected = read_tars(tmp_path / "first")
    assert len(expected) == 3

    rows.to_parquet(tmp_path / "rows.parquet")
    rows.astype({"words": object}).to_parquet(tmp_path / "first.parquet")
    scattered = pd.concat([rows.iloc[n : n + 1] for n in range(len(rows))])
    others = {
        "again": rows,
        "dask": dd.from_pandas(rows, npartitions=3, sort=False),
        "repartitioned": dd.from_pandas(rows, npartitions=5, sort=False).repartition(npartitions=2),
        "parquet": dd.read_parquet(tmp_path / "rows.parquet", dtype_backend="pyarrow"),
        "plain parquet": pd.read_parquet(tmp_path / "first.parquet"),
        "chunks": scattered,
        "column": rows.reset_index(),
        "minimal": rows[["shard", "offset", "size", "key", "mark", "words"]],
    }
    for name, other in others.items():
        again = write(client, other, tmp_path / name, **options)
        assert read_tars(tmp_path / name) == expected, name
        assert list(again["source_id"]) == list(first["source_id"])
        if name != "minimal":
            assert_same_rows(again, first)
            write(None, other, tmp_path / "first", **options)  # nothing is left to do


def assert_same_rows(rows, expected):
    ids = [frame.index.str.replace(r"-\w{10}/", "/", regex=True) for frame in (rows, expected)]
    assert list(ids[0]) == list(ids[1])
    rows, expected = (f.drop(columns=PLACES).reset_index(drop=True) for f in (rows, expected))
    pd.testing.assert_frame_equal(rows, expected[rows.columns])


def test_a_digest_is_of_values_not_of_how_they_are_held(frame):
    def digest(texts, flags):
        columns = {"text": texts, "flag": flags}
        return digest_rows(
            pd.DataFrame({k: pd.arrays.ArrowExtensionArray(v) for k, v in columns.items()})
        )

    texts, flags = pa.array(["a", None, "", "b"]), pa.array([True, None, False, True])
    expected = digest(texts, flags)
    held = pa.StringArray.from_buffers(  # "junk" lies where a value is missing
        4, pa.array([0, 1, 5, 5, 6], pa.int32()).buffers()[1], pa.py_buffer(b"ajunkb"),
        pa.py_buffer(bytes([0b1101 | 0xF0])), 1
    )  # fmt: skip
    bits = pa.BooleanArray.from_buffers(
        pa.bool_(), 4, [pa.py_buffer(bytes([0xFD])), pa.py_buffer(bytes([0xFB]))]
    )
    assert digest(held, bits) == expected
    halves = [pa.chunked_array([column[:1], column[1:]]) for column in (texts, flags)]
    assert digest(*halves) == expected
    sliced = [pa.concat_arrays([column, column])[4:] for column in (texts, flags)]
    assert digest(*sliced) == expected
    assert digest(texts, pa.array([True, None, True, True])) != expected
    assert digest(pa.array(["a", None, None, "b"]), flags) != expected
    assert digest(pa.array([None, "a", "", "b"]), flags) != expected


def test_shuffling_does_not_depend_on_the_order_of_the_rows(client, frame, tmp_path):
    write(client, frame, tmp_path / "a", shuffle=1, images_per_shard=10)
    write(
        client, frame.sample(frac=1, random_state=5), tmp_path / "b", shuffle=1, images_per_shard=10
    )
    other = write(client, frame, tmp_path / "c", shuffle=2, images_per_shard=10)
    assert read_tars(tmp_path / "a") == read_tars(tmp_path / "b") != read_tars(tmp_path / "c")
    assert sorted(other["source_id"]) == sorted(frame.index) != list(other["source_id"])


def test_sorted_by_columns_with_missing_values_last(client, frame, tmp_path):
    rows = frame.iloc[:6].assign(
        score=pd.array([3, None, 1, 2, None, 1], dtype="int64[pyarrow]"),
        name=["b", "z", "b", "a", "y", "a"],
    )

    def order(**options):
        out = tmp_path / f"{sorted(options.items())}"
        return [int(key) for key in write(client, rows, out, **options)["key"]]

    assert order(sort_by="score") == [2, 5, 3, 0, 1, 4]
    assert order(sort_by=["score", "name"]) == [5, 2, 3, 0, 4, 1]
    assert order(sort_by="image_id") == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="sort_by: the frame has no colour"):
        order(sort_by=["name", "colour"])


def test_shards_are_filled_evenly():
    chance = random.Random(4)
    for _ in range(300):
        views = [chance.choice([1, 1, 1, 2, 5]) for _ in range(chance.randint(1, 60))]
        samples = np.repeat(np.arange(len(views)), views)
        most = chance.randint(1, 20)
        cuts = _cut_evenly(samples, most)
        sizes = np.diff(cuts)
        assert cuts[0] == 0
        assert cuts[-1] == len(samples)
        assert sizes.min() > 0
        assert sizes.max() < most + max(views)
        assert all(samples[cut - 1] != samples[cut] for cut in cuts[1:-1])
        if max(views) == 1:
            assert sizes.max() - sizes.min() <= 1


# What belongs to a sample


def write_all(client, members, tmp_path, choose=None, **options):
    """Write a shard, and the rows of it that are chosen as new ones; return their members."""
    rows = read(write_shard(tmp_path / "source" / "s.tar", members))
    rows = rows if choose is None else rows[rows.index.str.endswith(choose)]
    written = write(client, rows, tmp_path / "out", **options)
    check_rows(written, tmp_path / "out")
    return read_members(tmp_path / "out")


def check_rows(written, folder):
    """The rows returned are those that reading the new shards gives."""
    found = read(sorted(Path(folder).glob("*.tar")))
    assert set(found.index) == set(written.index)
    found = found.loc[list(written.index)]
    for name in ("image_path", "shard", "shard_version", "key", "offset", "size"):
        assert list(found[name]) == list(written[name]), name
    known = found["sample_offset"].notna().to_numpy()
    for name in ("sample_offset", "sample_size"):
        assert list(found[name][known]) == list(written[name][known]), name


def test_sidecars_before_and_behind_the_image(client, tmp_path):
    members = [("a.json", b"{}"), ("a.png", A), ("a.txt", b"a"), ("b.cls", b"1"), ("b.png", B)]
    assert write_all(client, members, tmp_path) == members


@pytest.mark.parametrize("scattered", [False, True])
def test_of_several_images_those_that_are_chosen(client, tmp_path, scattered):
    members = [("a.l.png", A), ("a.json", b"{}"), ("a.r.PNG", B), ("a.tif", C), ("b.png", D)]
    if scattered:
        members.append(members.pop(1))
    one = write_all(client, members, tmp_path / "one", ("a.r.PNG",))
    assert sorted(one) == [("a.json", b"{}"), ("a.r.PNG", B)]
    both = write_all(client, members, tmp_path / "both", ("a.r.PNG", "a.l.png"), images_per_shard=1)
    assert sorted(both) == [("a.json", b"{}"), ("a.l.png", A), ("a.r.PNG", B)]
    assert len(read_tars(tmp_path / "both" / "out")) == 1
    outer = write_all(client, members, tmp_path / "outer", ("a.l.png", "a.tif"))
    assert sorted(outer) == [("a.json", b"{}"), ("a.l.png", A), ("a.tif", C)]


@pytest.mark.parametrize("size", [612, 1000])
def test_a_sample_that_would_end_amid_a_member(client, tmp_path, size):
    path = write_shard(tmp_path / "s.tar", [("a.jpg", bytes(5000)), ("b.jpg", bytes(5000))])
    rows = read([path])
    rows["sample_size"] = [size, *rows["sample_size"][1:]]
    with pytest.raises(JobError, match=r"a\.jpg ends beyond its sample a, at offset"):
        write(client, rows, tmp_path / "out", retries=0)


def test_a_sample_of_many_members_with_a_new_name():
    content = shard_writer.Content([], [])
    for number in range(20):
        content.add(f"a.{number}", bytes(number * 100))
    whole = b"".join(content.buffers)
    with tarfile.open(fileobj=io.BytesIO(whole + bytes(1024))) as tar:
        found = [(info.name, info.offset_data, info.size) for info in tar]
    assert found == [member[:3] for member in content.members]


def test_headers_stay_where_an_image_is_left_out(client, tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.l.png", A), ("a.r.png", B), ("a.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode, info.uname = len(content), 1_600_000_000, 0o640, "me"
            tar.addfile(info, io.BytesIO(content))
    rows = read([str(path)])
    write(client, rows[rows["image_path"].str.endswith("a.r.png")], tmp_path / "out")
    with tarfile.open(path) as old, tarfile.open(tmp_path / "out" / "00000.tar") as new:
        assert [info.tobuf() for info in new] == [info.tobuf() for info in old][1:]


def test_no_more_is_read_than_what_is_chosen(tmp_path, monkeypatch):
    """In any order: not the bytes behind each sample, which are read ahead where it is next."""
    path = write_shard(tmp_path / "s.tar", [(f"{n:03d}.png", bytes(3000)) for n in range(200)])
    rows = _name_samples(_collect_rows(read([path]).sample(frac=0.5, random_state=1), {}, []))
    samples = list_samples(rows)
    sizes = []

    def count(read):
        def read_and_count(*arguments):
            found = read(*arguments)
            sizes.append(found if isinstance(found, int) else len(found))
            return found

        return read_and_count

    monkeypatch.setattr(os, "pread", count(os.pread))
    monkeypatch.setattr(os, "preadv", count(os.preadv))
    for _ in SampleReader({}).read(samples):
        pass
    assert sum(sizes) <= sum(stop - start for start, stop in (s.extent for s in samples)) + 1024


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_old_headers_stay(client, tmp_path, format):
    long = "/".join("d" * 60 for _ in range(1 if format == tarfile.USTAR_FORMAT else 5))
    members = [(f"{long}/{'k' * 70}.png", A), (f"{long}/{'k' * 70}.txt", b"t"), ("ü/ß.png", B)]
    path = write_shard(tmp_path / "s.tar", members, format)
    out = tmp_path / "out"
    check_rows(write(client, read(path), out, index=["dali"]), out)
    assert read_members(out) == members
    size = sum(512 + -(-len(c) // 512) * 512 for _, c in members)
    assert (out / "00000.tar").read_bytes()[:size] == Path(path).read_bytes()[:size]
    for line in (out / "00000.idx").read_text().splitlines()[1:]:
        fields = iter(line.split(" "))
        for _, offset, length, name in zip(fields, fields, fields, fields, strict=True):
            start = int(offset)
            assert (out / "00000.tar").read_bytes()[start : start + int(length)] == dict(members)[
                name
            ]


def test_links_become_what_they_stand_for(client, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content, kind, target in (
            ("x/a.png", A, tarfile.REGTYPE, ""),
            ("x/a.txt", b"a caption", tarfile.REGTYPE, ""),
            ("x/hard.png", b"", tarfile.LNKTYPE, "x/a.png"),
            ("x/hard.txt", b"", tarfile.LNKTYPE, "x/a.txt"),
            ("x/soft.png", b"", tarfile.SYMTYPE, "a.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(content)
            tar.addfile(info, io.BytesIO(content))
    rows = read(tmp_path / "s.tar")
    check_rows(write(client, rows, tmp_path / "out"), tmp_path / "out")
    assert read_samples(tmp_path / "out") == {
        "x/a": {"png": A, "txt": b"a caption"},
        "x/hard": {"png": A, "txt": b"a caption"},
        "x/soft": {"png": A},
    }
    write(client, rows.iloc[1:], tmp_path / "fewer")
    assert list(read_samples(tmp_path / "fewer")) == ["x/hard", "x/soft"]


def test_scattered_samples_and_keys_that_come_again(client, tmp_path):
    members = [("a.png", A), ("b.png", B), ("a.txt", b"a"), ("c.png", D), ("a.png", C)]
    rows = read(write_shard(tmp_path / "s.tar", [*members, ("a.txt", b"again")]))
    written = write(client, rows, tmp_path / "out")
    check_rows(written, tmp_path / "out")
    samples = read_samples(tmp_path / "out")
    assert [samples.pop(key) for key in "bc"] == [{"png": B}, {"png": D}]
    assert all(key.startswith("a-") for key in samples)
    assert sorted(samples.values(), key=str) == sorted(
        [{"png": A, "txt": b"a"}, {"png": C, "txt": b"again"}], key=str
    )
    few = rows[["shard", "offset", "size", "key"]]
    with pytest.raises(JobError, match="several samples with the key a"):
        write(client, few, tmp_path / "few", retries=0)


def test_more_images_than_views_have_keys_with_dots(client, tmp_path):
    """Other readers would take them for one sample; so they get keys without."""
    members = [
        (f"a.{n}.{e}", c) for n in range(12) for e, c in (("png", PNGS[n % 6]), ("txt", b"%d" % n))
    ]
    written = write_all(client, members, tmp_path, ("a.3.png", "a.5.png"), index=["dali"])
    assert [content for _, content in written] == [D, b"3", F, b"5"]
    samples = read_samples(tmp_path / "out")
    assert sorted(samples.values(), key=str) == sorted(
        [{"png": D, "txt": b"3"}, {"png": F, "txt": b"5"}], key=str
    )
    assert all(key.startswith("a_") for key in samples)
    check_dali_index(tmp_path / "out" / "00000.tar", tmp_path / "expected.idx")


def test_names_that_are_not_utf8(client, tmp_path):
    with tarfile.open(
        tmp_path / "s.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        info = tarfile.TarInfo("übung.png")
        info.size = len(A)
        tar.addfile(info, io.BytesIO(A))
    rows = read(tmp_path / "s.tar")
    written = write(client, rows, tmp_path / "out", shuffle=1, index=["dali"])
    check_rows(written, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "00000.tar", encoding="latin-1") as tar:
        assert tar.getnames() == ["übung.png"]


def test_keys_of_several_sources(client, tmp_path):
    paths = [
        write_shard(
            tmp_path / f / "0.tar", [("x/a.png", c), ("x/a.txt", f.encode()), (f"{f}.png", c)]
        )
        for f, c in (("one", A), ("two", B))
    ]
    rows = read(paths)
    written = write(client, rows, tmp_path / "out")
    check_rows(written, tmp_path / "out")
    samples = read_samples(tmp_path / "out")
    assert [samples.pop(name)["png"] for name in ("one", "two")] == [A, B]
    assert {(key[:4], s["png"], s["txt"]) for key, s in samples.items()} == {
        ("x/a-", A, b"one"), ("x/a-", B, b"two")
    }  # fmt: skip

    # A key that was changed before may be the one that is found for another.
    again = pd.concat([rows, written.drop(columns="source_id")])
    third = write(client, again, tmp_path / "third")
    check_rows(third, tmp_path / "third")
    assert len(read_samples(tmp_path / "third")) == 8
    assert sorted(content for _, content in read_members(tmp_path / "third")) == sorted(
        2 * [A, A, B, B, b"one", b"two"]
    )


def test_no_name_leads_out_of_the_folder(client, tmp_path):
    keys = ["../x", "/abs", "a/../../x", "..", "a/..", "./ok", "..\\w", ".hidden", "//two", "a\\b"]
    members = [(f"{key}.png", PNGS[n % 6]) for n, key in enumerate(keys)]
    rows = read(write_shard(tmp_path / "s.tar", members))
    before = {path.name for path in tmp_path.iterdir()}
    written = write(client, rows, tmp_path / "out")
    check_rows(written, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before | {"out"}
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "out" / "00000.tar"], capture_output=True, text=True, check=True
    )
    assert listed.stderr == ""  # tar would say that it removes a leading slash
    names = [name for name, _ in read_members(tmp_path / "out")]
    assert len(set(names)) == len(rows)
    for name in names:
        assert not name.startswith("/")
        assert ".." not in name.replace("\\", "/").split("/")
    assert len(read_samples(tmp_path / "out")) == len(rows)


@pytest.mark.parametrize("key", ["x", "x.", "", "x./../../etc", "../y"])
def test_a_key_that_is_not_the_members(client, tmp_path, key):
    """The column may hold anything."""
    rows = read(write_shard(tmp_path / "s.tar", [("x./../../etc/a.png", A)])).assign(key=key)
    for name, some in {"whole": rows, "few": rows[["shard", "offset", "size", "key"]]}.items():
        with pytest.raises(
            JobError, match=r"s\.tar/x\./\.\./\.\./etc/a\.png is no member of the sample"
        ):
            write(client, some, tmp_path / name, retries=0)
        assert read_tars(tmp_path / name) == {}


def test_columns_as_json(client, frame, tmp_path):
    rows = frame.iloc[:2].assign(
        number=[1.5, None],
        infinite=pd.array([float("nan"), float("inf")], dtype="float64[pyarrow]"),
        text=["ä", None],
        numbers=pd.array([[1.5, float("nan")], None], pd.ArrowDtype(pa.list_(pa.float64()))),
        bytes=[b"\xff", None],
        list=[[1, None], []],
        vector=[np.arange(2), np.arange(2)],
        when=pd.to_datetime(["2026-01-02T03:04:05", None]),
        nothing=[None, None],
        json=[{"a": 1}, {"a": 2}],
    )
    names = ["number", "infinite", "text", "list", "vector", "when", "nothing", "json", "width"]
    names += ["numbers", "bytes"]
    out = tmp_path / "out"
    written = write(client, rows, out, json_columns=names, images_per_shard=1)
    first, second = (json.loads(s["columns.json"]) for s in read_samples(out).values())
    assert first == {
        "number": 1.5, "text": "ä", "list": [1, None], "vector": [0, 1],
        "when": "2026-01-02 03:04:05", "json": {"a": 1}, "width": 48,
        "numbers": [1.5, None], "bytes": "/w==",
    }  # fmt: skip
    assert second == {"list": [], "vector": [0, 1], "json": {"a": 2}, "width": 48}
    check_rows(written, out)
    assert list(pd.read_parquet(out / "metadata")["vector"].iloc[0]) == [0, 1]
    ids = write(client, rows, tmp_path / "ids", json_columns="image_id")
    sources = (json.loads(s["columns.json"]) for s in read_samples(tmp_path / "ids").values())
    assert [source["image_id"] for source in sources] == list(ids["source_id"]) == list(rows.index)
    again = write(client, written, tmp_path / "again", json_columns="width")
    members = [name for name, _ in read_members(tmp_path / "again")]
    assert [name for name in members if "json" in name] == [
        f"{key}.{name}"
        for key in written["key"]
        for name in ("json", "columns.json", "columns.columns.json")
    ]
    assert list(again["source_id"]) == list(written.index)
    with pytest.raises(ValueError, match="json_columns: the frame has no colour"):
        write(client, rows, tmp_path / "wrong", json_columns=["colour"])


def test_an_index_with_other_names_is_kept(client, frame, tmp_path):
    for number, rows in enumerate(
        [
            frame.reset_index().set_index("width"),
            frame.set_index("width", append=True),
        ]
    ):
        written = write(client, rows, tmp_path / str(number))
        assert list(written["width"]) == list(frame["width"])
        assert list(written["source_id"]) == list(frame.index)


def test_a_column_that_is_empty_in_one_shard(client, frame, tmp_path):
    notes = [None] * 10 + ["a note"] * 10
    rows = frame.assign(note=pd.Series(notes, frame.index, dtype=object))
    written = write(client, rows, tmp_path / "out", images_per_shard=10)
    assert [None if pd.isna(note) else note for note in written["note"]] == notes


def test_the_rows_are_a_frame_again(client, frame, tmp_path):
    first = write_shards(frame[::2], tmp_path / "first", client=client, images_per_shard=4)
    images = read_bag(first).compute(scheduler="sync")
    assert sum(batch.num_items for batch in images) == 10
    assert all(image.metadata for batch in images for image in batch)
    second = write(client, first, tmp_path / "second", images_per_shard=6)
    assert read_members(tmp_path / "second") == read_members(tmp_path / "first")
    assert list(second["source_id"]) == list(first.compute(scheduler="sync").index)


# Where it is read from and written to


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
@pytest.mark.parametrize("whole", [True, False])
def test_compressed_sources(client, tmp_path, suffix, whole, monkeypatch):
    monkeypatch.setattr(shard_writer, "_CHUNK_BYTES", 20_000)
    members = {
        n: [
            (f"{n}{k:02d}.{e}", c)
            for k in range(30)
            for e, c in (("png", PNGS[k % 6]), ("cls", b"%d" % k))
        ]
        for n in range(12)
    }
    rows = read([write_shard(tmp_path / f"s{n}{suffix}", members[n]) for n in members])
    rows = rows if whole else rows[["shard", "offset", "size", "key"]]
    samples = _name_samples(_collect_rows(rows.sample(frac=1, random_state=2), {}, []))
    reader = SampleReader({})
    found = {}
    for _, content in reader.read(list_samples(samples)):
        whole = b"".join(content.buffers)
        found |= {m.name: whole[m.offset : m.offset + m.size] for m in content.members}
        assert len(reader._streams) <= shard_writer._STREAMS
    assert found == dict(itertools.chain(*members.values()))
    assert not reader._streams


def test_memory_holds_a_few_chunks(tmp_path, monkeypatch):
    """2,000 samples from many sources, in any order."""
    chunk = 200_000
    monkeypatch.setattr(shard_writer, "_CHUNK_BYTES", chunk)
    content = bytes(2_000)
    paths = [
        write_shard(
            tmp_path / f"{s:02d}.tar", [(f"{s:02d}{n:02d}.png", content) for n in range(50)]
        )
        for s in range(40)
    ]
    rows = _name_samples(_collect_rows(read(paths).sample(frac=1, random_state=1), {}, []))
    held = {}  # buffers, by their addresses
    for _, written in SampleReader({}).read(list_samples(rows)):
        for buffer in written.buffers:
            base = np.frombuffer(buffer, np.uint8).base
            held[id(base)] = base
        break
    assert len(rows) == 2000
    sizes = [memoryview(each).nbytes for each in held.values()]
    assert sum(sizes) <= 2 * chunk
    peak = measure_peak(rows)
    assert peak < 40 * chunk


@pytest.mark.parametrize("sources", [3, 40])
def test_few_files_are_open_and_none_in_the_end(tmp_path, sources):
    paths = [
        write_shard(tmp_path / f"{s}.tar", [(f"{s:02d}{n}.png", A) for n in range(5)])
        for s in range(sources)
    ]
    rows = _name_samples(_collect_rows(read(paths).sample(frac=1, random_state=1), {}, []))
    assert count_files(tmp_path) == 0
    reader = SampleReader({}).read(list_samples(rows))
    for number, _ in enumerate(reader, 1):
        assert count_files(tmp_path) <= shard_writer._SOURCES
        if number == 2 * sources:
            break
    reader.close()
    assert count_files(tmp_path) == 0
    wrong = list_samples(rows.assign(size=rows["size"] + 1))[-1:]
    with pytest.raises(ValueError, match="has no image") as caught:
        list(SampleReader({}).read([*list_samples(rows)[:-1], *wrong]))
    assert count_files(tmp_path) == 0, caught  # whose traceback has all that was at work


def count_files(folder):
    """Return how many files of a folder this process has open; others may open and close some."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{folder}/")
    return found


def measure_peak(rows):
    import tracemalloc

    tracemalloc.start()
    with open(os.devnull, "wb") as file:
        shard_writer.write_tar(file, SampleReader({}).read(list_samples(rows)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_web_server_that_fails_at_times(client, source, frame, tmp_path, short_pauses):
    write(client, frame, tmp_path / "expected", shuffle=1, images_per_shard=7)
    secret = base64.b64encode(b"me:s3cret-pass").decode()
    options = {"headers": {"Authorization": f"Basic {secret}"}}
    with serve_http(Path(source[0]).parent, password="me:s3cret-pass") as server:
        paths = [f"{server.url}/{Path(path).name}" for path in source]
        rows = read_metadata(paths, storage_options=options).compute(scheduler="sync")
        with pytest.raises(JobError, match=r"PermissionError: .*HTTP 401: Unauthorized"):
            write(client, rows, tmp_path / "denied", retries=0)
        server.faults = Faults(every=20, delay=0.1)
        rows = rows.sort_values("key")
        rows = rows.set_axis(frame.index)  # the same order
        how = {"images_per_shard": 7, "storage_options": options}
        written = write(client, rows, tmp_path / "out", shuffle=1, **how)
    assert read_tars(tmp_path / "out") == read_tars(tmp_path / "expected")
    assert secret not in (tmp_path / "out" / "_write.json").read_text()
    assert not written.map(lambda value: secret in str(value)).to_numpy().any()


def test_to_a_store_that_fails_at_times(client, frame, tmp_path, short_pauses):
    expected = write(
        client, frame, tmp_path / "expected", images_per_shard=7, index=["wids", "dali"]
    )
    with serve_s3() as server:
        server.make_bucket("out")
        options = server.storage_options
        server.faults = Faults(every=20, delay=0.1)
        how = {"images_per_shard": 7, "index": ["wids", "dali"], "out_options": options}
        rows = write_shards(frame, "s3://out/chosen", client=client, **how).compute(
            scheduler="sync"
        )
        server.faults = None
        assert_same_rows(rows, expected)
        fs = fsspec.filesystem("s3", **options)
        names = {name.removeprefix("out/chosen/") for name in fs.find("out/chosen")}
        assert names == list_files(tmp_path / "expected")
        for name, content in read_tars(tmp_path / "expected").items():
            assert fs.cat_file(f"out/chosen/{name}") == content
        for name in names:
            assert SECRET.encode() not in fs.cat_file(f"out/chosen/{name}")
            assert KEY.encode() not in fs.cat_file(f"out/chosen/{name}")

        # The same from there, and what fails is told without the secrets.
        paths = [f"s3://out/chosen/{name_shard(n)}" for n in range(3)]
        there = read_metadata(paths, storage_options=options).compute(scheduler="sync")
        write(client, there, tmp_path / "back", images_per_shard=7, storage_options=options)
        assert read_tars(tmp_path / "back") == read_tars(tmp_path / "expected")
        server.faults = Faults(every=1, kinds=("403",), match="PUT")
        with pytest.raises((JobError, PermissionError)) as caught:
            write_shards(frame, "s3://out/other", client=client, out_options=options, retries=0)
        server.faults = None
        assert SECRET not in str(caught.value)
        fs.invalidate_cache()
        assert not fs.exists("out/other/00000.tar")


def test_a_shard_that_another_call_has_left_is_written_again(client, frame, tmp_path):
    """By a worker, say, that outlived the folder's earlier owner."""
    write(client, frame, tmp_path / "out", images_per_shard=5)
    expected = read_tars(tmp_path / "out")
    write(client, frame, tmp_path / "other", images_per_shard=5, shuffle=1)
    for name in ("00000.tar", "metadata/part-00000.parquet"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "out" / name)
    assert read_tars(tmp_path / "out") != expected
    write(client, frame, tmp_path / "out", images_per_shard=5)
    assert read_tars(tmp_path / "out") == expected


def list_files(folder):
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


# What goes wrong


def test_shards_that_do_not_match_their_rows(client, tmp_path):
    paths = make_shards(tmp_path / "source", shards=4, images_per_shard=3, size=(24, 16))
    rows = read(paths)
    write(client, rows, tmp_path / "undisturbed", images_per_shard=3)
    before = [Path(path).read_bytes() for path in paths]
    stat = os.stat(paths[0])
    Path(paths[0]).write_bytes(before[0] + bytes(512))
    os.remove(paths[1])
    Path(paths[3]).write_bytes(before[3][:2000])
    out = tmp_path / "out"
    with pytest.raises(
        JobError, match=r"3 shards could not be written, such as 0000[013]\.tar: "
    ) as caught:
        write(client, rows, out, images_per_shard=3, retries=0)
    assert any(
        text in str(caught.value) for text in ("changed since the frame was made", "No such file")
    )
    assert list_files(out) == {"_write.json", "00002.tar", "metadata/part-00002.parquet"}
    for path, content in zip(paths, before, strict=True):
        Path(path).write_bytes(content)
    for path in (0, 1, 3):
        os.utime(paths[path], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    rows_again = rows.assign(shard_version=read(paths)["shard_version"])
    with pytest.raises(OtherJobError, match="with other rows: give"):
        write(client, rows_again, out, images_per_shard=3)
    write(client, rows_again, out, images_per_shard=3, overwrite=True)
    assert read_tars(out) == read_tars(tmp_path / "undisturbed")


def test_it_goes_on_when_the_cause_is_mended(client, tmp_path):
    paths = make_shards(tmp_path / "source", shards=3, images_per_shard=3, size=(24, 16))
    rows = read(paths)
    os.rename(paths[1], tmp_path / "away.tar")
    out = tmp_path / "out"
    with pytest.raises(
        JobError, match=r"1 shards could not be written, such as 00001\.tar: .*00001\.tar"
    ):
        write(client, rows, out, images_per_shard=3, retries=0)
    written = (out / "00000.tar").stat().st_mtime_ns
    os.rename(tmp_path / "away.tar", paths[1])
    again = write(client, rows, out, images_per_shard=3)
    assert (out / "00000.tar").stat().st_mtime_ns == written
    assert len(again) == 9
    check_rows(again, out)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"offset": 1 << 40}, JobError, r"has no image 000000 of the \(offset, size\)"),
        ({"offset": 1 << 40, "sample_offset": None}, JobError, "has no image 000000"),
        ({"size": 17}, JobError, "has no image 000000 of"),
        ({"sample_offset": 1 << 61}, JobError, "ends before offset"),
        ({"sample_offset": 512}, JobError, "has no sample 000000 at offset 512: not a tar archive"),
        ({"sample_size": 1 << 61}, JobError, "ends before offset"),
        (
            {"offset": -1},
            ValueError,
            "1 rows name no place in a shard, such as .*: its offset is -1",
        ),
        ({"offset": 1.5}, ValueError, r"its offset is 1\.5"),
        ({"offset": None}, ValueError, "its offset is"),
        ({"size": -5}, ValueError, "its size is -5"),
        ({"sample_size": -5}, ValueError, "its sample_size is -5"),
        ({"sample_offset": "x"}, ValueError, "can't be written as Parquet: .*sample_offset"),
        ({"shard": None}, ValueError, "its shard is"),
        ({"key": None}, ValueError, "its key is"),
    ],
    ids=str,
)
def test_rows_that_name_no_place(client, frame, tmp_path, changes, error, text):
    rows = frame.iloc[:2].astype(object)
    for name, value in changes.items():
        rows.loc[rows.index[0], name] = value
    with pytest.raises(error, match=text):
        write(client, rows, tmp_path / "out", images_per_shard=1, retries=0)
    if error is JobError:
        assert list(read_tars(tmp_path / "out")) == ["00001.tar"]
        assert not list((tmp_path / "out").rglob("_tmp-*"))
    else:
        assert not (tmp_path / "out").exists()


def test_far_offsets_in_remote_shards_take_no_memory(client, source, frame, tmp_path):
    with serve_http(Path(source[0]).parent) as server:
        rows = read(f"{server.url}/00000.tar").iloc[:1]
        rows["sample_size"] = 1 << 61
        with pytest.raises(JobError, match="ends before offset"):
            write(client, rows, tmp_path / "out", retries=0)


def test_damage_is_left_out_and_told(client, tmp_path, caplog):
    (path,) = make_shards(tmp_path / "s", shards=1, images_per_shard=6, size=(24, 16))
    content = bytearray(Path(path).read_bytes())
    third = read(path)["sample_offset"].iloc[2]
    content[third : third + 512] = b"\xff" * 512
    Path(path).write_bytes(content)
    rows = read(path)
    assert rows["error"].notna().sum() == 1
    written = write(client, rows, tmp_path / "out")
    assert len(written) == 5
    assert "1 rows have no image, but record damage: left out" in caplog.text
    with pytest.raises(ValueError, match="no rows with images"):
        write(client, rows[rows["error"].notna()], tmp_path / "none")


def test_a_member_that_is_cut_off(client, tmp_path):
    path = write_shard(tmp_path / "s.tar", [("a.png", A), ("a.txt", b"x" * 2000)])
    size = 512 + -(-len(A) // 512) * 512 + 512 + 700
    os.truncate(path, size)
    rows = read(path)
    rows = rows[rows["size"] > 0]
    with pytest.raises(JobError, match=r"s\.tar"):
        write(client, rows, tmp_path / "out", retries=0)
    assert list_files(tmp_path / "out") == {"_write.json"}


# Folders and options


def test_what_is_in_the_folder_already(client, source, frame, tmp_path):
    out = tmp_path / "out"
    write(client, frame, out, images_per_shard=5, index=["dali"])
    kept = read_tars(out)
    for options, other in (
        ({"images_per_shard": 6, "index": ["dali"]}, "images per shard"),
        ({"images_per_shard": 5}, "index"),
        ({"images_per_shard": 5, "index": ["dali"], "shuffle": 1}, "rows"),
        ({"images_per_shard": 5, "index": ["dali"], "json_columns": ["width"]}, "json columns"),
        ({"images_per_shard": 9, "index": ["wids"]}, "images per shard, index"),
    ):
        with pytest.raises(OtherJobError, match=f"written with other {other}: give"):
            write(client, frame, out, **options)
    assert read_tars(out) == kept

    (out / "mine.txt").write_text("mine")
    write(client, frame[:5], out, overwrite=True)
    assert list_files(out) == {
        "_write.json",
        "00000.tar",
        "metadata/part-00000.parquet",
        "mine.txt",
    }

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"holds other files, such as mine\.txt"):
            write(client, frame, tmp_path / "full", overwrite=overwrite)
    assert list_files(tmp_path / "full") == {"mine.txt"}


def test_what_is_read_is_not_overwritten(client, frame, tmp_path):
    rows = write(client, frame, tmp_path / "out", images_per_shard=5)
    kept = read_tars(tmp_path / "out")
    os.symlink(tmp_path / "out", tmp_path / "link")
    for out in ("out", "link"):
        with pytest.raises(
            ValueError, match=r"00000\.tar, which is read, lies in .*: give another"
        ):
            write(client, rows, tmp_path / out, overwrite=True)
    assert read_tars(tmp_path / "out") == kept


@pytest.mark.parametrize(
    ("place", "shard"),
    [("memory://out", "memory:///out/a.tar"), ("s3a://b/out", "s3://b/out/x/a.tar")],
)
def test_two_spellings_of_a_url_are_one_place(place, shard):
    check_place("s3a://b/out2", [shard])
    with pytest.raises(ValueError, match="which is read, lies in"):
        check_place(place, [shard])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"images_per_shard": 0}, "images_per_shard must be at least 1, not 0"),
        ({"shuffle": 1, "sort_by": "key"}, "sort_by and shuffle can't be given together"),
        ({"index": "faiss"}, "index takes dali, wids, not faiss"),
        ({"index": ["dali", "x", "a"]}, "index takes dali, wids, not a, x"),
        ({"sort_by": "tags"}, "sort_by: tags: "),
    ],
)
def test_wrong_options(frame, tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        write_shards(frame.assign(tags=[["a"]] * 20), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_wrong_frames(frame, tmp_path):
    with pytest.raises(
        ValueError, match=r"a DataFrame of images is expected, .*https://host/a\.tar"
    ):
        write_shards("https://me:pw@host/a.tar", tmp_path / "out")
    with pytest.raises(ValueError, match="no size"):
        write_shards(frame.drop(columns="size"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"a column can't be written as Parquet: .*mixed"):
        write_shards(frame.assign(mixed=[b"1", 2] * 10), tmp_path / "out")


def test_a_jobs_folder(client, source, tmp_path):
    run_job(source, tmp_path / "job", client=client)
    written = write(client, tmp_path / "job", tmp_path / "out")
    assert len(written) == 20
    check_rows(written, tmp_path / "out")


# Killed


def write_apart(out, rows, scheduler):
    client = connect_client(scheduler=scheduler)
    write(client, pd.read_parquet(rows), out, images_per_shard=4, shuffle=1)


def test_killed_and_called_again(client, tmp_path):
    rows = read(make_shards(tmp_path / "s", images_per_shard=100, size=(24, 16), sidecars=["txt"]))
    rows.to_parquet(tmp_path / "rows.parquet")
    out = tmp_path / "out"
    start_server()
    arguments = out, tmp_path / "rows.parquet", client.scheduler.address
    process = ForkedProcess(target=write_apart, args=arguments)
    process.start()
    end = time.monotonic() + 60
    while len(list(out.glob("metadata/part-*"))) < 2:
        assert process.exitcode is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.join()
    (out / "_tmp-00049.tar-0a").write_bytes(b"left by a writer")
    done = {path: path.stat().st_mtime_ns for path in out.glob("metadata/part-*")}
    assert 2 <= len(done) < 50

    written = write(client, rows, out, images_per_shard=4, shuffle=1)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    expected = write(client, rows, tmp_path / "undisturbed", images_per_shard=4, shuffle=1)
    assert_same_rows(written, expected)
    assert read_tars(out) == read_tars(tmp_path / "undisturbed")
    assert list_files(out) == list_files(tmp_path / "undisturbed")


def test_a_worker_killed_while_it_writes(client, frame, tmp_path):
    """Another one does it again."""

    class Killer(shard_writer.ShardWriter):
        def __call__(self, partition):
            mark = tmp_path / "mark"
            if partition[0] == 1 and not mark.exists():
                mark.touch()
                (Path(self.out) / "_tmp-00001.tar-0b").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(partition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dask_imgread.selection.write.ShardWriter", Killer)
        written = write(client, frame, tmp_path / "out", images_per_shard=5)
    assert (tmp_path / "mark").exists()
    check_rows(written, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("_tmp-*"))
    assert len(written) == 20
