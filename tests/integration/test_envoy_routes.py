"""What Envoy does to a request on its way: the real Envoy before servers that note what they get."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.core.image_limits import DEFAULT_MAX_BODY_BYTES
from pipelines.core.request_origins import SHADOW_HEADER, is_copy
from pipelines.release.envoy import bootstrap, read_config_dump, read_healthy_clusters, route_table
from pipelines.release.local_layout import LocalLayout, LocalPorts, SlotPorts
from pipelines.release.local_plan import PROCESSES, Plan
from pipelines.release.targets import ReleaseRef, Routing, Slot
from pipelines.services.programs import tool
from pipelines.services.stack import any_free_port

pytestmark = pytest.mark.services


class Upstream:
    """A server that notes the requests it gets and answers with its name."""

    def __init__(self, name: str) -> None:
        self.requests: list[tuple[dict[str, str], int]] = []
        noted = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(b"ready")

            def do_POST(self) -> None:
                size = len(self.rfile.read(int(self.headers["content-length"])))
                noted.append(({key.lower(): value for key, value in self.headers.items()}, size))
                self._answer(name.encode())

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Front:
    """Envoy over two upstreams, with a plan."""

    def __init__(self, folder: Path) -> None:
        self.stable, self.canary = Upstream("stable"), Upstream("canary")
        self.layout = LocalLayout(folder)
        self.layout.routes_folder.mkdir(parents=True)
        api = {"serving-a": self.stable.port, "serving-b": self.canary.port}
        slots = {process: SlotPorts(api.get(process, 1), 1) for process in PROCESSES}
        self.ports = LocalPorts(any_free_port(), any_free_port(), slots)
        self.layout.bootstrap_file.write_text(json.dumps(bootstrap(self.layout, self.ports)))
        release = ReleaseRef("shapes", "1", "0" * 64, "/nowhere")
        self.plan = Plan().deployed(Slot.STABLE, release, 1).deployed(Slot.CANARY, release, 1)
        self.version = 0
        self._write(self.plan)
        command = [tool("envoy"), "--config-path", str(self.layout.bootstrap_file), "--disable-hot-restart"]
        self.process = subprocess.Popen([*command, "--concurrency", "1"], stderr=subprocess.DEVNULL)
        self._wait_in_force()
        while not {"serving-a", "serving-b"} <= read_healthy_clusters(self.ask("/clusters?format=json")):
            time.sleep(0.02)

    def route(self, routing: Routing) -> None:
        self._write(self.plan.routed(routing))
        self._wait_in_force()

    def post(self, body: bytes = b"image", **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(f"http://127.0.0.1:{self.ports.clients}/v1/predict", content=body, headers=named)

    def ask(self, path: str) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.ports.admin}{path}").json()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        self.stable.close()
        self.canary.close()

    def _write(self, plan: Plan) -> None:
        self.version += 1
        draft = self.layout.routes_file.with_suffix(".new")
        draft.write_text(json.dumps(route_table(plan, self.version)))
        draft.replace(self.layout.routes_file)

    def _wait_in_force(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                found = read_config_dump(self.ask("/config_dump?resource=dynamic_route_configs"))
            except httpx.TransportError:
                found = None
            if found and found[1] == self.version:
                time.sleep(0.05)
                return
            time.sleep(0.02)
        pytest.fail("Envoy did not take the routes")


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    front = Front(tmp_path)
    yield front
    front.close()


def test_envoy__mirror__copies_alone_are_marked_and_carry_the_same_request_id(front: Front) -> None:
    front.route(Routing(mirror=True))
    body = b"x" * 3_000_000  # larger than Envoy holds by default
    assert front.post(body, x_request_id="mine", **{SHADOW_HEADER: "1"}).text == "stable"
    assert front.post().text == "stable"
    deadline = time.monotonic() + 60
    while len(front.canary.requests) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    (original, size), (second, _) = front.stable.requests
    (copy, copied_size), (second_copy, _) = front.canary.requests
    assert (size, copied_size) == (3_000_000, 3_000_000)
    assert (original["x-request-id"], copy["x-request-id"]) == ("mine", "mine")
    assert second["x-request-id"] == second_copy["x-request-id"]
    assert SHADOW_HEADER not in original  # nor may a client pass its request off as a copy
    assert copy[SHADOW_HEADER] == "1"
    assert is_copy({"host": copy["host"]})  # by that alone, too: on a cluster nobody sets the header
    assert not is_copy({"host": original["host"]})


def test_envoy__body_larger_than_what_is_held_back__is_passed_on(front: Front) -> None:
    front.route(Routing(mirror=True))
    assert front.post(b"x" * (DEFAULT_MAX_BODY_BYTES + 5_000_000)).text == "stable"
    assert front.stable.requests[0][1] == DEFAULT_MAX_BODY_BYTES + 5_000_000


def test_envoy__canary_gone__stable_answers_for_it_and_never_the_other_way_round(front: Front) -> None:
    front.route(Routing(100))
    assert front.post().text == "canary"
    front.canary.close()
    assert [front.post().text for _ in range(20)] == ["stable"] * 20
    front.route(Routing(0))
    front.stable.close()
    answer = front.post(x_request_id="mine")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert answer.json()["type"] == "urn:perch:not-ready"
    assert (answer.json()["request_id"], answer.headers["x-request-id"]) == ("mine", "mine")
