from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.progress import ImageProgress
from pipelines.data.shards import read_images
from pipelines.errors import Refusal
from pipelines.modeling.comparison import Comparison, compare
from pipelines.modeling.evaluation_data import load_evaluation_data
from pipelines.modeling.inference import OnnxPredictor


def compare_run(run: Any) -> Comparison:
    workspace = run.workspace
    data = load_evaluation_data(workspace)
    originals = partial(read_images, workspace.raw)
    return compare(data, workspace.model / "model.onnx", workspace.reference, originals, ImageProgress)


def test_compare__no_champion__has_nobody(make_evaluation_run: Any) -> None:
    comparison = compare_run(make_evaluation_run())
    assert comparison.kind == "none"
    assert comparison.name == "no champion yet"
    assert len(comparison.rows) == 0


def test_compare__same_contract__asks_about_every_test_image(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(skill=0.7)
    comparison = compare_run(run)
    assert comparison.name == "champion v3"
    assert not comparison.same_file
    np.testing.assert_array_equal(comparison.rows, np.arange(120))
    expected = OnnxPredictor(run.workspace.reference / "model.onnx").predict(np.load(run.workspace.splits / "test.npy"))
    np.testing.assert_array_equal(comparison.probabilities, expected)


def test_compare__images_the_champion_was_trained_on__are_left_out(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(trained_on=set(run.test_sha256[10:30]))
    comparison = compare_run(run)
    assert comparison.seen == 20
    assert set(range(10, 30)).isdisjoint(comparison.rows.tolist())
    assert len(comparison.rows) == 100


def test_compare__champion_takes_larger_images__gets_them_from_the_original_bytes(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(side_px=16)
    comparison = compare_run(run)
    own = OnnxPredictor(run.workspace.model / "model.onnx").predict(np.load(run.workspace.splits / "test.npy"))
    agreement = (comparison.probabilities.argmax(axis=1) == own.argmax(axis=1)).mean()
    assert agreement > 0.95


def test_compare__champion_with_other_order_and_fewer_classes__is_put_in_this_models_order(
    make_evaluation_run: Any,
) -> None:
    run = make_evaluation_run(labels=("0", "1", "2"))
    run.write_champion(labels=("0", "1"))
    comparison = compare_run(run)
    assert comparison.labels == ("0", "1")
    assert comparison.model_only == ("2",)
    assert comparison.unknown + len(comparison.rows) == 120
    assert comparison.unknown > 10
    assert (comparison.probabilities[:, 2] == 0).all()


def test_compare__champion_of_another_problem__has_no_class_in_common(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion(labels=("cat", "dog"))
    comparison = compare_run(run)
    assert comparison.labels == ()
    assert comparison.reference_only == ("cat", "dog")
    assert comparison.unknown == 120


def test_compare__the_very_same_file__is_recognised(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion()
    assert compare_run(run).same_file


def test_compare__champion_file_changed__is_refused(make_evaluation_run: Any) -> None:
    run = make_evaluation_run()
    run.write_champion()
    file: Path = run.workspace.reference / "model.onnx"
    file.write_bytes((run.workspace.model / "model.onnx").read_bytes() + b"\x00\x00")
    with pytest.raises(Refusal):
        compare_run(run)
