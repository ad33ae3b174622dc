"""Images chosen on the command line: written as new shards, or removed from theirs."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from dask_imgread import JobError, read_metadata, run_job
from dask_imgread.cli.main import main
from dask_imgread.cli.select import concat_rows
from dask_imgread.selection.choose import find_failed, find_ids, match_rows, read_ids
from dask_imgread.selection.remove import _name_copies, remove_images
from dask_imgread.testing import draw_picture, encode_picture, make_shards, write_shard

A, B, C, D = (encode_picture(draw_picture(n, (24, 16)), "png") for n in range(4))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)
    return tmp_path


@pytest.fixture
def select(folder, client, capsys):
    """The command, in this process and on the tests' own cluster."""

    def select(*arguments):
        where = "--scheduler", client.scheduler.address
        status = main(["select", *map(str, arguments), *where])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return select


@pytest.fixture
def shards(folder):
    return make_shards("shards", shards=3, images_per_shard=6, size=(48, 32), broken=3)


def read_keys(out):
    return list(pd.read_parquet(f"{out}/metadata")["key"])


def read_members(path):
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def list_files(out):
    return {str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file()}


# Chosen and written


def test_a_condition(select, shards):
    options = ["--images-per-shard", 3, "--index", "dali", "--json-column", "width"]
    condition = "width == 48 and key >= '000012' and format == 'jpeg'"
    status, out, err = select("shards", "--where", condition, "--out", "out", *options)
    assert (status, err.count("Error")) == (0, 0)
    assert "chosen         5 of 18 images, in 5 samples\nshards         2, " in out
    assert "rows           out/metadata" in out
    assert read_keys("out") == [f"{n:06d}" for n in (12, 13, 14, 16, 17)]  # 15 is broken
    assert list_files("out") >= {"00000.tar", "00001.tar", "00000.idx", "00001.idx"}
    members = read_members("out/00000.tar")
    assert json.loads(members["000012.columns.json"]) == {"width": 48}
    assert members["000012.jpg"] == read_members(shards[2])["000012.jpg"]


def test_captions_and_digests(select, shards):
    """Every picture's caption is "landscape number N"."""
    dogs = "width >= 48 and caption.str.contains('number 1')"
    columns = "--sidecar", "txt=caption", "--sidecar", "json=number:int32", "--checksum"
    status, _, _ = select(*shards, *columns, "--where", dogs, "--out", "dogs")
    assert status == 0
    rows = pd.read_parquet("dogs/metadata")
    assert list(rows["key"]) == ["000001", *(f"0000{n}" for n in (10, 11, 12, 13, 14, 16, 17))]
    assert list(rows["number"]) == [1, 10, 11, 12, 13, 14, 16, 17]  # 15 is no image any more
    Path("ids.txt").write_text(rows["sha256"].iloc[3])
    status, _, _ = select(*shards, "--checksum", "--ids", "ids.txt", "--out", "one")
    assert (status, read_keys("one")) == (0, ["000012"])
    status, _, _ = select("dogs/metadata", *columns, "--out", "no")
    assert status == 2


def test_from_a_jobs_output_no_shard_is_read(select, shards, client):
    run_job(shards, "job", client=client)
    for path in shards:
        os.rename(path, f"{path}.away")
    status, out, _ = select("job", "--where", "key < '000004'", "--dry-run")
    assert status == 0
    assert "chosen         4 of 18 images, in 4 samples\nshards         1, " in out
    assert "nothing is written (--dry-run)" in out
    assert not Path("out").exists()
    for path in shards:
        os.rename(f"{path}.away", path)
    status, out, _ = select("job", "--sort-by", "key", "--out", "out", "--log-format", "json")
    told = json.loads(out)
    assert (status, told["chosen"], told["shards"], told["out"]) == (0, 18, 1, "out")
    assert told["bytes"] <= Path("out/00000.tar").stat().st_size < told["bytes"] + 20_480


def test_several_inputs_and_a_configuration_file(select, shards, client):
    run_job(shards[:1], "job", client=client)
    Path("select.toml").write_text(
        f'shards = ["job", "{shards[2]}"]\nout = "out"\nshuffle = 0\nindex = ["dali", "wids"]\n'
        'json-column = ["width", "height"]\n'
    )
    status, out, _ = select("--config", "select.toml")
    assert status == 0
    assert "chosen         12 of 12 images" in out
    keys = read_keys("out")
    assert sorted(keys) == [f"{n:06d}" for n in (*range(6), *range(12, 18))] != keys
    assert list_files("out") >= {"00000.idx", "index.json"}


def test_nothing_chosen(select, shards):
    for more in (["--out", "out"], ["--dry-run"]):
        status, out, _ = select("shards", "--where", "width > 48", *more)
        assert status == 0
        assert out == "none of 18 images was chosen: nothing is written\n"
    assert not Path("out").exists()


def test_broken_images_with_their_causes(select, shards, client):
    status, out, _ = select("shards", "--failed", "--decode", "--device", "cpu", "--out", "out")
    assert status == 0
    assert "chosen         3 of 18 images" in out
    members = read_members("out/00000.tar")
    for key in read_keys("out"):
        original = read_members(shards[int(key) // 6])
        assert members[f"{key}.jpg"] == original[f"{key}.jpg"]
        assert members[f"{key}.json"] == original[f"{key}.json"]
        assert json.loads(members[f"{key}.columns.json"])["error"].startswith("truncated: ")
    assert pd.read_parquet("out/metadata")["error"].notna().all()
    status, out, _ = select("out", "--failed", "--out", "again")
    assert status == 2  # those are shards
    status, _, err = select("shards", "--failed", "--out", "other")
    assert (status, "only decoding shows which images are broken: add --decode" in err) == (2, True)


def test_several_outputs_with_the_same_images(select, shards, client, caplog):
    run_job(shards, "plain", client=client)
    run_job(shards, "sums", client=client, checksum=True)
    rows = pd.read_parquet("sums")
    Path("ids.txt").write_bytes(f"\ufeff{rows['sha256'].iloc[0].upper()}\r\n".encode())
    status, out, _ = select("plain", "sums", "--ids", "ids.txt", "--dry-run")
    assert (status, out.splitlines()[0]) == (0, "chosen         1 of 18 images, in 1 samples")
    assert "18 images have no sha256: digests do not find them" in caplog.text
    Path("ids.txt").write_bytes(f"{rows.index[0]}\r\n".encode())
    status, out, _ = select("plain", "sums", "--not-ids", "ids.txt", "--out", "out")
    assert out.startswith("removed        1 of 18 images, from 1 shards")
    assert list(pd.read_csv("out/removed.csv")["image_id"]) == [rows.index[0]]
    for option in ("--checksum", "--decode"):
        status, _, err = select("sums", option, "--dry-run")
        assert status == 2
        assert f"{option} is for shards: the output of metadata has its columns" in err


def test_shards_in_which_images_can_not_be_found_are_told(select, shards, caplog):
    Path("ids.txt").write_text(read_metadata("shards").compute(scheduler="sync").index[9])
    Path(shards[1]).write_bytes(b"no tar" * 999)
    status, out, _ = select("shards", "--not-ids", "ids.txt", "--dry-run")
    assert (status, out.splitlines()[0]) == (0, "removed        0 of 13 images, from 0 shards")
    assert "1 shards can't be read, or not all of them, such as " in caplog.text
    assert "00001.tar: images there are not found" in caplog.text


def test_ids(select, shards, caplog):
    rows = read_metadata("shards").compute(scheduler="sync")
    Path("ids.txt").write_text(f"# two\n\n{rows.index[7]}\n {rows.index[3]} \nnope/1.jpg\n")
    status, _, err = select("shards", "--ids", "ids.txt", "--out", "out")
    assert status == 0
    assert read_keys("out") == ["000003", "000007"]
    assert "1 of 3 ids were not found, such as nope/1.jpg" in caplog.text
    Path("ids.txt").write_text("0" * 64)
    status, _, err = select("shards", "--ids", "ids.txt", "--out", "other")
    assert status == 2
    assert "1 of the ids are SHA-256 digests, and the rows have no column sha256" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["shards"], "--out is missing"),
        (["--out", "o"], "SHARDS is missing"),
        (
            ["shards", "--where", "colour > 1"],
            "name 'colour' is not defined; the columns are image_id",
        ),
        (["shards", "--where", "width >"], "invalid syntax"),
        (["shards", "--where", "width"], "that is no condition"),
        (["shards", "--where", "True"], "that is no condition"),
        (["shards", "--where", "x = 3"], "that is no condition"),
        (["shards", "--where", "@rows"], "local variable 'rows' is not defined"),
        (["shards", "--where", "key.str.nope()"], "no attribute 'nope'"),
        (["shards", "--ids", "nope.txt"], "nope.txt"),
        (["shards", "--ids", "empty.txt"], "the file has no ids: give one in each line"),
        (["shards", "--ids", "shards/00000.tar"], "give a text file, an id in each line"),
        (["shards", "--ids", "digests.txt"], "the rows have no column sha256: add --checksum"),
        (["shards", "--sort-by", "colour", "--dry-run"], "sort_by: the frame has no colour"),
        (["shards", "--json-column", "colour", "--dry-run"], "json_columns: the frame has no"),
        (
            ["shards", "--sidecar", "json=a.b", "--where", "a.b > 1"],
            "name 'a' is not defined; the columns are image_id, image_path, shard, shard_version, "
            "key, offset, size, sample_offset, sample_size, format, width, height, channels, "
            "backend, error, warning, `a.b`, error_sidecar",
        ),
        (["shards", "--sort-by", "colour"], "sort_by: the frame has no colour"),
        (["shards", "--json-column", "colour"], "json_columns: the frame has no colour"),
        (["shards", "--images-per-shard", "0"], "--images-per-shard must be at least 1, not 0"),
        (["nope.tar"], "no such shard or folder"),
        (["."], "out lies in ., all of whose shards are read"),
        (["./", "--not-ids", "ids.txt"], "out lies in ./, all of whose shards are read"),
        (
            ["shards", "--not-ids", "ids.txt", "--shuffle", "0", "--where", "a"],
            "no --where, --shuffle",
        ),
    ],
    ids=str,
)
def test_refusals(select, folder, arguments, told):
    make_shards("shards", images_per_shard=2, size=(24, 16))
    Path("empty.txt").write_text("# nothing\n\n")
    Path("ids.txt").write_text("x\n")
    Path("digests.txt").write_text("0" * 64)
    out = [] if arguments in (["shards"], ["--out", "o"]) else ["--out", "out"]
    status, printed, err = select(*arguments, *out)
    assert (status, printed) == (2, "")
    assert told in err
    assert not Path("out").exists()


def test_conditions_where_values_are_missing():
    rows = concat_rows(
        [
            pd.DataFrame(
                {
                    "width": pd.array([1, None, 3], dtype="int32[pyarrow]"),
                    "score": [0.5, float("nan"), 2],
                    "caption": ["a dog", None, "a cat"],
                    "seen": [True, None, False],
                },
                index=pd.Index(["x/a", "x/b", "y/c"], name="image_id"),
            )
        ]
    )
    for condition, expected in {
        "width > 0": [True, False, True],
        "width != 1": [False, False, True],
        "not (width > 2)": [True, False, False],
        "caption.str.contains('dog')": [True, False, False],
        "not caption.str.contains('dog')": [False, False, True],
        "width >= 1 and caption.str.contains('cat')": [False, False, True],
        "score > 1 or width == 1": [True, False, True],
        "seen": [True, False, False],
        "~seen": [False, False, True],
        "caption.isna()": [False, True, False],
        "width in [1, 9]": [True, False, False],
        "1 <= width < 3": [True, False, False],
        "image_id.str.startswith('x/')": [True, True, False],
    }.items():
        assert match_rows(rows, condition).tolist() == expected, condition


def test_ids_are_found_by_digests_too(tmp_path):
    digests = [hashlib.sha256(c).hexdigest() for c in (b"1", b"2", b"2")]
    rows = pd.DataFrame(
        {"sha256": pd.array([*digests, None], dtype="string[pyarrow]")},
        index=pd.Index(["a", "b", "c", "d"], name="image_id"),
    )
    ids = {"a", digests[1].upper(), "e", "0" * 64}
    chosen, missing = find_ids(rows, ids)
    assert chosen.tolist() == [True, True, True, False]
    assert missing == ["0" * 64, "e"]
    lines = "".join(f"{n:064x}\n" for n in range(50_000))
    (tmp_path / "ids.txt").write_text(f"\ufeff{lines}")
    many = read_ids(tmp_path / "ids.txt")
    assert len(many) == 50_000
    assert find_ids(rows, many)[0].sum() == 0
    assert find_ids(rows, {"a", "A"})[1] == ["A"]  # only digests are the same in both cases


def test_failures_without_bytes_are_no_broken_images():
    errors = [None, "corrupt: x", "truncated archive: y", "unreachable: z", "unsupported: sparse"]
    errors += ["unsupported codec: JPEG XL", "not an image: w"]
    rows = pd.DataFrame({"error": errors, "size": [9] * 6 + [0]})
    assert find_failed(rows).tolist() == [False, True, False, False, False, True, False]


# Removed


def test_images_are_removed_and_nothing_else_changes(select, shards):
    before = {path: Path(path).read_bytes() for path in shards}
    rows = read_metadata("shards").compute(scheduler="sync")
    Path("gone.txt").write_text("".join(f"{n}\n" for n in [*rows.index[[1, 2, 14]], "nope"]))
    status, out, _ = select("shards", "--not-ids", "gone.txt", "--dry-run")
    assert status == 0
    assert "removed        3 of 18 images, from 2 shards\nnot found      1 of the ids" in out
    status, out, _ = select("shards", "--not-ids", "gone.txt", "--out", "out")
    assert status == 0
    assert "receipt        out/removed.csv, out/not-found.txt" in out
    files = {"00000.tar", "00002.tar", "removed.csv", "not-found.txt", "_write.json"}
    assert list_files("out") == files
    starts, ends = rows["sample_offset"], rows["sample_offset"] + rows["sample_size"]
    first = before[shards[0]]
    assert Path("out/00000.tar").read_bytes() == first[: starts.iloc[1]] + first[ends.iloc[2] :]
    third = before[shards[2]]
    assert Path("out/00002.tar").read_bytes() == third[: starts.iloc[14]] + third[ends.iloc[14] :]
    receipt = pd.read_csv("out/removed.csv")
    assert list(receipt["image_id"]) == list(rows.index[[1, 2, 14]])
    assert list(receipt["shard"]) == [os.path.abspath(shards[n]) for n in (0, 0, 2)]
    assert list(receipt["new_shard"]) == [os.path.abspath(f"out/0000{n}.tar") for n in (0, 0, 2)]
    assert receipt["sha256"].isna().all()
    assert Path("out/not-found.txt").read_text() == "nope\n"
    assert {path: Path(path).read_bytes() for path in shards} == before

    # Again: nothing is left to do. Other ids: refused, or with --overwrite begun anew.
    written = Path("out/00000.tar").stat().st_mtime_ns
    assert select("shards", "--not-ids", "gone.txt", "--out", "out")[0] == 0
    assert Path("out/00000.tar").stat().st_mtime_ns == written
    Path("gone.txt").write_text(f"{rows.index[7]}\n")
    status, _, err = select("shards", "--not-ids", "gone.txt", "--out", "out")
    assert (status, "was written with other images to remove: give" in err) == (2, True)
    status, _, _ = select("shards", "--not-ids", "gone.txt", "--out", "out", "--overwrite")
    assert status == 0
    assert list_files("out") == files - {"00000.tar", "00002.tar"} | {"00001.tar"}

    Path("gone.txt").write_text("nope\n")
    status, out, _ = select("shards", "--not-ids", "gone.txt", "--out", "none")
    assert (status, "removed        0 of 18 images, from 0 shards" in out) == (0, True)
    assert list_files("none") == {"removed.csv", "not-found.txt", "_write.json"}
    status, _, err = select("shards", "--not-ids", "gone.txt", "--out", "shards")
    assert (status, "lies in" in err) == (2, True)


def test_copies_have_their_paths_below_the_common_folder():
    assert _name_copies(["/a/b/0.tar"]) == {"/a/b/0.tar": "0.tar"}
    assert [*_name_copies(["s3://a/x/0.tar", "s3://a/x/y/0.tar"]).values()] == ["0.tar", "y/0.tar"]
    urls = ["https://me:pw@host/0.tar?sig=1&token=2", "s3://b/0.tar"]
    assert [*_name_copies(urls).values()] == ["https:/host/0.tar", "s3:/b/0.tar"]
    for paths in (["https://h/get?n=1", "https://h/get?n=2"], ["s3://a/../0.tar", "s3://a/1.tar"]):
        with pytest.raises(ValueError, match="no names of their own"):
            _name_copies(paths)


def remove(client, paths, names, out="out", **options):
    """Remove the images with these names; return their rows."""
    rows = concat_rows([read_metadata(paths).compute(scheduler="sync")])
    chosen = rows.index.str.endswith(tuple(f"/{name}" for name in names)).to_numpy(bool)
    return remove_images(rows, chosen, [], out, client=client, **options)


def test_what_belongs_to_a_removed_image(client, folder):
    members = [
        ("a.txt", b"before"),
        ("a.png", A),
        ("note.txt", b"of no image"),
        ("b.l.png", A),
        ("b.r.png", B),
        ("b.txt", b"of both"),
        ("a.json", b"{}"),
        ("c.png", C),
        ("c.txt", b"c"),
        ("c.txt", b"again"),
        ("d.png", D),
    ]
    write_shard("s.tar", members)
    for removed, kept in {
        ("a.png",): [m for m in members if not m[0].startswith("a.")],
        ("b.l.png",): [m for m in members if m[0] != "b.l.png"],
        ("b.l.png", "b.r.png"): [m for m in members if not m[0].startswith("b.")],
        ("c.png", "d.png"): [m for m in members if m[0][0] not in "cd"],
    }.items():
        out = "-".join(removed)
        remove(client, "s.tar", removed, out)
        with tarfile.open(f"{out}/s.tar") as tar:
            assert [(info.name, tar.extractfile(info).read()) for info in tar] == kept


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_all_of_a_shard_is_removed_and_it_stays_compressed(client, folder, suffix):
    write_shard(f"x/1{suffix}", [("a.png", A), ("a.txt", b"a")])
    write_shard(f"y/1{suffix}", [("a.png", A), ("b.png", B), ("b.txt", bytes(9_000_000))])
    receipt = remove(client, ["x", "y"], ["a.png"])
    names = [path.rpartition("/out/")[2] for path in receipt["new_shard"]]
    assert names == [f"x/1{suffix}", f"y/1{suffix}"]
    assert len(read_metadata(f"out/x/1{suffix}").compute(scheduler="sync")) == 0
    rows = read_metadata(f"out/y/1{suffix}").compute(scheduler="sync")
    assert list(rows["key"]) == ["b"]
    content = Path(f"out/y/1{suffix}").read_bytes()
    if suffix == ".tar.gz":
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(content))) as tar:
            assert tar.extractfile("b.txt").read() == bytes(9_000_000)
    if suffix != ".tar":
        assert len(content) < 100_000


def test_links(client, folder):
    with tarfile.open("s.tar", "w") as tar:
        for name, content, kind, target in (
            ("a.png", A, tarfile.REGTYPE, ""),
            ("a.txt", b"a", tarfile.REGTYPE, ""),
            ("same.png", b"", tarfile.LNKTYPE, "a.png"),
            ("b.png", B, tarfile.REGTYPE, ""),
            ("b.txt", b"", tarfile.LNKTYPE, "a.txt"),
            ("c.png", b"", tarfile.SYMTYPE, "b.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(content)
            tar.addfile(info, io.BytesIO(content))
    receipt = remove(client, "s.tar", ["c.png"])
    assert [name.rpartition("/")[2] for name in receipt["image_id"]] == ["b.png", "c.png"]
    assert list(read_members("out/s.tar")) == ["a.png", "a.txt", "same.png"]
    with pytest.raises(
        JobError, match=r"s\.tar/b\.txt is a link to a\.txt, which is to be removed"
    ):
        remove(client, "s.tar", ["a.png"], "other", retries=0)
    assert list_files("other") == {"_write.json"}


def test_a_changed_shard_is_not_copied(client, folder):
    paths = make_shards("shards", images_per_shard=3, size=(24, 16))
    rows = concat_rows([read_metadata(paths).compute(scheduler="sync")])
    content = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(content + bytes(512))
    chosen = (rows["key"].astype(int) % 3 == 0).to_numpy(bool)
    with pytest.raises(JobError, match=r"1 shards could .* 00000\.tar: .*changed since the frame"):
        remove_images(rows, chosen, [], "out", client=client, retries=0)
    assert list_files("out") == {"_write.json", "00001.tar"}
    wrong = rows.drop(columns="shard_version").assign(offset=rows["offset"] + 512)
    with pytest.raises(JobError, match="has no images of the"):
        remove_images(wrong, chosen, [], "wrong", client=client, retries=0)
