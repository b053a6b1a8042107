"""Traces: sent to a real OTLP/HTTP receiver, or nothing at all."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving.tracing import Tracing, parse_traceparent

PROJECT = Path(__file__).parents[3]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver:
    """An OTLP/HTTP endpoint that keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                receiver.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def spans(self) -> dict[str, Any]:
        return {
            span.name: span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    receiver = Receiver()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


def _attributes(holder: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in holder.attributes}


def test_otlp__a_request_with_its_steps__arrives_as_one_trace(receiver: Receiver) -> None:
    tracing = Tracing.from_environment("digits", "3")
    trace = tracing.begin("POST", "/v1/predict", f"00-{TRACE}-{PARENT}-01", "vendor=1")
    with trace.span("decode"):
        time.sleep(0.002)
    now = time.time_ns()
    trace.record("model", now - 5_000_000, now)
    trace.end(200, request_id="7f3c")
    tracing.close()

    spans = receiver.spans()
    request = spans["POST /v1/predict"]
    assert request.trace_id.hex() == TRACE == trace.trace_id
    assert request.parent_span_id.hex() == PARENT
    assert request.span_id.hex() == trace.span_id
    assert request.trace_state == "vendor=1"
    assert request.kind == 2  # SPAN_KIND_SERVER
    assert _attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/predict",
        "http.response.status_code": 200,
        "perch.request_id": "7f3c",
    }
    assert {spans[step].parent_span_id for step in ("decode", "model")} == {request.span_id}
    assert spans["model"].end_time_unix_nano - spans["model"].start_time_unix_nano == 5_000_000
    assert spans["decode"].end_time_unix_nano - spans["decode"].start_time_unix_nano >= 2_000_000
    resource = _attributes(receiver.requests[0].resource_spans[0].resource)
    assert resource["service.name"] == "perch"
    assert (resource["perch.model.name"], resource["perch.model.version"]) == ("digits", "3")


def test_otlp__an_error_of_the_service__is_marked_and_a_client_error_is_not(receiver: Receiver) -> None:
    tracing = Tracing.from_environment()
    tracing.begin("POST", "/v1/predict").end(503, problem="overloaded")
    tracing.begin("POST", "/v1/explain").end(415, problem="unsupported-media")
    tracing.close()
    spans = receiver.spans()
    assert (spans["POST /v1/predict"].status.code, spans["POST /v1/explain"].status.code) == (2, 0)
    assert _attributes(spans["POST /v1/explain"])["error.type"] == "unsupported-media"


def test_otlp__client_that_does_not_sample__is_followed_in_the_log_only(receiver: Receiver) -> None:
    tracing = Tracing.from_environment()
    trace = tracing.begin("POST", "/v1/predict", f"00-{TRACE}-{PARENT}-00")
    trace.end(200)
    tracing.close()
    assert trace.trace_id == TRACE
    assert receiver.requests == []


def test_otlp__standard_variables__name_the_service_and_choose_the_sampler(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "clinic")
    tracing = Tracing.from_environment()
    tracing.begin("GET", "/v1/model").end(200)
    tracing.close()
    assert _attributes(receiver.requests[0].resource_spans[0].resource)["service.name"] == "clinic"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    silent = Tracing.from_environment()
    silent.begin("GET", "/v1/model").end(200)
    silent.close()
    assert len(receiver.requests) == 1


def test_otlp__traceparent_that_is_none__begins_a_trace_of_its_own(receiver: Receiver) -> None:
    tracing = Tracing.from_environment()
    trace = tracing.begin("GET", "/v1/model", f"00-{'0' * 32}-{PARENT}-01", "x" * 10**5)
    trace.end(200)
    tracing.close()
    (span,) = receiver.spans().values()
    assert span.parent_span_id == b""
    assert span.trace_id.hex() == trace.trace_id != "0" * 32


def test_otlp__endpoint_is_away__requests_go_on_and_the_end_is_soon(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.otlp_tracing._LAST_EXPORT_S", 0.3)
    receiver.server.shutdown()
    receiver.server.server_close()
    tracing = Tracing.from_environment()
    started = time.perf_counter()
    for _ in range(5_000):  # more than the queue holds
        tracing.begin("POST", "/v1/predict").end(200)
    assert time.perf_counter() - started < 10
    started = time.perf_counter()
    tracing.close()
    assert time.perf_counter() - started < 10  # the library itself would wait for 30


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_EXPORTER_OTLP_ENDPOINT", ""), ("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")],
)
def test_from_environment__not_asked_for__records_nothing(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    tracing = Tracing.from_environment()
    trace = tracing.begin("POST", "/v1/predict", f"00-{TRACE}-{PARENT}-01")
    with trace.span("decode"):
        pass
    trace.end(200)
    tracing.close()
    assert (trace.trace_id, trace.span_id) == (TRACE, PARENT)
    assert receiver.requests == []


def test_from_environment__no_endpoint__imports_no_opentelemetry() -> None:
    code = (
        "import sys\n"
        "from serving.tracing import Tracing\n"
        "Tracing.from_environment().begin('GET', '/v1/model')\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01\n",
        f"01-{TRACE}-{PARENT}-01-{'x' * 300}",
    ],
)
def test_parse_traceparent__what_the_standard_forbids__is_none(header: str) -> None:
    assert parse_traceparent(header) is None


def test_parse_traceparent__a_later_version__is_read_as_far_as_it_is_known() -> None:
    assert parse_traceparent(f"cc-{TRACE}-{PARENT}-01-what-the-future-brings") == (TRACE, PARENT)


@given(header=st.text())
def test_parse_traceparent__anything__gives_hex_or_none(header: str) -> None:
    assert parse_traceparent(header) is None
