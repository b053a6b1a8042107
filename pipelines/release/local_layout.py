"""Where the local target's files lie and its ports are: what `perch up` lays out and everybody else finds again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.core.results import write_json
from pipelines.errors import TryLater

HOST = "127.0.0.1"
ENVOY = "envoy"


@dataclass(frozen=True)
class SlotPorts:
    """Of one service.

    Attributes:
        api: where it takes requests.
        metrics: where /metrics stands.
    """

    api: int
    metrics: int


@dataclass(frozen=True)
class LocalPorts:
    """TCP ports, of the loopback interface unless it is said.

    Attributes:
        clients: Envoy's, which clients know.
        admin: Envoy's own pages.
        slots: process name to its service's ports.
        clients_host: address that Envoy takes clients' requests at; in a container of its own, all of them.
    """

    clients: int
    admin: int
    slots: dict[str, SlotPorts]
    clients_host: str = HOST


class LocalLayout:
    """The files of the local target of one home.

    Args:
        home: folder that holds everything of this machine.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "release"
        self.bootstrap_file = self.folder / "envoy.json"
        self.routes_folder = self.folder / "routes"  # Envoy watches the folder
        self.routes_file = self.routes_folder / "routes.json"
        self.reserve_file = self.folder / "reserve"
        self.lock_file = self.folder / "lock"
        self.deployments_lock_file = self.folder / "deployments.lock"

    def started_file(self, process: str) -> Path:
        """What a slot's process notes when it starts."""
        return self.folder / f"{process}.json"

    def spool_folder(self, process: str) -> Path:
        """Where a process's predictions wait to be stored."""
        return self.home / "serving" / process / "spool"

    def log_file(self, process: str) -> Path:
        """What a process printed."""
        return self.home / "services" / f"{process}.log"

    def write_ports(self, ports: LocalPorts) -> None:
        """Fix the ports until the next `perch up`."""
        write_json(self.folder / "ports.json", asdict(ports))

    def ports(self) -> LocalPorts:
        """The ports in use.

        Raises:
            TryLater: nothing was ever started.
        """
        try:
            tree = json.loads((self.folder / "ports.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise TryLater(f"nothing is laid out in {self.folder}\n  what to do: `perch up`") from error
        slots = {process: SlotPorts(**ports) for process, ports in tree["slots"].items()}
        return LocalPorts(tree["clients"], tree["admin"], slots, tree.get("clients_host", HOST))
