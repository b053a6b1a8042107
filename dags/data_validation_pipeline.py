"""Every day: read what is new at the source and hold it against the expectations, so that Sunday brings no surprise."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from dags.dag_support.notifiers import FailureNotice
from dags.dag_support.stage_tasks import StageOperator
from pipelines.settings import get_settings

with DAG(
    dag_id="data_validation_pipeline",
    description="Ingest and validate, without training.",
    doc_md=__doc__,
    schedule="0 5 * * *",
    catchup=False,
    max_active_runs=1,
    default_args={
        "owner": "perch",
        "retries": 3,
        "retry_delay": timedelta(seconds=get_settings().retry_delay_s),
        "retry_exponential_backoff": True,
        "max_retry_delay": timedelta(minutes=10),
        "on_failure_callback": FailureNotice(),
    },
    tags=["perch"],
) as dag:
    # Its runs have ids of the same form as the training's, and must not share their workspaces.
    StageOperator(stage="data_ingestion", run_prefix="validation__") >> StageOperator(
        stage="data_validation", run_prefix="validation__"
    )
