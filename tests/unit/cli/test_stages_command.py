"""What `--set` takes, and how it says no."""

from __future__ import annotations

from datetime import date

import pytest

from pipelines.cli.stages import parse_overrides
from pipelines.errors import Refusal


def test_parse_overrides__pairs_and_json__are_merged_as_yaml_values() -> None:
    pairs = ["model_training.epochs=3", "data_ingestion.as_of=2026-11-08", "data_ingestion.source=a=b"]
    assert parse_overrides(pairs, '{"seed": 1, "model_training.epochs": 9}') == {
        "seed": 1,
        "model_training.epochs": 3,
        "data_ingestion.as_of": date(2026, 11, 8),
        "data_ingestion.source": "a=b",
    }


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("seed", "KEY=VALUE"),
        ("seed=[1", r"--set seed: the value '\[1' cannot be read"),
        (
            "data_ingestion.as_of=2026-13-01",
            r"--set data_ingestion\.as_of: the value '2026-13-01' cannot be read: month",
        ),
    ],
)
def test_parse_overrides__pair_that_cannot_be_read__is_refused(pair: str, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        parse_overrides([pair], "{}")
