"""A release served as in production: BentoML's arbiter and its workers as real processes, on a free port."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from pipelines.core.api_keys import ApiKey, ApiKeyFile, new_key, write_keys
from pipelines.core.contract import ModelContract
from pipelines.core.release_unit import MANIFEST_FILE, MODEL_FILE, RELEASE_FOLDER, ReleaseManifest
from pipelines.core.scopes import Scope
from pipelines.services.stack import any_free_port
from serving.__main__ import ALLOCATOR

PROJECT = Path(__file__).parents[2]
START_LIMIT_S = 60.0  # 3 s on an idle machine


def stage_release(folder: Path, model: bytes, contract: ModelContract) -> Path:
    """Lay a release out as it lies in a Bento's sources, with this working tree's code.

    Args:
        folder: new.
        model: an ONNX file that carries the contract.
        contract: what the model takes and gives.
    """
    release = folder / RELEASE_FOLDER
    release.mkdir(parents=True)
    (release / MODEL_FILE).write_bytes(model)
    manifest = ReleaseManifest(
        model="shapes-classification",
        version="7",
        labels=contract.labels,
        input=contract.input,
        metrics={},
        run_id="run-1",
        mlflow_run_id="0a" * 16,
        git_sha="3e9d1c2" + "0" * 33,
        service_git_sha="4f0e2d3" + "0" * 33,
        data_sha256="77ab" * 16,
        onnx_sha256=hashlib.sha256(model).hexdigest(),
        registered_at="2026-11-01T02:00:00+00:00",
    )
    (release / MANIFEST_FILE).write_text(manifest.model_dump_json())
    for package in ("serving", "pipelines"):
        (folder / package).symlink_to(PROJECT / package)
    return folder


@dataclass
class Server:
    """`bentoml serve` over a staged release, in a session of its own.

    Args:
        stage: from `stage_release`.
        home: folder for what the server writes.
        settings: of the service, without their prefix.
        keys: taken beside its own.
    """

    stage: Path
    home: Path
    settings: dict[str, Any] = field(default_factory=dict)
    keys: tuple[ApiKey, ...] = ()
    port: int = 0
    key: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.home / "server.log").read_text(errors="replace")

    @property
    def predictions(self) -> Path:
        return self.home / "predictions"

    def start(self, *, ready: bool = True) -> None:
        """Start it, and wait until it is ready."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.port = self.port or any_free_port()
        keys = self.home / "api-keys.json"
        self.key, entry = new_key("tests", tuple(Scope), rate_per_s=1e6, burst=10_000_000)
        write_keys(keys, ApiKeyFile(keys=(entry, *self.keys)))
        settings = {
            "API_KEYS_FILE": keys,
            "PREDICTIONS_URL": self.predictions,
            "SPOOL_DIR": self.home / "spool",
            "WORKERS": 1,
        } | self.settings
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PERCH_SERVING_")}
        environment |= {f"PERCH_SERVING_{name}": str(value) for name, value in settings.items()}
        environment |= {"BENTOML_HOME": str(self.home / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
        environment |= {"OTEL_SDK_DISABLED": "true", "OMP_NUM_THREADS": "1", **ALLOCATOR}
        command = [sys.executable, "-m", "bentoml", "serve", "serving.service:service"]
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                cwd=self.stage,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if ready:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until `/readyz` says so."""
        until = time.monotonic() + START_LIMIT_S
        while not self.is_ready():
            assert self.process is not None
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            assert time.monotonic() < until, f"not ready after {START_LIMIT_S:g} s:\n{self.log}"
            time.sleep(0.05)

    def is_ready(self) -> bool:
        """Whether `/readyz` says so."""
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def client(self, **options: Any) -> httpx.Client:
        """An HTTP client with the key."""
        return httpx.Client(base_url=self.url, headers={"X-API-Key": self.key}, timeout=30, **options)

    def processes(self) -> list[psutil.Process]:
        """The arbiter and all below it."""
        assert self.process is not None
        arbiter = psutil.Process(self.process.pid)
        return [arbiter, *arbiter.children(recursive=True)]

    def workers(self) -> list[int]:
        """The workers' process ids."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one of these
                if "--worker-id" in process.cmdline():
                    found.append(process.pid)
        return sorted(found)

    def pss_mib(self) -> float:
        """Memory of all its processes, what they share counted once, in MiB."""
        return sum(process.memory_full_info().pss for process in self.processes()) / 2**20

    def stop(self, patience_s: float = 30.0) -> int | None:
        """End it by SIGTERM, as an orchestrator would; what is left then, by SIGKILL."""
        process = self.process
        if process is None:
            return None
        everything = self.processes() if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            for other in everything:
                if other.is_running() and other.pid != process.pid:
                    other.kill()
            self.process = None
