import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipelines.data.sources.download import download
from pipelines.errors import Refusal, TryLater

CONTENT = b"npz" * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    served = 0

    def do_GET(self) -> None:
        Handler.served += 1
        status = int(self.path.strip("/").split(".")[0])
        self.send_response(200 if status == 299 else status)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 100 if status == 299 else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Handler.served = 0
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch(url: str, sha256: str | None, folder):
    return download(url, sha256, folder, name=url)


def test_download__matching_digest__is_fetched_once(address, tmp_path):
    for _ in range(2):
        assert fetch(f"{address}/200.npz", DIGEST, tmp_path).read_bytes() == CONTENT
    assert Handler.served == 1


def test_download__kept_copy_damaged__is_fetched_again(address, tmp_path):
    fetch(f"{address}/200.npz", DIGEST, tmp_path).write_bytes(b"damaged")
    assert fetch(f"{address}/200.npz", DIGEST, tmp_path).read_bytes() == CONTENT


def test_download__other_digest__is_refused_with_both_and_not_kept(address, tmp_path):
    with pytest.raises(Refusal) as caught:
        fetch(f"{address}/200.npz", "0" * 64, tmp_path)
    assert DIGEST in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert not list(tmp_path.rglob("*.npz"))


def test_download__no_digest_given__is_refused_before_anything_is_fetched(address, tmp_path):
    with pytest.raises(Refusal, match=r"data_ingestion\.sha256"):
        fetch(f"{address}/200.npz", None, tmp_path)
    assert Handler.served == 0


@pytest.mark.parametrize("status", [403, 404, 410])
def test_download__not_there__is_refused(address, tmp_path, status):
    with pytest.raises(Refusal, match=str(status)):
        fetch(f"{address}/{status}.npz", DIGEST, tmp_path)


@pytest.mark.parametrize("status", [299, 429, 500, 503])
def test_download__server_in_trouble_or_cut_off__may_be_tried_later(address, tmp_path, status):
    with pytest.raises(TryLater):
        fetch(f"{address}/{status}.npz", DIGEST, tmp_path)


def test_download__no_server__may_be_tried_later(tmp_path):
    with pytest.raises(TryLater, match="refused"):
        fetch("http://127.0.0.1:9/data.npz", DIGEST, tmp_path)
