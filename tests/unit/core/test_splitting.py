from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.splitting import SPLITS, SplitShares, assign_splits, draw, find_small_classes, pick_split

SHARES = SplitShares(0.70, 0.15)
identities = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@settings(deadline=None)
@given(old=st.lists(identities, min_size=1, max_size=40, unique=True), new=st.lists(identities, max_size=40))
def test_assign_splits__data_is_added__no_image_changes_its_split(old, new):
    added = [identity for identity in new if identity not in set(old)]
    before = assign_splits(old, [""] * len(old), [""] * len(old), SHARES)
    everything = added + old
    after = assign_splits(everything, [""] * len(everything), [""] * len(everything), SHARES)
    assert after[len(added) :] == before


@settings(deadline=None)
@given(rows=st.lists(st.tuples(identities, st.sampled_from(["", "anna", "ben", "carla"])), min_size=1, max_size=60))
def test_assign_splits__images_have_groups__each_group_stays_in_one_split(rows):
    splits = assign_splits([sha for sha, _ in rows], [group for _, group in rows], [""] * len(rows), SHARES)
    seen: dict[str, set[str]] = {}
    for (_, group), split in zip(rows, splits, strict=True):
        if group:
            seen.setdefault(group, set()).add(split)
    assert all(len(of) == 1 for of in seen.values())


@settings(deadline=None)
@given(identity=identities)
def test_draw__any_identity__lies_in_the_unit_interval_and_repeats(identity):
    assert 0.0 <= draw(identity) < 1.0
    assert draw(identity) == draw(identity)


@settings(deadline=None)
@given(
    identity=identities,
    train=st.floats(0.05, 0.8),
    val=st.floats(0.05, 0.15),
    missing=st.sampled_from([(), ("val",), ("test",), ("val", "test")]),
)
def test_assign_splits__given_splits__win_and_only_training_is_divided(identity, train, val, missing):
    present = [split for split in SPLITS if split not in missing]
    splits = assign_splits([identity] * len(present), [""] * len(present), present, SplitShares(train, val))
    by_given = dict(zip(present, splits, strict=True))
    assert all(by_given[split] == split for split in present if split != "train")
    assert by_given["train"] in {"train", *missing}


@pytest.mark.parametrize("label", ["normal", "pneumonia"])
def test_assign_splits__many_images__shares_are_close_in_every_class(label):
    count = 20_000
    splits = Counter(assign_splits([f"{label}{n}" for n in range(count)], [""] * count, [""] * count, SHARES))
    for split in SPLITS:
        expected = SHARES.of(split)
        tolerance = 4 * (expected * (1 - expected) / count) ** 0.5
        assert splits[split] / count == pytest.approx(expected, abs=tolerance)


def test_assign_splits__training_given_without_val__val_takes_its_proportion_of_training():
    count = 20_000
    splits = Counter(
        assign_splits(
            [str(n) for n in range(count + 10)], [""] * (count + 10), ["train"] * count + ["test"] * 10, SHARES
        )
    )
    assert splits["test"] == 10
    assert splits["val"] / count == pytest.approx(0.15 / 0.85, abs=0.012)


def test_assign_splits__some_images_without_given_split__they_are_drawn_among_all_three():
    count = 2_000
    splits = assign_splits(
        [str(n) for n in range(count)], [""] * count, ["train", "val", "test"] + [""] * (count - 3), SHARES
    )
    assert set(splits[3:]) == set(SPLITS)


def test_pick_split__known_identity__stays_where_it_has_always_been():
    # These may never change: an image that moved from test to training would spoil every comparison with older models.
    splits = [pick_split(identity, SHARES) for identity in "abcdef"]
    assert splits == ["val", "val", "train", "train", "test", "train"]


def test_find_small_classes__class_without_test_images__is_named_with_its_counts():
    labels = ["cat"] * 6 + ["dog"] * 3
    splits = ["train", "train", "val", "val", "test", "test", "train", "val", ""]
    assert find_small_classes(labels, splits, 1, {"cat", "dog"}) == {"dog": {"train": 1, "val": 1, "test": 0}}


def test_find_small_classes__enough_everywhere__finds_none():
    assert find_small_classes(["cat"] * 3, SPLITS, 1, {"cat"}) == {}
