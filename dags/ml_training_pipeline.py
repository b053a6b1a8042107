"""From images to a release that passed in staging, every Sunday at 02:00 UTC: `dvc.yaml`, then what has effects."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, CronTriggerTimetable, chain

from dags.dag_support.candidates import candidate_asset
from dags.dag_support.default_args import default_args
from dags.dag_support.form import form_params
from dags.dag_support.project import PROJECT_DIR
from dags.dag_support.stage_tasks import stage_task
from dags.dag_support.trials import add_trials
from pipelines.core.stage_graph import read_stage_graph
from pipelines.params import load_params

with DAG(
    dag_id="ml_training_pipeline",
    description="From the source's images to a registered model, with the evidence that it is good enough.",
    doc_md=__doc__,
    # Not the tick that has passed either: within a tenth of the interval after it Airflow would make up for that one.
    schedule=CronTriggerTimetable("0 2 * * 0", timezone="UTC", run_immediately=timedelta(0)),
    # No start date either: with one, Airflow would make up for last Sunday the moment it first sees the DAG.
    catchup=False,
    max_active_runs=1,
    params=form_params(load_params(PROJECT_DIR / "params.yaml")),
    default_args=default_args(),
    tags=["perch"],
) as dag:
    stages = read_stage_graph(PROJECT_DIR / "dvc.yaml")
    tasks = {stage.name: stage_task(stage=stage.name, doc_md=stage.description) for stage in stages}
    for stage in stages:
        for upstream in stage.upstream:
            tasks[upstream] >> tasks[stage.name]
    add_trials(stages, tasks)
    last = [tasks[stage.name] for stage in stages if not any(stage.name in other.upstream for other in stages)]
    chain(
        last,
        stage_task(stage="model_registration", doc_md="Register the model, if it passed the gate."),
        stage_task(stage="model_packaging", doc_md="Make one signed file of the model and its service."),
        stage_task(
            stage="deploy_to_staging",
            doc_md="Start the release, ask it twelve smoke tests, and call for an approval.",
            outlets=[candidate_asset()],
        ),
        stage_task(stage="notify_team", doc_md="Tell the team what was registered and where its card is."),
    )
