"""What the chart's MLflow pods do to their database before they serve, on a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests.helm import rendering
from tests.helm.rendering import RELEASE
from tests.integration.postgresql_server import execute, make_database, serve_postgresql

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it lies in the pod."""
    found = rendering.documents("default")
    template = rendering.find(found, "Deployment", f"{RELEASE}-mlflow")["spec"]["template"]
    (container,) = template["spec"]["initContainers"]
    interpreter, path = container["command"]
    assert interpreter == "python"
    (file := tmp_path_factory.mktemp("scripts") / Path(path).name).write_text(
        rendering.find(found, "ConfigMap", f"{RELEASE}-mlflow")["data"][Path(path).name]
    )
    return file


@pytest.fixture(scope="module")
def socket() -> Iterator[Path]:
    with serve_postgresql() as folder:
        yield folder


def start(script: Path, url: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": url}
    return subprocess.Popen(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip()


def test_upgrade__two_pods_on_an_empty_database__one_makes_the_tables_and_the_other_waits(
    socket: Path, script: Path
) -> None:
    url = make_database(socket, "two")
    said = [ended(process) for process in [start(script, url), start(script, url)]]
    (made,) = (line for line in said if line.startswith("schema none -> "))
    revision = made.rpartition(" ")[2]
    assert sorted(said) == sorted([made, f"schema {revision}, as it was"])
    engine = create_engine(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [revision]
        assert connection.execute(text("SELECT count(*) FROM experiments")).scalar() == 0
    engine.dispose()


def test_upgrade__database_of_a_newer_mlflow__is_left_and_what_to_do_is_said(socket: Path, script: Path) -> None:
    url = make_database(socket, "newer")
    ended(start(script, url))
    execute(url, "UPDATE alembic_version SET version_num = 'of_tomorrow'")
    refused = start(script, url)
    _, error = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "Can't locate revision identified by 'of_tomorrow'" in error
    assert "backup from before it" in error.splitlines()[-1]
