"""The exported model as the evaluation uses it: its contract, and probabilities for many images at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from pydantic import ValidationError

from pipelines.core.contract import CONTRACT_KEY, INPUT_NAME, PROBABILITIES_NAME, ModelContract
from pipelines.errors import Refusal

Images = np.ndarray[Any, np.dtype[np.uint8]]
Probabilities = np.ndarray[Any, np.dtype[np.float32]]


class Counter(Protocol):
    """Counts images that are done."""

    def advance(self, images: int = 1) -> None:
        """Count some more."""


ShowProgress = Callable[[str, int], AbstractContextManager[Counter]]
"""Opens a progress bar with a title and a number of images."""

_BATCH_BYTES = 2**23  # of input; the network's activations take a multiple of it
_MAX_BATCH_IMAGES = 128


class OnnxPredictor:
    """An exported model on the CPU.

    Batches run side by side, each on one thread, so that the number of cores changes the speed and not the result.

    Args:
        path: of an ONNX file that carries its `ModelContract`.

    Attributes:
        contract: what the model takes and gives.
        observe: called with the number of images in each batch that is done; set it to show progress.

    Raises:
        Refusal: the file is missing, is not ONNX, or carries no contract.
    """

    contract: ModelContract
    observe: Callable[[int], object] | None = None

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

    def predict(
        self, images: Images, batch_images: int | None = None, *, change: Callable[[Images], Images] | None = None
    ) -> Probabilities:
        """Probabilities float32 `(N, classes)` in the order of the contract's labels.

        Args:
            images: uint8 `(N, size_px, size_px, channels)`; a memory map is read batch by batch.
            batch_images: images per batch; by default `self.batch_images`.
            change: applied to each batch before it is predicted.

        Raises:
            Refusal: the images or the model's answer have not the shape that the contract promises.
        """
        self._refuse_misshapen(images)
        size = batch_images or self.batch_images

        def answer(start: int) -> Probabilities:
            batch = np.asarray(images[start : start + size])
            return self._run(change(batch) if change else batch)

        batches = [self._no_answers()]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for batch in pool.map(answer, range(0, len(images), size)):
                batches.append(batch)
                if self.observe:
                    self.observe(len(batch))
        return np.concatenate(batches)

    def predict_batches(self, batches: Iterator[Images]) -> Probabilities:
        """As `predict`, for images that come in pieces and need not be held together."""
        return np.concatenate([self._no_answers(), *map(self.predict, batches)])

    def predict_batch(self, batch: Images) -> Probabilities:
        """As `predict`, for one batch, on the thread that asks."""
        self._refuse_misshapen(batch)
        return self._run(batch) if len(batch) else self._no_answers()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image: `(size_px, size_px, channels)`."""
        return (self.contract.input.size_px, self.contract.input.size_px, self.contract.input.channels)

    @property
    def batch_images(self) -> int:
        """How many images fit 8 MiB, at most 128."""
        return max(1, min(_MAX_BATCH_IMAGES, _BATCH_BYTES // math.prod(self.image_shape)))

    def _refuse_misshapen(self, images: Images) -> None:
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise Refusal(
                f"the images for {self._name}",
                f"are {images.dtype} {images.shape}",
                limit=f"uint8 (N, *{self.image_shape})",
            )

    def _no_answers(self) -> Probabilities:
        return np.zeros((0, len(self.contract.labels)), np.float32)

    def _run(self, batch: Images) -> Probabilities:
        inputs = {INPUT_NAME: np.ascontiguousarray(batch)}
        probabilities: Probabilities = self._session.run([PROBABILITIES_NAME], inputs)[0]
        promised = (len(batch), len(self.contract.labels))
        if probabilities.shape != promised:
            raise Refusal(
                f"the probabilities of {self._name}",
                f"have the shape {probabilities.shape}",
                limit=f"{promised}, by its contract",
                way_out="run model_training again; it writes file and contract together",
            )
        return probabilities
