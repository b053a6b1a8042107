"""BentoML as in its documentation: a method under `@bentoml.api` that takes an image."""

import os

import bentoml
import numpy as np
import onnxruntime
from PIL import Image

labels = os.environ["BENCH_LABELS"].split(",")
side = int(os.environ["BENCH_SIZE_PX"])


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Classifier:
    """One worker."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )

    @bentoml.api
    def predict(self, image: Image.Image) -> dict:
        """Classify one image."""
        pixels = np.asarray(image.convert("L").resize((side, side)), dtype=np.uint8)[None, :, :, None]
        row = self.session.run(["probabilities"], {"images": pixels})[0][0].tolist()
        return {"label": labels[row.index(max(row))], "probabilities": dict(zip(labels, row, strict=True))}
