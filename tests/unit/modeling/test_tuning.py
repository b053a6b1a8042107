import csv
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipelines.errors import Refusal
from pipelines.modeling import tuning
from pipelines.modeling.live_run import LiveRun
from pipelines.modeling.tuning import Tuning, tune, write_trials
from pipelines.params import ModelTrainingParams, SmallCNNParams

PARAMS = ModelTrainingParams(
    small_cnn=SmallCNNParams(widths=[8]), batch_size=32, learning_rate=0.01, trials=5, trial_epochs=3
)


def search(data, folder: Path, params: ModelTrainingParams = PARAMS) -> Tuning:
    return tune(data, params, seed=7, folder=folder, fingerprint="same inputs", live_run=LiveRun("", ""))


@pytest.fixture(scope="module")
def uninterrupted(training_data, tmp_path_factory) -> Tuning:
    return search(training_data, tmp_path_factory.mktemp("tuning"))


def test_tune__first_trial__is_the_configuration(uninterrupted):
    assert uninterrupted.trials[0].values["learning_rate"] == PARAMS.learning_rate
    assert uninterrupted.trials[0].values["augmentation_strength"] == 1.0


def test_tune__all_trials__the_lowest_loss_is_chosen(uninterrupted):
    complete = [trial for trial in uninterrupted.trials if trial.state == "complete"]
    best = min(complete, key=lambda trial: trial.metrics["val/loss"])
    assert len(uninterrupted.trials) == 5
    assert uninterrupted.params.learning_rate == pytest.approx(best.values["learning_rate"], rel=1e-5)
    assert uninterrupted.params.epochs == PARAMS.epochs  # the short trial_epochs are for trials alone


@pytest.mark.parametrize("kills", [["train 2"], ["journal 1", "train 3"]], ids=str)
def test_tune__killed_and_started_again__runs_the_missing_trials_and_finds_the_same(
    training_data, uninterrupted, tmp_path, kills, monkeypatch
):
    for kill in kills:
        process = get_context("fork").Process(target=_search_until, args=(training_data, tmp_path, kill))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    trained = []
    original = tuning.train
    monkeypatch.setattr(tuning, "train", lambda *args, **kwargs: trained.append(1) or original(*args, **kwargs))
    found = search(training_data, tmp_path)
    assert found == uninterrupted
    assert len(trained) == 5 - int(kills[-1].split()[1])


def _search_until(data, folder: Path, kill: str) -> None:
    """Kill the process when it begins to train, or has trained but not yet recorded, that trial (from 0)."""
    place, number = kill.split()
    name = {"train": "train", "journal": "write_json"}[place]
    original, left = getattr(tuning, name), [int(number)]

    def killing(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return original(*args, **kwargs)

    # A resumed study has its finished trials behind it.
    journal = next(folder.glob("study-*.json"), None)
    left[0] -= len(tuning.read_trials(journal)) if journal else 0
    setattr(tuning, name, killing)
    search(data, folder)


def test_tune__loss_diverges_in_a_trial__the_others_go_on(training_data, tmp_path, monkeypatch):
    original, calls = tuning.train, []

    def failing_first(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise Refusal("val/loss of epoch 1", "nan")
        return original(*args, **kwargs)

    monkeypatch.setattr(tuning, "train", failing_first)
    found = search(training_data, tmp_path, PARAMS.model_copy(update={"trials": 2}))
    assert [trial.state for trial in found.trials] == ["fail", "complete"]
    write_trials(tmp_path / "trials.csv", PARAMS, found.trials)
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["fail", "complete"]
    assert rows[0]["val/loss"] == ""
    assert float(rows[1]["learning_rate"]) == found.hyperparameters["learning_rate"]


def test_tune__loss_diverges_in_all_trials__is_refused(training_data, tmp_path):
    data = type(training_data)(**{**training_data.__dict__, "std": (1e-38,)})
    with pytest.raises(Refusal, match="diverged in all 2 trials"):
        search(data, tmp_path, PARAMS.model_copy(update={"trials": 2}))
