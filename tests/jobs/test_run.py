"""Batch jobs: killed, resumed, refused, retried; as Python calls and as commands."""

import contextlib
import json
import os
import random
import re
import signal
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from dask.cli import run_cli

from dask_imgread import (
    FolderInUseError,
    ImageReaderStage,
    JobError,
    OtherJobError,
    ReadError,
    connect_client,
    read_bag,
    run_job,
)
from dask_imgread.cli.main import main
from dask_imgread.jobs import plan
from dask_imgread.jobs import run as jobs
from dask_imgread.jobs.claim import claim_folder
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.jobs.parts import PartName, Place
from dask_imgread.jobs.writer import PartSink
from dask_imgread.report.page import write_report
from dask_imgread.testing import make_shards, write_shard
from tests.helpers.commands import Command, ForkedProcess, run_command, run_main, start_server
from tests.helpers.images import encode
from tests.helpers.waiting import wait_for

MODULE = """
import os, time
import pandas as pd

def measure(batch):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    ids = pd.Index([image.image_id for image in batch.data], name="image_id")
    means = [image.image_data.mean() for image in batch.data]
    return pd.DataFrame({"width": [i.width for i in batch.data], "mean": means}, index=ids)
"""
DECODING = ImageReaderStage(device="cpu", verbose=False, sidecars=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "measuring.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("measuring", None)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """400 images, three of them broken."""
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, shards=4, images_per_shard=100, size=(64, 32), broken=3)


@pytest.fixture
def run_here(client, capsys, monkeypatch):
    """What ``run_command`` does, on the tests' own cluster and without a new process."""
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)

    def run_here(*arguments):
        where = "--scheduler", client.scheduler.address
        status = main([str(argument) for argument in (*arguments, *where)])
        return status, *capsys.readouterr()

    return run_here


def wait_for_parts(folder, count, process):
    """Wait until a job has written some parts."""

    def are_there():
        assert process.returncode is None, process.wait()
        return len(list(folder.glob("part-*"))) >= count

    wait_for(are_there)


def read_bytes(folder):
    """The rows of each part, in the order of the partitions, without what tells of the run."""
    tables = [pq.read_table(path) for path in sorted(Path(folder).glob("part-*"))]
    return [table.replace_schema_metadata() for table in tables]


def read_records(out):
    return pd.read_parquet(sorted((Path(out) / "_images").iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_killed_at_ten_random_moments_it_ends_as_if_undisturbed(folder, client, shards):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    job = ["apply", "measuring:measure", *shards, "--out", "out", "--workers", 2]
    job += ["--images-per-partition", 4, "--device", "cpu", "--dali-batch-size", 3]
    out = folder / "out"
    started = []
    for kill in range(10):
        before = len(list(out.glob("part-*")))
        process = Command(*job, PAUSE="0.05")
        wait_for_parts(out, before + 1, process)
        time.sleep(chance.uniform(0, 0.6))
        while not (workers := process.list_workers()):  # none, for a moment: they start anew
            time.sleep(0.05)
        started += workers
        if kill % 2:
            chance.choice(workers).kill()
            time.sleep(chance.uniform(0, 0.6))
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive  # what a client started ends with it
    done = len(list(out.glob("part-*")))
    assert 10 <= done < 100
    written = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    status, printed, _ = run_command(*job)
    assert status == 0
    assert "397 images, 3 failed" in printed
    assert f"{100 - done} of 100 partitions now" in printed
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert not list(out.rglob("_tmp-*"))

    namespace = {"__name__": "measuring"}
    exec(MODULE, namespace)
    reader = ImageReaderStage(device="cpu", dali_batch_size=3)
    options = {"client": client, "reader": reader, "images_per_partition": 4}
    assert run_job(shards, "undisturbed", namespace["measure"], **options).images == 397
    assert read_bytes(out) == read_bytes(folder / "undisturbed")
    assert read_bytes(out / "_images") == read_bytes(folder / "undisturbed" / "_images")
    assert len(pd.read_parquet(out)) == 397
    records = read_records(out)
    assert records.index.is_unique
    assert len(records) == 400
    assert records["error"].notna().sum() == 3


@pytest.mark.slow
def test_a_worker_killed_is_no_matter_for_the_client(folder, shards):
    process = Command("metadata", *shards, "--out", "out", "--decode", "--workers", 2, *PARTS)
    wait_for_parts(folder / "out", 3, process)
    process.list_workers()[0].kill()
    status, out, err = process.wait()
    assert status == 0, err
    assert "397 images, 3 failed" in out


PARTS = ["--images-per-partition", 4, "--device", "cpu"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_keeps_what_is_done(folder, shards, number):
    job = ["apply", "measuring:measure", *shards, "--out", "out", "--workers", 1, *PARTS]
    process = Command(*job, PAUSE="0.2")
    wait_for_parts(folder / "out", 2, process)
    process.send_signal(number)
    status, out, err = process.wait()
    assert status == 128 + number
    assert out == ""
    assert f"stopped by {number.name}; what is done is kept" in err
    assert "Traceback" not in err
    assert all(len(table) for table in read_bytes(folder / "out"))


def start_dask(*words, **variables):
    """Start one of Dask's own commands."""
    start_server()
    process = ForkedProcess(target=run_cli)
    process.variables = variables
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dask", *words])
        process.start()
    return process


def test_a_scheduler_that_is_there_and_is_lost(folder, shards, run_here):
    (folder / "elsewhere").mkdir()  # where the function's module can't be imported
    address = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    scheduler = start_dask("scheduler", *address, "--scheduler-file", "where.json")
    wait_for((folder / "where.json").exists)
    with contextlib.chdir("elsewhere"):
        where = ["--scheduler-file", "../where.json"]
        threads = ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
        worker = start_dask("worker", *where, *threads, PAUSE="0.2")
    job = ["apply", "measuring:measure", *shards, "--out", "out", *PARTS]
    try:
        process = Command(
            *job, "--scheduler-file", "where.json", DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="2s"
        )
        wait_for_parts(folder / "out", 2, process)
        scheduler.kill()
        status, out, err = process.wait()
        assert status == 3, err
        assert "dask-imgread: the scheduler was lost" in err
        assert "could not be done" not in err
        assert out == ""
    finally:
        for each in (scheduler, worker):
            each.terminate()
            each.join()
    status, out, _ = run_here(*job)
    assert status == 0
    assert "397 images, 3 failed" in out


def test_a_cluster_is_connected_to_only_if_anything_is_left_to_do(folder, client, shards):
    address = client.scheduler.address
    first = run_job(shards[:1], "out", client=connect_client(scheduler=address))
    assert (first.images, first.new_partitions) == (100, 1)
    nowhere = connect_client(scheduler_file="nope.json", n_workers=0)  # would raise
    again = run_job(shards[:1], "out", client=nowhere)
    assert (again.images, again.new_partitions) == (100, 0)
    with pytest.raises(ValueError, match="n_workers must be at least 1"):
        run_job(shards[:1], "out", client=nowhere, overwrite=True)


def test_whose_client_it_is(folder, client, shards):
    """The caller's stays open; one that the job has opened is closed, after an error too."""
    run_job(shards[:1], "out", client=client)
    assert client.status == "running"

    opened = []

    @contextlib.contextmanager
    def connect():
        with connect_client(scheduler=client.scheduler.address) as own:
            opened.append(own)
            yield own

    run_job(shards[:1], "out", client=connect(), overwrite=True)

    def wrong(batch):
        raise KeyError("colour")

    with pytest.raises(JobError, match="colour"):
        run_job(shards[:1], "wrong", wrong, client=connect(), reader=DECODING)
    assert [own.status for own in opened] == ["closed", "closed"]


@pytest.mark.parametrize(
    ("reader", "asked"),
    [
        (None, {"device": "cpu", "num_gpus_per_worker": 0.25}),
        (ImageReaderStage(), {"device": "auto", "num_gpus_per_worker": 0.25}),
        (
            ImageReaderStage(device="gpu", num_gpus_per_worker=0.5),
            {"device": "gpu", "num_gpus_per_worker": 0.5},
        ),
    ],
)
def test_the_cluster_that_a_job_starts_fits_its_reader(folder, shards, monkeypatch, reader, asked):
    given = []

    def refuse(**options):
        given.append(options)
        raise RuntimeError("no cluster here")

    monkeypatch.setattr(jobs, "connect_client", refuse)
    with pytest.raises(RuntimeError, match="no cluster here"):
        run_job(shards[:1], "out", reader=reader)
    assert given == [asked | {"verbose": False}]


def test_a_wrong_keyword_is_named(folder, shards):
    near = {"image_per_partition": "; did you mean 'images_per_partition'\\?", "scheduler": ""}
    near["fit"] = r"; it is an option of the reader: reader=ImageReaderStage\(fit=\.\.\.\)"
    for wrong, hint in near.items():
        told = rf"^run_job\(\) got an unexpected keyword argument '{wrong}'{hint}$"
        with pytest.raises(TypeError, match=told):
            run_job(shards, "out", **{wrong: 1})
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'{hint}$"):
            read_bag(shards, **{wrong: 1})
    assert not (folder / "out").exists()


def test_another_job_is_refused_and_told_apart(folder, client, shards):
    run_job(shards, "out", client=client, images_per_partition=20)
    with pytest.raises(OtherJobError, match="images_per_partition was 20, and is 40"):
        run_job(shards, "out", client=client, images_per_partition=40)
    with pytest.raises(OtherJobError, match=r"decode was False, and is True"):
        run_job(shards, "out", client=client, reader=DECODING, images_per_partition=20)
    cropping = DECODING.with_options(resize=64, fit="crop")
    with pytest.raises(OtherJobError, match=r"fit was 'auto', and is 'crop'"):
        run_job(shards, "out", client=client, reader=cropping, images_per_partition=20)
    with pytest.raises(OtherJobError, match=r"command was 'metadata', and is 'apply'"):
        run_job(shards, "out", count_rows, client=client, images_per_partition=20)
    with pytest.raises(OtherJobError, match=r"1 shard is gone: .*00003.tar"):
        run_job(shards[:3], "out", client=client, images_per_partition=20)
    reverse = run_job(shards[::-1], "out", client=client, images_per_partition=20)
    assert (reverse.images, reverse.new_partitions) == (400, 0)
    more = make_shards(folder / "more", shards=1, images_per_shard=3)
    with pytest.raises(OtherJobError, match=r"1 shard is new: .*more/00000.tar"):
        run_job([*shards, *more], "out", client=client, images_per_partition=20)
    run_job(more, "out2", client=client)
    os.utime(more[0], (1, 1))
    with pytest.raises(OtherJobError, match=r"1 shard is changed: .*more/00000.tar"):
        run_job(more, "out2", client=client)

    again = run_job(shards, "out", client=client, images_per_partition=20)
    assert (again.images, again.new_partitions) == (400, 0)
    anew = run_job(shards[:1], "out", client=client, overwrite=True)
    assert (anew.images, anew.partitions) == (100, 1)
    assert len(pd.read_parquet("out")) == 100


def test_what_no_job_has_written_is_left_alone(folder, client, shards):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"no job has written, such as mine\.txt"):
            run_job(shards, "out", client=client, overwrite=overwrite)
    assert (folder / "out" / "mine.txt").read_text() == "dear"


def count_rows(batch):
    ids = pd.Index([image.image_id for image in batch.data], name="image_id")
    return pd.DataFrame({"number": range(len(ids))}, index=ids)


def test_only_failures_again(folder, client, shards):
    flag = folder / "fail"
    flag.write_text("")

    def fail(batch):
        if os.path.exists(flag) and any("000101" in i.key for i in batch.data):
            raise RuntimeError("the store has closed")
        return count_rows(batch)

    options = {"client": client, "reader": DECODING, "images_per_partition": 20}
    first = run_job(shards, "out", fail, **options)
    assert (first.images, first.failed, first.function_failed) == (396, 4, 1)
    errors = read_records("out")["error"].dropna()
    function_failed = errors[errors.str.startswith("function failed")]
    assert function_failed.index.str[-10:].tolist() == ["000101.jpg"]
    assert "RuntimeError: the store has closed" in function_failed.iloc[0]
    flag.unlink()
    again = run_job(shards, "out", fail, **options)
    assert (again.new_partitions, again.failed, again.function_failed) == (0, 4, 1)
    again = run_job(shards, "out", fail, retry_failed=True, **options)
    assert (again.images, again.failed, again.function_failed) == (397, 3, 0)
    assert 2 <= again.new_partitions <= 4
    assert len(pd.read_parquet("out")) == 397
    assert read_records("out")["error"].notna().sum() == 3


def test_a_function_fails_only_for_the_images_that_it_raises_for(folder, client, shards):
    """Though the first of them is among those that tell the columns."""

    def measure(batch):
        for image in batch.data:
            if image.key in {"000000", "000007", "000042", "000120"}:
                raise ZeroDivisionError(image.key)
        if len(batch.data) > 40:
            raise MemoryError("too many at a time")  # and no image's fault
        return {"width": [image.width for image in batch.data]}

    summary = run_job(shards[:2], "out", measure, client=client, reader=DECODING)
    records = read_records("out")
    failed = records[records["error"].fillna("").str.startswith("function failed")]
    assert failed["key"].tolist() == ["000000", "000007", "000042", "000120"]
    assert failed["error"].iloc[3] == "function failed: ZeroDivisionError: 000120"
    assert (summary.function_failed, summary.failed) == (4, records["error"].notna().sum())
    assert len(pd.read_parquet("out")) == summary.images == 200 - summary.failed


def test_failures_of_a_function_have_an_exit_status_of_their_own(folder, shards, run_here):
    (folder / "picky.py").write_text(
        "def measure(batch):\n"
        "    return [{'n': 6 / (int(image.key) - 20)} for image in batch.data]\n"
    )
    job = ["apply", "picky:measure", shards[0], "--out", "out", *PARTS]
    status, out, _ = run_here(*job)
    assert status == 4
    assert ", 1 of them in the function" in out
    assert "failed: " in out
    assert "function failed: ZeroDivisionError" in out
    status, out, _ = run_here(*job, "--log-format", "json")
    assert (status, json.loads(out)["function_failed"]) == (4, 1)
    assert len(read_records("out")) == 100
    assert run_here("metadata", shards[0], "--out", "rows", "--decode", *PARTS)[0] == 0


def test_columns_are_the_same_in_every_part(folder, client, shards):
    def describe(batch):
        rows = count_rows(batch)
        rows["note"] = None
        rows.loc[rows.index.str.endswith("7.jpg"), "note"] = "seven"
        return rows[rows["number"] < 3]

    small = replace(DECODING, dali_batch_size=10)
    run_job(shards[:2], "out", describe, client=client, reader=small, images_per_partition=50)
    tables = read_bytes("out")
    assert len({str(table.schema) for table in tables}) == 1
    assert set(tables[0].column_names) == {"image_id", "number", "note"}
    assert len(pd.read_parquet("out")) == 2 * 10 * 3

    def nothing(batch):
        return count_rows(batch)[:0]

    nothing.meta = pd.DataFrame({"number": pd.Series(dtype="int16")}).rename_axis("image_id")
    run_job(shards[:1], "empty", nothing, client=client, reader=DECODING)
    empty = pd.read_parquet("empty")
    assert (len(empty), str(empty["number"].dtype)) == (0, "int16")


def test_a_function_that_always_fails_ends_the_job_at_once(folder, client, shards):
    def wrong(batch):
        raise KeyError("colour")

    with pytest.raises(JobError, match=r"wrong fails on the first images of .*KeyError: 'colour'"):
        run_job(shards, "out", wrong, client=client, reader=DECODING)


def test_an_unreadable_image_ends_a_job_that_is_told_to_raise(folder, client, shards):
    strict = replace(DECODING, on_error="raise")
    with pytest.raises(ReadError, match=r"\d+\.tar/\d+\.jpg: truncated") as raised:
        run_job(shards, "out", client=client, reader=strict, images_per_partition=10)
    wait_for(lambda: len(client.cluster.scheduler.tasks) <= 1)
    assert raised  # its traceback, as one in a notebook, keeps that task alone, which failed
    skipping = replace(DECODING, on_error="skip")
    summary = run_job(shards, "skipped", client=client, reader=skipping)
    assert (summary.images, summary.failed) == (397, 3)
    assert len(pd.read_parquet("skipped")) == 397


def test_a_folder_that_can_not_be_written_to(folder, client, shards):
    (folder / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run_job(shards, "file/out", client=client)


def test_sidecars_become_a_column(folder, client, photo_shards):
    reader = ImageReaderStage(decode=False)
    run_job(photo_shards[:1], "out", client=client, reader=reader)
    rows = pd.read_parquet("out")
    assert [json.loads(text)["cls"] for text in rows["sidecars"]] == list(range(25))


SIDECARS = {"txt": "text", "json": ["n", "o", "never"]}


@pytest.fixture
def changing_shards(tmp_path, photographs):
    """Two shards; the values of the second one have other types than those of the first."""
    image = encode(photographs[0].crop((0, 0, 30, 20)), "JPEG")
    values = [{"n": 1, "o": {"k": 1}}, {"n": 0.5, "o": "text"}]
    return [
        write_shard(
            tmp_path / f"changing-{shard}.tar",
            [
                member
                for n in range(3)
                for member in (
                    (f"{n}.jpg", image),
                    (f"{n}.json", json.dumps(value).encode()),
                    (f"{n}.txt", b"%d" % n),
                )
            ],
        )
        for shard, value in enumerate(values)
    ]


def test_columns_for_sidecars_keep_their_types(folder, client, changing_shards):
    """In a job that is resumed, the images that it begins with are others."""
    job = {"client": client, "sidecars": SIDECARS, "checksum": True}
    run_job(changing_shards, "out", **job)
    written = read_bytes("out")
    assert written[0].schema == written[1].schema
    rows = pd.read_parquet("out", dtype_backend="pyarrow")
    assert [*rows.columns[-6:]] == ["sha256", "text", "n", "o", "never", "error_sidecar"]
    assert rows["text"].tolist() == ["0", "1", "2"] * 2
    assert rows["n"].tolist() == [1, 1, 1] + [pd.NA] * 3
    assert [json.loads(text) for text in rows["o"]] == [{"k": 1}] * 3 + ["text"] * 3
    assert rows["error_sidecar"].tolist() == [pd.NA] * 3 + ["n: 0.5 is no int64"] * 3
    assert set(rows["sha256"].str.len()) == {64}
    (folder / "out" / "part-0000001.parquet").unlink()
    assert run_job(changing_shards, "out", **job).new_partitions == 1
    assert read_bytes("out") == written
    (folder / "out" / "part-0000000.parquet").write_bytes(b"cut off")
    run_job(changing_shards, "out", **job)
    assert read_bytes("out") == written


@pytest.mark.parametrize(
    "other",
    [
        {"sidecars": {"txt": "text"}},
        {"sidecars": None},
        {"sidecars": {"txt": "text", "json": {"n": "float64", "o": None, "never": None}}},
        {"sidecars": {"txt": "text", "json": ["o", "n", "never"]}},
        {"checksum": False},
    ],
)
def test_a_job_with_other_columns_for_sidecars_is_refused(folder, client, changing_shards, other):
    job = {"client": client, "sidecars": SIDECARS, "checksum": True}
    run_job(changing_shards[:1], "out", **job)
    name = "checksum" if "checksum" in other else "sidecar_columns"
    with pytest.raises(OtherJobError, match=f"{name} was "):
        run_job(changing_shards[:1], "out", **job | other)


def test_a_frame_is_refused(folder):
    rows = pd.DataFrame({"shard": ["a.tar"], "offset": [0], "size": [1], "key": ["a"]})
    with pytest.raises(ValueError, match="run_job reads whole shards: for the rows of a frame"):
        run_job(rows, folder / "frame")


def test_columns_for_sidecars_are_the_metadatas(folder, shards):
    with pytest.raises(ValueError, match=r"it finds what sidecars hold in image.metadata"):
        run_job(shards, "out", count_rows, sidecars={"txt": "text"})
    with pytest.raises(ValueError, match="width: the metadata would have two columns"):
        run_job(shards, "out", sidecars={"json": ["width"]})


def test_columns_for_sidecars_are_given_on_the_command_line(folder, changing_shards, run_here):
    words = ["--sidecar", "txt=text", "--sidecar", "json=n:float64,o", "--sidecar", "json=never"]
    job = ["metadata", *changing_shards]
    (folder / "job.toml").write_text(
        'checksum = true\n[sidecar]\ntxt = "text"\njson = ["n:float64", "o", "never"]'
    )
    assert run_here(*job, "--out", "words", *words, "--checksum")[0] == 0
    assert run_here(*job, "--out", "file", "--config", "job.toml")[0] == 0
    assert read_bytes("words") == read_bytes("file")
    rows = pd.read_parquet("words")
    assert rows["n"].tolist() == [1.0] * 3 + [0.5] * 3
    assert rows["sha256"].notna().all()
    status, _, err = run_here(*job, "--out", "words", "--checksum")
    assert (status, "sidecar_columns was" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sidecar", "txt=text", "--sidecars"], "--sidecar and --sidecars can't be given"),
        (["--sidecar", "json=a", "--sidecar", "json=b,a"], "gives a of json twice"),
        (["--sidecar", "txt=width"], "width: the metadata would have two columns"),
        (["--sidecar", "json=a:complex"], "'complex' is no type of a column"),
        (["--sidecar", "txt=a,b"], "give a name or {name: dtype}"),
    ],
)
def test_wrong_columns_for_sidecars(folder, capsys, changing_shards, words, told):
    assert main(["metadata", *changing_shards, "--out", "out", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("text", ["txt", "=a", "txt=", "json=a,,b", "json=a:", "json=:int64"])
def test_a_sidecars_grammar(capsys, text):
    with pytest.raises(SystemExit):
        main(["metadata", "s", "--out", "out", "--sidecar", text])
    assert "EXT=NAME[:TYPE],... is expected, such as json=url" in capsys.readouterr().err


def test_exit_statuses_and_what_goes_where(folder, shards):
    job = ["metadata", *shards, "--out", "out", "--workers", 1, "--log-format", "json"]
    status, out, err = run_command(*job, "--decode", "--device", "cpu", "--fail-on-error")
    assert status == 1
    result = json.loads(out)
    assert (result["images"], result["failed"], result["out"]) == (397, 3, "out")
    assert result["decoded"]
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[-1]["images_per_second"] == pytest.approx(result["images_per_second"], rel=0.5)
    assert {"partitions_done", "images_per_second", "seconds_left"} <= lines[-1].keys()
    assert sum("truncated" in line["message"] for line in lines) == 3
    status, out, err = run_command(*job)
    assert (status, out) == (2, "")
    assert "decode was True, and is False" in json.loads(err)["message"]


def test_headers_only_does_not_look_verified(folder, shards, run_here):
    """On the terminal, in the summary and on the page."""
    note = "pixels were not checked"
    job = ["metadata", *shards[:1], "--device", "cpu", "--out"]
    headers, decoded = run_here(*job, "headers"), run_here(*job, "decoded", "--decode")
    assert headers[0] == decoded[0] == 0
    assert note in headers[1]
    assert note not in decoded[1]
    again = json.loads(run_here(*job, "headers", "--log-format", "json")[1])
    assert not again["decoded"]
    pages = [Path(write_report(out)).read_text() for out in ("headers", "decoded")]
    assert [note in page for page in pages] == [True, False]
    assert "every image could be read" not in pages[0]


@pytest.mark.parametrize("size", ["64", "16x24"])
def test_to_resize_what_is_not_decoded_is_refused(folder, capsys, shards, size):
    (folder / "job.toml").write_text(f'resize = "{size}"')
    for given in (["--resize", size], ["--config", "job.toml"]):
        assert main(["metadata", *map(str, shards), "--out", "out", *given]) == 2
        assert "add --decode, or leave --resize out" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_configuration_file(folder, shards, capsys):
    (folder / "job.toml").write_text(
        f"""
        shards = {json.dumps([str(path) for path in shards])}
        function = "measuring:measure"
        out = "out"
        images-per-partition = 100
        device = "cpu"
        resize = "16x24"
        sidecars = false
        workers = 1
        log-format = "json"
        """
    )
    status, out, err = run_command("apply", "--config", "job.toml", "--out", "other")
    assert status == 0, err
    assert json.loads(out)["out"] == "other"
    options = json.loads((folder / "other" / "_job.json").read_text())["options"]
    assert options["resize"] == [16, 24]
    assert options["images_per_partition"] == 100
    (folder / "job.toml").write_text("shard = 1")
    assert main(["apply", "--config", "job.toml"]) == 2
    assert capsys.readouterr() == (
        "",
        "dask-imgread: job.toml: no such option: shard; do you mean shards?\n",
    )


def test_a_bar_on_a_terminal(folder, client, shards):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 140))
    job = ["metadata", *shards[:2], "--out", "out", *map(str, PARTS)]
    job += ["--scheduler", client.scheduler.address, "--decode"]
    start_server()
    process = ForkedProcess(target=run_main, args=(job,))
    with open("printed", "w+") as printed:
        process.descriptors = printed.fileno(), theirs
        process.start()
        shown = os.read(ours, 1 << 16)
        os.close(theirs)  # only now: the command has opened it
        with contextlib.suppress(OSError):  # so a terminal says that nobody writes to it any more
            while piece := os.read(ours, 1 << 16):
                shown += piece
        os.close(ours)
        process.join()
        out = printed.read()
    assert process.exitcode == 0
    assert out.startswith("199")
    bars = re.split(r"[\r\n]", shown.decode())
    assert any(re.search(r"50/50 .* 199 images, \d failed, \d+ images/s", bar) for bar in bars)


META = pd.DataFrame({"number": pd.Series(dtype=float)}).rename_axis("image_id")


@pytest.mark.parametrize(
    "meta",
    [META, pd.DataFrame({"number": pd.Series(dtype=float)}, index=pd.Index([], name="image_id"))],
)
def test_what_meta_leaves_open_is_seen_in_the_first_rows(folder, client, shards, meta):
    run_job(shards[:1], "out", count_rows, client=client, reader=DECODING, meta=meta)
    rows = pd.read_parquet("out")
    assert (str(rows["number"].dtype), rows.index[0][-11:]) == ("float64", "/000000.jpg")


def grow(rows, batch):
    """Change what comes after the first images."""
    return batch.data[0].key > "000019" and len(rows) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.assign(more=1), "columns are .*more.*, expected"),
        (lambda rows: rows.assign(number=rows["number"] + 0.5), r"column 'number' \(int64\)"),
        (lambda rows: rows.assign(number="x"), r"column 'number' \(int64\)"),
        (lambda rows: rows.assign(box=[{"a": 1, "b": 2}] * len(rows)), r"no place for \['b'\]"),
    ],
)
def test_rows_that_do_not_fit_are_no_images_failure(folder, client, shards, change, message):
    def measure(batch):
        rows = count_rows(batch)
        if "no place" in message:
            rows["box"] = [{"a": 1}] * len(rows)
        return change(rows) if grow(rows, batch) else rows

    options = {"client": client, "reader": DECODING, "images_per_partition": 20}
    with pytest.raises(JobError, match=message):
        run_job(shards[:1], "out", measure, **options)
    assert len(list(Path("out").glob("part-*"))) < 5


def test_a_column_without_a_type_is_asked_for(folder, client, shards):
    def measure(batch):
        return count_rows(batch).assign(note=None)

    with pytest.raises(JobError, match="do not show the type of note"):
        run_job(shards[:1], "out", measure, client=client, reader=DECODING)


def test_dask_reads_the_output_as_pandas_does(folder, client, shards):
    import dask.dataframe as dd

    for out, fn in (("rows", count_rows), ("metadata", None)):
        run_job(shards[:2], out, fn, client=client, reader=DECODING, images_per_partition=20)
        by_dask = dd.read_parquet(out).compute(scheduler="sync")
        pd.testing.assert_frame_equal(
            by_dask, pd.read_parquet(out), check_dtype=False, check_index_type=False
        )


@pytest.mark.parametrize("name", ["part-0.parquet", "part-0000000.parquet", "_images/photo.jpg"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_nobody_elses_parts_are_removed(folder, client, shards, name, overwrite):
    path = folder / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("dear")
    with pytest.raises(FileExistsError, match="no job has written"):
        run_job(shards[:1], "out", client=client, overwrite=overwrite)
    assert path.read_text() == "dear"


def test_one_shard_in_two_spellings_is_one(folder, client, shards):
    shard = Path(shards[0])
    other = f"{shard.parent}/./../{shard.parent.name}/{shard.name}"
    assert run_job([shards[0], other], "out", client=client).images == 100


def test_a_task_of_an_earlier_run_writes_nothing(folder, client, shards):
    """A cluster goes on with tasks of a client that is gone."""
    first = JobFolder(str(folder / "out"))
    with claim_folder(first) as claim:
        pass
    run_job(shards[:1], "out", client=client)
    before = read_bytes("out")
    sink = PartSink(first, first.read_job()["id"], claim.token, before[0].schema, False)
    for number in (0, 7):
        with pytest.raises(OtherJobError, match="now belongs to another job"):
            sink.write(PartName(Place.OUT, number), before, [], [], 0.0)
    assert read_bytes("out") == before
    assert not (folder / "out" / "_claim.json").exists()


def test_a_folder_is_one_jobs_at_a_time(folder, client, shards, monkeypatch):
    divide = plan.divide_shards
    told = []

    def divide_slowly(*arguments):
        with pytest.raises(FolderInUseError, match=rf"out is in use by process {os.getpid()} on "):
            run_job(shards[:2], "out", client=client)
        told.append(True)
        return divide(*arguments)

    monkeypatch.setattr(plan, "divide_shards", divide_slowly)
    assert run_job(shards[2:], "out", client=client).images == 200
    assert told
    assert len(pd.read_parquet("out")) == 200


def test_killed_while_overwriting_it_is_overwritten(folder, client, shards, monkeypatch):
    run_job(shards, "out", client=client, images_per_partition=20)

    def die(*arguments):
        raise SystemExit

    monkeypatch.setattr(JobFolder, "write_table", die)
    with pytest.raises(SystemExit):
        run_job(shards[:1], "out", client=client, overwrite=True)
    monkeypatch.undo()
    os.chdir(folder)
    (folder / "out" / "part-0000009.parquet").unlink(missing_ok=True)
    assert run_job(shards[:1], "out", client=client).images == 100
    assert len(pd.read_parquet("out")) == 100


def test_a_retry_that_reads_less_changes_nothing(folder, client, shards):
    flag = folder / "break"

    def measure(batch):
        if flag.exists():
            raise RuntimeError("worse")
        return count_rows(batch)

    options = {"client": client, "reader": DECODING, "images_per_partition": 20}
    first = run_job(shards, "out", measure, **options)
    before = read_bytes("out")
    flag.touch()
    again = run_job(shards, "out", measure, retry_failed=True, **options)
    assert (again.images, again.failed) == (first.images, first.failed) == (397, 3)
    assert read_bytes("out") == before


def test_a_damaged_part_is_made_again(folder, client, shards):
    run_job(shards[:1], "out", client=client, images_per_partition=20)
    (folder / "out" / "part-0000002.parquet").write_bytes(b"PAR1")
    assert run_job(shards[:1], "out", client=client, images_per_partition=20).new_partitions == 1
    assert len(pd.read_parquet("out")) == 100


def test_workers_that_write_elsewhere(folder, client, shards):
    with pytest.raises(JobError, match="does this worker see the same folder"):
        run_job(shards[:1], "memory://out", client=client)


def test_only_the_result_is_on_stdout(folder, shards):
    noisy = MODULE.replace("    ids =", "    print('chatter')\n    ids =") + "print('import')\n"
    (folder / "measuring.py").write_text(noisy)
    job = ["apply", "measuring:measure", shards[0], "--out", "out", "--workers", 1]
    status, out, err = run_command(*job, "--log-format", "json", "--device", "cpu")
    assert status == 0, err
    assert json.loads(out)["partitions"] == 1
    assert "chatter" in err
    assert "import" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('out = ["x"]', "out: a string or a number is expected"),
        ("shards = 5", "shards: a list is expected"),
        ("shards = [5]", "shards: "),
        ('storage-option = ["anon=true"]', "storage-option: a dict is expected"),
        ("overwrite = 1", "overwrite: a bool is expected"),
        ("nonsense = 1", "no such option: nonsense"),
        ("batch_size = 4", "do you mean dali-batch-size?"),
        ("out = ", "Invalid value"),
    ],
)
def test_wrong_configuration_files(folder, capsys, text, message):
    (folder / "job.toml").write_text(text)
    assert main(["metadata", "--config", "job.toml"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("dask-imgread: job.toml: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "function", ["measuring", "measuring:nope", "nope:f", "os:sep", "broken:f"]
)
def test_functions_that_are_none(folder, capsys, function):
    (folder / "broken.py").write_text("1 +")
    assert main(["apply", function, "x.tar", "--out", "out"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert function.split(":")[0] in err
