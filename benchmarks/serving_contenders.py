"""The servers that `serving.py` measures: how each is started, what it is sent, and where it says its label."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving_model import BenchModel
from benchmarks.serving_release import ServedRelease

FLOOR = "floor: bare ASGI"
PERCH = "Perch"
MLFLOW = "mlflow models serve"


@dataclass(frozen=True)
class Payload:
    """What a server is sent.

    Attributes:
        kind: for the table, e.g. `PNG, raw body`.
        body: the bytes.
        content_type: of the body.
        headers: further ones.
    """

    kind: str
    body: bytes
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, url: str) -> urllib.request.Request:
        """One request for Python's own client."""
        return urllib.request.Request(url, self.body, {"Content-Type": self.content_type, **self.headers})


@dataclass(frozen=True)
class Contender:
    """One server.

    Attributes:
        name: for the table.
        command: from the port to program and arguments.
        environment: from the port to what the server needs besides this process's environment.
        path: of the endpoint.
        payload: what it is sent.
        read_label: from the answer to the predicted label, to see that all servers compute the same.
    """

    name: str
    command: Callable[[int], list[str]]
    environment: Callable[[int], Mapping[str, str]]
    path: str
    payload: Payload
    read_label: Callable[[Any], str] = lambda answer: answer["label"]

    def url(self, port: int) -> str:
        """Of the endpoint on this machine."""
        return f"http://127.0.0.1:{port}{self.path}"

    def label_in(self, body: bytes) -> str:
        """The predicted label."""
        return self.read_label(json.loads(body))


def multipart(field_name: str, data: bytes) -> Payload:
    """A form with one PNG, as browsers and HTTP clients send it."""
    boundary = "----perch-benchmark-boundary"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field_name}"; filename="digit.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
    return Payload("PNG, multipart", body, f"multipart/form-data; boundary={boundary}")


def raw_body(png: bytes) -> Payload:
    """The image itself as the body."""
    return Payload("PNG, raw body", png, "image/png")


def perch(name: str, release: ServedRelease, payload: Payload, *, workers: int) -> Contender:
    """Perch's release as shipped, asked with an API key; 0 workers is one for each core."""
    return Contender(
        name,
        release.command,
        lambda port: release.environment(port, workers=workers),
        "/v1/predict",
        replace(payload, headers={"X-API-Key": release.api_key}),
    )


def contenders(model: BenchModel, release: ServedRelease, png: bytes) -> list[Contender]:
    """All of them, each with one worker and one thread in the model; no access logs but Perch's own.

    Args:
        model: the registered version.
        release: the same version, packaged.
        png: the image.
    """
    python = sys.executable
    labels = model.contract.labels
    given = {
        "BENCH_MODEL": str(model.onnx),
        "BENCH_TORCHSCRIPT": str(model.torchscript),
        "BENCH_LABELS": ",".join(labels),
        "BENCH_SIZE_PX": str(model.contract.input.size_px),
    }
    raw, form = raw_body(png), multipart("image", png)
    encoded = Payload(
        "PNG in JSON, base64", json.dumps({"image": base64.b64encode(png).decode()}).encode(), "application/json"
    )
    pixels = np.asarray(Image.open(io.BytesIO(png)))[None, :, :, None].tolist()
    tensor = Payload(
        "pixels in JSON, no image", json.dumps({"inputs": {"images": pixels}}).encode(), "application/json"
    )

    def uvicorn(app: str, *more: str) -> Callable[[int], list[str]]:
        target = f"benchmarks.serving_apps.{app}:app"
        return lambda port: [
            *(python, "-m", "uvicorn", target, "--port", str(port)),
            *("--no-access-log", "--log-level", "warning", *more),
        ]

    def same(_port: int) -> Mapping[str, str]:
        return given

    quick = ("--loop", "uvloop", "--http", "httptools")
    return [
        Contender(FLOOR, uvicorn("floor", "--lifespan", "off", *quick), same, "/", raw),
        perch(PERCH, release, raw, workers=1),
        perch(f"{PERCH}, multipart", release, form, workers=1),
        Contender("FastAPI + ONNX Runtime", uvicorn("fastapi_onnx", *quick), same, "/predict-raw", raw),
        Contender("FastAPI + ONNX Runtime, multipart", uvicorn("fastapi_onnx", *quick), same, "/predict", form),
        Contender("FastAPI + PyTorch", uvicorn("fastapi_pytorch", *quick), same, "/predict", raw),
        Contender(
            "LitServe",
            lambda port: [python, "-m", "benchmarks.serving_apps.litserve_app", "--port", str(port)],
            same,
            "/predict",
            encoded,
        ),
        Contender(
            "BentoML @bentoml.api",
            lambda port: [
                *(str(Path(python).parent / "bentoml"), "serve", "benchmarks.serving_apps.bentoml_api:Classifier"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            same,
            "/predict",
            form,
        ),
        Contender(
            MLFLOW,
            lambda port: [
                *(str(Path(python).parent / "mlflow"), "models", "serve", "--model-uri", str(model.mlflow)),
                *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            ],
            # Its uvicorn is found on PATH; one thread, as in the others.
            lambda _port: {"PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            "/invocations",
            tensor,
            lambda answer: labels[int(np.argmax(answer["predictions"]["probabilities"][0]))],
        ),
    ]
