"""`/metrics` on a port of its own, which no API key guards and no client reaches.

Every worker listens on the same port (SO_REUSEPORT) and answers for all of them, so that it stays while any worker
lives.  Threads answer, not the event loop: a worker that is busy can still be looked at.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pipelines.errors import Refusal
from serving.metrics import CONTENT_TYPE

_MOST_AT_ONCE = 8
_PATIENCE_S = 5.0  # with a reader that sends or takes nothing


class MetricsEndpoint:
    """A small HTTP server that gives Prometheus what `render` says.

    Args:
        render: makes the answer, in Prometheus' text format.
        port: to listen on; 0 takes any, for tests.
        host: address to listen on; all by default, because Prometheus calls from another machine.

    Attributes:
        port: it listens on.

    Raises:
        Refusal: the port is taken by something else.
    """

    def __init__(self, render: Callable[[], bytes], port: int, host: str = "0.0.0.0") -> None:  # noqa: S104
        try:
            self._server = _Server((host, port), _handler(render))
        except OSError as error:
            raise Refusal(
                f"PERCH_SERVING_METRICS_PORT {port}",
                error.strerror or str(error),
                limit="a port that nothing else listens on",
                way_out="set another port, or 0 to serve /metrics beside the API",
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="perch-metrics-port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32
    allow_reuse_address = True
    _places = threading.BoundedSemaphore(_MOST_AT_ONCE)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # HTTPServer would look its own name up in the DNS here.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: object, client_address: object) -> None:
        """Answers in a thread, or closes the connection when enough of them are at work."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[arg-type]
            return
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that went away is no event."""


def _handler(render: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE_S
        server_version = "perch"
        sys_version = ""

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            body = render()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing: a scrape every few seconds is no event."""

    return Handler
