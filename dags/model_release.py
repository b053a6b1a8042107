"""From a candidate to the champion: a person answers, then shadow and canary, each step judged by the release engine.

Runs when a candidate has passed in staging.  The engine (`pipelines/release/engine.py`) reads the recorded answer
itself and decides every step; a task that is marked as succeeded by hand releases nothing.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from dags.dag_support.candidates import candidate_asset
from dags.dag_support.default_args import default_args
from dags.dag_support.project import PROJECT_DIR
from dags.dag_support.rollout_tasks import (
    ASK_AGAIN,
    BEGIN,
    COMMENT,
    BeginRolloutOperator,
    ReleaseApprovalOperator,
    RolloutSensor,
    name_further_approvals,
)
from pipelines.params import load_params
from pipelines.settings import get_settings

with DAG(
    dag_id="model_release",
    description="Ask for an approval, then release behind a canary that takes itself back.",
    doc_md=__doc__,
    schedule=[candidate_asset()],
    catchup=False,
    max_active_runs=1,
    params={
        "version": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            title="Version",
            description="Release this version; empty takes the candidate that called for it.",
        )
    },
    default_args={**default_args(), "execution_timeout": timedelta(minutes=15)},
    tags=["perch"],
) as dag:
    assigned = [{"id": user, "name": user} for user in get_settings().approvers.split()]
    begin = BeginRolloutOperator(doc_md="Write down what is to be released, and what approvers are to read.")
    ask = ReleaseApprovalOperator(
        task_id="request_approval",
        subject="{{ ti.xcom_pull(task_ids='" + BEGIN + "')['subject'] }}",
        assigned_users=assigned,
        params=COMMENT,
        doc_md="Approve or reject, with a comment; silence is a no.",
    )
    ask_further = ReleaseApprovalOperator.partial(
        task_id="request_further_approvals",
        assigned_users=assigned,
        params=COMMENT,
        doc_md="One more for each further person that the promotion policy wants.",
        **ASK_AGAIN,
    ).expand(subject=name_further_approvals(begin.output))
    release = RolloutSensor(
        task_id="roll_out",
        release=load_params(PROJECT_DIR / "params.yaml").model_release,
        trigger_rule="none_failed",  # nobody further to ask is no reason to stop
        doc_md="Have the engine take its steps until the release is promoted or taken back.",
    )
    begin >> ask >> ask_further >> release
