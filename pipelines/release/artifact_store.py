"""Where releases lie: a folder, or a prefix of an S3 bucket; files are named by their content and put whole or not."""

from __future__ import annotations

import base64
import os
import shutil
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from pipelines.core.file_hash import hash_file
from pipelines.errors import Refusal
from pipelines.object_storage.client import connect, explained, is_missing
from pipelines.object_storage.settings import S3Settings, read_s3_settings
from pipelines.object_storage.transfers import DIGEST_KEY, download
from pipelines.settings import Settings

_S3 = "s3://"


class ArtifactStore(Protocol):
    """A place for files."""

    def address(self, name: str) -> str:
        """Where a file of this name lies, for a person and for `python -m serving`."""

    def put(self, name: str, file: Path) -> None:
        """Copy a file into the store; nothing is written where the same bytes lie there already."""

    def get(self, name: str, file: Path) -> bool:
        """Copy a file out of the store; False where there is none of this name."""


def open_store(settings: Settings) -> ArtifactStore:
    """The store that `PERCH_RELEASES_URL` names; a folder in the home by default.

    Raises:
        Refusal: the address is neither a folder nor `s3://bucket/prefix`.
    """
    url = settings.releases_url
    if url.startswith(_S3):
        parts = urlsplit(url)
        return _Bucket(parts.netloc, parts.path.strip("/"), read_s3_settings(settings.s3_endpoint_url))
    if "://" in url:
        raise Refusal(
            "PERCH_RELEASES_URL",
            url,
            limit="a folder or s3://bucket/prefix",
            way_out="set it to one of them, or unset it",
        )
    return _Folder(Path(url).expanduser().absolute() if url else settings.releases_dir)


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def address(self, name: str) -> str:
        return str(self._folder / name)

    def put(self, name: str, file: Path) -> None:
        there = self._folder / name
        if there.is_file() and hash_file(there) == hash_file(file):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f".{name}.{os.getpid()}"
        try:
            shutil.copyfile(file, draft)
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            draft.replace(there)
        finally:
            draft.unlink(missing_ok=True)

    def get(self, name: str, file: Path) -> bool:
        try:
            shutil.copyfile(self._folder / name, file)
        except FileNotFoundError:
            return False
        return True


class _Bucket:
    def __init__(self, bucket: str, prefix: str, settings: S3Settings) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._name = f"the artifact store {_S3}{bucket}/{self._prefix}"
        self._settings = settings
        self._client = connect(settings)

    def address(self, name: str) -> str:
        return f"{_S3}{self._bucket}/{self._prefix}{name}"

    def put(self, name: str, file: Path) -> None:
        digest = hash_file(file)
        with explained(self._name):
            if self._stored(name) == (digest, file.stat().st_size):
                return
            # One request: the object is there with these bytes, which the store checks, or it is not there.
            with file.open("rb") as stream:
                self._client.put_object(
                    Bucket=self._bucket,
                    Key=self._prefix + name,
                    Body=stream,
                    ChecksumSHA256=base64.b64encode(bytes.fromhex(digest)).decode(),
                    Metadata={DIGEST_KEY: digest},
                )

    def get(self, name: str, file: Path) -> bool:
        with explained(self._name):
            return download(self._client, self._settings, self._bucket, self._prefix + name, file)

    def _stored(self, name: str) -> tuple[str, int] | None:
        """SHA-256 and size of an object; its own checksum is not told by every store."""
        from botocore.exceptions import ClientError

        try:
            head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
        except ClientError as error:
            if is_missing(error):
                return None
            raise
        return head["Metadata"].get(DIGEST_KEY, ""), head["ContentLength"]
