"""What a test may leave open: this process's descriptors, threads and children."""

import gc
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import resource_tracker

import fsspec.asyn
import pytest

ENDING_SECONDS = 5.0  # what is about to end is waited for so long
GARBAGE_SECONDS = 0.5  # and after so long, garbage is collected

# They serve the whole process, which ends them.
KEPT_THREADS = (
    "dask-imgread-buffers",  # releases idle memory, for half a minute
    "asyncio_",  # of fsspec's event loop
    "Dask-Callback-Thread",
    "Dask-Offload",
)
KEPT_FILES = (
    "/memfd:stderr",  # where what DALI prints is led
    "/proc/",  # read again and again by what watches Dask's processes
)


def start_what_stays():
    """Start what a process has only one of, lest the first test to use it be blamed."""
    fsspec.asyn.get_loop()
    resource_tracker.ensure_running()


def list_open():
    """Return descriptors, threads and children; those apart that stay for good."""
    return {*_list_descriptors(), *_list_threads(), *_list_children()}


def _list_descriptors():
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing, or closed by another thread
            target = os.readlink(f"/proc/self/fd/{number}")
            if not target.startswith(KEPT_FILES):
                yield "descriptor", number, target


def _list_threads():
    scheduler = sys.modules.get("dask.threaded")  # its pool starts a thread when it needs one
    kept = getattr(scheduler and scheduler.default_pool, "_threads", ())
    for thread in threading.enumerate():
        if thread not in kept and not thread.name.startswith(KEPT_THREADS):
            yield "thread", str(thread.ident), thread.name


def _list_children():
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/children", "rb", 0) as file:
            for child in file.read().decode().split():
                yield "child", child, ""


def check_leaks(before):
    """Fail if anything is open that was not, once what is ending has ended."""
    start = time.monotonic()
    collected = False
    left = list_open() - before
    while left and time.monotonic() - start < ENDING_SECONDS:
        time.sleep(0.01)
        if not collected and time.monotonic() - start > GARBAGE_SECONDS:
            gc.collect()
            collected = True
        left &= list_open()
    left = {one for one in left if not _is_of_a_cluster(*one)}
    if left:
        pytest.fail(f"the test leaves behind: {sorted(left)}", pytrace=False)


def _is_of_a_cluster(kind, number, target):
    """Return whether a socket connects the parts of a cluster, which do so when they like."""
    if not target.startswith("socket:"):
        return False
    with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connection:
        return not _list_ports().isdisjoint(
            (connection.getsockname()[1], connection.getpeername()[1])
        )
    return False


def _list_ports():
    """Return the ports of the schedulers in this process, their workers and nannies."""
    module = sys.modules.get("distributed.scheduler")
    schedulers = list(module.Scheduler._instances) if module else []
    addresses = [scheduler.address for scheduler in schedulers]
    for scheduler in schedulers:
        for worker in list(scheduler.workers.values()):
            addresses += [worker.address, worker.nanny or ""]
    return {int(a.rpartition(":")[2]) for a in addresses if a.startswith("tcp:")}
