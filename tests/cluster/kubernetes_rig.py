"""The target on a cluster, laid out for the tests that every release target has to pass."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import yaml

from pipelines.errors import TryLater
from pipelines.release.artifact_store import open_store
from pipelines.release.kubernetes_api import ClusterApi
from pipelines.release.kubernetes_pods import current
from pipelines.release.kubernetes_target import KubernetesTarget
from pipelines.release.local_plan import PRODUCTION_PROCESSES
from pipelines.release.targets import Slot, SlotCounters
from tests.cluster.gateway import Gateway
from tests.cluster.kubernetes_cluster import Cluster
from tests.integration.release_target_behaviour import TargetRig, flip_a_bit

_SERVICE_VARIABLE = "PERCH_SERVING_WORKERS"
_SCRAPED_LIMIT_S = 20.0
SCRAPE_INTERVAL_S = 1


@dataclass(frozen=True)
class KubernetesRig(TargetRig):
    cluster: Cluster
    gateway: Gateway
    released: Path  # folder with the files of the releases

    @property
    def target(self) -> KubernetesTarget:
        return KubernetesTarget(self.settings)

    def pods(self, process: str) -> list[dict[str, Any]]:
        everything = self.cluster.read("pods", f"--namespace={self.settings.kubernetes_namespace}")["items"]
        return [dict(pod) for pod in current(everything, process)]

    def process_of(self, slot: Slot) -> str:
        return f"serving-{self.cluster.server_of(self.settings.kubernetes_namespace, slot)}"

    def identities(self) -> tuple[object, ...]:
        return tuple(
            tuple(
                (pod["metadata"]["uid"], *(status["restartCount"] for status in pod["status"]["containerStatuses"]))
                for pod in self.pods(process)
            )
            for process in PRODUCTION_PROCESSES
        )

    def kill_service(self, slot: Slot) -> None:
        """As the node sees them: what runs in a container has the pod's name for a host name."""
        names = {pod["metadata"]["name"] for pod in self.pods(self.process_of(slot))}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("HOSTNAME") in names and _SERVICE_VARIABLE in environment:
                    found.append(process)
        assert found
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):  # the first one's end ends the others
                process.kill()
        psutil.wait_procs(found, timeout=10)

    def is_running(self, process: str) -> bool:
        return bool(self.pods(process))

    def put_tampered(self) -> str:
        file = flip_a_bit(self.released / Path(self.second.address).name, self.settings.home / "broken")
        store = open_store(self.settings.model_copy(update={"releases_url": "s3://releases/broken"}))
        for one in (file, file.with_name(f"{file.name}.sig")):
            store.put(one.name, one)
        return store.address(file.name)

    @property
    def mortal_writes(self) -> str:
        return """
from pipelines.release.kubernetes_api import ClusterApi
ClusterApi.apply = mortal(ClusterApi.apply)
"""

    @property
    def environment(self) -> dict[str, str]:
        settings = self.settings
        return {
            "PERCH_HOME": str(settings.home),
            "PERCH_TARGET": "kubernetes",
            "PERCH_KUBERNETES_NAMESPACE": settings.kubernetes_namespace,
            "KUBECONFIG": os.environ["KUBECONFIG"],
        }

    def observe(self, slot: Slot) -> SlotCounters:
        """Numbers of now: Prometheus looks once a second."""
        asked_at = time.time()
        while True:
            counters = self.target.observe(slot)
            if counters is not None and counters.taken_at > asked_at:
                return counters
            assert time.time() - asked_at < _SCRAPED_LIMIT_S, counters
            time.sleep(0.1)


def make_bucket(endpoint: str, name: str) -> None:
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)


@contextlib.contextmanager
def prometheus(folder: Path, api: ClusterApi, port: int) -> Iterator[None]:
    """A Prometheus at a port of this machine that looks at the pods, labelled as the operator labels them.

    Debian's is built without Kubernetes' discovery: what it would find is written into a file that it watches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pods = folder / "pods.json"
    configuration = {
        "global": {"scrape_interval": f"{SCRAPE_INTERVAL_S}s", "scrape_timeout": f"{SCRAPE_INTERVAL_S}s"},
        "scrape_configs": [
            {"job_name": "serving", "file_sd_configs": [{"files": [str(pods)], "refresh_interval": "1s"}]}
        ],
    }
    _write_pods(pods, api)
    ended = threading.Event()
    discovery = threading.Thread(target=_discover, args=(pods, api, ended))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    program = shutil.which("prometheus")
    assert program, "prometheus is missing: scripts/debian-packages.sh installs it"
    arguments = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *arguments, f"--web.listen-address=0.0.0.0:{port}"],
            stdout=log,
            stderr=log,
            env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/-/ready").status_code == 200:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        discovery.start()
        yield
    finally:
        ended.set()
        if discovery.ident is not None:
            discovery.join()
        process.terminate()
        process.wait(timeout=30)


def _discover(file: Path, api: ClusterApi, ended: threading.Event) -> None:
    while not ended.wait(0.5):
        with contextlib.suppress(TryLater):  # a test ended the API server
            _write_pods(file, api)


def _write_pods(file: Path, api: ClusterApi) -> None:
    groups = [
        {
            "targets": [f"{pod['status']['podIP']}:9464"],
            "labels": {"namespace": api.namespace, "pod": pod["metadata"]["name"]},
        }
        for pod in api.list_pods("app.kubernetes.io/component=serving")
        if "podIP" in pod["status"]
    ]
    (draft := file.with_suffix(".new")).write_text(json.dumps(groups))
    draft.replace(file)
