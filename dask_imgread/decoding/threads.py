"""The threads that decode or copy the images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def map_in_threads(
    threads: int, function: Callable[..., Result], *arguments: Iterable[Any]
) -> list[Result]:
    """Return the results of a function, in order; one thread is the caller's own."""
    if threads < 2:
        return list(map(function, *arguments))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, *arguments))
