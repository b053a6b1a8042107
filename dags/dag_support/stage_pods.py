"""A stage as a pod: the same `perch` command in the pipeline image, its result read from the run's storage.

The pod's state decides nothing.  It can be collected, evicted or lost with its node; what the step wrote last, with the
name of its pod, says how it ended.  An API server that is away says nothing at all, and takes no try.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import (
    TRANSIENT_CONNECTION_ERRORS,
    TRANSIENT_STATUS_CODES,
)
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger
from airflow.sdk import BaseOperatorLink
from airflow.sdk.exceptions import AirflowException
from kubernetes.client import ApiException
from kubernetes.client import models as k8s
from urllib3.exceptions import HTTPError

from dags.dag_support.perch_command import CommandOutcome, run_perch
from dags.dag_support.pod_spec import ENGINE_STEPS, LABELS, pod_annotations, pod_template, require_pod_settings
from dags.dag_support.project import PROJECT_DIR
from dags.dag_support.stage_command import announce_outlets, stage_links, stage_timeout, stage_words
from pipelines.errors import EXIT_REFUSED
from pipelines.params import load_params
from pipelines.settings import get_settings

if TYPE_CHECKING:
    from datetime import datetime

    from airflow.sdk import Context

_GRACE_S = 60  # to hand over checkpoints and give the run back
_SCHEDULE_LIMIT_S = 1800  # a node with a GPU may have to be started first
_START_LIMIT_S = 900  # and pull a large image
_LOG_PAUSE_S = 10
_AWAY_PAUSE_S = 10  # before the API server is asked again
_AWAY_LIMIT_S = 1800  # for a try whose pod could not be made; one that watches a pod has its task's time
_AT_ONCE_S = 20  # the trigger itself asks for longer where nobody answers
_DEFERRED_AT = "_perch_deferred_at"
_OUTCOME_PAUSE_S = 15
_OUTCOME_LIMIT_S = 300  # for a bucket that is away when the step has ended


class PodCommandOperator(KubernetesPodOperator):
    """Runs a `perch` command in a pod, without holding a worker while it does.

    Args:
        step: what `pods.steps` in params.yaml calls it.
        kwargs: of any operator.
    """

    def __init__(self, *, step: str, **kwargs: Any) -> None:
        settings = get_settings()
        require_pod_settings(settings)
        timeout = kwargs.setdefault("execution_timeout", stage_timeout(step))
        super().__init__(
            name=f"perch-{step.replace('_', '-')}",
            namespace=settings.kubernetes_namespace or None,
            image=settings.pipeline_image,
            cmds=["perch"],
            full_pod_spec=pod_template(step, load_params(PROJECT_DIR / "params.yaml").pods.of_step(step), settings),
            labels={**LABELS, "app.kubernetes.io/instance": settings.kubernetes_release, "perch/step": step},
            service_account_name=(
                f"{settings.kubernetes_release}-engine"
                if step in ENGINE_STEPS and settings.target == "kubernetes"
                else settings.pod_service_account or None
            ),
            automount_service_account_token=step in ENGINE_STEPS and settings.target == "kubernetes",
            deferrable=True,
            durable=True,  # a pod outlives the worker that started it, and the next try goes on watching it
            do_xcom_push=False,  # no sidecar
            get_logs=True,
            logging_interval=_LOG_PAUSE_S,
            log_events_on_failure=True,
            log_pod_spec_on_failure=False,
            on_finish_action="delete_pod",
            on_kill_action="delete_pod",
            termination_grace_period=_GRACE_S,
            # Should everybody forget it, the cluster ends it.
            active_deadline_seconds=int((timeout + timedelta(minutes=10)).total_seconds()),
            schedule_timeout_seconds=_SCHEDULE_LIMIT_S,
            startup_timeout_seconds=_START_LIMIT_S,
            **kwargs,
        )
        self.step = step

    @abstractmethod
    def perch_words(self, context: Context) -> list[str]:
        """The command's words after `perch`."""

    def build_pod_request_obj(self, context: Context | None = None, *, dry_run: bool = False) -> k8s.V1Pod:
        """The pod, with this try's command and the names by which it is found again."""
        if context is not None:
            self.arguments = self.perch_words(context)
            self.annotations = pod_annotations(context)
        return super().build_pod_request_obj(context, dry_run=dry_run)

    def execute_async(self, context: Context) -> None:
        """Make the pod, or find that of an earlier try; where the API server is away, come back for it.

        Raises:
            AirflowException: it answers, and does not make the pod, or it has been away for half an hour.
        """
        try:
            super().execute_async(context)
        except (AirflowException, ApiException, HTTPError) as error:
            tried_s = time.time() - context["ti"].start_date.timestamp()
            if not _is_outage(error) or tried_s > _AWAY_LIMIT_S:
                raise
            self.log.warning("The API server is away; it is asked for the pod again in %d s: %s", _AWAY_PAUSE_S, error)
            pause = TimeDeltaTrigger(timedelta(seconds=_AWAY_PAUSE_S))
            self.defer(trigger=pause, method_name="start_again")

    def start_again(self, context: Context, event: Any = None) -> None:  # noqa: ARG002 - of a pause, it says nothing
        """Go on where `execute_async` found the API server away."""
        self.execute_async(context)

    def invoke_defer_method(self, last_log_time: datetime | None = None, context: Context | None = None) -> None:
        """Watch the pod without a worker; what the trigger says then tells since when it did."""
        self.trigger_kwargs = {**(self.trigger_kwargs or {}), _DEFERRED_AT: time.time()}
        super().invoke_defer_method(last_log_time, context)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Ship the rest of the log and remove the pod; where the API server is away, go on watching until it is back.

        Raises:
            AirflowFailException: the command refused.
            AirflowException: it failed, or its pod was lost, or the task's time is over; it can be tried again.
        """
        if time.time() - event.get(_DEFERRED_AT, 0.0) > _AT_ONCE_S:
            # An outage that ended, and not one of three failures in a row, after which a worker would do the watching.
            event = {name: value for name, value in event.items() if name != "_redefer_count"}
        try:
            super().trigger_reentry(context, event)
        except (AirflowException, ApiException, HTTPError) as error:
            if _is_outage(error) and time.time() < event.get("_execution_deadline", float("inf")):
                self.log.warning("The API server does not answer; pod %s is watched further: %s", event["name"], error)
                # Without a state, whatever was seen of it before: one that had ended would be judged here and now.
                self.pod = k8s.V1Pod(metadata=k8s.V1ObjectMeta(name=event["name"], namespace=event["namespace"]))
                time.sleep(_AWAY_PAUSE_S)
                self.invoke_defer_method(event.get("last_log_time"), context)
            if _exit_code(self.pod) == EXIT_REFUSED:
                CommandOutcome(EXIT_REFUSED, {}).raise_for_exit(self.task_id)
            if isinstance(error, AirflowException):
                raise
            raise AirflowException(f"{self.task_id}: nothing can be learnt of pod {event['name']}: {error}") from error


class StagePodOperator(PodCommandOperator):
    """Runs `perch <stage> --run <run id>` in a pod and returns the stage's result.

    Args:
        stage: the stage's name; the task id.
        run_prefix: set where another DAG's runs could have the same run id.
    """

    ui_color = "#e8f1f8"

    def __init__(self, *, stage: str, run_prefix: str = "", **kwargs: Any) -> None:
        super().__init__(step=stage, task_id=stage, **kwargs)
        self.stage = stage
        self.run_prefix = run_prefix
        self.links: dict[str, str] = {}

    @property
    def operator_extra_links(self) -> list[BaseOperatorLink]:
        """The MLflow run, and the stage's report where it has one."""
        return stage_links(self.stage)

    def perch_words(self, context: Context) -> list[str]:
        """The same command as in a process."""
        return stage_words(self.stage, self.run_prefix + context["dag_run"].run_id, context)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Ship the rest of the log, and judge the step by what it wrote.

        Raises:
            AirflowFailException: the step refused.
            AirflowException: it failed, or its pod was lost before it had ended; it can be tried again.
        """
        failure: AirflowException | None = None
        try:
            super().trigger_reentry(context, event)
        except AirflowException as error:
            failure = error
        run_id = self.run_prefix + context["dag_run"].run_id
        outcome = self._read_outcome(run_id)
        result = dict(outcome.result)
        if result.pop("by", None) != event["name"]:
            found = "left no outcome" if "by" in outcome.result else "its outcome could not be read"
            raise failure or AirflowException(
                f"{self.stage}: pod {event['name']} has ended and {found}; it can be tried again"
            )
        self.links = result.pop("links", {})
        outcome.raise_for_exit(self.stage)
        announce_outlets(self, context, result, run_id)
        context["ti"].xcom_push(key="return_value", value=result)

    def _read_outcome(self, run_id: str) -> CommandOutcome:
        """What the step wrote; asked for again for some minutes where that could not be read, for the pod is gone."""
        deadline = time.monotonic() + _OUTCOME_LIMIT_S
        while True:
            outcome = run_perch(SubprocessHook(), "runs", "outcome", run_id, self.stage, "--json")
            if "by" in outcome.result or outcome.exit_code == EXIT_REFUSED or time.monotonic() > deadline:
                return outcome
            self.log.warning("How %s ended could not be read; asked again in %d s", self.stage, _OUTCOME_PAUSE_S)
            time.sleep(_OUTCOME_PAUSE_S)


def _is_outage(error: Exception) -> bool:
    """Whether the API server was not there, or too busy; status 0 is a connection that broke off before an answer."""
    if isinstance(error, ApiException):
        return not error.status or error.status in TRANSIENT_STATUS_CODES
    return isinstance(error, TRANSIENT_CONNECTION_ERRORS)


def _exit_code(pod: k8s.V1Pod | None) -> int | None:
    """Of the command, where the pod still tells."""
    statuses = (pod.status.container_statuses if pod is not None and pod.status is not None else None) or ()
    for status in statuses:
        if status.name == "base" and status.state.terminated is not None:
            code: int = status.state.terminated.exit_code
            return code
    return None
