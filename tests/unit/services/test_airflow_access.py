"""What a person is told of Airflow: where it is, and how a version goes live there."""

from __future__ import annotations

from pathlib import Path

from pipelines.services.airflow_access import how_to_release
from pipelines.settings import Settings


def test_how_to_release__airflow_is_somewhere__names_dag_address_form_and_answer(tmp_path: Path) -> None:
    assert how_to_release(Settings(home=tmp_path, airflow_uri="http://airflow.test"), "3") == (
        "in Airflow trigger the DAG model_release at http://airflow.test/dags/model_release "
        "with 3 in the form's field Version, then `perch approve 3`"
    )


def test_how_to_release__nothing_runs_here__begins_with_perch_up(tmp_path: Path) -> None:
    assert how_to_release(Settings(home=tmp_path), "3") == (
        "`perch up`, then in Airflow trigger the DAG model_release with 3 in the form's field Version, "
        "then `perch approve 3`"
    )
