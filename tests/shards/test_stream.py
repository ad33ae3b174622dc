"""Samples made while a shard is walked are those that a walk to its end makes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_imgread.shards import samples
from dask_imgread.shards.samples import index_members, index_stream
from dask_imgread.shards.tar import Member

EXTENSIONS = ["jpg", "left.jpg", "png", "json", "txt", "cls"]


def lay_out(names, size=100):
    """Return members of these names as they would stand in a tar."""
    step = 512 + -(-size // 512) * 512
    return [Member(name, n * step, n * step + 512, size) for n, name in enumerate(names)]


def to_tuples(images):
    return [(e.member, e.key, dict(e.sidecars), e.warning, e.repeated) for e in images]


def stream(members):
    pieces = list(index_stream(iter(members), lambda offset: None))
    images = [entry for piece in pieces for entry in piece.images]
    return images, [member for piece in pieces for member in piece.broken]


KEYS = st.lists(
    st.lists(st.sampled_from(EXTENSIONS), min_size=1, max_size=4, unique=True), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(KEYS, st.integers(1, 8))
def test_samples_that_stand_together(extensions, reach):
    names = [f"{n:03d}.{e}" for n, some in enumerate(extensions) for e in some]
    members = lay_out(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "_WINDOW", reach * 1024)
        images, broken = stream(members)
    assert to_tuples(images) == to_tuples(index_members(members).images)
    assert broken == []


@pytest.mark.parametrize("seed", range(20))
def test_members_within_reach_are_joined(seed, monkeypatch):
    """Each member is moved by less than what the walk goes on before samples are yielded."""
    monkeypatch.setattr(samples, "_WINDOW", 20 * 1024)
    rng = random.Random(seed)
    for _ in range(20):
        kinds = [rng.sample(EXTENSIONS, rng.randint(1, 3)) for _ in range(rng.randint(0, 40))]
        names = [f"{n:03d}.{e}" for n, some in enumerate(kinds) for e in some]
        moved = sorted(range(len(names)), key=lambda n: n + rng.randint(0, 6))
        members = lay_out([names[n] for n in moved])
        images, broken = stream(members)
        expected = to_tuples(index_members(members).images)
        assert sorted(to_tuples(images), key=str) == sorted(expected, key=str)
        assert broken == []


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_of_any_order(seed, monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 3 * 1024)
    rng = random.Random(seed)
    for _ in range(20):
        count = rng.randint(1, 12)
        names = [f"{n}.{e}" for n in range(count) for e in ("jpg", "txt", "json")]
        members = lay_out(rng.sample(names, len(names)))
        images, broken = stream(members)
        assert sorted(e.member.name for e in images) == sorted(n for n in names if "jpg" in n)
        attached = [m.name for e in images for _, m in e.sidecars]
        assert len(set(attached)) == len(attached)
        assert all(m.name.split(".")[0] == e.key for e in images for _, m in e.sidecars)
        late = sum(int(member.problem.split()[2]) for member in broken)
        assert len(attached) + late == 2 * count
        # What stands before its image is never late.
        starts = {image.key: image.member.start for image in images}
        before = {m.name for m in members if m.start < starts[m.name.split(".")[0]]}
        assert before <= set(attached)


def test_what_comes_too_late_is_named(monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 2048)
    names = [f"{n}.jpg" for n in range(20)] + [f"{n}.txt" for n in reversed(range(20))]
    images, (record,) = stream(lay_out(names))
    joined = sum(len(e.sidecars) for e in images)
    assert 0 < joined < 5
    assert record.problem.startswith(f"late sidecars: {20 - joined} are more than")
    assert record.problem.endswith("such as 18.txt")


def test_images_of_a_key_with_dots_are_told_before_the_shard_ends():
    names = [f"img.{n:05d}.{e}" for n in range(4000) for e in ("cls", "jpg")]
    members = lay_out(names, 5000)
    pieces = [p for p in index_stream(iter(members), lambda offset: None) if p.images]
    assert len(pieces) > 5
    images = [entry for piece in pieces for entry in piece.images]
    assert to_tuples(images) == to_tuples(index_members(members).images)
    assert sum("dotted" in piece.notes for piece in pieces) == 1


def test_a_walk_that_ends_in_an_error_loses_nothing_before_it():
    def walk():
        yield from lay_out(["a.jpg", "a.txt", "b.jpg"])
        raise OSError("gone")

    pieces = index_stream(walk(), lambda offset: None)
    assert [e.member.name for e in next(pieces).images] == ["a.jpg", "b.jpg"]
    with pytest.raises(OSError, match="gone"):
        next(pieces)


def test_what_may_still_be_read_is_kept(monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 4096)
    members = lay_out([f"{n}.{e}" for n in range(100) for e in ("jpg", "txt")], size=700)
    needed = [0]
    for piece in index_stream(iter(members), needed.append):
        for entry in piece.images:
            assert entry.member.start >= needed[-1]
    assert needed[-1] > members[-20].start


def lay_out_archives(rng):
    """Return members of one archive or two, in some order, with second files and damage."""
    members, position = [], 0
    for archive in range(rng.choice((1, 1, 2))):
        names = []
        for n in range(rng.randint(0, 30)):
            key = rng.choice((f"{n:03d}", f"img.{n:03d}", f"{n // 3}.v{n}"))
            kinds = rng.sample(["txt", "json", "cls"], rng.randint(0, 2))
            names += [f"{key}.{kind}" for kind in [*["jpg"] * (rng.random() < 0.95), *kinds]]
        names += rng.sample(names, min(len(names), rng.choice((0, 0, 3))))
        spread = rng.choice((0, 4, 100))
        order = sorted(range(len(names)), key=lambda n: n + rng.randint(0, spread))
        boundary = [Member("", position, position, 0)] if archive else []
        found = [Member(names[n], 0, 0, rng.choice((100, 700, 9000))) for n in order]
        for member in boundary + found:
            start = position
            if rng.random() < 0.05:
                members.append(Member("", start, start, 0, "damaged"))
                start += 512
            members.append(member._replace(start=start, offset=start + 512))
            position = start + 512 + -(-member.size // 512) * 512
    return members


@pytest.mark.parametrize("seed", range(10))
def test_a_shard_in_reach_is_read_as_a_local_one(seed):
    rng = random.Random(seed)
    for _ in range(30):
        members = lay_out_archives(rng)
        expected = index_members(members)
        pieces = list(index_stream(iter(members), lambda offset: None))
        images = [entry for piece in pieces for entry in piece.images]
        assert to_tuples(images) == to_tuples(expected.images)
        assert [member for piece in pieces for member in piece.broken] == expected.broken
        assert {topic for piece in pieces for topic in piece.notes} >= set(expected.notes)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("window", [3 << 10, 20 << 10])
def test_a_shard_out_of_reach_has_the_same_images_and_damage(seed, window, monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", window)
    rng = random.Random(seed)
    for _ in range(30):
        members = lay_out_archives(rng)
        expected = index_members(members)
        images, broken = stream(members)
        starts = [entry.member.start for entry in images]
        assert sorted(starts) == sorted(entry.member.start for entry in expected.images)
        late = [member for member in broken if "late sidecars" in member.problem]
        assert len(late) <= 1
        assert [member for member in broken if member not in late] == expected.broken
        boundary = next((m.start for m in members if not m.name and m.problem is None), 0)
        shared = {(e.member.start, m) for e in expected.images for _, m in e.sidecars}
        for entry in images:
            for _, sidecar in entry.sidecars:
                own = sidecar.name.startswith(f"{entry.key}.")
                assert own or (entry.member.start, sidecar) in shared
                assert (sidecar.start < boundary) == (entry.member.start < boundary)


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.txt", "a.txt"],
        ["a.jpg", "a.txt", "b.jpg", "a.txt"],
        ["a.jpg", "a.txt", *(f"{n}.jpg" for n in range(20)), "a.txt"],
    ],
)
def test_a_second_sidecar_is_not_late(names, monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 2048)
    members = lay_out(names)
    expected = index_members(members)
    pieces = list(index_stream(iter(members), lambda offset: None))
    assert to_tuples([e for p in pieces for e in p.images]) == to_tuples(expected.images)
    assert not any(piece.broken for piece in pieces)
    assert {topic: text for p in pieces for topic, text in p.notes.items()} == expected.notes


def test_sidecars_far_before_an_image_that_has_its_own_are_left_out(monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 2048)
    between = [f"{n}.jpg" for n in range(20)]
    members = lay_out(["z.txt", "z.json", *between, "z.jpg", "z.txt"])
    expected = index_members(members)
    pieces = list(index_stream(iter(members), lambda offset: None))
    assert to_tuples([e for p in pieces for e in p.images]) == to_tuples(expected.images)
    assert {topic: text for p in pieces for topic, text in p.notes.items()} == expected.notes


def test_keys_of_the_last_archive_make_no_sidecar_late(monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 2048)
    members = lay_out(["a.jpg", "a.txt", "", *(f"{n}.jpg" for n in range(9)), "a.cls", "a.jpg"])
    images, broken = stream(members)
    assert broken == []
    assert [dict(e.sidecars).keys() for e in images if e.key == "a"] == [{"txt"}, {"cls"}]
    assert [e.key for e in images if e.warning] == ["a"]


def test_samples_are_joined_across_damage(monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 8192)
    first, hole, *others = lay_out(["a.jpg", "", "a.txt", *(f"{n}.jpg" for n in range(30))])
    hole = hole._replace(problem="damaged")
    images, broken = stream([first, hole, *others])
    assert dict(images[0].sidecars) == {"txt": others[0]}
    assert broken == [hole]


@pytest.mark.parametrize(
    ("series", "size"),
    [(["img"], size) for size in (50_000, 500_000, 1_000_000, 3_000_000)]
    + [(["a", "b"], size) for size in (50_000, 300_000, 500_000)],
)
def test_keys_with_dots_of_large_members(series, size):
    """Few of them are held at a time, and fewer still as the shard ends."""
    names = [f"{key}.{n:05d}.{e}" for n in range(31) for key in series for e in ("jpg", "json")]
    members = lay_out(names, size)
    images, broken = stream(members)
    images.sort(key=lambda entry: entry.member.start)
    assert to_tuples(images) == to_tuples(index_members(members).images)
    assert broken == []


def test_sidecars_of_a_key_with_dots_that_stand_before_all_images(monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 16 << 10)
    names = [f"img.{n:05d}.{e}" for e in ("json", "cls", "jpg") for n in range(100)]
    members = lay_out(["img.txt", *names])
    images, broken = stream(members)
    assert to_tuples(images) == to_tuples(index_members(members).images)
    assert broken == []


def test_sidecars_of_a_key_with_dots_that_have_no_image_are_noted(monkeypatch):
    monkeypatch.setattr(samples, "_WINDOW", 16 << 10)
    names = [f"img.{n:05d}.{e}" for n in range(100) for e in ("json", "jpg")]
    names.remove("img.00050.jpg")
    pieces = list(index_stream(iter(lay_out(names)), lambda offset: None))
    for entry in (entry for piece in pieces for entry in piece.images):
        assert [member.name for _, member in entry.sidecars] == [f"{entry.key}.json"]
    (note,) = [piece.notes["apart"] for piece in pieces if "apart" in piece.notes]
    assert note.startswith(
        "1 keys with dots have sidecars but no image near them, such as img.00050"
    )
