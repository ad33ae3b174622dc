"""Which images are duplicates, on the command line."""

import json
from functools import partial

import fsspec
import numpy as np
import pandas as pd
import pytest
from dask.utils import format_bytes

from dask_imgread import run_job
from dask_imgread.cli.main import main
from dask_imgread.testing import draw_picture, encode_picture, write_shard

A, B = (encode_picture(draw_picture(n, (24, 16)), "png") for n in range(2))


def hash_names(batch):
    """Return hashes of images by their names, in which a number is a number of set bits."""
    bits = [(1 << int(image.key)) - 1 for image in batch]
    names = "shard", "offset", "size"
    columns = {name: [getattr(image, name) for image in batch] for name in names}
    return {"image_id": batch.ids, "phash": np.array(bits, np.uint64), **columns}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, imgread_cluster):
    """A folder with shards, their metadata and their hashes."""
    folder = tmp_path_factory.mktemp("outputs")
    for name, images in {"s": {"00": A, "10": A, "20": B}, "t": {"03": A, "40": B}}.items():
        members = [(f"{key}.png", content) for key, content in images.items()]
        write_shard(folder / "shards" / f"{name}.tar", members)
    shards = str(folder / "shards")
    with imgread_cluster.get_client() as client:
        options = {"client": client, "relative_to": shards}
        run_job(shards, str(folder / "metadata"), checksum=True, **options)
        run_job(shards, str(folder / "hashes"), hash_names, **options)
    return folder


@pytest.fixture
def duplicates(outputs, monkeypatch, run_command):
    monkeypatch.chdir(outputs)
    return partial(run_command, "duplicates")


def test_numbers_and_groups(duplicates):
    status, out, err = duplicates("metadata")
    assert (status, err) == (0, "")
    numbers, groups = out.split("\n\n")
    size = format_bytes(2 * len(A) + len(B))
    assert numbers.splitlines() == [
        "images         5 in metadata",
        f"duplicates     5 in 2 groups: 3 beside one of each, {size}",
    ]
    first, second = groups.splitlines()
    assert first.endswith(" and 1 more")
    assert second.count("/20.png") == second.count("/40.png") == 1


def test_for_machines(duplicates):
    status, out, _ = duplicates("hashes", "--by", "phash", "--log-format", "json")
    assert status == 0
    assert json.loads(out) == {
        "images": 5,
        "groups": 1,
        "duplicates": 2,
        "to_drop": 1,
        "bytes_to_drop": len(A),
        "out": None,
    }
    out = duplicates("hashes", "--by", "phash", "--distance", 2)[1]
    assert out.splitlines()[1] == "duplicates     0 in 0 groups: 0 beside one of each, 0 B"


def test_many_groups_and_warnings(duplicates, monkeypatch, caplog):
    monkeypatch.setattr("dask_imgread.cli.duplicates._LISTED", 1)
    monkeypatch.setattr("dask_imgread.duplicates._MANY", 2)
    assert "\ngroups not shown: 1\n" in duplicates("metadata")[1]
    assert "3 images are one group of duplicates, by sha256" in caplog.text


@pytest.mark.parametrize("out", ["all.parquet", "memory://duplicates/all.parquet"])
def test_all_in_a_file(duplicates, out):
    status, told, _ = duplicates("metadata", "--out", out)
    assert status == 0
    assert told.endswith(f"\n\nwritten to     {out}\n")
    rows = pd.read_parquet(out, dtype_backend="pyarrow")
    assert (rows.index.name, len(rows), rows["keep"].sum()) == ("image_id", 5, 2)
    fs, path = fsspec.url_to_fs(out)
    fs.rm(path)


def test_the_rest_is_removed_from_the_shards(duplicates, client, capsys, tmp_path):
    assert duplicates("metadata", "--out", tmp_path / "drop.txt")[0] == 0
    out = tmp_path / "rewritten"
    drop = ["--not-ids", str(tmp_path / "drop.txt"), "--out", str(out)]
    assert main(["select", "metadata", *drop, "--scheduler", client.scheduler.address]) == 0
    assert "removed        3 of 5 images" in capsys.readouterr().out


def test_what_can_not_be_compared(duplicates):
    status, _, err = duplicates("metadata", "--by", "phash")
    assert status == 2
    assert "the frame has no column phash: make the rows with the function fingerprint" in err
    assert duplicates("nowhere")[0] == 2
