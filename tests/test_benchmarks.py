"""The benchmarks run; what they measure is not tested."""

import json
import multiprocessing
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import main
from benchmarks.duplicates import main as measure_duplicates
from benchmarks.gpu import main as measure_gpu
from benchmarks.gpu import read_gpu
from benchmarks.planted import main as measure_planted
from benchmarks.remote import main as measure_remote
from benchmarks.rounds import Contender, serve
from benchmarks.scale import main as scale
from tests.helpers.commands import ForkedProcess, fork_workers


@pytest.fixture(autouse=True)
def forked_contenders(monkeypatch, forked_workers):
    """Fork contenders, too, from one process that has imported the large packages."""
    forking = SimpleNamespace(Process=ForkedProcess, Pipe=multiprocessing.Pipe)
    monkeypatch.setattr(Contender, "context", forking)
    monkeypatch.setattr("benchmarks.rounds.serve", serve_forked)


def serve_forked(*arguments):
    """Serve a contender; its workers, and contenders of its own, are forked, too."""
    fork_workers()
    Contender.context = multiprocessing.get_context("forkserver")
    serve(*arguments)


@pytest.mark.slow
def test_a_tiny_run_of_every_measure(tmp_path, capfd):
    out = tmp_path / "table.json"
    arguments = ["--images", "12", "--long", "24", "--rounds", "1", "--kinds", "1"]
    assert main([*arguments, "--json", str(out)]) == 0
    table = json.loads(out.read_text())
    assert len(table["rows"]) == 23
    assert all(row["ours"] > 0 and row["other"] > 0 for row in table["rows"])
    printed = capfd.readouterr().out
    assert all(row["what"] in printed for row in table["rows"])
    assert "dask" in table["about"]["versions"]


def test_duplicates_among_few_rows(capfd):
    assert measure_duplicates(["2000"]) == 0
    assert capfd.readouterr().out.startswith("2,000 rows: 1")


def test_few_planted_copies(capfd):
    assert measure_planted(["--originals", "6"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("46 pictures, 6 of them originals")
    lines = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines()]
    exact = [line[4] for line in lines if {"sha256", "phash", "dhash"} & {*line}]
    assert exact == ["1.000"] * 17
    flags = {line[1]: line[3:-1] for line in lines if "whole" in line}
    assert flags["cut off"][2] == flags["bordered"][3] == flags["blank"][0] == "1.000"


def test_a_rehearsal_of_what_is_measured_on_a_gpu(tmp_path, capfd):
    out = tmp_path / "gpu.json"
    assert measure_gpu(["--rehearse", "--minutes", "0.01", "--out", str(out)]) == 0
    table = json.loads(out.read_text())
    assert len(table["rows"]) == 10
    assert all(row["ours"] > 0 and row["other"] > 0 for row in table["rows"])
    assert len(table["uses"]) == 12
    printed = capfd.readouterr()
    assert printed.out.strip() == out.with_suffix(".md").read_text().strip()
    assert "Traceback" not in printed.err


def test_what_nvml_does_not_answer_is_left_out(monkeypatch):
    import pynvml

    def refuse(*arguments):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    process = SimpleNamespace(pid=7, usedGpuMemory=3_000_000)
    for name, answer in {
        "nvmlDeviceGetJpgUtilization": lambda gpu: [42, 1000],
        "nvmlDeviceGetUtilizationRates": refuse,
        "nvmlDeviceGetPcieThroughput": lambda gpu, counter: 2000 * (1 + counter),
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [process],
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    link = {"to GPU MB/s": 4, "from GPU MB/s": 2}
    assert read_gpu("gpu", 7) == {"JPEG engines %": 42, "memory MB": 3} | link
    assert read_gpu("gpu", 8) == {"JPEG engines %": 42} | link


def test_a_tiny_run_at_scale(capfd):
    assert scale(["--tasks", "200", "--partitions", "200"]) == 0
    assert "ms a task" in capfd.readouterr().out


def test_a_tiny_run_of_far_stores(capfd):
    arguments = ["--images", "16", "--rounds", "1", "--stores", "1", "--gigabytes", "0.002"]
    assert measure_remote([*arguments, "--only", "40 kB, .tar,"]) == 0
    printed = capfd.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| 40 kB")]
    for reader in ("map_images", "read_metadata", "webdataset", "by hand"):
        (line,) = [line for line in lines if reader in line]
        _, _, rate, seconds, fetched, requests, _ = line.split("|")
        assert min(map(float, (rate, seconds, requests))) > 0
        assert float(fetched) >= 1
    (line,) = [line for line in lines if "1 % of the images" in line]
    assert 0 < float(line.split("|")[4]) < 1
    assert "peak memory of a shard of 0.002 GB" in printed
