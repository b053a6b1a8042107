import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.core.calibration import CalibrationBin
from pipelines.core.gates import GateCheck
from pipelines.core.statistics import Interval
from pipelines.modeling.figures import draw_confusion, draw_reliability, enlarge
from pipelines.modeling.model_card import (
    describe_outcome,
    escape_markdown,
    format_check,
    format_difference,
    format_estimate,
    format_interval,
    format_points,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, "1.000"), (0.9996, "0.9996"), (0.9999999, "0.99999"), (0.98, "0.980"), (None, "\u2013")],
)
def test_format_estimate__near_one__does_not_look_perfect(value: float | None, expected: str) -> None:
    assert format_estimate(value) == expected


def test_format_interval__known_and_unknown__reads_as_in_a_paper() -> None:
    assert format_interval(Interval(0.963, 0.926, 0.985)) == "0.963 [0.926, 0.985]"
    assert format_interval(None) == "\u2013"


@pytest.mark.parametrize(
    ("value", "expected"), [(0.007, "+0.7"), (-0.0496, "\u22125.0"), (-0.0001, "0.0"), (0.0, "0.0")]
)
def test_format_points__any_difference__has_a_sign_unless_zero(value: float, expected: str) -> None:
    assert format_points(value) == expected


def test_format_difference__interval__is_in_points() -> None:
    assert format_difference(Interval(0.007, -0.011, 0.026)) == "+0.7 points [\u22121.1, +2.6]"


def test_format_check__drop_share_and_nothing__are_told_apart() -> None:
    numbers = {"value": -0.05, "low": -0.1, "high": 0.0}
    assert format_check(GateCheck(name="drop", passed=True, limit=-0.1, **numbers)).startswith("\u22125.0 points")
    assert format_check(GateCheck(name="share", passed=True, limit=0.9, value=0.95)) == "0.95"
    assert format_check(GateCheck(name="none", passed=True)) == "\u2013"


@pytest.mark.parametrize(
    ("check", "outcome"),
    [
        ({"passed": True, "value": 0.0, "low": -0.11, "high": 0.11, "limit": -0.1}, "passed, within chance"),
        ({"passed": True, "value": 0.0, "low": -0.05, "high": 0.05, "limit": -0.1}, "passed"),
        ({"passed": False, "value": -0.2, "low": -0.3, "high": -0.11, "limit": -0.1}, "failed"),
        ({"passed": True, "judged": False, "low": -0.5, "high": 0.5, "limit": -0.1}, "not judged"),
        ({"passed": True, "value": 1e-8, "limit": 0.001}, "passed"),
    ],
)
def test_describe_outcome__any_check__says_when_an_interval_may_reach_over_its_limit(
    check: dict[str, Any], outcome: str
) -> None:
    assert describe_outcome(GateCheck(name="class 0 recall drop", **check)) == outcome


@given(st.text(max_size=40))
def test_escape_markdown__any_text__stays_on_its_line_and_opens_nothing(text: str) -> None:
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    bare = escaped.replace("\\\\", "")
    for index, character in enumerate(bare):
        if character in "`*_[]<>|~$&!{}":
            assert bare[index - 1] == "\\"


def test_enlarge__small_image__repeats_pixels_and_a_large_one_shrinks() -> None:
    small = np.array([[0, 255], [255, 0]], np.uint8)[..., None]
    picture = Image.open(io.BytesIO(enlarge(small, 9)))
    assert picture.size == (8, 8)
    np.testing.assert_array_equal(np.asarray(picture)[:4, :4], 0)
    large = Image.open(io.BytesIO(enlarge(np.zeros((300, 300, 3), np.uint8), 168)))
    assert large.size == (168, 168)


def test_figures__drawn_twice__are_the_same_bytes() -> None:
    labels = [f"class $x_{index}$ with a long name" for index in range(25)]
    confusion = np.random.default_rng(0).integers(0, 9, (25, 25))
    assert draw_confusion(confusion, labels) == draw_confusion(confusion, labels)
    bins = [CalibrationBin(20, 0.7, 0.65), CalibrationBin(20, 0.99, 1.0)]
    assert draw_reliability(bins) == draw_reliability(bins)
