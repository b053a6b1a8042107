"""FastAPI around the same network in TorchScript, frozen, with the image decoded and normalised by hand."""

import io
import os

import numpy as np
import torch
from fastapi import FastAPI, Request
from PIL import Image

torch.set_num_threads(1)
model = torch.jit.load(os.environ["BENCH_TORCHSCRIPT"])
labels = os.environ["BENCH_LABELS"].split(",")
side = int(os.environ["BENCH_SIZE_PX"])
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> dict:
    image = Image.open(io.BytesIO(await request.body())).convert("L").resize((side, side))
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))[None, :, :, None]
    with torch.inference_mode():
        row = model(pixels).softmax(dim=1)[0].tolist()
    return {"label": labels[row.index(max(row))], "probabilities": dict(zip(labels, row, strict=True))}
