"""A stage as an Airflow task: the `perch` command in a process of its own, its log live, its result as XCom."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import attrs
from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import BaseOperator, BaseOperatorLink

from dags.dag_support.candidates import describe_candidate
from dags.dag_support.form import form_overrides
from dags.dag_support.perch_command import run_perch
from dags.dag_support.project import PROJECT_DIR
from pipelines.params import load_params

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.types import TaskInstanceKey

_TIMEOUTS = {"model_training": timedelta(hours=24), "data_ingestion": timedelta(hours=6)}
_TIMEOUT = timedelta(hours=1)
_REPORT_OF = {
    "data_validation": "Data Docs",
    "model_evaluation": "Model card",
    "deploy_to_staging": "Smoke tests",
}


@attrs.define()
class ResultLink(BaseOperatorLink):
    """A button on the task's page that leads to an address in the stage's result.

    Attributes:
        title: the button's text and the key in the result's `links`.
    """

    title: str = "MLflow run"

    @property
    def name(self) -> str:
        """The button's text."""
        return self.title

    @property
    def xcom_key(self) -> str:
        """Where Airflow keeps the address; the class's name alone would be the same for two buttons."""
        return f"_link_{self.title.lower().replace(' ', '_')}"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """The address, which the task that just ran knows."""
        return getattr(operator, "links", {}).get(self.title, "")


class StageOperator(BaseOperator):
    """Runs `perch <stage> --run <run id>` and returns the stage's result.

    A refusal (exit code 65) fails the task at once: trying again would be refused again.  Any other failure is tried
    again, and because every stage is idempotent, a try that follows a kill ends as if there had been none.

    Args:
        stage: the stage's name; the task id.
        run_prefix: set where another DAG's runs could have the same run id.
    """

    ui_color = "#e8f1f8"

    def __init__(self, *, stage: str, run_prefix: str = "", **kwargs: Any) -> None:
        kwargs.setdefault("execution_timeout", _TIMEOUTS.get(stage, _TIMEOUT))
        super().__init__(task_id=stage, **kwargs)
        self.stage = stage
        self.run_prefix = run_prefix
        self.links: dict[str, str] = {}
        self.hook: SubprocessHook | None = None

    @property
    def operator_extra_links(self) -> list[BaseOperatorLink]:
        """The MLflow run, and the stage's report where it has one."""
        titles = ["MLflow run", *([_REPORT_OF[self.stage]] if self.stage in _REPORT_OF else [])]
        return [ResultLink(title) for title in titles]

    def execute(self, context: Context) -> dict[str, Any]:
        """Run the stage and return `{"summary", "metrics", …}`."""
        run = context["dag_run"]
        requested_by = getattr(run, "triggering_user_name", None) or run.run_type
        overrides = form_overrides(context.get("params", {}), load_params(PROJECT_DIR / "params.yaml"))
        self.hook = SubprocessHook()
        outcome = run_perch(
            self.hook,
            *(self.stage, "--run", self.run_prefix + run.run_id, "--conf", json.dumps(overrides)),
            *("--as-of", (run.logical_date or run.run_after).date().isoformat()),
            *("--by", requested_by, "--json"),
        )
        result = outcome.result
        self.links = result.pop("links", {})
        outcome.raise_for_exit(self.stage)
        for outlet in self.outlets:
            context["outlet_events"][outlet].extra = describe_candidate(
                result,
                run_id=self.run_prefix + run.run_id,
                requested_by=requested_by,
                limits=(run.conf or {}).get("release"),
            )
        return result

    def on_kill(self) -> None:
        """End the process group: the stage's own process is a grandchild."""
        if self.hook is not None:
            self.hook.send_sigterm()
