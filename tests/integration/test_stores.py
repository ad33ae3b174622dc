"""Shards and outputs on real servers: with ranges and without, failing, and keeping secrets."""

import json
import logging
import subprocess
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from dask_imgread import (
    FileGroupTask,
    ImageReaderStage,
    JobError,
    partition_shards,
    run_job,
    verify_shards,
)
from dask_imgread.errors import StorageError
from dask_imgread.shards.find import find_shards
from dask_imgread.storage import retries
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.storage.retries import is_transient, with_retries
from dask_imgread.testing import make_shards
from tests.helpers.commands import run_command
from tests.helpers.images import write_noise
from tests.helpers.servers import KEY, SECRET, Faults, count_bytes, serve, serve_http, serve_s3

READER = ImageReaderStage(device="cpu", verbose=False)
PLACES = ["image_path", "shard", "shard_version"]

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 images in three shards, the middle one compressed; and 100 in a large one of 11 MB."""
    folder = tmp_path_factory.mktemp("served")
    make_shards(folder, shards=3, images_per_shard=40, broken=2)
    subprocess.run(["gzip", folder / "00001.tar"], check=True)
    write_noise(folder / "large" / "00000.tar", 100, 340)
    return folder


@pytest.fixture(scope="module")
def s3(folder):
    with serve_s3() as server:
        server.make_bucket("pictures")
        for path in folder.rglob("*.tar*"):
            server.put("pictures", str(path.relative_to(folder)), path.read_bytes())
        yield server


def read(paths, **options):
    """Decode shards in this process; the rows without what differs from place to place."""
    rows = []
    for task in partition_shards(paths, **options):
        rows += [batch.to_frame() for batch in READER.stream(task)]
    frame = pd.concat(rows).drop(columns=PLACES)
    frame.index = frame.index.str.replace(r"-\w{10}/", "/", regex=True)
    return frame


@pytest.fixture(scope="module", params=["s3", "gs", "abfs"])
def store(request, folder):
    with serve(request.param, folder) as server:
        yield server


NAMES = ["00000.tar", "00001.tar.gz", "00002.tar", "large/00000.tar"]


@pytest.fixture(scope="module")
def from_disk(folder):
    return read([folder / name for name in NAMES], images_per_partition=30)


@pytest.mark.parametrize("ranges", [True, False, "none"])
@pytest.mark.parametrize("faults", [None, Faults(every=3, kinds=("503", "cut", "reset", "500"))])
def test_a_web_server_gives_what_the_disk_gives(folder, from_disk, ranges, faults):
    with serve_http(folder, ranges=ranges, faults=faults) as server:
        there = read([f"{server.url}/{name}" for name in NAMES], images_per_partition=30)
    # Without ranges shards are not cut, so that failures stand at the end of other batches.
    pd.testing.assert_frame_equal(there.sort_index(), from_disk.sort_index())
    assert from_disk["error"].notna().sum() == 2
    if faults is not None:
        assert faults.injected.total() > 3


def test_a_part_of_a_shard_is_read_by_ranges(folder):
    with serve_http(folder) as server:
        *_, last = partition_shards(f"{server.url}/large/00000.tar", images_per_partition=20)
        server.requests.clear()
        (batch,) = READER.process(last)
        assert batch.num_items == 20
        size = (folder / "large" / "00000.tar").stat().st_size
        assert 0 < count_bytes(server.requests, size) < size / 2


def test_folders_and_globs_of_a_web_server(folder):
    with serve_http(folder) as server:
        for paths in (f"{server.url}/", f"{server.url}/*.tar*"):
            names = [shard.path.rpartition("/")[2] for shard in find_shards(paths)]
            assert set(names) >= {"00000.tar", "00001.tar.gz", "00002.tar"}


@pytest.mark.parametrize(
    ("path", "kind", "match", "cause"),
    [
        (
            *("nope.tar", FileNotFoundError),
            *("no such shard or folder: {url}/nope.tar; check the path", "unreadable shard"),
        ),
        (
            *("secret/a.tar", PermissionError),
            *("{url}/secret/a.tar: HTTP 403: Forbidden", "unreachable"),
        ),
    ],
)
def test_what_is_final_is_said_at_once(folder, path, kind, match, cause):
    with serve_http(folder) as server:
        with pytest.raises(kind) as caught:
            partition_shards(f"{server.url}/{path}")
        assert str(caught.value) == match.format(url=server.url)
        assert len(server.requests) <= 2  # a HEAD and a GET
        (batch,) = READER.process(FileGroupTask(data=[f"{server.url}/{path}"]))
        assert server.url in batch.failed[0].error
        assert batch.failed[0].cause == cause


def test_options_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match="storage options that don't fit"):
        partition_shards("s3://pictures/x.tar", storage_options={"nonsense_option": SECRET})


def test_a_server_that_stays_broken_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    with serve_http(folder, faults=Faults(every=1, kinds=("503",))) as server:
        with pytest.raises(StorageError, match=r"00000.tar: HTTP 503: .* \(tried 3 times in 0 s\)"):
            partition_shards(f"{server.url}/00000.tar")
        url = server.url
    with pytest.raises(StorageError, match="ConnectionRefusedError"):
        partition_shards(f"{url}/00000.tar")
    with pytest.raises(StorageError, match="Connect"):
        partition_shards(f"{url}/")


def test_blocks_that_can_not_be_had_cost_their_images_alone(folder, monkeypatch):
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    with serve_http(folder) as server:
        (task,) = partition_shards(f"{server.url}/large/00000.tar")
        batches = READER.stream(task)
        good = next(batches).num_items
        server.faults = Faults(every=1, kinds=("500",))
        rest = list(batches)
    assert good + sum(batch.num_items + len(batch.failed) for batch in rest) == 100


def test_an_outage_ends_no_job_and_loses_no_row(folder, client, tmp_path):
    options = {"client": client, "reader": READER, "retries": 0}
    with serve_http(folder) as server:
        urls = [f"{server.url}/00000.tar", f"{server.url}/00002.tar"]
        server.faults = Faults(every=1, kinds=("403",), match="GET")
        with pytest.raises(JobError, match=r"2 partitions could not be done.*HTTP 403"):
            run_job(urls, tmp_path / "out", **options)
        server.faults = None
        first = run_job(urls, tmp_path / "out", **options)
        assert (first.images, first.failed, first.new_partitions) == (78, 2, 2)
        server.faults = Faults(every=1, kinds=("403",), match="GET")
        with pytest.raises(JobError, match="HTTP 403"):
            run_job(urls, tmp_path / "out", retry_failed=True, **options)
    assert len(pd.read_parquet(tmp_path / "out")) == 80


def test_objects_of_a_store_are_read_as_files_are(folder, store):
    here = read(folder, images_per_partition=30)
    options = {"storage_options": store.storage_options, "images_per_partition": 30}
    pd.testing.assert_frame_equal(read(f"{store.base}/", **options), here)
    kinds = ("503", "cut", "reset", "500")
    # Azure's client repeats other requests by itself, after 15 seconds.
    store.faults = faults = Faults(every=4, kinds=kinds, match=store.reads)
    try:
        fsspec.get_filesystem_class(store.base.partition(":")[0]).clear_instance_cache()
        pd.testing.assert_frame_equal(read(f"{store.base}/", **options), here)
    finally:
        store.faults = None
    assert faults.injected.total() > 3


def test_denied_and_missing_objects_are_said_at_once(store):
    options = {"storage_options": store.storage_options}
    with pytest.raises(FileNotFoundError, match=rf"{store.base}/nope\.tar"):
        partition_shards(f"{store.base}/nope.tar", **options)
    store.requests.clear()
    for status, kind in ("403", PermissionError), ("404", FileNotFoundError):
        store.faults = Faults(every=1, kinds=(status,))
        try:
            with pytest.raises(kind, match=rf"{store.base}/x.tar.*(: HTTP 403|check)") as caught:
                partition_shards(f"{store.base}/x.tar", **options)
            task = FileGroupTask(data=[f"{store.base}/x.tar"], reader_config=options)
            (batch,) = READER.process(task)
        finally:
            store.faults = None
        told = [str(caught.value), batch.failed[0].error]
        assert f"x.tar: HTTP {status}" in told[1]
        assert not any("\n" in text or "SharedKey" in text for text in told)
    assert len(store.requests) <= 12


@pytest.mark.slow
def test_a_job_in_a_store_with_one_request_in_twenty_failing(folder, s3, client, tmp_path):
    """From S3 to S3, in worker processes; secrets are looked for in all that comes out."""
    config = {"shards": "s3://pictures/", "images-per-partition": 10, "decode": True}
    config |= {"device": "cpu", "workers": 2, "log-format": "json"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.items()]
    lines += ["[storage-option]"]
    for name, value in s3.storage_options.items():
        nested = value.items() if isinstance(value, dict) else ()
        lines += [f"{name}.{inner} = {json.dumps(item)}" for inner, item in nested]
        lines += [] if nested else [f"{name} = {json.dumps(value)}"]
    (tmp_path / "job.toml").write_text("\n".join(lines))
    s3.make_bucket("results")
    s3.faults = faults = Faults(every=20)
    try:
        command = ["metadata", "--config", tmp_path / "job.toml", "--out", "s3://results/out"]
        done = [run_command(*command) for _ in range(2)]
    finally:
        s3.faults = None
    assert [status for status, *_ in done] == [0, 0], done
    first, again = (json.loads(out) for _, out, _ in done)
    assert (first["images"], first["failed"]) == (218, 2)
    assert again | {"seconds": 0} == first | {
        "images_per_second": 0,
        "new_shards": 0,
        "new_images": 0,
        "new_failed": 0,
        "new_partitions": 0,
        "seconds": 0,
    }
    assert set(faults.injected) == set(faults.kinds)
    logged = [json.loads(line) for *_, err in done for line in err.splitlines()]
    assert any("trying again" in line["message"] for line in logged)

    there = pd.read_parquet("s3://results/out", storage_options=s3.storage_options)
    reader = ImageReaderStage(device="cpu", verbose=False, sidecars=False)
    run_job(folder, tmp_path / "out", reader=reader, images_per_partition=10, client=client)
    here = pd.read_parquet(tmp_path / "out")
    for frame in (there, here):
        frame.index = frame.index.str.replace(r"-\w{10}/", "/", regex=True)
    pd.testing.assert_frame_equal(there.drop(columns=PLACES), here.drop(columns=PLACES))

    fs = fsspec.filesystem("s3", **s3.storage_options)
    written = b"".join(fs.cat(fs.find("s3://results/out")).values())
    for secret in (KEY, SECRET):
        assert secret not in "".join(out + err for _, out, err in done)
        assert secret.encode() not in written


def test_no_secret_of_a_url_is_told(folder, client, tmp_path, caplog):
    query = "X-Amz-Credential=AKIAURLKEY&X-Amz-Signature=5ec2e7&token=t0k3n"
    with serve_http(folder, password="me:pa55w0rd") as server, caplog.at_level(logging.INFO):
        base = server.url.replace("://", "://me:pa55w0rd@")
        good = [f"{base}/{name}?{query}" for name in ("00000.tar", "00002.tar")]
        summary = run_job(good, tmp_path / "out", client=client, reader=READER, progress=False)
        assert (summary.images, summary.failed) == (78, 2)
        with pytest.raises(FileNotFoundError) as missing:
            partition_shards(f"{base}/nope.tar?{query}")
        server.faults = Faults(every=1, kinds=("403",))
        tasks = [FileGroupTask(data=[good[0]])]
        found = verify_shards(tasks, reader=READER, client=client)
        keys = client.run_on_scheduler(list_keys)
    signed_anew = [path.replace("5ec2e7", "0123ab") for path in good]
    assert redact_url(signed_anew[0]) == redact_url(good[0])
    rows = pd.read_parquet(tmp_path / "out")
    assert rows["shard"].iloc[0] == f"{server.url}/00000.tar?token=***"
    assert "HTTP 403" in found.bad["error"].iloc[0]
    told = [str(missing.value), str(found), found.bad.to_csv(), repr(tasks), caplog.text, *keys]
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    for secret in ("pa55w0rd", "5ec2e7", "t0k3n", "AKIAURLKEY"):
        assert all(secret not in text for text in told)
        assert secret.encode() not in written


def list_keys(dask_scheduler):
    return [str(key) for key in dask_scheduler.tasks] + list(dask_scheduler.task_prefixes)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/a b.tar", "/data/a b.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("https://h/a.tar?v=2&keyword=x", "https://h/a.tar?v=2&keyword=***"),
        ("https://u:p@h/a.tar", "https://h/a.tar"),
        ("https://h/a.tar?sv=1&se=2&sig=3&x=4", "https://h/a.tar?x=4"),
        ("https://h/a.tar?AWSAccessKeyId=1&Signature=2&Expires=3", "https://h/a.tar"),
    ],
)
def test_names_of_urls(text, shown):
    assert redact_url(text) == shown
    assert hide_secrets(f"no {text}") == f"no {shown}"


def test_secrets_of_nested_options_are_hidden():
    options = {"client_kwargs": {"headers": {"Authorization": "Bearer abc123"}}, "anon": False}
    assert hide_secrets("refused: Bearer abc123", options) == "refused: ***"


def test_what_is_tried_again():
    assert is_transient(TimeoutError())
    assert is_transient(ConnectionResetError())
    assert not is_transient(FileNotFoundError("x"))
    assert not is_transient(OSError(28, "No space left on device"))
    calls = []

    def fail_twice(value):
        calls.append(value)
        if len(calls) < 3:
            raise ConnectionResetError("reset")
        return value

    assert with_retries(fail_twice, "url", 7) == 7
    assert calls == [7, 7, 7]


def test_local_errors_stay_as_they_are(tmp_path):
    with pytest.raises(IsADirectoryError):
        with_retries(Path(tmp_path).read_bytes, "url")
