"""Trials in a database that does not always answer; tests/integration has several processes on a real PostgreSQL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from pipelines.core import patience
from pipelines.errors import TryLater
from pipelines.modeling import shared_tuning
from pipelines.params import ModelTrainingParams, SmallCNNParams

PARAMS = ModelTrainingParams(small_cnn=SmallCNNParams(widths=[8]), batch_size=32, trials=2, trial_epochs=2)


def run_share(data: Any, folder: Path) -> int:
    url = f"sqlite:///{folder / 'tuning.db'}"
    return shared_tuning.run_share(data, PARAMS, seed=7, url=url, name="r", share=0, of=1)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let one of the storage's calls fail so many times."""
    name, times = request.param
    original, left = getattr(optuna.storages.RDBStorage, name), [times]

    def fail(self: optuna.storages.RDBStorage, *args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise optuna.exceptions.StorageInternalError("the connection was closed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(optuna.storages.RDBStorage, name, fail)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.01)


@pytest.mark.parametrize(
    "failing", [("set_trial_intermediate_value", 2), ("set_trial_user_attr", 2)], ids=lambda it: it[0], indirect=True
)
def test_share__database_away_for_a_moment__loses_no_trial(training_data: Any, failing: None, tmp_path: Path) -> None:
    assert run_share(training_data, tmp_path) == PARAMS.trials
    trials = shared_tuning.collect_trials(f"sqlite:///{tmp_path / 'tuning.db'}", "r")
    assert [len(trial.losses) for trial in trials] == [2, 2]
    study = optuna.load_study(study_name="r", storage=f"sqlite:///{tmp_path / 'tuning.db'}")
    assert len(study.trials) == PARAMS.trials


@pytest.mark.parametrize("failing", [("set_trial_intermediate_value", 10**6)], ids=["for good"], indirect=True)
def test_share__database_away_in_a_trial__may_be_tried_later(training_data: Any, failing: None, tmp_path: Path) -> None:
    with pytest.raises(TryLater, match="PERCH_TUNING_URL"):
        run_share(training_data, tmp_path)
