"""Start a local Dask cluster that fits the readers and the machine."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import dask
from dask.system import CPU_COUNT

from dask_imgread.gpu import DEVICE_SETTING, RESOURCE, count_gpus, explain_absence

if TYPE_CHECKING:
    from distributed import Client, LocalCluster


logger = logging.getLogger("dask_imgread")

_WAIT = 600  # seconds, for a scheduler and for workers


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
    """Connect to a scheduler that is there, or else start a cluster; close in the end.

    Parameters
    ----------
    scheduler, scheduler_file
        The address of a scheduler, or the file that it has written; both may come to be
        within ten minutes.
    n_workers
        Workers to wait for, as long; or to start.
    **options
        Options of ``start_cluster``.

    Raises
    ------
    TimeoutError
        If there is no scheduler or too few workers after ten minutes.
    """
    from distributed import Client

    if n_workers is not None and n_workers < 1:
        raise ValueError(f"n_workers must be at least 1, not {n_workers}")
    if scheduler is None and scheduler_file is None:
        with start_cluster(n_workers=n_workers, **options) as cluster, Client(cluster) as client:
            yield client
        return
    logger.info("looking for the scheduler %s", scheduler or scheduler_file)
    if scheduler_file is not None:
        _wait_for_file(scheduler_file)
    with _reach(partial(Client, scheduler, scheduler_file=scheduler_file)) as client:
        wanted = n_workers or 1
        logger.info("waiting for %d workers of %s", wanted, client.scheduler.address)
        client.wait_for_workers(wanted, timeout=_WAIT)
        yield client


def _reach(connect: Callable[[], Client]) -> Client:
    """Connect to a scheduler, as soon as it is there."""
    end = time.monotonic() + _WAIT  # as Dask's own time-out it would hold for reconnecting too
    while True:
        try:
            return connect()
        except OSError:
            if time.monotonic() > end:
                raise
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
    """Raise RuntimeError if no worker of a cluster declares what tasks will ask for.

    Dask would let the tasks wait for ever, in silence.
    """
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
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
