import dask.dataframe as dd
import pandas as pd
import pytest

from dask_imgread import ImageReaderStage, map_images, partition_shards, read_bag, read_metadata
from dask_imgread.tasks import COLUMNS
from dask_imgread.testing import write_shard

SCHEDULERS = ["sync", "threads", None]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_bag_counts_every_image(client, photo_shards, scheduler):
    bag = read_bag(photo_shards, images_per_partition=10)
    assert bag.npartitions == 12
    assert bag.map(lambda b: b.num_items).sum().compute(scheduler=scheduler) == 100


def test_bag_of_whole_batches(client, photo_shards):
    batches = read_bag(partition_shards(photo_shards[:2])).compute()
    assert [b.num_items for b in batches] == [25, 25]
    assert batches[0].data[0].image_data.ndim == 3


EVENTS = []


class Watched(ImageReaderStage):
    def stream(self, task):
        for batch in super().stream(task):
            EVENTS.append("decoded")
            yield batch


def test_bag_streams(photo_shards):
    """A function mapped over the bag sees a batch before the next one is decoded."""
    EVENTS.clear()
    bag = read_bag(photo_shards[:1], reader=Watched(dali_batch_size=5))
    bag.map(lambda b: EVENTS.append("seen")).count().compute(scheduler="sync")
    assert EVENTS == ["decoded", "seen"] * 5


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("decode", [False, True])
def test_metadata_has_a_row_for_each_image(client, photo_shards, scheduler, decode):
    frame = read_metadata(photo_shards, decode=decode, files_per_partition=3)
    rows = frame.compute(scheduler=scheduler)
    assert len(rows) == 100
    assert rows.index.name == "image_id"
    assert rows.index.is_unique
    assert {name: str(dtype) for name, dtype in rows.dtypes.items()} == {
        name: dtype.replace("string[pyarrow]", "string") for name, dtype in COLUMNS.items()
    }
    assert set(rows["format"]) == {"jpeg"}
    assert rows["error"].isna().all()
    assert rows["backend"].notna().all() == decode
    assert (rows["image_path"] == rows["shard"] + "/" + rows["key"] + ".jpg").all()


def test_len_and_selection(client, photo_shards):
    frame = read_metadata(photo_shards)
    assert len(frame) == 100
    wide = frame[frame.width > 150]
    rows = frame.compute()
    assert len(wide.compute()) == int((rows["width"] > 150).sum())


def test_every_partition_has_the_same_schema(client, photo_shards, tmp_path):
    empty = write_shard(tmp_path / "empty.tar", [])
    texts = write_shard(tmp_path / "texts.tar", [("a.txt", b"no image")])
    frame = read_metadata([photo_shards[0], empty, texts])
    partitions = [frame.get_partition(n).compute() for n in range(3)]
    assert [len(p) for p in partitions] == [25, 0, 0]
    for partition in partitions:
        assert partition.dtypes.equals(frame._meta.dtypes)
        assert partition.index.dtype == frame._meta.index.dtype
    frame.to_parquet(str(tmp_path / "out"))
    assert len(dd.read_parquet(str(tmp_path / "out"))) == 25


def test_no_tasks_give_empty_collections():
    assert read_bag([]).compute(scheduler="sync") == []
    frame = read_metadata([])
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame.compute(scheduler="sync")) == 0


def brightness(batch):
    ids = pd.Index([i.image_id for i in batch.data], dtype="string[pyarrow]", name="image_id")
    return pd.DataFrame({"mean": [i.image_data.mean() for i in batch.data]}, index=ids)


def test_map_images(client, photo_shards):
    meta = pd.DataFrame({"mean": pd.Series(dtype=float)}).rename_axis("image_id")
    rows = map_images(brightness, photo_shards, meta=meta).compute()
    assert len(rows) == 100
    assert rows["mean"].between(1, 254).all()


def test_options_for_paths_are_not_for_tasks(photo_shards):
    with pytest.raises(ValueError, match="limit"):
        read_bag(partition_shards(photo_shards), limit=1)
