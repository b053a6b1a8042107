"""Reads a request's body within its limits of bytes and time, and takes multipart forms apart."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serving.admission import Admission
from serving.problems import BAD_REQUEST, REQUEST_TIMEOUT, TOO_LARGE, Problem

# Whoever waits to be told that the body is welcome may send it yet, or the next request: which, nobody can tell.
# A body that is on its way is read away instead (`http_protocol`): a close would take the answer along.
_CLOSE = {"Connection": "close"}


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


@dataclass(frozen=True)
class Part:
    """One part of a multipart form.

    Attributes:
        field: its name; empty where the part has none.
        data: its content.
    """

    field: str
    data: bytes


async def read_body(request: Request, admission: Admission, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body; its bytes count against the admission's room until the caller gives them back.

    Args:
        request: of which nothing was read yet.
        admission: gives room for the bytes that arrive; `give_bytes(len(body))` returns it.
        max_bytes: of the body.
        timeout_s: seconds until the last byte.

    Raises:
        Problem: too many bytes, too late, or no room.
        ClientGone: the client went away.
    """
    length = request.headers.get("content-length")
    if length is not None and int(length) > max_bytes:
        raise _too_large(f"{int(length):,}", max_bytes, closes="expect" in request.headers)
    taken = 0
    try:
        async with asyncio.timeout(timeout_s):
            chunks: list[bytes] = []
            while True:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise ClientGone
                chunk: bytes = message.get("body", b"")
                admission.take_bytes(len(chunk))
                taken += len(chunk)
                if taken > max_bytes:
                    raise _too_large("more", max_bytes, closes=False)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
    except TimeoutError:
        admission.give_bytes(taken)
        raise Problem(
            REQUEST_TIMEOUT,
            f"{taken:,} bytes arrived in {timeout_s:g} s (limit: the whole body in that time); "
            "send it faster or make it smaller.",
            headers=_CLOSE,
        ) from None
    except BaseException:
        admission.give_bytes(taken)
        raise


def is_multipart(request: Request) -> bool:
    """Whether the body is a form with parts, by its Content-Type."""
    return request.headers.get("content-type", "")[:19].lower() == "multipart/form-data"


def split_parts(request: Request, body: bytes, *, max_parts: int) -> list[Part]:
    """The parts of a multipart body, in their order.

    Raises:
        Problem: the form is malformed, or has more parts than `max_parts`.
    """
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary")
    if not boundary:
        raise Problem(BAD_REQUEST, "The Content-Type names no boundary; let your HTTP client make the form.")
    reader = _PartReader(max_parts)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": reader.begin,
                "on_part_data": reader.take_data,
                "on_part_end": reader.end,
                "on_header_begin": reader.begin_header,
                "on_header_field": reader.take_header_name,
                "on_header_value": reader.take_header_value,
                "on_header_end": reader.end_header,
                "on_end": reader.finish,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Problem(BAD_REQUEST, f"The multipart form is malformed: {error}") from error
    if not reader.finished:
        raise Problem(BAD_REQUEST, "The multipart form ends before its closing boundary.")
    return reader.parts


class _PartReader:
    """Collects what the parser calls out."""

    def __init__(self, max_parts: int) -> None:
        self.parts: list[Part] = []
        self.finished = False
        self._max_parts = max_parts
        self._name = self._value = b""
        self._field = ""
        self._data: list[bytes] = []

    def begin(self) -> None:
        if len(self.parts) == self._max_parts:
            raise Problem(TOO_LARGE, f"The form has more than {self._max_parts} parts; send several requests.")
        self._field, self._data = "", []

    def take_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def end(self) -> None:
        self.parts.append(Part(self._field, self._data[0] if len(self._data) == 1 else b"".join(self._data)))

    def begin_header(self) -> None:
        self._name = self._value = b""

    def take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._field = options.get(b"name", b"").decode("utf-8", "replace")

    def finish(self) -> None:
        self.finished = True


def _too_large(found: str, max_bytes: int, *, closes: bool) -> Problem:
    return Problem(
        TOO_LARGE,
        f"The body has {found} bytes (limit: {max_bytes:,}); send a smaller image.",
        headers=_CLOSE if closes else {},
        limit_bytes=max_bytes,
    )
