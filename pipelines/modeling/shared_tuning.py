"""One Optuna study in a database, and several processes that each run their share of its trials at the same time.

A share is a number of trials, not a queue: killed and started again, a process runs what its share still lacks.  What
the trials found is collected into a file of the run before training reads it, for trials that ran side by side cannot
be repeated to the bit: each was chosen by what the others had found by then.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import optuna
import pytorch_lightning as pl
from optuna.trial import TrialState

from pipelines.core.connection_deadline import Deadline
from pipelines.core.patience import be_patient
from pipelines.errors import Refusal
from pipelines.modeling.callbacks import MONITORED, EpochHistory
from pipelines.modeling.progress import TrainingProgress
from pipelines.modeling.search_space import configured_values, hyperparameters, search_space, with_hyperparameters
from pipelines.modeling.seeds import derive_seed
from pipelines.modeling.training import train
from pipelines.modeling.training_data import TrainingData
from pipelines.modeling.tuning import Pruning, TrialRecord, make_pruner, make_sampler
from pipelines.params import ModelTrainingParams

ResultT = TypeVar("ResultT")

_SHARE, _MARK, _METRICS, _STATE = "perch_share", "perch_mark", "perch_metrics", "perch_state"
_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "fail": TrialState.FAIL}
_LIMIT_S = 30  # for a connection, and again for all that is asked over it
_DEADLINE = "perch_deadline"


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
        _answered(lambda: _end_unfinished(study, share))  # of this share's process that was killed
        done = sum(_STATE in trial.user_attrs for trial in _answered(lambda: _trials_of(study, share)))
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
    trial = _answered(lambda: _begin_trial(params, study, share))
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

    # Each by itself: of a trial that is told, nothing can be set any more, and the answer to telling may get lost.
    metrics = history.best if history.records else {}
    _answered(lambda: trial.set_user_attr(_METRICS, json.dumps(metrics)))
    _answered(lambda: trial.set_user_attr(_STATE, state))  # with it the trial counts
    _answered(lambda: _tell(study, trial.number, state, metrics))


def _begin_trial(params: ModelTrainingParams, study: optuna.Study, share: int) -> optuna.Trial:
    """Begin a trial of a share, and end what an earlier attempt, of which no answer came, left of it.

    `Study.ask` makes a trial and returns it: where it is made and the answer lost, nobody knows whose it is, and the
    samplers of all shares count it as at work.  So the trial says whose it is in the transaction that makes it.
    """
    mark = secrets.token_hex(8)
    study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={_SHARE: share, _MARK: mark}))
    begun = [trial for trial in _trials_of(study, share) if trial.user_attrs.get(_MARK) == mark]
    _end_unfinished(study, share, but=begun[0].number)
    trial = optuna.Trial(study, begun[0]._trial_id)  # as `ask` makes it
    for name, wanted in search_space(params).items():
        trial.suggest_float(name, wanted.low, wanted.high, log=wanted.log)
    return trial


def _end_unfinished(study: optuna.Study, share: int, *, but: int | None = None) -> None:
    """End the trials of a share that nobody is at work on: all that run, but for one."""
    for trial in _trials_of(study, share):
        if trial.state == TrialState.RUNNING and trial.number != but:
            state = trial.user_attrs.get(_STATE, "fail")
            _tell(study, trial.number, state, json.loads(trial.user_attrs.get(_METRICS, "{}")))


def _trials_of(study: optuna.Study, share: int) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.get_trials() if trial.user_attrs.get(_SHARE) == share]


def _tell(study: optuna.Study, number: int, state: str, metrics: dict[str, float]) -> None:
    """Tell how a trial ended; once more has no effect."""
    study.tell(number, metrics[MONITORED] if state == "complete" else None, state=_STATES[state], skip_if_finished=True)


@contextmanager
def _open(url: str, name: str) -> Iterator[optuna.Study]:
    """The study, made if need be; several processes may come first at once."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _answered(lambda: optuna.storages.RDBStorage(url, engine_kwargs=_engine_arguments(url)))
    try:
        yield _answered(
            lambda: optuna.create_study(storage=storage, study_name=name, pruner=make_pruner(), load_if_exists=True)
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _engine_arguments(url: str) -> dict[str, Any]:
    """Arguments of SQLAlchemy's engine, with which nothing that is asked of PostgreSQL waits for ever."""
    from sqlalchemy import make_url
    from sqlalchemy.pool import NullPool

    # A connection per transaction, as the ledger has it: one that was kept may have been lost in a trial's minutes.
    if make_url(url).get_backend_name() != "postgresql":
        return {"poolclass": NullPool}

    def limit(connection: Any, record: Any) -> None:
        record.info[_DEADLINE] = Deadline(connection.fileno(), _LIMIT_S)
        # The server's side of the same limit: a client that vanished must not keep the study's lock.
        for name in ("statement_timeout", "idle_in_transaction_session_timeout"):
            connection.execute(f"SET {name} = '{_LIMIT_S}s'")
        connection.commit()

    def cancel(_connection: object, record: Any) -> None:
        if deadline := record.info.pop(_DEADLINE, None):
            deadline.cancel()

    return {
        "poolclass": NullPool,
        "pool_events": [(limit, "connect"), (cancel, "close")],
        "connect_args": {"connect_timeout": _LIMIT_S},
    }


def _answered(ask: Callable[[], ResultT]) -> ResultT:
    """Ask the database again where it did not answer, or where another process made the same tables just now."""
    from sqlalchemy.exc import SQLAlchemyError

    return be_patient(
        ask,
        transient=lambda error: isinstance(error, optuna.exceptions.StorageInternalError | SQLAlchemyError),
        name="the database of tuning (PERCH_TUNING_URL)",
    )
