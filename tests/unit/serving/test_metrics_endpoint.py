"""`/metrics` on its own port, shared by the workers."""

from __future__ import annotations

import contextlib
import socket
import time
import urllib.error
import urllib.request

import pytest

from pipelines.errors import Refusal
from serving.metrics_endpoint import MetricsEndpoint


def _get(port: int, path: str = "/metrics") -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read()


def test_endpoint__two_workers_on_one_port__stays_when_one_ends() -> None:
    one = MetricsEndpoint(lambda: b"perch_one 1\n", 0, "127.0.0.1")
    other = MetricsEndpoint(lambda: b"perch_other 1\n", one.port, "127.0.0.1")
    try:
        seen = {_get(one.port) for _ in range(40)}
        assert seen == {b"perch_one 1\n", b"perch_other 1\n"}
        one.close()
        assert {_get(other.port) for _ in range(10)} == {b"perch_other 1\n"}
    finally:
        other.close()


def test_endpoint__any_other_address_or_method__gives_nothing_away() -> None:
    endpoint = MetricsEndpoint(lambda: b"perch_up 1\n", 0, "127.0.0.1")
    try:
        with pytest.raises(urllib.error.HTTPError) as missing:
            _get(endpoint.port, "/v1/model")
        assert missing.value.code == 404
        request = urllib.request.Request(f"http://127.0.0.1:{endpoint.port}/metrics", data=b"x", method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 501
        assert "Python" not in (refused.value.headers["Server"] or "")
    finally:
        endpoint.close()


def test_endpoint__readers_that_say_nothing__neither_stop_it_nor_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.metrics_endpoint._PATIENCE_S", 0.5)
    endpoint = MetricsEndpoint(lambda: b"perch_up 1\n", 0, "127.0.0.1")
    silent = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(7)]
    try:
        assert _get(endpoint.port) == b"perch_up 1\n"
        silent += [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(20)]
        deadline = time.monotonic() + 30
        for connection in silent:  # all are closed: some at once, some when patience ends
            connection.settimeout(max(deadline - time.monotonic(), 0.1))
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        assert _get(endpoint.port) == b"perch_up 1\n"
    finally:
        for connection in silent:
            connection.close()
        endpoint.close()


def test_endpoint__port_of_somebody_else__is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        with pytest.raises(Refusal, match=rf"PERCH_SERVING_METRICS_PORT {port}.*in use"):
            MetricsEndpoint(lambda: b"", port, "127.0.0.1")
