import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from serving.admission import Admission
from serving.problems import BAD_REQUEST, OVERLOADED, REQUEST_TIMEOUT, TOO_LARGE, Problem
from serving.request_bodies import ClientGone, is_multipart, read_body, split_parts

BOUNDARY = "----perch"


def make_request(messages: Iterable[dict[str, Any]] = (), content_type: str = "", length: int | None = None) -> Request:
    headers = [(b"content-type", content_type.encode())] if content_type else []
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    waiting = iter(messages)

    async def receive() -> dict[str, Any]:
        for message in waiting:
            return message
        await asyncio.sleep(60)
        raise AssertionError("nobody should wait so long")

    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def chunk(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def read(request: Request, admission: Admission, max_bytes: int = 100, timeout_s: float = 1.0) -> bytes:
    return asyncio.run(read_body(request, admission, max_bytes=max_bytes, timeout_s=timeout_s))


@pytest.fixture
def admission() -> Admission:
    return Admission(max_requests=4, max_buffered_bytes=1000)


def test_read_body__the_last_chunk__ends_it_and_its_bytes_are_counted(admission: Admission) -> None:
    assert read(make_request([chunk(b"ab", more=True), chunk(b""), chunk(b"c")]), admission) == b"ab"
    assert admission.buffered_bytes == 2


def test_read_body__several_chunks__are_joined(admission: Admission) -> None:
    body = read(make_request([chunk(b"ab", more=True), chunk(b"", more=True), chunk(b"c")]), admission)
    assert body == b"abc"
    admission.give_bytes(len(body))
    assert admission.buffered_bytes == 0


def test_read_body__announced_length_over_the_limit__is_refused_before_a_byte_is_read(admission: Admission) -> None:
    with pytest.raises(Problem) as caught:
        read(make_request(length=101), admission)
    assert caught.value.kind is TOO_LARGE
    assert caught.value.headers == {}  # what is on its way is read away, and the connection stays


def test_read_body__no_length_but_too_many_bytes__is_refused_and_the_room_given_back(admission: Admission) -> None:
    with pytest.raises(Problem) as caught:
        read(make_request([chunk(b"x" * 60, more=True), chunk(b"x" * 60, more=True)]), admission)
    assert caught.value.kind is TOO_LARGE
    assert admission.buffered_bytes == 0


def test_read_body__bytes_that_dribble__end_in_408_and_the_room_is_given_back(admission: Admission) -> None:
    with pytest.raises(Problem) as caught:
        read(make_request([chunk(b"slow", more=True)]), admission, timeout_s=0.02)
    assert caught.value.kind is REQUEST_TIMEOUT
    assert "4 bytes" in caught.value.detail
    assert admission.buffered_bytes == 0


def test_read_body__client_goes_away__is_no_error_to_answer(admission: Admission) -> None:
    with pytest.raises(ClientGone):
        read(make_request([chunk(b"half", more=True), {"type": "http.disconnect"}]), admission)
    assert admission.buffered_bytes == 0


def test_read_body__no_room_for_more_bytes__is_refused_with_retry_after(admission: Admission) -> None:
    admission.take_bytes(950)
    with pytest.raises(Problem) as caught:
        read(make_request([chunk(b"x" * 60)]), admission)
    assert caught.value.kind is OVERLOADED
    assert caught.value.headers["Retry-After"] == "1"
    assert admission.buffered_bytes == 950


def make_form(parts: list[tuple[str, bytes]], *, closed: bool = True) -> bytes:
    pieces = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="x.png"\r\n'
        "Content-Type: image/png\r\n\r\n".encode()
        + data
        + b"\r\n"
        for field, data in parts
    ]
    return b"".join(pieces) + (f"--{BOUNDARY}--\r\n".encode() if closed else b"")


FORM = make_request(content_type=f"multipart/form-data; boundary={BOUNDARY}")


@given(st.lists(st.tuples(st.sampled_from(["image", "note", ""]), st.binary(max_size=300)), min_size=1, max_size=6))
def test_split_parts__any_content__comes_back_in_order(parts: list[tuple[str, bytes]]) -> None:
    parts = [(field, data) for field, data in parts if BOUNDARY.encode() not in data]
    found = split_parts(FORM, make_form(parts), max_parts=6) if parts else []
    assert [(part.field, part.data) for part in found] == parts


@given(st.binary(max_size=400))
def test_split_parts__any_bytes__are_parts_or_a_problem_and_nothing_else(body: bytes) -> None:
    with contextlib.suppress(Problem):
        split_parts(FORM, body, max_parts=4)


def test_split_parts__form_cut_short__is_a_bad_request() -> None:
    with pytest.raises(Problem, match="closing boundary") as caught:
        split_parts(FORM, make_form([("image", b"x")], closed=False), max_parts=4)
    assert caught.value.kind is BAD_REQUEST


def test_split_parts__more_parts_than_allowed__is_too_large() -> None:
    with pytest.raises(Problem) as caught:
        split_parts(FORM, make_form([("image", b"x")] * 3), max_parts=2)
    assert caught.value.kind is TOO_LARGE


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary="])
def test_split_parts__no_boundary__is_a_bad_request(content_type: str) -> None:
    with pytest.raises(Problem, match="boundary"):
        split_parts(make_request(content_type=content_type), b"", max_parts=4)


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [("multipart/form-data; boundary=x", True), ("Multipart/Form-Data; boundary=x", True), ("image/png", False)],
)
def test_is_multipart__by_the_content_type__whatever_its_case(content_type: str, expected: bool) -> None:
    assert is_multipart(make_request(content_type=content_type)) is expected
