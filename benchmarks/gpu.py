"""Test and measure on a GPU, in one command: ``python -m benchmarks.gpu --out FILE``.

Runs the tests marked ``gpu``; measures rates in alternating rounds, with NVML's readings of the
GPU meanwhile; and sweeps the decoder's options. Writes JSON to FILE, and the tables as Markdown
beside it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contenders import choose_batch
from benchmarks.photographs import (
    CORES,
    break_shards,
    make_large_shard,
    make_photo_shards,
    read_all,
    repeat_shards,
)
from benchmarks.rounds import Contender, alternate
from benchmarks.table import Pair, Row, describe_machine, format_table, make_rows, write_json

_MOST_ROUNDS = 15
_NEEDED = 4 << 30  # bytes: the pictures, and room to spare
# Fractions of the time that is left after the tests.
_SHARES = {"40 kB": 0.45, "2 MB": 0.35, "sweep": 0.2}
_TEST_SHARE = 0.4  # of all the time, at most

_PAIRS: tuple[Pair, ...] = (
    ("stream, 1 reader : floor with the same copy", "stream", "floor, copy in graph", 0),
    ("stream, 2 readers : floor with the same copy", "stream 2", "floor, copy in graph", 0),
    ("stream, 4 readers : floor with the same copy", "stream 4", "floor, copy in graph", 0.9),
    ("stream on the device, 4 readers : floor", "device 4", "floor", 0.95),
    ("stream, 4 readers : as NeMo Curator, 1 process", "stream 4", "Curator", 1.0),
    ("stream, 4 processes : as NeMo Curator, 4 processes", "stream x 4", "Curator x 4", 1.0),
    ("stream, 1 % broken : none, 4 readers", "broken", "stream 4", 0.95),
    ("floor, copy in graph : as_cpu()", "floor, copy in graph", "floor, as_cpu()", 0),
    ("external source : webdataset reader", "external", "floor", 0),
    ("stream, 2 processes of 2 readers : 4 readers", "stream 2 x 2", "stream 4", 0),
    ("resize=224, 4 readers : floor", "resize", "floor", 0),
)
_SWEEP: dict[str, dict[str, Any]] = {
    "as DALI has it": {},
    **{f"hw_decoder_load={x}": {"hw_decoder_load": x} for x in (0.0, 0.5, 0.8, 0.9, 1.0)},
    **{f"batch={n}": {"batch": n} for n in (25, 50, 200, 400)},
    "jpeg_fancy_upsampling": {"jpeg_fancy_upsampling": True},
    "affine=False": {"affine": False},
}


class Meter:
    """Samples NVML's readings of the first GPU, in a thread, while each contender runs."""

    def __init__(self) -> None:
        self.readings: dict[str, list[dict[str, float]]] = {}
        self._running = ("", -1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def watch(self, name: str, pid: int) -> Iterator[None]:
        """Assign the readings taken meanwhile to a contender and its process."""
        self._running = name, pid
        yield
        self._running = "", -1

    def summarize(self, name: str) -> dict[str, float]:
        """Return the median of each reading."""
        readings = self.readings.get(name, [])
        keys = {key for reading in readings for key in reading}
        return {
            key: statistics.median(r[key] for r in readings if key in r) for key in sorted(keys)
        }

    def _ask(self) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError:
            return
        while not self._ended.wait(0.05):
            name, pid = self._running
            if name:
                self.readings.setdefault(name, []).append(read_gpu(gpu, pid))


def read_gpu(gpu: Any, pid: int) -> dict[str, float]:
    """Read the load of a GPU, and how much of its memory a process uses, from NVML.

    Readings that the GPU does not support are left out.
    """
    import pynvml

    def find_memory() -> float:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        return float({process.pid: process.usedGpuMemory for process in processes}[pid]) / 1e6

    questions: dict[str, Callable[[], float]] = {
        "JPEG engines %": lambda: pynvml.nvmlDeviceGetJpgUtilization(gpu)[0],
        "SM %": lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "to GPU MB/s": lambda: pynvml.nvmlDeviceGetPcieThroughput(gpu, 1) / 1e3,
        "from GPU MB/s": lambda: pynvml.nvmlDeviceGetPcieThroughput(gpu, 0) / 1e3,
        "memory MB": find_memory,
    }
    answers = {}
    for name, ask in questions.items():
        with suppress(pynvml.NVMLError, KeyError, TypeError):
            answers[name] = float(ask())
    return answers


class GpuContender(Contender):
    """A contender that a meter watches."""

    def __init__(self, meter: Meter, label: str, name: str, *args: Any, **kwargs: Any) -> None:
        module = "benchmarks." + ("contenders" if name == "Curator" else "gpu_contenders")
        super().__init__(name, *args, module=module, **kwargs)
        self._meter, self._label = meter, label

    def run(self) -> float:
        """Run one round; return images per second."""
        with self._meter.watch(self._label, self.pid or -1):
            return super().run()


def main(argv: Sequence[str] | None = None) -> int:
    """Test, measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="time limit for everything")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="JSON; Markdown goes beside it"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU and without tests, a few pictures: the figures mean nothing",
    )
    args = parser.parse_args(argv)
    ends = time.monotonic() + 60 * args.minutes
    report, out = Report(), Path(args.out)
    if not args.rehearse:
        report.tests = run_tests(60 * args.minutes * _TEST_SHARE)
        write_report(out, report)
    free = shutil.disk_usage("/dev/shm").free
    place = "/dev/shm" if free > _NEEDED else None  # it is small in containers
    with tempfile.TemporaryDirectory(dir=place) as folder, Meter() as meter:
        for step in measure(Path(folder), meter, ends, report, rehearse=args.rehearse):
            print(f"{step} is done", file=sys.stderr)
            write_report(out, report)
    print(out.with_suffix(".md").read_text())
    return 0


def run_tests(seconds: float) -> str:
    """Run the tests marked ``gpu``; return the end of their output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--override-ini=addopts=",  # in one process: the GPU is one, too
        "-m",
        "gpu",
        "-q",
        "--no-header",
        "tests/integration/test_gpu.py",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode()  # bytes, in spite of text=True
        return f"not finished in {seconds:.0f} s\n{printed}"[-4000:]
    return done.stdout[-4000:]


@dataclass
class Report:
    """What has been measured so far."""

    tests: str = "not run"
    rows: list[Row] = field(default_factory=list)
    uses: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # resources used by each contender
    sweep: dict[str, float] = field(default_factory=dict)  # images per second


def measure(
    folder: Path, meter: Meter, ends: float, report: Report, *, rehearse: bool
) -> Iterator[str]:
    """Measure pictures of both sizes, then the decoder's options on the small ones."""
    device = "cpu" if rehearse else "gpu"
    pictures = write_pictures(folder, rehearse=rehearse)
    left = ends - time.monotonic()
    for size, (shards, broken) in pictures.items():
        contenders = list_contenders(shards, broken, device)
        if rehearse:  # without those of four processes, which rehearse nothing more
            contenders = {name: c for name, c in contenders.items() if not name.endswith("x 4")}
        rates, uses = race(contenders, meter, f"{size}: ", _SHARES[size] * left)
        pairs = [
            (f"{size}, {what}", ours, other, target)
            for what, ours, other, target in _PAIRS
            if ours in rates and other in rates
        ]
        report.rows.extend(make_rows(rates, pairs))
        report.uses.update(uses)
        yield size
    small, _ = pictures["40 kB"]
    sweep = {name: ("Dali", (small, device, "external"), kwargs) for name, kwargs in _SWEEP.items()}
    if rehearse:
        sweep = dict(list(sweep.items())[:2])
    rates, _ = race(sweep, meter, "sweep: ", _SHARES["sweep"] * left)
    report.sweep.update({name: statistics.median(measured) for name, measured in rates.items()})
    yield "sweep"


def write_pictures(folder: Path, *, rehearse: bool) -> dict[str, tuple[list[str], list[str]]]:
    """Write shards of two picture sizes, and copies with one picture in a hundred broken."""
    images, times = (16, 4) if rehearse else (1000, 8)
    sources = {"40 kB": make_photo_shards(folder / "photos", images, shards=1)}
    if not rehearse:
        sources["2 MB"] = make_large_shard(folder / "large", (3300, 2500), images=32)
    pictures = {}
    for size, source in sources.items():
        shards = repeat_shards(folder / f"whole {size}", source, times)
        pictures[size] = shards, break_shards(folder / f"broken {size}", shards, 0.01)
    return pictures


Spec = tuple[str, tuple[Any, ...], dict[str, Any]]  # a contender's class and its arguments


def list_contenders(shards: list[str], broken: list[str], device: str) -> dict[str, Spec]:
    """Return the contenders by label."""
    batch = choose_batch(len(read_all(shards[:1])))
    floor = {"batch": batch}
    ours = "benchmarks.gpu_contenders", "Stream"
    curators = "benchmarks.contenders", "Curator"
    return {
        "floor": ("Dali", (shards, device), floor),
        "floor, copy in graph": ("Dali", (shards, device), floor | {"copy": "graph"}),
        "floor, as_cpu()": ("Dali", (shards, device), floor | {"copy": "as_cpu"}),
        "external": ("Dali", (shards, device, "external"), floor),
        "stream": ("Stream", (shards, device, 1), {}),
        "stream 2": ("Stream", (shards, device, 2), {}),
        "stream 4": ("Stream", (shards, device, 4), {}),
        "device 4": ("Stream", (shards, device, 4), {"output": "device"}),
        "resize": ("Stream", (shards, device, 4), {"resize": 224}),
        "broken": ("Stream", (broken, device, 4), {}),
        "stream 2 x 2": ("Processes", (2, *ours, shards, device, 2), {}),
        "stream x 4": ("Processes", (4, *ours, shards, device, 1), {}),
        "Curator": ("Curator", (shards, CORES, device), {}),
        "Curator x 4": ("Processes", (4, *curators, shards, CORES, device), {}),
    }


def race(
    contenders: Mapping[str, Spec], meter: Meter, prefix: str, seconds: float
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Run contenders in turn; return the rates of each, and the resources that it uses.

    A contender that fails is left out.
    """
    ends = time.monotonic() + seconds
    running = {
        label: GpuContender(meter, prefix + label, name, *args, **kwargs)
        for label, (name, args, kwargs) in contenders.items()
    }
    for label, contender in list(running.items()):
        try:
            contender.wait()
        except EOFError:
            print(f"{prefix}{label} has failed", file=sys.stderr)
            del running[label]
    rates = alternate([*running.values()], _MOST_ROUNDS, ends - time.monotonic())
    uses = {}
    for (label, contender), measured in zip(running.items(), rates, strict=True):
        use = uses[prefix + label] = {"images/s": statistics.median(measured)}
        if contenders[label][0] != "Processes":  # whose CPU time is that of its children
            use["CPU ms an image"] = 1e3 * statistics.median(contender.cpu_seconds)
        use |= meter.summarize(prefix + label)
        contender.close()
    return dict(zip(running, rates, strict=True)), uses


def write_report(path: Path, report: Report) -> None:
    """Write JSON to ``path``, and Markdown beside it."""
    about = describe_machine()
    write_json(path, report.rows, about, tests=report.tests, uses=report.uses, sweep=report.sweep)
    columns = list(dict.fromkeys(key for use in report.uses.values() for key in use))
    lines = [format_table(report.rows, about), "", "| what | " + " | ".join(columns) + " |"]
    lines += ["| --- |" + " ---: |" * len(columns)]
    for name, use in report.uses.items():
        cells = [f"{use[key]:,.1f}" if key in use else "" for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| decoder of 40 kB pictures | images/s |", "| --- | ---: |"]
    lines += [f"| {name} | {rate:,.0f} |" for name, rate in report.sweep.items()]
    lines += ["", "```", report.tests.strip(), "```", ""]
    path.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
