"""Unpacks tar archives below a folder, also where Python has no filters for them yet (Debian 12's 3.11.2)."""

from __future__ import annotations

import tarfile
from pathlib import Path


def extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Extract an archive; what would lie outside of the folder, or is neither file nor folder, is not written.

    Args:
        tar: open for reading.
        folder: is made where it is not there.

    Raises:
        tarfile.TarError: a member is not what may be written.
    """
    if hasattr(tarfile, "data_filter"):  # 3.11.4 and later
        tar.extractall(folder, filter="data")
        return
    root = folder.resolve()
    for member in tar:
        target = (root / member.name).resolve()
        if not (member.isreg() or member.isdir()) or not target.is_relative_to(root):
            raise tarfile.TarError(f"{member.name} is no file or folder below {folder}")
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        tar.extract(member, root)
