"""What every server under measurement is given: one registered model in the forms they need, and one image."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.core.contract import ModelContract
from pipelines.settings import Settings

SEED_IMAGE = 5  # of scikit-learn's digits; any will do, as long as all servers get the same


@dataclass(frozen=True)
class BenchModel:
    """A registered version and what was made of it.

    Attributes:
        name: of the registered model.
        version: its number.
        contract: of the ONNX file.
        onnx: the registered file.
        torchscript: the same network and weights for PyTorch, frozen, from uint8 pixels to logits.
        mlflow: the registered folder, as `mlflow models serve` takes it.
    """

    name: str
    version: int
    contract: ModelContract
    onnx: Path
    torchscript: Path
    mlflow: Path


def prepare_model(settings: Settings, model: str, folder: Path) -> BenchModel:
    """Fetch the newest registered version and convert it.

    Raises:
        RuntimeError: nothing is registered; a run that passes its gate registers a model.
    """
    import onnx

    from pipelines.core.contract import CONTRACT_KEY
    from pipelines.registry.connection import with_mlflow
    from pipelines.registry.models import MODEL_FOLDER, list_versions

    versions = list_versions(settings, model)
    if not versions:
        raise RuntimeError(f"{model} has no registered version in {settings.home}; `perch run` registers one")
    newest = versions[0]
    fetched = with_mlflow(
        settings,
        lambda mlflow: mlflow.artifacts(newest.mlflow_run_id).download_artifacts(MODEL_FOLDER, dst_path=str(folder)),
    )
    proto = onnx.load(Path(fetched) / "model.onnx")
    contract = ModelContract.model_validate_json(
        next(entry.value for entry in proto.metadata_props if entry.key == CONTRACT_KEY)
    )
    torchscript = folder / "model.torchscript.pt"
    _write_torchscript(proto, contract, torchscript)
    return BenchModel(model, newest.version, contract, Path(fetched) / "model.onnx", torchscript, Path(fetched))


def digit_png() -> bytes:
    """A handwritten digit of 28 x 28 grey pixels as PNG, about 400 bytes."""
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[SEED_IMAGE] * (255 / 16)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((28, 28), Image.Resampling.BILINEAR).save(stream, "PNG")
    return stream.getvalue()


def _write_torchscript(proto, contract: ModelContract, target: Path) -> None:
    """Put the ONNX file's weights back into the network they came from.

    The exporter folds each batch norm into the convolution before it, so that the weights return into the convolution
    and its bias into a batch norm that does nothing else; freezing folds them together again.
    """
    import onnx
    import torch

    from pipelines.modeling.networks import NormalizedNet, PixelNormalization, SmallConvNet

    arrays = {
        entry.name.removeprefix("network."): torch.from_numpy(onnx.numpy_helper.to_array(entry).copy())
        for entry in proto.graph.initializer
    }
    widths = [arrays[f"backbone.features.{block}.expand.0.weight"].shape[0] for block in _blocks(arrays)]
    backbone = SmallConvNet(contract.input.channels, len(contract.labels), widths=widths, dropout=0.0)
    network = NormalizedNet(
        PixelNormalization(
            arrays["normalization.mean"].flatten().tolist(), arrays["normalization.std"].flatten().tolist()
        ),
        backbone,
    ).eval()
    state = network.state_dict()
    for name, tensor in arrays.items():
        if name.endswith("_bias"):  # e.g. backbone.features.1.expand.0.weight_bias: of the norm after that convolution
            convolution = name.removesuffix(".weight_bias")
            before, _, number = convolution.rpartition(".")
            norm = f"{before}.{int(number) + 1}"
            state[f"{norm}.bias"] = tensor
            state[f"{norm}.running_var"] = state[f"{norm}.running_var"] - _norm_eps(network, norm)
        elif name in state:
            state[name] = tensor
    network.load_state_dict(state)
    side, channels = contract.input.size_px, contract.input.channels
    traced = torch.jit.trace(network, torch.zeros(1, side, side, channels, dtype=torch.uint8))
    torch.jit.freeze(traced).save(str(target))


def _norm_eps(network, norm: str) -> float:
    """What a batch norm adds to the variance, 1 here, before it divides by its root."""
    return float(network.get_submodule(norm).eps)


def _blocks(names) -> Iterator[int]:
    number = 1
    while f"backbone.features.{number}.expand.0.weight" in names:
        yield number
        number += 1
