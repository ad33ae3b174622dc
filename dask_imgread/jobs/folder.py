"""A job's output folder: a Parquet dataset in parts, and beside them what the job is.

========================  =====================================================================
``part-0000000.parquet``  the rows of one partition, written once, whole or not at all
``_images/``              where a function made the rows: the records of the images, in parts too
``_job.json``             what is read with which options; written last, when the plan is whole
``_plan.arrow``           one row for each partition: which part of which shards
``_shards.arrow``         one row for each shard
``_schema.arrow``         no rows: the columns and types that all parts have
========================  =====================================================================

Readers of Parquet datasets pass over names that begin with an underscore (PyArrow), or do not
end in ``.parquet`` (Dask): so nothing but the parts does both.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.errors import OtherJobError
from dask_imgread.storage.filesystems import connect
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import with_retries

JOB, PLAN, SHARDS, SCHEMA = "_job.json", "_plan.arrow", "_shards.arrow", "_schema.arrow"
IMAGES = "_images"
CLEARED = 0  # the format of a folder that is being cleared
FOOTER = b"dask_imgread"
_PART = re.compile(r"part-\d{7,}\.parquet")
_OURS = re.compile(r"_(job\.json|(plan|shards|schema)\.arrow|report\.html|tmp-.*)")
# In these stores a file is there when all of it is; elsewhere it is renamed when it is whole.
_WHOLE_ON_PUT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory"}
_READERS = 16  # footers read at the same time
_FOOTERS = 1000  # asked for in advance
_SAMPLED = 100  # parts looked at for samples

logger = logging.getLogger("dask_imgread")


@dataclass(frozen=True)
class Count:
    """How many images were read, and how many could not be, some as a function raised for them."""

    images: int = 0
    failed: int = 0
    function_failed: int = 0

    def __add__(self, other: Count) -> Count:
        """Add the numbers."""
        return Count(
            self.images + other.images,
            self.failed + other.failed,
            self.function_failed + other.function_failed,
        )


@dataclass(frozen=True)
class Footer:
    """What a part tells of how it came about; stands in its Parquet schema's metadata."""

    job: str  # the `id` in its folder's `_job.json`
    images: int
    failed: int
    began: float  # seconds since 1970
    ended: float
    worker: str
    function_failed: int = 0

    def count(self) -> Count:
        """Return how many images the part is about."""
        return Count(self.images, self.failed, self.function_failed)


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
            job = json.loads(with_retries(fs.cat_file, self.url, f"{root}/{JOB}"))
        except FileNotFoundError:
            return None
        except ValueError:
            job = None
        if not isinstance(job, dict) or "format" not in job:
            raise FileExistsError(f"{redact_url(self.url)}/{JOB} is no job's: give another folder")
        return job

    def write_job(self, job: dict[str, Any]) -> None:
        """Write what the job is."""
        self._write(JOB, json.dumps(job, indent=1).encode())

    def read_table(self, name: str) -> pa.Table:
        """Return one of the job's own tables."""
        return pa.ipc.open_file(self._read(name)).read_all()

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one of the job's own tables."""
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table)
        self._write(name, buffer.getvalue())

    def write_part(
        self, number: int, rows: pa.Table, records: pa.Table | None, footer: Footer
    ) -> None:
        """Write one partition, whole or not at all: it is done when ``part-`` is there.

        Raises
        ------
        OtherJobError
            If the folder was given to another job since; a cluster may still run the tasks
            of a client that is gone.
        """
        job = self.read_job()
        if job is None:
            raise FileNotFoundError(
                f"{redact_url(self.url)}/{JOB} is not there: does this worker see the same folder?"
            )
        if job["id"] != footer.job:
            raise OtherJobError(
                f"{redact_url(self.url)} has become another job's: give another folder"
            )
        marks = {FOOTER: json.dumps(asdict(footer)).encode()}
        name = f"part-{number:07d}.parquet"
        if records is not None:
            # Never a part beside the records of another attempt: rather it is not done.
            fs, root = self.connect()
            with suppress(FileNotFoundError):
                with_retries(fs.rm_file, self.url, f"{root}/{name}")
            self._write(name_records(name), _to_bytes(records, marks))
        self._write(name, _to_bytes(rows, marks))

    def mark_done(self, partitions: int) -> bytearray:
        """Return 1 for each partition that is done."""
        done = bytearray(partitions)
        for name in self.list_parts():
            number = int(name.removeprefix("part-").removesuffix(".parquet"))
            if number < partitions:
                done[number] = 1
        return done

    def list_parts(self) -> list[str]:
        """Return the names of the parts that are done, in order."""
        return sorted(filter(_PART.fullmatch, self._list()))

    def read_footers(self, numbers: Iterable[int]) -> Iterator[tuple[int, Footer | None]]:
        """Yield the footer of each of some parts, None for one that is damaged."""
        waiting = iter(numbers)
        with ThreadPoolExecutor(_READERS) as pool:
            while some := list(islice(waiting, _FOOTERS)):
                yield from zip(some, pool.map(self.read_footer, some), strict=True)

    def read_footer(self, number: int) -> Footer | None:
        """Return the footer of a part, None if it is damaged or not there."""
        fs, root = self.connect()
        path = f"{root}/part-{number:07d}.parquet"
        try:
            return with_retries(_read_footer, self.url, fs, path)
        except FileNotFoundError:
            return None

    def read_samples(self, count: int = 5) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
        """Return a few rows, and the id and error of a few failures, of the first parts."""
        job = self.read_job() or {}
        rows: list[pd.DataFrame] = []
        failures: list[tuple[str, str]] = []
        for name in self.list_parts()[:_SAMPLED]:
            table = pq.read_table(self._read(name))
            frame = table.slice(0, count).to_pandas()
            rows.append(frame.reset_index(drop=frame.index.names == [None]))
            if job.get("command") == "apply":
                table = pq.read_table(self._read(name_records(name)))
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
        has_job = JOB in names  # without it, parts are someone else's
        foreign = sorted(
            name
            for name in names
            if not _OURS.fullmatch(name)
            and not (has_job and (_PART.fullmatch(name) or name == IMAGES))
        )
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise FileExistsError(
                f"{redact_url(self.url)} holds what no job has written, such as {foreign[0]}"
                f"{more}: give another folder"
            )
        if has_job:  # until the last part is gone; then it is the last to go
            self.write_job({"format": CLEARED, "id": ""})
        for name in sorted(names, key=lambda name: name == JOB):
            with_retries(fs.rm, self.url, f"{root}/{name}", recursive=name == IMAGES)

    def tidy(self) -> None:
        """Remove what killed workers left of files that they had begun."""
        fs, root = self.connect()
        for folder in (root, f"{root}/{IMAGES}"):
            for name in self._list(folder):
                if name.startswith("_tmp-"):
                    with suppress(FileNotFoundError):
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
        # A store may list the folder itself.
        inside = [path.rstrip("/") for path in paths if path.rstrip("/") != folder]
        return [path.rpartition("/")[2] for path in inside]

    def _read(self, name: str) -> pa.NativeFile:
        fs, root = self.connect()
        return open_bytes(with_retries(fs.cat_file, self.url, f"{root}/{name}"))

    def _write(self, name: str, content: bytes) -> None:
        fs, root = self.connect()
        with_retries(write_whole, f"{self.url}/{name}", fs, f"{root}/{name}", content)


def name_records(part: str) -> str:
    """Return the file of a part's records: not ``.parquet``, which some readers go by alone."""
    return f"{IMAGES}/{part.removesuffix('.parquet')}.records"


def open_bytes(content: bytes) -> pa.NativeFile:
    """Return bytes as a file for Arrow to read, in memory of its own.

    Threads of Arrow read files, and may be the last to hold them. One that lets go of a Python
    object while Python exits ends the process with SIGABRT.
    """
    memory = pa.BufferOutputStream()
    memory.write(content)
    return pa.BufferReader(memory.getvalue())


def _read_footer(fs: fsspec.AbstractFileSystem, path: str) -> Footer | None:
    with fs.open(path, "rb") as file:
        try:
            return Footer(**json.loads(pq.read_schema(file).metadata[FOOTER]))
        except (pa.ArrowInvalid, KeyError, TypeError) as error:
            logger.warning("%s is damaged, and is made again: %s", redact_url(path), error)
            return None


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
    try:
        if isinstance(fs, LocalFileSystem):
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # the name must not be on the disk before the bytes
            os.replace(draft, path)
        else:
            fs.pipe_file(draft, content)
            fs.mv(draft, path)
    except BaseException:
        with suppress(OSError):
            fs.rm_file(draft)
        raise
