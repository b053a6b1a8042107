"""Signatures over releases: each way in which one is not good is refused, and named."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pipelines.core.file_hash import hash_file
from pipelines.core.release_signing import find_public_keys, key_id, sign_file, verify_file
from pipelines.errors import Refusal


def write_pair(folder: Path, name: str, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@dataclass(frozen=True)
class Signed:
    file: Path
    signature: Path
    digest: str
    private: Path
    public: Path

    def verify(self, *public_keys: Path) -> str:
        return verify_file(self.file, self.digest, self.signature, find_public_keys(public_keys or [self.public]))


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    private, public = write_pair(tmp_path, "signer")
    content = tmp_path / "content"
    content.write_bytes(bytes(range(256)) * 100)
    digest = hash_file(content)
    file = content.rename(tmp_path / f"{digest}.bento")
    signature = tmp_path / f"{digest}.bento.sig"
    sign_file(file, signature, private)
    return Signed(file, signature, digest, private, public)


def test_verify_file__as_signed__names_the_key(signed: Signed) -> None:
    assert signed.verify() == key_id(signed.public)


def test_verify_file__by_hand__is_what_the_upstream_command_does(signed: Signed) -> None:
    """The format is model-signing's own: nobody needs Perch to check a release."""
    command = Path(sys.executable).parent / "model_signing"
    arguments = ["--signature", signed.signature, "--public_key", signed.public]
    done = subprocess.run([command, "verify", "key", signed.file, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("position", [0, 12_800, 25_599], ids=["first", "middle", "last"])
def test_verify_file__one_bit_flipped__says_that_the_file_was_changed(signed: Signed, position: int) -> None:
    content = bytearray(signed.file.read_bytes())
    content[position] ^= 1
    signed.file.write_bytes(content)
    with pytest.raises(Refusal, match="was changed: its bytes have SHA-256"):
        signed.verify()


def test_verify_file__changed_and_renamed_to_its_new_digest__does_not_fit_the_signature(signed: Signed) -> None:
    """Who can write to the store can name a file as they like; they cannot sign it."""
    signed.file.write_bytes(b"other bytes")
    with pytest.raises(Refusal, match="its signature does not fit it"):
        verify_file(signed.file, hash_file(signed.file), signed.signature, find_public_keys([signed.public]))


def test_verify_file__without_signature__says_so(signed: Signed) -> None:
    signed.signature.unlink()
    with pytest.raises(Refusal, match="has no signature"):
        signed.verify()


def test_verify_file__signed_with_another_key__names_it_and_the_trusted_ones(signed: Signed, tmp_path: Path) -> None:
    _, stranger = write_pair(tmp_path, "stranger")
    with pytest.raises(Refusal) as refusal:
        signed.verify(stranger)
    assert f"is signed with the key {key_id(signed.public)}, which is not trusted here" in str(refusal.value)
    assert f"trusted: {key_id(stranger)}" in str(refusal.value)


def test_verify_file__two_trusted_keys__takes_either(signed: Signed, tmp_path: Path) -> None:
    _, successor = write_pair(tmp_path, "successor")
    assert signed.verify(successor, signed.public) == key_id(signed.public)


def test_verify_file__forged_with_the_trusted_keys_name__is_refused(signed: Signed, tmp_path: Path) -> None:
    """The signature says who made it; that is a claim."""
    forger, _ = write_pair(tmp_path, "forger")
    hint = json.loads(signed.signature.read_text())["verificationMaterial"]
    signed.signature.unlink()
    sign_file(signed.file, signed.signature, forger)
    forged = json.loads(signed.signature.read_text())
    signed.signature.write_text(json.dumps(forged | {"verificationMaterial": hint}))
    with pytest.raises(Refusal, match="its signature does not fit it"):
        signed.verify()


@pytest.mark.parametrize(
    "text",
    ["", "not JSON", "[]", "{}", '{"verificationMaterial": {"publicKey": {"hint": 7}}}', "\xff\xfe"],
    ids=["empty", "text", "list", "no key", "odd key", "bytes"],
)
def test_verify_file__unreadable_signature__says_so(signed: Signed, text: str) -> None:
    signed.signature.write_bytes(text.encode("latin-1"))
    with pytest.raises(Refusal, match="its signature cannot be read"):
        signed.verify()


@pytest.mark.parametrize("part", ["mediaType", "dsseEnvelope"])
def test_verify_file__part_of_the_signature_missing__is_refused(signed: Signed, part: str) -> None:
    bundle = json.loads(signed.signature.read_text())
    del bundle[part]
    signed.signature.write_text(json.dumps(bundle))
    with pytest.raises(Refusal, match="its signature does not fit it"):
        signed.verify()


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_sign_file__other_nist_curves__are_taken(signed: Signed, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    private, public = write_pair(tmp_path, "other", curve)
    signed.signature.unlink()
    sign_file(signed.file, signed.signature, private)
    assert signed.verify(public) == key_id(public)


def test_sign_file__with_a_key_that_is_none__is_refused(signed: Signed, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="cannot be used"):
        sign_file(signed.file, tmp_path / "signature", signed.public)


def test_find_public_keys__folder__gives_every_key_in_it(signed: Signed, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    shutil.copy(signed.public, folder)
    _, second = write_pair(folder, "second")
    assert find_public_keys([folder]).keys() == {key_id(signed.public), key_id(second)}


def test_find_public_keys__no_key__is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="none is named"):
        find_public_keys([])
    with pytest.raises(Refusal, match="there are none in"):
        find_public_keys([tmp_path])
    with pytest.raises(Refusal, match="No such file"):
        find_public_keys([tmp_path / "absent.pub"])


def test_find_public_keys__another_kind_of_key__is_refused(tmp_path: Path) -> None:
    """Better when the server is configured than when the first release comes."""
    pem = rsa.generate_private_key(65537, 2048).public_key()
    file = tmp_path / "rsa.pub"
    file.write_bytes(pem.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(Refusal, match="RSAPublicKey"):
        find_public_keys([file])
