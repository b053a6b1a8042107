from pathlib import Path

import numpy as np
import onnx
import pytest

from pipelines.core.contract import CONTRACT_KEY
from pipelines.modeling.export import export_onnx
from pipelines.modeling.quantization import QuantizationLimits, choose_calibration_images, quantize, try_int8
from pipelines.modeling.training import train
from pipelines.modeling.training_data import LabelledImages
from pipelines.params import ModelTrainingParams, SmallCNNParams

LENIENT = QuantizationLimits(min_speedup=0.0, max_accuracy_drop=0.1, confidence=0.95)


@pytest.fixture(scope="module")
def model(training_data, tmp_path_factory) -> Path:
    params = ModelTrainingParams(
        small_cnn=SmallCNNParams(widths=[8, 16]), epochs=3, batch_size=32, learning_rate=0.02, patience_epochs=5
    )
    path = tmp_path_factory.mktemp("quantization") / "model.onnx"
    export_onnx(train(training_data, params, seed=7).network, training_data.contract, path)
    return path


def test_try_int8__fast_enough_and_not_worse__is_kept_with_its_contract(training_data, model, tmp_path):
    target = tmp_path / "model_int8.onnx"
    outcome = try_int8(model, target, training_data, LENIENT, seed=7)
    assert outcome.kept
    assert outcome.check.value is not None
    assert abs(outcome.check.value) < 0.05
    quantized = onnx.load(target)
    assert [entry.key for entry in quantized.metadata_props] == [CONTRACT_KEY]
    assert any(node.op_type == "QuantizeLinear" for node in quantized.graph.node)


def test_try_int8__not_fast_enough__is_removed(training_data, model, tmp_path):
    limits = QuantizationLimits(min_speedup=1e6, max_accuracy_drop=0.1, confidence=0.95)
    outcome = try_int8(model, tmp_path / "model_int8.onnx", training_data, limits, seed=7)
    assert not outcome.kept
    assert outcome.reason == "not 1e+06 times as fast"
    assert not list(tmp_path.iterdir())


def test_try_int8__calibrated_on_black_images__is_worse_and_removed(training_data, model, tmp_path):
    black = LabelledImages(np.zeros_like(training_data.train.images), training_data.train.labels)
    data = type(training_data)(**{**training_data.__dict__, "train": black})
    outcome = try_int8(model, tmp_path / "model_int8.onnx", data, LENIENT, seed=7)
    assert not outcome.kept
    assert "worse" in outcome.reason
    assert not list(tmp_path.iterdir())


def test_quantize__again__same_bytes(training_data, model, tmp_path):
    images = choose_calibration_images(training_data.train, seed=7)
    for name in ("one", "two"):
        quantize(model, tmp_path / name, training_data.contract, images)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_choose_calibration_images__more_than_needed__takes_some_by_the_seed(training_data):
    many = LabelledImages(
        np.repeat(training_data.train.images, 4, axis=0), np.repeat(training_data.train.labels, 4, axis=0)
    )
    chosen = choose_calibration_images(many, seed=7)
    assert chosen.shape == (256, 8, 8, 1)
    assert np.array_equal(chosen, choose_calibration_images(many, seed=7))
    assert not np.array_equal(chosen, choose_calibration_images(many, seed=8))
