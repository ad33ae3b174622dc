"""A job's output folder: a Parquet dataset in parts, and beside them what the job is.

========================  =====================================================================
``part-0000000.parquet``  the rows of one partition, written once, whole or not at all
``_images/``              where a function made the rows: the records of the images, in parts too
``_job.json``             what is read with which options; written last, when the plan is whole
``_plan.parquet``         one row for each partition: which part of which shards
``_shards.parquet``       one row for each shard
``_schema.parquet``       no rows: the columns and types that all parts have
========================  =====================================================================

Readers of Parquet datasets pass over names that begin with an underscore.
"""

from __future__ import annotations

import io
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.shards import connect
from dask_imgread.storage import name_url, with_retries

JOB, PLAN, SHARDS, SCHEMA = "_job.json", "_plan.parquet", "_shards.parquet", "_schema.parquet"
IMAGES = "_images"
FOOTER = b"dask_imgread"
_PART = re.compile(r"part-\d+\.parquet")
_OURS = re.compile(
    r"part-\d+\.parquet|_(job\.json|(plan|shards|schema)\.parquet|report\.html|tmp-.*)"
)
# In these stores a file is there when all of it is; elsewhere it is renamed when it is whole.
_WHOLE_ON_PUT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory"}
_READERS = 16  # footers read at the same time
_SAMPLED = 100  # parts looked at for samples


@dataclass(frozen=True)
class Count:
    """How many images were read, and how many could not be."""

    images: int = 0
    failed: int = 0

    def __add__(self, other: Count) -> Count:
        """Add the numbers."""
        return Count(self.images + other.images, self.failed + other.failed)


@dataclass(frozen=True)
class Footer:
    """What a part tells of how it came about; stands in its Parquet schema's metadata."""

    images: int
    failed: int
    began: float  # seconds since 1970
    ended: float
    worker: str


@dataclass(frozen=True)
class JobFolder:
    """A job's output folder, on a disk or in a store.

    Parameters
    ----------
    url
        A path or a URL that fsspec knows.
    options
        Options for fsspec's file system. Left out of ``repr``: they may hold credentials.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def read_job(self) -> dict[str, Any] | None:
        """Return what the job is, None if the folder holds none."""
        fs, root = self.connect()
        try:
            job: dict[str, Any] = json.loads(with_retries(fs.cat_file, self.url, f"{root}/{JOB}"))
        except FileNotFoundError:
            return None
        return job

    def write_job(self, job: dict[str, Any]) -> None:
        """Write what the job is."""
        self._write(JOB, json.dumps(job, indent=1).encode())

    def read_table(self, name: str) -> pa.Table:
        """Return one of the job's own tables."""
        fs, root = self.connect()
        return pq.read_table(io.BytesIO(with_retries(fs.cat_file, self.url, f"{root}/{name}")))

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one of the job's own tables."""
        self._write(name, _to_bytes(table))

    def write_part(
        self, number: int, rows: pa.Table, records: pa.Table | None, footer: Footer
    ) -> None:
        """Write one partition, whole or not at all: it is done when ``part-`` is there."""
        marks = {FOOTER: json.dumps(asdict(footer)).encode()}
        name = f"part-{number:07d}.parquet"
        if records is not None:  # first: what is done must have its records
            self._write(f"{IMAGES}/{name}", _to_bytes(records, marks))
        self._write(name, _to_bytes(rows, marks))

    def mark_done(self, partitions: int) -> bytearray:
        """Return 1 for each partition that is done."""
        done = bytearray(partitions)
        for name in self.list_parts():
            done[int(name.removeprefix("part-").removesuffix(".parquet"))] = 1
        return done

    def list_parts(self) -> list[str]:
        """Return the names of the parts that are done, in order."""
        return sorted(filter(_PART.fullmatch, self._list()))

    def read_counts(self, numbers: Iterable[int]) -> Iterator[tuple[int, Count]]:
        """Yield the count of each of some parts, from their footers."""
        fs, root = self.connect()

        def read(number: int) -> tuple[int, Count]:
            path = f"{root}/part-{number:07d}.parquet"
            footer = with_retries(_read_footer, self.url, fs, path)
            return number, Count(footer.images, footer.failed)

        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(read, numbers)

    def read_samples(self, count: int = 5) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
        """Return a few rows, and the id and error of a few failures, of the first parts."""
        job = self.read_job() or {}
        rows: list[pd.DataFrame] = []
        failures: list[tuple[str, str]] = []
        for name in self.list_parts()[:_SAMPLED]:
            table = self.read_table(name)
            rows.append(table.slice(0, count).to_pandas().reset_index())
            if job.get("command") == "apply":
                table = self.read_table(f"{IMAGES}/{name}")
            failed = table.filter(pc.is_valid(table["error"])).slice(0, count).to_pylist()
            failures += [(row["image_id"], row["error"]) for row in failed]
            if sum(map(len, rows)) >= count and len(failures) >= count:
                break
        return pd.concat(rows)[:count] if rows else pd.DataFrame(), failures[:count]

    def clear(self) -> None:
        """Remove what a job has written.

        Raises
        ------
        FileExistsError
            If something else is in the folder, which then is left as it is.
        """
        fs, root = self.connect()
        names = self._list()
        foreign = sorted(name for name in names if not _OURS.fullmatch(name) and name != IMAGES)
        if foreign:
            raise FileExistsError(
                f"{name_url(self.url)} holds what no job has written, such as {foreign[0]}"
            )
        # The job first: without it what is left is no job's.
        for name in sorted(names, key=lambda name: name != JOB):
            with_retries(fs.rm, self.url, f"{root}/{name}", recursive=name == IMAGES)

    def tidy(self) -> None:
        """Remove what killed workers left of files that they had begun."""
        fs, root = self.connect()
        for folder in (root, f"{root}/{IMAGES}"):
            for name in self._list(folder):
                if name.startswith("_tmp-"):
                    fs.rm_file(f"{folder}/{name}")

    def connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the folder's file system, and its path in it."""
        fs, root = connect(self.url, self.options)
        return fs, root.rstrip("/")

    def _list(self, folder: str | None = None) -> list[str]:
        fs, root = self.connect()
        folder = folder or root
        fs.invalidate_cache(folder)  # others write here
        try:
            paths = with_retries(fs.ls, self.url, folder, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def _write(self, name: str, content: bytes) -> None:
        fs, root = self.connect()
        with_retries(write_whole, f"{self.url}/{name}", fs, f"{root}/{name}", content)


def _read_footer(fs: fsspec.AbstractFileSystem, path: str) -> Footer:
    with fs.open(path, "rb") as file:
        return Footer(**json.loads(pq.read_schema(file).metadata[FOOTER]))


def _to_bytes(table: pa.Table, marks: dict[bytes, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    metadata = {**(table.schema.metadata or {}), **(marks or {})}
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def write_whole(fs: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file so that it is there with all its bytes, or not."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & _WHOLE_ON_PUT:
        fs.pipe_file(path, content)
        return
    folder, _, name = path.rpartition("/")
    fs.makedirs(folder, exist_ok=True)
    draft = f"{folder}/_tmp-{name}-{uuid.uuid4().hex}"
    if isinstance(fs, LocalFileSystem):
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the name must not be on the disk before the bytes
        os.replace(draft, path)
    else:
        fs.pipe_file(draft, content)
        fs.mv(draft, path)
