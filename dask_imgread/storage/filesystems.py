"""File systems: find the one of a path or URL, and normalize paths."""

from __future__ import annotations

import os
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from dask_imgread.storage.redaction import hide_secrets, redact_url


def resolve_path(path: str) -> str:
    """Return a path in the form from which ids are made: a local one absolute, a URL unchanged."""
    if is_local(path):
        return os.path.abspath(path.removeprefix("file://").removeprefix("local://"))
    return path


def is_local(path: str) -> bool:
    """Whether a path lies in the local file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


def connect(path: str, storage_options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in it.

    Raises
    ------
    ImportError
        If the package for the URL's store is not installed; the message names it.
    ValueError
        If fsspec knows no such store, or the store does not take these options.
    """
    if path.startswith(("s3://", "s3a://")):
        # s3fs and botocore would make 25 attempts for each of ours: hours, if the server is down.
        no_retries = {"config_kwargs": {"retries": {"max_attempts": 0}}}
        storage_options = no_retries | storage_options
    try:
        fs, name = url_to_fs(path, **storage_options)
    except TypeError as error:
        reason = hide_secrets(str(error), storage_options)
        raise ValueError(f"{redact_url(path)}: storage options that don't fit: {reason}") from None
    if "s3" in fs.protocol:
        fs.retries = 1
    return fs, name
