"""The first rows and failures of a job's output, cut to what a terminal shows."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from dask_imgread.jobs.folder import JobFolder
from dask_imgread.texts import shorten

_SAMPLED = 100  # parts that are searched for samples
_WIDEST = 32  # characters of a cell
_LISTED = 3  # values of a list


def read_samples(folder: JobFolder, count: int = 5) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Return a few rows, and the id and error of a few failures, from the first parts."""
    rows: list[pd.DataFrame] = []
    failures: list[tuple[str, str]] = []
    for name in folder.list_parts()[:_SAMPLED]:
        table, records, _ = folder.read_part(name)
        frame = table.slice(0, count).to_pandas()
        rows.append(frame.reset_index(drop=frame.index.names == [None]))
        failed = records.filter(pc.is_valid(records["error"])).slice(0, count).to_pylist()
        failures += [(row["image_id"], row["error"]) for row in failed]
        if sum(map(len, rows)) >= count and len(failures) >= count:
            break
    return pd.concat(rows)[:count] if rows else pd.DataFrame(), failures[:count]


def format_rows(rows: pd.DataFrame, width: int | None = None) -> str:
    """Return rows as text, with the columns that fit; the last line names those that do not.

    Parameters
    ----------
    rows
        Few: all of them are shown. Their values may be of any type.
    width
        Characters in a line; the terminal's if not given.

    Examples
    --------
    >>> rows = pd.DataFrame({"key": ["a"], "photo": [bytes(9000)], "vector": [np.arange(512)]})
    >>> print(format_rows(rows, 50))
    key          photo                       vector
      a <9,000 bytes> [0, 1, 2, and 509 more]
    >>> print(format_rows(rows, 30))
    key          photo
      a <9,000 bytes>
    and 1 more column: vector
    """
    width = width or shutil.get_terminal_size().columns
    cells = pd.DataFrame(
        {
            name: [shorten(_format_value(value), _WIDEST, "...") for value in column]
            for name, column in rows.items()
        },
        columns=rows.columns,
    )
    shown = len(cells.columns)
    while shown > 1 and _measure(cells.iloc[:, :shown]) > width:
        shown -= 1
    text = cells.iloc[:, :shown].to_string(index=False) if len(rows) else "no rows"
    lines = [line[:width].rstrip() for line in text.splitlines()]
    hidden = [str(name) for name in rows.columns[shown:]] if len(rows) else []
    if hidden:
        names = f"and {len(hidden)} more column{'s' if len(hidden) > 1 else ''}: "
        lines += textwrap.wrap(names + ", ".join(hidden), width)
    return "\n".join(lines)


def _measure(cells: pd.DataFrame) -> int:
    return max(map(len, cells.to_string(index=False).splitlines()))


def _format_value(value: Any) -> str:
    """Return a value as a short text: the number of its bytes, or the first items of a list."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        items = [_format_value(item) for item in value[:_LISTED]]
        if len(value) > _LISTED:
            items.append(f"and {len(value) - _LISTED:,} more")
        return f"[{', '.join(items)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_format_value(item)}' for name, item in value.items())}}}"
    if isinstance(value, float):
        return f"{value:.6g}"
    # The names in a shard may hold control characters, and a terminal would obey them.
    return "".join(char if char.isprintable() else "?" for char in str(value))
