"""Traces, when an OTLP endpoint is set; without one only `traceparent` is read, for the log.

OpenTelemetry's own variables steer it: `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_HEADERS`,
`OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_…`, `OTEL_SDK_DISABLED`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

# https://www.w3.org/TR/trace-context/#traceparent-header; what may follow belongs to versions that do not exist yet.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_LONGEST_TRACEPARENT = 256
_NOTHING: AbstractContextManager[None] = nullcontext()


class RequestTrace:
    """What is known of one request's trace; this one records nothing.

    Attributes:
        trace_id: 32 hex digits, empty when the client sent no `traceparent`.
        span_id: 16 hex digits: our span of the request, or the client's where we record none.
    """

    __slots__ = ("span_id", "trace_id")

    def __init__(self, trace_id: str = "", span_id: str = "") -> None:
        self.trace_id, self.span_id = trace_id, span_id

    def span(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002 - recorded by the subclass
        """Records a step, e.g. `decode`, as a span below the request's."""
        return _NOTHING

    def record(self, name: str, start_ns: int, end_ns: int) -> None:
        """Records a step that is over; times are `time.time_ns()`."""

    def end(self, status: int, *, problem: str = "", request_id: str = "") -> None:
        """The request was answered.

        Args:
            status: HTTP status code.
            problem: slug of the problem type, if it was answered with one.
            request_id: what the answer's `X-Request-ID` says.
        """


_NO_TRACE = RequestTrace()


class Tracing:
    """Makes a `RequestTrace` for each request; this one records nothing."""

    @staticmethod
    def from_environment(model: str = "", model_version: str = "") -> Tracing:
        """Tracing as the OTEL_* variables ask for it.

        Args:
            model: name of the model that is served, the resource attribute `perch.model.name`.
            model_version: its version, `perch.model.version`.
        """
        if not _is_asked_for(os.environ):
            return Tracing()
        # Half a second of imports that a service without an endpoint does not pay.
        from serving.otlp_tracing import OtlpTracing

        return OtlpTracing(model, model_version)

    def begin(
        self,
        method: str,  # noqa: ARG002 - recorded by the subclass, as are the route and the state
        route: str,  # noqa: ARG002
        traceparent: str | None = None,
        tracestate: str = "",  # noqa: ARG002
    ) -> RequestTrace:
        """A request has arrived.

        Args:
            method: HTTP method.
            route: the address as the service knows it.
            traceparent: the header of that name, if it came.
            tracestate: likewise.
        """
        parent = parse_traceparent(traceparent) if traceparent else None
        return RequestTrace(*parent) if parent else _NO_TRACE

    def close(self) -> None:
        """Sends what waits."""


def parse_traceparent(header: str) -> tuple[str, str] | None:
    """Trace id and parent's span id of a W3C `traceparent`, or None if it is not one."""
    match = _TRACEPARENT.fullmatch(header) if len(header) <= _LONGEST_TRACEPARENT else None
    if match is None or (match[1] == "00" and match[4]):
        return None
    return match[2], match[3]


def _is_asked_for(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") not in ("otlp", ""):
        return False
    return bool(environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))
