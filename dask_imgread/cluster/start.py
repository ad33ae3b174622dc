"""Start a local Dask cluster that fits the readers and the machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Literal

import dask
from dask.system import CPU_COUNT
from dask.utils import parse_timedelta

from dask_imgread.cluster.gpu import DEVICE_SETTING, RESOURCE, count_gpus, explain_absence
from dask_imgread.errors import NoWorkersError

if TYPE_CHECKING:
    from distributed import Client, LocalCluster


logger = logging.getLogger("dask_imgread")

_WAIT = 600  # seconds, for a scheduler and for workers
_WAIT_HERE = 60  # for workers on this machine: they come back soon, or not at all
WAIT_SETTING = "imgread.wait-for-workers"
_LOOKED_EVERY = 5.0  # seconds, at the workers while no task ends


def start_cluster(
    *,
    device: Literal["auto", "gpu", "cpu"] = "auto",
    num_gpus_per_worker: float = 0.25,
    n_workers: int | None = None,
    verbose: bool = True,
    **options: Any,
) -> LocalCluster:
    """Start worker processes on this machine: a LocalCUDACluster where there is a GPU.

    Parameters
    ----------
    device
        ``"auto"`` looks for GPUs here; ``"gpu"`` and ``"cpu"`` insist.
    num_gpus_per_worker
        The share of a GPU that a reader will ask for. Each GPU worker declares one
        ``GPU`` and gets as many threads as shares fit on it.
    n_workers
        Worker processes: one for each GPU, or, on the CPU, one of a single thread for
        each core, unless given.
    verbose
        Print the link to the dashboard.
    **options
        Further options of ``dask_cuda.LocalCUDACluster`` or ``distributed.LocalCluster``.

    Returns
    -------
    LocalCluster
        A context manager, as is any Dask cluster: it closes its workers in the end.
        ``LocalCUDACluster`` is a LocalCluster too.

    Raises
    ------
    RuntimeError
        If ``device="gpu"`` and there is no GPU.
    ImportError
        If there is a GPU, but not dask-cuda.

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
            f'device="gpu", but no GPU was found: {explain_absence()}. Give "auto" to use cores'
        )
    options = {"dashboard_address": _choose_dashboard()} | options
    with _keep_interrupts():
        if gpus:
            cluster = _start_on_gpus(n_workers, num_gpus_per_worker, options)
        else:
            cluster = _start_on_cores(n_workers, options)
    if verbose:
        print(f"Dask dashboard: {cluster.dashboard_link}")
    return cluster


@contextmanager
def connect_client(
    *,
    scheduler: str | None = None,
    scheduler_file: str | None = None,
    n_workers: int | None = None,
    **options: Any,
) -> Iterator[Client]:
    """Connect to a scheduler, or start a cluster on this machine; close what was opened at the end.

    A context manager, and a lazy one: it does nothing before it is entered. ``run_job`` takes it
    as its ``client``, and enters it only if anything is left to do.

    Parameters
    ----------
    scheduler, scheduler_file
        The address of a scheduler, or the file that it writes. Either may appear only after up
        to ten minutes. If neither is given, a cluster is started.
    n_workers
        The workers to wait for, one if not given; or to start.
    **options
        Options of ``start_cluster``, if a cluster is started.

    Yields
    ------
    distributed.Client
        Each call gives a context manager that can be entered once.

    Raises
    ------
    ValueError
        When it is entered, as are the other errors: if ``n_workers`` is below 1.
    TimeoutError
        If there is no scheduler after ten minutes. A ``NoWorkersError``, which is one, if there
        are too few workers after ten minutes, or after what Dask's setting
        ``imgread.wait-for-workers`` says.
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
        with start_cluster(n_workers=n_workers, **options) as cluster, Client(cluster) as client:
            try:
                yield client
            except BaseException:
                _hush_workers(client)
                raise
        return
    with _announce(f"the scheduler {scheduler or scheduler_file}", _WAIT):
        if scheduler_file is not None:
            _wait_for_file(scheduler_file)
        client = _reach(partial(Client, scheduler, scheduler_file=scheduler_file))
    with client:
        wait_for_workers(client, n_workers or 1)
        yield client


def wait_for_workers(client: Client, count: int = 1) -> None:
    """Wait until a cluster has workers, and let an adaptive one start them.

    Raises
    ------
    NoWorkersError
        If there are too few for as long as ``choose_patience`` says.
    """
    if len(client.nthreads()) >= count:
        return
    patience = choose_patience(client)
    workers = "1 worker" if count == 1 else f"{count} workers"
    # An adaptive cluster starts workers for work alone, one for five seconds of it. What is left
    # of it when they are there is dropped with the futures.
    work = client.map(time.sleep, [0.5] * 10 * count, pure=False, key="wait-for-workers")
    with _announce(f"{workers} of {client.scheduler.address}", patience):
        try:
            client.wait_for_workers(count, timeout=patience)
        except TimeoutError:
            raise NoWorkersError(
                f"waited {patience:.0f} s for {workers}: "
                f"{client.scheduler.address} has {len(client.nthreads())}"
            ) from None
    del work


def choose_patience(client: Client) -> float:
    """Return for how many seconds a cluster may be without workers: what the setting says.

    A minute if it is on this machine, else ten, if the setting says nothing.
    """
    from distributed import LocalCluster

    default = _WAIT_HERE if isinstance(client.cluster, LocalCluster) else _WAIT
    patience: float = parse_timedelta(dask.config.get(WAIT_SETTING, default))
    return patience


class WorkerWatch:
    """Gives up a cluster that for too long has no worker that can do the work.

    Parameters
    ----------
    client
        A client of the cluster.
    resources
        What each task asks for.
    """

    def __init__(self, client: Client, resources: Mapping[str, float]) -> None:
        self._client, self._resources = client, resources
        self.interval = _LOOKED_EVERY
        self._looked = time.monotonic()
        self._missed: float | None = None

    def look(self) -> None:
        """Look at the workers, unless the last look was a moment ago.

        Raises
        ------
        NoWorkersError
            If there were none for as long as ``choose_patience`` says.
        """
        now = time.monotonic()
        if now - self._looked < self.interval:
            return
        self._looked = now
        if _has_worker(self._client, self._resources):
            self._missed = None
            return
        patience = choose_patience(self._client)
        some = f"workers that declare {dict(self._resources)}" if self._resources else "workers"
        if self._missed is None:
            self._missed = now
            logger.warning("the cluster has no %s: waiting up to %.0f s for some", some, patience)
        elif now - self._missed >= patience:
            raise NoWorkersError(f"the cluster has had no {some} for {patience:.0f} s")


def _has_worker(client: Client, resources: Mapping[str, float]) -> bool:
    """Return whether a cluster has a worker that can do what asks for some resources."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any(
        all(worker.get("resources", {}).get(name, 0) >= resources[name] for name in resources)
        for worker in workers
    )


@contextmanager
def _announce(what: str, seconds: float) -> Iterator[None]:
    """Say what is waited for and how long, if it does not come at once."""
    line = "waiting up to %.0f s for %s"
    teller = threading.Timer(1, logger.warning, (line, seconds, what))
    teller.daemon = True
    teller.start()
    try:
        yield
    finally:
        teller.cancel()


def _hush_workers(client: Client) -> None:
    """Let workers log nothing of being closed amid their tasks: tracebacks that mean nothing."""

    def hush() -> None:
        with suppress(Exception):
            client.run(logging.disable)

    hushing = threading.Thread(target=hush, daemon=True)
    hushing.start()
    hushing.join(1)  # not every worker may answer


@contextmanager
def _keep_interrupts() -> Iterator[None]:
    """Keep SIGINT from processes that are started meanwhile, and by threads started meanwhile.

    A terminal sends it to all processes, as Jupyter does. Workers end when their cluster is
    closed, and threads of a cluster start them anew as they die.
    """
    resource_tracker.ensure_running()  # else the first worker's start does it, and lets SIGINT in
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _reach(connect: Callable[[], Client]) -> Client:
    """Connect to a scheduler, as soon as it is there."""
    end = time.monotonic() + _WAIT  # as Dask's own time-out it would hold for reconnecting too
    while True:
        try:
            return connect()
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"no scheduler was reached in {_WAIT} s: {error}") from error
            time.sleep(1)


def _wait_for_file(path: str) -> None:
    end = time.monotonic() + _WAIT  # Dask would wait for ever
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise TimeoutError(f"no scheduler has written {path} in {_WAIT} s")
        time.sleep(0.1)


def _choose_dashboard() -> str:
    """Return Dask's usual port, or any where a second cluster runs beside the first."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", 8787))
        except OSError:
            return ":0"
    return ":8787"


def _start_on_cores(n_workers: int | None, options: dict[str, Any]) -> LocalCluster:
    from distributed import LocalCluster

    # Processes of one thread each: the decoders then share no lock and no memory arena.
    defaults: dict[str, Any] = {"n_workers": n_workers or CPU_COUNT, "threads_per_worker": 1}
    # Dask 2026.8.0 looks at the first GPU that CUDA_VISIBLE_DEVICES names, and does not start if it
    # is not there.
    blind = {"distributed.diagnostics.nvml": False} if "CUDA_VISIBLE_DEVICES" in os.environ else {}
    if options.get("processes", True):
        defaults["config"] = {DEVICE_SETTING: "cpu"} | blind | options.pop("config", {})
    with dask.config.set(blind):
        return LocalCluster(**(defaults | options))


def _start_on_gpus(n_workers: int | None, share: float, options: dict[str, Any]) -> LocalCluster:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise ImportError(
            "a cluster on GPUs needs dask-cuda: pip install 'dask-imgread[gpu]'"
        ) from error
    return LocalCUDACluster(**choose_gpu_options(n_workers, share, options))


def choose_gpu_options(
    n_workers: int | None, share: float, options: dict[str, Any]
) -> dict[str, Any]:
    """Return the options for ``LocalCUDACluster`` (dask-cuda 26.10): one process for each GPU."""
    defaults = {
        "n_workers": n_workers,
        "threads_per_worker": max(1, int(1 / share)),
        "resources": {RESOURCE: 1},
    }
    return defaults | options


def check_resources(client: Client, asked: dict[str, float]) -> None:
    """Raise RuntimeError if a cluster has workers, and none declares what tasks will ask for.

    Dask would let the tasks wait for ever, in silence.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if not workers:  # an adaptive cluster starts them for the tasks
        return
    for name, amount in asked.items():
        declared = [worker.get("resources", {}).get(name, 0) for worker in workers]
        if max(declared, default=0) < amount:
            raise RuntimeError(
                f"tasks ask for {amount} of the resource {name!r}, but none of the "
                f"{len(declared)} workers declares as much (declared: {sorted(set(declared))}), so "
                f"that they would wait for ever. A cluster that fits: "
                f"start_cluster(num_gpus_per_worker={amount}), or workers started with "
                f'--resources "{name}=1"'
            )
