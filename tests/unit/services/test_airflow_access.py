"""What a person is told of Airflow: where it is, and how a version goes live there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import Refusal, TryLater
from pipelines.services.airflow_access import how_to_release, open_airflow
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


def test_open_airflow__nothing_was_ever_up__says_perch_up_and_not_that_a_password_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TryLater, match="`perch up`"):
        open_airflow(Settings(home=tmp_path))


def test_open_airflow__airflow_is_elsewhere_without_a_password__says_which_settings(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="PERCH_AIRFLOW_PASSWORD"):
        open_airflow(Settings(home=tmp_path, airflow_uri="http://airflow.test"))
