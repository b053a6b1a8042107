"""A release served for real: answers as offline, limits under load, and how it starts, loses workers and ends."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.core.api_keys import ApiKey, new_key
from pipelines.core.image_decoding import read_model_input
from pipelines.core.image_limits import DEFAULT_MAX_BODY_BYTES, DEFAULT_MAX_PIXELS
from pipelines.core.release_unit import MODEL_FILE, RELEASE_FOLDER
from pipelines.core.scopes import Scope
from pipelines.data.sources.digits import DigitsSource
from pipelines.errors import EXIT_REFUSED
from pipelines.modeling.inference import OnnxPredictor
from tests.integration.image_corpus import encode, photograph, png_of_zeros, turned
from tests.integration.served_release import Server

pytestmark = pytest.mark.services

# Evaluation sums in batches of 128, the service one by one; where the sums came out alike it was 0.0.
SAME_EYES_LIMIT = 1e-6

NEW_CONNECTIONS = {"Connection": "close"}  # each of which any worker may take


def digits_as_sent() -> Iterator[bytes]:
    """The arrivals of the newest week, each in another guise."""
    source = DigitsSource()
    for number, item in enumerate(source.list_items()[-300:]):
        stored = source.read(item, DEFAULT_MAX_BODY_BYTES)
        image = Image.open(io.BytesIO(stored))
        large = image.resize((96, 64), Image.Resampling.BICUBIC)
        yield (
            stored,
            encode(large, "JPEG", quality=70),
            encode(Image.merge("RGB", (large, large.transpose(Image.Transpose.ROTATE_180), large)), "WEBP"),
            encode(Image.fromarray(np.asarray(large).astype(np.uint16) * 257), "TIFF"),
            turned(large.convert("RGB"), 1 + number % 8, "JPEG", progressive=True),
            encode(large.resize((700, 900)), "JPEG"),
        )[number % 6]


def test_predict__a_weeks_images__are_given_the_probabilities_that_evaluation_stores(served: Server) -> None:
    predictor = OnnxPredictor(served.stage / RELEASE_FOLDER / MODEL_FILE)
    images = list(digits_as_sent())
    limits = {"max_pixels": DEFAULT_MAX_PIXELS, "max_bytes": DEFAULT_MAX_BODY_BYTES}
    arrays = np.stack([read_model_input(data, predictor.contract.input, **limits) for data in images])
    offline = predictor.predict(arrays)
    with served.client() as client:
        alone = [client.post("/v1/predict", content=data).json() for data in images]
        files = [("image", data) for data in images[:60]]
        together = client.post("/v1/predict/batch", files=files).json()["results"]
    online = np.array([[answer["probabilities"][label] for label in predictor.contract.labels] for answer in alone])
    difference = float(np.abs(online - offline).max())
    print(f"the largest difference of a probability over {len(images)} images: {difference:.2g}")
    assert difference <= SAME_EYES_LIMIT
    assert offline.std(axis=0).max() > 0.05  # the network tells these images apart
    assert [answer["label"] for answer in alone] == [predictor.contract.labels[i] for i in offline.argmax(axis=1)]
    assert [result["probabilities"] for result in together] == [answer["probabilities"] for answer in alone[:60]]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_predict__turned_by_exif__is_the_upright_image(served: Server, image_format: str) -> None:
    # Grey steps of 8 pixels survive JPEG the same way round or not.
    steps = np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, np.ones((8, 8), np.uint8))
    options: dict[str, Any] = {"lossless": True} if image_format == "WEBP" else {}
    with served.client() as client:
        answers = [
            client.post("/v1/predict", content=turned(Image.fromarray(steps), orientation, image_format, **options))
            for orientation in range(1, 9)
        ]
        differently = client.post("/v1/predict", content=encode(Image.fromarray(np.ascontiguousarray(steps.T))))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all(answer.json()["probabilities"] == answers[0].json()["probabilities"] for answer in answers)
    assert differently.json()["probabilities"] != answers[0].json()["probabilities"]


@pytest.fixture
def start(staged_release: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of the test's own."""
    started: list[Server] = []

    def start(
        stage: Path = staged_release, *, ready: bool = True, keys: tuple[ApiKey, ...] = (), **settings: Any
    ) -> Server:
        server = Server(stage, tmp_path / f"server-{len(started)}", settings, keys)
        started.append(server)
        server.start(ready=ready)
        return server

    yield start
    for server in started:
        server.stop()


def in_parallel(work: Callable[[], object], threads: int) -> None:
    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def test_limits__of_two_workers__hold_under_load(start: Callable[..., Server]) -> None:
    rated, entry = new_key("rated", (Scope.PREDICT,), rate_per_s=0.01, burst=30)
    server = start(WORKERS=2, MAX_CONCURRENT=1, REQUEST_TIMEOUT_S=20, keys=(entry,))
    image = encode(photograph(mode="L"))

    # A rate is shared by the workers: 30 at once, and not 30 each.
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, headers={"X-API-Key": rated, **NEW_CONNECTIONS}, timeout=30) as client:
            answers.extend(client.post("/v1/predict", content=image) for _ in range(15))

    in_parallel(ask, 6)
    statuses = Counter(answer.status_code for answer in answers)
    assert all(int(answer.headers["Retry-After"]) > 1 for answer in answers if answer.status_code == 429)
    served = statuses[200] + statuses[503]  # what was full had been charged before
    assert served == 30, statuses
    assert statuses[429] == 60, statuses

    # What is more than a worker takes is told so at once, not queued; the probes answer all the while.
    waits: list[tuple[int, float]] = []
    hints: list[str] = []

    slow = png_of_zeros(5000, 5000, depth=16, colour=6)

    clients = [server.client() for _ in range(12)]

    def ask_slowly() -> None:
        with clients.pop() as client:
            client.get("/livez")  # connects
            began = time.perf_counter()
            response = client.post("/v1/predict", content=slow)
            waits.append((response.status_code, time.perf_counter() - began))
            hints.append(response.headers.get("Retry-After", ""))

    thread = threading.Thread(target=in_parallel, args=(ask_slowly, 12))
    thread.start()
    time.sleep(0.3)
    probed: list[float] = []
    with httpx.Client(base_url=server.url) as client:
        for _ in range(10):
            began = time.perf_counter()
            probe = client.get("/readyz", headers={"X-Request-ID": "probe-1"})
            assert (probe.status_code, probe.headers["x-request-id"]) == (200, "probe-1")
            probed.append(time.perf_counter() - began)
    thread.join()
    refused = [seconds for status, seconds in waits if status == 503]
    taken = [seconds for status, seconds in waits if status == 200]
    print(f"{len(refused)} of {len(waits)} refused, the last after {max(refused):.3f} s; rates: {dict(statuses)}")
    assert len(waits) == 12
    assert {status for status, _ in waits} == {200, 503}
    assert Counter(hints) == {"": len(taken), "1": len(refused)}
    assert 1 <= len(waits) - len(refused) <= 6
    # Of medians, and beside those that were taken: a busy machine keeps single ones waiting.
    assert median(refused) < max(taken) / 3
    assert median(probed) < max(taken) / 3


def test_worker__killed__comes_back_while_the_other_answers(start: Callable[..., Server]) -> None:
    server = start(WORKERS=2)
    image = encode(photograph())
    victim, survivor = server.workers()
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    lost = 0
    client = server.client()
    client.headers.update(NEW_CONNECTIONS)
    while len(workers := server.workers()) < 2 or victim in workers:
        try:
            assert client.post("/v1/predict", content=image).status_code == 200
        except httpx.TransportError:
            lost += 1  # it was the dead one's
        assert time.monotonic() - began < 40
        time.sleep(0.02)
    print(f"the worker was started again after {time.monotonic() - began:.1f} s; {lost} requests met the dead one")
    assert lost <= 1
    assert survivor in workers
    for _ in range(50):
        assert client.post("/v1/predict", content=image).status_code == 200


def test_connection__that_is_old__is_told_that_its_answer_is_the_last(start: Callable[..., Server]) -> None:
    server = start(CONNECTION_AGE_S=2, MAX_BODY_BYTES=100_000)
    image, headers = encode(photograph()), {"X-API-Key": server.key}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    said: list[tuple[int, str | None]] = []

    def ask(body: bytes) -> None:
        connection.request("POST", "/v1/predict", body, headers)
        response = connection.getresponse()
        response.read()
        said.append((response.status, response.getheader("connection")))

    connection.connect()
    began = time.monotonic()
    ask(image)
    ask(bytes(2_000_000))  # refused before all of it is there, young or old: a close would take the answer along
    assert [status for status, _ in said] == [200, 413]
    if time.monotonic() - began < 1.6:  # younger than any connection's greatest age
        assert said == [(200, None), (413, None)]
    time.sleep(2.5)
    ask(bytes(2_000_000))
    ask(image)
    ask(image)  # http.client connects again
    assert said[2:] == [(413, None), (200, "close"), (200, None)]


def test_end__by_sigterm_under_load__answers_all_that_was_taken_and_keeps_it(start: Callable[..., Server]) -> None:
    server = start(WORKERS=2, EXPLAIN_BUDGET_S=1.0)
    image = encode(photograph())
    headers = {"X-API-Key": server.key}
    answers: list[object] = []
    predicted: list[str] = []
    begun = threading.Semaphore(0)

    def connect() -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

    def explain() -> None:
        connection = connect()
        connection.request("POST", "/v1/explain", image, headers)
        begun.release()
        answers.append(connection.getresponse().status)

    def send_slowly() -> None:
        def pieces() -> Iterator[bytes]:
            yield image[:20]
            begun.release()
            time.sleep(1.5)
            yield image[20:]

        connection = connect()
        connection.request("POST", "/v1/predict", pieces(), headers)
        response = connection.getresponse()
        answers.append(response.status)
        predicted.append(json.loads(response.read())["prediction_id"])

    def ask_on() -> None:
        """On one connection, until an answer says that it is the last."""
        connection = connect()
        last, asked = False, 0
        while not last:
            connection.request("POST", "/v1/predict", image, headers)
            response = connection.getresponse()
            last = response.getheader("connection") == "close"
            answers.append(response.status)
            predicted.append(json.loads(response.read())["prediction_id"])
            asked += 1
            if asked == 1:
                begun.release()
        ended.append(True)

    ended: list[bool] = []
    work = (explain, explain, send_slowly, send_slowly, ask_on, ask_on, ask_on, ask_on)
    threads = [threading.Thread(target=target) for target in work]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=30)
    time.sleep(0.5)  # until the server has taken what was sent
    began = time.monotonic()
    assert server.stop() == 0
    print(f"ended after {time.monotonic() - began:.1f} s, {len(predicted)} predictions answered")
    for thread in threads:
        thread.join()
    assert len(ended) == 4
    assert len(answers) == len(predicted) + 2
    assert set(answers) == {200}
    files = server.predictions.rglob("*.parquet")
    kept = {row["prediction_id"] for file in files for row in pq.ParquetFile(file).read().to_pylist()}
    assert set(predicted) == kept
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


@pytest.mark.parametrize(
    ("break_it", "settings", "told"),
    [
        ("model", {}, "was changed after packaging"),
        ("manifest", {}, "release.json"),
        ("", {"API_KEYS_FILE": ""}, "perch api-keys add"),
    ],
)
def test_start__that_could_not_serve__ends_at_once_and_says_why(
    start: Callable[..., Server],
    staged_release: Path,
    tmp_path: Path,
    break_it: str,
    settings: dict[str, Any],
    told: str,
) -> None:
    stage = tmp_path / "stage"
    release = stage / RELEASE_FOLDER
    release.mkdir(parents=True)
    for entry in staged_release.iterdir():
        if entry.name != RELEASE_FOLDER:
            (stage / entry.name).symlink_to(entry.resolve())
    for file in (staged_release / RELEASE_FOLDER).iterdir():
        content = bytearray(file.read_bytes())
        if break_it and break_it in file.name.replace("release.json", "manifest"):
            content[len(content) // 2] ^= 1
            content = content[: -len(content) // 4] if break_it == "manifest" else content
        (release / file.name).write_bytes(bytes(content))
    server = start(stage, ready=False, **settings)
    assert server.process is not None
    assert server.process.wait(60) == EXIT_REFUSED
    assert told in server.log
    assert "Traceback" not in server.log
