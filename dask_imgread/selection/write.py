"""Write chosen samples as new shards, on a cluster."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dask_imgread.cluster.start import wait_for_workers
from dask_imgread.cluster.window import run_tasks
from dask_imgread.errors import JobError
from dask_imgread.jobs.folder import resolve_out
from dask_imgread.jobs.run import choose_client, raise_job_errors
from dask_imgread.progress import Progress, choose_progress
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.selection.folder import OutputFolder
from dask_imgread.selection.shard_writer import ShardWriter, Written, name_shard
from dask_imgread.shards.frames import index_by_id, is_lazy, require_frame
from dask_imgread.shards.samples import make_shard_id, split_name
from dask_imgread.storage.filesystems import is_local, resolve_path
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.tasks import COLUMNS

if TYPE_CHECKING:
    from dask.dataframe import DataFrame
    from distributed import Client

    from dask_imgread.shards.frames import Frame

Item = TypeVar("Item", contravariant=True)

IMAGES_PER_SHARD = 10_000
# A key that leads to another folder, or that not all readers end at the same dot.
_ODD_KEY = r"^/|(^|[/\\])\.\.([/\\]|$)|\.[^/]*$|(^|/)$|\x00"
_OPTIONAL = ("shard_version", "sample_offset", "sample_size")
_INDEXES = {"dali", "wids"}
_READER = ImageReaderStage(decode=False)  # no GPU is needed
_MOST_ERRORS = 10

logger = logging.getLogger("dask_imgread")


def write_shards(
    frame: Frame | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
    sort_by: str | Sequence[str] | None = None,
    shuffle: int | None = None,
    json_columns: Sequence[str] = (),
    index: Collection[str] = (),
    client: Client | AbstractContextManager[Client] | None = None,
    storage_options: dict[str, Any] | None = None,
    out_options: dict[str, Any] | None = None,
    retries: int = 2,
    overwrite: bool = False,
    progress: bool = False,
) -> DataFrame:
    """Write the samples of chosen rows as new WebDataset shards, without decoding anything.

    Each image keeps its bytes, and so do all sidecars of its sample; other images of the sample are
    written only if their rows are chosen, too. Names and contents of the shards depend on nothing
    but the rows and the options. A shard appears under its name when all of it is written. A call
    that was killed, at any moment, and is made again writes what is missing.

    Parameters
    ----------
    frame
        Rows of pandas or Dask, as ``read_metadata`` makes them, or the output folder of a job. They
        are computed, and held in memory here. Rows without an image, which record damage, are left
        out.
    out
        A folder, or a URL that fsspec can write to. The shards are ``00000.tar`` and so on; their
        rows go to ``metadata/``.
    images_per_shard
        How many images a shard has at most; all have about the same number. A sample is never
        split: one with several images may exceed it.
    sort_by
        One or several columns by which the samples are ordered; missing values come last, and equal
        ones stay in the order of the rows. If not given, all do.
    shuffle
        A number that decides a random order, which depends on nothing else but the images' ids.
    json_columns
        Columns that become the member ``.json`` of each sample; ``.columns.json`` where it has a
        ``.json``. Missing values are left out; what JSON has no type for becomes a string, bytes
        one in base64. Of a sample with several images the first one's row counts.
    index
        Index files to write: ``"dali"`` (one for each shard, for ``fn.readers.webdataset``),
        ``"wids"`` (``index.json``, for the package ``wids``).
    client
        As for ``run_job``: a client, or ``connect_client(...)``; if not given, a cluster is started
        on this machine if anything is left to do.
    storage_options, out_options
        Options for the file systems of the shards that are read, and of ``out``, if that needs
        others.
    retries
        How often a shard is tried again.
    overwrite
        Remove what another call has written to ``out``.
    progress
        Show it on stderr.

    Returns
    -------
    dask.dataframe.DataFrame
        The rows as they are now: with new ids, places and versions, and ``source_id``, the
        ``image_id`` that each had before. Samples of different sources with the same key get a key
        with a suffix; so do those whose key leads out of the folder, or has dots after its last
        slash, at which other readers would end it.

    Raises
    ------
    OtherJobError
        If ``out`` holds what was written from other rows or with other options; a ValueError.
    FileExistsError
        If ``out`` holds other files.
    JobError
        If shards could not be written: one that is read is gone, has changed since the rows were
        made, or does not match them. The same call tries again.
    ValueError
        If the frame lacks columns, has no rows with images, or rows that name no place in a shard;
        if ``out`` is where its shards lie, or an option is wrong.

    Examples
    --------
    >>> from distributed import Client
    >>> from dask_imgread import read_metadata
    >>> from dask_imgread.testing import make_shards
    >>> frame = read_metadata(make_shards("shards", shards=2, images_per_shard=5))
    >>> with Client(n_workers=1, processes=False, dashboard_address=":0") as client:
    ...     chosen = write_shards(frame[frame.width >= 100], "chosen", client=client)
    ...     len(chosen)
    10
    """
    json_columns, index = _list(json_columns), _list(index)
    _check_options(images_per_shard, sort_by, shuffle, index)
    options = storage_options or {}
    place, out_options = resolve_out(out, options, out_options)
    rows = _collect_rows(frame, options, json_columns)
    check_place(place, rows["shard"].unique())
    rows = _name_samples(_order_rows(rows, sort_by, shuffle))
    cuts = _cut_evenly(rows["_sample"].to_numpy(), images_per_shard)
    job = {
        "rows": digest_rows(rows),
        "images per shard": images_per_shard,
        "json columns": json_columns,
        "index": sorted(index),
    }
    job_id = hashlib.blake2b(json.dumps(job).encode(), digest_size=16).hexdigest()
    writer = ShardWriter(place, out_options, options, job_id, tuple(json_columns), "dali" in index)
    folder = OutputFolder(place, out_options)
    folder.prepare(job, overwrite)
    written = folder.list_written(len(cuts) - 1, job_id)
    wanted = (
        (n, rows.iloc[start:stop])
        for n, (start, stop) in enumerate(pairwise(cuts))
        if n not in written
    )
    run_writer(
        writer,
        wanted,
        total=len(cuts) - 1,
        done=len(written),
        client=client,
        retries=retries,
        progress=progress,
    )
    if "wids" in index:
        counts = [rows["_sample"].iloc[start:stop].nunique() for start, stop in pairwise(cuts)]
        folder.write_wids_index([(name_shard(n), count) for n, count in enumerate(counts)])
    folder.remove_drafts()
    return dd.read_parquet(
        f"{place}/metadata", dtype_backend="pyarrow", storage_options=out_options or None
    )


def _list(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


class ShardPlan(NamedTuple):
    """What ``write_shards`` would write."""

    images: int
    samples: int
    shards: int
    size: int  # bytes of the samples; of the images, where that is not known


def plan_shards(
    frame: Frame,
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
    sort_by: str | Sequence[str] | None = None,
    json_columns: Sequence[str] = (),
) -> ShardPlan:
    """Return what ``write_shards`` would write of a frame's rows.

    Raises
    ------
    ValueError
        As ``write_shards`` does.
    """
    rows = _name_samples(_order_rows(_collect_rows(frame, {}, json_columns), sort_by, None))
    first = rows[~rows["_sample"].duplicated()]
    size = int(first["sample_size"].fillna(first["size"]).sum())
    shards = len(_cut_evenly(rows["_sample"].to_numpy(), images_per_shard)) - 1
    return ShardPlan(len(rows), len(first), shards, size)


def _check_options(
    images_per_shard: int,
    sort_by: str | Sequence[str] | None,
    shuffle: int | None,
    index: Collection[str],
) -> None:
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard must be at least 1, not {images_per_shard}")
    if sort_by is not None and shuffle is not None:
        raise ValueError("sort_by and shuffle can't be given together: give one")
    unknown = sorted(set(index) - _INDEXES)
    if unknown:
        raise ValueError(f"index takes {', '.join(sorted(_INDEXES))}, not {', '.join(unknown)}")


def check_place(place: str, shards: Iterable[str]) -> None:
    """Raise ValueError if shards that are read lie where others are to be written."""
    inside = f"{_follow_links(place)}/"
    for path in shards:
        if _follow_links(path).startswith(inside):
            raise ValueError(
                f"{redact_url(path)}, which is read, lies in {redact_url(place)}: give another "
                "folder to write to"
            )


def check_apart(place: str, folders: Iterable[str]) -> None:
    """Raise ValueError if what is to be written lies in a folder whose shards are read.

    The same call would then find other shards when it is made again.
    """
    for path in folders:
        if f"{_follow_links(place)}/".startswith(f"{_follow_links(path)}/"):
            raise ValueError(
                f"{redact_url(place)} lies in {redact_url(path)}, all of whose shards are read: "
                "give a folder elsewhere to write to"
            )


def _follow_links(path: str) -> str:
    """Return one spelling of a path or URL: ``s3a://`` is ``s3://``, for example."""
    if is_local(path):
        return os.path.realpath(resolve_path(path))
    url = path.rpartition("::")[2]
    kind = fsspec.get_filesystem_class(url.partition("://")[0])
    return f"{kind.__name__}:{kind._strip_protocol(url)}"


def _collect_rows(
    frame: Frame | str | os.PathLike[str], options: dict[str, Any], json_columns: Sequence[str]
) -> pd.DataFrame:
    """Return the rows with images, each once, indexed by ``image_id``, with all columns needed."""
    opened = require_frame(frame, options)
    rows = convert_to_arrow(index_by_id(opened.compute() if is_lazy(opened) else opened))
    _check_columns("json_columns", json_columns, rows)
    empty = rows["size"].fillna(0) == 0
    if empty.any():
        logger.warning("%d rows have no image, but record damage: left out", empty.sum())
        rows = rows[~empty]
    if not len(rows):
        raise ValueError("the frame has no rows with images: nothing to write")
    for name in _OPTIONAL:
        if name not in rows:
            rows[name] = pd.array([None] * len(rows), dtype=COLUMNS[name])
    rows["shard_version"] = rows["shard_version"].astype(COLUMNS["shard_version"])
    for name in ("offset", "size", "sample_offset", "sample_size"):
        rows[name] = _check_numbers(rows, name)
    if rows.index.name != "image_id" or "key" not in rows:
        rows = _complete_names(rows)
    _refuse(rows, rows["key"].isna(), "key")
    _refuse(rows, rows["shard"].isna(), "shard")
    paths = {path: resolve_path(path) for path in rows["shard"].unique()}
    rows["shard"] = rows["shard"].map(paths).astype(COLUMNS["shard"])
    place = rows[["shard", "offset", "key"]].reset_index()
    return rows[~place.duplicated().to_numpy()]


def _check_columns(option: str, names: Iterable[str], rows: pd.DataFrame) -> None:
    lacking = [name for name in names if name not in (*rows.columns, rows.index.name)]
    if lacking:
        raise ValueError(f"{option}: the frame has no {', '.join(lacking)}")


def convert_to_arrow(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows with Arrow's types, which are then the same for each part of them."""
    try:
        table = pa.Table.from_pandas(rows)
    except pa.ArrowException as error:
        raise ValueError(f"a column can't be written as Parquet: {error}") from error
    return table.to_pandas(types_mapper=_choose_dtype)


def _choose_dtype(kind: pa.DataType) -> Any:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return pd.StringDtype("pyarrow") if text else pd.ArrowDtype(kind)


def _check_numbers(rows: pd.DataFrame, name: str) -> pd.Series:
    """Return a column of places as whole numbers."""
    numbers = pd.to_numeric(rows[name], errors="coerce").astype("Float64")
    right = ((numbers >= 0) & (numbers < 2**62) & (numbers % 1 == 0)).fillna(False)
    right |= rows[name].isna() if name in _OPTIONAL else False
    _refuse(rows, ~right, name)
    return numbers.astype("int64[pyarrow]")


def _refuse(rows: pd.DataFrame, wrong: pd.Series, name: str) -> None:
    """Raise ValueError if some rows name no place in a shard, because of one column."""
    if wrong.any():
        first = rows[wrong].iloc[0]
        raise ValueError(
            f"{wrong.sum()} rows name no place in a shard, such as {first.name}, of the shard "
            f"{redact_url(str(first['shard']))}: its {name} is {first[name]}"
        )


def _complete_names(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the column ``key`` or the index ``image_id``, each from the other."""
    if "key" not in rows:
        names = rows.index.astype(str).str.partition("/").get_level_values(2)
        return rows.assign(key=[split_name(name)[0] for name in names])
    _refuse(rows, rows["shard"].isna(), "shard")
    shard_ids = {path: make_shard_id(resolve_path(path)) for path in rows["shard"].unique()}
    ids = [f"{shard_ids[s]}/{key}" for s, key in zip(rows["shard"], rows["key"], strict=True)]
    return rows.set_axis(pd.Index(ids, dtype="string[pyarrow]", name="image_id"))


def _order_rows(
    rows: pd.DataFrame, sort_by: str | Sequence[str] | None, shuffle: int | None
) -> pd.DataFrame:
    if shuffle is not None:
        key = f"{shuffle:016d}"[-16:]
        hashes = pd.util.hash_array(rows.index.to_numpy(object), hash_key=key)
        return rows.iloc[np.lexsort((rows.index.to_numpy(str), hashes))]
    if sort_by is not None:
        columns = _list(sort_by)
        _check_columns("sort_by", columns, rows)
        try:
            return rows.sort_values(columns, kind="stable")
        except (NotImplementedError, TypeError) as error:
            raise ValueError(f"sort_by: {', '.join(columns)}: {error}") from error
    return rows


def _name_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the number of each row's sample, in ascending order, and the key it is written under."""
    place = rows["sample_offset"].astype("string[pyarrow]")
    place = place.fillna("@" + rows["key"].astype(str) + _tell_apart(rows))
    numbers, _ = pd.factorize(rows["shard"].astype(str) + "\0" + place)
    rows = rows.assign(_sample=numbers, _key=rows["key"]).sort_values("_sample", kind="stable")
    first = rows[~rows["_sample"].duplicated()]
    keys = first["key"].astype(str)
    odd = pc.match_substring_regex(pa.array(keys, pa.string()), _ODD_KEY).to_numpy(False)
    renamed = first[keys.duplicated(keep=False).to_numpy() | odd]
    taken = set(keys)
    new_keys: dict[int, str] = {}
    for number, key, shard, offset in zip(
        *(renamed[name] for name in ("_sample", "key", "shard", "offset")), strict=True
    ):
        new_keys[number] = _make_key(str(key), f"{shard}\0{offset}", taken)
    if new_keys:
        chosen = rows["_sample"].map(new_keys)
        rows["_key"] = chosen.where(chosen.notna(), rows["key"])
    return rows


def _tell_apart(rows: pd.DataFrame) -> pd.Series:
    """Return what distinguishes samples of a shard with the same key: nothing, for most."""
    if "warning" not in rows:
        return pd.Series("", rows.index)
    again = rows["warning"].astype(str).str.match("key again|duplicate name")
    return ("\0" + rows["offset"].astype(str)).where(again.astype(bool), "")


def _make_key(key: str, place: str, taken: set[str]) -> str:
    """Return a plain key that no other sample has, and add it to those ``taken``."""
    *folders, name = key.replace("\0", "_").replace("..", "_").lstrip("/").split("/")
    plain = "/".join([*folders, name.replace(".", "_")])
    while True:
        new = f"{plain}-{hashlib.blake2b(place.encode(), digest_size=5).hexdigest()}"
        if new not in taken:
            taken.add(new)
            return new
        place += "\0"


def _cut_evenly(samples: np.ndarray, images_per_shard: int) -> list[int]:
    """Return where to cut rows, numbered by their samples, into parts of about the same size."""
    count = -(-len(samples) // images_per_shard)
    targets = [round(n * len(samples) / count) for n in range(count)]
    cuts = np.searchsorted(samples, samples[targets])
    return [*dict.fromkeys(cuts.tolist()), len(samples)]


class _Digest(io.RawIOBase):
    """A file that keeps only a digest of what is written to it."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=16)

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.hash.update(content)
        return len(content)


def digest_rows(rows: pd.DataFrame) -> str:
    """Return a digest of the rows' values, however Arrow holds them."""
    digest = _Digest()
    table = pa.Table.from_pandas(rows)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_boolean(column.type):  # a byte's unused bits may be anything
            column = column.cast(pa.uint8())
        elif isinstance(column.type, pa.ListType):  # Parquet has another name for the values
            column = column.cast(pa.list_(column.type.value_type))
        # What lies where values are missing may be anything, too.
        for values in (pc.indices_nonzero(column.is_null()), column.drop_null()):
            part = pa.table({name: values}).combine_chunks()
            with pa.ipc.new_stream(pa.PythonFile(digest, "w"), part.schema) as stream:
                stream.write_table(part)
    return digest.hash.hexdigest()


class Writer(Protocol[Item]):
    """What writes one shard, on a worker."""

    @property
    def out_options(self) -> dict[str, Any]:
        """The options of the output's file system."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """The options of the file system of the shards that are read."""

    def __call__(self, item: Item, /) -> Written:
        """Write the shard of one item."""

    def name_shard(self, item: Item, /) -> str:
        """Return the shard's name in the output folder."""


def run_writer(
    writer: Writer[Item],
    wanted: Iterable[Item],
    *,
    total: int,
    done: int,
    client: Client | AbstractContextManager[Client] | None,
    retries: int,
    progress: bool,
) -> None:
    """Write the shards that are wanted on a cluster, which is asked for only if there are any.

    Parameters
    ----------
    writer
        What writes one.
    wanted
        The shards that are still to be written.
    total, done
        How many shards there are, and how many of them are written.
    client, retries, progress
        As for ``write_shards``.

    Raises
    ------
    JobError
        If some can't be written; the others are.
    """
    if done == total:
        return
    with raise_job_errors(), choose_client(client, _READER) as opened:
        wait_for_workers(opened)
        with choose_progress(total, done, hidden=not progress) as shown:
            _write(opened, writer, wanted, shown, retries)


def _write(
    client: Client,
    writer: Writer[Item],
    wanted: Iterable[Item],
    progress: Progress,
    retries: int,
) -> None:
    errors: list[str] = []
    images = 0
    tasks = run_tasks(client, writer, wanted, pure=False, retries=retries)
    for ended, (item, result) in enumerate(tasks, 1):
        if isinstance(result, Exception):
            secrets = {"read": writer.storage_options, "written": writer.out_options}
            reason = hide_secrets(f"{type(result).__name__}: {result}", secrets)
            errors.append(f"{writer.name_shard(item)}: {reason}")
            logger.error("%s", errors[-1])
            if len(errors) == _MOST_ERRORS:
                break
        else:
            images += result.images
        progress.update(ended - len(errors), images, 0)
    if errors:
        raise JobError(
            f"{len(errors)} shards could not be written, such as {errors[0]}. The same call tries "
            "them again"
        )
