"""File systems: find the one of a path or URL, and normalize paths."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import fsspec
from fsspec.core import url_to_fs

from dask_imgread.storage.redaction import hide_secrets, redact_url

_EXTRAS = {"http": "http", "https": "http", "hf": "hf", "s3": "s3", "s3a": "s3"}  # by protocol
_EXTRAS |= {"gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}


def resolve_path(path: str) -> str:
    """Return a path in the form from which ids are made: a local one absolute, a URL unchanged."""
    if is_local(path):
        return os.path.abspath(path.removeprefix("file://").removeprefix("local://"))
    return path


def is_local(path: str) -> bool:
    """Whether a path lies in the local file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


class Place(NamedTuple):
    """A file system, and a path in it."""

    fs: fsspec.AbstractFileSystem
    name: str


def connect(path: str, storage_options: dict[str, Any]) -> Place:
    """Return the file system of a path or URL, and the path in it.

    Raises
    ------
    ImportError
        If the package for the URL's store is not installed; the message names it, and the extra
        that brings it.
    ValueError
        If fsspec knows no such store, or the store does not take these options.
    """
    if path.startswith(("s3://", "s3a://")):
        # s3fs and botocore would make 25 attempts for each of ours: hours, if the server is down.
        no_retries = {"config_kwargs": {"retries": {"max_attempts": 0}}}
        storage_options = no_retries | storage_options
    try:
        if path.startswith("hf://"):
            fsspec.get_filesystem_class("https")  # raises without aiohttp, which fetches ranges
        fs, name = url_to_fs(path, **storage_options)
    except ImportError as error:
        extra = _EXTRAS.get(path.split("://")[0].split("::")[-1])
        if extra is None:
            raise
        raise ImportError(f'{error}: pip install "dask-imgread[{extra}]"') from error
    except TypeError as error:
        reason = hide_secrets(str(error), storage_options)
        raise ValueError(f"{redact_url(path)}: storage options that don't fit: {reason}") from None
    if "s3" in fs.protocol:
        fs.retries = 1
    return Place(fs, name)


def reach_hub(fs: fsspec.AbstractFileSystem, name: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the Hugging Face Hub as a web server's file system, and the URL of one of its files.

    The Hub's own client would list the file's folder in each thread that reads, only to see that
    it is a file, and could not end a request that is under way.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    place = fs.resolve_path(name)  # by one request for each repository and thread
    if hasattr(place, "repo_id"):
        where = {"repo_type": place.repo_type, "revision": place.revision}
        url = hf_hub_url(place.repo_id, place.path, endpoint=fs.endpoint, **where)
    else:  # a bucket
        url = fs.url(name)
    web = fsspec.filesystem(
        "https",
        headers=build_hf_headers(token=fs.token),
        client_kwargs={"trust_env": True},  # proxies, as the Hub's own client does
    )
    return web, url
