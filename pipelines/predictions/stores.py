"""The tree of kept predictions in a folder or an S3 bucket: listed by folder, and brought to where DuckDB reads it.

DuckDB's own reader for S3 is an extension that it downloads; boto3 is here already and takes the credentials that
everything else takes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from pipelines.errors import Refusal, TryLater
from pipelines.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONCURRENT_READS = 16
_OF_THE_REQUEST = range(400, 500)


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
    return FolderStore(Path(url.removeprefix("file://")).absolute() if url else settings.home / "predictions")


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
        endpoint_url: of the store; empty is AWS, or what AWS_ENDPOINT_URL_S3 says.

    Raises:
        Refusal: boto3's configuration is wrong.
    """

    def __init__(self, bucket: str, prefix: str, endpoint_url: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.name = f"s3://{bucket}/{self._prefix}"
        with self._explained():
            import boto3
            from botocore.config import Config

            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or endpoint_url or None
            config = Config(
                connect_timeout=5,
                read_timeout=30,
                retries={"mode": "standard", "max_attempts": 3},
                max_pool_connections=_CONCURRENT_READS,
                # Buckets as host names need a wildcard in the DNS, which only AWS can be counted on to have.
                s3={"addressing_style": "path" if endpoint else "auto"},
            )
            self._client: S3Client = boto3.Session().client("s3", endpoint_url=endpoint, config=config)

    def list_folder(self, path: str) -> tuple[list[str], list[str]]:
        """Names of the folders and of the files in a folder."""
        prefix = f"{self._prefix}{path}/"
        folders: list[str] = []
        files: list[str] = []
        with self._explained():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
                folders += [
                    entry["Prefix"].removeprefix(prefix).rstrip("/") for entry in page.get("CommonPrefixes", [])
                ]
                files += [entry["Key"].removeprefix(prefix) for entry in page.get("Contents", [])]
        return folders, files

    def fetch(self, paths: Sequence[str], into: Path) -> list[Path]:
        """Copies of the files, many at once."""
        with self._explained(), ThreadPoolExecutor(_CONCURRENT_READS) as pool:
            return list(pool.map(partial(self._copy, into=into), paths))

    def _copy(self, path: str, into: Path) -> Path:
        target = into / path.replace("/", "~")
        if not target.exists():
            target.write_bytes(self._client.get_object(Bucket=self._bucket, Key=self._prefix + path)["Body"].read())
        return target

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise Refusal(
                self.name, str(error), way_out="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
            ) from error
        except ClientError as error:
            code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status in _OF_THE_REQUEST and status != 429:
                raise Refusal(
                    self.name, f"{code}: {message}", way_out="check PERCH_PREDICTIONS_URL and the credentials' rights"
                ) from error
            raise TryLater(f"{self.name} answers {code}: {message}") from error
        except BotoCoreError as error:
            raise TryLater(f"{self.name} cannot be reached: {error}") from error
