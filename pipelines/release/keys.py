"""Key pairs that sign releases: made here, kept in `<home>/keys`, never overwritten."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipelines.core.release_signing import PUBLIC_SUFFIX, key_id
from pipelines.errors import Refusal
from pipelines.settings import Settings

PRIVATE_SUFFIX = ".pem"
DEFAULT_NAME = "release"


@dataclass(frozen=True)
class KeyPair:
    """A key that can sign.

    Attributes:
        private: its file; who can read it can sign.
        public: the file that servers trust.
        key_id: known by both.
    """

    private: Path
    public: Path
    key_id: str


def create_key(settings: Settings, name: str = DEFAULT_NAME) -> KeyPair:
    """Make a pair of keys on the curve P-256.

    Raises:
        Refusal: the name is taken, or is none that a file can have.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise Refusal("the key's name", repr(name), limit="letters, digits, dots, dashes", way_out="e.g. --name 2026-b")
    private, public = _files(settings, name)
    settings.keys_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    draft = settings.keys_dir / f".{name}.{os.getpid()}"
    try:
        _write_new(
            draft,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            mode=0o600,
        )
        try:
            os.link(draft, private)  # unlike a rename, it never replaces a key that somebody made just now
        except FileExistsError:
            raise Refusal(
                f"the key {private}",
                "exists",
                limit="a key is never overwritten: releases signed with it would no longer be trusted",
                way_out="choose another name, e.g. `perch keys init --name 2026-b`, and set PERCH_SIGNING_KEY to it",
            ) from None
    finally:
        draft.unlink(missing_ok=True)
    _write_public(private, public)
    return KeyPair(private, public, key_id(public))


def signing_key(settings: Settings, *, make: bool = False) -> tuple[KeyPair, bool]:
    """The key that signs, and whether it was made just now.

    Args:
        settings: `signing_key`, or the default key in the home.
        make: make the default one where there is none; one that was named is never made.

    Raises:
        Refusal: there is none, or it cannot be used.
    """
    if settings.signing_key is not None:
        private, public = settings.signing_key, settings.signing_key.with_suffix(PUBLIC_SUFFIX)
    else:
        private, public = _files(settings, DEFAULT_NAME)
        if make and not private.is_file():
            return create_key(settings), True
    if not private.is_file():
        raise Refusal(
            "the signing key",
            f"{private} does not exist",
            limit="a release is signed",
            way_out="`perch keys init` makes a key, PERCH_SIGNING_KEY names one made elsewhere",
        )
    if not public.is_file():
        public = _keep_public(settings, private)
    return KeyPair(private, public, key_id(public)), False


def list_keys(settings: Settings) -> list[KeyPair]:
    """The pairs in the home, by name; the public half of a pair whose making was cut off is written now."""
    pairs = []
    for private in sorted(settings.keys_dir.glob(f"[!.]*{PRIVATE_SUFFIX}")):
        public = private.with_suffix(PUBLIC_SUFFIX)
        if not public.is_file():
            _write_public(private, public)
        pairs.append(KeyPair(private, public, key_id(public)))
    return pairs


def _files(settings: Settings, name: str) -> tuple[Path, Path]:
    # Not `with_suffix`, which would take a dot in the name for the beginning of a suffix.
    return settings.keys_dir / f"{name}{PRIVATE_SUFFIX}", settings.keys_dir / f"{name}{PUBLIC_SUFFIX}"


def _keep_public(settings: Settings, private: Path) -> Path:
    """The public half of a key from elsewhere, whose folder may be read-only."""
    draft = settings.keys_dir / f".public.{os.getpid()}"
    settings.keys_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        _write_public(private, draft)
        return draft.rename(settings.keys_dir / f"{key_id(draft)}{PUBLIC_SUFFIX}")
    finally:
        draft.unlink(missing_ok=True)


def _write_public(private: Path, public: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(private.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise Refusal(
            f"the signing key {private}",
            f"cannot be read: {error}",
            limit="an unencrypted private key in PEM",
            way_out="`perch keys init --name NAME` makes one",
        ) from error
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    draft = public.with_name(f".{public.name}.{os.getpid()}")
    try:
        _write_new(draft, pem, mode=0o644)
        draft.replace(public)
    finally:
        draft.unlink(missing_ok=True)


def _write_new(file: Path, content: bytes, *, mode: int) -> None:
    file.unlink(missing_ok=True)  # of a process that was killed and had the same id
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
