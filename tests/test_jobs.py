"""Batch jobs: killed, resumed, refused, retried; as Python calls and as commands."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from dask_imgread import ImageReaderStage, JobError, OtherJobError, ReadError, run_job
from dask_imgread.testing import make_shards

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
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """2,000 images, three of them broken."""
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, shards=4, images_per_shard=500, size=(48, 32), broken=3)


def start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment):
    command = [sys.executable, "-m", "dask_imgread", *map(str, arguments)]
    variables = os.environ | environment
    return subprocess.Popen(command, env=variables, stdout=stdout, stderr=stderr, text=True)


def list_workers(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def run(*arguments, **environment):
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def wait_for_parts(folder, count, process):
    """Wait until a job has written some parts."""
    end = time.monotonic() + 60
    while len(list(folder.glob("part-*"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def read_bytes(folder):
    """The rows of each part, in the order of the partitions."""
    return [pq.read_table(path) for path in sorted(Path(folder).glob("part-*.parquet"))]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_killed_at_ten_random_moments_it_ends_as_if_undisturbed(folder, shards):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    job = ["apply", "measuring:measure", *shards, "--out", "out", "--workers", 2]
    job += ["--images-per-partition", 20, "--device", "cpu", "--dali-batch-size", 7]
    out = folder / "out"
    started = []
    for kill in range(10):
        before = len(list(out.glob("part-*")))
        with open("kills.log", "w") as log:
            process = start(*job, PAUSE="0.05", stdout=log, stderr=log)
        wait_for_parts(out, before + 1, process)
        time.sleep(chance.uniform(0, 0.6))
        workers = list_workers(process)
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
    status, printed, _ = run(*job)
    assert status == 0
    assert "1997 images, 3 failed" in printed
    assert f"{100 - done} of 100 partitions now" in printed
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert not list(out.rglob("_tmp-*"))

    assert run(*[*job[:7], "undisturbed", *job[8:]])[0] == 0
    assert read_bytes(out) == read_bytes(folder / "undisturbed")
    assert read_bytes(out / "_images") == read_bytes(folder / "undisturbed" / "_images")
    assert len(pd.read_parquet(out)) == 1997
    records = pd.read_parquet(out / "_images")
    assert records.index.is_unique
    assert len(records) == 2000
    assert records["error"].notna().sum() == 3


@pytest.mark.slow
def test_a_worker_killed_is_no_matter_for_the_client(folder, shards):
    process = start("metadata", *shards, "--out", "out", "--decode", "--workers", 2, *PARTS)
    wait_for_parts(folder / "out", 3, process)
    list_workers(process)[0].kill()
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "1997 images, 3 failed" in out


PARTS = ["--images-per-partition", 20, "--device", "cpu"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_keeps_what_is_done(folder, shards, number):
    job = ["apply", "measuring:measure", *shards, "--out", "out", "--workers", 1, *PARTS]
    process = start(*job, PAUSE="0.2")
    wait_for_parts(folder / "out", 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    assert f"stopped by {number.name}; what is done is kept" in err
    assert "Traceback" not in err
    assert all(len(table) for table in read_bytes(folder / "out"))


def test_a_scheduler_that_is_there_and_is_lost(folder, shards):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    where = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    scheduler = subprocess.Popen(
        [*dask, "scheduler", *where, "--scheduler-file", "where.json"], **quiet
    )
    worker = subprocess.Popen(
        [*dask, "worker", "--scheduler-file", "where.json", "--nthreads", "1", "--no-dashboard"],
        **quiet | {"env": environment | {"PAUSE": "0.2"}},
    )
    job = ["apply", "measuring:measure", *shards, "--out", "out", *PARTS]
    try:
        process = start(
            *job, "--scheduler-file", "where.json", DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT="2s"
        )
        wait_for_parts(folder / "out", 2, process)
        scheduler.kill()
        out, err = process.communicate(timeout=100)
        assert process.returncode == 3, err
        assert "dask-imgread: the scheduler was lost" in err
        assert "could not be done" not in err
        assert out == ""
    finally:
        for each in (scheduler, worker):
            each.terminate()
            each.wait()
    status, out, _ = run(*job, "--workers", 2)
    assert status == 0
    assert "1997 images, 3 failed" in out


def test_another_job_is_refused_and_told_apart(folder, client, shards):
    run_job(shards, "out", client=client, images_per_partition=100)
    with pytest.raises(OtherJobError, match="images_per_partition was 100, and is 200"):
        run_job(shards, "out", client=client, images_per_partition=200)
    with pytest.raises(OtherJobError, match=r"decode was False, and is True"):
        run_job(shards, "out", client=client, reader=DECODING, images_per_partition=100)
    with pytest.raises(OtherJobError, match=r"command was 'metadata', and is 'apply'"):
        run_job(shards, "out", count_rows, client=client, images_per_partition=100)
    with pytest.raises(OtherJobError, match=r"1 shard is gone: .*00003.tar"):
        run_job(shards[:3], "out", client=client, images_per_partition=100)
    with pytest.raises(OtherJobError, match="other order"):
        run_job(shards[::-1], "out", client=client, images_per_partition=100)
    more = make_shards(folder / "more", shards=1, images_per_shard=3)
    with pytest.raises(OtherJobError, match=r"1 shard is new: .*more/00000.tar"):
        run_job([*shards, *more], "out", client=client, images_per_partition=100)
    run_job(more, "out2", client=client)
    os.utime(more[0], (1, 1))
    with pytest.raises(OtherJobError, match=r"1 shard is changed: .*more/00000.tar"):
        run_job(more, "out2", client=client)

    again = run_job(shards, "out", client=client, images_per_partition=100)
    assert (again.images, again.new_partitions) == (2000, 0)
    anew = run_job(shards[:1], "out", client=client, overwrite=True)
    assert (anew.images, anew.partitions) == (500, 1)
    assert len(pd.read_parquet("out")) == 500


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
        if os.path.exists(flag) and any("000501" in i.key for i in batch.data):
            raise RuntimeError("the store has closed")
        return count_rows(batch)

    options = {"client": client, "reader": DECODING, "images_per_partition": 100}
    first = run_job(shards, "out", fail, **options)
    assert (first.images, first.failed) == (1897, 103)
    records = pd.read_parquet("out/_images")
    causes = records["error"].dropna().str.split(":").str[0].value_counts()
    assert causes.to_dict() == {"function failed": 100, "truncated": 3}
    assert "RuntimeError: the store has closed" in records["error"].dropna().iloc[50]
    flag.unlink()
    assert run_job(shards, "out", fail, **options).failed == 103
    again = run_job(shards, "out", fail, retry_failed=True, **options)
    assert (again.images, again.failed) == (1997, 3)
    assert 2 <= again.new_partitions <= 4
    assert len(pd.read_parquet("out")) == 1997
    assert pd.read_parquet("out/_images")["error"].notna().sum() == 3


def test_columns_are_the_same_in_every_part(folder, client, shards):
    def describe(batch):
        rows = count_rows(batch)
        rows["note"] = None
        rows.loc[rows.index.str.endswith("7.jpg"), "note"] = "seven"
        return rows[rows["number"] < 3]

    small = replace(DECODING, dali_batch_size=10)
    run_job(shards[:2], "out", describe, client=client, reader=small, images_per_partition=50)
    tables = read_bytes("out")
    assert len({str(table.schema.remove_metadata()) for table in tables}) == 1
    assert set(tables[0].column_names) == {"image_id", "number", "note"}
    assert len(pd.read_parquet("out")) == 2 * 50 * 3

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
    with pytest.raises(ReadError, match=r"\d+\.tar/\d+\.jpg: truncated"):
        run_job(shards, "out", client=client, reader=strict, images_per_partition=50)
    skipping = replace(DECODING, on_error="skip")
    summary = run_job(shards, "skipped", client=client, reader=skipping)
    assert (summary.images, summary.failed) == (1997, 3)
    assert len(pd.read_parquet("skipped")) == 1997


def test_a_folder_that_can_not_be_written_to(folder, client, shards):
    (folder / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run_job(shards, "file/out", client=client)


def test_sidecars_become_a_column(folder, client, photo_shards):
    reader = ImageReaderStage(decode=False)
    run_job(photo_shards[:1], "out", client=client, reader=reader)
    rows = pd.read_parquet("out")
    assert [json.loads(text)["cls"] for text in rows["sidecars"]] == list(range(25))


def test_exit_statuses_and_what_goes_where(folder, shards):
    job = ["metadata", *shards, "--out", "out", "--workers", 1, "--log-format", "json"]
    status, out, err = run(*job, "--decode", "--device", "cpu", "--fail-on-error")
    assert status == 1
    result = json.loads(out)
    assert (result["images"], result["failed"], result["out"]) == (1997, 3, "out")
    lines = [json.loads(line) for line in err.splitlines()]
    assert {"partitions_done", "images_per_second", "seconds_left"} <= lines[-1].keys()
    assert sum("truncated" in line["message"] for line in lines) == 3
    status, out, err = run(*job)
    assert (status, out) == (2, "")
    assert "decode was True, and is False" in json.loads(err)["message"]


def test_a_configuration_file(folder, shards):
    (folder / "job.toml").write_text(
        f"""
        shards = {json.dumps([str(path) for path in shards])}
        function = "measuring:measure"
        out = "out"
        images-per-partition = 500
        device = "cpu"
        resize = "16x24"
        sidecars = false
        workers = 1
        log-format = "json"
        """
    )
    status, out, err = run("apply", "--config", "job.toml", "--out", "other")
    assert status == 0, err
    assert json.loads(out)["out"] == "other"
    options = json.loads((folder / "other" / "_job.json").read_text())["options"]
    assert options["resize"] == [16, 24]
    assert options["images_per_partition"] == 500
    (folder / "job.toml").write_text("shard = 1")
    status, out, err = run("apply", "--config", "job.toml")
    assert (status, out, err) == (2, "", "dask-imgread: job.toml: no such option: shard\n")


def test_a_bar_on_a_terminal(folder, shards):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 140))
    job = ["metadata", *shards[:2], "--out", "out", "--workers", "1", *map(str, PARTS)]
    with subprocess.Popen(
        [sys.executable, "-m", "dask_imgread", *job, "--decode"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # so a terminal says that nobody writes to it any more
            while piece := os.read(ours, 1 << 16):
                shown += piece
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    assert out.startswith("99")
    bars = re.split(r"[\r\n]", shown.decode())
    assert any(re.search(r"50/50 .* 99\d images, \d failed, \d+ images/s", bar) for bar in bars)
