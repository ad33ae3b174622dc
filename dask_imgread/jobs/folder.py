"""A job's output folder: a Parquet dataset in parts, and beside them the job's own files.

=========================  ====================================================================
``part-0000000.parquet``   the rows of one or more partitions, replaced in one piece or not at all
``_images/``               where a function makes the rows: the images' records, in parts too
``_staged/``               parts that wait to be merged into others
``_job.json``              the job's description: what is read, with which options, and its runs
``_plan-<n>.arrow``        one row for each partition: which piece of which shards it is
``_shards-<n>.arrow``      one row for each shard
``_again-<n>.arrow``       one row for each piece of a shard that is being read again
``_parts.arrow``           what the footers of the parts say
``_schema.arrow``          no rows, but the columns and types that all parts have
``_claim.json``            which process works on the job at the moment
=========================  ====================================================================

``_job.json`` names the tables that are valid. So a new plan is there as a whole once that file is
replaced.

PyArrow skips names that begin with an underscore when it reads a Parquet dataset, and Dask skips
names that do not end in ``.parquet``. Both read the parts, and nothing else.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.jobs.claim import CLAIM
from dask_imgread.jobs.parts import (
    FOOTER,
    IMAGES,
    STAGING,
    Footer,
    Ledger,
    PartName,
    Place,
    index_parts,
    list_parts,
    make_token,
    warn_damaged,
)
from dask_imgread.shards.find import make_version
from dask_imgread.shards.frames import JOB
from dask_imgread.storage.files import DRAFT, open_bytes, write_whole
from dask_imgread.storage.filesystems import connect
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import with_retries

SCHEMA, LEDGER = "_schema.arrow", "_parts.arrow"
CLEARED = 0  # the format of a folder that is being cleared
_PART = re.compile(r"part-(\d{7,})\.parquet")
_STAGED = re.compile(r"(part|again)-(\d{7,})\.rows")
_OURS = re.compile(
    r"_(job|claim)\.json|_(parts|schema)\.arrow|_(plan|shards|again)(-\d+)?\.arrow"
    r"|_report\.html|_tmp-.*"
)
_TABLE = re.compile(r"_(plan|shards|again)-\d+\.arrow")
_FOLDERS = (IMAGES, STAGING)
_READERS = 16  # footers read at the same time
_FOOTERS = 1000  # queued for reading at the same time


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
        self, name: PartName, rows: pa.Table, records: pa.Table | None, footer: Footer
    ) -> None:
        """Write a part in one piece or not at all, in place of the one that has the name.

        A part and its records must come from one attempt. The records go first: if the worker dies
        between the two, the part still has to be made.
        """
        metadata = {FOOTER: footer.to_json().encode()}
        if records is not None:
            self._write(name.records, _to_parquet(records, metadata))
        self._write(name.file, _to_parquet(rows, metadata))

    def read_rows(self, name: PartName, records: bool = False) -> tuple[pa.Table, Footer]:
        """Return the rows of a part, or its images' records, and its footer.

        Raises
        ------
        FileNotFoundError
            If it is not there.
        pyarrow.ArrowInvalid
            If it is damaged.
        """
        table = pq.read_table(self.open(name.records if records else name.file))
        return table, Footer.from_metadata(table.schema.metadata)

    def find_parts(self) -> Iterator[tuple[PartName, int]]:
        """Yield the name of each part, and a number that changes when the file does."""
        for name, stamp in self._list():
            if match := _PART.fullmatch(name):
                yield PartName(Place.OUT, int(match[1])), make_token(stamp)
        for name, stamp in self._list(STAGING):
            if match := _STAGED.fullmatch(name):
                place = Place.STAGED if match[1] == "part" else Place.AGAIN
                yield PartName(place, int(match[2])), make_token(stamp)

    def list_parts(self) -> list[str]:
        """Return the names of the dataset's files, in order."""
        return sorted(filter(_PART.fullmatch, self._list_names()))

    def read_footers(
        self, names: Iterable[PartName], job_id: str
    ) -> Iterator[tuple[PartName, Footer]]:
        """Yield the footers of parts, but not of those that are damaged or another job's."""
        waiting = iter(names)
        with ThreadPoolExecutor(_READERS) as pool:
            while some := list(islice(waiting, _FOOTERS)):
                for name, footer in zip(some, pool.map(self.read_footer, some), strict=True):
                    if footer is not None and footer.job == job_id:
                        yield name, footer

    def read_footer(self, name: PartName) -> Footer | None:
        """Return the footer of a part, None if the part is damaged or missing."""
        fs, root = self.connect()
        try:
            return with_retries(_read_footer, self.url, fs, f"{root}/{name.file}")
        except FileNotFoundError:
            return None

    def look_up_parts(self, job_id: str) -> Ledger:
        """Return what the footers of all parts say; those that are known are not read again."""
        parts = list_parts(self.find_parts())
        try:
            known = Ledger.from_table(self.read_table(LEDGER)).keep_unchanged(parts)
        except (FileNotFoundError, pa.ArrowInvalid):
            known = Ledger.from_footers([])
        is_new = ~index_parts(parts).isin(index_parts(known.runs))
        names = (
            PartName(Place(place), number)
            for place, number in parts.loc[is_new, ["place", "number"]].itertuples(index=False)
        )
        read = Ledger.from_footers(self.read_footers(names, job_id))
        return known.replace_parts(read).set_stamps(parts)

    def clear(self) -> None:
        """Remove what a job has written.

        Raises
        ------
        FileExistsError
            If something else is in the folder, which is then left as it is.
        """
        fs, root = self.connect()
        names = self._list_names()
        has_job = JOB in names  # without it, parts are someone else's
        foreign = sorted(
            name
            for name in names
            if not _OURS.fullmatch(name)
            and not (has_job and (_PART.fullmatch(name) or name in _FOLDERS))
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
        for name in sorted(set(names) - {CLAIM}, key=lambda name: name == JOB):
            with_retries(fs.rm, self.url, f"{root}/{name}", recursive=name in _FOLDERS)

    def remove(self, names: Iterable[str]) -> None:
        """Remove some of the job's own files or folders, those that are there."""
        fs, root = self.connect()
        for name in names:
            with suppress(FileNotFoundError):
                with_retries(fs.rm, self.url, f"{root}/{name}", recursive=name in _FOLDERS)

    def tidy(self, tables: Collection[str]) -> None:
        """Remove what killed processes left: drafts of files, and tables but those given."""
        for folder in ("", IMAGES, STAGING):
            names = self._list_names(folder)
            drafts = [name for name in names if name.startswith(DRAFT)]
            self.remove(f"{folder}/{name}".lstrip("/") for name in drafts)
            if not folder:
                self.remove({*filter(_TABLE.fullmatch, names)} - {*tables})

    def connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the folder's file system, and its path in it."""
        fs, root = connect(self.url, self.storage_options)
        return fs, root.rstrip("/")

    def open(self, name: str) -> pa.NativeFile:
        """Fetch one of the folder's files whole, for Arrow to read."""
        fs, root = self.connect()
        return open_bytes(with_retries(fs.cat_file, self.url, f"{root}/{name}"))

    def _list_names(self, folder: str = "") -> list[str]:
        fs, root = self.connect()
        if isinstance(fs, LocalFileSystem):
            with suppress(FileNotFoundError):
                return os.listdir(f"{root}/{folder}")
        return [name for name, _ in self._list(folder)]

    def _list(self, folder: str = "") -> Iterator[tuple[str, str]]:
        """Yield the name of each file in the folder, and a text that changes when the file does."""
        fs, root = self.connect()
        path = f"{root}/{folder}".rstrip("/")
        if isinstance(fs, LocalFileSystem):  # many times faster without fsspec
            with suppress(FileNotFoundError), os.scandir(path) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        yield entry.name, f"{status.st_size}-{status.st_mtime_ns}"
            return
        fs.invalidate_cache(path)  # other processes write here
        try:
            found = with_retries(fs.ls, self.url, path, detail=True)
        except FileNotFoundError:
            return
        for info in found:
            name = info["name"].rstrip("/")
            if name != path:  # some stores list the folder itself, too
                yield name.rpartition("/")[2], make_version(info)

    def _write(self, name: str, content: bytes) -> None:
        fs, root = self.connect()
        with_retries(write_whole, f"{self.url}/{name}", fs, f"{root}/{name}", content)


def _read_footer(fs: fsspec.AbstractFileSystem, path: str) -> Footer | None:
    with fs.open(path, "rb") as file:
        try:
            return Footer.from_metadata(pq.read_schema(file).metadata)
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            warn_damaged(path, error)
            return None


def _to_parquet(table: pa.Table, metadata: dict[bytes, bytes]) -> bytes:
    buffer = io.BytesIO()
    merged = {**(table.schema.metadata or {}), **metadata}
    pq.write_table(table.replace_schema_metadata(merged), buffer)
    return buffer.getvalue()
