"""Publishing on a real tracking store: everything arrives, and nothing arrives twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.core import patience
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal, TryLater
from pipelines.params import Params, check_params
from pipelines.registry import tracking
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.settings import Settings

MakeRun = Callable[..., Workspace]
STAGES = ("data_ingestion", "data_validation", "model_training", "model_evaluation")


def publish_all(settings: Settings, params: Params, workspace: Workspace) -> str:
    run_id = tracking.ensure_run(settings, params, workspace)
    for stage in STAGES:
        tracking.publish_stage(settings, params, workspace, stage, run_id)
    return run_id


def everything(settings: Settings, model: str) -> dict[str, Any]:
    """All that MLflow holds of the runs of an experiment: parameters, tags, histories, inputs, artifacts."""

    def read(mlflow: Mlflow) -> dict[str, Any]:
        experiment = mlflow.client.get_experiment_by_name(model)
        found = {}
        for run in mlflow.client.search_runs([experiment.experiment_id]):
            run_id = run.info.run_id
            found[run_id] = {
                "params": run.data.params,
                "tags": run.data.tags,
                "status": run.info.status,
                "history": {
                    name: [(m.step, m.value) for m in mlflow.client.get_metric_history(run_id, name)]
                    for name in run.data.metrics
                },
                "latest": run.data.metrics,
                "inputs": [(i.dataset.name, i.dataset.digest, i.dataset.source) for i in run.inputs.dataset_inputs],
                "artifacts": sorted(_list(mlflow.artifacts(run_id), None)),
            }
        return found

    return with_mlflow(settings, read)


def _list(artifacts: Any, path: str | None) -> list[str]:
    found: list[str] = []
    for entry in artifacts.list_artifacts(path):
        found += _list(artifacts, entry.path) if entry.is_dir else [entry.path]
    return found


def test_publish__whole_run__arrives_in_full(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CTX_DAG_RUN_ID", "scheduled__2026-11-01T02:00:00+00:00")
    workspace = make_run("run-1")
    run_id = publish_all(registry_settings, registry_params, workspace)
    runs = everything(registry_settings, "shapes-classification")
    assert list(runs) == [run_id]
    run = runs[run_id]
    assert run["params"]["model_training.small_cnn.widths"] == "[32, 64, 128]"
    assert run["params"]["data_ingestion.as_of"] == "null"
    assert run["params"]["model_training.class_weights"] == "true"
    tags = run["tags"]
    assert tags["mlflow.runName"] == tags["perch.run_id"] == "run-1"
    assert tags["airflow.run_id"] == "scheduled__2026-11-01T02:00:00+00:00"
    assert tags["perch.git_clean"] == "true"
    assert tags["perch.overrides"] == '{"model_training.epochs": 3}'
    assert tags["perch.data_md5"] == "0badc0de.dir"
    assert tags["perch.stage.data_ingestion"] == "done: data_ingestion is done"
    assert run["history"]["train/loss"] == [(1, 0.9), (2, 0.5), (3, 0.4)]
    assert run["history"]["test/accuracy"] == [(0, 0.963)]
    assert run["history"]["val/_odd_ label"] == [(0, 0.5)]
    name, digest, source = run["inputs"][0]
    assert (name, len(digest)) == ("shapes", 36)
    assert json.loads(source) == {"url": "https://example.org/shapes.npz"}
    assert {
        "data_validation/data_docs/index.html",
        "data_validation/data_docs/static/style.css",
        "dvc.lock",
        "environment.txt",
        "model_evaluation/model_card.html",
        "model_training/training.json",
        "params.yaml",
        "reference.json",
        "results/model_training.json",
        "run.json",
    } <= set(run["artifacts"])


def test_publish__number_that_is_also_a_curve__is_the_latest_value(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    run_id = publish_all(registry_settings, registry_params, make_run())
    # 0.95 is the exported epoch's, though the last epoch had 0.9.
    assert everything(registry_settings, "shapes-classification")[run_id]["latest"]["val/accuracy"] == 0.95


def test_publish__twice__adds_nothing(registry_settings: Settings, registry_params: Params, make_run: MakeRun) -> None:
    workspace = make_run()
    publish_all(registry_settings, registry_params, workspace)
    once = everything(registry_settings, "shapes-classification")
    publish_all(registry_settings, registry_params, workspace)
    assert everything(registry_settings, "shapes-classification") == once


def test_publish__curves_half_logged_by_a_killed_training__are_completed(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    run_id = tracking.ensure_run(registry_settings, registry_params, workspace)
    with_mlflow(registry_settings, lambda mlflow: mlflow.client.log_metric(run_id, "train/loss", 0.9, step=1))
    tracking.publish_stage(registry_settings, registry_params, workspace, "model_training", run_id)
    history = everything(registry_settings, "shapes-classification")[run_id]["history"]
    assert history["train/loss"] == [(1, 0.9), (2, 0.5), (3, 0.4)]


def test_publish__refused_then_done__tells_each(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    run_id = tracking.ensure_run(registry_settings, registry_params, workspace)
    refusal = workspace.refusal_file("data_validation")
    refusal.parent.mkdir()
    docs = {"Data Docs": "data/validation/data_docs"}
    refusal.write_text(json.dumps({"message": "labels: 3 unknown (limit: 0)", "reports": docs}))
    tracking.publish_stage(registry_settings, registry_params, workspace, "data_validation", run_id)
    run = everything(registry_settings, "shapes-classification")[run_id]
    assert run["tags"]["perch.stage.data_validation"] == "refused: labels: 3 unknown (limit: 0)"
    assert run["status"] == "FAILED"
    assert "data/met" not in run["latest"]
    assert "data_validation/data_docs/index.html" in run["artifacts"]

    refusal.unlink()
    tracking.publish_stage(registry_settings, registry_params, workspace, "data_validation", run_id)
    run = everything(registry_settings, "shapes-classification")[run_id]
    assert run["tags"]["perch.stage.data_validation"] == "done: data_validation is done"
    assert run["status"] == "RUNNING"


def test_publish__process_died_without_a_word__is_failed(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    run_id = tracking.ensure_run(registry_settings, registry_params, workspace)
    tracking.publish_stage(registry_settings, registry_params, workspace, "data_preprocessing", run_id)
    run = everything(registry_settings, "shapes-classification")[run_id]
    assert run["tags"]["perch.stage.data_preprocessing"].startswith("failed: ")


def test_publish__value_changed_by_a_second_try__is_the_latest_value(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    run_id = publish_all(registry_settings, registry_params, workspace)
    file = workspace.result_file("model_evaluation")
    file.write_text(file.read_text().replace("0.963", "0.97"))
    tracking.publish_stage(registry_settings, registry_params, workspace, "model_evaluation", run_id)
    assert everything(registry_settings, "shapes-classification")[run_id]["latest"]["test/accuracy"] == 0.97


def test_publish__after_tuning__logs_what_it_chose(registry_settings: Settings, make_run: MakeRun) -> None:
    tree = {"dataset": "shapes", "model_name": "shapes-classification", "model_training": {"trials": 2}}
    params, workspace = check_params(tree), make_run()
    run_id = tracking.ensure_run(registry_settings, params, workspace)
    tracking.publish_stage(registry_settings, params, workspace, "model_training", run_id)
    logged = everything(registry_settings, "shapes-classification")[run_id]["params"]
    assert (logged["model_training.learning_rate"], logged["tuned.learning_rate"]) == ("0.003", "0.1")


def test_ensure_run__killed_after_creation__is_described_by_the_next_call(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_run()

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_describe_run", die)
        with pytest.raises(KeyboardInterrupt):
            tracking.ensure_run(registry_settings, registry_params, workspace)
    run_id = tracking.ensure_run(registry_settings, registry_params, workspace)
    runs = everything(registry_settings, "shapes-classification")
    assert list(runs) == [run_id]
    assert runs[run_id]["params"]["seed"] == "7"
    assert "environment.txt" in runs[run_id]["artifacts"]


@pytest.mark.parametrize(
    "run_id", ["somebody's", "scheduled__2026-11-01T02:00:00+00:00", 'the "big" one', "100% `sure`"]
)
def test_ensure_run__odd_run_id__is_found_again(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, run_id: str
) -> None:
    workspace = make_run(run_id)
    assert tracking.ensure_run(registry_settings, registry_params, workspace) == tracking.find_run(
        registry_settings, registry_params, workspace
    )


def test_ensure_run__creation_answered_twice__keeps_to_the_earliest(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    run_id = tracking.ensure_run(registry_settings, registry_params, workspace)

    def create_again(mlflow: Mlflow) -> None:
        experiment = mlflow.client.get_run(run_id).info.experiment_id
        mlflow.client.create_run(experiment, tags={"perch.run_id": "run-1"})

    with_mlflow(registry_settings, create_again)
    assert tracking.ensure_run(registry_settings, registry_params, workspace) == run_id
    assert tracking.find_run(registry_settings, registry_params, workspace) == run_id


def test_ensure_run__very_long_parameter__is_cut_not_refused(registry_settings: Settings, make_run: MakeRun) -> None:
    params = check_params(
        {"dataset": "d", "model_name": "shapes-classification", "data_ingestion": {"source": "x" * 10_000}}
    )
    run_id = tracking.ensure_run(registry_settings, params, make_run())
    logged = everything(registry_settings, "shapes-classification")[run_id]["params"]["data_ingestion.source"]
    assert len(logged) == 6000


def test_ensure_run__deleted_experiment__is_refused_with_the_way_out(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    tracking.ensure_run(registry_settings, registry_params, workspace)

    def delete(mlflow: Mlflow) -> None:
        experiment = mlflow.client.get_experiment_by_name("shapes-classification")
        mlflow.client.delete_experiment(experiment.experiment_id)

    with_mlflow(registry_settings, delete)
    with pytest.raises(Refusal, match="mlflow experiments restore"):
        tracking.ensure_run(registry_settings, registry_params, make_run("run-2"))


def test_find_run__unknown_run__is_refused(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    with pytest.raises(Refusal, match="not known to MLflow"):
        tracking.find_run(registry_settings, registry_params, make_run())


def test_urls__without_a_server__are_none(registry_settings: Settings) -> None:
    assert tracking.run_url(registry_settings, "abc") is None
    assert tracking.artifact_url(registry_settings, "abc", "x.html") is None


@pytest.mark.parametrize(
    ("report", "artifact"),
    [
        ("evaluation/model_card.html", "s/model_card.html"),
        ("data/validation/data_docs", "s/data_docs/index.html"),
        ("data/validation/data_docs/index.html", "s/data_docs/index.html"),
        ("evaluation/figures", "s/figures"),
    ],
)
def test_report_artifact__file_folder_or_site__is_the_page_to_show(
    make_run: MakeRun, report: str, artifact: str
) -> None:
    assert tracking.report_artifact(make_run(), "s", report) == artifact


def test_ensure_run__server_away__asks_to_try_later_and_names_it(
    tmp_path: Path, registry_params: Params, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    settings = Settings(home=tmp_path / "home", mlflow_uri="http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TryLater, match=r"MLflow at http://127\.0\.0\.1:9: not reachable for 1 s"):
        tracking.ensure_run(settings, registry_params, make_run())
