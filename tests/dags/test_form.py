"""The trigger form refuses what `params.yaml` would refuse, and overrides only what differs from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.params import load_params

PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def airflow_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))


def test_form_overrides__nothing_changed__is_empty() -> None:
    from dags.dag_support.form import form_overrides, form_params

    params = load_params(PROJECT / "params.yaml")
    untouched = {name: param.resolve() for name, param in form_params(params).items()}
    assert form_overrides(untouched, params) == {}


def test_form_overrides__some_changed__holds_just_these() -> None:
    from dags.dag_support.form import form_overrides

    params = load_params(PROJECT / "params.yaml")
    chosen = {"epochs": 3, "network": params.model_training.network, "as_of": "2026-11-08"}
    assert form_overrides(chosen, params) == {"model_training.epochs": 3, "data_ingestion.as_of": "2026-11-08"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network", "resnet"),
        ("epochs", 0),
        ("epochs", "ten"),
        ("learning_rate", 0),
        ("learning_rate", 2.0),
        ("trials", -1),
        ("source", ""),
        ("as_of", "yesterday"),
    ],
)
def test_form_params__bad_value__is_refused(name: str, value: object) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    from dags.dag_support.form import form_params

    param = form_params(load_params(PROJECT / "params.yaml"))[name]
    with pytest.raises(ParamValidationError):
        param.resolve(value=value)
