"""A job's output folder: parts are there as a whole or not at all."""

import os
import signal
import subprocess
import sys

import pandas as pd
import pyarrow.parquet as pq

from dask_imgread.testing import make_shards

LARGEST = 200_000  # bytes of a file: more than each file of the job but its parts
MODULE = f"""
import os, resource, signal
import numpy as np

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def make_noise(batch):
    if "KILLED" in os.environ and any(image.key == "000025" for image in batch.data):
        # From now on the kernel kills the process when it would write more than this to a file.
        resource.setrlimit(resource.RLIMIT_FSIZE, ({LARGEST}, {LARGEST}))
    noise = np.random.default_rng(0)
    return {{"noise": [noise.bytes(50_000) for _ in batch.data]}}
"""
JOB = """
from distributed import Client
from noise import make_noise
from dask_imgread import ImageReaderStage, run_job

with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as client:
    reader = ImageReaderStage(device="cpu", verbose=False)
    run_job("shards", "out", make_noise, client=client, reader=reader, images_per_partition=10)
"""


def test_a_writer_killed_half_way_leaves_no_part_of_a_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_shards("shards", shards=1, images_per_shard=50, size=(48, 32))
    (tmp_path / "noise.py").write_text(MODULE)
    out = tmp_path / "out"

    def run(**environment):
        command = [sys.executable, "-c", JOB]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        return done.returncode, done.stderr

    status, told = run(KILLED="")
    assert status == -signal.SIGXFSZ, told
    assert len(pd.read_parquet(out)) == 20
    assert [pq.read_metadata(path).num_rows for path in sorted(out.glob("part-*"))] == [10, 10]
    (draft,) = out.rglob("_tmp-*")
    assert draft.name.startswith("_tmp-part-0000002.parquet")
    assert draft.stat().st_size == LARGEST

    status, told = run()
    assert status == 0, told
    assert not list(out.rglob("_tmp-*"))
    assert len(pd.read_parquet(out)) == 50
