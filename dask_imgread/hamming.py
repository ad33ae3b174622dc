"""64-bit hashes that differ in few bits, and the groups that they form."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from distributed import warn

_BITS = 64
# A bucket is divided further if it has more hashes, for each part, than can be compared faster.
_FEW = 64
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
    hashes: np.ndarray, distance: int, *, equal: int = 0, window: int | None = None
) -> Iterator[np.ndarray]:
    """Yield all pairs of hashes that differ in so many bits at most, some at a time.

    Of ``distance + 1`` parts of the bits, one must be equal. So only hashes that are equal in one
    of them are compared; if these are many, the same is done with the rest of their bits. A pair
    may be found several times.

    Parameters
    ----------
    hashes
        Of type uint64, all different, in order.
    distance
        The most bits.
    equal
        Bits that must be equal.
    window
        How many hashes each is compared with where too many are alike: those that are next to it
        in numerical order; all if not given.

    Yields
    ------
    numpy.ndarray
        Two rows: the numbers of the hashes.

    Warns
    -----
    UserWarning
        If not all were compared.
    """
    numbers = np.arange(len(hashes))
    levels = _LEVELS - bool(equal)  # which takes the place of the first division
    return _find_pairs(hashes, numbers, distance, equal, levels, window or len(hashes))


def _find_pairs(
    hashes: np.ndarray, numbers: np.ndarray, distance: int, equal: int, levels: int, window: int
) -> Iterator[np.ndarray]:
    keys = hashes & np.uint64(equal)
    order = np.argsort(keys) if levels else np.lexsort((hashes, keys))
    hashes, numbers, keys = hashes[order], numbers[order], keys[order]
    sizes = np.diff(np.flatnonzero(np.diff(keys, prepend=~keys[:1])), append=len(keys))
    if levels:
        divided = sizes > _FEW * (distance + 1)
        rest = np.repeat(~divided, sizes)
        for some in _cut(np.flatnonzero(~rest), sizes[divided]):
            for part in divide_bits(distance + 1, equal):
                yield from _find_pairs(
                    hashes[some], numbers[some], distance, equal | part, levels - 1, window
                )
        hashes, numbers, sizes = hashes[rest], numbers[rest], sizes[~divided]
    elif (sizes > window + 1).any():
        _warn_of_crowds(hashes, sizes, window)
    for ends, others in _compare(hashes, numbers, sizes, distance, window):
        yield ends[:, others & np.uint64(equal) == 0]


def _cut(places: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the places of several whole buckets, as many as are sorted fast."""
    ends = np.cumsum(sizes)
    last = np.flatnonzero(np.diff(ends // _CACHED, append=-1))
    for start, stop in pairwise([0, *ends[last]]):
        yield places[start:stop]


def _compare(
    hashes: np.ndarray, numbers: np.ndarray, sizes: np.ndarray, distance: int, window: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the near ones among hashes that lie together in buckets of these sizes.

    Some of them are of two buckets. With their numbers come the bits that differ.
    """
    sizes = np.repeat(sizes, sizes)
    order = np.argsort(sizes, kind="stable")
    # With the largest buckets last, at each step the rest of the array is compared with itself,
    # shifted. Beyond the end of a bucket that is in vain, but faster than to pick hashes.
    hashes, numbers, sizes = hashes[order], numbers[order], sizes[order]
    for start in range(0, len(hashes), _CACHED):
        stop = start + _CACHED
        most = int(sizes[start:stop][-1])
        for step in range(1, min(most - 1, window) + 1):
            first = max(start, int(np.searchsorted(sizes, step, "right")))
            right = hashes[first + step : stop + step]
            bits = hashes[first : first + len(right)] ^ right
            near = np.flatnonzero(np.bitwise_count(bits) <= distance)
            if len(near):
                yield numbers[[near + first, near + first + step]], bits[near]


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
    roots, links, count = np.arange(len(hashes)), list[np.ndarray](), 0
    for ends in find_pairs(hashes, distance, equal=equal, window=_WINDOW):
        # Where all are near to each other, nearly all pairs link what is linked already.
        links.append(ends[:, np.not_equal(*roots[ends])])
        count += links[-1].shape[1]
        if count > len(hashes):
            _join(roots, np.hstack(links))
            links, count = [], 0
    if links:
        _join(roots, np.hstack(links))
    linked = np.bincount(roots)[roots] > 1
    return np.stack([hashes[linked], hashes[roots[linked]]])


def join_links(links: np.ndarray) -> np.ndarray:
    """Return each hash that is linked to others, and the smallest that links lead to from it.

    >>> join_links(np.array([[5, 2, 8], [3, 3, 9]], np.uint64)).tolist()
    [[2, 3, 5, 8, 9], [2, 2, 2, 8, 8]]
    """
    hashes, ends = np.unique(links, return_inverse=True)
    roots = np.arange(len(hashes))
    _join(roots, ends.reshape(2, -1))
    return np.stack([hashes, hashes[roots]])


def _join(roots: np.ndarray, ends: np.ndarray) -> None:
    """Give all that links join the same root, which is the smallest number among them."""
    while True:
        ends = np.sort(roots[ends], axis=0)
        ends = ends[:, ends[0] != ends[1]]
        if not ends.size:
            return
        np.minimum.at(roots, ends[1], ends[0])
        while not np.array_equal(nearer := roots[roots], roots):
            roots[:] = nearer
