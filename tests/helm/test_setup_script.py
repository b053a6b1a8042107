"""What the chart's Job does to servers, over TLS and with a token, against a server that answers as the API does.

`tests/cluster` runs it on a real one; here are the moments that are hard to meet there.
"""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.helm.rendering import CHART

PATH = "/apis/apps/v1/namespaces/vision/deployments/"


def server(replicas: int, digest: str = "") -> dict[str, Any]:
    annotations = {"perch/release-digest": digest} if digest else {}
    return {
        "metadata": {"resourceVersion": "7"},
        "spec": {"replicas": replicas, "template": {"metadata": {"annotations": annotations}}},
    }


class Api(ThreadingHTTPServer):
    """Deployments by name; `next_status` is what the next answers are instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.servers: dict[str, dict[str, Any]] = {}
        self.patches: list[tuple[str, dict[str, Any]]] = []
        self.next_status: list[int] = []
        self.released_meanwhile = ""


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        status = self.server.next_status.pop(0) if self.server.next_status else 200
        name = self.path.removeprefix(PATH)
        if self.headers["Authorization"] != "Bearer the-token":
            status = 401
        self._answer(status, self.server.servers[name])

    def do_PATCH(self) -> None:
        name, _, query = self.path.removeprefix(PATH).partition("?")
        patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/merge-patch+json"
        assert query == "fieldManager=perch-engine"
        if self.server.released_meanwhile == name:
            self.server.servers[name] = {**server(3, "d1"), "metadata": {"resourceVersion": "8"}}
        known = self.server.servers[name]
        if patch["metadata"]["resourceVersion"] != known["metadata"]["resourceVersion"]:
            self._answer(409, {"message": "the object has been modified"})
            return
        self.server.patches.append((name, patch["spec"]))
        known["spec"] |= patch["spec"]
        self._answer(200, known)

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rest_empty_servers", CHART / "files/rest_empty_servers.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ACCOUNT", tmp_path)
    return module


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "token").write_text("the-token\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key.pem")
    found = Api()
    found.socket = context.wrap_socket(found.socket, server_side=True)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(found.server_address[1]))
    thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def test_setup__servers_without_a_release__are_set_to_0_and_no_others(script: ModuleType, api: Api) -> None:
    api.servers = {"a": server(1), "b": server(3, "d1"), "staging": server(0)}
    script.main("vision", ["a", "b", "staging"])
    assert api.patches == [("a", {"replicas": 0})]
    assert [known["spec"]["replicas"] for known in api.servers.values()] == [0, 3, 0]
    script.main("vision", ["a", "b", "staging"])
    assert len(api.patches) == 1


def test_setup__a_release_that_comes_in_between__keeps_its_pods(script: ModuleType, api: Api) -> None:
    api.servers, api.released_meanwhile = {"a": server(1)}, "a"
    script.main("vision", ["a"])
    assert (api.patches, api.servers["a"]["spec"]["replicas"]) == ([], 3)


def test_setup__an_api_that_is_away_for_a_moment__is_asked_again(
    script: ModuleType, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    api.servers, api.next_status = {"a": server(1)}, [503]
    script.main("vision", ["a"])
    assert "a: 503" in capsys.readouterr().out
    assert api.patches == [("a", {"replicas": 0})]


def test_setup__an_api_that_stays_away__fails_the_job(
    script: ModuleType, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.servers, api.next_status = {"a": server(1)}, [503, 503, 503]
    monkeypatch.setattr(script, "TRIES", 1)
    with pytest.raises(SystemExit, match="a: given up"):
        script.main("vision", ["a"])


def test_setup__an_api_with_another_certificate__is_not_given_the_token(
    script: ModuleType, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.servers = {"a": server(1)}
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "localhost")  # which is not in the certificate
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        script.rest("vision", "a")
    assert not api.patches
