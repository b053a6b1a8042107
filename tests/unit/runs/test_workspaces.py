"""A run's workspace is fixed when it begins: its parameters, code, suites and reference."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
import yaml

from pipelines.errors import Refusal
from pipelines.runs.workspaces import find_workspace, list_runs, open_workspace, resolve_params, write_dvc_config
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[3]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy2(PROJECT / "params.yaml", project)
    shutil.copy2(PROJECT / "dvc.yaml", project)
    shutil.copytree(PROJECT / "expectations", project / "expectations")
    return Settings(project_dir=project, home=tmp_path / "home", _env_file=None)


def test_open_workspace__new_run__snapshots_everything_the_run_depends_on(settings: Settings) -> None:
    workspace = open_workspace(settings, "r1", {"model_training.epochs": 3}, requested_by="a test")
    record = json.loads(workspace.run_file.read_text())
    assert record["run_id"] == "r1"
    assert record["overrides"] == {"model_training.epochs": 3}
    assert record["requested_by"] == "a test"
    assert yaml.safe_load(workspace.params_file.read_text())["model_training"]["epochs"] == 3
    assert (workspace.root / "pipelines" / "stages" / "data_ingestion.py").is_file()
    assert (workspace.expectations / "default").is_dir()
    assert json.loads((workspace.reference / "reference.json").read_text())["kind"] == "none"


def test_open_workspace__project_edited_afterwards__keeps_what_the_run_began_with(settings: Settings) -> None:
    open_workspace(settings, "r1", {})
    file = settings.project_dir / "params.yaml"
    file.write_text(file.read_text().replace("epochs: 20", "epochs: 1"))
    again = open_workspace(settings, "r1", {})
    assert yaml.safe_load(again.params_file.read_text())["model_training"]["epochs"] == 20


def test_open_workspace__same_run_other_overrides__is_refused(settings: Settings) -> None:
    open_workspace(settings, "r1", {"seed": 1})
    with pytest.raises(Refusal, match="fixed when it begins"):
        open_workspace(settings, "r1", {"seed": 2})


def test_open_workspace__override_that_yaml_reads_as_a_date__is_recorded_and_recognised(settings: Settings) -> None:
    workspace = open_workspace(settings, "r1", {"data_ingestion.as_of": date(2026, 11, 8)})
    record = json.loads(workspace.run_file.read_text())
    assert record["overrides"] == {"data_ingestion.as_of": "2026-11-08"}
    assert yaml.safe_load(workspace.params_file.read_text())["data_ingestion"]["as_of"] == "2026-11-08"
    for same in (date(2026, 11, 8), "2026-11-08"):
        assert open_workspace(settings, "r1", {"data_ingestion.as_of": same}) == workspace


def test_open_workspace__bad_override__leaves_nothing_behind(settings: Settings) -> None:
    with pytest.raises(Refusal, match=r"model_training\.epochs: value 0"):
        open_workspace(settings, "r1", {"model_training.epochs": 0})
    assert not settings.runs_dir.exists()


def test_open_workspace__airflow_run_id__becomes_a_plain_folder_name(settings: Settings) -> None:
    run_id = "manual__2026-11-08T10:00:00+00:00"
    workspace = open_workspace(settings, run_id, {})
    assert workspace.root.name == "manual__2026-11-08T10-00-00-00-00"
    assert find_workspace(settings, run_id) == workspace
    assert list_runs(settings) == [run_id]


@pytest.mark.parametrize("run_id", ["", "..", "/", "x" * 201])
def test_open_workspace__run_id_that_is_no_name__is_refused(settings: Settings, run_id: str) -> None:
    with pytest.raises(Refusal, match="run id"):
        open_workspace(settings, run_id, {})


def test_find_workspace__unknown_run__names_those_there_are(settings: Settings) -> None:
    open_workspace(settings, "known", {})
    with pytest.raises(Refusal, match="known"):
        find_workspace(settings, "unknown")


@pytest.mark.parametrize(
    ("overrides", "as_of", "expected"),
    [
        ({}, date(2026, 11, 8), date(2026, 11, 8)),
        ({"data_ingestion.as_of": "2026-11-01"}, date(2026, 11, 8), date(2026, 11, 1)),
    ],
)
def test_resolve_params__as_of__comes_from_the_override_before_the_run(
    settings: Settings, overrides: dict[str, str], as_of: date, expected: date
) -> None:
    assert resolve_params(settings, overrides, as_of=as_of).data_ingestion.as_of == expected


def test_open_workspace__pods_of_a_step_that_there_is_not__are_refused_with_the_nearest(settings: Settings) -> None:
    with pytest.raises(Refusal, match=r"pods\.steps\.model_trainig: there is no such step .*trials") as caught:
        open_workspace(settings, "r1", {"pods.steps": {"model_trainig": {"cpu": 8}}})
    assert caught.value.way_out.startswith("write model_training")
    open_workspace(settings, "r1", {"pods.steps": {"trials": {"cpu": 2}, "deploy_to_staging": {"cpu": 2}}})


def test_resolve_params__no_params_file__says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="PERCH_PROJECT_DIR"):
        resolve_params(Settings(project_dir=tmp_path, home=tmp_path), {})


def test_open_workspace__line_without_its_colon__points_at_the_line_above_the_named_one_too(settings: Settings) -> None:
    (settings.project_dir / "params.yaml").write_text("dataset: a\nmodel_name b\nseed: 7\n")
    with pytest.raises(Refusal, match=r"line 3(.|\n)*the line it names, or the one above it"):
        open_workspace(settings, "r1", {})


def remote_of(root: Path) -> dict[str, str]:
    """What DVC itself makes of the remote that a run's workspace names."""
    from dvc.config import Config

    remote: dict[str, str] = Config(str(root / ".dvc"))["remote"]["shared"]
    return remote


def test_write_dvc_config__runs_in_a_bucket__verifies_what_it_fetches_and_waits_as_perch_does(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PERCH_S3_TIMEOUT_S", "0.4")
    workspace = open_workspace(settings, "r1", {})
    shared = settings.model_copy(update={"runs_url": "s3://perch/team/", "s3_endpoint_url": "https://store:9000"})
    write_dvc_config(workspace, shared)
    remote = remote_of(workspace.root)
    assert remote["url"] == "s3://perch/team/dvc"
    assert remote["endpointurl"] == "https://store:9000"
    assert remote["verify"] is True
    assert (remote["connect_timeout"], remote["read_timeout"]) == (1, 1)  # whole seconds, and none means for ever
    assert "configpath" not in remote


@pytest.mark.parametrize(
    ("addressing", "host"), [("auto", "store:9000"), ("path", "store:9000"), ("virtual", "perch.store:9000")]
)
def test_write_dvc_config__addressing__is_that_of_perchs_own_clients(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, addressing: str, host: str
) -> None:
    from botocore.session import Session

    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PERCH_S3_ADDRESSING", addressing)
    workspace = open_workspace(settings, "r1", {})
    shared = settings.model_copy(update={"runs_url": "s3://perch", "s3_endpoint_url": "https://store:9000"})
    write_dvc_config(workspace, shared)
    remote = remote_of(workspace.root)
    monkeypatch.setenv("AWS_CONFIG_FILE", remote.get("configpath", str(tmp_path / "none")))  # as DVC sets it
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    client = Session().create_client("s3", region_name="us-east-1", endpoint_url=remote["endpointurl"])
    assert client.generate_presigned_url("get_object", {"Bucket": "perch", "Key": "k"}).startswith(f"https://{host}/")
