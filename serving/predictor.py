"""The exported model in this process: one ONNX Runtime session, checked and warmed before the first request."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.core.contract import CONTRACT_KEY, INPUT_NAME, PROBABILITIES_NAME, ModelContract
from pipelines.errors import Refusal

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]

_WARM_UP_ROUNDS = 5


class Predictor:
    """An exported model on the CPU.

    Args:
        model: an ONNX file that carries its `ModelContract`.
        threads: that one call may use; one is best while there are as many workers as cores.

    Attributes:
        contract: what the model takes and gives.

    Raises:
        Refusal: the file is no model that ONNX Runtime loads, or carries no contract.
    """

    contract: ModelContract

    def __init__(self, model: Path, *, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # A thread that spins for its next piece of work takes the core from the process beside it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
            text = self._session.get_modelmeta().custom_metadata_map.get(CONTRACT_KEY, "")
            self.contract = ModelContract.model_validate_json(text)
        except Exception as error:  # ONNX Runtime has a dozen kinds, none of them public
            raise Refusal(
                f"the model {model}", f"cannot be loaded: {error}", way_out="package the registered version again"
            ) from error

    def predict(self, images: Images) -> Probabilities:
        """Probabilities float32 `(N, classes)`, in the order of the contract's labels.

        Args:
            images: uint8 `(N, size_px, size_px, channels)`.
        """
        answer: Any = self._session.run([PROBABILITIES_NAME], {INPUT_NAME: images})
        probabilities: Probabilities = answer[0]
        return probabilities

    def warm_up(self) -> float:
        """Predict real arrays until memory is laid out and code is paged in.

        Returns:
            Seconds that one image takes: the median of a few rounds.

        Raises:
            Refusal: the answer is not what the contract promises.
        """
        side, channels = self.contract.input.size_px, self.contract.input.channels
        image = np.linspace(0, 255, side * side * channels, dtype=np.uint8).reshape(1, side, side, channels)
        seconds = []
        for _ in range(_WARM_UP_ROUNDS):
            started = time.perf_counter()
            probabilities = self.predict(image)
            seconds.append(time.perf_counter() - started)
        promised = (1, len(self.contract.labels))
        if probabilities.shape != promised or not np.isfinite(probabilities).all():
            raise Refusal(
                "the model's first answer",
                f"is {probabilities.tolist()}",
                limit=f"finite numbers of shape {promised}",
                way_out="do not release this version; train it again",
            )
        return statistics.median(seconds[1:])
