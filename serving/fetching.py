"""Brings a release from where it lies (a file, a folder, a bucket) into this machine's cache, unread and unjudged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipelines.core.file_hash import hash_file
from pipelines.core.release_unit import RELEASE_SUFFIX, SIGNATURE_SUFFIX, digest_in_name, release_name
from pipelines.errors import Refusal, TryLater
from pipelines.object_storage.client import connect, explained
from pipelines.object_storage.settings import read_s3_settings
from pipelines.object_storage.transfers import download

_S3 = "s3://"


@dataclass(frozen=True)
class FetchedRelease:
    """A release in the cache; neither digest nor signature is checked yet.

    Attributes:
        file: the release unit.
        signature: beside it; need not exist.
        digest: SHA-256 that the release must have.
    """

    file: Path
    signature: Path
    digest: str


def fetch_release(address: str, cache: Path, *, digest: str = "", s3_endpoint_url: str = "") -> FetchedRelease:
    """Copy a release and its signature into the cache, where nobody changes them between check and use.

    Args:
        address: a file, a folder, `s3://bucket/prefix/<sha256>.bento` or `s3://bucket/prefix`.
        cache: folder of this machine.
        digest: SHA-256 of the release; needed where the address does not end in it.
        s3_endpoint_url: of the store; empty is what the environment says.

    Raises:
        Refusal: there is no such release, or the address leaves open which one.
        TryLater: the store does not answer, and the cache does not have it.
    """
    address, digest = _resolve(address, digest)
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = cache / release_name(digest)
    signature = file.with_name(f"{file.name}{SIGNATURE_SUFFIX}")
    copy = _bucket_copier(s3_endpoint_url) if address.startswith(_S3) else _copy_file
    try:
        if not (file.is_file() and hash_file(file) == digest) and not _fetch(copy, address, file):
            raise Refusal(
                f"the release {address}",
                "does not exist",
                way_out="`perch models` lists what was packaged; check the address",
            )
        if not _fetch(copy, f"{address}{SIGNATURE_SUFFIX}", signature):
            signature.unlink(missing_ok=True)
    except TryLater:
        if not (file.is_file() and signature.is_file()):
            raise
        # A name that is a digest cannot have got another meaning: what was fetched before is as good.
    return FetchedRelease(file, signature, digest)


def _resolve(address: str, digest: str) -> tuple[str, str]:
    """The address of one file, and the digest that it must have."""
    folder = not address.endswith(RELEASE_SUFFIX)
    if digest and digest_in_name(release_name(digest)) is None:
        raise Refusal(
            "--digest",
            digest,
            limit="a SHA-256: 64 hexadecimal digits in small letters",
            way_out="`perch models show VERSION`",
        )
    if folder and not digest and not address.startswith(_S3):
        found = sorted(Path(address).glob(f"*{RELEASE_SUFFIX}"))
        if len(found) != 1:
            raise Refusal(
                f"the folder {address}",
                f"holds {len(found)} releases",
                limit="one, where none is named",
                way_out="name the file, or its SHA-256 with --digest",
            )
        folder, address = False, str(found[0])
    if folder and not digest:
        raise Refusal(
            f"the address {address}",
            "names no release",
            limit="…/<sha256>.bento",
            way_out="name one with --digest SHA256",
        )
    if folder:
        return f"{address.rstrip('/')}/{release_name(digest)}", digest
    named = digest_in_name(address.rpartition("/")[2])
    if not (digest or named):
        raise Refusal(
            f"the release {address}",
            "is not named by its SHA-256",
            limit="<sha256>.bento",
            way_out="say with --digest SHA256 which bytes you expect",
        )
    if digest and named and digest != named:
        raise Refusal(
            f"the release {address}",
            f"is not the expected one, {digest[:12]}…",
            way_out="name the file or its digest, or make them agree",
        )
    return address, digest or str(named)


def _fetch(copy: Callable[[str, Path], bool], address: str, target: Path) -> bool:
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if not copy(address, draft):
            return False
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return True


def _copy_file(address: str, target: Path) -> bool:
    try:
        shutil.copyfile(address, target)
    except FileNotFoundError:
        return False
    return True


def _bucket_copier(endpoint_url: str) -> Callable[[str, Path], bool]:
    settings = read_s3_settings(endpoint_url)
    client = connect(settings)

    def copy(address: str, target: Path) -> bool:
        parts = urlsplit(address)
        with explained(f"the artifact store {_S3}{parts.netloc}"):
            return download(client, settings, parts.netloc, parts.path.lstrip("/"), target)

    return copy
