"""Every quarter of an hour: remove pods of steps that nobody waits for.  By hand only where steps are no pods."""

from __future__ import annotations

from airflow.sdk import DAG

from dags.dag_support.default_args import default_args
from dags.dag_support.stage_tasks import CommandOperator
from pipelines.settings import get_settings

with DAG(
    dag_id="pod_maintenance",
    description="Remove pods that outlived their task.",
    doc_md=__doc__,
    schedule="*/15 * * * *" if get_settings().runner == "kubernetes" else None,
    catchup=False,
    max_active_runs=1,
    default_args=default_args(),
    tags=["perch"],
) as dag:
    CommandOperator(task_id="clean_pods", words=["pods", "clean"], doc_md="`perch pods clean` does the same by hand.")
