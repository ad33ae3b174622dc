"""Hashes that differ in few bits, compared with all pairs."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_imgread import hamming
from dask_imgread.hamming import divide_bits, find_pairs, group_near, join_links

# Few values for each byte, so that many hashes are near to each other.
HASHES = st.lists(
    st.lists(st.sampled_from([0, 1, 3, 128, 255]), min_size=8, max_size=8), max_size=30
).map(lambda rows: np.unique(np.array(rows, np.uint8).reshape(-1, 8).view(np.uint64)))


def compare_all(hashes, distance):
    return {pair for pair in combinations(hashes.tolist(), 2) if count_bits(*pair) <= distance}


def count_bits(one, other):
    return (one ^ other).bit_count()


def list_pairs(hashes, *args, **options):
    return {
        (min(pair), max(pair))
        for ends in find_pairs(hashes, *args, **options)
        for pair in zip(*hashes[ends].tolist(), strict=True)
    }


def group_plainly(pairs):
    """Return the smallest member of each one's group, by following pairs until nothing changes."""
    roots = {end: end for pair in pairs for end in pair}
    changed = True
    while changed:
        changed = False
        for one, other in pairs:
            low = min(roots[one], roots[other])
            changed |= (roots[one], roots[other]) != (low, low)
            roots[one] = roots[other] = low
    return roots


@pytest.mark.parametrize("parts", [1, 2, 5, 17])
@pytest.mark.parametrize("taken", [0, 0x00FF_0000_0000_0001])
def test_all_bits_are_in_one_part(parts, taken):
    masks = divide_bits(parts, taken)
    assert len(masks) == parts
    assert sum(masks) == (1 << 64) - 1 - taken
    assert all(one & other == 0 for one, other in combinations(masks, 2))


@settings(max_examples=200, deadline=None)
@given(HASHES, st.integers(0, 16), st.sampled_from([0.1, 1, 32]))
def test_all_pairs_are_found(hashes, distance, few):
    with pytest.MonkeyPatch.context() as patch:  # buckets in buckets in buckets, or none
        patch.setattr(hamming, "_FEW", few)
        patch.setattr(hamming, "_CACHED", 4)
        assert list_pairs(hashes, distance) == compare_all(hashes, distance)


@settings(max_examples=100, deadline=None)
@given(HASHES, st.integers(0, 16))
def test_groups(hashes, distance):
    near, roots = group_near(hashes, distance)
    assert dict(zip(near.tolist(), roots.tolist(), strict=True)) == group_plainly(
        compare_all(hashes, distance)
    )


@settings(max_examples=50, deadline=None)
@given(HASHES, st.integers(0, 16), st.sampled_from([1, 0xFF00, 1 << 63]))
def test_some_bits_must_be_equal(hashes, distance, equal):
    wanted = {pair for pair in compare_all(hashes, distance) if not (pair[0] ^ pair[1]) & equal}
    assert list_pairs(hashes, distance, equal=equal) == wanted


def test_long_chains():
    order = np.random.default_rng(1).permutation(10_000).astype(np.uint64)
    hashes, roots = join_links(np.stack([order[1:], order[:-1]]))
    assert len(hashes) == 10_000
    assert not roots.any()


def test_planted_copies():
    rng = np.random.default_rng(7)
    hashes = rng.integers(0, 1 << 64, 50_000, np.uint64)
    copies = hashes[:1_000].copy()
    for _ in range(4):
        copies ^= np.uint64(1) << rng.integers(0, 64, 1_000, np.uint64)
    found = list_pairs(np.union1d(hashes, copies), 4)
    planted = {
        (min(pair), max(pair))
        for pair in zip(hashes[:1_000].tolist(), copies.tolist(), strict=True)
        if pair[0] != pair[1]
    }
    assert planted <= found
    assert all(count_bits(*pair) <= 4 for pair in found)


def test_many_that_are_all_near(monkeypatch):
    monkeypatch.setattr(hamming, "_FEW", 1)
    hashes = np.arange(1 << 12, dtype=np.uint64)
    near, roots = group_near(hashes, 2)
    assert (len(near), roots.any()) == (1 << 12, False)


def test_more_alike_than_are_compared(monkeypatch):
    monkeypatch.setattr(hamming, "_LEVELS", 0)
    hashes = np.arange(1 << 8, dtype=np.uint64)
    with pytest.warns(UserWarning, match=r"256 different hashes .* 256 near 0{16}: .* 100 "):
        some = list_pairs(hashes, 2, window=100)
    assert some == {pair for pair in compare_all(hashes, 2) if pair[1] - pair[0] <= 100}
    assert list_pairs(hashes, 2) == compare_all(hashes, 2)
