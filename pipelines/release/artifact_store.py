"""Where releases lie: a folder, or a prefix of an S3 bucket; files are named by their content and put whole or not."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from pipelines.core.release_signing import hash_file
from pipelines.errors import Refusal, TryLater
from pipelines.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_S3 = "s3://"
_DIGEST_KEY = "sha256"  # among an object's metadata


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
        return _Bucket(parts.netloc, parts.path.strip("/"), settings.s3_endpoint_url)
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
    def __init__(self, bucket: str, prefix: str, endpoint_url: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = self._connect(endpoint_url)

    def address(self, name: str) -> str:
        return f"{_S3}{self._bucket}/{self._prefix}{name}"

    def put(self, name: str, file: Path) -> None:
        digest = hash_file(file)
        if self._stored(name) == (digest, file.stat().st_size):
            return
        # One request: the object is there with these bytes, which the store checks, or it is not there.
        with self._explained(), file.open("rb") as stream:
            self._client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + name,
                Body=stream,
                ChecksumSHA256=base64.b64encode(bytes.fromhex(digest)).decode(),
                Metadata={_DIGEST_KEY: digest},
            )

    def get(self, name: str, file: Path) -> bool:
        from botocore.exceptions import ClientError

        with self._explained():
            try:
                self._client.download_file(self._bucket, self._prefix + name, str(file))
            except ClientError as error:
                if error.response["Error"].get("Code") in {"404", "NoSuchKey"}:
                    return False
                raise
        return True

    def _stored(self, name: str) -> tuple[str, int] | None:
        """SHA-256 and size of an object; its own checksum is not told by every store."""
        from botocore.exceptions import ClientError

        with self._explained():
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
            except ClientError as error:
                if error.response["Error"].get("Code") in {"404", "NoSuchKey"}:
                    return None
                raise
        return head["Metadata"].get(_DIGEST_KEY, ""), head["ContentLength"]

    def _connect(self, endpoint_url: str) -> S3Client:
        import boto3
        from botocore.config import Config

        config = Config(
            connect_timeout=10,
            read_timeout=60,
            retries={"mode": "standard", "max_attempts": 4},
            # Buckets as host names need a wildcard in the DNS, which only AWS can be counted on to have.
            s3={"addressing_style": "path" if endpoint_url else "auto"},
        )
        with self._explained():
            return boto3.Session().client("s3", endpoint_url=endpoint_url or None, config=config)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        name = f"the artifact store {_S3}{self._bucket}/{self._prefix}"
        try:
            yield
        except ClientError as error:
            code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500 or code == "SlowDown":
                raise TryLater(f"{name} answers {code}: {message}\n  what to do: try again; nothing is lost") from error
            raise Refusal(
                name,
                f"answers {code}: {message}",
                way_out="check PERCH_RELEASES_URL, PERCH_S3_ENDPOINT_URL, and what the credentials allow",
            ) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise Refusal(
                name, f"needs credentials: {error}", way_out="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise TryLater(f"{name} cannot be reached: {error}\n  what to do: try again; nothing is lost") from error
