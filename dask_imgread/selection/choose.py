"""Choose rows: by a condition, by ids, by their failures."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable

import numpy as np
import pandas as pd

from dask_imgread.tasks import CHECKSUM

_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
# Causes that say that an image's bytes can't be had, not that they are broken.
_WITHOUT_BYTES = (
    *("truncated archive", "damaged archive", "unreadable shard", "killed its worker"),
    *("late sidecars", "unsupported:", "broken link", "unreachable", "changed shard", "bad row"),
)


def match_rows(rows: pd.DataFrame, condition: str) -> np.ndarray:
    """Return for which rows a condition is true, as pandas' ``query`` takes it.

    Where a value is missing, comparisons with it are not true.

    Parameters
    ----------
    rows
        Rows with Arrow's types.
    condition
        An expression of the columns' names, and the index's.

    Raises
    ------
    ValueError
        If it can't be evaluated, or is no condition.

    Examples
    --------
    >>> rows = pd.DataFrame({"width": pd.array([1, 2, None], dtype="int64[pyarrow]")})
    >>> match_rows(rows, "width > 1 or width == 0").tolist()
    [False, True, False]
    """
    try:
        found = rows.eval(condition, engine="python", local_dict={}, global_dict={})
    except Exception as error:  # pandas and the columns' methods raise anything
        raise ValueError(f"{condition}: {error}; {_list_columns(rows)}") from error
    kinds = ("boolean", "empty")
    if not isinstance(found, pd.Series) or pd.api.types.infer_dtype(found) not in kinds:
        raise ValueError(
            f"{condition}: that is no condition, which would be true or false for each row; "
            f"{_list_columns(rows)}"
        )
    mask: np.ndarray = found.fillna(False).to_numpy(bool)
    return mask


def _list_columns(rows: pd.DataFrame) -> str:
    names = filter(None, map(str, (rows.index.name or "", *rows.columns)))
    shown = (name if name.isidentifier() else f"`{name}`" for name in names)
    return f"the columns are {', '.join(shown)}"


def read_ids(path: str | os.PathLike[str]) -> set[str]:
    """Return the ids in a text file, one in each line; blank lines and ``#`` comments are skipped.

    Raises
    ------
    OSError, ValueError
        If the file can't be read, or has no ids.
    """
    with open(path, encoding="utf-8-sig") as file:
        try:
            ids = {line.strip() for line in file if line.strip() and line.strip()[0] != "#"}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}: give a text file, an id in each line") from None
    if not ids:
        raise ValueError(f"{path}: the file has no ids: give one in each line")
    return ids


def find_digests(ids: Iterable[str]) -> set[str]:
    """Return which ids are digests of images' bytes (SHA-256, hexadecimal), in lower case."""
    return {name.lower() for name in ids if _DIGEST.fullmatch(name)}


def find_ids(rows: pd.DataFrame, ids: Collection[str]) -> tuple[np.ndarray, list[str]]:
    """Return which rows are among those with some ids or digests, and the ids that no row has.

    Parameters
    ----------
    rows
        Rows indexed by ``image_id``.
    ids
        Ids, and digests, of which each row with such bytes is found.

    Raises
    ------
    ValueError
        If there are digests, and the rows have none.
    """
    chosen = rows.index.isin(ids)
    digests = find_digests(ids)
    found = set(rows.index[chosen])
    if digests - found and CHECKSUM not in rows:
        raise ValueError(
            f"{len(digests)} of the ids are SHA-256 digests, and the rows have no column "
            f"{CHECKSUM}: make them with --checksum"
        )
    if digests:
        same = rows[CHECKSUM].str.lower().isin(digests).fillna(False).to_numpy(bool)
        found.update(rows[CHECKSUM][same].str.lower())
        chosen |= same
    missing = sorted(
        name
        for name in ids
        if name not in found and not (name.lower() in digests and name.lower() in found)
    )
    return chosen, missing


def find_failed(rows: pd.DataFrame) -> np.ndarray:
    """Return which rows are of images that could not be read, but whose bytes are there."""
    failed = rows["error"].notna() & (rows["size"].fillna(0) > 0)
    lost = rows["error"].astype(str).str.startswith(_WITHOUT_BYTES)
    mask: np.ndarray = (failed & ~lost).to_numpy(bool)
    return mask
