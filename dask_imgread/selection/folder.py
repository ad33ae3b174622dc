"""The folder that new shards are written to: what is in it, and to what it belongs."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pyarrow.parquet as pq

from dask_imgread.errors import OtherJobError
from dask_imgread.selection.shard_writer import JOB_KEY, name_rows, name_shard
from dask_imgread.storage.files import DRAFT, open_bytes, write_whole
from dask_imgread.storage.filesystems import connect
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import with_retries

REMOVED, NOT_FOUND = "removed.csv", "not-found.txt"
_DESCRIPTION = "_write.json"  # what decides the shards; beside them
_OURS = re.compile(
    r"\d{5,}\.(tar|idx)|index\.json|_write\.json|metadata/part-\d{5,}\.parquet|(.*/)?_tmp-.*"
    r"|removed\.csv|not-found\.txt"
)
_READERS = 16  # footers read at the same time


class OutputFolder:
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
        names = self.list_names()
        if _DESCRIPTION in names:
            content = with_retries(self._fs.cat_file, self.url, f"{self._root}/{_DESCRIPTION}")
            before = json.loads(content)
            if before == description:
                return
            if not overwrite:
                both = [key for key in description if key in before and key != "files"]
                changed = [key for key in both if before[key] != description[key]]
                raise OtherJobError(
                    f"{redact_url(self.url)} was written with other "
                    f"{', '.join(changed) or 'options'}: give another folder, or overwrite it"
                )
            listed = before.get("files", [])
            for name in sorted(names, key=lambda name: name == _DESCRIPTION):
                if _OURS.fullmatch(name) or name in listed:
                    with_retries(self._fs.rm_file, self.url, f"{self._root}/{name}")
        elif names:
            raise FileExistsError(
                f"{redact_url(self.url)} holds other files, such as {min(names)}: give an empty "
                "folder"
            )
        self.write(_DESCRIPTION, json.dumps(description, indent=1).encode())

    def list_written(self, count: int, job_id: str) -> set[int]:
        """Return the numbers of the shards that are there, with their rows."""
        names = self.list_names()
        there = [n for n in range(count) if {name_shard(n), name_rows(n)} <= names]
        with ThreadPoolExecutor(_READERS) as pool:
            ids = pool.map(self._read_job_id, there)
            return {n for n, found in zip(there, ids, strict=True) if found == job_id}

    def write_wids_index(self, shards: list[tuple[str, int]]) -> None:
        """Write the index of all shards that the package ``wids`` takes."""
        described = [{"url": name, "nsamples": samples} for name, samples in shards]
        index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": described}
        self.write("index.json", json.dumps(index, indent=1).encode())

    def remove_drafts(self) -> None:
        """Remove what killed writers have left."""
        for name in self.list_names():
            if name.rpartition("/")[2].startswith(DRAFT):
                with suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file, all of it or nothing."""
        write_whole(self._fs, f"{self._root}/{name}", content)

    def list_names(self) -> set[str]:
        """Return the names of all files, with those of the folders that they are in."""
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
