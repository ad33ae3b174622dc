"""A job's output folder: parts are there as a whole or not at all."""

import os
import resource
import signal

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from distributed import Client

from dask_imgread import ImageReaderStage, run_job
from dask_imgread.testing import make_shards
from tests.helpers.commands import ForkedProcess, start_server

LARGEST = 200_000  # bytes of a file: more than each file of the job but its parts


def make_noise(batch):
    if "KILLED" in os.environ and any(image.key == "000025" for image in batch.data):
        # From now on the kernel kills the process when it would write more than this to a file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
    noise = np.random.default_rng(0)
    return {"noise": [noise.bytes(50_000) for _ in batch.data]}


def write_noise():
    """Run in a process of its own, which is killed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader = ImageReaderStage(device="cpu", verbose=False)
    job = {"reader": reader, "images_per_partition": 10}
    where = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with Client(processes=False, **where) as client:
        run_job("shards", "out", make_noise, client=client, **job)


def test_a_writer_killed_half_way_leaves_no_part_of_a_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_shards("shards", shards=1, images_per_shard=50, size=(48, 32))
    out = tmp_path / "out"
    start_server()

    def run(**variables):
        process = ForkedProcess(target=write_noise)
        process.variables = variables
        process.start()
        process.join()
        return process.exitcode

    assert run(KILLED="") == -signal.SIGXFSZ
    assert len(pd.read_parquet(out)) == 20
    assert [pq.read_metadata(path).num_rows for path in sorted(out.glob("part-*"))] == [10, 10]
    (draft,) = out.rglob("_tmp-*")
    assert draft.name.startswith("_tmp-part-0000002.parquet")
    assert draft.stat().st_size == LARGEST

    assert run() == 0
    assert not list(out.rglob("_tmp-*"))
    assert len(pd.read_parquet(out)) == 50
