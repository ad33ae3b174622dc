"""What GPUs there are, and the shares of them that readers hold."""

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

RESOURCE = "GPU"  # what workers declare, and tasks ask for a share of
DEVICE_SETTING = "imgread.device"  # of Dask's configuration: "cpu" on workers that use no GPU
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_FIRST_WITH_MANY_INSTANCES = 570  # driver, whose CUDA gives a process more than one MIG instance


class Driver(NamedTuple):
    """What NVML, the NVIDIA driver's library, says of this machine."""

    uuids: tuple[str, ...] = ()  # of the GPUs; of those that are divided, of their MIG instances
    version: int = 0  # the major one
    problem: str = ""  # why there are none


def count_gpus() -> int:
    """Return how many GPUs this process can use; 0 without a driver. Makes no CUDA context.

    NVML lists the machine's; ``CUDA_VISIBLE_DEVICES`` may leave fewer, and ``imgread.device`` in
    Dask's configuration, if it is ``"cpu"``, none.
    """
    if _is_told_to_use_none():
        return 0
    driver = ask_driver()
    chosen = choose_visible(driver.uuids, os.environ.get(_VISIBLE))
    if driver.version < _FIRST_WITH_MANY_INSTANCES and any(u.startswith("MIG") for u in chosen):
        return 1
    return len(chosen)


def choose_visible(uuids: Sequence[str], visible: str | None) -> list[str]:
    """Return those of a machine's GPUs that ``CUDA_VISIBLE_DEVICES`` leaves.

    As in NVIDIA's CUDA Programming Guide, "CUDA Environment Variables": indices, or UUIDs that may
    be cut short while only one begins so; what follows the first that is not there is not looked
    at. Not documented, but seen: numbers end at the first other character, the first entry says
    whether all are numbers, and a GPU that is named twice leaves none.

    Examples
    --------
    >>> choose_visible(["GPU-a7", "GPU-b2"], "1,0,2")
    ['GPU-b2', 'GPU-a7']
    >>> choose_visible(["GPU-a7", "GPU-b2"], "GPU-b,NoDevFiles,GPU-a")
    ['GPU-b2']
    """
    if visible is None:
        return list(uuids)
    chosen: list[str] = []
    by_number = None
    for entry in map(str.strip, visible.split(",")):
        number = re.match(r"[+-]?\d+", entry)
        if by_number is None:
            by_number = number is not None
        if number and by_number:
            found = [uuid for n, uuid in enumerate(uuids) if n == int(number[0])]
        else:
            named = not by_number and entry
            found = [uuid for uuid in uuids if named and uuid.startswith(entry)]
        if len(found) != 1:
            break
        if found[0] in chosen:
            return []
        chosen += found
    return chosen


@functools.cache
def ask_driver() -> Driver:
    """Ask NVML for the machine's GPUs. Warns, once, of a GPU that it does not see."""
    driver = _ask_driver()
    nodes = glob("/dev/nvidia[0-9]*") + glob("/dev/dxg")
    if nodes and not driver.uuids:
        logger.warning(
            "there is a GPU (%s), but %s: pictures are decoded on the CPU",
            nodes[0],
            driver.problem,
        )
    return driver


def _ask_driver() -> Driver:
    try:
        import pynvml
    except ImportError:
        return Driver(problem="the package nvidia-ml-py, which asks for it, is not installed")
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
    """Return a GPU's UUID, or, if it is divided, those of its MIG instances."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
    except nvml.NVMLError:  # one that belongs to others
        return []
    try:
        divided = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:  # GPUs before Ampere don't know the question
        divided = False
    if not divided:
        return [nvml.nvmlDeviceGetUUID(handle)]
    instances = []
    for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except nvml.NVMLError:  # places can be empty
            continue
        instances.append(nvml.nvmlDeviceGetUUID(instance))
    return instances


def _is_told_to_use_none() -> bool:
    return bool(dask.config.get(DEVICE_SETTING, "auto") == "cpu")


def choose_device(asked: str) -> str:
    """Return ``"gpu"`` or ``"cpu"``, for a reader that asks for one, or for ``"auto"``.

    Raises
    ------
    RuntimeError
        If a GPU is asked for, or declared by the worker, and there is none. What declares one
        and is to decode on the CPU all the same has ``imgread.device`` set to ``"cpu"``.
    """
    if asked == "cpu":
        return "cpu"
    if count_gpus():
        return "gpu"
    worker = find_worker()
    declared = worker is not None and RESOURCE in worker.state.total_resources
    if asked == "auto" and (not declared or _is_told_to_use_none()):
        return "cpu"
    reason = 'device="gpu"' if asked == "gpu" else f"this worker declares the resource {RESOURCE}"
    raise RuntimeError(f"{reason}, but no GPU was found: {explain_absence()}")


def explain_absence() -> str:
    """Say what was looked for when no GPU was found."""
    if _is_told_to_use_none():
        return f'{DEVICE_SETTING} is "cpu" in Dask\'s configuration'
    driver = ask_driver()
    seen = driver.problem or f"NVML finds {', '.join(driver.uuids)}"
    visible = os.environ.get(_VISIBLE)
    return f"{seen}; {_VISIBLE} is " + ("not set" if visible is None else repr(visible))


class _Shares:
    """The shares that the threads of one worker hold; together at most what it declares."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._shares: dict[int, float] = {}  # by thread
        self._readers: Counter[int] = Counter()

    def acquire(self, thread: int, share: float, capacity: float) -> None:
        with self._free:
            # A thread that reads inside of what it reads waits for nobody: it would be itself.
            if not self._readers[thread]:
                self._free.wait_for(
                    lambda: sum(self._shares.values()) + share <= capacity + 1e-9  # 3 times 1/3
                )
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
    """Hold a share of this worker's GPU, waiting until it is free.

    Dask's scheduler holds shares for tasks that carry a resource annotation, but bags lose
    annotations in optimization, and DataFrames ignore them. This holds on every path, and
    never waits where the scheduler already did. Without a GPU, declared or real, there is
    nothing to hold.

    Raises
    ------
    RuntimeError
        If the worker declares less than ``share``.
    """
    worker = find_worker()
    if worker is not None and RESOURCE in worker.state.total_resources:
        capacity = worker.state.total_resources[RESOURCE]
    elif count_gpus():
        capacity = 1.0  # the process's first GPU is what it decodes on
    else:
        yield
        return
    if share > capacity:
        raise RuntimeError(
            f"a reader asks for {share} of a GPU, but its worker declares only {capacity}: "
            "let it declare more, or ask for less with num_gpus_per_worker"
        )
    shares = _shares[worker.id if worker is not None else ""]
    thread = threading.get_ident()  # a generator may be closed by another one
    shares.acquire(thread, share, capacity)
    try:
        yield
    finally:
        shares.release(thread)
