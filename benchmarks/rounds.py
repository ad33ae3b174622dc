"""Run contenders in turn, each in its own process, and record the rate of each round."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any


def serve(
    pipe: Connection, module: str, name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Make a contender in this process; run a round for each request."""
    import importlib

    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as in Dask's workers
    contender = getattr(importlib.import_module(module), name)(*args, **kwargs)
    prepare = getattr(contender, "prepare", lambda: None)  # what is not measured
    prepare()
    contender.run()  # a warm-up: what is loaded and built once is not measured
    pipe.send("ready")
    with suppress(EOFError):  # the parent process is gone
        while pipe.recv() == "go":
            prepare()
            start, cpu = time.perf_counter(), time.process_time()
            count = contender.run()
            pipe.send((count / (time.perf_counter() - start), (time.process_time() - cpu) / count))
    if hasattr(contender, "close"):
        contender.close()


class Contender:
    """A process that runs rounds of one contender."""

    context: BaseContext = multiprocessing.get_context("spawn")

    def __init__(
        self, name: str, *args: Any, module: str = "benchmarks.contenders", **kwargs: Any
    ) -> None:
        self._pipe, theirs = self.context.Pipe()
        self._process = self.context.Process(
            target=serve, args=(theirs, module, name, args, kwargs)
        )
        self._process.start()
        self.pid = self._process.pid
        self.cpu_seconds: list[float] = []  # for each image, of all threads, round by round

    def wait(self) -> None:
        """Wait until the contender is made; several are made at the same time."""
        self._pipe.recv()

    def run(self) -> float:
        """Run one round; return images, or members, per second."""
        self._pipe.send("go")
        rate, cpu = self._pipe.recv()
        self.cpu_seconds.append(cpu)
        return float(rate)

    def close(self) -> None:
        """End the process."""
        self._pipe.send("stop")
        self._process.join()


def alternate(
    contenders: Sequence[Contender], rounds: int, seconds: float = math.inf
) -> list[list[float]]:
    """Run all contenders in turn, ``rounds`` times; return the rates of each.

    After two rounds no round begins later than ``seconds`` after the start.
    """
    rates: list[list[float]] = [[] for _ in contenders]
    ends = time.monotonic() + seconds
    for number in range(rounds):
        if number >= 2 and time.monotonic() > ends:
            break
        for contender, measured in zip(contenders, rates, strict=True):
            measured.append(contender.run())
    return rates


def compare(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios round by round, which cancels the machine's drift."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
