"""MLflow as the chart starts it, word for word, over a real PostgreSQL and S3, called by its Service's name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import httpx
import pytest
import requests
from moto.server import ThreadedMotoServer

from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.services.stack import any_free_port
from pipelines.settings import Settings
from tests.helm import rendering
from tests.helm.rendering import NAMESPACE, RELEASE
from tests.integration.postgresql_server import make_database, serve_postgresql

pytestmark = [pytest.mark.services, pytest.mark.slow]

HOST = f"{RELEASE}-mlflow.{NAMESPACE}:5000"


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with serve_postgresql() as folder:
        yield make_database(folder, "mlflow")


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port := any_free_port(), verbose=False)
    server.start()
    address = f"http://127.0.0.1:{port}"
    credentials = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **credentials).create_bucket(Bucket="perch")
    yield address
    server.stop()


def keep_and_fetch(mlflow: Mlflow, folder: Path) -> bytes:
    (note := folder / "note.txt").write_bytes(b"kept, too")
    artifacts = mlflow.artifacts(mlflow.client.create_run("0").info.run_id)
    artifacts.log_artifact(str(note))
    return Path(artifacts.download_artifacts("note.txt")).read_bytes()


def test_mlflow__as_the_chart_starts_it__keeps_runs_and_artifacts(
    database: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = rendering.values_of("default", objectStore={"endpointUrl": store, "region": "us-east-1"})
    template = rendering.find(rendering.render(values), "Deployment", f"{RELEASE}-mlflow")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    secrets = {
        "MLFLOW_BACKEND_STORE_URI": database,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    variables = {
        name: value if isinstance(value, str) else secrets[name]
        for name, value in rendering.environment_of(container).items()
    }
    port = any_free_port()
    arguments = [argument.replace("--port=5000", f"--port={port}") for argument in container["args"]]
    program = Path(sys.executable).parent / container["command"][0]
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [program, *container["command"][1:], *arguments],
            env={**kept, **variables, "HOME": str(tmp_path)},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Host": HOST}, timeout=30)
        probe = container["readinessProbe"]["httpGet"]
        named = {header["name"]: header["value"] for header in probe["httpHeaders"]}
        assert named == {"Host": "localhost:5000"}  # the kubelet's own, the pod's address, is none that is let in
        deadline = time.monotonic() + 180
        while True:
            try:
                if client.get(probe["path"], headers=named).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)

        alive = client.get(container["livenessProbe"]["httpGet"]["path"], headers={"Host": "10.0.0.7:5000"})
        assert alive.status_code == 200
        api = "/api/2.0/mlflow"
        experiment = client.post(f"{api}/experiments/create", json={"name": "digits"})
        assert experiment.status_code == 200, experiment.text
        found = client.get(f"{api}/experiments/get", params={"experiment_id": experiment.json()["experiment_id"]})
        location = found.json()["experiment"]["artifact_location"]
        assert location.startswith("mlflow-artifacts:/")  # clients go through the server
        folder = location.removeprefix("mlflow-artifacts:/")
        stored = client.put(f"{api}-artifacts/artifacts/{folder}/note.txt", content=b"kept")
        assert stored.status_code == 200, stored.text
        s3 = boto3.client(
            "s3", endpoint_url=store, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
        )
        keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket="perch")["Contents"]]
        assert [key for key in keys if key.startswith("mlflow/") and key.endswith("/note.txt")]

        # Perch's own files go the same way, though the server offers to send its clients to the store.
        asked, send = set(), requests.Session.send

        def note(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
            asked.add(urlsplit(str(request.url)).netloc)
            return send(session, request, **options)

        monkeypatch.setattr(requests.Session, "send", note)
        settings = Settings(home=tmp_path / "home", mlflow_uri=f"http://127.0.0.1:{port}")
        assert with_mlflow(settings, lambda mlflow: keep_and_fetch(mlflow, tmp_path)) == b"kept, too"
        assert asked == {f"127.0.0.1:{port}"}

        stranger = client.get(f"{api}/experiments/get", headers={"Host": "evil.example"}, params={"experiment_id": "0"})
        assert stranger.status_code == 403
    finally:
        server.terminate()
        server.wait(60)
