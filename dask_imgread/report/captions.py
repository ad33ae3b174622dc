"""The texts that stand beneath pictures: those that sidecars held, or a function has made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
from fsspec import AbstractFileSystem

from dask_imgread.report.statistics import Row, count_threads, open_part, read_columns
from dask_imgread.tasks import OWN_COLUMNS

_COLUMNS, _CHARACTERS = 3, 300  # columns that are shown, and the beginning of each text


def find_captions(
    fs: AbstractFileSystem, parts: Sequence[str], rows: Iterable[Row]
) -> dict[str, list[str]]:
    """Return texts by image id. Of the parts only those are opened that have one of the rows."""
    wanted: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        wanted[row.part].add(row.image_id)

    def find(part: int) -> dict[str, list[str]]:
        return _read_texts(fs, parts[part], wanted[part])

    with ThreadPoolExecutor(count_threads(fs)) as pool:
        return {name: texts for found in pool.map(find, wanted) for name, texts in found.items()}


def _read_texts(fs: AbstractFileSystem, path: str, wanted: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with open_part(fs, path) as parquet:
        names = [
            field.name
            for field in parquet.schema_arrow
            if field.name not in OWN_COLUMNS and _is_text(field.type)
        ]
        names = sorted(names, key=lambda name: name != "caption")[:_COLUMNS]
        if not names or "image_id" not in parquet.schema_arrow.names:
            return {}
        schema = pa.schema({name: pa.large_string() for name in ("image_id", *names)})
        ids = pa.array(wanted, pa.large_string())
        for table in read_columns(parquet, schema):
            for row in table.filter(pc.is_in(table["image_id"], ids)).to_pylist():
                texts = ((name, row[name]) for name in names if row[name])
                found[row["image_id"]] = [
                    _shorten(text) if name == names[0] else f"{name}: {_shorten(text)}"
                    for name, text in texts
                ]
    return found


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _shorten(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"
