"""What a socket's reads happen to hold together must not matter; here each read is given as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from serving.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        """Every read is the test's."""

    def resume_reading(self) -> None:
        """Every read is the test's."""


async def answer(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """Refuses a large body unread, as the API does, and says how long another was."""
    length = int(dict(scope["headers"]).get(b"content-length", b"0"))
    status, size = 413, 0
    if length < 1_000_000:
        more = True
        while more:
            message = await receive()
            size, more = size + len(message["body"]), message["more_body"]
        status = 200
    body = str(size).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def converse(*reads: bytes) -> Wire:
    """Give a connection these reads, each after all has been done that the one before asked for."""

    async def give() -> Wire:
        wire = Wire()
        protocol = BoundedHttpProtocol(Config(answer, log_config=None), ServerState(), {})
        protocol.connection_made(wire)
        for read in reads:
            protocol.data_received(read)
            for _ in range(10):
                await asyncio.sleep(0)
        protocol.connection_lost(None)
        return wire

    return asyncio.run(give())


def head(length: int, *lines: str) -> bytes:
    return "\r\n".join(["POST / HTTP/1.1", "Host: x", f"Content-Length: {length}", *lines, "", ""]).encode()


def test_read__end_of_a_refused_body_and_the_next_head__does_not_count_as_that_head() -> None:
    end = bytes(3 * MAX_HEAD_BYTES)
    wire = converse(head(2_000_000), bytes(2_000_000 - len(end)), end + head(300), bytes(300))
    first, second = wire.written.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"413 ")
    assert second.startswith(b"200 ")
    assert second.endswith(b"300")
    assert b"connection: close" not in wire.written


@pytest.mark.parametrize("size", [100, 1_000, 2**17])
def test_read__head_in_reads_of_any_size__is_refused_soon_after_its_limit(size: int) -> None:
    lines = b"X-Odd: " + b"a" * (4 * MAX_HEAD_BYTES)
    sent = head(0)[:-2] + lines
    reads = [sent[at : at + size] for at in range(0, len(sent), size)]
    wire = converse(*reads)
    assert wire.written.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in wire.written
    assert wire.closed


def test_read__many_messages__are_counted_one_by_one() -> None:
    one = head(10) + bytes(10)
    wire = converse(*[one[at : at + 7] for at in range(0, len(one), 7)] * (2 * MAX_HEAD_BYTES // len(one)))
    assert set(wire.written.split(b"HTTP/1.1 ")[1:]) == {b"200 OK\r\ncontent-length: 2\r\n\r\n10"}
