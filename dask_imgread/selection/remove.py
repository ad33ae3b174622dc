"""Remove images from shards: those that hold one are written anew, without it, on a cluster."""

from __future__ import annotations

import io
import itertools
import os
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_imgread.jobs.folder import resolve_out
from dask_imgread.selection.folder import NOT_FOUND, REMOVED, OutputFolder
from dask_imgread.selection.shard_writer import Written, check_version
from dask_imgread.selection.write import check_place, digest_rows, run_writer
from dask_imgread.shards.find import stat_shard
from dask_imgread.shards.samples import index_members, split_name
from dask_imgread.shards.sources import find_compression, open_shard
from dask_imgread.shards.tar import BLOCK, Member, pad, walk_members
from dask_imgread.storage.files import open_whole
from dask_imgread.storage.filesystems import connect
from dask_imgread.storage.redaction import drop_signature, redact_url
from dask_imgread.storage.retries import with_retries
from dask_imgread.tasks import CHECKSUM

if TYPE_CHECKING:
    from distributed import Client

_COPIED_BYTES = 4 << 20  # at a time


class Removal(NamedTuple):
    """The images that are to be removed from one shard: their sizes, by their offsets."""

    path: str
    version: str | None
    name: str
    images: dict[int, int]


@dataclass(frozen=True)
class ShardCopier:
    """Copies a shard without some images, byte for byte.

    With the last image of a sample its sidecars are left out, too.

    Parameters
    ----------
    out, out_options
        The folder, and the options of its file system.
    storage_options
        Those of the shards that are read.
    """

    out: str
    out_options: dict[str, Any] = field(repr=False)
    storage_options: dict[str, Any] = field(repr=False)

    def __call__(self, removal: Removal) -> Written:
        """Copy one shard.

        Raises
        ------
        OSError
            If the shard can't be read, or has changed since the rows were made.
        ValueError
            If it does not have the images, or a link to one of them.
        """
        path = removal.path
        version = stat_shard(path, self.storage_options).version
        check_version(path, removal.version, version)
        with open_shard(path, self.storage_options, skipping=True) as source:
            members = list(walk_members(source))
        removed = _find_removed(removal, members)
        cuts = [(m.start, pad(m.offset + m.size)) for m in removed]
        fs, root = connect(self.out, self.out_options)
        with open_whole(fs, f"{root}/{removal.name}") as file:
            self._copy(path, cuts, file)
            size = file.tell()
        return Written(removal.name, 0, len(removal.images), size)

    def name_shard(self, removal: Removal) -> str:
        """Return the name of the copy in the output folder."""
        return removal.name

    def _copy(self, path: str, cuts: list[tuple[int, int]], file: IO[bytes]) -> None:
        """Write a shard's bytes without those of some parts, compressed as the shard is."""
        codec = self._find_codec(path)
        with ExitStack() as stack:
            source = stack.enter_context(open_shard(path, self.storage_options))
            sink: Any = file
            if codec is not None:
                sink = stack.enter_context(pa.CompressedOutputStream(_Unclosed(file), codec))
            position = 0
            for start, stop in [*cuts, (1 << 62, 1 << 62)]:
                while position < start:
                    content = source.view_at(position, min(_COPIED_BYTES, start - position))
                    if not content:
                        break
                    sink.write(content)
                    position += len(content)
                    source.keep(position)
                position = stop
            if source.problem:
                raise ValueError(f"{redact_url(path)} can't be decompressed: {source.problem}")

    def _find_codec(self, path: str) -> str | None:
        fs, name = connect(path, self.storage_options)

        def read_head() -> bytes:
            with fs.open(name, "rb") as file:
                return bytes(file.read(BLOCK))

        return find_compression(with_retries(read_head, path))


class _Unclosed(io.RawIOBase):
    """Writes to a file, which stays open when this is closed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        return self._file.write(content)


def _find_removed(removal: Removal, members: list[Member]) -> list[Member]:
    """Return the members to leave out, in the order of the shard."""
    index = index_members(members)
    going = [entry for entry in index.images if entry.member.offset in removal.images]
    staying = [entry for entry in index.images if entry.member.offset not in removal.images]
    found = {entry.member.offset: entry.member.size for entry in going}
    if found != removal.images:
        missing = removal.images.items() - found.items()
        raise ValueError(
            f"{redact_url(removal.path)} has no images of the (offset, size) "
            f"{', '.join(map(str, sorted(missing)))}: the frame does not match it"
        )
    starts = {entry.member.start for entry in going}
    starts |= {member.start for entry in going for _, member in entry.sidecars}
    images = {entry.member.start for entry in index.images}
    keys = {key for entry in going for key in (entry.key, split_name(entry.member.name)[0])}
    # Sidecars that belong to no image, such as second ones, have its key all the same.
    kept_keys = {key for entry in staying for key in (entry.key, split_name(entry.member.name)[0])}
    starts |= {
        member.start
        for member in members
        if member.start not in images and split_name(member.name)[0] in keys - kept_keys
    }
    starts -= {member.start for entry in staying for _, member in entry.sidecars}
    removed = [member for member in members if member.name and member.start in starts]
    names = {posixpath.normpath(member.name) for member in removed}
    links = [member for member in members if member.link and member.start not in starts]
    broken = [member for member in links if posixpath.normpath(member.link or "") in names]
    if broken:
        raise ValueError(
            f"{redact_url(removal.path)}/{broken[0].name} is a link to {broken[0].link}, which is "
            "to be removed: remove its image, too"
        )
    return removed


def remove_images(
    rows: pd.DataFrame,
    chosen: np.ndarray,
    missing: Iterable[str],
    out: str | os.PathLike[str],
    *,
    client: Client | AbstractContextManager[Client] | None = None,
    storage_options: dict[str, Any] | None = None,
    out_options: dict[str, Any] | None = None,
    retries: int = 2,
    overwrite: bool = False,
    progress: bool = False,
) -> pd.DataFrame:
    """Write the shards that hold some images anew, without them, and receipts of that.

    All other bytes of these shards stay as they are, and so do their names, and the order of their
    samples. Of a sample whose images are all removed the sidecars are, too. Other shards are not
    written. ``removed.csv`` lists what was removed, ``not-found.txt`` what was not found.

    Parameters
    ----------
    rows
        Rows indexed by ``image_id``, of all images of the dataset.
    chosen
        Which of them to remove. Rows with the same bytes in a shard, which are links, are, too.
    missing
        Ids that no row has, for the receipt.
    out
        A folder, or a URL. The shards have their paths below the folder that all are in.
    client, storage_options, out_options, retries, overwrite, progress
        As for ``write_shards``.

    Returns
    -------
    pandas.DataFrame
        The receipt: ``image_id``, ``sha256``, ``shard`` and ``new_shard``.

    Raises
    ------
    OtherJobError, FileExistsError, JobError, ValueError
        As ``write_shards`` does.
    """
    options = storage_options or {}
    place, out_options = resolve_out(out, options, out_options)
    check_place(place, rows["shard"].dropna().unique())
    names = _name_copies(rows["shard"].dropna().unique())
    removed = find_copies(rows, chosen)
    removals = list(_group(removed, names))
    folder = OutputFolder(place, out_options)
    files = [removal.name for removal in removals]
    folder.prepare({"images to remove": digest_rows(removed), "files": files}, overwrite)
    written = folder.list_names()
    wanted = [removal for removal in removals if removal.name not in written]
    run_writer(
        ShardCopier(place, out_options, options),
        wanted,
        total=len(removals),
        done=len(removals) - len(wanted),
        client=client,
        retries=retries,
        progress=progress,
    )
    receipt = pd.DataFrame(
        {
            "image_id": list(removed.index),
            CHECKSUM: list(removed[CHECKSUM]) if CHECKSUM in removed else [None] * len(removed),
            "shard": list(removed["shard"]),
            "new_shard": [f"{redact_url(place)}/{names[path]}" for path in removed["shard"]],
        }
    )
    folder.write(NOT_FOUND, "".join(f"{name}\n" for name in missing).encode())
    folder.write(REMOVED, receipt.to_csv(index=False).encode("utf-8"))
    folder.remove_drafts()
    return receipt


def find_copies(rows: pd.DataFrame, chosen: np.ndarray) -> pd.DataFrame:
    """Return the rows chosen, and those that share their bytes, each once; none without bytes."""
    filled = rows["size"].fillna(0).gt(0).to_numpy(bool)
    places = pd.MultiIndex.from_frame(rows[["shard", "offset"]])
    found = rows[filled & places.isin(places[filled & chosen])]
    return found[~found[["shard", "offset"]].reset_index().duplicated().to_numpy()]


def _name_copies(paths: Iterable[str]) -> dict[str, str]:
    """Return under which name below the output folder each shard's copy is written.

    Raises
    ------
    ValueError
        If two have the same name, or one leads out of the folder.
    """
    split = {path: drop_signature(path).partition("?")[0].split("/") for path in paths}
    levels = zip(*(parts[:-1] for parts in split.values()), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda level: len({*level}) == 1, levels))
    names = {path: "/".join(filter(None, parts[common:])) for path, parts in split.items()}
    if len(set(names.values())) < len(names) or any(".." in parts for parts in split.values()):
        raise ValueError(
            "the shards have no names of their own below a common folder: give fewer of them"
        )
    return names


def _group(rows: pd.DataFrame, names: dict[str, str]) -> Iterator[Removal]:
    for path, some in rows.groupby("shard", sort=True):
        version = some["shard_version"].iloc[0] if "shard_version" in some else pd.NA
        images = dict(zip(map(int, some["offset"]), map(int, some["size"]), strict=True))
        yield Removal(str(path), None if pd.isna(version) else version, names[str(path)], images)
