"""Run contenders in processes of their own, in turn, and keep what each round took."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any


def serve(
    pipe: Connection, module: str, name: str, arguments: Sequence[Any], options: dict[str, Any]
) -> None:
    """Prepare a contender in this process; run a round whenever asked."""
    import importlib

    run = getattr(importlib.import_module(module), name)(*arguments, **options)
    run()  # what is loaded and built once is not what is measured
    pipe.send("ready")
    with suppress(EOFError):  # who asked is gone
        while pipe.recv() == "go":
            start, cpu = time.perf_counter(), time.process_time()
            count = run()
            pipe.send((count / (time.perf_counter() - start), (time.process_time() - cpu) / count))


class Contender:
    """A process that runs rounds of one contender."""

    context: BaseContext = multiprocessing.get_context("spawn")

    def __init__(
        self, name: str, *arguments: Any, module: str = "benchmarks.contenders", **options: Any
    ) -> None:
        self._pipe, theirs = self.context.Pipe()
        given = theirs, module, name, arguments, options
        self._process = self.context.Process(target=serve, args=given)
        self._process.start()
        self.pid = self._process.pid
        self.cpu_seconds: list[float] = []  # an image, of all threads, round by round

    def wait(self) -> None:
        """Wait until it is prepared: several prepare at the same time."""
        self._pipe.recv()

    def run(self) -> float:
        """Return how many a second one round went through."""
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

    Two rounds at least; of the others those that begin within so many seconds.
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
    """Return the median of the ratios, round by round: a machine's drift falls out."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
