"""FastAPI around ONNX Runtime: an uploaded file as in FastAPI's documentation, and the same image as the raw body."""

import io
import os

import numpy as np
import onnxruntime
from fastapi import FastAPI, Request, UploadFile
from PIL import Image

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"])
labels = os.environ["BENCH_LABELS"].split(",")
side = int(os.environ["BENCH_SIZE_PX"])
app = FastAPI()


def classify(data: bytes) -> dict:
    image = Image.open(io.BytesIO(data)).convert("L").resize((side, side))
    pixels = np.asarray(image, dtype=np.uint8)[None, :, :, None]
    row = session.run(["probabilities"], {"images": pixels})[0][0].tolist()
    return {"label": labels[row.index(max(row))], "probabilities": dict(zip(labels, row, strict=True))}


# `async`, because on a small model handing the work to FastAPI's threads makes it slower.
@app.post("/predict")
async def predict(image: UploadFile) -> dict:
    return classify(await image.read())


@app.post("/predict-raw")
async def predict_raw(request: Request) -> dict:
    return classify(await request.body())
