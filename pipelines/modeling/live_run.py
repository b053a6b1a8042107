"""Shows a training in MLflow while it runs, and never stands in its way.

Everything is sent from a thread of its own.  The first failure ends the showing with one warning: whoever publishes the
finished stage completes the curves from `curves.csv`.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from pipelines.modeling.callbacks import EpochHistory

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

_CLOSING_TIMEOUT_S = 10.0
_SYSTEM_INTERVAL_S = 5.0
# Set unless the user has set them: the client's own patience would be minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

Task = Callable[["MlflowClient"], None]


@dataclass(frozen=True)
class TrialReport:
    """What a nested run shows of one tuning trial.

    Attributes:
        number: of the trial, from 0.
        state: how it ended: `complete`, `pruned` or `fail`.
        hyperparameters: what was tried.
        losses: val/loss of each epoch.
        metrics: of its best epoch.
    """

    number: int
    state: str
    hyperparameters: Mapping[str, float]
    losses: list[float]
    metrics: Mapping[str, float] = field(default_factory=dict)


class LiveRun:
    """A run in MLflow that somebody else began and will end; use it as a context.

    Args:
        run_id: of the MLflow run; empty shows nothing.
        tracking_uri: of MLflow.
    """

    def __init__(self, run_id: str, tracking_uri: str) -> None:
        self._run_id, self._uri = run_id, tracking_uri
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    @classmethod
    def from_environment(cls) -> LiveRun:
        """The run that `MLFLOW_RUN_ID` and `MLFLOW_TRACKING_URI` name, which `pipelines.runs` sets."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        return cls(os.environ.get("MLFLOW_RUN_ID", "") if uri else "", uri)

    def __enter__(self) -> LiveRun:
        if self._run_id:
            for key, value in _ENVIRONMENT.items():
                os.environ.setdefault(key, value)
            self._worker = threading.Thread(target=self._work, name="LiveRun", daemon=True)
            self._worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._worker is not None:
            self._tasks.put(None)
            self._worker.join(_CLOSING_TIMEOUT_S)  # a server that hangs is left behind with its daemon thread

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each curve.

        Args:
            epoch: from 1.
            metrics: `split/name` to value.
        """
        moment_ms = int(time.time() * 1000)

        def send(client: MlflowClient) -> None:
            client.log_batch(self._run_id, metrics=_points(metrics, epoch, moment_ms))

        self._submit(send)

    def log_trial(self, trial: TrialReport) -> None:
        """Show a finished trial as a nested run; once, however often it is called."""

        def send(client: MlflowClient) -> None:
            _log_nested(client, self._run_id, trial)

        self._submit(send)

    def _submit(self, task: Task) -> None:
        if self._worker is not None:
            self._tasks.put(task)

    def _work(self) -> None:
        monitor = None
        try:
            from mlflow import MlflowClient

            _hush_mlflow()
            client = MlflowClient(tracking_uri=self._uri)
            monitor = _start_system_metrics(self._run_id, self._uri)
            while (task := self._tasks.get()) is not None:
                task(client)
        except Exception as error:  # noqa: BLE001  whatever it is, the training is worth more than its picture
            cause = str(error).split("\n", 1)[0]
            _log.warning("MLflow at %s does not take the curves live (%s); training goes on", self._uri, cause)
        finally:
            if monitor is not None:
                monitor.finish()


class LiveCurves(pl.Callback):
    """Sends each epoch's metrics to the live run."""

    def __init__(self, live_run: LiveRun, history: EpochHistory) -> None:
        self._live_run, self._history = live_run, history

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Send them."""
        self._live_run.log_epoch(len(self._history.records), self._history.latest)


def _start_system_metrics(run_id: str, uri: str) -> Any:
    """MLflow's own monitor of processor, memory, disk, network and GPU, going on where an earlier one was killed."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, _SYSTEM_INTERVAL_S, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def _log_nested(client: MlflowClient, parent_id: str, trial: TrialReport) -> None:
    """Make the trial's run whole: one that a killed process left unfinished is replaced."""
    from mlflow.entities import Param

    experiment_id = client.get_run(parent_id).info.experiment_id
    known = client.search_runs(
        [experiment_id], f"tags.mlflow.parentRunId = '{parent_id}' and tags.`perch.trial` = '{trial.number}'"
    )
    if any(run.info.status != "RUNNING" for run in known):
        return
    for run in known:
        client.delete_run(run.info.run_id)
    tags = {"mlflow.parentRunId": parent_id, "perch.trial": str(trial.number), "perch.trial_state": trial.state}
    run_id = client.create_run(experiment_id, run_name=f"trial {trial.number}", tags=tags).info.run_id
    moment_ms = int(time.time() * 1000)
    points = [point for i, loss in enumerate(trial.losses) for point in _points({"val/loss": loss}, i + 1, moment_ms)]
    last = {name: value for name, value in trial.metrics.items() if name != "val/loss"}
    params = [Param(name, f"{value:g}") for name, value in trial.hyperparameters.items()]
    client.log_batch(run_id, metrics=points + _points(last, len(trial.losses), moment_ms), params=params)
    client.set_terminated(run_id, {"complete": "FINISHED", "pruned": "KILLED"}.get(trial.state, "FAILED"))


def _points(metrics: Mapping[str, float], step: int, moment_ms: int) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(name, value, moment_ms, step) for name, value in metrics.items() if math.isfinite(value)]


def _hush_mlflow() -> None:
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
