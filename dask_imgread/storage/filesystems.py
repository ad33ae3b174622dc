"""File systems: which one a path or URL lies in, and how it is spelled."""

from __future__ import annotations

import os
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from dask_imgread.storage.redaction import hide_secrets, redact_url


def resolve_path(path: str) -> str:
    """Return the one spelling of a shard's path that its ids are made from."""
    if is_local(path):
        return os.path.abspath(path.removeprefix("file://").removeprefix("local://"))
    return path


def is_local(path: str) -> bool:
    """Whether a path lies in the local file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


def connect(path: str, options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it.

    Raises
    ------
    ImportError
        If the package for the URL's store is not installed; the message names it.
    ValueError
        If there is no such store, or the options don't fit it.
    """
    if path.startswith(("s3://", "s3a://")):
        # Its libraries' own attempts, 25 for each of ours, would take hours on a dead server.
        options = {"config_kwargs": {"retries": {"max_attempts": 0}}} | options
    try:
        fs, name = url_to_fs(path, **options)
    except TypeError as error:
        reason = hide_secrets(str(error), options)
        raise ValueError(f"{redact_url(path)}: storage options that don't fit: {reason}") from None
    if "s3" in fs.protocol:
        fs.retries = 1
    return fs, name
