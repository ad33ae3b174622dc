"""Find shards by path, folder, glob, brace range or URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dask_imgread.storage.filesystems import Place, connect, is_local
from dask_imgread.storage.ranges import Stopper, look_up
from dask_imgread.storage.redaction import redact_url
from dask_imgread.storage.retries import with_retries

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")


class Shard(NamedTuple):
    """A tar shard: its absolute path or URL, its size in bytes, and a token for its content."""

    path: str
    size: int | None
    version: str


Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | list[Shard]


def find_shards(paths: Paths, storage_options: dict[str, Any] | None = None) -> list[Shard]:
    """List the shards that ``paths`` name or match, in the order given, without duplicates.

    Parameters
    ----------
    paths
        A file, a folder (searched recursively), a glob, a brace range such as
        ``{00000..00099}.tar``, a URL that fsspec supports, several of these joined by ``::``, or
        a list of these. A list of Shards is returned as it is.
    storage_options
        Options for fsspec's file system.

    Raises
    ------
    FileNotFoundError
        If a path does not exist, or a folder or a glob has no shards.
    PermissionError
        If a store denies access.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if given and isinstance(given[0], Shard):
        return cast("list[Shard]", given)
    names = [name for path in given for name in split_list(os.fspath(cast("str", path)))]
    expanded = [path for name in names for path in expand_braces(name)]
    options = storage_options or {}

    def find(path: str) -> list[Shard]:
        return _find(path, options)

    if all(is_local(path) for path in expanded):
        found = [find(path) for path in expanded]
    else:  # each call is a request to a store
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(find, expanded))
    return list({shard.path: shard for shards in found for shard in shards}.values())


def split_list(path: str) -> list[str]:
    """Split ``a.tar::b.tar``, webdataset's list of shards, but not fsspec's chained URLs.

    >>> split_list("a.tar::s3://bucket/{00..09}.tar")
    ['a.tar', 's3://bucket/{00..09}.tar']
    >>> split_list("simplecache::s3://bucket/a.tar")
    ['simplecache::s3://bucket/a.tar']
    """
    parts = path.split("::")
    chained = any(part.startswith(("tar://", "zip://", "libarchive://")) for part in parts)
    return parts if not chained and all(part.endswith(SHARD_SUFFIXES) for part in parts) else [path]


def expand_braces(path: str) -> list[str]:
    """Expand ``{a,b}`` and ``{000..010}`` as a shell does, with zero padding.

    >>> expand_braces("s-{08..10}.tar")
    ['s-08.tar', 's-09.tar', 's-10.tar']
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", path)
    if match is None:
        return [path]
    first, last, names = match.groups()
    if names is not None:
        choices = names.split(",")
    else:
        step = 1 if int(first) <= int(last) else -1
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
    head, tail = path[: match.start()], path[match.end() :]
    return [head + choice + rest for choice in choices for rest in expand_braces(tail)]


def _find(path: str, options: dict[str, Any]) -> list[Shard]:
    fs, root = connect(path, options)
    if isinstance(fs, LocalFileSystem) and os.path.isfile(root):
        return [stat_shard(root, {})]
    wildcards = "*[?" if isinstance(fs, LocalFileSystem) else "*["  # a URL's ? begins its query
    is_glob = any(wildcard in path for wildcard in wildcards)
    # Else what was listed for an earlier job would be found again.
    fs.invalidate_cache(None if is_glob or not root.endswith(SHARD_SUFFIXES) else root)
    if is_glob and not with_retries(fs.exists, path, root):
        found = with_retries(fs.glob, path, root, detail=True)
        kind = "no shard matches"
    else:
        try:
            info = with_retries(fs.info, path, root)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no such shard or folder: {redact_url(path)}; check the path"
            ) from None
        # A web server's folder is a page like any other; only the slash distinguishes it.
        if info["type"] != "directory" and not path.endswith("/"):
            return [_make_shard(fs, root, info)]
        found = with_retries(fs.find, path, root, detail=True)
        kind = f"no {' or '.join(SHARD_SUFFIXES)} in the folder"
    shards = [
        _make_shard(fs, name, info)
        for name, info in sorted(found.items())
        if name.endswith(SHARD_SUFFIXES)
        and (info["type"] == "file" or (info.get("islink") and not os.path.isdir(name)))
    ]
    if not shards:
        if "http" in fs.protocol:  # fsspec finds nothing, too, if the server does not respond
            with_retries(fs.cat_file, path, root.partition("*")[0])
        raise FileNotFoundError(f"{kind} {redact_url(path)}; give the path of shards{_hint(found)}")
    return shards


def _hint(found: Iterable[str]) -> str:
    rows = any(name.endswith(".parquet") for name in found)
    return ", or, in Python, the frame dd.read_parquet(...)" if rows else ""


def _make_shard(fs: fsspec.AbstractFileSystem, name: str, info: dict[str, Any]) -> Shard:
    if info.get("islink"):
        with suppress(OSError):  # a broken link is recorded when the reader can't open it
            status = os.stat(name)
            info = info | {"size": status.st_size, "mtime": status.st_mtime}
    # One spelling for each file: a shard given under two would be read twice.
    path = os.path.abspath(name) if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(name)
    return Shard(path, info.get("size"), make_version(info))


def make_version(info: dict[str, Any]) -> str:
    """Return a token for a file's content, from what its file system says about it."""
    tags = ["ETag", "etag", "md5Hash", "blob_id"]
    tags += ["mtime", "LastModified", "last_modified", "updated"]
    return "-".join(str(info[tag]) for tag in ("size", *tags) if info.get(tag) is not None)


def stat_shard(
    path: str,
    storage_options: dict[str, Any],
    stopper: Stopper | None = None,
    place: Place | None = None,
) -> Shard:
    """Look up one shard's size and the token for its content.

    Parameters
    ----------
    path, storage_options
        The shard.
    stopper
        To stop the request from another thread.
    place
        Where it lies, if ``connect`` was called already.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    fs, name = place or connect(path, storage_options)
    fs.invalidate_cache(name)  # else the file may be another than the one that was listed
    return _make_shard(fs, name, look_up(fs, name, path, (stopper or Stopper()).make_requests()))
