import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A worker that takes its time to end, under a real arbiter with a real listening socket.
WORKER = """
import pathlib, signal, sys, time
def drain(*_):
    pathlib.Path(sys.argv[1]).write_text("draining")
    time.sleep(1.5)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print("up", flush=True)
while True:
    time.sleep(10)
"""
ARBITER = """
import sys
from circus.arbiter import Arbiter
from circus.sockets import CircusSocket
from circus.watcher import Watcher
from serving.draining import change, refuse_connections_while_draining
port, worker, marker, changed, controller, pubsub = sys.argv[1:]
refuse_connections_while_draining()  # not the module that serves: must do nothing
if changed == "True":
    change(Arbiter)
watcher = Watcher("w", sys.executable, args=[worker, marker], use_sockets=True, copy_env=True, graceful_timeout=30)
listener = CircusSocket(name="api", host="127.0.0.1", port=int(port))
Arbiter([watcher], controller, pubsub, sockets=[listener]).start()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize("changed", [True, False])
def test_arbiter__its_workers_drain__refuses_connections_where_it_was_changed(changed: bool, tmp_path: Path) -> None:
    """Without the change the kernel takes connections that nobody serves: what the module is for."""
    (tmp_path / "worker.py").write_text(WORKER)
    port, marker = free_port(), tmp_path / "marker"
    places = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    arguments = [str(port), str(tmp_path / "worker.py"), str(marker), str(changed), *places]
    with subprocess.Popen(
        [sys.executable, "-c", ARBITER, *arguments], stdout=subprocess.PIPE, start_new_session=True
    ) as arbiter:
        try:
            assert arbiter.stdout is not None
            assert arbiter.stdout.readline() == b"up\n"
            assert connects(port)
            arbiter.terminate()
            deadline = time.monotonic() + 20
            while not marker.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert connects(port) is not changed
            assert arbiter.poll() is None
            assert arbiter.wait(20) == 0
        finally:
            arbiter.kill()
    assert not connects(port)
