"""The exceptions that users may catch."""

from __future__ import annotations


class ReadError(RuntimeError):
    """An image could not be read, under ``on_error="raise"``. Names shard and member.

    Examples
    --------
    >>> from dask_imgread import FileGroupTask, ImageReaderStage
    >>> from dask_imgread.testing import make_shards
    >>> task = FileGroupTask(data=make_shards("shards", images_per_shard=3, broken=1))
    >>> ImageReaderStage(on_error="raise").process(task)
    Traceback (most recent call last):
    ...
    dask_imgread.errors.ReadError: ...jpg: truncated: image file is truncated...
    """


class OtherJobError(ValueError):
    """The output folder holds another job's output; the message names the difference."""


class FolderInUseError(OtherJobError):
    """Another process is at work on the output folder; the message names it and its host.

    Examples
    --------
    >>> from dask_imgread.jobs.claim import claim_folder
    >>> from dask_imgread.jobs.folder import JobFolder
    >>> with claim_folder(JobFolder("out")), claim_folder(JobFolder("out")):
    ...     pass
    Traceback (most recent call last):
    ...
    dask_imgread.errors.FolderInUseError: out is in use by process ...
    """


class JobError(RuntimeError):
    """A job could not finish. What is done is kept, and the same call resumes from there."""


class SchemaError(ValueError):
    """A function's result is not rows, or its columns or types differ from those expected.

    Examples
    --------
    >>> from dask_imgread import map_images
    >>> from dask_imgread.testing import make_shards
    >>> map_images(lambda batch: {"width": [1]}, make_shards("shards", images_per_shard=3))
    Traceback (most recent call last):
    ...
    dask_imgread.errors.SchemaError: ...column 'width' has 1 entries for 3 images
    """


class NoWorkersError(TimeoutError):
    """A cluster has had no workers, or none that can run the tasks, for too long."""


class StorageError(OSError):
    """A request to a store failed; the message names the URL and the reason."""
