"""The exported model as the evaluation uses it: its contract, and probabilities for many images at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from pydantic import ValidationError

from pipelines.core.contract import CONTRACT_KEY, INPUT_NAME, PROBABILITIES_NAME, ModelContract
from pipelines.errors import Refusal

Images = np.ndarray[Any, np.dtype[np.uint8]]
Probabilities = np.ndarray[Any, np.dtype[np.float32]]

_BATCH_BYTES = 2**23  # of input; the network's activations take a multiple of it
_MAX_BATCH_IMAGES = 128


class OnnxPredictor:
    """An exported model on the CPU.

    Batches run side by side, each on one thread, so that the number of cores changes the speed and not the result.

    Args:
        path: of an ONNX file that carries its `ModelContract`.

    Attributes:
        contract: what the model takes and gives.

    Raises:
        Refusal: the file is missing, is not ONNX, or carries no contract.
    """

    contract: ModelContract

    def __init__(self, path: Path) -> None:
        self._name = f"the model {path.parent.name}/{path.name}"
        way_out = "run model_training again; it writes the file"
        if not path.is_file():
            raise Refusal(self._name, "is missing", way_out=way_out)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            text = self._session.get_modelmeta().custom_metadata_map.get(CONTRACT_KEY, "")
            self.contract = ModelContract.model_validate_json(text)
        except ValidationError:
            raise Refusal(self._name, f"carries no readable contract in {CONTRACT_KEY}", way_out=way_out) from None
        except Exception as error:  # ONNX Runtime has a dozen kinds for a file that it cannot use
            raise Refusal(self._name, f"cannot be loaded: {error}", way_out=way_out) from error

    def predict(self, images: Images, batch_images: int | None = None) -> Probabilities:
        """Probabilities float32 `(N, classes)` in the order of the contract's labels.

        Args:
            images: uint8 `(N, size_px, size_px, channels)`; a memory map is read batch by batch.
            batch_images: images per batch; by default as many as fit 8 MiB, at most 128.

        Raises:
            Refusal: the images or the model's answer have not the shape that the contract promises.
        """
        shape = (self.contract.input.size_px, self.contract.input.size_px, self.contract.input.channels)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise Refusal(
                f"the images for {self._name}", f"are {images.dtype} {images.shape}", limit=f"uint8 (N, *{shape})"
            )
        classes = len(self.contract.labels)
        size = batch_images or max(1, min(_MAX_BATCH_IMAGES, _BATCH_BYTES // int(np.prod(shape))))
        starts = range(0, len(images), size)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            batches = list(pool.map(lambda start: self._run(images[start : start + size]), starts))
        probabilities = np.concatenate([np.zeros((0, classes), np.float32), *batches])
        if probabilities.shape != (len(images), classes):
            raise Refusal(
                f"the probabilities of {self._name}",
                f"have the shape {probabilities.shape}",
                limit=f"{(len(images), classes)}, by its contract",
            )
        return probabilities

    def predict_batches(self, batches: Iterator[Images]) -> Probabilities:
        """As `predict`, for images that come in pieces and need not be held together."""
        return np.concatenate([np.zeros((0, len(self.contract.labels)), np.float32), *map(self.predict, batches)])

    def _run(self, batch: Images) -> Probabilities:
        probabilities: Probabilities = self._session.run(
            [PROBABILITIES_NAME], {INPUT_NAME: np.ascontiguousarray(batch)}
        )[0]
        return probabilities
