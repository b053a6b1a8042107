"""The service's log: one JSON object per line on standard output, never in the way of a request.

Lines go into memory and a thread writes them out, so that a pipe nobody reads cannot stop the event loop; what does
not fit into memory is dropped and counted.  A line holds no image, no key, no token and no file name of a client, and
JSON's escapes keep one line one line.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import threading
import traceback
from collections import deque
from datetime import UTC, datetime
from typing import Any

import orjson

_FLUSH_S = 0.2
_LAST_FLUSH_S = 1.0  # at exit, a pipe nobody reads is given up after this
_MOST_BYTES_WAITING = 4 * 2**20
# What one write() puts into a pipe stays together up to PIPE_BUF bytes, pipe(7); several workers share standard output.
_PIPE_BUF = 4096
_MOST_CHARACTERS = 1800  # of a message or a traceback, so that a line stays below PIPE_BUF in any but strange alphabets
_STANDARD_OUTPUT = 1

# Handlers that BentoML and uvicorn bring; their lines go through ours instead.
_ACCESS_LOGGERS = ("bentoml.access", "uvicorn.access")
_FOREIGN_LOGGERS = (*_ACCESS_LOGGERS, "bentoml", "uvicorn", "uvicorn.error", "circus")
_OWN_LOGGERS = ("serving", "pipelines")
# What every record of Python's logging has; the rest came with `extra=`.
_COMMON_ATTRIBUTES = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}


class LineWriter:
    """Lines of bytes to a file descriptor, from any thread, without waiting for it.

    Args:
        fd: where the lines go.
        most_bytes_waiting: what may wait in memory; more is dropped.
    """

    def __init__(self, fd: int = _STANDARD_OUTPUT, most_bytes_waiting: int = _MOST_BYTES_WAITING) -> None:
        self._fd = fd
        self._most_bytes = most_bytes_waiting
        self._lines: deque[bytes] = deque()
        self._bytes_waiting = 0
        self._counting = threading.Lock()
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self.lines_dropped = 0
        self._thread = threading.Thread(target=self._write_until_stopped, name="perch-log", daemon=True)
        self._thread.start()

    def write(self, line: bytes, urgent: bool = False) -> None:
        """Takes one line, newline included; `urgent` is written out at once instead of within 0.2 s."""
        with self._counting:
            if self._bytes_waiting + len(line) > self._most_bytes:
                self.lines_dropped += 1
                return
            self._bytes_waiting += len(line)
        self._lines.append(line)
        if urgent:
            self._wake.set()

    def close(self) -> None:
        """Writes what waits, for a second at most."""
        self._stopped.set()
        self._wake.set()
        self._thread.join(timeout=_LAST_FLUSH_S)

    def _write_until_stopped(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait(_FLUSH_S)
            self._wake.clear()
            self._flush()
        self._flush()

    def _flush(self) -> None:
        while self._lines:
            chunk = [self._lines.popleft()]
            size = len(chunk[0])
            while self._lines and size + len(self._lines[0]) <= _PIPE_BUF:
                chunk.append(self._lines.popleft())
                size += len(chunk[-1])
            written = self._write(b"".join(chunk))
            with self._counting:
                self._bytes_waiting -= size
                if not written:
                    self.lines_dropped += len(chunk)

    def _write(self, data: bytes) -> bool:
        """Whether all of it went out."""
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # whoever started us made standard output non-blocking
                select.select([], [self._fd], [], _FLUSH_S)
            except OSError:  # the reader is gone, or the disk is full
                return False
        return True


class JsonFormatter(logging.Formatter):
    """A record of Python's logging as one JSON line; what came with `extra=` are members."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "event": "log",
            "logger": record.name,
            "message": _shortened(record.getMessage(), keep="start"),
            **{name: value for name, value in vars(record).items() if name not in _COMMON_ATTRIBUTES},
        }
        if record.exc_info and record.exc_info[0]:
            line["exception"] = _shortened("".join(traceback.format_exception(*record.exc_info)), keep="end")
        return _as_json(line).decode()


class _LineHandler(logging.Handler):
    """Python's logging into a `LineWriter`."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self.format(record).encode() + b"\n", urgent=record.levelno >= logging.ERROR)
        except Exception:  # noqa: BLE001 - a record that cannot be formatted must not fail its request
            self.handleError(record)


class RequestLog:
    """One line per answered request.

    Args:
        writer: where the lines go.
        model_version: version of the model that is served.
        every_request: False leaves out requests answered below 400.
    """

    def __init__(self, writer: LineWriter, model_version: str, every_request: bool = True) -> None:
        self._writer = writer
        self._model_version = model_version
        self._least_status = 0 if every_request else 400

    def log_request(
        self,
        *,
        request_id: str,
        method: str,
        route: str,
        status: int,
        duration_s: float,
        caller: str = "",
        bytes_in: int = 0,
        problem: str = "",
        prediction_id: str = "",
        trace_id: str = "",
        span_id: str = "",
    ) -> None:
        """Logs an answered request; empty members are left out.

        Args:
            request_id: what `X-Request-ID` answered.
            method: HTTP method.
            route: the address as the service knows it, never what the client wrote.
            status: HTTP status code.
            duration_s: seconds from arrival to answer.
            caller: name of the credential, never the credential.
            bytes_in: bytes of the request's body.
            problem: slug of the problem type.
            prediction_id: of a single prediction.
            trace_id: W3C trace id, 32 hex digits.
            span_id: the request's span, or the caller's where we make none, 16 hex digits.
        """
        if status < self._least_status:
            return
        line: dict[str, Any] = {
            "time": datetime.now(UTC),
            "level": "info" if status < 500 else "warning" if status == 503 else "error",
            "event": "request",
            "request_id": request_id,
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round(duration_s * 1000, 3),
            "bytes": bytes_in,
            "model_version": self._model_version,
        }
        if caller:
            line["caller"] = caller
        if problem:
            line["problem"] = problem
        if prediction_id:
            line["prediction_id"] = prediction_id
        if trace_id:
            line["trace_id"] = trace_id
            line["span_id"] = span_id
        self._writer.write(_as_json(line) + b"\n", urgent=status == 500)


def configure_logging(level: int = logging.INFO, fd: int = _STANDARD_OUTPUT) -> LineWriter:
    """Sends all of this process's logging through one writer, BentoML's and uvicorn's too.

    Args:
        level: from which on the service's own modules are heard; libraries are from WARNING on.
        fd: where the lines go.

    Returns:
        the writer, which is emptied at exit.
    """
    writer = LineWriter(fd)
    atexit.register(writer.close)
    root = logging.getLogger()
    root.handlers = [_LineHandler(writer)]
    root.setLevel(logging.WARNING)
    for name in _FOREIGN_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    # Our own line per request replaces these; uvicorn makes none where no handler would take it.
    for name in _ACCESS_LOGGERS:
        logging.getLogger(name).propagate = False
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    return writer


def _as_json(line: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(line, default=str, option=orjson.OPT_UTC_Z)
    except TypeError:  # a lone surrogate, as in the name of a file that is not UTF-8
        return json.dumps(line, default=str).encode()


def _shortened(text: str, keep: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]} …" if keep == "start" else f"… {text[-_MOST_CHARACTERS:]}"
