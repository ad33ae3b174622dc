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
    names = [f"img.{n:05d}.{e}" for n in range(20_000) for e in ("cls", "jpg")]
    members = lay_out(names)
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
