"""Finds images that look alike: pairs of perceptual hashes that differ in few bits, without comparing all with all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.intp]

HASH_BITS = 64


def near_pairs(hashes: Hashes, max_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield every pair of distinct hashes at most `max_distance` bits apart, once, in blocks of bounded size.

    Multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012): cut the 64 bits into `max_distance + 1` bands, and by
    the pigeonhole principle two near hashes agree in one band at least; only hashes that share a band are compared.
    Among 100,000 hashes that is quick up to about 8 bits; beyond, the bands are so narrow that most pairs share one.

    Args:
        hashes: `(n,)` uint64, all different.
        max_distance: bits, 0 to 63.

    Yields:
        Two index arrays `(i, j)` of equal length; each pair comes once, in one order only.
    """
    if max_distance == 0:
        return
    bands = _bands(max_distance + 1)
    for number, band in enumerate(bands):
        for i, j in _pairs_within(hashes & band):
            difference = hashes[i] ^ hashes[j]
            keep = np.bitwise_count(difference) <= max_distance
            for earlier in bands[:number]:
                keep &= (difference & earlier) != 0  # else that band has yielded the pair
            if keep.any():
                yield i[keep], j[keep]


def near_across_splits(
    hashes: NDArray[np.int64], sha256: Indices, split: Indices, max_distance: int
) -> NDArray[np.bool]:
    """Tell for each image whether another split holds a near-duplicate of it with different bytes.

    Args:
        hashes: `(n,)` int64, perceptual hashes with their bits reinterpreted as signed.
        sha256: `(n,)` codes of the digests, 0 to fewer than n; equal code, equal bytes.
        split: `(n,)` codes of the splits, 0 to 62.
        max_distance: bits that the hashes of near-duplicates may differ in.

    Returns:
        `(n,)` bool.
    """
    if len(hashes) == 0:
        return np.zeros(0, dtype=np.bool)
    unique, group = np.unique(hashes.view(np.uint64), return_inverse=True)
    own = np.uint64(1) << split.astype(np.uint64)
    nearby = np.zeros(len(unique), dtype=np.uint64)  # splits of the other hashes within reach, one bit each
    present = np.zeros(len(unique), dtype=np.uint64)
    np.bitwise_or.at(present, group, own)
    for i, j in near_pairs(unique, max_distance):
        np.bitwise_or.at(nearby, i, present[j])
        np.bitwise_or.at(nearby, j, present[i])
    alike = _same_hash_other_bytes_and_split(group, sha256, split)
    return np.asarray(alike | ((nearby[group] & ~own) != 0))


def _bands(count: int) -> list[np.uint64]:
    """Masks that share out the bits in turn, since neighbouring bits of a perceptual hash go together."""
    return [np.uint64(sum(1 << bit for bit in range(first, HASH_BITS, count))) for first in range(count)]


def _pairs_within(keys: Hashes) -> Iterator[tuple[Indices, Indices]]:
    """Yield all pairs of positions with equal keys: neighbours in sorted order, then those two apart, and so on."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    left = np.arange(len(keys) - 1)
    step = 1
    while len(left := left[left + step < len(keys)]):
        left = left[ordered[left] == ordered[left + step]]
        if len(left):
            yield order[left], order[left + step]
        step += 1


def _same_hash_other_bytes_and_split(group: Indices, sha256: Indices, split: Indices) -> NDArray[np.bool]:
    """By inclusion and exclusion: of a hash's distinct (bytes, split), is one unlike the image's own in both?"""
    files, file = np.unique(np.stack([group, sha256, split]), axis=1, return_inverse=True)
    in_group = np.bincount(files[0])
    same_bytes = _count_equal(files[0], files[1])
    same_split = _count_equal(files[0], files[2])
    other = in_group[files[0]] - same_bytes - same_split + 1
    return np.asarray((other > 0)[file.ravel()])


def _count_equal(a: Indices, b: Indices) -> Indices:
    """For each position, at how many positions the pair (a, b) occurs."""
    _, inverse, counts = np.unique(np.stack([a, b]), axis=1, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse.ravel()])
