"""Which images are on a list of digests or hashes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import dask
import numpy as np
import pandas as pd

from dask_imgread.duplicates import check_column, check_distance, convert_hashes
from dask_imgread.hamming import find_pairs
from dask_imgread.shards.frames import index_by_id, is_lazy, require_frame
from dask_imgread.storage.filesystems import connect
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import with_retries
from dask_imgread.tasks import CHECKSUM, MD5
from dask_imgread.texts import shorten

if TYPE_CHECKING:
    from dask_imgread.shards.frames import Frame

_HEX = re.compile(r"[0-9a-fA-F]+")
_KINDS = {64: "SHA-256 digests", 32: "MD5 digests", 16: "64-bit hashes"}
_COLUMNS = {64: CHECKSUM, 32: MD5}
_SHOWN = 80  # characters of a line
_TEXT = pd.StringDtype("pyarrow")


class HashList(NamedTuple):
    """A list of digests or hashes of one kind.

    Parameters
    ----------
    length
        How many hexadecimal digits each has.
    values
        They, each once, in lower case and in order; 64-bit hashes as uint64.
    """

    length: int
    values: np.ndarray


def match_hashes(
    frame: Frame | str | os.PathLike[str],
    hashes: str | os.PathLike[str] | Iterable[str | int],
    *,
    by: str = "phash",
    distance: int = 4,
    storage_options: dict[str, Any] | None = None,
) -> Frame:
    """Find the images that are on a list of digests of their bytes, or of hashes of their pixels.

    Of a lazy frame each partition is matched by itself, while it is read: with
    ``read_metadata(shards, checksum=True)`` only the rows that match are ever kept.

    Parameters
    ----------
    frame
        Rows of pandas or Dask, as ``read_metadata`` makes them, or the output folder of a job. Rows
        without a digest or hash match nothing.
    hashes
        A list, or the path or URL of a text file with one in each line; blank lines and what
        follows a ``#`` are skipped. They are hexadecimal: SHA-256 (64 digits), for the column
        ``sha256``; MD5 (32), for the column ``md5``, of a reader with ``md5=True``; or 64-bit
        hashes (16), for the column ``by``. A list may have the latter as integers.
    by
        The column of 64-bit hashes.
    distance
        In how many bits these may differ, 0 to 16.
    storage_options
        Options for the file systems of a folder and of the list.

    Returns
    -------
    dask.dataframe.DataFrame or pandas.DataFrame
        The rows that match, indexed by ``image_id``, with ``matched``, the nearest one on the list
        (of several the smallest), in lower case, and ``distance``, in how many bits it differs.

    Raises
    ------
    ValueError
        If this is neither a frame nor a job's folder, a column is missing, ``distance`` is out of
        bounds, or the list is empty, or has something else or two kinds; the message names the
        line.
    OSError
        If the list can't be read.
    StorageError
        If a store can't be reached.

    Examples
    --------
    >>> from dask_imgread import read_metadata
    >>> from dask_imgread.testing import make_shards
    >>> frame = read_metadata(make_shards("shards", shards=1, images_per_shard=3), checksum=True)
    >>> listed = [frame["sha256"].compute(scheduler="sync").iloc[1].upper()]
    >>> found = match_hashes(frame, listed).compute(scheduler="sync")
    >>> found["key"].tolist(), found["distance"].tolist()
    (['000001'], [0])
    """
    check_distance(distance)
    given = require_frame(frame, storage_options)
    listed = read_hashes(hashes, storage_options)
    column = _COLUMNS.get(listed.length, by)
    if check_column(given, column) != (listed.length == 16):
        raise ValueError(f"the list has {_KINDS[listed.length]}, and the column {column} does not")
    if not is_lazy(given):
        return _match(given, listed, column, distance)
    meta = _match(given._meta, listed, column, distance)
    # Delayed, so that each task is sent a name, not the list.
    return given.map_partitions(
        _match, dask.delayed(listed), column, distance, meta=meta, enforce_metadata=False
    ).clear_divisions()


def read_hashes(
    hashes: str | os.PathLike[str] | Iterable[str | int],
    storage_options: dict[str, Any] | None = None,
) -> HashList:
    """Return digests or hashes that are given in a list, or in a text file.

    Raises
    ------
    OSError, ValueError
        As ``match_hashes`` does.

    Examples
    --------
    >>> read_hashes(["00000000000000FF", 3]).values.tolist()
    [3, 255]
    >>> read_hashes(["00000000000000FF", "d41d8cd98f00b204e9800998ecf8427e"])
    Traceback (most recent call last):
    ...
    ValueError: hashes, entry 2: d41d8cd98f00b204e9800998ecf8427e ...
    """
    texts: Iterable[str]
    if isinstance(hashes, str | os.PathLike):
        path = os.path.expanduser(os.fspath(hashes))
        name, part = redact_url(path), "line"
        texts = _read_lines(path, storage_options or {})
    else:
        name, part = "hashes", "entry"
        texts = (
            value if isinstance(value, str) else f"{int(value) % 2**64:016x}" for value in hashes
        )
    found, length = set[str](), 0
    for number, text in enumerate(texts, 1):
        value = text.partition("#")[0].strip().lower()
        if not value:
            continue
        place = f"{name}, {part} {number}: {shorten(value, _SHOWN)}"
        if len(value) not in _KINDS or not _HEX.fullmatch(value):
            kinds = ", ".join(f"{digits} for {kind}" for digits, kind in _KINDS.items())
            raise ValueError(f"{place} is none: give so many hexadecimal digits: {kinds}")
        if length not in (0, len(value)):
            raise ValueError(
                f"{place} is one of {_KINDS[len(value)]}, and those before are "
                f"{_KINDS[length]}: give a list of each"
            )
        length = len(value)
        found.add(value)
    if not found:
        raise ValueError(f"{name}: there are none: give one in each {part}")
    values = sorted(found)
    if length == 16:
        return HashList(length, np.array([int(value, 16) for value in values], np.uint64))
    return HashList(length, np.array(values, object))


def _read_lines(path: str, storage_options: dict[str, Any]) -> Iterator[str]:
    fs, name = connect(path, storage_options)
    content = with_retries(fs.cat_file, path, name)
    try:
        return iter(content.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{redact_url(path)}: {error}: give a text file") from None


def _match(frame: pd.DataFrame, listed: HashList, column: str, distance: int) -> pd.DataFrame:
    """Return the rows that match, with what they match."""
    rows = index_by_id(frame)
    rows = rows[rows[column].notna().to_numpy(bool)]
    if listed.length == 16:
        hashes, numbers = np.unique(convert_hashes(rows[column]), return_inverse=True)
        found, bits = _find_nearest(hashes, listed.values, distance)
        texts = np.array([f"{value:016x}" for value in found.tolist()], object)[numbers]
        bits = bits[numbers]
    else:
        texts = rows[column].astype(_TEXT).str.lower()
        bits = np.where(texts.isin(listed.values), 0, -1)
    rows = rows.assign(
        matched=pd.array(texts, _TEXT), distance=pd.array(bits.astype(int), "int16[pyarrow]")
    )
    return rows[bits >= 0]


def _find_nearest(
    hashes: np.ndarray, listed: np.ndarray, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return which one on a list is nearest to each hash, and in how many bits; -1 if none is."""
    union, both = np.union1d(hashes, listed), np.intersect1d(hashes, listed)
    is_ours, is_listed = np.isin(union, hashes), np.isin(union, listed)
    found = [np.stack([both, both])]
    for pair in find_pairs(union, distance) if distance else ():
        ends = np.hstack([pair, pair[::-1]])
        found.append(union[ends[:, is_ours[ends[0]] & is_listed[ends[1]]]])
    ours, theirs = np.hstack(found)
    bits = np.bitwise_count(ours ^ theirs)
    order = np.lexsort((theirs, bits, ours))
    ours, first = np.unique(ours[order], return_index=True)
    places = np.searchsorted(hashes, ours)
    nearest, fewest = np.zeros(len(hashes), np.uint64), np.full(len(hashes), -1)
    nearest[places], fewest[places] = theirs[order][first], bits[order][first]
    return nearest, fewest
