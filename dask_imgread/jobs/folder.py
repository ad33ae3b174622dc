"""A job's output folder: a Parquet dataset in parts, and beside them the job's own files.

========================  =====================================================================
``part-0000000.parquet``  the rows of one partition, written in one piece or not at all
``_images/``              where a function makes the rows: the images' records, in parts too
``_job.json``             the job's description: what is read, with which options; written last
``_plan.arrow``           one row for each partition: which part of which shards it reads
``_shards.arrow``         one row for each shard
``_schema.arrow``         no rows, but the columns and types that all parts have
========================  =====================================================================

PyArrow skips names that begin with an underscore when it reads a Parquet dataset, and Dask skips
names that do not end in ``.parquet``. Both read the parts, and nothing else.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dask_imgread.errors import OtherJobError
from dask_imgread.shards.frames import JOB
from dask_imgread.storage.files import DRAFT, open_bytes, write_whole
from dask_imgread.storage.filesystems import connect
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import with_retries

PLAN, SHARDS, SCHEMA = "_plan.arrow", "_shards.arrow", "_schema.arrow"
IMAGES = "_images"
CLEARED = 0  # the format of a folder that is being cleared
FOOTER = b"dask_imgread"
_PART = re.compile(r"part-\d{7,}\.parquet")
_OURS = re.compile(r"_(job\.json|(plan|shards|schema)\.arrow|report\.html|tmp-.*)")
_READERS = 16  # footers read at the same time
_FOOTERS = 1000  # queued for reading at the same time

logger = logging.getLogger("dask_imgread")


@dataclass(frozen=True)
class Count:
    """How many images were read, how many failed, and for how many of these the function raised."""

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
    """How a part was made, as JSON in the metadata of its Parquet schema."""

    job: str  # the `id` in `_job.json`
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
    storage_options
        Options for fsspec's file system. Left out of ``repr``: they may hold credentials.
    """

    url: str
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)

    def read_job(self) -> dict[str, Any] | None:
        """Return the job's description, None if the folder holds no job."""
        fs, root = self.connect()
        try:
            description = json.loads(with_retries(fs.cat_file, self.url, f"{root}/{JOB}"))
        except FileNotFoundError:
            return None
        except ValueError:
            description = None
        if not isinstance(description, dict) or "format" not in description:
            raise FileExistsError(f"{redact_url(self.url)}/{JOB} is no job's: give another folder")
        return description

    def write_job(self, description: dict[str, Any]) -> None:
        """Write the job's description."""
        self._write(JOB, json.dumps(description, indent=1).encode())

    def read_table(self, name: str) -> pa.Table:
        """Return one of the job's own tables."""
        return pa.ipc.open_file(self.open(name)).read_all()

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write one of the job's own tables."""
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table)
        self._write(name, buffer.getvalue())

    def write_part(
        self, number: int, rows: pa.Table, records: pa.Table | None, footer: Footer
    ) -> None:
        """Write one partition in one piece or not at all: it is done when its part is there.

        Raises
        ------
        OtherJobError
            If the folder has been given to another job since: a cluster may still run the tasks
            of a client that is gone.
        """
        description = self.read_job()
        if description is None:
            raise FileNotFoundError(
                f"{redact_url(self.url)}/{JOB} is not there: does this worker see the same folder?"
            )
        if description["id"] != footer.job:
            raise OtherJobError(
                f"{redact_url(self.url)} now belongs to another job: give another folder"
            )
        metadata = {FOOTER: json.dumps(asdict(footer)).encode()}
        name = f"part-{number:07d}.parquet"
        if records is not None:
            # A part and its records must come from one attempt. So the earlier part goes first:
            # if the worker dies here, the partition counts as not done.
            fs, root = self.connect()
            with suppress(FileNotFoundError):
                with_retries(fs.rm_file, self.url, f"{root}/{name}")
            self._write(name_records(name), _to_parquet(records, metadata))
        self._write(name, _to_parquet(rows, metadata))

    def mark_done(self, partitions: int) -> bytearray:
        """Return 1 for each partition whose part is there, else 0."""
        done = bytearray(partitions)
        for name in self.list_parts():
            number = int(name.removeprefix("part-").removesuffix(".parquet"))
            if number < partitions:
                done[number] = 1
        return done

    def list_parts(self) -> list[str]:
        """Return the names of the parts, in order."""
        return sorted(filter(_PART.fullmatch, self._list()))

    def read_footers(self, numbers: Iterable[int]) -> Iterator[tuple[int, Footer | None]]:
        """Yield the number and footer of each of the given parts, None for a damaged one."""
        waiting = iter(numbers)
        with ThreadPoolExecutor(_READERS) as pool:
            while some := list(islice(waiting, _FOOTERS)):
                yield from zip(some, pool.map(self.read_footer, some), strict=True)

    def read_footer(self, number: int) -> Footer | None:
        """Return the footer of a part, None if the part is damaged or missing."""
        fs, root = self.connect()
        path = f"{root}/part-{number:07d}.parquet"
        try:
            return with_retries(_read_footer, self.url, fs, path)
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        """Remove what a job has written.

        Raises
        ------
        FileExistsError
            If something else is in the folder, which is then left as it is.
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
        if has_job:
            # `_job.json` is removed last, and marks the rest as output that is being removed, in
            # case this process is killed meanwhile.
            self.write_job({"format": CLEARED, "id": ""})
        for name in sorted(names, key=lambda name: name == JOB):
            with_retries(fs.rm, self.url, f"{root}/{name}", recursive=name == IMAGES)

    def remove_drafts(self) -> None:
        """Remove the drafts of files that killed workers did not complete."""
        fs, root = self.connect()
        for folder in (root, f"{root}/{IMAGES}"):
            for name in self._list(folder):
                if name.startswith(DRAFT):
                    with suppress(FileNotFoundError):
                        fs.rm_file(f"{folder}/{name}")

    def connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the folder's file system, and its path in it."""
        fs, root = connect(self.url, self.storage_options)
        return fs, root.rstrip("/")

    def open(self, name: str) -> pa.NativeFile:
        """Fetch one of the folder's files whole, for Arrow to read."""
        fs, root = self.connect()
        return open_bytes(with_retries(fs.cat_file, self.url, f"{root}/{name}"))

    def _list(self, folder: str | None = None) -> list[str]:
        fs, root = self.connect()
        folder = folder or root
        fs.invalidate_cache(folder)  # other processes write here
        try:
            paths = with_retries(fs.ls, self.url, folder, detail=False)
        except FileNotFoundError:
            return []
        # Some stores list the folder itself, too.
        inside = [path.rstrip("/") for path in paths if path.rstrip("/") != folder]
        return [path.rpartition("/")[2] for path in inside]

    def _write(self, name: str, content: bytes) -> None:
        fs, root = self.connect()
        with_retries(write_whole, f"{self.url}/{name}", fs, f"{root}/{name}", content)


def name_records(part: str) -> str:
    """Return the name of a part's records: not ``.parquet``, by which some readers find parts.

    Examples
    --------
    >>> name_records("part-0000007.parquet")
    '_images/part-0000007.records'
    """
    return f"{IMAGES}/{part.removesuffix('.parquet')}.records"


def _read_footer(fs: fsspec.AbstractFileSystem, path: str) -> Footer | None:
    with fs.open(path, "rb") as file:
        try:
            return Footer(**json.loads(pq.read_schema(file).metadata[FOOTER]))
        except (pa.ArrowInvalid, KeyError, TypeError) as error:
            logger.warning("%s is damaged, and is made again: %s", redact_url(path), error)
            return None


def _to_parquet(table: pa.Table, metadata: dict[bytes, bytes]) -> bytes:
    buffer = io.BytesIO()
    merged = {**(table.schema.metadata or {}), **metadata}
    pq.write_table(table.replace_schema_metadata(merged), buffer)
    return buffer.getvalue()
