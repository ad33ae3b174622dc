"""What ends a run from outside: workers that go, Ctrl-C, a reader of its output that goes."""

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

from dask_imgread import JobError, connect_client, run_job, start_cluster, verify_shards
from dask_imgread.cli.main import main
from dask_imgread.cli.preview import read_samples
from dask_imgread.cluster import start as cluster
from dask_imgread.cluster.window import run_one
from dask_imgread.errors import NoWorkersError
from dask_imgread.jobs.folder import JobFolder
from dask_imgread.report.page import write_report
from dask_imgread.testing import make_shards
from tests.helpers.commands import ForkedProcess, start_server
from tests.helpers.waiting import wait_for

MODULE = """
import time
import pandas as pd

def measure(batch):
    time.sleep(0.2)
    ids = pd.Index([image.image_id for image in batch.data], name="image_id")
    return pd.DataFrame({"width": [image.width for image in batch.data]}, index=ids)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, shards=4, images_per_shard=50, size=(48, 32), broken=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "measuring.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def impatient(forked_workers, monkeypatch):
    monkeypatch.setattr(cluster, "_CHECK_INTERVAL", 0.1)
    with dask.config.set({cluster.WAIT_SETTING: "1s"}):
        yield


def start(*arguments, unread=()):
    """Start a command in a session of its own; nobody reads its descriptors ``unread``."""
    start_server()
    process = ForkedProcess(target=run_alone, args=([*map(str, arguments)], unread))
    process.start()
    return process


def run_alone(words, unread):
    """Run a command, whose workers inherit from it; what it prints goes to two files."""
    os.setsid()
    reading, writing = os.pipe()
    os.close(reading)
    for number, name in enumerate(PRINTED, 1):
        file = os.open(name, os.O_CREAT | os.O_WRONLY)
        os.dup2(writing if number in unread else file, number)
    status = main(words)
    atexit._run_exitfuncs()  # of which a forked process runs none: they close clusters, too
    sys.exit(status)


PRINTED = ("stdout", "stderr")


def start_local(workers):
    return LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0")


def count_slowly(batch):
    time.sleep(0.1)
    ids = pd.Index([image.image_id for image in batch.data], name="image_id")
    return pd.DataFrame({"number": range(len(ids))}, index=ids)


def scale_when_begun(local, out, workers):
    """Scale a cluster as soon as a job has written a part."""

    def scale():
        wait_for(lambda: list(Path(out).glob("part-*")))
        local.scale(workers)

    threading.Thread(target=scale).start()


# Workers


def test_a_job_without_workers_ends(folder, shards, impatient, monkeypatch, capsys):
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)
    with start_local(1) as local:
        scale_when_begun(local, "out", 0)
        job = ["metadata", *shards, "--out", "out", "--images-per-partition", "1"]
        assert main([*job, "--decode", "--scheduler", local.scheduler_address]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[-1] == "dask-imgread: the cluster has had no workers for 1 s"
    assert 1 <= len(list(Path("out").glob("part-*"))) < 200


def test_a_job_goes_on_when_workers_come_back(folder, shards, forked_workers, monkeypatch):
    monkeypatch.setattr(cluster, "_CHECK_INTERVAL", 0.1)
    with start_local(1) as local, Client(local) as client:
        scale_when_begun(local, "out", 0)

        class Rescue(logging.Handler):
            def emit(self, record):
                if "has no workers: waiting up to 60 s" in record.getMessage():
                    local.scale(1)

        monkeypatch.setattr(logging.getLogger("dask_imgread"), "handlers", [Rescue()])
        options = {"images_per_partition": 25, "client": client}
        assert run_job(shards, "out", count_slowly, **options).images == 199


def test_columns_are_not_waited_for_without_workers(folder, shards, impatient):
    with start_local(1) as local, Client(local) as client:

        def leave(batch):
            time.sleep(60)

        threading.Timer(1, local.scale, (0,)).start()
        with pytest.raises(JobError, match="the cluster has had no workers for 1 s"):
            run_job(shards, "out", leave, client=client)
        with pytest.raises(NoWorkersError, match=r"waited 1 s for 1 worker: tcp://.* has 0"):
            verify_shards(shards, client=client)


def test_workers_that_can_not_do_the_work_are_none(client, impatient):
    with pytest.raises(NoWorkersError, match=r"no workers that declare \{'GPU': 0.5\} for 1 s"):
        run_one(client, abs, -1, resources={"GPU": 0.5})


@pytest.mark.parametrize("workers", [None, 2])
def test_an_adaptive_cluster_starts_from_nothing(folder, shards, forked_workers, workers):
    with start_local(0) as local:
        local.adapt(minimum=0, maximum=2, interval="100ms")
        client = connect_client(scheduler=local.scheduler_address, n_workers=workers)
        options = {"images_per_partition": 50, "client": client}
        assert run_job(shards, "out", count_slowly, **options).images == 199


def test_an_adaptive_cluster_is_seen_to_declare_gpus(folder, shards, forked_workers, monkeypatch):
    """What its tasks ask for is not known before there is a worker."""
    monkeypatch.setenv("DASK_IMGREAD__DEVICE", "cpu")
    options = {"threads_per_worker": 1, "dashboard_address": ":0", "resources": {"GPU": 1}}
    asked = []
    monkeypatch.setattr(
        "dask_imgread.verify.run_tasks", lambda *_, **options: asked.append(options) or []
    )
    with LocalCluster(n_workers=0, **options) as local, Client(local) as client:
        local.adapt(minimum=0, maximum=1, interval="100ms")
        verify_shards(shards, client=client)
    assert asked[0]["resources"] == {"GPU": 0.25}


@pytest.mark.parametrize(
    ("option", "where"), [("--scheduler", "tcp://127.0.0.1:9"), ("--scheduler-file", "nope.json")]
)
def test_a_wrong_scheduler_is_told_at_once(
    folder, shards, monkeypatch, caplog, capsys, option, where
):
    monkeypatch.setattr("dask_imgread.cli.commands.start_logging", lambda log_format: None)
    monkeypatch.setattr(cluster, "_TIMEOUT", 2)
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        assert main(["verify", *shards, option, where]) == 3
    assert caplog.messages == [f"waiting up to 2 s for the scheduler {where}"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert where in told[0]
    assert "2 s" in told[0]


# Ctrl-C


@pytest.mark.parametrize("command", ["apply", "verify"])
def test_ctrl_c_in_a_terminal(folder, shards, command):
    """It is sent to the workers too."""
    job = [*shards, "--images-per-partition", 1, "--workers", 1, "--device", "cpu"]
    if command == "apply":
        job = ["measuring:measure", *job, "--out", "out"]
    process = start(command, *job)
    if command == "apply":
        wait_for(lambda: list(folder.glob("out/part-*")))
    else:
        wait_for(lambda: psutil.Process(process.pid).children())
    os.killpg(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    out, err = (Path(name).read_text() for name in PRINTED)
    assert out == ""
    assert "Traceback" not in err
    kept = "; what is done is kept" if command == "apply" else ""
    assert err.splitlines()[-1].endswith(f"dask-imgread: stopped by SIGINT{kept}")
    assert err.count("\n") < 5


def blocks_interrupts(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    blocked = next(line for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(blocked.split()[1], 16) & 1 << signal.SIGINT - 1)


def test_interrupts_are_kept_from_workers_alone():
    before = set(psutil.Process().children())

    def list_workers():
        new = set(psutil.Process().children()) - before
        return [p for p in new if "spawn_main" in " ".join(p.cmdline())]

    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
        start_cluster(device="cpu", n_workers=1, dashboard_address=":0", verbose=False) as local,
    ):
        (worker,) = list_workers()
        assert blocks_interrupts(worker)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
        worker.kill()
        worker.wait()
        local.wait_for_workers(1, 60)
        wait_for(list_workers)
        (again,) = list_workers()
        assert again.pid != worker.pid
        assert blocks_interrupts(again)


# Readers of its output


def test_nobody_reads_its_output(folder, shards, client):
    job = ["verify", *shards, "--scheduler", client.scheduler.address, "--out", "bad.parquet"]
    process = start(*job, unread=(1,))
    process.join(60)
    assert process.exitcode == 1, "as it would be with a reader"
    assert "ipe" not in Path("stderr").read_text()
    process = start("metadata", *shards, "--workers", 1, "--out", "out", unread=(1, 2))
    process.join(60)
    assert process.exitcode == 0
    assert len(pd.read_parquet("bad.parquet")) == 1
    assert len(pd.read_parquet("out")) == 200


# Exit

AT_EXIT = """
import gc, os, sys, threading
from dask_imgread.cli.preview import read_samples
from dask_imgread.jobs.folder import JobFolder

def spin():
    while True:
        pass

sys.setswitchinterval(0.0002)
gc.freeze()  # or each child spends most of its time on collecting modules
statuses = []
for _ in range(50):
    child = os.fork()
    if not child:
        # As threads of a cluster do: one of Arrow's waits for its turn, until it is too late.
        threading.Thread(target=spin, daemon=True).start()
        read_samples(JobFolder("out"))
        sys.exit()
    statuses.append(os.waitpid(child, 0)[1])
print(sum(map(bool, statuses)))
"""


@pytest.mark.slow
def test_fifty_ends_of_a_job(folder, shards, client):
    run_job(shards[:1], "out", count_slowly, client=client)
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


def test_arrow_is_given_no_file_of_pythons_to_read(folder, shards, client, monkeypatch):
    """One of its threads may be the last to hold it."""
    given = []

    def watch(module, name):
        function = getattr(module, name)

        def note(source, *arguments, **options):
            given.append(source)
            return function(source, *arguments, **options)

        monkeypatch.setattr(module, name, note)

    run_job(shards, "out", count_slowly, client=client, images_per_partition=100)
    for module, name in ((pq, "read_table"), (pq, "ParquetFile"), (pa.ipc, "open_file")):
        watch(module, name)
    job = JobFolder("out")
    assert len(read_samples(job)[0]) == 5
    assert len(job.read_table("_plan-1.arrow")) == 4
    write_report("out")
    assert len(given) >= 4
    assert all(isinstance(source, pa.NativeFile) for source in given)
    assert not any(isinstance(source, pa.PythonFile) for source in given)
