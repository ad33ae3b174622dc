"""The exceptions that users may catch."""

from __future__ import annotations


class ReadError(RuntimeError):
    """An image could not be read, under ``on_error="raise"``; names the shard and the member."""


class OtherJobError(ValueError):
    """The output folder holds another job's output; the message names the difference."""


class JobError(RuntimeError):
    """A job could not finish. What is done is kept, and the same call resumes from there."""


class SchemaError(ValueError):
    """A function returned something other than rows, or rows of the wrong columns or types."""


class NoWorkersError(TimeoutError):
    """For too long a cluster had no workers, or none that can run the tasks."""


class StorageError(OSError):
    """A request to a store failed; the message names the URL and the reason."""
