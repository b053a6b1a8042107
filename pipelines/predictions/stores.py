"""The tree of kept predictions in a folder or an S3 bucket: listed by folder, and brought to where DuckDB reads it.

DuckDB's own reader for S3 is an extension that it downloads; boto3 is here already and takes the credentials that
everything else takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from pipelines.errors import Refusal
from pipelines.object_storage.client import connect, explained
from pipelines.object_storage.settings import read_s3_settings
from pipelines.object_storage.transfers import list_objects, read_object
from pipelines.settings import Settings

_CONCURRENT_READS = 16


class Store(Protocol):
    """A tree of files; paths are relative to its root, `/` between folders."""

    name: str

    def list_folder(self, path: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in a folder, in no order; nothing where there is none."""
        ...

    def fetch(self, paths: Sequence[str], into: Path) -> list[Path]:
        """Where the files can be read.

        Args:
            paths: the files.
            into: a folder for copies, where they are needed.
        """
        ...


def open_store(settings: Settings) -> Store:
    """The store that the settings name.

    Raises:
        Refusal: the URL is of another kind than a folder or S3.
        TryLater: S3 cannot be prepared.
    """
    url = settings.predictions_url
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return S3Store(parts.netloc, parts.path.strip("/"), settings.s3_endpoint_url)
    if parts.scheme not in {"", "file"}:
        raise Refusal(
            "PERCH_PREDICTIONS_URL", url, limit="a folder or s3://bucket/prefix", way_out="correct it, or unset it"
        )
    return FolderStore(Path(url.removeprefix("file://")).absolute() if url else settings.require_home() / "predictions")


class FolderStore:
    """A folder of a file system, read in place.

    Args:
        root: of the tree; may be missing.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.name = str(root)

    def list_folder(self, path: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in a folder."""
        folders: list[str] = []
        files: list[str] = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._root / path) as entries:
            for entry in entries:
                (folders if entry.is_dir() else files).append(entry.name)
        return folders, files

    def fetch(self, paths: Sequence[str], into: Path) -> list[Path]:  # noqa: ARG002 - a bucket's files are copied there
        """The files themselves."""
        return [self._root / path for path in paths]


class S3Store:
    """A prefix of an S3 bucket; its files are copied when they are read.

    Args:
        bucket: the bucket's name.
        prefix: without slashes at its ends; may be empty.
        endpoint_url: of the store; empty is what the environment says.

    Raises:
        Refusal: a setting, or boto3's configuration, is wrong.
    """

    def __init__(self, bucket: str, prefix: str, endpoint_url: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.name = f"s3://{bucket}/{self._prefix}"
        self._settings = read_s3_settings(endpoint_url)
        self._client = connect(self._settings, concurrent=_CONCURRENT_READS)

    def list_folder(self, path: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in a folder."""
        prefix = f"{self._prefix}{path}/"
        folders: list[str] = []
        files: list[str] = []
        with explained(self.name):
            for page in list_objects(self._client, self._settings, self._bucket, prefix, Delimiter="/"):
                folders += [
                    entry["Prefix"].removeprefix(prefix).rstrip("/") for entry in page.get("CommonPrefixes", [])
                ]
                files += [entry["Key"].removeprefix(prefix) for entry in page.get("Contents", [])]
        return folders, files

    def fetch(self, paths: Sequence[str], into: Path) -> list[Path]:
        """Copies of the files, many at once."""
        with explained(self.name), ThreadPoolExecutor(_CONCURRENT_READS) as pool:
            return list(pool.map(partial(self._copy, into=into), paths))

    def _copy(self, path: str, into: Path) -> Path:
        target = into / path.replace("/", "~")
        if not target.exists():
            target.write_bytes(read_object(self._client, self._settings, self._bucket, self._prefix + path))
        return target
