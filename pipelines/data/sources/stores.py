"""Where files lie, whether in a folder or in a bucket: named by their path relative to the store's root."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipelines.errors import Refusal

# What operating systems leave in folders of pictures; no user put it there, and no user wants to hear of it.
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as a listing shows it; the fields mean what they mean in `SourceItem`."""

    path: str
    n_bytes: int = -1
    fingerprint: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Listing:
    """What lies under a store's root, hidden files left out."""

    files: list[StoredFile] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


class FileStore(Protocol):
    """A folder or a prefix of a bucket."""

    @property
    def identity(self) -> str:
        """As `Source.identity`."""

    @property
    def concurrent_reads(self) -> int:
        """As `Source.concurrent_reads`."""

    def relative(self, path: str) -> str:
        """The path relative to the root, where it is a full one below it; else the path as it is."""

    def list_tree(self) -> Listing:
        """Every file below the root."""

    def find(self, paths: Sequence[str]) -> list[StoredFile]:
        """The named files, in the order asked for; one that is not there has a fault."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """As `Source.read`."""

    def local_copy(self, path: str, folder: Path) -> Path:
        """The file on this machine: itself, or a copy below `folder` that is checked against the store."""


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden or left by an operating system."""
    return name.startswith(".") or name.casefold() in _LITTER


class LocalStore:
    """A folder on this machine."""

    concurrent_reads = 0

    def __init__(self, root: Path) -> None:
        self._root = root
        self.identity = str(root.resolve())

    def relative(self, path: str) -> str:
        """The path without the root in front."""
        return path.removeprefix(f"{self._root.absolute()}/")

    def list_tree(self) -> Listing:
        """Walk the folder; links to folders are followed, but none is entered twice on one way down.

        Raises:
            Refusal: a folder cannot be opened.
        """
        listing = Listing()
        self._walk(self._root, "", (os.path.realpath(self._root),), listing)
        return listing

    def find(self, paths: Sequence[str]) -> list[StoredFile]:
        """Stat each path; an absolute one is taken as it is."""
        return [self._describe(path, self._root / path) for path in paths]

    def read(self, path: str, max_bytes: int) -> bytes:
        """The file's bytes."""
        # Python would first make room for all that it is asked to read at most.
        with (self._root / path).open("rb", buffering=0) as file:
            return file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)

    def local_copy(self, path: str, folder: Path) -> Path:  # noqa: ARG002 - a bucket needs the folder
        """The file itself."""
        return self._root / path

    def _walk(self, folder: Path, prefix: str, ancestors: tuple[str, ...], listing: Listing) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise Refusal(
                f"the folder {folder}", f"cannot be listed: {error.strerror}", way_out="give this user leave to read it"
            ) from error
        for entry in entries:
            if is_litter(entry.name):
                continue
            path = prefix + entry.name
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in ancestors:
                    listing.folders.add(path)
                    self._walk(Path(entry.path), path + "/", (*ancestors, real), listing)
            else:
                listing.files.append(self._describe(path, Path(entry.path)))

    def _describe(self, path: str, file: Path) -> StoredFile:
        if (name := path.encode("utf-8", "replace").decode()) != path:
            return StoredFile(name, fault="its name is not UTF-8")
        try:
            status = file.stat()
        except OSError as error:
            return StoredFile(path, fault=f"cannot be opened: {error.strerror}")
        if not stat.S_ISREG(status.st_mode):
            return StoredFile(path, fault="is not a regular file")
        return StoredFile(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
