"""What changed between two frames of metadata: every kind of change, and what is none."""

import os
from collections import defaultdict
from itertools import product

import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_imgread import diff_frames, read_metadata, run_job
from dask_imgread.diff import KINDS, survey_changes
from dask_imgread.tasks import COLUMNS
from dask_imgread.testing import draw_picture, encode_picture, make_shards, write_shard

A, B, C, D = (encode_picture(draw_picture(n, (24, 16)), "png") for n in range(4))
OTHER_A = A + b"\0"  # what follows a PNG's end is not looked at


@pytest.fixture
def read(tmp_path):
    """Write shards, of each the names and contents of its members, and return their rows."""

    def read(shards, **options):
        paths = [write_shard(tmp_path / f"{name}.tar", [*m.items()]) for name, m in shards.items()]
        return read_metadata(paths, **options).compute(scheduler="sync")

    return read


def sum_up(changes):
    """Return, by kind, the names of the images, and from where they were moved."""
    found = defaultdict(list)
    for row in changes.reset_index().to_dict("records"):
        place = row["shard_old"] if row["change"] == "gone" else row["shard_new"]
        shard, name = os.path.basename(place).partition(".")[0], row["image_id"].partition("/")[2]
        former = "" if pd.isna(row["moved_from"]) else f" from {row['moved_from'].split('-')[0]}"
        found[row["change"]].append(f"{shard}/{name}{former}")
    return dict(found)


def assert_same(lazy, changes):
    pd.testing.assert_frame_equal(lazy.compute(scheduler="sync").sort_index(), changes)


@pytest.mark.parametrize("checksum", [False, True])
def test_each_kind(read, checksum):
    old = read(
        {
            "s": {"a.png": A, "b.png": B, "c.png": C, "d.png": b"text", "e.png": D},
            "t": {"f.png": A},
        },
        checksum=checksum,
    )
    new = read(
        {"s": {"a.png": A, "b.png": b"text", "c.png": C, "d.png": D, "x.png": B},
         "t": {"e.png": D, "f.png": OTHER_A}},
        checksum=checksum,
    )  # fmt: skip
    changes = diff_frames(old, new)
    assert sum_up(changes) == {
        "added": ["s/x.png"],
        "newly failed": ["s/b.png"],
        "newly readable": ["s/d.png"],
        "moved": ["t/e.png from s"],
        "changed": ["t/f.png"],
    }
    assert sum_up(diff_frames(new, old))["gone"] == ["s/x.png"]
    failed = changes[changes["change"] == "newly failed"].iloc[0]
    assert failed["error_old"] is pd.NA
    assert failed["error_new"].startswith("not an image: ")
    assert (failed["size_old"], failed["size_new"]) == (len(B), 4)
    changed = changes[changes["change"] == "changed"].iloc[0]
    assert changed["size_new"] - changed["size_old"] == 1
    assert changes[["sha256_old", "sha256_new"]].notna().any(axis=None) == checksum
    assert len(diff_frames(old, old)) == 0


def test_an_edit_that_keeps_the_size_is_seen_by_its_digest(read):
    assert len(B) == len(B[:-1] + b"\0")
    before = {"s": {"a.png": A, "b.png": B}}
    after = {"s": {"a.png": A, "b.png": B[:-1] + b"\0"}}
    plain, known = read(before), read(before, checksum=True)
    assert len(diff_frames(plain, read(after))) == 0
    assert sum_up(diff_frames(known, read(after, checksum=True))) == {"changed": ["s/b.png"]}
    assert len(diff_frames(known, read(after))) == 0


def test_another_place_in_another_version_of_the_shard_is_no_change(read):
    old = read({"s": {"a.png": A, "b.png": B}})
    new = read({"s": {"note.txt": b"new", "b.png": B, "a.png": A}})
    assert set(old["shard_version"]).isdisjoint(new["shard_version"])
    assert len(diff_frames(old, new)) == 0


def test_another_cause_is_a_change_only_with_other_bytes(read):
    old = read({"s": {"a.png": b"text"}, "t": {"a.png": b"text"}})
    new = read({"s": {"a.png": b"more text"}, "t": {"a.png": b"text"}})
    new["error"] = "corrupt: at last"
    assert sum_up(diff_frames(old, new)) == {"changed": ["s/a.png"]}


@pytest.mark.parametrize("checksum", [False, True])
def test_twins_are_paired_off(read, checksum):
    """The same picture in several shards, of which one has a third of another content."""
    old = read({"s": {"a.png": A}, "t": {"a.png": A}, "u": {"a.png": B}}, checksum=checksum)
    new = read({"v": {"a.png": A}, "w": {"a.png": A}, "x": {"a.png": A}}, checksum=checksum)
    changes = diff_frames(old, new)
    assert sum_up(changes) == {
        "moved": ["v/a.png from s", "w/a.png from t"],
        "added": ["x/a.png"],
        "gone": ["u/a.png"],
    }
    assert_same(diff_frames(dd.from_pandas(old[::-1], 2, sort=False), new[::-1]), changes)


def test_what_was_moved_has_one_row(read):
    old, new = read({"s": {"a.png": A}}), read({"t": {"x.txt": b"", "a.png": A}})
    (row,) = diff_frames(old, new).reset_index().to_dict("records")
    assert (row["image_id"], row["moved_from"]) == (new.index[0], old.index[0])
    assert (row["shard_old"], row["shard_new"]) == (old["shard"].iloc[0], new["shard"].iloc[0])
    assert row["offset_old"] < row["offset_new"]
    assert row["size_old"] == row["size_new"] == len(A)


def test_a_repeated_name_is_the_same_name(tmp_path, read):
    old = read({"t": {"a.png": B}})
    twice = write_shard(tmp_path / "s.tar", [("a.png", A), ("a.png", B)])
    new = read_metadata(twice).compute(scheduler="sync")
    changes = diff_frames(old, new)
    assert dict(zip(changes.index, changes["change"], strict=True)) == {
        new.index[0]: "added",
        new.index[1]: "moved",
    }
    assert "/a.png@" in new.index[1]


def test_a_shard_that_is_lost(tmp_path, read):
    shards = {"s": {"a.png": A, "b.png": B}, "t": {"a.png": C}}
    old = read(shards)
    (tmp_path / "s.tar").write_bytes(b"no tar at all")
    new = read_metadata(str(tmp_path)).compute(scheduler="sync")
    changes = diff_frames(old, new)
    assert sum_up(changes) == {"added": ["s/"], "gone": ["s/a.png", "s/b.png"]}
    assert changes["error_new"].iloc[0].startswith("unreadable shard")
    # Nothing was moved from one lost shard to another.
    (tmp_path / "u.tar").write_bytes(b"no tar either")
    os.remove(tmp_path / "s.tar")
    later = read_metadata(str(tmp_path)).compute(scheduler="sync")
    assert sum_up(diff_frames(new, later)) == {"gone": ["s/"], "added": ["u/"]}


def test_a_frame_as_it_was_stored(tmp_path, read):
    """Ids in a column, other types, fewer columns, rows in another order."""
    old = read({"s": {"a.png": A, "b.png": b"text"}, "t": {"c.png": C}}, checksum=True)
    new = read({"s": {"a.png": OTHER_A, "b.png": b"text"}, "t": {"d.png": C}}, checksum=True)
    changes = diff_frames(old, new)
    assert sum_up(changes) == {"changed": ["s/a.png"], "gone": ["t/c.png"], "added": ["t/d.png"]}
    old[::-1].to_csv(tmp_path / "old.csv")
    old.reset_index().to_parquet(tmp_path / "old.parquet")
    for stored in (
        pd.read_csv(tmp_path / "old.csv", dtype={"key": str}),
        pd.read_parquet(tmp_path / "old.parquet"),
        old[::-1].reset_index(),
    ):
        pd.testing.assert_frame_equal(diff_frames(stored, new), changes)
        assert_same(diff_frames(stored, dd.from_pandas(new, 2)), changes)
    few = new[["shard", "offset", "size"]]
    assert sum_up(diff_frames(old, few)) == sum_up(changes)
    assert_same(diff_frames(dd.from_pandas(old, 2), few), diff_frames(old, few))


def test_frames_of_dask_stay_lazy(tmp_path):
    paths = make_shards(tmp_path, shards=3, images_per_shard=4)
    old = read_metadata(paths[:2])
    changes = diff_frames(old, read_metadata(paths[1:]))
    assert changes.npartitions == 2
    found = changes.compute(scheduler="sync")
    assert found["change"].value_counts().to_dict() == {"gone": 4, "added": 4}
    assert {str(dtype) for dtype in found.dtypes} == {"string", "int64[pyarrow]", "int32[pyarrow]"}
    assert found.dtypes.equals(changes.dtypes)
    for number in range(2):
        part = changes.get_partition(number).compute(scheduler="sync")
        assert part.dtypes.equals(found.dtypes)
        assert (part.index.name, part.index.dtype) == ("image_id", "string[pyarrow]")
    nothing = diff_frames(old, old)
    assert len(nothing) == 0
    assert nothing.compute(scheduler="sync").dtypes.equals(found.dtypes)


def test_on_a_cluster(tmp_path, client):
    old = read_metadata(make_shards(tmp_path / "a", shards=3, images_per_shard=4))
    new = read_metadata(make_shards(tmp_path / "b", shards=3, images_per_shard=4))
    found = diff_frames(old, new).compute()
    assert found["change"].tolist() == ["moved"] * 12
    assert (found["moved_from"].str[-10:] == found.index.str[-10:]).all()


def test_folders_of_jobs(tmp_path, client):
    paths = make_shards(tmp_path, shards=3, images_per_shard=4)
    store = fsspec.filesystem("memory")
    run_job(paths[:2], str(tmp_path / "old"), client=client)
    run_job(paths[1:], str(tmp_path / "new"), client=client)
    store.put(f"{tmp_path}/new/", "/diff/", recursive=True)
    changes = diff_frames(tmp_path / "old", str(tmp_path / "new")).compute().sort_index()
    assert changes["change"].value_counts().to_dict() == {"gone": 4, "added": 4}
    for new in (tmp_path / "new", "memory://diff"):
        parts = []
        found = survey_changes(str(tmp_path / "old"), new, listed=3, write=parts.append)
        assert (found.old, found.new, found.counts) == (8, 8, {"added": 4, "gone": 4})
        pd.testing.assert_frame_equal(found.first, changes.groupby("change").head(3))
        pd.testing.assert_frame_equal(pd.concat(parts).sort_index(), changes)
    store.rm("/diff", recursive=True)


def test_many_rows_are_compared_in_parts(tmp_path, client, monkeypatch):
    paths = make_shards(tmp_path, shards=4, images_per_shard=3)
    run_job(paths, str(tmp_path / "old"), client=client)
    run_job(paths[1:], str(tmp_path / "new"), client=client)
    monkeypatch.setattr("dask_imgread.diff._ROWS", 5)
    parts = []
    found = survey_changes(tmp_path / "old", tmp_path / "new", listed=2, write=parts.append)
    assert (len(parts), found.counts) == (3, {"gone": 3})
    assert list(found.first["shard_old"]) == [paths[0]] * 2


def test_what_can_not_be_compared(read):
    rows = read({"s": {"a.png": A}})
    with pytest.raises(ValueError, match="expected, or a job's folder, not nowhere"):
        diff_frames(rows, "nowhere")
    with pytest.raises(ValueError, match="compared by image_id, and one of these has none"):
        diff_frames(rows.reset_index(drop=True), rows)
    twice = pd.concat([rows, rows])
    for each in (twice, dd.from_pandas(twice, 2, sort=False)):
        with pytest.raises(ValueError, match=f"{rows.index[0]} is .* several rows of the new"):
            len(diff_frames(rows, each))


# Compared with the same in plain Python

NAMES = ["a.png", "a.png@512", "b.png", "d/a.png", ""]
ROWS = st.dictionaries(
    st.tuples(st.sampled_from("stu"), st.sampled_from(NAMES)),
    st.fixed_dictionaries(
        {
            "size": st.sampled_from([None, 0, 1, 2]),
            "sha256": st.sampled_from([None, "x", "y"]),
            "width": st.sampled_from([None, 1, 2]),
            "error": st.sampled_from([None, None, "bad", "worse"]),
        }
    ),
    max_size=8,
)


def find_kind(old, new):
    def differ(name):
        return None not in (old[name], new[name]) and old[name] != new[name]

    if (old["error"] is None) != (new["error"] is None):
        return "newly failed" if old["error"] is None else "newly readable"
    if None in (old["sha256"], new["sha256"]):
        return "changed" if differ("size") or differ("width") else ""
    return "changed" if differ("sha256") else ""


def diff_plainly(old, new):
    """Return the kind of each change, and from where an image was moved, by id."""
    found = {place: (find_kind(old[place], new[place]), None) for place in old.keys() & new.keys()}
    gone, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    for knows_old, knows_new in product((True, False), repeat=2):
        for before, after in product(gone, added):
            one, other = old[before], new[after]
            same = (
                before[1].split("@")[0] == after[1].split("@")[0] and one["size"] == other["size"]
            )
            if knows_old and knows_new:
                same &= one["sha256"] == other["sha256"]
            known = (one["sha256"] is not None, other["sha256"] is not None)
            free = after not in found and ("moved", before) not in found.values()
            if same and one["size"] and known == (knows_old, knows_new) and free:
                found[after] = "moved", before
    moved = {before for kind, before in found.values() if kind == "moved"}
    found |= {place: ("gone", None) for place in gone if place not in moved}
    found |= {place: ("added", None) for place in added if place not in found}
    return {place: change for place, change in found.items() if change[0]}


def make_rows(known):
    ids = pd.Index([f"{s}-1/{n}" for s, n in known], dtype="string[pyarrow]", name="image_id")
    columns = {
        name: pd.array([row[name] for row in known.values()], dtype=COLUMNS.get(name, "string"))
        for name in ("size", "sha256", "width", "error")
    }
    shards = pd.array([f"{s}.tar" for s, _ in known], dtype="string[pyarrow]")
    return pd.DataFrame({"shard": shards, "offset": 512, **columns}, index=ids)


@st.composite
def draw_both(draw):
    """Draw one or several pairs of old and new rows, which have no names in common, as one."""
    both = {}, {}
    for number, pair in enumerate(draw(st.lists(st.tuples(ROWS, ROWS), min_size=1, max_size=9))):
        folder = f"{number}/" if number else ""
        for known, rows in zip(both, pair, strict=True):
            known.update({(shard, folder + name): row for (shard, name), row in rows.items()})
    return both


@settings(max_examples=25, deadline=None)
@given(draw_both())
def test_as_in_plain_python(both):
    old, new = both
    changes = diff_frames(make_rows(old), make_rows(new))
    assert set(changes["change"]) <= set(KINDS)
    told = {
        tuple(place.split("-1/")): (change, None if pd.isna(old) else tuple(old.split("-1/")))
        for place, change, old in changes[["change", "moved_from"]].itertuples()
    }
    assert told == diff_plainly(old, new)
    assert np.all(changes["shard_old"].isna() == (changes["change"] == "added"))
    assert np.all(changes["shard_new"].isna() == (changes["change"] == "gone"))


@settings(max_examples=5, deadline=None)
@given(draw_both(), st.integers(1, 3))
def test_dask_and_pandas_agree(both, partitions):
    old, new = map(make_rows, both)
    changes = diff_frames(old, new)
    lazy = [dd.from_pandas(rows, partitions, sort=False) for rows in (old, new)]
    for pair in (lazy, (old, lazy[1]), (lazy[0], new)):
        assert_same(diff_frames(*pair), changes)
