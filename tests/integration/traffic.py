"""Clients that send one prediction after the other over kept connections, and note what became of each."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Exchange:
    """One request.

    Attributes:
        sent_at: by the monotonic clock, in seconds.
        ended_at: when the answer was there, or was given up.
        status: HTTP status; 0 when there was no answer.
        version: of the model that answered.
        detail: of what went wrong.
    """

    sent_at: float
    ended_at: float
    status: int
    version: str
    detail: str = ""


class Traffic:
    """A few clients in threads, for as long as the context lasts.

    Args:
        url: where to send.
        key: API key.
        image: encoded.
        clients: how many at once.
        pause_s: between an answer and the next request, so that the machine has time for what is tested.
    """

    def __init__(self, url: str, key: str, image: bytes, *, clients: int = 3, pause_s: float = 0.01) -> None:
        self._host = urlsplit(url).netloc
        self._headers = {"X-API-Key": key, "Content-Type": "image/png"}
        self._image, self.clients, self._pause_s = image, clients, pause_s
        self._exchanges: list[Exchange] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._send_until_ended) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    @property
    def failed(self) -> list[Exchange]:
        """What was not answered with a prediction."""
        return [exchange for exchange in self._exchanges if exchange.status != 200]

    def since(self, moment: float) -> list[Exchange]:
        """What was sent after a moment of the monotonic clock."""
        return [exchange for exchange in self._exchanges if exchange.sent_at >= moment]

    def wait_for(self, count: int, limit_s: float = 60.0) -> list[Exchange]:
        """The next so many exchanges that begin from now on."""
        began = time.monotonic()
        while len(found := self.since(began)) < count:
            assert time.monotonic() - began < limit_s, f"{len(found)} of {count} requests in {limit_s:g} s"
            time.sleep(0.01)
        return found

    def _send_until_ended(self) -> None:
        connection = http.client.HTTPConnection(self._host, timeout=30)
        while not self._ended.is_set():
            sent_at, version, detail = time.monotonic(), "", ""
            try:
                connection.request("POST", "/v1/predict", self._image, self._headers)
                response = connection.getresponse()
                body = response.read()
                status, version = response.status, response.headers.get("x-model-version", "")
                detail = "" if status == 200 else body.decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                status, detail = 0, repr(error)
                connection.close()
            self._exchanges.append(Exchange(sent_at, time.monotonic(), status, version, detail))
            self._ended.wait(self._pause_s)
        connection.close()
