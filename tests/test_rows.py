"""What a function makes of a batch: its forms, its index, its types, and where it raises."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_imgread import (
    ImageBatch,
    ImageObject,
    ImageReaderStage,
    JobError,
    map_images,
    run_job,
)
from dask_imgread.rows import make_rows, to_table
from dask_imgread.testing import draw_picture, encode_picture, make_shards, write_shard

READER = ImageReaderStage(device="cpu", verbose=False, sidecars=False)
IDS = ["s/a.jpg", "s/b.jpg", "s/c.jpg"]


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_shards("shards", shards=2, images_per_shard=12, size=(48, 32))


def as_dict(batch):
    return {"mean": [image.image_data.mean() for image in batch.data]}


def as_dicts(batch):
    return [{"mean": image.image_data.mean()} for image in batch.data]


def as_frame(batch):
    return pd.DataFrame(as_dict(batch))


def as_sorted_frame(batch):
    return as_frame(batch).sort_values("mean", ascending=False)


def as_frame_with_ids(batch):
    return pd.DataFrame(as_dict(batch), index=[image.image_id for image in batch.data])


FORMS = [as_dict, as_dicts, as_frame, as_sorted_frame, as_frame_with_ids]
LOOSE = pd.DataFrame({"mean": pd.Series(dtype=float)}).rename_axis("image_id")


@pytest.mark.parametrize("meta", [None, LOOSE], ids=["inferred", "meta"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_and_can_be_written(shards, form, meta):
    frame = map_images(form, shards, reader=READER, meta=meta)
    frame.to_parquet("out", compute_kwargs={"scheduler": "sync"})
    rows = pd.read_parquet("out").sort_index()
    expected = map_images(as_dict, shards, reader=READER).compute(scheduler="sync").sort_index()
    assert rows.index.tolist() == expected.index.tolist()
    assert rows["mean"].tolist() == expected["mean"].tolist()
    assert len(set(rows["mean"])) > 10


def test_types_come_from_the_first_rows_not_from_the_first_images(shards):
    def late(batch):
        keys = {"key": [image.key for image in batch.data]}
        rows = pd.DataFrame(as_dict(batch) | keys).set_index("key")
        return rows[rows.index > "000009"]

    frame = map_images(late, shards, reader=READER)
    assert (str(frame.dtypes["mean"]), frame.index.name) == ("float64", "key")
    assert len(frame.compute(scheduler="sync")) == 14


def test_meta_is_inferred_where_dask_computes(imgread_client, shards):
    rows = map_images(as_dict, shards, reader=READER).compute()
    assert (len(rows), rows.index.name) == (24, "image_id")


def test_what_nothing_can_be_inferred_from_is_said(tmp_path):
    shard = write_shard(tmp_path / "s.tar", [("a.jpg", b"no picture")])
    with pytest.raises(ValueError, match=r"give no row from which .* give them with meta"):
        map_images(as_dict, shard, reader=READER)
    empty = map_images(as_dict, shard, reader=READER, meta=LOOSE).compute(scheduler="sync")
    assert (len(empty), str(empty.index.dtype)) == (0, "string")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"mean": int}, "mean: float64, where meta has image_id: string.*, mean: int64"),
        ({"mean": str}, r"mean: float64, where meta has .*mean: str \(column 'mean' is float64"),
        ({"mean": float, "width": int}, "mean: float64, where meta has .*width: int64"),
        ({"means": float}, "mean: float64, where meta has .*means: float64"),
    ],
)
def test_rows_are_checked_against_meta(shards, meta, message):
    empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in meta.items()})
    frame = map_images(as_dict, shards, reader=READER, meta=empty.rename_axis("image_id"))
    with pytest.raises(ValueError, match=message):
        frame.compute(scheduler="sync")
    frame = map_images(as_dict, shards, reader=READER, meta=empty)
    with pytest.raises(ValueError, match="leave meta out"):
        frame.compute(scheduler="sync")


def test_rows_get_the_types_of_meta_where_nothing_is_lost(shards):
    def widths(batch):
        return {"width": [i.width for i in batch.data], "key": [i.key for i in batch.data]}

    types = {"key": "string[pyarrow]", "width": "int16"}
    meta = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in types.items()})
    rows = map_images(widths, shards, reader=READER, meta=meta.rename_axis("image_id"))
    computed = rows.compute(scheduler="sync")
    assert [str(kind) for kind in computed.dtypes] == ["string", "int16"]
    assert list(computed.columns) == ["key", "width"]


def make_batch():
    return ImageBatch([ImageObject(image_id=name) for name in IDS])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"a": [1, 2]}, r"column 'a' has 2 entries for 3 images"),
        ([{"a": 1}], r"a list of dicts has 1 entries for 3 images"),
        ({"a": 1.5}, r"column 'a': an array or a list is expected, not 1.5"),
        ({"a": np.array(1.5)}, r"column 'a': an array or a list is expected"),
        ({"a": "abc"}, r"column 'a': an array or a list is expected, not 'abc'"),
        (np.zeros(3), r"a DataFrame, a dict of arrays or a list of dicts is expected, not ndarray"),
        ([1, 2, 3], r"a list of dicts is expected, not list"),
    ],
)
def test_what_is_no_rows(made, message):
    with pytest.raises(ValueError, match=message):
        make_rows(lambda batch: made, make_batch())


def test_what_is_no_rows_is_no_images_failure(imgread_client, shards):
    def summarise(batch):
        return {"mean": [1.0]} if batch.num_items > 8 else as_dict(batch)

    with pytest.raises(JobError, match="column 'mean' has 1 entries for 12 images"):
        run_job(shards, "out", summarise, client=imgread_client, reader=READER)


@pytest.mark.parametrize(
    "rows",
    [
        pd.DataFrame({"box": range(5)}),  # other rows than images
        pd.DataFrame({"image_id": IDS}),
        pd.DataFrame({"a": range(3)}, index=pd.Index([1, 2, 3], name="number")),
        pd.DataFrame({"a": range(3)}, index=[7, 8, 9]),
    ],
)
def test_an_index_that_is_not_the_images_is_left_alone(rows):
    pd.testing.assert_frame_equal(make_rows(lambda batch: rows, make_batch()), rows)


def test_nothing_for_no_image_is_no_rows():
    assert len(make_rows(lambda batch: None, ImageBatch())) == 0
    with pytest.raises(ValueError, match="not NoneType"):
        make_rows(lambda batch: None, make_batch())


def test_columns_may_have_numbers_as_names():
    table = to_table(make_rows(lambda batch: {0: np.zeros((3, 2)), 1: [1, 2, 3]}, make_batch()))
    assert table.column_names == ["0", "1", "image_id"]


def test_a_function_may_empty_its_batch():
    def take(batch):
        names = []
        while batch.data:
            names.append(batch.data.pop(0).image_id)
        return {"name": names}

    batch = make_batch()
    assert make_rows(take, batch)["name"].tolist() == IDS
    assert batch.num_items == 3


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.zeros((3, 4), np.float32), pa.list_(pa.float32(), 4)),
        ([np.arange(2)] * 3, pa.list_(pa.int64(), 2)),
        (np.zeros((3, 2, 5), np.uint8), pa.list_(pa.list_(pa.uint8(), 5), 2)),
        ([np.arange(n) for n in range(3)], pa.list_(pa.int64())),
        ([np.arange(0.0)] * 3, pa.list_(pa.float64())),
        ([[1, 2]] * 3, pa.list_(pa.int64())),
    ],
)
def test_arrays_of_one_shape_are_lists_of_a_fixed_size(values, kind):
    for made in ({"a": values}, [{"a": value} for value in values]):
        table = to_table(make_rows(lambda batch, made=made: made, make_batch()))
        assert table["a"].type == kind
        assert table["a"].to_pylist() == [np.asarray(value).tolist() for value in values]


def thumbnail(batch):
    """An array of one shape for each image, and one of any length."""
    return {
        "mean": np.stack([i.image_data.mean(axis=(0, 1)) for i in batch.data]),
        "some": [np.arange(int(i.key) % 3) for i in batch.data],
    }


def test_arrays_in_a_frame_and_in_a_job(imgread_client, shards):
    run_job(shards, "job", thumbnail, client=imgread_client, reader=READER)
    map_images(thumbnail, shards, reader=READER).to_parquet("frame")
    for table in (pq.read_table("job"), pq.read_table("frame")):
        assert table["mean"].type.list_size == 3
        assert table["some"].type.value_type == pa.int64()
        assert len(table) == 24
    rows = pd.read_parquet("job")
    assert rows["mean"].iloc[0].shape == (3,)
    assert rows.index[0].endswith("/000000.jpg")


def test_sidecars_are_json_whatever_python_takes_for_it(imgread_client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jpeg = encode_picture(draw_picture(1, (64, 48)))
    sidecars = ['{"a": NaN, "b": [1.5, Infinity, {"c": -Infinity}]}', "1e999", '{"a": "NaN"}']
    members = []
    for number, text in enumerate(sidecars):
        members += [(f"{number}.jpg", jpeg), (f"{number}.json", text.encode())]
    members.append(("2.bin", b"\0"))
    shard = write_shard("s.tar", members)
    run_job(shard, "out", client=imgread_client, reader=ImageReaderStage(decode=False))

    def refuse(constant):
        raise ValueError(constant)

    texts = pd.read_parquet("out")["sidecars"]
    assert [json.loads(text, parse_constant=refuse) for text in texts] == [
        {"json": {"a": None, "b": [1.5, None, {"c": None}]}},
        {"json": None},
        {"json": {"a": "NaN"}, "bin": {"base64": "AA=="}},
    ]


def test_a_batch_without_a_good_image_has_no_rows(imgread_client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jpeg = encode_picture(draw_picture(1, (64, 48)))
    shards = [write_shard("a.tar", [("0.jpg", jpeg)]), write_shard("b.tar", [("0.jpg", b"")])]
    assert len(map_images(thumbnail, shards, reader=READER).compute()) == 1
    summary = run_job(shards, "out", thumbnail, client=imgread_client, reader=READER)
    assert (summary.images, summary.failed, summary.function_failed) == (1, 1, 0)


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (ValueError("\ud800 bad"), r"ValueError: \ud800 bad"),
        (ValueError("m" * 1_000_000), "ValueError: mmmm"),
        (ValueError("http://me:secret@host/"), "ValueError: http://host/"),
        (UnspeakableError(), "UnspeakableError: (no text)"),
    ],
)
def test_whatever_a_function_raises_can_be_written(error, start):
    from dask_imgread.rows import describe_failure

    text = describe_failure(error)
    assert text.startswith(start)
    assert len(text) < 3000
    text.encode()


def test_lost_parts_of_a_shard_have_ids_of_their_own(tmp_path):
    from dask_imgread import partition_shards
    from dask_imgread.reading.records import describe_lost_shards
    from dask_imgread.testing import make_shards

    tasks = partition_shards(make_shards(tmp_path, shards=2), images_per_partition=2)
    lost = [i for task in tasks for i in describe_lost_shards(task, None, ValueError("gone"))]
    assert len({image.image_id for image in lost}) == len(lost) == 8
