"""Every day: read what is new at the source and hold it against the expectations, so that Sunday brings no surprise."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, CronTriggerTimetable

from dags.dag_support.default_args import default_args
from dags.dag_support.stage_tasks import stage_task

with DAG(
    dag_id="data_validation_pipeline",
    description="Ingest and validate, without training.",
    doc_md=__doc__,
    # Not the tick that has passed either: within a tenth of the interval after it Airflow would make up for that one.
    schedule=CronTriggerTimetable("0 5 * * *", timezone="UTC", run_immediately=timedelta(0)),
    catchup=False,
    max_active_runs=1,
    default_args=default_args(),
    tags=["perch"],
) as dag:
    # Its runs have ids of the same form as the training's, and must not share their workspaces.
    stage_task(stage="data_ingestion", run_prefix="validation__") >> stage_task(
        stage="data_validation", run_prefix="validation__"
    )
