"""Look first, decode later: frames of Dask and pandas in the place of shards."""

import os
import subprocess
import sys
from collections import Counter

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask.base import tokenize

from dask_imgread import (
    ImageReaderStage,
    SchemaError,
    map_images,
    partition_shards,
    read_bag,
    read_metadata,
    run_job,
)
from dask_imgread.shards import local
from dask_imgread.tasks import COLUMNS
from tests.helpers.servers import serve_http
from tests.helpers.workers import META
from tests.helpers.workers import add_up as add_up_by_id

READER = ImageReaderStage(device="cpu", verbose=False, sidecars=False)
SUMS = pd.DataFrame({"total": pd.Series(dtype="int64")}).rename_axis("image_id")


def add_up(batch):
    return {"total": [int(image.image_data.sum()) for image in batch.data]}


def list_metadata(batch):
    return [
        {"label": image.metadata.get("label"), "more": sorted(image.metadata)}
        for image in batch.data
    ]


@pytest.fixture(scope="module")
def sums(photo_shards):
    """The sum of each image's pixels by id."""
    return map_images(add_up, photo_shards, reader=READER).compute(scheduler="sync")["total"]


@pytest.fixture
def lazy(photo_shards):
    return read_metadata(photo_shards, reader=READER)


def check(chosen, sums, expected, scheduler="sync"):
    """Read a frame with both functions; compare with the sums of the whole shards."""
    rows = map_images(add_up, chosen, reader=READER, meta=SUMS).compute(scheduler=scheduler)
    assert sorted(rows.index) == sorted(expected)
    assert list(rows["total"]) == list(sums[rows.index])
    pairs = read_bag(chosen, reader=READER).map(pair_ids).flatten().compute(scheduler=scheduler)
    assert sorted(pairs) == sorted((name, sums[name]) for name in expected)


def pair_ids(batch):
    assert not batch.failed
    return [(image.image_id, image.image_data.sum()) for image in batch.data]


CHOICES = {
    "all": lambda f: f,
    "query": lambda f: f.query("width > 150 and height < 200"),
    "mask": lambda f: f[(f["width"] > f["height"]) & (f["format"] == "jpeg")],
    "sample": lambda f: f.sample(frac=0.2, random_state=1),
    "few columns": lambda f: f[["shard", "key", "offset", "size", "image_path"]],
    "reset": lambda f: f.reset_index(),
    "repartitioned": lambda f: f.repartition(npartitions=3),
    "one partition": lambda f: f.repartition(npartitions=1),
    "indexed by width": lambda f: f.set_index("width"),
    "indexed by key": lambda f: f.set_index("key", drop=False),
    "sorted": lambda f: f.sort_values("size"),
    "shuffled": lambda f: f.shuffle("width"),
    "head": lambda f: f.head(5, compute=False),
    "numpy's types": lambda f: f.astype({"offset": "int64", "size": "float64", "shard": object}),
    "twice": lambda f: dd.concat([f, f.query("width > 150")]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_choices(lazy, sums, choice):
    chosen = CHOICES[choice](lazy)
    rows = chosen.compute(scheduler="sync")
    expected = rows["image_path"].map(
        {row.image_path: row.Index for row in lazy.compute(scheduler="sync").itertuples()}
    )
    check(chosen, sums, expected)
    check(rows, sums, expected)


def test_on_a_cluster(client, lazy, sums):
    chosen = lazy.query("width > 100")
    names = list(chosen.compute().index)
    check(chosen, sums, names, scheduler=None)
    check(chosen.persist(), sums, names, scheduler=None)
    means = map_images(add_up, chosen, reader=READER)
    assert means["total"].sum().compute() == sums[names].sum()


def test_a_table_of_the_user_is_joined(lazy, photo_shards):
    names = list(lazy.compute(scheduler="sync").index)
    table = pd.DataFrame({"image_id": names[::5], "label": [*range(19), None]})
    joined = lazy.reset_index().merge(table, on="image_id")
    rows = map_images(list_metadata, joined, reader=READER).compute(scheduler="sync")
    assert sorted(rows.index) == sorted(names[::5])
    for name, label in zip(table["image_id"], table["label"], strict=True):
        assert list(rows["more"][name]) == ([] if np.isnan(label) else ["label"])
        assert np.isnan(label) or rows["label"][name] == label
    left = lazy.merge(table.set_index("image_id"), left_index=True, right_index=True, how="left")
    rows = map_images(list_metadata, left, reader=READER).compute(scheduler="sync")
    assert len(rows) == 100
    assert rows["label"].notna().sum() == 19


# Nothing is read early


@pytest.fixture
def opened(monkeypatch):
    """Counts the local shards that are opened."""
    count = Counter()
    begin = local.LocalSource.__init__

    def note(source, path, *args):
        count[path] += 1
        begin(source, path, *args)

    monkeypatch.setattr(local.LocalSource, "__init__", note)
    return count


def test_nothing_is_read_before_it_is_computed(lazy, opened, photo_shards):
    chosen = lazy[lazy["shard"] == photo_shards[2]].query("width > 150")
    rows = map_images(add_up, chosen, reader=READER, meta=SUMS)
    bag = read_bag(chosen, reader=READER)
    again = read_metadata(chosen, reader=READER)
    assert opened.total() == 0
    assert rows.npartitions == bag.npartitions == again.npartitions == 4
    assert len(rows.compute(scheduler="sync")) > 5
    assert opened == dict.fromkeys(photo_shards, 1) | {photo_shards[2]: 2}


def test_of_a_pandas_frame_only_its_shards_are_opened(lazy, opened, photo_shards):
    rows = lazy.compute(scheduler="sync")
    opened.clear()
    chosen = rows[rows["shard"].isin(photo_shards[1:3])]
    map_images(add_up, chosen, reader=READER, meta=SUMS).compute(scheduler="sync")
    assert opened == dict.fromkeys(photo_shards[1:3], 1)


def test_a_bag_streams_the_batches_of_a_partition(lazy):
    reader = READER.with_options(dali_batch_size=5)
    sizes = read_bag(lazy, reader=reader).map(lambda batch: batch.num_items)
    assert sizes.compute(scheduler="sync") == [5] * 20


def test_partitions_without_rows(lazy, sums, photo_shards):
    chosen = lazy[lazy["shard"] == photo_shards[1]]
    rows = map_images(add_up, chosen, reader=READER, meta=SUMS)
    parts = [rows.get_partition(n).compute(scheduler="sync") for n in range(4)]
    assert [len(part) for part in parts] == [0, 25, 0, 0]
    assert all(part.dtypes.equals(parts[1].dtypes) for part in parts)
    assert all(part.index.dtype == parts[1].index.dtype for part in parts)
    none = lazy.query("width < 0")
    check(none, sums, [])
    with pytest.raises(ValueError, match="give no row from which to infer"):
        map_images(add_up, none, reader=READER)
    assert len(read_metadata(none).compute(scheduler="sync")) == 0


def test_meta_is_inferred_from_the_first_rows(lazy, photo_shards, opened):
    rows = map_images(add_up, lazy[lazy["shard"] == photo_shards[1]], reader=READER)
    assert opened[photo_shards[1]] == 2
    assert opened[photo_shards[3]] == 0
    assert rows.dtypes.to_dict() == {"total": np.dtype("int64")}
    assert rows.index.name == "image_id"


def test_meta_is_enforced(lazy):
    meta = pd.DataFrame({"total": pd.Series(dtype="string[pyarrow]")}).rename_axis("image_id")
    rows = map_images(add_up, lazy, reader=READER, meta=meta)
    with pytest.raises(SchemaError, match="where meta has"):
        rows.compute(scheduler="sync")


def test_objects_stay_objects(lazy):
    def list_sizes(batch):
        return {"size": [(image.width, image.height) for image in batch.data]}

    meta = pd.DataFrame({"size": pd.Series(dtype=object)}).rename_axis("image_id")
    rows = map_images(list_sizes, lazy, reader=READER, meta=meta)
    assert str(rows.dtypes["size"]) == "object"
    assert isinstance(rows.compute(scheduler="sync")["size"].iloc[0], tuple)


@pytest.mark.parametrize(
    ("division", "partitions"),
    [
        ({"images_per_partition": 30}, 4),
        ({"files_per_partition": 2}, 2),
        ({"blocksize": 1 << 40}, 1),
        ({"limit": 3}, 3),
        ({"images_per_partition": None, "limit": None}, 4),
        ({"dataset_name": "photos"}, 4),
    ],
)
def test_divisions_of_a_lazy_frame(lazy, sums, division, partitions):
    with dask.config.set(scheduler="sync"):
        rows = map_images(add_up, lazy, reader=READER, meta=SUMS, **division)
        bag = read_bag(lazy, reader=READER, **division)
    assert rows.npartitions == bag.npartitions == partitions
    expected = sums[:75] if division.get("limit") else sums
    assert rows.compute(scheduler="sync")["total"].to_dict() == expected.to_dict()
    batches = bag.compute(scheduler="sync")
    assert {batch.dataset_name for batch in batches} == {division.get("dataset_name", "")}


def test_options_are_part_of_the_names(lazy, photo_shards):
    bags = [read_bag(lazy, reader=READER, dataset_name=name) for name in ("a", "b", "a")]
    assert bags[0].name == bags[2].name != bags[1].name
    keys = [
        map_images(add_up, lazy, reader=READER, meta=SUMS, dataset_name=name).dask.keys()
        for name in ("a", "b", "a")
    ]
    assert set(keys[0]) == set(keys[2]) != set(keys[1])


def test_secrets_are_in_no_key_and_no_name(lazy, caplog):
    options = {"storage_options": {"secret": "pass-4f1c"}}
    rows = map_images(add_up, lazy, reader=READER, meta=SUMS, **options)
    bag = read_bag(lazy, reader=READER, **options)
    for text in (str(rows), repr(rows.expr), str(bag), str(list(bag.dask)), str(list(rows.dask))):
        assert "pass-4f1c" not in text
    with serve_http(".") as server:
        lost = lazy.assign(shard=f"{server.url}/gone.tar")
        frame = map_images(
            describe_failures,
            lost,
            reader=READER,
            meta=FAILURES,
            storage_options={"headers": {"Authorization": "pass-4f1c"}},
        ).compute(scheduler="sync")
    assert len(frame) == 100
    assert "pass-4f1c" not in frame.to_csv() + caplog.text


FAILURES = pd.DataFrame({"error": pd.Series(dtype="string[pyarrow]")}).rename_axis("image_id")


def describe_failures(batch):
    return batch.to_frame()[["error"]]


# In another process


def list_keys(path):
    reader = ImageReaderStage(device="cpu")
    rows = pd.read_parquet(path)
    keys = []
    for frame in (rows, dd.from_pandas(rows, npartitions=2)):
        keys += sorted(map(str, map_images(add_up_by_id, frame, reader=reader, meta=META).dask))
        keys.append(read_bag(frame, reader=reader).name)
    return keys


def run_python(code, *arguments, folder):
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_keys_are_the_same_in_every_process(lazy, tmp_path):
    path = str(tmp_path / "rows")
    lazy.query("width > 100").to_parquet(path)
    here = list_keys(path)
    assert sum(key.startswith("read-images-") for key in here) == 2
    assert sum(key.startswith("('map-images-") for key in here) == 6
    code = f"from tests.test_chosen import list_keys; print(list_keys({path!r}))"
    assert run_python(code, folder=".") == f"{here}\n"


READ_LATER = """
import sys
import dask.dataframe as dd

def read(path):
    if path.endswith("csv"):
        return dd.read_csv(path, dtype={"key": str})
    return dd.read_parquet(path)

frames = {path: read(path) for path in sys.argv[1:]}
assert not any(name.startswith("dask_imgread") for name in sys.modules)
chosen = {path: rows[rows["width"] > 150] for path, rows in frames.items()}
assert all(len(rows) > 10 for rows in chosen.values())

from dask_imgread import ImageReaderStage, map_images, read_bag

def add_up(batch):
    return {"total": [int(image.image_data.sum()) for image in batch.data]}

reader = ImageReaderStage(device="cpu", verbose=False)
for path, rows in chosen.items():
    frame = map_images(add_up, rows, reader=reader).compute(scheduler="sync")
    batches = read_bag(rows, reader=reader).compute(scheduler="sync")
    found = {image.image_id: int(image.image_data.sum()) for b in batches for image in b.data}
    assert found == frame["total"].to_dict()
    frame.to_parquet(f"{path}-read")
"""


def test_rows_that_were_stored(lazy, sums, tmp_path):
    rows = lazy.compute(scheduler="sync")
    paths = [str(tmp_path / name) for name in ("by-dask", "by-pandas", "no-index", "as-csv")]
    lazy.to_parquet(paths[0])
    rows.to_parquet(paths[1])
    rows.reset_index().to_parquet(paths[2], index=False)
    rows.to_csv(paths[3])
    run_python(READ_LATER, *paths, folder=tmp_path)
    expected = sums[rows.index[rows["width"] > 150]].sort_index().to_dict()
    for path in paths:
        assert pd.read_parquet(f"{path}-read")["total"].sort_index().to_dict() == expected


def test_a_jobs_folder_stays_lazy(client, photo_shards, sums, tmp_path, opened):
    run_job(photo_shards, tmp_path / "out", reader=READER, client=client)
    for given in (tmp_path / "out", str(tmp_path / "out")):
        opened.clear()
        rows = map_images(add_up, given, reader=READER, meta=SUMS)
        assert opened.total() == 0
        assert rows.compute(scheduler="sync")["total"].to_dict() == sums.to_dict()
        assert set(COLUMNS) <= set(read_metadata(given).columns)


def test_metadata_of_a_frame_is_the_frame(lazy):
    rows = lazy.compute(scheduler="sync")
    again = read_metadata(rows[::3]).compute(scheduler="sync")
    pd.testing.assert_frame_equal(again, rows[::3])
    decoded = read_metadata(lazy, decode=True).compute(scheduler="sync")
    pd.testing.assert_frame_equal(decoded.drop(columns="backend"), rows.drop(columns="backend"))


def test_a_token_of_a_task_reads_no_shard(lazy, opened):
    tasks = partition_shards(lazy.compute(scheduler="sync"))
    opened.clear()
    assert len({tokenize(task) for task in tasks}) == 4
    assert opened.total() == 0


@pytest.mark.parametrize("form", ["pandas", "dask", "tasks"])
def test_sidecars_of_a_frame_are_refused_not_null(lazy, form):
    rows = lazy.compute(scheduler="sync")
    given = {"pandas": rows, "dask": lazy, "tasks": partition_shards(rows)}[form]
    with pytest.raises(ValueError, match="give the shards"):
        read_metadata(given, sidecars={"cls": "label"})
