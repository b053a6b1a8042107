"""The way to MLflow: a database that is made whole or not at all, artifacts of a server that is gone, clear errors."""

import os
from pathlib import Path

import pytest

from pipelines.errors import PerchError
from pipelines.registry.connection import Mlflow, page_url, with_mlflow
from pipelines.registry.mlflow_database import ensure_database
from pipelines.settings import Settings


def test_ensure_database__killed_before_it_is_whole__leaves_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", die)
        with pytest.raises(KeyboardInterrupt):
            ensure_database(tmp_path / "mlflow" / "mlflow.db")
    assert list((tmp_path / "mlflow").iterdir()) == []


def test_ensure_database__there_already__is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"somebody's")
    ensure_database(file)
    assert file.read_bytes() == b"somebody's"


def test_artifacts__of_a_server_that_is_gone__are_read_from_its_folder(registry_settings: Settings) -> None:
    stored = registry_settings.home / "mlflow" / "artifacts" / "7"

    def record(mlflow: Mlflow) -> str:
        # What a server notes for an experiment it creates.
        experiment = mlflow.client.create_experiment("served", artifact_location="mlflow-artifacts:/7")
        return str(mlflow.client.create_run(experiment).info.run_id)

    run_id = with_mlflow(registry_settings, record)
    (stored / run_id / "artifacts").mkdir(parents=True)
    (stored / run_id / "artifacts" / "note.txt").write_text("kept")

    def read(mlflow: Mlflow) -> str:
        return Path(mlflow.artifacts(run_id).download_artifacts("note.txt")).read_text()

    assert with_mlflow(registry_settings, read) == "kept"


def test_with_mlflow__request_refused__names_mlflow_and_the_cause(registry_settings: Settings) -> None:
    with pytest.raises(PerchError, match=r"MLflow at sqlite:.* refused: .*nobody"):
        with_mlflow(registry_settings, lambda mlflow: mlflow.client.get_run("nobody"))


def test_page_url__server_with_a_password__does_not_show_it() -> None:
    settings = Settings(mlflow_uri="https://user:secret@mlflow.example.org/base/")
    assert page_url(settings, "runs", "a b") == "https://mlflow.example.org/base/#/runs/a%20b"
    assert page_url(Settings(mlflow_uri="sqlite:///x.db"), "runs", "a") is None
