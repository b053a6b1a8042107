"""OpenTelemetry spans over OTLP/HTTP; imported only where an endpoint is set.

Spans follow the HTTP semantic conventions, https://opentelemetry.io/docs/specs/semconv/http/http-spans/.  They are
sent in the background: an endpoint that is away costs spans, never requests.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.tracing import RequestTrace, Tracing, parse_traceparent

_log = logging.getLogger(__name__)

_LAST_EXPORT_S = 3.0  # at the end an endpoint that is away is given up after this; the SDK would wait for 30
_LONGEST_TRACESTATE = 512  # what the specification asks everybody to pass on


class OtlpTracing(Tracing):
    """Spans of every request, to the endpoint that the environment names.

    Args:
        model: name of the model that is served.
        model_version: its version.
    """

    def __init__(self, model: str, model_version: str) -> None:
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        if protocol not in (None, "", "http/protobuf"):
            _log.warning("traces go out as http/protobuf; OTEL_EXPORTER_OTLP_PROTOCOL asks for %s", protocol)
        # "Queue full" would be one line for each span while an endpoint is away; the exporter says it for each batch.
        logging.getLogger("opentelemetry.sdk._shared_internal").setLevel(logging.ERROR)
        attributes = {"perch.model.name": model, "perch.model.version": model_version}
        if not os.environ.get("OTEL_SERVICE_NAME"):
            attributes["service.name"] = "perch"
        self._provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("perch.serving")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, method: str, route: str, traceparent: str | None = None, tracestate: str = "") -> RequestTrace:
        """A request has arrived: its span begins, below the client's if the client has one."""
        parent = Context()
        if traceparent and parse_traceparent(traceparent):
            state = tracestate if len(tracestate) <= _LONGEST_TRACESTATE else ""
            parent = self._propagator.extract({"traceparent": traceparent, "tracestate": state}, parent)
        attributes = {"http.request.method": method, "http.route": route}
        span = self._tracer.start_span(f"{method} {route}", parent, SpanKind.SERVER, attributes)
        return _RecordingTrace(self._tracer, span)

    def close(self) -> None:
        """Sends what waits, for three seconds at most."""
        sending = threading.Thread(target=self._provider.shutdown, name="perch-last-spans", daemon=True)
        sending.start()
        sending.join(_LAST_EXPORT_S)


class _RecordingTrace(RequestTrace):
    __slots__ = ("_context", "_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span) -> None:
        ids = span.get_span_context()
        super().__init__(format(ids.trace_id, "032x"), format(ids.span_id, "016x"))
        self._tracer, self._span = tracer, span
        self._context = set_span_in_context(span, Context())

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start_ns = time.time_ns()
        try:
            yield
        finally:
            self.record(name, start_ns, time.time_ns())

    def record(self, name: str, start_ns: int, end_ns: int) -> None:
        self._tracer.start_span(name, self._context, start_time=start_ns).end(end_ns)

    def end(self, status: int, *, problem: str = "", request_id: str = "") -> None:
        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attribute("perch.request_id", request_id)
        if problem:
            self._span.set_attribute("error.type", problem)
        if status >= 500:  # a client's mistake is no error of the server, says the convention
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
