from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.prediction_ids import new_prediction_id
from pipelines.core.prediction_layout import PredictionFile, feedback_path, parse_path, predictions_path

FIRST, LAST, JOURNAL = sorted(new_prediction_id() for _ in range(3))


@given(st.text(min_size=1), st.text(min_size=1), st.dates(date(1970, 1, 1)))
def test_predictions_path__any_names__are_read_back(model: str, version: str, day: date) -> None:
    path = predictions_path(model, version, day, FIRST, LAST, JOURNAL)
    assert len(path.split("/")) == 5
    assert parse_path(path) == PredictionFile(path, day, FIRST, LAST, model, version)


def test_feedback_path__of_a_file__is_read_back() -> None:
    path = feedback_path(date(2026, 11, 20), FIRST, LAST, JOURNAL)
    assert parse_path(path) == PredictionFile(path, date(2026, 11, 20), FIRST, LAST)


@pytest.mark.parametrize(
    "path", ["", "a.parquet", f"day=2026-13-01/{FIRST}-{LAST}-x.parquet", f"day=2026-11-20/{FIRST}-{LAST}-x.tmp"]
)
def test_parse_path__no_file_of_the_tree__is_none(path: str) -> None:
    assert parse_path(path) is None
