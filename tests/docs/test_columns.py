"""The page about columns says what the code makes."""

import pandas as pd

from dask_imgread import (
    ImageReaderStage,
    diff_frames,
    find_duplicates,
    fingerprint,
    match_hashes,
    read_metadata,
    verify_shards,
)
from dask_imgread.rows import to_table
from dask_imgread.tasks import COLUMNS, make_frame
from tests.helpers.markdown import ROOT, list_tables

PAGE = (ROOT / "docs" / "columns.md").read_text()


def read_columns(title, table=0):
    """Return the types of a table's columns by name."""
    return {name: kind for name, kind, *_ in list_tables(PAGE, title)[table]}


def list_types(frame):
    return {field.name: str(field.type) for field in to_table(frame).schema}


def compute_rows(shards):
    reader = ImageReaderStage(md5=True, verbose=False)
    rows = read_metadata(shards, reader=reader, sidecars={"txt": "caption"}, checksum=True)
    return rows.compute(scheduler="sync")


def test_metadata():
    described = read_columns("Metadata")
    assert list(described.items()) == list(list_types(make_frame([])).items())
    assert list(described) == [*COLUMNS, "image_id"]


def test_what_metadata_may_have(make_shards):
    types = list_types(compute_rows(make_shards()))
    more = read_columns("Metadata", 1)
    assert list(types)[len(COLUMNS) : -1] == ["sha256", "md5", "caption", "error_sidecar"]
    for name in ("sha256", "md5", "error_sidecar"):
        assert types[name] == more[name]


def test_fingerprints():
    assert list(read_columns("Fingerprints").items()) == list(list_types(fingerprint.meta).items())


def test_duplicates_and_matches(make_shards):
    rows = compute_rows(make_shards())
    duplicates = list_types(find_duplicates(pd.concat([rows, rows.set_axis(rows.index + "2")])))
    assert read_columns("Duplicates").items() & duplicates.items() == {
        (name, duplicates[name]) for name in ("group", "keep", "distance", "image_id")
    }
    found = list_types(match_hashes(rows, rows["sha256"].iloc[:1]))
    assert read_columns("Duplicates", 1).items() <= found.items()
    assert found.keys() - list_types(rows).keys() == read_columns("Duplicates", 1).keys()


def test_changes(make_shards):
    rows = compute_rows(make_shards())
    assert list(read_columns("Changes").items()) == list(
        list_types(diff_frames(rows, rows)).items()
    )


def check_nulls(frame, tables):
    """Check that the columns of which the page says so are never null."""
    never = {row[0] for table in tables for row in table if row[3] == "never"}
    nulls = {name for name, column in frame.reset_index().items() if column.isna().any()}
    assert never & {*frame.reset_index()}
    assert not never & nulls


def test_what_is_never_null(make_shards):
    shards = make_shards(broken=2)
    with open(shards[1], "r+b") as shard:
        shard.truncate(20_000)  # a shard's damage has a row
    bad = verify_shards(shards).bad
    assert (bad["size"] == 0).any()
    check_nulls(bad, list_tables(PAGE, "Metadata"))
