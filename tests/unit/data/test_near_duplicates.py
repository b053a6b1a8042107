"""The near-duplicate search against comparing all with all."""

import time
from random import Random

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.near_duplicates import near_across_splits, near_pairs


@st.composite
def clustered_hashes(draw: st.DrawFn) -> npt.NDArray[np.uint64]:
    """Hashes around a few centres, since random ones are never near each other."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = draw(st.lists(st.sets(st.integers(0, 63), max_size=5), min_size=1, max_size=40))
    values = [centres[n % len(centres)] ^ sum(1 << bit for bit in bits) for n, bits in enumerate(flips)]
    return np.array(values, dtype=np.uint64)


def all_pairs(hashes: npt.NDArray[np.uint64], max_distance: int) -> set[tuple[int, int]]:
    return {
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if int(hashes[i] ^ hashes[j]).bit_count() <= max_distance
    }


@given(clustered_hashes(), st.integers(0, 16))
def test_near_pairs__any_hashes__finds_what_comparing_all_finds_and_each_once(
    hashes: npt.NDArray[np.uint64], max_distance: int
) -> None:
    hashes = np.unique(hashes)
    found = [
        (int(min(i, j)), int(max(i, j)))
        for block in near_pairs(hashes, max_distance)
        for i, j in zip(*block, strict=True)
    ]
    assert len(found) == len(set(found))
    assert set(found) == all_pairs(hashes, max_distance)


@settings(max_examples=200)
@given(clustered_hashes(), st.integers(0, 6), st.randoms(use_true_random=False))
def test_near_across_splits__any_images__agrees_with_the_definition(
    hashes: npt.NDArray[np.uint64], max_distance: int, random: Random
) -> None:
    hashes = np.concatenate([hashes, hashes[::2]])
    content: dict[tuple[int, int], int] = {}  # equal bytes have equal hashes; an equal hash may have other bytes
    sha256 = np.array([content.setdefault((int(h), random.choice((0, 1))), len(content)) for h in hashes])
    split = np.array([random.choice((0, 1, 2)) for _ in hashes])
    expected = [
        any(
            sha256[i] != sha256[j] and split[i] != split[j] and int(hashes[i] ^ hashes[j]).bit_count() <= max_distance
            for j in range(len(hashes))
        )
        for i in range(len(hashes))
    ]
    assert near_across_splits(hashes.view(np.int64), sha256, split, max_distance).tolist() == expected


def test_near_across_splits__no_images__is_empty() -> None:
    nothing = np.zeros(0, dtype=np.intp)
    assert near_across_splits(np.zeros(0, dtype=np.int64), nothing, nothing, 2).tolist() == []


def test_near_across_splits__a_hundred_thousand_images__takes_seconds() -> None:
    generator = np.random.default_rng(1)
    hashes = generator.integers(-(2**63), 2**63, 100_000)
    hashes[50_000:50_100] = hashes[:100] ^ 0b11
    hashes[60_000:70_000] = 0  # as many blank images, each with bytes of its own
    split = np.arange(100_000) % 3
    split[50_000:50_100] = (split[:100] + 1) % 3
    started = time.process_time()
    found = near_across_splits(hashes, np.arange(100_000), split, 2)
    assert time.process_time() - started < 20
    assert found[:100].all()
    assert found[50_000:50_100].all()
    assert found[60_000:70_000].all()
    assert found.sum() == 10_200
