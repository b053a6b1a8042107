"""What each address of the API does, once the caller is known and may."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import Response

from pipelines.core.prediction_ids import new_prediction_id, time_of
from pipelines.core.request_origins import CLIENT, MIRROR, PROBE, is_copy
from serving.admission import Admission
from serving.api import Endpoint, Exchange
from serving.api_page import render_api_page
from serving.classification import Classification, Classifier
from serving.explainer import Explainer
from serving.metrics import CONTENT_TYPE, ServiceMetrics
from serving.openapi import MAX_FORM_PARTS, describe_api
from serving.prediction_log import FeedbackRecord, PredictionLog, PredictionRecord
from serving.problems import BAD_REQUEST, INVALID_FIELD, NOT_READY, Problem
from serving.rate_limits import RateLimiter
from serving.release import Release
from serving.request_bodies import Part, is_multipart, read_body, split_parts
from serving.settings import ServingSettings

JSON = "application/json"
IMAGE_FIELD = "image"
_MAX_FEEDBACK_BYTES = 2**14
_CLOCK_SKEW = timedelta(minutes=5)


class Feedback(BaseModel):
    """The true label of an earlier prediction."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prediction_id: str
    true_label: str


class Endpoints:
    """The endpoints over one release.

    Args:
        release: what is served.
        classifier: decodes and predicts.
        explainer: draws heat maps.
        admission: bounds what is inside.
        predictions: keeps what was answered.
        metrics: counts.
        rate_limiter: charges a batch for each of its images.
        settings: limits.
    """

    def __init__(
        self,
        release: Release,
        classifier: Classifier,
        *,
        explainer: Explainer,
        admission: Admission,
        predictions: PredictionLog,
        metrics: ServiceMetrics,
        rate_limiter: RateLimiter,
        settings: ServingSettings,
    ) -> None:
        self._classifier, self._explainer = classifier, explainer
        self._admission, self._predictions = admission, predictions
        self._metrics, self._rate_limiter, self._settings = metrics, rate_limiter, settings
        manifest = release.manifest
        self._manifest, self._labels = manifest, manifest.labels
        self._model = {"name": manifest.model, "version": manifest.version}
        self._described = orjson.dumps(manifest.model_dump(mode="json"))
        self._openapi = orjson.dumps(describe_api(manifest, settings))
        self._page, self._page_headers = render_api_page(manifest)
        self.ready = False

    def table(self) -> dict[str, dict[str, Endpoint]]:
        """The endpoints by path and method."""
        return {
            "/v1/predict": {"POST": Endpoint(self.predict, "predict")},
            "/v1/predict/batch": {"POST": Endpoint(self.predict_batch, "predict")},
            "/v1/explain": {"POST": Endpoint(self.explain, "explain")},
            "/v1/feedback": {"POST": Endpoint(self.feedback, "feedback")},
            "/v1/model": {"GET": Endpoint(self.model, "model")},
            "/v1/openapi.json": {"GET": Endpoint(self.openapi)},
            "/": {"GET": Endpoint(self.page)},
            "/docs.json": {"GET": Endpoint(self.openapi)},  # where the page looks for it
            "/livez": {"GET": Endpoint(self.livez), "HEAD": Endpoint(self.livez)},
            "/readyz": {"GET": Endpoint(self.readyz), "HEAD": Endpoint(self.readyz)},
            "/metrics": {"GET": Endpoint(self.metrics, "metrics")},
        }

    async def predict(self, exchange: Exchange) -> Response:
        """Classify one image: the raw body, or the field `image` of a form."""
        body = await self._read(exchange, self._settings.max_body_bytes)
        try:
            data = self._only_image(exchange, body)
            with self._admission.work():
                answer = await self._classifier.classify(data)
                answered = self._keep(exchange, "predict", data, answer)
        finally:
            self._admission.give_bytes(len(body))
        exchange.prediction_id = answered["prediction_id"]
        answered["model"] = self._model
        return Response(orjson.dumps(answered), media_type=JSON)

    async def predict_batch(self, exchange: Exchange) -> Response:
        """Classify every `image` field of a form, in order; one that fails has a problem in its place."""
        limit = self._settings.max_batch_items
        body = await self._read(exchange, self._settings.max_batch_bytes)
        try:
            if not is_multipart(exchange.request):
                raise Problem(BAD_REQUEST, "A batch is a multipart form with one field `image` for each image.")
            parts = split_parts(exchange.request, body, max_parts=limit)
            images = [part.data for part in parts if part.field == IMAGE_FIELD]
            if not images:
                raise Problem(INVALID_FIELD, f"The form has no field `image`{_named(parts)}; add one for each image.")
            assert exchange.caller is not None  # noqa: S101 - the endpoint has a scope
            if len(images) > 1:  # the request itself was charged as one
                self._rate_limiter.take(exchange.caller, len(images) - 1, taken=1)
            with self._admission.work():
                answers = await self._classifier.classify_many(images)
                results = [
                    {"index": index, "problem": answer.as_json()}
                    if isinstance(answer, Problem)
                    else {"index": index, **self._keep(exchange, "batch", data, answer)}
                    for index, (data, answer) in enumerate(zip(images, answers, strict=True))
                ]
        finally:
            self._admission.give_bytes(len(body))
        failed = sum(isinstance(answer, Problem) for answer in answers)
        content = {"model": self._model, "succeeded": len(images) - failed, "failed": failed, "results": results}
        return Response(orjson.dumps(content), media_type=JSON)

    async def explain(self, exchange: Exchange) -> Response:
        """Draw where the model looked; `?label=` asks about another label than the predicted one."""
        label = exchange.request.query_params.get("label")
        if label is not None and label not in self._labels:
            raise Problem(
                INVALID_FIELD, f"`label` is none of this model's labels; send one of {', '.join(self._labels)}."
            )
        body = await self._read(exchange, self._settings.max_body_bytes)
        try:
            heat_map = await self._explainer.explain(self._only_image(exchange, body), label)
        finally:
            self._admission.give_bytes(len(body))
        headers = {
            "X-Explained-Label": quote(heat_map.label, safe=" "),  # a header holds no letters beyond Latin-1
            "X-Explained-Probability": f"{heat_map.probability:.6f}",
            "X-Explanation-Masks": str(heat_map.masks),
        }
        return Response(heat_map.png, headers=headers, media_type="image/png")

    async def feedback(self, exchange: Exchange) -> Response:
        """Keep the true label of an earlier prediction."""
        body = await self._read(exchange, _MAX_FEEDBACK_BYTES)
        try:
            given = Feedback.model_validate_json(body)
        except ValidationError as error:
            raise _as_problem(error) from None
        finally:
            self._admission.give_bytes(len(body))
        if given.true_label not in self._labels:
            raise Problem(
                INVALID_FIELD, f"`true_label` is none of this model's labels; send one of {', '.join(self._labels)}."
            )
        try:
            predicted_at = time_of(given.prediction_id)
        except ValueError as error:
            raise Problem(INVALID_FIELD, f"`prediction_id` is not an id that an answer carried: {error}.") from None
        if predicted_at > datetime.now(UTC) + _CLOCK_SKEW:
            raise Problem(INVALID_FIELD, "`prediction_id` lies in the future; send the id that an answer carried.")
        assert exchange.caller is not None  # noqa: S101 - the endpoint has a scope
        self._predictions.append_feedback(
            FeedbackRecord(
                prediction_id=given.prediction_id,
                true_label=given.true_label,
                time=datetime.now(UTC),
                caller=exchange.caller.name,
                request_id=exchange.request_id,
            )
        )
        return Response(orjson.dumps({"prediction_id": given.prediction_id}), 202, media_type=JSON)

    async def model(self, _exchange: Exchange) -> Response:
        """Say what is served: the release's manifest."""
        return Response(self._described, media_type=JSON)

    async def openapi(self, _exchange: Exchange) -> Response:
        """Describe the API."""
        return Response(self._openapi, media_type=JSON)

    async def page(self, _exchange: Exchange) -> Response:
        """Show the API to a person."""
        return Response(self._page, headers=self._page_headers, media_type="text/html; charset=utf-8")

    async def livez(self, _exchange: Exchange) -> Response:
        """Say that the process answers at all."""
        return Response(b'{"status":"alive"}', media_type=JSON)

    async def readyz(self, _exchange: Exchange) -> Response:
        """Say whether requests are welcome: after the warm-up, until the end begins."""
        if not self.ready:
            raise Problem(NOT_READY, "The model is being loaded, or the service ends.", headers={"Retry-After": "1"})
        return Response(b'{"status":"ready"}', media_type=JSON)

    async def metrics(self, _exchange: Exchange) -> Response:
        """Give Prometheus the numbers of all workers."""
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def _read(self, exchange: Exchange, max_bytes: int) -> bytes:
        timeout_s = self._settings.request_timeout_s
        body = await read_body(exchange.request, self._admission, max_bytes=max_bytes, timeout_s=timeout_s)
        exchange.bytes_in = len(body)
        return body

    def _only_image(self, exchange: Exchange, body: bytes) -> bytes:
        if not is_multipart(exchange.request):
            return body
        parts = split_parts(exchange.request, body, max_parts=MAX_FORM_PARTS)
        images = [part.data for part in parts if part.field == IMAGE_FIELD]
        if len(images) != 1:
            found = f"{len(images)} fields `image`" if images else f"no field `image`{_named(parts)}"
            raise Problem(INVALID_FIELD, f"The form has {found}; send one, or several to /v1/predict/batch.")
        return images[0]

    def _keep(self, exchange: Exchange, endpoint: str, data: bytes, answer: Classification) -> dict[str, Any]:
        """Enter a prediction in the log and the metrics; what the client is told of it."""
        prediction_id = new_prediction_id()
        label = self._labels[answer.label_index]
        confidence = answer.probabilities[answer.label_index]
        origin = PROBE if exchange.is_probe else MIRROR if is_copy(exchange.request.headers) else CLIENT
        if origin != PROBE:
            self._metrics.observe_prediction(label, confidence)
        _trace_steps(exchange, answer)
        image = answer.image
        self._predictions.append(
            PredictionRecord(
                prediction_id=prediction_id,
                time=datetime.now(UTC),
                request_id=exchange.request_id,
                endpoint=endpoint,
                label=label,
                confidence=confidence,
                probabilities=answer.probabilities,
                image_sha256=hashlib.sha256(data).hexdigest(),
                format=image.format,
                mode=image.mode,
                width_px=image.width_px,
                height_px=image.height_px,
                n_bytes=len(data),
                caller=exchange.caller.name if exchange.caller else "",
                duration_ms=1000 * (time.perf_counter() - exchange.started),
                origin=origin,
            )
        )
        probabilities = dict(zip(self._labels, answer.probabilities, strict=True))
        return {"prediction_id": prediction_id, "label": label, "probabilities": probabilities}


def _trace_steps(exchange: Exchange, answer: Classification) -> None:
    """Enter decoding and model in the request's trace; both are over, maybe on another thread."""
    begun_ns = time.time_ns() - int(1e9 * (time.perf_counter() - answer.begun))
    model_ns = begun_ns + int(1e9 * (answer.model_began - answer.begun))
    exchange.trace.record("decode", begun_ns, begun_ns + int(1e9 * answer.decode_s))
    exchange.trace.record("model", model_ns, model_ns + int(1e9 * answer.model_s))


def _named(parts: Sequence[Part]) -> str:
    """How many fields there are instead; their names are the client's and stay out of answers."""
    return f" among its {len(parts)}" if parts else ""


def _as_problem(error: ValidationError) -> Problem:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return Problem(BAD_REQUEST, f"The body is not JSON: {first['msg']}.")
    where = ".".join(map(str, first["loc"])) or "the body"
    return Problem(INVALID_FIELD, f"`{where}`: {first['msg']}; send prediction_id and true_label.")
