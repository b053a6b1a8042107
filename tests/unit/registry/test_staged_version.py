"""Which version is released where none is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import Refusal
from pipelines.registry.ledger import Ledger
from pipelines.registry.staged_version import last_staged_version
from pipelines.settings import Settings

MODEL = "shapes-classification"


def record(settings: Settings, *outcomes: tuple[str, str, int]) -> None:
    ledger = Ledger(settings.ledger_url)
    for number, (event, model, version) in enumerate(outcomes):
        key = f"{event}:{model}:{version}:{number}"
        ledger.append(event, model=model, version=str(version), evidence={}, key=key)  # type: ignore[arg-type]
    ledger.close()


def test_last_staged_version__some_turned_away__is_the_highest_whose_last_outcome_was_a_pass(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    record(
        settings,
        ("staged", MODEL, 2),
        ("staged", MODEL, 10),
        ("staged", MODEL, 11),
        ("staging_failed", MODEL, 11),
        ("staging_failed", MODEL, 12),
        ("promoted", MODEL, 13),
        ("staged", "xray-classification", 14),
    )
    assert last_staged_version(settings, MODEL) == 10


def test_last_staged_version__none_passed__is_refused_with_the_way_out(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    record(settings, ("staging_failed", MODEL, 1))
    with pytest.raises(Refusal, match=r"has no version that passed in staging(.|\n)*perch run"):
        last_staged_version(settings, MODEL)
