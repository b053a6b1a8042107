"""What the client makes of Airflow's answers, from a server that gives them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.errors import PerchError
from pipelines.services.airflow_client import AirflowClient


class Airflow(ThreadingHTTPServer):
    """Answers each request with the status it is told."""

    status = 200
    asked: list[dict[str, object]]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Airflow

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body = json.dumps({"detail": f"status {self.server.status}"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def airflow() -> Iterator[Airflow]:
    with Airflow(("127.0.0.1", 0), Answer) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [200, 409], ids=["started", "there already"])
def test_trigger__new_run_or_one_that_is_there__is_fine(airflow: Airflow, status: int) -> None:
    airflow.status = status
    AirflowClient(airflow.address, "admin", "x").trigger("ml_training_pipeline", "demo", {"epochs": 3})
    assert airflow.asked == [{"dag_run_id": "demo", "logical_date": None, "conf": {"epochs": 3}}]


def test_trigger__form_that_airflow_refuses__is_an_error_with_its_words(airflow: Airflow) -> None:
    airflow.status = 400
    with pytest.raises(PerchError, match=r"Airflow answered 400 .*status 400"):
        AirflowClient(airflow.address, "admin", "x").trigger("ml_training_pipeline", "demo", {"epochs": 0})
