"""Start a local Dask cluster, or connect to one, and wait for its workers."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import current_process, resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import dask
from dask.system import CPU_COUNT
from dask.utils import parse_timedelta

from dask_imgread.cluster.gpu import DEVICE_SETTING, RESOURCE, count_gpus, describe_missing_gpu
from dask_imgread.errors import NoWorkersError

if TYPE_CHECKING:
    from distributed import Client, LocalCluster


logger = logging.getLogger("dask_imgread")

_TIMEOUT = 600  # seconds, to wait for a scheduler or for workers
_LOCAL_TIMEOUT = 60  # for workers on this machine, which restart soon, or not at all
WAIT_SETTING = "imgread.wait-for-workers"
_CHECK_INTERVAL = 5.0  # seconds between looks at the workers, while no task completes
_MARK = "DASK_IMGREAD_UNGUARDED"  # the variable with the path of a file: there if a worker ran it
_UNGUARDED = (
    "dask_imgread: each worker process imports this script, and so runs it again: start the "
    'cluster below `if __name__ == "__main__":`, or in a function that is called there'
)


def start_cluster(
    *,
    device: Literal["auto", "gpu", "cpu"] = "auto",
    num_gpus_per_worker: float = 0.25,
    n_workers: int | None = None,
    verbose: bool = True,
    **cluster_options: Any,
) -> LocalCluster:
    """Start worker processes on this machine: a LocalCUDACluster where there is a GPU.

    Parameters
    ----------
    device
        ``"auto"`` uses GPUs if there are any; ``"gpu"`` and ``"cpu"`` force either.
    num_gpus_per_worker
        The share of a GPU that each reader will request. A GPU worker declares one
        ``GPU``, and has as many threads as shares fit on it.
    n_workers
        Worker processes: by default one for each GPU or, on the CPU, one with a single
        thread for each core.
    verbose
        Print the link to the dashboard.
    **cluster_options
        Further keyword arguments of ``dask_cuda.LocalCUDACluster`` or ``distributed.LocalCluster``.

    Returns
    -------
    LocalCluster
        A context manager, like any Dask cluster: on exit it closes its workers.
        ``LocalCUDACluster`` is a LocalCluster too.

    Raises
    ------
    RuntimeError
        If ``device="gpu"`` and there is no GPU.
    ImportError
        If there is a GPU, but dask-cuda is not installed.
    SystemExit
        If a script calls this without ``if __name__ == "__main__":``. Each worker process imports
        the script first, and would start a cluster itself.

    Examples
    --------
    >>> from distributed import Client
    >>> with start_cluster(device="cpu", n_workers=2, verbose=False) as cluster:
    ...     with Client(cluster) as client:
    ...         client.submit(sum, [1, 2]).result()
    3
    """
    gpus = count_gpus() if device != "cpu" else 0
    if device == "gpu" and not gpus:
        raise RuntimeError(
            f'device="gpu", but no GPU was found: {describe_missing_gpu()}. '
            'Give "auto" to use cores'
        )
    cluster_options = {"dashboard_address": _choose_dashboard_address()} | cluster_options
    with _refuse_unguarded_script(), _block_sigint():
        if gpus:
            cluster = _start_on_gpus(n_workers, num_gpus_per_worker, cluster_options)
        else:
            cluster = _start_on_cores(n_workers, cluster_options)
    if verbose:
        print(f"Dask dashboard: {cluster.dashboard_link}")
    return cluster


@contextmanager
def connect_client(
    *,
    scheduler: str | None = None,
    scheduler_file: str | None = None,
    n_workers: int | None = None,
    **cluster_options: Any,
) -> Iterator[Client]:
    """Connect to a scheduler, or start a cluster on this machine; close what was opened at the end.

    A context manager, and a lazy one: it does nothing before it is entered. ``run_job`` takes it
    as its ``client``, and enters it only if anything is left to do.

    Parameters
    ----------
    scheduler, scheduler_file
        The address of a scheduler, or the file to which it writes it. The scheduler may still be
        starting: it is waited for, up to ten minutes. If neither is given, a cluster is started.
    n_workers
        How many workers to wait for, by default one; or to start.
    **cluster_options
        Keyword arguments of ``start_cluster``, if a cluster is started.

    Yields
    ------
    distributed.Client
        Each call gives a context manager that can be entered once.

    Raises
    ------
    ValueError
        If ``n_workers`` is below 1. Like the other errors, it is raised on entering.
    TimeoutError
        If there is no scheduler after ten minutes.
    NoWorkersError
        If there are too few workers after ten minutes, or the time that Dask's setting
        ``imgread.wait-for-workers`` gives; a TimeoutError.
    RuntimeError, ImportError
        If a cluster can't be started, as in ``start_cluster``.

    Examples
    --------
    >>> with connect_client(device="cpu", n_workers=1, verbose=False) as client:
    ...     client.submit(sum, [1, 2]).result()
    3
    """
    from distributed import Client

    if n_workers is not None and n_workers < 1:
        raise ValueError(f"n_workers must be at least 1, not {n_workers}")
    if scheduler is None and scheduler_file is None:
        with (
            start_cluster(n_workers=n_workers, **cluster_options) as cluster,
            Client(cluster) as client,
        ):
            try:
                yield client
            except BaseException:
                _silence_workers(client)
                raise
        return
    with _log_if_slow(f"the scheduler {scheduler or scheduler_file}", _TIMEOUT):
        if scheduler_file is not None:
            _wait_for_file(scheduler_file)
        client = _connect(scheduler, scheduler_file)
    with client:
        wait_for_workers(client, n_workers or 1)
        yield client


def wait_for_workers(client: Client, count: int = 1) -> None:
    """Wait until a cluster has enough workers, and make an adaptive one start them.

    Raises
    ------
    NoWorkersError
        If there are too few for as long as ``imgread.wait-for-workers`` allows.
    """
    if len(client.nthreads()) >= count:
        return
    timeout = get_worker_timeout(client)
    workers = "1 worker" if count == 1 else f"{count} workers"
    # An adaptive cluster starts workers only for pending tasks, one for each five seconds of work.
    # Tasks left over when the workers are there are cancelled with their futures.
    futures = client.map(time.sleep, [0.5] * 10 * count, pure=False, key="wait-for-workers")
    with _log_if_slow(f"{workers} of {client.scheduler.address}", timeout):
        try:
            client.wait_for_workers(count, timeout=timeout)
        except TimeoutError:
            raise NoWorkersError(
                f"waited {timeout:.0f} s for {workers}: "
                f"{client.scheduler.address} has {len(client.nthreads())}"
            ) from None
    del futures


def get_worker_timeout(client: Client) -> float:
    """Return for how many seconds a cluster may have no workers: ``imgread.wait-for-workers``.

    By default a minute for a cluster on this machine, else ten minutes.
    """
    from distributed import LocalCluster

    default = _LOCAL_TIMEOUT if isinstance(client.cluster, LocalCluster) else _TIMEOUT
    timeout: float = parse_timedelta(dask.config.get(WAIT_SETTING, default))
    return timeout


class WorkerWatch:
    """Raises an error when a cluster has had no suitable workers for too long.

    Parameters
    ----------
    client
        A client of the cluster.
    resources
        What each task requests of a worker.
    """

    def __init__(self, client: Client, resources: Mapping[str, float]) -> None:
        self._client, self._resources = client, resources
        self.interval = _CHECK_INTERVAL
        self._checked = time.monotonic()
        self._missing_since: float | None = None

    def check(self) -> None:
        """Check for workers, unless the last check was less than ``interval`` ago.

        Raises
        ------
        NoWorkersError
            If there have been none for as long as ``imgread.wait-for-workers`` allows.
        """
        now = time.monotonic()
        if now - self._checked < self.interval:
            return
        self._checked = now
        if _has_worker(self._client, self._resources):
            self._missing_since = None
            return
        timeout = get_worker_timeout(self._client)
        some = f"workers that declare {dict(self._resources)}" if self._resources else "workers"
        if self._missing_since is None:
            self._missing_since = now
            logger.warning("the cluster has no %s: waiting up to %.0f s for some", some, timeout)
        elif now - self._missing_since >= timeout:
            raise NoWorkersError(f"the cluster has had no {some} for {timeout:.0f} s")


def _has_worker(client: Client, resources: Mapping[str, float]) -> bool:
    """Return whether a cluster has a worker that declares these resources."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(
        all(worker.get("resources", {}).get(name, 0) >= resources[name] for name in resources)
        for worker in workers
    )


@contextmanager
def _log_if_slow(what: str, seconds: float) -> Iterator[None]:
    """Log what is waited for, and for how long at most, if it takes more than a second."""
    message = "waiting up to %.0f s for %s"
    timer = threading.Timer(1, logger.warning, (message, seconds, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _silence_workers(client: Client) -> None:
    """Stop workers from logging meaningless tracebacks when they are closed in mid-task."""
    thread = threading.Thread(target=_disable_logging, args=(client,), daemon=True)
    thread.start()
    thread.join(1)  # some workers may not answer


def _disable_logging(client: Client) -> None:
    with suppress(Exception):
        client.run(logging.disable)


def end_unguarded_worker() -> None:
    """End this process if it is a worker's, and runs a script that starts workers."""
    importing_script = getattr(current_process(), "_inheriting", False)
    if importing_script and _MARK in os.environ:
        Path(os.environ[_MARK]).touch()
        os._exit(1)  # an exception would print a traceback, and one for each worker


@contextmanager
def _refuse_unguarded_script() -> Iterator[None]:
    """End with one line if the workers started in the ``with`` block get here, too.

    They do if importing the script starts a cluster: each worker process first imports it.
    """
    end_unguarded_worker()
    with TemporaryDirectory() as folder:
        mark = Path(folder, "unguarded")
        os.environ[_MARK] = str(mark)
        try:
            yield
        except Exception:
            if mark.exists():
                raise SystemExit(_UNGUARDED) from None
            raise
        finally:
            os.environ.pop(_MARK, None)


@contextmanager
def _block_sigint() -> Iterator[None]:
    """Block SIGINT in processes started in the ``with`` block, and by threads started there.

    Terminals and Jupyter send it to all processes, but workers should end only when their cluster
    is closed. A cluster's threads, which restart dead workers, inherit the blocked signal.
    """
    resource_tracker.ensure_running()  # starting it later, with a worker, would unblock SIGINT
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _connect(scheduler: str | None, scheduler_file: str | None) -> Client:
    """Connect to a scheduler, waiting until it is up."""
    from distributed import Client

    end = time.monotonic() + _TIMEOUT  # Dask's own timeout would apply to reconnecting, too
    while True:
        client = Client.__new__(Client)
        try:
            client.__init__(scheduler, scheduler_file=scheduler_file)
            return client
        except OSError as error:
            client._loop_runner.stop()  # Dask leaves the thread of its event loop running
            if time.monotonic() > end:
                raise TimeoutError(f"no scheduler was reached in {_TIMEOUT} s: {error}") from error
            time.sleep(1)


def _wait_for_file(path: str) -> None:
    end = time.monotonic() + _TIMEOUT  # Dask would wait forever
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise TimeoutError(f"no scheduler has written {path} in {_TIMEOUT} s")
        time.sleep(0.1)


def _choose_dashboard_address() -> str:
    """Return Dask's usual port, or any free one if that is taken, e.g. by another cluster."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", 8787))
        except OSError:
            return ":0"
    return ":8787"


def _start_on_cores(n_workers: int | None, cluster_options: dict[str, Any]) -> LocalCluster:
    from distributed import LocalCluster

    # One thread a process: decoders then don't contend for the GIL or a malloc arena.
    defaults: dict[str, Any] = {"n_workers": n_workers or CPU_COUNT, "threads_per_worker": 1}
    # Dask 2026.8.0 queries the first GPU in CUDA_VISIBLE_DEVICES, and fails to start if it does not
    # exist.
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    no_nvml = {"distributed.diagnostics.nvml": False} if hidden else {}
    if cluster_options.get("processes", True):
        defaults["config"] = {DEVICE_SETTING: "cpu"} | no_nvml | cluster_options.pop("config", {})
    with dask.config.set(no_nvml):
        return LocalCluster(**(defaults | cluster_options))


def _start_on_gpus(
    n_workers: int | None, share: float, cluster_options: dict[str, Any]
) -> LocalCluster:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ImportError(
            'a cluster on GPUs needs dask-cuda: pip install "dask-imgread[gpu]"'
        ) from error
    return LocalCUDACluster(**choose_gpu_options(n_workers, share, cluster_options))


def choose_gpu_options(
    n_workers: int | None, share: float, cluster_options: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of ``LocalCUDACluster`` (dask-cuda 26.10): one process for each GPU."""
    defaults = {
        "n_workers": n_workers,
        "threads_per_worker": max(1, int(1 / share)),
        "resources": {RESOURCE: 1},
    }
    return defaults | cluster_options


def check_resources(client: Client, requested: dict[str, float]) -> None:
    """Raise RuntimeError if a cluster has workers, but none declares what tasks will request.

    Dask would let such tasks wait forever, without a message.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if not workers:  # an adaptive cluster starts some once there are tasks
        return
    for name, amount in requested.items():
        declared = [worker.get("resources", {}).get(name, 0) for worker in workers]
        if max(declared, default=0) < amount:
            raise RuntimeError(
                f"tasks ask for {amount} of the resource {name!r}, but none of the "
                f"{len(declared)} workers declares as much (declared: {sorted(set(declared))}), so "
                f"that they would wait for ever. A cluster that fits: "
                f"start_cluster(num_gpus_per_worker={amount}), or workers started with "
                f'--resources "{name}=1"'
            )
