"""A real PostgreSQL server of the tests' own, behind a Unix socket, and databases on it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from tests.missing_parts import miss

_SERVERS: dict[Path, subprocess.Popen[bytes]] = {}  # by the folder of the socket
_REMEDY = "scripts/debian-packages.sh installs PostgreSQL"


@contextmanager
def serve_postgresql() -> Iterator[Path]:
    """The folder of the socket of a server that ends with the block."""
    binaries, account = _find_binaries(), _drop_privileges()
    # Not under tmp_path, which only its owner may enter; and a Unix socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="perch-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o777)
        run = partial(subprocess.run, check=True, cwd=name, stdout=subprocess.DEVNULL, **account)  # type: ignore[call-overload]
        run([binaries / "initdb", "-D", folder / "data", "-U", "perch", "--auth=trust", "-N"])
        _SERVERS[folder] = _start(folder)
        try:
            yield folder
        finally:
            server = _SERVERS.pop(folder)
            server.terminate()
            server.wait(30)


@contextmanager
def killed_postgresql(folder: Path) -> Iterator[None]:
    """The server behind a socket is killed; when the block ends it is started again, and recovers."""
    server = _SERVERS[folder]
    backends = psutil.Process(server.pid).children()
    server.kill()
    server.wait(30)
    psutil.wait_procs(backends, timeout=30)  # they end once they notice, and before that no other server starts
    try:
        yield
    finally:
        _SERVERS[folder] = _start(folder)


def _start(folder: Path) -> subprocess.Popen[bytes]:
    server: subprocess.Popen[bytes] = subprocess.Popen(  # type: ignore[call-overload]
        [
            *(_find_binaries() / "postgres", "-D", folder / "data", "-k", folder),
            *("-c", "listen_addresses=", "-c", "fsync=off"),
        ],
        cwd=folder,
        stderr=subprocess.DEVNULL,
        **_drop_privileges(),
    )
    while True:
        try:
            execute(database_url(folder, "postgres"), "SELECT 1")
            return server
        except OperationalError:
            assert server.poll() is None, "PostgreSQL ended while starting"
            time.sleep(0.1)


def database_url(socket_folder: Path, name: str) -> str:
    """SQLAlchemy's URL of a database behind a socket."""
    return f"postgresql+psycopg://perch@/{name}?host={socket_folder}"


def execute(url: str, statement: str) -> None:
    """Execute statements in a transaction of their own."""
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(text(statement))
    finally:
        engine.dispose()


def make_database(socket_folder: Path, name: str) -> str:
    """An empty database; its URL."""
    engine = create_engine(database_url(socket_folder, "postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return database_url(socket_folder, name)


def _find_binaries() -> Path:
    """The newest installation's programs; distributions keep `initdb` off the PATH."""
    on_path = shutil.which("initdb")
    candidates = (
        [Path(on_path).resolve().parent] if on_path else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    )
    found = [folder for folder in candidates if (folder / "initdb").is_file()]
    if not found:
        miss("PostgreSQL is not installed", _REMEDY)
    return found[0]


def _drop_privileges() -> dict[str, object]:
    """PostgreSQL does not run as root."""
    if os.getuid() != 0:
        return {}
    try:
        account = pwd.getpwnam("postgres")
    except KeyError:
        miss("PostgreSQL does not run as root, and there is no account postgres", _REMEDY)
    return {"user": account.pw_uid, "group": account.pw_gid}
