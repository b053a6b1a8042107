"""Fetches a file from an http(s) address, once, and only with the digest it is expected to have."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.data.sources.fetched_files import FetchedFiles
from pipelines.errors import Refusal, TryLater

_TIMEOUT_S = 60.0
_CHUNK_BYTES = 2**20
_BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


def download(address: str, sha256: str | None, cache_dir: Path, *, name: str) -> Path:
    """Fetch an `.npz`, or find it where an earlier run left it.

    Args:
        address: http:// or https://.
        sha256: what its digest must be.
        cache_dir: `Settings.ingest_cache_dir`.
        name: the address as it may be shown.

    Raises:
        Refusal: there is no digest to check it against, it has another, or the address holds no such file.
        TryLater: the server does not answer.
    """
    suffix = Path(urlsplit(address).path).suffix.casefold()
    if suffix != ".npz":
        raise Refusal("data_ingestion.source", name, limit="an .npz, where the source is an address")
    if sha256 is None:
        raise Refusal(
            "data_ingestion.sha256",
            f"is not given, and {name} might be anything",
            limit="the SHA-256 of the file, 64 hex digits",
            way_out="take it from whoever publishes the file, or from a copy you trust, with sha256sum",
        )
    files = FetchedFiles(cache_dir)
    if kept := files.find(sha256, suffix):
        return kept
    try:
        file, found = files.keep(_read(address), suffix)
    except urllib.error.HTTPError as error:
        if error.code in _BUSY or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise TryLater(f"{name} answers {error.code} {error.reason}") from error
        raise Refusal("data_ingestion.source", f"{name} answers {error.code} {error.reason}") from error
    except (http.client.HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise TryLater(f"{name} cannot be fetched: {getattr(error, 'reason', None) or error}") from error
    if found != sha256:
        file.unlink(missing_ok=True)
        raise Refusal(
            f"the file at {name}",
            f"has the SHA-256 {found}",
            limit=f"{sha256}, data_ingestion.sha256",
            way_out="correct the digest if the file was changed on purpose",
        )
    return file


def _read(address: str) -> Iterator[bytes]:
    """The bytes behind an address, in pieces; fewer than announced are an error."""
    with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:  # noqa: S310 - the caller checked the scheme
        announced = response.headers.get("Content-Length")
        received = 0
        while chunk := response.read(_CHUNK_BYTES):
            received += len(chunk)
            yield chunk
        if announced is not None and received < int(announced):
            raise http.client.IncompleteRead(b"", int(announced) - received)
