"""Each step of a run, with PostgreSQL and S3 cut off for some seconds in its middle, ends well or with "try later".

The ledger is in PostgreSQL, and so is what an MLflow server keeps, to which every step writes.  Each attempt is a
machine of its own, as a pod is: what it finds, it finds in the bucket and in the databases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipelines.errors import EXIT_OK, EXIT_TRY_LATER
from pipelines.registry.ledger import Ledger
from pipelines.release.keys import create_key
from pipelines.runs.pipeline import pipeline_steps
from pipelines.runs.replaying import lock_outs
from pipelines.runs.workspaces import workspace_of
from pipelines.settings import Settings
from tests.integration.postgresql_proxy import Proxy
from tests.integration.postgresql_server import make_database
from tests.integration.s3_fault_proxy import FaultProxy
from tests.integration.test_registry_over_mlflow import Server as Mlflow

PROJECT = Path(__file__).parents[2]
STEPS = pipeline_steps(Settings(project_dir=PROJECT))
OVERRIDES = {"model_training.epochs": 4, "model_training.int8": False, "data_ingestion.as_of": "2026-11-01"}
CUT_S = 4.0

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]


class Network:
    """All that is between a machine and its two servers.

    Attributes:
        requests: to both together, since `watch`.
        was_cut: whether it was, since `watch`.
    """

    def __init__(self, s3: FaultProxy, database: Proxy) -> None:
        self.s3, self.database = s3, database
        self.requests, self.was_cut = 0, False
        self._cut_at, self._lock = 0, threading.Lock()
        self._mending: threading.Timer | None = None
        s3.tell_of_requests(self._count)
        database.tell_of_questions(self._count)

    def watch(self, cut_at: int = 0) -> None:
        """Count from now on; cut both ways at this request, and be there again `CUT_S` later."""
        if self._mending:
            self._mending.join()
        with self._lock:
            self.requests, self.was_cut, self._cut_at = 0, False, cut_at

    def _count(self) -> None:
        with self._lock:
            self.requests += 1
            due = self.requests == self._cut_at
            self.was_cut = self.was_cut or due
        if due:
            self.s3.cut()
            self.database.cut()
            self._mending = threading.Timer(CUT_S, self._mend)
            self._mending.start()

    def _mend(self) -> None:
        self.s3.mend()
        self.database.mend()


@dataclass
class Run:
    """A run of which each attempt at each step is done on a machine of its own.

    Attributes:
        ended: the steps that have.
        requests: of each step that was not disturbed.
        attempts: exit codes of each step.
    """

    folder: Path
    network: Network
    environment: dict[str, str]
    database_url: str
    ended: list[str] = field(default_factory=list)
    requests: dict[str, int] = field(default_factory=dict)
    attempts: dict[str, list[int]] = field(default_factory=dict)

    def attempt(self, step: str, cut_at: int = 0) -> tuple[int, str]:
        """Do a step on a new machine; its exit code and what it said."""
        codes = self.attempts.setdefault(step, [])
        home = self.folder / f"{step}-{len(codes)}"
        self.network.watch(cut_at)
        done = subprocess.run(
            [Path(sys.executable).parent / "perch", step, "--run", "r", "--conf", json.dumps(OVERRIDES), "--json"],
            env={**self.environment, "PERCH_HOME": str(home), "PERCH_POD_NAME": home.name},
            cwd=PROJECT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        codes.append(done.returncode)
        if done.returncode == EXIT_OK:
            self.ended.append(step)
            self.requests[step] = self.network.requests
        return done.returncode, done.stdout

    def do_steps_before(self, step: str) -> None:
        """Do those that have not ended yet, undisturbed."""
        for earlier in STEPS[: STEPS.index(step)]:
            if earlier not in self.ended:
                code, said = self.attempt(earlier)
                assert code == EXIT_OK, said

    def outcome(self, step: str) -> dict[str, Any]:
        """What a step that has just ended left: in DVC, and of the registry's ledger."""
        home = self.folder / f"{step}-{len(self.attempts[step]) - 1}"
        ledger = Ledger(self.database_url)
        assert ledger.verify() == []
        return {
            "outs": lock_outs(workspace_of(Settings(project_dir=PROJECT, home=home), "r")),
            "ledger": [(row.event, row.model, row.version) for row in ledger.entries()],
        }


@contextmanager
def serve_run(name: str, s3_server: str, postgresql: Path, folder: Path) -> Iterator[Run]:
    """A run with an empty bucket, an empty database and a registry of its own."""
    url, kept_by_mlflow = make_database(postgresql, f"perch_{name}"), make_database(postgresql, f"mlflow_{name}")
    with closing(Proxy.before(url)) as database, closing(FaultProxy(s3_server)) as s3:
        mlflow = Mlflow(folder, database.url(kept_by_mlflow))
        (folder / "mlflow").mkdir()
        mlflow.start()
        try:
            yield open_run(name, s3_server, folder, Network(s3, database), mlflow.uri, url)
        finally:
            mlflow.kill()


def open_run(name: str, s3_server: str, folder: Path, network: Network, mlflow_uri: str, url: str) -> Run:
    bucket: Any = boto3.resource(
        "s3", endpoint_url=s3_server, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    ).Bucket(name)
    bucket.create()
    environment = {
        **os.environ,
        "PERCH_PROJECT_DIR": str(PROJECT),
        "PERCH_RUNS_URL": f"s3://{name}/perch",
        "PERCH_RELEASES_URL": f"s3://{name}/releases",
        "PERCH_S3_ENDPOINT_URL": network.s3.url,
        "PERCH_MLFLOW_URI": mlflow_uri,
        "PERCH_DATABASE_URL": network.database.url(url),
        "PERCH_SIGNING_KEY": str(create_key(Settings(home=folder)).private),
        "PERCH_SERVING_PUBLIC_KEYS": str(Settings(home=folder).keys_dir),
        "PERCH_GIT_SHA": "0" * 40,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return Run(folder, network, environment, url)


@pytest.fixture(scope="module")
def undisturbed(
    s3_server: str, postgresql_server: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Of a run that nothing happened to, how often each step asked for something, and what it left."""
    left = {}
    with serve_run("undisturbed", s3_server, postgresql_server, tmp_path_factory.mktemp("undisturbed")) as run:
        for step in STEPS:
            code, said = run.attempt(step)
            assert code == EXIT_OK, said
            left[step] = run.outcome(step)
        return run.requests, left


@pytest.fixture(scope="module")
def disturbed(s3_server: str, postgresql_server: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with serve_run("disturbed", s3_server, postgresql_server, tmp_path_factory.mktemp("disturbed")) as run:
        yield run


@pytest.mark.parametrize("step", STEPS)
def test_step__both_connections_lost_in_its_middle__ends_well_or_later_and_the_same(
    undisturbed: tuple[dict[str, int], dict[str, dict[str, Any]]], disturbed: Run, step: str
) -> None:
    requests, left = undisturbed
    disturbed.do_steps_before(step)
    code, said = disturbed.attempt(step, cut_at=requests[step] // 2)
    print(f"{step}: cut at request {requests[step] // 2} of {requests[step]}, exit {code}")
    assert disturbed.network.was_cut
    assert code in (EXIT_OK, EXIT_TRY_LATER), said
    assert "Traceback" not in said
    if code == EXIT_TRY_LATER:
        assert "what to do" in said
        code, said = disturbed.attempt(step)
        assert code == EXIT_OK, said
    assert disturbed.outcome(step) == left[step]
