import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from pipelines.core.free_ports import any_free_port

# A worker that ends only when it is let go, under a real arbiter with a real listening socket.
WORKER = """
import os, pathlib, signal, sys, time
def drain(*_):
    marker = pathlib.Path(sys.argv[1])
    marker.write_text("draining")
    while marker.exists():
        time.sleep(0.02)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print(os.getpid(), flush=True)
while True:
    time.sleep(10)
"""
ARBITER = """
import sys
from circus.arbiter import Arbiter
from circus.sockets import CircusSocket
from circus.watcher import Watcher
from serving.arbiter import amend_arbiter, change
port, worker, marker, changed, controller, pubsub = sys.argv[1:]
amend_arbiter()  # not the module that serves: must do nothing
if changed == "True":
    change(Arbiter)
watcher = Watcher("w", sys.executable, args=[worker, marker], use_sockets=True, copy_env=True, graceful_timeout=30)
listener = CircusSocket(name="api", host="127.0.0.1", port=int(port))
Arbiter([watcher], controller, pubsub, check_delay=60, sockets=[listener]).start()
"""


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def arbiter_over(folder: Path, *, changed: bool) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """An arbiter with one worker, and the port of its socket; checks once a minute unless changed."""
    (folder / "worker.py").write_text(WORKER)
    port = any_free_port()
    places = [f"tcp://127.0.0.1:{any_free_port()}" for _ in range(2)]
    arguments = [str(port), str(folder / "worker.py"), str(folder / "marker"), str(changed), *places]
    command = [sys.executable, "-c", ARBITER, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as arbiter:
        try:
            yield arbiter, port
        finally:
            # The arbiter first, which would start another worker; its workers have sessions of their own.
            workers = [] if arbiter.poll() is not None else psutil.Process(arbiter.pid).children(recursive=True)
            arbiter.kill()
            for worker in workers:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()


def read_pid(arbiter: "subprocess.Popen[bytes]") -> int:
    """The next worker's, which prints it when it is up."""
    assert arbiter.stdout is not None
    return int(arbiter.stdout.readline())


@pytest.mark.parametrize("changed", [True, False])
def test_arbiter__its_workers_drain__refuses_connections_where_it_was_changed(changed: bool, tmp_path: Path) -> None:
    """Without the change the kernel takes connections that nobody serves: what the module is for."""
    with arbiter_over(tmp_path, changed=changed) as (arbiter, port):
        read_pid(arbiter)
        assert connects(port)
        arbiter.terminate()
        deadline = time.monotonic() + 20
        while not (marker := tmp_path / "marker").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert connects(port) is not changed
        assert arbiter.poll() is None
        marker.unlink()
        assert arbiter.wait(30) == 0
        assert not connects(port)


def test_arbiter__a_worker_is_killed__another_comes_soon(tmp_path: Path) -> None:
    with arbiter_over(tmp_path, changed=True) as (arbiter, _):
        os.kill(read_pid(arbiter), signal.SIGKILL)
        killed = time.monotonic()
        read_pid(arbiter)
        assert time.monotonic() - killed < 30  # a minute without the change
