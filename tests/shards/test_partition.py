import os
from pathlib import Path

import pytest

from dask_imgread import FileGroupTask, ImageReaderStage, partition_shards
from dask_imgread.shards.find import expand_braces, find_shards
from dask_imgread.testing import make_shards, write_shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    nested = make_shards(folder / "deep" / "er", shards=1, images_per_shard=3, size=(16, 12))
    return make_shards(folder, shards=3, images_per_shard=10, size=(16, 12)) + nested


def read_ids(tasks):
    reader = ImageReaderStage(device="cpu", decode=False)
    return [image.image_id for t in tasks for batch in reader(t) for image in batch.data]


def paths_of(found):
    return [shard.path for shard in found]


def test_paths_of_every_kind(shards, monkeypatch):
    folder = str(Path(shards[0]).parent)
    assert paths_of(find_shards(shards[0])) == shards[:1]
    assert paths_of(find_shards(Path(shards[0]))) == shards[:1]
    assert sorted(paths_of(find_shards(folder))) == sorted(shards)
    assert paths_of(find_shards(folder + "/0*.tar")) == shards[:3]
    assert paths_of(find_shards(folder + "/**/*.tar")) == shards
    assert paths_of(find_shards(folder + "/{00000..00002}.tar")) == shards[:3]
    assert paths_of(find_shards([shards[1], shards[1], folder]))[0] == shards[1]
    assert len(find_shards([shards[1], folder])) == 4
    assert paths_of(find_shards("file://" + shards[0])) == shards[:1]
    monkeypatch.chdir(folder)
    assert paths_of(find_shards("00000.tar")) == shards[:1]


def test_expand_braces():
    assert expand_braces("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]
    assert expand_braces("{098..101}") == ["098", "099", "100", "101"]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    assert expand_braces("{plain}") == ["{plain}"]


@pytest.mark.parametrize("path", ["nope.tar", "nope/*.tar", "x-{0..3}.tar", "empty"])
def test_wrong_paths_are_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=path.split("{")[0].replace("*", r"\*")):
        partition_shards(path)


def test_files_per_partition_and_limit(shards):
    tasks = partition_shards(shards, files_per_partition=3, dataset_name="d")
    assert [len(task.data) for task in tasks] == [3, 1]
    assert [task.task_id for task in tasks] == ["file_group_0", "file_group_1"]
    assert {task.dataset_name for task in tasks} == {"d"}
    assert len(partition_shards(shards, limit=2)) == 2


def test_a_big_shard_is_cut_and_each_task_reads_its_own_part(shards, monkeypatch):
    tasks = partition_shards(shards[0], images_per_partition=4)
    assert [len(read_ids([task])) for task in tasks] == [4, 4, 2]
    assert read_ids(tasks) == read_ids(partition_shards(shards[0]))

    spans = []
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda fd, n, at: spans.append((at, at + n)) or pread(fd, n, at)
    )
    read_ids(tasks[1:2])
    start, stop = tasks[1].byte_range
    assert min(at for at, _ in spans) >= start
    assert max(end for _, end in spans) <= stop


def test_blocksize_puts_together_and_cuts(shards):
    size = os.path.getsize(shards[0])
    assert [len(t.data) for t in partition_shards(shards[:3], blocksize=2 * size)] == [2, 1]
    cut = partition_shards(shards[:3], blocksize=size // 2)
    assert len(cut) >= 6
    assert read_ids(cut) == read_ids(partition_shards(shards[:3]))


def test_scattered_samples_keep_their_sidecars_when_cut(tmp_path):
    images = [(f"{n}.jpg", b"\xff\xd8x") for n in range(6)]
    texts = [(f"{n}.txt", b"%d" % n) for n in range(6)]
    tasks = partition_shards(
        write_shard(tmp_path / "s.tar", images + texts), images_per_partition=2
    )
    assert len(tasks) == 3
    found = [image for t in tasks for b in ImageReaderStage(device="cpu")(t) for image in b.failed]
    assert [image.metadata for image in found] == [{"txt": str(n)} for n in range(6)]


@pytest.mark.parametrize(
    "options",
    [{"files_per_partition": 0}, {"limit": 0}, {"blocksize": 1, "images_per_partition": 1}],
)
def test_wrong_options_are_named(shards, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        partition_shards(shards, **options)


def test_ids_do_not_depend_on_grouping(photo_shards):
    ways = [
        partition_shards(photo_shards, files_per_partition=1),
        partition_shards(photo_shards, files_per_partition=3),
        partition_shards(photo_shards, images_per_partition=7),
        partition_shards(photo_shards[::-1], blocksize=50_000),
        [FileGroupTask(data=photo_shards)],
    ]
    ids = [read_ids(tasks) for tasks in ways]
    assert all(len(found) == len(set(found)) == 100 for found in ids)
    assert all(set(found) == set(ids[0]) for found in ids)
    assert {i.split("/")[1] for i in ids[0]} == {
        f"{s}{n:03d}.jpg" for s in range(4) for n in range(25)
    }
