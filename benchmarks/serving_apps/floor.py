"""The floor: a bare ASGI application around Perch's own decoding and one call of ONNX Runtime.  Nothing else."""

import json
import os
from pathlib import Path

from pipelines.core.image_decoding import read_model_input
from serving.predictor import Predictor

predictor = Predictor(Path(os.environ["BENCH_MODEL"]), threads=1)
contract = predictor.contract
HEADERS = [(b"content-type", b"application/json")]


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    pixels = read_model_input(b"".join(chunks), contract.input, max_pixels=25_000_000, max_bytes=10_000_000)
    row = predictor.predict(pixels[None])[0].tolist()
    answer = {
        "label": contract.labels[row.index(max(row))],
        "probabilities": dict(zip(contract.labels, row, strict=True)),
    }
    body = json.dumps(answer).encode()
    headers = [*HEADERS, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
