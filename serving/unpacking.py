"""Unpacks a verified release into a folder of its own, and clears away those that nobody serves any more."""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO, cast

from pipelines.errors import Refusal

_NEEDED = ("bento.yaml", "src/")  # the rest is for who builds an image out of the Bento
_LOCK = ".served"


def unpack_release(file: Path, cache: Path, *, name: str) -> Path:
    """Unpack what a server needs.

    The folder is new each time, so that nothing an earlier process left or changed there is served, and it is locked
    for as long as this process lives, also when it has become another program by `exec`.

    Args:
        file: a release whose digest and signature were verified.
        cache: folder of this machine.
        name: how the folder's name begins.

    Returns:
        The folder of the Bento.

    Raises:
        Refusal: an entry is no plain file or folder, or would lie outside.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    _clear(cache)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
    lock = os.open(folder / _LOCK, os.O_WRONLY | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)
    with tarfile.open(file, "r|xz") as archive:
        for entry in archive:
            _refuse_unsafe(entry)
            if not f"{entry.name}/".startswith(_NEEDED) and entry.name not in _NEEDED:
                continue
            target = folder / entry.name
            if entry.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as stream:
                # Not `extract`, which would take modes, owners and times from the archive.
                shutil.copyfileobj(cast("IO[bytes]", archive.extractfile(entry)), stream, 2**20)
    return folder


def _refuse_unsafe(entry: tarfile.TarInfo) -> None:
    path = PurePosixPath(entry.name)
    if path.is_absolute() or ".." in path.parts or "\\" in entry.name or not (entry.isreg() or entry.isdir()):
        raise Refusal(
            f"the entry {entry.name!r} of the release",
            "is no plain file or folder inside it",
            limit="what `perch package` writes",
            way_out="find out who made and signed this release",
        )


def _clear(cache: Path) -> None:
    """Remove the folders of servers that have ended: their locks are free."""
    for lock_file in cache.glob(f"*/{_LOCK}"):
        try:
            lock = os.open(lock_file, os.O_WRONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_file.parent, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
