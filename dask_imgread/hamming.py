"""64-bit hashes that differ in few bits, and the groups that they form."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from distributed import warn

_BITS = 64
# A bucket is divided further if it has more hashes, for each part, than can be compared faster.
_FEW = 32
_CACHED = 1 << 15  # hashes that are compared while they are in the processor's cache
_LEVELS = 3  # of buckets in buckets
_WINDOW = 1_000  # of how many others each hash in a bucket that can't be divided is compared with


def divide_bits(parts: int, taken: int = 0) -> list[int]:
    """Return masks of all bits but those taken, dealt out in turn.

    So bits that lie together, and tend to be equal, do not become one mask.

    >>> [f"{mask:064b}"[-6:] for mask in divide_bits(3)]
    ['001001', '010010', '100100']
    """
    free = [bit for bit in range(_BITS) if not taken >> bit & 1]
    return [sum(1 << bit for bit in free[number::parts]) for number in range(parts)]


def find_pairs(
    hashes: np.ndarray,
    distance: int,
    *,
    equal: int = 0,
    levels: int = _LEVELS,
    window: int | None = _WINDOW,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs of hashes that differ in so many bits at most, some at a time.

    Of ``distance + 1`` parts of the bits, one must be equal. So only hashes that are equal in one
    of them are compared; if these are many, the same is done with the rest of their bits. A pair
    may be found several times.

    Parameters
    ----------
    hashes
        Of type uint64, all different.
    distance
        The most bits.
    equal
        Bits that must be equal.
    levels
        How often buckets are divided further.
    window
        How many hashes each is compared with in a bucket that is not divided any more: those that
        are next to it in numerical order. None for all.

    Warns
    -----
    UserWarning
        If not all were compared.
    """
    keys = hashes & np.uint64(equal)
    order = np.argsort(keys) if levels else np.lexsort((hashes, keys))
    hashes, keys = hashes[order], keys[order]
    sizes = np.diff(np.flatnonzero(np.diff(keys, prepend=~keys[:1])), append=len(keys))
    if levels:
        divided = sizes > _FEW * (distance + 1)
        rest = np.repeat(~divided, sizes)
        for some in _cut(hashes[~rest], sizes[divided]):
            for part in divide_bits(distance + 1, equal):
                yield from find_pairs(
                    some, distance, equal=equal | part, levels=levels - 1, window=window
                )
        hashes, sizes = hashes[rest], sizes[~divided]
    elif window is not None and (sizes > window + 1).any():
        _warn_of_crowds(hashes, sizes, window)
    yield from _compare(hashes, sizes, distance, window or len(hashes))


def _cut(hashes: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the hashes of several whole buckets, as many as are sorted fast."""
    ends = np.cumsum(sizes)
    last = np.flatnonzero(np.diff(ends // _CACHED, append=-1))
    for start, stop in pairwise([0, *ends[last]]):
        yield hashes[start:stop]


def _compare(
    hashes: np.ndarray, sizes: np.ndarray, distance: int, window: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the near ones among hashes that lie together in buckets of these sizes."""
    sizes = np.repeat(sizes, sizes)
    order = np.argsort(sizes, kind="stable")
    # With the largest buckets last, at each step the rest of the array is compared with itself,
    # shifted. Beyond the end of a bucket that is in vain, but faster than to pick hashes.
    hashes, sizes = hashes[order], sizes[order]
    for start in range(0, len(hashes), _CACHED):
        stop = start + _CACHED
        most = int(sizes[start:stop][-1])
        for step in range(1, min(most - 1, window) + 1):
            first = max(start, int(np.searchsorted(sizes, step, "right")))
            right = hashes[first + step : stop + step]
            left = hashes[first : first + len(right)]
            near = np.bitwise_count(left ^ right) <= distance
            if near.any():
                yield left[near], right[near]


def _warn_of_crowds(hashes: np.ndarray, sizes: np.ndarray, window: int) -> None:
    crowded = sizes > window + 1
    example = hashes[(np.cumsum(sizes) - sizes)[sizes.argmax()]]
    warn(
        f"{sizes[crowded].sum():,} different hashes are much alike, such as {sizes.max():,} near "
        f"{example:016x}: each of them is compared with {window:,} others only"
    )


def group_near(hashes: np.ndarray, distance: int, *, equal: int = 0) -> np.ndarray:
    """Return the hashes that are near to another one, and the smallest that each is linked to.

    Parameters
    ----------
    hashes, distance, equal
        As for ``find_pairs``.

    Returns
    -------
    numpy.ndarray
        Two rows, as ``join_links`` returns them.
    """
    links, count = [np.empty((2, 0), np.uint64)], 0
    for pair in find_pairs(hashes, distance, equal=equal):
        links.append(np.stack(pair))
        count += len(pair[0])
        if count > 2 * len(hashes):  # where all are near to each other, pairs would fill the memory
            links = [join_links(np.hstack(links))]
            count = links[0].shape[1]
    return join_links(np.hstack(links))


def join_links(links: np.ndarray) -> np.ndarray:
    """Return each hash that is linked to others, and the smallest that links lead to from it.

    >>> join_links(np.array([[5, 2, 8], [3, 3, 9]], np.uint64)).tolist()
    [[2, 3, 5, 8, 9], [2, 2, 2, 8, 8]]
    """
    hashes, numbers = np.unique(links, return_inverse=True)
    roots, ends = np.arange(len(hashes)), numbers.reshape(2, -1)
    while True:
        ends = roots[ends]
        ends = np.sort(ends[:, ends[0] != ends[1]], axis=0)
        if not ends.size:
            return np.stack([hashes, hashes[roots]])
        np.minimum.at(roots, ends[1], ends[0])
        while not np.array_equal(nearer := roots[roots], roots):
            roots = nearer


def look_up(hashes: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where hashes would lie among others, which are in order and not none; which do."""
    places = np.searchsorted(hashes, wanted).clip(max=len(hashes) - 1)
    return places, hashes[places] == wanted
