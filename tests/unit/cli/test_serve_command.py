"""`perch serve` says who has the port that it wants."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.core.results import write_json
from pipelines.errors import Refusal
from pipelines.services.programs import Ports, tool
from pipelines.services.stack import Stack, render_config
from pipelines.settings import Settings


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens at."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


@pytest.fixture
def stack(registry_settings: Settings, taken: int) -> Iterator[Stack]:
    """A supervisor without programs, as of a `perch up` whose Envoy has the taken port."""
    stack = Stack(registry_settings)
    stack.working_folder.mkdir(parents=True)
    write_json(stack.folder / "ports.json", asdict(Ports(mlflow=1, airflow=2, serving=taken)))
    config = stack.folder / "supervisord.conf"
    config.write_text(render_config(stack, []))
    subprocess.run([tool("supervisord"), "--configuration", str(config)], check=True, cwd=stack.folder)
    yield stack
    stack.down()


def refusal_of(port: int) -> str:
    with pytest.raises(Refusal) as refused:
        CliRunner().invoke(app, ["serve", "--port", str(port)], catch_exceptions=False)
    return str(refused.value)


def test_serve__port_of_this_homes_envoy__says_so_until_it_is_down(stack: Stack, taken: int) -> None:
    said = refusal_of(taken)
    assert "is taken by Perch's own Envoy" in said
    assert f"ask http://127.0.0.1:{taken}" in said
    stack.down()
    assert "is taken by another program" in refusal_of(taken)
