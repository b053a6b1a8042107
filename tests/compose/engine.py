"""The Docker Engine that `scripts/compose-test.sh` started, and one server on it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

PROJECT = "/srv/perch"
T = TypeVar("T")


class Server:
    """`docker compose` in the engine's namespaces, and the pages that it publishes."""

    def __init__(self) -> None:
        self._engine = os.environ["PERCH_COMPOSE_ENGINE"]
        self.checkout = Path(os.environ["PERCH_COMPOSE_CHECKOUT"])
        self.image = os.environ["PERCH_COMPOSE_IMAGE"]

    def run(self, *words: str, limit_s: float = 600) -> str:
        """What a command says where the engine is, in the checkout.

        Raises:
            AssertionError: it failed.
        """
        done = self._done(words, limit_s)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def answers(self, *words: str) -> bool:
        """Whether the command succeeds there."""
        return self._done(words, 60).returncode == 0

    def _done(self, words: tuple[str, ...], limit_s: float) -> subprocess.CompletedProcess[str]:
        namespaces = ["nsenter", "--target", self._engine, "--mount", "--net", "--pid", "--root", f"--wdns={PROJECT}"]
        alone = ["env", "--ignore-environment", "PATH=/usr/sbin:/usr/bin", "HOME=/root"]
        return subprocess.run(
            [*namespaces, *alone, *words], capture_output=True, text=True, timeout=limit_s, check=False
        )

    def compose(self, *words: str, limit_s: float = 600) -> str:
        return self.run("docker", "compose", "--file", "docker/compose.yaml", *words, limit_s=limit_s)

    def services(self) -> dict[str, dict[str, Any]]:
        """What `ps` says of each container, by service."""
        lines = self.compose("ps", "--all", "--format", "json").splitlines()
        return {known["Service"]: known for known in map(json.loads, lines)}

    def unwell(self) -> dict[str, str]:
        """Services that are not as the runbook says, and what they are."""
        found = {}
        for name, known in self.services().items():
            if name == "setup":
                fine = known["State"] == "exited" and known["ExitCode"] == 0
            elif name in {"loopback", "watchdog"}:
                fine = known["State"] == "running"
            else:
                fine = known["Health"] == "healthy"
            if not fine:
                found[name] = known["Status"]
        return found

    def secrets(self) -> dict[str, str]:
        lines = (self.checkout / "docker/.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if not line.startswith("#"))

    def airflow(self, user: str) -> httpx.Client:
        """Logged in by the password of `docker/.env`."""
        client = httpx.Client(base_url="http://127.0.0.1:8080", timeout=60)
        password = self.secrets()[f"AIRFLOW_{user.upper()}_PASSWORD"]
        answer = client.post("/auth/token", json={"username": user, "password": password})
        client.headers["Authorization"] = f"Bearer {answer.raise_for_status().json()['access_token']}"
        return client


def wait_for(what: str, ask: Callable[[], T], limit_s: float, every_s: float = 2.0) -> T:
    """The first true answer; an answer of the network's is none."""
    deadline = time.monotonic() + limit_s
    said: object = None
    while time.monotonic() < deadline:
        try:
            if found := ask():
                return found
        except (httpx.HTTPError, KeyError) as error:
            said = error
        time.sleep(every_s)
    raise AssertionError(f"not within {limit_s:.0f} s: {what} ({said})")
