"""Optuna tries hyperparameters in short trainings; killed and started again it runs only the trials that are missing.

Nothing depends on when a process was killed: a finished trial is kept in a file, an unfinished one is trained on from
its checkpoint, and the sampler of each trial has a seed of its own, so that the same trials lead to the same next one.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
from optuna.trial import TrialState

from pipelines.core.results import write_json
from pipelines.errors import Refusal
from pipelines.modeling.callbacks import MONITORED, EpochHistory
from pipelines.modeling.live_run import LiveRun, TrialReport
from pipelines.modeling.progress import TrainingProgress
from pipelines.modeling.search_space import configured_values, hyperparameters, search_space, with_hyperparameters
from pipelines.modeling.seeds import derive_seed
from pipelines.modeling.training import Resumption, train
from pipelines.modeling.training_data import TrainingData
from pipelines.params import ModelTrainingParams

_RANDOM_TRIALS = 8  # before TPE has enough to model
_FIRST_UNPRUNED_TRIALS = 4
_FIRST_UNPRUNED_EPOCHS = 2


@dataclass(frozen=True)
class TrialRecord:
    """A finished trial, as it is kept between processes.

    Attributes:
        number: from 0.
        state: `complete`, `pruned`, or `fail` where the loss diverged.
        values: the point of the search space.
        losses: val/loss of each epoch.
        metrics: of the best epoch.
    """

    number: int
    state: str
    values: dict[str, float]
    losses: list[float]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        params: with the best trial's hyperparameters.
        hyperparameters: keys of `model_training` and the values they got.
        trials: all of them, in order.
    """

    params: ModelTrainingParams
    hyperparameters: dict[str, float]
    trials: list[TrialRecord]


def tune(
    data: TrainingData,
    params: ModelTrainingParams,
    *,
    seed: int,
    folder: Path,
    fingerprint: str,
    live_run: LiveRun,
    given: Sequence[TrialRecord] = (),
) -> Tuning:
    """Run the trials and choose the one with the lowest val/loss.

    The sampler is TPE (Bergstra et al. 2011), the pruner stops a trial whose best loss so far is above the median of
    the others at the same epoch (Golovin et al. 2017).  The first trial is the configuration as it stands.

    Args:
        data: images and constants.
        params: `trials` of `trial_epochs` each, around these values.
        seed: of the samplers and of every training.
        folder: for the study and the checkpoint of the trial in progress.
        fingerprint: of everything the study depends on; a study with another is not gone on with.
        live_run: gets a nested run per trial.
        given: trials that ran elsewhere, side by side; only what is missing of `trials` is run here.

    Raises:
        Refusal: the loss diverged in every trial.
        TryLater: the folder could not be written.
    """
    journal = folder / f"study-{fingerprint[:16]}.json"
    trials = read_trials(journal) or list(given)
    for trial in trials:
        live_run.log_trial(_report(params, trial))
    for number in range(len(trials), params.trials):
        checkpoint = Resumption(folder / f"trial-{number}.ckpt", fingerprint)
        trial = _run_trial(data, params, number, trials, seed=seed, resumption=checkpoint)
        trials.append(trial)
        write_json(journal, [asdict(trial) for trial in trials])
        checkpoint.path.unlink(missing_ok=True)
        live_run.log_trial(_report(params, trial))
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        raise Refusal(
            "tuning",
            f"the loss diverged in all {len(trials)} trials",
            limit="one trial with a finite loss",
            way_out="lower model_training.learning_rate, around which tuning looks",
        )
    best = min(complete, key=lambda trial: trial.metrics[MONITORED])
    chosen = hyperparameters(params, best.values)
    return Tuning(with_hyperparameters(params, chosen), chosen, trials)


def write_trials(path: Path, params: ModelTrainingParams, trials: list[TrialRecord]) -> None:
    """Write `trials.csv`: `trial,state,epochs,val/loss,val/accuracy` and one column per hyperparameter."""
    names = list(hyperparameters(params, trials[0].values))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "epochs", MONITORED, "val/accuracy", *names])
        for trial in trials:
            chosen = hyperparameters(params, trial.values)
            measured = [f"{trial.metrics[name]:.9g}" if trial.metrics else "" for name in (MONITORED, "val/accuracy")]
            writer.writerow(
                [trial.number, trial.state, len(trial.losses), *measured, *(chosen[name] for name in names)]
            )


def make_sampler(seed: int, *, constant_liar: bool = False) -> optuna.samplers.TPESampler:
    """Tree-structured Parzen estimators; with `constant_liar`, trials at work elsewhere count as bad ones."""
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS, constant_liar=constant_liar)


def make_pruner() -> optuna.pruners.MedianPruner:
    """Stops a trial that is behind the median of the others, once there are others and it has begun in earnest."""
    return optuna.pruners.MedianPruner(n_startup_trials=_FIRST_UNPRUNED_TRIALS, n_warmup_steps=_FIRST_UNPRUNED_EPOCHS)


def _run_trial(
    data: TrainingData,
    params: ModelTrainingParams,
    number: int,
    finished: list[TrialRecord],
    *,
    seed: int,
    resumption: Resumption,
) -> TrialRecord:
    study = _restore_study(params, finished, derive_seed(seed, "trial", number) % 2**32)
    trial = study.ask(dict(search_space(params)))
    values = {name: float(value) for name, value in trial.params.items()}
    tried = with_hyperparameters(params, hyperparameters(params, values)).model_copy(
        update={"epochs": params.trial_epochs}
    )
    history = EpochHistory(tried.patience_epochs)
    title = f"trial {number + 1} of {params.trials}  "
    observers: list[pl.Callback] = [TrainingProgress(history, len(data.train), title), Pruning(trial, history)]
    state = "complete"
    try:
        train(data, tried, seed=seed, resumption=resumption, observers=observers, history=history)
    except optuna.TrialPruned:
        state = "pruned"
    except Refusal:
        state = "fail"  # a diverging loss is an answer about these values, not about the data
    losses = [record[MONITORED] for record in history.records]
    return TrialRecord(number, state, values, losses, history.best if history.records else {})


def _restore_study(params: ModelTrainingParams, finished: list[TrialRecord], seed: int) -> optuna.Study:
    """A study that knows the finished trials and nothing else."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=make_sampler(seed), pruner=make_pruner())
    space: dict[str, Any] = dict(search_space(params))
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "fail": TrialState.FAIL}
    for trial in finished:
        study.add_trial(
            optuna.trial.create_trial(
                state=states[trial.state],
                value=trial.metrics[MONITORED] if trial.state == "complete" else None,
                params=trial.values,
                distributions=space,
                intermediate_values=dict(enumerate(trial.losses, start=1)),
            )
        )
    if not finished:
        study.enqueue_trial(configured_values(params))
    return study


def _ask_once(question: Callable[[], Any]) -> Any:
    return question()


class Pruning(pl.Callback):
    """Reports each epoch's val/loss, and ends the trial when the pruner says so.

    Args:
        trial: whose losses these are.
        history: of its epochs.
        ask: puts a question to the study, again where its database may not have answered.
    """

    def __init__(
        self, trial: optuna.Trial, history: EpochHistory, ask: Callable[[Callable[[], Any]], Any] = _ask_once
    ) -> None:
        self._trial, self._history, self._ask = trial, history, ask

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Tell the pruner what a resumed trial had already measured."""
        for epoch, record in enumerate(self._history.records, start=1):
            self._report(record[MONITORED], epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Report, and judge.

        Raises:
            optuna.TrialPruned: the trial is behind the others.
        """
        self._report(self._history.latest[MONITORED], len(self._history.records))
        if self._ask(self._trial.should_prune):
            raise optuna.TrialPruned

    def _report(self, loss: float, epoch: int) -> None:
        self._ask(lambda: self._trial.report(loss, epoch))


def read_trials(path: Path) -> list[TrialRecord]:
    """The trials that an earlier process finished; none where there is no such file."""
    if not path.is_file():
        return []
    tree = json.loads(path.read_text(encoding="utf-8"))
    return [TrialRecord(**fields) for fields in (tree["trials"] if isinstance(tree, dict) else tree)]


def _report(params: ModelTrainingParams, trial: TrialRecord) -> TrialReport:
    chosen = hyperparameters(params, trial.values)
    return TrialReport(trial.number, trial.state, chosen, trial.losses, trial.metrics)
