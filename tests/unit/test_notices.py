"""A notice reaches every address it is given, and its failure neither hides it nor leaks an address."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from pipelines.notices import send_notice
from pipelines.settings import get_settings


@pytest.fixture
def received() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A real web hook: its address for Apprise, and what it was sent."""
    notices: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            notices.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"json://127.0.0.1:{server.server_port}", notices
        server.shutdown()


@pytest.fixture
def urls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def use(value: str) -> None:
        monkeypatch.setenv("PERCH_NOTICE_URLS", value)
        get_settings.cache_clear()

    yield use
    get_settings.cache_clear()


def test_send_notice__with_an_address__arrives_there(received: tuple[str, list[dict[str, Any]]], urls: Any) -> None:
    address, notices = received
    urls(address)
    assert send_notice("a title", "the body")
    assert (notices[0]["title"], notices[0]["message"]) == ("a title", "the body")


def test_send_notice__nothing_set__is_logged(urls: Any, caplog: pytest.LogCaptureFixture) -> None:
    urls("")
    assert send_notice("a title", "the body")
    assert "a title" in caplog.text
    assert "the body" in caplog.text


def test_send_notice__one_address_dead__reaches_the_other_and_says_so_without_the_address(
    received: tuple[str, list[dict[str, Any]]], urls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    address, notices = received
    urls(f"json://user:s3cret@127.0.0.1:1 {address}")
    with caplog.at_level(logging.ERROR, logger="pipelines.notices"):
        assert not send_notice("a title", "the body")
    assert len(notices) == 1
    ours = [record.getMessage() for record in caplog.records if record.name == "pipelines.notices"]
    assert "the body" in ours[0]
    assert "s3cret" not in ours[0]
