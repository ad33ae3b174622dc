"""Shards on the Hugging Face Hub and in public buckets, and what is asked for once for a job."""

import logging
import sys
import threading

import fsspec
import pandas as pd
import pytest

from dask_imgread import ImageReaderStage, partition_shards, read_metadata, run_job
from dask_imgread.cli.main import main
from dask_imgread.shards.find import find_shards
from dask_imgread.storage.filesystems import connect
from dask_imgread.testing import make_shards
from tests.helpers.hub import serve_hub
from tests.helpers.images import write_noise
from tests.helpers.servers import Faults, count_bytes, serve_http, serve_s3

READER = ImageReaderStage(device="cpu", verbose=False)
TOKEN = "hf_s3cr3tT0ken"
DATASET = "hf://datasets/owner/name"

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 small shards of 2 images, and one of 80 and 9 MB."""
    folder = tmp_path_factory.mktemp("dataset")
    make_shards(folder / "data", shards=20, images_per_shard=2, size=(48, 32), broken=1)
    write_noise(folder / "large" / "00000.tar", 80, 340)
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    with serve_hub(folder) as server:
        yield server


@pytest.fixture(scope="module")
def private_hub(folder):
    with serve_hub(folder, token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def public_bucket(folder):
    with serve_s3() as server:
        server.make_bucket("pictures")
        server.ask_moto("PUT", "/pictures?acl", headers={"x-amz-acl": "public-read"})
        for path in sorted(folder.rglob("*.tar")):
            name = str(path.relative_to(folder))
            server.put("pictures", name, path.read_bytes(), **{"x-amz-acl": "public-read"})
        yield server


def strip_places(frame):
    frame = frame.drop(columns=["image_path", "shard", "shard_version"]).sort_index()
    frame.index = frame.index.str.replace(r"-\w{10}/", "/", regex=True)
    return frame


def decode(paths, **options):
    batches = (READER.stream(task) for task in partition_shards(paths, **options))
    return strip_places(pd.concat(batch.to_frame() for each in batches for batch in each))


def forget(server):
    """Forget what clients of this process know, and what they have asked for."""
    for protocol in ("hf", "http", "s3"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
    server.requests.clear()


def test_a_dataset_gives_what_the_disk_gives(folder, hub, client, tmp_path):
    there, here = f"{DATASET}/data/*.tar", f"{folder}/data/*.tar"
    options = {"storage_options": hub.storage_options}
    found = find_shards(there, hub.storage_options)
    local = find_shards(here)
    assert [shard.path for shard in found] == [
        shard.path.replace(str(folder), DATASET) for shard in local
    ]
    assert [shard.size for shard in found] == [shard.size for shard in local]
    assert len({shard.version for shard in found}) == 20  # tells files of one size apart
    assert find_shards(f"{DATASET}/data", hub.storage_options) == found
    assert find_shards(f"{DATASET}/data/{{00000..00019}}.tar", hub.storage_options) == found

    tables = [read_metadata(there, **options).compute(), read_metadata(here).compute()]
    pd.testing.assert_frame_equal(*map(strip_places, tables))
    for number, (paths, more) in enumerate([(there, options), (here, {})]):
        run_job(paths, tmp_path / str(number), client=client, reader=READER, **more)
    tables = [pd.read_parquet(tmp_path / name) for name in "01"]
    pd.testing.assert_frame_equal(*map(strip_places, tables))
    assert tables[0]["error"].notna().sum() == 1


@pytest.mark.parametrize("images_per_partition", [None, 20])
def test_each_byte_of_a_dataset_is_fetched_once(folder, hub, images_per_partition):
    size = (folder / "large" / "00000.tar").stat().st_size
    paths = f"{DATASET}/large/*.tar"
    options = {"images_per_partition": images_per_partition}
    tasks = partition_shards(paths, storage_options=hub.storage_options, **options)
    hub.files.requests.clear()
    reader = READER.with_options(decode=False, sidecars=False)
    assert sum(batch.num_items for task in tasks for batch in reader.stream(task)) == 80
    fetched = count_bytes(hub.files.requests, size)
    if images_per_partition is None:
        assert fetched == size
        assert len(hub.files.requests) > 8
    else:  # a task ends within its last block
        assert fetched < 3 * size


def test_a_dataset_is_read_although_requests_fail(folder, hub):
    forget(hub)
    hub.faults = Faults(first=3, kinds=("503", "reset", "500"))
    hub.files.faults = Faults(every=4, kinds=("503", "cut", "reset", "500"))
    try:
        there = decode(f"{DATASET}/large/*.tar", storage_options=hub.storage_options)
        assert hub.files.faults.injected.total() > 2
    finally:
        hub.faults = hub.files.faults = None
    pd.testing.assert_frame_equal(there, decode(f"{folder}/large/*.tar"))


@pytest.mark.parametrize("store", ["hub", "s3", "http"])
def test_workers_neither_list_nor_look_up(folder, hub, public_bucket, client, tmp_path, store):
    """What has no range is asked for by the client, and as often for a job as for its shards."""
    with serve_http(folder) as web:
        server, paths, options = {
            "hub": (hub, f"{DATASET}/data/*.tar", hub.storage_options),
            "s3": (public_bucket, "s3://pictures/data/", public_bucket.storage_options),
            "http": (web, f"{web.url}/data/{{00000..00019}}.tar", {}),
        }[store]
        forget(server)
        find_shards(paths, options)
        looked_up = [request for request in server.requests if request.range is None]
        per_worker = 1 if store == "hub" else 0  # whether there is such a dataset
        for number, per_partition in enumerate((2, 1)):
            forget(server)
            summary = run_job(
                *(paths, tmp_path / f"{store}{number}"),
                client=client,
                reader=READER,
                storage_options=options,
                images_per_partition=per_partition,
            )
            assert summary.partitions == 40 / per_partition
            for request in looked_up:
                assert request in server.requests
            lookups = [request for request in server.requests if request.range is None]
            # Planning reads the headers, in up to eight threads.
            assert len(lookups) <= len(looked_up) + per_worker * (8 + 2)


def test_shards_begun_early_ask_for_nothing_anew(hub, monkeypatch):
    threads = set()

    def note_thread(*args):
        threads.add(threading.current_thread())
        return connect(*args)

    for module in ("reading.shard_reader", "shards.sources"):
        monkeypatch.setattr(f"dask_imgread.{module}.connect", note_thread)
    options = {"storage_options": hub.storage_options, "files_per_partition": 20}
    (task,) = partition_shards(f"{DATASET}/data/*.tar", **options)
    asked = []
    for reader in 3 * (READER.with_options(decode=False),):
        hub.requests.clear()
        assert sum(map(len, reader.read(task))) > 30
        asked.append(sum("/resolve/" not in request.path for request in hub.requests))
    assert asked[0] <= 8  # at the same time
    assert asked[1:] == [0, 0]
    assert threads == {threading.main_thread()}


def test_a_listing_is_not_kept_for_the_next_job(tmp_path, public_bucket):
    s3 = public_bucket.storage_options
    (tmp_path / "data").mkdir()
    with serve_hub(tmp_path) as hub:
        for number in range(3):
            name = f"{number}.tar"
            (tmp_path / "data" / name).write_bytes(bytes(512))
            public_bucket.put("pictures", f"new/{name}", bytes(512))
            for paths, options in (
                (f"{DATASET}/data/*.tar", hub.storage_options),
                (f"{DATASET}/data", hub.storage_options),
                ("s3://pictures/new/*.tar", s3),
                ("s3://pictures/new", s3),
            ):
                assert len(find_shards(paths, options)) == number + 1


def test_the_token_of_a_private_dataset_is_told_nowhere(private_hub, client, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    forget(private_hub)
    out = tmp_path / "out"
    options = {"storage_options": private_hub.storage_options, "client": client, "reader": READER}
    assert run_job(f"{DATASET}/data/*.tar", out, **options).images == 39
    assert set(private_hub.authorizations) == {f"Bearer {TOKEN}"}
    assert set(private_hub.files.authorizations) == {None}  # another server, with signed URLs
    tasks = partition_shards(f"{DATASET}/data", storage_options=private_hub.storage_options)
    table = read_metadata(tasks)
    told = [caplog.text, repr(tasks), *map(str, table.__dask_graph__())]
    told += client.run_on_scheduler(list_keys)
    told += [str(logs) for logs in (client.get_scheduler_logs(), client.get_worker_logs())]
    assert not any(TOKEN in text for text in told)
    assert not any(TOKEN.encode() in path.read_bytes() for path in out.iterdir())


def list_keys(dask_scheduler):
    return [str(key) for key in dask_scheduler.tasks]


@pytest.mark.parametrize(
    ("path", "token", "kind", "says"),
    [
        ("owner/nope/data/*.tar", TOKEN, FileNotFoundError, r"HTTP 404: .*repository not found"),
        ("owner/nope/data", TOKEN, FileNotFoundError, "no such shard or folder"),
        ("owner/name/nope.tar", TOKEN, FileNotFoundError, "no such shard or folder"),
        ("owner/name@v2/data/*.tar", TOKEN, FileNotFoundError, "revision not found"),
        ("owner/name/data/*.tar", None, PermissionError, "HTTP 401: .*make sure you are authent"),
        ("owner/name/data/00000.tar", "hf_wr0ng", PermissionError, "HTTP 401: .*If the repo is pr"),
    ],
)
def test_a_dataset_that_can_not_be_had(private_hub, capfd, path, token, kind, says, tmp_path):
    path = f"hf://datasets/{path}"
    options = {"endpoint": private_hub.url} | ({"token": token} if token else {})
    with pytest.raises(kind, match=says) as caught:
        partition_shards(path, storage_options=options)
    assert path in str(caught.value)
    assert "hf_" not in str(caught.value)
    command = ["metadata", path, "--out", str(tmp_path / "out"), "--workers", "1"]
    for name, value in options.items():
        command += ["--storage-option", f"{name}={value}"]
    assert main(command) == 2
    assert capfd.readouterr().err == f"dask-imgread: {caught.value}\n"


def test_a_public_bucket_is_read_without_a_signature(
    folder, public_bucket, client, capsys, tmp_path
):
    options = {"anon": True, "endpoint_url": public_bucket.endpoint}
    forget(public_bucket)
    public_bucket.authorizations.clear()
    there = decode("s3://pictures/data/", storage_options=options)
    pd.testing.assert_frame_equal(there, decode(folder / "data"))
    command = ["metadata", "s3://pictures/data/*.tar", "--out", str(tmp_path / "out")]
    command += ["--scheduler", client.scheduler.address, "--storage-option", "anon=true"]
    command += ["--storage-option", f"endpoint_url={public_bucket.endpoint}"]
    assert main(command) == 0
    assert len(pd.read_parquet(tmp_path / "out")) == 40
    assert len(public_bucket.authorizations) > 20
    assert set(public_bucket.authorizations) == {None}


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("hf://datasets/owner/name/*.tar", "huggingface_hub", "hf"),
        ("hf://datasets/owner/name/*.tar", "aiohttp", "hf"),
        ("https://host/a.tar", "aiohttp", "http"),
        ("simplecache::https://host/a.tar", "aiohttp", "http"),
        ("s3://bucket/a.tar", "s3fs", "s3"),
        ("s3a://bucket/a.tar", "s3fs", "s3"),
        ("gs://bucket/a.tar", "gcsfs", "gcs"),
        ("abfs://container/a.tar", "adlfs", "azure"),
        ("oci://bucket/a.tar", "ocifs", None),
    ],
)
def test_what_is_to_be_installed_is_said(monkeypatch, capfd, url, package, extra):
    known = sys.modules["fsspec.registry"]._registry
    for protocol in list(known):
        monkeypatch.delitem(known, protocol)
    loaded = [name for name in sys.modules if name.split(".")[0] == package]
    for name in [*loaded, package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    with pytest.raises(ImportError, match=package) as caught:
        connect(url, {})
    command = f'pip install "dask-imgread[{extra}]"'
    assert (command in str(caught.value)) == (extra is not None)
    assert main(["verify", url]) == 2
    assert capfd.readouterr().err == f"dask-imgread: {caught.value}\n"
