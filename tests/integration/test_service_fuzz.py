"""Tries to break a really served release: by its own description, by hostile images, and by what is hardly HTTP.

One worker answers everything here; its process id must be the same at the end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.image_corpus import PIXELS, Sent, corpus, encode, photograph, png_of_zeros
from tests.integration.served_release import PROJECT, Server

pytestmark = pytest.mark.services

# Decoding takes up to 13 bytes for each pixel (RGBA with its three companions) and what libraries put on top; a request
# is in memory as pieces, as a whole, and once more inside a form.  Beside one pixel's bytes, metadata may grow.
MEMORY_LIMIT_MIB = 16 * PIXELS / 2**20 + 4 * 10
LASTING_GROWTH_MIB = 120.0  # what allocators keep: 80 after the first time, 1 more after each further one

SCHEMATHESIS = """
seed = 7
base-url = "{url}"
headers = {{ X-API-Key = "{key}" }}
hooks = "tests.integration.schemathesis_hooks"

[generation]
max-examples = 12
database = "none"

# All checks are on.  A schema cannot say how many bytes a body may have in all, nor that a form has no further parts:
# 413 is right where it allows a body, and where it does not.
[checks.negative_data_rejection]
expected-statuses = [400, 401, 405, 406, 413, 415, 422]
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 413]

# Nor can it say that an id carries a time, which must not lie in the future.
[[operations]]
include-operation-id = "feedback"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 422]
"""


@pytest.fixture(autouse=True)
def same_worker(served: Server) -> Iterator[None]:
    """Whatever was sent, the worker that answered before answers after, and nothing of it is an error of its own."""
    before, logged = served.workers(), len(served.log)
    yield
    assert served.workers() == before
    served.wait_until_ready()
    assert "Traceback" not in served.log[logged:]


def test_api__its_own_description__is_what_it_does(served: Server, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS.format(url=served.url, key=served.key))
    command = [Path(sys.executable).parent / "schemathesis", "--config-file", tmp_path / "schemathesis.toml", "run"]
    done = subprocess.run(
        [*command, f"{served.url}/v1/openapi.json", "--no-color"],
        env=os.environ | {"PYTHONPATH": str(PROJECT), "COLUMNS": "120"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert "Tested: 7" in done.stdout


@pytest.fixture(scope="module")
def client(served: Server) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def images() -> list[Sent]:
    return corpus()


def complain(response: httpx.Response, statuses: frozenset[int]) -> str:
    """What is wrong with the answer to an image."""
    if response.status_code not in statuses:
        return f"{response.status_code}, not {sorted(statuses)}: {response.text[:300]}"
    if response.status_code == 200:
        return ""
    if response.headers["content-type"] != "application/problem+json":
        return f"is {response.headers['content-type']}"
    return complain_of_problem(response.json())


def complain_of_problem(problem: dict[str, object]) -> str:
    if not str(problem["type"]).startswith("urn:perch:"):
        return f"has the type {problem['type']}"
    if " at 0x" in str(problem["detail"]) or "/" in str(problem["detail"]).replace("8/16", ""):
        return f"tells of the inside: {problem['detail']}"
    return ""


@contextlib.contextmanager
def watched_memory(server: Server) -> Iterator[None]:
    """Hold the server's memory against its limits, all the time and at the end."""
    before, highest, done = server.pss_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, server.pss_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    after = server.pss_mib()
    print(f"{before:.0f} MiB before, {highest:.0f} at most, {after:.0f} after")
    assert highest - before <= MEMORY_LIMIT_MIB
    assert after - before <= LASTING_GROWTH_MIB


@pytest.mark.parametrize(("path", "every"), [("/v1/predict", 1), ("/v1/explain", 4)])
def test_image__broken_or_odd__is_answered_or_refused_by_name(
    served: Server, images: list[Sent], path: str, every: int
) -> None:
    complaints = {}
    with watched_memory(served), served.client() as client:
        for index, sent in enumerate(images[::every]):
            # By turns as a body and in a form, always under a false name: the content decides.
            if index % 2:
                response = client.post(path, content=sent.data, headers={"Content-Type": "image/x-icon"})
            else:
                response = client.post(path, files={"image": ("../../notes.txt", sent.data, "text/html")})
            if complaint := complain(response, sent.statuses):
                complaints[sent.name] = complaint
    assert complaints == {}


def test_batch__of_broken_and_odd_images__answers_each_in_its_place(served: Server, images: list[Sent]) -> None:
    complaints = {}
    with watched_memory(served), served.client() as client:
        for start in range(0, len(images), 16):
            sent = images[start : start + 16]
            response = client.post("/v1/predict/batch", files=[("image", ("x.gif", item.data)) for item in sent])
            assert response.status_code == 200, response.text
            results = response.json()["results"]
            assert [result["index"] for result in results] == list(range(len(sent)))
            for item, result in zip(sent, results, strict=True):
                problem = result.get("problem")
                status = problem["status"] if problem else 200
                complaint = complain_of_problem(problem) if problem else ""
                if status not in item.statuses or complaint:
                    complaints[item.name] = complaint or f"{status}, not {sorted(item.statuses)}"
    assert complaints == {}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    image_format=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]),
    flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), min_size=1, max_size=6),
)
def test_image__bytes_flipped_anywhere__is_answered_or_refused(
    client: httpx.Client, image_format: str, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(encode(photograph(), image_format))
    for position, change in flips:
        data[position % len(data)] ^= change
    response = client.post("/v1/predict", content=bytes(data))
    assert complain(response, frozenset({200, 415, 422})) == ""


def test_event_loop__while_the_slowest_images_are_decoded__goes_on_answering(served: Server) -> None:
    # The slow ones are on threads: a small image does not wait for them.
    slow = png_of_zeros(5000, 5000, depth=16, colour=6)
    with served.client() as client, served.client() as other:
        quick = encode(photograph(28, 28))
        client.post("/v1/predict", content=quick)
        slow_s: list[float] = []

        def ask_slowly() -> None:
            for _ in range(3):
                began = time.perf_counter()
                other.post("/v1/predict", content=slow)
                slow_s.append(time.perf_counter() - began)

        thread = threading.Thread(target=ask_slowly)
        thread.start()
        waited = []
        while thread.is_alive():
            began = time.perf_counter()
            assert client.post("/v1/predict", content=quick).status_code == 200
            waited.append(time.perf_counter() - began)
        thread.join()
    waited.sort()
    print(
        f"{len(waited)} answers, the median in {1000 * waited[len(waited) // 2]:.1f} ms, the last in {waited[-1]:.3f} s"
    )
    # By the slow ones' own time, which a busy machine stretches, too.
    assert waited[len(waited) // 2] < min(slow_s) / 4
    assert len(waited) > 12


def exchange(server: Server, *pieces: bytes, patience_s: float = 8.0, half_close: bool = False) -> bytes:
    """Send bytes as they are; what came back until the server closed, or fell silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=patience_s) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):  # closed before everything was sent: a fine answer
            for piece in pieces:
                connection.sendall(piece)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while received := connection.recv(2**16):
                answer += received
        return answer


def head(server: Server, *lines: str, first: str = "POST /v1/predict HTTP/1.1") -> bytes:
    """The head of a request with the key; the server is asked to close afterwards."""
    known = [first, "Host: x", f"X-API-Key: {server.key}", "Connection: close"]
    return "\r\n".join([*known, *lines, "", ""]).encode()


SMUGGLED = b"GET /v1/model HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["Content-Length: 6", "Transfer-Encoding: chunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked", "Content-Length: 6"], b"0\r\n\r\n" + SMUGGLED),
        (["Content-Length: 6", "Content-Length: 5"], b"abcdef"),
        (["Content-Length: 5, 5"], b"abcde"),
        (["Content-Length: +5"], b"abcde"),
        (["Content-Length: -1"], b"abcde"),
        (["Content-Length: 0x5"], b"abcde"),
        (["Content-Length: 99999999999999999999999"], b"abcde"),
        (["Transfer-Encoding: xchunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding: chunked"], b"zz\r\nabc\r\n0\r\n\r\n"),
        (["Transfer-Encoding: chunked"], b"ffffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
        (["Transfer-Encoding: chunked"], b"-5\r\nabcde\r\n0\r\n\r\n"),
        (["Transfer-Encoding : chunked"], b"0\r\n\r\n" + SMUGGLED),
        (["Transfer-Encoding:\r\n chunked"], b"0\r\n\r\n" + SMUGGLED),
        (["X-Odd: a\0b"], b""),
        (["X-Odd: a\rContent-Length: 5"], b"abcde"),
        ([f"X-Odd-{number}: 1" for number in range(200)], b""),
    ],
)
def test_http__framing_that_two_servers_might_read_differently__is_400_and_the_end(
    served: Server, lines: list[str], body: bytes
) -> None:
    answer = exchange(served, head(served, *lines).replace(b"Connection: close\r\n", b""), body)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    ("first", "status"),
    [
        ("GET /livez HTTP/1.0", b"200"),
        ("GET /%6civez HTTP/1.1", b"200"),
        ("GET http://elsewhere.example/livez HTTP/1.1", b"200"),
        ("HEAD /livez HTTP/1.1", b"200"),
        ("GET /livez%00 HTTP/1.1", b"404"),
        ("GET /livez/ HTTP/1.1", b"404"),
        ("GET /../../etc/passwd HTTP/1.1", b"404"),
        ("GET /static_content/../../serving/service.py HTTP/1.1", b"404"),
        ("GET /static_content/%2e%2e/%2e%2e/%2e%2e/service.py HTTP/1.1", b"404"),
        ("GET /static_content/%00 HTTP/1.1", b"404"),
        ("GET /%zz%f HTTP/1.1", b"404"),
        ("GET /%ff%fe HTTP/1.1", b"404"),
        ("OPTIONS * HTTP/1.1", b"404"),
        ("DELETE /v1/predict HTTP/1.1", b"405"),
        ("GET /livez\0 HTTP/1.1", b"400"),
        ("GET /livez HTTP/3.0", b"400"),
        ("BREW /livez HTTP/1.1", b"400"),
        ("CONNECT elsewhere.example:1 HTTP/1.1", b"400"),
        ("\x16\x03\x01\x02\x00\x01", b"400"),
        (f"GET /{'a' * 300_000} HTTP/1.1", b"400"),
        ("POST /v1/predict HTTP/1.1", b"400"),  # without a body
    ],
)
def test_http__odd_request_lines__have_an_answer(served: Server, first: str, status: bytes) -> None:
    assert exchange(served, head(served, first=first)).split(b" ", 2)[1] == status


def test_http__upgrade__is_not_offered(served: Server) -> None:
    websocket = ["Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
    for path in ("/livez", "/", "/static_content/x"):
        request = head(served, *websocket, first=f"GET {path} HTTP/1.1").replace(b": close", b": close, Upgrade")
        assert exchange(served, request).split(b" ", 2)[1] in {b"200", b"404"}


def test_http__head_without_an_end__is_refused_while_it_is_small(served: Server) -> None:
    began = time.monotonic()
    with watched_memory(served):
        for endless in (b"X-Odd: " + b"a" * 20_000_000, b"X-Odd: a\r\n" * 2_000_000):
            answer = exchange(served, b"GET /livez HTTP/1.1\r\nHost: x\r\n", endless)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
        trailers = b"5\r\nabcde\r\n0\r\n" + b"X-Odd: a\r\n" * 2_000_000
        exchange(served, head(served, "Transfer-Encoding: chunked"), trailers)
        extension = b"5;" + b"a" * 20_000_000
        exchange(served, head(served, "Transfer-Encoding: chunked"), extension)
    assert time.monotonic() - began < 16  # four that are waited for would each take the five seconds of the limit


def test_http__chunks_of_one_byte__are_a_body_like_any(served: Server) -> None:
    data = encode(photograph(300, 200), "BMP")[:150_000]
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in data) + b"0\r\n\r\n"
    answer = exchange(served, head(served, "Transfer-Encoding: chunked"), chunks)
    assert answer.startswith(b"HTTP/1.1 422 ")


def test_http__slow_clients__get_408_each_after_the_limit_and_hold_up_nobody(served: Server) -> None:
    answers: dict[str, tuple[bytes, float]] = {}

    def ask(name: str, *pieces: bytes) -> None:
        began = time.monotonic()
        answers[name] = exchange(served, *pieces, patience_s=20), time.monotonic() - began

    requests = {
        "body": head(served, "Content-Length: 1000") + b"some",
        "chunks": head(served, "Transfer-Encoding: chunked") + b"4\r\nsome\r\n",
        "head": b"GET /livez HTTP/1.1\r\nHost:",
        "nothing": b"",
    }
    threads = [threading.Thread(target=ask, args=request) for request in requests.items()]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    assert httpx.get(f"{served.url}/livez").status_code == 200
    assert time.monotonic() - began < 4  # before any of them is told to go
    for thread in threads:
        thread.join()
    for name, (answer, seconds) in answers.items():
        assert answer.startswith(b"HTTP/1.1 408 ") or (name == "nothing" and answer == b""), (name, answer)
        assert 4.5 < seconds < 15, name


def test_http__clients_that_leave_early__leave_nothing_behind(served: Server) -> None:
    with served.client() as client:
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(head(served, "Content-Length: 5000000") + bytes(1_000_000))
        deadline = time.monotonic() + 20
        while not in_flight(client).endswith(" 1.0"):  # the one that asks
            assert time.monotonic() < deadline, in_flight(client)
            time.sleep(0.05)
        # The room that their bodies took is free again: 256 MiB would not hold nine times this.
        for _ in range(3):
            assert client.post("/v1/predict", content=bytes(10_000_000)).status_code == 415


def in_flight(client: httpx.Client) -> str:
    lines = client.get("/metrics").text.splitlines()
    return next(line for line in lines if line.startswith("perch_requests_in_flight{"))


def test_http__pipelined_requests__are_answered_in_their_order(served: Server) -> None:
    one = head(served, "Content-Length: 4").replace(b"Connection: close\r\n", b"")
    last = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = exchange(served, (one + b"some") * 5 + last)
    assert answer.count(b"HTTP/1.1 415 ") == 5
    assert answer.endswith(b'{"status":"alive"}')


def test_http__expect_100_continue__asks_for_the_body_only_where_it_is_taken(served: Server) -> None:
    expect = "Expect: 100-continue"
    taken = exchange(served, head(served, "Content-Length: 4", expect), b"some")
    assert taken.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 415 ")
    refused = exchange(served, head(served, "Content-Length: 80000000", expect))
    assert refused.startswith(b"HTTP/1.1 413 ")


def test_http__body_shorter_than_promised_and_then_closed__is_dropped(served: Server) -> None:
    assert exchange(served, head(served, "Content-Length: 1000"), b"some", half_close=True) in {b"", b"HTTP/1.1 408"}


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary="\\"\\xff"',
        "multipart/form-data; boundary*0=a; boundary*1=b",
        f"multipart/form-data; boundary={'a' * 20_000}",
        "multipart/form-data; boundary=other",
    ],
)
def test_form__that_cannot_be_taken_apart__is_400(served: Server, content_type: str) -> None:
    body = b'--a\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--a--\r\n'
    with served.client() as client:
        response = client.post("/v1/predict", content=body, headers={"Content-Type": content_type})
    assert complain(response, frozenset({400})) == ""


def test_form__endless_headers_or_parts__is_refused(served: Server) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=a"}
    with served.client() as client:
        for body in (b"--a\r\n" + b"X: y\r\n" * 1_000_000, b"--a\r\nX: " + b"y" * 9_000_000):
            assert complain(client.post("/v1/predict", content=body, headers=kind), frozenset({400})) == ""
        parts = b"--a\r\n\r\nx\r\n" * 900_000 + b"--a--\r\n"
        assert complain(client.post("/v1/predict", content=parts, headers=kind), frozenset({413})) == ""
