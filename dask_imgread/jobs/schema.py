"""The schema of a job's rows, the same for all its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from distributed.scheduler import KilledWorker

from dask_imgread.cluster.window import run_one
from dask_imgread.errors import JobError, NoWorkersError
from dask_imgread.jobs.folder import SCHEMA, JobFolder
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.rows import (
    INFERRED_BATCH,
    INFERRED_BATCHES,
    INFERRED_TASKS,
    BatchFunction,
    ByValue,
    describe_failure,
    make_rows_singly,
    name_function,
    to_table,
)
from dask_imgread.sidecars import MetadataColumns
from dask_imgread.storage.redaction import hide_secrets
from dask_imgread.tasks import FileGroupTask

if TYPE_CHECKING:
    from distributed import Client


def read_meta(meta: pd.DataFrame) -> pa.Schema:
    """Return the columns and types of an empty frame; a type is null where the frame has none.

    pandas gives an empty frame an index of integers, which says nothing about its type.
    """
    schema = to_table(meta).schema
    if isinstance(meta.index, pd.RangeIndex) and meta.index.name is not None:
        place = schema.get_field_index(meta.index.name)
        schema = schema.set(place, pa.field(meta.index.name, pa.null()))
    return schema


@dataclass(frozen=True)
class SchemaFinder:
    """Finds the schema of a job's rows on its first images, and keeps it in the job's folder.

    Parameters
    ----------
    client
        The cluster that reads these images.
    folder
        The job's folder.
    reader
        The job's reader.
    tasks
        The tasks that are still to be done; a few are read.
    """

    client: Client
    folder: JobFolder
    reader: ImageReaderStage
    tasks: Iterable[FileGroupTask]

    def find(self, fn: BatchFunction, declared: pa.Schema | None) -> pa.Schema:
        """Return the schema that an earlier run has kept, or that is declared, or inferred.

        Parameters
        ----------
        fn
            The function.
        declared
            The schema that the user has declared, with null for a type that is left open; None
            if there is none.

        Raises
        ------
        JobError
            If the function fails on the first images, or their rows do not determine the schema.
        """

        def complete() -> pa.Schema:
            if declared is not None and not _list_untyped(declared):
                return declared
            return _merge(self._infer(fn), declared, name_function(fn))

        return self.keep(complete)

    def keep(self, make: Callable[[], pa.Schema]) -> pa.Schema:
        """Return the schema that an earlier run has kept; if there is none, make and keep one."""
        try:
            return self.folder.read_table(SCHEMA).schema
        except FileNotFoundError:
            pass
        schema = make()
        self.folder.write_table(SCHEMA, schema.empty_table())
        return schema

    def infer_types(self, columns: MetadataColumns) -> MetadataColumns:
        """Return columns for sidecars with the types that the first images show."""

        def run(
            fn: Callable[[FileGroupTask], dict[str, str]], task: FileGroupTask
        ) -> dict[str, str]:
            with suppress(KilledWorker):  # the job will tell
                return run_one(self.client, fn, task)
            return {}

        return columns.infer_types(self.reader, iter(self.tasks), run)

    def _infer(self, fn: BatchFunction) -> list[pa.Schema]:
        """Run the function on a few images of the first partition that has any."""
        name = name_function(fn)
        annotations = self.reader.annotations(self.client)
        for task in islice(self.tasks, INFERRED_TASKS):
            try:
                schemas = self._infer_from_task(fn, task, annotations)
            except (CancelledError, NoWorkersError):
                raise
            except Exception as error:
                reason = hide_secrets(describe_failure(error), task.storage_options)
                raise JobError(f"{name} fails on the first images of {task!r}: {reason}") from error
            if schemas:
                return schemas
        raise JobError(
            f"no image of the first {INFERRED_TASKS} partitions could be read, from which to infer "
            f"the columns of {name}: give them with meta"
        )

    def _infer_from_task(
        self, fn: BatchFunction, task: FileGroupTask, annotations: dict[str, Any]
    ) -> list[pa.Schema]:
        """Run it on a worker; if that dies, once more with each image decoded in a child process.

        So an image that kills its decoder costs only itself.
        """
        small = self.reader.with_options(dali_batch_size=INFERRED_BATCH)
        carried: Any = ByValue(fn)
        try:
            return run_one(self.client, partial(infer_schemas, small, carried), task, **annotations)
        except KilledWorker:
            isolated = partial(infer_schemas, small.isolated(), carried)
            return run_one(self.client, isolated, task, **annotations)


def infer_schemas(
    reader: ImageReaderStage, fn: BatchFunction, task: FileGroupTask
) -> list[pa.Schema]:
    """Return the schemas of the rows that a function makes of the first images of a partition."""
    batches = (batch for batch in reader.read(task) if batch.data)
    schemas: list[pa.Schema] = []
    first: Exception | None = None
    for batch in islice(batches, INFERRED_BATCHES):
        rows, failures = make_rows_singly(fn, batch)
        schemas += [to_table(each).schema for each in rows]
        first = first or next((error for _, error in failures), None)
    if first is not None and not schemas:
        raise first
    return schemas


def _merge(schemas: list[pa.Schema], declared: pa.Schema | None, name: str) -> pa.Schema:
    """Return one schema for all rows: the declared one, with the types that it leaves open."""
    try:
        found = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise JobError(f"{name} gives rows of several types: {error}") from None
    if declared is not None:
        if set(declared.names) != set(found.names):
            raise JobError(f"{name} gives the columns {found.names}, meta has {declared.names}")
        for column in _list_untyped(declared):
            place = declared.get_field_index(column)
            declared = declared.set(place, found.field(column))
        found = declared
    if untyped := _list_untyped(found):
        raise JobError(
            f"{name}: the first images do not show the type of {', '.join(untyped)}: give it "
            f"with meta, an empty DataFrame, such as {name}.meta"
        )
    return found


def _list_untyped(schema: pa.Schema) -> list[str]:
    """Return the columns whose type is null: no row has a value."""
    return [field.name for field in schema if pa.types.is_null(field.type)]
