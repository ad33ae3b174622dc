"""Find GPUs, and limit the shares of them that readers hold."""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from typing import Any, NamedTuple

import dask

from dask_imgread.cluster.worker import find_worker

logger = logging.getLogger("dask_imgread")

RESOURCE = "GPU"  # the Dask resource that workers declare and tasks request
DEVICE_SETTING = "imgread.device"  # in Dask's configuration: "cpu" for workers without GPUs
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_FIRST_WITH_SEVERAL_INSTANCES = 570  # driver version; older ones give a process one MIG instance


class Driver(NamedTuple):
    """What NVML, the NVIDIA driver's library, reports of this machine."""

    uuids: tuple[str, ...] = ()  # of the GPUs, or of their MIG instances
    version: int = 0  # major
    problem: str = ""  # why there are no GPUs


def count_gpus() -> int:
    """Return how many GPUs this process can use; 0 without a driver. Creates no CUDA context.

    These are the GPUs that NVML lists and ``CUDA_VISIBLE_DEVICES`` leaves visible; none if
    ``imgread.device`` is ``"cpu"`` in Dask's configuration.
    """
    if _is_gpu_disabled():
        return 0
    driver = query_driver()
    chosen = select_visible(driver.uuids, os.environ.get(_VISIBLE))
    if driver.version < _FIRST_WITH_SEVERAL_INSTANCES and any(u.startswith("MIG") for u in chosen):
        return 1
    return len(chosen)


def select_visible(uuids: Sequence[str], visible: str | None) -> list[str]:
    """Return the GPUs of a machine that ``CUDA_VISIBLE_DEVICES`` leaves visible.

    As in NVIDIA's CUDA Programming Guide, "CUDA Environment Variables": entries are indices, or
    UUIDs, which may be abbreviated to a unique prefix; all from the first invalid one on are
    ignored. Observed, but not documented: an index ends at the first character that is no digit,
    the first entry decides whether all are indices, and no GPU is visible if one is named twice.

    Examples
    --------
    >>> select_visible(["GPU-a7", "GPU-b2"], "1,0,2")
    ['GPU-b2', 'GPU-a7']
    >>> select_visible(["GPU-a7", "GPU-b2"], "GPU-b,NoDevFiles,GPU-a")
    ['GPU-b2']
    """
    if visible is None:
        return list(uuids)
    chosen: list[str] = []
    by_index = None
    for entry in map(str.strip, visible.split(",")):
        number = re.match(r"[+-]?\d+", entry)
        if by_index is None:
            by_index = number is not None
        if number and by_index:
            found = [uuid for n, uuid in enumerate(uuids) if n == int(number[0])]
        else:
            named = not by_index and entry
            found = [uuid for uuid in uuids if named and uuid.startswith(entry)]
        if len(found) != 1:
            break
        if found[0] in chosen:
            return []
        chosen += found
    return chosen


@functools.cache
def query_driver() -> Driver:
    """Query NVML for the machine's GPUs. Warns, once, if there are device nodes but no GPU."""
    driver = _query_nvml()
    nodes = glob("/dev/nvidia[0-9]*") + glob("/dev/dxg")
    if nodes and not driver.uuids:
        logger.warning(
            "there is a GPU (%s), but %s: images are decoded on the CPU",
            nodes[0],
            driver.problem,
        )
    return driver


def _query_nvml() -> Driver:
    try:
        import pynvml
    except ImportError:
        return Driver(problem="the package nvidia-ml-py, which finds it, is not installed")
    try:
        pynvml.nvmlInit()
        try:
            version = int(pynvml.nvmlSystemGetDriverVersion().partition(".")[0])
            numbers = range(pynvml.nvmlDeviceGetCount())
            uuids = [uuid for number in numbers for uuid in _list_uuids(pynvml, number)]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return Driver(problem=f"NVML, the NVIDIA driver's library, says: {error}")
    return Driver(tuple(uuids), version, "" if uuids else "NVML finds none")


def _list_uuids(nvml: Any, number: int) -> list[str]:
    """Return a GPU's UUID, or, in MIG mode, those of its MIG instances."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
    except nvml.NVMLError:  # e.g. no permission: the GPU belongs to others
        return []
    try:
        mig_enabled = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:  # not supported by GPUs before Ampere
        mig_enabled = False
    if not mig_enabled:
        return [nvml.nvmlDeviceGetUUID(handle)]
    instances = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError:  # not all of them exist
            continue
        instances.append(nvml.nvmlDeviceGetUUID(instance))
    return instances


def _is_gpu_disabled() -> bool:
    return bool(dask.config.get(DEVICE_SETTING, "auto") == "cpu")


def choose_device(requested: str) -> str:
    """Return ``"gpu"`` or ``"cpu"``, given what a reader requests: either of them, or ``"auto"``.

    Raises
    ------
    RuntimeError
        If a GPU is requested, or declared by the worker, but there is none. For a worker that
        declares one and should still decode on the CPU, set ``imgread.device`` to ``"cpu"``.
    """
    if requested == "cpu":
        return "cpu"
    if count_gpus():
        return "gpu"
    worker = find_worker()
    declared = worker is not None and RESOURCE in worker.state.total_resources
    if requested == "auto" and (not declared or _is_gpu_disabled()):
        return "cpu"
    reason = (
        'device="gpu"' if requested == "gpu" else f"this worker declares the resource {RESOURCE}"
    )
    raise RuntimeError(f"{reason}, but no GPU was found: {describe_missing_gpu()}")


def describe_missing_gpu() -> str:
    """Return why no GPU was found, for an error message."""
    if _is_gpu_disabled():
        return f'{DEVICE_SETTING} is "cpu" in Dask\'s configuration'
    driver = query_driver()
    seen = driver.problem or f"NVML finds {', '.join(driver.uuids)}"
    visible = os.environ.get(_VISIBLE)
    return f"{seen}; {_VISIBLE} is " + ("not set" if visible is None else repr(visible))


class _Shares:
    """The GPU shares held by the threads of one worker; their sum is at most its capacity."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._shares: dict[int, float] = {}  # by thread
        self._readers: Counter[int] = Counter()

    def acquire(self, thread: int, share: float, capacity: float) -> None:
        with self._free:
            # A reader within a reader uses its thread's share: waiting for another would deadlock.
            if not self._readers[thread]:
                limit = capacity + 1e-9  # so that three times 1/3 fit
                self._free.wait_for(lambda: sum(self._shares.values()) + share <= limit)
                self._shares[thread] = share
            self._readers[thread] += 1

    def release(self, thread: int) -> None:
        with self._free:
            self._readers[thread] -= 1
            if not self._readers[thread]:
                del self._readers[thread], self._shares[thread]
                self._free.notify_all()


_shares: defaultdict[str, _Shares] = defaultdict(_Shares)  # by worker


@contextmanager
def hold_share(share: float) -> Iterator[None]:
    """Wait for a share of this worker's GPU, and hold it in the ``with`` block.

    Dask's scheduler enforces shares only for tasks with a resource annotation, but bags lose
    annotations in optimization, and DataFrames ignore them. This enforces them always, and does
    not wait where the scheduler already did. It does nothing if there is no GPU, neither declared
    nor real.

    Raises
    ------
    RuntimeError
        If the worker declares less than ``share``.
    """
    worker = find_worker()
    if worker is not None and RESOURCE in worker.state.total_resources:
        capacity = worker.state.total_resources[RESOURCE]
    elif count_gpus():
        capacity = 1.0  # only the process's first GPU is used
    else:
        yield
        return
    if share > capacity:
        raise RuntimeError(
            f"a reader asks for {share} of a GPU, but its worker declares only {capacity}: "
            "let it declare more, or ask for less with num_gpus_per_worker"
        )
    shares = _shares[worker.id if worker is not None else ""]
    thread = threading.get_ident()  # kept: a generator may be closed by another thread
    shares.acquire(thread, share, capacity)
    try:
        yield
    finally:
        shares.release(thread)
