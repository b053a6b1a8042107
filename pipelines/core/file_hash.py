"""The hash by which files are known."""

from __future__ import annotations

import hashlib
from pathlib import Path


def hash_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
