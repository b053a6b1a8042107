"""What a stage's task does in any runner: the words of its command, its buttons, and what it makes of the result."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import attrs
from airflow.sdk import BaseOperator, BaseOperatorLink

from dags.dag_support.candidates import describe_candidate
from dags.dag_support.form import form_overrides
from dags.dag_support.project import PROJECT_DIR
from pipelines.params import load_params

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.types import TaskInstanceKey

_TIMEOUTS = {"model_training": timedelta(hours=24), "trials": timedelta(hours=24), "data_ingestion": timedelta(hours=6)}
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


def stage_links(stage: str) -> list[BaseOperatorLink]:
    """The MLflow run, and the stage's report where it has one."""
    titles = ["MLflow run", *([_REPORT_OF[stage]] if stage in _REPORT_OF else [])]
    return [ResultLink(title) for title in titles]


def stage_timeout(stage: str) -> timedelta:
    """How long a try of a stage may take."""
    return _TIMEOUTS.get(stage, _TIMEOUT)


def requested_by(context: Context) -> str:
    """Who asked for the DAG run."""
    run = context["dag_run"]
    return getattr(run, "triggering_user_name", None) or str(run.run_type)


def stage_words(stage: str, run_id: str, context: Context) -> list[str]:
    """The command's words after `perch`.

    Args:
        stage: the stage.
        run_id: of the Perch run.
        context: of the task.
    """
    run = context["dag_run"]
    overrides = form_overrides(context.get("params", {}), load_params(PROJECT_DIR / "params.yaml"))
    return [
        *(stage, "--run", run_id, "--conf", json.dumps(overrides)),
        *("--as-of", (run.logical_date or run.run_after).date().isoformat()),
        *("--by", requested_by(context), "--json"),
    ]


def announce_outlets(operator: BaseOperator, context: Context, result: dict[str, Any], run_id: str) -> None:
    """Let what the task makes known to other DAGs say what it is about."""
    for outlet in operator.outlets:
        context["outlet_events"][outlet].extra = describe_candidate(
            result,
            run_id=run_id,
            requested_by=requested_by(context),
            limits=(context["dag_run"].conf or {}).get("release"),
        )
