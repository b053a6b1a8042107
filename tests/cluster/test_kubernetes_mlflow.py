"""MLflow as the chart runs it, in pods of a node, over a real PostgreSQL and S3: used as Perch does, and killed."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import httpx
import pytest
import requests
import sqlalchemy

from pipelines.core.free_ports import any_free_port
from pipelines.params import Params
from pipelines.registry.aliases import RegistryAliases
from pipelines.registry.connection import Mlflow, with_mlflow
from pipelines.registry.models import EVIDENCE_FOLDER, MODEL_FOLDER, list_versions
from pipelines.registry.registration import register
from pipelines.release.keys import create_key
from pipelines.settings import Settings
from tests.cluster.conftest import IMAGE, Phases
from tests.cluster.installation import OBJECT_STORE, RELEASE, chart_objects, secret
from tests.cluster.installed import object_store
from tests.cluster.kubernetes_cluster import HOST_SEEN_FROM_PODS, Cluster
from tests.cluster.test_kubernetes_training import PIPELINE_ARCHIVE, PIPELINE_IMAGE
from tests.cluster.training_rig import reachable_from_pods
from tests.conftest import MakeRun
from tests.integration.postgresql_server import execute, killed_postgresql, make_database, serve_postgresql
from tests.integration.release_target_behaviour import wait_until
from tests.missing_parts import miss

NAMESPACE, ELSEWHERE = "registry", "registry-upgraded"
NAME, DATABASE = f"{RELEASE}-mlflow", "perch-mlflow-database"
SELECTOR = "--selector=app.kubernetes.io/component=mlflow"
READ = "/api/2.0/mlflow/registered-models/search?max_results=1"
UP_LIMIT_S = 240.0
UNREADY_LIMIT_S = 40.0  # three probes, 5 s apart; Perch waits for 60 s
OLDER_BY = 12  # migrations

pytestmark = [pytest.mark.cluster, pytest.mark.services, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Registry:
    """MLflow in a namespace.

    Attributes:
        cluster: of one node, which has the image.
        namespace: where the chart is installed.
        store: address of the object store.
        postgresql: folder of the database's server and its socket.
        database: what pods reach the database by.
        public_key: PEM of the key whose releases are trusted.
    """

    cluster: Cluster
    namespace: str
    store: str
    postgresql: Path
    database: str
    public_key: str

    @property
    def url(self) -> str:
        """Of its Service, as this machine reaches it."""
        service = self.cluster.read("service", NAME, f"--namespace={self.namespace}")
        return f"http://{service['spec']['clusterIP']}:5000"

    def pods(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.cluster.read("pods", f"--namespace={self.namespace}", SELECTOR)["items"]
        return found

    def ready(self) -> int:
        return sum(known.get("ready", False) for pod in self.pods() for known in statuses(pod, "containerStatuses"))

    def restarts(self) -> int:
        kinds = ("initContainerStatuses", "containerStatuses")
        return sum(known["restartCount"] for pod in self.pods() for kind in kinds for known in statuses(pod, kind))

    def kubectl(self, *words: str, **options: Any) -> str:
        return self.cluster.kubectl(f"--namespace={self.namespace}", *words, **options)

    def upgrade_said(self, pod: dict[str, Any]) -> str:
        """The last line of what brought the database up to date."""
        return self.kubectl("logs", pod["metadata"]["name"], "--container=database").splitlines()[-1]

    def explain(self) -> str:
        logs = [
            self.kubectl("logs", pod["metadata"]["name"], "--all-containers", "--tail=30", check=False)
            for pod in self.pods()
        ]
        return "\n".join([self.kubectl("describe", "pods", SELECTOR, check=False)[-6000:], *logs])

    def wait_until_ready(self, pods: int) -> float:
        began = time.monotonic()
        while self.ready() != pods or len(self.pods()) != pods:
            assert time.monotonic() - began < UP_LIMIT_S, self.explain()
            time.sleep(0.2)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def registry(cluster: Cluster, phases: Phases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """The chart with one MLflow pod on an empty database, ready."""
    if not PIPELINE_ARCHIVE:
        miss("PERCH_PIPELINE_IMAGE and PERCH_PIPELINE_ARCHIVE name no image", "`make cluster-test` makes one")
    cluster.load_image(Path(PIPELINE_ARCHIVE))
    phases.end("image of MLflow given to the node")
    settings, port = Settings(home=tmp_path_factory.mktemp("keys")), any_free_port()
    create_key(settings)
    with (
        serve_postgresql() as socket,
        reachable_from_pods(port, f"UNIX-CONNECT:{socket}/.s.PGSQL.5432"),
        object_store("perch") as store,
    ):
        make_database(socket, "mlflow")
        address = f"postgresql+psycopg://perch@{HOST_SEEN_FROM_PODS}:{port}"
        public_key = (settings.keys_dir / "release.pub").read_text()
        registry = Registry(cluster, NAMESPACE, store, socket, f"{address}/mlflow", public_key)
        try:
            cluster.apply(objects(registry, replicas=1))
            print(f"on an empty database: ready after {registry.wait_until_ready(1):.1f} s")
            phases.end("chart installed, MLflow ready")
            yield registry
        finally:
            cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false", check=False)
            phases.end("MLflow used and killed")


@pytest.fixture
def second(registry: Registry) -> Iterator[Registry]:
    """A second installation, MLflow's own objects alone: two pods, on the database of an older MLflow."""
    make_old_database(make_database(registry.postgresql, "older"))
    own = replace(registry, namespace=ELSEWHERE, database=f"{registry.database.removesuffix('/mlflow')}/older")
    wanted = [
        known
        for known in objects(own, replicas=2)
        if known["kind"] in ("Namespace", "Secret") or known["metadata"]["name"] == NAME
    ]
    try:
        registry.cluster.apply(wanted)
        yield own
    finally:
        registry.cluster.kubectl("delete", "namespace", ELSEWHERE, "--wait=false", check=False)


def objects(registry: Registry, *, replicas: int) -> list[dict[str, Any]]:
    """A namespace with the chart in it."""
    namespace, (repository, _, tag) = registry.namespace, PIPELINE_IMAGE.rpartition(":")
    credentials = {"AWS_ACCESS_KEY_ID": b"test", "AWS_SECRET_ACCESS_KEY": b"test"}
    chart = chart_objects(
        namespace,
        IMAGE,
        public_key=registry.public_key,
        images={"pipeline": {"repository": repository, "tag": tag}},
        objectStore={"endpointUrl": registry.store, "region": "us-east-1"},
        # The tests on this machine call it by its address.
        mlflow={"enabled": True, "replicas": replicas, "allowedHosts": ["10.*"]},
    )
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        secret(namespace, DATABASE, {"MLFLOW_BACKEND_STORE_URI": registry.database.encode()}),
        secret(namespace, OBJECT_STORE, credentials),
        *chart,
    ]


def make_old_database(url: str) -> None:
    """Tables as they were some migrations ago, with an experiment in them."""
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine, config = sqlalchemy.create_engine(url), _get_alembic_config(url)
    Base.metadata.create_all(engine)
    older = [known.revision for known in ScriptDirectory.from_config(config).walk_revisions()][OLDER_BY]
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, older)
    engine.dispose()
    columns = "(name, artifact_location, lifecycle_stage)"
    execute(url, f"INSERT INTO experiments {columns} VALUES ('of old', 'mlflow-artifacts:/old', 'active')")


def statuses(pod: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pod["status"].get(kind, [])
    return found


@contextmanager
def asked(url: str) -> Iterator[list[tuple[float, int]]]:
    """Somebody reads all the time: when each answer came, and its status, 0 for none."""
    answers: list[tuple[float, int]] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(0.1):
            status = 0
            with suppress(httpx.TransportError):
                status = httpx.get(url + READ, timeout=5, trust_env=False).status_code
            answers.append((time.monotonic(), status))

    reader = threading.Thread(target=ask)
    reader.start()
    try:
        yield answers
    finally:
        ended.set()
        reader.join()


def away_s(answers: list[tuple[float, int]]) -> float:
    """The longest time between two good answers."""
    good = [at for at, status in answers if status == 200]
    return max(after - before for before, after in pairwise(good))


def everything(settings: Settings, model: str) -> tuple[Any, dict[str, str]]:
    """All versions as they are registered, and the SHA-256 of every file of their runs."""
    versions = list_versions(settings, model)

    def read(mlflow: Mlflow) -> dict[str, str]:
        files = {}
        for version in versions:
            root = Path(mlflow.artifacts(version.mlflow_run_id).download_artifacts(""))
            for path in root.rglob("*"):
                if path.is_file():
                    name = f"{version.version}/{path.relative_to(root)}"
                    files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return files

    return versions, with_mlflow(settings, read)


@pytest.fixture
def client(registry: Registry, registry_settings: Settings) -> Settings:
    return registry_settings.model_copy(update={"mlflow_uri": registry.url})


def test_mlflow__in_a_pod__has_no_rights_and_writes_where_it_may_alone(registry: Registry) -> None:
    (pod,) = registry.pods()
    name = pod["metadata"]["name"]
    assert registry.upgrade_said(pod).startswith("schema none -> ")
    assert registry.restarts() == 0
    inside = ("exec", name, "--container=mlflow", "--")
    status = dict(line.split(":\t", 1) for line in registry.kubectl(*inside, "cat", "/proc/1/status").splitlines())
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
    assert status["Seccomp"] == "2"  # the runtime's filter
    tries = "for folder in / /opt/perch /etc /tmp /var/lib/perch; do touch $folder/new && echo $folder; done; true"
    assert registry.kubectl(*inside, "sh", "-c", tries).split() == ["/tmp", "/var/lib/perch"]


def test_model__registered_over_the_service__is_read_back_byte_for_byte_here_and_in_a_pod(
    registry: Registry, client: Settings, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_hosts, send = set(), requests.Session.send

    def note(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        asked_hosts.add(urlsplit(str(request.url)).netloc)
        return send(session, request, **options)

    monkeypatch.setattr(requests.Session, "send", note)
    params, workspace = Params(dataset="shapes", model_name="read-back"), make_run()
    began = time.monotonic()
    registered = register(client, params, workspace)
    print(f"registered in {time.monotonic() - began:.1f} s")
    RegistryAliases(client).move("read-back", {"champion": "1"})
    (version,), files = everything(client, "read-back")
    assert set(version.aliases) == {"candidate", "champion"}
    assert asked_hosts == {
        urlsplit(registry.url).netloc
    }  # it would send its clients to the store, which some do not reach
    for path, name in (
        (workspace.model / "model.onnx", f"1/{MODEL_FOLDER}/model.onnx"),
        (workspace.evaluation / "model_card.html", f"1/{EVIDENCE_FOLDER}/model_card.html"),
    ):
        assert files[name] == hashlib.sha256(path.read_bytes()).hexdigest()
    store = boto3.client("s3", endpoint_url=registry.store)
    keys = [known["Key"] for known in store.list_objects_v2(Bucket="perch", Prefix="mlflow/")["Contents"]]
    assert {key.partition(f"{registered.mlflow_run_id}/artifacts/")[2] for key in keys} >= {
        name.removeprefix("1/") for name in files
    }
    # As the steps' pods know it: by the Service's name, with no credentials of the store.
    registry.cluster.apply([reader("models", "show", "1", "--model=read-back")])
    wait_until(lambda: phase_of(registry, "reader") in {"Succeeded", "Failed"}, UP_LIMIT_S)
    log = registry.kubectl("logs", "reader")
    assert phase_of(registry, "reader") == "Succeeded", log
    assert "Card of run-1" in log


def reader(*words: str) -> dict[str, Any]:
    """A pod of the installation that calls `perch`."""
    folders = {"home": "/var/lib/perch", "tmp": "/tmp"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "reader", "namespace": NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": f"{RELEASE}-pipeline",
            "enableServiceLinks": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001},
            "containers": [
                {
                    "name": "perch",
                    "image": PIPELINE_IMAGE,
                    "imagePullPolicy": "Never",
                    "args": [*words],
                    "envFrom": [{"configMapRef": {"name": f"{RELEASE}-settings"}}],
                    "volumeMounts": [{"name": name, "mountPath": path} for name, path in folders.items()],
                }
            ],
            "volumes": [{"name": name, "emptyDir": {}} for name in folders],
        },
    }


def phase_of(registry: Registry, pod: str) -> str:
    return str(registry.cluster.read("pod", pod, f"--namespace={registry.namespace}")["status"]["phase"])


def test_mlflow__its_pod_killed__comes_back_with_all_that_was_registered(
    registry: Registry, client: Settings, make_run: MakeRun
) -> None:
    params = Params(dataset="shapes", model_name="pod-killed")
    register(client, params, make_run("run-1", seed=1))
    before = everything(client, "pod-killed")
    (pod,) = registry.pods()
    with asked(registry.url) as answers:
        time.sleep(1)
        registry.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
        registry.wait_until_ready(1)
        wait_until(lambda: answers[-1][1] == 200, 10)
    print(f"pod killed: away for {away_s(answers):.1f} s")
    (other,) = registry.pods()
    assert other["metadata"]["uid"] != pod["metadata"]["uid"]
    assert registry.upgrade_said(other).endswith("as it was")
    assert everything(client, "pod-killed") == before
    assert register(client, params, make_run("run-2", seed=2)).version == 2


def test_mlflow__its_database_killed__is_not_ready_meanwhile_and_needs_no_restart(
    registry: Registry, client: Settings, make_run: MakeRun
) -> None:
    params = Params(dataset="shapes", model_name="database-killed")
    register(client, params, make_run("run-1", seed=1))
    before, restarts = everything(client, "database-killed"), registry.restarts()
    with asked(registry.url) as answers, ThreadPoolExecutor() as step:
        with killed_postgresql(registry.postgresql):
            # A step that is at it waits, and does not fail.
            registration = step.submit(register, client, params, make_run("run-2", seed=2))
            unready_after_s = wait_until(lambda: registry.ready() == 0, UNREADY_LIMIT_S)
        back_at = time.monotonic()
        ready_after_s = registry.wait_until_ready(1)
        wait_until(lambda: answers[-1][1] == 200, 10)
    first_good = next(at for at, status in answers if at > back_at and status == 200)
    told = {status for _, status in answers} - {200}
    print(
        f"database killed: not ready after {unready_after_s:.1f} s, clients were told {told}; back: first answer after "
        f"{first_good - back_at:.1f} s, ready after {ready_after_s:.1f} s"
    )
    assert told <= {0, 503}
    assert registry.restarts() == restarts
    assert registration.result().version == 2
    (_, first), files = everything(client, "database-killed")
    assert {name: digest for name, digest in files.items() if name.startswith("1/")} == before[1]
    assert first.tags == before[0][0].tags


def test_mlflow__two_pods_on_the_database_of_an_older_one__one_upgrades_it_and_both_serve(second: Registry) -> None:
    print(f"two pods on an older database: ready after {second.wait_until_ready(2):.1f} s")
    said = sorted(second.upgrade_said(pod) for pod in second.pods())
    assert sorted((line.endswith("as it was"), " -> " in line) for line in said) == [(False, True), (True, False)], said
    assert second.restarts() == 0
    for pod in second.pods():
        address = f"http://{pod['status']['podIP']}:5000/api/2.0/mlflow/experiments/get-by-name"
        answer = httpx.get(address, params={"experiment_name": "of old"}, timeout=10, trust_env=False)
        assert answer.json()["experiment"]["artifact_location"] == "mlflow-artifacts:/old"
