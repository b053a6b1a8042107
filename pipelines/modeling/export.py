"""The trained network as one ONNX file that carries its own normalisation and contract, checked against PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from pipelines.core.contract import CONTRACT_KEY, INPUT_NAME, LOGITS_NAME, PROBABILITIES_NAME, ModelContract
from pipelines.errors import Refusal
from pipelines.modeling.inference import OnnxPredictor

OPSET = 20
_PARITY_BATCH = 32
_PARITY_SINGLES = 8

Images = np.ndarray[Any, np.dtype[np.uint8]]


class ExportedNet(nn.Module):
    """What is exported: the network's logits, divided by its temperature, and their softmax."""

    def __init__(self, network: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """From uint8 `(N, H, W, C)` to logits and probabilities, float32 `(N, classes)`."""
        logits = self.network(images) / self.temperature
        return logits, logits.softmax(dim=1)


def export_onnx(network: nn.Module, contract: ModelContract, path: Path, *, temperature: float = 1.0) -> None:
    """Write the network as ONNX with a free batch size; equal weights give equal bytes.

    Args:
        network: on the CPU, in evaluation mode, from uint8 `(N, H, W, C)` to logits.
        contract: goes into the file's metadata under `CONTRACT_KEY`.
        path: of the new file.
        temperature: what the logits are divided by.
    """
    side, channels = contract.input.size_px, contract.input.channels
    example = torch.zeros(2, side, side, channels, dtype=torch.uint8)
    with _quiet_exporter():
        program = torch.onnx.export(
            ExportedNet(network, temperature).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[LOGITS_NAME, PROBABILITIES_NAME],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    model = program.model_proto
    _strip_traces(model)
    set_contract(model, contract)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def set_contract(model: onnx.ModelProto, contract: ModelContract) -> None:
    """Make the contract the model's only metadata."""
    del model.metadata_props[:]
    model.metadata_props.add(key=CONTRACT_KEY, value=contract.model_dump_json())


def open_session(path: Path, *, threads: int = 0) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU; 0 threads takes one per core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure_parity(network: nn.Module, path: Path, images: Images, *, temperature: float = 1.0) -> float:
    """The largest absolute difference of a probability between PyTorch and the file, one by one and in batches.

    Args:
        network: what was exported.
        path: the ONNX file.
        images: uint8 `(N, H, W, C)`, N at least 1.
        temperature: what it was exported with.
    """
    exported, predictor = ExportedNet(network, temperature).eval(), OnnxPredictor(path)
    starts = range(0, len(images), _PARITY_BATCH)
    with torch.inference_mode():
        expected = np.concatenate(
            [exported(torch.tensor(images[start : start + _PARITY_BATCH]))[1].numpy() for start in starts]
        )
    singles = images[:_PARITY_SINGLES]
    in_batches = np.abs(predictor.predict(images, _PARITY_BATCH) - expected).max()
    one_by_one = np.abs(predictor.predict(singles, 1) - expected[: len(singles)]).max()
    return float(np.maximum(in_batches, one_by_one))  # NaN wins, unlike in max()


def compute_logits(network: nn.Module, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The network's own logits, float32 `(N, classes)`, of uint8 images `(N, H, W, C)`, batch by batch."""
    starts = range(0, len(images), _PARITY_BATCH)
    with torch.inference_mode():
        return np.concatenate(
            [network(torch.tensor(images[start : start + _PARITY_BATCH])).numpy() for start in starts]
        )


def refuse_disparity(difference: float, limit: float) -> None:
    """Stop where the exported model is not the trained one.

    Raises:
        Refusal: the difference is above the limit, or not a number.
    """
    if not difference <= limit:
        raise Refusal(
            "the exported model's probabilities",
            f"differ from PyTorch's by up to {difference:.3g}",
            limit=f"{limit:g}, model_training.max_parity_difference",
            way_out="raise the limit if the difference is harmless, or choose another network or precision",
        )


def _strip_traces(model: onnx.ModelProto) -> None:
    """Take out what depends on the machine or the exporter's mood: source lines, paths, doc strings."""
    model.doc_string = ""
    for graph in (model.graph, *model.functions):
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in graph.value_info:
            value.doc_string = ""
            del value.metadata_props[:]
    for entry in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]


@contextlib.contextmanager
def _quiet_exporter() -> Any:
    """The exporter prints its steps to standard output and warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
