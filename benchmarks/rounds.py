"""Run contenders in processes of their own, in turn, and keep what each round took."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any


def serve(pipe: Connection, module: str, name: str, arguments: Sequence[Any]) -> None:
    """Prepare a contender in this process; run a round whenever asked."""
    import importlib

    run = getattr(importlib.import_module(module), name)(*arguments)
    run()  # what is loaded and built once is not what is measured
    pipe.send("ready")
    while pipe.recv() == "go":
        start = time.perf_counter()
        count = run()
        pipe.send(count / (time.perf_counter() - start))


class Contender:
    """A process that runs rounds of one contender."""

    def __init__(self, name: str, *arguments: Any, module: str = "benchmarks.contenders") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, module, name, arguments))
        self._process.start()

    def wait(self) -> None:
        """Wait until it is prepared: several prepare at the same time."""
        self._pipe.recv()

    def run(self) -> float:
        """Return how many a second one round went through."""
        self._pipe.send("go")
        rate: float = self._pipe.recv()
        return rate

    def close(self) -> None:
        """End the process."""
        self._pipe.send("stop")
        self._process.join()


def alternate(contenders: Sequence[Contender], rounds: int) -> list[list[float]]:
    """Run all contenders in turn, ``rounds`` times; return the rates of each."""
    for contender in contenders:
        contender.wait()
    rates: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, measured in zip(contenders, rates, strict=True):
            measured.append(contender.run())
    return rates


def compare(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios, round by round: a machine's drift falls out."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
