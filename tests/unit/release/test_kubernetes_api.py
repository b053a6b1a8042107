"""What the client of the cluster makes of answers that no API server gives; `tests/cluster` asks a real one."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from pipelines.errors import TryLater
from pipelines.release.kubernetes_api import ROUTES, ClusterApi


class Nonsense(BaseHTTPRequestHandler):
    """Answers everything with 200 and the same bytes."""

    answer = b""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def do_PATCH(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ClusterApi]:
    server = HTTPServer(("127.0.0.1", 0), Nonsense)
    Thread(target=server.serve_forever, daemon=True).start()
    kubeconfig = tmp_path / "kubeconfig"
    address = f"http://127.0.0.1:{server.server_port}"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "clusters": [{"name": "one", "cluster": {"server": address}}],
                "users": [{"name": "one", "user": {"token": "a"}}],
                "contexts": [{"name": "one", "context": {"cluster": "one", "user": "one", "namespace": "ml"}}],
                "current-context": "one",
            }
        )
    )
    yield ClusterApi(kubeconfig=str(kubeconfig))
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "answer",
    [b"", b"<html>sign in</html>", b"\xff\xfe", b"[]", b"null", b"{}", b'{"metadata": null}', b'{"items": [{}]}'],
)
def test_calls__answer_is_nonsense__are_try_later_and_never_a_defect(
    api: ClusterApi, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(Nonsense, "answer", answer)
    document = {"metadata": {"name": "perch-serving"}}
    calls = (
        lambda: api.get(ROUTES, "httproutes", "perch-serving"),
        lambda: api.list_pods("app.kubernetes.io/component=serving"),
        lambda: api.apply(ROUTES, "httproutes", document),
    )
    for call in calls:
        with pytest.raises(TryLater, match="its answer is no"):
            call()


def test_list_pods__there_are_none__is_an_answer(api: ClusterApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Nonsense, "answer", b'{"kind": "PodList", "metadata": {"resourceVersion": "7"}, "items": []}')
    assert api.list_pods("app.kubernetes.io/component=serving") == []
