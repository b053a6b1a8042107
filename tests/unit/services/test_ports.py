"""Ports asked for must be free; others are found."""

from __future__ import annotations

import socket

import pytest

from pipelines.errors import Refusal
from pipelines.services.stack import choose_ports


@pytest.fixture
def busy_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_choose_ports__asked_for_and_busy__is_refused_with_a_way_out(
    busy_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERCH_MLFLOW_PORT", str(busy_port))
    with pytest.raises(Refusal, match=rf"port {busy_port} for mlflow: is taken(.|\n)*set PERCH_MLFLOW_PORT to another"):
        choose_ports()


@pytest.mark.parametrize("value", ["eighty", "0", "70000", "-1", "²"])
def test_choose_ports__no_port__is_refused_as_one(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_AIRFLOW_PORT", value)
    with pytest.raises(Refusal, match=r"PERCH_AIRFLOW_PORT: .* is no port .limit: a number from 1 to 65535"):
        choose_ports()


def test_choose_ports__usual_port_busy__takes_another(busy_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.services import stack
    from pipelines.services.programs import Ports

    monkeypatch.setattr(stack, "PREFERRED_PORTS", Ports(mlflow=busy_port, airflow=busy_port))
    chosen = choose_ports()
    assert busy_port not in {chosen.mlflow, chosen.airflow}
