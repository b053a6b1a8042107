"""Which split an image belongs to, from its content alone: data that is added never moves data that was there.

An image's SHA-256 (or its group's name) gives a number that is as good as drawn at random and never changes; the
number falls into the training, validation or test part of the unit interval.  Because the draw does not look at the
class, every class is split in the same proportions in expectation; because it does not look at the other images, it is
stable.  Exact proportions per class would need the ranks of all images, and one more image would then move others from
the test split into training.  What the draw can leave too small, a minimum per class and split catches:
`find_small_classes`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitShares:
    """How much of the images each split gets in expectation; the three add up to 1."""

    train: float
    val: float

    @property
    def test(self) -> float:
        """What is left."""
        return 1.0 - self.train - self.val

    def of(self, split: str) -> float:
        """The share of a split by its name."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def draw(identity: str) -> float:
    """A number in [0, 1) that depends on the identity alone and is uniform over identities."""
    digest = hashlib.sha256(b"perch split\0" + identity.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def pick_split(identity: str, shares: SplitShares, among: Sequence[str] = SPLITS) -> str:
    """The split of one image or group.

    Args:
        identity: the SHA-256 of the encoded bytes, or the name of a group whose images must share a split.
        shares: of the three splits.
        among: the splits to choose from, in proportion to their shares.
    """
    position = draw(identity) * sum(shares.of(split) for split in among)
    for split in among[:-1]:
        position -= shares.of(split)
        if position < 0:
            return split
    return among[-1]


def assign_splits(sha256: Sequence[str], groups: Sequence[str], given: Sequence[str], shares: SplitShares) -> list[str]:
    """The split of every image.

    A split that the source gives wins.  Where the source gives a training split but lacks validation or test, the
    missing ones are taken out of its training images, in the proportions of `shares`.  Images without a given split
    are drawn among all three.

    Args:
        sha256: of each image's encoded bytes.
        groups: each image's group; empty where it stands alone.
        given: each image's given split, or empty.
        shares: of the three splits.

    Returns:
        `train`, `val` or `test` for each image.
    """
    present = set(given) - {""}
    missing = [split for split in SPLITS[1:] if split not in present]
    among = {"": SPLITS, "train": ("train", *missing), "val": ("val",), "test": ("test",)}
    return [
        pick_split(f"group {group}" if group else digest, shares, among[split])
        for digest, group, split in zip(sha256, groups, given, strict=True)
    ]


def find_small_classes(
    labels: Iterable[str], splits: Iterable[str], minimum: int, classes: Collection[str]
) -> dict[str, dict[str, int]]:
    """The classes that have fewer than `minimum` images in some split, each with its count per split."""
    counts = Counter(zip(labels, splits, strict=True))
    per_class = {label: {split: counts[label, split] for split in SPLITS} for label in sorted(classes)}
    return {label: of for label, of in per_class.items() if min(of.values()) < minimum}
