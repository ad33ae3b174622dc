"""What a test may leave open: this process's descriptors, threads and children."""

import gc
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import active_children, forkserver, resource_tracker

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
# They handle requests, and the server that has them waits for them when it is closed.
SERVER_THREADS = "(process_request_thread)"
WORKER_THREADS = "-Dask-Default-Threads-"  # of a worker in this process: started for its tasks
KEPT_FILES = (
    "/memfd:stderr",  # where what DALI prints is led
    "/proc/",  # read again and again by what watches Dask's processes
)
# What a cluster in this process has for a worker that it started in place of a killed one.
OF_NEW_WORKERS = ("pipe:", "AsyncProcess Dask Worker process", "QueueFeederThread")
FORKSERVER = forkserver._forkserver  # from whose process tests fork others


def start_what_stays():
    """Start what a process has only one of, lest the first test to use it be blamed."""
    fsspec.asyn.get_loop()
    resource_tracker.ensure_running()


def list_open():
    """Return descriptors, threads and children; those apart that stay for good."""
    return {*_list_descriptors(), *_list_threads(), *_list_children()}


def _list_descriptors():
    kept = str(FORKSERVER._forkserver_alive_fd)
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing, or closed by another thread
            target = os.readlink(f"/proc/self/fd/{number}")
            if number != kept and not target.startswith(KEPT_FILES):
                yield "descriptor", number, target


def _list_threads():
    scheduler = sys.modules.get("dask.threaded")  # its pool starts a thread when it needs one
    kept = getattr(scheduler and scheduler.default_pool, "_threads", ())
    for thread in threading.enumerate():
        name = thread.name
        stays = name.startswith(KEPT_THREADS) or name.endswith(SERVER_THREADS)
        if thread not in kept and not stays and WORKER_THREADS not in name:
            yield "thread", str(thread.ident), name


def _list_children():
    server = str(FORKSERVER._forkserver_pid)
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/children", "rb", 0) as file:
            for child in file.read().decode().split():
                if child != server:
                    yield "child", child, ""


def check_leaks(before):
    """Fail if anything is open that was not, once what is ending has ended."""
    start = time.monotonic()
    collected = False
    left = list_open() - before
    while left := left and _leave_out_what_is_shared(left, before):
        waited = time.monotonic() - start
        if waited > ENDING_SECONDS:
            pytest.fail(f"the test leaves behind: {sorted(left)}", pytrace=False)
        if waited > GARBAGE_SECONDS and not collected:
            gc.collect()
            collected = True
        time.sleep(0.01)
        left &= list_open()


def _leave_out_what_is_shared(left, before):
    """Leave out connections with servers and clusters that began before the test.

    Their clients keep connections for later, and so do the parts of a cluster. A cluster whose
    worker was killed has a new one, too, with its pipes and the threads that watch it.
    """
    clusters = _list_clusters()
    ports = {p for _, n, target in before if _is_socket(target) for p in _read_ports(n, True)}
    for scheduler in clusters:
        addresses = (worker.address.rpartition(":")[2] for worker in [*scheduler.workers.values()])
        ports.update(int(port) for port in addresses if port.isdigit())  # in this process: none
    workers = {str(child.pid) for child in active_children()} if clusters else set()
    left = {one for one in left if one[0] != "child" or one[1] not in workers}
    return {
        (kind, number, target)
        for kind, number, target in left
        if not (_is_socket(target) and ports & set(_read_ports(number, False)))
        and not (clusters and target.startswith(OF_NEW_WORKERS))
    }


def _is_socket(target):
    return target.startswith("socket:")


def _read_ports(number, listening):
    """Return the ports of a socket that listens, or of both ends of a connection."""
    with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as one:
        if one.family in (socket.AF_INET, socket.AF_INET6):
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listening:
                return [one.getsockname()[1]] if listens else []
            return [one.getsockname()[1], one.getpeername()[1]]
    return []


def _list_clusters():
    """Return the schedulers in this process."""
    module = sys.modules.get("distributed.scheduler")
    schedulers = list(module.Scheduler._instances) if module else []
    return [scheduler for scheduler in schedulers if scheduler.workers]
