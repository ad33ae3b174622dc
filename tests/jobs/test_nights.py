"""Ten nights of a job over shards that change, killed in each of them."""

import collections
import os
import random
import time
from contextlib import ExitStack
from pathlib import Path

import dask
import pandas as pd
import psutil
import pytest
from distributed import Client, LocalCluster

from dask_imgread import ImageReaderStage, run_job
from tests.helpers.commands import start_server
from tests.helpers.nights import OpenedReader, ShardSet, keep_gone, read_all, sum_pixels

PLAIN = ImageReaderStage(device="cpu", verbose=False)
Night = collections.namedtuple("Night", "folder division where")


def make_reader(folder):
    return OpenedReader(device="cpu", verbose=False, log=str(folder / "opened"), pause=0.02)


def work_a_night(night):
    """Run in a process of its own, which may be killed; ``where`` says what else is a process."""
    folder = Path(night.folder)
    processes = night.where == "worker"
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        ExitStack() as stack,
    ):
        where = {"scheduler_file": str(folder / "scheduler.json")}
        if night.where != "scheduler":
            cluster = LocalCluster(
                n_workers=2, threads_per_worker=1, processes=processes, dashboard_address=None
            )
            where = {"address": stack.enter_context(cluster)}
        client = stack.enter_context(Client(**where))
        run_job(
            *(folder / "shards", folder / "out", sum_pixels),
            **{"client": client, "reader": make_reader(folder), "update": True, **night.division},
        )


def keep_cluster(folder):
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        dashboard_address=None,
        protocol="tcp://",
    ) as cluster:
        with Client(cluster) as client:
            client.write_scheduler_file(f"{folder}/new.json")
        os.replace(f"{folder}/new.json", f"{folder}/scheduler.json")
        time.sleep(100)


def wait_for(found, process):
    end = time.monotonic() + 30
    while not found():
        assert time.monotonic() < end
        if not process.is_alive():
            return
        time.sleep(0.01)


def disturb_a_night(folder, division, chance):
    """Run a job, and kill something at a random moment; return what was killed."""
    context = start_server()
    where = chance.choice(["client", "client", "client", "worker", "scheduler"])
    cluster = None
    if where == "scheduler":
        (folder / "scheduler.json").unlink(missing_ok=True)
        cluster = context.Process(target=keep_cluster, args=(str(folder),))
        cluster.start()
        wait_for((folder / "scheduler.json").exists, cluster)
    night = context.Process(
        target=work_a_night, args=(Night(str(folder), division, where),), daemon=False
    )
    night.start()
    wait_for((folder / "out" / "_claim.json").exists, night)
    time.sleep(chance.uniform(0, 0.7))
    if where == "worker":
        children = psutil.Process(night.pid).children() if night.is_alive() else []
        workers = [worker for child in children for worker in child.children()]
        for victim in workers[:1]:
            victim.kill()
    else:
        (cluster or night).kill()
    night.join(60)
    assert night.exitcode is not None
    if cluster is not None:
        cluster.kill()
        cluster.join()
    return where, night.exitcode


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_nights(tmp_path, client):
    division = {"images_per_partition": 4, "rows_per_file": 40}
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    shards = ShardSet(tmp_path / "shards", seed)
    opened, before, known = tmp_path / "opened", None, collections.Counter()
    opened.touch()
    job = {"client": client, **division}
    for night in range(10):
        shards.change()
        shards.add(8 if night == 0 else 3)
        what = disturb_a_night(tmp_path, division, chance)
        print(night, *what)
        if chance.random() < 0.5:  # it comes in between
            shards.add(1)
        paths, out = tmp_path / "shards", tmp_path / "out"
        run_job(paths, out, sum_pixels, reader=make_reader(tmp_path), update=True, **job)
        found = read_all(tmp_path / "out", sum_pixels)
        fresh = {"client": client, "reader": PLAIN, "files_per_partition": 99}
        run_job(paths, tmp_path / f"{night}", sum_pixels, **fresh)
        expected = read_all(tmp_path / f"{night}", sum_pixels)
        if before is not None:
            pairs = zip(before, expected, strict=True)
            expected = [keep_gone(*pair, paths) for pair in pairs]
        for rows, wanted in zip(found, expected, strict=True):
            pd.testing.assert_frame_equal(rows, wanted)
        lines = collections.Counter(opened.read_text().splitlines())
        again = lines - known
        assert not set(again) & set(known)  # what was read by the end of a night is not read again
        assert sum(again.values()) - len(again) <= 4  # but for what two workers were at
        known, before = lines, found
    assert not (tmp_path / "out" / "_staged").exists()
    assert not list((tmp_path / "out").rglob("_tmp-*"))
