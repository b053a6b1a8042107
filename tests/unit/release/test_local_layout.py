import json
from pathlib import Path

import pytest

from pipelines.release.envoy import bootstrap
from pipelines.release.local_layout import HOST, LocalLayout, LocalPorts, SlotPorts
from pipelines.release.local_plan import PROCESSES
from pipelines.release.supervision import SOCKET, supervisor_socket

SLOTS = {process: SlotPorts(10 + n, 20 + n) for n, process in enumerate(PROCESSES)}


@pytest.mark.parametrize("host", [HOST, "0.0.0.0"])
def test_ports__for_clients_elsewhere__open_that_door_alone(tmp_path: Path, host: str) -> None:
    layout = LocalLayout(tmp_path)
    layout.write_ports(LocalPorts(1, 2, SLOTS, host))
    ports = layout.ports()
    assert ports == LocalPorts(1, 2, SLOTS, host)
    document = bootstrap(layout, ports)
    (listener,) = document["static_resources"]["listeners"]
    assert listener["address"]["socket_address"] == {"address": host, "port_value": 1}
    assert document["admin"]["address"]["socket_address"] == {"address": HOST, "port_value": 2}
    assert json.dumps(document).count("0.0.0.0") == (host != HOST)


def test_ports__written_by_an_older_perch__are_the_loopback_interfaces(tmp_path: Path) -> None:
    layout = LocalLayout(tmp_path)
    layout.write_ports(LocalPorts(1, 2, SLOTS))
    file = layout.folder / "ports.json"
    tree = json.loads(file.read_text())
    del tree["clients_host"]
    file.write_text(json.dumps(tree))
    assert layout.ports().clients_host == HOST


def test_supervisor_socket__named_by_the_environment__is_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOCKET, raising=False)
    usual = supervisor_socket(tmp_path)
    assert usual != supervisor_socket(tmp_path / "another")
    monkeypatch.setenv(SOCKET, "/var/lib/perch/services/supervisor.sock")
    assert supervisor_socket(tmp_path) == Path("/var/lib/perch/services/supervisor.sock")
