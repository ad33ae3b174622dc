"""What changed between two frames of images' metadata."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_imgread.shards.frames import index_by_id, is_lazy, require_frame
from dask_imgread.tasks import CHECKSUM, COLUMNS

if TYPE_CHECKING:
    from dask.dataframe import DataFrame

    from dask_imgread.shards.frames import Frame

KINDS = ("added", "gone", "changed", "moved", "newly failed", "newly readable")

_TEXT = pd.StringDtype("pyarrow")
_KEPT = {  # the columns that are compared or told, and their types
    name: COLUMNS.get(name, _TEXT)
    for name in ("shard", "offset", "size", CHECKSUM, "format", "width", "height", "error")
}
_SEEN = "size", "format", "width", "height"  # what is compared where there are no digests
_OLD = [f"{name}_old" for name in _KEPT]
_TOLD = ["change", "moved_from", *(f"{name}_{age}" for name in _KEPT for age in ("old", "new"))]
_NO_ROWS = pd.DataFrame(index=pd.Index([], dtype=_TEXT, name="image_id"))
# What is no part of the member's name in an id: the shard's, and the offset after a repeated name.
_AROUND_NAME = r"^[^/]*/|@\d+$"
_AGES = False, True  # of the old and of the new frame: whether it is new
_ROWS = 100_000  # of each frame that are compared at a time


def diff_frames(
    old: Frame | str | os.PathLike[str],
    new: Frame | str | os.PathLike[str],
    *,
    storage_options: dict[str, Any] | None = None,
) -> Frame:
    """Find which images differ between two frames of metadata.

    Images are compared by their ids, ``<shard>/<member>``, and by what the frames say of them; no
    shard is read. Copies of a dataset have the same ids if ``relative_to`` was given.

    Parameters
    ----------
    old, new
        Rows of pandas or Dask, as ``read_metadata`` makes them, or the output folders of jobs. What
        a frame has no column or no value for is not compared.
    storage_options
        Options for the file systems of folders.

    Returns
    -------
    dask.dataframe.DataFrame or pandas.DataFrame
        One row for each image that differs, indexed by ``image_id``; of pandas, in the order of the
        ids, if both frames are. Else it is lazy, in no order, with as many partitions as the frame
        that has more of them: repartition frames of many small ones. ``change`` is one of

        - ``added`` and ``gone``: the id is in one of the frames only;
        - ``moved``: the same, but for an image with bytes that is gone from one place and added in
          another with the same member name, and with the same ``sha256``, or, where one of the
          frames has none, the same ``size``. Its former id is in ``moved_from``. Of several such
          images each is paired with one, in the order of their ids;
        - ``newly failed`` and ``newly readable``: ``error`` is set in the one frame only, whatever
          else has changed. Decoding finds failures that headers do not show;
        - ``changed``: ``sha256`` differs, or, where one of the frames has none, ``size``,
          ``format``, ``width`` or ``height``. So without ``sha256`` an edit that keeps them all is
          not seen. A new version of the shard, another place in it, or another cause of a failure
          is no change.

        Then come ``moved_from`` and, as ``shard_old``, ``shard_new`` and so on, ``shard``,
        ``offset``, ``size``, ``sha256``, ``format``, ``width``, ``height`` and ``error`` in both
        frames. The row of a whole shard that could not be read counts like an image: it is
        added, and the images in the shard are gone.

    Raises
    ------
    ValueError
        If one is neither a frame nor a job's folder, or lacks a column that is needed; when the
        result is computed, if an id is in a frame twice.
    StorageError
        If a store can't be reached.

    Examples
    --------
    >>> from dask_imgread import read_metadata
    >>> from dask_imgread.testing import make_shards
    >>> old = read_metadata(make_shards("shards", shards=2, images_per_shard=3)).compute()
    >>> new = old[1:].assign(size=old["size"].where(old["key"] != "000004", 7))
    >>> changes = diff_frames(old, new)
    >>> changes["change"].tolist(), changes["size_new"].tolist()
    (['gone', 'changed'], [<NA>, 7])
    """
    frames = _open_both(old, new, storage_options)
    if not any(map(is_lazy, frames)):
        rows = [_take(frame, is_new) for frame, is_new in zip(frames, _AGES, strict=True)]
        return _compare(pd.concat(rows, ignore_index=True))
    counts = [
        given.npartitions if is_lazy(given) else _count_partitions(len(frame))
        for given, frame in zip((old, new), frames, strict=True)
    ]
    return _compare_lazily(frames, max(counts))


@dataclass
class Survey:
    """How many images differ between two jobs' outputs, and the first of them.

    Parameters
    ----------
    old, new
        How many images each has.
    counts
        How many differ, by kind.
    first
        Some rows of each kind, as ``diff_frames`` returns them: those with the first ids.
    """

    old: int
    new: int
    counts: Counter[str] = field(default_factory=Counter)
    first: pd.DataFrame = field(default_factory=lambda: NO_CHANGES)

    def add(self, changes: pd.DataFrame, listed: int) -> Survey:
        """Return a survey of more changes, which lists so many rows of each kind."""
        first = pd.concat([self.first, changes]).sort_index().groupby("change").head(listed)
        return Survey(self.old, self.new, self.counts + Counter(changes["change"]), first)

    def list_first(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Return each kind of which there are changes, with its first rows."""
        rows = self.first.reset_index().astype(object).where(pd.notna, None).to_dict("records")
        listed = [(kind, [row for row in rows if row["change"] == kind]) for kind in KINDS]
        return [(kind, some) for kind, some in listed if some]


def describe_change(row: Mapping[str, Any]) -> str:
    """Return what there is to say of a change beside its kind; nothing at times.

    >>> describe_change({"change": "moved", "moved_from": "s-1/a.jpg"})
    'from s-1/a.jpg'
    """
    if row["change"] == "moved":
        return f"from {row['moved_from']}"
    if row["change"] == "changed":
        pairs = {name: (row[f"{name}_old"], row[f"{name}_new"]) for name in _SEEN}
        told = [
            f"{name} {old} to {new}"
            for name, (old, new) in pairs.items()
            if None not in (old, new) and old != new
        ]
        return ", ".join(told) or "other bytes"
    if row["change"] == "newly readable":
        return f"before: {row['error_old']}"
    return row["error_new"] or ""


def survey_changes(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    listed: int,
    storage_options: dict[str, Any] | None = None,
    write: Callable[[pd.DataFrame], object] = lambda changes: None,  # noqa: ARG005
) -> Survey:
    """Count the changes between the outputs of two jobs, in the threads of this process.

    Parameters
    ----------
    old, new
        The jobs' folders.
    listed
        How many rows of each kind are kept.
    storage_options
        Options for the folders' file systems.
    write
        Called with all rows, some at a time.

    Raises
    ------
    ValueError, StorageError
        As ``diff_frames`` does.
    """

    def add(survey: Survey, changes: pd.DataFrame) -> Survey:
        write(changes)
        return survey.add(changes, listed)

    # Else a client of this process would run it, and the rows be shuffled as only a cluster can.
    with dask.config.set({"scheduler": "threads", "dataframe.shuffle.method": "disk"}):
        frames = _open_both(old, new, storage_options)
        survey: Any = Survey(len(frames[0]), len(frames[1]))
        changes = _compare_lazily(frames, _count_partitions(max(survey.old, survey.new)))
        for part in changes.to_delayed():
            survey = dask.delayed(add, pure=False)(survey, part)
        result: Survey = survey.compute()
    return result


def _open_both(old: Any, new: Any, storage_options: dict[str, Any] | None) -> list[Frame]:
    frames = [require_frame(given, storage_options) for given in (old, new)]
    for frame in frames:
        if index_by_id(frame._meta if is_lazy(frame) else frame[:0]).index.name != "image_id":
            raise ValueError("frames are compared by image_id, and one of these has none")
    if not all("error" in frame for frame in frames):  # where it is null, an image could be read
        frames = [frame.drop(columns="error", errors="ignore") for frame in frames]
    return frames


def _count_partitions(rows: int) -> int:
    return max(1, -(-rows // _ROWS))


def _compare_lazily(frames: list[Frame], count: int) -> DataFrame:
    parts = [_divide(frame, is_new, count) for frame, is_new in zip(frames, _AGES, strict=True)]
    # By name, so that the place that an image was moved from is in the same partition.
    rows = dd.concat(parts).shuffle("name", npartitions=count)
    return rows.map_partitions(_compare, meta=NO_CHANGES, enforce_metadata=False)


def _divide(frame: Frame, is_new: bool, count: int) -> DataFrame:
    """Return what is needed of a frame's rows, in at most so many partitions."""
    if not is_lazy(frame):
        rows = dd.from_pandas(_take(frame, is_new), npartitions=count, sort=False)
        return rows.clear_divisions()
    frame = frame[[name for name in frame.columns if name in (*_KEPT, "image_id")]]
    if frame.npartitions > count:
        frame = frame.repartition(npartitions=count)
    meta = _take(_NO_ROWS, is_new)
    return frame.map_partitions(
        _take, is_new, meta=meta, enforce_metadata=False, clear_divisions=True
    )


def _take(frame: pd.DataFrame, is_new: bool) -> pd.DataFrame:
    """Return what is needed of a frame's rows, always with the same columns and types."""
    rows = index_by_id(frame)
    columns = {name: rows[name].array if name in rows else [None] * len(rows) for name in _KEPT}
    taken = pd.DataFrame({"image_id": rows.index, **columns}).astype({"image_id": _TEXT, **_KEPT})
    names = pc.replace_substring_regex(pa.array(taken["image_id"]), _AROUND_NAME, "")
    return taken.assign(name=_TEXT.__from_arrow__(names), is_new=np.full(len(taken), is_new))


def _compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of images that differ: of all rows of both frames, or of some names."""
    twice = rows.duplicated(["image_id", "is_new"])
    if twice.any():
        first = rows[twice].iloc[0]
        age = "new" if first["is_new"] else "old"
        raise ValueError(f"{first['image_id']} is the image_id of several rows of the {age} frame")
    is_new = rows["is_new"].to_numpy(bool)
    sides = [rows[mask].drop(columns="is_new") for mask in (~is_new, is_new)]
    both = sides[0].merge(
        sides[1], on="image_id", how="outer", suffixes=("_old", "_new"), indicator=True
    )
    kinds = _find_kinds(both)
    both["change"] = pd.array(kinds, _TEXT)
    both["moved_from"] = pd.array([None] * len(both), _TEXT)
    return _join_moved(both[kinds != ""].set_index("image_id"))[_TOLD]


def _find_kinds(both: pd.DataFrame) -> np.ndarray:
    """Return the kind of each change but the moves, and an empty text where nothing differs."""

    def differ(name: str) -> pd.Series:
        return (both[f"{name}_old"] != both[f"{name}_new"]).fillna(False).astype(bool)

    knows = both[f"{CHECKSUM}_old"].notna() & both[f"{CHECKSUM}_new"].notna()
    seems = pd.concat([differ(name) for name in _SEEN], axis=1).any(axis=1)
    failed, fails = both["error_old"].notna(), both["error_new"].notna()
    kinds = {
        "gone": both["_merge"] == "left_only",
        "added": both["_merge"] == "right_only",
        "newly failed": fails & ~failed,
        "newly readable": failed & ~fails,
        "changed": differ(CHECKSUM).where(knows, seems),
    }
    return np.select(list(kinds.values()), list(kinds), "")


def _join_moved(rows: pd.DataFrame) -> pd.DataFrame:
    """Make one row, under the new id, of the two of each image that was moved."""
    moves = _find_moves(rows)
    former, latter = (rows.loc[moves[f"image_id_{age}"]] for age in ("old", "new"))
    moved = latter.assign(
        change=pd.array(["moved"] * len(moves), _TEXT),
        moved_from=former.index.array,
        **{name: former[name].array for name in _OLD},
    )
    rest = rows.drop([*former.index, *latter.index])
    return pd.concat([rest, moved]).sort_index()


def _find_moves(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the old and the new id of each image that was moved."""
    gone, added = _list_candidates(rows, "gone", "old"), _list_candidates(rows, "added", "new")
    found = []
    # With a digest on both sides first, then on one only: so the most images find a partner.
    for digests in product((True, False), repeat=2):
        on = ["name", "size", CHECKSUM] if all(digests) else ["name", "size"]
        turns = [
            some.assign(turn=some.groupby(on).cumcount())
            for some in (
                each[each[CHECKSUM].notna() == known]
                for each, known in zip((gone, added), digests, strict=True)
            )
        ]
        pairs = turns[0].merge(turns[1], on=[*on, "turn"], suffixes=("_old", "_new"))
        gone = gone[~gone["image_id"].isin(pairs["image_id_old"])]
        added = added[~added["image_id"].isin(pairs["image_id_new"])]
        found.append(pairs[["image_id_old", "image_id_new"]])
    return pd.concat(found)


def _list_candidates(rows: pd.DataFrame, kind: str, age: str) -> pd.DataFrame:
    """Return name, size and digest of the images of a kind that have bytes."""
    columns = {f"{name}_{age}": name for name in ("name", "size", CHECKSUM)}
    candidates = rows[rows["change"] == kind][[*columns]].rename(columns=columns)
    return candidates[candidates["size"].gt(0).fillna(False).to_numpy(bool)].reset_index()


NO_CHANGES: pd.DataFrame = _compare(_take(_NO_ROWS, False))
