"""Files that were fetched from elsewhere, kept in the ingest cache under their own SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pipelines.core.file_hash import hash_file
from pipelines.data.ingest_cache import temporary_file


class FetchedFiles:
    """Files by content; one whose bytes no longer match its name is dropped.

    Args:
        cache_dir: `Settings.ingest_cache_dir`.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._root = cache_dir
        self._files = cache_dir / "files"
        self._versions = cache_dir / "files" / "versions"

    def find(self, sha256: str, suffix: str) -> Path | None:
        """The file of that content, if it is here."""
        file = self._files / (sha256 + suffix)
        if not file.is_file():
            return None
        if hash_file(file) != sha256:
            file.unlink(missing_ok=True)
            return None
        return file

    def find_version(self, version: str, suffix: str) -> Path | None:
        """The file that was kept under this version of an address, e.g. its ETag."""
        pointer = self._versions / hashlib.sha256(version.encode()).hexdigest()
        return self.find(pointer.read_text(encoding="ascii"), suffix) if pointer.is_file() else None

    def keep(self, chunks: Iterable[bytes], suffix: str, version: str = "") -> tuple[Path, str]:
        """Write a file as its bytes arrive.

        Args:
            chunks: the bytes, in pieces.
            suffix: the ending of its name, e.g. `.npz`.
            version: of the address it came from, for `find_version`.

        Returns:
            Where it lies, and its SHA-256.
        """
        self._versions.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with temporary_file(self._root) as temporary:
            with temporary.open("wb") as stream:
                for chunk in chunks:
                    digest.update(chunk)
                    stream.write(chunk)
            file = self._files / (digest.hexdigest() + suffix)
            temporary.replace(file)
        if version:
            with temporary_file(self._root) as temporary:
                temporary.write_text(digest.hexdigest(), encoding="ascii")
                temporary.replace(self._versions / hashlib.sha256(version.encode()).hexdigest())
        return file, digest.hexdigest()
