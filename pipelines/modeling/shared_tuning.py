"""One Optuna study in a database, and several processes that each run their share of its trials at the same time.

A share is a number of trials, not a queue: killed and started again, a process runs what its share still lacks.  What
the trials found is collected into a file of the run before training reads it, for trials that ran side by side cannot
be repeated to the bit: each was chosen by what the others had found by then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna
import pytorch_lightning as pl
from optuna.trial import TrialState

from pipelines.errors import Refusal, TryLater
from pipelines.modeling.callbacks import MONITORED, EpochHistory
from pipelines.modeling.progress import TrainingProgress
from pipelines.modeling.search_space import configured_values, hyperparameters, search_space, with_hyperparameters
from pipelines.modeling.seeds import derive_seed
from pipelines.modeling.training import train
from pipelines.modeling.training_data import TrainingData
from pipelines.modeling.tuning import Pruning, TrialRecord, make_pruner, make_sampler
from pipelines.params import ModelTrainingParams

ResultT = TypeVar("ResultT")

_SHARE, _METRICS, _STATE = "perch_share", "perch_metrics", "perch_state"
_TRIES = 5
_PAUSE_S = 1.0


def run_share(
    data: TrainingData, params: ModelTrainingParams, *, seed: int, url: str, name: str, share: int, of: int
) -> int:
    """Run the trials of one share that are missing from the study.

    Args:
        data: images and constants.
        params: `trials` of `trial_epochs` each, around these values.
        seed: of the samplers and of every training.
        url: SQLAlchemy's, of the database that keeps the study.
        name: of the study; made by whoever comes first.
        share: from 0; the first one's first trial is the configuration as it stands.
        of: number of shares.

    Returns:
        How many trials the share has now.

    Raises:
        TryLater: the database does not answer.
    """
    wanted = len(range(share, params.trials, of))
    with _open(url, name) as study:
        own = [trial for trial in _answered(study.get_trials) if trial.user_attrs.get(_SHARE) == share]
        for trial in own:
            if trial.state == TrialState.RUNNING:  # of this share's process that was killed
                _answered(lambda number=trial.number: study.tell(number, state=TrialState.FAIL))  # type: ignore[misc]
        done = sum(_STATE in trial.user_attrs for trial in own)
        for index in range(done, wanted):
            sampler: optuna.samplers.BaseSampler = make_sampler(
                derive_seed(seed, "share", share, index) % 2**32, constant_liar=True
            )
            if (share, index) == (0, 0):
                sampler = optuna.samplers.PartialFixedSampler(configured_values(params), sampler)
            study.sampler = sampler
            _run_trial(data, params, study, share=share, title=f"trial {index + 1} of {wanted}  ", seed=seed)
    return wanted


def collect_trials(url: str, name: str) -> list[TrialRecord]:
    """The finished trials of a study, in the order in which they were begun.

    Raises:
        TryLater: the database does not answer.
    """
    with _open(url, name) as study:
        finished = [trial for trial in _answered(study.get_trials) if _STATE in trial.user_attrs]
    return [
        TrialRecord(
            number=number,
            state=trial.user_attrs[_STATE],
            values={key: float(value) for key, value in sorted(trial.params.items())},
            losses=[trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)],
            metrics=json.loads(trial.user_attrs[_METRICS]),
        )
        for number, trial in enumerate(sorted(finished, key=lambda trial: trial.number))
    ]


def _run_trial(
    data: TrainingData, params: ModelTrainingParams, study: optuna.Study, *, share: int, title: str, seed: int
) -> None:
    trial = _answered(lambda: study.ask(dict(search_space(params))))
    _answered(lambda: trial.set_user_attr(_SHARE, share))
    values = {name: float(value) for name, value in trial.params.items()}
    tried = with_hyperparameters(params, hyperparameters(params, values)).model_copy(
        update={"epochs": params.trial_epochs}
    )
    history = EpochHistory(tried.patience_epochs)
    pruning = Pruning(trial, history, ask=_answered)
    observers: list[pl.Callback] = [TrainingProgress(history, len(data.train), title), pruning]
    state = "complete"
    try:
        train(data, tried, seed=seed, observers=observers, history=history)
    except optuna.TrialPruned:
        state = "pruned"
    except Refusal:
        state = "fail"  # a diverging loss is an answer about these values, not about the data

    def record() -> None:
        trial.set_user_attr(_METRICS, json.dumps(history.best if history.records else {}))
        trial.set_user_attr(_STATE, state)  # with it the trial counts
        if state == "complete":
            study.tell(trial, history.best[MONITORED], skip_if_finished=True)
        else:
            told = TrialState.PRUNED if state == "pruned" else TrialState.FAIL
            study.tell(trial, state=told, skip_if_finished=True)

    _answered(record)


@contextmanager
def _open(url: str, name: str) -> Iterator[optuna.Study]:
    """The study, made if need be; several processes may come first at once."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _answered(lambda: optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True}))
    try:
        yield _answered(
            lambda: optuna.create_study(storage=storage, study_name=name, pruner=make_pruner(), load_if_exists=True)
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _answered(ask: Callable[[], ResultT]) -> ResultT:
    """Ask the database again where it did not answer, or where another process made the same tables just now."""
    from sqlalchemy.exc import SQLAlchemyError

    failure: Exception | None = None
    for _ in range(_TRIES):
        try:
            return ask()
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            failure = error
            time.sleep(_PAUSE_S)
    cause: Any = failure.__cause__ or failure if failure else ""
    raise TryLater(
        f"the database of tuning does not answer: {str(cause).splitlines()[0]}\n"
        "  what to do: see that PERCH_TUNING_URL is right and its server up, then try again; finished trials are kept"
    ) from failure
