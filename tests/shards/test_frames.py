"""Frames of rows: which images they name, in whatever form, and what can't be one."""

import os
import re
import shutil
import tarfile

import dask
import numpy as np
import pandas as pd
import pytest
from dask.base import tokenize

from dask_imgread import (
    FileGroupTask,
    ImageReaderStage,
    ReadError,
    map_images,
    partition_shards,
    read_metadata,
    run_job,
)
from dask_imgread.errors import StorageError
from dask_imgread.shards.find import find_shards, stat_shard
from dask_imgread.shards.frames import open_frame
from dask_imgread.tasks import COLUMNS, make_frame
from dask_imgread.testing import draw_picture, encode_picture, write_shard
from tests.helpers.servers import KEY, SECRET, Faults, serve, serve_http, serve_s3

READER = ImageReaderStage(device="cpu", verbose=False, sidecars=False)
MINIMUM = ["shard", "key", "offset", "size"]


def read(frame, reader=READER, **options):
    """Return the images read, and those that failed; every row is one of them."""
    batches = [b for task in partition_shards(frame, **options) for b in reader.stream(task)]
    good = [image for batch in batches for image in batch.data]
    failed = [image for batch in batches for image in batch.failed]
    assert len(good) + len(failed) == len(frame)
    for batch in batches:
        assert len(batch.to_frame()) == len(batch.data) + len(batch.failed)
    return good, failed


def check(frame, images, expected, **options):
    """Read a frame; compare ids and pixels with those of the whole shards."""
    good, failed = read(frame, **options)
    assert failed == []
    assert sorted(image.image_id for image in good) == sorted(expected)
    for image in good:
        assert np.array_equal(image.image_data, images[image.image_id].image_data)
        assert image.image_path == images[image.image_id].image_path
        assert image.key == images[image.image_id].key
    return good


def pick(frame, count=11, seed=1):
    return frame.sample(count, random_state=seed)


# What a frame may look like

FORMS = {
    "as it is": lambda f: f,
    "reversed": lambda f: f[::-1],
    "twice": lambda f: pd.concat([f, f[::2]]),
    "id as a column": lambda f: f.reset_index(),
    "id as both": lambda f: f.reset_index().set_index("image_id", drop=False),
    "no id": lambda f: f.reset_index(drop=True),
    "the minimum": lambda f: f[MINIMUM],
    "ids for keys": lambda f: f[["shard", "offset", "size"]],
    "no name": lambda f: f[MINIMUM].reset_index(drop=True),
    "another index": lambda f: f.set_index("width"),
    "two indices": lambda f: f.set_index(["format", "height"], drop=False),
    "numpy's types": lambda f: f.astype(
        dict.fromkeys(["offset", "size"], "int64") | dict.fromkeys(["shard", "key"], object)
    ),
    "floats": lambda f: f.astype(dict.fromkeys(["offset", "size", "sample_offset"], float)),
    "categories": lambda f: f.astype({"shard": "category", "key": "category"}),
    "pandas' nullable types": lambda f: f.convert_dtypes(dtype_backend="numpy_nullable"),
    "more columns": lambda f: f.assign(label=range(len(f)), **{"a b": "text"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_frame_gives_the_same_images(frame, images, form):
    chosen = pick(frame)
    shaped = FORMS[form](chosen)
    expected = [*chosen.index, *chosen.index[::2]] if form == "twice" else chosen.index
    good, failed = read(shaped)
    assert failed == []
    suffix = ".jpg" if form == "no name" else ""  # without it a key is all there is
    assert sorted(image.image_id + suffix for image in good) == sorted(expected)
    for image in good:
        same = images[image.image_id + suffix]
        assert np.array_equal(image.image_data, same.image_data)
        assert image.image_path + suffix == same.image_path
        assert image.key == same.key


def test_an_outer_join_leaves_floats_and_nulls(frame, images):
    chosen = pick(frame)
    table = pd.DataFrame({"image_id": [*chosen.index, "no such image"], "score": 0.5})
    table.loc[3, "score"] = None
    plain = chosen.astype({"offset": "int64", "size": "int64"})
    joined = plain.merge(table, on="image_id", how="outer")
    assert joined["offset"].dtype == float
    good, (lost,) = read(joined)
    assert lost.image_id == "no such image"
    assert lost.error == "bad row: shard None"
    scores = {image.image_id: image.metadata for image in good}
    assert scores == {
        name: {} if name == table["image_id"][3] else {"score": 0.5} for name in chosen.index
    }
    assert all(
        np.array_equal(image.image_data, images[image.image_id].image_data) for image in good
    )


def test_columns_of_the_user_are_metadata(frame):
    more = {
        "when": pd.to_datetime(["2024-05-06", None]),
        "tags": [["a", "b"], None],
        "count": pd.array([3, None], dtype="Int64"),
        "text": ["x", None],
        "kind": pd.Categorical(["k", None]),
        "odd": [object, None],
        5: [1.5, float("nan")],
    }
    first, second = read(frame[:2].assign(**{str(k): v for k, v in more.items()}))[0]
    assert first.metadata == {
        "when": pd.Timestamp("2024-05-06"),
        "tags": ["a", "b"],
        "count": 3,
        "text": "x",
        "kind": "k",
        "odd": object,
        "5": 1.5,
    }
    assert second.metadata == {}


def test_an_empty_frame_has_no_tasks(frame):
    for none in (frame[:0], frame[:0][MINIMUM], pd.DataFrame(columns=MINIMUM)):
        assert partition_shards(none) == []
        assert len(read_metadata(none).compute(scheduler="sync")) == 0


def test_without_a_division_each_shard_is_a_task(frame, photo_shards):
    tasks = partition_shards(frame[::-1])
    assert [task.data for task in tasks] == [[path] for path in photo_shards[::-1]]
    assert [len(task.rows) for task in tasks] == [25] * 4
    assert [task.versions for task in tasks] == [
        (stat_shard(path, {}).version,) for path in photo_shards[::-1]
    ]
    assert "rows" not in repr(tasks[0])


@pytest.mark.parametrize(
    ("division", "sizes"),
    [
        ({"files_per_partition": 3}, [75, 25]),
        ({"images_per_partition": 40}, [40, 40, 20]),
        ({"images_per_partition": 7}, [7] * 14 + [2]),
        ({"limit": 2}, [25, 25]),
    ],
)
def test_divisions(frame, images, division, sizes):
    shuffled = frame.sample(frac=1, random_state=0)
    assert [len(t.rows) for t in partition_shards(shuffled, **division)] == sizes
    if "limit" not in division:
        check(shuffled, images, shuffled.index, **division)


def test_a_blocksize_counts_the_bytes_of_the_images(frame, images):
    tasks = partition_shards(frame, blocksize=20_000)
    assert len(tasks) > 5
    assert sum(len(task.rows) for task in tasks) == 100
    assert max(task.rows["size"].sum() for task in tasks) < 20_000 + frame["size"].max()
    check(frame, images, frame.index, blocksize=20_000)


def test_two_spellings_of_a_shard(frame, images, monkeypatch, photo_shards):
    folder, name = os.path.split(photo_shards[0])
    monkeypatch.chdir(folder)
    spelled = pd.concat(
        [
            frame[:2].assign(shard=name),
            frame[2:4].assign(shard=f"./{name}"),
            frame[4:6].assign(shard=f"{folder}/../{os.path.basename(folder)}/{name}"),
            frame[6:8].assign(shard=f"file://{folder}/{name}"),
        ]
    )
    for division in ({}, {"files_per_partition": 9}):
        check(spelled, images, frame.index[:8], **division)


def test_a_task_that_is_given_rows_reads_them_in_any_order(frame, images):
    rows = frame[:25].sample(frac=1, random_state=3)
    (batch,) = READER(FileGroupTask(data=[rows["shard"].iloc[0]], rows=rows))
    assert [image.image_id for image in batch.data] == list(frame.index[:25])


def test_relative_to_names_only_what_has_no_id(frame, photo_shards):
    folder = os.path.dirname(photo_shards[0])
    whole = read_metadata(photo_shards, relative_to=folder).compute(scheduler="sync")
    good, _ = read(frame[:30].reset_index(drop=True), relative_to=folder)
    assert [image.image_id for image in good] == list(whole.index[:30])
    good, _ = read(frame[:30], relative_to=folder)
    assert [image.image_id for image in good] == list(frame.index[:30])
    with pytest.raises(ValueError, match="relative_to"):
        partition_shards(frame, relative_to=f"{folder}/elsewhere")


def test_a_dataset_that_was_moved(frame, tmp_path, photo_shards):
    """Only `shard` is changed: names and ids stay, paths follow."""
    names = [os.path.basename(path) for path in photo_shards]
    for path, name in zip(photo_shards, names, strict=True):
        os.link(path, tmp_path / name)
    moved = frame.assign(shard=[str(tmp_path / os.path.basename(path)) for path in frame["shard"]])
    good, failed = read(moved)
    assert failed == []
    for image in good:
        assert image.image_path == f"{image.shard}/{image.key}.jpg"
        assert image.shard.startswith(str(tmp_path))
        assert image.image_id in frame.index


def test_the_token_is_that_of_the_rows(frame):
    (one,), (same,), (other,) = (
        partition_shards(rows) for rows in (frame[:5], frame[:5].copy(), frame[1:5])
    )
    assert tokenize(one) == tokenize(same) != tokenize(other)


# What is no frame of images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="offset"), "has no offset$"),
        (lambda f: f.drop(columns=["shard", "size"]), "has no shard, no size$"),
        (lambda f: f.reset_index(drop=True).drop(columns="key"), "has no image_id or key$"),
        (lambda f: pd.DataFrame(), "has no shard, no offset, no size, no image_id or key$"),
        (lambda f: pd.concat([f, f[["shard"]]], axis=1), "two columns shard"),
        (lambda f: pd.concat([f, f[["width"]]], axis=1), "two columns width"),
        (lambda f: f.assign(key=1), r"keys are text, .* read the file with dtype={'key': str}"),
    ],
)
def test_a_frame_that_lacks_columns(frame, change, message):
    for function in (partition_shards, read_metadata, lambda f: map_images(len, f)):
        with pytest.raises(ValueError, match=message):
            function(change(frame))


# Rows that can't be those of an image

NUMBERS = [
    -1,
    -(2**70),
    10**15,
    10**18,
    2**63 - 1,
    2**63,
    10**30,
    None,
    pd.NA,
    float("nan"),
    float("inf"),
    1e15,
    1e300,
    3.5,
    "12",
    "x" * 10**6,
    b"\0",
    [1],
    {"a": 1},
]


def put(frame, column, value, row=2):
    """Return the frame with another value in a row."""
    values = np.empty(len(frame), object)
    values[:] = list(frame[column])
    values[row] = value
    return frame.assign(**{column: pd.Series(values, index=frame.index, dtype=object)})


@pytest.mark.parametrize("column", ["offset", "size"])
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: f"{value!r:.20}")
def test_a_number_that_is_no_place(frame, column, value):
    rows = frame[22:28]  # of two shards
    bad = put(rows, column, value)
    for division in ({}, {"blocksize": 9999}, {"images_per_partition": 4}):
        good, (failed,) = read(bad, **division)
        assert failed.image_id == rows.index[2]
        assert failed.error.startswith(("bad row: offset", "truncated archive: "))
        assert len(failed.error) < 200
        assert {image.image_id for image in good} == {*rows.index} - {failed.image_id}
    with pytest.raises(ReadError, match=r"jpg: (bad row|truncated)"):
        read(bad, ImageReaderStage(device="cpu", on_error="raise", verbose=False))


@pytest.mark.parametrize("column", ["sample_offset", "sample_size", "warning", "width", "error"])
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: f"{value!r:.20}")
def test_other_columns_keep_no_image_from_being_read(frame, column, value):
    good, failed = read(put(frame[:5], column, value))
    assert (len(good), failed) == (5, [])


@pytest.fixture
def odd_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.tar")
    os.mkdir("folder.tar")
    os.symlink("nowhere", "link.tar")
    os.symlink("circle.tar", "circle.tar")
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_bytes(b"not a tar\n" * 100_000)
    write_shard("closed.tar", [])
    os.chmod("closed.tar", 0)
    return tmp_path


@pytest.mark.parametrize("columns", [MINIMUM, [*COLUMNS]])
@pytest.mark.parametrize(
    ("shard", "cause"),
    [
        (None, "bad row: shard None"),
        (float("nan"), "bad row: shard None"),
        (5, "bad row: shard 5"),
        (b"a.tar", "bad row: shard b'a.tar'"),
        (["a.tar"], "bad row: shard"),
        ("", "bad row: shard ''"),
        ("..", "unreadable shard: .*not a regular file"),
        ("../../nothing.tar", "unreadable shard: .*No such file"),
        ("nothing.tar", "unreadable shard: .*No such file"),
        ("a.tar::b.tar", "unreadable shard: "),
        ("simplecache::nothing.tar", "unreadable shard: "),
        ("tar://a.jpg::nothing.tar", "unreadable shard: "),
        ("{0..3}.tar", "unreadable shard: "),
        ("*.tar", "unreadable shard: "),
        ("a\nb.tar", "unreadable shard: "),
        ("a\0b.tar", "unreadable shard: "),
        ("folder.tar", "unreadable shard: .*not a regular file"),
        ("pipe.tar", "unreadable shard: .*not a regular file"),
        ("link.tar", "unreadable shard: "),
        ("circle.tar", "unreadable shard: "),
        ("/dev/null", "unreadable shard: .*not a regular file"),
        ("/dev/zero", "unreadable shard: .*not a regular file"),
        ("empty.tar", "truncated archive|changed shard"),
        ("text.tar", "not an image|truncated|changed shard"),
        ("foo://bucket/a.tar", "unreadable shard: Protocol not known: foo"),
        ("http://", "unreadable shard|unreachable"),
        ("http://[::1/a.tar", "unreadable shard|unreachable"),
    ],
)
@pytest.mark.usefixtures("short_pauses")
def test_a_shard_that_is_none(odd_folder, frame, shard, cause, columns):
    bad = put(frame[:5], "shard", shard)[columns]
    for division in ({}, {"files_per_partition": 9}):
        good, (failed,) = read(bad, **division)
        assert failed.key == frame["key"].iloc[2]
        assert len(good) == 4
        assert re.match(cause, failed.error), failed.error


@pytest.mark.parametrize("name", ["a\nb", "", "x/../y", "\0", None, 7, [1], "é"])
def test_names_are_only_names(frame, images, name):
    for column in ("key", "image_path", "image_id"):
        good, failed = read(put(frame[:5].reset_index(), column, name))
        assert failed == []
        for image in good:
            assert isinstance(image.key, str)
            assert isinstance(image.image_id, str)
        pixels = {image.offset: image.image_data for image in good}
        for image in list(images.values())[:5]:
            assert np.array_equal(pixels[image.offset], image.image_data)


# Shards that have changed


@pytest.fixture
def one(tmp_path):
    """A shard, and its rows."""
    members = [(f"{n}.jpg", encode_picture(draw_picture(n, (48, 32)))) for n in range(6)]
    path = write_shard(tmp_path / "one.tar", members)
    return path, read_metadata(path).compute(scheduler="sync")


def grow(path):
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("empty"))


CHANGES = {"size": grow, "date": lambda path: os.utime(path, (1, 1))}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("remote", [False, True])
def test_each_row_of_a_changed_shard_fails(one, change, remote):
    path, frame = one
    with serve_http(os.path.dirname(path)) as server:
        if remote:
            path = f"{server.url}/one.tar"
            frame = read_metadata(path).compute(scheduler="sync")
        CHANGES[change](one[0])
        good, failed = read(frame)
        assert good == []
        assert [image.image_id for image in failed] == list(frame.index)
        for image in failed:
            assert image.error.startswith(f"changed shard: {path} is not what the row was made")
            assert image.cause == "changed shard"
        with pytest.raises(ReadError, match=r"0\.jpg: changed shard: "):
            read(frame, ImageReaderStage(device="cpu", on_error="raise", verbose=False))
        good, failed = read(frame.drop(columns="shard_version"))
        assert (len(good), failed) == (6, [])
        mixed = frame.assign(shard_version=frame["shard_version"].where(frame["key"] < "3"))
        good, failed = read(mixed)
        assert [image.key for image in good] == ["3", "4", "5"]
        assert [image.key for image in failed] == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["s3", "gs", "abfs"])
def test_an_object_that_was_listed_before_it_changed(one, tmp_path, kind):
    path, _ = one
    (tmp_path / "set").mkdir()
    path = shutil.copy(path, tmp_path / "set" / "one.tar")
    content = path.read_bytes()
    with serve(kind, tmp_path) as server:
        options = {"storage_options": server.storage_options}
        folder = f"{server.base}/set/"
        frame = read_metadata(folder, **options).compute(scheduler="sync")
        assert len(read(frame, **options)[0]) == 6
        before = tokenize(FileGroupTask(data=[f"{folder}one.tar"], reader_config=options))
        (listed,) = find_shards(folder, **options)
        server.put("bucket", "set/one.tar", content[:-1] + b"1")  # of the same size
        assert find_shards(listed.path, **options) != [listed]
        good, failed = read(frame, **options)
        after = tokenize(FileGroupTask(data=[f"{folder}one.tar"], reader_config=options))
    assert good == []
    assert {image.cause for image in failed} == {"changed shard"}
    assert before != after


def test_a_shard_that_is_gone_or_forbidden(one, tmp_path):
    path, frame = one
    (tmp_path / "secret").mkdir()
    os.link(path, tmp_path / "secret" / "one.tar")
    with serve_http(tmp_path) as server:
        for name, cause in (("two.tar", "unreadable shard"), ("secret/one.tar", "unreachable")):
            good, failed = read(frame.assign(shard=f"{server.url}/{name}"))
            assert good == []
            assert [image.image_id for image in failed] == list(frame.index)
            assert {image.cause for image in failed} == {cause}
            assert all(f"{server.url}/{name}" in image.error for image in failed)


def test_records_of_damage_keep_their_error(tmp_path):
    path = write_shard(tmp_path / "s.tar", [("a.jpg", encode_picture(draw_picture(0)))] * 2)
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 4 // 512 * 512)
        file.write(b"damage" * 300)
    frame = read_metadata([path, str(tmp_path / "gone.tar")][:1]).compute(scheduler="sync")
    lost = make_frame(READER(FileGroupTask(data=[str(tmp_path / "gone.tar")]))[0].failed)
    frame = pd.concat([frame, lost])
    _, failed = read(frame)
    errors = {image.image_id: image.error for image in failed}
    for name, row in frame[frame["error"].notna()].iterrows():
        assert row["error"] == errors[name]
    paths = {image.image_id: image.image_path for image in failed}
    assert paths[lost.index[0]] == str(tmp_path / "gone.tar")


# Secrets


@pytest.mark.usefixtures("short_pauses")
def test_no_secret_is_shown(one, tmp_path, caplog, capfd):
    with serve_http(tmp_path, password="user:pass-4f1c") as server:
        url = f"{server.url.replace('://', '://user:pass-4f1c@')}/one.tar"
        texts = []
        for shard in (
            url,
            url.replace("one", "two"),
            url.replace("4f1c", "4f1d"),
            f"{url}?key=pass-4f1c",
        ):
            frame = one[1].assign(shard=shard).drop(columns="shard_version").reset_index(drop=True)
            tasks = partition_shards(frame)
            good, failed = read(frame)
            assert len(good) == (6 if shard.startswith(url) else 0)
            texts += [
                repr(tasks),
                repr(good),
                repr(failed),
                repr([image.metadata for image in good]),
            ]
            texts += [make_frame(good + failed).to_csv(), str(tokenize(tasks))]
            with pytest.raises(ReadError) as error:
                read(
                    frame.assign(offset=-1),
                    ImageReaderStage(device="cpu", on_error="raise", verbose=False),
                )
            texts.append(str(error.value))
    texts += [caplog.text, *capfd.readouterr()]
    for text in texts:
        assert "pass-4f1" not in text


def test_storage_options_are_not_shown(one, caplog):
    with serve_s3() as server:
        server.make_bucket("bucket")
        options = {"storage_options": server.storage_options}
        frame = one[1].assign(shard="s3://bucket/gone.tar")
        good, failed = read(frame, **options)
        wrong = {"storage_options": server.storage_options | {"nonsense": SECRET}}
        _, refused = read(frame, **wrong)
        texts = [repr(partition_shards(frame, **options)), make_frame(failed + refused).to_csv()]
    assert good == []
    assert {image.cause for image in failed + refused} == {"unreadable shard"}
    for text in (*texts, caplog.text):
        assert KEY not in text
        assert SECRET not in text


# The output of a job


@pytest.fixture(scope="module")
def job(photo_shards, tmp_path_factory, imgread_cluster):
    folder = tmp_path_factory.mktemp("job") / "out"
    with imgread_cluster.get_client() as client:
        run_job(photo_shards, folder, reader=READER, client=client, images_per_partition=20)
    return folder


def test_a_jobs_folder_is_a_frame(job, images):
    for given in (job, str(job), f"{job}/", f"file://{job}"):
        frame = open_frame(given).compute(scheduler="sync")
        assert frame.index.name == "image_id"
        assert set(COLUMNS) <= {*frame.columns}
        with dask.config.set(scheduler="sync"):
            check(frame, images, images)
            tasks = partition_shards(given, images_per_partition=30)
        assert [len(task.rows) for task in tasks] == [30, 30, 30, 10]


def count_heights(batch):
    return {"rows": [image.image_data.shape[0] for image in batch.data]}


def test_the_output_of_a_function_names_no_images(photo_shards, tmp_path, client):
    run_job(photo_shards[:1], tmp_path / "out", fn=count_heights, reader=READER, client=client)
    with pytest.raises(ValueError, match="this one has no shard, no offset, no size"):
        partition_shards(tmp_path / "out")


def test_a_folder_in_a_store_is_a_frame_too(job, images, short_pauses):
    with serve_s3() as server:
        server.make_bucket("bucket")
        for path in job.rglob("*"):
            if path.is_file():
                server.put("bucket", f"out/{path.relative_to(job)}", path.read_bytes())
        options = {"storage_options": server.storage_options}
        frame = open_frame("s3://bucket/out", server.storage_options).compute(scheduler="sync")
        check(frame, images, images)
        server.faults = Faults(every=1, kinds=("500",))
        with pytest.raises(StorageError):
            partition_shards("s3://bucket/out", **options)


def test_paths_of_shards_cost_no_request(photo_shards):
    folder = os.path.dirname(photo_shards[0])
    names = [os.path.basename(path) for path in photo_shards]
    with serve_http(folder) as server:
        url = f"{server.url}/{names[0]}"
        for given in (url, [url], f"{server.url}/*.tar", f"{server.url}/", f"{url}?v=1"):
            server.requests.clear()
            find_shards(given)
            paths = [request.path for request in server.requests]
            server.requests.clear()
            read_metadata(given)
            assert [request.path for request in server.requests] == paths
    with serve_s3() as server:
        server.make_bucket("bucket")
        for path, name in zip(photo_shards, names, strict=True):
            with open(path, "rb") as file:
                server.put("bucket", name, file.read())
        for given in (f"s3://bucket/{names[0]}", "s3://bucket/*.tar", "s3://bucket/"):
            server.requests.clear()
            find_shards(given, server.storage_options)
            count = len(server.requests)
            server.requests.clear()
            read_metadata(given, storage_options=server.storage_options)
            asked = [r for r in server.requests if "_job.json" not in r.path]
            assert len(asked) <= count + 1
            assert (len(server.requests) == count) or given.endswith("/")
