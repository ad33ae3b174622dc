"""Wait until something has happened, and no longer than it may take."""

import gc
import threading
import time

from dask_imgread.shards import ahead

CLOSING_SECONDS = 5.0


def wait_for(happened, seconds=60.0):
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def close_at_once(batches):
    """Close a reader's generator, which ends all its requests and threads without waiting."""
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < CLOSING_SECONDS
    gc.collect()
    assert list_reader_threads() == set()
    assert ahead.BUDGET._left == ahead._WORKER_BYTES


def list_reader_threads():
    """Return the names of the package's threads, but for the one that serves the whole process."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith("dask-imgread-")} - {"dask-imgread-buffers"}
