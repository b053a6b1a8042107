"""Objects brought here whole; boto3 takes an answer that ends early for the object's end, and waits for a slow one.

A request is tried again by botocore until its answer begins; what happens after that is looked at here.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.object_storage.client import is_missing
from pipelines.object_storage.settings import S3Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

DIGEST_KEY = "sha256"  # among an object's metadata, where Perch put it

_CHUNK_BYTES = 2**20
_SLOWEST_BYTES_PER_S = 64 * 2**10  # a store that is slower than this on the whole does not work
_LONGEST_PAUSE_S = 8.0


@dataclass(frozen=True)
class Incoming:
    """An object on its way.

    Attributes:
        chunks: its bytes as they arrive; the iterator fails where they end early.
        sha256: that its owner noted when putting it; empty where none did.
    """

    chunks: Iterator[bytes]
    sha256: str


def receive(
    client: S3Client,
    settings: S3Settings,
    consume: Callable[[Incoming], T],
    *,
    max_bytes: int | None = None,
    **request: Any,
) -> T:
    """Get an object, again from its beginning where its answer breaks off.

    Args:
        client: of the store.
        settings: how often and how long to try.
        consume: takes the bytes; is called anew for each attempt.
        max_bytes: bring no more than these, from its beginning.
        request: arguments of GetObject.

    Raises:
        ClientError: the store refuses.
        BotoCoreError: it does not answer, or broke off each time.
    """

    def attempt() -> T:
        answer = client.get_object(**request)
        chunks = _chunks(answer["Body"], answer.get("ContentLength"), max_bytes, settings)
        with contextlib.closing(answer["Body"]):
            return consume(Incoming(chunks, answer.get("Metadata", {}).get(DIGEST_KEY, "")))

    return _again(attempt, settings)


def read_object(
    client: S3Client, settings: S3Settings, bucket: str, key: str, *, max_bytes: int | None = None
) -> bytes:
    """An object's bytes, or the first of them; raises what `receive` raises."""
    return receive(
        client, settings, lambda incoming: b"".join(incoming.chunks), max_bytes=max_bytes, Bucket=bucket, Key=key
    )


def download(client: S3Client, settings: S3Settings, bucket: str, key: str, file: Path) -> bool:
    """Copy an object into a file; False where there is none.

    An object that Perch put carries its SHA-256.  A copy with another one is fetched again; one that never has it is
    handed over: then the object itself was changed, and whoever verifies the file says so.

    Raises:
        ClientError: the store refuses.
        BotoCoreError: it does not answer, or broke off each time.
    """
    from botocore.exceptions import ClientError

    def copy(incoming: Incoming) -> bool:
        digest = hashlib.sha256()
        with file.open("wb") as stream:
            for chunk in incoming.chunks:
                digest.update(chunk)
                stream.write(chunk)
        return incoming.sha256 in ("", digest.hexdigest())

    try:
        for attempt in range(1, settings.attempts + 1):
            if receive(client, settings, copy, Bucket=bucket, Key=key):
                break
            _pause(attempt)
    except ClientError as error:
        if is_missing(error):
            return False
        raise
    return True


def list_objects(client: S3Client, settings: S3Settings, bucket: str, prefix: str, **more: Any) -> Iterator[Any]:
    """The pages of a listing, each whole.

    Args:
        client: of the store.
        settings: how often to try.
        bucket: to be listed.
        prefix: of the keys.
        more: further arguments of ListObjectsV2.

    Raises:
        ClientError: the store refuses.
        BotoCoreError: it does not answer.
        ResponseParserError: its answer ended early each time.
    """
    following: dict[str, Any] = {}
    while True:
        page = _again(
            lambda: client.list_objects_v2(Bucket=bucket, Prefix=prefix, **following, **more),  # noqa: B023 - at once
            settings,
        )
        yield page
        if not page.get("IsTruncated"):
            return
        following = {"ContinuationToken": page["NextContinuationToken"]}


def _chunks(body: Any, announced: int | None, max_bytes: int | None, settings: S3Settings) -> Iterator[bytes]:
    """The bytes of an answer, to the last that was announced or wanted."""
    from botocore.exceptions import BotoCoreError, FlexibleChecksumError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    limits = [limit for limit in (announced, max_bytes) if limit is not None]
    wanted = min(limits) if limits else None
    received = 0
    try:
        with _no_slower(body, settings.timeout_s + (wanted or 0) / _SLOWEST_BYTES_PER_S):
            while wanted is None or received < wanted:
                chunk = body.read(_CHUNK_BYTES if wanted is None else min(_CHUNK_BYTES, wanted - received))
                if not chunk:
                    break
                received += len(chunk)
                yield chunk
            if wanted == announced:
                body.read(1)  # at the end the checksum is compared
    except FlexibleChecksumError:
        raise
    except (OSError, HTTPError, BotoCoreError) as error:
        raise IncompleteReadError(actual_bytes=received, expected_bytes=wanted or 0) from error
    if announced is not None and received < (wanted or 0):
        raise IncompleteReadError(actual_bytes=received, expected_bytes=wanted or 0)


@contextlib.contextmanager
def _no_slower(body: Any, limit_s: float) -> Iterator[None]:
    """End an answer that takes longer in all: the timeout counts from byte to byte, and one byte may always come."""

    def end() -> None:
        with contextlib.suppress(Exception):
            body._raw_stream.shutdown()  # botocore hides urllib3's answer, which another thread may shut down

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _again(operation: Callable[[], T], settings: S3Settings) -> T:
    """Repeat what failed after its answer had begun; what failed before was repeated by botocore."""
    from botocore.exceptions import FlexibleChecksumError, IncompleteReadError
    from botocore.parsers import ResponseParserError

    for attempt in range(1, settings.attempts):
        try:
            return operation()
        except (IncompleteReadError, FlexibleChecksumError, ResponseParserError):
            _pause(attempt)
    return operation()


def _pause(attempt: int) -> None:
    time.sleep(min(_LONGEST_PAUSE_S, 0.2 * 2**attempt) * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
