"""A job's description: all that decides what its rows are."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import version
from typing import Any

from dask.base import tokenize

from dask_imgread.jobs.row_makers import RowMaker
from dask_imgread.reading.reader import ImageReaderStage

# The reader's other fields change only how fast the rows come.
_FIELDS_THAT_CHANGE_ROWS = (
    *("decode", "sidecars", "checksum", "md5", "on_error", "max_pixels", "resize", "fit"),
    *("resample", "output", "decoder", "scaled_decoding", "min_side", "relative_to"),
)


def describe_job(
    reader: ImageReaderStage, row_maker: RowMaker, rows_per_file: int | None = None
) -> dict[str, Any]:
    """Return the part of a job's description that does not depend on its shards.

    Raises
    ------
    ValueError
        If a subclass of the reader holds something for which there is no deterministic token.
    """
    values = vars(reader)
    return {
        **row_maker.describe(),
        "code": row_maker.digest_code(),
        "version": version("dask-imgread"),
        "options": {"reader": type(reader).__qualname__}
        | {name: values[name] for name in _FIELDS_THAT_CHANGE_ROWS}
        | row_maker.list_options()
        | _describe_subclass(reader)
        | {"rows_per_file": rows_per_file},
    }


def _describe_subclass(reader: ImageReaderStage) -> dict[str, Any]:
    """Return what a reader holds beside the fields of ``ImageReaderStage``."""
    state = reader.__getstate__()
    held: dict[str, Any] = {}
    for part in state if isinstance(state, tuple) else (state,):  # a tuple where it has slots
        held.update(part or {})
    known = {field.name for field in fields(ImageReaderStage)}
    more = {}
    for name, value in sorted(held.items()):
        if name in known:
            continue
        try:
            token = tokenize(value, ensure_deterministic=True)
        except Exception as error:  # pickling a value may raise anything
            raise ValueError(
                f"the reader's {name}, a {type(value).__name__}, has no deterministic token, so "
                "that changed settings would not be noticed: keep plain values in it, or give it a "
                "__dask_tokenize__"
            ) from error
        simple = value is None or isinstance(value, str | int | float)
        more[name] = value if simple else f"{type(value).__name__} {token}"
    return more
