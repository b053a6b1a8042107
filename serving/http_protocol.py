"""uvicorn's HTTP protocol with bounds on what comes before a request reaches the API, and on a connection's age.

uvicorn bounds neither the size of a head nor its time: a head that never ends fills the memory, and a client that
sends nothing holds its connection for ever.  What is refused here is answered as everywhere else, with problem+json.

A connection stays with the worker that took it.  Without an age, a worker that was started again, or a new pod, gets
next to nothing of clients that keep theirs open, while the others answer for it.
"""

from __future__ import annotations

import asyncio
import random

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipelines.core.prediction_ids import new_prediction_id
from serving.problems import BAD_REQUEST, MEDIA_TYPE, REQUEST_TIMEOUT, Problem
from serving.settings import get_serving_settings

MAX_HEAD_BYTES = 2**16  # beside one read from the socket, which is parsed before it is counted
MAX_HEADERS = 128  # trailers among them
LINGER_S = 5.0  # for the rest of a body that was refused; a close would take the answer along, which is on its way
LAST_REQUEST_S = 0.5  # at the server's end an idle connection may bring one more request in this time
AGE_SPREAD = 0.2  # of a connection's greatest age, either way: those that began together shall not end together
_FRAMING_BYTES = 16  # per byte of a chunked body; the smallest chunk needs 6

_REASONS = {400: "Bad Request", 408: "Request Timeout"}


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    _open = False  # a message has begun, and is not complete
    _just_begun = False  # in what is being parsed, which may hold the end of the message before it
    _head_complete = False
    _raw_bytes = 0  # of the open message, without those that came together with its beginning
    _body_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _ends = False  # the next answer is the last
    _old_at = 0.0  # by the loop's clock

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        spread = random.uniform(1 - AGE_SPREAD, 1 + AGE_SPREAD)  # noqa: S311 - no secret
        self._old_at = self.loop.time() + spread * get_serving_settings().connection_age_s
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._cancel_wait()
        self._cancel_linger()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived, and refuse a message that is all head and framing."""
        self._just_begun = False
        super().data_received(data)
        if not self._open or self.transport.is_closing():
            return
        if not self._just_begun:
            self._raw_bytes += len(data)
            if self._raw_bytes > MAX_HEAD_BYTES + _FRAMING_BYTES * self._body_bytes:
                detail = f"The request has more than {MAX_HEAD_BYTES:,} bytes beside its body; send fewer headers."
                self._refuse(Problem(BAD_REQUEST, detail))
                return
        if not self._head_complete and self._head_timer is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._open, self._just_begun, self._head_complete = True, True, False
        self._raw_bytes = self._body_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep one header; a failure here is answered as a request that cannot be parsed."""
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete: the body's time and size are the API's to judge."""
        self._head_complete = True
        self._cancel_wait()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is there; where its connection ends, its answer says so.

        Not before: the answer to a request that is refused half-way would be lost with the rest of its body.
        """
        self._open = False
        self._cancel_linger()
        super().on_message_complete()
        if not self.cycle.response_started:
            if self._ends or self.loop.time() >= self._old_at:
                self.cycle.keep_alive = False
        elif self._ends and self.cycle.response_complete:
            self.transport.close()  # refused half-way, and there is no time for another

    def on_response_complete(self) -> None:
        """The answer is out; what is still coming of its request is read and thrown away, for a while."""
        super().on_response_complete()
        if self._open and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _cancel_linger(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def shutdown(self) -> None:
        """The server ends: say so with the last answer.

        uvicorn closes idle connections at once, and resets those whose next request has just been sent: the client of
        a busy connection would lose one that it cannot safely repeat.
        """
        self._ends = True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LAST_REQUEST_S, self._close_if_idle)
        else:
            super().shutdown()

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()  # also when that is done already

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        del msg
        self._refuse(Problem(BAD_REQUEST, f"This is not HTTP/1.1, or has more than {MAX_HEADERS} headers."))

    def _should_upgrade_to_ws(self) -> bool:
        return False  # the API has no WebSockets

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that is not offered is answered as the plain request that it also is."""

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(get_serving_settings().request_timeout_s, self._give_up)

    def _cancel_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self._open:
            self._refuse(
                Problem(REQUEST_TIMEOUT, "The head of the request did not arrive in time; send it in one piece.")
            )
        else:
            self.transport.close()  # nothing was asked

    def _refuse(self, problem: Problem) -> None:
        """Answer and close; the connection's next bytes would mean nothing."""
        self._open = False
        self._cancel_wait()
        if self.transport.is_closing():
            return
        request_id = new_prediction_id()
        body = orjson.dumps(problem.as_json(request_id))
        status = problem.kind.status
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
