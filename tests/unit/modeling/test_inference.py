from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipelines.core.contract import CONTRACT_KEY
from pipelines.errors import Refusal
from pipelines.modeling.inference import OnnxPredictor


@pytest.fixture
def run(make_evaluation_run: Any) -> Any:
    return make_evaluation_run()


def test_predict__any_batch_size__gives_the_same_probabilities(run: Any) -> None:
    predictor = OnnxPredictor(run.workspace.model / "model.onnx")
    images = np.load(run.workspace.splits / "test.npy", mmap_mode="r")
    probabilities = predictor.predict(images)
    assert probabilities.shape == (120, 3)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(predictor.predict(images, batch_images=7), probabilities, atol=1e-6)
    np.testing.assert_array_equal(predictor.predict(images), probabilities)


def test_predict__no_images__gives_none(run: Any) -> None:
    predictor = OnnxPredictor(run.workspace.model / "model.onnx")
    assert predictor.predict(np.zeros((0, 8, 8, 1), np.uint8)).shape == (0, 3)


@pytest.mark.parametrize("images", [np.zeros((2, 9, 9, 1), np.uint8), np.zeros((2, 8, 8, 1), np.float32)])
def test_predict__images_of_another_shape_or_type__are_refused(run: Any, images: np.ndarray) -> None:
    with pytest.raises(Refusal, match="uint8"):
        OnnxPredictor(run.workspace.model / "model.onnx").predict(images)


def test_predictor__file_missing__is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="is missing"):
        OnnxPredictor(tmp_path / "model.onnx")


def test_predictor__file_damaged__is_refused(run: Any) -> None:
    file = run.workspace.model / "model.onnx"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(Refusal, match="cannot be loaded"):
        OnnxPredictor(file)


def test_predictor__file_without_contract__is_refused(run: Any) -> None:
    file = run.workspace.model / "model.onnx"
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, file)
    with pytest.raises(Refusal, match=CONTRACT_KEY):
        OnnxPredictor(file)
