"""What makes the rows of a job: from the images' metadata, or with a function of the images."""

from __future__ import annotations

import dataclasses
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
import pyarrow as pa

from dask_imgread.errors import SchemaError
from dask_imgread.jobs.code import digest_code
from dask_imgread.jobs.schema import SchemaFinder
from dask_imgread.rows import (
    BatchFunction,
    ByValue,
    describe_failure,
    make_rows_singly,
    name_function,
    to_table,
)
from dask_imgread.sidecars import MetadataColumns, to_json
from dask_imgread.tasks import ImageBatch, ImageObject

logger = logging.getLogger("dask_imgread")

_LOGGED_PER_BATCH = 5  # failures of a function; the records have all of them
_TYPES = b"sidecar_types"  # where a schema's metadata hold the types of sidecars' columns


class RowMaker(ABC):
    """Makes the rows of a job. It consists of plain values, since it is pickled for workers.

    Attributes
    ----------
    keeps_records
        Whether the images' records are written beside the rows, as the rows don't hold them.
    """

    keeps_records: ClassVar[bool]

    @abstractmethod
    def describe(self) -> dict[str, str | None]:
        """Return its part of the job's description."""

    def list_options(self) -> dict[str, Any]:
        """Return its part of the options in the job's description."""
        return {}

    def digest_code(self) -> dict[str, str]:
        """Return a digest of all that decides what its rows are, by name."""
        return {}

    @abstractmethod
    def find_schema(self, finder: SchemaFinder) -> pa.Schema:
        """Return the columns and types of all rows."""

    @abstractmethod
    def make_rows(self, batch: ImageBatch, schema: pa.Schema) -> pa.Table:
        """Return the rows of a batch, with that schema."""


@dataclass(frozen=True)
class MetadataRows(RowMaker):
    """A row for each image, failed ones too: its record, and its sidecars if they are read.

    Parameters
    ----------
    columns
        What makes the rows. If it has no columns for sidecars, and the reader reads them, they are
        one column of JSON.
    """

    columns: MetadataColumns = dataclasses.field(default_factory=MetadataColumns)

    keeps_records: ClassVar[bool] = False

    def describe(self) -> dict[str, str | None]:
        """Return its part of the job's description."""
        return {"command": "metadata", "function": None}

    def list_options(self) -> dict[str, Any]:
        """Return the columns for sidecars as the user has given them."""
        return {"sidecar_columns": self.columns.sidecars} if self.columns.sidecars else {}

    def find_schema(self, finder: SchemaFinder) -> pa.Schema:
        """Return the columns of the rows, with types that are kept in the folder or inferred."""
        columns = self.columns
        if not columns.sidecars:
            whole = bool(finder.reader.sidecars)
            return to_table(describe_batch(ImageBatch(), columns, whole)).schema
        if not columns.untyped:
            return _make_schema(columns)
        return finder.keep(lambda: _make_schema(finder.infer_types(columns)))

    def make_rows(self, batch: ImageBatch, schema: pa.Schema) -> pa.Table:
        """Return the rows of a batch."""
        if not self.columns.sidecars:
            return to_table(describe_batch(batch, self.columns, "sidecars" in schema.names))
        return to_table(self.columns.set_types(json.loads(schema.metadata[_TYPES]))(batch))


def _make_schema(columns: MetadataColumns) -> pa.Schema:
    """Return the schema of all rows; it holds the types by name, as it shows JSON as strings."""
    schema = to_table(columns.meta).schema
    types = json.dumps({column.name: column.type for column in columns.sidecars})
    return schema.with_metadata({**schema.metadata, _TYPES: types.encode()})


@dataclass(frozen=True)
class FunctionRows(RowMaker):
    """What a function returns for the images that were read.

    Parameters
    ----------
    fn
        The function.
    on_error
        What to do with an image for which it raises: the same as with one that can't be read.
    declared
        The schema that the user has declared, with null for a type that is left open; None if
        there is none.
    """

    fn: BatchFunction
    on_error: Literal["record", "skip", "raise"] = "record"
    declared: pa.Schema | None = None

    keeps_records: ClassVar[bool] = True

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the function with its code, where its module asks for that."""
        return FunctionRows, (ByValue(self.fn), self.on_error, self.declared)

    def describe(self) -> dict[str, str | None]:
        """Return its part of the job's description."""
        return {"command": "apply", "function": name_function(self.fn)}

    def digest_code(self) -> dict[str, str]:
        """Return digests of the function and of what it uses."""
        return digest_code(self.fn)

    def find_schema(self, finder: SchemaFinder) -> pa.Schema:
        """Return the schema that is kept in the folder, or declared, or inferred."""
        return finder.find(self.fn, self.declared)

    def make_rows(self, batch: ImageBatch, schema: pa.Schema) -> pa.Table:
        """Return the rows of a batch; images for which the function raises become its failures."""
        rows, failures = make_rows_singly(self.fn, batch, "image_id" in schema.names)
        if failures:
            if self.on_error == "raise":
                raise failures[0][1]
            self._move_failures(batch, failures)
        try:
            tables = [_conform(to_table(each), schema) for each in rows]
        except (ValueError, TypeError, NotImplementedError) as error:
            raise SchemaError(
                f"rows of {name_function(self.fn)}: {error}. Give all columns and types with meta; "
                "if the function was edited and has other columns now, overwrite the output"
            ) from None
        return pa.concat_tables([schema.empty_table(), *tables])

    def _move_failures(
        self, batch: ImageBatch, failures: Sequence[tuple[ImageObject, Exception]]
    ) -> None:
        """Count the images for which the function raises as failed, and not as read."""
        logger.error("%s failed", name_function(self.fn), exc_info=failures[0][1])
        for number, (image, error) in enumerate(failures):
            image.image_data = None
            image.error = f"function failed: {describe_failure(error)}"
            if number < _LOGGED_PER_BATCH:
                logger.warning("%s: %s", image.image_path, image.error)
        if len(failures) > _LOGGED_PER_BATCH:
            logger.warning("and %d more of its batch", len(failures) - _LOGGED_PER_BATCH)
        batch.data = [image for image in batch.data if image.error is None]
        if self.on_error == "skip":
            batch.skipped += len(failures)
        else:
            batch.failed += [image for image, _ in failures]


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Give a table the schema of all parts."""
    if not len(table):
        return schema.empty_table()
    if set(table.column_names) != set(schema.names):
        raise ValueError(f"columns are {table.column_names}, expected {schema.names}")
    columns = []
    for field in schema:
        column = table[field.name]
        if pa.types.is_struct(field.type) and not pa.types.is_null(column.type):
            lost = {f.name for f in column.type} - {f.name for f in field.type}
            if lost:  # a cast would drop them silently
                raise ValueError(f"column {field.name!r}: no place for {sorted(lost)}")
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"column {field.name!r} ({field.type}): {error}") from None
    return pa.Table.from_arrays(columns, schema=schema)


def describe_batch(batch: ImageBatch, columns: MetadataColumns, sidecars: bool) -> pd.DataFrame:
    """Return a batch's metadata, with the sidecars as a column of JSON if they are asked for."""
    frame = columns(batch)
    if sidecars:
        texts = [to_json(image.metadata) for image in [*batch.data, *batch.failed]]
        frame["sidecars"] = pd.array(texts, dtype="string[pyarrow]")
    return frame
