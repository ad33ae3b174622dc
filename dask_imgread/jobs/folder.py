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
import logging
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    make_token,
    tabulate_parts,
    warn_damaged,
)
from dask_imgread.shards.find import make_version
from dask_imgread.shards.frames import JOB
from dask_imgread.storage.files import DRAFT, open_bytes, write_whole
from dask_imgread.storage.filesystems import connect, is_local, resolve_path
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

logger = logging.getLogger("dask_imgread")


def resolve_out(
    out: str | os.PathLike[str], options: dict[str, Any], out_options: dict[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """Return the path or URL of the output, and the options of its file system.

    A remote one has the shards' options, unless it has its own.
    """
    place = resolve_path(os.path.expanduser(os.fspath(out))).rstrip("/") or "/"
    if out_options is None:
        out_options = {} if is_local(place) else options
    return place, out_options


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
        self,
        name: PartName,
        rows: pa.Table,
        records: pa.Table | None,
        footer: Footer,
        earlier: Footer | None = None,
    ) -> Footer:
        """Write a part in one piece or not at all, in place of an earlier one; return its footer.

        Its footer names its records. So they come from one attempt, even if a worker is killed
        between the two.
        """
        if records is not None:
            attempt = secrets.randbits(62) + 1
            content = _to_parquet(records, {FOOTER: footer.to_json().encode()})
            footer = replace(footer, attempt=attempt, records_size=len(content))
            self._write(name.name_records(attempt), content)
        self._write(name.file, _to_parquet(rows, {FOOTER: footer.to_json().encode()}))
        if earlier is not None and earlier.attempt:
            self.remove([name.name_records(earlier.attempt)])
        return footer

    def read_part(self, name: PartName) -> tuple[pa.Table, pa.Table, Footer]:
        """Return the rows of a part, its images' records (the rows, if it has none), its footer.

        Raises
        ------
        FileNotFoundError
            If it is not there.
        pyarrow.ArrowInvalid
            If it is damaged.
        """
        for last in (False, False, True):
            rows = pq.read_table(self.open(name.file))
            footer = Footer.from_metadata(rows.schema.metadata)
            if not footer.attempt:
                return rows, rows, footer
            try:
                return rows, pq.read_table(self.open(name.name_records(footer.attempt))), footer
            except FileNotFoundError:  # the part was replaced meanwhile
                if last:
                    raise
        raise AssertionError  # for the type checker

    def find_parts(self) -> Iterator[tuple[PartName, int]]:
        """Yield the name of each part, and a number that changes when the file does."""
        for name, _, stamp in self._list():
            if match := _PART.fullmatch(name):
                yield PartName(Place.OUT, int(match[1])), make_token(stamp)
        for name, _, stamp in self._list(STAGING):
            if match := _STAGED.fullmatch(name):
                place = Place.STAGED if match[1] == "part" else Place.AGAIN
                yield PartName(place, int(match[2])), make_token(stamp)

    def list_parts(self) -> list[PartName]:
        """Return the parts of the dataset, in order."""
        matches = map(_PART.fullmatch, self._list_names())
        return sorted(PartName(Place.OUT, int(match[1])) for match in matches if match)

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

    def look_up_parts(self, job_id: str) -> tuple[Ledger, bool]:
        """Return what the footers of all parts say, and whether any had to be read for that.

        Those that are known are not read again. Parts that are damaged, or another job's, are left
        out.
        """
        parts = tabulate_parts(self.find_parts())
        try:
            known = Ledger.from_table(self.read_table(LEDGER)).keep_unchanged(parts)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):  # none, or damaged
            known = Ledger.from_footers([])
        is_new = ~index_parts(parts).isin(index_parts(known.runs))
        names = (
            PartName(Place(place), number)
            for place, number in parts.loc[is_new, ["place", "number"]].itertuples(index=False)
        )
        if is_new.any():
            read = Ledger.from_footers(self.read_footers(names, job_id)).set_stamps(parts)
            known = known.replace_parts(read)
        return self._check_records(known), bool(is_new.any())

    def write_ledger(self, ledger: Ledger) -> None:
        """Keep what the footers of the parts say, for ``look_up_parts``."""
        self.write_table(LEDGER, ledger.to_table())

    def _check_records(self, ledger: Ledger) -> Ledger:
        """Leave out parts whose records are missing or cut off."""
        columns = ["place", "number", "attempt", "records_size"]
        parts = ledger.runs[columns].drop_duplicates()
        if not parts["attempt"].any():
            return ledger
        sizes = {
            f"{folder}/{name}": size for folder in _FOLDERS for name, size, _ in self._list(folder)
        }
        is_whole = []
        for place, number, attempt, size in parts.itertuples(index=False):
            name = PartName(Place(place), number)
            is_whole.append(not attempt or sizes.get(name.name_records(attempt)) == size)
            if not is_whole[-1]:
                warn_damaged(
                    f"{self.url}/{name.file}", "its images' records are missing or cut off"
                )
        return ledger.keep_parts(parts[is_whole])

    def check_ours(self) -> None:
        """Raise FileExistsError if something is in the folder that no job has written."""
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

    def clear(self) -> None:
        """Remove what a job has written.

        Raises
        ------
        FileExistsError
            If something else is in the folder, which is then left as it is.
        """
        self.check_ours()
        fs, root = self.connect()
        names = self._list_names()
        if JOB in names:
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

    def tidy(self, tables: Collection[str], ledger: Ledger, partitions: int) -> None:
        """Remove what killed processes left: drafts, old tables, records of no part.

        And what stands where a part may stand, but is none: it is damaged, or another job's.
        """
        names = self._list_names()
        found = {int(match[1]) for match in map(_PART.fullmatch, names) if match}
        for number in sorted(found - {*ledger.select(Place.OUT)["number"].tolist()}):
            if number < partitions:
                file = PartName(Place.OUT, number).file
                logger.warning("%s/%s is no part of the job, and is removed", self.url, file)
                self.remove([file])
        self.remove({*filter(_TABLE.fullmatch, names)} - {*tables})
        self.remove(n for n in names if n.startswith(DRAFT) and CLAIM not in n)
        self.remove(
            f"{folder}/{name}"
            for folder in _FOLDERS
            for name in self._list_names(folder)
            if name.startswith(DRAFT)
        )
        records = {f"{IMAGES}/{name}" for name in self._list_names(IMAGES)}
        attempts = ledger.runs[["place", "number", "attempt"]].drop_duplicates()
        for place, number, attempt in attempts.itertuples(index=False) if records else ():
            records.discard(PartName(Place(place), number).name_records(attempt))
        self.remove(sorted(records))

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
        return [name for name, *_ in self._list(folder)]

    def _list(self, folder: str = "") -> Iterator[tuple[str, int, str]]:
        """Yield each file's name, its size, and a text that changes when the file does."""
        fs, root = self.connect()
        path = f"{root}/{folder}".rstrip("/")
        if isinstance(fs, LocalFileSystem):  # many times faster without fsspec
            with suppress(FileNotFoundError), os.scandir(path) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        stamp = f"{status.st_size}-{status.st_mtime_ns}"
                        yield entry.name, status.st_size, stamp
            return
        fs.invalidate_cache(path)  # other processes write here
        try:
            found = with_retries(fs.ls, self.url, path, detail=True)
        except FileNotFoundError:
            return
        for info in found:
            name = info["name"].rstrip("/")
            if name != path:  # some stores list the folder itself, too
                yield name.rpartition("/")[2], info.get("size") or 0, make_version(info)

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
