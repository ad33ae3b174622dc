"""Jobs over a set of shards that changes: what is new is read, and nothing else."""

import contextlib
import json
import os
import random
import re
import shutil
import threading
from pathlib import Path

import dask.dataframe as dd
import duckdb
import numpy as np
import pandas as pd
import pytest

from dask_imgread import ImageReaderStage, OtherJobError, forecast_job, run_job
from dask_imgread.cli.main import main
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.jobs.merge import PartMerger
from dask_imgread.pictures import draw_picture, encode_picture
from dask_imgread.testing import make_shards, write_shard
from tests.helpers.nights import (
    OpenedReader,
    ShardSet,
    keep_gone,
    read_all,
    read_rows,
    sum_pixels,
)

DIVISIONS = [
    {},
    {"images_per_partition": 3},
    {"files_per_partition": 3},
    {"rows_per_file": 30},
    {"images_per_partition": 3, "rows_per_file": 20},
]


def name(value):
    """The name of a parameter: no address, which differs between the processes of a run."""
    return getattr(value, "__name__", str(value))


HEADERS = ImageReaderStage(decode=False, sidecars=False, verbose=False)


@pytest.mark.parametrize(
    ("division", "function"),
    list(zip(DIVISIONS, [None, sum_pixels, None, sum_pixels, None], strict=True)),
    ids=name,
)
def test_after_each_night_it_is_as_if_made_anew(tmp_path, client, division, function):
    """However it is divided: what is made anew is one partition."""
    reader = ImageReaderStage(device="cpu", verbose=False, decode=function is not None)
    whole = {"client": client, "reader": reader}
    job = whole | division
    shards = ShardSet(tmp_path / "shards", f"{division} {function}")
    before = None
    for night in range(4):
        shards.change()
        shards.add(6 if night == 0 else 3)
        prune = night == 2
        done = run_job(shards.folder, tmp_path / "out", function, update=True, prune=prune, **job)
        found = read_all(tmp_path / "out", function)
        fresh = {"files_per_partition": 99, **whole}
        run_job(shards.folder, tmp_path / f"fresh-{night}", function, **fresh)
        expected = read_all(tmp_path / f"fresh-{night}", function)
        if before is not None and not prune:
            pairs = zip(before, expected, strict=True)
            expected = [keep_gone(*pair, shards.folder) for pair in pairs]
        for rows, wanted in zip(found, expected, strict=True):
            assert rows.index.is_unique
            pd.testing.assert_frame_equal(rows, wanted)
        assert done.images == found[-1]["error"].isna().sum()
        assert done.failed == found[-1]["error"].notna().sum()
        again = run_job(shards.folder, tmp_path / "out", function, **job | {"client": None})
        assert (again.new_partitions, again.images, again.failed) == (0, done.images, done.failed)
        before = found
    assert not (tmp_path / "out" / "_staged").exists()
    if "rows_per_file" in division:
        sizes = [len(pd.read_parquet(path)) for path in sorted((tmp_path / "out").glob("part-*"))]
        assert len(sizes) <= 2 * sum(sizes) / division["rows_per_file"] + 2


@pytest.mark.parametrize("division", DIVISIONS, ids=name)
def test_what_has_not_changed_is_not_opened(tmp_path, client, division):
    """Whether a shard is cut into partitions, or shares one with others."""
    reader = OpenedReader(decode=False, verbose=False, log=str(tmp_path / "opened"))
    job = {"client": client, "reader": reader, **division}
    folder = tmp_path / "shards"
    paths = make_shards(folder, shards=6, images_per_shard=9)
    run_job(folder, tmp_path / "out", **job)
    (tmp_path / "opened").write_text("")
    changed, gone = paths[4], paths[1]
    make_shards(tmp_path / "other", shards=1, images_per_shard=7)
    os.replace(tmp_path / "other" / "00000.tar", changed)
    os.unlink(gone)
    os.symlink(paths[0], folder / "new.tar")
    update = run_job(folder, tmp_path / "out", update=True, **job)
    opened = {line.split()[0] for line in (tmp_path / "opened").read_text().splitlines()}
    assert opened == {"00004.tar", "new.tar"}
    assert (update.new_shards, update.changed_shards, update.gone_shards) == (1, 1, 1)
    counts = read_rows(tmp_path / "out")["shard"].map(os.path.basename).value_counts()
    assert counts.to_dict() == {f"{n:05d}.tar": 7 if n == 4 else 9 for n in range(6)} | {
        "new.tar": 9
    }
    pruned = run_job(folder, tmp_path / "out", update=True, prune=True, **job)
    assert (pruned.images, pruned.gone_shards, pruned.new_partitions) == (52, 0, 0)
    assert gone not in set(read_rows(tmp_path / "out")["shard"])


def test_it_is_refused_unless_asked_for(tmp_path, client, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = make_shards("shards", shards=2, images_per_shard=3)
    run_job(paths[:1], "out", client=client)
    with pytest.raises(OtherJobError, match=r"1 shard is new: .*01.tar. Update it \(update=True, "):
        run_job(paths, "out", client=client)
    with pytest.raises(OtherJobError, match=r"checksum was .*, and is True\. Give another"):
        run_job(paths, "out", client=client, checksum=True, update=True)
    with pytest.raises(OtherJobError, match="rows_per_file was None, and is 9"):
        run_job(paths, "out", client=client, rows_per_file=9, update=True)
    with pytest.raises(ValueError, match="only with update=True"):
        run_job(paths, "out", client=client, prune=True)
    with pytest.raises(ValueError, match="rows_per_file must be at least 1, not 0"):
        run_job(paths, "out", client=client, rows_per_file=0)
    assert main(["metadata", *paths, "--out", "out"]) == 2
    assert "Update it (update=True, --update)" in capsys.readouterr().err


def test_on_the_command_line(tmp_path, client, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)
    make_shards("shards", shards=3, images_per_shard=10)
    job = ["metadata", "shards", "--out", "out", "--rows-per-file", "15"]
    where = ["--scheduler", client.scheduler.address]

    def run(*words):
        assert main([*job, *words]) == 0
        return capsys.readouterr().out

    told = run("--dry-run")
    assert not Path("out").exists()
    assert "3 new" in told
    assert "not known" in told
    assert "30 images, 0 failed\n" in run(*where)
    assert len(list(Path("out").glob("part-*"))) == 3
    make_shards("more", shards=2, images_per_shard=5)
    os.replace("more/00000.tar", "shards/00000.tar")
    os.replace("more/00001.tar", "shards/00003.tar")
    os.unlink("shards/00001.tar")
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    told = run("--update", "--dry-run", "--log-format", "json")
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    size = sum(Path(f"shards/0000{n}.tar").stat().st_size for n in (0, 3))
    expected = {"shards": 2, "new_shards": 1, "changed_shards": 1, "gone_shards": 1, "bytes": size}
    told = json.loads(told)
    assert expected.items() <= told.items()
    assert 8 <= told["images"] <= 12
    assert told["seconds"] > 0
    assert told["memory"] > 1e7
    told = run(*where, "--update")
    assert "30 images, 0 failed\nonly headers" in told
    assert "shards: 1 new, 1 changed, 1 gone" in told
    assert "20 images, 0 failed" in run(*where, "--update", "--prune")
    assert len(read_rows("out")) == 20


class Polling(threading.Thread):
    """Reads a dataset over and over, and notes what can't be."""

    def __init__(self, read, check):
        super().__init__()
        self.read, self.check, self.times, self.ended = read, check, 0, threading.Event()
        self.wrong = []
        self.start()

    def run(self):
        while not self.ended.is_set() or not self.times:
            try:
                self.check(self.read())
            except Exception as error:
                self.wrong.append(error)
                return
            self.times += 1


def read_with_duckdb(out):
    """It opens a file several times, and says so if that is another one meanwhile."""
    while True:
        with contextlib.suppress(duckdb.Error):
            return duckdb.sql(f"select * from '{out}/*.parquet'").df().set_index("image_id")


def read_with_dask(out):
    return dd.read_parquet(out).compute(scheduler="sync")


@pytest.mark.parametrize(
    ("division", "read"),
    [
        (DIVISIONS[1], read_with_dask),
        *((division, pd.read_parquet) for division in DIVISIONS[2:4]),
        (DIVISIONS[4], read_with_duckdb),
    ],
    ids=name,
)
def test_a_reader_sees_each_image_once(tmp_path, client, division, read):
    """All images are in all states, but change their places in their shard, and their sizes."""
    folder, out = tmp_path / "shards", str(tmp_path / "out")
    folder.mkdir()
    shuffled = random.Random(0)

    def write(number, size):
        picture = encode_picture(draw_picture(number, (size, size)))
        names = [f"{name:03d}.jpg" for name in range(10)]
        shuffled.shuffle(names)
        write_shard(folder / f"{number}.tar", [(name, picture) for name in names])

    for number in range(5):
        write(number, 8)
    job = {"client": client, "reader": HEADERS, **division}
    run_job(folder, out, **job)

    def check(rows):
        assert rows.index.is_unique
        assert len(rows) == 50
        assert set(rows["width"]) <= {8, 9, 10, 11, 12, 13}

    polling = Polling(lambda: read(out), check)
    for night in range(4):
        for number in shuffled.sample(range(5), 3):
            write(number, 9 + night)
        run_job(folder, out, update=True, **job)
    polling.ended.set()
    polling.join()
    assert not polling.wrong
    assert polling.times


def test_an_edited_function(tmp_path, client, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = make_shards("shards", shards=2, images_per_shard=4)
    reader = ImageReaderStage(device="cpu", verbose=False)

    def make(factor):
        def measure(batch):
            return {"value": [factor for _ in batch.data]}

        return measure

    first = run_job(paths, "out", make(1), client=client, reader=reader)
    assert (first.images, first.new_partitions) == (8, 2)
    assert run_job(paths, "out", make(1), client=client, reader=reader).new_partitions == 0
    with pytest.raises(OtherJobError, match=r"factor.*changed.*Update it"):
        run_job(paths, "out", make(2), client=client, reader=reader)
    assert set(pd.read_parquet("out")["value"]) == {1}
    edited = run_job(paths, "out", make(2), client=client, reader=reader, update=True)
    assert (edited.images, edited.new_images, edited.changed_shards) == (8, 8, 0)
    assert set(pd.read_parquet("out")["value"]) == {2}
    assert run_job(paths, "out", make(2), client=client, reader=reader).new_partitions == 0


def test_footers_are_read_once(tmp_path, client, monkeypatch):
    paths = make_shards(tmp_path / "shards", shards=2, images_per_shard=10)
    job = {"images_per_partition": 2}
    out = tmp_path / "out"
    run_job(paths, out, client=client, **job)
    read, footers = JobFolder.read_footer, []

    def read_footer(folder, name):
        footers.append(name.number)
        return read(folder, name)

    monkeypatch.setattr(JobFolder, "read_footer", read_footer)
    assert run_job(paths, out, **job).images == 20
    assert footers == []
    (out / "part-0000003.parquet").write_bytes(b"PAR1")
    (out / "part-0000005.parquet").unlink()
    assert run_job(paths, out, client=client, **job).new_partitions == 2
    assert footers == [3]
    for content in (None, b"damaged"):
        footers.clear()
        (out / "_parts.arrow").unlink() if content is None else (out / "_parts.arrow").write_bytes(
            content
        )
        assert run_job(paths, out, **job).images == 20
        assert sorted(footers) == list(range(10))
    assert len(read_rows(out)) == 20


def test_a_merged_file_that_is_damaged_is_made_again(tmp_path, client):
    paths = make_shards(tmp_path / "shards", shards=6, images_per_shard=4)
    job = {"client": client, "rows_per_file": 10}
    out = tmp_path / "out"
    run_job(paths, out, **job)
    whole = read_rows(out)
    files = sorted(out.glob("part-*"))
    assert [len(pd.read_parquet(path)) for path in files] == [8, 8, 8]
    files[1].write_bytes(b"PAR1")
    files[2].unlink()
    assert run_job(paths, out, **job).new_partitions == 4
    pd.testing.assert_frame_equal(read_rows(out), whole)


WIDTH = pd.DataFrame({"width": pd.Series(dtype="int64")}).rename_axis("image_id")


@pytest.fixture
def closing(tmp_path, monkeypatch):
    """A file, and a function that fails for one shard as long as the file is there."""
    monkeypatch.chdir(tmp_path)
    flag = tmp_path / "closed"
    flag.touch()

    def measure(batch):
        if flag.exists() and batch.data[0].shard.endswith("00002.tar"):
            raise RuntimeError("the store has closed")
        return {"width": [image.width for image in batch.data]}

    return flag, measure


def test_a_retry_that_was_killed_goes_on(client, monkeypatch, closing):
    """Though what is called next has no ``retry_failed``."""
    flag, measure = closing
    paths = make_shards("shards", shards=3, images_per_shard=4)
    job = {"client": client, "reader": ImageReaderStage(device="cpu", verbose=False)}
    assert run_job(paths, "out", measure, meta=WIDTH, **job).failed == 4
    flag.unlink()

    def die(*arguments, **options):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("dask_imgread.jobs.execution.Execution.read", die)
        with pytest.raises(SystemExit):
            run_job(paths, "out", measure, meta=WIDTH, retry_failed=True, **job)
    assert run_job(paths, "out", measure, meta=WIDTH, **job).images == 12
    assert run_job(paths, "out", measure, meta=WIDTH, **job).new_partitions == 0


def test_retried_where_shards_share_a_file(tmp_path, client, closing):
    flag, measure = closing
    paths = make_shards("shards", shards=4, images_per_shard=4)
    reader = OpenedReader(device="cpu", verbose=False, log=str(tmp_path / "opened"))
    job = {"client": client, "reader": reader, "meta": WIDTH, "rows_per_file": 100}
    assert run_job(paths, "out", measure, **job).failed == 4
    Path("opened").write_text("")
    again = run_job(paths, "out", measure, retry_failed=True, **job)  # in vain
    assert (again.images, again.failed, again.new_partitions) == (12, 4, 1)
    flag.unlink()
    again = run_job(paths, "out", measure, retry_failed=True, **job)
    assert (again.images, again.failed, again.new_partitions) == (16, 0, 1)
    assert {line.split()[0] for line in Path("opened").read_text().splitlines()} == {"00002.tar"}
    assert len(list(Path("out").glob("part-*"))) == 1
    assert len(read_all("out", measure)[1]) == 16


def test_a_forecast_opens_nothing(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    forecast = forecast_job(tmp_path / "a.tar", tmp_path / "out", images_per_partition=5)
    assert (forecast.shards, forecast.bytes, forecast.partitions) == (1, 6, None)
    assert forecast.images is forecast.seconds is forecast.memory is None
    assert not (tmp_path / "out").exists()


@pytest.fixture
def scene(tmp_path, client):
    """Shards of which one changes, one goes and one comes; and a job over them."""
    shards = tmp_path / "shards"
    shards.mkdir()

    def write(name, images, size=8):
        picture = encode_picture(draw_picture(1, (size, size)))
        write_shard(shards / f"{name}.tar", [(f"{n}.jpg", picture) for n in images])

    for name in "abc":
        write(name, range(5))
    return write, lambda out, **options: run_job(shards, tmp_path / out, client=client, **options)


class Killed(BaseException):
    """Ends the client at a moment of the test's choice."""


def kill_at(number, patch):
    """Let the client die before it writes or removes for the n-th time; return a list of these."""
    written = []

    def die(write):
        def write_or_die(*arguments):
            written.append(write.__name__)
            if len(written) == number:
                raise Killed
            return write(*arguments)

        return write_or_die

    for name in ("write_job", "write_table", "remove"):
        patch.setattr(JobFolder, name, die(getattr(JobFolder, name)))
    return written


TABLES = {"_parts.arrow", "_schema.arrow"}
KILLED = [
    {},
    {"images_per_partition": 2},
    {"files_per_partition": 2},
    {"images_per_partition": 2, "rows_per_file": 6},
]


@pytest.mark.parametrize(
    ("division", "function"),
    list(zip(KILLED, [sum_pixels, None, None, sum_pixels], strict=True)),
    ids=name,
)
def test_killed_at_any_of_its_writes(tmp_path, scene, monkeypatch, division, function):
    """The client's own: tables and description. What workers write is there or not."""
    write, run = scene
    reader = ImageReaderStage(device="cpu", verbose=False, decode=function is not None)
    job = {"fn": function, "reader": reader, **division}
    run("base", **job)
    gone = read_all(tmp_path / "base", function)
    write("a", [7, 0, 3, 9], size=16)
    (tmp_path / "shards" / "b.tar").unlink()
    write("d", range(3))
    run("fresh", **job)
    pairs = zip(gone, read_all(tmp_path / "fresh", function), strict=True)
    expected = [keep_gone(*pair, tmp_path / "shards") for pair in pairs]
    number = writes = 0
    while writes >= number:  # until it is not killed any more
        number += 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "base", tmp_path / "out")
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            written = kill_at(number, patch)
            run("out", update=True, **job)
        writes = len(written)
        done = run("out", update=True, **job)
        for rows, wanted in zip(read_all(tmp_path / "out", function), expected, strict=True):
            pd.testing.assert_frame_equal(rows, wanted)
        assert (done.images, done.failed) == (17, 0)
        left = {re.sub(r"-.*", "", path.name) for path in (tmp_path / "out").iterdir()}
        assert left <= {"part", "_job.json", "_images", "_plan", "_shards", *TABLES}
        assert len(list((tmp_path / "out").glob("_plan-*"))) == 1
    assert number > 5


def test_a_merge_may_be_repeated(tmp_path, scene, monkeypatch):
    """Dask runs a task again if its worker dies after it has written, but before it has told."""
    write, run = scene
    job = {"reader": HEADERS, "rows_per_file": 100}
    run("out", **job)
    write("d", range(4))
    call = PartMerger.__call__

    def call_twice(merger, merge):
        call(merger, merge)
        return call(merger, merge)

    with monkeypatch.context() as patch:
        patch.setattr(PartMerger, "__call__", call_twice)
        patch.setattr("dask_imgread.jobs.execution.run_tasks", run_here)
        assert run("out", update=True, **job).images == 19
    assert read_rows(tmp_path / "out").index.is_unique


def run_here(client, fn, items, **options):
    """What ``run_tasks`` does, in this process."""
    return ((item, fn(item)) for item in items)


def test_a_shard_that_changes_before_its_pieces_were_merged(tmp_path, scene, monkeypatch):
    write, run = scene
    job = {"reader": HEADERS, "rows_per_file": 2, "images_per_partition": 2}

    def die(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr("dask_imgread.jobs.execution.Execution.merge", die)
        run("out", **job)
    write("a", [8, 1, 0, 3, 4, 2, 9])
    with monkeypatch.context() as patch:  # the files in any order
        patch.setattr("dask_imgread.jobs.execution.run_tasks", run_backwards)
        assert run("out", update=True, **job).images == 17
    assert read_rows(tmp_path / "out").index.is_unique


def run_backwards(client, fn, items, **options):
    return run_here(client, fn, list(items)[::-1], **options)


@pytest.mark.parametrize("content", [None, b"PAR1"])
def test_records_that_are_lost_are_made_again(tmp_path, scene, content):
    _, run = scene
    job = {"fn": sum_pixels, "reader": ImageReaderStage(device="cpu", verbose=False)}
    run("out", **job)
    records = next((tmp_path / "out" / "_images").glob("part-0000001-*"))
    records.unlink() if content is None else records.write_bytes(content)
    assert run("out", **job).new_partitions == 1
    assert [len(rows) for rows in read_all(tmp_path / "out", sum_pixels)] == [15, 15]


def test_what_is_no_part_is_removed(tmp_path, scene):
    _, run = scene
    job = {"reader": HEADERS, "rows_per_file": 100}
    run("out", **job)
    run("other", reader=HEADERS)
    shutil.copy(tmp_path / "other" / "part-0000001.parquet", tmp_path / "out")
    assert len(read_rows(tmp_path / "out")) == 20
    assert run("out", **job).new_partitions == 0
    assert len(read_rows(tmp_path / "out")) == 15


def test_a_shard_that_was_pruned_comes_back(tmp_path, scene):
    write, run = scene
    run("out", reader=HEADERS)
    (tmp_path / "shards" / "b.tar").unlink()
    assert run("out", reader=HEADERS, update=True, prune=True).images == 10
    write("b", range(6))
    back = run("out", reader=HEADERS, update=True)
    assert (back.images, back.new_shards) == (16, 1)


def test_a_shard_that_was_gone_is_there_again(tmp_path, scene):
    _, run = scene
    path, aside = tmp_path / "shards" / "b.tar", tmp_path / "b.tar"
    run("out", reader=HEADERS)
    path.rename(aside)
    assert run("out", reader=HEADERS, update=True).gone_shards == 1
    aside.rename(path)
    with pytest.raises(OtherJobError, match=r"1 shard is there again: .*/b\.tar\. Update it"):
        run("out", reader=HEADERS)
    back = run("out", reader=HEADERS, update=True)
    assert (back.images, back.gone_shards, back.new_partitions) == (15, 0, 0)


def test_all_types_of_columns_can_be_merged(tmp_path, scene):
    def measure(batch):
        count = len(batch)
        return pd.DataFrame(
            {
                "image_id": batch.ids,
                "kind": pd.Categorical(["x"] * count, categories=["x", "y"]),
                "time": pd.Series(pd.to_datetime(["2020-01-01"] * count)).astype("datetime64[s]"),
                "vector": [np.zeros(3, np.float32)] * count,
                "boxes": [[{"left": 1, "top": 2}]] * count,
            }
        ).set_index("image_id")

    _, run = scene
    reader = ImageReaderStage(device="cpu", verbose=False)
    run("plain", fn=measure, reader=reader)
    run("merged", fn=measure, reader=reader, rows_per_file=100)
    assert len(list((tmp_path / "merged").glob("part-*"))) == 1
    pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / o) for o in ("plain", "merged")))
