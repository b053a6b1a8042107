from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.modeling.slices import MAX_SOURCES, find_slices


def make_table(count: int = 90, **columns: Any) -> pd.DataFrame:
    defaults = {
        "key": [f"image-{index}.png" for index in range(count)],
        "group": "",
        "width_px": 28,
        "height_px": 28,
        "mean": 100.0,
    }
    return pd.DataFrame(defaults | columns)


def names(table: pd.DataFrame, kind: str, labels: tuple[str, ...] = ("cat", "dog")) -> list[str]:
    return [part.name for part in find_slices(table, labels) if part.kind == kind]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.floats(0, 255)), min_size=1, max_size=60))
def test_find_slices__any_sizes_and_intensities__hold_each_image_once_per_kind(
    images: list[tuple[int, int, float]],
) -> None:
    widths, heights, means = zip(*images, strict=True)
    table = make_table(len(images), width_px=widths, height_px=heights, mean=means)
    for kind in ("size", "intensity"):
        parts = [part.inside for part in find_slices(table, ("cat", "dog")) if part.kind == kind]
        assert np.array_equal(np.sum(parts, axis=0), np.ones(len(images)))
        assert all(part.any() for part in parts)


def test_find_slices__one_size__is_one_slice() -> None:
    assert names(make_table(), "size") == ["28 x 28 px"]


def test_find_slices__a_few_sizes__are_named() -> None:
    assert names(make_table(width_px=[28, 56, 56] * 30), "size") == ["28 x 28 px", "56 x 28 px"]


def test_find_slices__many_sizes__are_thirds() -> None:
    table = make_table(width_px=np.arange(90) + 10, height_px=10)
    assert names(table, "size") == [
        "small, 100 to 390 pixels",
        "medium, 400 to 690 pixels",
        "large, 700 to 990 pixels",
    ]


def test_find_slices__constant_intensity__is_one_slice() -> None:
    assert names(make_table(), "intensity") == ["all, mean 100 to 100"]


@pytest.mark.parametrize(
    ("keys", "groups", "expected"),
    [
        (["monday/1.png", "tuesday/2.png", "tuesday/cat/3.png"], [""], ["monday", "tuesday"]),
        (["cat/1.png", "dog/2.png", "dog/3.png"], [""], []),
        (["train/cat/1.png", "test/cat/2.png", "test/dog/3.png"], [""], []),
        (["1.png", "2.png", "3.png"], [""], []),
        (["all/1.png", "all/2.png", "all/3.png"], [""], []),
        (["cat/1.png", "dog/2.png", "dog/3.png"], ["ann", "bob", "bob"], ["ann", "bob"]),
        (["cat/1.png", "dog/2.png", "dog/3.png"], ["ann", "bob", "eve"], ["ann", "bob", "eve"]),
    ],
)
def test_find_slices__source__is_the_top_folder_unless_it_means_something_else(
    keys: list[str], groups: list[str], expected: list[str]
) -> None:
    table = make_table(
        6, key=[key.replace(".", f"{turn}.") for turn in range(2) for key in keys], group=groups * (6 // len(groups))
    )
    assert names(table, "source") == expected


def test_find_slices__groups_of_one_image__are_no_source() -> None:
    assert names(make_table(3, group=["a", "b", "c"]), "source") == []


def test_find_slices__many_sources__leaves_the_smallest_together() -> None:
    keys = [f"week-{min(index // 5, 17):02d}/{index}.png" for index in range(90)]
    found = names(make_table(key=keys), "source")
    assert len(found) == MAX_SOURCES + 1
    assert found[-1] == "6 others"
