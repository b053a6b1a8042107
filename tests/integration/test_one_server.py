"""What one server's containers run, without the containers: the setup, and slots and Envoy together."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import boto3
import httpx
import psutil
import psycopg
import pytest
import yaml
from moto.server import ThreadedMotoServer
from sqlalchemy import make_url

from pipelines.core.api_keys import read_keys
from pipelines.errors import TryLater
from pipelines.release.keys import create_key, list_keys
from pipelines.release.local_layout import LocalLayout, LocalPorts, SlotPorts
from pipelines.release.local_plan import PROCESSES
from pipelines.release.local_target import LocalTarget
from pipelines.release.supervision import SOCKET, Supervisor
from pipelines.release.targets import Routing, Slot
from pipelines.services.programs import SERVICES_OF, tool
from pipelines.services.secrets import ensure_demo_key
from pipelines.services.stack import any_free_port
from pipelines.settings import Settings
from tests.integration.release_target_behaviour import READY_LIMIT_S, make_release, wait_until

PROJECT = Path(__file__).parents[2]
PREPARE = PROJECT / "docker/one-server/prepare.py"
SERVICES = yaml.safe_load((PROJECT / "docker/compose.yaml").read_text())["services"]

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_one_server", PREPARE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_url(url: str, database: str = "") -> str:
    """SQLAlchemy's URL as PostgreSQL's own programs read it."""
    parts = make_url(url).set(drivername="postgresql")
    return (parts.set(database=database) if database else parts).render_as_string(hide_password=False)


@pytest.fixture
def superuser(prepare: ModuleType, postgresql_url: str) -> Iterator[str]:
    """URL of a server on which none of the accounts is left afterwards."""
    url = plain_url(postgresql_url)
    yield url
    with psycopg.connect(url, autocommit=True) as connection:
        for database in prepare.DATABASES:
            connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")  # type: ignore[call-overload]
        for account in set(prepare.DATABASES.values()) - {connection.info.user}:
            connection.execute(f"DROP ROLE IF EXISTS {account}")  # type: ignore[call-overload]


def test_prepare__databases_twice__are_there_once_and_closed_to_the_others(prepare: ModuleType, superuser: str) -> None:
    own = {"mlflow": "one", "airflow": "two"}  # `perch` is the tests' superuser, which may enter everything
    prepare.prepare_databases(superuser, {**own, "perch": "three"})
    with psycopg.connect(plain_url(superuser, "mlflow").replace("perch@", "mlflow@"), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (n int)")
    prepare.prepare_databases(superuser, {**own, "perch": "four"})
    with psycopg.connect(superuser) as connection:
        owners = dict(
            connection.execute(
                "SELECT datname, pg_get_userbyid(datdba) FROM pg_database WHERE datname = ANY(%s)",
                (list(prepare.DATABASES),),
            ).fetchall()
        )
        assert owners == prepare.DATABASES
        for account in own:
            may = {
                database
                for database in prepare.DATABASES
                if connection.execute(
                    "SELECT has_database_privilege(%s, %s, 'CONNECT')", (account, database)
                ).fetchone()
                == (True,)
            }
            assert may == {account}
            row = connection.execute("SELECT rolsuper, rolcreatedb FROM pg_roles WHERE rolname = %s", (account,))
            assert row.fetchone() == (False, False)
    with psycopg.connect(plain_url(superuser, "mlflow").replace("perch@", "mlflow@")) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_prepare__bucket_keys_and_logins_twice__stay_as_they_were(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    store = ThreadedMotoServer("127.0.0.1", port := any_free_port(), verbose=False)
    store.start()
    try:
        endpoint = f"http://127.0.0.1:{port}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        prepare.prepare_bucket(endpoint, "us-east-1")
        client.put_object(Bucket="perch", Key="releases/x", Body=b"x")
        prepare.prepare_bucket(endpoint, "us-east-1")
        assert client.get_object(Bucket="perch", Key="releases/x")["Body"].read() == b"x"
    finally:
        store.stop()

    private, trusted, keys = tmp_path / "keys/release.pem", tmp_path / "public", tmp_path / "serving/api-keys.json"
    trusted.mkdir()
    keys.parent.mkdir()
    prepare.prepare_keys(private, trusted, keys)
    before = private.read_bytes()
    assert read_keys(keys).keys == ()
    keys.write_text(keys.read_text() + "\n")
    prepare.prepare_keys(private, trusted, keys)
    assert private.read_bytes() == before
    assert keys.read_text().endswith("\n\n") or keys.read_text().endswith("\n")
    assert [file.name for file in trusted.iterdir()] == ["release.pub"]
    (pair,) = list_keys(Settings(home=tmp_path))
    assert (trusted / "release.pub").read_bytes() == pair.public.read_bytes()

    logins = tmp_path / "airflow/passwords.json"
    prepare.write_logins(logins, {"admin": "one"})
    prepare.write_logins(logins, {"admin": "two"})
    assert json.loads(logins.read_text()) == {"admin": "two"}
    assert stat.S_IMODE(logins.stat().st_mode) == 0o600


@pytest.mark.slow
def test_prepare__tables__airflow_starts_on_them_with_the_settings_and_log_ins_of_compose(
    prepare: ModuleType, superuser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(
        ["bash", PREPARE.with_name("make-env.sh"), "perch-server:v1", tmp_path / ".env"],
        check=True,
        capture_output=True,
    )
    lines = (tmp_path / ".env").read_text().splitlines()
    secrets = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    given = {
        name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: secrets[found[1]], str(value))
        for name, value in SERVICES["airflow-api"]["environment"].items()
        if name.startswith("AIRFLOW__")
    }
    prepare.prepare_databases(superuser, {"airflow": "one", "mlflow": "two", "perch": "three"})
    port, logins = any_free_port(), tmp_path / "airflow/passwords.json"
    given |= {
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": plain_url(superuser, "airflow").replace("perch@", "airflow@"),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(logins),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(tmp_path / "logs"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(PROJECT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "PERCH_DATABASE_URL": f"postgresql+psycopg://{plain_url(superuser, 'perch').partition('://')[2]}",
        "PATH": f"{Path(tool('airflow')).parent}:{os.environ['PATH']}",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare.write_logins(logins, {user: secrets[f"AIRFLOW_{user.upper()}_PASSWORD"] for user in prepare.USERS})
    before = logins.read_text()
    prepare.migrate()
    prepare.migrate()
    log = tmp_path / "log"
    with running([tool("airflow"), *SERVICES["airflow-api"]["command"]], log):
        deadline = time.monotonic() + 180
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/execution/health", timeout=10).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        body = {"username": "approver", "password": secrets["AIRFLOW_APPROVER_PASSWORD"]}
        answer = httpx.post(f"http://127.0.0.1:{port}/auth/token", json=body, timeout=30)
        assert answer.status_code == 201, answer.text
        headers = {"Authorization": f"Bearer {answer.json()['access_token']}"}
        # By Airflow's asynchronous connection, for which it has a driver of its own.
        assert httpx.get(f"http://127.0.0.1:{port}/api/v2/monitor/health", timeout=30).json()["metadatabase"] == {
            "status": "healthy"
        }
        assert httpx.get(f"http://127.0.0.1:{port}/api/v2/dags", headers=headers, timeout=30).status_code == 200
    assert logins.read_text() == before


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def services_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(SERVICES_OF) == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


SLOTS = """
import json, sys
from pipelines.release.local_layout import LocalPorts, SlotPorts
from pipelines.services.slots import run_slots
from pipelines.settings import Settings
home, project, tree = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
slots = {process: SlotPorts(**ports) for process, ports in tree["slots"].items()}
ports = LocalPorts(tree["clients"], tree["admin"], slots, tree["clients_host"])
sys.exit(run_slots(Settings(home=home, project_dir=project), ports))
"""


@pytest.mark.slow
def test_slots_and_envoy__as_compose_starts_them__serve_a_release_and_again_after_a_restart(
    staged_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="perch-slots-") as short:  # a socket's path must be
        monkeypatch.setenv(SOCKET, f"{short}/supervisor.sock")
        settings = Settings(project_dir=PROJECT, home=tmp_path / "home")
        create_key(settings)
        key = ensure_demo_key(settings)
        first = make_release(settings, staged_release, "1")
        ports = LocalPorts(
            any_free_port(),
            any_free_port(),
            {process: SlotPorts(any_free_port(), any_free_port()) for process in PROCESSES},
            "0.0.0.0",
        )
        slots = [sys.executable, "-c", SLOTS, str(settings.home), str(PROJECT), json.dumps(asdict(ports))]
        # Reached at another address of the loopback interface than the one that everything else listens at.
        client = httpx.Client(base_url=f"http://127.0.0.2:{ports.clients}", headers={"X-API-Key": key}, timeout=10)
        health = list(SERVICES["slots"]["healthcheck"]["test"][1:])
        health = [sys.executable, *health[1:-1], health[-1].replace("/var/lib/perch", str(settings.home))]
        layout, log = LocalLayout(settings.home), tmp_path / "log"
        command = [word.replace("/var/lib/perch", str(settings.home)) for word in SERVICES["envoy"]["command"]]

        with running(slots, log, PERCH_SERVING_WORKERS="1"):
            wait_for_supervisor(settings.home, log)
            assert subprocess.run(health, check=False, cwd=PROJECT).returncode == 0
            with running([tool("envoy"), *command], log):
                target = LocalTarget(settings)
                target.deploy(Slot.STABLE, first)
                target.wait_ready(Slot.STABLE, READY_LIMIT_S)
                target.route(Routing())
                assert client.get("/v1/model").json()["version"] == "1"
                status = [sys.executable, "-m", "pipelines", "status"]
                said = subprocess.run(
                    status, capture_output=True, text=True, env={**os.environ, "PERCH_HOME": str(settings.home)}
                )
                assert said.returncode == 0, said.stderr
                assert "serving-a  RUNNING" in said.stdout
                assert "v1 is live" in said.stdout
                with pytest.raises(httpx.ConnectError):
                    httpx.get(f"http://127.0.0.2:{ports.admin}/ready")
        assert not services_of(settings.home), "the supervisor left processes behind"
        assert subprocess.run(health, check=False, cwd=PROJECT, capture_output=True).returncode != 0

        with running(slots, log, PERCH_SERVING_WORKERS="1") as again, running([tool("envoy"), *command], log):
            wait_for_supervisor(settings.home, log)
            # Nobody deploys it again: the plan says what was there.
            wait_until(lambda: Supervisor(settings.home).is_up("serving-a"))
            LocalTarget(settings).wait_ready(Slot.STABLE, READY_LIMIT_S)
            deadline = time.monotonic() + 20
            while (answer := client.get("/v1/model")).status_code != 200:
                assert time.monotonic() < deadline, answer.text
                time.sleep(0.1)
            assert layout.ports() == ports
            again.send_signal(signal.SIGINT)
            assert again.wait(60) == 0


def wait_for_supervisor(home: Path, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            Supervisor(home).info("serving-a")
            return
        except TryLater:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
