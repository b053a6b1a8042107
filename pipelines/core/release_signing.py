"""Signatures over release units, in the format of OpenSSF model-signing: an in-toto statement in a DSSE envelope.

A key is known by its id, the first digits of the SHA-256 over its public half in PEM, which the signature names too.
The libraries take 0.4 s to import, so they are imported where they are used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.core.file_hash import hash_file
from pipelines.errors import Refusal

PUBLIC_SUFFIX = ".pub"

_KEY_ID_DIGITS = 16


def key_id(public_key: Path) -> str:
    """A public key's id: 16 hexadecimal digits.

    Raises:
        Refusal: the file is missing or holds no public key on a NIST curve, in PEM.
    """
    return _key_hash(public_key)[:_KEY_ID_DIGITS]


def find_public_keys(places: Sequence[Path]) -> dict[str, Path]:
    """The public keys in files and folders, by their id; a folder gives every `*.pub` in it.

    Several may be trusted at once, so that a key can be replaced while releases signed with the old one still serve.

    Raises:
        Refusal: a file is missing or is no public key, or there is no key at all.
    """
    files: list[Path] = []
    for place in places:
        files += sorted(place.glob(f"*{PUBLIC_SUFFIX}")) if place.is_dir() else [place]
    if not files:
        raise Refusal(
            "the trusted public keys",
            f"there are none in {', '.join(map(str, places))}" if places else "none is named",
            limit="at least one",
            way_out="name the signer's public key (`perch keys` shows where it lies) with --public-key FILE",
        )
    return {key_id(file): file for file in files}


def sign_file(file: Path, signature: Path, private_key: Path) -> None:
    """Write the signature over a file.

    Raises:
        Refusal: the private key cannot be read.
    """
    from model_signing import signing

    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError) as error:
        raise Refusal(
            f"the signing key {private_key}",
            f"cannot be used: {error}",
            limit="an unencrypted private key on a NIST curve, in PEM",
            way_out="`perch keys init` makes one; PERCH_SIGNING_KEY names one made elsewhere",
        ) from error
    config.sign(file, signature)


def verify_file(file: Path, digest: str, signature: Path, public_keys: Mapping[str, Path]) -> str:
    """Hold a release unit against its digest and its signature; nothing in it is read.

    Args:
        file: the release unit, where nobody else can change it any more.
        digest: SHA-256 that it must have.
        signature: the signature's file; it need not exist.
        public_keys: the trusted keys by their id.

    Returns:
        Id of the key that signed it.

    Raises:
        Refusal: the bytes are others, there is no signature, it is unreadable, made with a key that is not trusted, or
            not over this file.  The message says which.
    """
    name, way_out = (
        f"the release {digest[:12]}…",
        "fetch it again from the artifact store, or package the version again",
    )
    actual = hash_file(file)
    if actual != digest:
        raise Refusal(
            name,
            f"was changed: its bytes have SHA-256 {actual[:12]}…",
            limit=f"{digest[:12]}…, its name",
            way_out=way_out,
        )
    if not signature.is_file():
        raise Refusal(
            name,
            "has no signature",
            limit=f"{digest[:12]}….bento.sig beside the file",
            way_out="`perch package VERSION` signs it",
        )
    signer = _named_key(signature)
    if signer is None:
        raise Refusal(name, "its signature cannot be read", limit="a Sigstore bundle in JSON", way_out=way_out)
    trusted = next((file for file in public_keys.values() if _key_hash(file) == signer), None)
    if trusted is None:
        raise Refusal(
            name,
            f"is signed with the key {signer[:_KEY_ID_DIGITS]}, which is not trusted here",
            limit=f"trusted: {', '.join(public_keys)}",
            way_out="if you know that key, name its public half with --public-key; else find out who signed this",
        )
    try:
        _verify(file, signature, trusted)
    except Exception as error:  # what a broken signature makes the library raise is not all documented
        raise Refusal(
            name,
            f"its signature does not fit it: {error or type(error).__name__}",
            limit=f"a signature over this very file by the key {signer[:_KEY_ID_DIGITS]}",
            way_out=way_out,
        ) from error
    return signer[:_KEY_ID_DIGITS]


def _verify(file: Path, signature: Path, public_key: Path) -> None:
    from model_signing import verifying

    logging.getLogger("model_signing").setLevel(logging.ERROR)
    config = verifying.Config()  # type: ignore[no-untyped-call]
    config.use_elliptic_key_verifier(public_key=public_key).verify(file, signature)


def _named_key(signature: Path) -> str | None:
    """Hash of the public key that a signature says it was made with; a claim, until it is verified."""
    try:
        bundle = json.loads(signature.read_text(encoding="utf-8"))
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, TypeError):
        return None
    return hint if isinstance(hint, str) else None


def _key_hash(public_key: Path) -> str:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(public_key.read_bytes())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError(f"it is a {type(key).__name__}")
    except (OSError, ValueError) as error:
        raise Refusal(
            f"the public key {public_key}",
            f"cannot be used: {error}",
            limit="a public key on a NIST curve, in PEM",
            way_out="`perch keys` lists those made here",
        ) from error
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()
