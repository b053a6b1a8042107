import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig

from pipelines.core.contract import InputContract, ModelContract
from pipelines.errors import Refusal
from pipelines.modeling.export import export_onnx, measure_parity
from pipelines.modeling.huggingface import build_huggingface
from pipelines.modeling.networks import NormalizedNet, PixelNormalization
from pipelines.params import HuggingFaceParams


def contract(size_px: int = 32, channels: int = 1, classes: int = 3) -> ModelContract:
    labels = tuple(f"class {index:04}" for index in range(classes))
    return ModelContract(input=InputContract(size_px=size_px, channels=channels, resize="squash"), labels=labels)


def build(checkpoint: str, *, pretrained: bool = False, **images: int):
    torch.manual_seed(0)
    return build_huggingface(HuggingFaceParams(checkpoint=checkpoint, pretrained=pretrained), contract(**images))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A local folder, as `save_pretrained` leaves it: a tiny ResNet for five classes."""
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    folder = tmp_path_factory.mktemp("checkpoint")
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_build_huggingface__local_folder__has_a_head_for_the_classes(checkpoint, pretrained, channels):
    network = build(checkpoint, pretrained=pretrained, channels=channels)
    assert network(torch.rand(2, channels, 32, 32)).shape == (2, 3)


def test_build_huggingface__pretrained__has_the_folder_s_weights(checkpoint):
    original = AutoModelForImageClassification.from_pretrained(checkpoint).resnet.embedder.embedder.convolution.weight
    assert torch.equal(build(checkpoint, pretrained=True).model.resnet.embedder.embedder.convolution.weight, original)
    assert not torch.equal(build(checkpoint).model.resnet.embedder.embedder.convolution.weight, original)


def test_build_huggingface__grey_images__are_seen_as_three_equal_channels(checkpoint):
    network, grey = build(checkpoint).eval(), torch.rand(2, 1, 32, 32)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(("size", "parameters"), [("b0", 5_288_548), ("b4", 19_341_616)])
def test_build_huggingface__efficientnet__has_the_published_number_of_parameters(size, parameters):
    """Keras' EfficientNetB0 and B4 have 5,330,571 and 19,466,823, batch norm's statistics included."""
    network = build(f"google/efficientnet-{size}", size_px=64, classes=1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_build_huggingface__random_efficientnet__tells_images_apart():
    """As transformers initialises it, all logits are zero."""
    network = build("efficientnet-b0", size_px=64).train()
    logits = network(torch.rand(8, 1, 64, 64))
    assert logits.std(dim=0).min() > 1e-3


def test_build_huggingface__efficientnet__averages_batch_statistics_over_batches():
    network = build("efficientnet-b0", size_px=64)
    assert {m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_export_onnx__huggingface_network__equals_pytorch(checkpoint, tmp_path):
    network = NormalizedNet(PixelNormalization([100.0], [60.0]), build(checkpoint)).eval()
    export_onnx(network, contract(), tmp_path / "model.onnx")
    images = torch.randint(0, 256, (5, 32, 32, 1), dtype=torch.uint8).numpy()
    assert measure_parity(network, tmp_path / "model.onnx", images) < 1e-5


def test_build_huggingface__images_too_small__says_what_to_change():
    with pytest.raises(Refusal, match="cannot take images of 8x8 px") as caught:
        build("efficientnet-b0", size_px=8)
    assert "size_px" in caught.value.way_out


def test_build_huggingface__no_image_classifier__is_refused():
    with pytest.raises(Refusal, match="checkpoint bert: cannot be loaded"):
        build("bert")


@pytest.mark.parametrize("pretrained", [True, False])
def test_build_huggingface__neither_here_nor_reachable__shows_the_way_out(monkeypatch, pretrained):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refusal, match="neither a local folder nor on a reachable hub") as caught:
        build("some-org/some-network", pretrained=pretrained)
    assert "pretrained: false" in caught.value.way_out
