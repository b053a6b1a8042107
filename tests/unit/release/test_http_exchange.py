"""Requests to a real server, and what becomes of those that get no answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.release.http_exchange import exchange, fetch
from pipelines.services.stack import any_free_port


class _Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200 if self.path.startswith("/there") else 404, self.path.encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, self.headers["Content-Type"].encode() + b" " + body)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetch__path_and_query__are_asked_for(url: str) -> None:
    assert fetch(f"{url}/there?format=json", 3) == b"/there?format=json"
    answer = exchange(f"{url}/there", 3)
    assert (answer.body, answer.headers.get("content-length")) == (b"/there", "6")


def test_fetch__a_form__is_posted(url: str) -> None:
    body = fetch(f"{url}/api", 3, form={"query": "up == 1", "time": "1.5"})
    assert body == b"application/x-www-form-urlencoded query=up+%3D%3D+1&time=1.5"


def test_fetch__proxy_of_the_environment__is_passed_by(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{any_free_port()}")
    assert fetch(f"{url}/there", 3) == b"/there"


def test_fetch__another_status_than_200__is_an_error_that_names_it(url: str) -> None:
    with pytest.raises(OSError, match=r"/gone: .*status 404"):
        fetch(f"{url}/gone", 3)


def test_fetch__nobody_listens__is_an_error() -> None:
    with pytest.raises(OSError, match="refused"):
        fetch(f"http://127.0.0.1:{any_free_port()}", 3)


def test_fetch__something_that_is_not_http__is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"220 mail.example.org ESMTP\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="BadStatusLine"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/", 3)
        thread.join()


@pytest.mark.parametrize("wrong", ["prometheus:9090", "ftp://prometheus", "", "http://", "http://host:port/x"])
def test_fetch__no_address__is_an_error_and_no_request_to_this_machine(wrong: str) -> None:
    with pytest.raises(OSError, match=r"no address of http|nonnumeric port"):
        fetch(wrong, 3)


def test_fetch__password_in_the_address__is_refused_and_not_repeated() -> None:
    with pytest.raises(OSError, match=r"^host:9090/: .*without a user") as caught:
        fetch("http://somebody:secret@host:9090/", 3)
    assert "secret" not in str(caught.value)
