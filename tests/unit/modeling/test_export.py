import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipelines.core.contract import CONTRACT_KEY, INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME, ModelContract
from pipelines.errors import Refusal
from pipelines.modeling.export import export_onnx, measure_parity, open_session, refuse_disparity
from pipelines.modeling.networks import NormalizedNet, PixelNormalization, SmallConvNet


def make_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    backbone = SmallConvNet(1, 3, widths=[8, 16], dropout=0.5)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return NormalizedNet(PixelNormalization([80.0], [95.0]), backbone).eval()


@pytest.fixture(scope="module")
def exported(training_data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(make_network(), training_data.contract, path)
    return path


def test_export_onnx__again__same_bytes_and_no_path_of_this_machine(training_data, exported, tmp_path):
    export_onnx(make_network(), training_data.contract, tmp_path / "again.onnx")
    content = exported.read_bytes()
    assert (tmp_path / "again.onnx").read_bytes() == content
    for trace in (str(Path.cwd()), str(tmp_path.parent), "site-packages", ".py"):
        assert trace.encode() not in content


def test_export_onnx__other_weights__other_bytes(training_data, exported, tmp_path):
    export_onnx(make_network(seed=1), training_data.contract, tmp_path / "other.onnx")
    assert (tmp_path / "other.onnx").read_bytes() != exported.read_bytes()


def test_export_onnx__the_file__carries_names_types_and_contract(training_data, exported):
    model = onnx.load(exported)
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == {
        CONTRACT_KEY: training_data.contract.model_dump(mode="json")
    }
    session = open_session(exported)
    (taken,), given = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == (INPUT_NAME, "tensor(uint8)", [8, 8, 1])
    assert [output.name for output in given] == [LOGITS_NAME, PROBABILITIES_NAME]
    assert ModelContract.model_validate_json(session.get_modelmeta().custom_metadata_map[CONTRACT_KEY])


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_export_onnx__any_batch__probabilities_are_the_softmax_of_the_logits(training_data, exported, batch):
    images = training_data.val.images[:batch]
    logits, probabilities = open_session(exported).run(None, {INPUT_NAME: images})
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert probabilities.shape == (batch, 3)
    assert np.allclose(probabilities, exponentials / exponentials.sum(axis=1, keepdims=True), atol=1e-6)


def test_measure_parity__the_exported_network__is_within_rounding(training_data, exported):
    assert measure_parity(make_network(), exported, training_data.val.images) < 1e-5


def test_measure_parity__one_weight_moved__is_the_largest_difference(training_data, exported):
    network = make_network()
    with torch.no_grad():
        network.backbone.head.bias[1] += 0.5
        images = torch.from_numpy(training_data.val.images)
        expected = (network(images).softmax(1) - make_network()(images).softmax(1)).abs().max().item()
    assert measure_parity(network, exported, training_data.val.images) == pytest.approx(expected, abs=1e-5)


def test_refuse_disparity__above_the_limit_or_not_a_number__names_value_and_limit():
    refuse_disparity(1e-3, 1e-3)
    with pytest.raises(Refusal, match=r"by up to 0.0011 \(limit: 0.001"):
        refuse_disparity(1.1e-3, 1e-3)
    with pytest.raises(Refusal, match="nan"):
        refuse_disparity(float("nan"), 1e-3)
