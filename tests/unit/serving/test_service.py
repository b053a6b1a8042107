"""The service's application as BentoML makes it, over a tiny real model, without a socket."""

import io
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipelines.core.api_keys import ApiKeyFile, Scope, new_key, write_keys
from pipelines.core.prediction_ids import new_prediction_id
from pipelines.core.request_origins import PROBE_HEADER, PROBER, SHADOW_HEADER
from pipelines.release.slot_metrics import read_counts
from serving import release as release_module
from serving.problems import MEDIA_TYPE
from serving.settings import get_serving_settings
from tests.unit.serving.conftest import MakeImage

SCOPES = {"all": tuple(Scope), "predictor": (Scope.PREDICT,), "slow": (Scope.PREDICT,), PROBER: (Scope.PREDICT,)}


PAGE_PARTS = [
    "static_content/favicon-light-32x32.png",
    "static_content/swagger-ui.css",
    "static_content/swagger-ui-bundle.js",
]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """API keys by name; `slow` may ask twice."""
    secrets, entries = {}, []
    for name, scopes in SCOPES.items():
        rate, burst = (0.001, 2) if name == "slow" else (10_000, 10_000)
        secrets[name], entry = new_key(name, scopes, rate_per_s=rate, burst=burst)
        entries.append(entry)
    write_keys(tmp_path / "api-keys.json", ApiKeyFile(keys=tuple(entries)))
    return secrets


@pytest.fixture
def client(
    tmp_path: Path, release_folder: Path, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    monkeypatch.setattr(release_module, "_PACKED", release_folder)
    environment = {
        "API_KEYS_FILE": tmp_path / "api-keys.json",
        "PREDICTIONS_URL": tmp_path / "predictions",
        "SPOOL_DIR": tmp_path / "spool",
        "MAX_BODY_BYTES": 20_000,
        "MAX_PIXELS": 40_000,
        "MAX_BATCH_ITEMS": 4,
        "EXPLAIN_BUDGET_S": 0.2,
        "WORKERS": 1,
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"PERCH_SERVING_{name}", str(value))
    get_serving_settings.cache_clear()
    from serving.service import service

    loggers = [logging.getLogger(name) for name in (None, "bentoml", "uvicorn", "serving", "pipelines")]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    with TestClient(service.to_asgi(), headers={"X-API-Key": keys["all"]}) as client:
        yield client
    for logger, logger.handlers, level, logger.propagate in before:
        logger.setLevel(level)
    get_serving_settings.cache_clear()


def assert_problem(response: object, status: int, slug: str) -> dict[str, object]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    body = response.json()
    assert body["type"] == f"urn:perch:{slug}"
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert response.headers["x-model-version"] == "7"
    return body


def test_predict__raw_body_and_form_field__give_the_same_answer(client: TestClient, make_image: MakeImage) -> None:
    data = make_image()
    raw = client.post("/v1/predict", content=data)
    form = client.post("/v1/predict", files={"image": ("name.txt", data, "text/plain")})
    assert raw.status_code == form.status_code == 200
    assert raw.json()["probabilities"] == form.json()["probabilities"]
    assert raw.json()["prediction_id"] != form.json()["prediction_id"]
    assert raw.json()["model"] == {"name": "shapes-classification", "version": "7"}
    assert raw.json()["label"] == max(raw.json()["probabilities"], key=raw.json()["probabilities"].__getitem__)
    assert raw.headers["x-model-version"] == "7"


@pytest.mark.parametrize(
    ("given", "taken"), [("job-7.a_B", True), ("", False), ("a b", False), ("x" * 129, False), ("é", False)]
)
def test_request_id__of_the_client__is_taken_only_if_sane(client: TestClient, given: str, taken: bool) -> None:
    response = client.get("/livez", headers={"X-Request-ID": given.encode()})
    assert (response.headers["x-request-id"] == given) is taken
    assert response.headers["x-request-id"]


def test_predict__without_a_key__is_401_with_a_challenge(client: TestClient, make_image: MakeImage) -> None:
    response = client.post("/v1/predict", content=make_image(), headers={"X-API-Key": "perch_nobody"})
    assert_problem(response, 401, "unauthorized")
    assert response.headers["www-authenticate"].startswith("Bearer")


def test_metrics__key_without_the_scope__is_403(client: TestClient, keys: dict[str, str]) -> None:
    assert_problem(client.get("/metrics", headers={"X-API-Key": keys["predictor"]}), 403, "forbidden")
    assert b"perch_requests_total" in client.get("/metrics").content


def test_service__unknown_path_or_method__is_404_or_405(client: TestClient) -> None:
    assert_problem(client.get("/v2/predict"), 404, "not-found")
    assert_problem(client.get("/schema.json"), 404, "not-found")
    refused = client.get("/v1/predict")
    assert_problem(refused, 405, "method-not-allowed")
    assert refused.headers["allow"] == "POST"


def test_predict__body_over_the_limit__is_413_and_closes_where_nobody_knows_what_comes_next(client: TestClient) -> None:
    response = client.post("/v1/predict", content=bytes(20_001))
    assert_problem(response, 413, "too-large")
    assert "connection" not in response.headers  # the rest is read away
    response = client.post("/v1/predict", content=bytes(20_001), headers={"Expect": "100-continue"})
    assert_problem(response, 413, "too-large")
    assert response.headers["connection"] == "close"


def test_predict_batch__one_more_than_the_burst__is_413_at_once(
    client: TestClient, make_image: MakeImage, tmp_path: Path
) -> None:
    key, record = new_key("small", (Scope.PREDICT,), rate_per_s=1.0, burst=3)
    file = tmp_path / "api-keys.json"
    keys = ApiKeyFile.model_validate_json(file.read_text())
    write_keys(file, ApiKeyFile(keys=(*keys.keys, record)))
    deadline = time.monotonic() + 30
    while client.get("/v1/model", headers={"X-API-Key": key}).status_code == 401:  # the file is looked at each second
        assert time.monotonic() < deadline
        time.sleep(0.2)
    images = [("image", make_image(seed=seed)) for seed in range(4)]
    assert_problem(client.post("/v1/predict/batch", files=images, headers={"X-API-Key": key}), 413, "too-large")


@pytest.mark.parametrize(
    ("content", "status", "slug"),
    [
        (b"", 400, "bad-request"),
        (b"just text", 415, "unsupported-media"),
        (b"\x89PNG\r\n\x1a\n??", 422, "unreadable-image"),
    ],
)
def test_predict__bytes_that_are_no_image__are_named(
    client: TestClient, content: bytes, status: int, slug: str
) -> None:
    assert_problem(client.post("/v1/predict", content=content), status, slug)


def test_predict__bomb_of_pixels__is_refused_by_its_header(client: TestClient, make_image: MakeImage) -> None:
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    assert_problem(client.post("/v1/predict", content=stream.getvalue()), 422, "too-many-pixels")


def test_predict__rate_used_up__is_429_with_the_time_to_wait(
    client: TestClient, keys: dict[str, str], make_image: MakeImage
) -> None:
    headers = {"X-API-Key": keys["slow"]}
    assert [client.post("/v1/predict", content=make_image(), headers=headers).status_code for _ in range(2)] == [
        200,
        200,
    ]
    response = client.post("/v1/predict", content=make_image(), headers=headers)
    assert_problem(response, 429, "rate-limited")
    assert int(response.headers["retry-after"]) >= 1


def test_batch__some_items_broken__are_problems_in_their_place(client: TestClient, make_image: MakeImage) -> None:
    files = [("image", make_image(seed=1)), ("image", b"text"), ("image", make_image(seed=2))]
    response = client.post("/v1/predict/batch", files=files)
    body = response.json()
    assert response.status_code == 200
    assert (body["succeeded"], body["failed"]) == (2, 1)
    assert [result["index"] for result in body["results"]] == [0, 1, 2]
    assert body["results"][1]["problem"]["type"] == "urn:perch:unsupported-media"
    alone = client.post("/v1/predict", content=make_image(seed=2)).json()
    assert body["results"][2]["probabilities"] == alone["probabilities"]


def test_batch__too_many_items_none_or_no_form__are_refused(client: TestClient, make_image: MakeImage) -> None:
    many = [("image", make_image())] * 5
    assert_problem(client.post("/v1/predict/batch", files=many), 413, "too-large")
    assert_problem(client.post("/v1/predict/batch", files=[("scan", b"x")]), 422, "invalid-field")
    assert_problem(client.post("/v1/predict/batch", content=make_image()), 400, "bad-request")


def test_explain__an_image__is_a_picture_of_the_predicted_label(client: TestClient, make_image: MakeImage) -> None:
    data = make_image(40)
    response = client.post("/v1/explain", content=data)
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(response.content)).width >= 40
    predicted = client.post("/v1/predict", content=data).json()
    assert response.headers["x-explained-label"] == predicted["label"]
    probability = float(response.headers["x-explained-probability"])
    assert probability == pytest.approx(predicted["probabilities"][predicted["label"]], abs=1e-5)
    assert int(response.headers["x-explanation-masks"]) >= 8


def test_explain__another_label__is_explained_and_an_unknown_one_refused(
    client: TestClient, make_image: MakeImage
) -> None:
    other = client.post("/v1/explain?label=square", files={"image": make_image()})
    assert other.headers["x-explained-label"] == "square"
    assert_problem(client.post("/v1/explain?label=cat", content=make_image()), 422, "invalid-field")
    assert_problem(client.post("/v1/explain", content=b"text"), 415, "unsupported-media")


def test_feedback__of_an_answer__is_kept(client: TestClient, make_image: MakeImage, tmp_path: Path) -> None:
    prediction_id = client.post("/v1/predict", content=make_image()).json()["prediction_id"]
    response = client.post("/v1/feedback", json={"prediction_id": prediction_id, "true_label": "square"})
    assert (response.status_code, response.json()) == (202, {"prediction_id": prediction_id})


@pytest.mark.parametrize(
    ("body", "status", "slug"),
    [
        (b"{", 400, "bad-request"),
        (b"[]", 422, "invalid-field"),
        (json.dumps({"prediction_id": "x", "true_label": "square"}).encode(), 422, "invalid-field"),
        (
            json.dumps({"prediction_id": "7ZZZZZZZZZZZZZZZZZZZZZZZZZ", "true_label": "square"}).encode(),
            422,
            "invalid-field",
        ),
        (json.dumps({"prediction_id": new_prediction_id(), "true_label": "cat"}).encode(), 422, "invalid-field"),
        (
            json.dumps({"prediction_id": new_prediction_id(), "true_label": "square", "x": 1}).encode(),
            422,
            "invalid-field",
        ),
    ],
)
def test_feedback__that_makes_no_sense__is_refused(client: TestClient, body: bytes, status: int, slug: str) -> None:
    assert_problem(client.post("/v1/feedback", content=body), status, slug)


def test_feedback__id_that_is_none__is_told_what_an_id_looks_like(client: TestClient) -> None:
    problem = client.post("/v1/feedback", json={"prediction_id": "x", "true_label": "square"}).json()
    assert problem["detail"] == (
        "`prediction_id` is not an id that an answer carried: a prediction id has 26 characters, not 1."
    )


def test_model__asked_for__tells_the_whole_manifest(client: TestClient) -> None:
    body = client.get("/v1/model").json()
    assert (body["model"], body["version"], body["labels"]) == ("shapes-classification", "7", ["circle", "square"])
    assert body["metrics"]["test/accuracy"]["low"] == 0.926
    assert body["input"]["size_px"] == 8


def test_probes__without_a_key__answer_also_to_head(client: TestClient) -> None:
    for path in ("/livez", "/readyz"):
        del client.headers["X-API-Key"]
        assert client.get(path).status_code == client.head(path).status_code == 200
        client.headers["X-API-Key"] = "perch_whatever"


def test_openapi__every_address_of_the_api__is_described(client: TestClient) -> None:
    document = client.get("/v1/openapi.json").json()
    from serving.service import service

    served = {
        (path, method.lower())
        for path, methods in service.inner.current.api.endpoints.items()
        for method in methods
        if method != "HEAD" and path not in {"/", "/docs.json", "/v1/openapi.json", "/metrics"}
    }
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    assert described == served


def test_page__at_the_root__shows_the_api(client: TestClient) -> None:
    page = client.get("/")
    assert "swagger" in page.text
    assert re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text) == PAGE_PARTS
    for part in PAGE_PARTS:
        assert client.get(f"/{part}").status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/docs.json").json() == client.get("/v1/openapi.json").json()


def test_shutdown__predictions_answered__are_all_in_the_store(
    client: TestClient, make_image: MakeImage, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    answered = {client.post("/v1/predict", content=make_image(seed=seed)).json()["prediction_id"] for seed in range(5)}
    client.__exit__(None, None, None)
    client.__enter__()
    files = list((tmp_path / "predictions").rglob("*.parquet"))
    kept = {row["prediction_id"] for file in files for row in pq.ParquetFile(file).read().to_pylist()}
    assert kept == answered


def test_prediction__of_a_copy_that_the_gateway_sent__is_kept_as_such(
    client: TestClient, make_image: MakeImage, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    client.post("/v1/predict", content=make_image())
    for headers in ({SHADOW_HEADER: "1"}, {"Host": "vision.example.org-shadow"}, {"Host": "10.0.0.1-shadow:8080"}):
        client.post("/v1/predict", content=make_image(), headers=headers)
    client.__exit__(None, None, None)
    client.__enter__()
    files = (tmp_path / "predictions").rglob("*.parquet")
    assert sorted(pq.ParquetFile(file).read()["origin"].to_pylist() for file in files)[0] == ["client", *3 * ["mirror"]]


def test_prediction__of_the_prober__is_kept_as_such_and_in_none_of_the_clients_numbers(
    client: TestClient, keys: dict[str, str], make_image: MakeImage, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    before = read_counts(client.get("/metrics").text)
    probe = {PROBE_HEADER: "1", "X-API-Key": keys[PROBER]}
    client.post("/v1/predict", content=make_image(), headers=probe)
    client.post("/v1/predict", content=make_image(), headers={**probe, SHADOW_HEADER: "1"})
    client.post("/v1/predict", content=b"no image", headers=probe)
    after = read_counts(client.get("/metrics").text)
    assert (after.requests, after.client_errors, after.labels) == (before.requests, before.client_errors, before.labels)
    assert after.probes.requests - before.probes.requests == 2
    assert after.probes.client_errors - before.probes.client_errors == 1
    client.__exit__(None, None, None)
    client.__enter__()
    (file,) = (tmp_path / "predictions").rglob("*.parquet")
    assert pq.ParquetFile(file).read()["origin"].to_pylist() == ["probe", "probe"]


def test_prediction__that_a_client_calls_a_probe__is_a_clients(client: TestClient, make_image: MakeImage) -> None:
    before = read_counts(client.get("/metrics").text)
    client.post("/v1/predict", content=make_image(), headers={PROBE_HEADER: "1"})
    client.post("/v1/predict", content=make_image(), headers={PROBE_HEADER: "1", "X-API-Key": "perch_nobody"})
    after = read_counts(client.get("/metrics").text)
    assert (after.requests - before.requests, after.client_errors - before.client_errors) == (1, 1)
    assert after.probes.requests == before.probes.requests
