"""Enters a model that passed its gate in MLflow's registry and in the ledger: once, whatever happens in between.

The order of the writes makes that hold.  Each is safe to repeat, and each finds by itself whether it was done:

1. the files go to the run's artifacts, where a second upload replaces equal by equal;
2. the version is created with all its tags in one request; it is found again by the run id among them;
3. the ledger's row is keyed by model and version;
4. the version is tagged with its row's hash, and only now does the alias move.

So a kill leaves at worst a version that nothing points at, and the next call goes on from it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.contract import CONTRACT_KEY, INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME, ModelContract
from pipelines.core.file_hash import hash_file
from pipelines.core.gates import GateCheck, Verdict
from pipelines.core.results import read_json
from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.candidate import move_candidate
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import EVIDENCE_FOLDER, MODEL_FOLDER, find_model, find_versions
from pipelines.registry.tracking import artifact_url, data_md5, ensure_run
from pipelines.settings import Settings

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

ACCURACY_CHECK = "accuracy"  # the gate's check that carries the test accuracy with its interval
INT8_MODEL = "model_int8.onnx"  # beside the model, where it won
_REQUIREMENTS = ("numpy", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Registration:
    """Where a model was entered.

    Attributes:
        run_id: the Perch run.
        version: in MLflow's registry.
        alias_version: that the candidate alias points at now; another one when this run is an old one, None when
            staging has turned all away.
        mlflow_run_id: of the run that holds the files.
        ledger_sequence: number of the ledger's row.
        ledger_sha256: hash of the ledger's row.
        same_as: the latest version before it with the very same model file; None where the model is new.
    """

    run_id: str
    version: int
    alias_version: int | None
    mlflow_run_id: str
    ledger_sequence: int
    ledger_sha256: str
    same_as: int | None


def register(settings: Settings, params: Params, workspace: Workspace) -> Registration:
    """Register a run's model, or find that it is registered.

    Raises:
        Refusal: the model did not pass, is not the one that was trained, or the ledger contradicts.
        TryLater: MLflow or the ledger's database did not answer.
    """
    evidence = collect_evidence(workspace)
    mlflow_run_id = ensure_run(settings, params, workspace)
    ledger = Ledger(settings.ledger_url)
    try:
        with_mlflow(settings, lambda mlflow: _upload(mlflow, mlflow_run_id, workspace))
        card = artifact_url(settings, mlflow_run_id, f"{EVIDENCE_FOLDER}/model_card.html")
        version = with_mlflow(
            settings, lambda mlflow: _ensure_version(mlflow, params.model_name, mlflow_run_id, evidence, card)
        )
        _refuse_reused_number(settings, params.model_name, version, evidence["run_id"], ledger)
        record = ledger.append(
            "registered",
            model=params.model_name,
            version=str(version),
            evidence=evidence,
            key=f"registered:{params.model_name}:{version}",
        )
        tags = {"perch.ledger_sequence": str(record.sequence), "perch.ledger_sha256": record.row_sha256}
        with_mlflow(settings, lambda mlflow: _tag(mlflow, params.model_name, version, tags))
        alias_version = move_candidate(settings, ledger, params.model_name, params.model_registration.candidate_alias)
        same_as = _find_same_model(ledger, params.model_name, record.sequence, evidence["model"]["onnx_sha256"])
    finally:
        ledger.close()
    return Registration(
        evidence["run_id"], version, alias_version, mlflow_run_id, record.sequence, record.row_sha256, same_as
    )


def collect_evidence(workspace: Workspace) -> dict[str, Any]:
    """What the registration rests on, with a digest of every file; equal runs give equal evidence.

    Raises:
        Refusal: the gate's verdict is missing or negative, or the model is not the one that was trained.
    """
    verdict = _read_passed_verdict(workspace)
    accuracy = next(check for check in verdict.checks if check.name == ACCURACY_CHECK)
    training = read_json(workspace.model / "training.json")
    manifest = read_json(workspace.raw / "manifest.json")
    validation = read_json(workspace.validation / "validation.json")
    run = read_json(workspace.run_file)
    onnx_sha256 = hash_file(workspace.model / "model.onnx")
    if onnx_sha256 != training["onnx_sha256"]:
        raise Refusal(
            f"model/model.onnx of run {run['run_id']}",
            f"has SHA-256 {onnx_sha256[:16]}…",
            limit=f"{training['onnx_sha256'][:16]}… was trained and judged",
            way_out="the file was changed after training; run the run's model_training and model_evaluation again",
        )
    int8 = workspace.model / INT8_MODEL
    judged = sum(check.judged for check in verdict.checks)
    return {
        "run_id": run["run_id"],
        "git_sha": run["git_sha"],
        "git_clean": run["git_clean"],
        "data": {"sha256": manifest["data_sha256"], "md5": data_md5(workspace), "rows": manifest["rows"]},
        "model": {
            "onnx_sha256": onnx_sha256,
            "int8_sha256": hash_file(int8) if int8.is_file() else None,
            "weights_sha256": training["weights_sha256"],
        },
        "validation": {
            "met": validation["met"],
            "total": validation["total"],
            "suites": {suite["name"]: suite["success"] for suite in validation["suites"]},
        },
        "verdict": {"passed": judged, "judged": judged, "checks": len(verdict.checks)},
        "test_accuracy": {"value": accuracy.value, "low": accuracy.low, "high": accuracy.high},
        # The hash that the model card shows to whoever decides.
        "evidence_sha256": read_json(workspace.result_file("model_evaluation"))["evidence_sha256"],
        "files": {
            str(path.relative_to(workspace.root)): hash_file(path) for path in _evidence_files(workspace).values()
        },
    }


def _read_passed_verdict(workspace: Workspace) -> Verdict:
    file = workspace.evaluation / "verdict.json"
    if not file.is_file():
        raise Refusal(
            "the model", "was not evaluated: evaluation/verdict.json is missing", way_out="run model_evaluation first"
        )
    verdict = Verdict.model_validate_json(file.read_text(encoding="utf-8"))
    if verdict.passed and not verdict.failed:
        return verdict
    lines = "".join(f"\n  {describe_check(check)}" for check in verdict.failed)
    raise Refusal(
        f"the model of run {read_json(workspace.run_file)['run_id']}",
        f"did not pass {len(verdict.failed)} of {len(verdict.checks)} checks:{lines}\n ",
        limit="only a model that passed is registered",
        way_out=f"read {workspace.evaluation / 'model_card.html'}; better data or training, or a changed limit in "
        "model_evaluation",
    )


def describe_check(check: GateCheck) -> str:
    """A check of the verdict in one line: `accuracy 0.812 [0.774, 0.846], limit 0.85`."""
    text = check.name
    if check.value is not None:
        text += f" {check.value:.3f}"
    if check.low is not None and check.high is not None:
        text += f" [{check.low:.3f}, {check.high:.3f}]"
    if check.limit is not None:
        text += f", limit {check.limit:g}"
    return text + (f" ({check.detail})" if check.detail else "")


def _evidence_files(workspace: Workspace) -> dict[str, Path]:
    """Name among the artifacts to file: what a later run is compared with, and what an auditor reads."""
    return {
        "images.parquet": workspace.splits / "images.parquet",
        "manifest.json": workspace.raw / "manifest.json",
        "validation.json": workspace.validation / "validation.json",
        "training.json": workspace.model / "training.json",
        "metrics.json": workspace.evaluation / "metrics.json",
        "verdict.json": workspace.evaluation / "verdict.json",
        "model_card.html": workspace.evaluation / "model_card.html",
        "model_card.md": workspace.evaluation / "model_card.md",
    }


def _upload(mlflow: Mlflow, mlflow_run_id: str, workspace: Workspace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        evidence = Path(temporary) / "evidence"
        evidence.mkdir()
        for name, path in _evidence_files(workspace).items():
            shutil.copyfile(path, evidence / name)
        model = Path(temporary) / "model"
        _write_mlflow_model(workspace, model)
        artifacts = mlflow.artifacts(mlflow_run_id)
        artifacts.log_artifacts(str(evidence), EVIDENCE_FOLDER)
        artifacts.log_artifacts(str(model), MODEL_FOLDER)


def _write_mlflow_model(workspace: Workspace, folder: Path) -> None:
    """Make the folder that `mlflow.onnx.load_model` and `mlflow.pyfunc.load_model` read, around the very same file."""
    import mlflow.onnx
    import onnx

    source = workspace.model / "model.onnx"
    model = onnx.load(source)
    contract = next(entry.value for entry in model.metadata_props if entry.key == CONTRACT_KEY)
    mlflow.onnx.save_model(
        model,
        str(folder),
        signature=_signature(ModelContract.model_validate_json(contract)),
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in _REQUIREMENTS],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,
    )
    # MLflow serialises the model anew; registered is the file that was judged, byte for byte.
    shutil.copyfile(source, folder / "model.onnx")
    int8 = workspace.model / INT8_MODEL
    if int8.is_file():
        shutil.copyfile(int8, folder / int8.name)


def _signature(contract: ModelContract) -> ModelSignature:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    size, outputs = contract.input.size_px, (-1, len(contract.labels))
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, size, size, contract.input.channels), INPUT_NAME)]),
        outputs=Schema([TensorSpec(np.dtype("float32"), outputs, name) for name in (LOGITS_NAME, PROBABILITIES_NAME)]),
    )


def _ensure_version(
    mlflow: Mlflow, model: str, mlflow_run_id: str, evidence: Mapping[str, Any], card: str | None
) -> int:
    """The version of this run, created where there is none."""
    from mlflow.exceptions import MlflowException

    if find_model(mlflow, model) is None:
        try:
            mlflow.client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was quicker
                raise
    if not _versions_of_run(mlflow, model, evidence["run_id"]):
        uri = mlflow.client.get_run(mlflow_run_id).info.artifact_uri
        mlflow.client.create_model_version(
            model,
            source=f"{uri}/{MODEL_FOLDER}",
            run_id=mlflow_run_id,
            tags=_version_tags(evidence, mlflow_run_id),
            description=_describe_version(evidence, card),
        )
    # An answer may be lost and the request made again, or two processes may be at it.  The lowest version counts;
    # whoever made a higher one sees the lower one here and takes its own back.
    version, *surplus = _versions_of_run(mlflow, model, evidence["run_id"])
    for number in surplus:
        mlflow.client.delete_model_version(model, str(number))
    return version


def _refuse_reused_number(settings: Settings, model: str, version: int, run_id: str, ledger: Ledger) -> None:
    """Take the version back where the ledger knows its number as another run's: MLflow's numbering began anew."""
    for record in ledger.entries(model):
        owner = json.loads(record.evidence).get("run_id")
        if record.event == "registered" and record.version == str(version) and owner != run_id:
            with_mlflow(settings, lambda mlflow: mlflow.client.delete_model_version(model, str(version)))
            raise Refusal(
                f"{model} v{version}",
                f"is run {owner}'s in the ledger (row {record.sequence}), and MLflow gave the number to run {run_id}",
                limit="one number, one model",
                way_out="MLflow's database was reset: restore it, or begin a new ledger with PERCH_DATABASE_URL",
            )


def _find_same_model(ledger: Ledger, model: str, before: int, onnx_sha256: str) -> int | None:
    """The latest version registered before a row of the ledger whose model file is the same, byte for byte."""
    same = [
        int(record.version)
        for record in ledger.entries(model)
        if record.event == "registered"
        and record.sequence < before
        and json.loads(record.evidence).get("model", {}).get("onnx_sha256") == onnx_sha256
    ]
    return same[-1] if same else None


def _versions_of_run(mlflow: Mlflow, model: str, run_id: str) -> list[int]:
    return sorted(version.version for version in find_versions(mlflow, model) if version.run_id == run_id)


def _version_tags(evidence: Mapping[str, Any], mlflow_run_id: str) -> dict[str, str]:
    validation, verdict, accuracy = evidence["validation"], evidence["verdict"], evidence["test_accuracy"]
    return {
        "perch.run_id": evidence["run_id"],
        "perch.mlflow_run_id": mlflow_run_id,
        "perch.git_sha": evidence["git_sha"],
        "perch.git_clean": json.dumps(evidence["git_clean"]),
        "perch.data_sha256": evidence["data"]["sha256"],
        "perch.data_md5": evidence["data"]["md5"],
        "perch.data_rows": str(evidence["data"]["rows"]),
        "perch.onnx_sha256": evidence["model"]["onnx_sha256"],
        "perch.weights_sha256": evidence["model"]["weights_sha256"],
        "perch.validation": f"{validation['met']} of {validation['total']} expectations met",
        "perch.suites": json.dumps(validation["suites"], sort_keys=True),
        "perch.verdict": f"passed {verdict['passed']} of {verdict['judged']} checks",
        "perch.test_accuracy": f"{accuracy['value']:.6f}",
        "perch.test_accuracy_low": f"{accuracy['low']:.6f}",
        "perch.test_accuracy_high": f"{accuracy['high']:.6f}",
        "perch.evidence_sha256": evidence["evidence_sha256"],
    }


def _describe_version(evidence: Mapping[str, Any], card: str | None) -> str:
    accuracy = evidence["test_accuracy"]
    where = f"[Model card]({card})" if card else f"Model card: `{EVIDENCE_FOLDER}/model_card.html` of its run"
    return (
        f"Run {evidence['run_id']} on {evidence['data']['rows']:,} images: "
        f"test accuracy {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}].\n\n{where}"
    )


def _tag(mlflow: Mlflow, model: str, version: int, tags: Mapping[str, str]) -> None:
    for key, value in tags.items():
        mlflow.client.set_model_version_tag(model, str(version), key, value)
