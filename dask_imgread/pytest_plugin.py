"""Fixtures for tests of image pipelines; pytest loads them if dask_imgread is installed.

``make_shards``
    ``dask_imgread.testing.make_shards``; by default it writes to a new folder in ``tmp_path``.
``imgread_cluster``, ``imgread_client``
    Two CPU workers, each a process with one thread; all tests of a session share the cluster.
``imgread_gpu_cluster``, ``imgread_gpu_client``
    Two workers with eight threads, each declaring ``GPU: 1`` as a Dask-CUDA worker does. They
    decode on the CPU, but GPU shares are enforced all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from distributed import Client, LocalCluster


@pytest.fixture(name="make_shards")
def make_shards_fixture(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that writes shards of drawn pictures and returns their paths."""
    from dask_imgread.testing import make_shards

    folders = (tmp_path / f"shards{number or ''}" for number in itertools.count())

    def make(folder: Path | str | None = None, **kwargs: Any) -> list[str]:
        return make_shards(folder or next(folders), **kwargs)

    return make


def _start(**kwargs: Any) -> LocalCluster:
    from dask_imgread import start_cluster

    return start_cluster(device="cpu", n_workers=2, verbose=False, dashboard_address=":0", **kwargs)


@pytest.fixture(scope="session")
def imgread_cluster() -> Iterator[LocalCluster]:
    """Start two CPU workers, each a process with one thread."""
    with _start() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def imgread_gpu_cluster() -> Iterator[LocalCluster]:
    """Start two workers with eight threads, each declaring ``GPU: 1``."""
    with _start(threads_per_worker=8, resources={"GPU": 1}) as cluster:
        yield cluster


@pytest.fixture
def imgread_client(imgread_cluster: LocalCluster) -> Iterator[Client]:
    """Connect to ``imgread_cluster``."""
    with imgread_cluster.get_client() as client:
        yield client


@pytest.fixture
def imgread_gpu_client(imgread_gpu_cluster: LocalCluster) -> Iterator[Client]:
    """Connect to ``imgread_gpu_cluster``."""
    with imgread_gpu_cluster.get_client() as client:
        yield client
