"""Registration on a real registry and a real ledger: once, whatever happens between any two of its writes."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.ledger import Ledger
from pipelines.registry.models import find_disagreements, get_version, list_versions, read_card
from pipelines.registry.registration import collect_evidence, register
from pipelines.settings import Settings
from pipelines.stages import model_registration

MakeRun = Callable[..., Workspace]
MODEL = "shapes-classification"


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Axe:
    """Kills before or after the n-th write to MLflow or to the ledger."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlflow import MlflowClient
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        self.writes: list[str] = []
        self.die_at: int | None = None
        self.after = False
        for owner, name in (
            (LocalArtifactRepository, "log_artifacts"),
            (MlflowClient, "create_registered_model"),
            (MlflowClient, "create_model_version"),
            (MlflowClient, "delete_model_version"),
            (MlflowClient, "set_model_version_tag"),
            (MlflowClient, "set_registered_model_alias"),
            (Ledger, "append"),
        ):
            monkeypatch.setattr(owner, name, self._wrap(name, getattr(owner, name)))

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            number = len(self.writes)
            self.writes.append(name)
            if number == self.die_at and not self.after:
                raise Killed
            answer = call(*arguments, **keywords)
            if number == self.die_at:
                raise Killed
            return answer

        return guarded

    def strike(self, number: int, *, after: bool) -> None:
        self.writes, self.die_at, self.after = [], number, after

    def rest(self) -> None:
        self.die_at = None


WRITES = [
    *("log_artifacts", "log_artifacts", "create_registered_model", "create_model_version", "append"),
    *("set_model_version_tag", "set_model_version_tag", "set_registered_model_alias"),
]


def disagreements(settings: Settings) -> list[str]:
    ledger = Ledger(settings.ledger_url)
    return ledger.verify() + find_disagreements(
        MODEL, list_versions(settings, MODEL), ledger.entries(), candidate_alias="candidate"
    )


def test_register__first_model__is_version_1_with_its_evidence(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run("run-1")
    result = model_registration.run(registry_params, workspace)
    assert result.summary == "shapes-classification v1, candidate"
    assert (result.version, result.alias, result.run_id, result.ledger_sequence) == ("1", "candidate", "run-1", 1)

    (version,) = list_versions(registry_settings, MODEL)
    onnx_sha256 = hashlib.sha256((workspace.model / "model.onnx").read_bytes()).hexdigest()
    assert version.aliases == ("candidate",)
    assert version.accuracy == (0.963, 0.926, 0.985)
    assert version.data_rows == 110
    assert version.tags["perch.onnx_sha256"] == onnx_sha256
    assert version.tags["perch.data_md5"] == "0badc0de.dir"
    assert version.tags["perch.validation"] == "14 of 14 expectations met"
    assert version.tags["perch.verdict"] == "passed 1 of 1 checks"
    assert version.tags["perch.ledger_sha256"] == result.ledger_sha256
    assert read_card(registry_settings, version).startswith("# Card of run-1")

    (record,) = Ledger(registry_settings.ledger_url).entries()
    evidence = json.loads(record.evidence)
    assert evidence == collect_evidence(workspace)
    assert (
        evidence["files"]["evaluation/verdict.json"]
        == hashlib.sha256((workspace.evaluation / "verdict.json").read_bytes()).hexdigest()
    )
    assert version.tags["perch.evidence_sha256"] == evidence["evidence_sha256"] == "5d0f" * 16
    assert disagreements(registry_settings) == []


def test_register__registered_model__loads_and_is_the_judged_file(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    workspace = make_run()
    register(registry_settings, registry_params, workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry_settings.tracking_uri)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{MODEL}@candidate"))
    assert (folder / "model.onnx").read_bytes() == (workspace.model / "model.onnx").read_bytes()
    model = mlflow.pyfunc.load_model(str(folder))
    images = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    assert model.predict({"images": images})["probabilities"].shape == (3, 2)
    assert [spec.name for spec in model.metadata.signature.outputs] == ["logits", "probabilities"]


def test_register__same_run_twice__changes_nothing(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    first = model_registration.run(registry_params, workspace)
    before = list_versions(registry_settings, MODEL)
    assert model_registration.run(registry_params, workspace) == first
    assert list_versions(registry_settings, MODEL) == before
    assert len(Ledger(registry_settings.ledger_url).entries()) == 1


def test_register__undisturbed__writes_in_the_order_that_the_next_test_cuts(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    axe = Axe(monkeypatch)
    register(registry_settings, registry_params, make_run())
    assert axe.writes == WRITES


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(len(WRITES)), ids=[f"{n}-{name}" for n, name in enumerate(WRITES)])
def test_register__killed_at_a_write__is_completed_by_the_second_call(
    registry_settings: Settings,
    registry_params: Params,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    after: bool,
) -> None:
    workspace = make_run()
    axe = Axe(monkeypatch)
    axe.strike(number, after=after)
    with pytest.raises(Killed):
        register(registry_settings, registry_params, workspace)
    axe.rest()
    registration = register(registry_settings, registry_params, workspace)
    assert (registration.version, registration.alias_version, registration.ledger_sequence) == (1, 1, 1)
    assert len(list_versions(registry_settings, MODEL)) == 1
    assert len(Ledger(registry_settings.ledger_url).entries()) == 1
    assert disagreements(registry_settings) == []


def test_register__creation_answered_twice__keeps_the_lowest_version(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    create = MlflowClient.create_model_version

    def create_twice(*arguments: Any, **keywords: Any) -> Any:
        create(*arguments, **keywords)
        return create(*arguments, **keywords)

    monkeypatch.setattr(MlflowClient, "create_model_version", create_twice)
    assert register(registry_settings, registry_params, make_run()).version == 1
    assert [version.version for version in list_versions(registry_settings, MODEL)] == [1]


def test_register__second_run__takes_the_alias_and_the_first_gets_it_never_back(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    first, second = make_run("run-1", seed=1), make_run("run-2", seed=2)
    register(registry_settings, registry_params, first)
    assert register(registry_settings, registry_params, second).version == 2
    again = model_registration.run(registry_params, first)
    assert again.summary == "shapes-classification v1; candidate stays v2"
    assert again.alias == ""
    assert get_version(registry_settings, MODEL, 2).aliases == ("candidate",)
    assert disagreements(registry_settings) == []


def test_run__model_file_of_an_earlier_version__is_registered_with_a_note(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    del registry_settings  # the environment's
    summaries = [
        model_registration.run(registry_params, make_run(run_id, seed=seed)).summary
        for run_id, seed in (("run-1", 1), ("run-2", 2), ("run-3", 1), ("run-1", 1))
    ]
    assert summaries == [
        f"{MODEL} v1, candidate",
        f"{MODEL} v2, candidate",
        f"{MODEL} v3, candidate; the same model file as v1",
        f"{MODEL} v1; candidate stays v3",
    ]


def test_register__version_lost_in_mlflow__is_made_anew_under_a_new_number(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    first, second = make_run("run-1", seed=1), make_run("run-2", seed=2)
    register(registry_settings, registry_params, first)
    register(registry_settings, registry_params, second)
    with_mlflow(registry_settings, lambda mlflow: mlflow.client.delete_model_version(MODEL, "1"))
    assert register(registry_settings, registry_params, first).version == 3
    assert [record.version for record in Ledger(registry_settings.ledger_url).entries()] == ["1", "2", "3"]


def test_register__row_lost_in_the_ledger__is_written_again(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    register(registry_settings, registry_params, workspace)
    for suffix in ("", "-wal", "-shm"):
        (registry_settings.home / f"ledger.db{suffix}").unlink(missing_ok=True)
    assert "names row 1 of the ledger, which is gone" in disagreements(registry_settings)[0]
    assert register(registry_settings, registry_params, workspace).version == 1
    assert len(Ledger(registry_settings.ledger_url).entries()) == 1
    assert disagreements(registry_settings) == []


def test_register__mlflow_reset_under_the_ledger__is_refused_and_taken_back(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    Ledger(registry_settings.ledger_url).append(
        "registered", model=MODEL, version="1", evidence={"run_id": "old"}, key=f"registered:{MODEL}:1"
    )
    with pytest.raises(Refusal, match=r"is run old's in the ledger \(row 1\)"):
        register(registry_settings, registry_params, make_run())
    assert list_versions(registry_settings, MODEL) == []


def test_register__gate_not_passed__is_refused_with_the_failed_checks(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run(passed=False)
    with pytest.raises(Refusal) as refusal:
        model_registration.run(registry_params, workspace)
    assert f"read {workspace.evaluation / 'model_card.html'};" in str(refusal.value)
    assert "did not pass 1 of 2 checks" in str(refusal.value)
    assert "accuracy 0.800 [0.700, 0.880], limit 0.85" in str(refusal.value)
    assert list_versions(registry_settings, MODEL) == []
    assert Ledger(registry_settings.ledger_url).entries() == []


def test_register__verdict_says_passed_but_a_check_failed__is_refused(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run(passed=False)
    file = workspace.evaluation / "verdict.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"passed": True}))
    with pytest.raises(Refusal, match="did not pass"):
        register(registry_settings, registry_params, workspace)


def test_register__never_evaluated__is_refused(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    (workspace.evaluation / "verdict.json").unlink()
    with pytest.raises(Refusal, match="was not evaluated"):
        register(registry_settings, registry_params, workspace)


def test_register__model_changed_after_training__is_refused(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    workspace = make_run()
    file = workspace.model / "model.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(Refusal, match="was changed after training"):
        register(registry_settings, registry_params, workspace)


def test_find_disagreements__alias_moved_by_hand__is_named(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run("run-1", seed=1))
    register(registry_settings, registry_params, make_run("run-2", seed=2))
    with_mlflow(registry_settings, lambda mlflow: mlflow.client.set_registered_model_alias(MODEL, "candidate", "1"))
    assert disagreements(registry_settings) == [f"alias candidate of {MODEL} points at v1, the ledger's is v2"]


def test_find_disagreements__end_of_the_ledger_cut_off__is_seen_from_mlflow(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    register(registry_settings, registry_params, make_run("run-1", seed=1))
    register(registry_settings, registry_params, make_run("run-2", seed=2))
    with sqlite3.connect(registry_settings.home / "ledger.db") as connection:
        connection.execute("DROP TRIGGER perch_ledger_no_delete")
        connection.execute("DELETE FROM perch_ledger WHERE sequence = 2")
    assert Ledger(registry_settings.ledger_url).verify() == []
    assert any("names row 2 of the ledger, which is gone" in problem for problem in disagreements(registry_settings))


def test_find_disagreements__version_registered_past_the_ledger__is_named(
    registry_settings: Settings, registry_params: Params, make_run: MakeRun
) -> None:
    registration = register(registry_settings, registry_params, make_run())

    def register_by_hand(mlflow: Mlflow) -> None:
        source = mlflow.client.get_run(registration.mlflow_run_id).info.artifact_uri
        mlflow.client.create_model_version(MODEL, source, registration.mlflow_run_id)

    with_mlflow(registry_settings, register_by_hand)
    assert disagreements(registry_settings) == [f"{MODEL} v2 is in MLflow, but the ledger has never registered it"]
