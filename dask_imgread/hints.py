"""Hints in errors: what a wrong name or value was probably meant to be."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)

_SYNONYMS = {  # what others call it
    "batch_size": "dali_batch_size",
    "size": "resize",
    "image_size": "resize",
    "interpolation": "resample",
    "filter": "resample",
    "center": "crop",
    "centre": "crop",
    "cover": "crop",
    "stretch": "exact",
    "cuda": "gpu",
}
_WORKERS = (
    "Dask's workers read in parallel: start_cluster(n_workers=...); num_threads is for one of them"
)
_NOTHING: Mapping[str, str] = MappingProxyType({})
_ELSEWHERE = {
    "num_workers": _WORKERS,
    "n_workers": _WORKERS,
    "workers": _WORKERS,
    "shuffle": "images come in the shards' order: write_shards(..., shuffle=SEED) changes it",
    "storage_options": "they go with the paths: partition_shards(paths, storage_options=...)",
    "transform": "map_images(fn, ...) applies a function to batches",
}


def suggest(given: str, known: Collection[str], elsewhere: Mapping[str, str] = _NOTHING) -> str:
    """Return the end of an error's message: what was probably meant; empty if nothing is near.

    ``elsewhere`` says of names that are not known what to do instead.

    >>> suggest("batch_size", ["dali_batch_size", "device"])
    "; did you mean 'dali_batch_size'?"
    >>> suggest("resise", ["resize"]), suggest("colour", ["resize"])
    ("; did you mean 'resize'?", '')
    """
    name = _SYNONYMS.get(given, given)
    advice = {**_ELSEWHERE, **elsewhere}.get(name)
    if name not in known and advice is not None:
        return f"; {advice}"
    near = find_near(given, known)
    return "" if near is None else f"; did you mean {near!r}?"


def find_near(given: str, known: Collection[str]) -> str | None:
    """Return which of the known names was probably meant, if one is near."""
    name = _SYNONYMS.get(given, given)
    return name if name in known else next(iter(get_close_matches(given, known, 1)), None)


def check_keywords(
    function: str,
    given: Collection[str],
    known: Collection[str],
    elsewhere: Mapping[str, str] = _NOTHING,
) -> None:
    """Raise a TypeError as Python's own, with a hint, for a keyword that is not known."""
    for name in given:
        if name not in known:
            hint = suggest(name, known, elsewhere)
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def explain_keywords(cls: _Class) -> _Class:
    """Decorate a class: the error for a keyword that it doesn't take has a hint."""
    make: Any = cls.__init__  # type: ignore[misc]
    known = inspect.signature(make).parameters

    @functools.wraps(make)
    def checked(self: object, *values: Any, **options: Any) -> None:
        check_keywords(cls.__name__, options, known)
        make(self, *values, **options)

    cls.__init__ = checked  # type: ignore[misc]
    return cls
