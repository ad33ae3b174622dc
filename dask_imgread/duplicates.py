"""Which images are equal, or nearly so, by digests of their bytes or hashes of their pixels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from distributed import warn
from pandas.api.types import is_float_dtype, is_integer_dtype

from dask_imgread.hamming import divide_bits, group_near, join_links
from dask_imgread.shards.frames import index_by_id, is_lazy, require_frame
from dask_imgread.tasks import CHECKSUM, COLUMNS, MD5

if TYPE_CHECKING:
    from dask.dataframe import DataFrame

    from dask_imgread.shards.frames import Frame

_MOST_BITS = 16
_TEXT = pd.StringDtype("pyarrow")
_PLACE = ["shard", "offset"]
_KEPT = (
    *("shard", "shard_version", "key", "offset", "size", "sample_offset", "sample_size"),
    *("format", "width", "height"),
)
_OURS = "image_id", "_label", "_pixels"
_TOLD = ["group", "keep", "distance"]
_ROWS = 100_000  # in a partition, of a job's many small ones
_MANY = 10_000  # images in a group
_SOURCES = {
    CHECKSUM: "make the rows with checksum=True (--checksum)",
    "phash": "make the rows with the function fingerprint",
    "dhash": "make the rows with the function fingerprint",
    MD5: "make the rows with a reader that has md5=True (--md5)",
}


def find_duplicates(
    frame: Frame | str | os.PathLike[str],
    by: str = CHECKSUM,
    *,
    distance: int = 4,
    prefer: str | None = None,
    blank: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> Frame:
    """Find which images have duplicates, and which one of each group to keep.

    Parameters
    ----------
    frame
        Rows of pandas or Dask, as ``read_metadata`` makes them, or the output folder of a job. No
        two images have the same id. Rows where ``by`` is null are never duplicates.
    by
        A column of digests, such as ``sha256``: images with the same one are duplicates. Or one of
        64-bit hashes as integers, such as ``phash`` or ``dhash``: images whose hashes differ in at
        most ``distance`` bits are, and all that are linked by such pairs form one group.
    distance
        The most bits, 0 to 16. Time grows with it: beyond 8 it is for small frames.
    prefer
        The column whose largest value decides which image to keep; then, and if it is not given,
        the most pixels, then the first id.
    blank
        Whether images for which the frame's column ``blank`` is true are compared by their hashes,
        too. All that have hardly any detail would be alike.
    storage_options
        Options for the file system of a folder.

    Returns
    -------
    dask.dataframe.DataFrame or pandas.DataFrame
        One row for each image that has a duplicate, indexed by ``image_id``; of pandas, in the
        order of the groups, if the frame is. Else it is lazy, in no order of the groups, whose rows
        are each in one partition. The columns are

        - ``group``: the first id of the group;
        - ``keep``: true for one image of each group. Rows of the same bytes of a shard, which are
          links, count as one image, and have the same value;
        - ``distance``: how many bits differ from the image to keep, which for images that are
          linked by others may be more than ``distance``;
        - those of the frame that say where the image is and how large, ``by`` and ``prefer``.

    Raises
    ------
    ValueError
        If this is neither a frame nor a job's folder, a column is missing, or ``distance`` is
        out of bounds; when the result is computed, if images of a group have the same id.
    StorageError
        If a store can't be reached.

    Warns
    -----
    UserWarning
        If a group has more than 10,000 images; if so many different hashes are alike that not all
        were compared.

    Notes
    -----
    Hashes that are equal are compared once, and only with those that are equal to them in one of
    ``distance + 1`` parts. A worker has the hashes of one partition at a time. The pairs that were
    found are joined to groups by one worker, whose memory holds one entry for each hash that is
    repeated or near to another one; these are sent to all workers, and only rows with these hashes
    are shuffled. 2,000,000 rows take 18 s on two cores.

    Examples
    --------
    >>> from dask_imgread import read_metadata, write_shards
    >>> from dask_imgread.testing import make_shards
    >>> shards = make_shards("shards", shards=1, images_per_shard=3)
    >>> shards += make_shards("others", shards=1, images_per_shard=2)
    >>> frame = read_metadata(shards, checksum=True).compute(scheduler="sync")
    >>> duplicates = find_duplicates(frame)
    >>> duplicates["keep"].tolist()
    [True, False, True, False]
    >>> rest = frame.drop(duplicates.index[~duplicates["keep"]])
    >>> len(rest)
    3

    ``write_shards(rest, "unique")`` writes them, or ``dask-imgread select --not-ids`` copies the
    shards without the others.
    """
    check_distance(distance)
    given = require_frame(frame, storage_options)
    near = check_column(given, by) and distance > 0
    if prefer is not None and prefer not in given.columns:
        raise ValueError(f"the frame has no column {prefer}, by which to prefer images")
    how: dict[str, Any] = {"by": by, "prefer": prefer, "blank": blank}
    if not is_lazy(given):
        rows = _take(given, **how)
        if near:
            rows = _label(rows, _make_links(_link(rows["_label"].to_numpy(), distance)))
        return _find_groups(rows, by, prefer)
    if not is_lazy(frame) and (count := -(-len(given) // _ROWS) or 1) < given.npartitions:
        given = given.repartition(npartitions=count)
    rows = given.map_partitions(_take, **how, **_no_check(_take(given._meta, **how)))
    if near:
        rows = rows.map_partitions(_label, _link_all(rows, distance), **_no_check(rows._meta))
    found = _find_groups(rows._meta, by, prefer)
    rows = rows.shuffle("_label", npartitions=_count_fewer(rows) if near else rows.npartitions)
    return rows.map_partitions(_find_groups, by, prefer, **_no_check(found))


def check_distance(distance: int) -> None:
    """Refuse a distance that is out of bounds."""
    if not 0 <= distance <= _MOST_BITS:
        raise ValueError(f"distance is {distance}, and must be 0 to {_MOST_BITS} bits")


def check_column(frame: Frame, by: str) -> bool:
    """Return whether a column has 64-bit hashes, not digests.

    Raises
    ------
    ValueError
        If there is no such column, or no ``image_id``.
    """
    meta = frame._meta if is_lazy(frame) else frame[:0]
    if index_by_id(meta).index.name != "image_id":
        raise ValueError("images are compared by image_id, and the frame has none")
    if by not in meta:
        source = f": {_SOURCES[by]}" if by in _SOURCES else ""
        raise ValueError(f"the frame has no column {by}{source}")
    if is_float_dtype(meta[by].dtype):
        raise ValueError(f"the column {by} has floats, which don't hold 64 bits: give integers")
    return bool(is_integer_dtype(meta[by].dtype))


def convert_hashes(hashes: pd.Series) -> np.ndarray:
    """Return integers, none of them null, as uint64; negative ones by their bits."""
    signed = str(hashes.dtype).lower().startswith("int")
    values: np.ndarray = hashes.to_numpy(np.int64 if signed else np.uint64)
    return values.view(np.uint64)


def _no_check(meta: pd.DataFrame) -> dict[str, Any]:
    """Return the arguments that spare Dask to compare each partition's types with these."""
    return {"meta": meta, "enforce_metadata": False, "align_dataframes": False}


def _take(frame: pd.DataFrame, by: str, prefer: str | None, blank: bool) -> pd.DataFrame:
    """Return what is needed of the rows that can be duplicates; in ``_label``, what to compare."""
    rows = index_by_id(frame)
    known, hashed = rows[by].notna(), is_integer_dtype(rows[by].dtype)
    if hashed and not blank and "blank" in rows:
        known &= ~rows["blank"].fillna(False).astype(bool)
    rows = rows[known.to_numpy(bool)]
    names = [name for name in (*_KEPT, by, prefer) if name in rows]
    types = {name: COLUMNS[name] for name in names if name in COLUMNS}
    taken = rows[list(dict.fromkeys(names))].astype(types)
    if hashed:
        label: Any = convert_hashes(rows[by])
        taken[by] = pd.array(label, "uint64[pyarrow]")
    else:
        taken[by] = rows[by].astype(_TEXT)
        label = taken[by].str.lower().array
    ids = rows.index.astype(_TEXT)
    return taken.set_index(ids).assign(_label=label).reset_index(names="image_id")


def _label(rows: pd.DataFrame, links: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose hashes are linked, labeled with the smallest one of these."""
    hashes, roots = links.to_numpy().T
    labels = rows["_label"].to_numpy()
    places = np.searchsorted(hashes, labels)
    linked = np.searchsorted(hashes, labels, "right") > places
    return rows[linked].assign(_label=roots[places[linked]])


def _count_fewer(rows: DataFrame) -> int:
    """Return a number of partitions for what is small beside all rows: each pair costs some ms."""
    return max(1, int(rows.npartitions) // 4)


def _link_all(rows: DataFrame, distance: int) -> DataFrame:
    """Return, in one partition, all hashes that are repeated or near to another one."""
    copies = rows[["_label"]].map_partitions(
        _copy, distance, **_no_check(_copy(rows._meta, distance))
    )
    links = copies.shuffle("part", npartitions=_count_fewer(rows)).map_partitions(
        _link_parts, distance, **_no_check(_NO_LINKS)
    )
    return links.reduction(_join, aggregate=_join, combine=_join, meta=_NO_LINKS, split_every=8)


def _copy(rows: pd.DataFrame, distance: int) -> pd.DataFrame:
    """Return the hashes once for each part of their bits, with these bits; repeated ones twice."""
    hashes, counts = np.unique(rows["_label"].to_numpy(np.uint64), return_counts=True)
    hashes = np.repeat(hashes, counts.clip(max=2))
    masks = np.array(divide_bits(distance + 1), np.uint64)[:, None]
    columns = {
        "hash": np.tile(hashes, len(masks)),
        # The other bits are set, so that zeros are not together in all parts.
        "part": ((hashes & masks) | ~masks).ravel(),
        "number": np.repeat(np.arange(len(masks), dtype=np.uint8), len(hashes)),
    }
    return pd.DataFrame(columns)


def _link_parts(copies: pd.DataFrame, distance: int) -> pd.DataFrame:
    links = [np.empty((2, 0), np.uint64)]
    for number, part in enumerate(divide_bits(distance + 1)):
        hashes = copies["hash"][copies["number"] == number].to_numpy(np.uint64)
        links.append(_link(hashes, distance, equal=part))
    return _make_links(np.hstack(links))


def _link(hashes: np.ndarray, distance: int, *, equal: int = 0) -> np.ndarray:
    """Return the hashes that are repeated or near to another one, and one that each is linked to.

    ``equal`` are bits that must be equal.
    """
    different, counts = np.unique(hashes, return_counts=True)
    repeated = different[counts > 1]
    near = group_near(different, distance, equal=equal)
    return np.hstack([near, np.stack([repeated, repeated])])


def _join(links: pd.DataFrame) -> pd.DataFrame:
    return _make_links(links.to_numpy().T)


def _make_links(links: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(join_links(links).T, columns=["hash", "root"])


def _find_groups(rows: pd.DataFrame, by: str, prefer: str | None) -> pd.DataFrame:
    """Return the rows of the images that have duplicates: of all rows of some labels."""
    rows = rows[rows.duplicated("_label", keep=False).to_numpy()].sort_values("image_id")
    firsts = rows.drop_duplicates("_label").set_index("_label")["image_id"]
    pixels = pd.Series(0, rows.index)
    if {"width", "height"} <= {*rows.columns}:
        pixels = rows["width"].astype("Int64") * rows["height"].astype("Int64")
    rows = rows.assign(
        group=rows["_label"].map(firsts).astype(_TEXT), _pixels=pixels.fillna(0).astype("int64")
    )
    order = [prefer, "_pixels"] if prefer else ["_pixels"]
    rows = rows.sort_values(
        ["group", "_label", *order, "image_id"],
        ascending=[True, True, *(False for _ in order), True],
    )
    best = rows.drop_duplicates("_label").set_index("_label").loc[rows["_label"]]
    rows["keep"] = np.logical_and.reduce(
        [(rows[name].array == best[name].array).fillna(False) for name in _PLACE]
    ).astype(bool)
    rows["distance"] = pd.array(_count_bits(rows[by], best[by]), "int16[pyarrow]")
    rows = rows[~rows.groupby("_label")["keep"].transform("all").to_numpy(bool)]
    _refuse_ambiguous(rows)
    _warn_of_many(rows, by)
    told = [*_TOLD, *(name for name in rows if name not in (*_TOLD, *_OURS))]
    return rows.set_index("image_id")[told]


def _count_bits(hashes: pd.Series, others: pd.Series) -> np.ndarray:
    if not is_integer_dtype(hashes.dtype):
        return np.zeros(len(hashes), np.int16)
    bits: np.ndarray = np.bitwise_count(hashes.to_numpy(np.uint64) ^ others.to_numpy(np.uint64))
    return bits


def _refuse_ambiguous(rows: pd.DataFrame) -> None:
    images = rows.drop_duplicates(["_label", "image_id", *_PLACE])
    twice = images.duplicated(["_label", "image_id"]).to_numpy()
    if twice.any():
        name = images["image_id"][twice].iloc[0]
        raise ValueError(f"{name} is the image_id of several duplicates, which it can't tell apart")


def _warn_of_many(rows: pd.DataFrame, by: str) -> None:
    counts = rows["group"].value_counts()
    for group, count in counts[counts > _MANY].items():
        value = rows[by][(rows["group"] == group).to_numpy()].iloc[0]
        shown = f"{value:016x}" if isinstance(value, int) else value
        warn(f"{count:,} images are one group of duplicates, by {by}: that of {group}, {shown}")


_NO_LINKS = _make_links(np.empty((2, 0), np.uint64))
