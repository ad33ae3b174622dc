"""The exceptions that users may catch."""

from __future__ import annotations


class ReadError(RuntimeError):
    """An image could not be read, under ``on_error="raise"``. Names shard and member."""


class OtherJobError(ValueError):
    """The output folder holds another job's output; the message names the difference."""


class JobError(RuntimeError):
    """A job could not finish. What is done is kept, and the same call goes on from there."""


class SchemaError(ValueError):
    """What a function returns is no rows, or has other columns or types than other rows."""


class NoWorkersError(TimeoutError):
    """A cluster has had no workers, or none that can do the work, for too long."""


class StorageError(OSError):
    """A store did not give what was asked for; the message names the URL and the reason."""
