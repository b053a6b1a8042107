"""Puts a release and its signature into the artifact store, so that a kill between any two writes can be repeated."""

from __future__ import annotations

from pathlib import Path

from pipelines.core.release_signing import sign_file, verify_file
from pipelines.core.release_unit import SIGNATURE_SUFFIX
from pipelines.errors import Refusal
from pipelines.release.artifact_store import ArtifactStore
from pipelines.release.keys import KeyPair


def publish_release(store: ArtifactStore, file: Path, digest: str, key: KeyPair) -> None:
    """Store a release, then its signature; what is there already and good stays as it is.

    Args:
        store: where to.
        file: named by its digest; the signature is written beside it.
        digest: SHA-256 of the file.
        key: that signs.

    Raises:
        TryLater: the store does not answer.
    """
    store.put(file.name, file)
    signature = file.with_name(f"{file.name}{SIGNATURE_SUFFIX}")
    # Two signatures over the same bytes differ, so that a good one stays; one by a key that was replaced does not.
    if not (store.get(signature.name, signature) and _is_good(file, digest, signature, key)):
        sign_file(file, signature, key.private)
        store.put(signature.name, signature)


def _is_good(file: Path, digest: str, signature: Path, key: KeyPair) -> bool:
    try:
        verify_file(file, digest, signature, {key.key_id: key.public})
    except Refusal:
        return False
    return True
