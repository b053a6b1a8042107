"""The stage end to end on a small real run: what it measures, what it decides, what it writes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest

from pipelines.core.workspace import Workspace
from pipelines.errors import Refusal
from pipelines.params import Params
from pipelines.stages import model_evaluation


def evaluate(run: Any, **limits: Any) -> model_evaluation.ModelEvaluationResult:
    tree = {"dataset": "digits", "model_name": "digits-classification", "model_evaluation": {"bootstrap_samples": 100}}
    tree["model_evaluation"] |= limits
    return model_evaluation.run(Params.model_validate(tree), run.workspace)


def read_verdict(workspace: Workspace) -> dict[str, dict[str, Any]]:
    tree = json.loads((workspace.evaluation / "verdict.json").read_text())
    return {check["name"]: check for check in tree["checks"]}


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_run__first_model__passes_and_says_that_there_is_no_champion(
    make_evaluation_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_evaluation_run()
    result = evaluate(run)
    assert result.passed
    assert result.summary.endswith("floor 0.85, passed")
    assert result.metrics["gate/passed"] == 1
    assert result.metrics["test/accuracy_low"] < result.metrics["test/accuracy"] <= result.metrics["test/accuracy_high"]
    assert "test/accuracy_difference" not in result.metrics
    checks = read_verdict(run.workspace)
    for name in ("accuracy drop", "class 1 recall drop", "size 8 x 8 px accuracy drop", "source monday accuracy drop"):
        assert not checks[name]["judged"]
        assert checks[name]["passed"]
        assert checks[name]["detail"] == "no champion yet"
    judged = sum(check["judged"] for check in checks.values())
    for card in ("model_card.md", "model_card.html"):
        text = (run.workspace.evaluation / card).read_text()
        assert f"Passed all {judged} checks that can be judged" in text
        assert (
            f"{len(checks) - judged} more of the {len(checks)} under “Every check” cannot be judged: no champion"
            in text
        )
    assert "test images and" in capsys.readouterr().err
    assert digest(run.workspace.evaluation).keys() == {
        "figures/confusion.png",
        "figures/reliability.png",
        "metrics.json",
        "model_card.html",
        "model_card.md",
        "predictions.parquet",
        "verdict.json",
    }


def test_run__twice__writes_the_same_bytes(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(skill=0.8, seed=3)
    first = evaluate(run)
    written = digest(run.workspace.evaluation)
    assert evaluate(run) == first
    assert digest(run.workspace.evaluation) == written


def test_run__predictions__are_those_of_both_models(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(trained_on=set(run.test_sha256[:5]), skill=0.9)
    result = evaluate(run)
    table = pd.read_parquet(run.workspace.evaluation / "predictions.parquet")
    assert table["row"].tolist() == list(range(120))
    assert table["sha256"].tolist() == run.test_sha256
    right = table[["p_0", "p_1", "p_2"]].to_numpy().argmax(axis=1) == table["label_index"]
    assert right.mean() == pytest.approx(result.metrics["test/accuracy"])
    assert table["reference_p_0"].isna().tolist() == [True] * 5 + [False] * 115


def test_run__much_worse_than_the_champion__does_not_pass_but_keeps_the_evidence(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion()
    run.write_model(skill=0.2)
    result = evaluate(run, min_accuracy=0.1)
    assert not result.passed
    assert result.metrics["gate/passed"] == 0
    assert "not passed: accuracy drop" in result.summary
    check = read_verdict(run.workspace)["accuracy drop"]
    assert not check["passed"]
    assert check["high"] < -0.05
    assert "against champion v3" in check["detail"]
    assert "Not passed" in (run.workspace.evaluation / "model_card.html").read_text()


def test_run__champion_again__passes_even_on_a_handful_of_images(make_evaluation_run: Any) -> None:
    run = make_evaluation_run(test_images=24)
    run.write_champion()
    assert evaluate(run, min_accuracy=0.5).passed
    check = read_verdict(run.workspace)["accuracy drop"]
    assert check["judged"]
    assert "byte for byte" in check["detail"]


def test_run__accuracy_floor_within_the_interval__does_not_pass(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    result = evaluate(run, min_accuracy=0.98)
    assert result.metrics["test/accuracy"] >= 0.98 > result.metrics["test/accuracy_low"]
    assert not result.passed
    assert "not passed: accuracy" in result.summary


def test_run__one_class_forgotten__is_named(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion()
    file = run.workspace.model / "model.onnx"
    model = onnx.load(file)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    shifted = onnx.numpy_helper.to_array(bias) - np.array([0, 0, 30], np.float32)
    bias.CopyFrom(onnx.numpy_helper.from_array(shifted, "bias"))
    onnx.save(model, file)
    result = evaluate(run, min_accuracy=0.1, max_accuracy_drop=1.0, max_calibration_error=1.0)
    assert "class 2 recall drop" in result.summary
    assert "class 0 recall drop" not in result.summary


def test_run__slice_smaller_than_the_limit__is_shown_but_not_judged(make_evaluation_run: Any) -> None:
    run = make_evaluation_run(folders=("big",) * 11 + ("small",))
    run.write_champion()
    run.write_model(skill=0.2)
    evaluate(run)
    small = read_verdict(run.workspace)["source small accuracy drop"]
    assert not small["judged"]
    assert small["value"] is not None
    assert small["detail"] == "10 images, 20 needed to judge"
    assert read_verdict(run.workspace)["source big accuracy drop"]["judged"]


def test_run__champion_trained_on_every_test_image__does_not_pass_and_says_why(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(trained_on=set(run.test_sha256), skill=0.9)
    assert not evaluate(run).passed
    assert "trained on 120 of 120" in read_verdict(run.workspace)["accuracy drop"]["detail"]


def test_run__champion_of_another_problem__does_not_pass_and_says_why(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(labels=("cat", "dog"))
    assert not evaluate(run).passed
    assert "knows other classes (cat, dog)" in read_verdict(run.workspace)["accuracy drop"]["detail"]


def test_run__champion_knows_fewer_classes__is_compared_on_those(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(labels=("0", "1"))
    assert evaluate(run).passed
    checks = read_verdict(run.workspace)
    assert checks["accuracy drop"]["judged"]
    assert not checks["class 2 recall drop"]["judged"]
    assert "does not know this class" in checks["class 2 recall drop"]["detail"]


def test_run__sure_of_everything__has_a_calibration_error_that_blocks(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_model(skill=0.3, temperature=0.01)
    result = evaluate(run, min_accuracy=0.1, max_calibration_error=0.05)
    assert "calibration error" in result.summary
    assert "more sure than right" in read_verdict(run.workspace)["calibration error"]["detail"]


@pytest.mark.parametrize("test_images", [1, 2])
def test_run__hardly_any_test_image__is_judged_without_a_crash(make_evaluation_run: Any, test_images: int) -> None:
    run = make_evaluation_run(test_images=test_images)
    run.write_champion(skill=0.5)
    result = evaluate(run)
    assert not result.passed
    assert result.metrics["test/images"] == test_images


def test_run__no_test_image__is_refused(make_evaluation_run: Any) -> None:
    with pytest.raises(Refusal, match="the test split: holds no image"):
        evaluate(make_evaluation_run(test_images=0))


def test_run__probabilities_that_are_not_numbers__are_refused(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    file = run.workspace.model / "model.onnx"
    model = onnx.load(file)
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    weights.CopyFrom(onnx.numpy_helper.from_array(np.full((64, 3), np.nan, np.float32), "weights"))
    onnx.save(model, file)
    with pytest.raises(Refusal, match="finite numbers"):
        evaluate(run)


def test_run__model_of_other_classes_than_the_splits__is_refused(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.labels = ("a", "b", "c")
    run.write_model()
    with pytest.raises(Refusal, match="contract"):
        evaluate(run)


def test_run__splits_that_disagree__are_refused(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    np.save(run.workspace.splits / "test.npy", np.zeros((3, 8, 8, 1), np.uint8))
    with pytest.raises(Refusal, match="run data_preprocessing again"):
        evaluate(run)


def test_run__names_from_strangers__cannot_write_into_the_card(make_evaluation_run: Any) -> None:
    attack = "<script>alert('x')</script>"
    run = make_evaluation_run(labels=("0", attack, "| a | [b](javascript:x)"), folders=(attack.replace("/", ""), "b"))
    run.write_champion(labels=("0", attack, "| a | [b](javascript:x)"), skill=0.5)
    run.write_model(skill=0.4)
    evaluate(run)
    page = (run.workspace.evaluation / "model_card.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    text = (run.workspace.evaluation / "model_card.md").read_text()
    assert "<script" not in text.replace(r"\<", "")
    assert "[b](" not in text


def test_run__card__needs_no_other_file(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_model(skill=0.6)
    evaluate(run)
    page = (run.workspace.evaluation / "model_card.html").read_text()
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<link" not in page
    assert "url(" not in page
    assert str(run.workspace.root) not in page


def test_run__evidence_digest__changes_with_the_numbers(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    first = evaluate(run).evidence_sha256
    assert first in (run.workspace.evaluation / "model_card.html").read_text()
    assert first in (run.workspace.evaluation / "model_card.md").read_text()
    assert evaluate(run, min_accuracy=0.8).evidence_sha256 != first
