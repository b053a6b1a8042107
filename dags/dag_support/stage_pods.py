"""A stage as a pod: the same `perch` command in the pipeline image, its result read from the run's storage.

The pod's state decides nothing.  It can be collected, evicted or lost with its node; what the step wrote last, with the
name of its pod, says how it ended.
"""

from __future__ import annotations

from abc import abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import BaseOperatorLink
from airflow.sdk.exceptions import AirflowException
from kubernetes.client import models as k8s

from dags.dag_support.perch_command import run_perch
from dags.dag_support.pod_spec import ENGINE_STEPS, LABELS, pod_annotations, pod_template, require_pod_settings
from dags.dag_support.project import PROJECT_DIR
from dags.dag_support.stage_command import announce_outlets, stage_links, stage_timeout, stage_words
from pipelines.params import load_params
from pipelines.settings import get_settings

if TYPE_CHECKING:
    from airflow.sdk import Context

_GRACE_S = 60  # to hand over checkpoints and give the run back
_SCHEDULE_LIMIT_S = 1800  # a node with a GPU may have to be started first
_START_LIMIT_S = 900  # and pull a large image
_LOG_PAUSE_S = 10


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
        outcome = run_perch(SubprocessHook(), "runs", "outcome", run_id, self.stage, "--json")
        result = dict(outcome.result)
        if result.pop("by", None) != event["name"]:
            raise failure or AirflowException(
                f"{self.stage}: pod {event['name']} has ended and left no outcome; it can be tried again"
            )
        self.links = result.pop("links", {})
        outcome.raise_for_exit(self.stage)
        announce_outlets(self, context, result, run_id)
        context["ti"].xcom_push(key="return_value", value=result)
