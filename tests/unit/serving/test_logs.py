"""The log: whole JSON lines, cheap, and never in a request's way."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.logs import JsonFormatter, LineWriter, RequestLog

PROJECT = Path(__file__).parents[3]


class Lines(LineWriter):
    """A writer whose lines are read back from a pipe."""

    def __init__(self) -> None:
        self._reader, self._end = os.pipe()
        super().__init__(self._end)

    def read(self) -> list[dict[str, Any]]:
        self.close()
        os.close(self._end)
        with os.fdopen(self._reader) as lines:
            return [json.loads(line) for line in lines]


def _run(code: str, **streams: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **streams)


def _lines_of(code: str) -> list[dict[str, Any]]:
    output, errors = _run(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate(timeout=60)
    assert errors == b""
    return [json.loads(line) for line in output.splitlines()]


def test_log_request__all_that_is_known__is_one_json_object() -> None:
    lines = Lines()
    RequestLog(lines, "3").log_request(
        request_id="7f3c",
        method="POST",
        route="/v1/predict",
        status=415,
        duration_s=0.0031234,
        caller="clinic-a",
        bytes_in=12,
        problem="unsupported-media",
        trace_id="a" * 32,
        span_id="b" * 16,
    )
    (line,) = lines.read()
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "7f3c",
        "method": "POST",
        "route": "/v1/predict",
        "status": 415,
        "duration_ms": 3.123,
        "bytes": 12,
        "model_version": "3",
        "caller": "clinic-a",
        "problem": "unsupported-media",
        "trace_id": "a" * 32,
        "span_id": "b" * 16,
    }


def test_log_request__errors_only__leaves_out_what_went_well() -> None:
    lines = Lines()
    log = RequestLog(lines, "3", every_request=False)
    for status in (200, 202, 400, 503, 500):
        log.log_request(request_id="r", method="POST", route="/v1/predict", status=status, duration_s=0.1)
    assert [(line["status"], line["level"]) for line in lines.read()] == [
        (400, "info"),
        (503, "warning"),
        (500, "error"),
    ]


@given(text=st.text())
def test_json_formatter__whatever_a_message_holds__stays_one_line(text: str) -> None:
    record = logging.LogRecord("serving.api", logging.INFO, "", 0, "%s", (text,), None)
    line = JsonFormatter().format(record)
    assert not {"\n", "\r", "\x1b"} & set(line)
    assert json.loads(line)["message"] == text


def test_json_formatter__text_that_is_no_unicode__is_logged_all_the_same() -> None:
    record = logging.LogRecord("serving.api", logging.INFO, "", 0, "file %s", ("\udcff.png",), None)
    assert json.loads(JsonFormatter().format(record))["message"] == "file \udcff.png"


def test_json_formatter__huge_message__is_cut_so_that_the_line_stays_whole_in_a_pipe() -> None:
    record = logging.LogRecord("serving.api", logging.INFO, "", 0, "x" * 10**6, (), None)
    try:
        raise ValueError("y" * 10**6)
    except ValueError:
        record.exc_info = sys.exc_info()
    assert len(JsonFormatter().format(record)) < 4096


def test_configure_logging__traceback_and_warnings_and_libraries__are_json_too() -> None:
    lines = _lines_of(
        "import logging, warnings\n"
        "import bentoml._internal.log as theirs\n"
        "theirs.configure_server_logging()\n"
        "from serving.logs import configure_logging\n"
        "configure_logging()\n"
        "logging.getLogger('bentoml').warning('from bentoml')\n"
        "logging.getLogger('uvicorn.error').error('from uvicorn')\n"
        "logging.getLogger('botocore').info('too chatty')\n"
        "logging.getLogger('serving.service').info('ready', extra={'model_version': '3'})\n"
        "warnings.warn('old')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('serving.api').exception('unhandled')\n"
    )
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("bentoml", "warning"),
        ("uvicorn.error", "error"),
        ("serving.service", "info"),
        ("py.warnings", "warning"),
        ("serving.api", "error"),
    ]
    assert lines[2]["model_version"] == "3"
    assert lines[4]["exception"].endswith("ZeroDivisionError: division by zero\n")


def test_configure_logging__servers_access_logs__are_off_at_their_root() -> None:
    """uvicorn makes a line per request if any handler would take it: it costs more than ours."""
    (line,) = _lines_of(
        "import logging\n"
        "from serving.logs import configure_logging\n"
        "configure_logging()\n"
        "names = [n for n in ('uvicorn.access', 'bentoml.access') if logging.getLogger(n).hasHandlers()]\n"
        "logging.getLogger('serving').info('heard: %s', names)\n"
    )
    assert line["message"] == "heard: []"


def test_line_writer__several_processes_on_one_pipe__never_mix_their_lines() -> None:
    code = (
        "import sys\n"
        "from serving.logs import LineWriter, RequestLog\n"
        "writer = LineWriter(most_bytes_waiting=2**26)\n"
        "log = RequestLog(writer, '3')\n"
        "for number in range(20_000):\n"
        "    log.log_request(request_id=f'{number}', method='POST', route='/v1/predict', status=200,\n"
        "                    duration_s=0.1, caller='c' * (number % 300))\n"
        "    if number % 1000 == 0: import time; time.sleep(0.005)\n"
        "writer.close()\n"
        "assert writer.lines_dropped == 0\n"
    )
    reader, end = os.pipe()
    workers = [_run(code, stdout=end) for _ in range(3)]
    os.close(end)
    with os.fdopen(reader) as lines:
        numbers = [json.loads(line)["request_id"] for line in lines]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    assert len(numbers) == 60_000


def test_line_writer__nobody_reads_the_pipe__requests_go_on_and_the_process_ends() -> None:
    reader, end = os.pipe()
    try:
        writer = LineWriter(end, most_bytes_waiting=2**20)
        line = b"x" * 999 + b"\n"
        slowest_s = 0.0
        for _ in range(5_000):
            started = time.perf_counter()
            writer.write(line)
            slowest_s = max(slowest_s, time.perf_counter() - started)
        assert slowest_s < 5  # a blocking write would never come back
        assert 3_500 < writer.lines_dropped < 4_500
        started = time.perf_counter()
        writer.close()
        assert time.perf_counter() - started < 10
    finally:
        os.close(reader)  # which ends the thread that hangs in write()
        time.sleep(0.05)
        os.close(end)


def test_line_writer__pipe_is_read_again__goes_on_and_has_counted_what_was_lost() -> None:
    reader, end = os.pipe()
    writer = LineWriter(end, most_bytes_waiting=2**20)
    for number in range(5_000):
        writer.write(b"%04d" % number + b"x" * 995 + b"\n")
    lost = writer.lines_dropped
    assert lost > 0
    read = b""
    while read.count(b"\n") < 5_000 - lost:
        read += os.read(reader, 2**16)
    writer.write(b"after\n", urgent=True)
    assert os.read(reader, 100) == b"after\n"
    assert writer.lines_dropped == lost
    writer.close()
    os.close(reader)
    os.close(end)


def test_line_writer__reader_is_gone__counts_and_goes_on() -> None:
    reader, end = os.pipe()
    os.close(reader)
    writer = LineWriter(end)
    writer.write(b"one\n")
    writer.write(b"two\n", urgent=True)
    writer.close()
    os.close(end)
    assert writer.lines_dropped == 2


def test_line_writer__descriptor_that_does_not_block__loses_nothing() -> None:
    reader, end = os.pipe()
    os.set_blocking(end, False)
    writer = LineWriter(end)
    for _ in range(200):
        writer.write(b"x" * 999 + b"\n", urgent=True)
    read = b""
    while len(read) < 200_000:
        read += os.read(reader, 2**16)
    writer.close()
    os.close(reader)
    os.close(end)
    assert (read.count(b"\n"), writer.lines_dropped) == (200, 0)


def test_log_request__one_line__costs_little() -> None:
    """Some 5 µs where the decoder and the model take 500; the limit leaves room for a busy machine."""
    end = os.open(os.devnull, os.O_WRONLY)
    writer = LineWriter(end)
    log = RequestLog(writer, "3")
    best_s = 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(500):
            log.log_request(
                request_id="01JD3KX8QZ0000000000000000",
                method="POST",
                route="/v1/predict",
                status=200,
                duration_s=0.0031,
                caller="clinic-a",
                bytes_in=4096,
                prediction_id="01JD3KX8QZ0000000000000001",
            )
        best_s = min(best_s, (time.perf_counter() - started) / 500)
    writer.close()
    os.close(end)
    print(f"{best_s * 1e6:.1f} µs")
    assert best_s < 25e-6


@pytest.mark.parametrize("signal_name", ["SIGTERM", "exit"])
def test_configure_logging__process_ends__has_written_its_last_line(signal_name: str) -> None:
    code = (
        "import logging, os, signal, sys\n"
        "from serving.logs import configure_logging\n"
        "configure_logging()\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "logging.getLogger('serving').info('last words')\n"
    )
    if signal_name == "SIGTERM":
        code += "os.kill(os.getpid(), signal.SIGTERM)\n"
    assert [line["message"] for line in _lines_of(code)] == ["last words"]
