"""Where Parquet files are shipped to: a folder or an S3 bucket; a file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from pipelines.core.prediction_ids import new_prediction_id
from pipelines.object_storage.client import connect, explained
from pipelines.object_storage.settings import read_s3_settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class PredictionStore(Protocol):
    """Takes files."""

    def prepare(self) -> None:
        """Do beforehand what need not wait for the first file; asks nothing of the store."""
        ...

    def put(self, path: str, content: bytes) -> None:
        """Store a file, or replace its equal.

        Args:
            path: relative to the store's root, `/` between folders.
            content: the file's bytes.

        Raises:
            Exception: it could not be stored now; the kinds of storage fail in their own ways.
        """
        ...


def open_store(url: str, s3_endpoint_url: str = "") -> PredictionStore:
    """The store behind a folder or `s3://bucket/prefix`; nothing is asked of it yet."""
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return S3PredictionStore(parts.netloc, parts.path.strip("/"), s3_endpoint_url)
    return FolderPredictionStore(Path(url.removeprefix("file://")))


class FolderPredictionStore:
    """A folder of a file system.

    Args:
        root: made when the first file comes.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def prepare(self) -> None:
        """Nothing to do."""

    def put(self, path: str, content: bytes) -> None:
        """Write beside the target, then rename: readers see no half a file.

        Raises:
            OSError: it cannot be written.
        """
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{new_prediction_id()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # the journal is removed after this
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


class S3PredictionStore:
    """A prefix of an S3 bucket; boto3 finds the credentials.

    Args:
        bucket: the bucket's name.
        prefix: without slashes at its ends; may be empty.
        endpoint_url: of the store; empty is what the environment says.
    """

    def __init__(self, bucket: str, prefix: str, endpoint_url: str = "") -> None:
        self._bucket = bucket
        self._endpoint_url = endpoint_url
        self._prefix = f"{prefix}/" if prefix else ""
        self._client: S3Client | None = None

    def prepare(self) -> None:
        """Import boto3 and read its configuration.

        Raises:
            Refusal: the configuration is wrong.
        """
        if self._client is None:
            self._client = connect(read_s3_settings(self._endpoint_url), attempts=1)  # the shipper tries again itself

    def put(self, path: str, content: bytes) -> None:
        """Store by one request, which S3 completes or refuses as a whole.

        Raises:
            PerchError: no answer, no bucket, no credentials.
        """
        self.prepare()
        assert self._client is not None  # noqa: S101 - prepared
        with explained(f"the store of predictions s3://{self._bucket}/{self._prefix}"):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + path, Body=content)
