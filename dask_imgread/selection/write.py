"""Write chosen samples as new shards, on a cluster."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dask_imgread.cluster.start import wait_for_workers
from dask_imgread.cluster.window import run_tasks
from dask_imgread.errors import JobError, OtherJobError
from dask_imgread.jobs.run import choose_client, raise_job_errors
from dask_imgread.progress import Progress, choose_progress
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.selection.shard_writer import JOB_KEY, ShardWriter, name_rows, name_shard
from dask_imgread.shards.frames import is_lazy, open_frame
from dask_imgread.shards.samples import make_shard_id, split_name
from dask_imgread.storage.files import DRAFT, open_bytes, write_whole
from dask_imgread.storage.filesystems import connect, is_local, resolve_path
from dask_imgread.storage.redaction import hide_secrets, redact_url
from dask_imgread.storage.retries import with_retries
from dask_imgread.tasks import COLUMNS

if TYPE_CHECKING:
    from dask.dataframe import DataFrame
    from distributed import Client

    from dask_imgread.shards.frames import Frame

IMAGES_PER_SHARD = 10_000
_DESCRIPTION = "_write.json"  # what decides the shards; beside them
_OPTIONAL = ("shard_version", "sample_offset", "sample_size")
_OURS = re.compile(
    r"\d{5,}\.(tar|idx)|index\.json|_write\.json|metadata/part-\d{5,}\.parquet|(metadata/)?_tmp-.*"
)
_INDEXES = {"dali", "wids"}
_READER = ImageReaderStage(decode=False)  # no GPU is needed
_MOST_ERRORS = 10
_READERS = 16  # footers read at the same time

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
        split.
    sort_by
        One or several columns by which the samples are ordered; missing values come last. If not
        given, they are in the order of the rows.
    shuffle
        A number that decides a random order, which depends on nothing else but the images' ids.
    json_columns
        Columns that become the member ``.json`` of each sample; ``.columns.json`` where it has a
        ``.json``.
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
        with a suffix.

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
        If the frame lacks columns, has no rows with images, or an option is wrong.

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
    _check_options(images_per_shard, sort_by, shuffle, index)
    options = storage_options or {}
    rows = _collect_rows(frame, options, json_columns)
    rows = _name_samples(_order_rows(rows, sort_by, shuffle))
    cuts = _cut_evenly(rows["_sample"].to_numpy(), images_per_shard)
    place = resolve_path(os.path.expanduser(os.fspath(out))).rstrip("/")
    out_options = ({} if is_local(place) else options) if out_options is None else out_options
    job = {
        "rows": _digest_rows(rows),
        "images per shard": images_per_shard,
        "json columns": list(json_columns),
        "index": sorted(index),
    }
    job_id = hashlib.blake2b(json.dumps(job).encode(), digest_size=16).hexdigest()
    writer = ShardWriter(place, out_options, options, job_id, tuple(json_columns), "dali" in index)
    folder = _Folder(place, out_options)
    folder.prepare(job, overwrite)
    written = folder.list_written(len(cuts) - 1, job_id)
    wanted = [(start, stop) for n, (start, stop) in enumerate(pairwise(cuts)) if n not in written]
    if wanted:
        partitions = ((cuts.index(start), rows.iloc[start:stop]) for start, stop in wanted)
        with raise_job_errors(), choose_client(client, _READER) as opened:
            wait_for_workers(opened)
            with choose_progress(len(cuts) - 1, len(written), hidden=not progress) as shown:
                _write_partitions(opened, writer, partitions, shown, retries)
    if "wids" in index:
        counts = [rows["_sample"].iloc[start:stop].nunique() for start, stop in pairwise(cuts)]
        folder.write_wids_index([(name_shard(n), count) for n, count in enumerate(counts)])
    folder.remove_drafts()
    return dd.read_parquet(
        f"{place}/metadata", dtype_backend="pyarrow", storage_options=out_options or None
    )


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
    unknown = {index} - _INDEXES if isinstance(index, str) else set(index) - _INDEXES
    if unknown:
        raise ValueError(f"index takes {', '.join(sorted(_INDEXES))}, not {', '.join(unknown)}")


def _collect_rows(
    frame: Frame | str | os.PathLike[str], options: dict[str, Any], json_columns: Sequence[str]
) -> pd.DataFrame:
    """Return the rows with images, each once, indexed by ``image_id``, with all columns needed."""
    opened = open_frame(frame, options)
    if opened is None:
        raise ValueError(f"a DataFrame of images is expected, or a job's folder, not {frame!r}")
    rows = opened.compute() if is_lazy(opened) else opened
    lacking = [name for name in json_columns if name not in rows]
    if lacking:
        raise ValueError(f"json_columns: the frame has no {', '.join(lacking)}")
    rows = rows.set_index("image_id") if "image_id" in rows else rows.copy(deep=False)
    empty = rows["size"].fillna(0) == 0
    if empty.any():
        logger.warning("%d rows have no image, but record damage: left out", empty.sum())
        rows = rows[~empty]
    if not len(rows):
        raise ValueError("the frame has no rows with images: nothing to write")
    for name in ("offset", "size"):
        numbers = pd.to_numeric(rows[name], errors="coerce").astype("Float64")
        wrong = ~((numbers >= 0) & (numbers < 2**62) & (numbers % 1 == 0)).fillna(False)
        if wrong.any() or rows["shard"].isna().any():
            where = wrong if wrong.any() else rows["shard"].isna()
            raise ValueError(
                f"{where.sum()} rows name no place in a shard, such as {rows.index[where][0]}: "
                f"shard {rows['shard'][where].iloc[0]}, {name} {rows[name][where].iloc[0]}"
            )
        rows[name] = numbers.astype("int64[pyarrow]")
    for name in _OPTIONAL:
        if name not in rows:
            rows[name] = pd.array([None] * len(rows), dtype=COLUMNS[name])
    if rows.index.name != "image_id" or "key" not in rows:
        rows = _complete_names(rows)
    return rows[~rows.duplicated(["shard", "offset"])]


def _complete_names(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the column ``key`` or the index ``image_id``, each from the other."""
    if "key" not in rows:
        names = rows.index.astype(str).str.partition("/").get_level_values(2)
        return rows.assign(key=[split_name(name)[0] for name in names])
    shard_ids = {path: make_shard_id(resolve_path(str(path))) for path in rows["shard"].unique()}
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
        columns = [sort_by] if isinstance(sort_by, str) else list(sort_by)
        lacking = [name for name in columns if name not in rows]
        if lacking:
            raise ValueError(f"sort_by: the frame has no {', '.join(lacking)}")
        return rows.sort_values(columns, kind="stable")
    return rows


def _name_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the number of each row's sample, in ascending order, and the key it is written under."""
    place = rows["sample_offset"].astype("string[pyarrow]").fillna("@" + rows["key"].astype(str))
    numbers, _ = pd.factorize(rows["shard"].astype(str) + "\0" + place)
    rows = rows.assign(_sample=numbers, _key=rows["key"]).sort_values("_sample", kind="stable")
    first = rows[~rows["_sample"].duplicated()]
    keys = first["key"].astype(str)
    unsafe = keys.str.startswith("/") | keys.str.split("/").map(lambda parts: ".." in parts)
    renamed = first[(keys.duplicated(keep=False) | unsafe).to_numpy()]
    new_keys = {
        number: _make_key(str(key), f"{shard}\0{offset}")
        for number, key, shard, offset in zip(
            *(renamed[name] for name in ("_sample", "key", "shard", "offset")), strict=True
        )
    }
    if new_keys:
        chosen = rows["_sample"].map(new_keys)
        rows["_key"] = chosen.where(chosen.notna(), rows["key"])
    return rows


def _make_key(key: str, place: str) -> str:
    """Return a key that no other sample has, and that leads to no other folder."""
    parts = [part if part != ".." else "_" for part in key.lstrip("/").split("/")]
    return f"{'/'.join(parts)}-{hashlib.blake2b(place.encode(), digest_size=5).hexdigest()}"


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


def _digest_rows(rows: pd.DataFrame) -> str:
    """Return a digest of the rows' values, the same in every process."""
    digest = _Digest()
    table = pa.Table.from_pandas(rows).replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(pa.PythonFile(digest, "w"), table.schema) as stream:
        stream.write_table(table)
    return digest.hash.hexdigest()


def _write_partitions(
    client: Client,
    writer: ShardWriter,
    partitions: Iterator[tuple[int, pd.DataFrame]],
    progress: Progress,
    retries: int,
) -> None:
    """Write partitions on the cluster.

    Raises
    ------
    JobError
        If some can't be written; the others are.
    """
    errors: list[str] = []
    images = 0
    tasks = run_tasks(client, writer, partitions, pure=False, retries=retries)
    for ended, ((number, _), result) in enumerate(tasks, 1):
        if isinstance(result, Exception):
            reason = hide_secrets(f"{type(result).__name__}: {result}", writer.storage_options)
            errors.append(f"{name_shard(number)}: {reason}")
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


class _Folder:
    """The folder that shards are written to."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url, self._options = url, options
        self._fs, self._root = connect(url, options)

    def prepare(self, description: dict[str, Any], overwrite: bool) -> None:
        """Begin, or go on with what was begun.

        Raises
        ------
        OtherJobError
            If something else was begun there.
        FileExistsError
            If there are other files.
        """
        names = self._list_names()
        if _DESCRIPTION in names:
            content = with_retries(self._fs.cat_file, self.url, f"{self._root}/{_DESCRIPTION}")
            before = json.loads(content)
            if before == description:
                return
            if not overwrite:
                changed = [key for key in description if before.get(key) != description[key]]
                raise OtherJobError(
                    f"{redact_url(self.url)} was written with other {', '.join(changed)}: give "
                    "another folder, or overwrite it"
                )
            for name in sorted(names, key=lambda name: name == _DESCRIPTION):
                if _OURS.fullmatch(name):
                    with_retries(self._fs.rm_file, self.url, f"{self._root}/{name}")
        elif names:
            raise FileExistsError(
                f"{redact_url(self.url)} holds other files, such as {min(names)}: give an empty "
                "folder"
            )
        content = json.dumps(description, indent=1).encode()
        write_whole(self._fs, f"{self._root}/{_DESCRIPTION}", content)

    def list_written(self, count: int, job_id: str) -> set[int]:
        """Return the numbers of the shards that are there, with their rows."""
        names = self._list_names()
        there = [n for n in range(count) if {name_shard(n), name_rows(n)} <= names]
        with ThreadPoolExecutor(_READERS) as pool:
            ids = pool.map(self._read_job_id, there)
            return {n for n, found in zip(there, ids, strict=True) if found == job_id}

    def write_wids_index(self, shards: list[tuple[str, int]]) -> None:
        """Write the index of all shards that the package ``wids`` takes."""
        described = [{"url": name, "nsamples": samples} for name, samples in shards]
        index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": described}
        write_whole(self._fs, f"{self._root}/index.json", json.dumps(index, indent=1).encode())

    def remove_drafts(self) -> None:
        """Remove what killed writers have left."""
        for name in self._list_names():
            if name.rpartition("/")[2].startswith(DRAFT):
                with suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._root}/{name}")

    def _list_names(self) -> set[str]:
        self._fs.invalidate_cache()
        if not with_retries(self._fs.exists, self.url, self._root):
            return set()
        found = with_retries(self._fs.find, self.url, self._root)
        root = self._fs._strip_protocol(self._root).rstrip("/") + "/"
        return {name.removeprefix(root) for name in found}

    def _read_job_id(self, number: int) -> str:
        path = f"{self._root}/{name_rows(number)}"
        content = with_retries(self._fs.cat_file, self.url, path)
        metadata = pq.read_schema(open_bytes(content)).metadata or {}
        return bytes(metadata.get(JOB_KEY, b"")).decode()
