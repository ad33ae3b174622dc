"""Write the parts of a job's output: one for each partition, by the worker that read it."""

from __future__ import annotations

import json
import logging
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from math import isfinite
from typing import Any

import pandas as pd
import pyarrow as pa
from dask.base import tokenize

from dask_imgread.cluster.worker import find_worker
from dask_imgread.errors import SchemaError, StorageError
from dask_imgread.jobs.folder import Count, Footer, JobFolder
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.reading.records import UNREACHABLE, describe_lost_shards
from dask_imgread.rows import (
    INFERRED_BATCHES,
    BatchFunction,
    describe_failure,
    make_rows_singly,
    name_function,
    to_table,
)
from dask_imgread.tasks import FileGroupTask, ImageBatch, ImageObject, make_frame

logger = logging.getLogger("dask_imgread")


# What of a reader decides on the rows. The rest is how fast they come.
_DECISIVE = (
    *("decode", "sidecars", "on_error", "max_pixels", "resize", "output"),
    *("decoder", "scaled_decoding", "relative_to"),
)
_LOGGED_PER_BATCH = 5  # failures of a function; all are in the records


def _describe_more(reader: ImageReaderStage) -> dict[str, Any]:
    """Return what a subclass of the reader holds besides.

    Raises
    ------
    ValueError
        If that can't be told from something else.
    """
    state = reader.__getstate__()
    held: dict[str, Any] = {}
    for part in state if isinstance(state, tuple) else (state,):  # the second is of slots
        held.update(part or {})
    plain = {field.name for field in fields(ImageReaderStage)}
    more = {}
    for name, value in sorted(held.items()):
        if name in plain:
            continue
        try:
            token = tokenize(value, ensure_deterministic=True)
        except Exception as error:  # whatever pickling it raises
            raise ValueError(
                f"the reader's {name}, a {type(value).__name__}, can't be told from another, so "
                "that the job could go on over other settings: keep plain values in it, or give "
                "it a __dask_tokenize__"
            ) from error
        simple = value is None or isinstance(value, str | int | float)
        more[name] = value if simple else f"{type(value).__name__} {token}"
    return more


@dataclass(frozen=True)
class PartWriter:
    """Reads one partition and writes its rows; all that a worker must know of a job.

    Parameters
    ----------
    reader
        The reader.
    fn
        What makes the rows of a batch; None for the images' metadata.
    folder
        Where they are written.
    job_id
        Which job the parts belong to.
    schema
        The columns and types that all parts have; None until they are known.
    retrying
        Whether a part that is there may be replaced, if no image is lost by it.
    """

    reader: ImageReaderStage
    fn: BatchFunction | None
    folder: JobFolder
    job_id: str = ""
    schema: pa.Schema | None = None
    retrying: bool = False

    __name__ = "write_part"  # Dask names tasks by it

    def isolated(self) -> PartWriter:
        """Return the same writer whose reader decodes each image in a child process."""
        return replace(self, reader=self.reader.isolated())

    def describe(self) -> dict[str, Any]:
        """Return all that decides on what the rows are."""
        options = vars(self.reader)
        return {
            "command": "metadata" if self.fn is None else "apply",
            "function": None if self.fn is None else name_function(self.fn),
            "version": version("dask-imgread"),
            "options": {"reader": type(self.reader).__qualname__}
            | {name: options[name] for name in _DECISIVE}
            | _describe_more(self.reader),
        }

    def __call__(self, numbered: tuple[int, FileGroupTask]) -> Count:
        """Read one partition and write its rows."""
        number, task = numbered
        began = time.time()
        rows, records = [self._no_rows()], [_no_records()]
        count = Count()
        for batch in self.reader.read(task):
            _check_reached(batch)
            given = batch.num_items
            rows.append(self._make_rows(batch))
            records.append(to_table(batch.to_frame()))
            failed = len(batch.failed) + batch.skipped
            count += Count(batch.num_items, failed, given - batch.num_items)
        return self._write(number, pa.concat_tables(rows), pa.concat_tables(records), count, began)

    def infer_schemas(self, task: FileGroupTask) -> list[pa.Schema]:
        """Return the columns that the function gives for the first images of a partition."""
        assert self.fn is not None
        batches = (batch for batch in self.reader.read(task) if batch.data)
        schemas: list[pa.Schema] = []
        first: Exception | None = None
        for batch in islice(batches, INFERRED_BATCHES):
            rows, failures = make_rows_singly(self.fn, batch)
            schemas += [to_table(each).schema for each in rows]
            first = first or next((error for _, error in failures), None)
        if first is not None and not schemas:
            raise first
        return schemas

    def write_lost(self, number: int, task: FileGroupTask, error: Exception) -> Count:
        """Write a row for each shard of a partition that could not be run."""
        batch = ImageBatch(failed=describe_lost_shards(task, self.reader.relative_to, error))
        rows = self._no_rows() if self.fn is not None else self._make_rows(batch)
        count = Count(0, len(batch.failed))
        return self._write(number, rows, to_table(batch.to_frame()), count, time.time())

    def _no_rows(self) -> pa.Table:
        assert self.schema is not None
        return self.schema.empty_table()

    def _make_rows(self, batch: ImageBatch) -> pa.Table:
        if self.fn is None:
            return to_table(describe_batch(batch, self.reader.sidecars))
        assert self.schema is not None
        with_ids = "image_id" in self.schema.names
        rows, failures = make_rows_singly(self.fn, batch, with_ids)
        if failures:
            if self.reader.on_error == "raise":
                raise failures[0][1]
            self._fail_images(batch, failures)
        try:
            tables = [_conform(to_table(each), self.schema) for each in rows]
        except (ValueError, TypeError, NotImplementedError) as error:
            raise SchemaError(
                f"rows of {name_function(self.fn)}: {error}. Give all columns and types with meta"
            ) from None
        return pa.concat_tables([self._no_rows(), *tables])

    def _fail_images(
        self, batch: ImageBatch, failures: Sequence[tuple[ImageObject, Exception]]
    ) -> None:
        """Count the images that the function raises for as failed."""
        assert self.fn is not None
        logger.error("%s failed", name_function(self.fn), exc_info=failures[0][1])
        for number, (image, error) in enumerate(failures):
            image.image_data = None
            image.error = f"function failed: {describe_failure(error)}"
            if number < _LOGGED_PER_BATCH:
                logger.warning("%s: %s", image.image_path, image.error)
        if len(failures) > _LOGGED_PER_BATCH:
            logger.warning("and %d more of its batch", len(failures) - _LOGGED_PER_BATCH)
        batch.data = [image for image in batch.data if image.error is None]
        if self.reader.on_error == "skip":
            batch.skipped += len(failures)
        else:
            batch.failed += [image for image, _ in failures]

    def _write(
        self, number: int, rows: pa.Table, records: pa.Table, count: Count, began: float
    ) -> Count:
        earlier = self.folder.read_footer(number) if self.retrying else None
        if earlier is not None and earlier.images > count.images:
            logger.warning(
                "partition %d: %d images could be read before, and %d now: its rows stay",
                *(number, earlier.images, count.images),
            )
            return earlier.count()
        worker = find_worker()
        name = worker.address if worker is not None else "client"
        footer = Footer(self.job_id, **asdict(count), began=began, ended=time.time(), worker=name)
        self.folder.write_part(number, rows, records if self.fn is not None else None, footer)
        return count


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give a table the schema of all parts."""
    if not len(table):
        return schema.empty_table()
    if set(table.column_names) != set(schema.names):
        raise ValueError(f"columns {table.column_names} came where {schema.names} are expected")
    columns = []
    for field in schema:
        column = table[field.name]
        if pa.types.is_struct(field.type) and not pa.types.is_null(column.type):
            lost = {f.name for f in column.type} - {f.name for f in field.type}
            if lost:  # a cast would drop them in silence
                raise ValueError(f"column {field.name!r}: no place for {sorted(lost)}")
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"column {field.name!r} ({field.type}): {error}") from None
    return pa.Table.from_arrays(columns, schema=schema)


def _check_reached(batch: ImageBatch) -> None:
    """Raise what a store has answered: the images are there, and are to be read another time."""
    for image in batch.failed:
        if image.cause == UNREACHABLE:
            raise StorageError(image.error)


def describe_batch(batch: ImageBatch, sidecars: bool) -> pd.DataFrame:
    """Return a batch's metadata, and the sidecars as JSON if they are asked for."""
    frame = batch.to_frame()
    if sidecars:
        texts = [_to_json(image.metadata) for image in [*batch.data, *batch.failed]]
        frame["sidecars"] = pd.array(texts, dtype="string[pyarrow]")
    return frame


def _to_json(sidecars: dict[str, Any]) -> str:
    # ASCII: a lone surrogate, which JSON may hold, is no UTF-8.
    dump = partial(json.dumps, default=lambda content: {"base64": b64encode(content).decode()})
    try:
        return dump(sidecars, allow_nan=False)
    except ValueError:
        return dump(_drop_non_finite(sidecars))


def _drop_non_finite(value: Any) -> Any:
    """Return what Python's own JSON holds with null for the numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _drop_non_finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_drop_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _no_records() -> pa.Table:
    return to_table(make_frame([]))
