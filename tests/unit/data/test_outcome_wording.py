"""How limits and values read."""

from typing import Any

import numpy as np
import pytest

from pipelines.data.outcome_wording import describe_limit, describe_value

BETWEEN = "expect_column_values_to_be_between"
IN_SET = "expect_column_values_to_be_in_set"


@pytest.mark.parametrize(
    ("type_", "kwargs", "text"),
    [
        (BETWEEN, {"min_value": 8, "max_value": 8.0}, "exactly 8"),
        (BETWEEN, {"min_value": 0.125}, "at least 0.125"),
        (BETWEEN, {"max_value": 3, "strict_max": True}, "less than 3"),
        (IN_SET, {"value_set": ["L", "RGB"], "mostly": 0.995}, "only L, RGB, for at least 99.5 % of the rows"),
        ("expect_column_values_to_match_regex", {"regex": "^a"}, "match regex ^a"),
        ("expect_table_columns_to_match_set", {"column_set": ["a"], "exact_match": False}, "all of a"),
    ],
)
def test_describe_limit__arguments__read_as_words(type_: str, kwargs: dict[str, Any], text: str) -> None:
    assert describe_limit(type_, {"column": "c", **kwargs}) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (100_000, "100000"),
        (np.float32(1797), "1797"),
        (0.0217391, "0.02174"),
        (np.True_, "true"),
        (["a", 2.5], "a, 2.5"),
        ({"quantiles": [0.1]}, "quantiles 0.1"),
    ],
)
def test_describe_value__any_value__reads_without_noise(value: object, text: str) -> None:
    assert describe_value(value) == text
