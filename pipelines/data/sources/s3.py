"""A prefix of an S3 bucket, at AWS or at any endpoint that speaks its protocol."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

from botocore.exceptions import ClientError

from pipelines.data.sources.fetched_files import FetchedFiles
from pipelines.data.sources.stores import Listing, StoredFile, is_litter
from pipelines.object_storage.client import connect, explained, is_missing
from pipelines.object_storage.settings import read_s3_settings
from pipelines.object_storage.transfers import list_objects, read_object, receive

_CONCURRENT_READS = 16  # an answer takes milliseconds of waiting, not of computing


class S3Store:
    """The objects below a prefix; credentials are those boto3 finds (environment, profile, instance role).

    Args:
        bucket: the bucket's name.
        prefix: without a slash at its end; empty is the whole bucket.
        endpoint_url: of the store; empty is what the environment says.
    """

    concurrent_reads = _CONCURRENT_READS

    def __init__(self, bucket: str, prefix: str, endpoint_url: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._name = f"s3://{bucket}/{self._prefix}"
        self.identity = f"{endpoint_url or 'aws'} {self._name}"
        self._settings = read_s3_settings(endpoint_url)
        self._client = connect(self._settings, concurrent=_CONCURRENT_READS)

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
        with explained(f"the source {self._name}"):
            for page in list_objects(self._client, self._settings, self._bucket, self._prefix):
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
        with explained(f"the source {self._name}"):
            try:
                return read_object(
                    self._client, self._settings, self._bucket, self._prefix + path, max_bytes=max_bytes + 1
                )
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if is_missing(error) or status == HTTPStatus.FORBIDDEN:  # this one alone is at fault
                    code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
                    raise OSError(f"{code}: {message}") from error
                raise

    def local_copy(self, path: str, folder: Path) -> Path:
        """Fetch an object, unless this version of it (by its ETag) was fetched before.

        Raises:
            Refusal: it is not there.
            TryLater: the store does not answer.
        """
        files, suffix = FetchedFiles(folder), Path(path).suffix.casefold()
        with explained(f"the source {self._name}"):
            etag = self._client.head_object(Bucket=self._bucket, Key=self._prefix + path)["ETag"]
            version = f"{self.identity} {path} {etag}"
            if kept := files.find_version(version, suffix):
                return kept
            return receive(
                self._client,
                self._settings,
                lambda incoming: files.keep(incoming.chunks, suffix, version)[0],
                Bucket=self._bucket,
                Key=self._prefix + path,
                IfMatch=etag,
            )
