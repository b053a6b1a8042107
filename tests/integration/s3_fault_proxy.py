"""Stands before a real S3 server, over TLS where asked, and does faults to chosen requests."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["503", "slow", "truncated", "shortened", "damaged", "drip", "reset", "unanswered"]

_BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_OF_THE_CONNECTION = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}


@dataclass
class _Plan:
    fault: Fault | None = None
    methods: frozenset[str] = frozenset()
    left: int = 0


class FaultProxy:
    """A proxy on a free port.

    Args:
        upstream: the S3 server's address.
        tls: what to speak TLS with.
        slow_s: how long a slow answer waits before it begins.

    Attributes:
        seen: method and path of each request, in order.
    """

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None, slow_s: float = 2.0) -> None:
        self.seen: list[tuple[str, str]] = []
        self.slow_s = slow_s
        self.upstream = urlsplit(upstream).netloc
        self._plan, self._lock = _Plan(), threading.Lock()
        self._on_request: Callable[[], None] = lambda: None
        self._is_cut, self._open = False, set[socket.socket]()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def set(self, fault: Fault, times: int = 1, methods: str = "GET PUT HEAD") -> None:
        """Do a fault to the next requests of these methods, so many times."""
        with self._lock:
            self._plan = _Plan(fault, frozenset(methods.split()), times)

    @property
    def left(self) -> int:
        """Faults that are still to be done."""
        return self._plan.left

    def take(self, method: str, path: str) -> Fault | None:
        """The fault to do to this request."""
        with self._lock:
            self.seen.append((method, path))
        self._on_request()
        with self._lock:
            if not self._plan.left or method not in self._plan.methods:
                return None
            self._plan.left -= 1
            return self._plan.fault

    def tell_of_requests(self, listener: Callable[[], None]) -> None:
        """Call this before each request is passed on."""
        self._on_request = listener

    def cut(self) -> None:
        """Reset all connections, and each new one as soon as it is made, until `mend`."""
        with self._lock:
            self._is_cut = True
            ends = list(self._open)
        for end in ends:
            _reset(end)

    def mend(self) -> None:
        """Be there again."""
        with self._lock:
            self._is_cut = False

    def begin(self, connection: socket.socket) -> bool:
        """Note a connection; whether there is a way through."""
        with self._lock:
            self._open.add(connection)
            return not self._is_cut

    def end(self, connection: socket.socket) -> None:
        """Forget a connection."""
        with self._lock:
            self._open.discard(connection)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what is being tested."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        try:
            if self.owner.begin(self.connection):
                super().handle()
            else:
                self._reset()
        finally:
            self.owner.end(self.connection)

    def do_GET(self) -> None:
        body = self._read_body()
        fault = self.owner.take(self.command, self.path)
        if fault == "reset":
            self._reset()
        elif fault == "503":
            self._answer(503, {"Content-Type": "application/xml"}, _BUSY, len(_BUSY))
        else:
            if fault == "slow":
                time.sleep(self.owner.slow_s)
            self._pass_on(body, fault)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815 - http.server's names

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection(self.owner.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_THE_CONNECTION}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _OF_THE_CONNECTION}
        length = int(answer.getheader("Content-Length", "") or len(content))
        upstream.close()
        if fault == "unanswered":  # done, and nobody hears of it
            self._reset()
            return
        if fault == "truncated":
            content = content[: len(content) // 2]
        elif fault == "shortened" and self.command == "GET":
            content = content[: len(content) // 2]
            length = len(content)
        elif fault == "damaged" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._answer(answer.status, kept, content, length, drip=fault == "drip")

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: int, *, drip: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if drip:
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(content)
        if len(content) != length:
            self.close_connection = True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reset(self) -> None:
        self.close_connection = True
        _reset(self.connection)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        pass


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)  # wakes who reads from it in another thread
    with contextlib.suppress(OSError):
        connection.close()


def make_authority(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A private authority's certificate, and what a server on 127.0.0.1 needs to be vouched for by it."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)

    def certificate(
        subject: str, issuer: str, public: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePrivateKey, *, ca: bool
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if ca:
            usage = dict.fromkeys(
                ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
                False,
            ) | {"key_cert_sign": True, "crl_sign": True, "encipher_only": False, "decipher_only": False}
            builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        else:
            names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(signer, hashes.SHA256())

    root_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certificate("tests' authority", "tests' authority", root_key.public_key(), root_key, ca=True)
    server = certificate("127.0.0.1", "tests' authority", server_key.public_key(), root_key, ca=False)
    bundle, pair = folder / "authority.pem", folder / "server.pem"
    bundle.write_bytes(root.public_bytes(serialization.Encoding.PEM))
    pair.write_bytes(
        server.public_bytes(serialization.Encoding.PEM)
        + server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    return bundle, context
