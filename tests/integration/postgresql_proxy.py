"""Stands before a real PostgreSQL, and cuts, stalls and refuses."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal
from urllib.parse import parse_qs, urlsplit

Fault = Literal["none", "lose the question", "lose the answer", "stall"]

_GOODBYE = b"X\0\0\0\4"


class Proxy:
    """Passes connections on to PostgreSQL's Unix socket, and does one fault to one question of a client.

    Attributes:
        questions: writes of clients that were seen since the fault was set.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self.port = 0
        self.questions = 0
        self._fault: Fault = "none"
        self._at = 0
        self._word, self._times = b"", 0
        self._open: list[socket.socket] = []
        self._on_question: Callable[[], None] = lambda: None
        self._listen()

    @classmethod
    def before(cls, url: str) -> Proxy:
        """A proxy before the server of a URL of `postgresql_server`."""
        return cls(f"{parse_qs(urlsplit(url).query)['host'][0]}/.s.PGSQL.5432")

    def url(self, url: str) -> str:
        """The URL of the same database through here."""
        name = urlsplit(url).path
        return f"postgresql+psycopg://perch@127.0.0.1:{self.port}{name}?sslmode=disable&gssencmode=disable"

    def set(self, fault: Fault, at: int = 0) -> None:
        """Do `fault` to question number `at` from now on, counted from 1, once."""
        self.questions, self._fault, self._at = 0, fault, at

    def lose_commits_after(self, word: bytes, times: int) -> None:
        """Lose the answers to the commits of transactions in which this word was said, the first so many times."""
        self._word, self._times = word, times

    @property
    def left(self) -> int:
        """Commits whose answers are still to be lost."""
        return self._times

    def tell_of_questions(self, listener: Callable[[], None]) -> None:
        """Call this before each question of a client is passed on."""
        self._on_question = listener

    def cut(self) -> None:
        """Reset all connections, and refuse new ones until `mend`."""
        self._stop_listening()
        ends = list(self._open)
        self._open.clear()
        _shut(*ends)  # wakes who reads from them in other threads
        for end in ends:
            with contextlib.suppress(OSError):  # closed by now
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()

    def mend(self) -> None:
        """Be there again."""
        self._listen()

    def close(self) -> None:
        self._stop_listening()
        for end in self._open:
            end.close()

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _stop_listening(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                self._open += [client, server]
                answers = threading.Event()
                answers.set()
                threading.Thread(target=self._pass_questions, args=(client, server, answers), daemon=True).start()
                threading.Thread(target=self._pass_answers, args=(server, client, answers), daemon=True).start()

    def _pass_questions(self, client: socket.socket, server: socket.socket, answers: threading.Event) -> None:
        was_said = False
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if data == _GOODBYE:  # may come after the call that is looked at has ended
                    server.sendall(data)
                    continue
                self.questions += 1
                self._on_question()
                was_said = was_said or (bool(self._word) and self._word in data)
                fault = self._fault if self.questions == self._at else "none"
                if fault == "lose the question":
                    break
                if fault == "stall":
                    continue  # neither passed on nor refused
                if b"COMMIT" in data and was_said:
                    was_said = False
                    if self._times:
                        self._times -= 1
                        fault = "lose the answer"
                if fault == "lose the answer":
                    answers.clear()
                server.sendall(data)
        _shut(client, server)

    @staticmethod
    def _pass_answers(server: socket.socket, client: socket.socket, answers: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if not answers.is_set():
                    break
                client.sendall(data)
        _shut(client, server)


def _shut(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
