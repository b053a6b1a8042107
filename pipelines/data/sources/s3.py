"""A prefix of an S3 bucket, at AWS or at any endpoint that speaks its protocol."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from pipelines.data.sources.fetched_files import FetchedFiles
from pipelines.data.sources.stores import Listing, StoredFile, is_litter
from pipelines.errors import Refusal, TryLater

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONCURRENT_READS = 16  # an answer takes milliseconds of waiting, not of computing
_CHUNK_BYTES = 2**20
_NOT_FOUND = {"NoSuchKey", "404", "NotFound"}


class S3Store:
    """The objects below a prefix; credentials are those boto3 finds (environment, profile, instance role).

    Args:
        bucket: the bucket's name.
        prefix: without a slash at its end; empty is the whole bucket.
        endpoint_url: of the store; empty is AWS.
    """

    concurrent_reads = _CONCURRENT_READS

    def __init__(self, bucket: str, prefix: str, endpoint_url: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._name = f"s3://{bucket}/{self._prefix}"
        self.identity = f"{endpoint_url or 'aws'} {self._name}"
        config = Config(
            connect_timeout=10,
            read_timeout=60,
            retries={"mode": "standard", "max_attempts": 4},
            max_pool_connections=_CONCURRENT_READS,
            # Buckets as host names need a wildcard in the DNS, which only AWS can be counted on to have.
            s3={"addressing_style": "path" if endpoint_url else "auto"},
        )
        with self._explained():
            self._client: S3Client = boto3.Session().client("s3", endpoint_url=endpoint_url or None, config=config)

    def relative(self, path: str) -> str:
        """The path without the prefix's address in front."""
        return path.removeprefix(self._name)

    def list_tree(self) -> Listing:
        """Every object below the prefix; an object that ends in a slash stands for a folder.

        Raises:
            Refusal: the bucket is not there, or may not be listed.
            TryLater: the store does not answer.
        """
        listing = Listing()
        with self._explained():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            for page in pages:
                for entry in page.get("Contents", []):
                    path = entry["Key"].removeprefix(self._prefix)
                    *folders, name = path.split("/")
                    if any(is_litter(part) for part in (*folders, name) if part):
                        continue
                    listing.folders.update("/".join(folders[:depth]) for depth in range(1, len(folders) + 1))
                    if name:
                        etag = entry["ETag"].strip('"')
                        listing.files.append(StoredFile(path, entry["Size"], f"{entry['Size']}-{etag}"))
        return listing

    def find(self, paths: Sequence[str]) -> list[StoredFile]:
        """Look the paths up in one listing; what lies outside the prefix is not found."""
        files = {file.path: file for file in self.list_tree().files}
        return [
            files.get(path) or StoredFile(path, fault=f"there is no such object below {self._name}") for path in paths
        ]

    def read(self, path: str, max_bytes: int) -> bytes:
        """An object's bytes.

        Raises:
            OSError: it is not there any more, or may not be read.
            TryLater: the store does not answer.
        """
        with self._explained(one_object=True):
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + path)["Body"].read(max_bytes + 1)

    def local_copy(self, path: str, folder: Path) -> Path:
        """Fetch an object, unless this version of it (by its ETag) was fetched before.

        Raises:
            Refusal: it is not there.
            TryLater: the store does not answer.
        """
        files, suffix = FetchedFiles(folder), Path(path).suffix.casefold()
        with self._explained():
            etag = self._client.head_object(Bucket=self._bucket, Key=self._prefix + path)["ETag"]
            version = f"{self.identity} {path} {etag}"
            if kept := files.find_version(version, suffix):
                return kept
            body = self._client.get_object(Bucket=self._bucket, Key=self._prefix + path, IfMatch=etag)["Body"]
            return files.keep(body.iter_chunks(_CHUNK_BYTES), suffix, version)[0]

    @contextlib.contextmanager
    def _explained(self, *, one_object: bool = False) -> Iterator[None]:
        """Turn boto3's errors into "refused", "later", or, where only one object is at fault, `OSError`."""
        try:
            yield
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR or code in ("SlowDown", "RequestTimeout"):
                raise TryLater(f"{self._name} answers {code}: {message}") from error
            if one_object and (code in _NOT_FOUND or status == HTTPStatus.FORBIDDEN):
                raise OSError(f"{code}: {message}") from error
            raise Refusal(
                f"the source {self._name}",
                f"answers {code}: {message}",
                way_out="check the address, PERCH_S3_ENDPOINT_URL, and what the credentials allow",
            ) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise Refusal(
                f"the source {self._name}",
                f"needs credentials: {error}",
                way_out="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            ) from error
        except BotoCoreError as error:
            raise TryLater(f"{self._name} cannot be reached: {error}") from error
