"""Images of a few rows, loaded into this process."""

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from dask_imgread import ImageReaderStage, ReadError, load_images, read_metadata, run_job
from tests.helpers.servers import serve_http

READER = ImageReaderStage(device="cpu", verbose=False, sidecars=False)


@pytest.fixture(autouse=True)
def sync():
    with dask.config.set(scheduler="sync"):
        yield


def check(loaded, images, expected):
    assert [image.image_id for image in loaded] == list(expected)
    for image in loaded:
        assert image.error is None
        assert np.array_equal(image.image_data, images[image.image_id].image_data)


def test_rows_in_their_order(frame, images):
    chosen = frame.sample(20, random_state=0)
    check(load_images(chosen), images, chosen.index)
    check(load_images(chosen.reset_index()), images, chosen.index)
    again = pd.concat([chosen, chosen[:3]])
    check(load_images(again), images, again.index)
    assert load_images(frame[:0]) == []
    check(load_images(chosen.assign(key=float("nan"))), images, chosen.index)
    assert [image.metadata for image in load_images(chosen.assign(a=1))] == [{"a": 1}] * 20
    assert [image.metadata for image in load_images(chosen)] == [{}] * 20


def test_ids_in_their_order(frame, images):
    names = list(frame.sample(20, random_state=1).index)
    lazy = dd.from_pandas(frame.sort_index(), npartitions=3)
    for given in (frame, frame.reset_index(), pd.concat([frame, frame]), lazy):
        check(load_images(given, names), images, names)
        check(load_images(given, pd.Index(names)), images, names)
        check(load_images(given, ids=[*names, names[0]]), images, [*names, names[0]])
        assert load_images(given, []) == []


def test_one_id_and_ids_that_are_read_once(frame, images):
    first = frame.index[0]
    check(load_images(frame, first), images, [first])
    check(load_images(frame, iter(frame.index[:2])), images, frame.index[:2])


def test_ids_that_are_not_there(frame):
    with pytest.raises(KeyError, match="2 ids are not in the frame, such as nothing"):
        load_images(frame, [frame.index[0], "nothing", "more"])
    with pytest.raises(ValueError, match="has no image_id"):
        load_images(frame.reset_index(drop=True), ["a"])


def test_a_lazy_frame(frame, images, photo_shards):
    chosen = read_metadata(photo_shards).query("width > 200")
    check(load_images(chosen, reader=READER), images, frame[frame["width"] > 200].index)


def test_a_jobs_folder(images, photo_shards, tmp_path, client):
    run_job(photo_shards, tmp_path / "out", reader=READER, client=client)
    names = list(images)[::9]
    check(load_images(tmp_path / "out", names), images, names)
    check(load_images(str(tmp_path / "out"))[:5], images, list(images)[:5])


def test_the_reader_is_the_users(frame):
    (image,) = load_images(frame[:1], reader=ImageReaderStage(device="cpu", resize=(8, 9)))
    assert image.image_data.shape == (8, 9, 3)


def test_what_fails_says_why(frame, images, tmp_path):
    rows = frame[:4].astype({"offset": object, "shard": object})
    rows["offset"] = [*rows["offset"][:2], -1, rows["offset"].iloc[3]]
    rows["shard"] = [*rows["shard"][:3], str(tmp_path / "gone.tar")]
    loaded = load_images(rows)
    assert [image.image_id for image in loaded] == list(rows.index)
    assert [image.cause for image in loaded] == [None, None, "bad row", "unreadable shard"]
    assert [image.image_data is None for image in loaded] == [False, False, True, True]
    with pytest.raises(ReadError, match=r"bad row|unreadable shard"):
        load_images(rows, reader=ImageReaderStage(on_error="raise", verbose=False))
    skipping = ImageReaderStage(on_error="skip", verbose=False)
    check(load_images(rows, reader=skipping), images, rows.index[:2])


def test_a_secret_is_not_shown(tmp_path):
    for given in ("https://me:pw-4f1c@127.0.0.1/a.tar", ["https://me:pw-4f1c@127.0.0.1/a.tar"]):
        with pytest.raises(ValueError, match="a DataFrame of images is expected") as error:
            load_images(given)
        assert "pw-4f1c" not in str(error.value)


def test_storage_options(frame, images, tmp_path, photo_shards):
    folder = photo_shards[0].rpartition("/")[0]
    with serve_http(folder, password="me:pw-4f1c") as server:
        remote = frame[::10].drop(columns="shard_version")
        remote["shard"] = [f"{server.url}/{path.rpartition('/')[2]}" for path in remote["shard"]]
        options = {"headers": {"Authorization": server.authorization}}
        check(load_images(remote, storage_options=options), images, remote.index)
        refused = load_images(remote)
    assert {image.cause for image in refused} == {"unreachable"}
