"""Columns that metadata may have beside the images' records: sidecars' values, and checksums."""

from __future__ import annotations

import functools
import json
import re
import reprlib
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from math import isfinite
from types import NoneType
from typing import Any, NamedTuple, Self, TypeAlias

import pandas as pd
import pyarrow as pa

from dask_imgread.errors import StorageError
from dask_imgread.reading.options import clean_extension
from dask_imgread.reading.reader import ImageReaderStage
from dask_imgread.reading.records import UNREACHABLE
from dask_imgread.rows import INFERRED_BATCH, INFERRED_BATCHES, INFERRED_TASKS
from dask_imgread.shards.partition import split_task
from dask_imgread.shards.samples import find_sidecar_type, is_image
from dask_imgread.tasks import (
    OWN_COLUMNS,
    PROBLEMS,
    FileGroupTask,
    ImageBatch,
    ImageObject,
)

# The columns by the extension of the sidecar: a name for the whole sidecar, or names of keys.
Sidecars: TypeAlias = Mapping[str, str | Sequence[str] | Mapping[str, Any]]
Notes: TypeAlias = list[list[str]]  # what is wrong with the sidecars of each image

_INTEGERS = (
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
)
_TYPES = {  # by their names in `Sidecars`
    "bool": pa.bool_(),
    **{str(each): each for each in _INTEGERS},
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "binary": pa.binary(),
    "json": pa.string(),
}
# The types of Python that fit them. Arrow converts others, too, such as 1.5 to 1.
_KINDS: dict[pa.DataType, set[type]] = {
    pa.bool_(): {bool},
    **{each: {int} for each in _INTEGERS},
    pa.float32(): {int, float},
    pa.float64(): {int, float},
    pa.string(): {str, bytes},
    pa.binary(): {bytes},
}
_ALIASES = {  # Python's, NumPy's and Arrow's
    "int": "int64",
    "float": "float64",
    "float[pyarrow]": "float32",
    "double": "float64",
    "boolean": "bool",
    "str": "string",
    "large_string": "string",
    "bytes": "binary",
}
_MISSING = object()
_MISFITS = (pa.ArrowException, TypeError, ValueError, OverflowError)


class SidecarColumn(NamedTuple):
    """A column of what sidecars hold.

    ``key`` is that of a JSON object, None for the whole sidecar. ``type`` is a name that
    ``name_type`` returns, None if it is yet to be found.
    """

    name: str
    extension: str
    key: str | None
    type: str | None


@dataclass(frozen=True)
class MetadataColumns:
    """Makes the rows of batches: the images' records, checksums, and columns of their sidecars.

    It consists of plain values, since it is part of Dask's keys and is pickled for workers.

    Parameters
    ----------
    sidecars
        The columns of the sidecars; if there are any, the rows have ``error_sidecar``, too.
    digests
        Which of the columns ``sha256`` and ``md5`` the rows have.
    """

    sidecars: tuple[SidecarColumn, ...] = ()
    digests: tuple[str, ...] = ()

    @classmethod
    def parse(cls, sidecars: Sidecars | None, digests: tuple[str, ...] = ()) -> Self:
        """Make the columns that a user asks for.

        Raises
        ------
        ValueError
            If a column's name is taken, or something is neither a name nor a type.

        Examples
        --------
        >>> for column in MetadataColumns.parse({"txt": "caption", "json": ["url"]}).sidecars:
        ...     tuple(column)
        ('caption', 'txt', None, 'string')
        ('url', 'json', 'url', None)
        """
        if not isinstance(sidecars, Mapping | NoneType):
            raise ValueError(
                'sidecars: give columns by extension, such as {"txt": "caption"}, '
                f"not {sidecars!r}"
            )
        columns = tuple(
            column
            for extension, wanted in (sidecars or {}).items()
            for column in _list_columns(clean_extension(extension), wanted)
        )
        _check_names([column.name for column in columns])
        return cls(columns, digests)

    @property
    def extensions(self) -> tuple[str, ...]:
        """The extensions of the sidecars that are read."""
        return tuple(sorted({column.extension for column in self.sidecars}))

    @property
    def untyped(self) -> list[str]:
        """The names of the columns whose types are yet to be found."""
        return [column.name for column in self.sidecars if column.type is None]

    @property
    def meta(self) -> pd.DataFrame:
        """No rows, with the columns and dtypes of all rows."""
        return self(ImageBatch())

    def set_types(self, types: Mapping[str, str]) -> Self:
        """Return the same columns with some types, by column, where they had none."""
        columns = (c._replace(type=c.type or types.get(c.name)) for c in self.sidecars)
        return replace(self, sidecars=tuple(columns))

    def infer_types(
        self,
        reader: ImageReaderStage,
        tasks: Iterable[FileGroupTask],
        run: Callable[[Callable[[FileGroupTask], dict[str, str]], FileGroupTask], dict[str, str]],
    ) -> Self:
        """Return the same columns with the types that the first images show, else ``"string"``.

        Parameters
        ----------
        reader
            The reader of the images.
        tasks
            What is read; a few are.
        run
            Runs a function of a task where images are read.

        Raises
        ------
        StorageError
            If a store refuses one of these images: its types are not known.
        """
        if not self.untyped:
            return self
        small = reader.with_options(
            decode=False,
            checksum=False,
            md5=False,
            on_error="record",
            sidecars=self.extensions,
            max_batch_bytes=1,  # each image with sidecars is a batch: not a thousand are read
        )
        columns = self
        for task in islice(tasks, INFERRED_TASKS):
            if not columns.untyped:
                break
            columns = columns.set_types(run(partial(find_types, small, columns), task))
        return columns.set_types(dict.fromkeys(columns.untyped, "string"))

    def __call__(self, batch: ImageBatch) -> pd.DataFrame:
        """Return one row for each image, read or failed, indexed by ``image_id``."""
        images = [*batch.data, *batch.failed]
        columns: dict[str, Any] = {}
        for name in self.digests:
            columns[name] = _make_texts(getattr(image, name) for image in images)
        if self.sidecars:
            notes = [[image.sidecar_error] if image.sidecar_error else [] for image in images]
            for column, values in self._list_values(images, notes):
                columns[column.name] = _convert(column, values, notes)
            columns[PROBLEMS] = _make_texts("; ".join(each) or None for each in notes)
        return batch.to_frame().assign(**columns)

    def _list_values(
        self, images: Sequence[ImageObject], notes: Notes
    ) -> Iterator[tuple[SidecarColumn, list[Any]]]:
        """Yield each column with its value for each image, None where it is missing."""
        objects = {
            extension: _list_objects(extension, images, notes)
            for extension in {c.extension: None for c in self.sidecars if c.key is not None}
        }
        for column in self.sidecars:
            if column.key is not None:
                yield column, _look_up(objects[column.extension], column.key)
            elif column.type == "json":  # of which null is a value, too
                found = (image.metadata.get(column.extension, _MISSING) for image in images)
                yield column, [None if each is _MISSING else to_json(each) for each in found]
            else:
                yield column, [image.metadata.get(column.extension) for image in images]


def find_types(
    reader: ImageReaderStage, columns: MetadataColumns, task: FileGroupTask
) -> dict[str, str]:
    """Return the types that a task's first images show, by column.

    Raises
    ------
    StorageError
        If a store refuses one of the images.
    """
    batches = (batch for each in split_task(task) for batch in reader.read(each))
    images = (image for batch in batches for image in [*batch.data, *batch.failed])
    first = list(islice(images, INFERRED_BATCH * INFERRED_BATCHES))
    for image in first:
        if image.cause == UNREACHABLE:
            raise StorageError(image.error)
    listed = columns._list_values(first, [[] for _ in first])
    types = {column.name: _infer_type(values) for column, values in listed if column.type is None}
    return {name: found for name, found in types.items() if found is not None}


def _list_columns(extension: str, wanted: Any) -> Iterator[SidecarColumn]:
    """Yield the columns of the sidecars with one extension."""
    if is_image(extension):
        raise ValueError(f"sidecars: .{extension} members are images: their rows are there anyway")
    kind = find_sidecar_type(extension)
    if isinstance(wanted, str):
        yield SidecarColumn(wanted, extension, None, kind)
    elif isinstance(wanted, Mapping) and (kind == "json" or len(wanted) == 1):
        for name, dtype in wanted.items():
            found = None if dtype is None else name_type(dtype)
            if kind == "json":
                yield SidecarColumn(name, extension, name, found)
            else:
                yield SidecarColumn(name, extension, None, found or kind)
    elif isinstance(wanted, Sequence) and kind == "json":
        for name in wanted:
            yield SidecarColumn(name, extension, name, None)
    else:
        raise ValueError(
            f"sidecars: {wanted!r} are no columns of .{extension}: give a name or {{name: dtype}}; "
            "for .json a list of keys or {key: dtype}, too"
        )


def _check_names(names: list[Any]) -> None:
    """Raise ValueError unless the columns' names are new, and each is there once."""
    if wrong := [name for name in names if not isinstance(name, str) or not name]:
        raise ValueError(f"sidecars: {wrong[0]!r} is no column's name")
    clashing = [name for name, count in Counter(names).items() if count > 1 or name in OWN_COLUMNS]
    if clashing:
        raise ValueError(
            f"sidecars: {', '.join(clashing)}: the metadata would have two columns of that name"
        )


def name_type(dtype: Any) -> str:
    """Return the name of a column's type, given as a name or as a type of Python's or a library's.

    Raises
    ------
    ValueError
        If no column can have that type.

    Examples
    --------
    >>> name_type(float), name_type("int32[pyarrow]"), name_type(pa.list_(pa.float32()))
    ('float64', 'int32', 'list<float32>')
    """
    text = f"{dtype}[pyarrow]" if isinstance(dtype, pa.DataType) else dtype
    text = getattr(text, "__name__", str(text)).lower().replace(" ", "")
    plain = text.removesuffix("[pyarrow]")
    # Arrow's own notation has a name for the items, and calls 32 bits "float".
    items = re.fullmatch(r"list<(item:)?(.+)>", plain)
    if items is not None and items[2] != "json":
        return f"list<{name_type(items[2] + ('[pyarrow]' if items[1] else ''))}>"
    name = _ALIASES.get(text) or _ALIASES.get(plain, plain)
    if name not in _TYPES:
        raise ValueError(
            f"sidecars: {dtype!r} is no type of a column: give {', '.join(_TYPES)}, or "
            "list<...> of one before json"
        )
    return name


@functools.cache
def _to_arrow(name: str) -> pa.DataType:
    if name.startswith("list<"):
        return pa.list_(_to_arrow(name[5:-1]))
    return _TYPES[name]


def _to_pandas(wanted: pa.DataType) -> pd.api.extensions.ExtensionDtype:
    """Return the pandas dtype of a column, which for strings is that of ``COLUMNS``."""
    return pd.StringDtype("pyarrow") if pa.types.is_string(wanted) else pd.ArrowDtype(wanted)


def _make_texts(texts: Iterable[str | None]) -> Any:
    return pd.array(list(texts), dtype="string[pyarrow]")


def _list_objects(
    extension: str, images: Sequence[ImageObject], notes: Notes
) -> list[dict[str, Any]]:
    """Return the JSON object of each image, an empty one where there is none."""
    objects: list[Any] = [image.metadata.get(extension) for image in images]
    for number, value in enumerate(objects):
        if type(value) is not dict:
            if value is not None:
                notes[number].append(f"{extension}: {reprlib.repr(value)} is no JSON object")
            objects[number] = {}
    return objects


def _look_up(objects: Iterable[dict[str, Any]], key: str) -> list[Any]:
    """Return the value of a key in each object; ``a.b`` is the ``b`` in ``a`` if there is no such.

    >>> _look_up([{"a": {"b": 1}}, {"a.b": 2, "a": {"b": 1}}, {"a": 3}], "a.b")
    [1, 2, None]
    """
    if "." not in key:
        return [each.get(key) for each in objects]
    return [each[key] if key in each else _follow(each, key.split(".")) for each in objects]


def _follow(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _infer_type(values: Iterable[Any]) -> str | None:
    """Return the type of JSON values: ``json`` if they have several; None if all are null.

    >>> _infer_type([1, None, 0.5]), _infer_type([[], ["a"]]), _infer_type([1, "a"])
    ('float64', 'list<string>', 'json')
    """
    values = [value for value in values if value is not None]
    kinds = set(map(type, values))
    if not kinds:
        return None
    if kinds == {list}:
        items = _infer_type(chain.from_iterable(values))
        return "json" if items in (None, "json") else f"list<{items}>"
    if kinds == {int, float}:
        return "float64"
    only = kinds.pop() if len(kinds) == 1 else object
    return {bool: "bool", int: "int64", float: "float64", str: "string"}.get(only, "json")


def _convert(column: SidecarColumn, values: list[Any], notes: Notes) -> Any:
    """Return a column as a pandas array; what does not fit is null, with a note."""
    name = column.type or "string"
    wanted = _to_arrow(name)
    if name == "json" and column.key is not None:
        values = [None if value is None else to_json(value) for value in values]
    try:
        _check_kinds(values, wanted)
        array = pa.array(values, wanted)
    except _MISFITS:
        pairs = zip(values, notes, strict=True)
        array = pa.array([_fit(column, value, own, wanted) for value, own in pairs], wanted)
    return _to_pandas(wanted).__from_arrow__(array)


def _fit(column: SidecarColumn, value: Any, notes: list[str], wanted: pa.DataType) -> Any:
    """Return a value that fits a type; None, with a note, if it doesn't."""
    try:
        fitting = value
        if pa.types.is_floating(wanted) and type(value) is int:  # perhaps rounded
            fitting = float(value)
        elif pa.types.is_integer(wanted) and type(value) is float and value.is_integer():
            fitting = int(value)
        _check_kinds([fitting], wanted)
        pa.array([fitting], wanted)
    except _MISFITS:
        notes.append(f"{column.name}: {reprlib.repr(value)} is no {column.type}")
        return None
    return fitting


def _check_kinds(values: Iterable[Any], wanted: pa.DataType) -> None:
    """Raise TypeError if a value is of a type that does not fit, whatever Arrow makes of it."""
    kinds = set(map(type, values)) - {NoneType}
    if pa.types.is_list(wanted):
        if kinds - {list}:
            raise TypeError
        _check_kinds(chain.from_iterable(filter(None, values)), wanted.value_type)
    elif kinds - _KINDS[wanted]:
        raise TypeError


def to_json(value: Any) -> str:
    """Return what sidecars hold as JSON: bytes in base64, null for NaN and infinities."""
    # json.dumps escapes what is not ASCII. A sidecar may hold a lone surrogate, which has no UTF-8.
    dump = partial(json.dumps, default=lambda content: {"base64": b64encode(content).decode()})
    try:
        return dump(value, allow_nan=False)
    except ValueError:
        return dump(drop_non_finite(value))


def drop_non_finite(value: Any) -> Any:
    """Return a value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: drop_non_finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [drop_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
