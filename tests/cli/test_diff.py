"""What changed between two jobs' outputs, on the command line."""

import json
import os
from functools import partial
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from dask_imgread import diff_frames, run_job
from dask_imgread.testing import draw_picture, encode_picture, write_shard

A, B = (encode_picture(draw_picture(n, (24, 16)), "png") for n in range(2))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, imgread_cluster):
    """A folder with two outputs of metadata, of which one has a change of each kind."""
    folder = tmp_path_factory.mktemp("outputs")
    images = {f"{n:02}.png": A for n in range(10)}
    bad = {"bad.png": b"text"}
    days = {
        "old": {"s": images | bad | {"edited.png": A, "good.png": A}, "t": {"x.png": B}},
        "new": {"s": bad | {"edited.png": A + b"\0", "good.png": b""}, "u": {"x.png": B}},
        "later": {"s": bad | {"bad.png": B}},
    }
    with imgread_cluster.get_client() as client:
        for day, shards in days.items():
            for name, members in shards.items():
                write_shard(folder / "shards" / f"{name}.tar", [*members.items()])
            shards = str(folder / "shards")
            run_job(shards, str(folder / day), client=client, relative_to=shards)
            for name in days[day]:
                os.remove(folder / "shards" / f"{name}.tar")
    return folder


@pytest.fixture
def diff(outputs, monkeypatch, run_command):
    monkeypatch.chdir(outputs)
    return partial(run_command, "diff")


def test_numbers_and_examples(diff):
    status, out, err = diff("old", "new")
    assert (status, err) == (0, "")
    numbers, listed = out.split("\n\n")
    assert numbers.splitlines() == [
        "images         14 in old, 4 in new",
        "added           0",
        "gone           10",
        "changed         1",
        "moved           1",
        "newly failed    1",
        "newly readable  0",
    ]
    (gone,) = {line.split("/")[0] for line in listed.splitlines() if line.startswith("gone")}
    shard = gone.removeprefix("gone: ")
    assert listed.splitlines()[:6] == [
        *(f"{gone}/{n:02}.png" for n in range(5)),
        "and 5 more gone",
    ]
    assert f"changed: {shard}/edited.png: size {len(A)} to {len(A) + 1}\n" in listed
    assert f"newly failed: {shard}/good.png: empty: " in listed
    assert "/x.png: from t-" in listed
    assert f"newly readable: {shard}/bad.png: before: not an image: " in diff("new", "later")[1]


def test_nothing_differs(diff):
    for options in ([], ["--exit-code"]):
        status, out, _ = diff("old", "old", *options)
        assert status == 0
        assert out.endswith("newly readable  0\n")
    assert diff("old", "new", "--exit-code")[0] == 1


def test_for_machines(diff):
    status, out, _ = diff("new", "old", "--log-format", "json", "--out", "changes.parquet")
    assert status == 0
    assert json.loads(out) == {
        "old": 4,
        "new": 14,
        "added": 10,
        "gone": 0,
        "changed": 1,
        "moved": 1,
        "newly_failed": 0,
        "newly_readable": 1,
        "out": "changes.parquet",
    }


@pytest.mark.parametrize("out", ["all.parquet", "memory://diff/all.parquet"])
def test_all_changes_in_a_file(diff, monkeypatch, out):
    monkeypatch.setattr("dask_imgread.diff._ROWS", 4)  # so that they come in several parts
    status, told, _ = diff("old", "new", "--out", out)
    assert status == 0
    assert told.endswith(f"\n\nchanges        {out}\n")
    rows = pd.read_parquet(out, dtype_backend="pyarrow")
    changes = diff_frames("old", "new").compute(scheduler="sync")
    assert rows.index.name == "image_id"
    assert sorted(rows.index) == sorted(changes.index)
    assert list(rows) == list(changes)
    for name in ("change", "size_old", "shard_new"):
        assert rows[name].dropna().to_dict() == changes[name].dropna().to_dict()
    assert diff("old", "old", "--out", out)[0] == 0
    none = pd.read_parquet(out, dtype_backend="pyarrow")
    assert (len(none), none.dtypes.to_dict()) == (0, rows.dtypes.to_dict())
    fs, path = fsspec.url_to_fs(out)
    fs.rm(path)


def test_outputs_in_a_store(diff, outputs):
    store = fsspec.filesystem("memory")
    store.put(f"{outputs}/new/", "/outputs/", recursive=True)
    status, out, _ = diff("old", "memory://outputs")
    assert status == 0
    assert "images         14 in old, 4 in memory://outputs" in out
    store.rm("/outputs", recursive=True)


def test_an_unfinished_output(diff, outputs, caplog, tmp_path):
    for path in (outputs / "old").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    os.remove(tmp_path / "part-0000001.parquet")
    job = json.loads((tmp_path / "_job.json").read_text())
    (tmp_path / "_job.json").write_text(json.dumps(job | {"finished": False}))
    assert "images         14 in old, 13 in" in diff("old", tmp_path)[1]
    assert f"{tmp_path} is unfinished, and may lack images" in caplog.text


def test_what_is_no_output(diff):
    for folders in (("old", "nowhere"), ("shards", "old")):
        status, out, err = diff(*folders, "--out", "none.parquet")
        assert (status, out) == (2, "")
        assert "a job's folder, not" in err
    assert not Path("none.parquet").exists()
