"""Which GPUs a process can use: NVML's answers times CUDA_VISIBLE_DEVICES, without a GPU."""
# ruff: noqa: N802  # NVML's own names

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml
import pytest

from dask_imgread import FileGroupTask, ImageReaderStage, start_cluster
from dask_imgread.cluster import gpu
from dask_imgread.testing import make_shards

A, B, C, D = (f"GPU-{letter * 8}-0f2f-01ac-6b05-8da14d6e9005" for letter in "abcd")
M0, M1 = "MIG-11111111-0f2f-01ac-6b05-8da14d6e9005", "MIG-22222222-0f2f-01ac-6b05-8da14d6e9005"

TWO = {
    None: 2, "": 0, "-1": 0, "99": 0, "0": 1, "1,0": 2, " 0 , 1 ": 2, "+0,+1": 2,
    "NoDevFiles": 0, "all": 0, "none": 0, "0,foo,1": 1, "0,99,1": 1, "0,-1,1": 1, "0,-1,0": 1,
    "0,0": 0, "0,1,0": 0, "0,,1": 1, ",0": 0, "0,": 1, "1abc": 1, "0-1": 1,
    A: 1, "GPU-a": 1, f"{A},{B}": 2, "GPU-bb,GPU-aa": 2, C: 0, "GPU-": 0, f"{A},{C},{B}": 1,
    f"{A},GPU-aaaa": 0, f"0,{B}": 1, f"{A},1": 1, M0: 0,
}  # fmt: skip
DIVIDED = {  # by the driver: before 570 a process gets one instance at most
    None: (1, 3), "0": (1, 1), "0,1": (1, 2), M0: (1, 1), f"{M0},{M1}": (1, 2), M1[:8]: (1, 1),
    B: (1, 1), "": (0, 0), "NoDevFiles": (0, 0), f"{M0},{M0}": (0, 0), A: (0, 0),
}  # fmt: skip


@dataclass
class FakeNvml:
    """What NVML says of a machine; its exceptions and constants are the package's own."""

    gpus: list[list[str]]  # the UUID of each; of a divided one its instances', after its own
    version: str = "580.95.05"
    forbidden: list[int] = field(default_factory=list)
    failure: Exception | None = None

    def install(self, monkeypatch):
        for name in dir(self):
            if name.startswith("nvml"):
                monkeypatch.setattr(pynvml, name, getattr(self, name))
        gpu.query_driver.cache_clear()

    def nvmlInit(self):
        if self.failure:
            raise self.failure

    def nvmlShutdown(self):
        pass

    def nvmlSystemGetDriverVersion(self):
        return self.version

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, number):
        if number in self.forbidden:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return SimpleNamespace(uuid=self.gpus[number][0], instances=self.gpus[number][1:])

    def nvmlDeviceGetUUID(self, handle):
        return handle.uuid

    def nvmlDeviceGetMigMode(self, handle):
        if not handle.instances:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [pynvml.NVML_DEVICE_MIG_ENABLE] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, place):
        if place % 2 or place // 2 >= len(handle.instances):  # NVML's numbers have gaps
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return SimpleNamespace(uuid=handle.instances[place // 2])


@pytest.fixture(autouse=True)
def forget():
    yield
    gpu.query_driver.cache_clear()


def set_visible(monkeypatch, visible):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(("visible", "count"), TWO.items())
def test_two_gpus(monkeypatch, visible, count):
    FakeNvml([[A], [B]]).install(monkeypatch)
    set_visible(monkeypatch, visible)
    assert gpu.count_gpus() == count


@pytest.mark.parametrize(("visible", "counts"), DIVIDED.items())
def test_a_gpu_that_is_divided(monkeypatch, visible, counts):
    set_visible(monkeypatch, visible)
    for version, count in zip(("535.129.03", "570.86.10"), counts, strict=True):
        FakeNvml([[A, M0, M1], [B]], version).install(monkeypatch)
        assert gpu.count_gpus() == count


def test_gpus_of_others_are_not_counted(monkeypatch):
    set_visible(monkeypatch, None)
    FakeNvml([[A], [B], [C], [D]], forbidden=[1, 2]).install(monkeypatch)
    assert gpu.count_gpus() == 2


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "Library Not Found"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version mismatch"),
        (pynvml.NVML_ERROR_UNKNOWN, "Unknown"),
    ],
)
def test_a_driver_that_does_not_answer(monkeypatch, caplog, code, said):
    set_visible(monkeypatch, "0")
    monkeypatch.setattr(gpu, "glob", lambda pattern: ["/dev/nvidia3"] * ("nvidia" in pattern))
    FakeNvml([[A]], failure=pynvml.NVMLError(code)).install(monkeypatch)
    with caplog.at_level(logging.WARNING, "dask_imgread"):
        assert gpu.count_gpus() == gpu.count_gpus() == 0
    (record,) = caplog.records  # once
    assert record.getMessage().startswith("there is a GPU (/dev/nvidia3), but NVML")
    assert said in record.getMessage()
    with pytest.raises(RuntimeError, match=rf"{said}.*CUDA_VISIBLE_DEVICES is '0'"):
        start_cluster(device="gpu")


def test_nothing_is_said_where_there_is_none(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "glob", lambda pattern: [])
    FakeNvml([], failure=pynvml.NVMLError(12)).install(monkeypatch)
    assert gpu.count_gpus() == 0
    assert not caplog.records


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu.query_driver.cache_clear()
    with pytest.raises(RuntimeError, match=r'device="gpu".*nvidia-ml-py.*not installed'):
        ImageReaderStage(device="gpu").process(FileGroupTask(data=make_shards(tmp_path)))


def test_a_worker_that_declares_a_gpu_and_has_none(tmp_path):
    """It says so, where it would have decoded on the CPU in silence."""
    from distributed import Client

    task = FileGroupTask(data=make_shards(tmp_path, shards=1, images_per_shard=2))
    options = {"n_workers": 1, "dashboard_address": ":0", "resources": {"GPU": 1}}
    with Client(processes=False, **options) as client:
        future = client.submit(ImageReaderStage(), task)
        message = r"declares the resource GPU, but no GPU was found: .*CUDA_VISIBLE_DEVICES is"
        with pytest.raises(RuntimeError, match=message):
            future.result(timeout=30)
        future = client.submit(ImageReaderStage(device="cpu"), task)
        assert len(future.result(timeout=30)) == 1


def test_workers_that_are_started_for_the_cpu_stay_there(imgread_gpu_client, tmp_path):
    task = FileGroupTask(data=make_shards(tmp_path, shards=1, images_per_shard=2))
    assert len(imgread_gpu_client.submit(ImageReaderStage(), task).result(timeout=30)) == 1
    with pytest.raises(RuntimeError, match=r'imgread\.device is "cpu" in Dask'):
        imgread_gpu_client.submit(ImageReaderStage(device="gpu"), task).result(timeout=30)


# As Dask's workers see it, with a module in front of the real one.
NVML = """
class NVMLError(Exception): pass
NVMLError_LibraryNotFound = NVMLError_DriverNotLoaded = NVMLError_Unknown = KeyError
NVML_DEVICE_MIG_ENABLE = 1
nvmlInit = nvmlShutdown = lambda: None
nvmlSystemGetDriverVersion = lambda: "580.95.05"
nvmlDeviceGetCount = lambda: 2
nvmlDeviceGetHandleByIndex = lambda n: [0, 1][n]
nvmlDeviceGetUUID = lambda handle: ["GPU-a", "GPU-b"][handle]
def nvmlDeviceGetMigMode(handle): raise NVMLError
def __getattr__(name):
    raise AttributeError(name)
"""
START = """
import json, sys
from dask_imgread import start_cluster
from dask_imgread.cluster.gpu import count_gpus
if __name__ == "__main__":
    with start_cluster(device=sys.argv[1], n_workers=1, verbose=False) as cluster:
        with cluster.get_client() as client:
            print(json.dumps([count_gpus(), *client.run(count_gpus).values()]))
"""


@pytest.mark.parametrize(
    ("visible", "device", "seen"),
    [("-1", "auto", [0, 0]), ("NoDevFiles", "auto", [0, 0]), ("1", "cpu", [1, 0])],
)
def test_a_cluster_starts_where_gpus_are_hidden(tmp_path, visible, device, seen):
    """Dask itself does not, once NVML answers."""
    (tmp_path / "pynvml.py").write_text(NVML)
    (tmp_path / "start.py").write_text(START)
    done = subprocess.run(
        [sys.executable, "start.py", device],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == seen
