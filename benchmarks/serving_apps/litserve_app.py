"""LitServe around ONNX Runtime, with one worker and its fast queue."""

import argparse
import base64
import io
import os

import litserve
import numpy as np
import onnxruntime
from PIL import Image

labels = os.environ["BENCH_LABELS"].split(",")
side = int(os.environ["BENCH_SIZE_PX"])


class Classifier(litserve.LitAPI):
    """Runs in LitServe's worker process."""

    def setup(self, _device):
        """Load the model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )

    def decode_request(self, request):
        """From JSON to pixels."""
        image = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("L").resize((side, side))
        return np.asarray(image, dtype=np.uint8)[None, :, :, None]

    def predict(self, pixels):
        """From pixels to probabilities."""
        return self.session.run(["probabilities"], {"images": pixels})[0][0]

    def encode_response(self, row):
        """To JSON."""
        row = row.tolist()
        return {"label": labels[row.index(max(row))], "probabilities": dict(zip(labels, row, strict=True))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    server = litserve.LitServer(Classifier(), accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=parser.parse_args().port,
        num_api_servers=1,
        generate_client_file=False,
        access_log=False,
        log_level="warning",
    )
