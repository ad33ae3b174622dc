"""Many tasks with few in flight."""

import time

from dask_imgread import map_windowed


def test_map_windowed(client):
    ended = [(item, f.result()) for item, f in map_windowed(client, abs, range(-20, 0), window=3)]
    assert sorted(ended) == [(-n, n) for n in range(20, 0, -1)]


def count_tasks(dask_scheduler, name):
    return sum(key.startswith(name) for key in map(str, dask_scheduler.tasks))


def test_map_windowed_keeps_no_more_than_its_window(client):
    """However slow the caller is, and whatever the caller still refers to."""
    futures = []
    for _, future in map_windowed(client, abs, range(30), window=4):
        futures.append(future)
        end = time.monotonic() + 5  # a release reaches the scheduler a moment later
        while (count := client.run_on_scheduler(count_tasks, name="abs")) > 4:
            assert time.monotonic() < end, count
    assert len(futures) == 30
