"""What tests of several packages share: a finished run's files, and a home with an MLflow database."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from pipelines.core.workspace import Workspace
from pipelines.params import Params
from pipelines.settings import Settings, get_settings

MakeRun = Callable[..., Workspace]
MountSmallDisk = Callable[[int], Path]

# Tests that several targets share stand in a module of their own; an assertion that fails there says its values, too.
pytest.register_assert_rewrite("tests.integration.release_target_behaviour")

# The same examples each time, however busy the machine: `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture
def mount_small_disk(tmp_path: Path) -> Iterator[MountSmallDisk]:
    """Mounts an empty file system of so many KiB; neither every user nor every container may."""
    mounted: list[Path] = []

    def mount(size_kib: int) -> Path:
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small file system needs root")
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine does not let its tests mount a file system: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's migrations take seconds: once per session."""
    from pipelines.registry.connection import with_mlflow

    home = tmp_path_factory.mktemp("mlflow-template")
    with_mlflow(Settings(home=home), lambda mlflow: mlflow.client.search_experiments())
    return home / "mlflow" / "mlflow.db"


@pytest.fixture
def registry_settings(
    tmp_path: Path, empty_mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """Settings of a fresh home, also as the environment's; MLflow and the ledger are SQLite files in it."""
    project, home = tmp_path / "project", tmp_path / "home"
    project.mkdir()
    (project / "params.yaml").write_text("dataset: shapes\nmodel_name: shapes-classification\n")
    (home / "mlflow").mkdir(parents=True)
    shutil.copyfile(empty_mlflow_database, home / "mlflow" / "mlflow.db")
    monkeypatch.setenv("PERCH_PROJECT_DIR", str(project))
    monkeypatch.setenv("PERCH_HOME", str(home))
    monkeypatch.delenv("PERCH_MLFLOW_URI", raising=False)
    monkeypatch.delenv("PERCH_DATABASE_URL", raising=False)
    get_settings.cache_clear()
    yield get_settings()
    get_settings.cache_clear()


@pytest.fixture
def registry_params() -> Params:
    return Params(dataset="shapes", model_name="shapes-classification")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes the workspace of a run whose stages have all ended, around a real ONNX file of a few weights."""

    def make(run_id: str = "run-1", *, seed: int = 1, passed: bool = True) -> Workspace:
        workspace = Workspace(tmp_path / "runs" / run_id)
        accuracy = {"value": 0.963, "low": 0.926, "high": 0.985} if passed else {"value": 0.8, "low": 0.7, "high": 0.88}
        floor = {"name": "accuracy", "passed": passed, "judged": True, "limit": 0.85, "detail": "", **accuracy}
        skipped = {"name": "accuracy drop", "passed": True, "judged": False, "value": None, "low": None}
        skipped |= {"high": None, "limit": 0.02, "detail": "no champion yet"}
        files: dict[Path, Any] = {
            workspace.run_file: {
                "run_id": run_id,
                "created": f"2026-11-01T02:00:{seed:02d}+00:00",
                "git_sha": "3e9d1c2" + "0" * 33,
                "git_clean": True,
                "overrides": {"model_training.epochs": 3},
                "requested_by": "somebody",
                "python": "3.11.2",
                "packages": {"torch": "2.13.0", "numpy": "2.1.0"},
            },
            workspace.raw / "manifest.json": {
                "dataset": "shapes",
                "source": "https://example.org/shapes.npz",
                "as_of": "2026-11-01",
                "labels": {"circle": 50, "square": 60},
                "rows": 110,
                "quarantined": 2,
                "data_sha256": hashlib.sha256(str(seed).encode()).hexdigest(),
            },
            workspace.validation / "validation.json": {
                "met": 14,
                "total": 14,
                "suites": [{"name": "images", "success": True}, {"name": "splits", "success": True}],
            },
            workspace.evaluation / "verdict.json": {"passed": passed, "checks": [floor, skipped]},
            workspace.evaluation / "metrics.json": {"overall": {"images": 50, "accuracy": accuracy, "roc_auc": None}},
            workspace.reference / "reference.json": {"kind": "none"},
        }
        _write_onnx(workspace.model / "model.onnx", seed)
        onnx_sha256 = hashlib.sha256((workspace.model / "model.onnx").read_bytes()).hexdigest()
        training = {
            "onnx_sha256": onnx_sha256,
            "weights_sha256": "77ab" * 16,
            "hyperparameters": {"learning_rate": 0.1},
        }
        files[workspace.model / "training.json"] = training
        for stage, metrics, reports in (
            ("data_ingestion", {"data/images": 110.0}, {}),
            ("data_validation", {"data/met": 14.0}, {"Data Docs": "data/validation/data_docs"}),
            ("model_training", {"val/accuracy": 0.95, "val/[odd] label": 0.5}, {}),
            ("model_evaluation", {"test/accuracy": accuracy["value"]}, {"Model card": "evaluation/model_card.html"}),
        ):
            result = {"summary": f"{stage} is done", "metrics": metrics, "reports": reports}
            files[workspace.result_file(stage)] = result
        files[workspace.result_file("model_evaluation")]["evidence_sha256"] = "5d0f" * 16
        for path, tree in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(tree, indent=2))
        _write_text_files(workspace, run_id)
        return workspace

    return make


def _write_text_files(workspace: Workspace, run_id: str) -> None:
    texts = {
        workspace.params_file: "dataset: shapes\nmodel_name: shapes-classification\n",
        workspace.root / "dvc.lock": "schema: '2.0'\nstages:\n  data_ingestion:\n    outs:\n"
        "    - {path: data/raw, hash: md5, md5: 0badc0de.dir}\n    - {path: data/quarantine.parquet, md5: 1}\n",
        workspace.splits / "images.parquet": f"images of {run_id}",
        workspace.model / "curves.csv": "epoch,metric,value\n"
        "1,train/loss,0.9\n2,train/loss,0.5\n3,train/loss,0.4\n"
        "1,val/accuracy,0.8\n2,val/accuracy,0.95\n3,val/accuracy,0.9\n",
        workspace.evaluation / "model_card.html": f"<!doctype html><h1>Card of {run_id}</h1>",
        workspace.evaluation / "model_card.md": f"# Card of {run_id}\n\nIt tells circles from squares.\n",
        workspace.validation / "data_docs" / "index.html": "<!doctype html><h1>Data Docs</h1>",
        workspace.validation / "data_docs" / "static" / "style.css": "h1 {color: red}",
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _write_onnx(path: Path, seed: int) -> None:
    """Write a linear classifier over 8x8 grey images, as small as its contract allows."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from pipelines.core.contract import CONTRACT_KEY, InputContract, ModelContract

    weights = np.random.default_rng(seed).normal(size=(64, 2)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["float"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 8, 8, 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in ("logits", "probabilities")],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    contract = ModelContract(input=InputContract(size_px=8, channels=1, resize="squash"), labels=("circle", "square"))
    helper.set_model_props(model, {CONTRACT_KEY: contract.model_dump_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, str(path))
