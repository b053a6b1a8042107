"""The soak's clients: what they send, at fixed times whatever the server does, and what they may get for it.

Every request carries its own `X-Request-ID`; what became of it is written down at once, so that the clients' memory
stays small and a request without an answer can be looked for among the predictions that the server kept.
"""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

SEED = 11
_LATE_MS = 60_000.0
_IN_FLIGHT_LIMIT = 4_000
_RETRY_PAUSE_S = 0.05
_RETRY_LIMIT_S = 30.0
_RECENT_IDS = 1_000

# What a request can end with besides a status; the checks say where each may happen.
BROKEN = -1  # the connection ended before an answer
REFUSED = -2  # nobody listened, for as long as the client cared to try
GIVEN_UP = -3  # too many requests waited already, so it was not sent


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        name: for the tables.
        share: of all requests, relative to the others.
        path: of the endpoint.
        allowed: statuses that may come back.
        make: the body and its headers, anew for each request.
        method: of HTTP.
        key: `good`, `slow` (a key with a low rate) or `wrong`.
        expects_continue: asks before it sends its body, as clients with large bodies do.
    """

    name: str
    share: float
    path: str
    allowed: frozenset[int]
    make: Callable[[], tuple[bytes | None, dict[str, str]]]
    method: str = "POST"
    key: str = "good"
    expects_continue: bool = False


@dataclass
class Journal:
    """Three CSV files: the end of each request, each prediction that was answered, each connection that broke.

    Args:
        folder: for the files.
    """

    folder: Path
    started: float = field(default_factory=time.monotonic)
    done: int = 0
    turned_away: int = 0
    broken: int = 0

    def __post_init__(self) -> None:
        self._files = {}
        self._writers = {}
        for name, columns in COLUMNS.items():
            self._files[name] = (self.folder / f"{name}.csv").open("w", newline="", buffering=2**16)
            self._writers[name] = csv.writer(self._files[name])
            self._writers[name].writerow(columns)

    def now(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self.started

    def end(self, kind: str, phase: str, due_s: float, status: int, request_id: str, lag_ms: float) -> None:
        """Write down how a request ended; its latency counts from the time it was due."""
        self.done += 1
        self.turned_away += status in (503, BROKEN, REFUSED, GIVEN_UP)
        latency_ms = 1000 * (self.now() - due_s)
        row = (f"{due_s:.4f}", kind, phase, status, f"{latency_ms:.2f}", f"{lag_ms:.2f}", request_id)
        self._writers["requests"].writerow(row)

    def answer(self, prediction_id: str, request_id: str) -> None:
        """Write down that a prediction arrived."""
        self._writers["predictions"].writerow((prediction_id, f"{self.now():.4f}", request_id))

    def breakage(self, kind: str, request_id: str, error: BaseException) -> None:
        """Write down that a connection ended before the answer was whole."""
        self.broken += 1
        self._writers["broken"].writerow((f"{self.now():.4f}", kind, request_id, repr(error)[:200]))

    def close(self) -> None:
        """Bring everything to disk."""
        for file in self._files.values():
            file.close()


# Of the files, with DuckDB's names for the types.
COLUMNS = {
    "requests": {
        "due_s": "DOUBLE",
        "kind": "VARCHAR",
        "phase": "VARCHAR",
        "status": "INTEGER",
        "latency_ms": "DOUBLE",
        "lag_ms": "DOUBLE",
        "request_id": "VARCHAR",
    },
    "predictions": {"prediction_id": "VARCHAR", "answered_s": "DOUBLE", "request_id": "VARCHAR"},
    "broken": {"at_s": "DOUBLE", "kind": "VARCHAR", "request_id": "VARCHAR", "error": "VARCHAR"},
}


class Clients:
    """Sends the mix of requests to the first address that takes connections.

    Args:
        addresses: `http://host:port`, in the order of preference; the list may change meanwhile.
        keys: by the names that `Kind.key` knows.
        journal: takes what happens.
        max_body_bytes: that the server takes.

    Attributes:
        phase: written down with each request.
        kinds: the mix of requests.
    """

    def __init__(self, addresses: list[str], keys: dict[str, str], journal: Journal, *, max_body_bytes: int) -> None:
        self.addresses = addresses
        self.phase = ""
        self.in_flight = 0
        self._keys, self._journal = keys, journal
        self.kinds = mix(self.feedback, max_body_bytes=max_body_bytes)
        self._random = random.Random(SEED)
        self._number = 0
        self._recent: deque[str] = deque(maxlen=_RECENT_IDS)
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Hold connections open while inside."""
        # Idle connections are dropped before the server drops them, so that no request meets a closing connection.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        timeout = aiohttp.ClientTimeout(total=_LATE_MS / 1000)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            yield

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """As many requests as the server takes from some clients that wait for their answers; requests per second."""
        until = self._journal.now() + seconds
        before = self._journal.done

        async def client() -> None:
            while (due_s := self._journal.now()) < until:
                await self._send(self._pick(), due_s)

        started = self._journal.now()
        await asyncio.gather(*(client() for _ in range(clients)))
        return (self._journal.done - before) / (self._journal.now() - started)

    async def open_loop(self, rate_per_s: float, until_s: float) -> None:
        """Requests at fixed times, whether or not earlier ones were answered; waits for the last answers."""
        loop = asyncio.get_running_loop()
        started = self._journal.now()
        number = 0
        while (due_s := started + number / rate_per_s) < until_s:
            if (pause_s := due_s - self._journal.now()) > 0:
                await asyncio.sleep(pause_s)
            if self.in_flight >= _IN_FLIGHT_LIMIT:
                self._journal.end(self._pick().name, self.phase, due_s, GIVEN_UP, "", 0.0)
            else:
                task = loop.create_task(self._send(self._pick(), due_s))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            number += 1
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LATE_MS / 1000)

    def feedback(self) -> tuple[bytes, dict[str, str]]:
        """A true label for a prediction that was answered not long ago."""
        prediction_id = self._random.choice(self._recent) if self._recent else "01ARZ3NDEKTSV4RRFFQ69G5FAV"
        body = {"prediction_id": prediction_id, "true_label": str(self._random.randrange(10))}
        return json.dumps(body).encode(), {"Content-Type": "application/json"}

    def take_ids(self, body: bytes, request_id: str) -> None:
        """Write down every prediction id in an answer."""
        for prediction_id in prediction_ids(body):
            self._recent.append(prediction_id)
            self._journal.answer(prediction_id, request_id)

    def next_request_id(self) -> str:
        """An id that no other request of this soak has."""
        self._number += 1
        return f"soak-{self._number}"

    def _pick(self) -> Kind:
        return self._random.choices(self.kinds, [kind.share for kind in self.kinds])[0]

    def prefer_others(self, address: str) -> None:
        """Put an address last where nobody listens: an attempt in vain before each request takes the server's cores."""
        self.addresses.sort(key=address.__eq__)

    async def _send(self, kind: Kind, due_s: float) -> None:
        """Send one request until it is answered: again where nobody listens, and where the connection breaks."""
        assert self._session is not None
        journal, phase = self._journal, self.phase
        lag_ms = 1000 * (journal.now() - due_s)
        body, headers = kind.make()
        headers |= {"X-API-Key": self._keys[kind.key]}
        status, request_id = REFUSED, ""
        self.in_flight += 1
        try:
            while journal.now() - due_s < _RETRY_LIMIT_S:
                for address in list(self.addresses):
                    request_id = self.next_request_id()
                    headers["X-Request-ID"] = request_id
                    try:
                        async with self._session.request(
                            kind.method,
                            address + kind.path,
                            data=body,
                            headers=headers,
                            expect100=kind.expects_continue,
                        ) as response:
                            content = await response.read()
                            status = response.status
                    except aiohttp.ClientConnectorError:
                        self.prefer_others(address)
                        continue  # nobody listens here: the next address
                    except (aiohttp.ClientError, TimeoutError) as error:
                        journal.breakage(kind.name, request_id, error)
                        status = BROKEN
                        break
                    if status == 200 and content.startswith(b"{"):
                        self.take_ids(content, request_id)
                    return
                await asyncio.sleep(_RETRY_PAUSE_S)
        finally:
            self.in_flight -= 1
            journal.end(kind.name, phase, due_s, status, request_id, lag_ms)


def prediction_ids(body: bytes) -> Iterator[str]:
    """The ids in the answer to one image, or to a batch."""
    answer: Any = json.loads(body)
    for part in (answer, *answer.get("results", ())):
        if "prediction_id" in part:
            yield part["prediction_id"]


def mix(feedback: Callable[[], tuple[bytes, dict[str, str]]], *, max_body_bytes: int) -> list[Kind]:
    """Good and bad requests, and what each may get.

    Args:
        feedback: makes a feedback's body.
        max_body_bytes: that the server takes.
    """
    pngs = [_digit(number) for number in range(50)]
    jpegs = [_recode(png, "JPEG") for png in pngs[:10]]
    choice = random.Random(SEED).choice

    def raw(bodies: list[bytes], content_type: str = "image/png") -> Callable[[], tuple[bytes, dict[str, str]]]:
        return lambda: (choice(bodies), {"Content-Type": content_type})

    def form(*fields: tuple[str, list[bytes]]) -> Callable[[], tuple[bytes, dict[str, str]]]:
        return lambda: _multipart([(name, choice(bodies)) for name, bodies in fields])

    def nothing() -> tuple[None, dict[str, str]]:
        return None, {}

    def status(*codes: int) -> frozenset[int]:
        return frozenset(codes)

    text = [b"{\\rtf1 these are my notes, not an image, and they go on for a while}" * 3]
    truncated = [png[: len(png) // 2] for png in pngs[:10]]
    corrupt = [png[:60] + bytes(8) + png[68:] for png in pngs[:10]]
    as_json = "application/json"
    return [
        Kind("PNG", 60, "/v1/predict", status(200), raw(pngs)),
        Kind("PNG in a form", 15, "/v1/predict", status(200), form(("image", pngs))),
        Kind("JPEG", 8, "/v1/predict", status(200), raw(jpegs, "image/jpeg")),
        Kind("batch of 8", 2, "/v1/predict/batch", status(200), form(*[("image", pngs)] * 8)),
        Kind("batch, one broken", 1, "/v1/predict/batch", status(200), form(("image", pngs), ("image", truncated))),
        Kind("explain", 0.05, "/v1/explain", status(200), raw(pngs)),
        Kind("feedback", 5, "/v1/feedback", status(202), feedback),
        Kind("model", 1, "/v1/model", status(200), nothing, method="GET"),
        Kind("readyz", 1, "/readyz", status(200), nothing, method="GET"),
        Kind("metrics", 0.1, "/metrics", status(200), nothing, method="GET"),
        Kind("truncated PNG", 1, "/v1/predict", status(422), raw(truncated)),
        Kind("corrupt PNG", 1, "/v1/predict", status(422), raw(corrupt)),
        Kind("bomb", 0.5, "/v1/predict", status(422), raw([bomb()])),
        Kind("text", 1, "/v1/predict", status(415), raw(text)),
        Kind("empty", 0.5, "/v1/predict", status(400), raw([b""])),
        Kind("form without image", 0.5, "/v1/predict", status(422), form(("picture", pngs))),
        Kind(
            "too large",
            0.05,
            "/v1/predict",
            status(413),
            raw([bytes(max_body_bytes + 1)]),
            expects_continue=True,
        ),
        Kind("wrong key", 1, "/v1/predict", status(401), raw(pngs), key="wrong"),
        Kind("over the rate", 1, "/v1/predict", status(200, 429), raw(pngs), key="slow"),
        Kind("forbidden", 0.3, "/v1/model", status(403), nothing, method="GET", key="slow"),
        Kind("no JSON", 0.5, "/v1/feedback", status(400), raw([b"{"], as_json)),
        Kind("wrong JSON", 0.5, "/v1/feedback", status(422), raw([b'{"prediction_id": 7}'], as_json)),
        Kind("unknown path", 0.5, "/v1/perdict", status(404), raw(pngs)),
        Kind("wrong method", 0.5, "/v1/predict", status(405), nothing, method="GET"),
    ]


@dataclass(frozen=True)
class SlowKind:
    """A kind of slow client, on a connection of its own.

    Attributes:
        name: for the tables.
        allowed: statuses that may come back; 0 stands for a connection closed without one.
        act: sends on a connection, and says what came back.
        clients: that do so at once, one request after the other.
    """

    name: str
    allowed: frozenset[int]
    act: Callable[[SlowConnection], Any]
    clients: int = 3


@dataclass
class SlowConnection:
    """A raw connection to the server.

    Attributes:
        reader: of the connection.
        writer: of the connection.
        head: of a request for a prediction.
        body: of that request.
        pace: what pauses are multiplied with; tests are in a hurry.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes
    body: bytes
    pace: float = 1.0

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while."""
        await asyncio.sleep(self.pace * seconds)

    async def send(self, data: bytes, *, pieces: int = 1, pause_s: float = 0.0) -> None:
        """Send in pieces.

        Raises:
            OSError: the server has closed the connection.
        """
        size = -(-len(data) // pieces)
        for start in range(0, len(data), size):
            if self.writer.transport.is_closing():  # uvloop's transport raises RuntimeError
                raise ConnectionResetError("closed by the server")
            self.writer.write(data[start : start + size])
            await self.writer.drain()
            await self.pause(pause_s)

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of the answer; 0 where the connection ends without one."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length")), 0
        )
        return int(head.split(b" ", 2)[1]), await self.reader.readexactly(length)


async def _dribble(connection: SlowConnection) -> tuple[int, bytes]:
    """The body in twenty pieces over three seconds."""
    await connection.send(connection.head)
    await connection.send(connection.body, pieces=20, pause_s=0.15)
    return await connection.answer()


async def _dribble_for_ever(connection: SlowConnection) -> tuple[int, bytes]:
    """A few bytes a second, which would take minutes."""
    await connection.send(connection.head)
    sending = asyncio.ensure_future(connection.send(connection.body, pieces=100, pause_s=1.0))
    try:
        return await connection.answer()
    finally:
        sending.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await sending


async def _read_late(connection: SlowConnection) -> tuple[int, bytes]:
    """Takes its answer three seconds after it asked."""
    await connection.send(connection.head + connection.body)
    await connection.pause(3.0)
    return await connection.answer()


async def _half_a_head(connection: SlowConnection) -> tuple[int, bytes]:
    """Stops within the headers, waits a while and leaves."""
    await connection.send(connection.head[: len(connection.head) // 2])
    with suppress(TimeoutError):
        async with asyncio.timeout(15.0):
            return await connection.answer()
    return 0, b""


async def _silence(connection: SlowConnection) -> tuple[int, bytes]:
    """Says nothing at all, and leaves."""
    with suppress(TimeoutError):
        async with asyncio.timeout(15.0):
            return await connection.answer()
    return 0, b""


async def _vanish(connection: SlowConnection) -> tuple[int, bytes]:
    """Resets the connection in the middle of the body."""
    await connection.send(connection.head + connection.body[: len(connection.body) // 2])
    await connection.pause(0.5)
    linger = struct.pack("ii", 1, 0)  # no waiting: the kernel sends RST
    connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    return 0, b""


SLOW_KINDS = (
    SlowKind("dribbled body", frozenset({200}), _dribble),
    SlowKind("endless dribble", frozenset({408}), _dribble_for_ever),
    SlowKind("late reader", frozenset({200}), _read_late),
    SlowKind("half a head", frozenset({0, 400, 408}), _half_a_head),
    SlowKind("silence", frozenset({0, 408}), _silence),
    SlowKind("vanishes", frozenset({0}), _vanish),
)


class SlowClients:
    """A few of each slow kind, all the time.

    Args:
        clients: whose addresses, phase and ids they share.
        key: an API key.
        journal: takes what happens.
        kinds: of slow clients.
        pace: what their pauses are multiplied with.
    """

    def __init__(
        self, clients: Clients, key: str, journal: Journal, kinds: Sequence[SlowKind] = SLOW_KINDS, pace: float = 1.0
    ) -> None:
        self._clients, self._key, self._journal = clients, key, journal
        self._kinds, self._pace = kinds, pace
        self._body = _digit(3)

    async def run(self, until_s: float) -> None:
        """Go on until a time, then finish what was begun."""
        await asyncio.gather(*(self._repeat(kind, until_s) for kind in self._kinds for _ in range(kind.clients)))

    async def _repeat(self, kind: SlowKind, until_s: float) -> None:
        while (due_s := self._journal.now()) < until_s:
            request_id, phase = self._clients.next_request_id(), self._clients.phase
            status = await self._once(kind, request_id)
            self._journal.end(kind.name, phase, due_s, status, request_id, 0.0)
            await asyncio.sleep(self._pace if status != REFUSED else _RETRY_PAUSE_S)

    async def _once(self, kind: SlowKind, request_id: str) -> int:
        connection = await self._connect(request_id)
        if connection is None:
            return REFUSED
        try:
            status, body = await kind.act(connection)
        except (OSError, EOFError) as error:
            if 0 in kind.allowed:
                return 0
            self._journal.breakage(kind.name, request_id, error)
            return BROKEN
        finally:
            connection.writer.close()
            with suppress(OSError):
                await connection.writer.wait_closed()
        if status == 200:
            self._clients.take_ids(body, request_id)
        return status

    async def _connect(self, request_id: str) -> SlowConnection | None:
        for address in list(self._clients.addresses):
            host, _, port = address.removeprefix("http://").partition(":")
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                self._clients.prefer_others(address)
                continue
            head = (
                f"POST /v1/predict HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: image/png\r\n"
                f"Content-Length: {len(self._body)}\r\nX-API-Key: {self._key}\r\nX-Request-ID: {request_id}\r\n\r\n"
            )
            return SlowConnection(reader, writer, head.encode(), self._body, self._pace)
        return None


def bomb(side_px: int = 30_000) -> bytes:
    """A PNG of a few hundred bytes whose header announces hundreds of megapixels."""
    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _digit(number: int) -> bytes:
    from sklearn.datasets import load_digits

    pixels = (load_digits().images[number] * (255 / 16)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((28, 28), Image.Resampling.BILINEAR).save(stream, "PNG")
    return stream.getvalue()


def _recode(png: bytes, file_format: str) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).save(stream, file_format)
    return stream.getvalue()


def _multipart(fields: list[tuple[str, bytes]]) -> tuple[bytes, dict[str, str]]:
    boundary = "perch-soak-boundary"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{index}.png"\r\n'
        f"Content-Type: image/png\r\n\r\n".encode()
        + data
        + b"\r\n"
        for index, (name, data) in enumerate(fields)
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }
