import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which

import pytest

from benchmarks import wrk
from tests.missing_parts import miss

REPORT = """Running 1s test @ http://127.0.0.1:1/
  2 threads and 4 connections
Requests/sec:    995.00
WRK {"requests": 1000, "duration_us": 2000000, "bytes": 9, "connect": 1, "read": 2, "write": 3, "status": 4, \
"timeout": 5, "p50_us": 1500, "p95_us": 2500, "p99_us": 9000, "max_us": 10000}
"""


def test_parse__a_report__gives_milliseconds_and_all_kinds_of_errors() -> None:
    load = wrk.parse(REPORT)
    assert load == wrk.Load(requests=1000, duration_s=2.0, p50_ms=1.5, p95_ms=2.5, p99_ms=9.0, errors=15)


def test_requests_per_s__errors__do_not_count_as_answers() -> None:
    assert wrk.parse(REPORT).requests_per_s == (1000 - 15) / 2


def test_parse__no_result__says_what_wrk_printed() -> None:
    with pytest.raises(ValueError, match="unable to connect"):
        wrk.parse("unable to connect to 127.0.0.1:1 Connection refused")


def test_command__a_core__is_pinned() -> None:
    line = wrk.command("http://x/", Path("b"), "image/png", {"X-API-Key": "k"}, connections=4, seconds=2.6, core=1)
    assert line[:4] == ["taskset", "-c", "1", "wrk"]
    assert "-d3s" in line
    assert line[-4:] == ["b", "image/png", "X-API-Key", "k"]


class _EveryThirdFails(BaseHTTPRequestHandler):
    """Answers 503 to each third request, and to every one that is not what it should be."""

    protocol_version = "HTTP/1.1"
    answered = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).answered += 1
        as_sent = (body, self.headers["Content-Type"], self.headers["X-API-Key"]) == (b"\x00\xff", "image/png", "k")
        self.send_response(200 if as_sent and self.answered % 3 else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_run__a_server_that_fails_every_third_time__is_counted_so(tmp_path: Path) -> None:
    if which("wrk") is None:
        miss("wrk is not installed", "scripts/debian-packages.sh installs it")
    (tmp_path / "body").write_bytes(b"\x00\xff")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _EveryThirdFails)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        line = wrk.command(url, tmp_path / "body", "image/png", {"X-API-Key": "k"}, connections=1, seconds=1)
        load = wrk.run(line, 1)
    finally:
        server.shutdown()
        server.server_close()
    assert load.requests > 20
    assert load.errors == pytest.approx(load.requests / 3, abs=2)
    assert 0 < load.p50_ms <= load.p95_ms <= load.p99_ms


def test_run__nobody_listens__is_an_error(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "import sys; sys.exit('unable to connect')"]
    with pytest.raises(ValueError, match="unable to connect"):
        wrk.run(line, 1)
