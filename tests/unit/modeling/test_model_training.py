"""The stage `model_training` from its inputs to its outputs."""

import csv
import hashlib
import json
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.modeling.export import open_session
from pipelines.params import Params, check_params
from pipelines.stages import model_training


def make_params(**changes: object) -> Params:
    training = {"small_cnn": {"widths": [8, 16]}, "epochs": 3, "batch_size": 32, "learning_rate": 0.02, "int8": False}
    return check_params(
        {"dataset": "digits", "model_name": "digits-classification", "model_training": {**training, **changes}}
    )


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


def test_run__digits__leaves_the_files_of_the_contract(training_workspace):
    result = model_training.run(make_params(), training_workspace)
    assert set(digests(training_workspace.model)) == {"model.onnx", "curves.csv", "training.json"}
    record = json.loads((training_workspace.model / "training.json").read_text())
    assert record["onnx_sha256"] == result.onnx_sha256 == digests(training_workspace.model)["model.onnx"]
    assert record["weights_sha256"] == result.weights_sha256
    assert record["parity_images"] == 60
    assert record["parity_max_difference"] == result.metrics["model/parity_difference"] < 1e-4
    assert record["int8"]["kept"] is False
    assert result.summary == f"3 epochs, best {record['best_epoch']}, val/accuracy {result.metrics['val/accuracy']:.3f}"
    rows = list(csv.DictReader((training_workspace.model / "curves.csv").open()))
    best = {row["metric"]: float(row["value"]) for row in rows if int(row["epoch"]) == record["best_epoch"]}
    assert best["val/loss"] == pytest.approx(result.metrics["val/loss"])
    assert not training_workspace.checkpoints.exists()
    assert open_session(training_workspace.model / "model.onnx")


def test_run__stopped_early__says_after_which_epoch_and_which_was_best(training_workspace):
    result = model_training.run(
        make_params(epochs=9, patience_epochs=1, learning_rate=0.5, batch_size=8), training_workspace
    )
    record = json.loads((training_workspace.model / "training.json").read_text())
    assert record["stopped_early"]
    start = f"stopped after epoch {record['epochs_run']} of 9, best {record['best_epoch']}, val/accuracy"
    assert result.summary.startswith(start)
    assert record["best_epoch"] < record["epochs_run"] < 9


def test_run__again__same_bytes(training_workspace):
    first = model_training.run(make_params(trials=2, trial_epochs=1), training_workspace)
    files = digests(training_workspace.model)
    assert "trials.csv" in files
    for path in training_workspace.model.iterdir():
        path.unlink()
    assert model_training.run(make_params(trials=2, trial_epochs=1), training_workspace) == first
    assert digests(training_workspace.model) == files


@pytest.mark.parametrize("where", ["train", "measure_parity"])
def test_run__killed_and_started_again__same_bytes(training_workspace, tmp_path, where):
    uninterrupted = model_training.run(make_params(), training_workspace)
    files = digests(training_workspace.model)
    for path in training_workspace.model.iterdir():
        path.unlink()
    process = get_context("fork").Process(target=_run_until, args=(training_workspace, where))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert model_training.run(make_params(), training_workspace) == uninterrupted
    assert digests(training_workspace.model) == files


def _run_until(workspace: Workspace, where: str) -> None:
    import pytorch_lightning as pl

    from pipelines.modeling import export

    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if where == "train":
        original = pl.Trainer.save_checkpoint

        def save_then_kill(trainer: pl.Trainer, path: Path) -> None:
            original(trainer, path)
            if trainer.current_epoch == 1:
                kill()

        pl.Trainer.save_checkpoint = save_then_kill
    else:
        setattr(export, where, kill)
    model_training.run(make_params(), workspace)


def test_run__parity_beyond_the_limit__is_refused(training_workspace):
    with pytest.raises(Refusal, match=r"differ from PyTorch's by up to .* \(limit: 1e-12"):
        model_training.run(make_params(max_parity_difference=1e-12), training_workspace)


def test_run__int8_asked_for__record_and_file_agree(training_workspace):
    model_training.run(make_params(int8=True, min_int8_speedup=1.0), training_workspace)
    record = json.loads((training_workspace.model / "training.json").read_text())["int8"]
    assert record["kept"] == (training_workspace.model / "model_int8.onnx").is_file()
    assert record["accuracy_difference"] is not None


def test_run__killed_attempt_left_a_file__it_goes(training_workspace):
    training_workspace.model.mkdir()
    (training_workspace.model / "model_int8.onnx").write_bytes(b"stale")
    model_training.run(make_params(), training_workspace)
    assert not (training_workspace.model / "model_int8.onnx").exists()
