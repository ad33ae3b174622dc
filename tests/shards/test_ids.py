"""Ids that stay what they are where a set is copied, linked or uploaded."""

import json
import os
import shutil

import fsspec
import pandas as pd
import pytest

from dask_imgread import (
    ImageReaderStage,
    partition_shards,
    read_bag,
    read_metadata,
    run_job,
    verify_shards,
)
from dask_imgread.cli.main import main
from dask_imgread.testing import make_shards


@pytest.fixture
def places(tmp_path):
    """One set of shards in three places: where it was made, copied, and in a store."""
    here = tmp_path / "here"
    for part in ("train", "test"):
        make_shards(here / part, shards=2, images_per_shard=3, broken=1)
    (here / "test" / "00009.tar").write_text("no shard")
    there = shutil.copytree(here, tmp_path / "other" / "there")
    (tmp_path / "link").symlink_to(here)
    store = fsspec.filesystem("memory")
    for path in here.rglob("*.tar"):
        store.pipe(f"/bucket/{path.relative_to(here)}", path.read_bytes())
    yield [str(here), f"{there}/", os.path.relpath(tmp_path / "link"), "memory://bucket"]
    store.rm("/bucket", recursive=True)


def list_ids(place, **options):
    frame = read_metadata(place, **options).compute(scheduler="sync")
    assert frame.error.notna().sum() == 1  # only headers are read
    return sorted(frame.index)


def test_ids_below_a_folder_are_the_same_everywhere(places):
    ids = [list_ids(place, relative_to=place) for place in places]
    assert ids[0] == ids[1] == ids[2] == ids[3]
    assert len(set(ids[0])) == 13
    assert len({i for place in places for i in list_ids(place)}) == 4 * 13


def test_every_way_has_them(places, tmp_path, client):
    place = places[0]
    expected = list_ids(place, relative_to=place)
    reader = ImageReaderStage(device="cpu", verbose=False, relative_to=place)
    bag = read_bag(place, reader=reader).map(lambda batch: batch.to_frame().index.tolist())
    assert sorted(i for part in bag.compute() for i in part) == expected
    cut = partition_shards(place, images_per_partition=1, relative_to=place)
    assert list_ids(cut) == expected
    assert set(verify_shards(place, reader=reader).bad.index) <= set(expected)
    run_job(place, tmp_path / "one", reader=reader, client=client)
    run_job(place, tmp_path / "two", relative_to=place, client=client)
    for out in ("one", "two"):
        assert sorted(pd.read_parquet(tmp_path / out).index) == expected
    with pytest.raises(ValueError, match="relative_to was"):
        run_job(place, tmp_path / "two", client=client)


def test_on_the_command_line(places, tmp_path, client):
    out = str(tmp_path / "out")
    command = ["metadata", places[1], "--out", out, "--relative-to", places[1]]
    assert main([*command, "--scheduler", client.scheduler.address]) == 0
    rows = pd.read_parquet(out)
    assert sorted(rows.index) == list_ids(places[0], relative_to=places[0])
    assert json.loads((tmp_path / "out" / "_job.json").read_text())["options"]["relative_to"]


def test_a_shard_that_does_not_lie_below(places):
    with pytest.raises(ValueError, match=r"00000\.tar does not lie below .*/elsewhere/"):
        partition_shards(places[0], relative_to=f"{places[0]}/elsewhere")
    reader = ImageReaderStage(device="cpu", relative_to="/elsewhere")
    with pytest.raises(ValueError, match="does not lie below /elsewhere/, its relative_to"):
        reader.process(partition_shards(places[0])[0])
