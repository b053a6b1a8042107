"""The HTTP API as one ASGI application: finds the endpoint, asks who calls, and turns whatever happens into an answer.

It is written on Starlette's requests and responses alone.  Its few fixed paths need no router, and every layer of
middleware would cost each request about as much as the model does (docs/adr/0021).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from pipelines.core.prediction_ids import new_prediction_id
from pipelines.core.request_origins import PROBE_HEADER, PROBER
from serving.authentication import ANYBODY, Authenticator, Caller, require
from serving.logs import RequestLog
from serving.metrics import OTHER_ROUTE, ServiceMetrics
from serving.problems import INTERNAL, METHOD_NOT_ALLOWED, NOT_FOUND, OVERLOADED, Problem
from serving.rate_limits import RateLimiter
from serving.request_bodies import ClientGone
from serving.tracing import RequestTrace, Tracing

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's number for a client that closed its connection; logged, never sent
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class Exchange:
    """One request on its way to an answer.

    Attributes:
        request: Starlette's.
        request_id: the client's own if sane, else made here.
        started: `time.perf_counter()` at its arrival.
        trace: where its steps may be recorded.
        caller: who sent it; None at the open endpoints, and until that is known.
        bytes_in: of its body.
        prediction_id: of its answer, where that is a single prediction.
        problem: slug of the problem it was answered with.
    """

    request: Request
    request_id: str
    started: float
    trace: RequestTrace
    caller: Caller | None = None
    bytes_in: int = 0
    prediction_id: str = ""
    problem: str = ""

    @property
    def is_probe(self) -> bool:
        """Whether the prober sent it, or the gateway a copy of what the prober sent: such a request is no client's."""
        caller = self.caller
        # Without authentication the prober is anybody, too.
        is_prober = caller is not None and (caller.name == PROBER or caller is ANYBODY)
        return is_prober and PROBE_HEADER in self.request.headers


Handler = Callable[[Exchange], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A method at a path.

    Attributes:
        handler: makes the answer.
        scope: what the caller must be allowed; empty lets everybody in.
    """

    handler: Handler
    scope: str = ""


class Api:
    """The ASGI application.

    Args:
        endpoints: by path, then by method.
        authenticator: says who calls.
        rate_limiter: says whether they may, once more.
        metrics: counts.
        tracing: makes spans, where an exporter is configured.
        request_log: gets a line per request.
        model_version: sent with every answer.
    """

    def __init__(
        self,
        endpoints: dict[str, dict[str, Endpoint]],
        *,
        authenticator: Authenticator,
        rate_limiter: RateLimiter,
        metrics: ServiceMetrics,
        tracing: Tracing,
        request_log: RequestLog,
        model_version: str,
    ) -> None:
        self.endpoints = endpoints
        self._authenticator, self._rate_limiter = authenticator, rate_limiter
        self._metrics, self._tracing = metrics, tracing
        self._request_log = request_log
        self._model_version = model_version.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whatever goes wrong becomes a problem, never an unhandled exception."""
        started = time.perf_counter()
        request = Request(scope, receive)
        headers = request.headers
        method, path = scope["method"], scope["path"]
        route = path if path in self.endpoints else OTHER_ROUTE
        given = headers.get("x-request-id")
        request_id = given if given and _SANE_REQUEST_ID.fullmatch(given) else new_prediction_id()
        trace = self._tracing.begin(method, route, headers.get("traceparent"), headers.get("tracestate", ""))
        exchange = Exchange(request, request_id, started, trace)
        status = CLIENT_GONE
        self._metrics.in_flight(1)
        try:
            response = await self._answer(exchange, path)
            if response is not None:
                response.raw_headers.append((b"x-request-id", request_id.encode()))
                response.raw_headers.append((b"x-model-version", self._model_version))
                await response(scope, receive, send)
                status = response.status_code
        finally:
            seconds = time.perf_counter() - started
            self._metrics.in_flight(-1)
            self._metrics.observe_request(route, status, seconds, exchange.problem, is_probe=exchange.is_probe)
            trace.end(status, problem=exchange.problem, request_id=request_id)
            self._request_log.log_request(
                request_id=request_id,
                method=method,
                route=route,
                status=status,
                duration_s=seconds,
                caller=exchange.caller.name if exchange.caller else "",
                bytes_in=exchange.bytes_in,
                problem=exchange.problem,
                prediction_id=exchange.prediction_id,
                trace_id=trace.trace_id,
                span_id=trace.span_id,
            )

    async def _answer(self, exchange: Exchange, path: str) -> Response | None:
        """The answer, or None when nobody waits for it any more."""
        try:
            endpoint = self._find(path, exchange.request.method)
            if endpoint.scope:
                exchange.caller = self._authenticator.authenticate(exchange.request.headers)
                require(exchange.caller, endpoint.scope)
                self._rate_limiter.take(exchange.caller)
            return await endpoint.handler(exchange)
        except Problem as problem:
            return _refuse(exchange, problem)
        except ClientGone:
            return None
        except MemoryError:
            logger.exception("out of memory in request %s", exchange.request_id)
            return _refuse(
                exchange, Problem(OVERLOADED, "Not enough memory for this now.", headers={"Retry-After": "1"})
            )
        except Exception:
            # The one place that may catch everything: a client gets an answer, on call gets the traceback.
            logger.exception("unhandled in request %s", exchange.request_id)
            return _refuse(
                exchange, Problem(INTERNAL, "An error of the service, not of the request; its log has the request id.")
            )

    def _find(self, path: str, method: str) -> Endpoint:
        methods = self.endpoints.get(path)
        if methods is None:
            raise Problem(NOT_FOUND, "Nothing is served at this path; /v1/openapi.json lists what is.")
        endpoint = methods.get(method)
        if endpoint is None:
            allowed = ", ".join(sorted(methods))
            raise Problem(METHOD_NOT_ALLOWED, f"This path takes {allowed}.", headers={"Allow": allowed})
        return endpoint


def _refuse(exchange: Exchange, problem: Problem) -> Response:
    exchange.problem = problem.kind.slug
    return problem.as_response(exchange.request_id)
