"""A real Airflow and a real MLflow for the tests that need them, in a folder of their own, on free ports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.services.airflow_client import AirflowClient
from pipelines.services.programs import Ports
from pipelines.services.secrets import ensure_passwords
from pipelines.services.stack import Stack, any_free_port
from pipelines.settings import Settings

PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Services:
    settings: Settings
    stack: Stack
    ports: Ports

    def client(self, user: str = "admin") -> AirflowClient:
        return AirflowClient(self.ports.airflow_uri, user, ensure_passwords(self.settings)[user])


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    settings = Settings(project_dir=PROJECT, home=tmp_path_factory.mktemp("perch-home"))
    stack = Stack(settings)
    os.environ["PERCH_RETRY_DELAY_S"] = "1"  # the services inherit it
    try:
        ports = stack.up(print, Ports(mlflow=any_free_port(), airflow=any_free_port(), serving=any_free_port()))
        yield Services(settings, stack, ports)
    finally:
        stack.down()
        del os.environ["PERCH_RETRY_DELAY_S"]
