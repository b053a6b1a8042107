"""The BentoML service: workers, signals and start-up are BentoML's, every request is answered by `serving.api`.

BentoML's own road for a request (OpenTelemetry's middleware, its metrics, access log and wrappers) costs three times
what the decoding and the model cost together.  `service_class` is BentoML's way to replace a part of a service, and
`to_asgi` the part that makes its application: ours stands in front of it, and leaves it the life cycle and the page
that shows the API (docs/adr/0021 has the numbers).
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
from typing import TYPE_CHECKING, Any

import bentoml
import uvicorn.config

from pipelines.errors import Refusal
from serving.admission import Admission, bound_requests
from serving.api import Api
from serving.arbiter import amend_arbiter
from serving.authentication import Authenticator
from serving.classification import Classifier
from serving.endpoints import Endpoints
from serving.explainer import Explainer
from serving.logs import RequestLog, configure_logging
from serving.metrics import ServiceMetrics
from serving.metrics_endpoint import MetricsEndpoint
from serving.prediction_log import PredictionLog
from serving.predictor import Predictor
from serving.rate_limits import RateLimiter
from serving.release import load_release
from serving.settings import ServingSettings, get_serving_settings
from serving.tracing import Tracing

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

_BENTOML_PATHS = ("/static_content/",)  # of the page that shows the API


amend_arbiter()


def count_workers(settings: ServingSettings) -> int:
    """Worker processes to start: as set, else one per core that this process may use."""
    return settings.workers or len(os.sched_getaffinity(0))


class PerchService(bentoml.Service):  # type: ignore[misc]
    """A BentoML service whose application answers Perch's API itself."""

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        """The application of one worker."""
        # BentoML makes uvicorn's configuration and offers no parameter for its protocol; `auto` is what it asks for.
        uvicorn.config.HTTP_PROTOCOLS["auto"] = "serving.http_protocol:BoundedHttpProtocol"
        bentoml_app: ASGIApp = super().to_asgi(is_main)

        async def front_door(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and not scope["path"].startswith(_BENTOML_PATHS):
                await self.inner.current.api(scope, receive, send)
            else:
                await bentoml_app(scope, receive, send)

        return front_door


@bentoml.service(
    name="perch",
    service_class=PerchService,
    workers=count_workers(get_serving_settings()),
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    traffic={"timeout": 3600},  # the API has its own, by request
)
class PredictionService:
    """One worker's share of the service; BentoML makes it when the worker starts."""

    current: PredictionService

    def __init__(self) -> None:
        settings = get_serving_settings()
        lines = configure_logging()
        release = load_release()
        manifest = release.manifest
        authenticator = Authenticator.from_settings(settings)
        predictor = Predictor(release.model, threads=settings.model_threads)
        model_s = predictor.warm_up()
        timeout_s = settings.request_timeout_s
        threads = math.ceil(len(os.sched_getaffinity(0)) / count_workers(settings))
        most = bound_requests(settings.max_concurrent, model_s=model_s, threads=threads, timeout_s=timeout_s)
        self._metrics = ServiceMetrics(
            manifest.model,
            manifest.version,
            manifest.onnx_sha256,
            manifest.labels,
            release=settings.release_digest,
            max_concurrent=most,
        )
        self._predictions = PredictionLog(settings, manifest)
        self._predictions.start()
        self._classifier = Classifier(
            predictor,
            model_s=model_s,
            max_pixels=settings.max_pixels,
            max_bytes=settings.max_body_bytes,
            timeout_s=timeout_s,
            threads=threads,
            observe=self._metrics.observe_model,
        )
        self._classifier.warm_up()
        self._explainer = Explainer(self._classifier, manifest.labels, budget_s=settings.explain_budget_s)
        rate_limiter = RateLimiter.from_settings(settings)
        self._endpoints = Endpoints(
            release,
            self._classifier,
            explainer=self._explainer,
            admission=Admission(max_requests=most, max_buffered_bytes=settings.max_buffered_bytes),
            predictions=self._predictions,
            metrics=self._metrics,
            rate_limiter=rate_limiter,
            settings=settings,
        )
        self._tracing = Tracing.from_environment(manifest.model, manifest.version)
        self.api = Api(
            self._endpoints.table(),
            authenticator=authenticator,
            rate_limiter=rate_limiter,
            metrics=self._metrics,
            tracing=self._tracing,
            request_log=RequestLog(lines, manifest.version, every_request=settings.log_requests),
            model_version=manifest.version,
        )
        type(self).current = self
        self._metrics.watch_prediction_log(self._predictions)
        self._metrics.watch_log(lambda: lines.lines_dropped)
        self._metrics.start()
        port = settings.metrics_port
        self._metrics_endpoint = MetricsEndpoint(self._metrics.render, port, settings.metrics_host) if port else None
        # What start-up made stays to the end: the collector need not look at it again, which shows in the slowest
        # requests.
        gc.collect()
        gc.freeze()
        self._endpoints.ready = True
        self._metrics.set_ready(True)
        logger.info("ready: %s v%s, %.2f ms an image", manifest.model, manifest.version, 1000 * model_s)

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Refuse to serve at all what no worker could; BentoML calls this once, before it starts them.

        A worker that cannot start is started again and again, and its port takes connections all the same.
        """
        try:
            settings = get_serving_settings()
            load_release()
            Authenticator.from_settings(settings)
        except Refusal as refusal:
            print(f"refused: {refusal}", file=sys.stderr, flush=True)  # noqa: T201 - nobody has set up a log yet
            sys.exit(refusal.exit_code)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Ship what is kept; uvicorn calls this when the last answer is out."""
        self._endpoints.ready = False
        self._classifier.close()
        self._explainer.close()
        self._predictions.close()
        self._tracing.close()
        self._metrics.close()
        if self._metrics_endpoint:
            self._metrics_endpoint.close()


service: Any = PredictionService
