"""Tasks that wait for a store leave their threads to others."""

import threading
import time
from pathlib import Path

import pytest
from distributed import Client, get_worker

from dask_imgread import read_metadata
from dask_imgread.cluster import worker
from dask_imgread.cluster.worker import step_aside
from dask_imgread.testing import make_shards
from tests.helpers.servers import serve_http


@pytest.fixture
def one_thread():
    with Client(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as client:
        yield client


class Count:
    """How many threads are in a place at the same time, at most."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __enter__(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_):
        with self.lock:
            self.now -= 1


EVERYONE, ASIDE, AFTER = threading.Barrier(3), Count(), Count()


def wait(number):
    with step_aside(), ASIDE:
        EVERYONE.wait(30)  # only if three are here at a time
    return work(number)


def work(number):
    with AFTER:
        time.sleep(0.01)
    return number


def fail(number):
    with step_aside(), step_aside():  # twice changes nothing
        raise ValueError(number)


def test_so_many_step_aside_and_one_goes_on(one_thread, monkeypatch):
    monkeypatch.setattr(worker, "_aside", threading.BoundedSemaphore(3))
    futures = one_thread.map(wait, range(9), pure=False)
    assert sorted(one_thread.gather(futures)) == list(range(9))
    assert (ASIDE.most, AFTER.most) == (3, 1)


def test_an_error_gives_the_place_back(one_thread):
    for future in one_thread.map(fail, range(12), pure=False):
        with pytest.raises(ValueError, match=r"\d"):
            future.result(timeout=30)
    one_thread.gather(one_thread.map(work, range(5), pure=False))
    assert AFTER.most == 1


def test_without_a_worker_nothing_changes():
    with step_aside(), pytest.raises(ValueError, match="worker"):
        get_worker()


class Together:
    """Faults that answer the first requests for `count` shards only when all are asked for."""

    def __init__(self, count):
        self.asked, self.everyone = set(), threading.Barrier(count)

    def draw(self, method, path):
        if method == "GET" and path not in self.asked:
            self.asked.add(path)
            self.everyone.wait(30)


def test_headers_of_many_shards_are_asked_for_at_a_time(one_thread, tmp_path):
    shards = make_shards(tmp_path, shards=6, images_per_shard=3)
    expected = read_metadata(shards).compute(scheduler="sync")
    with serve_http(tmp_path) as server:
        frame = read_metadata([f"{server.url}/{Path(shard).name}" for shard in shards])
        server.faults = Together(6)
        rows = one_thread.compute(frame).result(timeout=60)
    assert not server.faults.everyone.broken  # no request had to wait in vain
    assert list(rows["width"]) == list(expected["width"])
    assert rows["error"].isna().all()
